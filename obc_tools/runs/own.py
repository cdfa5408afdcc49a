"""A user's own model, data or task, named "package.module:function": imported because they named it, and called."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

from torch import nn

from ..data.adapters import as_data
from ..data.data import Data, load_data
from ..models.networks import load_model
from ..scoring.tasks import Task, find_task

LIBRARIES = ("torchvision", "timm", "transformers", "ultralytics")
REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_own(name: str) -> bool:
    """Say whether a name is "package.module:function", not that of a library's network."""
    return bool(REFERENCE.fullmatch(name)) and name.partition(":")[0] not in LIBRARIES


def called(name: str) -> Any:
    """Return what the function of a name returns; raise ValueError, with the name, where there is none."""
    module, _, function = name.partition(":")
    try:
        return getattr(import_module(module), function)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"'{name}' is no function that could be called without arguments: {error}") from error


def find_model(name: str, num_classes: int | None, weights: str | None, **options: Any) -> nn.Module:
    """Return a network by name, as `load_model` does, or what a user's own function returns."""
    if not is_own(name):
        return load_model(name, num_classes, weights, **options)
    model = called(name)
    if not isinstance(model, nn.Module):
        raise ValueError(f"'{name}' returned {type(model).__name__}; expected a network (nn.Module)")
    return model


def find_data(name: str, root: str | None = None, normalize: str | None = None) -> Data:
    """Return data by name, as `load_data` does, or what a user's own function returns: `Data`, or (train, val)."""
    if not is_own(name):
        return load_data(name, root, normalize=normalize)
    found = called(name)
    if isinstance(found, Data):
        return found
    if not isinstance(found, tuple) or len(found) != 2:
        raise ValueError(f"'{name}' returned {type(found).__name__}; expected Data or a pair (train, val)")
    return as_data(*found, name=name)


def own_task(name: str) -> Task:
    """Return a ready task by name, or what a user's own function returns."""
    if not is_own(name):
        return find_task(name)
    task = called(name)
    if not isinstance(task, Task):
        raise ValueError(f"'{name}' returned {type(task).__name__}; expected a Task")
    return task
