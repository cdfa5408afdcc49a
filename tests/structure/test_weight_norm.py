"""Weights that are learned by length and direction: pruned, scored, trained, saved as the same weights are plain."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from obc_tools import (
    EquivalentModel,
    check_plan,
    cost_model,
    find_groups,
    jacobian_products,
    load_pruned,
    make_plan,
    prune,
    prune_to,
    save_pruned,
    score_groups,
)
from obc_tools.scoring.jtj import dense_jtj

BATCHES = [(torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(n)).double(), torch.arange(6) % 4)
           for n in range(2)]  # fmt: skip
IMAGES = BATCHES[0][0]


def plain(seed=0):
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 1, groups=2), nn.ReLU(), nn.ConvTranspose2d(12, 6, 3)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 25, 10, bias=False), nn.ReLU(), nn.Linear(10, 4))
    return model.double().eval()


def normed(model, norm, dims=(0, 0, 0, None, 0)):
    for layer, dim in zip((0, 2, 4, 6, 8), dims, strict=True):
        norm(model[layer], dim=dim)
    return model


@pytest.fixture(params=[parametrizations.weight_norm, weight_norm], ids=["parametrized", "by a hook"])
def norm(request):
    return request.param


pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")


def plans(norm, criterion="l2"):
    found = []
    for model in (plain(), normed(plain(), norm)):
        groups = find_groups(model, IMAGES)
        found.append((model, make_plan(score_groups(model, groups, criterion, BATCHES), ratio=0.4, scope="local")))
    return found


@pytest.mark.parametrize("criterion", ["l2", "jacobian", "taylor", ("jacobian", {"rows": "sample"})])
def test_found_scored_and_pruned_as_plain_weights_are(norm, criterion):
    (model, plan), (same, other) = plans(norm, criterion)
    state = copy.deepcopy(same.state_dict())
    assert plan.channels_removed > 8 and [g.root for g in plan.groups] == [g.root for g in other.groups]
    assert plan.kept == other.kept
    pruned = prune(same, other)
    assert torch.allclose(pruned(IMAGES), prune(model, plan)(IMAGES), rtol=1e-10, atol=1e-12)
    assert check_plan(same, other, IMAGES).ok
    assert all(torch.equal(state[name], value) for name, value in same.state_dict().items())
    assert same[0].weight is not None and (hasattr(same[0], "parametrizations") or hasattr(same[0], "weight_g"))
    assert cost_model(same, IMAGES).of(other) == cost_model(model, IMAGES).of(plan)


def test_a_target_is_reached_and_proven(norm):
    same = normed(plain(), norm)
    plan = prune_to(same, IMAGES, BATCHES, speedup=1.5, steps=2, progress=False)
    costs = cost_model(same, IMAGES)
    assert plan.channels_removed and costs.original.macs >= 1.5 * costs.of(plan).macs


def test_equivalent_pruning_trains_and_merges(norm):
    (model, plan), (same, other) = plans(norm)
    outputs = []
    for network, of in ((model, plan), (same, other)):
        equivalent = EquivalentModel(network, of)
        optimizer = torch.optim.SGD(equivalent.parameters(), lr=0.05)
        for images, labels in BATCHES:
            optimizer.zero_grad()
            nn.functional.cross_entropy(equivalent(images), labels).backward()
            optimizer.step()
        merged = equivalent.merge()
        assert torch.allclose(merged(IMAGES), equivalent(IMAGES), rtol=1e-10)
        outputs.append(merged(IMAGES))
    assert torch.allclose(*outputs, rtol=1e-10) and not torch.allclose(outputs[0], prune(model, plan)(IMAGES))


def test_saved_and_loaded_into_a_fresh_network_with_norms(norm, tmp_path):
    _, (same, plan) = plans(norm)
    pruned = prune(same, plan)
    save_pruned(tmp_path / "saved", pruned, plan)
    loaded = load_pruned(tmp_path / "saved", model=normed(plain(1), norm))
    assert torch.equal(loaded.eval()(IMAGES), pruned(IMAGES)) and not any(".original" in n for n in loaded.state_dict())


def test_products_and_jtj_are_those_of_the_plain_weight(norm):
    model, same = plain(), normed(plain(), norm)
    for function in (
        lambda m: jacobian_products(m, BATCHES).scores(),
        lambda m: {0: dense_jtj(m, BATCHES, "2").values},
    ):
        expected, found = function(model), function(same)
        assert expected.keys() == found.keys()
        assert all(torch.allclose(found[key], expected[key], rtol=1e-9) for key in expected)


def test_frozen_weights_stay_frozen(norm):
    same = normed(plain(), norm)
    same[2].requires_grad_(False)
    plan = make_plan(score_groups(same, find_groups(same, IMAGES), "l2"), ratio=0.4, scope="local")
    assert [prune(same, plan)[layer].weight.requires_grad for layer in (0, 2)] == [True, False]


def test_layers_to_ignore_may_be_given_as_modules(norm):
    same = normed(plain(), norm)
    whole = [g.root.layer for g in find_groups(same, IMAGES, ignore=[same[0]]) if not g.prunable]
    assert "0" in whole and "4" not in whole


def test_another_parametrization_stays_whole_with_the_layer_s_name():
    model = plain()
    parametrizations.weight_norm(model[0])
    parametrizations.spectral_norm(model[0])
    reasons = [group.kept_whole or "" for group in find_groups(model, IMAGES)]
    assert any("layer '0' (ParametrizedConv2d) has a parametrization (remove it first)" in said for said in reasons)
