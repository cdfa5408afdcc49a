"""A pruning job as plain data; what it works on: the model, the data and the device, loaded and checked; its folder.

A user's own model, data or task is named "package.module:function": imported because they named it, and called.

A run's folder holds the job (`job.json`), the log, a folder for each training (`training_<name>`, as `fit` keeps it),
the plan as soon as it is found (before that `pruning.json`, what the last pruning step left; `refused_plan.json` where
its proof failed), `original.safetensors` and `sparse.safetensors` where the job trained them; in the end `results.json`
(all figures, with hardware and versions), `history_<training>.csv`, one folder a pruned model as `models/store.py`
writes them, and `report.html` where it was asked for. What a run goes on from carries digests.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from ..data.batches import Augmentation, Batches, take
from ..data.data import Data, as_data, load_data
from ..errors import check_whole
from ..files import PROCESS, entries, read_json, write_json
from ..measure.costs import Cost
from ..measure.latency import Latency
from ..measure.metrics import SIGNS, Metrics, TaskMetrics
from ..models.networks import load_model
from ..pruning.choices import TORCH_PRUNING, Settings, Steps, Target
from ..pruning.plan import PruningPlan
from ..scoring.jtj import DenseJTJ
from ..scoring.tasks import CLASSIFICATION, Task, find_task
from ..training.folder import History
from ..training.processes import processes
from ..training.recipe import Recipe

ORIGINAL, SPARSE, PRUNED, COMPENSATED = "original", "sparse", "pruned", "compensated"
NAIVE, MERGED = "naive", "merged"
TITLES: Mapping[str, str] = {
    ORIGINAL: "original",
    SPARSE: "after sparse training",
    PRUNED: "pruned, no fine-tuning",
    COMPENSATED: "pruned and compensated, no fine-tuning",
    NAIVE: "naive fine-tuning",
    MERGED: "Equivalent Pruning, merged",
}
"""The models of a job, in the order of its table."""

PLAN, PRUNING, REFUSED_PLAN = "plan.json", "pruning.json", "refused_plan.json"
WEIGHTS: Mapping[str, str] = {key: f"{key}.safetensors" for key in (ORIGINAL, SPARSE)}
"""Files of the weights of unpruned networks that a job trained."""


DIGITS: Mapping[str, str] = {
    "test accuracy": "{:.2%}",
    "test loss": "{:.4f}",
    "MACs": "{:,.0f}",
    "speed-up": "{:.2f}x",
    "parameters": "{:,}",
    "CPU latency (ms)": "{:.2f}",
}


def as_text(frame: pd.DataFrame, directions: Mapping[str, str]) -> pd.DataFrame:
    """Return a table of models as text, with as many digits as a reader wants; say of metrics which way is better."""
    texts = {name: DIGITS.get(name, "{:.4g}").format for name in frame.columns[1:]}
    signs = {f"test {name}": f"test {name} {SIGNS[better]}" for name, better in directions.items()}
    return frame.assign(**{name: frame[name].map(text) for name, text in texts.items()}).rename(columns=signs)


@dataclass(frozen=True)
class Measured:
    """What was measured of one model: metrics on all held-out images, MACs and CPU latency of one image."""

    metrics: Metrics | TaskMetrics
    cost: Cost
    latency: Latency


@dataclass(frozen=True)
class Equivalence:
    """How far Equivalent Pruning kept its promises: largest differences of logits on a batch of held-out images.

    Differences are over the largest logit where that is above 1, for float32 rounds relative to it.

    Attributes:
        start_from_naive: EP before training against the pruned network, or the compensated one; at most `TOLERANCE`.
        merged_from_trained: The merged network against the trained EP; at most `TOLERANCE`.
        merged_from_naive: The merged network against the naively fine-tuned one; above 0, or EP did nothing.
        merged_loads_into_naive: The merged state dict was loaded, strictly, into the naively pruned network.
    """

    start_from_naive: float
    merged_from_trained: float
    merged_from_naive: float
    merged_loads_into_naive: bool


@dataclass(frozen=True, eq=False, repr=False)
class JobResult:
    """What a job led to.

    Attributes:
        job: What was asked for.
        plan: Which channels stay.
        models: Key -> model, in the order of `TITLES`; those that the job asked for.
        measured: Key -> what was measured of that model.
        histories: Key -> its training.
        equivalence: None without Equivalent Pruning.
        filters: JᵀJ of some channels of the first layer of the original; None where a channel is too large to show.
        seconds: Stage -> duration.
        speeds: What `speed_table` found, where the job asked for it.
    """

    job: PruningJob
    plan: PruningPlan
    models: Mapping[str, nn.Module]
    measured: Mapping[str, Measured]
    histories: Mapping[str, History]
    equivalence: Equivalence | None
    filters: DenseJTJ | None
    seconds: Mapping[str, float]
    speeds: pd.DataFrame | None = None

    def to_frame(self) -> pd.DataFrame:
        """Return one row a model: its metrics, MACs, MACs of the original over its own, parameters, CPU latency."""
        whole = self.measured[ORIGINAL].cost.macs
        rows = [
            {
                "model": TITLES[key],
                **{f"test {name}": value for name, value in measured.metrics.values.items() if name != "top5"},
                "MACs": round(measured.cost.macs),
                "speed-up": whole / measured.cost.macs,
                "parameters": measured.cost.params,
                "CPU latency (ms)": measured.latency.median_ms,
            }
            for key, measured in self.measured.items()
        ]
        return pd.DataFrame(rows)

    def table(self) -> pd.DataFrame:
        """Return `to_frame` as text, each number with as many digits as a reader wants."""
        return as_text(self.to_frame(), getattr(self.measured[ORIGINAL].metrics, "directions", {}))

    def __repr__(self) -> str:
        return self.table().to_string(index=False)

    def _repr_html_(self) -> str:
        return self.table().to_html(index=False)


VALIDATION_BATCH = 256
RECIPES = ("pretrain", "sparse", "finetune")


@dataclass(frozen=True, kw_only=True)
class PruningJob(Settings):
    """What to prune, to which target, and how to fine-tune it; plain values, checked when built.

    Attributes:
        model: Name of a network for `load_model`, or "package.module:function" of one's own, which returns it.
        data: Name of a data set for `load_data`, or a function of one's own that returns `Data` or (train, val).
        task: What the network is for: a name of `TASKS`, or a function of one's own that returns a `Task`.
        target: What the pruned network must reach.
        weights: What fills the network: a file or a name of `load_model`; None: it is trained first, by ``pretrain``,
            unless the network is one's own.
        num_classes: Outputs of the network; None: what the weights have, or else the classes of the data.
        model_options: For the network's constructor, such as ``{"width": 8}``.
        root: Where the data lies.
        train_from_val: Cut the held-out images in two, to train on one half: for folders without training images.
        train_images, val_images: Use at most so many images of a split, for a small run.
        normalize: Normalisation of the data, by name; None: its default.
        criterion, steps, schedule_ratio, last_step: of `prune_to`, as are those of `Settings`. Calibration batches are
            drawn afresh from the training images for every pruning step. With ``compensate`` both fine-tunings begin
            at the compensated network.
        augment: Whether calibration images are augmented, by crops and flips.
        calibrate_as_trained: Augment calibration images by all that ``finetune`` says, mixed labels included.
        pretrain: How to train the network from scratch; None where there are weights.
        sparse: How to train it sparsely before pruning; None: not at all.
        sparse_weights: A file of weights that a sparse training left, instead of one.
        finetune: How to fine-tune the pruned network; None: not at all.
        equivalent: Fine-tune with Equivalent Pruning too, by the same recipe, and merge.
        speeds: Measure all networks by runtime, threads and examples at a time in the end (see `speed_table`).
        seed: Of `Settings`: fixes fresh weights, calibration batches and random scores; recipes have their own.
        device: "auto" (a CUDA GPU where there is one), "cpu", "cuda", "cuda:1", …
        title: What the report calls the job.

    Raises:
        ValueError: if a value is unknown, out of range or contradicts another.
    """

    model: str
    data: str
    target: Target
    weights: str | None = None
    num_classes: int | None = None
    model_options: Mapping[str, Any] = field(default_factory=dict)
    root: str | None = None
    train_from_val: bool = False
    train_images: int | None = None
    val_images: int | None = None
    normalize: str | None = None
    criterion: str = "jacobian"
    steps: int = 20
    schedule_ratio: float = 1.0
    last_step: str = "exact"
    augment: bool = True
    calibrate_as_trained: bool = False
    pretrain: Recipe | None = None
    sparse: Recipe | None = None
    sparse_weights: str | None = None
    finetune: Recipe | None = None
    equivalent: bool = False
    speeds: bool = False
    device: str = "auto"
    title: str = "pruning job"
    task: str = CLASSIFICATION.name

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kind in {"model": str, "data": str, "target": Target, **dict.fromkeys(self.recipes, Recipe)}.items():
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected a value of type {kind.__name__}")
        for name in ("train_images", "val_images", "num_classes"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1)
        if not is_own(self.task):
            find_task(self.task)
        _ = self.scoring(self.criterion), self.schedule
        own = is_own(self.model)
        if own and self.weights is not None:
            raise ValueError(f"'{self.model}' returns a network as it is: give no weights")
        if not own and (self.weights is None) == (self.pretrain is None):
            raise ValueError("give either weights or a recipe to train the network with (pretrain)")
        if self.equivalent and self.finetune is None:
            raise ValueError("Equivalent Pruning is a way of fine-tuning: give it at least 1 epoch")
        if self.sparse is not None and not self.sparse.group_penalty:
            raise ValueError("sparse training needs a recipe with group_penalty above 0")
        if self.calibrate_as_trained and self.finetune is None:
            raise ValueError("calibrate_as_trained asks for the augmentation of finetune, and there is none")

    @property
    def schedule(self) -> Steps:
        """In which steps the target is approached."""
        return Steps(self.steps, self.schedule_ratio, self.last_step)

    @property
    def recipes(self) -> dict[str, Recipe]:
        """The recipes of its trainings, by field."""
        return {name: recipe for name in RECIPES if (recipe := getattr(self, name)) is not None}

    def with_recipes(self, **changes: Any) -> PruningJob:
        """Return the job with every recipe changed so."""
        return replace(self, **{name: replace(recipe, **changes) for name, recipe in self.recipes.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return the job as plain data that JSON can hold."""
        plain = asdict(self) | {"ignore": list(self.ignore), "model_options": dict(self.model_options)}
        if self.task == CLASSIFICATION.name:
            plain.pop("task")  # as jobs were written when there was no other
        return plain | {name: recipe.to_dict() for name, recipe in self.recipes.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruningJob:
        """Build a job from what :meth:`to_dict` returned; a target that names no count is in torch_pruning's.

        Raises:
            ValueError: for keys that are no fields, and values out of range.
        """
        if unknown := sorted(set(data) - {entry.name for entry in fields(cls)}):
            raise ValueError(f"a job has no {', '.join(unknown)}")
        recipes = {name: data[name] and Recipe.from_dict(data[name]) for name in RECIPES if name in data}
        target = data.get("target")
        if not isinstance(target, Mapping) or not {*target} <= {entry.name for entry in fields(Target)}:
            raise ValueError(f"a job's target is {target!r}; expected one of speedup, macs, params, ratio")
        return cls(**{**data, **recipes, "target": Target(**{"counting": TORCH_PRUNING} | target)})

    def load(self) -> Data:
        """Load the data that the job names, as much of it as it asks for."""
        data = find_data(self.data, self.root, self.normalize)
        if self.train_from_val:
            data = data.with_train_from_val()
        return data.limited(self.train_images, self.val_images)


@dataclass(frozen=True, eq=False)
class JobInputs:
    """What a job works on, loaded and checked.

    ``source`` are the arguments of `load_model` for the unpruned network, None for one's own; ``example`` is one image,
    (1, …), or example inputs of another task.
    """

    job: PruningJob
    data: Data
    model: nn.Module
    source: Mapping[str, Any] | None
    device: torch.device
    example: Any
    task: Task = CLASSIFICATION

    def training_batches(self, recipe: Recipe) -> Batches:
        """Return the batches of a training: the same images in the same order for every training by one recipe."""
        own = processes()
        return self.data.batches(
            "train",
            recipe.batch_size * own.count,
            seed=recipe.seed,
            augment=recipe.augmentation,
            device=self.device,
            share=own.share,
        )

    def calibration_batches(self) -> Batches:
        """Return the calibration batches, other ones each time they are iterated over.

        Those of a pass, by `Batches.at`, are the same in every process and after a resume.
        """
        job = self.job
        augment = job.finetune.augmentation if job.calibrate_as_trained else Augmentation(crop=job.augment)
        train = self.data.batches("train", job.batch_size, seed=job.seed, augment=augment, device=self.device)
        return take(train, job.batches)

    def held_out_batches(self, share: tuple[int, int] = (0, 1)) -> Batches:
        """Return the held-out images, which are for reporting alone; or one process's share of them."""
        size = max(1, min(VALIDATION_BATCH, len(self.data.val))) // share[1] * share[1]
        return self.data.batches("val", size, device=self.device, share=share)


def find_device(name: str) -> torch.device:
    """Return a device by name, "auto" being this process's GPU if there is one.

    Raises:
        ValueError: if it is unknown or not there.
    """
    if name == "auto":
        return torch.device(f"cuda:{processes().local_rank}" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise ValueError(f"unknown device '{name}'; known are auto, cpu, cuda, cuda:1, ...")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device '{name}' is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)


LIBRARIES = ("torchvision", "timm", "transformers", "ultralytics")
REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_own(name: str) -> bool:
    """Say whether a name is "package.module:function", not that of a library's network."""
    return bool(REFERENCE.fullmatch(name)) and name.partition(":")[0] not in LIBRARIES


def called(name: str, kind: type | tuple[type, ...], expected: str) -> Any:
    """Return what the function of a name returns; raise ValueError, with the name, for no function or another kind."""
    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(module), function)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"'{name}' is no function that could be called without arguments: {error}") from error
    if not isinstance(found, kind) or (isinstance(found, tuple) and len(found) != 2):
        raise ValueError(f"'{name}' returned {type(found).__name__}; expected {expected}")
    return found


