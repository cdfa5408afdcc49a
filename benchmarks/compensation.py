"""Accuracy without training: plainly pruned, recalibrated and compensated networks, by images of calibration data.

    python benchmarks/compensation.py resnet56 --weights FILE --root FILE.npz --plans DIR [--out FILE.csv]
    python benchmarks/compensation.py efficientnet --weights FILE --root DIR --plans DIR
    python benchmarks/compensation.py digits --plans DIR
    python benchmarks/compensation.py vit --plans DIR
    python benchmarks/compensation.py llama --plans DIR
    python benchmarks/compensation.py minilm --plans DIR --weights FOLDER
    python benchmarks/compensation.py finetune --plans DIR --out results/compensation_finetune.csv
    python benchmarks/compensation.py areas --plans DIR --out results/compensation_areas.csv

`resnet56`: the published ResNet-56 on CIFAR-10, pruned in 5 steps to 1.5, 2.1, 2.5, 3.5 and 5 times fewer MACs by the
Jacobian Criterion and by `residual` (both on the same 10 batches of 128 images), 2,000 test images held out.
"residual, compensated steps" has the network compensated after every step, on the scoring images, before it is scored
again.
`efficientnet`: EfficientNet-Lite0 at 0.9, 0.8, 0.7 and 0.6 of its MACs on a sample of ImageNet, one seeded half to
score and calibrate with, the other held out.
`digits`, `vit`: ResNet-20 and a small vision transformer on digits, trained here for 15 epochs. `llama`: the small one
of `benchmarks/tasks.py`, on the source of the standard library (1,200 passages, 96 held out). `minilm`:
all-MiniLM-L6-v2 as in `benchmarks/real_weights.py`, heads and MLPs pruned; images are sentences.
`areas`: the digits' ResNet-20 pruned to a tenth of its MACs by six criteria, as it is and compensated after every
step; areas under the accuracy over the MACs left, and a picture of them beside the table.
`finetune`: ResNet-20 on digits, trained here for 15 epochs, at 3 times fewer MACs: fine-tuned naively and with
Equivalent Pruning from the plain and from the compensated start (512 images); a draw is the recipe's seed.
Calibration data are drawn anew for every draw. No labels and, but for `finetune`, no training.

Seconds are those of the processor in one thread: of the compensation or recalibration, and of the original network's
forward pass over the same images. Every row is written when it is known; what is there is not done again.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import plotly.graph_objects as go
import torch
import tyro
from torch import nn

from obc_tools import (
    TASKS,
    EquivalentModel,
    PruningPlan,
    Recipe,
    Task,
    compare_criteria,
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
from obc_tools.data.batches import count_examples
from obc_tools.files import environment
from obc_tools.plots.looks import theme
from obc_tools.plots.stills import still

STEPS = 5


@dataclass(frozen=True)
class Options:
    """What to run."""

    what: tyro.conf.Positional[
        Literal["resnet56", "efficientnet", "digits", "vit", "llama", "minilm", "finetune", "areas"]
    ]
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
    example: Any
    targets: tuple[float, ...]
    images: tuple[int, ...]
    scoring: tuple[int, int]
    batch: int
    held_out: list
    task: Task = TASKS["classification"]
    selection: Mapping[str, Any] = field(default_factory=dict)
    metric: str = ""
    """The metric of the table, the task's headline by default."""

    def target(self, value: float) -> dict[str, float]:
        """Return the target as `prune_to` takes it: a speed-up above 1, a share of the MACs below."""
        if value > 1:
            return {"speedup": value}
        return {"macs": value * cost(self.model, self.example).macs}

    def calibration(self, count: int, draw: int) -> list:
        """Return batches of a draw, the training pipeline's without augmentation."""
        size = min(self.batch, count)
        return list(take(self.data.batches("train", size, seed=1000 + draw), count // size))


def resnet56(options: Options) -> Setting:
    """The published ResNet-56."""
    data = load_data("cifar10", options.root)
    model = load_model("resnet56", num_classes=10, weights=options.weights).eval()
    held_out = list(take(data.batches("val", 500, seed=7, shuffle=True), 4))
    sizes = (512, 128, 2048, 64)
    return Setting(model, data, torch.zeros(1, 3, 32, 32), (2.5, 3.5, 1.5, 2.1, 5.0), sizes, (128, 10), 64, held_out)


def efficientnet(options: Options) -> Setting:
    """EfficientNet-Lite0."""
    data = hold_out(load_data("imagenet", options.root, normalize="inception"), "val", share=0.5, seed=0)
    model = load_model("timm:tf_efficientnet_lite0", num_classes=1000, weights=options.weights).eval()
    held_out = list(data.batches("val", 50))
    return Setting(
        model, data, torch.zeros(1, 3, 224, 224), (0.8, 0.9, 0.7, 0.6), (128, 256, 64), (32, 4), 32, held_out
    )


def digits(options: Options) -> Setting:
    """A ResNet-20 that is trained here."""
    recipe = Recipe(epochs=15, lr=0.1, batch_size=64, warmup_epochs=1, augment=False, seed=0)
    return _on_digits(options, "resnet20", lambda: load_model("resnet20", num_classes=10, in_channels=1), recipe)


def vit(options: Options) -> Setting:
    """A vision transformer of four blocks on patches of 2 x 2 pixels."""
    import timm

    size = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4}
    recipe = Recipe(
        epochs=15, lr=0.002, optimizer="adamw", weight_decay=0.05, batch_size=64, warmup_epochs=1, augment=False, seed=0
    )
    made = partial(timm.create_model, "vit_tiny_patch16_224", num_classes=10, **size)
    return _on_digits(options, "vit", made, recipe)


def _on_digits(options: Options, name: str, make: Callable[[], nn.Module], recipe: Recipe) -> Setting:
    data = load_data("digits")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
    kept = options.plans / f"digits_{name}.pt"
    if not kept.exists():
        fit(model, data.batches("train", 64, seed=0), data.batches("val", 256), recipe, progress=False)
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), kept)
    model.load_state_dict(torch.load(kept, weights_only=True))
    held_out = list(data.batches("val", 256))
    targets = (1.5, 2.0, 3.0) if name == "vit" else (3.0, 2.0, 5.0)
    return Setting(model.eval(), data, torch.zeros(1, 1, 8, 8), targets, (512, 128, 64), (64, 10), 64, held_out)


