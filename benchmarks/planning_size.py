"""What a plan costs as the network gets deeper or wider, or more batches are scored.

    python benchmarks/planning_size.py [--note "quiet"]        # writes results/planning_size.csv

CIFAR ResNets of random weights and images of 32 pixels, `prune_to` twice fewer MACs in two steps by the Jacobian
Criterion, batches of 32: with 1, 2, 4 and 8 times the blocks, the channels and the batches of the smallest. Each in a
process of its own: the processor's seconds of finding the groups with their costs and of the whole plan, those of as
many plain forward and backward passes of the unpruned network, and how much more memory planning held at most than the
process after some such passes. Denormal numbers count as zero.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import psutil
import torch
import tyro
from torch.nn import functional as F
from tqdm.auto import tqdm

import obc_tools as obc

OUT = Path(__file__).parents[1] / "results" / "planning_size.csv"
TIMES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Size:
    """A network of so many blocks a stage, each so wide, and the batches of a step."""

    blocks: int = 3
    width: int = 16
    batches: int = 2

    def times(self, what: str, factor: int) -> Size:
        return Size(**(asdict(self) | {what: getattr(self, what) * factor}))


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """Return the processor's seconds of some work, and the most megabytes held above those from before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
    before, start = psutil.Process().memory_info().rss, time.process_time()
    work()
    took, status = time.process_time() - start, Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024
    return took, (peak - before) / 2**20


def measure(size: Size) -> dict[str, float]:
    """Plan in this process."""
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    model = obc.load_model(f"resnet{6 * size.blocks + 2}", num_classes=10, width=size.width).eval()
    batches = [(torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))) for _ in range(size.batches)]
    example = batches[0][0][:1]

    def plain() -> None:
        for images, labels in batches * 2:
            model.zero_grad()
            F.cross_entropy(model(images), labels).backward()

    obc.find_groups(model, example), plain()
    passes, _ = measured(plain)
    model.zero_grad(set_to_none=True)
    found, _ = measured(lambda: obc.cost_model(model, example))
    plan, plan_mb = measured(lambda: obc.prune_to(model, example, batches, speedup=2, steps=2, progress=False))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "groups_seconds": found, "plan_seconds": plan, "passes_seconds": passes,
            "plan_mb": plan_mb}  # fmt: skip


def in_process(size: Size) -> dict[str, float]:
    words = [f"--{name}={value}" for name, value in asdict(size).items()]
    command = [sys.executable, __file__, "one", *words]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def main(pairs: int = 3, note: str = "not quiet") -> None:
    """Write the medians of some processes, a row a size."""
    rows = []
    sizes = dict.fromkeys(Size().times(field.name, factor) for field in fields(Size) for factor in TIMES)
    for size in tqdm(sizes):
        found = [in_process(size) for _ in range(pairs)]
        middle = {key: round(sorted(one[key] for one in found)[pairs // 2], 3) for key in found[0]}
        rows.append(
            asdict(size) | middle | {"n": pairs, "torch": torch.__version__, "threads": torch.get_num_threads()}
        )
        rows[-1]["machine"] = note
    with OUT.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(measure(tyro.cli(Size, args=sys.argv[2:]))))
    else:
        tyro.cli(main)