def find_model(name: str, num_classes: int | None, weights: str | None, **options: Any) -> nn.Module:
    """Return a network by name, as `load_model` does, or what a user's own function returns."""
    if is_own(name):
        return called(name, nn.Module, "a network (nn.Module)")
    return load_model(name, num_classes, weights, **options)


def find_data(name: str, root: str | None = None, normalize: str | None = None) -> Data:
    """Return data by name, as `load_data` does, or what a user's own function returns: `Data`, or (train, val)."""
    if not is_own(name):
        return load_data(name, root, normalize=normalize)
    found = called(name, (Data, tuple), "Data or a pair (train, val)")
    return found if isinstance(found, Data) else as_data(*found, name=name)


def own_task(name: str) -> Task:
    """Return a ready task by name, or what a user's own function returns."""
    return called(name, Task, "a Task") if is_own(name) else find_task(name)


FORMAT = 1
RESULTS, REPORT, JOB, RUN_LOG = "results.json", "report.html", "job.json", "run.log"
TRAINING = "training_"
"""What the names of trainings' folders begin with."""
SAVED_MODELS = (PRUNED, COMPENSATED, NAIVE, MERGED)
TRAINED = (ORIGINAL, SPARSE, NAIVE, MERGED)
STOP, STOPPED, ERROR, OUTPUT = "stop", "stopped.json", "error.json", "output.log"
ENTRIES = {
    RESULTS,
    PLAN,
    PRUNING,
    REFUSED_PLAN,
    REPORT,
    *WEIGHTS.values(),
    *SAVED_MODELS,
    *(f"history_{key}.csv" for key in TRAINED),
}
ENTRIES |= {JOB, RUN_LOG, STOP, STOPPED, ERROR, PROCESS, OUTPUT, "run.slurm", *(f"{TRAINING}{key}" for key in TRAINED)}


