#!/usr/bin/env bash
# torch-pruning 1.6.1: count_ops_and_params counts 0 operations for subclasses of Conv2d, and stride² times too many for
# transposed convolutions.
#
# A good guess: a class that only derives from nn.Conv2d (timm's Conv2dSame and StdConv2d, a user's own) costs what a
# Conv2d costs. The counter looks a layer's exact type up in a table, finds nothing, and says nothing: of a network built of
# such layers it counts the norms and activations alone, and "2x fewer MACs" is reached by removing the wrong thing.
# Its parameters are counted right, so the two columns of a table do not fit together. A transposed convolution
# multiplies each input position by its kernel once; counted is the kernel once for each output position.
#
# Output seen (2026-11-27, torch 2.14.1, Linux x86-64, CPU):
#   Conv2d: 8064 operations, its subclass: 0 operations, parameters 224 and 224
#   ConvTranspose2d: 26624 operations, by hand: 6144 multiply-adds and 2048 additions of the bias
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.14.1' 'numpy==2.4.6' 'torch-pruning==1.6.1'
"$folder/venv/bin/python" - <<'EOF'
import torch
from torch import nn
from torch_pruning.utils import count_ops_and_params


class Derived(nn.Conv2d):
    """Differs from its parent in nothing but its name."""


images = torch.randn(1, 3, 8, 8)
plain, parameters = count_ops_and_params(nn.Sequential(nn.Conv2d(3, 8, 3)), images)
derived, same = count_ops_and_params(nn.Sequential(Derived(3, 8, 3)), images)
print(f"Conv2d: {plain:.0f} operations, its subclass: {derived:.0f} operations, parameters {parameters} and {same}")
transposed, _ = count_ops_and_params(nn.Sequential(nn.ConvTranspose2d(3, 8, 2, stride=2)), images)
by_hand, bias = 8 * 8 * 3 * 8 * 2 * 2, 16 * 16 * 8
print(f"ConvTranspose2d: {transposed:.0f} operations, by hand: {by_hand} multiply-adds and {bias} additions of the bias")

assert plain == 6 * 6 * 8 * (3 * 9 + 1) and derived == 0 and parameters == same
assert transposed == 4 * by_hand + bias
EOF
