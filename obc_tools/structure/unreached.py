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
from .layers import LayerAxis, get_layer

FOLDS = (1, 2, 3, 4, 6)
"""How many times a width may be read or made at once: concatenated, or cut into as many parts."""


@dataclass
class Levels:
    """What passes on the level of each module that was called: what its own forward function takes, makes, hands on."""

    flow: Flow
    passing: dict[str, dict[int, tuple[tuple[int, ...], Channels]]] = field(default_factory=lambda: defaultdict(dict))

    def note(self, values: Iterable[Any]) -> None:
        """Note the tensors among values on the level of the module that is running."""
        here = self.passing[self.flow.module]
        for tensor in (value for value in values if isinstance(value, Tensor)):
            entry = self.flow.tensors.get(tensor)
            if entry is not None and entry.labelled and entry.weight_of is None:
                here[id(entry)] = (tuple(map(operator.index, tensor.shape)), entry)

    def keep_for(self, unreached: Mapping[LayerAxis, np.ndarray]) -> None:
        """Let what could feed or meet layers that were not reached stay, given the labels of their axes."""
        by_level: dict[str, dict[LayerAxis, int]] = defaultdict(dict)
        for axis, labels in unreached.items():
            if labels.size > 1 and axis.axis in ("in", "out"):
                by_level[self._level_of(axis.layer)][axis] = labels.size
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


def may_run(model: nn.Module, layer: str) -> bool:
    """Say whether other inputs may reach a layer: any but a bare parameter that no function of its module names."""
    if isinstance(get_layer(model, layer), nn.Module):
        return True
    owner, _, name = layer.rpartition(".")
    kinds = type(model.get_submodule(owner)).__mro__
    codes = [getattr(f, "__code__", None) for kind in kinds for key, f in vars(kind).items() if key != "__init__"]
    return any(name in _names(code) for code in codes if code is not None)


def _names(code: CodeType) -> set[str]:
    """Return the attributes that a function names, functions within it included."""
    within = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return {*code.co_names}.union(*within)
