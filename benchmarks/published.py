"""Score once by the method's published code and by this library: seconds, memory above the model, and the scores.

    python benchmarks/published.py --repo OptimalBrainConnection [--pairs 3] [--note "quiet"]

``--repo`` is a checkout of github.com/ShaowuChen/Optimal_Brain_Connection, of which nothing is here. VGG-19 for 100
classes, random weights and images, 50 batches of 32, one row a batch, sums without normaliser. The published
code twice: as its training script uses it, ten rows at a time, and its class that keeps all rows ("published, all").
Each runs in a process of its own, in turns: seconds from the first batch to the last score, and how much the process
held at most above what it held before. The network, the batches and the groups are made outside of the time. Denormal
numbers count as zero for all.
"""

from __future__ import annotations

import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import psutil
import torch
import torch_pruning as tp
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

import obc_tools as obc

OUT = Path(__file__).parents[1] / "results" / "published.csv"
COLUMNS = ["code", "rows", "batch", "n", "seconds", "cpu_seconds", "peak_mb", "least_cpu", "most_cpu",
           "rank_correlation", "torch", "torch_pruning", "threads", "machine"]  # fmt: skip
Scores = dict[str, list[float]]


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        repo: a checkout of the published code.
        pairs: of processes.
        batches, size: of images.
        only: run this code in this process and print what it took; all in turns by default.
        note: what else the machine did.
    """

    repo: Path
    pairs: int = 3
    batches: int = 50
    size: int = 32
    only: Literal["published", "published, all", "obc_tools", "plain"] | None = None
    note: str = "not quiet"


def published(model: nn.Module, batches: list[tuple[Tensor, Tensor]], *, keep: bool = False) -> Callable[[], Scores]:
    """Return what scores by the published code, in the order in which its training script calls it, or by all rows."""
    import Selfmake_Importance as theirs

    graph = tp.DependencyGraph().build_dependency(model, batches[0][0][:1])
    groups = list(graph.get_all_groups(ignored_layers=[classifier_of(model)]))

    def score() -> Scores:
        kind = theirs.GroupJacobianImportance if keep else theirs.GroupJacobianImportance_accumulate
        importance = kind(group_reduction="sum", normalizer=None)
        importance.zero_grad()
        for number, (images, labels) in enumerate(batches, start=1):
            loss = F.cross_entropy(model(images), labels)
            model.zero_grad()
            loss.backward()
            importance.accumulate_grad(model)
            if not keep and (number % 10 == 0 or number == len(batches)):
                importance.accumulate_score(model)
        return {group[0].dep.target.name.split()[0]: importance(group).tolist() for group in groups}

    return score


def ours(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Callable[[], Scores]:
    groups = obc.find_groups(model, batches[0][0][:1])

    def score() -> Scores:
        scores = obc.score_groups(model, groups, "jacobian", batches)
        return {group.root.layer: scores[group].tolist() for group in scores if group.prunable}

    return score


def plain(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Callable[[], Scores]:
    def run() -> Scores:
        for images, labels in batches:
            model.zero_grad()
            F.cross_entropy(model(images), labels).backward()
        return {}

    return run


def classifier_of(model: nn.Module) -> nn.Module:
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]


def measure(options: Options) -> dict[str, object]:
    """Score in this process."""
    sys.path.insert(0, str(options.repo))
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    model = obc.load_model("vgg19", num_classes=100).eval()
    shape = (options.size, 3, 32, 32)
    batches = [(torch.randn(shape), torch.randint(0, 100, (options.size,))) for _ in range(options.batches)]
    kinds = {"published": published, "published, all": partial(published, keep=True), "obc_tools": ours, "plain": plain}
    work = kinds[options.only](model, batches)
    before = psutil.Process().memory_info().rss
    wall, cpu = time.perf_counter(), time.process_time()
    scores = work()
    took = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return took | {"peak_mb": (peak - before) / 2**20, "scores": scores}


def in_process(options: Options, code: str) -> dict[str, object]:
    words = [options.repo.resolve(), "--batches", str(options.batches), "--size", str(options.size), "--only", code]
    command = [sys.executable, __file__, "--repo", *map(str, words)]
    return json.loads(subprocess.run(command, env=os.environ, stdout=subprocess.PIPE, check=True).stdout)


def rank_correlation(a: Scores, b: Scores) -> float:
    """Return Spearman's correlation of all scores of the groups that both have."""
    shared = [name for name in a if name in b and len(a[name]) == len(b[name])]
    ranks = [torch.tensor([s for name in shared for s in side[name]]).double().argsort().argsort() for side in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks).double())[0, 1])


def main(options: Options) -> None:
    """Run all in turns, and write a row each."""
    codes = ("published", "published, all", "obc_tools", "plain")
    found: dict[str, list[dict]] = {code: [] for code in codes}
    for _ in range(options.pairs):
        for code in codes:
            found[code].append(in_process(options, code))
            print(code, {key: found[code][-1][key] for key in ("seconds", "cpu_seconds", "peak_mb")}, flush=True)
    alike = {
        code: round(rank_correlation(found[code][0]["scores"], found["obc_tools"][0]["scores"]), 6)
        for code in codes
        if code.startswith("published")
    }
    fresh = not OUT.exists()
    with OUT.open("a", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        if fresh:
            table.writeheader()
        for code in codes:
            middle = {
                key: round(statistics.median(row[key] for row in found[code]), 2)
                for key in ("seconds", "cpu_seconds", "peak_mb")
            }
            cpu = [row["cpu_seconds"] for row in found[code]]
            row = {"code": code, "rows": options.batches, "batch": options.size, "n": options.pairs, **middle}
            row |= {"least_cpu": round(min(cpu), 2), "most_cpu": round(max(cpu), 2)}
            row |= {"rank_correlation": alike.get(code, "")}
            row |= {"torch": torch.__version__, "torch_pruning": version("torch-pruning")}
            table.writerow(row | {"threads": torch.get_num_threads(), "machine": options.note})


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    if chosen.only is None:
        main(chosen)
    else:
        print(json.dumps(measure(chosen)))
