"""Find a plan for a target in steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from ..errors import check_whole
from ..measure.costs import Cost, CostModel
from ..measure.latency import LatencyModel, Times
from ..scoring.objectives import Objective
from ..scoring.rows import Proof, Rows
from ..scoring.scores import Scores
from ..scoring.tasks import CLASSIFICATION, Task, find_task
from . import compensation
from .check import prove
from .choices import OPERATIONS, Limits, Reached, Scoring, Selection, Steps, Target
from .order import RemovalOrder, check_reachable, exchanged, next_units, per_cost, removal_order, unscored
from .plan import Deciding, PruningPlan, prune, shrink
from .timed import Measured, Timing, climb, latency_model, measure_apart


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
        timing: how that is measured, see `timed.Timing`: tolerance, processes, repeats, clock, file (keeps what was
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
    way = Way(
        selection=Selection(ignore, whole_heads, only),
        scoring=Scoring(
            criterion, group_reduction, normalizer, objective or find_task(task).losses, None, stop, per, rows, amp
        ),
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
    time_plan: Callable[[nn.Module], Times] | None = None,
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
        watch = Watch(
            stage.plan,
            way.scoring,
            way.limits,
            costs,
            lambda order, share=share: next_units(order, share, final, costs, steps.last_step),
        )
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
