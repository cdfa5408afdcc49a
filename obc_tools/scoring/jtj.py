"""Dense views of the Jacobian: JᵀJ of single channels and of whole groups, and how a layer's filters act together.

The Jacobian Criterion needs only the products J·w (see `jacobian`); these views show what they are made of. For one
channel with d parameters w, JᵀJ of shape (d, d) says how any two of its parameters act on the losses together, and
wᵀ(JᵀJ)w is the channel's score (Chen et al. 2025, arXiv 2508.05521).
"""

from __future__ import annotations

import html
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import vmap

from ..errors import check_name
from ..plots.jtj import POOLS, _sum_cells, pool_cells
from ..state import without_weight_norms
from ..structure.groups import ChannelGroup, Member
from ..structure.layers import (
    LayerAxis,
    Slot,
    UnknownLayerError,
    channel_dims,
    channel_view,
    find_axis,
    get_layer,
    layer_axes,
    own_parameters,
)
from .jacobian import JacobianProducts
from .objectives import Objective, classification
from .rows import Rows, distinct_members, parameter_slots, stream_gradients, uncompiled

if TYPE_CHECKING:
    import plotly.graph_objects as go


MAX_BYTES = 2 * 2**30


@dataclass(frozen=True)
class ChannelParameters:
    """The parameters of some channels of one layer axis, as matrices of one row a channel, (channels, d)."""

    axis: LayerAxis
    tensors: Mapping[str, nn.Parameter]
    slots: tuple[Slot, ...]
    channels: tuple[int, ...]

    def weights(self) -> Tensor:
        """Return w, shape (channels, d), at least float32."""
        parts = [channel_view(self.tensors[slot.tensor].detach(), slot) for slot in self.slots]
        return _at_least_float32(torch.cat(parts, dim=1)[list(self.channels)])

    def jacobian(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Return the channels' rows of J, shape (channels, rows, d), at least float32, from those of the layer."""
        parts = []
        for slot in self.slots:
            views = vmap(lambda gradient, slot=slot: channel_view(gradient, slot))
            parts.append(views(gradients[slot.tensor])[:, list(self.channels)])
        return _at_least_float32(torch.cat(parts, dim=2).transpose(0, 1))

    def labels(self, taps: bool = True) -> list[str]:
        """Return the place of each of the d parameters in its tensor, such as "weight[:, 2, 0, 1]".

        ":" stands for the channel. Outputs of a grouped convolution count within their group, and of fused q, k and v
        the first index is the part. Without ``taps`` the places within a kernel read "*".
        """
        return [label for slot in self.slots for label in self._labels(slot, taps)]

    def _labels(self, slot: Slot, taps: bool) -> Iterator[str]:
        tensor = self.tensors[slot.tensor]
        split, dims = channel_dims(tensor, slot)
        kernel = range(split.dim() - max(tensor.dim() - 2, 0), split.dim())
        name = slot.tensor or self.axis.layer.rpartition(".")[2]
        first = 1 if slot.groups > 1 else 0
        for index in itertools.product(*(range(1 if dim in dims else n) for dim, n in enumerate(split.shape))):
            places = [":" if d in dims else "*" if d in kernel and not taps else str(i) for d, i in enumerate(index)]
            yield f"{name}[{', '.join(places[first:])}]"


def check_channels(what: str, channels: Iterable[int], width: int) -> tuple[int, ...]:
    """Return the channels as a tuple; raise ValueError when there are none, or one outside an axis of this width."""
    chosen = tuple(channels) if isinstance(channels, Iterable) else (channels,)
    if not chosen:
        raise ValueError(f"{what}: no channels are asked for")
    if wrong := [channel for channel in chosen if not isinstance(channel, Integral) or not 0 <= channel < width]:
        raise ValueError(f"{what}: no channel {wrong[0]}; the channels are 0 to {width - 1}")
    return tuple(map(int, chosen))


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _Matrices:
    """What JᵀJ of channels and of groups have in common."""

    values: Tensor

    @cached_property
    def eigenvalues(self) -> Tensor:
        """The eigenvalues of each JᵀJ, largest first, (..., d), in float64 on the CPU, clear of rounding below 0."""
        return torch.linalg.eigvalsh(self.values.double().cpu()).flip(-1).clamp_min(0)

    def _repr_html_(self) -> str:
        return f"<b>{html.escape(repr(self))}</b>{self.to_frame().to_html(index=False, float_format='{:.3g}'.format)}"


@dataclass(frozen=True, eq=False, repr=False)
class DenseJTJ(_Matrices):
    """JᵀJ of some channels of one layer axis.

    Attributes:
        axis: the layer and its axis.
        channels: which channels, in the order of ``values``.
        values: JᵀJ, shape (channels, d, d), d the number of parameters of one channel, its bias included.
        weights: w, shape (channels, d); ones when pooled.
        labels: the place of each of the d parameters in its tensor, ":" where the channel stands.
        rows: what one row of J is.
        pool: None, or "kernel" (see `dense_jtj`).
    """

    axis: LayerAxis
    channels: tuple[int, ...]
    values: Tensor
    weights: Tensor
    labels: tuple[str, ...]
    rows: Rows = "batch"
    pool: str | None = None

    def __post_init__(self):
        count, d = len(self.channels), len(self.labels)
        if self.values.shape != (count, d, d) or self.weights.shape != (count, d):
            shapes = f"{tuple(self.values.shape)} and {tuple(self.weights.shape)}"
            raise ValueError(
                f"{self.axis}: values and weights of shapes {shapes} for {count} channels of {d} parameters"
            )

    @cached_property
    def score(self) -> Tensor:
        """The Jacobian Criterion wᵀ(JᵀJ)w of each channel, shape (channels,), in float64."""
        w, values = self.weights.double(), self.values.double()
        return torch.einsum("ci,cij,cj->c", w, values, w)

    @cached_property
    def diagonal_score(self) -> Tensor:
        """Σ_i w_i²(JᵀJ)_ii: the score as it were if no two parameters interacted, shape (channels,), in float64."""
        return (self.weights.double().square() * self.values.double().diagonal(dim1=1, dim2=2)).sum(1)

    @property
    def offdiagonal_share(self) -> Tensor:
        """The share of each score that comes from off-diagonal terms, shape (channels,).

        1 − diagonal_score / score, NaN where the score is 0. Below 0 where the parameters cancel: at −9 the diagonal
        is ten times the score.
        """
        return 1 - self.diagonal_score / self.score

    @property
    def effective_rank(self) -> Tensor:
        """The effective rank of each JᵀJ (Roy and Vetterli 2007), shape (channels,); see `effective_rank`."""
        return effective_rank(self.eigenvalues)

    def pooled(self, size: int) -> Tensor:
        """Return the mean |JᵀJ| over size x size cells, for display, shape (channels, size, size)."""
        d = len(self.labels)
        if not 1 <= size <= d:
            raise ValueError(f"size={size}: a JᵀJ of {d} parameters has from 1 to {d} cells a side")
        return pool_cells(self.values.abs(), torch.arange(d) * size // d)

    def index_of(self, channel: int) -> int:
        """Return where a channel lies in ``values``; raise ValueError when it is not there."""
        if channel not in self.channels:
            raise ValueError(f"{self.axis}: no JᵀJ of channel {channel}; it holds {len(self.channels)} others")
        return self.channels.index(channel)

    def to_frame(self) -> pd.DataFrame:
        """Return one row a channel: score, diagonal score, off-diagonal share and effective rank."""
        columns = {
            "channel": self.channels,
            "score": self.score.tolist(),
            "diagonal score": self.diagonal_score.tolist(),
            "off-diagonal share": self.offdiagonal_share.tolist(),
            "effective rank": self.effective_rank.tolist(),
        }
        return pd.DataFrame(columns)

    def plot(self, mode: str = "absolute") -> go.Figure:
        """Draw the channels' JᵀJ as a grid of heatmaps; `obc_tools.plots` has more views."""
        from ..plots.jtj import jtj_grid

        return jtj_grid(self, mode=mode)

    def __repr__(self) -> str:
        pooled = f", pooled by {self.pool}" if self.pool else ""
        d = len(self.labels)
        return f"DenseJTJ({self.axis}, {len(self.channels)} channels, {d} x {d}, rows={self.rows!r}{pooled})"


def dense_jtj(
    model: nn.Module,
    batches: Iterable[Any],
    layer: str,
    channels: int | Iterable[int] | None = None,
    *,
    rows: Rows = "batch",
    objective: Objective = classification,
    axis: str = "out",
    pool: str | None = None,
    max_bytes: int = MAX_BYTES,
) -> DenseJTJ:
    """Compute JᵀJ over the parameters of single channels of a layer, streaming over the batches.

    With ``pool="kernel"`` the parameters of one kernel (an input channel's taps, or on the input axis an output
    filter's) make one block, and P_ab = Σ_n (Σ_{i∈a} J_ni w_i)(Σ_{i∈b} J_ni w_i) takes the place of JᵀJ: how the
    blocks' removals interact. Its entries add up to the same score; its ``weights`` are ones.

    Args:
        model: run in eval mode; its mode, gradients and flags are given back unchanged.
        batches: the calibration batches, whatever `objective` takes.
        layer: the name of a module or bare parameter.
        channels: which channels; all by default.
        rows, objective: as in `jacobian.jacobian_products`.
        axis: "out" or "in".
        max_bytes: refuse to build more than this.

    Raises:
        ValueError: an unknown layer, axis or channel, a request above `max_bytes` (says what it would cost), or what
            the batches and their losses may raise.
    """
    check_name("pool", pool, POOLS)
    model = without_weight_norms(model)
    part = channel_parameters(model, LayerAxis(layer, axis), channels)
    labels = part.labels(taps=pool is None)
    blocks = list(dict.fromkeys(labels))
    _check_size(part, len(blocks), max_bytes)
    cells = torch.tensor([blocks.index(label) for label in labels]) if pool else None
    weights, values = part.weights(), None

    def consume(name: str, gradients: Mapping[str, Tensor]) -> None:
        nonlocal values
        jacobian = part.jacobian(gradients)
        if cells is not None:
            jacobian = _sum_cells(jacobian * weights[:, None], cells)
        values = _add_gram(values, jacobian)

    for _ in stream_gradients(model, batches, [layer], consume, rows=rows, objective=objective):
        pass
    weights = torch.ones_like(weights[:, : len(blocks)]) if pool else weights
    return DenseJTJ(part.axis, part.channels, values, weights, tuple(blocks), rows, pool)


def channel_parameters(
    model: nn.Module, axis: LayerAxis, channels: int | Iterable[int] | None = None
) -> ChannelParameters:
    """Return the parameters of some channels of a layer axis; raise ValueError for unknown ones."""
    layer = get_layer(uncompiled(model), axis.layer)
    axes = layer_axes(layer, axis.layer)
    check_name(f"axis of layer {axis.layer!r}", axis.axis.partition("_")[0], axes)
    described = find_axis(layer, axis)
    slots = tuple(parameter_slots(layer, described))
    if not slots:
        raise UnknownLayerError(f"layer {axis.layer!r} ({type(layer).__name__}) has no channels with parameters")
    width = described.width
    chosen = range(width) if channels is None else [channels] if isinstance(channels, int) else channels
    return ChannelParameters(axis, own_parameters(layer), slots, check_channels(str(axis), chosen, width))


def _check_size(part: ChannelParameters, d: int, max_bytes: int) -> None:
    one = d * d * part.weights().element_size()
    needed = one * len(part.channels)
    if needed <= max_bytes:
        return
    kernels = len(set(part.labels(taps=False)))
    ways = [f"fewer channels (up to {max_bytes // one})"] if one <= max_bytes else []
    if kernels < d:
        ways.append(f"pool='kernel' ({_gigabytes(needed * kernels**2 // d**2)})")
    raise ValueError(
        f"{part.axis}: JᵀJ of {len(part.channels)} channels of {d:,} parameters takes {_gigabytes(needed)}, "
        f"more than max_bytes ({_gigabytes(max_bytes)}); ask for {', '.join([*ways, 'a larger max_bytes'])}"
    )


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.3g} GB"


def _add_gram(total: Tensor | None, jacobian: Tensor) -> Tensor:
    """Add JᵀJ of some rows, J of shape (channels, rows, d), to the sum over the rows before."""
    return jacobian.mT @ jacobian if total is None else total.baddbmm_(jacobian.mT, jacobian)


def effective_rank(eigenvalues: Tensor) -> Tensor:
    """Return exp(−Σ p_i ln p_i) with p the eigenvalues over their sum (Roy and Vetterli 2007); 0 where all are zero.

    Between 1 and the rank: how many directions the losses see.

    Example:
        >>> effective_rank(torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
        tensor([2., 1.])
    """
    total = eigenvalues.sum(-1, keepdim=True)
    shares = eigenvalues / total.where(total > 0, 1)
    rank = torch.special.entr(shares).sum(-1).exp()
    return rank.where(total.squeeze(-1) > 0, 0)


@dataclass(frozen=True)
class GroupBlock:
    """The parameters of one member of a group at one position: ``start`` to ``stop`` of a group's JᵀJ."""

    axis: LayerAxis
    position: int
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.axis}[{self.position}]"


