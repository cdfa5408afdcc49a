"""Find a plan for a target in steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..measure.costs import Cost, CostModel, cost_model
from ..scoring.criteria import resolve_criterion
from ..scoring.objectives import Objective, classification
from ..scoring.scores import score_groups
from ..structure.groups import ChannelGroup, find_groups
from .check import prove
from .order import Limits, RemovalOrder, Target, removal_order
from .plan import PruningPlan, prune


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
    ignore: Iterable[nn.Module | str] = (),
    whole_heads: bool = False,
    only: str | None = None,
    round_to: int | None = None,
    max_ratio: float = 1.0,
    min_channels: int = 1,
    group_reduction: str = "sum",
    normalizer: str | None = None,
    objective: Objective = classification,
    seed: int = 0,
    verify: bool = True,
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
        scope: "global", "local" or "isomorphic" (see `order.removal_order`).
        schedule_ratio: the share of channels that the schedule runs to, in (0, 1], where the target is not a ratio.
        ignore, whole_heads, only: which channels may go at all (see `find_groups`).
        round_to, max_ratio, min_channels: what every group keeps (see `order.Limits`).
        verify: prove at the end that the pruned network runs, equals the masked one and costs what was predicted (see
            `check.prove`).
        last_step: "exact", or "full": the published rule, which stops after the whole step that passes the target.

    Raises:
        ValueError: no target or several, one that cannot be met (says the best that can be had, before any scoring),
            and what `find_groups` and `score_groups` raise.
        ProofError: the plan is wrong; the error carries it.
    """
    target = Target(speedup, macs, params, ratio)
    if steps < 1 or not 0 < schedule_ratio <= 1 or last_step not in ("exact", "full"):
        raise ValueError(
            f"steps={steps}, schedule_ratio={schedule_ratio}, last_step={last_step!r}: steps is at least "
            "1, schedule_ratio in (0, 1], last_step 'exact' or 'full'"
        )
    criterion = resolve_criterion(criterion)
    groups = find_groups(model, example_inputs, ignore=ignore, whole_heads=whole_heads, only=only)
    costs = cost_model(model, example_inputs, whole_heads=whole_heads)
    original = costs.of(PruningPlan.whole(groups))
    limits = Limits(min_channels, max_ratio, round_to)
    _check_reachable(target, groups, limits, costs, original)
    initial = {group.root: group.width for group in groups}
    plan = PruningPlan.whole(groups)
    final = schedule_ratio if ratio is None else ratio
    for step in tqdm(range(1, steps + 1), desc=f"pruning to {target}", disable=not progress, leave=False):
        scores = score_groups(
            prune(model, plan),
            plan.pruned_groups(),
            criterion,
            batches,
            group_reduction=group_reduction,
            normalizer=normalizer,
            objective=objective,
            seed=seed + step,
        )
        order = removal_order(scores, scope=scope, limits=limits, initial=initial)
        units = order.up_to(final * step / steps)
        candidate = plan.then(order.plan(units))
        if target.met(costs.of(candidate), original):
            if last_step == "full":
                return _proven(candidate, model, example_inputs, costs, verify)
            units = fewest_units(plan, order, units, target, costs, original)
            return _proven(plan.then(order.plan(units)), model, example_inputs, costs, verify)
        plan = candidate
    if ratio is None:
        best = target.reached(costs.of(plan), original)
        raise ValueError(f"{target} is not met: the schedule ends at schedule_ratio={final:g} with {best}")
    return _proven(plan, model, example_inputs, costs, verify)


def _proven(plan: PruningPlan, model: nn.Module, example_inputs: Any, costs: CostModel, verify: bool) -> PruningPlan:
    if verify:
        prove(model, plan, example_inputs, costs.of(plan))
    return plan


def fewest_units(
    plan: PruningPlan, order: RemovalOrder, units: int, target: Target, costs: CostModel, original: Cost
) -> int:
    """Return the fewest units, in order and at most `units`, whose removal after `plan` meets a target; bisection."""
    low, high = 0, units
    while low < high:
        middle = (low + high) // 2
        if target.met(costs.of(plan.then(order.plan(middle))), original):
            high = middle
        else:
            low = middle + 1
    return low


def _check_reachable(
    target: Target, groups: tuple[ChannelGroup, ...], limits: Limits, costs: CostModel, original: Cost
) -> None:
    """Raise ValueError when even removing all that the limits allow would not meet the target."""
    if not any(group.prunable for group in groups):
        reasons = "; ".join(sorted({f"{group.root}: {group.kept_whole}" for group in groups})[:5])
        raise ValueError(f"nothing can be pruned: {reasons or 'the model has no groups of channels'}")
    if target.ratio is not None:
        return
    order = removal_order({group: torch.zeros(group.width) for group in groups}, limits=limits)
    best = costs.of(order.plan(len(order)))
    if not target.met(best, original):
        raise ValueError(f"{target} cannot be met: the best that can be had is {target.reached(best, original)}")
