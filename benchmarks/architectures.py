"""Seconds and memory of finding groups, scoring by one batch and pruning, beside torch_pruning's pruner with L2.

    python benchmarks/architectures.py [--rounds 5 --batch-size 4 --out results/architectures.csv]

Ours: `find_groups`, `score_groups` by the Jacobian Criterion on one batch, `make_plan`, `prune`. Theirs: a
MagnitudePruner (its dependency graph), and its one step (L2 scores, removal). Half of the channels of every group go.
torch_pruning sees no data, so the scoring is compared without a plain forward and backward of the same batch, which
is timed beside it. Each round is a process of its own on one thread, sides take turns; seconds are those of computing.
Memory: the most that a part adds to what the process holds when it begins (Linux).
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch_pruning as tp
import tyro
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from obc_tools import find_groups, load_model, make_plan, prune, score_groups
from obc_tools.files import environment

NETWORKS = ("resnet50", "vit_b_16", "densenet121", "efficientnet_b0")
RATIO = 0.5


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        networks: torchvision's names.
        rounds: processes a network and side.
        batch_size, size: of the images that score.
    """

    networks: tuple[str, ...] = NETWORKS
    rounds: int = 5
    batch_size: int = 4
    size: int = 224
    out: Path = Path(__file__).parents[1] / "results" / "architectures.csv"


@dataclass
class Parts:
    """Seconds of computing and added megabytes of each part of a side, by name."""

    seconds: dict[str, float] = field(default_factory=dict)
    megabytes: dict[str, float] = field(default_factory=dict)

    def measure(self, name: str, work: Callable[[], Any]) -> Any:
        """Do some work, note what it takes, return what it returns."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        held, start = _held("VmRSS"), time.process_time()
        result = work()
        self.seconds[name] = time.process_time() - start
        self.megabytes[name] = _held("VmHWM") - held
        return result


def _held(kind: str) -> float:
    """Return megabytes of memory that this process holds: now (VmRSS), or at most since the mark was reset (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1024


def ours(model: nn.Module, images: Tensor, labels: Tensor) -> Parts:
    """Take a model through our parts, a plain forward and backward among them."""
    parts = Parts()
    _forward_backward(model, images, labels)
    parts.measure("forward and backward", lambda: _forward_backward(model, images, labels))
    groups = parts.measure("find_groups", lambda: find_groups(model, images[:1]))
    scores = parts.measure("score_groups", lambda: score_groups(model, groups, "jacobian", [(images, labels)]))
    plan = parts.measure("make_plan", lambda: make_plan(scores, ratio=RATIO, scope="local"))
    pruned = parts.measure("prune", lambda: prune(model, plan))
    pruned(images[:1])
    return parts


def _forward_backward(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    F.cross_entropy(model(images), labels).backward()
    model.zero_grad()


def theirs(model: nn.Module, images: Tensor, labels: Tensor) -> Parts:
    """Take a model through torch_pruning's parts; `images` only tells the size."""
    parts = Parts()
    heads = {m: m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]

    def build() -> tp.pruner.MagnitudePruner:
        return tp.pruner.MagnitudePruner(
            model,
            images[:1],
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=RATIO,
            ignored_layers=[last],
            num_heads=heads,
            in_channel_groups={},
            out_channel_groups={},
        )

    pruner = parts.measure("graph", build)
    parts.measure("step", pruner.step)
    if hasattr(model, "hidden_dim"):
        model.hidden_dim = model.conv_proj.out_channels
    model(images[:1])
    return parts


SIDES = {"ours": ours, "torch_pruning": theirs}


def run(side: str, name: str, batch_size: int, size: int) -> Parts:
    """Measure one side on one network, with random weights and images."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = load_model(f"torchvision:{name}", num_classes=1000).eval()
    images, labels = torch.randn(batch_size, 3, size, size), torch.randint(1000, (batch_size,))
    return SIDES[side](model, images, labels)


def rows_of(name: str, number: int, parts: dict[str, Parts]) -> dict[str, float | str | int]:
    """Return one round's row: the seconds and megabytes of all parts, sums and ratios besides forward and backward."""
    mine, other = parts["ours"], parts["torch_pruning"]
    scoring = max(0.0, mine.seconds["score_groups"] - mine.seconds["forward and backward"])
    besides = scoring + sum(mine.seconds[part] for part in ("find_groups", "make_plan", "prune"))
    row = {"network": name, "round": number}
    for entry in parts.values():
        row |= {f"{part} (s)": seconds for part, seconds in entry.seconds.items()}
    row |= {"ours besides (s)": besides, "theirs (s)": sum(other.seconds.values())}
    row["ratio"] = row["ours besides (s)"] / row["theirs (s)"]
    for entry in parts.values():
        row |= {f"{part} (MB)": megabytes for part, megabytes in entry.megabytes.items()}
    most = max(mine.megabytes[part] for part in ("find_groups", "make_plan", "prune"))
    row |= {"ours besides (MB)": most, "theirs (MB)": max(other.megabytes.values())}
    return row | {"scoring / forward and backward (MB)": _share(mine.megabytes)}


def _share(megabytes: dict[str, float]) -> float:
    return megabytes["score_groups"] / megabytes["forward and backward"]


def main(options: Options) -> None:
    about = environment(torch.device("cpu"))
    context = multiprocessing.get_context("spawn")
    rows = []
    for number in range(1, options.rounds + 1):
        for name in tqdm(options.networks, desc=f"round {number}"):
            parts = {}
            for side in sorted(SIDES, reverse=number % 2 == 0):
                with context.Pool(1) as pool:
                    parts[side] = pool.apply(run, (side, name, options.batch_size, options.size))
            rows.append(rows_of(name, number, parts))
    table = pd.DataFrame(rows)
    table = table.assign(batch=options.batch_size, size=options.size, hardware=f"{about['cpu']}, 1 thread")
    table = table.assign(**{library: about["libraries"][library] for library in ("torch", "torch-pruning")})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out, index=False, float_format="%.4g")
    print(table.groupby("network", sort=False).median(numeric_only=True).drop(columns="round").T.to_string())


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
