"""Live figures, and the place of a view in which one is shown after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import ipywidgets as W
import plotly.graph_objects as go

LIVE = 8
"""Live figures that a stage keeps at most; each brings plotly.js along, 5 MB."""

Shape = tuple[str | int, ...]


class LiveFigure(go.FigureWidget):
    """A figure that changes in the page, and that every page shows as it is when the page opens it.

    A plain FigureWidget tells a page of itself before it has data, and afterwards of changes only: what is shown late,
    or again after the page was loaded again, is the figure as it was made, or an empty one.
    """

    def __init__(self, figure: go.Figure):
        self._complete = False
        super().__init__(figure)
        self._complete = True
        self.open()

    def open(self) -> None:
        """Tell pages of the figure, once it has its data."""
        if self._complete:
            super().open()

    def change(
        self, traces: Sequence[Mapping[str, Any]], layout: Mapping[str, Any], *, overwrite: bool = False
    ) -> None:
        """Give the traces, in order, and the layout other properties; with ``overwrite`` in place of all they had."""
        with self.batch_update():
            for old, new in zip(self.data, traces, strict=True):
                old.update(new, overwrite=overwrite)
            self.update_layout(layout, overwrite=overwrite)
        self.settle()

    def settle(self) -> None:
        """Let pages that open later show the figure as it is now."""
        with self.hold_sync():
            self._widget_layout, self._widget_data = deepcopy(self._layout), deepcopy(self._data)


class Stage(W.Box):
    """Shows figures in one place.

    A live figure takes other values, but not another arrangement of panels: axes of the one before stay, and some fail.
    Nor can it be taken out of a page and put back. So each arrangement has a live figure of its own, hidden meanwhile.
    """

    def __init__(self):
        super().__init__(layout={"min_height": "420px", "flex": "1 1 auto", "min_width": "0"})
        self._live: dict[Shape, LiveFigure] = {}

    @property
    def figure(self) -> LiveFigure | None:
        """The figure that is shown; None before the first."""
        return next(reversed(self._live.values())) if self._live else None

    def show(self, kind: str, figure: go.Figure) -> LiveFigure:
        """Show a figure; return the live one. Figures of one kind differ in their values and numbers of panels only."""
        shape = _shape(kind, figure)
        live = self._live.pop(shape, None)
        if live is None:
            live = LiveFigure(figure)
            self.children = (*self.children, W.Box([live], layout={"flex": "1 1 auto", "min_width": "0"}))
        self._live[shape] = live
        for place in self.children:
            place.layout.display = None if place.children == (live,) else "none"
        live.change([trace.to_plotly_json() for trace in figure.data], figure.layout.to_plotly_json(), overwrite=True)
        while len(self._live) > LIVE:
            self._drop(self._live.pop(next(iter(self._live))))
        return live

    def _drop(self, live: LiveFigure) -> None:
        self.children = tuple(place for place in self.children if place.children != (live,))
        live.close()


def _shape(kind: str, figure: go.Figure) -> Shape:
    layout = figure.layout
    parts = sorted(key for key, value in layout.to_plotly_json().items() if value is not None)
    return (kind, *(trace.type for trace in figure.data), *parts, len(layout.annotations), len(layout.shapes))
