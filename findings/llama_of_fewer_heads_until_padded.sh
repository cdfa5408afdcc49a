#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.14.1: a Llama with grouped-query attention that lost query heads, with the same number left in each
# group, runs under SDPA (the default attention) for whole sequences, and raises as soon as a batch is padded.
#
# A good guess: a network that runs, and equals the masked one, is pruned rightly. The layers read head counts off their projections
# (view(..., -1, head_dim)), but how often a key is repeated, num_key_value_groups, was read from the config at construction. For
# whole sequences SDPA gets no mask and handles grouped heads by itself, from the shapes; with a padded batch the keys are repeated
# first, by the old number. A test without padding never sees it.
#
# Output seen (2026-11-28, Linux x86-64, CPU), two of four query heads left, two key/value heads:
#   whole sequences: ran, logits (2, 10, 64)
#   a padded batch: RuntimeError, The size of tensor a (2) must match the size of tensor b (4) at non-singleton dimension 1
#   a padded batch, num_key_value_groups = 1: ran, logits (2, 10, 64)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.14.1' 'transformers==5.24.0' 'numpy==2.4.6'
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'END' 2>/dev/null
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def linear(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    return layer


def pruned(groups=None):
    """Return a Llama that lost the second query head of each group of two."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=8)
    model = LlamaForCausalLM(config).eval()
    kept = torch.arange(32).view(4, 8)[[0, 2]].flatten()
    for block in model.model.layers:
        attention = block.self_attn
        attention.q_proj = linear(attention.q_proj.weight.data[kept])
        attention.o_proj = linear(attention.o_proj.weight.data[:, kept])
        if groups is not None:
            attention.num_key_value_groups = groups
    return model


def said(what, model, mask):
    tokens = torch.arange(20).view(2, 10)
    try:
        with torch.no_grad():
            found = f"ran, logits {tuple(model(input_ids=tokens, attention_mask=mask).logits.shape)}"
    except RuntimeError as error:
        found = f"RuntimeError, {error}"
    print(f"{what}: {found}")
    return found


whole = torch.ones(2, 10, dtype=torch.long)
padded = whole.clone()
padded[0, :3] = 0
assert said("whole sequences", pruned(), whole).startswith("ran")
assert said("a padded batch", pruned(), padded).startswith("RuntimeError")
assert said("a padded batch, num_key_value_groups = 1", pruned(groups=1), padded).startswith("ran")
END
