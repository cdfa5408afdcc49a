"""What a target costs: plans at many targets from one way to the last of them, each measured."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from ..data.batches import Batches
from ..errors import check_name, check_whole
from ..measure.costs import CostModel
from ..measure.latency import latencies
from ..pruning.choices import OPERATIONS, Limits, Reached, Scoring, Selection, Steps, Target, targets_of, values_of
from ..pruning.order import check_reachable
from ..pruning.plan import PruningPlan, prune, shrink
from ..pruning.prune import Stage, Way, pruning_steps, what_is_left
from ..scoring.criteria import Criterion
from ..scoring.objectives import Objective
from ..scoring.tasks import CLASSIFICATION, Task, evaluate
from .compare import Comparison, Curve, checksum, described, figures, measured_task, resolve_contenders, run_curves

Build = Callable[[nn.Module, PruningPlan], nn.Module]
"""(model, plan) -> the pruned network that is measured."""


@dataclass(frozen=True, eq=False, repr=False)
class Sweep:
    """What `sweep` found.

    Attributes:
        curves: the table as a `Comparison`, whose step is the number of the target, 0 for the unpruned network.
        plans: criterion -> target, "speedup=2" -> plan.
    """

    curves: Comparison
    plans: Mapping[str, Mapping[str, PruningPlan]]

    @property
    def frame(self) -> pd.DataFrame:
        """One row a criterion and target, the unpruned network first: what it is and what was measured."""
        return self.curves.frame.drop(columns=["repeat", "at_chance"]).dropna(axis=1, how="all")

    def to_frame(self) -> pd.DataFrame:
        """Return the table, one row a criterion and target."""
        return self.frame

    def plan(self, target: str, criterion: str | None = None) -> PruningPlan:
        """Return the plan of a target, "speedup=2", by the first criterion unless one is named."""
        found = self.plans[criterion or self.curves.criteria[0]]
        check_name("target", target, found)
        return found[target]

    def plot(self, metric: str | None = None, over: str = "macs", *, look: str = "light"):
        """Draw a metric, by default the headline, over what is left: of "macs", "params", "channels" or "latency"."""
        from ..plots.curves import criteria_curves

        return criteria_curves(self.curves, metric or self.curves.headline, over, look=look)

    def __repr__(self) -> str:
        return self.frame.to_string(index=False, float_format="{:.4g}".format, na_rep="")

    def _repr_html_(self) -> str:
        return self.frame.to_html(index=False, float_format="{:.4g}".format, na_rep="")


def sweep(
    model: nn.Module,
    example_inputs: Any,
    batches: Iterable[Any] | None = None,
    *,
    targets: Mapping[str, float | Iterable[float]],
    criteria: Any = "jacobian",
    held_out: Iterable[Any] | None = None,
    task: str | Task = CLASSIFICATION,
    objective: Objective | None = None,
    build: Build | None = None,
    repeats: int = 0,
    compensate: bool = False,
    counting: str = OPERATIONS,
    folder: str | Path | None = None,
    verify: bool | str = True,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> Sweep:
    """Find plans at many targets on the way to the last of them, and measure each: the frontier of a network.

    Every plan is that which `prune_to` finds for its target with the same settings; targets that are ratios share the
    steps of the largest. What is left is scored once a step, not once a target.

    Args:
        model, example_inputs, task, objective, counting, verify, seed: as in `prune_to`.
        batches: calibration batches; every step iterates over them anew, all criteria over the same: step k takes pass
            k - 1 of `Batches`.
        targets: kind -> values, {"speedup": (1.5, 2, 3)}; kinds are those of `prune_to` and may be mixed.
        criteria: one or several, as `compare_criteria` takes them.
        held_out: batches to measure the task's metrics on; None: none.
        build: (model, plan) -> the network to measure, `prune` or with ``compensate`` `compensate` by default; it may
            fine-tune.
        compensate: score what a step leaves as `compensate` leaves it, with the batches, as `prune_to` does.
        repeats: forward passes on the example inputs to time each network with, in turns with the unpruned one.
        folder: keep every finished step and all plans here, and go on from there if it is called again.
        settings: the other keywords of `prune_to`, such as steps, scope, ignore.

    Raises:
        ValueError: no target, one that cannot be met (says the best that can be had), what `prune_to` and
            `compare_criteria` raise.
    """
    check_whole("repeats", repeats, 0)
    contenders = resolve_contenders([criteria] if _is_one(criteria) else criteria)
    task = measured_task(task, model, held_out)
    scored = {"criterion": "jacobian", "objective": objective or task.losses}
    selection, *how = values_of(dict(settings, **scored), Selection, Scoring, Limits, Steps)
    left = what_is_left(compensate, batches, task)
    build = build or (left if compensate else prune)
    way = Way(scoring=how[0], limits=how[1], steps=how[2], left=left, verify=verify, seed=seed, progress=progress)
    for contender in contenders:
        way.scoring.of(contender.criterion)
    groups, costs = selection.analyse(model, example_inputs, counting)
    whole, asked = PruningPlan.whole(groups), targets_of(targets, counting)
    for target in {target.given[0]: target for target in asked}.values():
        check_reachable(target, whole, way.limits, costs)
    bench = _Bench(model, example_inputs, batches, asked, costs, way, task, held_out, build, repeats)
    about = bench.describe() | {"settings": {name: str(value) for name, value in settings.items()}}
    about |= {"criteria": {contender.label: described(contender.criterion) for contender in contenders}}
    about = json.loads(json.dumps(about))
    begun = [(contender, 0) for contender in contenders]
    found, curves = run_curves(folder, about, begun, whole, bench.continued, next(model.parameters()).device)
    return Sweep(found, {curve.contender.label: bench.told(curve.plans) for curve in curves})


def _is_one(criteria: Any) -> bool:
    """Say whether this is one criterion: a name, (name, options), a Criterion or a function."""
    with_options = isinstance(criteria, tuple) and len(criteria) == 2 and isinstance(criteria[1], Mapping)
    return with_options or isinstance(criteria, str | Criterion) or callable(criteria)


@dataclass(frozen=True, eq=False)
class _Bench:
    """Everything that curves share."""

    model: nn.Module
    example: Any
    batches: Iterable[Any] | None
    targets: list[Target]
    costs: CostModel
    way: Way
    task: Task
    held_out: Iterable[Any] | None
    build: Build
    repeats: int

    def describe(self) -> dict[str, Any]:
        """Return what the numbers depend on, as JSON holds it; ``steps`` are those of the table."""
        return {
            "targets": list(map(str, self.targets)),
            "steps": len(self.targets),
            "counting": self.targets[0].counting,
            "compensate": self.way.left is not shrink,
            "checksum_of_weights": checksum(self.model),
            "metrics": dict(self.task.directions),
            "build": getattr(self.build, "__name__", type(self.build).__name__),
            "repeats": self.repeats,
            "seed": self.way.seed,
        }

    def told(self, plans: Mapping[str, PruningPlan]) -> dict[str, PruningPlan]:
        """Return plans that say what they reach."""
        asked = {str(target): target for target in self.targets}
        return {name: replace(plan, reached=Reached.of(plan, self.costs, asked[name])) for name, plan in plans.items()}

    def continued(self, curve: Curve) -> Iterator[Curve]:
        """Go on with a curve; yield it after every step of pruning, once what it met is measured."""
        if not curve.rows:
            curve = replace(curve, rows=(self._row(curve, curve.plan),))
            yield curve
        left = [target for target in self.targets if str(target) not in curve.plans]
        start = time.perf_counter()
        way = replace(self.way, scoring=self.way.scoring.of(curve.contender.criterion))
        batches = self.batches
        of_step = (lambda step: batches.at(step - 1)) if isinstance(batches, Batches) else (lambda _: batches)
        stages = pruning_steps(self.model, Stage(curve.plan, curve.step), of_step, left, self.costs, way)
        for stage in stages if left else ():
            seconds = time.perf_counter() - start
            for target, plan in stage.met:
                row = self._row(curve, plan, target, seconds)
                curve = replace(curve, rows=(*curve.rows, row), plans={**curve.plans, str(target): plan})
            curve = replace(curve, plan=stage.plan, step=stage.step)
            yield curve
            start = time.perf_counter()

    def _row(
        self, curve: Curve, plan: PruningPlan, target: Target | None = None, seconds: float | None = None
    ) -> dict[str, Any]:
        """Prove a plan and measure it."""
        cost, network = self.costs.of(plan), self.model
        if target is not None:
            self.way.prove(self.model, plan, self.example, cost, target.counting)
            network = self.build(self.model, plan)
        values = {} if self.held_out is None else evaluate(network, self.held_out, task=self.task).values
        return {
            "criterion": curve.contender.label,
            "repeat": 0,
            "step": len(curve.rows),
            "target": "" if target is None else str(target),
            **figures(plan, cost),
            "speedup": self.costs.original.macs / cost.macs,
            **{name: values.get(name) for name in self.task.directions},
            **{f"train_{name}": None for name in self.task.directions},
            **self._timed(network),
            "seconds": seconds,
        }

    def _timed(self, network: nn.Module) -> dict[str, float | None]:
        if not self.repeats:
            return {"latency_ms": None, "latency_left": None}
        found = latencies({"unpruned": self.model, "pruned": network}, self.example, repeats=self.repeats)
        return {"latency_ms": found["pruned"].median_ms, "latency_left": 1 / found.speedup("pruned")}
