"""Curves of a comparison: one a criterion and repeat, kept on disk step by step."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .comparison import SETTINGS, TABLE, Comparison, ComparisonError
from .criteria import Criterion, resolve_criterion
from .files import write_text
from .plan import PruningPlan


@dataclass(frozen=True)
class Contender:
    """A criterion in a comparison, under the label that tables and figures show."""

    label: str
    criterion: Criterion

    @property
    def slug(self) -> str:
        """The label as a file name."""
        return "".join(c if c.isalnum() else "-" for c in self.label).strip("-")


@dataclass(frozen=True)
class Curve:
    """One criterion in one repeat so far: a row a finished step, and the plan of the last one."""

    contender: Contender
    repeat: int
    rows: tuple[Mapping[str, Any], ...]
    plan: PruningPlan
    at_chance: bool = False

    def to_json(self) -> str:
        """Return the curve as JSON text."""
        return json.dumps({"rows": self.rows, "at_chance": self.at_chance, "plan": json.loads(self.plan.to_json())})


def resolve_contenders(criteria: Iterable[Any] | Mapping[str, Any]) -> tuple[Contender, ...]:
    """Return the criteria under their labels; raise ValueError when there are none, or two with one label."""
    if isinstance(criteria, Mapping):
        found = tuple(Contender(str(label), resolve_criterion(given)) for label, given in criteria.items())
    else:
        found = tuple(Contender(_label(given), resolve_criterion(given)) for given in criteria)
    labels = [contender.slug for contender in found]
    if not found or len(set(labels)) < len(labels):
        names = ", ".join(contender.label for contender in found) or "none"
        raise ValueError(f"criteria need labels of their own, got {names}; pass a mapping from labels to criteria")
    return found


def _label(given: Any) -> str:
    name = resolve_criterion(given).name
    if not isinstance(given, tuple):
        return name
    return f"{name} ({', '.join(f'{key}={value}' for key, value in given[1].items())})"


def described(criterion: Criterion) -> dict[str, Any]:
    """Return a criterion's options as JSON holds them."""
    kept = ("name", "needs", "axes", "sampled_labels", "rows", "coupling", "split_bias", "batches")
    return {key: getattr(criterion, key) for key in kept}


@dataclass(frozen=True)
class CurveFolder:
    """A comparison's folder: its settings, a JSON file a curve, the table at the end; or none, which keeps nothing."""

    folder: Path | None

    @classmethod
    def open(cls, folder: str | Path | None, about: Mapping[str, Any]) -> CurveFolder:
        """Begin a folder, or go on with one; raise ComparisonError when it holds another comparison or other files."""
        store = cls(None if folder is None else Path(folder))
        if store.folder is None:
            return store
        path = store.folder / SETTINGS
        if not path.exists():
            if store.folder.exists() and (not store.folder.is_dir() or any(store.folder.iterdir())):
                raise ComparisonError(f"'{folder}' holds something else than a comparison: choose another folder")
            write_text(path, json.dumps(about, indent=1))
            return store
        before = json.loads(path.read_text(encoding="utf-8"))
        other = sorted(key for key in {*before, *about} - {"criteria"} if before.get(key) != about.get(key))
        known = before.get("criteria", {})
        other += [label for label, criterion in about["criteria"].items() if known.get(label, criterion) != criterion]
        if other:
            raise ComparisonError(
                f"'{folder}' holds a comparison with another {', '.join(other)}: choose another folder"
            )
        write_text(path, json.dumps(about | {"criteria": known | about["criteria"]}, indent=1))
        return store

    def read(self, contender: Contender, repeat: int, whole: PruningPlan) -> Curve:
        """Return a curve as far as it got; before the first step its plan is `whole`."""
        path = self._path(contender, repeat)
        if path is None or not path.exists():
            return Curve(contender, repeat, (), whole)
        data = json.loads(path.read_text(encoding="utf-8"))
        plan = PruningPlan.from_json(json.dumps(data["plan"]))
        return Curve(contender, repeat, tuple(data["rows"]), plan, data["at_chance"])

    def write(self, curve: Curve) -> None:
        """Keep a curve's finished steps."""
        if path := self._path(curve.contender, curve.repeat):
            write_text(path, curve.to_json())

    def finish(self, comparison: Comparison) -> Comparison:
        """Keep the whole table."""
        if self.folder is not None:
            comparison.to_csv(self.folder / TABLE)
        return comparison

    def _path(self, contender: Contender, repeat: int) -> Path | None:
        return self.folder and self.folder / f"curve_{contender.slug}_{repeat}.json"
