"""From labels to coupled channels: which positions of which axes go together, and which never go.

Labels that were joined, directly or through others, are one *class*: removing a channel means removing every position
of its class. A *bundle* gathers the classes that occur on the same axes.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from .flow import SUMMED, Flow, Labels, evaluate, leaves
from .layers import TEMPERATURE, LayerAxis
from .tracing import Traced

NONE = np.zeros(0, dtype=np.int64)
MISFIT = "a width that the model computes would not follow it"


@dataclass(frozen=True, eq=False)
class Place:
    """Where a bundle's channels lie on one axis: position ``positions[i]`` holds channel ``channels[i]``."""

    axis: LayerAxis
    positions: np.ndarray
    channels: np.ndarray
    width: int


@dataclass(frozen=True, eq=False)
class Bundle:
    """Classes that occur on the same axes, numbered as channels, in ``blocks`` runs that lose the same positions."""

    width: int
    blocks: int
    places: Sequence[Place]
    attributes: Sequence[Place]
    reason: str | None
    attends: bool
    least: int = 1


class LostChannelsError(ValueError):
    """Channels that entered an operation and neither left it nor were summed over or frozen: an error of the trace."""


class Classes:
    """The classes of a trace: ``of(labels)`` numbers them, ``reasons`` says why some never go.

    What an operation lost is frozen; in a ``strict`` trace it raises LostChannelsError.
    """

    def __init__(self, flow: Flow, strict: bool = False):
        self.flow = flow
        self.count, self.of_label = flow.components()
        self.reasons: dict[int, str] = {}
        for labels, reason in flow.frozen:
            for number in np.unique(self.of_label[labels]).tolist():
                self.reasons.setdefault(number, reason)
        for taken, met in flow.returned:
            self._check_returned(taken, met)
        for size, labels in flow.sizes:
            self._check(size, labels)
        for labels, rows in flow.temperatures:
            self._check_temperature(labels, rows)
        self._check_passages(strict)

    def of(self, labels: np.ndarray) -> np.ndarray:
        """Return the class of each label."""
        return self.of_label[labels]

    def _check_returned(self, taken: np.ndarray, met: Sequence[np.ndarray]) -> None:
        """Freeze the channels over which a number was taken that normalises other ones."""
        classes = np.unique(self.of(taken))
        if not any(np.array_equal(classes, np.unique(self.of(labels))) for labels in met):
            for number in classes.tolist():
                self.reasons.setdefault(number, SUMMED)

    def _check(self, size: int, labels: Labels) -> None:
        """Freeze the classes without one of which a computed width would not be that of the axis that it shapes."""
        carried = {id(source): self.flow.labels_of(source) for source in leaves(size)}
        shares = [NONE if found is None else self.of(found) for found in (labels, *carried.values())]
        classes = np.unique(np.concatenate(shares))
        counts = [np.bincount(np.searchsorted(classes, share), minlength=classes.size) for share in shares]
        patterns, which = np.unique(np.stack(counts, axis=1), axis=0, return_inverse=True)
        for number, (own, *others) in enumerate(patterns.tolist()):
            left = dict(zip(carried, others, strict=True))
            value = evaluate(size, lambda value, source, left=left: value - left[id(source)])
            if value != operator.index(size) - own:
                for misfit in classes[which.ravel() == number].tolist():
                    self.reasons.setdefault(misfit, MISFIT)

    def _check_temperature(self, labels: np.ndarray, rows: np.ndarray) -> None:
        """Freeze the channels of an attention unless each has equally many of the weights that make the queries."""
        heads, counts = np.unique(self.of(rows), return_counts=True)
        if not np.array_equal(heads, np.unique(self.of(labels))) or (counts != counts[0]).any():
            for number in np.unique(self.of(labels)).tolist():
                self.reasons.setdefault(number, "is a head of an attention whose queries are not its own")

    def _check_passages(self, strict: bool) -> None:
        """Freeze the classes that ended in an operation which gives no account of them."""
        there = np.full(self.count, -1)
        free = np.ones(self.count, dtype=bool)
        free[list(self.reasons)] = False
        for number, passage in enumerate(self.flow.passages):
            for labels in passage.left:
                there[self.of(labels)] = number
            entered = np.concatenate([self.of(labels).ravel() for labels in passage.entered])
            lost = np.unique(entered[(there[entered] != number) & free[entered]])
            if lost.size and strict:
                raise LostChannelsError(f"{passage.operation}: {lost.size} channels are lost in it")
            free[lost] = False
            self.reasons |= dict.fromkeys(lost.tolist(), f"is lost in {passage.operation}")


