"""What Equivalent Pruning learns: compressors and decompressors as heatmaps, and how much of the removed they use."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from .equivalent import EquivalentModel, MixedLayer
from .layers import UnknownNameError
from .looks import COLORS, theme


def mixing_heatmaps(equivalent: EquivalentModel, layer: str, *, block: int = 0, look: str = "light") -> go.Figure:
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


def removed_shares(start: EquivalentModel, trained: EquivalentModel) -> pd.DataFrame:
    """Return, layer by layer, which share of C and of D lies on channels that were removed.

    Columns: layer, compressor, decompressor; each the share of the squared entries, in [0, 1], None where a layer has
    none. All 0 before training.

    Args:
        start: as built, before any training: it says which channels were kept.
        trained: built of the same model by the same plan, then trained.

    Raises:
        ValueError: the two mix different layers.
    """
    if list(start.mixed_layers) != list(trained.mixed_layers):
        raise ValueError("the two models mix different layers: build both of one model by one plan")
    rows = []
    for name, before in start.mixed_layers.items():
        after = trained.mixed_layers[name]
        shares = (_share(before.compressor, after.compressor, 1), _share(before.decompressor, after.decompressor, 2))
        rows.append((name, *shares))
    return pd.DataFrame(rows, columns=["layer", "compressor", "decompressor"])


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


def _mixed(equivalent: EquivalentModel, layer: str) -> MixedLayer:
    found = equivalent.mixed_layers
    if layer not in found:
        raise UnknownNameError("mixed layer", layer, list(found))
    return found[layer]


def _share(before: Tensor | None, after: Tensor | None, kept_dim: int) -> float | None:
    """Return the share of a matrix outside the channels that its start selects; ``kept_dim`` runs over kept ones."""
    if before is None or after is None:
        return None
    selected = before.detach().abs().sum(kept_dim, keepdim=True) > 0
    squares = after.detach().double().square()
    return (squares * ~selected).sum().item() / squares.sum().item()
