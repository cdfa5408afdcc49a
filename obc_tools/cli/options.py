"""How options look in a command's help, those that commands share, and what can be wrong with any of them.

All of it is found before anything is loaded: nothing here imports torch.
"""

from __future__ import annotations

import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from ..errors import UnknownNameError
from ..files import cache_folder, entries

if TYPE_CHECKING:
    from ..runs.job import PruningJob

RESULTS, JOB, MANIFEST, GRID = "results.json", "job.json", "manifest.json", "grid.json"
SETTINGS = "comparison.json"
Makes = tuple[str, tuple[str, ...]]
"""What a command's folder holds in the end, and the files that tell."""
A_RUN, A_GRID, A_COMPARISON = ("run", (RESULTS, JOB)), ("grid", (GRID,)), ("comparison", (SETTINGS,))

Name = Annotated[str, tyro.conf.arg(metavar="NAME")]
Choice = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
Number = Annotated[float | None, tyro.conf.arg(metavar="NUMBER", help_behavior_hint="")]
Numbers = Annotated[tuple[float, ...], tyro.conf.arg(metavar="NUMBER ...", help_behavior_hint="")]
Rows = Annotated[str | None, tyro.conf.arg(metavar="ROWS", help_behavior_hint="")]
Whole = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="")]
Text = Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
Folder = Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
Root = Annotated[str | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")]
Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]
Position = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]


Expected = tuple[Callable[[Any], Any], str]
"""What a value must be: whether it fits, and how that is said."""
A_SHARE: Expected = (lambda entry: 0 < entry < 1, "a share between 0 and 1")
POSITIVE: Expected = (lambda entry: 0 < entry < math.inf, "a positive number")
AT_LEAST_0: Expected = (lambda entry: entry >= 0, "at least 0")
AT_LEAST_1: Expected = (lambda entry: entry >= 1, "at least 1")


class Command:
    """What is true of a command unless it says otherwise."""

    AFTER_STOP: ClassVar[str] = "the same command goes on from the last finished step"
    MAKES: ClassVar[Makes] = A_RUN
    TARGETS: ClassVar[tuple[int, float]] = (0, math.inf)
    """How many targets are given, at least and at most."""
    EXPECTED: ClassVar[Mapping[str, Expected]] = {}
    """Options whose values must be something else than those of other commands."""
    ELSEWHERE: ClassVar[bool] = False
    """The work is done on another machine."""