def llama(options: Options) -> Setting:
    """The small Llama of the table of tasks."""
    import tasks

    found = tasks.original("language_model", 0, tasks.Options(originals=options.plans))
    shape = (found.example(), (1.5, 2.0), (512, 128, 64), (16, 10), 16, list(found.val))
    return Setting(found.model, found.data, *shape, found.task)


def minilm(options: Options) -> Setting:
    """all-MiniLM-L6-v2, told by sentences alone what it has to give."""
    import real_weights

    found = real_weights.minilm(options.weights, real_weights.Options(options.weights))
    held_out = list(found.data.batches("val", real_weights.HELD_OUT_BATCH))
    example = found.task.example(next(iter(found.data.batches("val", 1))))
    shape = (example, (1.25, 1.5), (512, 128, 64), (32, 10), 32, held_out)
    return Setting(found.model, found.data, *shape, found.task, found.selection, "recall_at_1")


def plan_of(setting: Setting, options: Options, criterion: str, target: float) -> PruningPlan:
    """Return the plan of a target, kept in a file once it is found."""
    path = options.plans / f"{options.what}_{criterion}_{target:g}.json"
    if path.exists():
        return PruningPlan.from_json(path.read_text())
    size, count = setting.scoring
    batches = take(setting.data.batches("train", size, seed=0), count)
    name, _, between = criterion.partition(", ")
    found = prune_to(
        setting.model,
        setting.example,
        batches,
        criterion=name,
        steps=STEPS,
        task=setting.task,
        compensate=bool(between),
        progress=False,
        **setting.target(target),
        **setting.selection,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(found.to_json())
    return found


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a function returns, and the processor's seconds."""
    start = time.process_time()
    value = function()
    return value, time.process_time() - start


@torch.no_grad()
def passed(model: nn.Module, batches: Sequence[Any], task: Task) -> None:
    """Run a network on batches."""
    for batch in batches:
        task.forward(model, batch)


KEYS = ("network", "target", "criterion", "network is", "positions", "images", "draw")


def jobs(setting: Setting, options: Options) -> Iterator[tuple]:
    """Iterate over what there is to measure, as `KEYS` name it, what matters most first."""
    targets, sizes = options.targets or setting.targets, options.images or setting.images
    yield options.what, 1.0, "", "original", 0, 0, 0
    for criterion, target in itertools.product(options.criteria, targets):
        yield options.what, target, criterion, "pruned", 0, 0, 0
    for draw, size, target, criterion in itertools.product(options.draws, sizes, targets, options.criteria):
        if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in setting.model.modules()):
            yield options.what, target, criterion, "recalibrated", 0, size, draw
        for positions in options.positions:
            yield options.what, target, criterion, "compensated", positions, size, draw


