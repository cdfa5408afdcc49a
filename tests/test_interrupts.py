"""Ctrl-C at random lines of the library: the user's model, inputs and all of torch's state stay as they were."""

import random

import pytest
import torch
from interrupts import differences, run, state
from torch import nn

import obc_tools as obc
from obc_tools.models.export import export_program
from obc_tools.pruning.check import check_plan

POINTS = 9


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(8, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3)),
    )
    model.train()[1].eval()
    model[0].bias.requires_grad_(False)
    return model, torch.randn(4, 3, 6, 6)


def calls(model, x):
    batches = [(x, torch.tensor([0, 1, 2, 0]))]
    groups = obc.find_groups(model, x)
    plan = obc.make_plan(obc.score_groups(model, groups, "l1"), ratio=0.3)
    merging = obc.EquivalentModel(model, plan)
    return {
        "find_groups": lambda: obc.find_groups(model, x),
        "cost_model": lambda: obc.cost_model(model, x),
        "cost": lambda: obc.cost(model, x),
        "products": lambda: obc.score_groups(model, groups, "jacobian", batches),
        "products of examples": lambda: obc.score_groups(model, groups, ("jacobian", {"rows": "sample"}), batches),
        "gradients": lambda: obc.score_groups(model, groups, "taylor", batches),
        "prune_to": lambda: obc.prune_to(model, x, batches, ratio=0.3, steps=1, progress=False),
        "prune": lambda: obc.prune(model, plan),
        "check_plan": lambda: check_plan(model, plan, x),
        "EquivalentModel": lambda: obc.EquivalentModel(model, plan),
        "merge": merging.merge,
        "export_program": lambda: export_program(model, x),
    }


NAMES = ("find_groups", "cost_model", "cost", "products", "products of examples", "gradients", "prune_to", "prune",
         "check_plan", "EquivalentModel", "merge", "export_program")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_anywhere_leaves_everything_as_it_was(name):
    model, x = network()
    call = calls(model, x)[name]
    lines, drawn = run(call).lines, random.Random(name)
    stopped = 0
    for line in drawn.sample(range(1, lines + 1), min(POINTS, lines)):
        before = state(model, x)
        counter = run(call, line)
        stopped += counter.where is not None
        assert not differences(before, state(model, x)), counter.where
    assert stopped >= min(POINTS, lines) - 1
