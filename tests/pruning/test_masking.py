"""The masked network by operations: norms that no table knows against pruning by hand, and sabotage that must show."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from obc_tools import PruningPlan, check_plan, find_groups, prune
from obc_tools.pruning.check import WRONG
from obc_tools.pruning.masking import Masking


def channels_last(run):
    return lambda x, w, b: run(x.permute(0, 2, 3, 1), w, b).permute(0, 3, 1, 2)


def column(vector):
    return vector[:, None, None]


def by_mean_and_variance(x, w, b):
    return column(w) * (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt() + column(
        b
    )


def of_convnext(x, w, b):
    mean = x.mean(1, keepdim=True)
    spread = (x - mean).pow(2).mean(1, keepdim=True)
    return column(w) * ((x - mean) / torch.sqrt(spread + 1e-6)) + column(b)


def instance_norm_by_hand(x, w, b):
    spread, mean = torch.var_mean(x, (2, 3), keepdim=True)
    return (x - mean) * torch.rsqrt(spread + 1e-5) * column(w) + column(b)


def global_response(x, w, b):
    length = x.norm(dim=(2, 3), keepdim=True)
    return x + column(b) + column(w) * x * length / (length.mean(1, keepdim=True) + 1e-6)


def groups_by_hand(x, w, b):
    blocks = x.reshape(len(x), 4, -1)
    spread, mean = torch.var_mean(blocks, 2, correction=0, keepdim=True)
    return ((blocks - mean) / (spread + 1e-5).sqrt()).view(x.shape) * column(w) + column(b)


NORMS = {
    "LayerNorm by mean and variance": by_mean_and_variance,
    "LayerNorm2d as ConvNeXt writes it": of_convnext,
    "F.layer_norm behind permute": channels_last(lambda x, w, b: F.layer_norm(x, (x.shape[-1],), w, b)),
    "F.layer_norm of whole examples": lambda x, w, b: F.layer_norm(x, x.shape[1:]) * column(w) + column(b),
    "std_mean": channels_last(lambda x, w, b: (x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + 1e-5) * w + b),
    "RMSNorm by mean of squares": channels_last(lambda x, w, b: x * (x.pow(2).mean(-1, True) + 1e-6).rsqrt() * w + b),
    "F.rms_norm": channels_last(lambda x, w, b: F.rms_norm(x, (x.shape[-1],), w, 1e-6) + b),
    "F.group_norm": lambda x, w, b: F.group_norm(x, 4, w, b),
    "F.group_norm without weights": lambda x, w, b: F.group_norm(x, 2) * column(w) + column(b),
    "group norm by hand": groups_by_hand,
    "F.normalize": lambda x, w, b: F.normalize(x.sigmoid(), dim=1) * column(w) + column(b),
    "length by sum of squares": lambda x, w, b: x.exp() / x.exp().square().sum(1, keepdim=True).sqrt() * column(w),
    "share of the largest": lambda x, w, b: x.exp() / x.exp().amax(1, keepdim=True) * column(w),
    "share of the smallest": lambda x, w, b: (x / (x.min(1, keepdim=True).values.abs() + 1)) * column(w),
    "softmax": lambda x, w, b: x.softmax(1) * column(w) + column(b),
    "softmax by logsumexp": lambda x, w, b: (x - x.logsumexp(1, keepdim=True)).exp() * column(w) + column(b),
    "log_softmax": lambda x, w, b: -F.log_softmax(x, 1) * column(w),
    "instance norm by hand": instance_norm_by_hand,
    "F.instance_norm": lambda x, w, b: F.instance_norm(x, None, None, w, b),
    "global response norm": global_response,
    "gate of all channels": lambda x, w, b: x * (x * column(w)).mean((1, 2, 3), keepdim=True).sigmoid(),
    "running sum": lambda x, w, b: x.cumsum(1) * column(w) + column(b),
}


class Norm(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(16) + 0.5), nn.Parameter(torch.randn(16))
        self.run = run

    def forward(self, x):
        return self.run(x, self.weight, self.bias)


KEPT = (0, 2, 3, 5, 6, 7, 8, 9, 10, 12, 14, 15)


def case(name):
    """Return a network around a norm, its input, and a plan that removes four channels, which no rule held back."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), Norm(NORMS[name]), nn.ReLU(), nn.Conv2d(16, 3, 1)).double().eval()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    groups = [replace(g, kept_whole=None, blocks=4 if "roup" in name else 1) if g.root.layer == "0" else g
              for g in find_groups(model, x)]  # fmt: skip
    kept = [KEPT if group.root.layer == "0" else tuple(range(group.width)) for group in groups]
    kept = [(0, 1, 3, 4, 5, 7, 8, 9, 11, 12, 13, 15) if len(k) == 12 and "roup" in name else k for k in kept]
    return model, x, PruningPlan(tuple(groups), tuple(kept))


