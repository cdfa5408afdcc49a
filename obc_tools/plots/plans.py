"""Figures of what is coupled, what a plan keeps, how the studio shows that, and what Equivalent Pruning learns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import hex_to_rgb
from plotly.subplots import make_subplots
from torch import Tensor

from ..errors import check_name
from .looks import COLORS, PALETTE, PAPER, color_axis, counted, escaped, finished

TOLD = "%{customdata}<extra></extra>"
GROUPS = {"type": "category", "tickangle": -90, "tickfont_size": 9}
"""The axis on which groups or layers stand side by side."""


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
    bars = [go.Bar(**bar) for bar in _stacked_bars(names, kept, widths, whole) if bar["y"].any()]
    figure = go.Figure(bars).update_traces(customdata=notes, hovertemplate=TOLD)
    gone, channels = plan.channels_removed, plan.channels
    title = f"Channels by group: {gone:,} of {channels:,} prunable channels removed"
    more = 0
    if plan.reached:
        title, more = f"{title}<br><sub>{plan.reached}</sub>", 40
    x = {"title": "group (its first layer)", **GROUPS}
    stacked = {"barmode": "stack", "bargap": 0.2, "legend_traceorder": "normal", "margin_t": 68 + more}
    return finished(figure, look, 420 + more, x=x, y={"title": "channels"}, title=title, **stacked)


def _stacked_bars(names: Sequence[str], kept: np.ndarray, widths: np.ndarray, whole: np.ndarray) -> list[dict]:
    """Return the properties of the bars of what stays, of what goes, and of what is kept whole."""
    heights = {"kept": kept * ~whole, "removed": widths - kept, "kept whole": kept * whole}
    return [
        {"x": names, "y": y, "name": name, "marker": {"color": COLORS[name.split()[-1]], "line_width": 0}}
        for name, y in heights.items()
    ]


def group_names(plan: Any) -> list[str]:
    """Name each group by the layer of its root, and by the whole root where two share a layer."""
    layers = [group.root.layer for group in plan.groups]
    return [g.root.layer if layers.count(g.root.layer) == 1 else str(g.root) for g in plan.groups]


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
    for number, trace in enumerate(studio_traces(shown, kept, score)):
        add = figure.add_bar if number < 3 else figure.add_scatter
        add(**trace, row=1 if number < 4 else 2, col=1)
    figure.update_xaxes(title=shown.title, row=1, **GROUPS)
    figure.update_yaxes(title=shown.unit, row=1, col=1)
    figure.update_yaxes(title="score", exponentformat="power", row=2, col=1)
    figure.update_layout(studio_axes(root, score))
    # Margins that plotly has to measure make every drawing slower.
    measured = {"automargin": False}
    stacked = {"barmode": "stack", "bargap": 0.15, "legend_traceorder": "normal", "hovermode": "x"}
    margin = {"t": 30, "l": 64, "b": 48}
    return finished(figure, look, height + 78, x=measured, y=measured, margin=margin, **stacked)


def studio_axes(root: str, score: Tensor) -> dict[str, Any]:
    """Return what the layout of `studio_figure` says of the group that is shown."""
    title = f"channels of {root} by score; click one to keep or remove it"
    return {"xaxis2": {"title": {"text": escaped(title)}}, "yaxis2": {"type": "log" if _is_wide(score) else "linear"}}


def _is_wide(score: Tensor) -> bool:
    """Say whether scores are drawn on a logarithmic axis."""
    return 0 < 30 * float(score.min()) < float(score.max())


def studio_traces(shown: Any, kept: Sequence[int], score: Tensor) -> list[dict[str, Any]]:
    """Return the properties of each trace of `studio_figure`, for a figure that is there already."""
    traces = _stacked_bars(shown.names, shown.now, shown.whole, shown.fixed)
    for trace in traces:
        trace["marker"]["opacity"] = [1.0 if chosen else 0.7 for chosen in shown.chosen]
        trace.update(SILENT)
    traces[0] |= {"hoverinfo": None, "customdata": shown.notes, "hovertemplate": TOLD}
    traces[2]["showlegend"] = bool(shown.fixed.any())
    marks = [] if shown.marks is None else shown.marks
    marker = {"symbol": "diamond-open", "size": 8, "color": PALETTE[1], "line_width": 2}
    marked = {"x": shown.names if len(marks) else [], "y": marks, "name": "kept by the compared plan"}
    marked |= SILENT | {"mode": "markers", "marker": marker, "showlegend": bool(len(marks))}
    return [*escaped([*traces, marked]), *_score_bars(kept, score)]


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
    title = f"Coupled layers: {len(chosen)} of {len(groups)} groups prunable, {counted(channels, 'channel')}"
    every = -(-len(layers) // _MOST_LABELS)
    x = {"title": "group", "showgrid": False, "zeroline": False}
    y = {"type": "category", "categoryarray": layers, "categoryorder": "array", "autorange": "reversed"}
    y |= {"tickvals": layers[::every], "tickfont_size": 9}
    height = 160 + _ROW * len(layers) // every
    legend = {"yref": "container", "yanchor": "top", "y": 1 - _LEGEND / height}
    return finished(figure, look, height, x=x, y=y, title=title, legend=legend)


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
        hovertemplate=TOLD,
    )


def _note(group: Any, member: Any) -> str:
    several = "" if group.blocks == 1 else f" in {group.blocks} blocks"
    lines = [
        f"{member.axis} ({member.kind}): {len(member.positions)} of {member.width} positions",
        f"group {group.root}: {group.width} channels{several}",
        *([] if group.prunable else [f"kept whole: {group.kept_whole}"]),
    ]
    return "<br>".join(lines)


def mixing_heatmaps(
    equivalent: Any, layer: str, *, since: Any = None, block: int = 0, look: str = "light"
) -> go.Figure:
    """Draw the compressor C (kept × full) and the transposed decompressor Dᵀ (kept × full) of a layer.

    Both start as the selection of the kept channels: one 1 in each row. Whatever else is there was learnt: what the
    removed channels give to the kept ones.

    Args:
        since: draw what changed since this earlier `EquivalentModel` of the plan, such as one that was not trained.
        block: the convolution group, where the layer has several.
        look: "light" or "dark".

    Raises:
        ValueError: a layer that is not mixed, no such block, an unknown look.
    """
    check_name("mixed layer", layer, equivalent.mixed_layers)
    there, before = (_mixing(model.mixed_layers[layer]) for model in (equivalent, since or equivalent))
    if since is not None:
        there = {name: part - before[name] for name, part in there.items()}
    blocks = len(next(iter(there.values())))
    if not 0 <= block < blocks:
        raise ValueError(f"layer {layer!r}: no block {block}; it has {blocks}")
    figure = make_subplots(1, len(there), subplot_titles=list(there), horizontal_spacing=0.12)
    for column, part in enumerate(there.values(), start=1):
        hover = "kept %{y}, full %{x}: %{z:.3f}<extra></extra>"
        values = part[block].float().cpu().numpy()
        figure.add_trace(go.Heatmap(z=values, coloraxis="coloraxis", hovertemplate=hover), 1, column)
    bare = {"showgrid": False, "zeroline": False}
    x = bare | {"title": "channel of the full network"}
    y = bare | {"title": "kept channel", "autorange": "reversed"}
    title = f"Mixing of {layer}" + (f", block {block} of {blocks}" if blocks > 1 else "")
    title += "" if since is None else ": what changed"
    unit = "weight" if since is None else "change of weight"
    return finished(figure, look, 340, x=x, y=y, title=title, coloraxis=color_axis(unit, cmid=0))


def _mixing(mixed: Any) -> dict[str, Tensor]:
    parts = {"C": mixed.compressor, "Dᵀ": None if mixed.decompressor is None else mixed.decompressor.mT}
    return {name: part.detach() for name, part in parts.items() if part is not None}


def plot_removed_shares(shares: pd.DataFrame, *, look: str = "light") -> go.Figure:
    """Draw what `removed_shares` returns as bars.

    Raises:
        ValueError: an unknown look.
    """
    figure = go.Figure()
    for part, color in (("compressor", COLORS["ep"]), ("decompressor", COLORS["naive"])):
        hover = f"{part} of %{{x}}: %{{y:.2f}} %<extra></extra>"
        figure.add_bar(x=shares["layer"], y=100 * shares[part], name=part, marker_color=color, hovertemplate=hover)
    x, y = {"title": "layer", **GROUPS}, {"title": "on removed channels (% of squared entries)"}
    return finished(figure, look, 400, x=x, y=y, barmode="group", title="What the removed channels still give")


def plot_sensitivity(lost: pd.DataFrame, metric: str, *, look: str = "light") -> go.Figure:
    """Draw how much worse a metric gets where one group alone is pruned: a row a group, a column a ratio.

    Raises:
        ValueError: an unknown look.
    """
    name = metric.replace("_", " ")
    heatmap = go.Heatmap(
        z=lost.to_numpy(),
        x=[f"{100 * ratio:g}" for ratio in lost.columns],
        y=list(lost.index),
        coloraxis="coloraxis",
        hovertemplate="%{y}<br>%{x} % of its channels removed<br>%{z:.4g} worse<extra></extra>",
    )
    x = {"title": "removed (% of the group's channels)", "type": "category"}
    y = {**GROUPS, "autorange": "reversed", "tickangle": 0}
    shown = color_axis(f"{name}, how much worse", cmid=0)
    height = 150 + 20 * len(lost)
    return finished(go.Figure(heatmap), look, height, x=x, y=y, coloraxis=shown, title="One group pruned at a time")


ROW, ROWS, LANES = 18, 36, 7
"""Pixels of a row, and how many rows and lanes are seen before anybody moves the graph."""
HALF, TALL, FILLED = 0.42, 0.36, 0.4
"""Half a box's width in lanes, half its height in rows; how dense what is removed is filled."""
DASHES = "solid", "6px,3px", "2px,2px", "12px,3px", "6px,3px,2px,3px", "12px,3px,2px,3px"
MOVED = {"dragmode": "pan", "uirevision": "graph", "showlegend": False}
"""The mouse moves the graph, and another plan's leaves it where it was moved to."""


