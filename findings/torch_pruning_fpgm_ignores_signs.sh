#!/usr/bin/env bash
# torch-pruning 1.6.1: FPGMImportance measures distances between squared weights, so that a filter and its negative are the
# same filter to it.
#
# A good guess: FPGM (He et al. 2019) scores a filter by the sum of its Euclidean distances to the other filters of its layer.
# The class takes a p, as the magnitude criteria do, and raises the weights' absolute values to it before it measures, 2 by
# default. Two filters of opposite sign are at distance 0 then, the most replaceable of all, and large weights count by
# their squares: the order of a layer changes.
#
# Output seen (2026-11-28, Linux x86-64, CPU), four filters [1, 0], [-1, 0], [0, 1.2], [0, -1.3] with a reader:
#   FPGM by the paper:     [5.2, 5.2, 5.62, 5.78]
#   torch-pruning, p=2:    [3.72, 3.72, 3.76, 4.18]
#   squared weights:       [3.72, 3.72, 3.76, 4.18]
#   of 64 random filters the 32 lowest have 0.81 in common
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.14.1' 'torch-pruning==1.6.1' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'END' 2>/dev/null
import torch
import torch_pruning as tp
from torch import nn


def scores(weights):
    """Return FPGM's scores of a layer: the paper's, torch-pruning's, and the paper's of squared weights."""
    layer = nn.Conv2d(weights.shape[1], len(weights), 1, bias=False)
    layer.weight.data = weights[:, :, None, None].clone()
    model = nn.Sequential(layer, nn.ReLU(), nn.Conv2d(len(weights), 2, 1))
    graph = tp.DependencyGraph().build_dependency(model, torch.zeros(1, weights.shape[1], 4, 4))
    group = graph.get_pruning_group(layer, tp.prune_conv_out_channels, list(range(len(weights))))
    found = tp.importance.FPGMImportance(p=2, group_reduction="first", normalizer=None)(group)
    square = weights.square()
    return torch.cdist(weights, weights).sum(1), found.detach(), torch.cdist(square, square).sum(1)


def shown(values):
    return [round(value, 2) for value in values.tolist()]


paper, found, squared = scores(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.2], [0.0, -1.3]]))
print("FPGM by the paper:    ", shown(paper))
print("torch-pruning, p=2:   ", shown(found))
print("squared weights:      ", shown(squared))
torch.testing.assert_close(found, squared)
assert not torch.allclose(found, paper)
torch.manual_seed(0)
paper, found, squared = scores(torch.randn(64, 27))
low = [set(values.argsort()[:32].tolist()) for values in (paper, found)]
print(f"of 64 random filters the 32 lowest have {len(low[0] & low[1]) / 32:.2f} in common")
assert low[0] != low[1]
END
