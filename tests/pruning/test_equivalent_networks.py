"""Equivalent Pruning of what users bring: frozen layers, checkpointing, methods, shared layers, tied weights."""

import copy

import pytest
import torch
from networks import Tied
from torch import nn
from torch.utils.checkpoint import checkpoint

from obc_tools import EquivalentModel, PruningPlan, find_groups, prune


class Net(nn.Module):
    """Two blocks that may be checkpointed, a layer under two names, a method beside forward."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.reentrant = reentrant
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)) for _ in range(2))
        self.again, self.head = self.blocks[0][2], nn.Linear(6, 3)

    def encode(self, x):
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x

    def forward(self, x):
        return self.head(self.encode(x))


class Embedded(nn.Module):
    """Tokens, and a head of the same weight."""

    def __init__(self):
        super().__init__()
        self.tokens, self.mid, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        x = self.tokens(x)
        return self.head(x + self.mid(x).tanh())


def halved(model, x):
    groups = find_groups(model, x)
    kept = [tuple(range(0, group.width, 2 if group.prunable else 1)) for group in groups]
    return PruningPlan(groups, tuple(kept))


def case(model, x=None):
    torch.manual_seed(0)
    x = torch.randn(4, 6, dtype=torch.float64) if x is None else x
    plan = halved(model, x)
    assert plan.channels_removed
    return EquivalentModel(model, plan), prune(model, plan), x


def disturb(equivalent):
    with torch.no_grad():
        for parameter in equivalent.mixed.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant):
    plain, _, x = case(Net().double())
    disturb(plain)
    checkpointed = copy.deepcopy(plain)
    checkpointed.skeleton.reentrant = reentrant
    for model in (plain, checkpointed):
        model(x.clone().requires_grad_()).square().sum().backward()
    for ours, theirs in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-10)
    merged = checkpointed.merge()
    assert merged.again is merged.blocks[0][2]
    merged.reentrant = None
    torch.testing.assert_close(merged(x), plain(x), rtol=0, atol=1e-10)


def test_methods_attributes_and_layers_run_on_the_present_weights():
    equivalent, _, x = case(Net().double())
    equivalent(x).sum().backward()
    disturb(equivalent)
    merged = equivalent.merge()
    torch.testing.assert_close(equivalent.encode(x), merged.encode(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(equivalent.blocks[0][0](x), merged.blocks[0][0](x), rtol=0, atol=1e-10)
    assert equivalent.reentrant is None and not hasattr(equivalent, "missing")
    assert set(equivalent.state_dict()) == set(copy.deepcopy(equivalent).state_dict())


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parameters_stay_what_they_are(frozen):
    model = Net().double()
    getattr(model.blocks[0][0], frozen).requires_grad_(False)
    equivalent, naive, x = case(model)
    optimizer = torch.optim.SGD([p for p in equivalent.parameters() if p.requires_grad], lr=0.1)
    equivalent(x).square().sum().backward()
    optimizer.step()
    ours, theirs = equivalent.merge().blocks[0][0], naive.blocks[0][0]
    other = "bias" if frozen == "weight" else "weight"
    assert not getattr(ours, frozen).requires_grad and getattr(ours, other).requires_grad
    assert torch.equal(getattr(ours, frozen), getattr(theirs, frozen))
    assert not torch.equal(getattr(ours, other), getattr(theirs, other))


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_tied_weights_share_one_map_and_are_merged_tied(kind):
    model = Tied().double() if kind == "linear" else Embedded().double()
    equivalent, naive, x = case(model, None if kind == "linear" else torch.arange(8).view(2, 4))
    torch.testing.assert_close(equivalent(x), naive(x), rtol=0, atol=1e-12)
    disturb(equivalent)
    merged = equivalent.merge()
    first, second = (merged.second, merged.third) if kind == "linear" else (merged.tokens, merged.head)
    assert first.weight is second.weight
    torch.testing.assert_close(merged(x), equivalent(x), rtol=0, atol=1e-12)
    assert (merged(x) - naive(x)).abs().max() > 1e-6
    if kind == "linear":
        assert equivalent.mixed_layers["second"].compressor is equivalent.mixed_layers["third"].compressor
