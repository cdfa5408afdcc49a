"""Steps whose scoring stops when they are decided."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from obc_tools.pruning.choices import Limits, Scoring
from obc_tools.pruning.order import exchanged, removal_order
from obc_tools.pruning.plan import PruningPlan
from obc_tools.pruning.prune import prune_to
from obc_tools.scoring.rows import Proof
from obc_tools.scoring.scores import score_groups
from obc_tools.structure.groups import find_groups


def network(seed=0):
    torch.manual_seed(seed)
    body = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)]
    model = nn.Sequential(*body, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).double().eval()
    for norm in (model[1], model[4]):
        norm.running_mean.uniform_(-0.2, 0.2), norm.running_var.uniform_(0.5, 1.5)
        norm.weight.data.uniform_(0.5, 1.5), norm.bias.data.uniform_(-0.3, 0.3)
    return model


def batches_of(count, size=6, seed=1):
    torch.manual_seed(seed)
    return [(torch.randn(size, 3, 8, 8).double(), torch.randint(0, 4, (size,))) for _ in range(count)]


def scored(model, batches, decided=lambda scores: False, **options):
    groups = find_groups(model, batches[0][0][:1])
    return score_groups(model, groups, "jacobian", batches, decided=decided, **options)


def test_left_out_scores_are_those_of_the_other_batches():
    model, batches = network(), batches_of(4)
    scores = scored(model, batches)
    for group, left_out in scores.left_out.items():
        torch.testing.assert_close(scores[group], scored(model, batches, None)[group], rtol=1e-10, atol=0)
        for batch in range(4):
            others = scored(model, batches[:batch] + batches[batch + 1 :], None)[group]
            torch.testing.assert_close(left_out[batch], others * 4 / 3, rtol=1e-10, atol=0)


def test_scoring_ends_when_it_is_told_and_not_before_two_batches():
    model, batches, seen = network(), batches_of(5), []

    def decided(scores):
        seen.append(len(next(iter(scores.left_out.values()))))
        return len(seen) == 2

    scores = scored(model, batches, decided, normalizer="max")
    assert seen == [2, 3]
    for group, expected in scored(model, batches[:3], None, normalizer="max").items():
        torch.testing.assert_close(scores[group], expected)


def by_hand(values, left_out, units):
    """½ Σ Φ(−|z|) / units, channel by channel."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    border = (math.log(values[order[units - 1]]) + math.log(values[order[units]])) / 2
    wrong, batches = 0.0, len(left_out)
    for i, value in enumerate(values):
        logs = [math.log(row[i]) for row in left_out]
        mean = sum(logs) / batches
        error = math.sqrt((batches - 1) / batches * sum((log - mean) ** 2 for log in logs))
        wrong += 0.5 * math.erfc(abs(math.log(value) - border) / error / math.sqrt(2))
    return wrong / 2 / units


@pytest.mark.parametrize("units", [1, 4, 9])
def test_the_expected_share_is_that_of_the_formula(units):
    scores = scored(network(), batches_of(4))
    order = removal_order(scores, Limits())
    prunable = [group for group in scores if group.prunable]
    left_out = torch.cat([scores.left_out[group] for group in prunable], 1)
    index = {group.root: sum(g.width for g in prunable[:i]) for i, group in enumerate(prunable)}
    at = [index[order.groups[owner].root] + p for owner, p in zip(order.owners, order.positions, strict=True)]
    values = torch.cat([scores[group] for group in prunable])[at]
    assert exchanged(scores, order, units) == pytest.approx(by_hand(values.tolist(), left_out[:, at].tolist(), units))


def test_equal_batches_decide_and_dead_channels_are_ties():
    model, batch = network(), batches_of(1)
    scores = scored(model, batch * 3)
    assert exchanged(scores, removal_order(scores, Limits()), 4) < 1e-12
    none = replace(scores, values_={g: s * 0 for g, s in scores.items()})
    assert exchanged(none, removal_order(none, Limits(scope="local")), 4) == 0


def test_a_plan_says_how_its_steps_were_decided():
    model, batches = network(), batches_of(6)
    example = batches[0][0][:1]
    plan = prune_to(model, example, batches, ratio=0.4, steps=3, stop=0.4, progress=False)
    assert len(plan.deciding) == 3 and all(2 <= step.batches <= 6 for step in plan.deciding)
    assert all(step.decided == (step.share <= 0.4) for step in plan.deciding)
    again = PruningPlan.from_json(plan.to_json())
    assert again == plan and again.deciding == plan.deciding
    never = prune_to(model, example, batches, ratio=0.4, steps=2, stop=1e-9, progress=False)
    assert [step.batches for step in never.deciding] == [6, 6] and "2 of 2 steps undecided" in repr(never)
    whole = prune_to(model, example, batches, ratio=0.4, steps=2, progress=False)
    assert never == whole and whole.deciding == () and "deciding" not in json.loads(whole.to_json())


def test_the_same_plan_with_what_earlier_steps_have_shown():
    model, batches, proof = network(), batches_of(2), Proof()
    first = scored(model, batches, None, proof=proof)
    assert proof.folds == {"0": "1", "3": "4"} and proof.proven == {"0", "1", "3", "4", "8"}
    for group, score in scored(model, batches, None, proof=proof).items():
        torch.testing.assert_close(score, first[group], rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": 0.5}, r"stop=0.5: expected a share of a step's channels in \(0, 0.5\)"),
        ({"stop": 0}, "stop=0: expected"),
        ({"criterion": "l2", "stop": 0.1}, "criterion 'l2' has no rows"),
        ({"criterion": ("jacobian", {"coupling": "set"}), "stop": 0.1}, "criterion 'jacobian' has no rows"),
        ({"normalizer": "gaussian", "stop": 0.1}, "not with normalizer='gaussian'"),
        ({"batches": 0}, "batches=0: expected at least 1"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        Scoring(**options)
