"""Products of any rows against the whole Jacobian, for every layer type and structure, by each way."""

import logging

import pytest
import torch
from cases import CASES, EXAMPLES, Case
from oracles import products, row_gradients, score

from obc_tools.scoring.jacobian import jacobian_products

ROWS = ("batch", "sample", 1, 2, 3, EXAMPLES)


def by_name(case: Case) -> str:
    return case.name


def computed(case: Case, rows, batches=1):
    data = [case.data() for _ in range(batches)]
    return jacobian_products(case.model(), data, rows=rows, layers=case.layers, objective=case.objective)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_products_are_those_of_the_whole_jacobian(case, rows):
    model = case.model()
    jacobian = row_gradients(model, case.data(), rows, case.objective)
    found = computed(case, rows)
    scores = found.scores()
    for axis, product in found.items():
        expected = products(model, jacobian, axis)
        assert expected.abs().max() > 1e-6
        torch.testing.assert_close(product, expected, rtol=0, atol=1e-10 * expected.abs().max().item())
        quadratic = score(model, jacobian, axis)
        torch.testing.assert_close(scores[axis], quadratic, rtol=0, atol=1e-10 * quadratic.max().item())


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_one_backward_pass_a_row_where_gates_do_not_suit_and_only_there(case, caplog):
    with caplog.at_level(logging.WARNING):
        computed(case, "sample")
    named = {name for record in caplog.records for name in record.message.partition("for: ")[2].split(", ")}
    assert named == case.by_weights
