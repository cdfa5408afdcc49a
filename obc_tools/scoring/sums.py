"""Sums of δ·z and ε·x, one an example and channel, and the gradients of one layer's parameters from x and δ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn import functional as F

from ..structure.layers import fixed_outputs, own_parameters

RowsOf = Callable[[Any, Tensor, Tensor], dict[str, Tensor]]


def layer_row_gradients(layer: nn.Module | nn.Parameter, inputs: Tensor, deltas: Tensor) -> dict[str, Tensor]:
    """Return the gradient of each of a layer's parameters for each row, shape (rows, *parameter.shape).

    Args:
        layer: called with one tensor, and the leading axis of what it took and gave is the example; or a bare
            parameter, of which every example took a copy; or an attention, whose projection is meant.
        inputs: what it took, (rows, examples a row, ...).
        deltas: the gradient at what it gave, (rows, examples a row, ...).
    """
    dtype = next(iter(own_parameters(layer).values())).dtype
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    return _way_of(layer)(layer, inputs, deltas.to(dtype))


def _way_of(layer: nn.Module | nn.Parameter) -> RowsOf:
    """Return the formula of a layer's type, should the layer be called as its type is, or the way of all others."""
    for kind, way in GRADIENTS.items():
        if isinstance(layer, kind) and getattr(type(layer), "forward", None) is getattr(kind, "forward", None):
            return way
    return _any


def _broadcast(layer: nn.Parameter, inputs: Tensor, deltas: Tensor) -> dict[str, Tensor]:
    return {"": deltas.reshape(*deltas.shape[:2], *layer.shape).sum(1)}


def _linear(layer: nn.Module, inputs: Tensor, deltas: Tensor) -> dict[str, Tensor]:
    x, delta = inputs.flatten(1, -2), deltas.flatten(1, -2)
    return _named(layer, delta.mT @ x, delta.sum(1))


def _embedding(layer: nn.Embedding, inputs: Tensor, deltas: Tensor) -> dict[str, Tensor]:
    taken, delta = inputs.flatten(1), deltas.flatten(1, -2)
    fixed = fixed_outputs(layer, taken)
    delta = delta if fixed is None else delta.masked_fill(fixed, 0)
    weight = delta.new_zeros(len(delta), *layer.weight.shape)
    return {"weight": weight.scatter_add_(1, taken.unsqueeze(-1).expand_as(delta), delta)}


def _convolution(layer: nn.Conv2d, inputs: Tensor, deltas: Tensor) -> dict[str, Tensor]:
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return _any(layer, inputs, deltas)
    rows, size = inputs.shape[:2]
    patches = _patches(layer, inputs.flatten(0, 1)).unflatten(0, (rows, size))
    delta = deltas.flatten(3).unflatten(2, (layer.groups, -1))
    # (rows, groups, channels of a group, places of all examples of the row)
    patches, delta = (part.permute(0, 2, 3, 1, 4).flatten(3) for part in (patches, delta))
    weight = (delta @ patches.mT).flatten(1, 2).unflatten(2, layer.weight.shape[1:])
    return _named(layer, weight, deltas.sum((1, 3, 4)))


