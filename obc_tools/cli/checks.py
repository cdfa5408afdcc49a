"""What can be wrong with a command's options, found before anything is loaded, in the command's own spelling."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import UnknownNameError

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
    "experiment": (
        "vgg19-cifar100", "resnet56-cifar10", "resnet50-imagenet", "mobilenetv2-imagenet", "vit-b16-imagenet"
    ),
}  # fmt: skip
"""Names that options take, as the library has them: its own tables come with torch, which takes seconds to load."""
NAMED_WEIGHTS = ("pretrained", "published", "published-sparse", "scratch")
AT_LEAST_ONE = (
    "batches", "batch_size", "steps", "repeats", "held_out", "train_images", "val_images", "num_classes", "round_to",
    "min_channels", "processes", "each", "nodes", "gpus", "cpus",
)  # fmt: skip
LEAST = {"epochs": 0, "sparse_epochs": 0, "training": 0} | dict.fromkeys(AT_LEAST_ONE, 1)
POSITIONAL = ("experiment",)
TARGETS = ("speedup", "macs", "params", "ratio")
RESULTS, JOB = "results.json", "job.json"


def check(command: Any) -> None:
    """Raise ValueError for an option that cannot be meant, without loading anything."""
    for name, value in _given(command):
        for entry in value if isinstance(value, tuple) else (value,):
            if name in KNOWN and ":" not in str(entry) and str(entry).lower() not in (*KNOWN[name], *ALIASES):
                raise UnknownNameError(option(name), str(entry), KNOWN[name])
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
    _check_targets(command)
    _check_paths(command)


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


def _check_paths(command: Any) -> None:
    given = {} if getattr(command, "ELSEWHERE", False) else dict(_given(command))
    for name in ("weights", "sparse_weights"):
        if name in given and given[name] not in NAMED_WEIGHTS and not Path(given[name]).expanduser().exists():
            raise ValueError(f"{option(name)} {given[name]}: there is no such file, nor weights of that name")
    if "root" in given and not Path(given["root"]).expanduser().exists():
        raise ValueError(f"--root {given['root']}: there is no such folder")
    out = given.get("out")
    if out is None:
        return
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file, not a folder")
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
    return message
