"""Norms written by hand: statistics over channels that are given back to the same channels, and those that are not."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops.misc import FrozenBatchNorm2d

from obc_tools import LayerAxis, check_plan, explain, find_groups, make_plan, prune, score_groups

EPS = 1e-3
SUMMED = "is summed up or compared over its channels"


def root_mean_square(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def root_mean_square_unsqueezed(x):
    return x / (x * x).mean(2).add_(EPS).sqrt()[:, :, None]


def root_mean_square_expanded(x):
    return torch.rsqrt(EPS + torch.square(x).mean(dim=-1, keepdim=True)).expand_as(x) * x


def centred(x):
    centre = x - x.mean(-1, keepdim=True)
    return centre / (centre.pow(2).mean(-1, keepdim=True) + EPS).sqrt()


def variance(x):
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + EPS)


def variance_and_mean(x):
    var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return x.sub(mean).mul((var + EPS).rsqrt())


def moments(x):
    mean, square = x.mean(-1, keepdim=True), (x**2).mean(-1, keepdim=True)
    return (x - mean) * (square - mean * mean + EPS) ** -0.5


def by_length(x):
    return x / x.pow(2).sum(-1, keepdim=True).sqrt().clamp(min=1e-12)


def by_linalg(x):
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def by_largest(x):
    return x / x.abs().amax(-1, keepdim=True)


def all_at_once(x):
    return (x - x.mean((1, 2), keepdim=True)) / (x.var((1, 2), correction=0, keepdim=True) + EPS).sqrt()


ORACLES = {
    **dict.fromkeys(
        (root_mean_square, root_mean_square_unsqueezed, root_mean_square_expanded),
        lambda x: F.rms_norm(x, x.shape[-1:], eps=EPS),
    ),
    **dict.fromkeys((centred, variance, variance_and_mean, moments), lambda x: F.layer_norm(x, x.shape[-1:], eps=EPS)),
    **dict.fromkeys((by_length, by_linalg), lambda x: F.normalize(x, dim=-1)),
    by_largest: lambda x: torch.stack([row / max(map(abs, row.tolist())) for row in x.flatten(0, 1)]).view(x.shape),
    all_at_once: lambda x: F.group_norm(x.transpose(1, 2), 1, eps=EPS).transpose(1, 2),
}


class Normalised(nn.Module):
    """A stream of ten channels that is normalised by a function and multiplied by a gain."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.before, self.after = norm, nn.Linear(6, 10), nn.Linear(10, 4)
        self.gain = nn.Parameter(torch.rand(10) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.norm(self.before(x)) * self.gain)


def made(norm, build=Normalised):
    torch.manual_seed(0)
    return build(norm).double().eval(), torch.randn(3, 5, 6, dtype=torch.float64)


def planned(model, inputs):
    groups = find_groups(model, inputs)
    return make_plan(score_groups(model, groups, "random"), ratio=0.4, scope="local")


@pytest.mark.parametrize("norm", ORACLES, ids=lambda norm: norm.__name__)
def test_a_norm_takes_its_statistics_over_the_kept_channels(norm):
    model, inputs = made(norm)
    plan = planned(model, inputs)
    pruned = prune(model, plan)
    kept = list(plan.selection(LayerAxis("before", "out")))
    assert 1 < len(kept) < 10
    hidden = F.linear(inputs, model.before.weight[kept], model.before.bias[kept])
    expected = F.linear(ORACLES[norm](hidden) * model.gain[kept], model.after.weight[:, kept], model.after.bias)
    torch.testing.assert_close(pruned(inputs), expected, rtol=0, atol=1e-10)
    check_plan(model, plan, inputs).raise_if_failed()


