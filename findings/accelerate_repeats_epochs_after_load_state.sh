#!/usr/bin/env bash
# accelerate 1.15.0: after load_state, a prepared DataLoader with use_seedable_sampler=True goes through its first epochs again, in the same
# orders; set_epoch moves it on.
#
# A good guess: save_state after two epochs and load_state in a new process go on with the third epoch's order, since save_state
# writes the sampler to a file of its own and the option is there "for reproducibility". The file holds the sampler's seed
# and generator; the number of the epoch, which the order is drawn from, lives in the DataLoader's wrapper and starts at 0.
# A resumed training sees the first orders twice and the last ones never, and nothing looks wrong.
#
# Output seen (2026-11-28, Linux x86-64, CPU), orders of eight examples:
#   undisturbed, four epochs:  40732516 54267310 04726513 24351067
#   saved after two, loaded:   40732516 54267310
#   loaded, then set_epoch(2): 04726513 24351067
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.14.1' 'accelerate==1.15.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - "$folder/state" <<'END' 2>/dev/null
import sys

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader, TensorDataset


def made():
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    return accelerator, accelerator.prepare(DataLoader(TensorDataset(torch.arange(8)), batch_size=8, shuffle=True))


def order(loader):
    (batch,) = loader
    return "".join(str(number) for number in batch[0].tolist())


accelerator, loader = made()
orders = [order(loader), order(loader)]
accelerator.save_state(sys.argv[1])
orders += [order(loader), order(loader)]
print("undisturbed, four epochs: ", *orders)
accelerator, loader = made()
accelerator.load_state(sys.argv[1])
loaded = [order(loader), order(loader)]
print("saved after two, loaded:  ", *loaded)
accelerator, loader = made()
accelerator.load_state(sys.argv[1])
loader.set_epoch(2)
moved = [order(loader), order(loader)]
print("loaded, then set_epoch(2):", *moved)
assert len(set(orders)) == 4
assert loaded == orders[:2]
assert moved == orders[2:]
END
