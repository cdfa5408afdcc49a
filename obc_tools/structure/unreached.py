"""Layers that the example inputs do not reach: experts that were not chosen, branches not taken, optional parts.

Nothing tells what feeds them. So what passes where their module was called, and could feed them or be joined by what
they make, judged by its width, stays whole: other inputs may reach them.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import numpy as np
from torch import Tensor, nn

from .flow import Channels, Flow
from .layers import LayerAxis

FOLDS = (1, 2, 3, 4, 6)
"""How many times a width may be read or made at once: concatenated, or cut into as many parts."""
ITERATING = {"children", "named_children", "modules", "named_modules", "_modules", "getattr"}
"""What reaches parts of a module without naming them."""


@dataclass
class Levels:
    """What passes on the level of each module that was called: what its own forward function takes, makes, hands on.

    ``borders`` are what the last call of a module took ("in") and made ("out").
    """

    flow: Flow
    passing: dict[str, dict[int, tuple[tuple[int, ...], Channels]]] = field(default_factory=lambda: defaultdict(dict))
    borders: dict[tuple[str, str], list[Channels]] = field(default_factory=dict)

    def cross(self, side: str, values: Iterable[Any]) -> None:
        """Note the tensors that go into ("in") or come out of ("out") the module that is running."""
        found = (self.flow.tensors.get(value) for value in values if isinstance(value, Tensor))
        self.borders[self.flow.module, side] = [entry for entry in found if entry is not None and entry.labelled]

    def note(self, values: Iterable[Any]) -> None:
        """Note the tensors among values on the level of the module that is running."""
        here = self.passing[self.flow.module]
        for tensor in (value for value in values if isinstance(value, Tensor)):
            entry = self.flow.tensors.get(tensor)
            if entry is not None and entry.labelled and entry.weight_of is None:
                here[id(entry)] = (tuple(map(operator.index, tensor.shape)), entry)

    def keep_for(self, unreached: Mapping[LayerAxis, np.ndarray], named: set[str]) -> None:
        """Let what could feed or meet layers that were not reached stay, given the labels of their axes.

        ``named``: what the model's functions name; parts that none of them does are left out.
        """
        by_level: dict[str, dict[LayerAxis, int]] = defaultdict(dict)
        for axis, labels in unreached.items():
            level = self._level_of(axis.layer)
            part = axis.layer.removeprefix(f"{level}.").partition(".")[0]
            if labels.size > 1 and axis.axis in ("in", "out") and (part in named or named & ITERATING):
                by_level[level][axis] = labels.size
        for level, widths in by_level.items():
            made = {width * fold for axis, width in widths.items() for fold in FOLDS if axis.axis == "out"}
            for axis, width in widths.items():
                for labels in self._fitting(level, width, sure=axis.axis == "in" and width not in made):
                    self.flow.freeze(labels, f"may meet layer {axis.layer!r}, which the example inputs do not reach")

    def _level_of(self, layer: str) -> str:
        """Return the closest module around a layer that was called."""
        while layer:
            layer = layer.rpartition(".")[0]
            if layer in self.passing:
                return layer
        return ""

    def _fitting(self, level: str, width: int, *, sure: bool) -> list[np.ndarray]:
        """Return the labels that pass on a level and that an axis of a width could run along, flattened perhaps.

        Where there must be ``sure`` to be some and none seem to fit, those that could with other sizes of the input,
        or else all.
        """
        passing = [
            (labels, size, math.prod(shape[1:]))
            for shape, entry in self.passing[level].values()
            for size, labels in zip(shape, entry.dims, strict=True)
            if labels is not None and size > 1
        ]
        found = [labels for labels, size, flat in passing if width == flat or width in [size * fold for fold in FOLDS]]
        if sure:
            found = found or [labels for labels, size, _ in passing if width % size == 0]
            found = found or [labels for labels, _, _ in passing]
        return found


def named_in(model: nn.Module) -> set[str]:
    """Return the names that the functions of a model's modules use, but for their constructors and torch's own modules.

    A part that none of them names does not run, whatever the input.
    """
    return set().union(*(_named_by(kind) for kind in {type(module) for module in model.modules()}))


def _named_by(kind: type) -> set[str]:
    """Return the names that the functions of a class use: those of its ancestors that it does not replace, too."""
    own = [one for one in kind.__mro__ if one is not object and not one.__module__.startswith("torch.nn")]
    found = {name: f for one in reversed(own) for name, f in vars(one).items() if name != "__init__"}
    named = set().union(*map(names_in, found.values()))
    return named if "super" not in named else named.union(*(names_in(f) for one in own for f in vars(one).values()))


def names_in(function: Any) -> set[str]:
    """Return the names that a function uses, functions within it included; none of what is no function."""
    code = getattr(function, "__code__", function)
    if not isinstance(code, CodeType):
        return set()
    return {*code.co_names}.union(*map(names_in, code.co_consts))
