"""Find a plan for a target in steps; for a latency also what that takes: predicted of every plan, measured of some."""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ..errors import check_name, check_number, check_whole
from ..files import told
from ..measure.costs import Cost, CostModel
from ..measure.latency import CLOCKS, RUNTIMES, LatencyModel, conditions, kept_latency, learn_latency, time_layers
from ..scoring.objectives import Objective
from ..scoring.rows import Proof, Rows
from ..scoring.scores import Scores
from ..scoring.tasks import CLASSIFICATION, Task, find_task
from ..state import copy_of
from ..structure.groups import ChannelGroup
from . import compensation
from .check import prove
from .choices import OPERATIONS, Limits, Reached, Scoring, Selection, Steps, Target
from .order import RemovalOrder, check_reachable, exchanged, next_units, per_cost, removal_order, unscored
from .plan import Deciding, PruningPlan, prune, shrink

logger = logging.getLogger(__name__)
PLANS = 10
"""Pruned copies whose layers are timed."""
ROUNDS = 8
HELD = 15 / 16
"""With what probability an interval holds the median: that of the least to the largest of five."""


def prune_to(
    model: nn.Module,
    example_inputs: Any,
    batches: Iterable[Any] | None = None,
    *,
    criterion: Any = "jacobian",
    speedup: float | None = None,
    macs: float | None = None,
    params: float | None = None,
    ratio: float | None = None,
    latency: float | None = None,
    latency_speedup: float | None = None,
    timing: Mapping[str, Any] | None = None,
    scope: str = "global",
    steps: int = 20,
    schedule_ratio: float = 1.0,
    last_step: str = "exact",
    counting: str = OPERATIONS,
    ignore: Iterable[nn.Module | str] = (),
    whole_heads: bool = False,
    only: str | None = None,
    round_to: int | None = None,
    max_ratio: float = 1.0,
    min_channels: int = 1,
    group_reduction: str = "sum",
    normalizer: str | None = None,
    task: str | Task = CLASSIFICATION,
    objective: Objective | None = None,
    rows: Rows | None = None,
    stop: float | None = None,
    per: str | None = None,
    amp: str = "no",
    compensate: bool = False,
    seed: int = 0,
    verify: bool | str = True,
    progress: bool = True,
) -> PruningPlan:
    """Find a plan that reaches a target, in steps: score, remove the lowest-scored channels, score what is left again.

    Step k of ``steps`` removes channels until ratio·k/steps of those prunable at the start are gone; the step that
    would pass the target removes only as many, in score order, as the target needs. `prune(model, plan)` applies the
    plan.

    Args:
        model: left unchanged.
        example_inputs: what one forward pass takes; MACs are counted for one example of it.
        batches: calibration batches; every step iterates over them anew, so that re-drawn ones are fresh each step.
        speedup, macs, params, ratio: give exactly one. Original MACs over the pruned model's; MACs of one example;
            parameters; share of prunable channels removed, in (0, 1).
        latency, latency_speedup: a target too: milliseconds of a forward pass on the example inputs where the model
            is, with torch's present threads, or how many times fewer; what counts is measured in new processes.
        timing: how that is measured, see `Timing`: tolerance, processes, repeats, clock, file (keeps what was
            learnt of the layers' times, for the next call).
        scope: "global", "local" or "isomorphic" (see `choices.Limits`).
        schedule_ratio: the share of channels that the schedule runs to, in (0, 1], where the target is not a ratio.
        ignore, whole_heads, only: which channels may go at all (see `find_groups`).
        round_to, max_ratio, min_channels: what every group keeps (see `choices.Limits`).
        counting: what MACs are: of the "operations" that run, or as "torch_pruning" counts, the paper's way.
        task: what the network is for, a `Task` or the name of one of `TASKS`: its losses are differentiated.
        objective: (model, batch) -> losses, instead of the task's.
        rows: of J, of criteria that have any: "batch", "sample" or k examples; "expected" or ("expected", m) averages
            the score over all ways to draw rows of a batch, or of m examples. None: the criterion's own.
        stop: score no more batches once a step is decided: other batches would be expected to exchange at most this
            share of its channels, in (0, 0.5). The plan's ``deciding`` says how many it took. None scores all.
        per: "macs" or "latency": divide each channel's score by what its removal alone would save of these, so that
            channels that gain much for what they lose go first; "latency" with a latency target. None: the score alone.
        amp: "bf16" scores in bfloat16, "no" in the model's own precision (see `score_groups`).
        compensate: score what is left as `compensate` leaves it, with the batches, and not as `prune` does.
        verify: prove at the end that the pruned network runs, equals the masked one and costs what was predicted (see
            `check.prove`): in double precision, or in single where a copy in double would take more than 4 GiB;
            "float32" is single for any, False no proof.
        last_step: "exact", or "full": the published rule, which stops after the whole step that passes the target.

    Raises:
        ValueError: no target or several, one that cannot be met (says the best that can be had, before any scoring), no
            batches to compensate with, and what `find_groups` and `score_groups` raise.
        LatencyError: a latency that the fastest plan does not reach (says the best, measured), that no plan is near
            enough to, or that cannot be told on a noisy machine.
        ProofError: the plan is wrong; the error carries it.
    """
    timed = latency is not None or latency_speedup is not None
    if timed and any(given is not None for given in (speedup, macs, params, ratio)):
        raise ValueError("give one target: a latency, or speedup=, macs=, params= or ratio=")
    target = (
        Timing(latency, latency_speedup, **timing or {}) if timed else Target(speedup, macs, params, ratio, counting)
    )
    losses = objective or find_task(task).losses
    way = Way(
        selection=Selection(ignore, whole_heads, only),
        scoring=Scoring(criterion, group_reduction, normalizer, losses, None, stop, per, rows, amp),
        limits=Limits(min_channels, max_ratio, round_to, scope=scope),
        steps=Steps(steps, schedule_ratio, last_step),
        left=what_is_left(compensate, batches, task),
        verify=verify,
        seed=seed,
        progress=progress,
    )
    return (prune_to_latency if timed else prune_in_steps)(model, example_inputs, batches, target, way)


