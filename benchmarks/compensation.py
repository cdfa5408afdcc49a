"""Accuracy without training: plainly pruned, recalibrated and compensated networks, by images of calibration data.

    python benchmarks/compensation.py resnet56 --weights FILE --root FILE.npz --plans DIR [--out FILE.csv]
    python benchmarks/compensation.py efficientnet --weights FILE --root DIR --plans DIR
    python benchmarks/compensation.py finetune --plans DIR --out results/compensation_finetune.csv

`resnet56`: the published ResNet-56 on CIFAR-10, pruned in 5 steps to 1.5, 2.1, 2.5, 3.5 and 5 times fewer MACs by the
Jacobian Criterion and by `residual` (both on the same 10 batches of 128 images), 2,000 test images held out.
"residual, compensated steps" has the network compensated after every step, on the scoring images, before it is scored
again.
`efficientnet`: EfficientNet-Lite0 at 0.9, 0.8 and 0.7 of its MACs on a sample of ImageNet, one seeded half to score and
calibrate with, the other held out.
`finetune`: ResNet-20 on digits, trained here for 15 epochs, at 3 times fewer MACs: fine-tuned naively and with
Equivalent Pruning from the plain and from the compensated start (512 images); a draw is the recipe's seed.
Calibration data are drawn anew for every draw. No labels and, but for `finetune`, no training.

Seconds are those of the processor in one thread: of the compensation or recalibration, and of the original network's
forward pass over the same images. Every row is written when it is known; what is there is not done again.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
import tyro
from torch import nn

from obc_tools import (
    EquivalentModel,
    PruningPlan,
    Recipe,
    compensate,
    cost,
    evaluate,
    fit,
    hold_out,
    load_data,
    load_model,
    prune,
    prune_to,
    recalibrate,
    take,
)
from obc_tools.files import environment

STEPS = 5


@dataclass(frozen=True)
class Options:
    """What to run."""

    what: tyro.conf.Positional[Literal["resnet56", "efficientnet", "finetune"]]
    plans: Path
    weights: Path | None = None
    root: Path | None = None
    out: Path = Path("results/compensation.csv")
    draws: tuple[int, ...] = (0, 1, 2)
    targets: tuple[float, ...] = ()
    images: tuple[int, ...] = ()
    criteria: tuple[str, ...] = ("jacobian", "residual")
    positions: tuple[int, ...] = (64,)
    """Positions of an example that the moments take; 0: as `compensate` does by itself."""
    limit: int = 10_000


@dataclass(frozen=True)
class Setting:
    """A network with its data: what to prune it to, and how many images to calibrate with."""

    model: nn.Module
    data: Any
    example: torch.Tensor
    targets: tuple[float, ...]
    images: tuple[int, ...]
    scoring: tuple[int, int]
    batch: int
    held_out: list

    def target(self, value: float) -> dict[str, float]:
        """Return the target as `prune_to` takes it: a speed-up above 1, a share of the MACs below."""
        if value > 1:
            return {"speedup": value}
        return {"macs": value * cost(self.model, self.example).macs}

    def calibration(self, count: int, draw: int) -> list[torch.Tensor]:
        """Return images of a draw, the training pipeline's without augmentation, in batches."""
        size = min(self.batch, count)
        return [images for images, _ in take(self.data.batches("train", size, seed=1000 + draw), count // size)]


def resnet56(options: Options) -> Setting:
    """The published ResNet-56."""
    data = load_data("cifar10", options.root)
    model = load_model("resnet56", num_classes=10, weights=options.weights).eval()
    held_out = list(take(data.batches("val", 500, seed=7, shuffle=True), 4))
    sizes = (512, 128, 2048, 64)
    return Setting(model, data, torch.zeros(1, 3, 32, 32), (2.5, 3.5, 1.5, 2.1, 5.0), sizes, (128, 10), 128, held_out)


def efficientnet(options: Options) -> Setting:
    """EfficientNet-Lite0."""
    data = hold_out(load_data("imagenet", options.root, normalize="inception"), "val", share=0.5, seed=0)
    model = load_model("timm:tf_efficientnet_lite0", num_classes=1000, weights=options.weights).eval()
    held_out = list(data.batches("val", 50))
    return Setting(model, data, torch.zeros(1, 3, 224, 224), (0.8, 0.9, 0.7), (128, 256, 64), (32, 4), 32, held_out)


def plan_of(setting: Setting, options: Options, criterion: str, target: float) -> PruningPlan:
    """Return the plan of a target, kept in a file once it is found."""
    path = options.plans / f"{options.what}_{criterion}_{target:g}.json"
    if path.exists():
        return PruningPlan.from_json(path.read_text())
    size, count = setting.scoring
    batches = take(setting.data.batches("train", size, seed=0), count)
    name, _, between = criterion.partition(", ")
    if between:
        found = compensated_steps(setting, name, target, batches)
    else:
        found = prune_to(
            setting.model,
            setting.example,
            batches,
            criterion=name,
            steps=STEPS,
            progress=False,
            **setting.target(target),
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(found.to_json())
    return found


def compensated_steps(setting: Setting, criterion: str, target: float, batches: Any) -> PruningPlan:
    """Return a plan found in steps of equal speed-ups, the network compensated after each."""
    speedup = max(target, 1 / target)
    macs = cost(setting.model, setting.example).macs
    network, plan = setting.model, None
    for step in range(1, STEPS + 1):
        goal = macs / speedup ** (step / STEPS)
        more = prune_to(network, setting.example, batches, criterion=criterion, steps=1, progress=False, macs=goal)
        plan = more if plan is None else plan.then(more)
        network = compensate(setting.model, plan, [images for images, _ in batches], positions=64)
    return plan


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a function returns, and the processor's seconds."""
    start = time.process_time()
    value = function()
    return value, time.process_time() - start


@torch.no_grad()
def passed(model: nn.Module, batches: Sequence[torch.Tensor]) -> None:
    """Run a network on batches."""
    for batch in batches:
        model(batch)


KEYS = ("network", "target", "criterion", "network is", "positions", "images", "draw")


def jobs(setting: Setting, options: Options) -> Iterator[tuple]:
    """Iterate over what there is to measure, as `KEYS` name it, what matters most first."""
    targets, sizes = options.targets or setting.targets, options.images or setting.images
    for criterion, target in itertools.product(options.criteria, targets):
        yield options.what, target, criterion, "pruned", 0, 0, 0
    for draw, size, target, criterion in itertools.product(options.draws, sizes, targets, options.criteria):
        yield options.what, target, criterion, "recalibrated", 0, size, draw
        for positions in options.positions:
            yield options.what, target, criterion, "compensated", positions, size, draw


def measured(setting: Setting, options: Options, job: tuple) -> dict[str, Any]:
    """Return one row of the table."""
    _, target, criterion, state, positions, size, draw = job
    plan = plan_of(setting, options, criterion, target)
    network, seconds, forward = prune(setting.model, plan).eval(), None, None
    if state != "pruned":
        data = setting.calibration(size, draw)
        _, forward = timed(lambda: passed(setting.model, data))
    if state == "recalibrated":
        network, seconds = timed(lambda: recalibrate(network, data))
    if state == "compensated":
        network, seconds = timed(lambda: compensate(setting.model, plan, data, positions=positions or None))
    result = evaluate(network, setting.held_out)
    about = environment(torch.device("cpu"))
    return dict(zip(KEYS, job, strict=True)) | {
        "accuracy": result.accuracy,
        "loss": round(result.loss, 5),
        "held-out images": result.examples,
        "seconds": seconds and round(seconds, 2),
        "seconds / forward pass": seconds and round(seconds / forward, 2),
        "hardware": f"{about['cpu']}, {about['threads']} thread",
        "torch": about["libraries"]["torch"],
    }


TUNED = ("network", "target", "method", "start", "epochs", "draw")


def digits(options: Options) -> Setting:
    """A ResNet-20 that is trained here."""
    data = load_data("digits")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = load_model("resnet20", num_classes=10, in_channels=1)
    recipe = Recipe(epochs=15, lr=0.1, batch_size=64, warmup_epochs=1, augment=False, seed=0)
    kept = options.plans / "digits_resnet20.pt"
    if not kept.exists():
        fit(model, data.batches("train", 64, seed=0), data.batches("val", 256), recipe, progress=False)
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), kept)
    model.load_state_dict(torch.load(kept, weights_only=True))
    held_out = list(data.batches("val", 256))
    return Setting(model.eval(), data, torch.zeros(1, 1, 8, 8), (3.0,), (512,), (64, 10), 64, held_out)


def tuned(setting: Setting, options: Options, job: tuple) -> dict[str, Any]:
    """Return one row of the table of fine-tunings."""
    _, target, method, start, epochs, draw = job
    plan = plan_of(setting, options, "jacobian", target)
    made = compensate(setting.model, plan, setting.calibration(512, draw)) if start == "compensated" else None
    network = EquivalentModel(setting.model, plan, start=made) if method == "EP" else made or prune(setting.model, plan)
    before = evaluate(network, setting.held_out)
    recipe = Recipe(epochs=epochs, lr=0.02, batch_size=64, augment=False, seed=draw)
    train = setting.data.batches("train", 64, seed=draw)
    fit(network, train, setting.data.batches("val", 256), recipe, progress=False)
    result = evaluate(network.merge() if method == "EP" else network, setting.held_out)
    found = {"accuracy before": before.accuracy, "accuracy": result.accuracy, "loss": round(result.loss, 5)}
    return dict(zip(TUNED, job, strict=True)) | found | {"held-out images": result.examples, "torch": torch.__version__}


def main() -> None:
    """Measure what is missing in the table, row by row."""
    options = tyro.cli(Options)
    torch.set_num_threads(1)
    setting = {"resnet56": resnet56, "efficientnet": efficientnet, "finetune": digits}[options.what](options)
    keys, measure = (TUNED, tuned) if options.what == "finetune" else (KEYS, measured)
    rows = pd.read_csv(options.out).to_dict("records") if options.out.exists() else []
    done = {tuple(row[key] for key in keys) for row in rows}
    wanted = jobs(setting, options)
    if options.what == "finetune":
        values = (options.draws, (1, 5), options.targets or setting.targets, ("naive", "EP"), ("plain", "compensated"))
        wanted = (("resnet20", t, method, start, n, d) for d, n, t, method, start in itertools.product(*values))
    missing = [job for job in wanted if job not in done]
    for job in missing[: options.limit]:
        rows.append(measure(setting, options, job))
        pd.DataFrame(rows).to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
