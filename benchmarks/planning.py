"""Time scoring over plain forward and backward passes, and a whole plan with and without stopping.

    python benchmarks/planning.py scoring [--pairs 5]
    python benchmarks/planning.py exact
    python benchmarks/planning.py plans --data cifar10.npz --weights resnet56.pth [--batches 50] [--before CHECKOUT]

Both kinds take turns in one process, after three batches that prove what may be left out. Printed and appended to
``results/planning.csv`` are medians of the paired ratios with their extremes. Plans are for the published ResNet-56 at
2.11x in ten steps, or for EfficientNet-Lite0 at 1.25x, each found in a process of its own: seconds, of the clock and of
the processor, batches, accuracy on held-out images without any training, and the share of the removed channels that
`stop=None` removes too.
"""

from __future__ import annotations

import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

import obc_tools as obc
from obc_tools.scoring.objectives import Objective, classification
from obc_tools.scoring.rows import ProductRows, examples_per_row
from obc_tools.scoring.tasks import find_task
from obc_tools.structure.layers import LayerAxis

OUT = Path(__file__).parents[1] / "results" / "planning.csv"
SIZES = {"resnet56": (128, 32, 10), "vgg19": (64, 32, 100), "torchvision:resnet50": (8, 224, 1000),
         "torchvision:mobilenet_v2": (8, 224, 1000), "torchvision:vit_b_16": (4, 224, 1000)}  # fmt: skip
"""Network -> images in a batch, their size, classes."""
GPT2 = "gpt2"


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        images: in a batch of `scoring`, written behind the network's name; None: as in `SIZES`.
        pairs: of a plain pass and a scored batch; of whole plans by either code, 0 for none.
        batches: of 128 images at most in a step.
        fixed: numbers of batches in every step, to hold against stopping.
        whole: the number of batches in every step that stand for all of them.
        before: a checkout to run at that number too, in turns.
        network: of plans; half of the photos score EfficientNet-Lite0, the others test it.
        way: of scoring for plans: rows of the Jacobian Criterion ("batch", "sample", "expected"), or another criterion.
        note: whether the machine was quiet.
    """

    what: tyro.conf.Positional[Literal["scoring", "exact", "plans", "plan"]]
    models: tuple[str, ...] = (*SIZES, GPT2)
    rows: tuple[str, ...] = ("batch", "sample")
    images: int | None = None
    pairs: int = 5
    data: Path | None = None
    weights: Path | None = None
    batches: int = 50
    fixed: tuple[int, ...] = (4,)
    stops: tuple[float, ...] = (0.1,)
    whole: int = 50
    before: Path | None = None
    network: Literal["resnet56", "efficientnet_lite0"] = "resnet56"
    way: str = "batch"
    steps: int = 10
    seed: int = 0
    note: str = "not quiet"


def spent(work: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds of some work, of the clock and of the processor."""
    wall, process = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - process