def measured(setting: Setting, options: Options, job: tuple) -> dict[str, Any]:
    """Return one row of the table."""
    _, target, criterion, state, positions, images, draw = job
    network, seconds, forward = setting.model, None, None
    if state != "original":
        plan = plan_of(setting, options, criterion, target)
        network = prune(setting.model, plan).eval()
    if images:
        data = setting.calibration(images, draw)
        _, forward = timed(lambda: passed(setting.model, data, setting.task))
    if state == "recalibrated":
        network, seconds = timed(lambda: recalibrate(network, data, task=setting.task))
    if state == "compensated":
        how = {"positions": positions or None, "task": setting.task}
        network, seconds = timed(lambda: compensate(setting.model, plan, data, **how))
    result = evaluate(network, setting.held_out, task=setting.task)
    told = setting.metric or setting.task.headline
    about = environment(torch.device("cpu"))
    return dict(zip(KEYS, job, strict=True)) | {
        "metric": told,
        "accuracy": result.values[told],
        "loss": getattr(result, "loss", None),
        "held-out images": sum(count_examples(batch) for batch in setting.held_out),
        "seconds": seconds and round(seconds, 2),
        "seconds / forward pass": seconds and round(seconds / forward, 2),
        "hardware": f"{about['cpu']}, {about['threads']} thread",
        "torch": about["libraries"]["torch"],
    }


TUNED = ("network", "target", "method", "start", "epochs", "draw")


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


CRITERIA = ("jacobian", "residual", "taylor", "l2", "bn_scale", "random")


def areas(options: Options) -> None:
    """Write the areas of criteria, compensated and not, and a picture of them."""
    setting, tables = digits(options), []
    for made in (False, True):
        folder = options.plans / f"areas_{made}"
        how = {"macs": 0.1, "steps": 6, "batches": 8, "batch_size": 64, "training": 0, "repeats": 3, "seed": 0}
        found = compare_criteria(
            setting.model, setting.data, CRITERIA, compensate=made, folder=folder, progress=False, **how
        )
        tables.append(found.areas("accuracy", "macs").assign(compensated=made))
    table = pd.concat(tables)
    table.to_csv(options.out, index=False)
    wide = table.groupby(["criterion", "compensated"])["area"].agg(["mean", "std"]).unstack()
    wide = wide.sort_values(("mean", False))
    bars = [
        go.Bar(y=wide.index, x=wide["mean"][made], error_x={"array": wide["std"][made]}, name=name, orientation="h")
        for made, name in ((False, "pruned"), (True, "compensated after every step"))
    ]
    figure = go.Figure(bars, go.Layout(template=theme("light"), height=380, width=760, legend={"orientation": "h"}))
    figure.update_xaxes(title="area under accuracy over MACs left (three repeats; of l2 and bn_scale pruned: one)")
    (options.out.parent / "pictures" / "compensation_areas.png").write_bytes(still(figure))


def main() -> None:
    """Measure what is missing in the table, row by row."""
    options = tyro.cli(Options)
    torch.set_num_threads(1)
    if options.what == "areas":
        areas(options)
        return
    made = {"resnet56": resnet56, "efficientnet": efficientnet, "vit": vit, "llama": llama, "minilm": minilm}
    setting = made.get(options.what, digits)(options)
    keys, measure = (TUNED, tuned) if options.what == "finetune" else (KEYS, measured)
    rows = pd.read_csv(options.out).to_dict("records") if options.out.exists() else []
    done = {tuple("" if row[key] != row[key] else row[key] for key in keys) for row in rows}
    wanted = jobs(setting, options)
    if options.what == "finetune":
        values = (options.draws, (1, 5), options.targets or (3.0,), ("naive", "EP"), ("plain", "compensated"))
        wanted = (("resnet20", t, method, start, n, d) for d, n, t, method, start in itertools.product(*values))
    missing = [job for job in wanted if job not in done]
    for job in missing[: options.limit]:
        rows.append(measure(setting, options, job))
        pd.DataFrame(rows).to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
