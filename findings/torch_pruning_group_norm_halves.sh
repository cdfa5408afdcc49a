#!/usr/bin/env bash
# torch-pruning 1.6.1: a convolution before GroupNorm(32, 64) loses half of its channels at every pruning ratio up to 0.5,
# and none above it.
#
# A good guess: pruning_ratio=0.1 removes about a tenth of 64 channels, rounded so that 32 groups stay equal. The channels
# that may go are kept a multiple of the norm's groups, 32 or 64 of 64; any small ratio rounds to 32 kept, and a ratio above
# 0.5, whose rounded rest would be 0, leaves the layer alone. A ratio sweep shows a step where it should show a curve, and
# the strongest setting prunes nothing.
#
# Output seen (2026-11-27, torch 2.14.1, Linux x86-64, CPU): channels kept of 64
#   ratio 0.1: 32, 0.3: 32, 0.5: 32, 0.6: 64, 0.7: 64
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.14.1' 'numpy==2.4.6' 'torch-pruning==1.6.1'
"$folder/venv/bin/python" - <<'EOF'
import torch
import torch_pruning as tp
from torch import nn

kept = {}
for ratio in (0.1, 0.3, 0.5, 0.6, 0.7):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.GroupNorm(32, 64), nn.ReLU(), nn.Conv2d(64, 10, 1))
    options = {"importance": tp.importance.MagnitudeImportance(p=2), "ignored_layers": [model[3]]}
    tp.pruner.MagnitudePruner(model, torch.randn(1, 3, 8, 8), pruning_ratio=ratio, **options).step()
    kept[ratio] = model[0].out_channels
print("ratio " + ", ".join(f"{ratio}: {channels}" for ratio, channels in kept.items()))
assert list(kept.values()) == [32, 32, 32, 64, 64]
EOF
