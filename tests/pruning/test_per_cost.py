"""Channels are removed by what they lose for what they save: scores over the MACs or milliseconds of one channel."""

import pytest
import torch
from networks import network

from obc_tools import cost, prune, prune_to, score_groups
from obc_tools.errors import UnknownNameError
from obc_tools.pruning.choices import Limits, Scoring, Selection, Steps
from obc_tools.pruning.plan import PruningPlan
from obc_tools.pruning.prune import Measured, Timing, Way, prune_to_latency


def without(plan, index, channel):
    """A plan less one channel of a group, for groups of one block."""
    kept = [tuple(c for c in kept if (i, c) != (index, channel)) for i, kept in enumerate(plan.kept)]
    return PruningPlan(plan.groups, tuple(kept))


def saved_by_hand(model, example):
    """Score over MACs saved of every channel, each removed alone and counted."""
    groups, _ = Selection().analyse(model, example)
    whole, scores = PruningPlan.whole(groups), score_groups(model, groups, "l2")
    now, found = cost(model, example).macs, {}
    for index, group in enumerate(groups):
        if group in scores and group.prunable:
            assert group.blocks == 1
            for channel, score in enumerate(scores[group].tolist()):
                less = prune(model, without(whole, index, channel))
                found[group.root, channel] = score / (now - cost(less, example).macs)
    return found


@pytest.mark.parametrize("name", ["small_vgg", "concat"])
def test_what_gains_least_for_its_macs_stays(name):
    model, images = network(name)
    found = saved_by_hand(model, images[:1])
    how = {"criterion": "l2", "ratio": 0.2, "steps": 1, "progress": False}
    plan, plain = (prune_to(model, images[:1], per=per, **how) for per in ("macs", None))
    gone = {(g.root, c) for g, kept in zip(plan.groups, plan.kept, strict=True) for c in {*range(g.width)} - {*kept}}
    assert gone == set(sorted(found, key=found.get)[: len(gone)]) and len(gone) > 3
    assert plan != plain
    assert cost(prune(model, plan), images[:1]).macs < cost(prune(model, plain), images[:1]).macs


def test_milliseconds_are_those_of_the_layers():
    model, images = network("small_vgg")
    slow = "3"  # a layer whose time, of all, depends on its width

    def seconds(model):
        width = dict(model.named_modules())[slow].weight.shape[0]
        return {n: 1e-3 * (width if n == slow else 1) for n, m in model.named_modules() if hasattr(m, "weight")}

    def measured(original, pruned):
        times = [1e3 * sum(seconds(network).values()) for network in (original, pruned)]
        return Measured(*((time, time) for time in times))

    plan = prune_to_latency(
        model,
        images[:1],
        None,
        Timing(speedup=1.3, processes=2),
        Way(scoring=Scoring("l2", per="latency"), limits=Limits(), steps=Steps(4), progress=False),
        time_plan=seconds,
        measure=measured,
    )
    removed = {str(g.root): g.width - len(kept) for g, kept in zip(plan.groups, plan.kept, strict=True)}
    assert [name for name, count in removed.items() if count] == [f"{slow}.out"]


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({"per": "seconds"}, UnknownNameError, "unknown per 'seconds'; known: None, latency, macs"),
        (
            {"per": "macs", "normalizer": "gaussian"},
            ValueError,
            "per='macs' divides scores: not with normalizer='gauss",
        ),
        ({"per": "latency"}, ValueError, "per='latency' needs a target that is one"),
    ],
)
def test_bad_input(asked, error, said):
    model, images = network("small_vgg")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=said):
        prune_to(model, images[:1], criterion="l2", speedup=1.5, steps=1, progress=False, **asked)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
