"""What the traced passes tell nothing of: layers that they do not reach, and attributes that they do not read.

*Layers*: experts that were not chosen, branches not taken, optional parts. Nothing tells what feeds them. So
what passes where their module was called, and could feed them or be joined by what they make, judged by its width,
stays whole: other inputs may reach them.

*Widths that modules keep as attributes*: `num_features`, `in_chs`, `feature_info`. Other methods read them, to build a
new head or to fuse branches. By their names and values they follow what passes where their module is called. A wrong
guess cannot change an output: only what the traced passes did not read, and the module's forward function with the
methods that it calls does not name, follows.
"""

from __future__ import annotations

import dis
import functools
import inspect
import math
import operator
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

import numpy as np
from torch import Tensor, nn

from .flow import Attribute, Channels, Flow
from .layers import LayerAxis, is_known, layer_axes
from .plain_numbers import is_foreign

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


def named_in(model: nn.Module, run: Any = None) -> set[str]:
    """Return the names that the functions of a model's modules use, but for their constructors and torch's own modules.

    So do functions that its modules keep, hooks, ``run``, and those that any of them finds among its globals. A part
    that none of them names does not run, whatever the input.
    """
    kinds = {type(module) for module in model.modules()}
    held = [run, *(function for kind in kinds for function in _forward_functions(kind))]
    for module in model.modules():
        held += [*vars(module).values(), *module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return set().union(*map(_named_by, kinds), *map(names_in, _reached_from(held)))


def _reached_from(held: Iterable[Any]) -> set[FunctionType]:
    """Return the functions among some values, and those of the user that they close over or find as globals."""
    waiting, reached = list(held), set()
    while waiting:
        value = waiting.pop()
        function = inspect.unwrap(value) if isinstance(value, FunctionType) else None
        if isinstance(function, FunctionType) and function not in reached and not is_foreign(function.__module__ or ""):
            reached.add(function)
            for cell in function.__closure__ or ():
                with suppress(ValueError):  # it is empty yet
                    waiting.append(cell.cell_contents)
            waiting += [function.__globals__.get(name) for name in names_in(function)]
    return reached


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


_WIDTH = "_?(chs|channels|features|planes|dims?|size)"
TAKEN = re.compile(rf"(in|input){_WIDTH}|dim_in")
MADE = re.compile(rf"(out|output){_WIDTH}|dim_out")
PASSING = re.compile(r"num_(features|channels)|(head_)?hidden_(size|dim)|embed_dim|d_model|dim|channels|width|planes")
GROUPS, FEATURES = "groups", "feature_info"


class _Watched(dict):
    """A module's buffers that also give its hidden attributes, and note each that is read."""

    def __init__(self, buffers: Mapping[str, Any], hidden: Mapping[str, Any]):
        super().__init__(buffers)
        self.hidden, self.read = hidden, set()

    def __contains__(self, key: object) -> bool:
        return key in self.hidden or super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        if key not in self.hidden:
            return super().__getitem__(key)
        self.read.add(key)
        return self.hidden[key]


@dataclass
class Unread:
    """The attributes of a copied model that may be widths, watched while it runs."""

    model: nn.Module
    watched: dict[str, _Watched] = field(default_factory=dict)

    def watch(self) -> None:
        """Move, in place, the attributes to where torch looks last, so that each reading is noticed."""
        for name, module in self.model.named_modules():
            plain = not is_known(module) and type(module).__getattr__ is nn.Module.__getattr__
            own = {key: held for key, held in vars(module).items() if plain and _is_width(key, held)}
            named = named_forward(type(module)) if own else frozenset()
            if not named.isdisjoint(("__dict__", "vars")):
                continue
            fixed = {key for key, held in own.items() if isinstance(held, float) and key not in stored(type(module))}
            hidden = {key: own[key] for key in own if key in fixed or key not in named}
            hidden = {key: held for key, held in hidden.items() if not hasattr(type(module), key)}
            if hidden:
                for key in hidden:
                    del module.__dict__[key]
                self.watched[name] = module.__dict__["_buffers"] = _Watched(module._buffers, hidden)

    def attributes(self, levels: Levels) -> Iterator[tuple[Attribute, np.ndarray]]:
        """Yield the attributes that were not read, with the labels of the width that each of them holds."""
        for name, watched in self.watched.items():
            widths = (key for key, held in watched.hidden.items() if not isinstance(held, float))
            for key in (key for key in widths if key not in watched.read):
                for path, labels in self._labels_of(name, key, watched.hidden[key], levels):
                    if labels is not None:
                        yield Attribute(name, path), labels

    def _labels_of(self, name: str, key: str, held: Any, levels: Levels) -> Iterator[tuple[str, np.ndarray | None]]:
        """Yield each place of an attribute that holds a width, and the labels that it follows."""
        taken, made = (levels.borders.get((name, side), ()) for side in ("in", "out"))
        if key == FEATURES:
            for index, entry in enumerate(held):
                module = ".".join(filter(None, (name, str(entry.get("module")))))
                feature = levels.borders.get((module, "out"), ())
                yield f"{key}.{index}.num_chs", _first(feature, entry.get("num_chs"))
        elif key == GROUPS and any(self._convolutions(name)):
            yield key, self._depthwise(name, held, levels.flow.grouped)
        elif key == GROUPS or TAKEN.fullmatch(key):
            yield key, _first(taken, held)
        elif MADE.fullmatch(key):
            yield key, _first(made, held)
        else:
            within = [entry for _, entry in reversed(levels.passing[name].values())]
            results = {id(entry) for entry in made}
            yield key, _first([*(entry for entry in within if id(entry) not in results), *made], held)

    def _depthwise(self, name: str, groups: int, labels: Mapping[str, Mapping[str, np.ndarray]]) -> np.ndarray | None:
        """Return the labels of the first depthwise convolution within a module that has as many groups."""
        for inner, layer in self._convolutions(name):
            for key, axis in layer_axes(layer, inner).items() if inner in labels else ():
                if GROUPS in axis.attributes and axis.width == groups:
                    return labels[inner][key]
        return None

    def _convolutions(self, name: str) -> Iterator[tuple[str, nn.Module]]:
        for inner, layer in self.model.get_submodule(name).named_modules(prefix=name):
            if is_known(layer) and hasattr(layer, GROUPS):
                yield inner, layer


def _is_width(key: str, held: Any) -> bool:
    """Say whether an attribute may be a width, or the scale of an attention that follows one."""
    if isinstance(held, float):
        return 0 < held < 1 and math.isclose(round(held**-2) ** -0.5, held)
    if key == FEATURES:
        return isinstance(held, list) and all(isinstance(entry, dict) for entry in held)
    named = key == GROUPS or any(pattern.fullmatch(key) for pattern in (TAKEN, MADE, PASSING))
    return named and isinstance(held, int) and operator.index(held) > 1


def _first(passing: Iterable[Channels], width: int) -> np.ndarray | None:
    """Return the labels of the first dimension that is as wide."""
    found = (labels for entry in passing for labels in entry.dims if labels is not None and labels.size == width)
    return next(found, None)


@functools.cache
def named_forward(kind: type) -> frozenset[str]:
    """Return what the forward function of a module's type names, and what the methods name that it may call."""
    return frozenset().union(*map(names_in, forward_codes(kind)))


@functools.cache
def stored(kind: type) -> frozenset[str]:
    """Return the attributes that the forward function of a module's type sets, or the methods that it may call."""
    steps = (step for function in _forward_functions(kind) for step in dis.get_instructions(function))
    return frozenset(step.argval for step in steps if step.opname == "STORE_ATTR")


def forward_codes(kind: type) -> list[CodeType]:
    """Return the code of the forward function of a module's type, and of the methods that it may call."""
    return [function.__code__ for function in _forward_functions(kind)]


def _forward_functions(kind: type) -> list[FunctionType]:
    waiting, named, functions = ["forward"], set(), []
    while waiting:
        name = waiting.pop()
        for function in (vars(base).get(name) for base in kind.__mro__ if base is not nn.Module):
            function = inspect.unwrap(getattr(function, "fget", function))
            fresh = names_in(function) - named if isinstance(function, FunctionType) else set()
            functions += [function] if isinstance(function, FunctionType) else []
            named |= fresh
            waiting += fresh
    return functions
