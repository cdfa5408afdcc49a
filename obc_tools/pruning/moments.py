"""Least squares of a layer's outputs on its inputs, from second moments that are summed up batch by batch.

The canonical layout. Whatever its type, a layer linear in its inputs is one matrix a convolution group, and what it
sees at one output position is d numbers: inputs ``(groups, d, positions)``, outputs ``(groups, o, positions)``, weight
``(groups, o, d)``, where d runs over the input channels of a group and then over the kernel's taps, and positions over
examples and places. A depthwise convolution has as many groups as channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ..state import Wrapped
from ..structure.layers import kernel_dims, layer_type, own_parameters
from .equivalent import Mixing

CHUNK = 2**22
"""The most numbers of unfolded inputs held at once, unless one example has more."""
BLOCK = 256
"""The least rows of products that are worth a call of their own."""


class Moments:
    """Sums over positions of products of inputs x and outputs y, in float64; the products are at least float32.

    With ``centred``, of both less their means. They are taken less the first chunk's means, so that little cancels.
    ``squares`` holds x xᵀ on and below its diagonal.
    """

    def __init__(self, groups: int, inputs: int, outputs: int, *, centred: bool, device: torch.device):
        make = {"dtype": torch.float64, "device": device}
        self.squares = torch.zeros(groups, inputs, inputs, **make)
        self.products = torch.zeros(groups, outputs, inputs, **make)
        self.input_sums, self.output_sums = torch.zeros(groups, inputs, **make), torch.zeros(groups, outputs, **make)
        self.count, self.centred = 0, centred
        self._shifts: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def nbytes(groups: int, inputs: int, outputs: int) -> int:
        """Return how many bytes the sums and their solution take."""
        return 16 * groups * inputs * (inputs + outputs)

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add positions: inputs (groups, d, positions), outputs (groups, o, positions)."""
        dtype = torch.promote_types(inputs.dtype, torch.float32)
        inputs, outputs = inputs.to(dtype), outputs.to(dtype)
        if self.centred:
            if self._shifts is None:
                self._shifts = inputs.mean(2), outputs.mean(2)
            inputs, outputs = inputs - self._shifts[0][..., None], outputs - self._shifts[1][..., None]
            self.input_sums += inputs.sum(2)
            self.output_sums += outputs.sum(2)
        _add_squares(self.squares, inputs)
        self.products += outputs @ inputs.mT
        self.count += inputs.shape[2]

    @property
    def finite(self) -> bool:
        """Whether neither NaN nor infinity has come in."""
        return bool(self.squares.diagonal(dim1=1, dim2=2).isfinite().all() and self.products.isfinite().all())

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Return S = E[y xᵀ](E[x xᵀ] + λI)⁻¹, shape (groups, o, d), and the intercept E[y] − S E[x], (groups, o).

        λ is ``ridge`` times the mean second moment of a group's inputs. Without a ridge S is the least of all
        solutions, where inputs depend on each other and there are several.
        """
        second, cross = self.squares / self.count, self.products / self.count
        x, y = self.input_sums / self.count, self.output_sums / self.count
        second -= x[:, :, None] * x[:, None]
        cross -= y[:, :, None] * x[:, None]
        solution = _solve(second, cross, ridge)
        if self._shifts is not None:
            x, y = x + self._shifts[0], y + self._shifts[1]
        return solution, y - (solution @ x[..., None])[..., 0]


def _add_squares(sums: Tensor, inputs: Tensor) -> None:
    """Add x xᵀ to sums; of a large one only what is on or below the diagonal, and some blocks across it."""
    half = inputs.shape[1] // 2
    if half < BLOCK:
        sums += inputs @ inputs.mT
        return
    first, second = inputs[:, :half], inputs[:, half:]
    _add_squares(sums[:, :half, :half], first)
    sums[:, half:, :half] += second @ first.mT
    _add_squares(sums[:, half:, half:], second)


def _solve(second: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Return cross · (second + λI)⁻¹, or cross · second⁺ without a ridge; zeros for groups of dead inputs.

    Of the symmetric `second`, what is above the diagonal is not read.
    """
    diagonal = second.diagonal(dim1=1, dim2=2)
    scale = diagonal.mean(1, keepdim=True)
    level = ridge * torch.where(scale > 0, scale, 1)
    if ridge:
        factor, failed = torch.linalg.cholesky_ex(second + torch.diag_embed(level.expand_as(diagonal)))
        if not failed.any():
            return torch.cholesky_solve(cross.mT, factor).mT
    values, vectors = torch.linalg.eigh(second)
    least = values[:, -1:].clamp(min=0) * values.shape[1] * torch.finfo(values.dtype).eps
    inverse = torch.where(values > least, 1 / (values + level), 0)
    return cross @ (vectors * inverse[:, None]) @ vectors.mT


