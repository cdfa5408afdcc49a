"""The whole chain on tasks that are no classification: train, score, prune, fine-tune naively and with EP.

    python benchmarks/tasks.py [--tasks detection ...] [--seeds 0 1 2] [--out results/tasks.csv]
    python benchmarks/tasks.py --hand-on --seeds 0 --criteria jacobian [--out results/tasks_handed_on.csv]

Small networks from random weights on data that need no download: torchvision's SSD with light heads and its LRASPP,
both on a ResNet of this package, and ultralytics' YOLO11n on scenes of digits; a Llama with grouped-query attention on
the source of the standard library; open_clip's CLIP on pairs of digits and captions; a ResNet-8 on single digits, not
told what they are. Every criterion gets the same batches and the same target. An original is trained once a seed and
kept in a folder. Figures are of the last epoch: nothing is picked by the metric that is reported. Every row is written
when it is known; what is there is not done again. With ``--hand-on`` a row says what became of the network merged after
EP on its way out: saved and loaded, exported by torch.export and to ONNX, each beside the merged one.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.segmentation import LRASPP

from obc_tools import (
    TASKS,
    EquivalentModel,
    PruningPlan,
    Recipe,
    Task,
    cost,
    evaluate,
    export_onnx,
    export_program,
    fit,
    load_data,
    load_model,
    load_pruned,
    prune,
    prune_to,
    save_pruned,
    take,
    task_of,
)
from obc_tools.data.data import Data
from obc_tools.files import environment
from obc_tools.measure.latency import latencies
from obc_tools.measure.metrics import mask_targets
from obc_tools.state import Forward, call_model

CLASSES = 11
BACKGROUND_WEIGHT = 0.2
STEPS = 5
CALIBRATION = 10
MADE = {"optimizer": "adamw", "weight_decay": 0.01, "clip_norm": 5.0}


@dataclass(frozen=True)
class Options:
    """What to run."""

    tasks: tuple[str, ...] = ("outputs", "image_text", "segmentation", "language_model", "detection")
    criteria: tuple[str, ...] = ("jacobian", "taylor", "l2", "random")
    speedups: tuple[float, ...] = (2.0, 1.5)
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = Path("results/tasks.csv")
    originals: Path = Path("runs/tasks")
    """Where trained originals are kept."""
    limit: int = 10_000
    """Rows at most."""
    hand_on: bool = False


def detector() -> nn.Module:
    """Return an SSD whose heads say of four boxes at each of 16 x 16 places what they hold."""
    body = create_feature_extractor(load_model("resnet8", num_classes=10), {"layer3": "0"})
    boxes = DefaultBoxGenerator([[1.6]], scales=[0.25, 0.36], steps=[4])
    head = SSDLiteHead([64], boxes.num_anchors_per_location(), CLASSES, partial(nn.BatchNorm2d, momentum=0.03))
    as_is = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    limits = {"score_thresh": 0.01, "nms_thresh": 0.45, "detections_per_img": 20, "topk_candidates": 50}
    return SSD(body, boxes, (64, 64), CLASSES, head=head, **as_is, **limits)


def segmenter() -> nn.Module:
    """Return an LRASPP whose body reads every second pixel."""
    network = load_model("resnet8", num_classes=10)
    network.conv1.stride = (2, 2)
    return LRASPP(
        create_feature_extractor(network, {"layer1": "low", "layer3": "high"}), 16, 64, CLASSES, inter_channels=64
    )


def weighted_pixels(task: Task) -> Task:
    """Return a task of segmentation that is trained with little weight on the background, and measured as before."""
    weight = torch.ones(CLASSES)
    weight[0] = BACKGROUND_WEIGHT

    def losses(model: nn.Module, batch: Any) -> Tensor:
        logits = task.forward(model, batch)
        return F.cross_entropy(logits, mask_targets(batch, logits), weight.to(logits), reduction="none").mean((1, 2))

    return dataclasses.replace(task, training=losses)


def llama() -> nn.Module:
    """Return a Llama, three heads of which share their keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 96, "num_hidden_layers": 2, "intermediate_size": 256, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 256, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**size, **heads))


def clip() -> nn.Module:
    """Return a CLIP that reads images by convolutions."""
    from open_clip.model import CLIP

    images = {"layers": (1, 1, 1, 1), "width": 16, "head_width": 16, "image_size": 32}
    return CLIP(32, images, {"context_length": 24, "vocab_size": 32, "width": 64, "heads": 4, "layers": 2})