@dataclass(frozen=True, kw_only=True)
class PruningOptions(Command):
    """What pruning a network of one's own takes, once or by many criteria."""

    model: Name
    """Network: resnet20, resnet56, vgg19, ...; torchvision:resnet50, timm:vit_base_patch16_224, ...; or a function of
    your own that returns one, package.module:function."""
    data: Name
    """Data set: digits, cifar10, cifar100, imagenet, folder (class folders in train/ and val/ or test/), digit_scenes,
    digit_captions, stdlib_text; or a function of your own that returns Data or a pair (train, val)."""
    out: Folder
    """Folder to make for what comes out: tables, figures, models."""
    weights: Text = None
    """Its weights, unless the network is your own: a file (.safetensors, or a state dict saved by torch.save),
    "pretrained" (torchvision's or timm's), "published" or "published-sparse" (the paper's)."""
    task: Name = "classification"
    """What the network is for: classification, segmentation, detection, language_model, image_text, outputs (without
    labels); or a function of your own that returns a Task."""
    root: Root = None
    """Where the data lies: torchvision's files, class folders, or (CIFAR) one .npz file. Digits need none."""
    num_classes: Whole = None
    """Outputs of the network. Default: as many as the weights have, or the data."""
    normalize: Choice = None
    """Normalisation of the images. CIFAR: training (default) or benchmark; others: imagenet (default) or inception."""
    scope: Name = "global"
    """Which channels are ranked together: global (all), local (those of a layer), isomorphic (those of like layers)."""
    group_reduction: Name = "sum"
    """How scores of the layers that share a channel are combined: sum, mean, max, prod or first."""
    normalizer: Choice = None
    """How scores are scaled within a layer's group: sum, mean, max, gaussian, standarization or parameters."""
    round_to: Whole = None
    """Keep a multiple of so many channels in every layer."""
    min_channels: Whole = None
    """Keep at least so many channels in every layer. Default: 1."""
    max_ratio: Number = None
    """Remove at most this share of a layer's channels."""
    ignore: Names = ()
    """Layers that keep their width: names or patterns, such as conv1 'layer1.*'."""
    whole_heads: Flag = False
    """Let attentions lose whole heads; by default all heads lose the same positions."""
    only: Choice = None
    """Prune only this part: mlp (hidden channels), attention (its channels, or heads), bottleneck (both)."""
    counting: Choice = None
    """What MACs are: of the operations that run (operations, the default), or the paper's count (torch_pruning)."""
    batches: int = 50
    """Batches of training images to score with, drawn afresh for every step."""
    batch_size: int = 128
    """Images in a batch, for scoring and for fine-tuning."""
    rows: Rows = None
    """Rows of J of the criteria that have any: one a batch (batch, the default), an example (sample) or k of them; or
    the mean over all ways to draw batches from the examples (expected; expected:k for rows of k)."""
    stop: Number = None
    """Score no more batches once other ones would be expected to exchange at most this share of a step's channels,
    between 0 and 0.5, such as 0.1. Default: score all."""
    per: Choice = None
    """Divide each channel's score by what its removal alone would save: macs. Default: rank by the score."""
    compensate: Flag = False
    """Make up for removed channels in least squares over those images, without labels; fine-tuning starts there."""
    seed: int = 0
    """Fixes the images that are drawn, their order and their augmentation."""
    device: Name = "auto"
    """Where to compute: auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""

    def given(self, kind: type) -> dict[str, Any]:
        """Return the options that are fields of a value, but for those that were not said."""
        found = {entry.name: getattr(self, entry.name, None) for entry in fields(kind)}
        found = {name: value for name, value in found.items() if value is not None}
        return found | ({"rows": _rows(found["rows"])} if "rows" in found else {})


def _rows(said: str) -> Any:
    """Return rows as the library takes them: "32" and "expected:32" hold a number."""
    name, _, size = said.partition(":")
    return (name, int(size)) if size else int(name) if name.isdecimal() else name


@dataclass(frozen=True, kw_only=True)
class ExperimentOptions(Command):
    """What an experiment of the paper may be run with."""

    EXPECTED: ClassVar[Mapping[str, Expected]] = {"epochs": AT_LEAST_1}

    root: Root = None
    """Where the data lies."""
    data: Choice = None
    """Another data set than the paper's, such as cifar10 or digits."""
    weights: Text = None
    """Of the unpruned network: a file, "pretrained", "published", or "scratch" to train it. Default: the paper's."""
    sparse_weights: Text = None
    """A file that a sparse training left: skips that stage."""
    train_from_val: Flag = False
    """Train on one half of the held-out images, for folders that have no others."""
    as_requested: Flag = False
    """Train by what the published scripts ask for, also where their code ignores it."""
    small: Flag = False
    """Little of everything, to see that it runs."""
    epochs: Whole = None
    """Epochs of fine-tuning instead of the paper's."""
    sparse_epochs: Whole = None
    """Epochs of sparse training instead of the paper's; 0: no sparse training."""
    amp: Choice = None
    """Precision of training instead of the paper's: no (float32), bf16 or fp16."""
    steps: Whole = None
    """Pruning steps instead of the paper's; the last one then ends at the target, not past it."""
    batches: Whole = None
    """Batches that score the channels in every pruning step, instead of the paper's 50."""
    train_images: Whole = None
    """Use at most so many training images."""
    val_images: Whole = None
    """Use at most so many held-out images."""
    device: Choice = None
    """Where to compute: auto (default), cpu, cuda, ..."""

    def changes(self) -> dict[str, Any]:
        """Return the fields of a job that the options change."""
        names = ("root", "data", "steps", "batches", "train_images", "val_images", "device")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return given | ({"train_from_val": True} if self.train_from_val else {})

    def adapted(self, job: PruningJob) -> PruningJob:
        """Return a job with the epochs, the precision and the sparse weights that the options say."""
        from dataclasses import replace

        from ..training.recipe import rescaled

        if self.sparse_weights is not None:
            job = replace(job, sparse=None, sparse_weights=self.sparse_weights)
        if self.sparse_epochs == 0:
            job = replace(job, sparse=None)
        elif self.sparse_epochs is not None and job.sparse is not None:
            job = replace(job, sparse=rescaled(job.sparse, self.sparse_epochs))
        if self.epochs is not None:
            job = replace(job, finetune=rescaled(job.finetune, self.epochs))
        if self.amp is None:
            return job
        return job.with_recipes(amp=self.amp)


