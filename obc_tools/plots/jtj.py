"""Figures of JᵀJ, of interactions between filters, of spectra, and of filters themselves.

All share one look (see `looks`), "light" or "dark". Heatmaps and lines name no background, so that a figure changes its
look with its template.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from torch import Tensor
from torchvision.utils import make_grid

from ..errors import check_name
from .looks import color_axis, counted, finished

MODES = ("absolute", "signed", "correlation")

CELLS = 64
"""Cells a side of a small heatmap; a larger JᵀJ is pooled to as many."""
LARGE_CELLS = 384
"""The same of a large heatmap; it takes about 0.8 MB then."""
UNIT = "loss² per weight²"
BARE = {"showticklabels": False, "ticks": "", "showgrid": False, "constrain": "domain"}


def jtj_grid(
    dense: Any,
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
    rows = math.ceil(count / columns)
    values, names = _display(dense.values, dense.labels, mode, CELLS)
    relative = mode != "correlation" and not shared_scale
    largest = np.abs(values).max(axis=(1, 2), keepdims=True)
    colors = values / np.where(largest > 0, largest, 1) if relative else values
    titles = [f"{c}: {s:.2e}" if s else f"{c}: 0" for c, s in zip(dense.channels, dense.score.tolist(), strict=True)]
    heatmaps = [
        _heatmap(value, names, f"channel {channel}", color if relative else None)
        for channel, color, value in zip(dense.channels, colors, values, strict=True)
    ]
    gaps = (0.1 / columns, 0.14 / rows)
    figure = _panels(heatmaps, titles, columns, gaps=gaps, size=11, showline=True, mirror=True)
    unit = "share of the channel's largest" if relative else UNIT
    d = len(dense.labels)
    title = f"{_matrix(dense, mode)} of {dense.axis}: {counted(count, 'channel')}, {d} × {d}"
    title += "<br><sub>above each: channel and score wᵀJᵀJw</sub>"
    layout = {"title": title, "margin_t": 88, "coloraxis": _coloraxis(mode, unit)}
    return finished(figure, look, 110 + 210 * rows, **layout)


def _panels(
    heatmaps: Sequence[go.Heatmap],
    titles: Sequence[str],
    columns: int,
    *,
    gaps: tuple[float, float] = (0.1, 0.15),
    size: int = 16,
    **axis: Any,
) -> go.Figure:
    """Return square heatmaps side by side, without ticks, each under its title.

    Written as one layout, since plotly takes ten times as long to change that of many panels step by step.

    Args:
        gaps: between columns and rows, as shares of the figure.
        size: of the titles.
        axis: what all axes have in common besides.
    """
    rows = math.ceil(len(heatmaps) / columns)
    wide, high = ((1 - gap * (count - 1)) / count for gap, count in zip(gaps, (columns, rows), strict=True))
    layout: dict[str, Any] = {"annotations": []}
    for index, (heatmap, title) in enumerate(zip(heatmaps, titles, strict=True)):
        x, y = (f"{name}{index + 1 if index else ''}" for name in "xy")
        left, top = index % columns * (wide + gaps[0]), 1 - index // columns * (high + gaps[1])
        across = {"domain": (left, min(left + wide, 1)), "anchor": y}
        down = {"domain": (max(top - high, 0), top), "anchor": x, "scaleanchor": x, "constraintoward": "top"}
        layout[x.replace("x", "xaxis")] = {"type": "category", **BARE, **axis, **across}
        layout[y.replace("y", "yaxis")] = {"type": "category", "autorange": "reversed", **BARE, **axis, **down}
        place = {"x": left + wide / 2, "y": top, "xref": "paper", "yref": "paper"}
        words = {"text": title, "showarrow": False, "font": {"size": size}, "xanchor": "center", "yanchor": "bottom"}
        layout["annotations"].append(words | place)
        heatmap.update(xaxis=x, yaxis=y)
    return go.Figure(heatmaps, layout)


def jtj_heatmap(dense: Any, channel: int, mode: str = "absolute", *, look: str = "light") -> go.Figure:
    """Draw the JᵀJ of one channel; see `jtj_grid` for the modes. More than 384 parameters a side are pooled.

    Raises:
        ValueError: a channel that `dense` does not hold, an unknown mode or look.
    """
    index = dense.index_of(channel)
    values, names = _display(dense.values[index][None], dense.labels, mode, LARGE_CELLS)
    axis = {"tickvals": names[:: math.ceil(len(names) / 27)], "title": "parameter"}
    facts = f"score {dense.score[index]:.3e}, off-diagonal share {dense.offdiagonal_share[index]:.0%}"
    title = f"{_matrix(dense, mode)} of {dense.axis}, channel {channel}<br><sub>{facts}, "
    title += f"effective rank {dense.effective_rank[index]:.1f}</sub>"
    heatmap = _heatmap(values[0], names, f"channel {channel}")
    return _square(heatmap, axis, look, title=title, coloraxis=_coloraxis(mode))


def group_jtj_heatmap(group: Any, mode: str = "absolute", *, look: str = "light") -> go.Figure:
    """Draw JᵀJ over all members of one channel of a group, the members' borders drawn and labelled.

    More than 384 parameters a side are pooled, each member by itself. Raises ValueError for an unknown mode or look.
    """
    cells = _cells_of_blocks(group.members, LARGE_CELLS)
    values = pool_cells(_in_mode(group.values[None], mode), cells)[0].float().numpy(force=True)
    names = _names(group.labels, cells)
    starts = [int(cells[block.start]) for block in group.members] + [len(names)]
    ends = {"0": -0.5, "1": len(names) - 0.5}
    line = {"type": "line", "xref": "x", "yref": "y", "opacity": 0.35}
    lines = [
        {**line, f"{across}0": start - 0.5, f"{across}1": start - 0.5}
        | {f"{along}{end}": place for end, place in ends.items()}
        for start in starts[1:-1]
        for across, along in ("xy", "yx")
    ]
    facts = f"score {group.score:.3e} over the members, {group.coupled_score:.3e} with their cross terms"
    title = f"{_NAMES[mode]} of group {group.group.root}, channel {group.channel}<br><sub>{facts}</sub>"
    layout = {"title": title, "coloraxis": _coloraxis(mode), "shapes": lines}
    heatmap = _heatmap(values, names, str(group.group.root))
    return _square(heatmap, _member_ticks(group, starts, names), look, height=760, **layout)


def interactions_heatmap(
    interactions: Any, order: str = "cluster", mode: str = "correlation", *, look: str = "light"
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
    name = {"absolute": "|K|", "signed": "K", "correlation": "Correlation of K"}[mode]
    coloraxis = _coloraxis(mode, "loss²")
    title = f"{name} of {interactions.axis}<br><sub>K_ij = Σ (J w_i)(J w_j): below 0 the two cancel</sub>"
    heatmap = _heatmap(values, [str(channel) for channel in chosen], str(interactions.axis))
    return _square(heatmap, {"title": f"channel, ordered by {order}"}, look, title=title, coloraxis=coloraxis)


def spectrum(dense: Any, *, look: str = "light") -> go.Figure:
    """Draw the eigenvalues of each channel's JᵀJ as shares of their sum, largest first, on a logarithmic axis.

    A spectrum ends at the numerical rank: what is less than d times the rounding of the largest is rounding.
    """
    values = dense.eigenvalues
    shares = values / values.sum(1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    figure = go.Figure()
    ranks, rounding = dense.effective_rank.tolist(), torch.finfo(dense.values.dtype).eps * values.shape[1]
    for channel, share, rank in zip(dense.channels, shares, ranks, strict=True):
        name = f"channel {channel}, effective rank {rank:.1f}"
        hover = f"{name}<br>eigenvalue %{{x}}: %{{y:.2e}} of the sum<extra></extra>"
        seen = share[share > rounding * share[0]].numpy()
        x = np.arange(1, len(seen) + 1)
        figure.add_scatter(x=x, y=seen, name=name, mode="lines", line_width=1.4, opacity=0.8, hovertemplate=hover)
    x = {"title": "eigenvalue, largest first"}
    y = {"title": "share of the sum of eigenvalues", "type": "log", "exponentformat": "power", "dtick": 2}
    title = f"Spectra of JᵀJ of {dense.axis}: {counted(len(dense.channels), 'channel')}"
    return finished(figure, look, 420, x=x, y=y, title=title, showlegend=False)


_NAMES = {"absolute": "|JᵀJ|", "signed": "JᵀJ", "correlation": "Correlation of JᵀJ"}


def _matrix(dense: Any, mode: str) -> str:
    return _NAMES[mode] if dense.pool is None else f"{_NAMES[mode]} by {dense.pool}"


def _in_mode(values: Tensor, mode: str) -> Tensor:
    """Return matrices (n, d, d) as a mode shows them."""
    check_name("mode", mode, MODES)
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


def _cells_of_blocks(blocks: Sequence[Any], most: int) -> Tensor:
    """Cut each block into cells of equal size, about `most` in all, none across a border."""
    factor = max(1, math.ceil(blocks[-1].stop / most))
    cells, first = [], 0
    for block in blocks:
        inside = torch.arange(block.stop - block.start) // factor
        cells.append(first + inside)
        first += int(inside[-1]) + 1
    return torch.cat(cells)


def _member_ticks(group: Any, starts: Sequence[int], names: Sequence[str]) -> dict[str, list[str]]:
    """Name the members at their centres, but those too close to the name before."""
    ticks, last = {}, -math.inf
    for block, (start, stop) in zip(group.members, itertools.pairwise(starts), strict=True):
        centre = (start + stop) // 2
        if centre - last >= len(names) / 55:
            several = sum(other.axis == block.axis for other in group.members) > 1
            ticks[names[centre]], last = str(block if several else block.axis), centre
    return {"tickvals": list(ticks), "ticktext": list(ticks.values())}


def _heatmap(values: np.ndarray, names: Sequence[str], title: str, colors: np.ndarray | None = None) -> go.Heatmap:
    """Return a heatmap whose hover tells the values; it may be coloured by another matrix."""
    told, extra = ("z", {}) if colors is None else ("customdata", {"customdata": values})
    hover = f"{title}<br>%{{y}}<br>%{{x}}<br>%{{{told}:.3e}}<extra></extra>"
    shown = values if colors is None else colors
    return go.Heatmap(z=shown, x=names, y=names, coloraxis="coloraxis", hovertemplate=hover, **extra)


def _coloraxis(mode: str, unit: str = UNIT) -> dict:
    limits = {"absolute": {"cmin": 0}, "signed": {"cmid": 0}, "correlation": {"cmin": -1, "cmax": 1}}[mode]
    return color_axis("correlation" if mode == "correlation" else unit, **limits, colorbar_exponentformat="power")


LONGEST_TICK = 40
"""Characters of a name at a tick; of a longer one the end is shown."""


def _square(heatmap: go.Heatmap, axis: Mapping, look: str, height: int = 620, **layout: Any) -> go.Figure:
    """Return the figure of a square heatmap, its first row on top.

    The room for named ticks is told from their length: plotly's own way to find it draws the axes again and again.
    """
    both = {"type": "category", "showgrid": False, "constrain": "domain", **axis}
    if names := axis.get("ticktext", axis.get("tickvals")):
        names = [name if len(name) <= LONGEST_TICK else f"…{name[1 - LONGEST_TICK :]}" for name in names]
        room = 32 + 6 * max(map(len, names))
        both |= {"ticktext": names, "automargin": False}
        layout = {"margin_l": room, "margin_b": room, **layout}
    x, y = both | {"tickangle": -90}, both | {"autorange": "reversed", "scaleanchor": "x"}
    return finished(go.Figure(heatmap), look, height, x=x, y=y, **layout)


POOLS = (None, "kernel")


def _sum_cells(values: Tensor, cells: Tensor) -> Tensor:
    """Sum the last axis over cells: ``cells[i]`` is the cell of position i, from 0."""
    sums = values.new_zeros(*values.shape[:-1], int(cells.max()) + 1)
    return sums.index_add_(-1, cells.to(values.device), values)


def pool_cells(matrices: Tensor, cells: Tensor) -> Tensor:
    """Return the means of square matrices (…, d, d) over cells of both axes; ``cells[i]`` is the cell of position i."""
    sums = _sum_cells(_sum_cells(matrices, cells).mT, cells).mT
    counts = torch.bincount(cells).to(matrices)
    return sums / torch.outer(counts, counts)


MOST_KERNELS = 64


def filter_image(weight: Tensor, layer: str, channel: int, *, look: str = "light") -> go.Figure:
    """Draw one filter of a layer's weight (out, in, height, width): its kernels as tiles, at most 64 of them.

    The weights of a linear layer, (out, in), are tiles of one cell. Raises ValueError for an unknown look, or no such
    channel.
    """
    tiles, shown, count = filter_tiles(weight, layer, channel)
    figure = go.Figure(go.Heatmap(z=tiles, coloraxis="coloraxis", hovertemplate="weight %{z:.3e}<extra></extra>"))
    x = BARE | {"zeroline": False}
    part = "" if shown == count else f", the first {shown} of {count} kernels"
    title = f"Weights of {layer}, channel {channel}{part}"
    y = x | {"autorange": "reversed", "scaleanchor": "x"}
    return finished(figure, look, 320, x=x, y=y, title=title, coloraxis=color_axis("weight", cmid=0))


def filter_tiles(weight: Tensor, layer: str, channel: int) -> tuple[np.ndarray, int, int]:
    """Return a filter's kernels side by side with gaps between, how many these are, and how many there are.

    Raises ValueError as `filter_image` does.
    """
    if weight.ndim not in (2, 4):
        raise ValueError(f"layer {layer!r} has no filters to show: choose a Conv2d or Linear")
    if not 0 <= channel < len(weight):
        raise ValueError(f"layer {layer!r}: no channel {channel}; the channels are 0 to {len(weight) - 1}")
    kernels = weight[channel].detach().double().cpu()
    kernels = kernels if kernels.ndim == 3 else kernels[:, None, None]
    shown = kernels[:MOST_KERNELS]
    tiles = make_grid(shown[:, None], math.ceil(math.sqrt(len(shown))), padding=1, pad_value=math.nan)[0].numpy()
    inside = slice(1, -1) if len(shown) > 1 else slice(None)  # without the border, which one tile alone has not
    return tiles[inside, inside], len(shown), len(kernels)


def jtj_pair(dense: Any, mode: str = "correlation", *, look: str = "light") -> go.Figure:
    """Draw the JᵀJ of the two channels of `dense` side by side, on one scale; see `plots.jtj_grid` for the modes.

    Raises:
        ValueError: not two channels, an unknown mode or look.
    """
    if len(dense.channels) != 2:
        raise ValueError(f"{dense.axis}: JᵀJ of {len(dense.channels)} channels; two are drawn side by side")
    values, names = _display(dense.values, dense.labels, mode, LARGE_CELLS)
    titles = [f"channel {channel}" for channel in dense.channels]
    heatmaps = [_heatmap(shown, names, title) for shown, title in zip(values, titles, strict=True)]
    title = f"JᵀJ of {dense.axis}, two channels"
    coloraxis = _coloraxis(mode)
    return finished(_panels(heatmaps, titles, columns=2), look, 420, title=title, coloraxis=coloraxis)
