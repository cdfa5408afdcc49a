"""Errors that several parts of the library raise."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class UnknownNameError(ValueError):
    """A name that nothing known carries; says the closest known ones."""

    def __init__(self, what: str, name: str, known: Sequence[str]):
        close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
        hint = f"closest: {', '.join(close)}" if close else f"known: {', '.join(sorted(known)[:20])}"
        super().__init__(f"unknown {what} {name!r}; {hint}")


class PlanMismatchError(ValueError):
    """A plan that does not fit a model or another plan."""
