"""Whole heads, parts of transformers, and models that are not simply called, through all that takes example inputs."""

import pytest
import torch
from networks import Attention
from torch import nn

from obc_tools import (
    EquivalentModel,
    Forward,
    LayerAxis,
    check_plan,
    cost,
    cost_model,
    find_groups,
    jacobian_products,
    latency,
    load_model,
    prune,
    prune_to,
    score_groups,
)
from obc_tools.structure.groups import loses_heads


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(7), Attention(), nn.LayerNorm(7)
        self.attn.proj = nn.Linear(24, 7)
        self.mlp = nn.Sequential(nn.Linear(7, 20), nn.GELU(), nn.Linear(20, 7))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Two blocks with three heads of eight; the positions are a parameter of two labelled dimensions."""

    def __init__(self):
        super().__init__()
        self.embed, self.positions = nn.Linear(5, 7), nn.Parameter(torch.randn(1, 6, 7))
        self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(7, 3)

    def forward(self, x):
        return self.head(self.blocks(self.embed(x) + self.positions).mean(1))


def made():
    torch.manual_seed(0)
    return Transformer().double().eval(), torch.randn(4, 6, 5, dtype=torch.float64)


def batches(tokens):
    return [(tokens, torch.tensor([0, 1, 2, 0]))]


def prunable(groups):
    return [(str(group.root), group.width) for group in groups if group.prunable]


HEADS = [("blocks.0.attn.qkv.out", 24), ("blocks.1.attn.qkv.out", 24)]
HIDDEN = [("blocks.0.mlp.0.out", 20), ("blocks.1.mlp.0.out", 20)]


def test_each_part_by_itself():
    model, tokens = made()
    parts = {only: prunable(find_groups(model, tokens, only=only)) for only in ("mlp", "attention", "bottleneck", None)}
    assert parts["mlp"] == HIDDEN and parts["attention"] == HEADS
    assert sorted(parts["bottleneck"]) == sorted(HIDDEN + HEADS)
    assert sorted(parts[None]) == sorted([*HIDDEN, *HEADS, ("blocks.1.mlp.2.out", 7)])
    whole = {str(g.root): g.kept_whole for g in find_groups(model, tokens, only="mlp") if not g.prunable}
    assert whole["blocks.0.attn.qkv.out"] == "is of the attention, and only='mlp' is pruned"
    with pytest.raises(ValueError, match="unknown only 'heads'; known: None, attention, bottleneck, mlp"):
        find_groups(model, tokens, only="heads")


@pytest.mark.parametrize("only", ["mlp", "attention", "bottleneck", None])
@pytest.mark.parametrize("whole_heads", [False, True])
def test_a_target_is_met_and_right(only, whole_heads):
    model, tokens = made()
    options = {"only": only, "whole_heads": whole_heads, "steps": 2, "progress": False, "seed": 1}
    plan = prune_to(model, tokens, batches(tokens), ratio=1 / 3, **options)
    assert plan.channels_removed > 0
    assert cost_model(model, tokens, whole_heads=whole_heads).of(plan) == cost(prune(model, plan), tokens)
    check = check_plan(model, plan, tokens)
    assert check.ok and check.error_of("pruned = masked") < 1e-12, check


def test_heads_go_as_a_whole():
    model, tokens = made()
    plan = prune_to(
        model, tokens, criterion="l1", ratio=1 / 3, scope="local", only="attention", whole_heads=True, progress=False
    )
    pruned = prune(model, plan)
    assert [block.attn.num_heads for block in pruned.blocks] == [2, 2]
    assert all(block.attn.head_dim == 8 for block in pruned.blocks) and not plan.scaled


def test_costs_follow_the_heads_of_timms_attention():
    torch.manual_seed(0)
    small = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 24, "depth": 2, "num_heads": 4}
    model, images = load_model("timm:vit_tiny_patch16_224", 5, **small).eval(), torch.randn(2, 1, 8, 8)
    for only in ("attention", None):
        options = {"only": only, "whole_heads": True, "ratio": 0.5, "scope": "local"}
        plan = prune_to(model, images, criterion="random", progress=False, **options)
        pruned = prune(model, plan)
        assert pruned.blocks[0].attn.num_heads < 4
        assert cost_model(model, images, whole_heads=True).of(plan) == cost(pruned, images)


def test_a_number_of_heads_that_stays_is_no_whole_head():
    class Biased(Attention):
        """Adds a bias a head, made by a layer as wide as there are heads."""

        def __init__(self):
            super().__init__()
            self.hidden, self.bias = nn.Linear(1, 8), nn.Linear(8, 3)

        def attend(self, q, k, v):
            distances = torch.arange(36, dtype=q.dtype).view(6, 6, 1).sin()
            bias = self.bias(self.hidden(distances).relu()).view(6, 6, self.num_heads).permute(2, 0, 1)
            return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    torch.manual_seed(0)
    model, tokens = Biased().double(), torch.randn(2, 6, 7, dtype=torch.float64)
    for whole_heads in (False, True):
        plan = prune_to(model, tokens, criterion="l1", ratio=0.4, steps=1, whole_heads=whole_heads, progress=False)
        assert loses_heads(plan.groups) == whole_heads
        assert check_plan(model, plan, tokens).ok


class Named(nn.Module):
    """Two named inputs, a dict of outputs, and a forward pass of another name."""

    def __init__(self):
        super().__init__()
        self.one, self.other, self.last = nn.Linear(5, 8), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, *, one, other):
        x = (self.one(one) + self.other(other)).relu()
        return {"logits": self.last(x), "hidden": x}


def logits(model, inputs):
    return model(**inputs)["logits"]


def test_a_model_with_a_forward_of_its_own():
    torch.manual_seed(0)
    model = Named().double().eval()
    inputs = {"one": torch.randn(4, 5).double(), "other": torch.randn(4, 4).double()}
    assert not prunable(find_groups(model, inputs))
    forward = Forward(logits, inputs)
    groups = find_groups(model, forward)
    assert prunable(groups) in ([("one.out", 8)], [("other.out", 8)])
    labels = torch.tensor([0, 1, 2, 0])

    def objective(model, batch):
        return nn.functional.cross_entropy(logits(model, batch[0]), batch[1], reduction="none")

    products = jacobian_products(model, [(inputs, labels)], rows="sample", objective=objective)
    assert products["one", "out"].shape == (4, 8)
    plan = prune_to(model, forward, [(inputs, labels)], ratio=0.5, steps=2, objective=objective, progress=False)
    assert plan.channels_removed == 4 and check_plan(model, plan, forward).ok
    equivalent = EquivalentModel(model, plan)
    torch.testing.assert_close(logits(equivalent, inputs), logits(prune(model, plan), inputs))
    assert cost(model, forward).macs == cost(model, inputs).macs > 0
    assert latency(prune(model, plan), forward, repeats=2, warmup=1)


def test_all_dimensions_of_bare_parameters_are_scored():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.matrix, self.last = nn.Linear(5, 6), nn.Parameter(torch.randn(6, 8)), nn.Linear(8, 3)

        def forward(self, x):
            return self.last((self.first(x).relu() @ self.matrix).relu())

    torch.manual_seed(0)
    model, images = Mixing().double(), torch.randn(4, 5).double()
    groups = [group for group in find_groups(model, images) if group.prunable]
    assert any(member.axis == ("matrix", "dim0") for group in groups for member in group.members)
    batch = images, torch.tensor([0, 1, 2, 0])
    scores = score_groups(model, groups, "jacobian", [batch])
    nn.functional.cross_entropy(model(images), batch[1]).backward()
    first = next(group for group in groups if group.root.layer == "first")
    layer, matrix = model.first, model.matrix
    expected = (layer.weight * layer.weight.grad).sum(1).add(layer.bias * layer.bias.grad).square()
    expected = expected + (matrix * matrix.grad).sum(1).square()
    torch.testing.assert_close(scores[first], expected.detach(), rtol=1e-10, atol=0)
    for rows in ("sample", 2):
        by_row = score_groups(model, groups, ("jacobian", {"rows": rows}), [batch])
        assert all(value.isfinite().all() and value.sum() > 0 for value in by_row.values())
    plan = prune_to(model, images, [batch], ratio=0.4, steps=1, progress=False)
    assert check_plan(model, plan, images).ok


@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True, "num_layers": 2}, {"bias": False, "batch_first": True}], ids=str
)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU], ids=["lstm", "gru"])
def test_what_a_recurrent_layer_reads_goes(kind, options):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.front, self.memory = nn.Linear(5, 8), kind(8, 6, **options)
            self.last = nn.Linear(6 * (1 + self.memory.bidirectional), 3)

        def forward(self, x):
            return self.last(self.memory(self.front(x).relu())[0].mean(1))

    torch.manual_seed(0)
    model, x = Reads().eval(), torch.randn(4, 3, 5)  # in single precision, where an LSTM's kernel is fused
    plan = prune_to(model, x, criterion="l1", ratio=0.5, progress=False)
    kept = plan.shrunk[LayerAxis("front", "out")]
    assert len(kept) == 4 and check_plan(model, plan, x).ok
    pruned, gone = prune(model, plan), sorted({*range(8)} - {*kept})
    assert pruned.memory.input_size == 4 and pruned.memory.weight_ih_l0.shape[1] == 4
    with torch.no_grad():
        model.front.weight[gone], model.front.bias[gone] = 0, 0
    torch.testing.assert_close(pruned(x), model(x), rtol=1e-5, atol=1e-6)
