"""The figure of interactive pruning: what each group or layer keeps, and the scores of one group's channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from .looks import COLORS, PALETTE, theme

UPPER, SCORES = 0, 6
"""Which trace of `studio_figure` holds the upper bars, and which the scores; its ``customdata`` are the channels."""
MOST_BARS = 200
"""Channels up to which each is a bar of its own, with gaps between."""
PANELS = 350
"""Pixels of height of both panels together; names of groups stand between them."""
SILENT = {"hoverinfo": "skip"}


def studio_figure(shown: Any, kept: Sequence[int], root: str, score: Tensor, *, look: str = "light") -> go.Figure:
    """Draw what each group or layer keeps and loses, and below the scores of one group's channels, falling.

    Args:
        shown: the `Bars` of the upper panel; another plan's are marked by diamonds.
        kept: channels of the shown group that stay.
        root: the name of that group.
        score: of that group, shape (width,).
        look: "light" or "dark".

    Raises:
        ValueError: an unknown look.
    """
    gap = 40 + 5.4 * max(map(len, shown.names))
    height = PANELS + gap
    figure = make_subplots(2, 1, vertical_spacing=gap / height, row_heights=[0.55, 0.45])
    traces = studio_traces(shown, kept, score)
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


def studio_axes(root: str, score: Tensor) -> dict[str, Any]:
    """Return what the layout of `studio_figure` says of the group that is shown."""
    title = f"channels of {root} by score; click one to keep or remove it"
    return {"xaxis2": {"title": {"text": title}}, "yaxis2": {"type": "log" if _is_wide(score) else "linear"}}


def _is_wide(score: Tensor) -> bool:
    """Say whether scores are drawn on a logarithmic axis."""
    return 0 < 30 * float(score.min()) < float(score.max())


def studio_traces(shown: Any, kept: Sequence[int], score: Tensor) -> list[dict[str, Any]]:
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
    return [*traces, marked, *_score_bars(kept, score)]


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