class RunFolderError(ValueError):
    """A folder that a run must not be written to, or that holds none."""


def write_job(folder: Path, job: PruningJob) -> None:
    """Write the job of a run folder."""
    write_json(folder / JOB, job.to_dict(), checked=True)


def read_job(folder: str | os.PathLike[str]) -> PruningJob:
    """Read the job of a run folder; raise RunFolderError if it holds none."""
    try:
        return PruningJob.from_dict(read_json(Path(folder, JOB)))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunFolderError(f"'{folder}' holds no job: {error}") from error


def check_same_job(folder: Path, job: PruningJob) -> None:
    """Raise RunFolderError unless a run folder holds this very job."""
    there, here = read_job(folder).to_dict(), job.to_dict()
    keys = [key for key in here | there if there.get(key) != here.get(key)]
    if other := [f"{key} was {there.get(key)!r}, is {here.get(key)!r}" for key in keys]:
        raise RunFolderError(f"'{folder}' holds another job: {', '.join(other)}; choose another folder")


def as_begun(folder: Path, job: PruningJob) -> PruningJob:
    """Return a job as the run in a folder goes on with it: in torch_pruning's count, where it was begun in none."""
    begun = read_json(folder / JOB, "target")["target"]
    return job if "counting" in begun else replace(job, target=replace(job.target, counting=TORCH_PRUNING))


def check_run_folder(folder: Path, *, overwrite: bool) -> None:
    """Raise RunFolderError unless a run may be written to a folder: free, or holding a run that may be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"'{folder}' is a file, not a folder")
    found = entries(folder)
    strangers = found if not {RESULTS, JOB} & {*found} else sorted({*found} - ENTRIES)
    if strangers:
        raise RunFolderError(f"'{folder}' holds something else than a run ({strangers[0]}): choose another folder")
    if found and not overwrite:
        raise RunFolderError(f"'{folder}' already holds a run: choose another folder, or overwrite it (--overwrite)")


def read_results(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the results of a run; raise RunFolderError if the folder holds none."""
    path = Path(folder, RESULTS)
    try:
        results = read_json(path)
    except (OSError, ValueError) as error:
        raise RunFolderError(f"'{folder}' holds no run: {error}") from error
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        raise RunFolderError(f"'{path}' is not of format {FORMAT}, the one that this version reads")
    return results