def _patches(layer: nn.Conv2d, images: Tensor) -> Tensor:
    """Return what each output sees, (images, groups, inputs of a group * kernel, places)."""
    if layer.kernel_size == (1, 1) and layer.padding == (0, 0):
        patches = images[:, :, :: layer.stride[0], :: layer.stride[1]].flatten(2)
        return patches.unflatten(1, (layer.groups, -1))
    padding = tuple(border for border in reversed(layer.padding) for _ in range(2))
    padded = F.pad(images, padding).contiguous()
    extent = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    places = [(n - e) // s + 1 for n, e, s in zip(padded.shape[2:], extent, layer.stride, strict=True)]
    count, channels, down, right = padded.stride()
    taps, steps = ([down * x[0], right * x[1]] for x in (layer.dilation, layer.stride))
    # Copying a strided view takes a third of the time of F.unfold on a CPU.
    windows = padded.as_strided(
        (*padded.shape[:2], *layer.kernel_size, *places), (count, channels, *taps, *steps), padded.storage_offset()
    )
    return windows.reshape(len(images), layer.groups, -1, places[0] * places[1])


def _named(layer: nn.Module, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    # Those of an attention's projection are the in_proj_weight and the in_proj_bias.
    return {name: bias if name.endswith("bias") else weight for name in own_parameters(layer)}


def _any(layer: nn.Module, inputs: Tensor, deltas: Tensor) -> dict[str, Tensor]:
    parameters = {name: parameter.detach() for name, parameter in own_parameters(layer).items()}

    def of_row(row: Tensor, delta: Tensor) -> dict[str, Tensor]:
        return vjp(lambda given: functional_call(layer, given, (row,)), parameters)[1](delta)[0]

    return vmap(of_row)(inputs, deltas)


GRADIENTS: Mapping[type, RowsOf] = {
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
    nn.Embedding: _embedding,
    nn.MultiheadAttention: _linear,
    Tensor: _broadcast,
}
"""Layer type -> the gradient of its parameters from (x, δ); all others are differentiated once a row."""


FEW_PLACES = 4
"""Places of a small image: summed channel by channel, it takes longer than to lay its channels last."""


def channel_sums(
    gradient: Tensor, value: Tensor, dim: int, *, mean: Tensor | None = None, whole: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return Σ g·(v − mean) and, with a mean, Σ g over all but examples and channels: (examples, channels).

    Sums are at least in float32; with `whole` they are over the examples too: (1, channels).
    """
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    gradient, value = gradient.to(dtype), value.to(dtype)
    few = gradient.dim() > 2 and gradient.shape[2:].numel() <= FEW_PLACES
    last = whole and gradient.dim() == 4 and (few or gradient.is_contiguous(memory_format=torch.channels_last))
    if dim == 1 and gradient.dim() > 2 and (last or (gradient.is_contiguous() and not few)):
        layout = torch.channels_last if last else torch.contiguous_format
        pair = (tensor.contiguous(memory_format=layout) for tensor in (gradient, value))
        first, zeroth = _image_sums(*pair, mean, whole)
        return first, None if mean is None else zeroth
    gradient, value = gradient.movedim(dim, -1), value.movedim(dim, -1)
    value = value if mean is None else value - mean
    if whole:
        return _token_sums(gradient, value)
    factors = (gradient * value, None if mean is None else gradient)
    return tuple(t if t is None or t.dim() < 3 else t.flatten(1, -2).sum(1) for t in factors)


def _image_sums(gradient: Tensor, value: Tensor, mean: Tensor | None, whole: bool) -> tuple[Tensor, Tensor]:
    """Return Σ g · (v − mean) and Σ g of (examples, channels, ...) in one pass, without a temporary of their size.

    torch has no such reduction, but the backward pass of a batch norm in eval mode is one: its gradients of weight and
    bias are these sums. Each (example, channel) counts as a channel there unless the sums are over the examples too.
    """
    examples, channels = gradient.shape[:2]
    shape = (1, channels) if whole else (examples, channels)
    flat = (examples, channels, -1) if whole else (1, examples * channels, -1)
    mean = gradient.new_zeros(channels) if mean is None else mean.to(gradient.dtype)
    mean = mean.repeat(shape[0])
    last = whole and gradient.dim() == 4 and gradient.is_contiguous(memory_format=torch.channels_last)
    pair, ones = (gradient, value) if last else (gradient.view(flat), value.view(flat)), torch.ones_like(mean)
    _, first, zeroth = torch.ops.aten.native_batch_norm_backward(
        *pair, None, mean, ones, None, None, False, 0.0, (False, True, True)
    )
    return first.view(shape), zeroth.view(shape)


def _token_sums(gradient: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ g · v and Σ g of (..., channels), each (1, channels), likewise by a layer norm's backward pass."""
    width, leading = gradient.shape[-1], range(gradient.dim() - 1)
    order = (*sorted(leading, key=gradient.stride, reverse=True), gradient.dim() - 1)
    rows, values = (t.permute(order).reshape(-1, width).contiguous() for t in (gradient, value))
    mean, deviation = rows.new_zeros(len(rows), 1), rows.new_ones(len(rows), 1)
    ones, zeros = rows.new_ones(width), rows.new_zeros(width)
    _, first, zeroth = torch.ops.aten.native_layer_norm_backward(
        rows, values, [width], mean, deviation, ones, zeros, (False, True, True)
    )
    return first[None], zeroth[None]
