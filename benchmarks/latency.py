"""How well latencies are predicted, and targets of latency met: networks with random weights, one thread of a CPU.

    python benchmarks/latency.py model [--networks resnet50 ...]     error of the predicted ratio, held-out plans
    python benchmarks/latency.py targets [--networks resnet50 ...]   `prune_to(latency_speedup=)`, measured once more
    python benchmarks/latency.py accuracy --networks resnet56 --root cifar10.npz --weights FILE
                                                                     accuracy by what a score is divided by

`model` writes results/latency_model.csv, a row a network: seconds that learning took, and the mean absolute error of
pruned over original latency on random plans that were not learnt from, beside that of their share of MACs, for which
original and pruned network took turns. `targets` writes results/latency_targets.csv: every target's plan, and that of
the same speed-up in MACs, measured in new processes after the search, by the processor's clock and by the wall's.
`accuracy` writes results/latency_accuracy.csv: a trained network pruned to the same measured latency by the Jacobian
Criterion's score, by score per MAC and by score per millisecond, its accuracy on held-out images without training,
pruned and compensated, a row a seed of the calibration images.
Time is the processor's (`clock="cpu"`), so that other work on the machine does not count; caches it still shares.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import timm
import torch
import torchvision
import tyro
from torch import nn

from obc_tools import compensate, evaluate, hold_out, load_data, load_model, prune, prune_to, take
from obc_tools.data.data import Data
from obc_tools.files import environment
from obc_tools.measure.latency import latencies
from obc_tools.pruning.choices import Limits, Selection
from obc_tools.pruning.prune import LatencyError, Timing, latency_model, measure_apart, random_plans

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": torchvision.models.resnet50,
    "mobilenet_v2": torchvision.models.mobilenet_v2,
    "efficientnet_lite0": lambda: timm.create_model("tf_efficientnet_lite0"),
    "vit_small": lambda: timm.create_model("vit_small_patch16_224", img_size=160),
    "resnet18": torchvision.models.resnet18,
}


@dataclass(frozen=True)
class Options:
    """What to measure."""

    what: tyro.conf.Positional[Literal["model", "targets", "accuracy"]]
    networks: tuple[str, ...] = ("resnet50", "mobilenet_v2", "efficientnet_lite0", "vit_small")
    speedups: tuple[float, ...] = (1.3, 1.6, 2.0)
    pixels: int = 160
    plans: int = 12
    repeats: int = 9
    clock: str = "cpu"
    runtimes: tuple[str, ...] = ("eager",)
    """What runs the networks of `targets`."""
    root: Path | None = None
    """Of the images of `accuracy`."""
    weights: Path | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    batches: int = 10
    """Of scoring, in every step."""
    out: Path | None = None


def made(name: str, options: Options) -> tuple[nn.Module, torch.Tensor]:
    """Return a network with random weights, and an image."""
    torch.manual_seed(0)
    return NETWORKS[name]().eval(), torch.randn(1, 3, options.pixels, options.pixels)


def learnt(name: str, options: Options) -> Iterable[dict[str, Any]]:
    """Yield the row of a network's latency model."""
    model, example = made(name, options)
    groups, costs = Selection().analyse(model, example)
    start = time.perf_counter(), time.process_time()
    fast = latency_model(model, example, groups, costs, clock=options.clock)
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    errors: dict[str, list[float]] = {"latency model": [], "MACs": []}
    ratios = []
    for plan in random_plans(groups, Limits(), options.plans, seed=1):
        models = {"original": model, "pruned": prune(model, plan)}
        found = latencies(models, example, repeats=options.repeats, clock=options.clock)
        true = found["pruned"].median_seconds / found["original"].median_seconds
        ratios.append(true)
        errors["latency model"].append(fast.of(plan).latency / fast.original.latency / true - 1)
        errors["MACs"].append(costs.of(plan).macs / costs.original.macs / true - 1)
    yield {
        "network": name,
        "pixels": options.pixels,
        "held-out plans": options.plans,
        "least ratio": round(min(ratios), 3),
        "largest ratio": round(max(ratios), 3),
        **{f"error of {what}": round(float(np.abs(found).mean()), 4) for what, found in errors.items()},
        **{f"worst of {what}": round(float(np.abs(found).max()), 4) for what, found in errors.items()},
        "learnt in s": round(wall, 1),
        "learnt in processor s": round(cpu, 1),
    }