def weight_of(layer: nn.Module) -> nn.Parameter:
    """Return the weight of a layer that reads channels by a linear map."""
    return own_parameters(layer)[_weight_name(layer)]


def bias_of(layer: nn.Module) -> nn.Parameter | None:
    """Return what a layer adds to its outputs, or None."""
    return next((value for name, value in own_parameters(layer).items() if name != _weight_name(layer)), None)


def _weight_name(layer: nn.Module) -> str:
    return next(iter(layer_type(layer).inputs))


def _is_transposed(layer: nn.Module) -> bool:
    return layer_type(layer).inputs[_weight_name(layer)] == 0


def weight_matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return the weight of a layer as (groups, outputs of a group, d)."""
    mixing = Mixing.of(layer)
    if mixing is None:  # depthwise: a group a channel
        return weight.unflatten(0, (layer.groups, -1)).flatten(2)
    return mixing.split(weight).transpose(2, 3).flatten(2)


def from_weight_matrix(layer: nn.Module, matrix: Tensor) -> Tensor:
    """Return a weight in the layer's own layout: the inverse of `weight_matrix`, for any number of outputs."""
    kernel = weight_of(layer).shape[2:]
    mixing = Mixing.of(layer)
    if mixing is not None:
        return mixing.join(matrix.unflatten(2, (-1, kernel.numel())).transpose(2, 3))
    filters = matrix if _is_transposed(layer) else matrix.flatten(0, 1)[:, None]
    return filters.unflatten(2, kernel)


@dataclass(frozen=True)
class Draw:
    """Which output positions of an example are taken: at most so many, one in each of as many equal stretches."""

    most: int
    generator: torch.Generator

    def __call__(self, examples: int, places: int) -> Tensor | None:
        """Return the positions, shape (examples, most); None for all."""
        if places <= self.most:
            return None
        where = torch.arange(self.most) + torch.rand(examples, self.most, generator=self.generator)
        return (where * (places / self.most)).long().clamp(max=places - 1)


