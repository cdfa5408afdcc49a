"""The figure of interactive pruning: what each group or layer keeps, and the scores of one group's channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from .cost_prediction import CostModel
from .groups import ChannelGroup
from .layers import LayerAxis
from .looks import COLORS, PALETTE, theme
from .plan import PruningPlan
from .plots import group_names

UPPER, SCORES = 0, 6
"""Which trace of `studio_figure` holds the upper bars, and which the scores; its ``customdata`` are the channels."""
CHANNELS = "channels"
BARS = (CHANNELS, "MACs", "parameters")
"""What the upper bars may show: the channels of groups, or what layers cost."""
LEAST_SHARE = 1e-3
MILLION = 1e6
MOST_BARS = 200
"""Channels up to which each is a bar of its own, with gaps between."""
PANELS = 350
"""Pixels of height of both panels together; names of groups stand between them."""
SILENT = {"hoverinfo": "skip"}


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


def studio_figure(shown: Bars, plan: PruningPlan, root: LayerAxis, score: Tensor, *, look: str = "light") -> go.Figure:
    """Draw what each group or layer keeps and loses, and below the scores of one group's channels, falling.

    Args:
        shown: the bars of the upper panel; another plan's are marked by diamonds.
        root: of the group whose channels are shown.
        score: of that group, shape (width,).
        look: "light" or "dark".

    Raises:
        ValueError: an unknown group or look.
    """
    gap = 40 + 5.4 * max(map(len, shown.names))
    height = PANELS + gap
    figure = make_subplots(2, 1, vertical_spacing=gap / height, row_heights=[0.55, 0.45])
    traces = studio_traces(shown, plan, root, score)
    for trace in traces[:3]:
        figure.add_bar(**trace, row=1, col=1)
    figure.add_scatter(**traces[3], row=1, col=1)
    for trace in traces[4:]:
        figure.add_scatter(**trace, row=2, col=1)
    figure.update_xaxes(title=shown.title, type="category", tickangle=-90, tickfont_size=9, row=1)
    figure.update_yaxes(title=shown.unit, row=1, col=1)
    figure.update_yaxes(title="score", exponentformat="power", row=2, col=1)
    # Margins that plotly has to measure make every drawing slower.
    figure.update_xaxes(automargin=False)
    figure.update_yaxes(automargin=False)
    figure.update_layout(template=theme(look), barmode="stack", bargap=0.15, hovermode="x", legend_traceorder="normal")
    figure.update_layout(height=height + 78, margin={"t": 30, "l": 64, "b": 48})
    figure.update_layout(studio_axes(root, score))
    return figure


def studio_axes(root: LayerAxis, score: Tensor) -> dict[str, Any]:
    """Return what the layout of `studio_figure` says of the group that is shown."""
    title = f"channels of {LayerAxis(*root)} by score; click one to keep or remove it"
    return {"xaxis2": {"title": {"text": title}}, "yaxis2": {"type": "log" if _is_wide(score) else "linear"}}


def _is_wide(score: Tensor) -> bool:
    """Say whether scores are drawn on a logarithmic axis."""
    return 0 < 30 * float(score.min()) < float(score.max())


def studio_traces(shown: Bars, plan: PruningPlan, root: LayerAxis, score: Tensor) -> list[dict[str, Any]]:
    """Return the properties of each trace of `studio_figure`, for a figure that is there already."""
    shared = {"x": shown.names}
    told = {"customdata": shown.notes, "hovertemplate": "%{customdata}<extra></extra>"}
    opacity = [1.0 if chosen else 0.7 for chosen in shown.chosen]
    bars = (
        ("kept", shown.now * ~shown.fixed, "kept"),
        ("removed", shown.whole - shown.now, "removed"),
        ("kept whole", shown.now * shown.fixed, "whole"),
    )
    traces = [
        shared | {"y": heights, "name": name, "marker": {"color": COLORS[color], "opacity": opacity, "line_width": 0}}
        for name, heights, color in bars
    ]
    traces = [traces[0] | told, *(trace | SILENT for trace in traces[1:])]
    traces[2]["showlegend"] = bool(shown.fixed.any())
    marks = [] if shown.marks is None else shown.marks
    marker = {"symbol": "diamond-open", "size": 8, "color": PALETTE[1], "line_width": 2}
    marked = {"x": shared["x"] if len(marks) else [], "y": marks, "name": "kept by the compared plan"}
    marked |= SILENT | {"mode": "markers", "marker": marker, "showlegend": bool(len(marks))}
    return [*traces, marked, *_score_bars(plan.kept_of(root), score)]


def _score_bars(kept: Sequence[int], score: Tensor) -> list[dict[str, Any]]:
    """Return all bars of one colour as one outline each, and a line without ink that tells and takes clicks.

    A bar trace draws an element a channel: a second for the 2048 channels of ResNet-50's last group.
    """
    order = score.argsort(descending=True, stable=True).numpy()
    heights, ranks = score.numpy()[order], np.arange(1, len(order) + 1)
    lowest, highest = heights[-1], heights[0]
    base = lowest * (lowest / highest) ** 0.05 if _is_wide(score) else 0.0
    half = 0.5 if len(order) > MOST_BARS else 0.42
    stays = np.isin(order, kept)
    shared = {"mode": "lines", "showlegend": False}
    bars = [
        shared | SILENT | _outline(ranks[part], heights[part], base, half) | {"fillcolor": COLORS[color]}
        for part, color in ((stays, "kept"), (~stays, "removed"))
    ]
    hover = {"customdata": order, "hovertemplate": "channel %{customdata}: %{y:.3e}<extra></extra>"}
    return [*bars, shared | hover | {"x": ranks, "y": heights, "line": {"width": 0}}]


def _outline(ranks: np.ndarray, heights: np.ndarray, base: float, half: float) -> dict[str, Any]:
    """Return the outline of bars side by side as one filled path along their base."""
    foot = np.full_like(heights, base)
    x = np.stack([ranks - half, ranks - half, ranks + half, ranks + half], 1).ravel()
    y = np.stack([foot, heights, heights, foot], 1).ravel()
    return {"x": x, "y": y, "fill": "toself", "line": {"width": 0}}
