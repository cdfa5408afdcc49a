"""In which order channels go, given their scores: the removal order of a scope, and `make_plan` on top of it."""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..errors import UnknownNameError
from ..measure.costs import Cost, CostModel
from ..structure.groups import ChannelGroup
from ..structure.layers import LayerAxis
from .plan import PruningPlan

SCOPES = ("global", "local", "isomorphic")


@dataclass(frozen=True)
class Limits:
    """What every group keeps whatever the scores say.

    At least ``min_channels`` channels and at most ``max_ratio`` of the original ones removed; the number of kept
    channels is rounded up to a multiple of ``round_to``. ``max_ratio_of``, by root, takes the place of ``max_ratio``
    for single groups; 0 keeps the group whole.
    """

    min_channels: int = 1
    max_ratio: float = 1.0
    round_to: int | None = None
    max_ratio_of: Mapping[LayerAxis, float] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        if self.min_channels < 1:
            raise ValueError(f"min_channels={self.min_channels}: at least 1 channel of a group stays")
        if not 0 < self.max_ratio <= 1:
            raise ValueError(f"max_ratio={self.max_ratio}: expected a share in (0, 1]")
        if self.round_to is not None and self.round_to < 1:
            raise ValueError(f"round_to={self.round_to}: expected a positive whole number or None")
        for root, ratio in self.max_ratio_of.items():
            if not 0 <= ratio <= 1:
                raise ValueError(f"max_ratio_of group {LayerAxis(*root)}: {ratio}; expected a share in [0, 1]")

    def fewest(self, root: LayerAxis, initial: int) -> int:
        """Return the least number of channels that a group keeps which had `initial` channels."""
        ratio = self.max_ratio_of.get(root, self.max_ratio)
        return max(self.min_channels, math.ceil(initial * (1 - ratio) - 1e-9))