@dataclass(frozen=True)
class Setting:
    """A network, its data, and how it is trained and fine-tuned."""

    network: str
    build: Callable[[], nn.Module]
    data: str
    train: Recipe
    tune: Recipe
    examples: tuple[int | None, int | None] = (None, None)
    task: Callable[[nn.Module], Task] = task_of
    criterion: Mapping[str, Any] = field(default_factory=dict)
    """Options of the Jacobian Criterion."""
    ignore: tuple[str, ...] = ()
    """Layers that keep their outputs."""


def recipes(epochs: int, lr: float, tuning: int, batch_size: int, **changes: Any) -> tuple[Recipe, Recipe]:
    """Return how to train and how to fine-tune, there at a quarter of the learning rate."""
    shared = MADE | {"batch_size": batch_size} | changes
    return Recipe(epochs=epochs, lr=lr, warmup_epochs=1, **shared), Recipe(epochs=tuning, lr=lr / 4, **shared)


BY_EXAMPLE = {"rows": "sample"}
SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        "detection": Setting("SSD on ResNet-8", detector, "digit_scenes", *recipes(4, 0.004, 1, 32)),
        "yolo": Setting(
            "YOLO11n",
            lambda: load_model("ultralytics:yolo11n", num_classes=CLASSES),
            "digit_scenes",
            *recipes(25, 0.002, 3, 32),
            ignore=("*.dfl.conv",),
        ),
        "segmentation": Setting(
            "LRASPP on ResNet-8",
            segmenter,
            "digit_scenes",
            *recipes(10, 0.005, 3, 32),
            task=lambda model: weighted_pixels(task_of(model)),
            criterion=BY_EXAMPLE,
        ),
        "language_model": Setting(
            "Llama", llama, "stdlib_text", *recipes(2, 0.003, 1, 16), (1200, 96), criterion=BY_EXAMPLE
        ),
        "image_text": Setting("CLIP", clip, "digit_captions", *recipes(6, 0.002, 2, 100, weight_decay=0.05)),
        "outputs": Setting(
            "ResNet-8, no labels",
            lambda: load_model("resnet8", num_classes=10, in_channels=1),
            "digits",
            *recipes(8, 0.004, 4, 64),
            task=lambda model: TASKS["outputs"],
            criterion=BY_EXAMPLE,
        ),
    }
)


@dataclass(frozen=True)
class Original:
    """A trained network with its data and its task, to whose metrics ``task`` is bound."""

    setting: Setting
    model: nn.Module
    data: Data
    task: Task

    @property
    def train(self) -> Any:
        """The batches to train and to score with."""
        return self.data.batches("train", self.setting.train.batch_size)

    @property
    def val(self) -> Any:
        """The batches that are held out."""
        return self.data.batches("val", 50)

    def example(self, examples: int = 1) -> Any:
        """Return example inputs."""
        return self.task.example(next(iter(self.data.batches("val", examples).at(0))))

    def measure(self, model: nn.Module) -> float:
        """Return the headline."""
        return evaluate(model, self.val, task=self.task).values[self.task.headline]


def original(name: str, seed: int, options: Options) -> Original:
    """Return a trained network; it is trained where its weights are not there yet. Without labels: with them."""
    setting, path = SETTINGS[name], options.originals / f"{name}_{seed}.pt"
    torch.manual_seed(seed)
    model, data = setting.build(), load_data(setting.data)
    data = data.limited(*setting.examples) if any(setting.examples) else data
    task = setting.task(model)
    if not path.exists():
        known = "classification" if task.against else task
        train, val = data.batches("train", setting.train.batch_size, seed=seed), data.batches("val", 50)
        fit(model, train, val, dataclasses.replace(setting.train, seed=seed), task=known, progress=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path, weights_only=True))
    model.eval()
    return Original(setting, model, data, task.against(copy.deepcopy(model)) if task.against else task)


def planned(found: Original, criterion: str, speedup: float, seed: int) -> PruningPlan:
    """Return the plan that a criterion makes from the same batches as any other."""
    setting = found.setting
    chosen = (criterion, setting.criterion) if criterion == "jacobian" else criterion
    batches = take(found.data.batches("train", setting.train.batch_size, seed=1000 + seed), CALIBRATION)
    how = {"task": found.task, "criterion": chosen, "steps": STEPS, "seed": seed, "progress": False}
    return prune_to(found.model, found.example(), batches, speedup=speedup, ignore=setting.ignore, **how)


