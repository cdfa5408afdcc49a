"""Seconds of scoring a step: our criteria and torch_pruning's own, on the same network and batches, in one run.

    python benchmarks/scoring.py --weights FILE --root DIR [--out results/scoring_resnet56.csv]

The published ResNet-56 on CIFAR-10's training images. Ours is `score_groups`; theirs are the passes that each
importance's own documentation asks for, and then the importance of every group. Both sides get the groups beforehand.
torch_pruning's Hessian runs one backward pass an image: it is timed on `hessian_images` of a batch's images and scaled
up, which is said in the table. Sides take turns; medians.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pandas as pd
import torch
import torch_pruning as tp
import tyro
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from obc_tools import find_groups, load_data, load_model, score_groups, take
from obc_tools.files import environment


@dataclass(frozen=True)
class Options:
    """What to run."""

    weights: Path
    root: Path
    out: Path = Path("results/scoring_resnet56.csv")
    batches: int = 10
    batch_size: int = 128
    hessian_images: int = 8
    rounds: int = 3


SUM = {"group_reduction": "sum", "normalizer": None}
IMPORTANCES: dict[str, Callable] = {
    "l1": lambda: tp.importance.GroupMagnitudeImportance(p=1, **SUM),
    "l2": lambda: tp.importance.GroupMagnitudeImportance(p=2, **SUM),
    "fpgm": lambda: tp.importance.FPGMImportance(**SUM),
    "lamp": lambda: tp.importance.LAMPImportance(group_reduction="sum"),
    "bn_scale": lambda: tp.importance.BNScaleImportance(**SUM),
    "random": lambda: tp.importance.RandomImportance(),
    "taylor": lambda: tp.importance.GroupTaylorImportance(**SUM),
    "hessian": lambda: tp.importance.GroupHessianImportance(**SUM),
}
OURS_ALONE = ("jacobian", "obdc", "whc")


def torch_pruning_seconds(model: nn.Module, groups: list, name: str, batches: list, hessian_images: int) -> float:
    """Return what torch_pruning takes for one criterion; Hessian's images beyond `hessian_images` are scaled up."""
    importance = IMPORTANCES[name]()
    model.zero_grad()
    start = time.perf_counter()
    extra = 0.0
    if name == "taylor":
        for images, labels in batches:
            F.cross_entropy(model(images), labels).backward()
    if name == "hessian":
        images, labels = batches[0]
        losses = F.cross_entropy(model(images), labels, reduction="none")
        forward = time.perf_counter() - start
        for loss in losses[:hessian_images]:
            model.zero_grad()
            loss.backward(retain_graph=True)
            importance.accumulate_grad(model)
        one = (time.perf_counter() - start - forward) / hessian_images
        extra = len(batches) * (forward + one * len(images)) - (time.perf_counter() - start)
    for group in groups:
        importance(group)
    return time.perf_counter() - start + extra


def our_seconds(model: nn.Module, groups: tuple, name: str, batches: list) -> float:
    """Return what `score_groups` takes for one criterion."""
    start = time.perf_counter()
    score_groups(model, groups, name, batches)
    return time.perf_counter() - start


def main() -> None:
    """Time both sides in turns and write the table."""
    options = tyro.cli(Options)
    data = load_data("cifar10", options.root, normalize="benchmark")
    batches = list(take(data.batches("train", options.batch_size), options.batches))
    model = load_model("resnet56", num_classes=10, weights=options.weights).eval()
    theirs = copy.deepcopy(model)
    example = batches[0][0][:1]
    groups = find_groups(model, example)
    graph = tp.DependencyGraph().build_dependency(theirs, example)
    their_groups = list(graph.get_all_groups(ignored_layers=[theirs.fc]))
    names = [*OURS_ALONE, *IMPORTANCES]
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in tqdm(range(options.rounds), desc="rounds"):
        for name in names:
            seconds.setdefault((name, "ours"), []).append(our_seconds(model, groups, name, batches))
            if name in IMPORTANCES:
                one = torch_pruning_seconds(theirs, their_groups, name, batches, options.hessian_images)
                seconds.setdefault((name, "torch_pruning"), []).append(one)
    about = environment(torch.device("cpu"))
    rows = []
    for name in names:
        ours, other = (seconds.get((name, side)) for side in ("ours", "torch_pruning"))
        ratios = [b / a for a, b in zip(ours, other, strict=True)] if other else None
        rows.append(
            {
                "criterion": name,
                "ours (s)": median(ours),
                "torch_pruning (s)": median(other) if other else None,
                "torch_pruning / ours": median(ratios) if ratios else None,
                "rounds": options.rounds,
                "images": len(batches) * options.batch_size,
                "timed images of torch_pruning's Hessian": options.hessian_images if name == "hessian" else None,
                "hardware": f"{about['cpu']}, {about['threads']} threads",
                "torch": about["libraries"]["torch"],
                "torch-pruning": about["libraries"]["torch-pruning"],
            }
        )
    frame = pd.DataFrame(rows)
    frame.to_csv(options.out, index=False, float_format="%.4g")
    print(frame.iloc[:, :4].to_string(index=False))


if __name__ == "__main__":
    main()
