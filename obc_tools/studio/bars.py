"""What stands in the upper panel of the studio's figure: what each group or layer keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..measure.costs import CostModel
from ..plots.plans import group_names
from ..pruning.plan import PruningPlan
from ..structure.groups import ChannelGroup
from ..structure.layers import LayerAxis

CHANNELS = "channels"
BARS = (CHANNELS, "MACs", "parameters")
"""What the upper bars may show: the channels of groups, or what layers cost."""
LEAST_SHARE = 1e-3
MILLION = 1e6


@dataclass(frozen=True)
class Bars:
    """What stands in the upper panel: for each bar its name, its heights, what it tells and the group it leads to.

    Attributes:
        names, title: of the bars, and of all of them.
        now, whole: heights of what a plan leaves and of what there was, shape (bars,).
        fixed: which bars cannot become lower, shape (bars,).
        notes: what is shown under the mouse.
        roots: the group whose channels a click shows; None where there is no single one that can be pruned.
        chosen: which bars belong to the group that is shown.
        marks: heights of another plan, or None.
        unit: of all heights.
    """

    names: list[str]
    title: str
    now: np.ndarray
    whole: np.ndarray
    fixed: np.ndarray
    notes: list[str]
    roots: list[LayerAxis | None]
    chosen: list[bool]
    marks: np.ndarray | None
    unit: str


def studio_bars(
    plan: PruningPlan,
    root: LayerAxis,
    *,
    bars: str = CHANNELS,
    costs: CostModel | None = None,
    compared: PruningPlan | None = None,
) -> Bars:
    """Return the bars of the upper panel: channels of groups, or MACs or parameters of layers.

    Args:
        root: of the group whose channels are shown below.
        bars: one of `BARS`.
        costs: what MACs and parameters are taken from; layers with less than a thousandth of all are left out.
        compared: another plan for the same groups.

    Raises:
        ValueError: unknown ``bars``, or ones that need ``costs``.
    """
    if bars == CHANNELS:
        return _channel_bars(plan, root, compared)
    if bars not in BARS or costs is None:
        raise ValueError(
            f"bars of {bars!r}; expected one of {', '.join(map(repr, BARS))}, all but the first with costs"
        )
    return _layer_bars(plan, root, bars, costs, compared)


def _channel_bars(plan: PruningPlan, root: LayerAxis, compared: PruningPlan | None) -> Bars:
    kept = np.array([len(channels) for channels in plan.kept])
    notes = [
        f"{group.root}: {count} of {group.width} channels kept"
        + (f"<br>{group.kept_whole}" if group.kept_whole else "")
        for group, count in zip(plan.groups, kept, strict=True)
    ]
    return Bars(
        names=group_names(plan),
        title="group (its first layer); click one to see its channels",
        now=kept,
        whole=np.array([group.width for group in plan.groups]),
        fixed=np.array([not group.prunable for group in plan.groups]),
        notes=notes,
        roots=[group.root if group.prunable else None for group in plan.groups],
        chosen=[group.root == root for group in plan.groups],
        marks=None if compared is None else np.array([len(channels) for channels in compared.kept]),
        unit=CHANNELS,
    )


def _layer_bars(
    plan: PruningPlan, root: LayerAxis, quantity: str, costs: CostModel, compared: PruningPlan | None
) -> Bars:
    whole, now = (costs.by_layer(of) for of in (PruningPlan.whole(plan.groups), plan))
    shown = whole[quantity] >= LEAST_SHARE * whole[quantity].sum()
    names, before, after = whole["layer"][shown], whole[quantity][shown], now[quantity][shown]
    groups = [_made_by(name, plan.groups) for name in names]
    return Bars(
        names=list(names),
        title="layer; click one to see the channels of its group",
        now=after.to_numpy() / MILLION,
        whole=before.to_numpy() / MILLION,
        fixed=np.zeros(len(names), dtype=bool),
        notes=[f"{n}: {a:,.0f} of {b:,.0f} {quantity}" for n, a, b in zip(names, after, before, strict=True)],
        roots=[group.root if group is not None and group.prunable else None for group in groups],
        chosen=[group is not None and group.root == root for group in groups],
        marks=None if compared is None else costs.by_layer(compared)[quantity][shown].to_numpy() / MILLION,
        unit=f"{quantity} (millions)",
    )


def _made_by(layer: str, groups: Sequence[ChannelGroup]) -> ChannelGroup | None:
    """Return the group of a layer's output channels, or the first one within a layer that counts as a whole."""
    out = LayerAxis(layer, "out")
    within = (group for group in groups if group.root.layer.startswith(f"{layer}."))
    return next((group for group in groups if any(m.axis == out for m in group.members)), next(within, None))
