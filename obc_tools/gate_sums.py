"""Sums of gradient · value for each example and channel, in as few passes over memory as torch allows."""

from __future__ import annotations

import torch
from torch import Tensor


def example_sums(gradient: Tensor, value: Tensor, channel_dim: int) -> Tensor:
    """Sum gradient · value over all dimensions but the first and the channels', at least in float32: (n, channels)."""
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    gradient, value = gradient.to(dtype), value.to(dtype)
    if channel_dim == 1 and gradient.dim() > 2 and gradient.is_contiguous() and value.is_contiguous():
        return _row_sums(gradient, value, None)[0]
    others = [dim for dim in range(1, gradient.dim()) if dim != channel_dim]
    product = gradient * value
    return product.sum(others) if others else product


def centred_sums(gradient: Tensor, value: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ gradient · (value − mean) and Σ gradient over the positions, both (n, channels); channels along 1."""
    gradient, value = gradient.to(mean.dtype), value.to(mean.dtype)
    if gradient.is_contiguous() and value.is_contiguous():
        return _row_sums(gradient, value, mean)
    others = list(range(2, gradient.dim()))
    product = gradient * (value - mean.view(-1, *[1] * len(others)))
    return (product.sum(others), gradient.sum(others)) if others else (product, gradient)


def _row_sums(gradient: Tensor, value: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return Σ g · (v − mean) and Σ g over all dimensions from the third on, without a temporary of their size.

    torch has no such reduction, but the backward pass of a batch norm in eval mode is one when each (example, channel)
    counts as a channel: its gradients of weight and bias are these sums.
    """
    shape = gradient.shape[:2]
    rows = shape.numel()
    mean = gradient.new_zeros(rows) if mean is None else mean.repeat(shape[0])
    flat = (1, rows, -1)
    _, first, zeroth = torch.ops.aten.native_batch_norm_backward(
        gradient.view(flat),
        value.view(flat),
        None,
        mean,
        torch.ones_like(mean),
        None,
        None,
        False,
        0.0,
        (False, True, True),
    )
    return first.view(shape), zeroth.view(shape)
