"""The benchmark beside torch_pruning, on a small network; its figures are those of results/architectures.csv."""

from pathlib import Path

import architectures
import pytest
import torch
from architectures import SIDES, Parts, rows_of

from obc_tools import load_model

COUNTS_MEMORY = Path("/proc/self/clear_refs").exists()


@pytest.mark.parametrize("side", SIDES if COUNTS_MEMORY else [])
def test_both_sides_prune_half_and_say_what_each_part_takes(side, monkeypatch):
    model = load_model("torchvision:resnet18", num_classes=5).eval()
    pruned = []
    if side == "ours":
        prune = architectures.prune
        monkeypatch.setattr(architectures, "prune", lambda *args: pruned.append(prune(*args)) or pruned[0])
    parts = SIDES[side](model, torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    assert parts.seconds.keys() == parts.megabytes.keys()
    assert min(parts.seconds.values()) > 0 and min(parts.megabytes.values()) >= 0
    found = pruned[0] if side == "ours" else model
    assert (found.conv1.out_channels, found.layer4[0].conv1.out_channels, found.fc.out_features) == (32, 256, 5)


def test_a_row_leaves_out_a_forward_and_backward_once():
    names = ("forward and backward", "find_groups", "score_groups", "make_plan", "prune")
    mine = Parts(dict(zip(names, (5.0, 1.0, 7.0, 0.5, 0.5), strict=True)), dict.fromkeys(names, 10.0))
    other = Parts({"graph": 3.0, "step": 1.0}, {"graph": 20.0, "step": 5.0})
    row = rows_of("resnet18", 1, {"ours": mine, "torch_pruning": other})
    assert (row["ours besides (s)"], row["theirs (s)"], row["ratio"]) == (4.0, 4.0, 1.0)
    assert (row["ours besides (MB)"], row["theirs (MB)"]) == (10.0, 20.0)
    quick = Parts(mine.seconds | {"score_groups": 4.0}, mine.megabytes)
    assert rows_of("resnet18", 1, {"ours": quick, "torch_pruning": other})["ours besides (s)"] == 2.0
