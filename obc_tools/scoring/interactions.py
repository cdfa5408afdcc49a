"""How the filters of a layer act on the losses together: their interactions, from the products J·w alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from torch import Tensor

from ..errors import UnknownNameError
from ..structure.layers import LayerAxis
from .jacobian import JacobianProducts
from .jtj import check_channels

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False, repr=False)
class FilterInteractions:
    """How the channels of one layer axis act on the losses together: K = (JW)ᵀ(JW), K_ij = Σ_n (J_n w_i)(J_n w_j).

    K_ij > 0: removing i and j changes the losses the same way (they duplicate); K_ij < 0: they cancel.
    ``values``: K, shape (channels, channels), float64 on the CPU.
    """

    axis: LayerAxis
    values: Tensor

    @property
    def score(self) -> Tensor:
        """The Jacobian Criterion of each channel, the diagonal of K, shape (channels,)."""
        return self.values.diagonal()

    @cached_property
    def correlation(self) -> Tensor:
        """K_ij / √(K_ii K_jj), from −1 to 1, shape (channels, channels); 0 off the diagonal where a score is 0."""
        scale = self.score.sqrt()
        inverse = torch.where(scale > 0, 1 / scale, 0)
        return (self.values * torch.outer(inverse, inverse)).clamp(-1, 1).fill_diagonal_(1)

    def joint(self, channels: Iterable[int]) -> float:
        """Return 1ᵀK1 over a set of channels: the first-order squared loss change of removing the set together."""
        chosen = list(check_channels(str(self.axis), channels, len(self.values)))
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"{self.axis}: a channel is named twice in {chosen}")
        return self.values[chosen][:, chosen].sum().item()

    def order(self, by: str = "cluster") -> tuple[int, ...]:
        """Return the channels by falling "score", or so that those with alike effects are neighbours ("cluster").

        Clusters are those of average linkage on 1 − correlation, leaves in optimal order (Bar-Joseph et al. 2001).
        """
        if by not in ("cluster", "score"):
            raise UnknownNameError("order", by, ["cluster", "score"])
        if by == "score" or len(self.values) == 1:
            return tuple(self.score.argsort(descending=True, stable=True).tolist())
        distance = squareform((1 - self.correlation).fill_diagonal_(0).numpy(), checks=False)
        return tuple(hierarchy.leaves_list(hierarchy.linkage(distance, "average", optimal_ordering=True)).tolist())

    def to_frame(self) -> pd.DataFrame:
        """Return one row a pair of channels i < j: K_ij and their correlation, strongest correlation first."""
        i, j = torch.triu_indices(len(self.values), len(self.values), 1)
        columns = {"i": i, "j": j, "K": self.values[i, j], "correlation": self.correlation[i, j]}
        frame = pd.DataFrame({name: column.numpy() for name, column in columns.items()})
        return frame.sort_values("correlation", key=np.abs, ascending=False, ignore_index=True)

    def plot(self, order: str = "cluster", mode: str = "correlation") -> go.Figure:
        """Draw K as a heatmap."""
        from ..plots.jtj import interactions_heatmap

        return interactions_heatmap(self, order=order, mode=mode)

    def __repr__(self) -> str:
        return f"FilterInteractions({self.axis}, {len(self.values)} channels)"

    def _repr_html_(self) -> str:
        pairs = self.to_frame().head(10).to_html(index=False, float_format="{:.3g}".format)
        return f"<b>{self!r}</b>, the strongest pairs{pairs}"


def filter_interactions(products: JacobianProducts, layer: str, axis: str = "out") -> FilterInteractions:
    """Compute the interactions of a layer's channels from their products J·w; raise ValueError for an unknown layer."""
    name = LayerAxis(layer, axis)
    weighted = products[name].double().cpu()
    return FilterInteractions(name, weighted.T @ weighted)
