#!/usr/bin/env bash
# torch 2.14.1: FlopCounterMode counts 0 for attention and recurrent layers on a CPU, depending on how they are called.
#
# A good guess: torch.utils.flop_counter has formulas for scaled_dot_product_attention, so a transformer's count is that
# of its products, whatever the device, the kernel and the grad mode. What happens on a CPU:
#   - F.scaled_dot_product_attention takes a flash kernel of its own for CPUs, which is not in the counter's table: 0.
#     The same call under sdpa_kernel(SDPBackend.MATH) is counted in full.
#   - nn.MultiheadAttention in eval mode without gradients takes its fast path, one fused operation: even its four
#     projections count 0. With gradients the same call counts them.
#   - nn.LSTM runs as one fused mkldnn operation: 0, with and without gradients; with mkldnn switched off it is counted.
# So the count of one network changes with no_grad(), and comparing a pruned with an unpruned transformer by it is wrong.
#
# Output seen (2026-11-27, Linux x86-64, CPU):
#   attention: 0, by the math kernel: 1048576
#   MultiheadAttention: 2097152 with gradients, 0 without
#   LSTM: 0, without mkldnn: 40960
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.14.1' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'EOF'
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


heads = torch.randn(1, 4, 64, 16)
attention = lambda: F.scaled_dot_product_attention(heads, heads, heads)
flash = count(attention)
with sdpa_kernel(SDPBackend.MATH):
    math = count(attention)
print(f"attention: {flash}, by the math kernel: {math}")

layer, tokens = nn.MultiheadAttention(64, 4, batch_first=True).eval(), torch.randn(1, 64, 64)
call = lambda: layer(tokens, tokens, tokens, need_weights=False)
with_gradients = count(call)
with torch.no_grad():
    without = count(call)
print(f"MultiheadAttention: {with_gradients} with gradients, {without} without")

lstm, steps = nn.LSTM(16, 16, batch_first=True), torch.randn(1, 10, 16)
fused = count(lambda: lstm(steps))
with torch.backends.mkldnn.flags(enabled=False):
    cells = count(lambda: lstm(steps))
print(f"LSTM: {fused}, without mkldnn: {cells}")

assert (flash, math) == (0, 2 * 2 * 4 * 64 * 64 * 16)
assert with_gradients == 4 * 2 * 64 * 64 * 64 and without == 0
assert fused == 0 and cells == 2 * 10 * 2 * 4 * 16 * 16
EOF