@dataclass(frozen=True, eq=False, repr=False)
class RemovalOrder:
    """All removable units in the order in which they go; a unit is a channel, or the same position of every block.

    All arrays have the shape (units,). ``owners``: the index of each unit's group. ``positions``: of the unit within
    each block of its group. ``fractions[i]``: the share of the originally prunable channels (of the scope's pool) that
    is gone once units 0 to i are removed; it never falls. ``counts[i]``: the number of channels in units 0 to i.
    """

    groups: tuple[ChannelGroup, ...]
    owners: np.ndarray
    positions: np.ndarray
    fractions: np.ndarray
    counts: np.ndarray
    limits: Limits

    def __len__(self) -> int:
        return len(self.owners)

    def up_to(self, fraction: float) -> int:
        """Return how many units go before more than `fraction` of the pool is gone."""
        return int(np.searchsorted(self.fractions, fraction + 1e-9, side="right"))

    def up_to_channels(self, channels: int) -> int:
        """Return how many units go before more than `channels` channels are gone."""
        return int(np.searchsorted(self.counts, channels, side="right"))

    def plan(self, units: int) -> PruningPlan:
        """Return the plan that removes the first `units` units, kept counts rounded up to the limits' multiple."""
        return PruningPlan(self.groups, tuple(tuple(kept.tolist()) for kept in self.kept(units)))

    def kept(self, units: int) -> tuple[np.ndarray, ...]:
        """Return the channels of each group that stay in `plan`, ascending, unchecked: what a bisection needs."""
        counts = np.bincount(self.owners[:units], minlength=len(self.groups)).tolist()
        kept = []
        for group, count, channels in zip(self.groups, counts, self._channels, strict=True):
            stays = np.ones(group.width, dtype=bool)
            stays[channels[: self._rounded(group, count)]] = False
            kept.append(np.flatnonzero(stays))
        return tuple(kept)

    @cached_property
    def _channels(self) -> tuple[np.ndarray, ...]:
        """The channels of each group's units in their order, shape (units of the group, blocks)."""
        borders = np.bincount(self.owners, minlength=len(self.groups)).cumsum()[:-1]
        positions = np.split(self.positions[np.argsort(self.owners, kind="stable")], borders)
        return tuple(
            found[:, None] + np.arange(group.blocks) * (group.width // group.blocks)
            for group, found in zip(self.groups, positions, strict=True)
        )

    def _rounded(self, group: ChannelGroup, count: int) -> int:
        multiple = self.limits.round_to or 1
        while count and (group.width - count * group.blocks) % multiple:
            count -= 1
        return count


def removal_order(
    scores: Mapping[ChannelGroup, Tensor],
    *,
    scope: str = "global",
    limits: Limits = Limits(),
    initial: Mapping[LayerAxis, int] | None = None,
) -> RemovalOrder:
    """Order the removable channels of all prunable groups by score.

    Args:
        scores: the score of each channel of each group, shape (width,); low goes first.
        scope: "global" ranks all channels together, "local" within each group, "isomorphic" among the groups with the
            same structure (Fang et al. 2024); the last two remove the same share of each pool.
        initial: the groups' widths by root before any earlier pruning step; the present ones by default.

    Raises:
        ValueError: an unknown scope, scores of another width, scores that are not finite, or limits of a group that
            is not there.
    """
    if scope not in SCOPES:
        raise UnknownNameError("scope", scope, SCOPES)
    groups = tuple(scores)
    check_roots(limits.max_ratio_of, groups)
    start = {group.root: group.width for group in groups} | dict(initial or {})
    pools: dict[object, list[int]] = defaultdict(list)
    sizes = np.array([group.blocks for group in groups])
    found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
    for index, group in enumerate(groups):
        if group.prunable:
            pools[{"global": "all", "local": group.root, "isomorphic": group.kind}[scope]].append(index)
            positions, means = _removable(group, scores[group], limits, start[group.root])
            found.append((np.full(len(positions), index), positions, means))
    owners, positions, means = map(np.concatenate, zip(*found, strict=True))
    fractions = np.zeros(len(owners))
    by_score = np.lexsort([positions, owners, means])
    placed = [np.empty(0, np.int64)]
    for members in pools.values():
        size = sum(start[groups[index].root] for index in members)
        gone = size - sum(groups[index].width for index in members)
        mine = by_score[np.isin(owners[by_score], members)]
        fractions[mine] = (gone + sizes[owners[mine]].cumsum()) / size
        placed.append(mine)
    all_placed = np.concatenate(placed)
    order = all_placed[np.argsort(fractions[all_placed], kind="stable")]
    return RemovalOrder(
        groups, owners[order], positions[order], fractions[order], sizes[owners[order]].cumsum(), limits
    )


def check_roots(roots: Iterable[LayerAxis], groups: Iterable[ChannelGroup]) -> None:
    """Raise UnknownNameError where a root is not that of any of the groups."""
    known = {group.root for group in groups}
    for root in roots:
        if root not in known:
            raise UnknownNameError("group", str(LayerAxis(*root)), [str(name) for name in known])


def _removable(group: ChannelGroup, score: Tensor, limits: Limits, initial: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of a group that may go, lowest score first, and the scores; the best that must stay are out.

    A score is the mean over the group's blocks.
    """
    if score.shape != (group.width,):
        raise ValueError(f"group {group.root}: scores of shape {tuple(score.shape)} for {group.width} channels")
    if not torch.isfinite(score).all():
        channel = int((~torch.isfinite(score)).nonzero()[0])
        raise ValueError(f"group {group.root}: the score of channel {channel} is {score[channel].item()}")
    blocks = score.detach().double().cpu().view(group.blocks, -1)
    means, order = blocks.mean(0).sort(stable=True)
    size = blocks.shape[1]
    stay = min(size, math.ceil(limits.fewest(group.root, initial) / group.blocks))
    if group.blocks > 1:
        stay = max(stay, min(size, 2))  # one channel a convolution group would make it depthwise: another layer type
    return order[: size - stay].numpy(), means[: size - stay].numpy()


def make_plan(
    scores: Mapping[ChannelGroup, Tensor],
    *,
    ratio: float | None = None,
    channels: int | None = None,
    scope: str = "global",
    round_to: int | None = None,
    min_channels: int = 1,
    max_ratio: float = 1.0,
) -> PruningPlan:
    """Turn scores into a plan that removes the lowest-scored channels.

    Give one target: ``ratio``, the share in (0, 1) of the prunable channels to remove, or ``channels``, their number.
    Rounding (``round_to``) and the limits never remove more than asked. See `removal_order` for ``scope``.

    Raises:
        ValueError: no target or two, a target out of range, or more channels than the limits allow to remove.
    """
    if (ratio is None) == (channels is None):
        raise ValueError("give one target: ratio= or channels=")
    order = removal_order(scores, scope=scope, limits=Limits(min_channels, max_ratio, round_to))
    if ratio is not None:
        if not 0 < ratio < 1:
            raise ValueError(f"ratio={ratio}: expected a share of channels in (0, 1)")
        return order.plan(order.up_to(ratio))
    most = int(order.counts[-1]) if len(order) else 0
    if not 0 <= channels <= most:
        raise ValueError(f"channels={channels}: from 0 to {most} channels can be removed within the limits")
    return order.plan(order.up_to_channels(channels))


@dataclass(frozen=True)
class Target:
    """What a pruned model must reach: one of a speed-up (times fewer MACs), MACs, parameters, a ratio of channels."""

    speedup: float | None = None
    macs: float | None = None
    params: float | None = None
    ratio: float | None = None

    def __post_init__(self):
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"give one target: speedup=, macs=, params= or ratio=; got {given or 'none'}")
        ((name, value),) = given.items()
        if name == "ratio" and not 0 < value < 1:
            raise ValueError(f"ratio={value}: expected a share of channels in (0, 1)")
        if name == "speedup" and not value > 1:
            raise ValueError(f"speedup={value}: expected a number above 1")
        if not value > 0:
            raise ValueError(f"{name}={value}: expected a positive number")

    def met(self, cost: Cost, original: Cost) -> bool:
        """Say whether a cost reaches the target (a ratio is the schedule's own business)."""
        if self.speedup is not None:
            return cost.macs * self.speedup <= original.macs * (1 + 1e-12)
        if self.macs is not None:
            return cost.macs <= self.macs
        return self.params is not None and cost.params <= self.params

    def reached(self, cost: Cost, original: Cost) -> str:
        """Say how far a cost gets, in the target's own terms."""
        if self.speedup is not None:
            return f"speedup={original.macs / cost.macs:.4g}"
        return f"macs={cost.macs:,.0f}" if self.macs is not None else f"params={cost.params:,}"

    def __str__(self) -> str:
        return next(f"{name}={value:g}" for name, value in vars(self).items() if value is not None)


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