def what_is_left(compensate: bool, batches: Iterable[Any] | None, task: str | Task) -> Callable:
    """Return what makes the network that is scored from the model and the plan so far.

    Raises ValueError where there are no batches to compensate with.
    """
    if compensate and batches is None:
        raise ValueError("compensate=True needs batches, whatever the criterion is")
    return partial(compensation.compensate, batches=batches, task=task) if compensate else shrink


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a plan is found, whatever its target: what may go, how it is scored, what stays, in which steps, the proof.

    ``left`` makes the network that is scored from the model and the plan so far.
    """

    selection: Selection = field(default_factory=Selection)
    scoring: Scoring
    limits: Limits
    steps: Steps
    left: Callable[[nn.Module, PruningPlan], nn.Module] = shrink
    verify: bool | str = True
    seed: int = 0
    progress: bool = True

    def __post_init__(self):
        if self.verify not in (True, False, "float32"):
            raise ValueError(f"verify={self.verify!r}: True, False or 'float32'")
        check_whole("seed", self.seed, 0)

    def prove(self, model: nn.Module, plan: PruningPlan, example_inputs: Any, predicted: Cost, counting: str) -> None:
        """Prove a plan as far as it is asked for; raise ProofError as `check.prove` does."""
        if self.verify:
            prove(model, plan, example_inputs, predicted, counting=counting, single=self.verify == "float32")


def prune_in_steps(
    model: nn.Module,
    example_inputs: Any,
    batches: Iterable[Any] | None,
    target: Target,
    way: Way,
    *,
    begun: Stage | None = None,
    keep: Callable[[Stage], None] = lambda stage: None,
    of_step: Callable[[int], Iterable[Any] | None] | None = None,
) -> PruningPlan:
    """Find a plan as `prune_to` does, which says what is raised, asked by values instead of keywords.

    ``keep`` is told what every step leaves, from which a call goes on that is given it as ``begun``; ``of_step``: the
    number of a step, from 1, to the batches that it is scored on, where they are not ``batches`` iterated over anew.
    """
    groups, costs = way.selection.analyse(model, example_inputs, target.counting)
    whole = PruningPlan.whole(groups)
    check_reachable(target, whole, way.limits, costs)
    begun, of_step = begun or Stage(whole), of_step or (lambda _: batches)
    plan = begun.plan
    for stage in () if begun.met else pruning_steps(model, begun, of_step, (target,), costs, way):
        keep(stage)
        plan = stage.plan
    reached = Reached.of(plan, costs, target)
    way.prove(model, plan, example_inputs, reached.cost, target.counting)
    return replace(plan, reached=reached)


def prune_to_latency(
    model: nn.Module,
    example_inputs: Any,
    batches: Iterable[Any] | None,
    target: Timing,
    way: Way,
    *,
    time_plan: Callable[[nn.Module], Mapping[str, float]] | None = None,
    measure: Callable[[nn.Module, nn.Module], Measured] | None = None,
) -> PruningPlan:
    """Find the plan whose latency, measured in new processes, is the target's; see `prune_to`.

    Layers are timed in some pruned copies, from which the latency of every plan is predicted. Plans are taken from one
    way of pruning steps, which is gone no further than needed, and a few are measured (see `climb`). ``time_plan`` and
    ``measure`` take the place of what times a network's layers, and the original and a pruned one.
    """
    groups, costs = way.selection.analyse(model, example_inputs)
    order = unscored(groups, way.limits)
    order.check_prunable()
    fast = latency_model(model, example_inputs, groups, costs, way.limits, target.file, time_plan, target.clock)
    first, last = fast.original.latency, fast.of(order.least).latency * (1 + 1e-9)
    rungs = np.geomspace(first, last, 2 + int(100 * np.log(first / last)))
    targets, plans = [Target(latency=rung) for rung in rungs[1:]], {first: PruningPlan.whole(groups)}
    stages = pruning_steps(model, Stage(plans[first]), lambda _: batches, targets, fast, way)

    def plan_of(rung: float) -> PruningPlan:
        while rung not in plans:
            plans.update((met.latency, plan) for met, plan in next(stages).met)
        return plans[rung]

    measure = measure or partial(measure_apart, example_inputs=example_inputs, timing=target, progress=way.progress)
    plan = climb(target, fast, rungs, plan_of, lambda plan: measure(model, prune(model, plan)))
    reached = Reached.of(plan, costs)
    way.prove(model, plan, example_inputs, reached.cost, OPERATIONS)
    return replace(plan, reached=reached)


@dataclass(frozen=True)
class Stage:
    """What pruning step ``step`` leaves: its plan, and the targets that are met in it, each with its plan."""

    plan: PruningPlan
    step: int = 0
    met: tuple[tuple[Target, PruningPlan], ...] = ()


def pruning_steps(
    model: nn.Module,
    stage: Stage,
    batches: Callable[[int], Iterable[Any] | None],
    targets: Sequence[Target],
    costs: CostModel | LatencyModel,
    way: Way,
) -> Iterator[Stage]:
    """Go on from a stage, step by step, until all targets are met; each step scores what is left once.

    Targets of any kinds, of each the easiest first; where all are ratios the schedule ends with the last. ``batches``:
    the number of a step, from 1, to what is scored in it. Where scoring may stop early, the last target decides.

    Raises:
        ValueError: the schedule ends before a target is met (says how far it got), and what `score_groups` raises.
    """
    final = ([target for target in targets if target.ratio is None] or targets)[-1]
    steps, unmet, proof, begun = way.steps, list(targets), Proof(), stage.step
    shares = list(enumerate(steps.shares(final), start=1))[begun:]
    bar = tqdm(shares, f"pruning to {final}", disable=not way.progress, leave=False)
    for step, share in bar:
        units = partial(next_units, share=share, target=final, costs=costs, last_step=steps.last_step)
        watch = Watch(stage.plan, way.scoring, way.limits, costs, units)
        order = watch.order(way.left(model, stage.plan), batches(step), way.seed + step, proof=proof)
        deciding = watch.deciding
        met = []
        for target in unmet:
            units = next_units(order, min(share, target.ratio or share), target, costs, steps.last_step)
            if order.meets(units, target, costs) if target.ratio is None else share >= target.ratio - 1e-9:
                met.append((target, replace(order.plan(units), deciding=deciding)))
        unmet = [target for target in unmet if target not in dict(met)]
        plan = met[-1][1] if met and not unmet else replace(order.plan(order.up_to(share)), deciding=deciding)
        stage = Stage(plan, step, tuple(met))
        if not unmet:  # of the steps that are done: a bar that ends before its total is one that failed
            bar.total = step - 1 - begun
        yield stage
        if not unmet:
            return
    gone = stage.plan.channels_removed / stage.plan.channels
    best = unmet[0].reached(costs.of(stage.plan), costs.original, gone)
    raise ValueError(f"{unmet[0]} is not met: the schedule ends at schedule_ratio={steps.schedule_ratio:g} with {best}")


@dataclass(eq=False)
class Watch:
    """Scores a step, and says whether the scores so far decide it; ``record`` says how far they do.

    ``units``: how many of an order of removal go in the step.
    """

    plan: PruningPlan
    scoring: Scoring
    limits: Limits
    costs: CostModel | LatencyModel
    units: Callable[[RemovalOrder], int]
    record: Deciding | None = None

    def order(self, model: nn.Module, batches: Iterable[Any] | None, seed: int, **options: Any) -> RemovalOrder:
        """Return the order in which channels of what the plan leaves go, by batches until the step is decided."""
        options |= {"decided": self} if self.scoring.stop else {}
        scores = self.scoring.score(model, self.plan.pruned_groups(), batches, seed, **options)
        return removal_order(self._weighed(scores), self.limits, after=self.plan)

    @property
    def deciding(self) -> tuple[Deciding, ...]:
        """How all steps up to this one were decided."""
        return (*self.plan.deciding, *([self.record] if self.record else ()))

    def __call__(self, scores: Scores) -> bool:
        scores = self._weighed(scores)
        order = removal_order(scores, self.limits, after=self.plan)
        share = exchanged(scores, order, self.units(order))
        batches = len(next(iter(scores.left_out.values())))
        self.record = Deciding(batches, share, share <= self.scoring.stop)
        return self.record.decided

    def _weighed(self, scores: Scores) -> Scores:
        return per_cost(scores, self.plan, self.scoring.per, self.costs)


class LatencyError(ValueError):
    """A latency that is not reached, or cannot be told. ``plan`` is the nearest there is, ``measured`` its latency."""

    def __init__(self, said: str, plan: PruningPlan, measured: Measured):
        super().__init__(said)
        self.plan, self.measured = plan, measured


@dataclass(frozen=True)
class Measured:
    """Milliseconds of the unpruned and the pruned network, side by side, a pair for each of some new processes."""

    original: tuple[float, ...]
    pruned: tuple[float, ...]

    def __post_init__(self):
        if not self.pruned or len(self.original) != len(self.pruned) or min(*self.original, *self.pruned) <= 0:
            raise ValueError(f"latencies {self.original} and {self.pruned}: expected a pair of each process, above 0")

    def __add__(self, more: Measured) -> Measured:
        return Measured(self.original + more.original, self.pruned + more.pruned)

    def of(self, target: Timing) -> tuple[float, ...]:
        """Return what counts for a target: milliseconds, or the share of the unpruned network's."""
        if target.speedup is None:
            return self.pruned
        return tuple(b / a for a, b in zip(self.original, self.pruned, strict=True))