class Pictures(nn.Module):
    """A norm over the channels of pictures, between convolutions, on a residual stream."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.stem, self.block, self.head = norm, nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
        self.weight, self.bias = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        mean = x.mean(1, keepdim=True)
        scaled = (x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + EPS)
        x = x + self.block(self.weight[:, None, None] * scaled + self.bias[:, None, None])
        return self.head(x.mean((2, 3)))


def test_channels_of_pictures_are_normalised_by_hand():
    model, _ = made(None, Pictures)
    inputs = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    plan = planned(model, inputs)
    kept = list(plan.selection(LayerAxis("stem", "out")))
    x = F.conv2d(inputs, model.stem.weight[kept], model.stem.bias[kept])
    scaled = F.layer_norm(x.movedim(1, -1), (len(kept),), model.weight[kept], model.bias[kept], EPS).movedim(-1, 1)
    x = x + F.conv2d(scaled, model.block.weight[kept][:, kept], model.block.bias[kept])
    expected = F.linear(x.mean((2, 3)), model.head.weight[:, kept], model.head.bias)
    assert len(kept) < 8
    torch.testing.assert_close(prune(model, plan)(inputs), expected, rtol=0, atol=1e-10)


def added(x):
    """Add to a part of a tensor, in place."""
    both = torch.zeros(3, 5, 2, dtype=x.dtype)
    both[..., 1:].add_(x)
    return both.sum(-1, keepdim=True)


class Pooled(nn.Module):
    """Its channels are summed up, and the sum goes on in a way of its own; all layers run."""

    def __init__(self, use):
        super().__init__()
        self.use, self.attention = use, nn.MultiheadAttention(1, 1)
        self.before, self.other = nn.Linear(6, 10), nn.Linear(6, 10)
        self.after, self.one = nn.Linear(10, 4), nn.Linear(1, 4)

    def forward(self, x: Tensor) -> tuple:
        other, one = self.other(x), x[..., :1]
        return self.use(self, self.before(x), other), self.after(other), self.one(one), self.attention(one, one, one)


@pytest.mark.parametrize(
    "use",
    [
        lambda model, x, other: model.one(x.mean(-1, keepdim=True)),
        lambda model, x, other: (model.after(x), x.mean(-1)),
        lambda model, x, other: (model.after(x), x.pow(2).mean(-1, keepdim=True).sqrt()),
        lambda model, x, other: model.after(x * x.mean(-1, keepdim=True).sigmoid()),
        lambda model, x, other: model.after(other / x.pow(2).mean(-1, keepdim=True)),
        lambda model, x, other: model.after(x - x.mean(-1, keepdim=True)) + x.mean(-1, keepdim=True),
        lambda model, x, other: model.one(F.rms_norm(x.mean(-1), (5,))[..., None]),
        lambda model, x, other: model.one(model.attention(*[x.mean(-1)[..., None]] * 3)[0]),
        lambda model, x, other: model.after(added(x.mean(-1, keepdim=True)) * x),
        lambda model, x, other: model.one(x.max(-1, keepdim=True).values),
        lambda model, x, other: model.after(x * (x.mean(-1, keepdim=True) > 0)),
        lambda model, x, other: model.after(x * torch.cat([x.mean(-1, keepdim=True)] * 2, -1).sum(-1, keepdim=True)),
    ],
)
def test_what_is_summed_up_for_other_ends_stays_whole(use):
    model, inputs = made(use, Pooled)
    assert explain(find_groups(model, inputs)).why_whole("before") == SUMMED


def test_a_number_made_of_the_width_keeps_it():
    def by_root(model, x, other):
        return model.after(x / (x.pow(2).sum(-1, keepdim=True).sqrt() / x.shape[-1] ** 0.5))

    model, inputs = made(by_root, Pooled)
    assert explain(find_groups(model, inputs)).why_whole("before") == "its width is a number in root in layer ''"


def test_a_variance_is_left_with_two_channels():
    model, inputs = made(lambda x: x / x.var(-1, keepdim=True).sqrt())
    (group,) = (group for group in find_groups(model, inputs) if group.prunable)
    assert group.least == 2


class Frozen(nn.Module):
    """A batch norm whose numbers are buffers, with a forward of its own."""

    def __init__(self, width):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.running_mean[:, None, None]) * (self.weight / (self.running_var + 1e-5).sqrt()).view(
            1, -1, 1, 1
        ) + self.bias.reshape(1, -1, 1, 1)


@torch.no_grad()
@pytest.mark.parametrize("kind", [FrozenBatchNorm2d, Frozen])
def test_frozen_batch_norms_follow(kind):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, bias=False), kind(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)
    model, inputs = nn.Sequential(*layers).double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for buffer in model.buffers():
        buffer.uniform_(0.5, 1.5)
    plan, norm = planned(model, inputs), model[1]
    kept = list(plan.selection(LayerAxis("0", "out")))
    pruned = prune(model, plan)
    assert 0 < len(kept) < 8 and all(buffer.shape == (len(kept),) for buffer in pruned[1].buffers())
    given = (buffer[kept] for buffer in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    hidden = F.batch_norm(F.conv2d(inputs, model[0].weight[kept]), *given, eps=1e-5).relu().flatten(1)
    expected = F.linear(hidden, model[4].weight.view(4, 8, 16)[:, kept].flatten(1), model[4].bias)
    torch.testing.assert_close(pruned(inputs), expected, rtol=0, atol=1e-10)
    check_plan(model, plan, inputs).raise_if_failed()


@pytest.mark.parametrize(
    ("length", "kept"),
    [
        (lambda x: torch.norm(x, 2, dim=-1, keepdim=True), None),
        (lambda x: x.norm(p=1, dim=-1, keepdim=True), None),
        (lambda x: F.pairwise_distance(x, x.flip(0)).unsqueeze(-1), None),
        (lambda x: torch.linalg.vector_norm(x, -math.inf, -1, keepdim=True), SUMMED),
    ],
)
def test_lengths_over_channels(length, kept):
    model, inputs = made(lambda x: torch.cat([x, length(x).expand(-1, -1, 2)], -1))
    model.gain, model.after = nn.Parameter(torch.rand(1, dtype=torch.float64)), nn.Linear(12, 4).double()
    plan = planned(model, inputs)
    assert plan.groups[0].kept_whole == kept and check_plan(model, plan, inputs).ok