@dataclass(frozen=True)
class _Strand:
    """A group in the graph: the rows whose layers make its channels and read them, its lane, number and line."""

    group: Any
    makes: tuple[int, ...]
    reads: tuple[int, ...]
    lane: int
    number: int
    color: str

    @property
    def line(self) -> tuple[str, str]:
        """Colour and dash: the next dash begins where the colours do again."""
        return self.color, DASHES[self.number // len(PALETTE) % len(DASHES)]


def coupling_graph(plan: Any, layers: pd.DataFrame, *, look: str = "light") -> go.Figure:
    """Draw the layers in the order in which they run, each as the group whose channels it makes: line and number.

    Groups differ in colour or dash, 48 of them, and all in the number behind their layers' names. A group is a line
    along its layers: all boxes on it lose the same channels, and all that it branches off to read them. A box is filled
    as far as its channels go; in it stand the widths, in → out, where the plan changes them as left/before. Groups that
    are kept whole are grey; hovering tells the rest. The graph moves with the mouse. The last trace holds the boxes'
    texts; its ``customdata`` are what hovering tells and the roots of their groups.

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
    lines = list(dict.fromkeys(strand.line for strand in strands))
    traces = [_lines([strand for strand in strands if strand.line == line], makers) for line in lines]
    for line in lines:
        own = {row: strand.lane for row, strand in makers.items() if strand.line == line}
        gone = {row: 1 - rows["out after"].iloc[row] / rows["out"].iloc[row] for row in own}
        traces.append(_boxes(own, dict.fromkeys(own, 1.0), line, PAPER.get(look)))
        if any(gone.values()):
            fill = f"rgba{(*hex_to_rgb(line[0]), FILLED)}"
            traces.append(_boxes(own, {row: share for row, share in gone.items() if share}, line, fill))
    figure = go.Figure([{"type": "scatter", **trace} for trace in (*traces, _labels(rows, makers, plan))])
    x = {"visible": False, "range": [-0.6, min(1 + max(strand.lane for strand in strands), LANES) - 0.4]}
    named = [f"{layer}  {makers[row].number + 1}" if row in makers else layer for row, layer in enumerate(shown)]
    y = {"tickvals": list(range(len(shown))), "ticktext": named, "tickfont_size": 9, "showgrid": False}
    y |= {"range": [min(len(shown), ROWS) - 0.3, -0.7], "zeroline": False}
    chosen = sum(group.prunable for group in plan.groups)
    title = f"{counted(len(shown), 'layer')} in {counted(len(plan.groups), 'group')}, {chosen} of them prunable"
    title += "<br><sub>same line and number: goes together; filled: what goes; 9/16: 9 of 16 channels stay</sub>"
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
        strands.append(_Strand(group, makes, reads, lane, len(strands), color))
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
    color, dash = next(iter(strands)).line
    return {"x": x, "y": y, "mode": "lines", "line": {"color": color, "dash": dash, "width": 2}, "hoverinfo": "skip"}


def _boxes(lanes: Mapping[int, int], shares: Mapping[int, float], style: tuple[str, str], fill: str) -> dict[str, Any]:
    """Return boxes as one filled path, each as wide as its share says, from the left."""
    x, y = [], []
    for row, share in shares.items():
        left = lanes[row] - HALF
        right = left + 2 * HALF * float(share)
        x += [left, right, right, left, left, None]
        y += [row - TALL, row - TALL, row + TALL, row + TALL, row - TALL, None]
    line = {"color": style[0], "dash": style[1], "width": 1.5}
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
        f"{layer.name} ({layer['type']}): {_widths(layer)}",
        f"group {group.root}: {len(plan.kept_of(group))} of {counted(group.width, 'channel')} kept",
        f"{counted(count['output'], 'layer')} make them, {count['input']} read them, {counted(count['scale'], 'norm')}",
        *([] if group.prunable else [f"kept whole: {group.kept_whole}"]),
        *(f"{name}: {layer[f'{name} after']:,.0f} of {layer[name]:,.0f}" for name in ("parameters", "MACs")),
    ]
    return "<br>".join(lines)
