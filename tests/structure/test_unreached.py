"""Layers that the example does not reach: what could feed them stays whole, what cannot may go."""

import pytest
import torch
import transformers
from torch import nn

from obc_tools import Forward, check_plan, find_groups, make_plan, prune, score_groups


class Experts(nn.Module):
    """A mixture of experts, of which each row takes the one that the router likes most."""

    def __init__(self):
        super().__init__()
        self.first, self.stem, self.gate = nn.Linear(5, 9), nn.Linear(9, 12), nn.Linear(5, 4, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 6)) for _ in range(4))
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        picked, h = self.gate(x).argmax(-1), self.stem(self.first(x).relu()).relu()
        y = h.new_zeros(len(h), 6)
        for number, expert in enumerate(self.experts):
            rows = (picked == number).nonzero().flatten()
            if len(rows):
                y = y.index_add(0, rows, expert(h[rows]))
        return self.out(y)


class Resolution(nn.Module):
    """Another head for large images, of which the flattened features are read."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(nn.Conv2d(8, 7, 1), nn.ReLU())
        self.small, self.large = nn.Linear(7 * 16, 3), nn.Linear(7 * 36, 3)

    def forward(self, x):
        h = self.body(self.stem(x).relu()).flatten(1)
        return self.small(h) if x.shape[-1] == 4 else self.large(h)


class Optional(nn.Module):
    """A condition that may be given, read beside the hidden channels, and a token in place of masked rows."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 2)
        self.join = nn.Linear(16, 8)
        self.token = nn.Parameter(torch.randn(6))
        self.spare = nn.Parameter(torch.randn(8))

    def forward(self, x, condition=None, mask=None):
        h = self.first(x).relu()
        if condition is not None:
            h = self.join(torch.cat([h, self.first(condition)], -1))
        h = self.second(h).relu()
        if mask is not None:
            h = torch.where(mask[:, None], self.token, h)
        return self.out(h)


class Exit(nn.Module):
    """Blocks of which the last ones run for hard examples alone; their hidden channels are their own."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(5, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 11), nn.ReLU(), nn.Linear(11, 8)) for _ in range(3))
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        h = self.stem(x)
        for number, block in enumerate(self.blocks):
            if number < 2 or x.mean() > 1:
                h = h + block(h.relu())
        return self.out(h)


def few(model, x):
    """Return rows that take the first two experts."""
    return x[model.gate(x).argmax(-1) < 2][:6]


CASES = {
    "experts": (
        Experts,
        lambda m, x: few(m, x),
        lambda m, x: m(x),
        {"first.out", "experts.0.0.out", "experts.1.0.out"},
    ),
    "exit": (Exit, lambda m, x: x, lambda m, x: m(x + 5), {"blocks.0.0.out", "blocks.1.0.out"}),
    "optional": (Optional, lambda m, x: x, lambda m, x: m(x, condition=x, mask=x[:, 0] > 0), set()),
}


@pytest.mark.parametrize("name", CASES)
def test_other_inputs_run_through_the_pruned_network(name):
    make, example, other, prunable = CASES[name]
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(64, 5)
    groups = find_groups(model, example(model, x))
    assert {str(group.root) for group in groups if group.prunable} == prunable
    assert any("which the example inputs do not reach" in (group.kept_whole or "") for group in groups)
    plan = make_plan(score_groups(model, groups, "l1"), ratio=0.3, scope="local")
    assert not prunable or check_plan(model, plan, example(model, x)).ok
    assert other(prune(model, plan), x).shape == other(model, x).shape


def two_ways(model, x):
    """Run a network whose own functions name none of its parts."""
    h = model.stem(x).relu()
    return model.out(model.plain(h) if x.mean() < 1 else model.rare(h))


class Bare(nn.Module):
    def __init__(self, function=None):
        super().__init__()
        self.stem, self.plain, self.rare = nn.Linear(5, 12), nn.Linear(12, 8), nn.Linear(12, 8)
        self.out, self.function = nn.Linear(8, 3), function

    def forward(self, x):
        return self.function(self, x)


class Calling(Bare):
    def forward(self, x):
        return two_ways(self, x)


@pytest.mark.parametrize("way", ["kept", "called", "closed over", "Forward"])
def test_parts_that_free_functions_name_may_run(way):
    torch.manual_seed(0)
    kept = (lambda inner: lambda model, x: inner(model, x))(two_ways) if way == "closed over" else two_ways
    model, x = Calling() if way == "called" else Bare(kept), torch.zeros(4, 5)
    if way == "Forward":
        model.function = None
    groups = find_groups(model, Forward(two_ways, x) if way == "Forward" else x)
    whole = {str(group.root) for group in groups if "may meet layer 'rare" in (group.kept_whole or "")}
    assert whole == {"stem.out", "plain.out"}


def test_a_head_that_reads_flattened_features_keeps_them():
    torch.manual_seed(0)
    model, x = Resolution().eval(), torch.randn(2, 3, 4, 4)
    groups = {str(group.root): group for group in find_groups(model, x)}
    assert groups["stem.out"].prunable
    assert groups["body.0.out"].kept_whole == "may meet layer 'large', which the example inputs do not reach"
    plan = make_plan(score_groups(model, tuple(groups.values()), "l1"), ratio=0.3, scope="local")
    assert prune(model, plan)(torch.randn(2, 3, 6, 6)).shape == (2, 3)


def test_examples_that_reach_all_free_all():
    torch.manual_seed(0)
    model, x = Experts().eval(), torch.randn(64, 5)
    assert {str(group.root) for group in find_groups(model, x) if group.prunable} > {"stem.out", "first.out"}


def test_a_token_for_masked_patches_keeps_what_it_may_replace():
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Dinov2Config(**sizes, intermediate_size=24)
    model, x = transformers.Dinov2ForImageClassification(config).eval(), torch.randn(2, 3, 16, 16)
    groups = find_groups(model, x)
    reasons = [group.kept_whole for group in groups if "mask_token" in (group.kept_whole or "")]
    assert reasons == ["may meet layer 'dinov2.embeddings.mask_token', which the example inputs do not reach"]
    plan = make_plan(score_groups(model, groups, "l1"), ratio=0.3, scope="local")
    mask = torch.tensor([[True, False, False, True]] * 2)
    assert plan.channels_removed and prune(model, plan).dinov2(x, bool_masked_pos=mask)[0].shape == (2, 5, 16)
