"""Find a plan for a target in steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..errors import check_whole
from ..measure.costs import CostModel
from ..scoring.objectives import Objective
from ..scoring.rows import Proof
from ..scoring.scores import Scores
from ..scoring.tasks import CLASSIFICATION, Task, find_task
from . import compensation
from .check import prove
from .choices import OPERATIONS, Limits, Scoring, Selection, Steps, Target
from .order import RemovalOrder, exchanged, next_plan, next_units, removal_order
from .plan import Deciding, PruningPlan, shrink

logger = logging.getLogger(__name__)


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
    stop: float | None = None,
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
        scope: "global", "local" or "isomorphic" (see `choices.Limits`).
        schedule_ratio: the share of channels that the schedule runs to, in (0, 1], where the target is not a ratio.
        ignore, whole_heads, only: which channels may go at all (see `find_groups`).
        round_to, max_ratio, min_channels: what every group keeps (see `choices.Limits`).
        counting: what MACs are: of the "operations" that run, or as "torch_pruning" counts, the paper's way.
        task: what the network is for, a `Task` or the name of one of `TASKS`: its losses are differentiated.
        objective: (model, batch) -> losses, instead of the task's.
        stop: score no more batches once a step is decided: other batches would be expected to exchange at most this
            share of its channels, in (0, 0.5). The plan's ``deciding`` says how many it took. None scores all.
        compensate: score what is left as `compensate` leaves it, with the batches, and not as `prune` does.
        verify: prove at the end that the pruned network runs, equals the masked one and costs what was predicted (see
            `check.prove`): in double precision, or in single where a copy in double would take more than 4 GiB;
            "float32" is single for any, False no proof.
        last_step: "exact", or "full": the published rule, which stops after the whole step that passes the target.

    Raises:
        ValueError: no target or several, one that cannot be met (says the best that can be had, before any scoring), no
            batches to compensate with, and what `find_groups` and `score_groups` raise.
        ProofError: the plan is wrong; the error carries it.
    """
    if compensate and batches is None:
        raise ValueError("compensate=True needs batches, whatever the criterion is")
    left = partial(compensation.compensate, batches=batches, task=task) if compensate else shrink
    return prune_in_steps(
        model,
        example_inputs,
        batches,
        target=Target(speedup, macs, params, ratio, counting),
        selection=Selection(ignore, whole_heads, only),
        scoring=Scoring(criterion, group_reduction, normalizer, objective or find_task(task).losses, stop=stop),
        limits=Limits(min_channels, max_ratio, round_to, scope=scope),
        steps=Steps(steps, schedule_ratio, last_step),
        left=left,
        verify=verify,
        seed=seed,
        progress=progress,
    )


def prune_in_steps(
    model: nn.Module,
    example_inputs: Any,
    batches: Iterable[Any] | None,
    *,
    target: Target,
    selection: Selection,
    scoring: Scoring,
    limits: Limits,
    steps: Steps,
    left: Callable[[nn.Module, PruningPlan], nn.Module] = shrink,
    verify: bool | str = True,
    seed: int = 0,
    progress: bool = True,
) -> PruningPlan:
    """Find a plan as `prune_to` does, which says what is raised, asked by values instead of keywords.

    ``left`` makes the network that is scored from the model and the plan so far.
    """
    last_step = steps.last_step
    if verify not in (True, False, "float32"):
        raise ValueError(f"verify={verify!r}: True, False or 'float32'")
    check_whole("seed", seed, 0)
    groups, costs = selection.analyse(model, example_inputs, target.counting)
    plan = PruningPlan.whole(groups)
    check_reachable(target, plan, limits, costs)
    shares = tqdm(steps.shares(target), f"pruning to {target}", total=steps.steps, disable=not progress, leave=False)
    proof, deciding = Proof(), []
    for step, share in enumerate(shares, start=1):
        watch = Watch(
            plan, scoring, limits, lambda order, share=share: next_units(order, share, target, costs, last_step)
        )
        options = {"decided": watch, "proof": proof} if scoring.stop else {"proof": proof}
        scores = scoring.score(left(model, plan), plan.pruned_groups(), batches, seed + step, **options)
        deciding += [watch.record] if watch.record else []
        plan = next_plan(scores, plan, share, target, costs, limits, last_step=last_step)
        if target.ratio is None and target.met(costs.of(plan), costs.original):
            shares.total = step - 1  # of the steps that are done: a bar that ends before its total is one that failed
            break
    else:
        if target.ratio is None:
            best = target.reached(costs.of(plan), costs.original)
            raise ValueError(
                f"{target} is not met: the schedule ends at schedule_ratio={steps.schedule_ratio:g} with {best}"
            )
    plan = replace(plan, deciding=tuple(deciding))
    if verify:
        prove(model, plan, example_inputs, costs.of(plan), counting=target.counting, single=verify == "float32")
    return plan


class Watch:
    """Says whether the scores so far decide a step; ``record`` says how far they do."""

    def __init__(self, plan: PruningPlan, scoring: Scoring, limits: Limits, units: Callable[[RemovalOrder], int]):
        self.plan, self.scoring, self.limits, self.units = plan, scoring, limits, units
        self.record: Deciding | None = None

    def __call__(self, scores: Scores) -> bool:
        order = removal_order(scores, self.limits, after=self.plan)
        share = exchanged(scores, order, self.units(order))
        batches = len(next(iter(scores.left_out.values())))
        self.record = Deciding(batches, share, share <= self.scoring.stop)
        return self.record.decided


def check_reachable(target: Target, whole: PruningPlan, limits: Limits, costs: CostModel) -> None:
    """Raise ValueError, before any scoring, where even all that the limits allow to go would not meet a target.

    The log says which operations a target of MACs leaves out, for want of a formula.
    """
    if costs.original.unknown and target.given[0] in ("speedup", "macs"):
        logger.warning("%s: MACs leave out %s, which has no formula", target, ", ".join(costs.original.unknown))
    removal_order({group: torch.zeros(group.width) for group in whole.groups}, limits).check(target, costs)
