"""Attentions in which one head of keys and values serves several heads of queries."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from obc_tools import (
    Forward,
    LayerAxis,
    check_plan,
    cost,
    cost_model,
    explain,
    find_groups,
    make_plan,
    prune,
    prune_to,
    score_groups,
)
from obc_tools.structure.groups import loses_heads

WIDTH = 6


def turns():
    """Return a table of positions and channels, as rotary embeddings are."""
    return torch.linspace(0.5, 1.5, 5 * WIDTH, dtype=torch.float64).view(5, 1, WIDTH)


class Shared(nn.Module):
    """Four heads of queries on fewer of keys and values; ``attend`` says how they are shared."""

    def __init__(self, attend, rotary=False, shared=2):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim, self.copies = 4, shared, WIDTH, 4 // shared
        self.q, self.k, self.v, self.proj = (
            nn.Linear(8, 24),
            nn.Linear(8, shared * 6),
            nn.Linear(8, shared * 6),
            nn.Linear(24, 3),
        )
        self.attend, self.rotary = attend, rotary

    def forward(self, x):
        count, length, _ = x.shape
        q = self.q(x).view(count, length, self.n_heads, self.head_dim)
        k = self.k(x).view(count, length, self.n_kv_heads, self.head_dim)
        v = self.v(x).view(count, length, self.n_kv_heads, self.head_dim)
        if self.rotary:
            q, k = q * turns(), k * turns()
        mixed = self.attend(self, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(mixed.transpose(1, 2).flatten(2))


def expanded(model, q, k, v):
    def copied(x):
        count, heads, length, width = x.shape
        x = x[:, :, None, :, :].expand(count, heads, model.copies, length, width)
        return x.reshape(count, heads * model.copies, length, width)

    return F.scaled_dot_product_attention(q, copied(k), copied(v))


def interleaved(model, q, k, v):
    times = model.n_heads // model.n_kv_heads
    k, v = k.repeat_interleave(times, dim=1), torch.repeat_interleave(v, times, 1)
    return (q @ k.transpose(2, 3) / model.head_dim**0.5).softmax(-1) @ v


def by_the_kernel(model, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def side_by_side(model, q, k, v):
    q = q.unflatten(1, (model.n_kv_heads, model.copies))
    weights = torch.einsum("bgcqd,bgkd->bgcqk", q, k) / model.head_dim**0.5
    return torch.einsum("bgcqk,bgkd->bgcqd", weights.softmax(-1), v).flatten(1, 2)


WAYS = (expanded, interleaved, by_the_kernel, side_by_side)


def made(attend, **options):
    torch.manual_seed(0)
    return Shared(attend, **options).double().eval(), torch.randn(2, 5, 8, dtype=torch.float64)


def planned(model, inputs, **options):
    groups = find_groups(model, inputs, **options)
    return make_plan(score_groups(model, groups, "random"), ratio=0.5, scope="local")


def by_hand(model, x, plan):
    """Return what the kept heads and channels give, head by head."""

    def kept(name):
        return sorted(plan.shrunk.get(LayerAxis(name, "out"), range(getattr(model, name).out_features)))

    def of(name, head):
        rows = [row for row in kept(name) if row // WIDTH == head]
        layer, turned = getattr(model, name), model.rotary and name != "v"
        return F.linear(x, layer.weight[rows], layer.bias[rows]) * (turns()[:, 0] if turned else 1)

    heads = []
    for head in sorted({row // WIDTH for row in kept("q")}):
        scores = of("q", head) @ of("k", head // model.copies).transpose(1, 2) * WIDTH**-0.5
        heads.append(scores.softmax(-1) @ of("v", head // model.copies))
    columns = [
        WIDTH * head + row % WIDTH for head in range(4) for row in kept("v") if row // WIDTH == head // model.copies
    ]
    return F.linear(torch.cat(heads, -1), model.proj.weight[:, columns], model.proj.bias)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("attend", WAYS, ids=lambda attend: attend.__name__)
def test_a_head_of_keys_goes_with_its_heads_of_queries(attend, rotary):
    model, inputs = made(attend, rotary=rotary)
    plan = planned(model, inputs, whole_heads=True)
    assert loses_heads(plan.groups)
    pruned = prune(model, plan)
    assert (pruned.n_heads, pruned.n_kv_heads, pruned.copies, pruned.head_dim) == (2, 1, 2, WIDTH)
    assert (pruned.q.out_features, pruned.k.out_features, pruned.v.out_features) == (12, 6, 6)
    torch.testing.assert_close(pruned(inputs), by_hand(model, inputs, plan), rtol=0, atol=1e-10)
    check_plan(model, plan, inputs).raise_if_failed()


@pytest.mark.parametrize("attend", WAYS, ids=lambda attend: attend.__name__)
@pytest.mark.parametrize("shared", [1, 2])
def test_all_heads_become_narrower(attend, shared):
    model, inputs = made(attend, shared=shared)
    plan = planned(model, inputs)
    pruned = prune(model, plan)
    assert (pruned.n_heads, pruned.n_kv_heads, pruned.copies, pruned.head_dim) == (4, shared, 4 // shared, WIDTH // 2)
    torch.testing.assert_close(pruned(inputs), by_hand(model, inputs, plan), rtol=0, atol=1e-10)
    check_plan(model, plan, inputs).raise_if_failed()


@pytest.mark.parametrize("attend", WAYS, ids=lambda attend: attend.__name__)
def test_heads_that_meet_a_table_of_fixed_width_stay_as_wide(attend):
    found = explain(find_groups(*made(attend, rotary=True)))
    assert {found.why_whole(name) for name in "qk"} == {"meets a tensor of fixed width"}


@pytest.mark.parametrize("attend", WAYS, ids=lambda attend: attend.__name__)
def test_heads_that_share_one_head_of_keys_do_not_go(attend):
    found = explain(find_groups(*made(attend, shared=1), whole_heads=True))
    assert not {"q", "k", "v"} & {group.root.layer for group in found.prunable} and found.why_whole("q")


def llama(transformers, heads, **sizes):
    torch.manual_seed(0)
    options = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4} | sizes
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.LlamaConfig(
        **options, **tokens, num_key_value_heads=heads, num_hidden_layers=2, head_dim=16, attn_implementation="sdpa"
    )
    return transformers.LlamaForCausalLM(config).double().eval()


def indexed(model, plan):
    """Return the weights of a model, cut by the plan's positions alone."""
    state = model.state_dict()
    for axis, positions in plan.shrunk.items():
        name = axis.layer if axis.layer in state else f"{axis.layer}.weight"
        if name in state:
            embedding = "embed_tokens" in name
            dim = int((axis.axis == "in") != embedding) if state[name].dim() > 1 else 0
            state[name] = state[name].index_select(dim, torch.tensor(positions))
    return state


