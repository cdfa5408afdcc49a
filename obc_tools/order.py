"""In which order channels go, given their scores: the removal order of a scope, and `make_plan` on top of it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .groups import ChannelGroup
from .layers import LayerAxis, UnknownNameError
from .plan import PruningPlan

SCOPES = ("global", "local", "isomorphic")


@dataclass(frozen=True)
class Limits:
    """What every group keeps whatever the scores say.

    At least ``min_channels`` channels and at most ``max_ratio`` of the original ones removed; the number of kept
    channels is rounded up to a multiple of ``round_to``.
    """

    min_channels: int = 1
    max_ratio: float = 1.0
    round_to: int | None = None

    def __post_init__(self):
        if self.min_channels < 1:
            raise ValueError(f"min_channels={self.min_channels}: at least 1 channel of a group stays")
        if not 0 < self.max_ratio <= 1:
            raise ValueError(f"max_ratio={self.max_ratio}: expected a share in (0, 1]")
        if self.round_to is not None and self.round_to < 1:
            raise ValueError(f"round_to={self.round_to}: expected a positive whole number or None")

    def fewest(self, initial: int) -> int:
        """Return the least number of channels that a group of `initial` channels keeps."""
        return max(self.min_channels, math.ceil(initial * (1 - self.max_ratio) - 1e-9))


@dataclass(frozen=True)
class Unit:
    """Channels of one group that go together: one, or the same position of every block."""

    group: int
    channels: tuple[int, ...]
    score: float


@dataclass(frozen=True)
class RemovalOrder:
    """All removable units in the order in which they go.

    ``fractions[i]``: the share of the originally prunable channels (of the scope's pool) that is gone once
    ``units[:i + 1]`` are removed; it never falls. ``counts[i]``: the number of channels in ``units[:i + 1]``.
    """

    groups: tuple[ChannelGroup, ...]
    units: tuple[Unit, ...]
    fractions: tuple[float, ...]
    counts: tuple[int, ...]
    limits: Limits

    def up_to(self, fraction: float) -> int:
        """Return how many units go before more than `fraction` of the pool is gone."""
        return sum(1 for value in self.fractions if value <= fraction + 1e-9)

    def up_to_channels(self, channels: int) -> int:
        """Return how many units go before more than `channels` channels are gone."""
        return sum(1 for value in self.counts if value <= channels)

    def plan(self, units: int) -> PruningPlan:
        """Return the plan that removes the first `units` units, kept counts rounded up to the limits' multiple."""
        removed: dict[int, list[Unit]] = defaultdict(list)
        for unit in self.units[:units]:
            removed[unit.group].append(unit)
        kept = []
        for index, group in enumerate(self.groups):
            gone = {c for unit in self._rounded(group, removed[index]) for c in unit.channels}
            kept.append(tuple(channel for channel in range(group.width) if channel not in gone))
        return PruningPlan(self.groups, tuple(kept))

    def _rounded(self, group: ChannelGroup, removed: list[Unit]) -> list[Unit]:
        multiple = self.limits.round_to or 1
        count = len(removed)
        while count and (group.width - count * group.blocks) % multiple:
            count -= 1
        return removed[:count]


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
        ValueError: an unknown scope, scores of another width, or scores that are not finite.
    """
    if scope not in SCOPES:
        raise UnknownNameError("scope", scope, SCOPES)
    groups = tuple(scores)
    start = {group.root: group.width for group in groups} | dict(initial or {})
    pools: dict[object, list[Unit]] = defaultdict(list)
    for index, group in enumerate(groups):
        if group.prunable:
            key = {"global": "all", "local": group.root, "isomorphic": group.kind}[scope]
            pools[key] += _removable(index, group, scores[group], limits, start[group.root])
    placed = []
    for key, units in pools.items():
        members = [g for g in groups if g.prunable and key in ("all", g.root, g.kind)]
        size = sum(start[group.root] for group in members)
        gone = size - sum(group.width for group in members)
        for unit in sorted(units, key=lambda unit: (unit.score, unit.group, unit.channels)):
            gone += len(unit.channels)
            placed.append((gone / size, unit))
    placed.sort(key=lambda pair: pair[0])
    counts = torch.tensor([len(unit.channels) for _, unit in placed], dtype=torch.long).cumsum(0).tolist()
    fractions = tuple(fraction for fraction, _ in placed)
    return RemovalOrder(groups, tuple(unit for _, unit in placed), fractions, tuple(counts), limits)


def _removable(index: int, group: ChannelGroup, score: Tensor, limits: Limits, initial: int) -> list[Unit]:
    """Return the units of a group that may go, lowest score first; the best ones that must stay are left out."""
    if score.shape != (group.width,):
        raise ValueError(f"group {group.root}: scores of shape {tuple(score.shape)} for {group.width} channels")
    if not torch.isfinite(score).all():
        channel = int((~torch.isfinite(score)).nonzero()[0])
        raise ValueError(f"group {group.root}: the score of channel {channel} is {score[channel].item()}")
    blocks = score.detach().double().cpu().view(group.blocks, -1)
    means, order = blocks.mean(0).sort(stable=True)
    size = blocks.shape[1]
    stay = min(size, math.ceil(limits.fewest(initial) / group.blocks))
    if group.blocks > 1:
        stay = max(stay, min(size, 2))  # one channel a convolution group would make it depthwise: another layer type
    positions = order[: size - stay].tolist()
    channels = [tuple(block * size + position for block in range(group.blocks)) for position in positions]
    return [Unit(index, unit, mean) for unit, mean in zip(channels, means.tolist(), strict=False)]


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
    most = order.counts[-1] if order.counts else 0
    if not 0 <= channels <= most:
        raise ValueError(f"channels={channels}: from 0 to {most} channels can be removed within the limits")
    return order.plan(order.up_to_channels(channels))