@dataclass(frozen=True, eq=False)
class _Occurrences:
    """The positions of classes on one axis, sorted by class and position."""

    axis: LayerAxis
    width: int
    classes: np.ndarray
    positions: np.ndarray

    @classmethod
    def on(cls, axis: LayerAxis, classes: np.ndarray) -> _Occurrences:
        order = np.argsort(classes, kind="stable")
        return cls(axis, classes.size, classes[order], order)

    @cached_property
    def unique(self) -> np.ndarray:
        """The classes, each once."""
        return self.classes[np.flatnonzero(np.diff(self.classes, prepend=-2))]

    def of(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions of some classes and, for each, the place of its class in `numbers` (sorted)."""
        found = np.searchsorted(numbers, self.classes)
        inside = (found < numbers.size) & (numbers[np.minimum(found, numbers.size - 1)] == self.classes)
        return self.positions[inside], found[inside]


def bundles(
    traced: Traced, classes: Classes, ignored: Mapping[str, str], is_producer: Callable[[LayerAxis], bool]
) -> Iterator[Bundle]:
    """Yield the bundles of coupled channels of a trace; ``ignored`` maps a layer to why its outputs stay."""
    reasons = dict(classes.reasons)
    for axis, labels in traced.axes.items():
        if axis.axis != "in" and axis.layer in ignored:
            reasons = dict.fromkeys(classes.of(labels).tolist(), ignored[axis.layer]) | reasons
    axes = [_Occurrences.on(axis, classes.of(labels)) for axis, labels in traced.axes.items()]
    near = [_Occurrences.on(axis, classes.of(labels)) for axis, labels in _attribute_axes(traced)]
    for axis, labels in _temperature_axes(traced):
        near.append(_Occurrences.on(axis, np.where(labels < 0, -1, classes.of(labels))))
    attended = np.zeros(classes.count, dtype=bool)
    for part in traced.flow.attended:
        attended[classes.of(part.ravel())] = True
    pairs = np.zeros(classes.count, dtype=bool)
    for part in traced.flow.pairs:
        pairs[classes.of(part)] = True
    parts = _alike(axes, classes.count)
    members, attributes = (_by_part(found, parts) for found in (axes, near))
    for part, numbers in _numbers_of(parts).items():
        if any(is_producer(axis.axis) for axis in members[part]):
            reason = next((reasons[n] for n in numbers.tolist() if n in reasons), None)
            bundle = _bundle(members[part], numbers, attributes[part], reason, bool(attended[numbers].any()))
            yield replace(bundle, least=2 if pairs[numbers].any() else 1)


def _alike(axes: Sequence[_Occurrences], count: int) -> np.ndarray:
    """Part the classes: those that occur on the same axes have the same number, those on none 0; shape (count,)."""
    parts, next_part = np.zeros(count, dtype=np.int64), 1
    for axis in axes:
        here, finer = np.unique(parts[axis.unique], return_inverse=True)
        parts[axis.unique] = next_part + finer
        next_part += here.size
    return parts


def _numbers_of(parts: np.ndarray) -> dict[int, np.ndarray]:
    """Return the classes of each part but 0, ascending."""
    order = np.argsort(parts, kind="stable")
    found, first = np.unique(parts[order], return_index=True)
    split = zip(found.tolist(), np.split(order, first[1:]), strict=True)
    return {part: numbers for part, numbers in split if part}


def _by_part(axes: Iterable[_Occurrences], parts: np.ndarray) -> Mapping[int, list[_Occurrences]]:
    """Return the axes on which classes of each part occur."""
    found: dict[int, list[_Occurrences]] = defaultdict(list)
    for axis in axes:
        for part in np.unique(parts[axis.unique[axis.unique >= 0]]).tolist():
            found[part].append(axis)
    return found


def _attribute_axes(traced: Traced) -> Iterator[tuple[LayerAxis, np.ndarray]]:
    """Name the attributes that follow: ".head_dim", ".sizes.0", ".config.num_heads", ".scale^-0.5" of a power."""
    for attribute, labels in traced.flow.attributes.items():
        index = "" if attribute.index is None else f".{attribute.index}"
        yield LayerAxis(attribute.module, f".{attribute.name}{index}"), labels
    for (module, name), labels in traced.flow.scales.items():
        yield LayerAxis(module, f".{name}^-0.5"), labels


def _temperature_axes(traced: Traced) -> Iterator[tuple[LayerAxis, np.ndarray]]:
    """Name the outputs of layers that make queries whose temperature stays; −1 stands for outputs that make none."""
    queries = np.zeros(traced.flow.count, dtype=bool)
    for _, rows in traced.flow.temperatures:
        queries[rows] = True
    for axis, labels in traced.axes.items():
        found = queries[labels]
        if axis.axis == "out" and found.any():
            yield LayerAxis(axis.layer, TEMPERATURE), np.where(found, labels, -1)


def _bundle(
    axes: Sequence[_Occurrences],
    numbers: np.ndarray,
    attributes: Sequence[_Occurrences],
    reason: str | None,
    attends: bool,
) -> Bundle:
    """Number the classes as channels, in the order in which they come on the first axis."""
    positions, which = axes[0].of(numbers)
    first = np.full(numbers.size, np.iinfo(np.int64).max)
    np.minimum.at(first, which, positions)
    rank = np.argsort(np.argsort(first, kind="stable"), kind="stable")
    counts = [np.unique(np.bincount(axis.of(numbers)[1], minlength=numbers.size)) for axis in axes]
    blocks = math.gcd(*(int(count) for found in counts for count in found))

    def places(found: Sequence[_Occurrences]) -> list[Place]:
        return [_place(axis, numbers, rank, blocks) for axis in found]

    return Bundle(numbers.size * blocks, blocks, places(axes), places(attributes), reason, attends)


def _place(axis: _Occurrences, numbers: np.ndarray, rank: np.ndarray, blocks: int) -> Place:
    """Number the channels: the j-th of a unit's m positions belongs to block ⌊j · blocks / m⌋."""
    positions, which = axis.of(numbers)
    units = rank[which]
    order = np.lexsort((positions, units))
    positions, units = positions[order], units[order]
    counts = np.bincount(units, minlength=numbers.size)
    turn = np.arange(units.size) - (np.cumsum(counts) - counts)[units]
    channels = (turn * blocks // counts[units]) * numbers.size + units
    back = np.argsort(positions, kind="stable")
    return Place(axis.axis, positions[back], channels[back], axis.width)