def met(name: str, options: Options) -> Iterable[dict[str, Any]]:
    """Yield the rows of a network's targets."""
    model, example = made(name, options)
    file = Path("runs") / f"latency_{name}_{options.pixels}.json"
    file.parent.mkdir(exist_ok=True)
    for runtime, speedup in itertools.product(options.runtimes, options.speedups):
        timing = {"clock": options.clock, "file": file, "repeats": options.repeats, "runtime": runtime}
        said, start = "met", time.perf_counter()
        how = {"criterion": "l2", "steps": 5, "progress": False}
        try:
            plan = prune_to(model, example, latency_speedup=speedup, timing=timing, **how)
        except LatencyError as error:
            plan, said = error.plan, str(error)
        row = {"network": name, "pixels": options.pixels, "runtime": runtime, "target": speedup, "search": said}
        row["search s"] = round(time.perf_counter() - start, 1)
        plans = {"latency": plan, "MACs": prune_to(model, example, speedup=speedup, **how)}
        for asked, found in plans.items():
            row[f"MACs of the plan for {asked}"] = round(1 / (1 - found_share(model, example, found)), 3)
            for clock in ("cpu", "wall"):
                again = Timing(speedup=speedup, clock=clock, repeats=options.repeats, runtime=runtime)
                ratios = [1 / share for share in measure_apart(model, prune(model, found), example, again).of(again)]
                row[f"{asked}: {clock}, median"] = round(statistics.median(ratios), 3)
                row[f"{asked}: {clock}, from"] = round(min(ratios), 3)
                row[f"{asked}: {clock}, to"] = round(max(ratios), 3)
        yield row


WAYS = {"score": None, "score per MAC": "macs", "score per ms": "latency"}


def trained(name: str, options: Options) -> tuple[nn.Module, Data, int]:
    """Return a trained network, its images, and how many the latency is of: of small ones a single one tells little."""
    if name == "resnet56":
        model = load_model("resnet56", num_classes=10, weights=options.weights)
        return model.eval(), load_data("cifar10", options.root), 32
    if name == "efficientnet_lite0":
        data = hold_out(load_data("imagenet", options.root, normalize="inception"), "val", share=0.5, seed=0)
        return load_model("timm:tf_efficientnet_lite0", num_classes=1000, weights=options.weights).eval(), data, 1
    raise SystemExit(f"accuracy of {name!r}: there are trained weights for resnet56 and efficientnet_lite0 alone")


def compared(name: str, options: Options) -> Iterable[dict[str, Any]]:
    """Yield the accuracies of a trained network at measured latencies."""
    model, data, images = trained(name, options)
    held = list(take(data.batches("val", 100, seed=0, shuffle=True), 20))
    example = held[0][0][:images]
    file = Path("runs") / f"latency_{name}_{images}.json"
    file.parent.mkdir(exist_ok=True)
    whole = evaluate(model, held).accuracy
    for seed, speedup, way in itertools.product(options.seeds, options.speedups, WAYS):
        timing = {"clock": options.clock, "file": file, "repeats": options.repeats, "most_processes": 15}
        batches, said = list(take(data.batches("train", 64, seed=seed), options.batches)), "met"
        try:
            how = {"timing": timing, "per": WAYS[way], "steps": 5, "seed": seed}
            plan = prune_to(model, example, batches, latency_speedup=speedup, **how)
        except LatencyError as error:
            plan, said = error.plan, str(error)
        again = Timing(speedup=speedup, clock=options.clock, repeats=options.repeats)
        pruned = prune(model, plan)
        times = [1 / share for share in measure_apart(model, pruned, example, again).of(again)]
        yield {
            "network": name,
            "target": speedup,
            "way": way,
            "seed": seed,
            "search": said,
            "latency speed-up": round(statistics.median(times), 3),
            "from": round(min(times), 3),
            "to": round(max(times), 3),
            "MACs speed-up": round(1 / (1 - found_share(model, example, plan)), 3),
            "original": whole,
            "pruned": evaluate(pruned, held).accuracy,
            "compensated": evaluate(compensate(model, plan, batches), held).accuracy,
        }


def found_share(model: nn.Module, example: torch.Tensor, plan: Any) -> float:
    """Return the share of a network's MACs that a plan removes."""
    _, costs = Selection().analyse(model, example)
    return 1 - costs.of(plan).macs / costs.original.macs


KEYS = ("network", "runtime", "target", "way", "seed")
"""What tells rows apart."""


def main() -> None:
    """Measure, and write every row as it is known."""
    options = tyro.cli(Options)
    torch.set_num_threads(1)
    out = options.out or Path(f"results/latency_{options.what}.csv")
    about = environment(torch.device("cpu"))
    where = {"hardware": f"{about['cpu']}, 1 thread", "clock": options.clock, "torch": about["libraries"]["torch"]}
    rows = pd.read_csv(out).to_dict("records") if out.exists() else []
    for name in options.networks:
        for row in {"model": learnt, "targets": met, "accuracy": compared}[options.what](name, options):
            print(row, flush=True)
            kept = [r for r in rows if any(r.get(key) != row.get(key) for key in KEYS)]
            rows = [*kept, row | where]
            pd.DataFrame(rows).to_csv(out, index=False)


if __name__ == "__main__":
    main()
