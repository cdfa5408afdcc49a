#!/usr/bin/env bash
# torch-pruning 1.6.1: where a user narrows a group's choice, group.prune(idxs=...), the history keeps both choices, and
# loading it removes both.
#
# A good guess: pruning_history() is what was done, and load_pruning_history() on a fresh network of the same kind
# gives the widths of the pruned one, as the README uses it to load a state_dict. That holds for step() and for group.prune().
# With idxs, which the interactive loop is there for, a choice of two of eight is written down as "2", then as "8": the
# fresh network loses the union, once more renumbered, and its shapes do not fit the pruned network's state_dict.
#
# Output seen (2026-11-28, Linux x86-64, CPU):
#   all that was proposed: pruned to 8, 8; from its history 8, 8
#   two of each group:     pruned to 14, 14; from its history 6, 6
#   lengths in that history: [('second', 2), ('second', 8), ('first', 2), ('first', 8)]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.14.1' 'torch-pruning==1.6.1' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'END' 2>/dev/null
from collections import OrderedDict

import torch
import torch_pruning as tp
from torch import nn


def pruner():
    torch.manual_seed(0)
    layers = [("first", nn.Conv2d(3, 16, 3)), ("relu", nn.ReLU()), ("second", nn.Conv2d(16, 16, 3)), ("last", nn.Conv2d(16, 4, 1))]
    model = nn.Sequential(OrderedDict(layers))
    importance = tp.importance.MagnitudeImportance(p=2)
    return tp.pruner.BasePruner(model, torch.zeros(1, 3, 8, 8), importance, pruning_ratio=0.5, ignored_layers=[model.last])


def widths(narrow):
    one, other = pruner(), pruner()
    for group in one.step(interactive=True):
        idxs = group[0].idxs[:2]
        group.prune(idxs=idxs) if narrow else group.prune()
    other.load_pruning_history(one.pruning_history())
    seen = [(p.model.first.out_channels, p.model.second.out_channels) for p in (one, other)]
    return seen, [(name, len(idxs)) for name, _, idxs in one.pruning_history()]


(whole, again), _ = widths(narrow=False)
print(f"all that was proposed: pruned to {whole[0]}, {whole[1]}; from its history {again[0]}, {again[1]}")
assert whole == again == (8, 8)
(part, again), history = widths(narrow=True)
print(f"two of each group:     pruned to {part[0]}, {part[1]}; from its history {again[0]}, {again[1]}")
print("lengths in that history:", history)
assert part == (14, 14) and again != part
assert len(history) == 4
END