@pytest.mark.parametrize("name", NORMS)
def test_norms_written_by_hand_see_the_kept_alone(name):
    model, x, plan = case(name)
    kept = next(list(k) for k in plan.kept if len(k) == 12)
    hidden = F.conv2d(x, model[0].weight[kept], model[0].bias[kept])
    hidden = NORMS[name](hidden, model[1].weight[kept], model[1].bias[kept])
    by_hand = F.conv2d(hidden.relu(), model[3].weight[:, kept], model[3].bias)
    with torch.no_grad(), Masking(model, plan) as masking:
        masked = model(x)
    torch.testing.assert_close(masked, by_hand.detach(), rtol=0, atol=1e-11)
    torch.testing.assert_close(prune(model, plan)(x), by_hand, rtol=0, atol=1e-11)
    assert not masking.doubts and check_plan(model, plan, x).error_of("pruned = masked") < 1e-11


def rotated(tensor, dim=0):
    return nn.Parameter(tensor.detach().roll(1, dim))


def permute_consumer(pruned):
    pruned[3].weight = rotated(pruned[3].weight, 1)


def swap_weights(pruned):
    pruned[1].weight = rotated(pruned[1].weight)


def count_the_removed(pruned):
    pruned[1].register_forward_hook(lambda norm, taken, out: out * (12 / 16) ** 0.5)


def take_another_channel(pruned):
    pruned[0].weight = rotated(pruned[0].weight)


SABOTAGE = {"3": permute_consumer, "1": swap_weights, "": count_the_removed, "0": take_another_channel}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("where", SABOTAGE)
def test_a_sabotaged_network_is_called_wrong(name, where, monkeypatch):
    def wrong(model, plan):
        pruned = prune(model, plan)
        SABOTAGE[where](pruned)
        return pruned

    monkeypatch.setattr("obc_tools.pruning.check.shrink", wrong)
    model, x, plan = case(name)
    check = check_plan(model, plan, x)
    found = check.findings[0]
    assert check.verdict == found.verdict == WRONG and found.error > 1e-4
    assert found.where == f"first differs layer '{where or 1}'"


def test_every_function_of_single_numbers_is_followed():
    """torch tags `hardswish` and others as nothing that could be asked for: each has to be in the table."""
    functions = [F.hardswish, F.hardsigmoid, F.logsigmoid, F.mish, F.gelu, F.selu, F.softshrink, F.rrelu, F.threshold]

    class Net(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.first, self.last, self.function = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 3, 1), function

        def forward(self, x):
            return self.last(self.function(self.first(x)))

    functions[-1] = partial(F.threshold, threshold=0.1, value=0.5)
    for function in functions:
        model, images = Net(function).double().eval(), torch.randn(2, 2, 4, 4).double()
        plan = PruningPlan.whole(find_groups(model, images)).choose(("first", "out"), remove=[1, 4])
        assert check_plan(model, plan, images).ok, function
