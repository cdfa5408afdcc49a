#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.14.1: a Mixtral whose experts are 30 wide is built, counted and saved as any other, and its
# forward pass raises. At 32 it runs.
#
# A good guess: a config's intermediate_size may be any number, as in every layer of torch's nn, and as Mixtral's experts had
# it when each was a pair of Linear layers. They are one kernel now, torch's grouped_mm, which takes rows of whole 16 bytes
# alone: multiples of 4 in float32, of 8 in bfloat16. So a width that a pruning leaves, or a small config made for a test, decides
# whether the network runs. Nothing checks it at construction, and the error names strides, not the width.
# model.set_experts_implementation("eager"), or "batched_mm", runs any width. (Related: huggingface/transformers issue 48644.)
#
# Output seen (2026-11-28, Linux x86-64, CPU, float32):
#   32 wide, grouped_mm (the default): ran
#   30 wide, grouped_mm (the default): RuntimeError, strides should be multiple of 16 bytes
#   30 wide, eager: ran
#   30 wide, batched_mm: ran
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.14.1' 'transformers==5.24.0' 'numpy==2.4.6'
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'EOF' 2>/dev/null
import torch
from transformers import MixtralConfig, MixtralForCausalLM


def said(width, implementation=None):
    config = MixtralConfig(vocab_size=32, hidden_size=32, intermediate_size=width, num_hidden_layers=1, num_attention_heads=4,
                           num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    model = MixtralForCausalLM(config).eval()
    if implementation is not None:
        model.set_experts_implementation(implementation)
    name = implementation or f"{model.config._experts_implementation} (the default)"
    try:
        with torch.no_grad():
            model(torch.arange(8)[None])
        found = "ran"
    except RuntimeError as error:
        found = f"RuntimeError, {str(error).splitlines()[0]}"
    print(f"{width} wide, {name}: {found}")
    return found


assert said(32) == "ran"
assert "16 bytes" in said(30)
assert said(30, "eager") == said(30, "batched_mm") == "ran"
EOF
