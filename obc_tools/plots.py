"""Every figure of the library, as a plain function returning a plotly figure.

All share one look (see `looks`), "light" or "dark". Heatmaps and lines name no background, so that a figure changes its
look with its template.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from .dense import DenseJTJ, GroupBlock, GroupJTJ, pool_cells
from .history import History
from .interactions import FilterInteractions
from .layers import UnknownNameError
from .looks import COLORS, color_of, theme
from .plan import PruningPlan

MODES = ("absolute", "signed", "correlation")

CELLS = 64
"""Cells a side of a small heatmap; a larger JᵀJ is pooled to as many."""
LARGE_CELLS = 384
"""The same of a large heatmap; it takes about 0.8 MB then."""


def jtj_grid(
    dense: DenseJTJ,
    columns: int = 4,
    mode: str = "absolute",
    *,
    shared_scale: bool = False,
    look: str = "light",
) -> go.Figure:
    """Draw the JᵀJ of each channel as a small heatmap, with the channel and its score above it.

    Args:
        columns: heatmaps side by side.
        mode: "absolute", |JᵀJ|; "signed", JᵀJ; or "correlation", (JᵀJ)_ij / √((JᵀJ)_ii (JᵀJ)_jj).
        shared_scale: colour all channels by one scale; by default each by its own largest entry, which shows the
            pattern of weak channels too. Correlations always share the scale from −1 to 1.
        look: "light" or "dark".

    Raises:
        ValueError: an unknown mode or look, or no column.
    """
    if columns < 1:
        raise ValueError(f"columns={columns}: expected at least 1")
    count = len(dense.channels)
    columns = min(columns, count)
    grid_rows = math.ceil(count / columns)
    values, names = _display(dense.values, dense.labels, mode, CELLS)
    relative = mode != "correlation" and not shared_scale
    colors = _relative(values) if relative else values
    titles = [f"{c}: {s:.2e}" if s else f"{c}: 0" for c, s in zip(dense.channels, dense.score.tolist(), strict=True)]
    gap = {"horizontal_spacing": 0.1 / columns, "vertical_spacing": 0.14 / grid_rows}
    figure = make_subplots(grid_rows, columns, subplot_titles=titles, **gap)
    for index, (color, value) in enumerate(zip(colors, values, strict=True)):
        heatmap = _heatmap(color, value if relative else color, names, f"channel {dense.channels[index]}")
        figure.add_trace(heatmap, index // columns + 1, index % columns + 1)
    bare = {"showticklabels": False, "ticks": "", "showgrid": False, "showline": True, "mirror": True}
    figure.update_xaxes(constrain="domain", type="category", **bare)
    figure.update_yaxes(constrain="domain", constraintoward="top", type="category", autorange="reversed", **bare)
    for number in range(1, count + 1):
        suffix = "" if number == 1 else str(number)
        figure.layout[f"yaxis{suffix}"].update(scaleanchor=f"x{suffix}")
    unit = "share of the channel's largest" if relative else _unit(mode)
    d = len(dense.labels)
    title = f"{_matrix(dense, mode)} of {dense.axis}: {count} channels, {d} × {d}"
    title += "<br><sub>above each: channel and score wᵀJᵀJw</sub>"
    figure.update_layout(
        template=theme(look), height=110 + 210 * grid_rows, margin_t=88, title=title, coloraxis=_coloraxis(mode, unit)
    )
    figure.update_annotations(font_size=11)
    return figure


def jtj_heatmap(dense: DenseJTJ, channel: int, mode: str = "absolute", *, look: str = "light") -> go.Figure:
    """Draw the JᵀJ of one channel; see `jtj_grid` for the modes. More than 384 parameters a side are pooled.

    Raises:
        ValueError: a channel that `dense` does not hold, an unknown mode or look.
    """
    index = dense.index_of(channel)
    values, names = _display(dense.values[index][None], dense.labels, mode, LARGE_CELLS)
    figure = go.Figure(_heatmap(values[0], values[0], names, f"channel {channel}"))
    ticks = names[:: math.ceil(len(names) / 27)]
    _square(figure, {"tickvals": ticks, "title": "parameter"})
    facts = f"score {dense.score[index]:.3e}, off-diagonal share {dense.offdiagonal_share[index]:.0%}"
    title = f"{_matrix(dense, mode)} of {dense.axis}, channel {channel}<br><sub>{facts}, "
    title += f"effective rank {dense.effective_rank[index]:.1f}</sub>"
    figure.update_layout(template=theme(look), height=620, title=title, coloraxis=_coloraxis(mode, _unit(mode)))
    return figure


def group_jtj_heatmap(group: GroupJTJ, mode: str = "absolute", *, look: str = "light") -> go.Figure:
    """Draw JᵀJ over all members of one channel of a group, the members' borders drawn and labelled.

    More than 384 parameters a side are pooled, each member by itself. Raises ValueError for an unknown mode or look.
    """
    cells = _cells_of_blocks(group.members, LARGE_CELLS)
    values = pool_cells(_in_mode(group.values[None], mode), cells)[0].float().numpy(force=True)
    names = _names(group.labels, cells)
    starts = [int(cells[block.start]) for block in group.members] + [len(names)]
    figure = go.Figure(_heatmap(values, values, names, str(group.group.root)))
    _square(figure, _member_ticks(group, starts, names))
    lines = [{"type": "line", "xref": "x", "yref": "y", "opacity": 0.35} for _ in range(2 * (len(starts) - 2))]
    for (start, end), border in zip(itertools.product(starts[1:-1], "xy"), lines, strict=True):
        other = "y" if end == "x" else "x"
        border |= {f"{end}0": start - 0.5, f"{end}1": start - 0.5, f"{other}0": -0.5, f"{other}1": len(names) - 0.5}
    facts = f"score {group.score:.3e} over the members, {group.coupled_score:.3e} with their cross terms"
    title = f"{_NAMES[mode]} of group {group.group.root}, channel {group.channel}<br><sub>{facts}</sub>"
    coloraxis = _coloraxis(mode, _unit(mode))
    figure.update_layout(template=theme(look), height=760, title=title, coloraxis=coloraxis, shapes=lines)
    return figure


def interactions_heatmap(
    interactions: FilterInteractions, order: str = "cluster", mode: str = "correlation", *, look: str = "light"
) -> go.Figure:
    """Draw the interactions K of a layer's channels.

    Args:
        order: "cluster", "score" (falling) or "channel".
        mode: "correlation", "signed" or "absolute".

    Raises:
        ValueError: an unknown order, mode or look.
    """
    chosen = range(len(interactions.values)) if order == "channel" else interactions.order(order)
    shown = interactions.correlation if mode == "correlation" else _in_mode(interactions.values[None], mode)[0]
    values = shown[list(chosen)][:, list(chosen)].numpy()
    figure = go.Figure(_heatmap(values, values, [str(channel) for channel in chosen], str(interactions.axis)))
    _square(figure, {"title": f"channel, ordered by {order}"})
    name = {"absolute": "|K|", "signed": "K", "correlation": "Correlation of K"}[mode]
    unit = {"correlation": "correlation"}.get(mode, "loss²")
    title = f"{name} of {interactions.axis}<br><sub>K_ij = Σ (J w_i)(J w_j): below 0 the two cancel</sub>"
    figure.update_layout(template=theme(look), height=620, title=title, coloraxis=_coloraxis(mode, unit))
    return figure


def spectrum(dense: DenseJTJ, *, look: str = "light") -> go.Figure:
    """Draw the eigenvalues of each channel's JᵀJ as shares of their sum, largest first, on a logarithmic axis."""
    values = dense.eigenvalues
    shares = values / values.sum(1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    figure = go.Figure()
    ranks = dense.effective_rank.tolist()
    for channel, share, rank in zip(dense.channels, shares, ranks, strict=True):
        name = f"channel {channel}, effective rank {rank:.1f}"
        hover = f"{name}<br>eigenvalue %{{x}}: %{{y:.2e}} of the sum<extra></extra>"
        seen = share[share > 1e-12].numpy()
        x = np.arange(1, len(seen) + 1)
        figure.add_scatter(x=x, y=seen, name=name, mode="lines", line_width=1.4, opacity=0.8, hovertemplate=hover)
    figure.update_xaxes(title="eigenvalue, largest first")
    figure.update_yaxes(title="share of the sum of eigenvalues", type="log", exponentformat="power", dtick=2)
    title = f"Spectra of JᵀJ of {dense.axis}: {len(dense.channels)} channels"
    figure.update_layout(template=theme(look), height=420, title=title, showlegend=False)
    return figure


def plot_plan(plan: PruningPlan, *, look: str = "light") -> go.Figure:
    """Draw how many channels of each group stay and go; groups that are kept whole in a paler colour."""
    names = group_names(plan)
    kept = np.array([len(channels) for channels in plan.kept])
    widths = np.array([group.width for group in plan.groups])
    whole = np.array([not group.prunable for group in plan.groups])
    notes = [
        f"{group.root}: {len(channels)} of {group.width} channels kept ({len(channels) / group.width:.0%}), "
        f"{len(group.members)} members" + (f"<br>{group.kept_whole}" if group.kept_whole else "")
        for group, channels in zip(plan.groups, plan.kept, strict=True)
    ]
    figure = go.Figure()
    bars = (
        ("kept", kept * ~whole, "kept"),
        ("removed", widths - kept, "removed"),
        ("kept whole", kept * whole, "whole"),
    )
    for name, heights, color in bars:
        if heights.any():
            hover = {"customdata": notes, "hovertemplate": "%{customdata}<extra></extra>"}
            figure.add_bar(x=names, y=heights, name=name, marker={"color": COLORS[color], "line_width": 0}, **hover)
    figure.update_xaxes(title="group (its first layer)", tickangle=-90, type="category", tickfont_size=9)
    figure.update_yaxes(title="channels")
    gone, channels = plan.channels_removed, plan.channels
    title = f"Channels by group: {gone:,} of {channels:,} prunable channels removed"
    figure.update_layout(
        template=theme(look), barmode="stack", bargap=0.2, height=420, title=title, legend_traceorder="normal"
    )
    return figure


def plot_histories(histories: Mapping[str, History], *, look: str = "light") -> go.Figure:
    """Draw loss and accuracy of several trainings over the epochs: validation solid, training dotted.

    Raises:
        ValueError: no history, or an unknown look.
    """
    if not histories:
        raise ValueError("no history to draw: give {'name': history}")
    figure = make_subplots(1, 2, subplot_titles=("Loss", "Accuracy"), horizontal_spacing=0.1)
    for index, (label, history) in enumerate(histories.items()):
        frame = history.to_frame()
        for part, name, dash in (("val", "validation", "solid"), ("train", "training", "dot")):
            style = {"color": color_of(label, index), "dash": dash, "width": 2 if part == "val" else 1.4}
            shared = {"x": frame["epoch"], "name": f"{label}, {name}", "legendgroup": f"{label} {part}", "line": style}
            shared["mode"] = "lines+markers" if len(frame) <= 20 else "lines"
            shared["marker"] = {"size": 5}
            figure.add_scatter(y=frame[f"{part}_loss"], hovertemplate="%{y:.4f}", **shared, row=1, col=1)
            percent = 100 * frame[f"{part}_accuracy"]
            figure.add_scatter(y=percent, hovertemplate="%{y:.2f} %", showlegend=False, **shared, row=1, col=2)
    figure.update_xaxes(title="epoch", rangemode="tozero")
    figure.update_yaxes(title="cross entropy (nats)", row=1, col=1)
    figure.update_yaxes(title="accuracy (%)", row=1, col=2)
    figure.update_annotations(font_size=12)
    figure.update_layout(template=theme(look), height=400, hovermode="x unified", legend_y=1.1)
    return figure


def save_html(figure: go.Figure, path: str | Path) -> Path:
    """Write a figure as one HTML file that needs no network, plotly.js included (about 5 MB); return its path."""
    path = Path(path)
    page = figure.to_html(include_plotlyjs=True, config={"responsive": True, "displaylogo": False})
    path.write_text(page, encoding="utf-8")
    return path


def save_png(figure: go.Figure, path: str | Path, width: int = 1000, height: int | None = None) -> Path:
    """Write a figure as a PNG of `width` pixels, twice as fine; return its path. Needs the package kaleido.

    Raises:
        ValueError: kaleido is not installed.
    """
    if importlib.util.find_spec("kaleido") is None:
        raise ValueError("a PNG needs the package kaleido (pip install kaleido); save_html does without")
    figure.write_image(path, format="png", width=width, height=height or figure.layout.height, scale=2)
    return Path(path)


_NAMES = {"absolute": "|JᵀJ|", "signed": "JᵀJ", "correlation": "Correlation of JᵀJ"}


def _matrix(dense: DenseJTJ, mode: str) -> str:
    return _NAMES[mode] if dense.pool is None else f"{_NAMES[mode]} by {dense.pool}"


def _unit(mode: str) -> str:
    return "correlation" if mode == "correlation" else "loss² per weight²"


def _in_mode(values: Tensor, mode: str) -> Tensor:
    """Return matrices (n, d, d) as a mode shows them."""
    if mode not in MODES:
        raise UnknownNameError("mode", mode, MODES)
    if mode == "absolute":
        return values.abs()
    if mode == "signed":
        return values
    scale = values.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale, 0)
    return (values * inverse[:, :, None] * inverse[:, None]).clamp(-1, 1)


