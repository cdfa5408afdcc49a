"""The graph of the coupled layers: which layers make and read the channels of which group, and what of them goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.colors import hex_to_rgb

from .looks import COLORS, PALETTE, PAPER, counted, finished

ROW, ROWS, LANES = 18, 36, 7
"""Pixels of a row, and how many rows and lanes are seen before anybody moves the graph."""
HALF, TALL, FILLED = 0.42, 0.36, 0.4
"""Half a box's width in lanes, half its height in rows; how dense what is removed is filled."""
MOVED = {"dragmode": "pan", "uirevision": "graph", "showlegend": False}
"""The mouse moves the graph, and another plan's leaves it where it was moved to."""


@dataclass(frozen=True)
class _Strand:
    """A group in the graph: the rows whose layers make its channels and read them, its lane, its colour."""

    group: Any
    makes: tuple[int, ...]
    reads: tuple[int, ...]
    lane: int
    color: str


def coupling_graph(plan: Any, layers: pd.DataFrame, *, look: str = "light") -> go.Figure:
    """Draw the layers in the order in which they run, each in the colour of the group whose channels it makes.

    A group is a line along its layers: all boxes on it lose the same channels, and all that it branches off to read
    them. A box is filled as far as its channels go; in it stand the widths, in → out, where the plan changes them as
    left/before. Groups that are kept whole are grey; hovering tells the rest. The graph moves with the mouse. The last
    trace holds the boxes' texts; its ``customdata`` are what hovering tells and the roots of their groups.

    Args:
        plan: of what to remove; `PruningPlan.whole(groups)` draws the network as it is.
        layers: what `layers_table` returned for it.
        look: "light" or "dark".

    Raises:
        ValueError: no group, a table of another network, or an unknown look.
    """
    table = layers.set_index("layer")
    shown, strands = _strands(plan.groups, table.index)
    rows = table.loc[shown]
    makers = {row: strand for strand in strands for row in strand.makes}
    colors = list(dict.fromkeys(strand.color for strand in strands))
    traces = [_lines([strand for strand in strands if strand.color == color], makers) for color in colors]
    for color in colors:
        own = {row: strand.lane for row, strand in makers.items() if strand.color == color}
        gone = {row: 1 - rows["out after"].iloc[row] / rows["out"].iloc[row] for row in own}
        traces.append(_boxes(own, dict.fromkeys(own, 1.0), color, PAPER.get(look)))
        if any(gone.values()):
            fill = f"rgba{(*hex_to_rgb(color), FILLED)}"
            traces.append(_boxes(own, {row: share for row, share in gone.items() if share}, color, fill))
    figure = go.Figure([{"type": "scatter", **trace} for trace in (*traces, _labels(rows, makers, plan))])
    x = {"visible": False, "range": [-0.6, min(1 + max(strand.lane for strand in strands), LANES) - 0.4]}
    y = {"tickvals": list(range(len(shown))), "ticktext": shown, "tickfont_size": 9, "showgrid": False}
    y |= {"range": [min(len(shown), ROWS) - 0.3, -0.7], "zeroline": False}
    chosen = sum(group.prunable for group in plan.groups)
    title = f"{counted(len(shown), 'layer')} in {counted(len(plan.groups), 'group')}, {chosen} of them prunable"
    title += "<br><sub>one colour goes together; filled: what goes; 9/16: 9 of 16 channels stay</sub>"
    height = 110 + ROW * min(len(shown), ROWS)
    return finished(figure, look, height, x=x, y=y, title=title, **MOVED)