def unfolded_chunks(
    layer: nn.Module, inputs: Tensor, outputs: Tensor, draw: Draw | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what a layer saw in a call, and what it gave, in the canonical layout, a few examples at a time.

    ``draw`` says which positions; None takes all.
    """
    if not kernel_dims(layer):
        yield from _linear_chunks(inputs, outputs, draw)
        return
    if inputs.dim() == kernel_dims(layer) + 1:  # an example without a batch
        inputs, outputs = inputs[None], outputs[None]
    places = math.prod(outputs.shape[2:])
    groups, _, d = weight_matrix(layer, weight_of(layer)).shape
    plain = type(layer).forward.__module__ == "torch.nn.modules.conv" and not _is_transposed(layer)
    taken = min(draw.most, places) if draw is not None and plain else places
    step = max(1, CHUNK // max(1, groups * d * taken))
    for x, y in zip(inputs.split(step), outputs.split(step), strict=True):
        at = None if draw is None else draw(len(x), places)
        at = None if at is None else at.to(x.device)
        unfolded = _windows(layer, x, at) if plain else _probed(layer, x, at)
        yield unfolded, _picked(y.flatten(2), at).unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(2)


def _picked(values: Tensor, at: Tensor | None) -> Tensor:
    """Return of values (examples, channels, places) those at some places of each example, (examples, most)."""
    return values if at is None else values.gather(2, at[:, None].expand(-1, values.shape[1], -1))


def _linear_chunks(inputs: Tensor, outputs: Tensor, draw: Draw | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (1, channels, positions) of inputs and outputs with their channels last."""
    if draw is not None and inputs.dim() > 2:
        at = draw(len(inputs), math.prod(inputs.shape[1:-1]))
        if at is not None:
            rows = torch.arange(len(inputs))[:, None]
            inputs, outputs = (tensor.flatten(1, -2)[rows, at] for tensor in (inputs, outputs))
    step = max(1, CHUNK // inputs.shape[-1])
    for x, y in zip(inputs.flatten(0, -2).split(step), outputs.flatten(0, -2).split(step), strict=True):
        yield x.T[None], y.T[None]


def _windows(layer: nn.modules.conv._ConvNd, inputs: Tensor, at: Tensor | None) -> Tensor:
    """Return a convolution's windows at some output places, (groups, d, positions)."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    extents = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    places = [(n - e) // s + 1 for n, e, s in zip(padded.shape[2:], extents, layer.stride, strict=True)]
    windows = _all_windows(layer, padded, places) if at is None else _some_windows(layer, padded, places, at)
    channels, taps = padded.shape[1], math.prod(layer.kernel_size)
    return windows.reshape(layer.groups, channels // layer.groups * taps, -1)


def _all_windows(layer: nn.modules.conv._ConvNd, padded: Tensor, places: list[int]) -> Tensor:
    """Return a view, (channels, *kernel, examples, *places): a copy of one takes a third of the time of F.unfold."""
    padded = padded.contiguous()
    example, channel, *along = padded.stride()
    inside = [d * s for d, s in zip(layer.dilation, along, strict=True)]
    between = [d * s for d, s in zip(layer.stride, along, strict=True)]
    shape = (padded.shape[1], *layer.kernel_size, len(padded), *places)
    return padded.as_strided(shape, (channel, *inside, example, *between), padded.storage_offset())


def _some_windows(layer: nn.modules.conv._ConvNd, padded: Tensor, places: list[int], at: Tensor) -> Tensor:
    """Return the windows at some places of each example, (channels, taps, examples * most)."""
    rows = padded.movedim(1, -1).contiguous()  # or each number would be a jump in memory
    strides = [stride // rows.shape[-1] for stride in rows.stride()[:-1]]
    corners = strides[0] * torch.arange(len(at), device=at.device)[:, None]
    for place, step, stride in zip(torch.unravel_index(at, places), layer.stride, strides[1:], strict=True):
        corners = corners + step * stride * place
    taps = torch.zeros(1, dtype=torch.long, device=at.device)
    for size, apart, stride in zip(layer.kernel_size, layer.dilation, strides[1:], strict=True):
        taps = (taps[:, None] + apart * stride * torch.arange(size, device=at.device)).flatten()
    found = rows.flatten(0, -2)[(taps[:, None] + corners.flatten()).flatten()]
    return found.view(len(taps), -1, rows.shape[-1]).permute(2, 0, 1)


def _probed(layer: nn.Module, inputs: Tensor, at: Tensor | None) -> Tensor:
    """Return the same of any layer, by running it on weights that are zero but for one tap of one input each."""
    groups, _, d = weight_matrix(layer, weight_of(layer)).shape
    one = torch.eye(d, dtype=inputs.dtype, device=inputs.device).expand(groups, -1, -1)
    probes = {f"model.{_weight_name(layer)}": from_weight_matrix(layer, one)}
    if bias_of(layer) is not None:
        probes |= {f"model.{name}": inputs.new_zeros(groups * d) for name in own_parameters(layer)} | probes
    unhooked = Wrapped(layer, lambda layer, inputs: layer.forward(inputs))
    made = _picked(functional_call(unhooked, probes, (inputs,)).flatten(2), at)
    return made.unflatten(1, (groups, d)).permute(1, 2, 0, 3).flatten(2)
