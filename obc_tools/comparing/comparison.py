"""The outcome of comparing criteria: a table with a row a step, its summary, and both on disk."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from ..files import entries, read_json, write_json, write_text
from ..pruning.choices import TORCH_PRUNING
from ..pruning.plan import PruningPlan
from ..scoring.criteria import Criterion, resolve_criterion

SETTINGS, TABLE = "comparison.json", "comparison.csv"
KEYS = ["criterion", "repeat", "step"]
SHARES = {"channels": "pruned_channels", "macs": "macs", "params": "params"}
CLASSIFICATION = {"accuracy": "higher", "top5": "higher", "loss": "lower"}
"""Metrics and their directions, where settings name none."""


class ComparisonError(ValueError):
    """A comparison that cannot be read, summarised or gone on with."""


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """What `compare_criteria` found.

    Attributes:
        frame: one row a criterion, repeat and step (0: unpruned), sorted so. Columns: ``pruned_channels`` of
            ``channels`` prunable ones; ``macs`` of one example and ``params``; ``accuracy``, ``top5`` (shares in
            [0, 1], top-5 where there are more classes), ``loss`` (nats) on held-out images, or the metrics of another
            task; the same with ``train_`` on training images; ``seconds`` for scoring, data included; ``images``
            scored with; ``at_chance``: the curve was ended here, since the network only guesses.
        settings: what was asked for.
        environment: hardware, versions and date.
    """

    frame: pd.DataFrame
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]

    @property
    def criteria(self) -> tuple[str, ...]:
        """The labels, in the order in which they were asked for."""
        return tuple(self.frame["criterion"].unique())

    @property
    def directions(self) -> dict[str, str]:
        """Metric -> "higher" or "lower", whichever is better: first those on held-out images."""
        return metric_directions(self.settings)

    def left(self, over: str = "params") -> pd.Series:
        """Return the share that is left at each row, of "channels", "macs" or "params"; of "latency" where timed."""
        if over == "latency" and "latency_left" in self.frame:
            return self.frame["latency_left"]
        if over not in SHARES:
            raise ComparisonError(f"unknown axis '{over}'; known are {', '.join(SHARES)}")
        if over == "channels":
            return 1 - self.frame["pruned_channels"] / self.frame["channels"]
        first = self.frame["step"] == 0
        return self.frame[over] / self.frame.loc[first, over].iloc[0]

    def values_of(self, metric: str) -> pd.Series:
        """Return a metric at each row; raise ComparisonError for one that was not measured."""
        if metric not in self.measured():
            raise ComparisonError(f"'{metric}' was not measured; there are {', '.join(self.measured())}")
        return self.frame[metric]

    def areas(self, metric: str | None = None, over: str = "params") -> pd.DataFrame:
        """Return the area under a metric over the share that is left, one row a criterion and repeat.

        ∫ metric d(share left), by trapezoids, from all curves' end to 1. A curve that was ended at chance counts at its
        last value from there on; the others end at the largest share at which any of them ends. Curves that still
        run are left out.

        Raises:
            ComparisonError: an unknown axis, a metric that was not measured.
        """
        metric = metric or self.headline
        self.values_of(metric)
        frame = self.frame.assign(left=self.left(over))
        curves = frame.groupby(KEYS[:2], sort=False)
        steps = int(self.settings["steps"])
        whole = {key: curve for key, curve in curves if curve["step"].max() == steps}
        ended = {key: curve for key, curve in curves if curve["at_chance"].any()}
        low = max((curve["left"].min() for key, curve in whole.items() if key not in ended), default=0.0)
        done = [(key, curve) for key, curve in curves if key in whole or key in ended]
        rows = [(*key, _area(curve["left"].to_numpy(), curve[metric].to_numpy(), low)) for key, curve in done]
        return pd.DataFrame(rows, columns=[*KEYS[:2], "area"])

    def measured(self) -> list[str]:
        """Return the metrics that were measured."""
        return [name for name in self.directions if not self.frame[name].isna().all()]

    @property
    def headline(self) -> str:
        """The metric that stands for all: on training images, as in the paper's figures, or without them held-out."""
        first = next(iter(self.directions))
        return f"train_{first}" if f"train_{first}" in self.measured() else first

    def summary(self, metric: str | None = None, over: str = "params") -> pd.DataFrame:
        """Return one row a criterion, best first: area under the curve and seconds of scoring a step, mean and std.

        ``metric``: by default the headline.
        """
        metric = metric or self.headline
        areas = self.areas(metric, over).groupby("criterion", sort=False)["area"].agg(["mean", "std", "count"])
        seconds = self.frame[self.frame["step"] > 0].groupby("criterion", sort=False)["seconds"].median()
        table = areas.rename(columns={"mean": f"area ({metric} over {over} left)", "count": "repeats"})
        table["seconds a step (median)"] = seconds
        lowest_first = self.directions[metric] == "lower"
        return table.sort_values(table.columns[0], ascending=lowest_first).reset_index()

    def to_frame(self) -> pd.DataFrame:
        """Return the table, one row a criterion, repeat and step."""
        return self.frame

    def plot(self, metric: str | None = None, over: str = "params", *, look: str = "light"):
        """Draw mean and standard deviation of a metric against what was pruned; of all of them by default."""
        from ..plots.curves import criteria_curves, criteria_panels

        return criteria_panels(self, look=look) if metric is None else criteria_curves(self, metric, over, look=look)

    def plot_seconds(self, *, look: str = "light"):
        """Draw the seconds of scoring a step, a bar a criterion."""
        from ..plots.curves import scoring_seconds

        return scoring_seconds(self, look=look)

    def to_csv(self, path: str | Path) -> Path:
        """Write everything into one CSV file, settings and environment as JSON in its first line after "# "."""
        text = io.StringIO()
        text.write(f"# {json.dumps({'settings': self.settings, 'environment': self.environment}, allow_nan=False)}\n")
        self.frame.to_csv(text, index=False, float_format="%.7g", lineterminator="\n")
        write_text(Path(path), text.getvalue())
        return Path(path)

    def __repr__(self) -> str:
        return f"Comparison of {len(self.criteria)} criteria\n{self.summary().to_string(index=False, **_FORMAT)}"

    def _repr_html_(self) -> str:
        title = f"<b>Comparison of {len(self.criteria)} criteria</b>"
        return title + self.summary().to_html(index=False, **_FORMAT)


