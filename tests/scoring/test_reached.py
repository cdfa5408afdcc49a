"""Layers that no loss depends on, always or in some batches."""

import logging

import pytest
import torch
from oracles import products, row_gradients
from torch import nn

from obc_tools import prune_to
from obc_tools.scoring.jacobian import jacobian_products
from obc_tools.scoring.objectives import classification
from obc_tools.scoring.rows import ProductRows, examples_per_row
from obc_tools.scoring.scores import score_groups
from obc_tools.structure.groups import find_groups
from obc_tools.structure.layers import LayerAxis


class Pooled(nn.Module):
    """A pooler that the loss does not read, and an expert, or two of which the sign of the data chooses one."""

    def __init__(self, choose=True):
        super().__init__()
        self.choose = choose
        self.first, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.experts = nn.ModuleList(nn.Linear(6, 5) for _ in range(1 + choose))
        self.head, self.pooler = nn.Linear(5, 3), nn.Linear(6, 2)

    def forward(self, inputs):
        hidden = torch.tanh(self.norm(self.first(inputs)))
        self.pooled = self.pooler(hidden)
        return self.head(torch.tanh(self.experts[int(inputs[0, 0] > 0) if self.choose else 0](hidden)))


def made(choose=True):
    torch.manual_seed(0)
    model = Pooled(choose).double().eval()
    batches = [(torch.randn(5, 4).double(), torch.randint(0, 3, (5,))) for _ in range(5)]
    for (inputs, _), sign in zip(batches, (-1, -1, 1, 1, -1), strict=True):
        inputs[0, 0] = sign * inputs[0, 0].abs()
    return model, batches


@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_an_expert_that_runs_later_is_exact_in_every_batch(rows):
    model, batches = made()
    axes = [LayerAxis(f"experts.{i}", axis) for i in (0, 1) for axis in ("out", "in")]
    axes += [LayerAxis("first", "out"), LayerAxis("norm", "out")]
    read = ProductRows(model, axes, classification, examples_per_row(rows), set_aside=True)
    for number, batch in enumerate(batches, start=1):
        jacobian = row_gradients(model, batch, rows, classification)
        for axis, product in read(batch, number).items():
            expected = products(model, jacobian, axis)
            torch.testing.assert_close(product, expected, rtol=0, atol=1e-12)
    assert read.proof.absent == set() and read.proof.by_weights == set() and read.proof.folds == {"first": "norm"}


def test_members_that_no_loss_reaches_are_set_aside_with_a_note(caplog):
    model, batches = made(choose=False)
    groups = find_groups(model, batches[0][0])
    chosen = [group for group in groups if group.root == ("first", "out")]
    assert "pooler" in {member.axis.layer for member in chosen[0].members}
    with caplog.at_level(logging.INFO):
        scores = score_groups(model, chosen, "jacobian", batches, group_reduction="mean")
    assert "no loss depends on, and scores leave out: pooler" in caplog.text
    layers = ["first", "norm", "experts.0"]
    alone = jacobian_products(model, batches[:2], layers=layers).scores()
    parts = [alone[LayerAxis(*name)] for name in (("first", "out"), ("norm", "out"), ("experts.0", "in"))]
    two = score_groups(model, chosen, "jacobian", batches[:2])
    torch.testing.assert_close(two[chosen[0]], sum(parts), rtol=1e-10, atol=0)
    assert scores[chosen[0]].min() > 0


class Unread(nn.Module):
    """A branch that the loss does not read, and a front that runs without gradients."""

    def __init__(self):
        super().__init__()
        self.front, self.body = nn.Linear(4, 7), nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))
        self.branch = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 2))

    def forward(self, inputs):
        with torch.no_grad():
            hidden = self.front(inputs).tanh()
        return self.body(hidden), self.branch(hidden)


@pytest.mark.parametrize("criterion", ["jacobian", "taylor", "hessian", ("jacobian", {"rows": "sample"})])
def test_a_group_that_no_loss_depends_on_is_kept_whole_with_the_reason(criterion, caplog):
    torch.manual_seed(0)
    model = Unread().double()
    batches = [(torch.randn(5, 4).double(), torch.randint(0, 3, (5,))) for _ in range(2)]

    def losses(model, batch):
        return nn.functional.cross_entropy(model(batch[0])[0], batch[1], reduction="none")

    plan = prune_to(
        model, batches[0][0], batches, criterion=criterion, objective=losses, ratio=0.6, steps=2, progress=False
    )
    found = {
        group.root.layer: (group.kept_whole, len(kept)) for group, kept in zip(plan.groups, plan.kept, strict=True)
    }
    assert found["branch.0"] == ("no loss depends on it, so that nothing scores it", 5)
    assert found["body.0"][0] is None and found["body.0"][1] < 6
    assert caplog.text.count("group branch.0.out is kept whole: no loss depends on it") == 1
    scores = score_groups(model, find_groups(model, batches[0][0]), criterion, batches, objective=losses)
    assert all(scores[group].shape == (group.width,) for group in find_groups(model, batches[0][0]))


def test_a_layer_asked_for_by_name_must_be_reached():
    model, batches = made()
    with pytest.raises(ValueError, match="layer 'pooler' never ran, or the loss does not depend on it"):
        jacobian_products(model, batches, layers=["head", "pooler"])
