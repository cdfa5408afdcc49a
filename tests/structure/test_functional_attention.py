"""torch's attention called as a function, as CLIP's attention pools do: its width shrinks with what it takes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from obc_tools import LayerAxis, check_plan, cost, cost_model, find_groups, make_plan, prune, prune_to, score_groups


class Pool(nn.Module):
    """One query, the mean of all positions, attends to them; projections of its own, joined or separate."""

    def __init__(self, joined: bool, **options):
        super().__init__()
        self.stem, self.mlp, self.out = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 1), nn.Linear(8, 4)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.joined, self.options = joined, options

    def tokens(self, x):
        x = self.mlp(self.stem(x).relu()).flatten(2).permute(2, 0, 1)
        return torch.cat([x.mean(0, keepdim=True), x])

    def forward(self, x):
        x = self.tokens(x)
        layers = (self.q, self.k, self.v)
        weights = {f"{name}_proj_weight": layer.weight for name, layer in zip("qkv", layers, strict=True)}
        bias = torch.cat([layer.bias for layer in layers])
        rest = {"use_separate_proj_weight": True, "training": False} | weights | self.options
        weight, width, zero = None, rest.pop("width", x.shape[-1]), rest.pop("zero", False)
        if self.joined:
            weight, rest["use_separate_proj_weight"] = torch.cat([layer.weight for layer in layers]), False
        found, _ = F.multi_head_attention_forward(
            x[:1], x, x, width, 2, weight, bias, None, None, zero, 0.0, self.o.weight, self.o.bias, **rest
        )
        return self.out(found[0])


def made(*args, **options):
    torch.manual_seed(0)
    return Pool(*args, **options).double().eval(), torch.randn(2, 3, 6, 6).double()


def by_hand(model, x, kept):
    """Return what the kept channels give, head by head, at the temperature before pruning."""
    x, heads = model.tokens(x), []
    for head in range(2):
        rows = [row for row in kept if row // 4 == head]
        q, k, v = (F.linear(x[:, :, kept], f.weight[rows][:, kept], f.bias[rows]) for f in (model.q, model.k, model.v))
        heads.append(torch.einsum("bn,nbd->bd", (torch.einsum("bd,nbd->bn", q[0], k) / 4**0.5).softmax(-1), v))
    return model.out(F.linear(torch.cat(heads, -1), model.o.weight[:, kept], model.o.bias))


@pytest.mark.parametrize("options", [{}, {"need_weights": False}], ids=["with weights", "without"])
@pytest.mark.parametrize("joined", [True, False], ids=["joined", "separate"])
def test_its_heads_become_narrower_with_its_input(joined, options):
    model, x = made(joined, **options)
    plan = make_plan(score_groups(model, find_groups(model, x, ignore=["stem", "o"]), "l1"), ratio=0.5, scope="local")
    pruned, kept = prune(model, plan), sorted(plan.shrunk[LayerAxis("mlp", "out")])
    assert (len(kept), pruned.q.weight.shape, pruned.o.in_features) == (4, (4, 4), 4)
    torch.testing.assert_close(pruned(x), by_hand(model, x, kept), rtol=0, atol=1e-10)
    check_plan(model, plan, x).raise_if_failed()
    assert cost_model(model, x).of(plan) == cost(pruned, x)


@pytest.mark.parametrize("options", [{"zero": True}, {"attn_mask": torch.zeros(1, 17).double()}, {"width": 8}])
def test_what_it_extends_masks_or_holds_against_a_number_stays_whole(options):
    model, x = made(False, **options)
    groups = find_groups(model, x)
    assert not [str(group.root) for group in groups if group.prunable and group.root.layer in ["mlp", "q", "k", "v"]]
    reasons = {group.kept_whole for group in groups if group.root.layer in ("mlp", "q", "k", "v")}
    expected = "has to have a constant width of 8" if "width" in options else "is taken by multi_head_attention_forward"
    assert all(reason.startswith(expected) for reason in reasons)
    assert prune_to(model, x, criterion="l1", ratio=0.3, progress=False).channels_removed


def test_the_attention_pool_of_a_clip():
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    pool = open_clip.modified_resnet.AttentionPool2d(4, 16, 4, 6)
    model, x = nn.Sequential(nn.Conv2d(3, 16, 1), pool).double().eval(), torch.randn(2, 3, 4, 4).double()
    plan = make_plan(score_groups(model, find_groups(model, x), "l1"), ratio=0.5, scope="local")
    assert prune(model, plan)[1].q_proj.weight.shape == (8, 8)
    check_plan(model, plan, x).raise_if_failed()