_FORMAT = {"float_format": "{:.3f}".format, "na_rep": ""}


def read_comparison(path: str | Path) -> Comparison:
    """Read what `Comparison.to_csv` wrote, or what is finished so far in the folder of a comparison that runs.

    Raises:
        ComparisonError: the file or folder is not there or holds no comparison.
    """
    if Path(path).is_dir():
        return _read_unfinished(Path(path))
    try:
        first, _, rest = Path(path).read_text(encoding="utf-8").partition("\n")
        about = json.loads(first.removeprefix("# "))
        frame = pd.read_csv(io.StringIO(rest))
        missing = sorted({*KEYS, *metric_directions(about["settings"]), "at_chance"} - set(frame.columns))
        if missing:
            raise ComparisonError(f"columns {', '.join(missing)} are missing")
        return Comparison(frame, about["settings"], about["environment"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ComparisonError(f"'{path}' holds no comparison: {error}") from error


def read_settings(folder: str | Path) -> dict[str, Any]:
    """Return the settings of the comparison in a folder, {} without one, with what held before they were all said."""
    path = Path(folder) / SETTINGS
    if not path.exists():
        return {}
    if not isinstance(settings := read_json(path), dict):
        raise ComparisonError(f"'{path}' holds no settings of a comparison")
    return {"counting": TORCH_PRUNING, "compensate": False} | settings


def metric_directions(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the metrics of a comparison and their directions, on held-out images and on training images."""
    held_out = settings.get("metrics", CLASSIFICATION)
    return held_out | {f"train_{name}": direction for name, direction in held_out.items()}


def _read_unfinished(folder: Path) -> Comparison:
    """Read the curves in a folder, in the order in which their criteria were asked for."""
    try:
        settings = read_settings(folder)
        if not settings:
            raise ComparisonError(f"there is no {SETTINGS}")
        curves = [read_json(path) for path in sorted(folder.glob("curve_*.json"))]
        order = list(settings["criteria"])
        rows = [row for curve in curves for row in marked(curve["rows"], curve["at_chance"])]
        rows.sort(key=lambda row: order.index(row["criterion"]))
        return Comparison(as_frame(rows, settings), settings, {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ComparisonError(f"'{folder}' holds no comparison: {error}") from error


def marked(rows: Sequence[Mapping[str, Any]], at_chance: bool) -> list[dict[str, Any]]:
    """Return the rows of a curve with the column that says where it was ended at chance."""
    return [{**row, "at_chance": at_chance and row is rows[-1]} for row in rows]


def as_frame(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> pd.DataFrame:
    """Return the table of rows; what was not measured is NaN."""
    return pd.DataFrame(rows).astype(dict.fromkeys((*metric_directions(settings), "macs", "seconds"), float))


def _area(left: np.ndarray, metric: np.ndarray, low: float) -> float:
    """Integrate one curve from `low` to 1; a curve that ends before goes on at its last value."""
    order = np.argsort(left, kind="stable")
    left, metric = left[order], metric[order]
    inside = left > low
    share = np.concatenate([[low], left[inside]])
    value = np.concatenate([[np.interp(low, left, metric)], metric[inside]])
    return float(np.trapezoid(value, share))


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
    """One criterion in one repeat so far: its rows, and the plan of the last finished step.

    Of a sweep, whose steps are not its rows: the number of that step, and the plans at its targets.
    """

    contender: Contender
    repeat: int
    rows: tuple[Mapping[str, Any], ...]
    plan: PruningPlan
    at_chance: bool = False
    step: int = 0
    plans: Mapping[str, PruningPlan] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the curve as JSON holds it."""
        plans = {target: json.loads(plan.to_json()) for target, plan in self.plans.items()}
        of_sweep = {"step": self.step, "plans": plans} if self.step else {}
        plan = json.loads(self.plan.to_json())
        return {"rows": self.rows, "at_chance": self.at_chance, "plan": plan} | of_sweep


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
            if store.folder.is_file() or entries(store.folder):
                raise ComparisonError(f"'{folder}' holds something else than a comparison: choose another folder")
            write_json(path, dict(about), checked=True)
            return store
        before = read_settings(store.folder)
        other = sorted(key for key in {*before, *about} - {"criteria"} if before.get(key) != about.get(key))
        known = before.get("criteria", {})
        other += [label for label, criterion in about["criteria"].items() if known.get(label, criterion) != criterion]
        if other:
            raise ComparisonError(
                f"'{folder}' holds a comparison with another {', '.join(other)}: choose another folder"
            )
        write_json(path, about | {"criteria": known | about["criteria"]}, checked=True)
        return store

    def read(self, contender: Contender, repeat: int, whole: PruningPlan) -> Curve:
        """Return a curve as far as it got; before the first step its plan is `whole`."""
        path = self._path(contender, repeat)
        if path is None or not path.exists():
            return Curve(contender, repeat, (), whole)
        data = read_json(path)
        try:
            named = {target: PruningPlan.from_json(json.dumps(p)) for target, p in data.get("plans", {}).items()}
            plan, rows = PruningPlan.from_json(json.dumps(data["plan"])), tuple(data["rows"])
            return Curve(contender, repeat, rows, plan, data["at_chance"], data.get("step", 0), named)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ComparisonError(f"'{path}' holds no curve of a comparison: {error}") from error

    def write(self, curve: Curve) -> None:
        """Keep a curve's finished steps."""
        if path := self._path(curve.contender, curve.repeat):
            write_json(path, curve.to_dict(), checked=True, allow_nan=True)

    def finish(self, comparison: Comparison) -> Comparison:
        """Keep the whole table."""
        if self.folder is not None:
            comparison.to_csv(self.folder / TABLE)
        return comparison

    def _path(self, contender: Contender, repeat: int) -> Path | None:
        return self.folder and self.folder / f"curve_{contender.slug}_{repeat}.json"


def checksum(model: nn.Module) -> int:
    """Return the CRC-32 of a model's parameters and buffers."""
    total = 0
    for value in model.state_dict().values():
        total = zlib.crc32(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), total)
    return total