def _display(values: Tensor, labels: Sequence[str], mode: str, most: int) -> tuple[np.ndarray, list[str]]:
    """Return matrices in a mode, pooled to at most `most` cells a side, and the name of each cell."""
    values, d = _in_mode(values, mode), len(labels)
    cells = torch.arange(d) * min(most, d) // d
    if d > most:
        values = pool_cells(values, cells)
    return values.float().numpy(force=True), _names(labels, cells)


def _names(labels: Sequence[str], cells: Tensor) -> list[str]:
    """Name each cell by its first parameter, and say how many it holds when they are several."""
    counts = torch.bincount(cells).tolist()
    starts = itertools.accumulate(counts[:-1], initial=0)
    named = ((labels[start], count) for start, count in zip(starts, counts, strict=True))
    return [label if count == 1 else f"{label} + {count - 1}" for label, count in named]


def _cells_of_blocks(blocks: Sequence[GroupBlock], most: int) -> Tensor:
    """Cut each block into cells of equal size, about `most` in all, none across a border."""
    factor = max(1, math.ceil(blocks[-1].stop / most))
    cells, first = [], 0
    for block in blocks:
        inside = torch.arange(block.stop - block.start) // factor
        cells.append(first + inside)
        first += int(inside[-1]) + 1
    return torch.cat(cells)


