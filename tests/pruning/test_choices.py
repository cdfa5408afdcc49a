"""The values that a pruning is asked for by, and the one step that all pruning in steps takes."""

import math

import pytest
import torch
from networks import network

from obc_tools import PruningPlan, Target, cost, cost_model, find_groups, one_shot_plan, prune, prune_to, score_groups
from obc_tools.measure.costs import Cost
from obc_tools.pruning.choices import TORCH_PRUNING, Limits, Scoring, Selection, Settings, Steps
from obc_tools.pruning.order import next_units, removal_order


def test_a_selection_takes_what_find_groups_takes():
    model, images = network("small_vgg")
    for ignore in ("3", ["3"], (name for name in ["3"]), model[3]):
        assert Selection(ignore).analyse(model, images)[0] == find_groups(model, images, ignore=["3"])
    assert Selection("3") == Selection(["3"])
    with pytest.raises(ValueError, match="unknown only 'heads'"):
        Selection(only="heads")


def test_scores_of_weights_leave_the_batches_alone():
    class Untouched:
        def __iter__(self):
            raise AssertionError("somebody asked for a batch")

    model, images = network("small_vgg")
    groups = find_groups(model, images)
    scores = Scoring("l2", "mean", "max").score(model, groups, Untouched())
    expected = score_groups(model, groups, "l2", group_reduction="mean", normalizer="max")
    assert all(torch.equal(scores[group], expected[group]) for group in groups)
    assert Scoring("jacobian").needs_data and not Scoring("l2").needs_data
    with pytest.raises(AssertionError, match="somebody asked"):
        Scoring("jacobian").score(model, groups, Untouched())


def test_targets_are_met_and_told():
    whole, half = Cost(100, 50), Cost(50, 20)
    for target, met in ((Target(speedup=2), True), (Target(macs=49), False), (Target(params=20), True)):
        assert target.met(half, whole) is met
    assert Target(ratio=0.5).met(whole, whole, 0.5) and not Target(ratio=0.5).met(half, whole, 0.49)
    assert Target(ratio=0.5).reached(whole, whole, 2 / 7) == "ratio=0.2857"
    assert [str(Target(speedup=2.5, counting=TORCH_PRUNING)), Target(macs=9).given] == ["speedup=2.5", ("macs", 9)]
    for wrong in ({"macs": math.nan}, {"params": math.inf}, {"ratio": math.nan}, {"speedup": math.nan}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=(nan|inf): expected"):
            Target(**wrong)


def test_steps_share_out_what_goes():
    assert list(Steps(4).shares(Target(speedup=2))) == [0.25, 0.5, 0.75, 1.0]
    assert list(Steps(2, 0.5).shares(Target(macs=5))) == [0.25, 0.5]
    assert list(Steps(2, 0.5).shares(Target(ratio=0.8))) == [0.4, 0.8]


def test_settings_are_the_values_side_by_side():
    settings = Settings(ignore=["a"], only="mlp", normalizer="max", scope="local", round_to=4, max_ratio=0.5)
    assert settings.selection == Selection("a", only="mlp")
    assert settings.limits == Limits(max_ratio=0.5, round_to=4, scope="local")
    assert settings.scoring("l1") == Scoring("l1", normalizer="max")
    for wrong in ({"batches": math.nan}, {"seed": -1}, {"batch_size": True}, {"min_channels": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*: expected at least [01] .a whole number"):
            Settings(**wrong)


@pytest.mark.parametrize("target", [{"speedup": 1.7}, {"ratio": 0.4}])
def test_one_step_is_what_one_scoring_leads_to(target):
    model, images = network("small_vgg")
    scores = score_groups(model, find_groups(model, images), "l2")
    expected = one_shot_plan(scores, cost_model(model, images), **target)
    assert prune_to(model, images, criterion="l2", steps=1, progress=False, **target) == expected


def test_a_step_after_others_removes_no_unit_too_many():
    model, images = network("residual")
    groups, costs = find_groups(model, images), cost_model(model, images)
    first = one_shot_plan(score_groups(model, groups, "l2"), costs, ratio=0.2)
    scores = score_groups(prune(model, first), first.pruned_groups(), "l2")
    order, target = removal_order(scores, after=first), Target(speedup=1.8)
    plans = [order.plan(units) for units in range(len(order) + 1)]
    expected = next(plan for plan in plans if target.met(costs.of(plan), costs.original))
    assert order.plan(next_units(order, 1.0, target, costs)) == expected
    full = order.plan(next_units(order, 0.9, target, costs, last_step="full"))
    assert full == plans[order.up_to(0.9)] and full.channels_removed > expected.channels_removed
    short = order.plan(next_units(order, 0.25, target, costs))
    assert short == plans[order.up_to(0.25)] and not target.met(costs.of(short), costs.original)
    removed = [sum(map(len, plan.kept)) for plan in plans]
    assert removed == sorted(removed, reverse=True) and plans[0] == first != PruningPlan.whole(groups)


@pytest.mark.parametrize("counting", ["operations", TORCH_PRUNING])
def test_a_target_holds_in_the_count_that_it_is_stated_in(counting):
    model, images = network("residual")
    plan = prune_to(model, images, criterion="l2", speedup=1.5, steps=4, counting=counting, progress=False)
    whole, left = (cost(each, images, counting=counting).macs for each in (model, prune(model, plan)))
    assert 1.5 <= whole / left < 1.6
