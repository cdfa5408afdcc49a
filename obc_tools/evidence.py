"""What criteria look at, collected from a model and batches: squared products, and gradients of the mean loss.

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
            joined = sum(
                _by_channel(group.width, member.positions, member.channels, products[member.axis])
                for member in group.members
                if member.axis in products
            )
            total += joined.square().sum(0)
    return totals


def _by_channel(width: int, positions: Sequence[int], channels: Sequence[int], product: Tensor) -> Tensor:
    """Sum a member's products, (rows, positions of the axis), over the positions of each channel: (rows, width)."""
    at = product.double().cpu()[:, torch.tensor(positions)]
    return at.new_zeros(len(at), width).index_add_(1, torch.tensor(channels), at)


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
