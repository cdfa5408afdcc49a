"""Criteria against each other without fine-tuning: prune step by step, score what is left again, measure each step.

The paper's Fig. 5–7 (Chen et al. 2025): accuracy and loss against pruned channels, MACs and parameters. Calibration
images are plain training images, drawn afresh for every step and the same for all criteria of a repeat.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from ..data.batches import Batch, Batches, count_examples, first_examples, take
from ..data.data import Data, as_data
from ..errors import check_number, check_whole
from ..files import environment, held
from ..measure.costs import Cost
from ..measure.metrics import Metrics, TaskMetrics
from ..pruning.choices import OPERATIONS, Settings, Target, check_settings
from ..pruning.compensation import compensate
from ..pruning.order import check_reachable, next_units
from ..pruning.plan import PruningPlan, shrink
from ..pruning.prune import Watch
from ..scoring.objectives import Objective
from ..scoring.tasks import CLASSIFICATION, Task, checked_example, evaluate, find_task
from .comparison import (
    Comparison,
    Contender,
    Curve,
    CurveFolder,
    as_frame,
    checksum,
    described,
    marked,
    read_settings,
    resolve_contenders,
)

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
    bench = _Bench(factory, data, chosen, contenders, find_task(task), objective, progress)
    draws = [(c, c.criterion.draws or chosen.compensate) for c in contenders]
    curves = [(c, repeat) for c, drawn in draws for repeat in range(chosen.repeats if drawn else 1)]
    rows: list[Mapping[str, Any]] = []
    with (
        nullcontext() if folder is None else held(Path(folder)),
        tqdm(total=len(curves) * chosen.steps, desc="comparing", unit="step", disable=not progress) as bar,
    ):
        store = CurveFolder.open(folder, bench.describe())
        for contender, repeat in curves:
            curve = store.read(contender, repeat, bench.whole)
            bar.set_postfix_str(f"{contender.label}, repeat {repeat}")
            bar.update(max(len(curve.rows) - 1, 0))
            for longer in bench.continued(curve):
                store.write(longer)
                bar.update(longer.rows[-1]["step"] > 0)
                curve = longer
            bar.update(chosen.steps + 1 - len(curve.rows))
            rows += marked(curve.rows, curve.at_chance)
        about = bench.describe()
        return store.finish(Comparison(as_frame(rows, about), about, environment(bench.device)))


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
    task: Task
    objective: Objective | None
    progress: bool

    def __post_init__(self):
        settings, model = self.settings, self.factory().eval()
        self.checksum, self.device = checksum(model), next(model.parameters()).device
        task = self.task = self.task if self.task.against is None else self.task.against(model)
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
        s, cost, criterion = self.settings, self.costs.of(plan), curve.contender.criterion
        measured = {"task": self.task, "progress": self.progress}
        held_out = evaluate(pruned, self._images("val", s.held_out), **measured)
        seen = None if s.training == 0 else evaluate(pruned, self._images("train", s.training), **measured)
        data_free = criterion.needs == "weights"
        return {
            "criterion": curve.contender.label,
            "repeat": curve.repeat,
            "step": step,
            "pruned_channels": plan.channels_removed,
            "channels": plan.channels,
            "macs": cost.macs,
            "params": cost.params,
            **self._metrics(held_out, ""),
            **self._metrics(seen, "train_"),
            "seconds": seconds,
            "images": 0 if data_free or not step else (criterion.batches or s.batches) * s.batch_size,
        }

    def _metrics(self, found: Metrics | TaskMetrics | None, prefix: str) -> dict[str, float | None]:
        values = {} if found is None else found.values
        return {prefix + name: values.get(name) for name in self.task.directions}

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