@dataclass(frozen=True, eq=False, repr=False)
class GroupJTJ(_Matrices):
    """JᵀJ over all parameters that go when one channel of a group goes.

    Attributes:
        group, channel: which channel of which group.
        values: JᵀJ, shape (d, d), the members' parameters one after the other.
        weights: w, shape (d,).
        members: where each member lies; one block a position where a channel has several (a flattened axis).
        labels: the place of each of the d parameters.
    """

    group: ChannelGroup
    channel: int
    values: Tensor
    weights: Tensor
    members: tuple[GroupBlock, ...]
    labels: tuple[str, ...]
    rows: Rows = "batch"

    @cached_property
    def interactions(self) -> Tensor:
        """w_aᵀ(JᵀJ)_ab w_b of the members a and b, shape (members, members), in float64."""
        weighted = torch.outer(self.weights, self.weights).double() * self.values.double()
        cells = torch.tensor([i for i, block in enumerate(self.members) for _ in range(block.start, block.stop)])
        return _sum_cells(_sum_cells(weighted, cells).mT, cells).mT

    @property
    def score(self) -> float:
        """The group's Jacobian Criterion: the sum of the members' scores, as `score_groups` gives it."""
        return self.interactions.trace().item()

    @property
    def coupled_score(self) -> float:
        """wᵀ(JᵀJ)w over all members together, their cross terms kept: the score with ``coupling="group"``."""
        return self.interactions.sum().item()

    @property
    def effective_rank(self) -> float:
        """The effective rank of JᵀJ; see `effective_rank`."""
        return effective_rank(self.eigenvalues).item()

    def to_frame(self) -> pd.DataFrame:
        """Return one row a member: its number of parameters, score and share of the group's score."""
        scores = self.interactions.diagonal()
        columns = {
            "member": [str(block) for block in self.members],
            "parameters": [block.stop - block.start for block in self.members],
            "score": scores.tolist(),
            "share": (scores / scores.sum()).tolist(),
        }
        return pd.DataFrame(columns)

    def plot(self, mode: str = "absolute") -> go.Figure:
        """Draw JᵀJ as a heatmap with the members' borders."""
        from ..plots.jtj import group_jtj_heatmap

        return group_jtj_heatmap(self, mode=mode)

    def __repr__(self) -> str:
        d = len(self.labels)
        return f"GroupJTJ({self.group.root}, channel {self.channel}, {len(self.members)} members, {d} x {d})"


