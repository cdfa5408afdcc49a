"""Integers that remember where they come from: attributes of modules, and the widths of tensors' dimensions.

While a model is traced, the whole numbers that its modules keep (``head_dim``, ``hidden_dim``) and the widths that
its forward reads from shapes are replaced by `Size`. Where one of them is then used to cut or reshape an axis of
channels, it is known which attribute has to follow pruning, which widths must stay equal, and which are constants.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn


@dataclass(frozen=True)
class Attribute:
    """A whole number that a module keeps; ``index`` is its place where the attribute is a list or tuple.

    ``rooted`` is called with a number made of it that becomes a fraction, such as a root.
    """

    module: str
    name: str
    index: int | None = None
    rooted: Callable[[int], None] = field(default=lambda size: None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.module}.{self.name}" + ("" if self.index is None else f"[{self.index}]")


@dataclass(frozen=True, eq=False)
class Dimension:
    """The width of a dimension of a tensor, by the labels of its positions.

    ``equal_to`` is called with what the width was compared with and found equal to, ``rooted`` with a number made of
    it that becomes a fraction, such as a root.
    """

    labels: np.ndarray
    equal_to: Callable[[int, np.ndarray], None] = lambda size, labels: None
    rooted: Callable[[int], None] = lambda size: None


@dataclass(frozen=True, eq=False)
class Combined:
    """An arithmetic expression of two numbers."""

    operation: Callable[[int, int], int]
    left: int
    right: int


class Size(int):
    """A whole number with its source; arithmetic on it keeps the sources."""

    source: Attribute | Dimension | Combined

    def __new__(cls, value: int, source: Attribute | Dimension | Combined) -> Size:
        size = super().__new__(cls, value)
        size.source = source
        return size

    def __eq__(self, other: object) -> bool:
        equal = int.__eq__(self, other)
        for size, value in ((self, other), (other, self)):
            if equal is True and isinstance(size, Size) and isinstance(size.source, Dimension):
                size.source.equal_to(value, size.source.labels)
        return equal

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__

    def __float__(self) -> float:
        for source in leaves(self):
            source.rooted(self)
        return float(int(self))

    def __pow__(self, power: Any) -> Any:
        return float(self) ** power if isinstance(power, float) else int(self) ** power

    def __reduce__(self) -> tuple:
        return int, (int(self),)


def _arithmetic(operation: Callable[[Any, Any], Any], swapped: bool) -> Callable[[Size, Any], Any]:
    def combine(self: Size, other: Any) -> Any:
        left, right = (other, self) if swapped else (self, other)
        if not isinstance(other, int):
            return operation(other, int(self)) if swapped else operation(int(self), other)
        return Size(operation(int(left), int(right)), Combined(operation, left, right))

    return combine


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    _operation = getattr(operator, _name)
    setattr(Size, f"__{_name}__", _arithmetic(_operation, swapped=False))
    setattr(Size, f"__r{_name}__", _arithmetic(_operation, swapped=True))


def leaves(value: int) -> Iterator[Attribute | Dimension]:
    """Iterate over the sources of a number; a constant has none."""
    if isinstance(value, Size):
        if isinstance(value.source, Combined):
            yield from leaves(value.source.left)
            yield from leaves(value.source.right)
        else:
            yield value.source


def evaluate(value: int, look_up: Callable[[int, Attribute | Dimension], int]) -> int:
    """Compute a number anew from what `look_up(value, source)` says that its sources are."""
    if not isinstance(value, Size):
        return value
    if not isinstance(value.source, Combined):
        return look_up(int(value), value.source)
    left, right = (evaluate(side, look_up) for side in (value.source.left, value.source.right))
    if right == 0 and value.source.operation in (operator.floordiv, operator.mod):
        return -1
    return value.source.operation(left, right)


def track_attributes(model: nn.Module, rooted: Callable[[int], None]) -> None:
    """Replace, in place, the whole numbers that modules keep by `Size` values that know their attribute."""
    for name, module in model.named_modules():
        plain_torch = type(module).__module__.startswith("torch.nn") and not isinstance(
            module, nn.LayerNorm | nn.RMSNorm
        )
        for key, value in vars(module).items():
            if key.startswith("_"):
                continue
            if type(value) is int:
                module.__dict__[key] = Size(value, Attribute(name, key, rooted=rooted))
            elif type(value) in (list, tuple) and not plain_torch and any(type(item) is int for item in value):
                items = enumerate(value)
                tracked = (Size(v, Attribute(name, key, i, rooted)) if type(v) is int else v for i, v in items)
                module.__dict__[key] = type(value)(tracked)
