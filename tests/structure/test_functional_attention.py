"""torch's attention called as a function, as CLIP's attention pools do: what it takes stays whole, all else may go."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from obc_tools import check_plan, cost_model, find_groups, make_plan, prune_to, score_groups


class Pool(nn.Module):
    """One query, the mean of all positions, attends to them; projections of its own, joined or separate."""

    def __init__(self, joined: bool):
        super().__init__()
        self.stem, self.mlp, self.out = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 1), nn.Linear(8, 4)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.joined = joined

    def forward(self, x):
        x = self.mlp(self.stem(x).relu()).flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(0, keepdim=True), x])
        layers = (self.q, self.k, self.v)
        weights = {f"{name}_proj_weight": layer.weight for name, layer in zip("qkv", layers, strict=True)}
        bias = torch.cat([layer.bias for layer in layers])
        rest = {"use_separate_proj_weight": True} | weights
        if self.joined:
            rest = {"in_proj_weight": torch.cat([layer.weight for layer in layers])}
        weight = rest.pop("in_proj_weight", None)
        found, _ = F.multi_head_attention_forward(
            x[:1], x, x, 8, 2, weight, bias, None, None, False, 0.0, self.o.weight, self.o.bias, training=False, **rest
        )
        return self.out(found[0])


@pytest.mark.parametrize("joined", [True, False], ids=["joined", "separate"])
def test_what_it_takes_stays_whole(joined):
    torch.manual_seed(0)
    model, x = Pool(joined).double().eval(), torch.randn(2, 3, 6, 6).double()
    groups = find_groups(model, x)
    assert [str(group.root) for group in groups if group.prunable] == ["stem.out"]
    reasons = {group.kept_whole for group in groups if group.root.layer in ("mlp", "q", "k", "v")}
    assert reasons == {"is taken by multi_head_attention_forward in layer '', called as a function"}
    plan = make_plan(score_groups(model, groups, "l1"), ratio=0.4)
    assert check_plan(model, plan, x).ok and cost_model(model, x).of(plan).macs < cost_model(model, x).original.macs
    assert prune_to(model, x, criterion="l1", ratio=0.3, progress=False).channels_removed == 1