def group_jtj(
    model: nn.Module,
    batches: Iterable[Any],
    group: ChannelGroup,
    channel: int,
    *,
    rows: Rows = "batch",
    objective: Objective = classification,
    max_bytes: int = MAX_BYTES,
) -> GroupJTJ:
    """Compute JᵀJ over the concatenated parameters of all members of a group that belong to one of its channels.

    Members without parameters (a norm without scale) are left out, tied ones are one (see `score_groups`). For the
    arguments and errors see `dense_jtj`.
    """
    if not isinstance(group, ChannelGroup):
        raise ValueError(f"group={group!r}: expected a group of channels, one of those that find_groups returns")
    check_channels(f"group {group.root}", [channel], group.width)
    model = without_weight_norms(model)
    members = distinct_members(uncompiled(model), group.members)
    parts = [part for member in members if (part := _part_of_channel(model, member, channel)) is not None]
    members, labels = _blocks(parts)
    needed = len(labels) ** 2 * parts[0].weights().element_size()
    if needed > max_bytes:
        raise ValueError(
            f"group {group.root}: JᵀJ of {len(labels):,} parameters takes {_gigabytes(needed)}, more than max_bytes "
            f"({_gigabytes(max_bytes)}); look at single layers with dense_jtj, or give a larger max_bytes"
        )
    values, found = None, defaultdict(list)

    def consume(name: str, gradients: Mapping[str, Tensor]) -> None:
        for index, part in enumerate(parts):
            if part.axis.layer == name:
                found[index].append(part.jacobian(gradients).transpose(0, 1).flatten(1))

    layers = [part.axis.layer for part in parts]
    for _ in stream_gradients(model, batches, layers, consume, rows=rows, objective=objective):
        jacobian = torch.cat([torch.cat(found.pop(index)) for index in range(len(parts))], dim=1)
        values = _add_gram(values, jacobian[None])
    weights = torch.cat([part.weights().flatten() for part in parts])
    return GroupJTJ(group, channel, values[0], weights, members, labels, rows)