@dataclass(frozen=True)
class Timing:
    """What is asked for: milliseconds or a speed-up, how near, measured in how many new processes by which clock.

    The interval of the median (`interval`) must lie within ``tolerance`` of the target. While it is neither there nor
    wholly off, ``processes`` more are measured, up to ``most_processes``. ``clock``: see `latency`. ``runtime``: what
    runs the networks, one of `RUNTIMES`; what is predicted is how torch runs them, and corrected by what is measured.
    """

    latency: float | None = None
    speedup: float | None = None
    tolerance: float = 0.04
    processes: int = 5
    most_processes: int = 30
    repeats: int = 30
    clock: str = "wall"
    runtime: str = "eager"
    file: str | Path | None = None

    def __post_init__(self):
        if (self.latency is None) == (self.speedup is None):
            raise ValueError("give one target: latency= (milliseconds) or latency_speedup=")
        if self.latency is not None:
            check_number("latency", self.latency, "milliseconds above 0", lambda time: time > 0)
        if self.speedup is not None:
            check_number("latency_speedup", self.speedup, "a number above 1", lambda times: times > 1)
        check_number("tolerance", self.tolerance, "a share in (0, 1)", lambda share: 0 < share < 1)
        check_whole("processes", self.processes, 2)
        check_whole("most_processes", self.most_processes, self.processes, " (processes)")
        check_whole("repeats", self.repeats, 1)
        check_name("clock", self.clock, CLOCKS)
        check_name("runtime", self.runtime, RUNTIMES)

    @property
    def aim(self) -> float:
        """The target in milliseconds, or as a share of the unpruned network's latency."""
        return self.latency if self.speedup is None else 1 / self.speedup

    def __str__(self) -> str:
        return f"latency={self.latency:g} ms" if self.speedup is None else f"latency_speedup={self.speedup:g}"

    def told(self, values: Sequence[float]) -> str:
        """Say what was measured in the target's own terms, with its interval."""
        middle, ends = statistics.median(values), interval(values)
        if self.speedup is not None:
            return f"{1 / middle:.3g}x ({1 / ends[1]:.3g} to {1 / ends[0]:.3g} in {len(values)} processes)"
        return f"{middle:.4g} ms ({ends[0]:.4g} to {ends[1]:.4g} in {len(values)} processes)"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the narrowest interval between two values, as many below as above, that holds the median by `HELD`.

    Values are independent draws; the k-th least and the k-th largest of n have the median between them but for a
    probability of 2 * sum of C(n, i) / 2^n over i < k (order statistics). The least and the largest where n is below 5.
    """
    count, ordered, outside, place = len(values), sorted(values), 0.0, 0
    while 2 * place + 2 < count and outside + 2 * math.comb(count, place) / 2**count <= 1 - HELD:
        outside += 2 * math.comb(count, place) / 2**count
        place += 1
    place = max(place - 1, 0)
    return ordered[place], ordered[-1 - place]


def climb(
    timing: Timing,
    fast: LatencyModel,
    rungs: np.ndarray,
    plan_of: Callable[[float], PruningPlan],
    measured: Callable[[PruningPlan], Measured],
) -> PruningPlan:
    """Return the plan, of those by predicted latency, whose measured one is the target's.

    ``rungs``: the predicted latencies, those of the network as it is first. ``plan_of`` gives the plan that gets to
    one of them. The next plan to measure is where an affine map from predicted to measured latencies puts the target.

    Raises:
        LatencyError: see `prune_to`.
    """
    seen: dict[float, tuple[PruningPlan, Measured]] = {}
    aim = timing.aim * (1.0 if timing.speedup is None else fast.original.latency)
    for _ in range(ROUNDS):
        plans = _around(aim, fast, rungs, plan_of)
        found = min(plans, key=lambda latency: abs(latency - aim))
        if found in seen:
            break
        seen[found] = plans[found], _told_apart(timing, plans[found], measured)
        if _judged(timing, *seen[found]):
            return plans[found]
        points = {predicted: statistics.median(found.of(timing)) for predicted, (_, found) in seen.items()}
        aim = _corrected(points, timing.aim)
    nearest = min(points, key=lambda predicted: abs(points[predicted] - timing.aim))
    said = "is not met: the nearest plan has"
    if nearest <= rungs[-1] and points[nearest] > timing.aim:
        said = "cannot be met: the best that can be had is"
    elif nearest == rungs[0] and points[nearest] < timing.aim:
        said = "asks for less than the network does as it is:"
    plan, times = seen[nearest]
    raise LatencyError(f"{timing} {said} {timing.told(times.of(timing))}", plan, times)


def _around(
    aim: float, fast: LatencyModel, rungs: np.ndarray, plan_of: Callable[[float], PruningPlan]
) -> dict[float, PruningPlan]:
    """Return the plans next to a predicted latency, above and below it, by their own; one at either end."""
    place = int(np.searchsorted(-rungs, -aim, side="right"))
    found = {}
    for rung in (*rungs[place : place + 1], *rungs[:place][::-1]):  # that below, then upwards
        plan = plan_of(rung)
        latency = fast.of(plan).latency
        found[latency] = plan
        if latency >= aim:
            break
    return found


def _told_apart(timing: Timing, plan: PruningPlan, measured: Callable[[PruningPlan], Measured]) -> Measured:
    """Measure a plan in more and more processes, until it is told whether it is within the tolerance, or enough."""
    found = measured(plan)
    while _verdict(timing, found) is None and len(found.pruned) + timing.processes <= timing.most_processes:
        found += measured(plan)
    return found


def _verdict(timing: Timing, measured: Measured) -> bool | None:
    """Say whether an interval is within the tolerance of the target, or wholly off; None where it is neither."""
    low, high = interval(measured.of(timing))
    least, most = timing.aim * (1 - timing.tolerance), timing.aim * (1 + timing.tolerance)
    if least <= low and high <= most:
        return True
    return False if high < least or low > most else None


def _judged(timing: Timing, plan: PruningPlan, measured: Measured) -> bool:
    """Say whether a plan is within the tolerance for sure; raise LatencyError where nobody could tell."""
    values = measured.of(timing)
    low, high = interval(values)
    logger.info("%s: measured %s", timing, timing.told(values))
    verdict = _verdict(timing, measured)
    if verdict is None and high - low > 2 * timing.tolerance * statistics.median(values):
        said = f"{timing} cannot be told within {timing.tolerance:.0%}: {timing.told(values)}; the machine is too noisy"
        clock = "" if timing.clock == "cpu" else "one thread with clock='cpu', "
        raise LatencyError(
            f"{said}: stop other work, {clock}more most_processes= or repeats=, or a larger tolerance=", plan, measured
        )
    return bool(verdict)


def _corrected(points: dict[float, float], aim: float) -> float:
    """Return the predicted latency at which the target would be measured, by the two nearest points, or by one."""
    (x, y), *others = sorted(points.items(), key=lambda point: abs(point[1] - aim))
    slope = next(((y - v) / (x - u) for u, v in others), y / x)
    return x + (aim - y) / (slope if slope > 0 else y / x)


def latency_model(
    model: nn.Module,
    example_inputs: Any,
    groups: Sequence[ChannelGroup],
    costs: CostModel,
    limits: Limits | None = None,
    file: str | Path | None = None,
    time_plan: Callable[[nn.Module], Mapping[str, float]] | None = None,
    clock: str = "wall",
) -> LatencyModel:
    """Learn the latency of every plan for a network, or read it from a file measured under the same conditions.

    ``time_plan`` takes the place of what times the layers of a network.
    """
    layers = [name for name, _ in model.named_modules() if name in {*costs.macs.owners, *costs.params.owners}]
    time_plan = time_plan or (lambda network: time_layers(network, example_inputs, layers, clock=clock))

    def learn() -> LatencyModel:
        plans = [PruningPlan.whole(groups), *random_plans(groups, limits or Limits(), PLANS)]
        return learn_latency(costs, plans, layers, lambda plan: time_plan(prune(model, plan)))

    return kept_latency(file, costs, conditions(model, example_inputs, clock), learn)


def random_plans(groups: Sequence[ChannelGroup], limits: Limits, count: int, seed: int = 0) -> list[PruningPlan]:
    """Return plans that remove other shares of every group; every second one the same share of all."""
    random, plans = np.random.default_rng(seed), []
    for number in range(count):
        shared = random.uniform(0.1, 0.9)
        ratios = {g.root: shared if number % 2 else random.uniform(0, 0.9) for g in groups}
        ratios = {root: min(ratio, limits.max_ratio_of.get(root, limits.max_ratio)) for root, ratio in ratios.items()}
        order = unscored(groups, replace(limits, max_ratio_of=ratios))
        plans.append(order.plan(len(order)))
    return plans


def measure_apart(
    original: nn.Module, pruned: nn.Module, example_inputs: Any, timing: Timing, progress: bool = False
) -> Measured:
    """Measure two networks in turns, in several new processes one after the other, each some seconds to start."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "networks.pt"
        try:
            how = {"repeats": timing.repeats, "threads": torch.get_num_threads(), "clock": timing.clock}
            models = {"original": copy_of(original), "pruned": pruned}
            with told(path, "nothing was measured"), path.open("wb") as file:
                torch.save((models, example_inputs, timing.runtime, how), file)
        except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
            raise ValueError(f"the network cannot be handed to a new process: {error}") from error
        here = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "obc_tools.models.runtimes", str(path)]
        turns = tqdm(range(timing.processes), "measuring in new processes", disable=not progress, leave=False)
        found = [subprocess.run(command, capture_output=True, text=True, env=here) for _ in turns]
    for process in found:
        if process.returncode:
            last = (process.stderr.strip().splitlines() or ["it said nothing"])[-1]
            lost = " (its class must be in a module that can be imported there, not in a notebook)"
            hint = lost if last.startswith(("AttributeError", "ModuleNotFoundError")) else ""
            raise ValueError(f"the network could not be timed in a new process: {last}{hint}")
    pairs = [json.loads(process.stdout.splitlines()[-1]) for process in found]
    return Measured(tuple(pair["original"] for pair in pairs), tuple(pair["pruned"] for pair in pairs))
