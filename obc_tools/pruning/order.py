"""In which order channels go, given their scores, and plans from it: for a ratio, a number of channels, any target.

And how far pruning can go: the range of every target, before any scoring.
"""

from __future__ import annotations

import bisect
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ..errors import UnknownNameError, check_name, check_whole
from ..measure.costs import Cost, CostModel, Kept
from ..measure.latency import LatencyModel
from ..scoring.scores import Scores
from ..state import shapes
from ..structure.groups import ChannelGroup
from ..structure.layers import LayerAxis
from .choices import OPERATIONS, Limits, Reached, Selection, Target, values_of
from .plan import PlanMismatchError, PruningPlan, with_blocks

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, repr=False)
class RemovalOrder:
    """All removable units in the order in which they go; a unit is a channel, or the same position of every block.

    All arrays have the shape (units,). ``owners``: the index of each unit's group. ``positions``: of the unit within
    each block of its group. ``fractions[i]``: the share of the originally prunable channels (of the scope's pool) that
    is gone once units 0 to i are removed; it never falls. ``counts[i]``: the number of channels in units 0 to i.
    ``after``: the plan of earlier steps, for the same groups, whose kept channels are the present ones. ``fixed``: the
    kept channels of groups that are decided already, by root. ``hands``: the channels of groups, by their index, that
    are kept and that are removed whatever their place. ``best``: the positions that a group's limits keep, lowest score
    first, by its index.
    """

    groups: tuple[ChannelGroup, ...]
    owners: np.ndarray
    positions: np.ndarray
    fractions: np.ndarray
    counts: np.ndarray
    limits: Limits
    after: PruningPlan
    fixed: Mapping[LayerAxis, tuple[int, ...]]
    hands: Mapping[int, tuple[set[int], set[int]]] = field(default_factory=dict)
    best: Mapping[int, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.owners)

    def by_hand(self, hands: Mapping[LayerAxis, tuple[Iterable[int], Iterable[int]]]) -> RemovalOrder:
        """Return the order with single channels chosen by hand: those to keep and those to remove, by root.

        In a group of blocks the same position of every block goes along. Targets are met with them counted in, and
        groups keep what the limits say as far as there are other channels for it.
        """
        found = {}
        for root, chosen in hands.items():
            index = next((n for n, group in enumerate(self.after.groups) if group.root == LayerAxis.of(root)), None)
            if index is None:
                raise UnknownNameError("group", str(LayerAxis.of(root)), [str(group.root) for group in self.groups])
            keep, remove = (with_blocks(self.after.groups[index], channels) for channels in chosen)
            if both := keep & remove:
                raise PlanMismatchError(f"group {root}: channel {min(both)} is to be kept and to be removed")
            found[index] = (keep, remove)
        return replace(self._with_all(found), hands=found)

    def _with_all(self, indices: Iterable[int]) -> RemovalOrder:
        """Return the order in which what some groups would have kept whatever their scores goes last."""
        rest = [(np.full_like(self.best[index], index), self.best[index]) for index in indices if index in self.best]
        if not rest:
            return self
        owners, positions = (np.concatenate(parts) for parts in zip(*rest, strict=True))
        counts = np.concatenate([[0], self.counts])[-1] + np.cumsum([self.groups[n].blocks for n in owners], dtype=int)
        every = {"owners": owners, "positions": positions, "fractions": np.ones(len(owners)), "counts": counts}
        return replace(self, **{name: np.concatenate([getattr(self, name), more]) for name, more in every.items()})

    def up_to(self, fraction: float) -> int:
        """Return how many units go before more than `fraction` of the pool is gone."""
        return int(np.searchsorted(self.fractions, fraction + 1e-9, side="right"))

    def plan(self, units: int) -> PruningPlan:
        """Return the plan that removes the first `units` units too, kept counts rounded up to the limits' multiple."""
        return PruningPlan(self.after.groups, tuple(tuple(kept.tolist()) for kept in self.draft(units).kept))

    def reach(self, target: Target, costs: CostModel) -> PruningPlan:
        """Return the plan that meets a target, or else the one nearest to it: its ``reached`` says how far it gets.

        Raises ValueError where nothing may go.
        """
        self.check_prunable()
        plan, best = self.plan(self.meet(target, costs)), self._reached(self.least, target, costs)
        reached = replace(Reached.of(plan, costs, target), removed=self.share_gone(plan), met=target.met(*best))
        return replace(plan, reached=reached)

    def meet(self, target: Target, costs: CostModel, most: int | None = None) -> int:
        """Return the fewest units, in order and at most `most`, whose removal meets a target.

        A ratio is met from below: by the most units that do not pass it. All where none meets it: call `check` first.
        """
        if target.ratio is not None and not self.hands:
            return self.up_to(target.ratio)
        most = len(self) if most is None else most
        if target.ratio is not None:
            ratio = target.ratio + 1e-9
            above = bisect.bisect_right(range(most + 1), ratio, key=lambda units: self.share_gone(self.draft(units)))
            return max(0, above - 1)
        return bisect.bisect_left(range(most), True, key=lambda units: self.meets(units, target, costs))

    def meets(self, units: int, target: Target, costs: CostModel) -> bool:
        """Say whether the plan that removes the first `units` units meets a target."""
        return target.met(*self._reached(self.draft(units), target, costs))

    def check(self, target: Target, costs: CostModel) -> None:
        """Raise ValueError where nothing may go, or even all that may go would not meet a target: say the best."""
        self.check_prunable()
        best = self._reached(self.least, target, costs)
        if not target.met(*best):
            raise ValueError(f"{target} cannot be met: the best that can be had is {target.reached(*best)}")

    def check_prunable(self) -> None:
        """Raise ValueError where nothing may go: say why."""
        if not any(group.prunable for group in self.groups):
            reasons = "; ".join(sorted({f"{group.root}: {group.kept_whole}" for group in self.groups})[:5])
            raise ValueError(f"nothing can be pruned: {reasons or 'the model has no groups of channels'}")

    def draft(self, units: int) -> Kept:
        """Return what `plan` keeps, ascending, in the original numbering, unchecked: what a bisection needs."""
        counts = np.bincount(self.owners[:units], minlength=len(self.groups)).tolist()
        kept = []
        for group, count, channels, before in zip(self.groups, counts, self._channels, self._before, strict=True):
            stays = np.ones(group.width, dtype=bool)
            stays[channels[: self._rounded(group, count)]] = False
            kept.append(before[stays] if group.root not in self.fixed else np.array(self.fixed[group.root]))
        for index, hands in self.hands.items():
            kept[index] = self._by_hand(index, {*kept[index].tolist()}, *hands)
        return Kept(self.after.groups, tuple(kept))

    def _by_hand(self, index: int, kept: set[int], keep: set[int], remove: set[int]) -> np.ndarray:
        """Return what a group keeps, by hand too; for what its limits miss then, the last to go of others come back."""
        group, found, multiple = self.after.groups[index], (kept | keep) - remove, self.limits.round_to or 1
        fewest = max(group.least * group.blocks, self.limits.fewest(group.root, group.width), len(found))
        fewest = min(-(-fewest // multiple) * multiple, len(self._before[index]))
        for unit in self._before[index][self._channels[index][::-1]].tolist():
            if len(found) >= fewest:
                break
            if not remove.intersection(unit):
                found.update(unit)
        return np.array(sorted(found), dtype=np.int64)

    def _reached(self, draft: Kept, target: Target, costs: CostModel) -> tuple[Cost, Cost, float]:
        """Return a draft's cost, the original one, and the share that is gone of all channels that may go.

        Only what a target looks at is computed.
        """
        if target.ratio is None:
            return costs.of(draft), costs.original, 0.0
        return costs.original, costs.original, self.share_gone(draft)

    def share_gone(self, draft: Kept) -> float:
        """Return the share that is gone of all channels that may go."""
        counted = [
            (group.width, group.width - len(kept))
            for group, kept in zip(draft.groups, draft.kept, strict=True)
            if group.prunable and group.root not in self.fixed
        ]
        return sum(gone for _, gone in counted) / max(sum(w for w, _ in counted), 1)

    @cached_property
    def least(self) -> Kept:
        """What is kept where all goes that may."""
        return self.draft(len(self))

    @cached_property
    def _before(self) -> tuple[np.ndarray, ...]:
        return tuple(np.array(kept) for kept in self.after.kept)

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
    limits: Limits | None = None,
    *,
    after: PruningPlan | None = None,
    fixed: Mapping[LayerAxis, Iterable[int]] | None = None,
) -> RemovalOrder:
    """Order the removable channels of all prunable groups by score.

    Args:
        scores: the score of each channel of each group, shape (width,); low goes first.
        limits: what every group keeps, and which channels are ranked together.
        after: the plan of earlier steps, whose groups' widths are the original ones; that of no step by default.
        fixed: the kept channels of groups that are decided already, by root; they are neither ranked nor limited.

    Raises:
        ValueError: scores of another width, scores that are not finite, limits or fixed channels of a group that is
            not there.
    """
    if not isinstance(scores, Mapping) or not all(isinstance(group, ChannelGroup) for group in scores):
        raise ValueError("scores: expected a mapping from groups of channels to tensors, as score_groups returns it")
    groups = tuple(scores)
    limits, after = limits or Limits(), after or PruningPlan.whole(groups)
    held = {LayerAxis.of(root): tuple(kept) for root, kept in (fixed or {}).items()}
    known = [group.root for group in groups]
    if known != [group.root for group in after.groups]:
        raise ValueError("the scores are not those of the groups that the earlier plan leaves, in its order")
    for root in (*limits.max_ratio_of, *held):
        check_name("group", LayerAxis.of(root), known)
    after = _with_reasons(after, groups)
    start = {group.root: group.width for group in after.groups}
    pools: dict[object, list[int]] = defaultdict(list)
    sizes, best = np.array([group.blocks for group in groups]), {}
    found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
    for index, group in enumerate(groups):
        if group.prunable and group.root not in held:
            pools[_pool(group, limits)].append(index)
            positions, means, best[index] = _removable(group, scores[group], limits, start[group.root])
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
    owners, positions = owners[order], positions[order]
    counts = sizes[owners].cumsum()
    return RemovalOrder(groups, owners, positions, fractions[order], counts, limits, after, held, best=best)


def _with_reasons(after: PruningPlan, scored: Sequence[ChannelGroup]) -> PruningPlan:
    """Let a plan say why groups are kept whole that turned out so when they were scored; say it once in the log too."""
    found = list(after.groups)
    for index, (group, now, kept) in enumerate(zip(after.groups, scored, after.kept, strict=True)):
        if group.prunable and not now.prunable and len(kept) == group.width:
            found[index] = replace(group, kept_whole=now.kept_whole)
            logger.warning("group %s is kept whole: %s", group.root, now.kept_whole)
    return replace(after, groups=tuple(found)) if tuple(found) != after.groups else after


def _removable(
    group: ChannelGroup, score: Tensor, limits: Limits, initial: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the positions of a group that may go, lowest score first, their scores, and the best, which must stay.

    A score is the mean over the group's blocks.
    """
    if not isinstance(score, Tensor) or score.is_complex():
        raise ValueError(f"group {group.root}: scores are a tensor of real numbers, not {shapes(score)}")
    if score.shape != (group.width,):
        raise ValueError(f"group {group.root}: scores of shape {tuple(score.shape)} for {group.width} channels")
    if not torch.isfinite(score).all():
        channel = int((~torch.isfinite(score)).nonzero()[0])
        raise ValueError(f"group {group.root}: the score of channel {channel} is {score[channel].item()}")
    blocks = score.detach().double().cpu().view(group.blocks, -1)
    means, order = blocks.mean(0).sort(stable=True)
    size = blocks.shape[1]
    stay = min(size, math.ceil(limits.fewest(group.root, initial) / group.blocks))
    stay = max(stay, min(size, group.least))
    return order[: size - stay].numpy(), means[: size - stay].numpy(), order[size - stay :].numpy()


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
    A ratio is a bound: rounding (``round_to``) and the limits never remove more than asked. See `Limits` for ``scope``.

    Raises:
        ValueError: no target or two, a target out of range, or more channels than the limits allow to remove.
    """
    if (ratio is None) == (channels is None):
        raise ValueError("give one target: ratio= or channels=")
    order = removal_order(scores, Limits(min_channels, max_ratio, round_to, scope=scope))
    if ratio is not None:
        return order.plan(order.up_to(Target(ratio=ratio).ratio))
    most = int(order.counts[-1]) if len(order) else 0
    check_whole("channels", channels, 0)
    if channels > most:
        raise ValueError(f"channels={channels}: from 0 to {most} channels can be removed within the limits")
    return order.plan(int(np.searchsorted(order.counts, channels, side="right")))


def next_units(order: RemovalOrder, share: float, target: Target, costs: CostModel, last_step: str = "exact") -> int:
    """Return how many units the next step removes.

    They go until `share` of the channels prunable at the start is gone; where that would pass the target, only as many
    as it needs. With ``last_step="full"`` the whole share goes.
    """
    most = order.up_to(share)
    passes = last_step == "exact" and target.ratio is None and order.meets(most, target, costs)
    return order.meet(target, costs, most) if passes else most


def per_cost(scores: Scores, plan: PruningPlan, per: str | None, costs: CostModel | LatencyModel) -> Scores:
    """Divide the scores of what a plan leaves by what one channel of each group costs there, alone (see `Scoring`).

    Raises ValueError where latencies are asked for and not known.
    """
    if per is None:
        return scores
    now, saved = getattr(costs.of(plan), per), {}
    if now is None:
        raise ValueError("per='latency' needs a target that is one, for which layers are timed: latency_speedup=")
    for index, (group, kept) in enumerate(zip(plan.groups, plan.kept, strict=True)):
        if group.prunable and len(kept) > group.blocks:
            left = tuple(sorted({*kept} - with_blocks(group, kept[:1])))
            less = replace(plan, kept=(*plan.kept[:index], left, *plan.kept[index + 1 :]))
            saved[group.root] = now - getattr(costs.of(less), per)
    # What saves nothing, by what was measured, would go last, but not never.
    least = LEAST_SAVED * sum(saved.values()) / max(1, len(saved))
    gains = {group: max(saved.get(group.root, 0.0), least) or 1.0 for group in scores}
    left_out = scores.left_out and {group: table / gains[group] for group, table in scores.left_out.items()}
    return Scores({group: score / gains[group] for group, score in scores.items()}, scores.criterion, left_out)


def exchanged(scores: Scores, order: RemovalOrder, units: int) -> float:
    """Return the share of the first `units` units that other batches would be expected to exchange for others.

    With z how many standard errors the logarithm of a unit's score is away from the border between what goes and what
    stays, ½ Σ Φ(−|z|) / units: half of those that are on the wrong side are among the units. Errors are those of the
    jackknife over batches (Efron & Stein 1981). What scores zero is alike, whichever goes. Each pool of the scope has a
    border of its own.
    """
    values, left_out = np.empty(len(order)), np.empty((len(next(iter(scores.left_out.values()))), len(order)))
    pools: dict[object, list[int]] = defaultdict(list)
    for index, group in enumerate(order.groups):
        mine = np.flatnonzero(order.owners == index)
        for table, found in ((scores[group], values), (scores.left_out.get(group), left_out)):
            if len(mine):
                found[..., mine] = table.unflatten(-1, (group.blocks, -1)).mean(-2)[..., order.positions[mine]].numpy()
        pools[_pool(group, order.limits)] += mine.tolist()
    logs, others = (np.log(np.maximum(found, TINY)) for found in (values, left_out))
    errors = np.sqrt((len(others) - 1) * others.var(0))
    wrong = 0.0
    for members in map(np.array, pools.values()):
        goes = members < units
        if goes.all() or not goes.any():
            continue
        border = (logs[members[goes]].max() + logs[members[~goes]].min()) / 2
        away = np.abs(logs[members] - border)
        certain = (values[members] <= ZERO) | (errors[members] == 0)
        z = np.divide(away, errors[members], out=np.full(len(members), np.inf), where=~certain)
        wrong += torch.special.ndtr(-torch.from_numpy(z)).sum().item()
    return wrong / 2 / max(units, 1)


TINY, ZERO = 1e-300, 1e-30
LEAST_SAVED = 1e-3


def _pool(group: ChannelGroup, limits: Limits) -> object:
    """Return what the groups that are ranked together with this one have in common."""
    return {"global": "all", "local": group.root, "isomorphic": group.kind}[limits.scope]


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
    by_hand: Mapping[LayerAxis, tuple[Iterable[int], Iterable[int]]] | None = None,
    nearest: bool = False,
) -> PruningPlan:
    """Find the plan that removes the fewest of the lowest-scored channels such that a target is met.

    Unlike `prune_to` nothing is scored again on the way. Give one target.

    Args:
        scores: what `score_groups` gives, low goes first.
        costs: the model's `cost_model`.
        ratio: share in (0, 1) of the channels of all prunable groups that are not fixed.
        speedup, macs, params: original MACs over the pruned model's; MACs of one example; parameters.
        scope: "global", "local" or "isomorphic" (see `Limits`).
        round_to, min_channels, max_ratio: what every group keeps (see `Limits`).
        max_ratio_of: another ``max_ratio`` for single groups, by root (layer, axis); 0 keeps a group whole.
        fixed: the kept channels of groups that are decided already, by root; they are neither ranked nor limited.
        by_hand: channels to keep and channels to remove whatever their scores, a pair by root; the target is met with
            them counted in.
        nearest: a target that cannot be met leads to the plan nearest to it, whose ``reached`` says how far it gets.

    Raises:
        ValueError: no target or several, without ``nearest`` one that cannot be met (says the best that can be had), a
            group that is not there, or what `removal_order` raises.
    """
    limits = Limits(min_channels, max_ratio, round_to, max_ratio_of or {}, scope)
    target, order = Target(speedup, macs, params, ratio), removal_order(scores, limits, fixed=fixed)
    order = order.by_hand(by_hand or {})
    if not nearest:
        order.check(target, costs)
    return order.reach(target, costs)


@dataclass(frozen=True, repr=False)
class Reach:
    """What every target can be, from nothing removed to all that may go.

    Attributes:
        original, least: the cost of the whole network, and where all goes that may.
        ratio: the share of the prunable channels that goes then.
    """

    original: Cost
    least: Cost
    ratio: float

    def of(self, kind: str) -> tuple[float, float]:
        """Return the first and the last value of a kind of target: "speedup", "macs", "params" or "ratio"."""
        return tuple(self.to_frame().set_index("target").loc[kind])

    def to_frame(self) -> pd.DataFrame:
        """Return one row a kind of target: its value "from" where nothing goes "to" where all goes that may."""
        first, last = self.original, self.least
        rows = [
            ("speedup", 1.0, first.macs / last.macs),
            ("macs", first.macs, last.macs),
            ("params", first.params, last.params),
            ("ratio", 0.0, self.ratio),
        ]
        return pd.DataFrame(rows, columns=["target", "from", "to"])

    def __repr__(self) -> str:
        return self.to_frame().to_string(index=False, float_format="{:,.4g}".format)

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(index=False, float_format="{:,.4g}".format)


def reachable(model: nn.Module, example_inputs: Any, *, counting: str = OPERATIONS, **settings: Any) -> Reach:
    """Say how far a network can be pruned, in every kind of target at once; nothing is scored.

    Args:
        model: left unchanged.
        example_inputs: what one forward pass takes; MACs are counted for one example of it.
        counting: what MACs are, as in `prune_to`.
        settings: the keywords of `prune_to` that say what may go and what every group keeps: ignore, whole_heads,
            only, round_to, max_ratio, min_channels, scope.

    Raises:
        ValueError: an unknown setting, one out of range, nothing that can be pruned.
    """
    selection, limits = values_of(settings, Selection, Limits)
    return reach_of(*selection.analyse(model, example_inputs, counting), limits)


def reach_of(groups: Iterable[ChannelGroup], costs: CostModel, limits: Limits) -> Reach:
    """Return how far groups can be pruned within limits."""
    order = unscored(groups, limits)
    order.check_prunable()
    return Reach(costs.original, costs.of(order.least), order.share_gone(order.least))


def check_reachable(target: Target, whole: PruningPlan, limits: Limits, costs: CostModel) -> None:
    """Raise ValueError, before any scoring, where even all that the limits allow to go would not meet a target.

    The log says which operations a target of MACs leaves out, for want of a formula.
    """
    if costs.original.unknown and target.given[0] in ("speedup", "macs"):
        logger.warning("%s: MACs leave out %s, which has no formula", target, ", ".join(costs.original.unknown))
    unscored(whole.groups, limits).check(target, costs)


def unscored(groups: Iterable[ChannelGroup], limits: Limits) -> RemovalOrder:
    """Return an order of removal of groups that are not scored, for what does not depend on scores."""
    return removal_order({group: torch.zeros(group.width) for group in groups}, limits)
