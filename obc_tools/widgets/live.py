"""A figure that changes in the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import anywidget
import ipywidgets as W
import plotly.graph_objects as go
import traitlets
from plotly.offline import get_plotlyjs


class Text(W.Widget):
    """A text that a page knows."""

    text = traitlets.Unicode().tag(sync=True)


@cache
def library() -> Text:
    """Return the kernel's one copy of plotly.js, 5 MB, told to a page once."""
    return Text(text=get_plotlyjs())


@dataclass(frozen=True)
class Click:
    """Where in a figure somebody clicked: which trace, which of its points (row, column in a heatmap), its values."""

    trace: int
    place: tuple[int, ...]
    x: object
    y: object


class LiveFigure(anywidget.AnyWidget):
    """Shows one figure after another in the same place, whatever their panels, in every page that shows it.

    plotly's FigureWidget was tried: each brings plotly.js along and is dead where a page takes more than two seconds to
    load it, a page that is loaded again shows the figure as it was made, and axes of other panels stay.

    An anywidget that takes a busy page more than two seconds to make gets no message ever after. So the figure is told
    to the page by a widget of ipywidgets' own.
    """

    _esm = Path(__file__).with_name("live.js")
    library = traitlets.Instance(W.Widget).tag(sync=True, **W.widget_serialization)
    drawing = traitlets.Instance(W.Widget).tag(sync=True, **W.widget_serialization)

    def __init__(self, figure: go.Figure, clicked: Callable[[Click], None] | None = None):
        self.figure = figure
        super().__init__(library=library(), drawing=Text(text=figure.to_json(validate=False)))
        if clicked is not None:
            self.on_msg(lambda _, content, buffers: clicked(_click(**content)))

    def show(self, figure: go.Figure) -> None:
        """Show another figure, or the same one after a change."""
        self.figure, self.drawing.text = figure, figure.to_json(validate=False)


def _click(trace: int, place: Sequence[int], x: object, y: object) -> Click:
    return Click(trace, tuple(place), x, y)
