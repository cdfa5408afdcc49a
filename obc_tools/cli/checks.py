"""What can be wrong with a command's options, found before anything is loaded, in the command's own spelling."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UnknownNameError
from ..files import entries

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
}  # fmt: skip
"""Names that options take, as the library has them: its own tables come with torch, which takes seconds to load."""
NAMED_WEIGHTS = ("pretrained", "published", "published-sparse", "scratch")
AT_LEAST_ONE = (
    "batches", "batch_size", "steps", "repeats", "held_out", "train_images", "val_images", "num_classes", "round_to",
    "min_channels", "processes", "each", "nodes", "gpus", "cpus",
)  # fmt: skip
LEAST = {"epochs": 0, "sparse_epochs": 0, "training": 0} | dict.fromkeys(AT_LEAST_ONE, 1)
POSITIONAL = ("experiment", "grid")
LIBRARIES = ("torchvision", "timm", "transformers", "ultralytics")
DURATION = re.compile(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}")
"""As SLURM writes them."""
TARGETS = ("speedup", "macs", "params", "ratio")
RESULTS, JOB, MANIFEST = "results.json", "job.json", "manifest.json"


def check(command: Any) -> None:
    """Raise ValueError for an option that cannot be meant, without loading anything."""
    for name, value in _given(command):
        for entry in value if isinstance(value, tuple) else (value,):
            if name in KNOWN and ":" not in str(entry):
                _check_name(name, str(entry))
            if name in ("ratio", "hold_out") and not 0 < entry < 1:
                raise ValueError(f"{option(name)} {entry}: expected a share between 0 and 1")
            if name == "speedup" and not entry > 1:
                raise ValueError(f"{option(name)} {entry}: expected a number above 1")
            if name in TARGETS and not 0 < entry < math.inf:
                raise ValueError(f"{option(name)} {entry}: expected a positive number")
        if name == "stop" and isinstance(value, float) and not 0 < value < 0.5:
            raise ValueError(f"{option(name)} {value}: expected a share between 0 and 0.5")
        if name == "rows" and not re.fullmatch(r"batch|sample|(expected:)?[1-9]\d*|expected", value):
            raise ValueError(f"{option(name)} {value}: expected batch, sample, a number, expected or expected:32")
        if name in LEAST and value < LEAST[name]:
            raise ValueError(f"{option(name)} {value}: expected at least {LEAST[name]}")
        if name == "device" and not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
            raise ValueError(f"{option(name)} {value}: expected auto, cpu, cuda, cuda:1, ...")
        if name == "time" and not DURATION.fullmatch(value):
            raise ValueError(f"{option(name)} {value}: expected minutes, or 24:00:00, or 2-12:00 for days and hours")
    _check_targets(command)
    _check_paths(command)
    _check_network(command)


def _check_name(name: str, entry: str) -> None:
    known = KNOWN[name] + (ALIASES if KNOWN[name] is CRITERIA else ())
    if "," in entry:
        raise ValueError(f"{option(name)} {entry}: put spaces between names, no commas")
    if entry.lower() not in known:
        raise UnknownNameError(option(name), entry, known)


def _given(command: Any) -> Iterator[tuple[str, Any]]:
    """Yield the options that were said, or have a value when nothing is said."""
    for entry in fields(command):
        if (value := getattr(command, entry.name)) is not None:
            yield entry.name, value


def _check_targets(command: Any) -> None:
    least, most = getattr(command, "TARGETS", (0, len(TARGETS)))
    said = [(name, value if isinstance(value, tuple) else (value,)) for name, value in _given(command)]
    given = [f"{option(name)} {entry:g}" for name, values in said if name in TARGETS for entry in values]
    if not least <= len(given) <= most:
        known = [option(entry.name) for entry in fields(command) if entry.name in TARGETS]
        raise ValueError(f"give one target: {', '.join(known[:-1])} or {known[-1]}; got {', '.join(given) or 'none'}")


def _check_network(command: Any) -> None:
    """Check that a network has weights, and that there are the modules of what is a user's own."""
    given = dict(_given(command))
    for name in ("data", "task", *(() if "weights" in given else ("model",))):
        module, _, function = str(given.get(name, "")).partition(":")
        if function and module not in LIBRARIES and not _is_found(module.partition(".")[0]):
            raise ValueError(
                f"'{given[name]}' is no function that could be called without arguments: there is no module '{module}'"
            )
    model = given.get("model", "")
    own = ":" in model and model.partition(":")[0] not in LIBRARIES
    if not model or own or "weights" in given or (Path(model) / MANIFEST).is_file():
        return
    if not hasattr(command, "out"):
        raise ValueError(f"'{model}' holds no saved model; for a network by name, pass --weights too")
    ways = "a file, pretrained or published; a network of your own is package.module:function"
    raise ValueError(f"--weights: which weights of '{model}'? It begins with a trained network: {ways}")


def _is_found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:  # of __main__, which no specification is of
        return True


def _check_paths(command: Any) -> None:
    given = {} if getattr(command, "ELSEWHERE", False) else dict(_given(command))
    for name in ("weights", "sparse_weights"):
        if name in given and given[name] not in NAMED_WEIGHTS and not Path(given[name]).expanduser().exists():
            raise ValueError(f"{option(name)} {given[name]}: there is no such file, nor weights of that name")
    if "folder" in given and not given["folder"].exists():
        raise ValueError(f"'{given['folder']}' holds 0 runs: there is no such folder")
    if "root" in given and not Path(given["root"]).expanduser().exists():
        raise ValueError(f"--root {given['root']}: there is no such folder")
    out = given.get("out")
    if out is None:
        return
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file, not a folder")
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--out {out}: '{there}' is {'not writable' if there.is_dir() else 'a file, not a folder'}")
    found = entries(out) if getattr(command, "FRESH", False) else []
    if found and not {RESULTS, JOB} & {*found}:
        raise ValueError(f"--out '{out}' holds something else than a run ({found[0]}): choose another folder")
    goes_on = given.get("resume") or given.get("overwrite") or not getattr(command, "FRESH", False)
    if not goes_on and any((out / name).is_file() for name in (RESULTS, JOB)):
        way = "overwrite it (--overwrite)" if "overwrite" in given else "go on with it (--resume)"
        raise ValueError(f"--out {out} already holds a run: choose another folder, or {way}")


def option(name: str) -> str:
    """Return how a command spells the name of a value: an experiment is named without one."""
    return name if name in POSITIONAL else f"--{name.replace('_', '-')}"


def spelled(message: str, command: Any) -> str:
    """Return what the library says of its arguments as the command spells them: "--speedup 9", not "speedup=9"."""
    for name in (entry.name for entry in fields(command)):
        message = re.sub(rf"\b{name}=(?=[\w'\"\[(.-])", f"{option(name)} ", message)
        message = re.sub(rf"\b{name}=", option(name), message)
        message = message.replace(f"unknown {name} '", f"unknown {option(name)} '")
        message = re.sub(rf"; leave {name}$", f"; leave out {option(name)}", message)
    return message