@dataclass(frozen=True, kw_only=True)
class OneExperiment(ExperimentOptions):
    """One experiment and the folder of its run."""

    experiment: Position
    """vgg19-cifar100, resnet56-cifar10, resnet50-imagenet, mobilenetv2-imagenet or vit-b16-imagenet."""
    out: Folder
    """Folder of the run: metrics, log and checkpoints while it runs, models and figures in the end."""
    seed: int = 0
    """Of everything random."""

    def job(self, **chosen: Any) -> PruningJob:
        """Return the job, with other fields than the options' as well."""
        from ..runs.run import job_of

        same = {"seed": self.seed, "weights": self.weights, "as_requested": self.as_requested}
        return self.adapted(job_of(self.experiment, small=self.small, **same, **chosen, **self.changes()))


CRITERIA = (
    "jacobian",
    "taylor",
    "hessian",
    "obdc",
    "l1",
    "l2",
    "fpgm",
    "whc",
    "bn_scale",
    "lamp",
    "residual",
    "random",
)
ALIASES = ("magnitude", "l1_norm", "l2_norm", "bn", "jc", "taylor_fo")
EXPERIMENTS = ("vgg19-cifar100", "resnet56-cifar10", "resnet50-imagenet", "mobilenetv2-imagenet", "vit-b16-imagenet")
KNOWN = {
    "criterion": CRITERIA,
    "criteria": CRITERIA,
    "scope": ("global", "local", "isomorphic"),
    "group_reduction": ("sum", "mean", "max", "prod", "first"),
    "normalizer": ("sum", "mean", "max", "gaussian", "standarization", "parameters"),
    "only": ("mlp", "attention", "bottleneck"),
    "counting": ("operations", "torch_pruning"),
    "per": ("macs",),
    "task": ("classification", "segmentation", "detection", "language_model", "image_text", "outputs"),
    "data": (
        "digits", "cifar10", "cifar100", "imagenet", "folder", "digit_scenes", "digit_captions", "stdlib_text"
    ),
    "experiment": EXPERIMENTS,
    "grid": (*EXPERIMENTS, "paper-cifar", "paper-imagenet"),
    "amp": ("no", "bf16", "fp16"),
}  # fmt: skip
"""Names that options take, as the library has them: its own tables come with torch, which takes seconds to load."""
NAMED_WEIGHTS = ("pretrained", "published", "published-sparse", "scratch")
COUNTS = (
    "batches", "batch_size", "steps", "repeats", "held_out", "train_images", "val_images", "num_classes", "round_to",
    "min_channels", "processes", "each", "nodes", "gpus", "cpus",
)  # fmt: skip
POSITIONAL = ("experiment", "grid")
LIBRARIES = ("torchvision", "timm", "transformers", "ultralytics")
OWN_NETWORKS = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "vgg11", "vgg13", "vgg16", "vgg19")
PUBLISHED = ("resnet56", "vgg19")
NAMED = re.compile(
    r"^@register_model(?:\((?:name=\"(\w+)\")?\))?\n(?:[@ )].*\n)*def (\w+)\(|^    '([a-z]\w+)':", re.MULTILINE
)
"""How torchvision and timm give names to networks."""
TARGETS = ("speedup", "macs", "params", "ratio")
EXPECTED: Mapping[str, Expected] = {
    **dict.fromkeys(COUNTS, AT_LEAST_1),
    **dict.fromkeys(("epochs", "sparse_epochs", "training", "seed", "seeds"), AT_LEAST_0),
    **dict.fromkeys(("ratio", "hold_out"), A_SHARE),
    **dict.fromkeys(("macs", "params"), POSITIVE),
    "speedup": (lambda entry: 1 < entry < math.inf, "a number above 1"),
    "max_ratio": (lambda entry: 0 < entry <= 1, "a share above 0, at most 1"),
    "lr": (lambda entry: 0 <= entry < math.inf, "a number of at least 0"),
    "stop": (lambda entry: 0 < entry < 0.5, "a share between 0 and 0.5"),
    "rows": (
        re.compile(r"batch|sample|(expected:)?[1-9]\d*|expected").fullmatch,
        "batch, sample, a number, expected or expected:32",
    ),
    "device": (re.compile(r"auto|cpu|cuda(:\d+)?").fullmatch, "auto, cpu, cuda, cuda:1, ..."),
    "time": (
        re.compile(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}").fullmatch,
        "minutes, or 24:00:00, or 2-12:00 for days and hours",
    ),
}
LIES_IN = {
    "cifar10": ("cifar-10-batches-py", "train", "cifar10.npz"),
    "cifar100": ("cifar-100-python", "train", "cifar100.npz"),
    "imagenet": ("train", "val", "test"),
    "folder": ("train", "val", "test"),
}
"""Data set -> what lies where it does, one of these at least."""
GRIDS = {"paper-cifar": ("cifar100", "cifar10"), "paper-imagenet": ("imagenet",)}
GPUS = ("nvidia*", "nvhost*", "nvgpu*", "kfd", "dxg")
"""How Linux names the devices that a GPU is reached through."""


