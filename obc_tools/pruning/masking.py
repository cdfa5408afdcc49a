"""The masked network: what a pruned one must equal, made without any of the code that prunes.

A copy of full size in which the removed channels are nothing: every weight at a removed position is zero, of consumers
above all, and of producers too, for what has no weights of its own (the product of queries and keys). Norms that take
statistics over channels (LayerNorm, RMSNorm, GroupNorm, global response norm) see only the kept ones, and so do
convolutions that standardise their weights over their inputs.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from timm.layers import norm as timm_norms
from timm.layers import std_conv
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn

from ..structure.groups import Member
from ..structure.layers import LayerAxis, all_axes, get_layer
from .plan import PruningPlan

CHANNEL_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    GlobalResponseNorm,
    timm_norms.RmsNorm,
    timm_norms.RmsNormFp32,
    timm_norms.RmsNorm2d,
    timm_norms.RmsNorm2dFp32,
    timm_norms.SimpleNorm,
    timm_norms.SimpleNormFp32,
    timm_norms.SimpleNorm2d,
    timm_norms.SimpleNorm2dFp32,
)
"""Layers whose statistics run over channels, so that zeros would count."""
STANDARDISED = (
    std_conv.StdConv2d,
    std_conv.StdConv2dSame,
    std_conv.ScaledStdConv2d,
    std_conv.ScaledStdConv2dSame,
)
"""Convolutions whose weights are standardised over their inputs, so that zeros would count."""


@torch.no_grad()
def masked(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Return a copy of the unpruned model in which the channels that the plan removes have no influence.

    Raises:
        PlanMismatchError: the plan does not fit the model.
    """
    plan.validate(model)
    copied = copy.deepcopy(model)
    removed, widths = _removed(plan)
    for axis, gone in removed.items():
        _zero(get_layer(copied, axis.layer), axis, sorted(gone))
    for axis, gone in removed.items():
        kept = sorted(set(range(widths[axis])).difference(gone))
        if norm := _channel_norm(copied, axis):
            _see_only(norm, kept, widths[axis])
        elif axis.axis == "in" and isinstance(layer := get_layer(copied, axis.layer), STANDARDISED):
            _take_only(layer, kept)
    for member, kept in _norms_without_weights(copied, plan):
        _see_only(get_layer(copied, member.axis.layer), kept, member.width)
    return copied


def _norms_without_weights(model: nn.Module, plan: PruningPlan) -> Iterator[tuple[Member, list[int]]]:
    """Yield the norms over channels that own no parameters, by the attribute that holds their width, and what stays."""
    for group, kept in zip(plan.groups, plan.kept, strict=True):
        stay = set(kept)
        for member in group.attributes if len(stay) < group.width else ():
            layer = get_layer(model, member.axis.layer)
            if isinstance(layer, CHANNEL_NORMS) and not any(True for _ in layer.parameters(recurse=False)):
                pairs = zip(member.positions, member.channels, strict=True)
                yield member, sorted(position for position, channel in pairs if channel in stay)


def _removed(plan: PruningPlan) -> tuple[dict[LayerAxis, set[int]], dict[LayerAxis, int]]:
    """Return the positions that go of every axis that loses any, and the widths of these axes."""
    removed: dict[LayerAxis, set[int]] = defaultdict(set)
    widths = {}
    for group, kept in zip(plan.groups, plan.kept, strict=True):
        gone = set(range(group.width)).difference(kept)
        for member in group.members if gone else ():
            widths[member.axis] = member.width
            pairs = zip(member.positions, member.channels, strict=True)
            removed[member.axis].update(position for position, channel in pairs if channel in gone)
    return {axis: gone for axis, gone in removed.items() if gone}, widths


def _zero(layer: nn.Module | Tensor, axis: LayerAxis, gone: Sequence[int]) -> None:
    """Set everything to zero that a layer holds for the given positions of an axis."""
    if isinstance(layer, Tensor):
        layer.movedim(all_axes(layer, axis.layer)[axis.axis].slots[0].dim, 0)[gone] = 0
    elif isinstance(layer, nn.MultiheadAttention):
        _zero_attention(layer, axis.axis, gone)
    elif isinstance(layer, nn.modules.conv._ConvNd):
        for position in gone:
            _convolution_weights(layer, axis.axis, position).zero_()
        _zero_bias(layer, axis, gone)
    elif isinstance(layer, nn.Linear | nn.Embedding):
        outputs = 0 if isinstance(layer, nn.Linear) else 1
        layer.weight.movedim(outputs if axis.axis == "out" else 1, 0)[gone] = 0
        _zero_bias(layer, axis, gone)
    else:
        for parameter in layer.parameters(recurse=False):
            parameter[gone] = 0


def _zero_bias(layer: nn.Module, axis: LayerAxis, gone: Sequence[int]) -> None:
    bias = getattr(layer, "bias", None)
    if axis.axis == "out" and bias is not None:
        bias[gone] = 0


def _zero_attention(layer: nn.MultiheadAttention, key: str, gone: Sequence[int]) -> None:
    if key == "in":
        layer.in_proj_weight[:, gone] = 0
        return
    rows = [part * layer.embed_dim + position for part in range(3) for position in gone]
    layer.in_proj_weight[rows] = 0
    if layer.in_proj_bias is not None:
        layer.in_proj_bias[rows] = 0


def _convolution_weights(layer: nn.modules.conv._ConvNd, key: str, position: int) -> Tensor:
    """Return a view of the weights of one output or input channel of a convolution, grouped or not."""
    along_first = (key == "out") != layer.transposed
    depthwise = layer.groups == layer.in_channels == layer.out_channels
    if along_first or depthwise:
        return layer.weight[position]
    group, inside = divmod(position, layer.weight.shape[1])
    rows = layer.weight.shape[0] // layer.groups
    return layer.weight[group * rows : (group + 1) * rows, inside]


def _channel_norm(model: nn.Module, axis: LayerAxis) -> nn.Module | None:
    """Return the norm over channels that an axis belongs to, once for all of its parameters, or None."""
    layer = get_layer(model, axis.layer)
    if not isinstance(layer, Tensor):
        return layer if isinstance(layer, CHANNEL_NORMS) else None
    owner, _, leaf = axis.layer.rpartition(".")
    norm = model.get_submodule(owner)
    first = next((name for name, _ in norm.named_parameters(recurse=False)), None)
    return norm if isinstance(norm, CHANNEL_NORMS) and leaf == first else None


def _see_only(norm: nn.Module, kept: Sequence[int], width: int) -> None:
    """Narrow a norm to the kept channels; hooks pick its input's and put its output back among zeros."""
    dim = 1 if _channels_first(norm, width) else -1
    index = torch.tensor(kept)
    for name, parameter in list(norm.named_parameters(recurse=False)):
        setattr(norm, name, nn.Parameter(parameter[index.to(parameter.device)]))
    if isinstance(norm, nn.GroupNorm):
        norm.num_channels = len(kept)
    elif not isinstance(norm, GlobalResponseNorm):
        norm.normalized_shape = (len(kept),)

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


def _channels_first(norm: nn.Module, width: int) -> bool:
    """Say whether a norm takes its channels from dimension 1: one that takes the last refuses a pixel of such shape."""
    if isinstance(norm, nn.GroupNorm):
        return True
    like = next(norm.parameters(recurse=False), torch.empty(0))
    pixel = like.new_ones(1, width, 1, 1)
    try:
        return norm(pixel).shape == pixel.shape
    except RuntimeError:
        return False
