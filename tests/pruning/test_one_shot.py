"""Plans for a target from one scoring, against a search through every number of channels."""

import re

import pytest
import torch
from networks import network

from obc_tools import cost_model, find_groups, one_shot_plan, score_groups
from obc_tools.pruning.choices import Limits, Target
from obc_tools.pruning.order import make_plan, removal_order
from obc_tools.structure.layers import LayerAxis


@pytest.fixture(scope="module", params=["small_vgg", "grouped", "concat"])
def scored(request):
    """The scores and the cost model of a small network."""
    model, images = network(request.param)
    groups = find_groups(model, images[:1])
    return score_groups(model, groups, "l2"), cost_model(model, images[:1])


def roots(scores):
    return [group.root for group in scores if group.prunable]


@pytest.mark.parametrize("target", [{"speedup": 1.7}, {"macs": 0.4}, {"params": 0.5}], ids=str)
def test_fewest_channels_meet_the_target(scored, target):
    scores, costs = scored
    whole = {"macs": costs.original.macs, "params": costs.original.params, "speedup": 1.0}
    target = {key: value * whole[key] for key, value in target.items()}
    order = removal_order(scores)
    plans = (order.plan(units) for units in range(len(order) + 1))
    expected = next(p for p in plans if Target(**target).met(costs.of(p), costs.original))
    assert one_shot_plan(scores, costs, **target) == expected


def test_a_ratio_is_that_of_make_plan(scored):
    scores, costs = scored
    options = {"scope": "local", "round_to": 2, "min_channels": 2, "max_ratio": 0.8}
    assert one_shot_plan(scores, costs, ratio=0.4, **options) == make_plan(scores, ratio=0.4, **options)


def test_limits_of_single_groups(scored):
    scores, costs = scored
    first, *others = roots(scores)
    plan = one_shot_plan(scores, costs, ratio=0.4, max_ratio_of={first: 0.0}, max_ratio=0.9)
    assert len(plan.kept_of(first)) == plan.axes[first]
    assert any(len(plan.kept_of(root)) < plan.axes[root] for root in others)
    half = one_shot_plan(scores, costs, ratio=0.6, max_ratio_of={first: 0.5})
    assert len(half.kept_of(first)) >= plan.axes[first] / 2


def test_fixed_groups_stay_as_they_are_and_others_meet_the_target(scored):
    scores, costs = scored
    first = roots(scores)[0]
    before = one_shot_plan(scores, costs, ratio=0.3)
    held = before.kept_of(first)
    plan = one_shot_plan(scores, costs, speedup=1.8, fixed={tuple(first): held})
    assert plan.kept_of(first) == held
    assert Target(speedup=1.8).met(costs.of(plan), costs.original)
    assert plan.groups == before.groups
    free = {group: score for group, score in scores.items() if group.root != first}
    alone = make_plan(free, ratio=0.4)
    together = one_shot_plan(scores, costs, ratio=0.4, fixed={first: held})
    assert {g.root: together.kept_of(g) for g in free} == {g.root: alone.kept_of(g) for g in free}


def test_what_cannot_be_had_is_said(scored):
    scores, costs = scored
    with pytest.raises(ValueError, match="speedup=1e\\+06 cannot be met: the best that can be had is speedup="):
        one_shot_plan(scores, costs, speedup=1e6)
    with pytest.raises(ValueError, match=r"ratio=0.8 cannot be met: the best that can be had is ratio=0\.[2-5]\d*$"):
        one_shot_plan(scores, costs, ratio=0.8, max_ratio=0.5)
    with pytest.raises(ValueError, match="give one target"):
        one_shot_plan(scores, costs)
    for options in ({"fixed": {("nowhere", "out"): (0,)}}, {"max_ratio_of": {LayerAxis("nowhere", "out"): 0.5}}):
        with pytest.raises(ValueError, match="unknown group 'nowhere.out'"):
            one_shot_plan(scores, costs, ratio=0.3, **options)
    with pytest.raises(ValueError, match=re.escape("max_ratio_of group nowhere.out=1.5: expected a share in [0, 1]")):
        Limits(max_ratio_of={LayerAxis("nowhere", "out"): 1.5})


def test_drafts_are_the_plans_that_they_stand_for(scored):
    scores, costs = scored
    order = removal_order(scores, Limits(round_to=2))
    for units in range(0, len(order) + 1, 5):
        assert costs.of(order.draft(units)) == costs.of(order.plan(units))
    assert torch.isfinite(torch.tensor(costs.of(order.plan(0)).macs))