def write(row: dict[str, object], note: str) -> None:
    row |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": note}
    print(row, flush=True)
    fresh = not OUT.exists()
    with OUT.open("a", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if fresh:
            table.writeheader()
        table.writerow(row)


COLUMNS = ("what", "network", "rows", "n", "ratio", "least", "most", "cpu_ratio", "first_call", "error", "by_weights",
           "stop", "given", "batches", "seconds",
           "cpu_seconds", "accuracy", "overlap", "seed", "torch", "threads", "machine")  # fmt: skip


def case(name: str, size: int | None = None) -> tuple[nn.Module, Any, Objective]:
    """Return a network, a batch for it and what is differentiated; of so many examples, or as many as are timed."""
    torch.manual_seed(0)
    if name == GPT2:
        from transformers import GPT2Config, GPT2LMHeadModel

        tokens = torch.randint(0, 50257, (size or 2, 128))
        model = GPT2LMHeadModel(GPT2Config(use_cache=False)).eval()
        return model, {"input_ids": tokens, "labels": tokens}, find_task("language_model").losses
    usual, side, classes = SIZES[name]
    model = obc.load_model(name, num_classes=classes).eval()
    for weight in (p for p in model.parameters() if p.dim() > 1 and not p.any()):  # ViT's head: all products vanish
        nn.init.normal_(weight, std=0.02)
    batch = torch.randn(size or usual, 3, side, side), torch.randint(0, classes, (size or usual,))
    return model, batch, classification


def prunable_axes(model: nn.Module, batch: Any) -> list[LayerAxis]:
    example = {"input_ids": batch["input_ids"][:1]} if isinstance(batch, dict) else batch[0][:1]
    groups = [group for group in obc.find_groups(model, example) if group.prunable]
    return list(dict.fromkeys(member.axis for group in groups for member in group.members))


def time_scoring(name: str, options: Options) -> None:
    torch.set_flush_denormal(True)  # random weights of deep networks make many, and plain passes slow
    model, batch, objective = case(name, options.images)
    axes = prunable_axes(model, batch)

    def plain() -> None:
        model.zero_grad(set_to_none=True)
        objective(model, batch).mean().backward()

    plain()  # kernels are prepared for a process once
    for rows in options.rows:
        read = ProductRows(model, axes, objective, examples_per_row(rows))
        first = spent(partial(read, batch, 0))
        for number in (1, 2):  # the norms folded, then channels last: kept where that is faster
            read(batch, number)
        pairs = [(spent(partial(read, batch, 0)), spent(plain)) for _ in range(options.pairs)]
        wall, work = ([scored[kind] / passed[kind] for scored, passed in pairs] for kind in (0, 1))
        row = {"ratio": round(statistics.median(wall), 3), "least": round(min(wall), 3)}
        label = name if options.images is None else f"{name} x {options.images}"
        row |= {"what": "scoring", "network": label, "rows": rows, "n": len(wall), "most": round(max(wall), 3)}
        row |= {"cpu_ratio": round(statistics.median(work), 3)}
        row |= {"first_call": round(first[1] / statistics.median(passed[1] for _, passed in pairs), 3)}
        write(row, options.note)


def check_exact(name: str, options: Options) -> None:
    """Hold a batch's products in float64 against those by the weights' gradients."""
    model, batch, objective = case(name, 2)
    model = model.double()
    batch = batch if isinstance(batch, dict) else (batch[0].double(), batch[1])
    axes = prunable_axes(model, batch)
    read = ProductRows(model, axes, objective, None)
    for number in range(2):
        read(batch, number)
    read.proof.channels_last = True  # of kernels of images, whether it is faster or not
    found = read(batch, 2)
    layers = {axis.layer for axis in axes}
    from obc_tools.scoring.rows import Proof  # what an older checkout lacks

    proof = Proof(proven=set(layers), by_weights=set(layers), folds={})
    exact = ProductRows(model, axes, objective, None, proof)(batch, 0)
    error = max(
        float((found[axis] - exact[axis]).abs().max() / exact[axis].abs().max().clamp(min=1e-300)) for axis in axes
    )
    slow = len(read.proof.by_weights)
    write({"what": "exact", "network": name, "rows": "batch", "error": error, "by_weights": slow}, options.note)


def counted(batches: Iterable, count: list[int], most: int) -> Iterator:
    for batch in obc.take(batches, most):
        count[0] += 1
        yield batch


class Counted:
    """Batches that count how many were asked for."""

    def __init__(self, batches: Iterable, most: int):
        self.batches, self.most, self.count = batches, most, [0]

    def __iter__(self) -> Iterator:
        return counted(self.batches, self.count, self.most)


def accuracy(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    with torch.no_grad():
        return sum((model(x).argmax(1) == t).sum().item() for x, t in batches) / sum(len(t) for _, t in batches)


def published(options: Options) -> tuple[nn.Module, list, list, float]:
    """Return the published ResNet-56, batches to score by a seed, 2,000 images to test, and the speed-up."""
    data = obc.load_data("cifar10", root=str(options.data))
    model = obc.load_model("resnet56", num_classes=10, weights=str(options.weights)).eval()
    given = list(obc.take(data.batches("train", 128, seed=options.seed), max(options.batches, 1)))
    return model, given, list(obc.take(data.batches("val", 500, seed=0, shuffle=True), 4)), 2.11


def photos(options: Options) -> tuple[nn.Module, list, list, float]:
    """Return EfficientNet-Lite0, 15 batches of 32 photos to score, the others to test, and the speed-up."""
    data = obc.load_data("imagenet", str(options.data), normalize="inception", image_size=224)
    model = obc.load_model("timm:tf_efficientnet_lite0", weights=str(options.weights)).eval()
    drawn = list(data.batches("val", 32, seed=options.seed, shuffle=True, workers=0))
    return model, drawn[:15], drawn[15:], 1.25


def find(options: Options, stop: float | None, most: int) -> dict[str, object]:
    """Find one plan in this process; return what it took and the channels that are gone."""
    model, given, test, speedup = published(options) if options.network == "resnet56" else photos(options)
    given = Counted(given, most)
    extra = {} if stop is None else {"stop": stop}
    if options.way != "batch":  # what older checkouts do
        extra |= {"rows" if options.way in ("sample", "expected") else "criterion": options.way}
    wall, work = time.perf_counter(), time.process_time()
    example = torch.zeros(1, *test[0][0].shape[1:])
    plan = obc.prune_to(model, example, given, speedup=speedup, steps=options.steps, progress=False, **extra)
    found = {"seconds": round(time.perf_counter() - wall, 1), "cpu_seconds": round(time.process_time() - work, 1)}
    gone = [[str(g.root), c] for g, k in zip(plan.groups, plan.kept, strict=True) for c in set(range(g.width)) - set(k)]
    found |= {"batches": given.count[0], "accuracy": accuracy(obc.prune(model, plan).eval(), test), "gone": gone}
    return found


def in_process(options: Options, stop: float | None, most: int, code: Path) -> dict[str, object]:
    """Find a plan by some checkout's code, in a process of its own."""
    words = ["--data", options.data, "--weights", options.weights, "--steps", options.steps, "--seed", options.seed]
    words += [
        "--network",
        options.network,
        "--way",
        options.way,
        "--batches",
        most,
        "--stops",
        *([] if stop is None else [stop]),
    ]
    command = [sys.executable, __file__, "plan", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(code)}
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)


def time_plans(options: Options) -> None:
    here, whole = Path(__file__).parents[1], None
    runs = [(stop, options.batches, here, "here") for stop in options.stops]
    runs += [(None, fixed, here, "here") for fixed in options.fixed]
    for _ in range(options.pairs):
        runs += [(None, options.whole, options.before, "before")] if options.before else []
        runs += [(None, options.whole, here, "here")]
    found = []
    for stop, most, code, name in runs:
        result = in_process(options, stop, most, code)
        found.append((stop, most, name, result))
        print(stop, most, name, {key: value for key, value in result.items() if key != "gone"}, file=sys.stderr)
    whole = set(map(tuple, found[-1][-1]["gone"])) if options.pairs else set()
    for stop, most, name, result in found:
        gone = set(map(tuple, result.pop("gone")))
        row = {
            "what": f"plan {name}",
            "network": options.network,
            "rows": options.way,
            "n": 1,
            "stop": stop,
            "given": most,
        }
        overlap = round(len(gone & whole) / max(len(gone), len(whole)), 3) if whole else ""
        row |= {**result, "overlap": overlap, "seed": options.seed}
        write(row, options.note)


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    if chosen.what == "plans":
        time_plans(chosen)
    elif chosen.what == "plan":
        print(json.dumps(find(chosen, chosen.stops[0] if chosen.stops else None, chosen.batches)))
    else:
        for network in chosen.models:
            (time_scoring if chosen.what == "scoring" else check_exact)(network, chosen)