@pytest.mark.parametrize("whole_heads", [False, True])
@pytest.mark.parametrize("heads", [2, 4])
def test_a_llama_four_times_as_fast_is_a_smaller_llama(heads, whole_heads):
    transformers = pytest.importorskip("transformers")
    model = llama(transformers, heads)
    inputs = Forward(lambda model, x: model(input_ids=x, use_cache=False).logits, torch.randint(3, 50, (2, 12)))
    plan = prune_to(model, inputs, criterion="l2", speedup=4, steps=2, scope="local", whole_heads=whole_heads)
    pruned = prune(model, plan)
    before, after = cost(model, inputs), cost(pruned, inputs)
    assert before.macs / after.macs >= 4
    assert cost_model(model, inputs, whole_heads=whole_heads).of(plan) == after
    state = indexed(model, plan)
    queries = state["model.layers.0.self_attn.q_proj.weight"]
    keys, hidden = state["model.layers.0.self_attn.k_proj.weight"], state["model.layers.0.mlp.up_proj.weight"]
    assert queries.shape[0] // keys.shape[0] == 4 // heads and queries.shape[0] < 64
    sizes = {"hidden_size": queries.shape[1], "intermediate_size": hidden.shape[0]}
    small = llama(transformers, keys.shape[0] // 16, **sizes, num_attention_heads=queries.shape[0] // 16)
    small.load_state_dict(state)
    padded = torch.ones(2, 12, dtype=torch.long)
    padded[0, :4] = 0
    for mask in (None, padded):
        ours, theirs = (network(input_ids=inputs.inputs, attention_mask=mask).logits for network in (pruned, small))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
