"""The one look of all figures: fonts, colours and colour scales, light and dark; and figures as files.

Colours are safe for colour-blind readers (lines after Okabe and Ito 2008; maps from white to blue, or from navy to
yellow on dark; blue to orange where there are signs) and fixed by name: EP has the same colour in every figure.
"""

from __future__ import annotations

import importlib.util
import operator
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import make_colorscale

from ..errors import check_name
from ..files import write_text

LOOKS = LIGHT, DARK = "light", "dark"

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B59F00", "#8C6BB1")
COLORS: Mapping[str, str] = {
    "original": "#8A8A8A",
    "pruned": "#B59F00",
    "naive": "#D55E00",
    "ep": "#0079C1",
    "kept": "#0079C1",
    "removed": "rgba(138, 148, 158, 0.42)",
    "whole": "#7FA8C9",
    "jacobian": "#0079C1",
    "taylor": "#E69F00",
    "hessian": "#009E73",
    "obdc": "#CC79A7",
    "l1": "#56B4E9",
    "l2": "#D55E00",
    "fpgm": "#B59F00",
    "whc": "#8C510A",
    "bn_scale": "#8C6BB1",
    "lamp": "#4D9A8C",
    "random": "#9A9A9A",
}
"""The colour of each criterion, and of the original, the pruned, the naively trained and the EP-trained network."""

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_INK = {"light": "#24292F", "dark": "#D7DCE2"}
PAPER = {"light": "#FFFFFF", "dark": "#16191D"}
_LINE = {"light": "#C4CAD1", "dark": "#454C54"}
_GRID = {"light": "#E7EAEE", "dark": "#2B3036"}
_SEQUENTIAL = {
    "light": ("#FFFFFF", "#E3EDF6", "#A9CCE5", "#4F9BCB", "#14609F", "#0A2F5C"),
    "dark": ("#16191D", "#1E3A5F", "#2B6CA3", "#4FA9C9", "#A5D9B5", "#FBF3A5"),
}
_DIVERGING = {
    "light": ("#0B4F8A", "#5FA3D0", "#C9DFEE", "#FFFFFF", "#F8DDB8", "#E59A3C", "#9A4A00"),
    "dark": ("#8CC8F0", "#3E8EC4", "#1F4A70", "#16191D", "#6B4310", "#CF8424", "#FFD08A"),
}


def theme(look: str = "light") -> go.layout.Template:
    """Return the template of all figures, "light" or "dark"."""
    check_name("theme", look, LOOKS)
    axis = {
        "gridcolor": _GRID[look],
        "linecolor": _LINE[look],
        "zerolinecolor": _GRID[look],
        "tickfont": {"size": 10},
        "title": {"font": {"size": 11}, "standoff": 6},
        "automargin": True,
    }
    layout = {
        "font": {"family": _FONT, "size": 11, "color": _INK[look]},
        "title": {"font": {"size": 14}, "x": 0.01, "xanchor": "left"},
        "paper_bgcolor": PAPER[look],
        "plot_bgcolor": PAPER[look],
        "colorway": PALETTE,
        "colorscale": {
            "sequential": make_colorscale(_SEQUENTIAL[look]),
            "diverging": make_colorscale(_DIVERGING[look]),
        },
        "coloraxis": {"colorbar": {"outlinewidth": 0, "thickness": 10, "tickfont": {"size": 10}}},
        "annotationdefaults": {"font": {"size": 11}},
        "shapedefaults": {"line": {"color": _INK[look], "width": 1}},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 11}},
        "hoverlabel": {"font": {"family": _FONT, "size": 11}},
        "margin": {"l": 56, "r": 16, "t": 68, "b": 40},
        "xaxis": axis,
        "yaxis": axis,
    }
    return go.layout.Template(layout=layout)


def counted(number: int, noun: str) -> str:
    """Return so many of something in words: "1 group", "1,024 channels"."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def finished(
    figure: go.Figure, look: str, height: int, *, x: Mapping | None = None, y: Mapping | None = None, **layout: Any
) -> go.Figure:
    """Return a figure after giving it its look, its height, what all its axes have in common, and more of the layout.

    Names that would be read as tags are shown as they are written, see `escaped`.

    Raises:
        ValueError: an unknown look.
    """
    if x:
        figure.update_xaxes(x)
    if y:
        figure.update_yaxes(y)
    figure.update_layout(height=height, **layout)
    drawn = figure.to_plotly_json()
    shown = escaped(drawn)
    return (figure if shown is drawn else go.Figure(shown)).update_layout(template=theme(look))


_OTHER_TAGS = re.compile(r"<(?!br>|/?sub>|/?extra>)")
"""Where a tag begins that is none of ours."""


def escaped(drawn: Any) -> Any:
    """Return text, properties or figures without tags but those that figures here write: `br`, `sub`, `extra`.

    Names of layers, classes, runs and files are whatever their owners call them, and plotly reads tags, also links,
    wherever it writes text. What holds none is returned as it is.
    """
    if isinstance(drawn, str):
        return _OTHER_TAGS.sub("&lt;", drawn) if "<" in drawn else drawn
    if isinstance(drawn, np.ndarray):
        return drawn if drawn.dtype.kind not in "OU" or (told := escaped(said := drawn.tolist())) is said else told
    if isinstance(drawn, dict):
        values = escaped(list(drawn.values()))
        return dict(zip(drawn, values, strict=True)) if any(map(operator.is_not, values, drawn.values())) else drawn
    if isinstance(drawn, list | tuple):
        values = [escaped(part) for part in drawn]
        return type(drawn)(values) if any(map(operator.is_not, values, drawn)) else drawn
    return drawn


def color_axis(unit: str, **scale: Any) -> dict[str, Any]:
    """Return the colour axis of heatmaps in a unit: ``cmid=0`` for signs, ``cmin``, ``cmax`` for ends."""
    return {"colorbar_title": {"text": unit, "side": "right"}, **scale}


def color_of(name: str, index: int = 0) -> str:
    """Return the fixed colour of a name (by its first word, in any case), else the colour of a place in the palette."""
    words = name.lower().replace(",", " ").split()
    return COLORS.get(words[0] if words else "", PALETTE[index % len(PALETTE)])


def save_html(figure: go.Figure, path: str | Path) -> Path:
    """Write a figure as one HTML file that needs no network, plotly.js included (about 5 MB); return its path."""
    path = Path(path)
    page = figure.to_html(include_plotlyjs=True, config={"responsive": True, "displaylogo": False})
    write_text(path, page)
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
