"""Experts whose results are added up by the numbers of their rows."""

import torch
from torch import Tensor, nn

from obc_tools import check_plan, find_groups, make_plan, score_groups


class Experts(nn.Module):
    """Experts on the rows that a gate sends them, added to rows of zeros."""

    def __init__(self):
        super().__init__()
        self.stem, self.gate, self.out = nn.Linear(5, 12), nn.Linear(5, 4, bias=False), nn.Linear(12, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 12)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        pick, hidden = self.gate(x).argmax(-1), self.stem(x).relu()
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
