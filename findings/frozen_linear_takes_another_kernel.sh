#!/usr/bin/env bash
# torch 2.14.1: freezing a Linear layer's weight changes which product its forward and backward pass run: on an input that
# is not contiguous, one matrix product becomes a batched one.
#
# A good guess: requires_grad_(False) on a weight leaves the forward pass as it is and takes work away from the backward
# pass. For an input of three dimensions F.linear decides by requires_grad whether the leading dimensions are folded into
# one large product (mm) or kept as a batch (bmm with an expanded weight), unless the input can be folded for nothing. A
# vision transformer's patches, transposed after a convolution, cannot: with frozen weights each of its images
# is multiplied apart, and on CPUs the pass that computes less takes longer. x.contiguous() brings the one product back.
#
# Output seen (2026-11-27, Linux x86-64, CPU): operations of forward and backward
#   trained weight: {'aten::mm': 3}
#   frozen weight: {'aten::bmm': 2}
#   frozen weight, contiguous input: {'aten::addmm': 1, 'aten::mm': 1}
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.14.1' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'EOF' 2>/dev/null
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
layer = nn.Linear(64, 64)
patches = torch.randn(8, 64, 197).transpose(1, 2).requires_grad_()


def products(tokens):
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        layer(tokens).sum().backward()
    return {event.key: event.count for event in seen.key_averages() if event.key in PRODUCTS}


trained = products(patches)
layer.weight.requires_grad_(False), layer.bias.requires_grad_(False)
frozen, copied = products(patches), products(patches.detach().contiguous().requires_grad_())
print("trained weight:", trained)
print("frozen weight:", frozen)
print("frozen weight, contiguous input:", copied)
assert "aten::bmm" not in trained and "aten::mm" not in frozen and frozen["aten::bmm"] == 2
assert "aten::bmm" not in copied
EOF
