"""Scores of rows that are averaged over all ways to draw them."""

from itertools import combinations

import pytest
import torch
from torch import nn

from obc_tools.pruning.choices import Scoring, Settings
from obc_tools.scoring.criteria import Criterion
from obc_tools.scoring.jacobian import jacobian_products
from obc_tools.scoring.scores import score_groups
from obc_tools.structure.groups import find_groups

IMAGES = 6


def network():
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)]
    return nn.Sequential(*body, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).double().eval()


def images(count=IMAGES):
    torch.manual_seed(1)
    return torch.randn(count, 3, 6, 6).double(), torch.randint(0, 3, (count,))


def in_batches(size, data):
    return list(zip(data[0].split(size), data[1].split(size), strict=True))


def scored(batches, rows, decided=None, **options):
    model = network()
    groups = find_groups(model, batches[0][0][:1])
    return score_groups(model, groups, ("jacobian", {"rows": rows, **options}), batches, decided=decided)


def partitions(left, size):
    """Yield all ways to draw batches of a size from numbers."""
    if not left:
        yield []
        return
    first, *others = left
    for more in combinations(others, size - 1):
        batch = (first, *more)
        yield from ([batch, *rest] for rest in partitions([i for i in left if i not in batch], size))


@pytest.mark.parametrize("coupling", ["member", "group"])
@pytest.mark.parametrize(
    ("rows", "given", "size"), [("expected", 3, 3), (("expected", 2), 3, 2), (("expected", 3), 2, 3)]
)
def test_it_is_the_mean_over_all_partitions(rows, given, size, coupling):
    data, totals, count = images(), {}, 0
    for partition in partitions(list(range(IMAGES)), size):
        drawn = [(data[0][list(batch)], data[1][list(batch)]) for batch in partition]
        for group, score in scored(drawn, "batch", coupling=coupling).items():
            totals[group] = totals.get(group, 0) + score
        count += 1
    assert count == {2: 15, 3: 10}[size]
    for group, score in scored(in_batches(given, data), rows, coupling=coupling).items():
        torch.testing.assert_close(score, totals[group] / count, rtol=1e-10, atol=1e-14)


def test_rows_of_one_example_and_of_all_are_no_average():
    data = images()
    for rows, as_well, size in (
        (("expected", 1), "sample", 2),
        (("expected", 6), "batch", 6),
        ("expected", "sample", 1),
    ):
        known = scored(in_batches(size, data), as_well)
        for group, score in scored(in_batches(size, data), rows).items():
            torch.testing.assert_close(score, known[group], rtol=1e-10, atol=1e-14)


def test_left_out_scores_are_those_of_the_other_batches():
    batches, seen = in_batches(2, images()), []
    scores = scored(batches, ("expected", 4), decided=lambda scores: seen.append(len(seen)) or False)
    assert len(seen) == 1  # before the third batch the others make no row
    for group, left_out in scores.left_out.items():
        torch.testing.assert_close(scores[group], scored(batches, ("expected", 4))[group], rtol=1e-10, atol=0)
        for batch in range(3):
            others = scored(batches[:batch] + batches[batch + 1 :], ("expected", 4))[group]
            torch.testing.assert_close(left_out[batch], others * 3 / 2, rtol=1e-10, atol=0)


def test_a_scoring_and_settings_say_which_rows():
    expected = ("expected", 4)
    assert Scoring(rows=["expected", 4]).rows == expected and Scoring(rows=expected).resolved.rows == expected
    assert Scoring(("jacobian", {"rows": "sample"})).resolved.rows == "sample"
    assert Settings(rows=["expected", 4], stop=0.1).scoring() == Scoring(rows=expected, stop=0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scored(in_batches(4, images()), "expected"), "after one of 4 examples came one of 2: leave it out"),
        (lambda: scored(in_batches(3, images()), ("expected", 7)), "6 examples make no row; give more, or a smaller m"),
        (lambda: Scoring("taylor", rows="expected"), "rows='expected': criterion 'taylor' has no rows"),
        (lambda: Scoring("l2", rows="sample"), "criterion 'l2' has no rows, it needs weights; leave rows"),
        (lambda: Scoring(rows="most"), "rows='most': expected 'batch', 'sample'"),
        (lambda: Scoring(rows=("expected", 0)), "m=0: expected at least 1"),
        (lambda: Criterion("own", "products", len, coupling="set", rows="expected"), "needs the rows themselves"),
        (lambda: jacobian_products(network(), [images()], rows="expected"), "it goes with scores alone"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
