"""Queries, keys and values of one layer, cut apart by numbers that modules and configurations keep."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from obc_tools import Forward, LayerAxis, check_plan, find_groups, make_plan, prune, score_groups

WIDTH = 6


@dataclass
class Config:
    """The numbers of an attention, which all layers share."""

    heads: int = 4
    shared: int = 2


def by_slices(model, x: Tensor):
    queries, keys = model.config.heads * model.head_dim, model.config.shared * model.head_dim
    return x[..., :queries], x[..., queries : queries + keys], x[..., queries + keys :]


def by_sizes(model, x: Tensor):
    queries, keys = model.config.heads * model.head_dim, model.config.shared * model.head_dim
    return x.split([queries, keys, keys], dim=-1)


def by_narrow(model, x: Tensor):
    queries, keys = model.config.heads * model.head_dim, model.config.shared * model.head_dim
    starts = ((0, queries), (queries, keys), (queries + keys, keys))
    return tuple(torch.narrow(x, -1, start, width) for start, width in starts)


def by_chunk(model, x: Tensor):
    return x.chunk(3, dim=-1)


CUTS = {"slices": (by_slices, 2), "sizes": (by_sizes, 2), "narrow": (by_narrow, 2), "equal": (by_slices, 4),
        "chunk": (by_chunk, 4)}  # fmt: skip


class Attention(nn.Module):
    """Heads of queries, fewer of keys and values from one layer; the heads turn by a table of fixed width."""

    def __init__(self, config, cut):
        super().__init__()
        self.config, self.cut, self.head_dim = config, cut, WIDTH
        self.qkv = nn.Linear(8, (config.heads + 2 * config.shared) * WIDTH)
        self.proj = nn.Linear(config.heads * WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        turns = torch.linspace(0.5, 1.5, WIDTH, dtype=x.dtype)
        q, k, v = (part.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2) for part in self.cut(self, self.qkv(x)))
        copies = self.config.heads // self.config.shared
        k, v = k.repeat_interleave(copies, dim=1), v.repeat_interleave(copies, dim=1)
        return self.proj(F.scaled_dot_product_attention(q * turns, k * turns, v).transpose(1, 2).flatten(2))


class Layers(nn.Module):
    def __init__(self, cut, shared, count=2):
        super().__init__()
        self.config = Config(shared=shared)
        self.layers = nn.ModuleList(Attention(self.config, cut) for _ in range(count))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def by_hand(model, x: Tensor, plan) -> Tensor:
    """Return what is left of a model of which only some heads of keys are kept, with their heads of queries."""
    config = model.config
    copies = config.heads // config.shared
    for number, layer in enumerate(model.layers):
        kept = plan.shrunk[LayerAxis(f"layers.{number}.proj", "in")]
        qkv = layer.qkv(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2)
        turns, mixed = torch.linspace(0.5, 1.5, WIDTH, dtype=x.dtype), torch.zeros_like(x) + layer.proj.bias
        for head in sorted({column // WIDTH for column in kept}):
            q, k = (qkv[:, at] * turns for at in (head, config.heads + head // copies))
            value = (q @ k.mT / WIDTH**0.5).softmax(-1) @ qkv[:, config.heads + config.shared + head // copies]
            mixed = mixed + value @ layer.proj.weight[:, WIDTH * head : WIDTH * (head + 1)].T
        x = x + mixed
    return model.head(x)


@pytest.mark.parametrize("name", CUTS)
def test_heads_of_keys_go_with_their_queries_and_shared_numbers_with_all_layers(name):
    torch.manual_seed(0)
    cut, shared = CUTS[name]
    model, x = Layers(cut, shared).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    groups = find_groups(model, x, ignore="*proj")
    plan = make_plan(score_groups(model, groups, "random"), ratio=0.5, scope="local")
    pruned = prune(model, plan)
    for layer in pruned.layers:
        assert (layer.qkv.out_features, layer.proj.in_features) == ((2 + shared) * WIDTH, 2 * WIDTH)
        assert layer.config is pruned.config
    assert model.config == Config(4, shared)
    assert pruned.config == (model.config if name == "chunk" else Config(2, shared // 2))
    torch.testing.assert_close(pruned(x), by_hand(model, x, plan), rtol=0, atol=1e-10)
    check_plan(model, plan, x).raise_if_failed()


@pytest.mark.parametrize("heads", [2, 4])
def test_a_phi3_loses_heads_of_keys_with_their_queries(heads):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_hidden_layers": 2}
    config = transformers.Phi3Config(**sizes, **tokens, num_key_value_heads=heads)
    torch.manual_seed(0)
    model = transformers.Phi3ForCausalLM(config).double().eval()
    run = Forward(lambda model, x: model(input_ids=x, use_cache=False).logits, torch.randint(3, 50, (2, 12)))
    plan = make_plan(score_groups(model, find_groups(model, run), "l1"), ratio=0.5, scope="local")
    pruned = prune(model, plan)
    attention, mlp = pruned.model.layers[1].self_attn, pruned.model.layers[1].mlp
    assert (model.config.num_attention_heads, pruned.config.num_attention_heads) == (4, 2)
    assert (attention.num_key_value_heads, attention.head_dim) == (heads // 2, 8)
    assert attention.qkv_proj.weight.shape == ((2 + heads) * 8, 16) and mlp.gate_up_proj.out_features == 48
    check_plan(model, plan, run).raise_if_failed()


def test_numbers_of_a_configuration_that_are_computed_with_keep_the_heads():
    torch.manual_seed(0)
    model, x = Layers(by_slices, 2).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    model.register_forward_hook(lambda model, args, out: out / model.config.heads)
    group = next(group for group in find_groups(model, x) if "qkv" in group.root.layer)
    assert "number in div" in group.kept_whole