def measured(found: Original, criterion: str, speedup: float, seed: int) -> dict[str, Any]:
    """Prune and fine-tune both ways; return what a row of the table says."""
    model, task, setting, example = found.model, found.task, found.setting, found.example()
    plan = planned(found, criterion, speedup, seed)
    pruned = prune(model, plan)
    naive, equivalent = copy.deepcopy(pruned), EquivalentModel(model, plan)
    for network in (naive, equivalent):
        fit(network, found.train, found.val, dataclasses.replace(setting.tune, seed=seed), task=task, progress=False)
    whole, less = cost(model, example), cost(pruned, example)
    times = latencies({"original": model, "pruned": pruned}, example, threads=1)
    return {
        "metric": f"{task.headline} ({task.directions[task.headline]} is better)",
        "original": found.measure(model),
        "pruned": found.measure(pruned),
        "after naive": found.measure(naive),
        "after EP": found.measure(equivalent.merge()),
        "MACs, original": round(whole.macs),
        "MACs": round(less.macs),
        "parameters, original": whole.params,
        "parameters": less.params,
        "latency (ms), original": round(times["original"].median_ms, 3),
        "latency (ms)": round(times["pruned"].median_ms, 3),
    }


def handed_on(found: Original, criterion: str, speedup: float, seed: int) -> dict[str, Any]:
    """Prune, fine-tune with EP for an epoch, merge, save, load and export; return what the outputs differ by."""
    plan = planned(found, criterion, speedup, seed)
    equivalent, tune = EquivalentModel(found.model, plan), dataclasses.replace(found.setting.tune, epochs=1, seed=seed)
    fit(equivalent, found.train, found.val, tune, task=found.task, progress=False)
    merged, example = equivalent.merge().eval(), found.example()
    row = {"merged": apart(equivalent.eval(), merged, example)}
    with tempfile.TemporaryDirectory() as folder:
        save_pruned(f"{folder}/saved", merged, plan)
        loaded = load_pruned(f"{folder}/saved", model=found.setting.build())
        row["loaded"] = apart(merged, loaded, example)
        try:
            program = export_program(merged, example)
            given = (example.inputs,) if isinstance(example, Forward) else example
            row["torch.export"] = apart(merged, program.module(), example, given)
        except ValueError as error:
            row["torch.export"] = str(error)
        try:
            row["ONNX"] = export_onnx(f"{folder}/merged.onnx", merged, example).error
        except ValueError as error:
            row["ONNX"] = str(error)
    return row


def apart(one: nn.Module, other: nn.Module, example: Any, given: Any = None) -> float:
    """Return the largest difference of two networks' outputs, relative to the largest output."""
    with torch.no_grad():
        expected = tree_leaves(call_model(one, example))
        found = tree_leaves(call_model(other, example if given is None else given))
    pairs = [pair for pair in zip(expected, found, strict=True) if isinstance(pair[0], Tensor) and pair[0].numel()]
    largest = max(float(a.abs().max()) for a, _ in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs) / largest


KEYS = ("task", "criterion", "speed-up", "seed")


def main() -> None:
    """Measure what is missing in the table, row by row."""
    options = tyro.cli(Options)
    torch.set_num_threads(1)
    rows = pd.read_csv(options.out).to_dict("records") if options.out.exists() else []
    done = {tuple(row[key] for key in KEYS) for row in rows}
    wanted = itertools.product(options.seeds, options.tasks, options.speedups, options.criteria)
    jobs = [(task, criterion, speedup, seed) for seed, task, speedup, criterion in wanted]
    for task, criterion, speedup, seed in [job for job in jobs if job not in done][: options.limit]:
        found = original(task, seed, options)
        about = environment(torch.device("cpu"))
        row = {
            "task": task,
            "network": found.setting.network,
            "criterion": criterion,
            "speed-up": speedup,
            "seed": seed,
        }
        row |= (handed_on if options.hand_on else measured)(found, criterion, speedup, seed)
        row |= {"hardware": f"{about['cpu']}, {about['threads']} thread", "torch": about["libraries"]["torch"]}
        rows.append(row | {"obc_tools": about["libraries"]["obc_tools"], "python": about["python"]})
        pd.DataFrame(rows).to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
