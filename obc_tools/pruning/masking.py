"""The masked network: what a pruned one must equal, made without any of the code that prunes.

A copy of full size in which the removed channels are nothing: every weight at a removed position is zero, of consumers
above all, and of producers too, for what has no weights of its own (the product of queries and keys). Norms that take
statistics over channels (LayerNorm, RMSNorm, GroupNorm, global response norm) see only the kept ones, and so do
convolutions that standardise their weights over their inputs.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..structure.layers import LayerAxis, all_axes, channel_dims, get_layer, is_norm, layer_type, own_tensors
from ..structure.shrinking import is_attribute
from .plan import PruningPlan


@torch.no_grad()
def masked(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Return a copy of the unpruned model in which the channels that the plan removes have no influence.

    Raises:
        PlanMismatchError: the plan does not fit the model.
    """
    plan.validate(model)
    copied = copy.deepcopy(model)
    removed, widths = _removed(plan)
    norms: dict[nn.Module, tuple[list[int], int]] = {}
    for axis, gone in removed.items():
        kept = sorted(set(range(widths[axis])).difference(gone))
        layer = get_layer(copied, axis.layer)
        if not is_attribute(axis.axis):
            _zero(layer, axis, sorted(gone))
        owner = layer if isinstance(layer, nn.Module) else copied.get_submodule(axis.layer.rpartition(".")[0])
        if is_norm(owner, "channels") and _is_width(owner, axis.axis):
            norms[owner] = kept, widths[axis]
        elif axis.axis == "in" and layer_type(layer).statistics == "weights":
            _take_only(layer, kept)
    for norm, (kept, width) in norms.items():
        _see_only(norm, kept, width)
    return copied


def _is_width(norm: nn.Module, axis: str) -> bool:
    """Say whether an axis is that of a norm's channels: of its parameters, or of the attribute that holds the width."""
    return not is_attribute(axis) or axis[1:].partition(".")[0] in layer_type(norm).widths


def _removed(plan: PruningPlan) -> tuple[dict[LayerAxis, set[int]], dict[LayerAxis, int]]:
    """Return the positions that go of every axis that loses any, attributes included, and the widths of these axes."""
    removed: dict[LayerAxis, set[int]] = defaultdict(set)
    widths = {}
    for group, kept in zip(plan.groups, plan.kept, strict=True):
        gone = set(range(group.width)).difference(kept)
        for member in (*group.members, *group.attributes) if gone else ():
            widths[member.axis] = member.width
            pairs = zip(member.positions, member.channels, strict=True)
            removed[member.axis].update(position for position, channel in pairs if channel in gone)
    return {axis: gone for axis, gone in removed.items() if gone}, widths


def _zero(layer: nn.Module | Tensor, axis: LayerAxis, gone: Sequence[int]) -> None:
    """Set everything to zero that a layer holds for the given positions of an axis, but running statistics."""
    tensors = own_tensors(layer)
    for slot in all_axes(layer, axis.layer)[axis.axis].slots:
        if not slot.tensor.startswith("running_"):
            split, dims = channel_dims(tensors[slot.tensor], slot)
            channels = split.movedim(dims, tuple(range(len(dims))))
            channels[np.unravel_index(gone, channels.shape[: len(dims)])] = 0


def _see_only(norm: nn.Module, kept: Sequence[int], width: int) -> None:
    """Narrow a norm to the kept channels; hooks pick its input's and put its output back among zeros."""
    dim = _channel_dim(norm, width)
    index = torch.tensor(kept)
    for slot in all_axes(norm)["out"].slots:
        parameter = own_tensors(norm)[slot.tensor]
        setattr(norm, slot.tensor, nn.Parameter(parameter.index_select(slot.dim, index.to(parameter.device))))
    for attribute in layer_type(norm).widths:
        held = getattr(norm, attribute)
        setattr(norm, attribute, (len(kept),) if isinstance(held, tuple) else len(kept))

    def pick(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].index_select(dim, index.to(inputs[0].device)), *inputs[1:])

    def put_back(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        shape = list(output.shape)
        shape[dim] = width
        return output.new_zeros(shape).index_copy(dim, index.to(output.device), output)

    norm.register_forward_pre_hook(pick)
    norm.register_forward_hook(put_back)


def _take_only(layer: nn.Conv2d, kept: Sequence[int]) -> None:
    """Narrow a convolution to the kept inputs; a hook picks them."""
    index = torch.tensor(kept, device=layer.weight.device)
    inside = (index % layer.weight.shape[1]).view(layer.groups, -1)
    blocks = layer.weight.detach().unflatten(0, (layer.groups, -1))
    weight = torch.cat([block[:, own] for block, own in zip(blocks, inside, strict=True)])
    layer.weight = nn.Parameter(weight)
    layer.in_channels = len(kept)
    layer.register_forward_pre_hook(lambda _module, inputs: (inputs[0].index_select(1, index),))


def _channel_dim(norm: nn.Module, width: int) -> int:
    """Return the dimension that a norm takes its channels from; by trial, as a subclass may take another one.

    A norm that takes the last refuses a pixel of such shape.
    """
    known = layer_type(norm).channels
    if known is not None:
        return known
    like = next(norm.parameters(recurse=False), torch.empty(0))
    pixel = like.new_ones(1, width, 1, 1)
    try:
        return 1 if norm(pixel).shape == pixel.shape else -1
    except RuntimeError:
        return -1
