"""Figures that only the explorers draw: a filter as an image, and two filters side by side."""

from __future__ import annotations

import math

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from torch import nn

from .dense import DenseJTJ
from .layers import get_layer
from .looks import theme
from .plots import jtj_heatmap

MOST_KERNELS = 64


def filter_image(model: nn.Module, layer: str, channel: int, *, look: str = "light") -> go.Figure:
    """Draw the weights of one filter: its kernels as tiles, at most 64 of them, the weights of a linear layer as a row.

    Raises:
        ValueError: an unknown layer or look, a layer whose weights are no filters, or no such channel.
    """
    tiles, shown, count = filter_tiles(model, layer, channel)
    figure = go.Figure(go.Heatmap(z=tiles, coloraxis="coloraxis", hovertemplate="weight %{z:.3e}<extra></extra>"))
    bare = {"showticklabels": False, "ticks": "", "showgrid": False, "zeroline": False, "constrain": "domain"}
    figure.update_xaxes(**bare)
    figure.update_yaxes(autorange="reversed", scaleanchor="x", **bare)
    part = "" if shown == count else f", the first {shown} of {count} kernels"
    title = f"Weights of {layer}, channel {channel}{part}"
    coloraxis = {"cmid": 0, "colorbar": {"title": {"text": "weight", "side": "right"}}}
    figure.update_layout(template=theme(look), height=320, title=title, coloraxis=coloraxis)
    return figure


def filter_tiles(model: nn.Module, layer: str, channel: int) -> tuple[np.ndarray, int, int]:
    """Return a filter's kernels side by side with gaps between, how many these are, and how many there are.

    Raises ValueError as `filter_image` does.
    """
    module = get_layer(model, layer)
    if not isinstance(module, nn.Conv2d | nn.Linear):
        raise ValueError(f"layer {layer!r} ({type(module).__name__}) has no filters to show: choose a Conv2d or Linear")
    weight = module.weight.detach().float().cpu().numpy()
    if not 0 <= channel < len(weight):
        raise ValueError(f"layer {layer!r}: no channel {channel}; the channels are 0 to {len(weight) - 1}")
    kernels = weight[channel] if weight.ndim == 4 else weight[channel][:, None, None]
    shown = kernels[:MOST_KERNELS]
    columns = math.ceil(math.sqrt(len(shown)))
    rows, (height, width) = math.ceil(len(shown) / columns), shown.shape[1:]
    tiles = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1), np.nan)
    for index, kernel in enumerate(shown):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        tiles[top : top + height, left : left + width] = kernel
    return tiles, len(shown), len(kernels)


def jtj_pair(dense: DenseJTJ, mode: str = "correlation", *, look: str = "light") -> go.Figure:
    """Draw the JᵀJ of the two channels of `dense` side by side, on one scale; see `plots.jtj_grid` for the modes.

    Raises:
        ValueError: not two channels, an unknown mode or look.
    """
    if len(dense.channels) != 2:
        raise ValueError(f"{dense.axis}: JᵀJ of {len(dense.channels)} channels; two are drawn side by side")
    figure = make_subplots(1, 2, subplot_titles=[f"channel {channel}" for channel in dense.channels])
    for column, channel in enumerate(dense.channels, start=1):
        single = jtj_heatmap(dense, channel, mode, look=look)
        figure.add_trace(single.data[0], 1, column)
    bare = {"showticklabels": False, "type": "category", "constrain": "domain", "showgrid": False}
    figure.update_xaxes(**bare)
    figure.update_yaxes(autorange="reversed", **bare)
    figure.layout.yaxis.scaleanchor, figure.layout.yaxis2.scaleanchor = "x", "x2"
    title = f"JᵀJ of {dense.axis}, two channels"
    figure.update_layout(template=theme(look), height=420, title=title, coloraxis=single.layout.coloraxis)
    return figure
