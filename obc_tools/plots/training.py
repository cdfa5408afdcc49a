"""Figures of trainings: curves of finished ones, and of one that goes on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .looks import color_of, theme


def plot_histories(histories: Mapping[str, Any], *, look: str = "light") -> go.Figure:
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


PANELS = (("loss", "loss"), ("accuracy", "accuracy (%)"), ("lr", "learning rate"), ("images_per_second", "images/s"))
"""The panels of the figure: a quantity and the title of its axis."""


def watch_figure(traces: Iterable[Mapping[str, Any]], *, look: str = "light") -> go.Figure:
    """Draw loss, accuracy, learning rate and speed of several runs, as far as they are.

    Args:
        traces: the properties of each curve; ``meta[2]`` is the number of its panel, from 0.
        look: "light" or "dark".

    Raises:
        ValueError: an unknown look.
    """
    figure = make_subplots(2, 2, horizontal_spacing=0.1, vertical_spacing=0.16)
    for trace in traces:
        row, column = divmod(trace["meta"][2], 2)
        figure.add_scatter(**trace, row=row + 1, col=column + 1)
    for panel, (_, title) in enumerate(PANELS):
        place = {"row": panel // 2 + 1, "col": panel % 2 + 1}
        figure.update_yaxes(title=title, **place)
        figure.update_xaxes(title="epochs", rangemode="tozero", **place)
    figure.update_layout(template=theme(look), height=520, margin_t=40, legend_y=1.04)
    return figure
