"""Tied parameters: the sum over all uses under all names, before squaring, and one member of their group."""

import logging

import pytest
import torch
from oracles import row_gradients
from torch import nn
from torch.nn import functional as F

from obc_tools.scoring.jacobian import jacobian_products
from obc_tools.scoring.jtj import dense_jtj, group_jtj
from obc_tools.scoring.scores import score_groups
from obc_tools.structure.groups import find_groups
from obc_tools.structure.layers import LayerAxis


class Tied(nn.Module):
    """An embedding that is the output layer too, a width of 6 along which everything is one group."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.norm = nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 5), nn.Linear(5, 6)
        self.out = nn.Linear(6, 7, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, inputs):
        x = self.embedding(inputs)
        return self.out(self.norm(x + self.down(torch.tanh(self.up(x)))))


class OwnBiases(nn.Module):
    """Two branches of one weight and a bias each, added up."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 6), nn.Linear(4, 6)
        self.right.weight = self.left.weight
        self.out = nn.Linear(6, 3)

    def forward(self, inputs):
        return self.out(torch.tanh(self.left(inputs)) + torch.tanh(self.right(inputs + 1)))


def next_token(model, batch):
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").mean(1)


def classes(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def given(kind):
    """Return a model, two batches, the objective, and the group of the tied axis."""
    torch.manual_seed(0)
    model = kind().double()
    if kind is Tied:
        batches, objective = [torch.randint(7, (4, 5)) for _ in range(2)], next_token
        example, tied = batches[0][:1, :-1], LayerAxis("embedding", "out")
    else:
        batches = [(torch.randn(4, 4).double(), torch.randint(3, (4,))) for _ in range(2)]
        objective, example, tied = classes, batches[0][0][:1], LayerAxis("left", "out")
    group = next(g for g in find_groups(model, example) if any(member.axis == tied for member in g.members))
    branches = [member.axis.layer for member in group.members if member.axis.layer in ("left", "right")]
    assert branches == ([] if kind is Tied else ["right", "left"])
    return model, batches, objective, group


MEMBERS = {
    Tied: [
        [("embedding.weight", 1)],  # of the embedding and the output layer
        [("norm.weight", 0), ("norm.bias", 0)],
        [("up.weight", 1)],
        [("down.weight", 0), ("down.bias", 0)],
    ],
    # The weight goes by its first name in the group; what the other has of its own is a member.
    OwnBiases: [[("left.weight", 0), ("right.bias", 0)], [("left.bias", 0)], [("out.weight", 1)]],
}


def by_channel(tensor, dim, place):
    """Bring the channels to a place, all behind them into one dimension."""
    moved = tensor.movedim(dim, place)
    return moved.reshape(*moved.shape[: place + 1], -1)


def jacobians(kind, rows):
    """Return J and w of each member of the group: (rows, channels, d) and (channels, d), every parameter once."""
    model, batches, objective, _ = given(kind)
    pieces = [row_gradients(model, batch, rows, objective) for batch in batches]
    whole = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    parameters = dict(model.named_parameters())
    found = []
    for member in MEMBERS[kind]:
        parts = [by_channel(whole[name], dim + 1, 1) for name, dim in member]
        weights = [by_channel(parameters[name].detach(), dim, 0) for name, dim in member]
        found.append((torch.cat(parts, 2), torch.cat(weights, 1)))
    return found


def brute_force(kind, criterion, rows):
    """Return the score of each channel of the group by the definition of the criterion."""
    found = jacobians(kind, rows)
    products = [torch.einsum("ncd,cd->nc", j, w) for j, w in found]
    scores = {
        "jacobian": lambda: sum(product.square().sum(0) for product in products),
        "group": lambda: sum(products).square().sum(0),
        "hessian": lambda: sum((w.square() * j.square().sum(0)).sum(1) for j, w in found),
        "taylor": lambda: sum((w * j.mean(0)).abs().sum(1) for j, w in found),
    }
    return scores[criterion]()


@pytest.mark.parametrize("kind", MEMBERS)
@pytest.mark.parametrize(
    ("criterion", "rows"),
    [
        *(("jacobian", rows) for rows in ("batch", "sample", 2)),
        *(("group", "sample"), ("hessian", "sample"), ("taylor", "batch")),
    ],
)
def test_tied_parameters_are_one_member(kind, criterion, rows):
    model, batches, objective, group = given(kind)
    asked = {"jacobian": {"rows": rows}, "group": {"rows": rows, "coupling": "group"}}.get(criterion, {})
    name = "jacobian" if criterion == "group" else criterion
    score = score_groups(model, [group], (name, asked), batches, objective=objective)[group]
    expected = brute_force(kind, criterion, rows)
    torch.testing.assert_close(score, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", MEMBERS)
def test_a_group_of_tied_parameters_in_full(kind):
    model, batches, objective, group = given(kind)
    for rows in ("batch", "sample"):
        found = jacobians(kind, rows)
        jtj = group_jtj(model, batches, group, 2, rows=rows, objective=objective)
        assert len(jtj.labels) == sum(w.shape[1] for _, w in found)
        assert jtj.score == pytest.approx(brute_force(kind, "jacobian", rows)[2].item(), rel=1e-10)
        assert jtj.coupled_score == pytest.approx(brute_force(kind, "group", rows)[2].item(), rel=1e-10)


def test_weights_count_once():
    model, batches, _, group = given(Tied)
    parameters = dict(model.named_parameters())
    expected = sum(
        by_channel(parameters[name].detach(), dim, 0).square().sum(1)
        for member in MEMBERS[Tied]
        for name, dim in member
        if not name.endswith("bias")
    )
    torch.testing.assert_close(score_groups(model, [group], "l2")[group], expected, rtol=1e-12, atol=0)
    per_parameter = score_groups(model, [group], "l2", normalizer="parameters")[group]
    torch.testing.assert_close(per_parameter, expected / (7 + 2 + 5 + 6), rtol=1e-12, atol=0)


@pytest.mark.parametrize("layers", [["embedding"], ["out"], ["embedding", "out"]])
def test_every_name_has_the_sum_over_all_uses(layers, caplog):
    model, batches, objective, _ = given(Tied)
    jacobian, weights = jacobians(Tied, "sample")[0]
    expected = torch.einsum("ncd,cd->nc", jacobian, weights)
    with caplog.at_level(logging.WARNING):
        found = jacobian_products(model, batches, rows="sample", layers=layers, objective=objective)
    if layers == ["embedding"]:
        assert not caplog.records  # one backward pass a batch
    for axis in {LayerAxis("embedding", "out"), LayerAxis("out", "in")} & set(found):
        torch.testing.assert_close(found[axis], expected, rtol=1e-10, atol=1e-14)
    dense = dense_jtj(model, batches, layers[0], rows="sample", objective=objective, axis="out")
    rows = torch.cat([row_gradients(model, batch, "sample", objective)["embedding.weight"] for batch in batches])
    rows = rows.movedim(2, 1) if layers[0] == "embedding" else rows
    torch.testing.assert_close(dense.values, torch.einsum("nci,ncj->cij", rows, rows), rtol=1e-10, atol=1e-14)
