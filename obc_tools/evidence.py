"""What criteria look at, collected from a model and batches: squared products, gradients and squared gradients.

Everything is accumulated batch by batch in constant memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .groups import ChannelGroup
from .jacobian import Objective, batch_loss, classification
from .layers import LayerAxis, get_layer, own_parameters
from .row_gradients import stream_gradients
from .state import differentiable, evaluating, numbered

Products = Mapping[LayerAxis, Tensor]
"""J·w of the channels of layer axes for some rows: LayerAxis -> (rows, channels)."""


def sum_squares(stream: Iterable[Products]) -> dict[LayerAxis, Tensor]:
    """Add up the squares of streamed products over all rows, in float64: LayerAxis -> (channels,)."""
    totals: dict[LayerAxis, Tensor] = {}
    for products in stream:
        for axis, product in products.items():
            squares = product.double().square().sum(0)
            totals[axis] = totals[axis] + squares if axis in totals else squares
    return totals


def sum_group_squares(groups: Sequence[ChannelGroup], stream: Iterable[Products]) -> dict[ChannelGroup, Tensor]:
    """Add up Σ_n (Σ_m Σ_p J_{m,p} w_{m,p})² of each channel over all rows, in float64: group -> (width,).

    The cross terms between a group's members m and positions p are kept: this is wᵀ(JᵀJ)w over the concatenated
    parameters of all that goes with a channel.
    """
    totals = {group: torch.zeros(group.width, dtype=torch.float64) for group in groups}
    for products in stream:
        for group, total in totals.items():
            total += _joined(group, products).square().sum(0)
    return totals


def _by_channel(width: int, positions: Sequence[int], channels: Sequence[int], product: Tensor) -> Tensor:
    """Sum a member's products, (rows, positions of the axis), over the positions of each channel: (rows, width)."""
    at = product.double().cpu()[:, torch.tensor(positions)]
    return at.new_zeros(len(at), width).index_add_(1, torch.tensor(channels), at)


def removal_ranks(groups: Sequence[ChannelGroup], stream: Iterable[Products]) -> dict[ChannelGroup, Tensor]:
    """Rank all channels of all groups in the order of a greedy removal together: group -> (width,), 0 goes first.

    Next goes the channel c that leaves the least 1ᵀK1 = Σ_n (Σ_{i ∈ S ∪ {c}} J_n w_i)² of the removed set S: the
    first-order squared loss change of removing the set, a group's members joined as in `sum_group_squares`. All rows
    are kept, rows x channels numbers, and the time grows with rows x channels².
    """
    rows = torch.cat([torch.cat([_joined(group, products) for group in groups], 1) for products in stream])
    squares = rows.square().sum(0)
    removed = rows.new_zeros(len(rows))
    ranks = torch.full_like(squares, torch.inf)
    for rank in range(rows.shape[1]):
        change = squares + 2 * (removed @ rows)
        change[ranks < torch.inf] = torch.inf
        channel = int(change.argmin())
        ranks[channel] = rank
        removed += rows[:, channel]
    return dict(zip(groups, ranks.split([group.width for group in groups]), strict=True))


def _joined(group: ChannelGroup, products: Products) -> Tensor:
    """Return Σ_m Σ_p J_{m,p} w_{m,p} of each channel of a group, (rows, width), in float64 on the CPU."""
    members = [member for member in group.members if member.axis in products]
    return sum(_by_channel(group.width, m.positions, m.channels, products[m.axis]) for m in members)


def sum_square_gradients(
    model: nn.Module, batches: Iterable[Any], layers: Iterable[str], *, objective: Objective = classification
) -> dict[str, dict[str, Tensor]]:
    """Return Σ_n g_n², the squared gradients of the examples' own losses: layer -> parameter name -> (*its shape,).

    One backward pass a batch where examples do not see each other. Raises ValueError as `stream_gradients` does.
    """
    totals: dict[str, dict[str, Tensor]] = defaultdict(dict)
    layers = list(dict.fromkeys(layers))
    for rows in stream_gradients(model, batches, layers, rows="sample", objective=objective):
        for (layer, name), gradients in rows.items():
            squares = gradients.to(torch.promote_types(gradients.dtype, torch.float32)).square().sum(0)
            totals[layer][name] = totals[layer][name] + squares if name in totals[layer] else squares
    return dict(totals)


def mean_gradients(
    model: nn.Module, batches: Iterable[Any], layers: Iterable[str], *, objective: Objective = classification
) -> dict[str, dict[str, Tensor]]:
    """Return the gradient of the mean loss over all batches: layer -> parameter name -> gradient.

    Batches weigh equally. Raises ValueError as `stream_products` does.
    """
    owners = {name: own_parameters(get_layer(model, name)) for name in layers}
    named = {(name, key): p for name, own in owners.items() for key, p in own.items()}
    parameters = list(dict.fromkeys(named.values()))
    totals = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
    with evaluating(model), differentiable(model, parameters):
        for count, batch in numbered(batches):
            loss = batch_loss(model, batch, objective, count)
            for total, gradient in zip(totals, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
                if gradient is not None:
                    total += gradient
    gradients = dict(zip(parameters, totals, strict=True))
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for (name, key), parameter in named.items():
        found[name][key] = gradients[parameter] / count
    return dict(found)
