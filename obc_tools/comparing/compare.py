"""Criteria against each other without fine-tuning: prune step by step, score what is left again, measure each step.

The paper's Fig. 5–7 (Chen et al. 2025): accuracy and loss against pruned channels, MACs and parameters. Calibration
images are plain training images, drawn afresh for every step and the same for all criteria of a repeat. The outcome is
a table with a row a step; it and its summary lie on disk.
"""

from __future__ import annotations

import copy
import io
import json
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from ..data.batches import Batch, Batches, count_examples, first_examples, take
from ..data.data import Data, as_data
from ..errors import check_number, check_whole
from ..files import entries, environment, held, read_json, write_json, write_text
from ..measure.costs import Cost
from ..pruning.choices import OPERATIONS, TORCH_PRUNING, Settings, Target, check_settings
from ..pruning.compensation import compensate
from ..pruning.order import check_reachable, next_units
from ..pruning.plan import PruningPlan, shrink
from ..pruning.prune import Watch
from ..scoring.criteria import Criterion, resolve_criterion
from ..scoring.objectives import Objective
from ..scoring.tasks import CLASSIFICATION, Task, checked_example, evaluate, find_task

SETTINGS, TABLE = "comparison.json", "comparison.csv"
KEYS = ["criterion", "repeat", "step"]
SHARES = {"channels": "pruned_channels", "macs": "macs", "params": "params"}


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
    try:
        return _read_unfinished(Path(path)) if Path(path).is_dir() else _read_table(Path(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ComparisonError(f"'{path}' holds no comparison: {error}") from error


def _read_table(path: Path) -> Comparison:
    first, _, rest = path.read_text(encoding="utf-8").partition("\n")
    about = json.loads(first.removeprefix("# "))
    frame = pd.read_csv(io.StringIO(rest))
    missing = sorted({*KEYS, *metric_directions(about["settings"]), "at_chance"} - set(frame.columns))
    if missing:
        raise ComparisonError(f"columns {', '.join(missing)} are missing")
    return Comparison(frame, about["settings"], about["environment"])


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
    held_out = settings.get("metrics", CLASSIFICATION.directions)
    return held_out | {f"train_{name}": direction for name, direction in held_out.items()}


def _read_unfinished(folder: Path) -> Comparison:
    """Read the curves in a folder, in the order in which their criteria were asked for."""
    settings = read_settings(folder)
    if not settings:
        raise ComparisonError(f"there is no {SETTINGS}")
    curves = [read_json(path) for path in sorted(folder.glob("curve_*.json"))]
    order = list(settings["criteria"])
    rows = [row for curve in curves for row in marked(curve["rows"], curve["at_chance"])]
    rows.sort(key=lambda row: order.index(row["criterion"]))
    return Comparison(as_frame(rows, settings), settings, {})


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


def run_curves(
    folder: str | Path | None,
    about: Mapping[str, Any],
    begun: Sequence[tuple[Contender, int]],
    whole: PruningPlan,
    continued: Callable[[Curve], Iterator[Curve]],
    device: torch.device,
) -> tuple[Comparison, list[Curve]]:
    """Go on with the curves of criteria and repeats to their ends.

    A folder, if there is one, keeps the settings, a JSON file a curve, step by step, and the table at the end.

    Args:
        about: what the numbers depend on.
        whole: the plan before the first step.
        continued: goes on with a curve, and yields it after every step.
        device: of the network.
    """
    folder = None if folder is None else Path(folder)
    with nullcontext() if folder is None else held(folder):
        if folder is not None:
            _open(folder, about)
        paths = [folder and folder / f"curve_{contender.slug}_{repeat}.json" for contender, repeat in begun]
        curves = [_read_curve(path, Curve(*of, (), whole)) for path, of in zip(paths, begun, strict=True)]
        for index, (path, curve) in enumerate(zip(paths, curves, strict=True)):
            for curves[index] in continued(curve):
                if path is not None:
                    write_json(path, curves[index].to_dict(), checked=True, allow_nan=True)
        rows = [row for curve in curves for row in marked(curve.rows, curve.at_chance)]
        found = Comparison(as_frame(rows, about), about, environment(device))
        if folder is not None:
            found.to_csv(folder / TABLE)
        return found, curves


def _open(folder: Path, about: Mapping[str, Any]) -> None:
    """Begin a folder, or go on with one; raise ComparisonError when it holds another comparison or other files."""
    before = read_settings(folder)
    if not before and (folder.is_file() or entries(folder)):
        raise ComparisonError(f"'{folder}' holds something else than a comparison: choose another folder")
    known = before.get("criteria", {})
    other = sorted(key for key in {*before, *about} - {"criteria"} if before and before.get(key) != about.get(key))
    other += [label for label, criterion in about["criteria"].items() if known.get(label, criterion) != criterion]
    if other:
        raise ComparisonError(f"'{folder}' holds a comparison with another {', '.join(other)}: choose another folder")
    write_json(folder / SETTINGS, about | {"criteria": known | about["criteria"]}, checked=True)


def _read_curve(path: Path | None, begun: Curve) -> Curve:
    """Return a curve as far as a file has it; without one as it begins."""
    if path is None or not path.exists():
        return begun
    data = read_json(path)
    try:
        plans = {target: PruningPlan.from_json(json.dumps(plan)) for target, plan in data.get("plans", {}).items()}
        done = {"rows": tuple(data["rows"]), "at_chance": data["at_chance"], "step": data.get("step", 0)}
        return replace(begun, plan=PruningPlan.from_json(json.dumps(data["plan"])), plans=plans, **done)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ComparisonError(f"'{path}' holds no curve of a comparison: {error}") from error


def measured_task(task: str | Task, model: nn.Module, held_out: Iterable[Any] | None) -> Task:
    """Return a task as it is for a network; raise ValueError for batches that can be gone through only once."""
    if isinstance(held_out, Iterator):
        raise ValueError(f"held_out: a {type(held_out).__name__} can be gone through only once; pass a list of batches")
    task = find_task(task)
    return task if task.against is None else task.against(model)


def figures(plan: PruningPlan, cost: Cost) -> dict[str, float]:
    """Return what every row says of a plan."""
    channels = {"pruned_channels": plan.channels_removed, "channels": plan.channels}
    return channels | {"macs": cost.macs, "params": cost.params}


def checksum(model: nn.Module) -> int:
    """Return the CRC-32 of a model's parameters and buffers."""
    total = 0
    for value in model.state_dict().values():
        total = zlib.crc32(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), total)
    return total


EVALUATION_BATCH = 250


@dataclass(frozen=True, kw_only=True)
class CompareSettings(Settings):
    """How criteria are compared; plain values, checked when built. See `compare_criteria`."""

    steps: int = 18
    ratio: float | None = None
    macs: float | None = None
    counting: str = OPERATIONS
    repeats: int = 5
    held_out: int | None = None
    training: int | None = None
    until_chance: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("steps", 1), ("repeats", 1)):
            check_whole(name, getattr(self, name), least)
        for name, least in (("held_out", 1), ("training", 0)):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), least, " images, or None for all")
        if self.ratio is not None and self.macs is not None:
            raise ValueError("give one end: ratio= (share of channels removed) or macs= (share of the MACs left)")
        if self.ratio is None and self.macs is None:
            object.__setattr__(self, "ratio", 0.9)
        name = "ratio" if self.macs is None else "macs"
        check_number(name, getattr(self, name), "a share in (0, 1)", lambda share: 0 < share < 1)
        _ = self.target(self.steps, Cost(1, 1))

    def target(self, step: int, original: Cost) -> Target:
        """Return what the network is to reach in a step."""
        if self.macs is None:
            return Target(ratio=self.ratio * step / self.steps)
        return Target(macs=original.macs * (1 - (1 - self.macs) * step / self.steps), counting=self.counting)


