"""Experts whose results are added up by the numbers of their rows."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from obc_tools import PruningPlan, check_plan, cost_model, find_groups, make_plan, score_groups
from obc_tools.pruning.check import prove


class Experts(nn.Module):
    """Experts on the rows that a gate sends them, added to rows of zeros."""

    def __init__(self, after_stem: bool = False):
        super().__init__()
        self.after_stem, width = after_stem, 12 if after_stem else 5
        self.stem, self.gate, self.out = nn.Linear(5, 12), nn.Linear(width, 4, bias=False), nn.Linear(12, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 12)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.stem(x).relu()
        pick = self.gate(hidden if self.after_stem else x).argmax(-1)
        total = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            rows = (pick == number).nonzero().flatten()
            total = total.index_add(0, rows, expert(hidden[rows]))
        return self.out(total + hidden)


def test_experts_lose_hidden_channels_and_the_stream():
    torch.manual_seed(0)
    model, x = Experts().double().eval(), torch.randn(64, 5, dtype=torch.float64)
    groups = find_groups(model, x)
    hidden = {f"experts.{number}.0.out" for number in range(4)}
    assert {str(group.root) for group in groups if group.prunable} == {"stem.out", *hidden}
    plan = make_plan(score_groups(model, groups, "l1"), ratio=0.4, scope="local")
    assert check_plan(model, plan, x).ok


def test_costs_are_not_compared_where_the_gate_sends_rows_elsewhere():
    """All experts are equally wide, so that the sum alone does not change with what the gate says."""
    torch.manual_seed(0)
    model, x = Experts(after_stem=True).double().eval(), torch.randn(64, 5, dtype=torch.float64)
    plan = PruningPlan.whole(find_groups(model, x)).choose(("experts.0.0", "out"), remove=range(8))
    plan = plan.choose(("stem", "out"), remove=range(6))
    check = check_plan(model, plan, x)
    found = check.findings[-1]
    assert (found.name, check.verdict) == ("costs predicted = counted", "cannot tell") and found.error > 1e-3
    assert "how many rows an expert is sent" in str(found) and all(other.ok for other in check.findings[:-1])
    prove(model, plan, x, cost_model(model, x).of(plan))


class ManyAtOnce(nn.Module):
    """Experts multiplied by one kernel, each with the rows up to its bound."""

    def __init__(self):
        super().__init__()
        self.stem, self.out = nn.Linear(8, 16), nn.Linear(12, 3)
        self.experts = nn.Parameter(torch.randn(2, 16, 12))

    def forward(self, x: Tensor) -> Tensor:
        bounds = torch.tensor([3, len(x)], dtype=torch.int32)
        return self.out(F.grouped_mm(self.stem(x), self.experts, offs=bounds))


def test_experts_of_one_kernel_stay_whole_and_the_reason_says_what_to_do():
    groups = find_groups(ManyAtOnce(), torch.randn(6, 8))
    assert not any(group.prunable for group in groups)
    reasons = {str(group.root): group.kept_whole for group in groups}
    assert "needs widths of whole 16 bytes" in reasons["stem.out"] and "eager" in reasons["stem.out"]


def by_mask(model, hidden, pick):
    total = torch.zeros_like(hidden)
    for number, expert in enumerate(model.experts):
        total[pick == number] = expert(hidden[pick == number])
    return total


def by_order(model, hidden, pick):
    order, counts = pick.argsort(), torch.bincount(pick, minlength=4).tolist()
    total = torch.empty_like(hidden)
    total[order] = torch.cat(
        [each(rows) for each, rows in zip(model.experts, hidden[order].split(counts), strict=True)]
    )
    return total


def by_positions(model, hidden, pick):
    total = torch.zeros_like(hidden).view(8, 8, -1)
    for number, expert in enumerate(model.experts):
        places = torch.where(pick.view(8, 8) == number)
        total[places] = expert(hidden.view(8, 8, -1)[places])
    return total.flatten(0, 1)


def by_columns(model, hidden, pick):
    total = torch.zeros(hidden.shape[1], len(hidden), dtype=hidden.dtype)
    for number, expert in enumerate(model.experts):
        total[:, pick == number] = expert(hidden[pick == number]).T
    return total.T


@pytest.mark.parametrize("write", [by_mask, by_order, by_positions, by_columns])
def test_experts_whose_results_are_written_into_rows(write):
    class Writing(Experts):
        def forward(self, x):
            hidden = self.stem(x).relu()
            return self.out(write(self, hidden, self.gate(x).argmax(-1)) + hidden)

    torch.manual_seed(0)
    model, x = Writing().double().eval(), torch.randn(64, 5, dtype=torch.float64)
    groups = find_groups(model, x)
    assert {group.root.layer for group in groups if group.prunable} >= {f"experts.{number}.0" for number in range(4)}
    assert next(group for group in groups if group.root.layer == "stem").prunable == (write is not by_columns)
    plan = make_plan(score_groups(model, groups, "random"), ratio=0.4, scope="local")
    assert check_plan(model, plan, x).ok
