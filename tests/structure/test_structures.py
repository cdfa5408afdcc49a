"""Each way of joining, cutting and mixing channels: pruned = masked, EP = naive, merge = EP, costs as predicted."""

import pytest
import torch
from structures import STRUCTURES, WHOLE
from torch import nn

from obc_tools import check_plan, explain, find_groups, load_pruned, make_plan, prune, save_pruned
from obc_tools.state import call_model


def planned(name, ratio=0.4):
    model, inputs = STRUCTURES[name].make()
    generator = torch.Generator().manual_seed(0)
    scores = {group: torch.rand(group.width, generator=generator) for group in find_groups(model, inputs)}
    return model, inputs, make_plan(scores, ratio=ratio)


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_random_plan_is_proven(name):
    model, inputs, plan = planned(name)
    check = check_plan(model, plan, inputs)
    assert check.ok, check
    assert check.effect > 0.01 and plan.channels_removed > 0


@pytest.mark.parametrize("name", [*STRUCTURES, *WHOLE])
def test_what_can_be_pruned(name):
    structure = (STRUCTURES | WHOLE)[name]
    roots = tuple(str(group.root) for group in find_groups(*structure.make()) if group.prunable)
    assert roots == structure.prunable


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_pruned_network_is_saved_and_loaded(name, tmp_path):
    model, inputs, plan = planned(name)
    pruned = prune(model, plan)
    save_pruned(tmp_path / "saved", pruned, plan)
    loaded = load_pruned(tmp_path / "saved", model=STRUCTURES[name].build().double())
    ours, theirs = (torch.utils._pytree.tree_leaves(call_model(network.eval(), inputs)) for network in (pruned, loaded))
    assert ours and all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize(
    ("name", "layer", "why"),
    [
        ("two inputs", "left", "reaches the model's output"),
        ("padded shortcut", "stem.0", "is padded with zeros to a constant width"),
    ],
)
def test_what_stays_whole_says_why(name, layer, why):
    assert explain(find_groups(*(STRUCTURES | WHOLE)[name].make())).why_whole(layer) == why


def test_an_unused_parameter_stays_as_it_is():
    model, _, plan = planned("own layer")
    assert torch.equal(prune(model, plan).unused, model.unused)


def test_a_layer_used_twice_stays_one():
    model, _, plan = planned("split in three")
    pruned = prune(model, plan)
    assert pruned.shared[0][0].out_channels < model.shared[0][0].out_channels
    assert sum(isinstance(module, nn.Conv2d) for module in pruned.modules()) == 6