def compare_criteria(
    factory: nn.Module | Callable[[], nn.Module],
    data: Any,
    criteria: Iterable[Any] | Mapping[str, Any],
    *,
    task: str | Task = CLASSIFICATION,
    objective: Objective | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> Comparison:
    """Prune a trained network step by step by each criterion, without fine-tuning, and measure it after every step.

    Args:
        factory: the trained network, which stays as it is, or what returns it afresh for every criterion and repeat.
        data: `Data`, made by `load_data` or `as_data`. Calibration images are drawn from its training images, without
            augmentation: the same for all criteria in a repeat, others in every step and repeat. Measured on its
            held-out images and on training images.
        criteria: names, (name, options) pairs, Criterion values or functions of weights; or a mapping from labels to
            those. ("jacobian", {"batches": 500}) has a data budget of its own.
        task: what the network is for, a `Task` or the name of one of `TASKS`.
        objective: what is differentiated, instead of the task's losses.
        folder: keep what is finished here, step by step, and go on from there if it is called again.
        steps, ratio: step k of ``steps`` removes channels until the share ratio·k/steps is gone; default 18 to 0.9.
        macs: instead of a ratio: the share of the MACs left at the end, reached in equal steps.
        counting: what MACs are, as in `prune_to`; a comparison in ``folder`` goes on in the count that it began in.
        scope, group_reduction, normalizer, round_to, min_channels, max_ratio, ignore, whole_heads,
            only: as in `prune_to`.
        batches, batch_size: the calibration batches of a step; where nobody says, 50 or all there are.
        rows, stop: as in `prune_to`, for the criteria that have rows; the others score all batches.
        per: as in `prune_to`, for all criteria.
        compensate: measure every step, and score it for the next one, as `compensate` leaves the network with that
            step's ``batches``.
        repeats: how often each criterion is repeated; once for those in which neither data nor chance has a say.
        held_out, training: images to measure on, a fixed random choice; None: all, and ``training=0``: none.
        until_chance: end a curve once both accuracies are within three standard errors of a guess.
        seed: fixes all that is drawn.

    Raises:
        ValueError: settings out of range, an end that cannot be reached (says the best), more calibration batches than
            there are images, equal labels, a model that does not go with the data; ComparisonError if ``folder`` holds
            a comparison of something else.

    Example:
        >>> compare_criteria(lambda: load_model("resnet56", num_classes=10, weights=FILE), load_data("cifar10", ROOT),
        ...                  ["jacobian", "taylor", "l1"], batches=10, repeats=3).plot()
    """
    chosen = CompareSettings(**_begun(settings, folder))
    factory = partial(copy.deepcopy, factory) if isinstance(factory, nn.Module) else factory
    contenders = resolve_contenders(criteria)
    for contender in contenders:
        chosen.scoring().of(contender.criterion)
    data = as_data(data)
    if "batches" not in settings:  # as many as usual, or all there are
        there = len(data.batches("train", chosen.batch_size))
        chosen = replace(chosen, batches=min(chosen.batches, there))
    bench = _Bench(factory, data, chosen, contenders, task, objective, progress)
    draws = [(c, c.criterion.draws or chosen.compensate) for c in contenders]
    curves = [(c, repeat) for c, drawn in draws for repeat in range(chosen.repeats if drawn else 1)]
    with tqdm(total=len(curves) * chosen.steps, desc="comparing", unit="step", disable=not progress) as bar:

        def continued(curve: Curve) -> Iterator[Curve]:
            bar.set_postfix_str(f"{curve.contender.label}, repeat {curve.repeat}")
            bar.update(max(len(curve.rows) - 1, 0))
            for longer in bench.continued(curve):
                yield longer
                bar.update(longer.rows[-1]["step"] > 0)
                curve = longer
            bar.update(chosen.steps + 1 - len(curve.rows))

        return run_curves(folder, bench.describe(), curves, bench.whole, continued, bench.device)[0]


def _begun(settings: Mapping[str, Any], folder: str | Path | None) -> dict[str, Any]:
    """Return the settings, checked for names, in the count in which a comparison in a folder was begun."""
    check_settings(settings, [field.name for field in fields(CompareSettings)])
    begun = {} if folder is None else read_settings(folder)
    return {"counting": begun.get("counting", OPERATIONS), **settings}


@dataclass(eq=False)
class _Bench:
    """Everything that curves share: the data and the settings, and of the network its groups and costs."""

    factory: Callable[[], nn.Module]
    data: Data
    settings: CompareSettings
    contenders: tuple[Contender, ...]
    task: str | Task
    objective: Objective | None
    progress: bool

    def __post_init__(self):
        settings, model = self.settings, self.factory().eval()
        self.checksum, self.device = checksum(model), next(model.parameters()).device
        task = self.task = measured_task(self.task, model, None)
        criteria = [contender.criterion for contender in self.contenders] if self.objective is None else []
        if settings.until_chance and task is not CLASSIFICATION:
            raise ValueError(f"until_chance=True: there is no guess by which to end a curve of task '{task.name}'")
        example = checked_example(task, model, self.data, self.device, criteria)
        groups, self.costs = settings.selection.analyse(model, example, settings.counting)
        self.whole, self.objective = PruningPlan.whole(groups), self.objective or task.losses
        check_reachable(settings.target(settings.steps, self.costs.original), self.whole, settings.limits, self.costs)
        for budget in [c.criterion.batches for c in self.contenders] + [None] * settings.compensate:
            self.calibration(budget, 0, 1)

    def describe(self) -> dict[str, Any]:
        """Return what the numbers depend on, as JSON holds it."""
        counts = {"train_images": len(self.data.train), "val_images": len(self.data.val)}
        criteria = {c.label: described(c.criterion) for c in self.contenders}
        about = {"data": self.data.name, "checksum_of_weights": self.checksum, "criteria": criteria, **counts}
        if self.task is not CLASSIFICATION:
            about |= {"task": self.task.name, "metrics": dict(self.task.directions)}
        return json.loads(json.dumps(asdict(self.settings) | about))

    def calibration(self, budget: int | None, repeat: int, step: int) -> Iterable[Batch]:
        """Return so many calibration batches of a step, or as many as the settings say."""
        s = self.settings
        drawn = self.data.batches("train", s.batch_size, seed=s.seed + repeat, device=self.device)
        return take(drawn.at(step), budget or s.batches)

    def left(self, model: nn.Module, plan: PruningPlan, repeat: int, step: int) -> nn.Module:
        """Return what a step's plan leaves of the network."""
        if not self.settings.compensate:
            return shrink(model, plan)
        return compensate(model, plan, self.calibration(None, repeat, step), task=self.task)

    def continued(self, curve: Curve) -> Iterator[Curve]:
        """Go on with a curve; yield it after every step."""
        if curve.at_chance or len(curve.rows) > self.settings.steps:
            return
        model = self.factory().eval()
        pruned = self.left(model, curve.plan, curve.repeat, len(curve.rows) - 1)
        for step in range(len(curve.rows), self.settings.steps + 1):
            plan, seconds = (curve.plan, None) if step == 0 else self._next_plan(curve, pruned, step)
            pruned = self.left(model, plan, curve.repeat, step) if step else pruned
            row = self._row(curve, step, plan, seconds, pruned)
            curve = replace(curve, rows=(*curve.rows, row), plan=plan, at_chance=self._at_chance(row))
            yield curve
            if curve.at_chance:
                return

    def _next_plan(self, curve: Curve, pruned: nn.Module, step: int) -> tuple[PruningPlan, float]:
        """Score what is left and remove the lowest-scored channels; return the plan and the seconds of scoring."""
        s, criterion = self.settings, curve.contender.criterion
        seed = int(np.random.SeedSequence((s.seed, curve.repeat, step)).generate_state(1)[0])
        start = time.perf_counter()
        batches = self.calibration(criterion.batches, curve.repeat, step)
        scoring = s.scoring("jacobian", self.objective).of(criterion)
        target, share = s.target(step, self.costs.original), 1.0 if s.ratio is None else s.ratio * step / s.steps
        units = partial(next_units, share=share, target=target, costs=self.costs)
        watch = Watch(curve.plan, scoring, s.limits, self.costs, units)
        hidden = not (self.progress and scoring.needs_data)
        with tqdm(batches, f"scoring by {curve.contender.label}", disable=hidden, leave=False) as bar:
            order = watch.order(pruned, bar, seed)
            bar.total = bar.n  # where the step was decided before
        seconds = time.perf_counter() - start
        return replace(order.plan(watch.units(order)), deciding=watch.deciding), seconds

    def _row(
        self, curve: Curve, step: int, plan: PruningPlan, seconds: float | None, pruned: nn.Module
    ) -> dict[str, Any]:
        s, criterion = self.settings, curve.contender.criterion
        measured = {"task": self.task, "progress": self.progress}
        held_out = evaluate(pruned, self._images("val", s.held_out), **measured).values
        seen = {} if s.training == 0 else evaluate(pruned, self._images("train", s.training), **measured).values
        data_free = criterion.needs == "weights"
        return {
            "criterion": curve.contender.label,
            "repeat": curve.repeat,
            "step": step,
            **figures(plan, self.costs.of(plan)),
            **{name: held_out.get(name) for name in self.task.directions},
            **{f"train_{name}": seen.get(name) for name in self.task.directions},
            "seconds": seconds,
            "images": 0 if data_free or not step else (criterion.batches or s.batches) * s.batch_size,
        }

    def _images(self, split: str, count: int | None) -> Iterable[Batch]:
        """Return the images to measure on: all, or a fixed random choice of so many."""
        if count is None:
            return self.data.batches(split, EVALUATION_BATCH, shuffle=False, device=self.device).at(0)
        drawn = self.data.batches(split, EVALUATION_BATCH, seed=self.settings.seed, shuffle=True, device=self.device)
        return _first_images(drawn.at(0), count)

    def _at_chance(self, row: Mapping[str, Any]) -> bool:
        if not self.settings.until_chance:
            return False
        chance = 1 / len(self.data.classes)
        counts = {"accuracy": self.settings.held_out or len(self.data.val)}
        if row["train_accuracy"] is not None:
            counts["train_accuracy"] = self.settings.training or len(self.data.train)
        return all(row[key] <= chance + 3 * (chance * (1 - chance) / n) ** 0.5 for key, n in counts.items())


def _first_images(batches: Batches, count: int) -> Iterator[Batch]:
    """Yield the first `count` examples of a pass."""
    for batch in batches:
        examples = count_examples(batch)
        yield batch if examples <= count else first_examples(batch, count)
        count -= examples
        if count <= 0:
            return
