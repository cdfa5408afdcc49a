"""Apply a plan (`prune`), and find a plan for a target in steps (`prune_to`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..measure.cost_model import CostModel, cost_model
from ..measure.costs import Cost, cost
from ..scoring.objectives import Objective, classification
from ..structure.shrinking import shrink_model
from .choices import OPERATIONS, Limits, Scoring, Selection, Steps, Target
from .order import next_plan, removal_order
from .plan import PlanMismatchError, PruningPlan


def prune(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Return a new model with only the kept channels; the given model is left unchanged.

    Parameters, buffers and the attributes of layers that hold widths follow; everything else is a deep copy.

    Raises:
        PlanMismatchError: the plan does not fit the model, or prunes tied parameters differently.
    """
    plan.validate(model)
    pruned = shrink_model(model, plan.shrunk, plan.scaled)
    _tie(model, pruned)
    return pruned


def _tie(model: nn.Module, pruned: nn.Module) -> None:
    """Let parameters that are one object in the model be one object in the pruned model."""
    first: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        source = first.setdefault(parameter, name)
        if source == name:
            continue
        ours, theirs = pruned.get_parameter(name), pruned.get_parameter(source)
        if ours.shape != theirs.shape or not torch.equal(ours, theirs):
            raise PlanMismatchError(f"{source!r} and {name!r} are one parameter, but the plan prunes them differently")
        owner, _, leaf = name.rpartition(".")
        setattr(pruned.get_submodule(owner), leaf, theirs)


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
    objective: Objective = classification,
    seed: int = 0,
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
        last_step: "exact", or "full": the published rule, which stops after the whole step that passes the target.

    Raises:
        ValueError: no target or several, one that cannot be met (says the best that can be had, before any scoring),
            and what `find_groups` and `score_groups` raise.
    """
    return prune_in_steps(
        model,
        example_inputs,
        batches,
        target=Target(speedup, macs, params, ratio, counting),
        selection=Selection(ignore, whole_heads, only),
        scoring=Scoring(criterion, group_reduction, normalizer, objective),
        limits=Limits(min_channels, max_ratio, round_to, scope=scope),
        steps=Steps(steps, schedule_ratio, last_step),
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
    seed: int = 0,
    progress: bool = True,
) -> PruningPlan:
    """Find a plan as `prune_to` does, which says what is raised, asked by values instead of keywords."""
    groups = selection.groups(model, example_inputs)
    costs = costs_of_plans(model, example_inputs, selection, target.counting)
    plan = PruningPlan.whole(groups)
    check_reachable(target, plan, limits, costs)
    shares = tqdm(steps.shares(target), f"pruning to {target}", total=steps.steps, disable=not progress, leave=False)
    for step, share in enumerate(shares, start=1):
        scores = scoring.score(prune(model, plan), plan.pruned_groups(), batches, seed + step)
        plan = next_plan(scores, plan, share, target, costs, limits, last_step=steps.last_step)
        if target.ratio is None and target.met(costs.of(plan), costs.original):
            break
    else:
        if target.ratio is None:
            best = target.reached(costs.of(plan), costs.original)
            raise ValueError(
                f"{target} is not met: the schedule ends at schedule_ratio={steps.schedule_ratio:g} with {best}"
            )
    return plan


def check_reachable(target: Target, whole: PruningPlan, limits: Limits, costs: CostModel) -> None:
    """Raise ValueError, before any scoring, where even all that the limits allow to go would not meet a target."""
    removal_order({group: torch.zeros(group.width) for group in whole.groups}, limits).check(target, costs)


def cost_counted(model: nn.Module, example_inputs: Any, counting: str) -> Cost:
    """Return what a model costs, in one of the counts of `choices.COUNTS`."""
    return cost(model, example_inputs)


def costs_of_plans(model: nn.Module, example_inputs: Any, selection: Selection, counting: str) -> CostModel:
    """Return what every plan for a model costs, in one of the counts of `choices.COUNTS`."""
    return cost_model(model, example_inputs, whole_heads=selection.whole_heads)
