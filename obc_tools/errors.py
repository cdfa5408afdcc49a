"""Errors that several parts of the library raise, and the checks of single values that raise them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any


class UnknownNameError(ValueError):
    """A name that nothing known carries; says the closest known ones."""

    def __init__(self, what: str, name: str, known: Sequence[str]):
        close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
        names = f"known: {', '.join(sorted(known)[:20])}" if any(known) else "there is none that has a name"
        hint = f"closest: {', '.join(close)}" if close else names
        super().__init__(f"unknown {what} {name!r}; {hint}")


class PlanMismatchError(ValueError):
    """A plan that does not fit a model or another plan."""


class NoDataError(TypeError, ValueError):
    """What holds no examples, where data is wanted; a ValueError too, as all that the library raises."""


def check_whole(name: str, value: Any, least: int, what: str = "") -> None:
    """Raise ValueError unless a value is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}={value}: expected at least {least}{what} (a whole number)")


def check_number(name: str, value: Any, expected: str, fits: Callable[[Any], bool]) -> None:
    """Raise ValueError, saying what is expected, unless a value is a number that fits."""
    if isinstance(value, bool) or not isinstance(value, Real) or not fits(value):
        raise ValueError(f"{name}={value}: expected {expected}")


def check_name(name: str, value: Any, known: Iterable[str | None]) -> None:
    """Raise UnknownNameError unless a value is among those that are known."""
    known = tuple(known)
    if value not in known:
        raise UnknownNameError(name, str(value), list(map(str, known)))
