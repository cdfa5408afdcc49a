"""The range of every target: its end is met by a real pruning, what lies beyond it by none."""

import pytest
import torch
from networks import network
from torch import nn

from obc_tools import cost, one_shot_plan, prune, prune_to, reachable, score_groups
from obc_tools.pruning.choices import TARGETS, Selection

LIMITS = {"min_channels": 2, "max_ratio": 0.75, "round_to": 2}


@pytest.fixture(scope="module", params=["small_vgg", "grouped", "concat"])
def model_and_input(request):
    model, images = network(request.param)
    return model, images[:1]


@pytest.mark.parametrize("limits", [{}, LIMITS], ids=["free", "limited"])
def test_the_end_of_the_range_is_met_and_nothing_beyond_it(model_and_input, limits):
    model, example = model_and_input
    reach = reachable(model, example, **limits)
    groups, costs = Selection().analyse(model, example)
    scores = score_groups(model, groups, "l2")
    beyond = {"speedup": 1.01, "macs": 0.99, "params": 0.99, "ratio": 1.01}
    for kind in TARGETS:
        end = reach.of(kind)[1]
        plan = one_shot_plan(scores, costs, **{kind: end}, **limits)
        pruned = cost(prune(model, plan), example)
        found = {"speedup": costs.original.macs / pruned.macs, "macs": pruned.macs, "params": pruned.params}
        found["ratio"] = plan.channels_removed / plan.channels
        if kind != "ratio" or not limits:  # with rounding, a ratio is met from below
            assert found[kind] == pytest.approx(end, rel=1e-9)
        with pytest.raises(ValueError, match=f"{kind}=.* cannot be met: the best that can be had is {kind}="):
            one_shot_plan(scores, costs, **{kind: end * beyond[kind]}, **limits)


def test_the_beginning_is_the_network_as_it_is(model_and_input):
    model, example = model_and_input
    reach, whole = reachable(model, example), cost(model, example)
    assert [reach.of(kind)[0] for kind in TARGETS] == [1.0, whole.macs, whole.params, 0.0]
    assert "speedup" in repr(reach) and "<table" in reach._repr_html_()


def test_what_is_left_out_narrows_the_range():
    model, images = network("small_vgg")
    full, part = reachable(model, images), reachable(model, images, ignore="0")
    assert part.of("speedup")[1] < full.of("speedup")[1] and part.of("macs")[1] > full.of("macs")[1]


def test_what_cannot_be_asked():
    model, images = network("small_vgg")
    with pytest.raises(ValueError, match="unknown setting 'steps'; known are ignore, whole_heads, only, min_channels"):
        reachable(model, images, steps=3)
    with pytest.raises(ValueError, match=r"max_ratio=2: expected a share in \(0, 1\]"):
        reachable(model, images, max_ratio=2)
    with pytest.raises(ValueError, match="nothing can be pruned: "):
        reachable(nn.Linear(3, 2).double(), torch.zeros(1, 3, dtype=torch.float64))
    end = reachable(model, images).of("speedup")[1]
    with pytest.raises(ValueError, match=f"the best that can be had is speedup={end:.4g}"):
        prune_to(model, images, speedup=end * 1.01, criterion="l2", progress=False)
