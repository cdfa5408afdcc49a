"""The figure of coupled layers: which layer axes each group holds, and which groups are never pruned."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from .explain import role_of
from .groups import ChannelGroup, Member
from .looks import COLORS, theme

_SYMBOLS = {"output": "square", "input": "triangle-right", "scale": "circle-open"}
_TITLES = {"output": "output", "input": "input", "scale": "norm or parameter"}
_ROW, _LEGEND, _MOST_LABELS = 15, 55, 80


def plot_groups(groups: Sequence[ChannelGroup], *, look: str = "light") -> go.Figure:
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


def _add_lines(figure: go.Figure, groups: Sequence[ChannelGroup], layers: Sequence[str], prunable: bool) -> None:
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


def _add_members(figure: go.Figure, groups: Sequence[ChannelGroup], role: str, prunable: bool) -> None:
    found = [
        (index, group, member)
        for index, group in enumerate(groups)
        for member in group.members
        if group.prunable == prunable and role_of(member) == role
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


def _note(group: ChannelGroup, member: Member) -> str:
    several = "" if group.blocks == 1 else f" in {group.blocks} blocks"
    lines = [
        f"{member.axis} ({member.kind}): {len(member.positions)} of {member.width} positions",
        f"group {group.root}: {group.width} channels{several}",
        *([] if group.prunable else [f"kept whole: {group.kept_whole}"]),
    ]
    return "<br>".join(lines)
