"""Every function that touches a model gives it back as it was, also after an error in the objective."""

import pytest
import torch
from networks import network
from oracles import interrupted, state_of
from torch import nn

from obc_tools import (
    EquivalentModel,
    LayerAxis,
    cost,
    cost_model,
    dense_jtj,
    evaluate,
    find_groups,
    group_jtj,
    jacobian_products,
    latency,
    make_plan,
    prune,
    prune_to,
    score_groups,
)
from obc_tools.interop import JacobianImportance
from obc_tools.scoring.objectives import classification


def group_of(model, images):
    return next(group for group in find_groups(model, images) if group.root == LayerAxis("conv1", "out"))


def random_plan(model, images):
    return make_plan(score_groups(model, find_groups(model, images), "random"), ratio=0.3)


WITH_OBJECTIVE = {
    "jacobian_products": lambda m, b, o: jacobian_products(m, b, objective=o),
    "jacobian_products by image": lambda m, b, o: jacobian_products(m, b, rows="sample", objective=o),
    "score_groups": lambda m, b, o: score_groups(m, find_groups(m, b[0][0]), "jacobian", b, objective=o),
    "score_groups by gradients": lambda m, b, o: score_groups(m, find_groups(m, b[0][0]), "taylor", b, objective=o),
    "dense_jtj": lambda m, b, o: dense_jtj(m, b, "conv1", objective=o),
    "dense_jtj by image": lambda m, b, o: dense_jtj(m, b, "conv1", rows="sample", objective=o),
    "group_jtj": lambda m, b, o: group_jtj(m, b, group_of(m, b[0][0]), 0, objective=o),
    "prune_to": lambda m, b, o: prune_to(m, b[0][0], b, ratio=0.3, steps=2, objective=o, progress=False),
    "importance": lambda m, b, o: JacobianImportance().score(m, b, objective=o),
}

WITHOUT = {
    "find_groups": lambda m, b: find_groups(m, b[0][0]),
    "cost": lambda m, b: cost(m, b[0][0]),
    "cost_model": lambda m, b: cost_model(m, b[0][0]).of(random_plan(m, b[0][0])),
    "evaluate": evaluate,
    "latency": lambda m, b: latency(m, b[0][0], repeats=1, warmup=0),
    "prune": lambda m, b: prune(m, random_plan(m, b[0][0])),
    "equivalent": lambda m, b: EquivalentModel(m, random_plan(m, b[0][0])).merge(),
}


def borrowed():
    """Return a model in mixed modes, with a frozen parameter, a gradient and a hook of its own, and batches."""
    model, images = network("residual")
    model.train()
    model.bn1.eval()
    model.conv1.weight.requires_grad_(False)
    model.conv2.weight.grad = torch.ones_like(model.conv2.weight)
    model.fc.register_forward_hook(lambda module, args, output: None)
    return model, [(images, torch.tensor([0, 1, 2, 3]))] * 2


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", WITH_OBJECTIVE)
def test_functions_that_score_give_the_model_back(name, fails):
    model, batches = borrowed()
    before = state_of(model)
    if fails:
        with pytest.raises(KeyError, match="stop"):
            WITH_OBJECTIVE[name](model, batches, interrupted(classification))
    else:
        WITH_OBJECTIVE[name](model, batches, classification)
    assert state_of(model) == before


@pytest.mark.parametrize("name", WITHOUT)
def test_other_functions_give_the_model_back(name):
    model, batches = borrowed()
    before = state_of(model)
    WITHOUT[name](model, batches)
    assert state_of(model) == before


@pytest.mark.parametrize("name", ["find_groups", "cost", "cost_model", "evaluate", "latency"])
def test_a_forward_pass_that_fails_leaves_nothing(name):
    model, batches = borrowed()
    model.fc = nn.Linear(7, 5).double()
    before = state_of(model)
    with pytest.raises(Exception, match=r"mat1 and mat2|shapes|size"):
        WITHOUT[name](model, batches)
    assert state_of(model) == before