def check(command: Any) -> None:
    """Raise ValueError for an option that cannot be meant, without loading anything."""
    values = {entry.name: getattr(command, entry.name) for entry in fields(command)}
    given = {name: value for name, value in values.items() if value is not None}
    for name, value in given.items():
        for entry in value if isinstance(value, tuple) else (value,):
            _check_value(name, entry, command)
        if name == "criteria" and (not value or len({*value}) < len(value)):
            raise ValueError(" ".join(["--criteria", *value]) + ": name at least one, each once")
    _check_targets(command, given)
    if given.get("equivalent") and not given["epochs"]:
        raise ValueError("--equivalent: Equivalent Pruning is a way of fine-tuning: give --epochs at least 1")
    _check_paths(command, given)
    _check_network(given)
    if not command.ELSEWHERE:
        _check_data(given)
        _check_gpus(given)


def _check_value(name: str, entry: Any, command: Any) -> None:
    fits, expected = {**EXPECTED, **command.EXPECTED}.get(name, (None, ""))
    if name in KNOWN and ":" not in str(entry):
        _check_name(name, str(entry))
    elif fits is not None and not isinstance(entry, bool) and not fits(entry):
        raise ValueError(f"{option(name)} {entry}: expected {expected}")


def _check_name(name: str, entry: str) -> None:
    known = KNOWN[name] + (ALIASES if KNOWN[name] is CRITERIA else ())
    if "," in entry:
        raise ValueError(f"{option(name)} {entry}: put spaces between names, no commas")
    if entry.lower() not in known:
        raise UnknownNameError(option(name), entry, known)


def _check_targets(command: Any, given: Mapping[str, Any]) -> None:
    values = {name: value if isinstance(value, tuple) else (value,) for name, value in given.items() if name in TARGETS}
    said = [f"{option(name)} {entry:g}" for name, entries in values.items() for entry in entries]
    least, most = command.TARGETS
    if not least <= len(said) <= most:
        known = [option(entry.name) for entry in fields(command) if entry.name in TARGETS]
        raise ValueError(f"give one target: {', '.join(known[:-1])} or {known[-1]}; got {', '.join(said) or 'none'}")


def _check_network(given: Mapping[str, Any]) -> None:
    """Check that a network is known and has weights, and that there are the modules of what is a user's own."""
    for name in ("data", "task", *(() if "weights" in given else ("model",))):
        module, _, function = str(given.get(name, "")).partition(":")
        if function and module not in LIBRARIES and not _is_found(module.partition(".")[0]):
            raise ValueError(
                f"'{given[name]}' is no function that could be called without arguments: there is no module '{module}'"
            )
    model, weights = given.get("model", ""), given.get("weights")
    own = ":" in model and model.partition(":")[0] not in LIBRARIES
    if not model or own or (Path(model) / MANIFEST).is_file():
        return
    if weights is not None:
        _check_network_name(model)
        if weights == "pretrained" and ":" not in model:
            raise ValueError(
                f"--weights pretrained: there are none of {model}, only of torchvision's and timm's networks"
            )
        if weights.startswith("published") and weights in NAMED_WEIGHTS and model not in PUBLISHED:
            raise ValueError(f"--weights {weights}: there are none of {model}, but of {' and '.join(PUBLISHED)}")
        return
    if "out" not in given:
        raise ValueError(f"'{model}' holds no saved model; for a network by name, pass --weights too")
    ways = "a file, pretrained or published; a network of your own is package.module:function"
    raise ValueError(f"--weights: which weights of '{model}'? It begins with a trained network: {ways}")


def _check_network_name(name: str) -> None:
    source, colon, entry = name.partition(":")
    if source in LIBRARIES[:2]:
        known = _networks_of(source)
        if entry.partition(".")[0] not in known:
            raise UnknownNameError(f"network of {source}", entry, sorted(known))
    elif not colon:
        depth = re.fullmatch(r"resnet([1-9]\d*)", name)
        own = depth is not None and int(depth[1]) >= 8 and int(depth[1]) % 6 == 2 and int(depth[1]) not in (50, 152)
        if name not in OWN_NETWORKS and not own:
            there = [f"{library}:{name}" for library in LIBRARIES[:2] if name in _networks_of(library)]
            raise UnknownNameError("network", name, there or OWN_NETWORKS)