def _short(block: GroupBlock, group: GroupJTJ) -> str:
    several = sum(other.axis == block.axis for other in group.members) > 1
    return str(block) if several else str(block.axis)


def _member_ticks(group: GroupJTJ, starts: Sequence[int], names: Sequence[str]) -> dict[str, list[str]]:
    """Name the members at their centres, but those too close to the name before."""
    ticks, last = {}, -math.inf
    for block, (start, stop) in zip(group.members, itertools.pairwise(starts), strict=True):
        centre = (start + stop) // 2
        if centre - last >= len(names) / 55:
            ticks[names[centre]], last = _short(block, group), centre
    return {"tickvals": list(ticks), "ticktext": list(ticks.values())}


def _relative(values: np.ndarray) -> np.ndarray:
    largest = np.abs(values).max(axis=(1, 2), keepdims=True)
    return values / np.where(largest > 0, largest, 1)


def _heatmap(colors: np.ndarray, values: np.ndarray, names: Sequence[str], title: str) -> go.Heatmap:
    """Return a heatmap coloured by one matrix whose hover tells the values of another, where they differ."""
    extra, shown = ({}, "z") if colors is values else ({"customdata": values}, "customdata")
    hover = f"{title}<br>%{{y}}<br>%{{x}}<br>%{{{shown}:.3e}}<extra></extra>"
    return go.Heatmap(z=colors, x=names, y=names, coloraxis="coloraxis", hovertemplate=hover, **extra)


def _coloraxis(mode: str, unit: str) -> dict:
    title = {"text": unit, "side": "right"}
    limits = {"absolute": {"cmin": 0}, "signed": {"cmid": 0}, "correlation": {"cmin": -1, "cmax": 1}}[mode]
    return limits | {"colorbar": {"title": title, "exponentformat": "power"}}


def _square(figure: go.Figure, axis: Mapping) -> None:
    """Make the plot square, its first row on top."""
    figure.update_xaxes(type="category", showgrid=False, constrain="domain", **axis)
    figure.update_yaxes(type="category", showgrid=False, constrain="domain", **axis)
    figure.update_xaxes(tickangle=-90)
    figure.update_yaxes(autorange="reversed", scaleanchor="x")


def group_names(plan: PruningPlan) -> list[str]:
    """Name each group by the layer of its root, and by the whole root where two share a layer."""
    layers = [group.root.layer for group in plan.groups]
    return [g.root.layer if layers.count(g.root.layer) == 1 else str(g.root) for g in plan.groups]
