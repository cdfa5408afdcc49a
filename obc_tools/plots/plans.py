"""Figures of what is coupled, of what a plan keeps, and of what Equivalent Pruning learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..errors import UnknownNameError
from .looks import COLORS, theme


def plot_plan(plan: Any, *, look: str = "light") -> go.Figure:
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


def group_names(plan: Any) -> list[str]:
    """Name each group by the layer of its root, and by the whole root where two share a layer."""
    layers = [group.root.layer for group in plan.groups]
    return [g.root.layer if layers.count(g.root.layer) == 1 else str(g.root) for g in plan.groups]


_SYMBOLS = {"output": "square", "input": "triangle-right", "scale": "circle-open"}
_TITLES = {"output": "output", "input": "input", "scale": "norm or parameter"}
_ROW, _LEGEND, _MOST_LABELS = 15, 55, 80


def plot_groups(groups: Sequence[Any], *, look: str = "light") -> go.Figure:
    """Draw the layers of each group: one column a group, one row a layer, groups that are kept whole in grey.

    Squares are outputs that shrink, triangles inputs, circles norms and bare parameters; hovering tells positions,
    widths and why a group is whole.

    Raises:
        ValueError: no group, or an unknown look.
    """
    if not groups:
        raise ValueError("no group to draw: give what find_groups returned")
    layers = list(dict.fromkeys(member.axis.layer for group in groups for member in group.members))
    figure = go.Figure()
    for prunable in (True, False):
        _add_lines(figure, groups, layers, prunable)
        for role in _SYMBOLS:
            _add_members(figure, groups, role, prunable)
    chosen = [group for group in groups if group.prunable]
    channels = sum(group.width for group in chosen)
    title = f"Coupled layers: {len(chosen)} of {len(groups)} groups prunable, {channels:,} channels"
    every = -(-len(layers) // _MOST_LABELS)
    figure.update_xaxes(title="group", showgrid=False, zeroline=False)
    figure.update_yaxes(categoryarray=layers, categoryorder="array", autorange="reversed", tickfont_size=9)
    figure.update_yaxes(tickvals=layers[::every], type="category")
    height = 160 + _ROW * len(layers) // every
    legend = {"yref": "container", "yanchor": "top", "y": 1 - _LEGEND / height}
    figure.update_layout(template=theme(look), title=title, height=height, legend=legend)
    return figure


def _color(prunable: bool) -> str:
    return COLORS["kept"] if prunable else COLORS["original"]


def _add_lines(figure: go.Figure, groups: Sequence[Any], layers: Sequence[str], prunable: bool) -> None:
    """Join the members of each group by a line from its first layer to its last."""
    place = {layer: index for index, layer in enumerate(layers)}
    x, y = [], []
    for index, group in enumerate(groups):
        if group.prunable == prunable:
            rows = sorted(place[member.axis.layer] for member in group.members)
            x += [index, index, None]
            y += [layers[rows[0]], layers[rows[-1]], None]
    line = {"color": _color(prunable), "width": 1}
    figure.add_scatter(x=x, y=y, mode="lines", line=line, opacity=0.4, hoverinfo="skip", showlegend=False)


def _add_members(figure: go.Figure, groups: Sequence[Any], role: str, prunable: bool) -> None:
    found = [
        (index, group, member)
        for index, group in enumerate(groups)
        for member in group.members
        if group.prunable == prunable and member.role == role
    ]
    if not found:
        return
    figure.add_scatter(
        x=[index for index, _, _ in found],
        y=[member.axis.layer for _, _, member in found],
        mode="markers",
        marker={"symbol": _SYMBOLS[role], "color": _color(prunable), "size": 7},
        name=_TITLES[role] + ("" if prunable else ", kept whole"),
        customdata=[_note(group, member) for _, group, member in found],
        hovertemplate="%{customdata}<extra></extra>",
    )


def _note(group: Any, member: Any) -> str:
    several = "" if group.blocks == 1 else f" in {group.blocks} blocks"
    lines = [
        f"{member.axis} ({member.kind}): {len(member.positions)} of {member.width} positions",
        f"group {group.root}: {group.width} channels{several}",
        *([] if group.prunable else [f"kept whole: {group.kept_whole}"]),
    ]
    return "<br>".join(lines)


def mixing_heatmaps(equivalent: Any, layer: str, *, block: int = 0, look: str = "light") -> go.Figure:
    """Draw the compressor C (kept × full) and the transposed decompressor Dᵀ (kept × full) of a layer.

    Both start as the selection of the kept channels: one 1 in each row. Whatever else is there was learnt: what the
    removed channels give to the kept ones.

    Args:
        block: the convolution group, where the layer has several.
        look: "light" or "dark".

    Raises:
        ValueError: a layer that is not mixed, no such block, an unknown look.
    """
    mixed = _mixed(equivalent, layer)
    parts = {"C": mixed.compressor, "Dᵀ": None if mixed.decompressor is None else mixed.decompressor.mT}
    there = {name: part.detach() for name, part in parts.items() if part is not None}
    blocks = len(next(iter(there.values())))
    if not 0 <= block < blocks:
        raise ValueError(f"layer {layer!r}: no block {block}; it has {blocks}")
    figure = make_subplots(1, len(there), subplot_titles=list(there), horizontal_spacing=0.12)
    for column, part in enumerate(there.values(), start=1):
        hover = "kept %{y}, full %{x}: %{z:.3f}<extra></extra>"
        values = part[block].float().cpu().numpy()
        figure.add_trace(go.Heatmap(z=values, coloraxis="coloraxis", hovertemplate=hover), 1, column)
    figure.update_xaxes(title="channel of the full network", showgrid=False, zeroline=False)
    figure.update_yaxes(title="kept channel", autorange="reversed", showgrid=False, zeroline=False)
    title = f"Mixing of {layer}" + (f", block {block} of {blocks}" if blocks > 1 else "")
    coloraxis = {"cmid": 0, "colorbar": {"title": {"text": "weight", "side": "right"}}}
    figure.update_layout(template=theme(look), height=340, title=title, coloraxis=coloraxis)
    return figure


def plot_removed_shares(shares: pd.DataFrame, *, look: str = "light") -> go.Figure:
    """Draw what `removed_shares` returns as bars.

    Raises:
        ValueError: an unknown look.
    """
    figure = go.Figure()
    for part, color in (("compressor", COLORS["ep"]), ("decompressor", COLORS["naive"])):
        hover = f"{part} of %{{x}}: %{{y:.2f}} %<extra></extra>"
        figure.add_bar(x=shares["layer"], y=100 * shares[part], name=part, marker_color=color, hovertemplate=hover)
    figure.update_xaxes(title="layer", type="category", tickangle=-90, tickfont_size=9)
    figure.update_yaxes(title="on removed channels (% of squared entries)")
    figure.update_layout(
        template=theme(look), barmode="group", height=400, title="What the removed channels still give"
    )
    return figure


def _mixed(equivalent: Any, layer: str) -> Any:
    found = equivalent.mixed_layers
    if layer not in found:
        raise UnknownNameError("mixed layer", layer, list(found))
    return found[layer]