def _strands(groups: Sequence[Any], order: Iterable[str]) -> tuple[list[str], list[_Strand]]:
    """Return the layers that are drawn, in running order, and the groups as strands through them."""
    places: dict[str, dict[int, set[str]]] = {"output": defaultdict(set), "input": defaultdict(set)}
    for index, group in enumerate(groups):
        for member in group.members:
            if member.role in places:
                places[member.role][index].add(member.axis.layer)
    drawn = {layer for role in places.values() for layers in role.values() for layer in layers}
    row = {layer: place for place, layer in enumerate(layer for layer in order if layer in drawn)}
    if not drawn:
        raise ValueError("no group to draw: give a plan for what find_groups returned")
    if unknown := drawn - set(row):
        raise ValueError(f"layer {min(unknown)!r} of the plan is not in the table: give layers_table's of its network")
    spans = []
    for index, group in enumerate(groups):
        makes, reads = (tuple(sorted(row[layer] for layer in places[role][index])) for role in ("output", "input"))
        if makes or reads:
            spans.append((min((*makes, *reads)), max((*makes, *reads)), group, makes, reads))
    spans.sort(key=lambda span: span[:2])
    ends: list[int] = []
    strands = []
    for first, last, group, makes, reads in spans:
        lane = next((lane for lane, end in enumerate(ends) if end <= first), len(ends))
        ends[lane : lane + 1] = [last]
        color = PALETTE[len(strands) % len(PALETTE)] if group.prunable else COLORS["original"]
        strands.append(_Strand(group, makes, reads, lane, color))
    return list(row), strands


def _lines(strands: Iterable[_Strand], makers: Mapping[int, _Strand]) -> dict[str, Any]:
    """Return the lines of strands: down their lanes, and across to the boxes of what reads them."""
    x, y = [], []
    for strand in strands:
        ends = (*strand.makes, *strand.reads)
        x += [strand.lane, strand.lane, None]
        y += [min(ends), max(ends), None]
        for row in strand.reads:
            if row in makers and makers[row].lane != strand.lane:
                x += [strand.lane, makers[row].lane, None]
                y += [row, row, None]
    color = next(iter(strands)).color
    return {"x": x, "y": y, "mode": "lines", "line": {"color": color, "width": 2}, "hoverinfo": "skip"}


def _boxes(lanes: Mapping[int, int], shares: Mapping[int, float], color: str, fill: str) -> dict[str, Any]:
    """Return boxes as one filled path, each as wide as its share says, from the left."""
    x, y = [], []
    for row, share in shares.items():
        left = lanes[row] - HALF
        right = left + 2 * HALF * float(share)
        x += [left, right, right, left, left, None]
        y += [row - TALL, row - TALL, row + TALL, row + TALL, row - TALL, None]
    line = {"color": color, "width": 1.5}
    return {"x": x, "y": y, "mode": "lines", "line": line, "fill": "toself", "fillcolor": fill, "hoverinfo": "skip"}


def _labels(rows: pd.DataFrame, makers: Mapping[int, _Strand], plan: Any) -> dict[str, Any]:
    """Return what stands in the boxes, and what hovering over them tells."""
    here = sorted(makers)
    return {
        "x": [makers[row].lane for row in here],
        "y": here,
        "text": [_widths(rows.iloc[row]) for row in here],
        "mode": "markers+text",
        "marker": {"size": ROW, "opacity": 0},
        "textfont": {"size": 9},
        "customdata": [(_told(rows.iloc[row], makers[row].group, plan), str(makers[row].group.root)) for row in here],
        "hovertemplate": "%{customdata[0]}<extra></extra>",
    }


def _widths(layer: pd.Series) -> str:
    """Return a layer's widths: "3 → 16", and "9/16" for what is left where channels go."""
    parts = [(layer[axis], layer[f"{axis} after"]) for axis in ("in", "out") if not pd.isna(layer[axis])]
    return " → ".join(str(before) if left == before else f"{left}/{before}" for before, left in parts)


def _told(layer: pd.Series, group: Any, plan: Any) -> str:
    count = {role: sum(member.role == role for member in group.members) for role in ("output", "input", "scale")}
    lines = [
        f"<b>{layer.name}</b> ({layer['type']}): {_widths(layer)}",
        f"group {group.root}: {len(plan.kept_of(group))} of {counted(group.width, 'channel')} kept",
        f"{counted(count['output'], 'layer')} make them, {count['input']} read them, {counted(count['scale'], 'norm')}",
        *([] if group.prunable else [f"kept whole: {group.kept_whole}"]),
        *(f"{name}: {layer[f'{name} after']:,.0f} of {layer[name]:,.0f}" for name in ("parameters", "MACs")),
    ]
    return "<br>".join(lines)