def _networks_of(library: str) -> set[str]:
    """Return the names that the files of a library give to the networks in them, earlier ones too."""
    found = find_spec(library)
    places = found.submodule_search_locations if found else []
    texts = [path.read_text("utf-8") for place in places for path in Path(place, "models").rglob("*.py")]
    return {name for text in texts for names in NAMED.findall(text) for name in names if name}


def _is_found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:  # of __main__, which no specification is of
        return True


def _check_data(given: Mapping[str, Any]) -> None:
    """Check that data lies where it is said to lie, as far as folders tell."""
    roots = given.get("roots") or {}
    for name, place in roots.items():
        if name not in KNOWN["data"]:
            raise UnknownNameError("--roots", name, KNOWN["data"])
        if not Path(place).expanduser().exists():
            raise ValueError(f"--roots {name} {place}: there is no such folder")
    asked = given.get("grid") or given.get("experiment", "")
    for name in [given["data"]] if "data" in given else GRIDS.get(asked, (asked.partition("-")[2],)):
        place = roots.get(name) if roots else given.get("root")
        if place is None and name in ("cifar10", "cifar100"):
            place = cache_folder() / name
        if name not in LIES_IN or (place is not None and Path(place).expanduser().is_file()):
            continue
        if place is None:
            raise ValueError(
                f"{name}: no root was given; pass --root, a folder with class folders in 'train' and 'val'"
            )
        if not any((Path(place).expanduser() / entry).exists() for entry in LIES_IN[name]):
            known = ", ".join(LIES_IN[name])
            raise ValueError(f"no {name} in '{place}': pass as --root a folder that holds one of {known}")


def _check_gpus(given: Mapping[str, Any]) -> None:
    there = sys.platform != "linux" or any(True for name in GPUS for _ in Path("/dev").glob(name))
    for name in ("device", "devices"):
        if not there and given.get(name) and given[name] not in ("auto", "cpu"):
            said = given[name] if name == "device" else " ".join(map(str, given[name]))
            raise ValueError(f"{option(name)} {said}: this machine has no GPU")


def _check_paths(command: Any, given: Mapping[str, Any]) -> None:
    if not command.ELSEWHERE:
        for name in ("weights", "sparse_weights"):
            if name in given and given[name] not in NAMED_WEIGHTS and not Path(given[name]).expanduser().exists():
                raise ValueError(f"{option(name)} {given[name]}: there is no such file, nor weights of that name")
        if "root" in given and not Path(given["root"]).expanduser().exists():
            raise ValueError(f"--root {given['root']}: there is no such folder")
    if (folder := given.get("folder")) is not None:
        if not folder.exists():
            raise ValueError(f"'{folder}' holds 0 runs: there is no such folder")
        if not any((folder / name).is_file() for name in (GRID, JOB)) and not any(folder.glob(f"*/{JOB}")):
            raise ValueError(f"'{folder}' holds 0 runs")
    if "out" in given:
        _check_out(command, given["out"], given)


def _check_out(command: Any, out: Path, given: Mapping[str, Any]) -> None:
    """Check that a command may write to its folder: nothing lies in it, or what it goes on with or replaces."""
    kind, marks = command.MAKES
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file, not a folder")
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"--out {out}: '{there}' is a file, not a folder")
    try:
        os.rmdir(tempfile.mkdtemp(dir=there))
    except OSError as error:
        raise ValueError(f"--out {out}: nothing can be written to '{there}' ({error.strerror})") from error
    found = entries(out)
    if found and not {*marks} & {*found}:
        raise ValueError(f"--out '{out}' holds something else than a {kind} ({found[0]}): choose another folder")
    replaces = getattr(command, "may_overwrite", given.get("overwrite"))
    if found and kind != "comparison" and not given.get("resume") and not replaces:
        way = "overwrite it (--overwrite)" if "overwrite" in given else "go on with it (--resume)"
        raise ValueError(f"--out {out} already holds a {kind}: choose another folder, or {way}")


def option(name: str) -> str:
    """Return how a command spells the name of a value: an experiment is named without one."""
    return name if name in POSITIONAL else f"--{name.replace('_', '-')}"


def spelled(message: str, command: Any) -> str:
    """Return what the library says of its arguments as the command spells them: "--speedup 9", not "speedup=9"."""
    for name in (entry.name for entry in fields(command)):
        message = re.sub(rf"\b{name}=(?=[\w'\"\[(.-])", f"{option(name)} ", message)
        message = re.sub(rf"\b{name}=", option(name), message)
        message = re.sub(rf"\brecipe: {name} is\b", f"{option(name)} is", message)
        message = message.replace(f"unknown {name} '", f"unknown {option(name)} '")
        message = re.sub(rf"; leave {name}$", f"; leave out {option(name)}", message)
    return message