def _part_of_channel(model: nn.Module, member: Member, channel: int) -> ChannelParameters | None:
    """Return a member's parameters of one channel, at all its positions; None when it has none."""
    positions = [p for p, c in zip(member.positions, member.channels, strict=True) if c == channel]
    layer = get_layer(uncompiled(model), member.axis.layer)
    slots = parameter_slots(layer, find_axis(layer, member.axis))
    return channel_parameters(model, member.axis, positions) if positions and slots else None


def _blocks(parts: Sequence[ChannelParameters]) -> tuple[tuple[GroupBlock, ...], tuple[str, ...]]:
    blocks, labels = [], []
    for part in parts:
        places = part.labels()
        for position in part.channels:
            start = len(labels)
            labels += [f"{part.axis.layer}.{place} of {part.axis.axis} {position}" for place in places]
            blocks.append(GroupBlock(part.axis, position, start, len(labels)))
    return tuple(blocks), tuple(labels)


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
        check_name("order", by, ("cluster", "score"))
        if by == "score" or len(self.values) == 1:
            return tuple(self.score.argsort(descending=True, stable=True).tolist())
        # Few look at this, and importing it takes as long as all the rest.
        from scipy.cluster import hierarchy
        from scipy.spatial.distance import squareform

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
        return f"<b>{html.escape(repr(self))}</b>, the strongest pairs{pairs}"


def filter_interactions(products: JacobianProducts, layer: str, axis: str = "out") -> FilterInteractions:
    """Compute the interactions of a layer's channels from their products J·w; raise ValueError for an unknown layer."""
    if not isinstance(products, JacobianProducts):
        raise ValueError(f"products: expected what jacobian_products returns, not {type(products).__name__}")
    name = LayerAxis(layer, axis)
    weighted = products[name].double().cpu()
    return FilterInteractions(name, weighted.T @ weighted)
