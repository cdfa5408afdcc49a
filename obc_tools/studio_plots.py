"""The figure of interactive pruning: what each group keeps, and the scores of one group's channels."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from .layers import LayerAxis
from .looks import COLORS, theme
from .plan import PruningPlan
from .plots import group_names

SCORES = 4
"""Which trace of `studio_figure` holds the scores; its ``customdata`` are the channels."""


def studio_figure(
    plan: PruningPlan, root: LayerAxis, score: Tensor, *, compared: PruningPlan | None = None, look: str = "light"
) -> go.Figure:
    """Draw the channels that each group keeps and loses, and below the scores of one group's channels, falling.

    Args:
        root: of the group whose channels are shown.
        score: of that group, shape (width,).
        compared: another plan for the same groups; what it keeps is marked by diamonds.
        look: "light" or "dark".

    Raises:
        ValueError: an unknown group or look.
    """
    figure = make_subplots(2, 1, vertical_spacing=0.3, row_heights=[0.55, 0.45])
    traces = studio_traces(plan, root, score, compared=compared)
    for trace in traces[:3]:
        figure.add_bar(**trace, row=1, col=1)
    figure.add_scatter(**traces[3], row=1, col=1)
    figure.add_bar(**traces[SCORES], row=2, col=1)
    figure.update_xaxes(title="group (its first layer)", type="category", tickangle=-90, tickfont_size=9, row=1)
    figure.update_yaxes(title="channels", row=1, col=1)
    figure.update_yaxes(title="score", exponentformat="power", row=2, col=1)
    figure.update_layout(template=theme(look), barmode="stack", bargap=0.15, height=560, margin_t=30)
    figure.update_layout(studio_axes(root, score))
    return figure


def studio_axes(root: LayerAxis, score: Tensor) -> dict[str, Any]:
    """Return what the layout of `studio_figure` says of the group that is shown."""
    lowest, highest = float(score.min()), float(score.max())
    wide = lowest > 0 and highest > 30 * lowest
    title = f"channels of {LayerAxis(*root)} by score; click one to keep or remove it"
    return {"xaxis2": {"title": {"text": title}}, "yaxis2": {"type": "log" if wide else "linear"}}


def studio_traces(
    plan: PruningPlan, root: LayerAxis, score: Tensor, *, compared: PruningPlan | None = None
) -> list[dict[str, Any]]:
    """Return the properties of each trace of `studio_figure`, for a figure that is there already."""
    widths = np.array([group.width for group in plan.groups])
    kept = np.array([len(channels) for channels in plan.kept])
    whole = np.array([not group.prunable for group in plan.groups])
    notes = [
        f"{group.root}: {count} of {group.width} channels kept"
        + (f"<br>{group.kept_whole}" if group.kept_whole else "")
        for group, count in zip(plan.groups, kept, strict=True)
    ]
    shared = {"x": group_names(plan), "customdata": notes, "hovertemplate": "%{customdata}<extra></extra>"}
    opacity = [1.0 if group.root == root else 0.7 for group in plan.groups]
    bars = (
        ("kept", kept * ~whole, "kept"),
        ("removed", widths - kept, "removed"),
        ("kept whole", kept * whole, "whole"),
    )
    traces = [
        shared | {"y": heights, "name": name, "marker": {"color": COLORS[color], "opacity": opacity, "line_width": 0}}
        for name, heights, color in bars
    ]
    marks = [] if compared is None else [len(channels) for channels in compared.kept]
    marker = {"symbol": "diamond-open", "size": 8, "color": COLORS["ep"], "line_width": 1.5}
    marked = {"x": shared["x"] if marks else [], "y": marks, "name": "kept by the compared plan", "mode": "markers"}
    return [*traces, marked | {"marker": marker, "showlegend": bool(marks)}, _score_bars(plan, root, score)]


def _score_bars(plan: PruningPlan, root: LayerAxis, score: Tensor) -> dict[str, Any]:
    order = score.argsort(descending=True, stable=True).numpy()
    stays = np.isin(order, plan.kept_of(root))
    scale = [(0, COLORS["removed"]), (1, COLORS["kept"])]
    return {
        "x": np.arange(1, len(order) + 1),
        "y": score.numpy()[order],
        "customdata": order,
        "marker": {"color": stays.astype(int), "colorscale": scale, "cmin": 0, "cmax": 1, "line_width": 0},
        "hovertemplate": "channel %{customdata}: %{y:.3e}<extra></extra>",
        "showlegend": False,
    }
