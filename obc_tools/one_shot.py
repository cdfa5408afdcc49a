"""A plan for a target from one scoring: channels are ranked once, then every target is arithmetic.

`pruning.prune_to` scores again after every step and removes better for it; this answers at once, which is what a
slider needs.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from .groups import ChannelGroup
from .layers import LayerAxis
from .measure import CostModel
from .order import Limits, RemovalOrder, check_roots, removal_order
from .plan import PruningPlan
from .pruning import Target


@dataclass(frozen=True)
class _Draft:
    """Kept channels that only a cost model looks at, unchecked."""

    groups: tuple[ChannelGroup, ...]
    kept: tuple[np.ndarray, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Ranking:
    """The channels of all groups, ranked; the groups whose channels are fixed beforehand are not.

    Attributes:
        order: the removal order of all groups, fixed ones held whole in it.
        fixed: the kept channels of the groups that are fixed, by root.
    """

    order: RemovalOrder
    fixed: Mapping[LayerAxis, tuple[int, ...]]

    @classmethod
    def of(
        cls,
        scores: Mapping[ChannelGroup, Tensor],
        *,
        scope: str = "global",
        limits: Limits | None = None,
        fixed: Mapping[LayerAxis, Iterable[int]] | None = None,
    ) -> Ranking:
        """Rank the channels; raise ValueError as `removal_order` does, and for a fixed group that is not there."""
        held = {LayerAxis(*root): tuple(kept) for root, kept in (fixed or {}).items()}
        check_roots(held, scores)
        ranked = {_held(group) if group.root in held else group: score for group, score in scores.items()}
        order = removal_order(ranked, scope=scope, limits=limits or Limits())
        return cls(replace(order, groups=tuple(scores)), held)

    def plan(self, units: int) -> PruningPlan:
        """Return the plan that removes the first `units` units of the order."""
        kept = tuple(tuple(channels.tolist()) for channels in self._kept(units))
        return PruningPlan(self.order.groups, kept)

    def meet(self, target: Target, costs: CostModel) -> PruningPlan:
        """Return the plan that removes the fewest channels, in order, that meet a target.

        Raises:
            ValueError: even all that the limits allow to remove would not meet it.
        """
        most = len(self.order)
        if target.ratio is not None:
            return self.plan(self.order.up_to(target.ratio))
        best = costs.of(_Draft(self.order.groups, self._kept(most)))
        if not target.met(best, costs.original):
            reached = target.reached(best, costs.original)
            raise ValueError(f"{target} cannot be met: the best that can be had is {reached}")
        return self.plan(bisect.bisect_left(range(most), True, key=lambda units: self._meets(units, target, costs)))

    def _meets(self, units: int, target: Target, costs: CostModel) -> bool:
        return target.met(costs.of(_Draft(self.order.groups, self._kept(units))), costs.original)

    def _kept(self, units: int) -> tuple[np.ndarray, ...]:
        kept = self.order.kept(units)
        return tuple(
            np.array(self.fixed[group.root]) if group.root in self.fixed else channels
            for group, channels in zip(self.order.groups, kept, strict=True)
        )


def _held(group: ChannelGroup) -> ChannelGroup:
    return group if not group.prunable else replace(group, kept_whole="fixed beforehand")


def one_shot_plan(
    scores: Mapping[ChannelGroup, Tensor],
    costs: CostModel,
    *,
    ratio: float | None = None,
    speedup: float | None = None,
    macs: float | None = None,
    params: float | None = None,
    scope: str = "global",
    round_to: int | None = None,
    min_channels: int = 1,
    max_ratio: float = 1.0,
    max_ratio_of: Mapping[LayerAxis, float] | None = None,
    fixed: Mapping[LayerAxis, Iterable[int]] | None = None,
) -> PruningPlan:
    """Find the plan that removes the fewest of the lowest-scored channels such that a target is met.

    Unlike `prune_to` nothing is scored again on the way. Give one target.

    Args:
        scores: what `score_groups` gives, low goes first.
        costs: the model's `cost_model`.
        ratio: share in (0, 1) of the channels of all prunable groups that are not fixed.
        speedup, macs, params: original MACs over the pruned model's; MACs of one example; parameters.
        scope: "global", "local" or "isomorphic" (see `order.removal_order`).
        round_to, min_channels, max_ratio: what every group keeps (see `order.Limits`).
        max_ratio_of: another ``max_ratio`` for single groups, by root (layer, axis); 0 keeps a group whole.
        fixed: the kept channels of groups that are decided already, by root; they are neither ranked nor limited.

    Raises:
        ValueError: no target or several, one that cannot be met (says the best that can be had), a group that is not
            there, or what `removal_order` raises.
    """
    target = Target(speedup, macs, params, ratio)
    limits = Limits(min_channels, max_ratio, round_to, max_ratio_of or {})
    return Ranking.of(scores, scope=scope, limits=limits, fixed=fixed).meet(target, costs)
