"""Least squares of a layer's outputs on its inputs, from second moments that are summed up batch by batch.

The canonical layout. Whatever its type, a layer linear in its inputs is one matrix a convolution group, and what it
sees at one output position is d numbers: inputs ``(groups, d, positions)``, outputs ``(groups, o, positions)``, weight
``(groups, o, d)``, where d runs over the input channels of a group and then over the kernel's taps, and positions over
examples and places. A depthwise convolution has as many groups as channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
    ``squares`` holds x xᵀ on and below its diagonal. As long as there are no more positions than inputs they are held
    as they are: that takes less memory, and products among positions say the same.
    """

    def __init__(self, groups: int, inputs: int, outputs: int, *, centred: bool, device: torch.device):
        make = {"dtype": torch.float64, "device": device}
        self.input_sums, self.output_sums = torch.zeros(groups, inputs, **make), torch.zeros(groups, outputs, **make)
        self.squares: Tensor | None = None
        self.products = torch.zeros(groups, outputs, inputs, **make)
        self.count, self.centred, self.finite = 0, centred, True
        self._held: list[tuple[Tensor, Tensor]] = []
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
        sums = inputs.sum(2), outputs.sum(2)
        self.finite = self.finite and all(bool(tensor.isfinite().all()) for tensor in sums)
        if self.centred:
            self.input_sums += sums[0]
            self.output_sums += sums[1]
        self.count += inputs.shape[2]
        self._held.append((inputs, outputs))
        if self.count > inputs.shape[1]:
            self._sum_up()

    def _sum_up(self) -> None:
        for inputs, outputs in self._held:
            if self.squares is None:
                width = inputs.shape[1]
                self.squares = self.input_sums.new_zeros(len(inputs), width, width)
            _add_squares(self.squares, inputs)
            self.products += outputs @ inputs.mT
        self._held.clear()

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Return S = E[y xᵀ](E[x xᵀ] + λI)⁻¹, shape (groups, o, d), and the intercept E[y] − S E[x], (groups, o).

        λ is ``ridge`` times the mean second moment of a group's inputs. Without a ridge S is the least of all
        solutions, where inputs depend on each other and there are several.
        """
        x, y = self.input_sums[..., None] / self.count, self.output_sums[..., None] / self.count
        if self.squares is None:  # E[y xᵀ](E[x xᵀ] + λI)⁻¹ = Y (XᵀX + nλI)⁻¹ Xᵀ
            inputs, outputs = (torch.cat(chunks, 2) for chunks in zip(*self._held, strict=True))
            inputs, outputs = inputs - x.to(inputs), outputs - y.to(outputs)
            second, width = (inputs.mT @ inputs).double(), inputs.shape[1]
            solution = _solve(second, outputs.double(), ridge / width) @ inputs.mT.double()
        else:
            second = torch.baddbmm(self.squares, x, x.mT, beta=1 / self.count, alpha=-1)
            cross = torch.baddbmm(self.products, y, x.mT, beta=1 / self.count, alpha=-1)
            solution = _solve(second, cross, ridge / second.shape[1])
        if self._shifts is not None:
            x, y = x + self._shifts[0][..., None], y + self._shifts[1][..., None]
        return solution, (y - solution @ x)[..., 0]


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
    """Return cross · (second + λI)⁻¹ with λ = ridge · trace, or cross · second⁺; zeros for groups of dead inputs.

    Of the symmetric `second`, what is above the diagonal is not read; its diagonal changes.
    """
    diagonal = second.diagonal(dim1=1, dim2=2)
    scale = diagonal.sum(1, keepdim=True)
    level = ridge * torch.where(scale > 0, scale, 1)
    diagonal += level
    if ridge:
        factor, failed = torch.linalg.cholesky_ex(second)
        if not failed.any():
            return torch.cholesky_solve(cross.mT, factor).mT
    values, vectors = torch.linalg.eigh(second)
    least = level + (values[:, -1:] - level).clamp(min=0) * values.shape[1] * torch.finfo(values.dtype).eps
    inverse = torch.where(values > least, 1 / values, 0)
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
    """Yield what a layer saw in a call, in the canonical layout, and (channels, positions) of outputs, bit by bit.

    The outputs may have any number of channels. ``draw`` says which positions; None takes all.
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
        unfolded = _windows(layer, x, at, y.shape[2:]) if plain else _probed(layer, x, at)
        yield unfolded, _picked(y.flatten(2), at).transpose(0, 1).flatten(1)


def _picked(values: Tensor, at: Tensor | None) -> Tensor:
    """Return of values (examples, channels, places) those at some places of each example, (examples, most)."""
    return values if at is None else values.gather(2, at[:, None].expand(-1, values.shape[1], -1))


def _linear_chunks(inputs: Tensor, outputs: Tensor, draw: Draw | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (1, channels, positions) of inputs and (channels, positions) of outputs with their channels last."""
    if inputs.dim() == 1:  # an example without a batch
        inputs, outputs = inputs[None], outputs[None]
    if draw is not None and inputs.dim() > 2:
        at = draw(len(inputs), math.prod(inputs.shape[1:-1]))
        if at is not None:
            rows = torch.arange(len(inputs))[:, None]
            inputs, outputs = (tensor.flatten(1, -2)[rows, at] for tensor in (inputs, outputs))
    step = max(1, CHUNK // inputs.shape[-1])
    for x, y in zip(inputs.flatten(0, -2).split(step), outputs.flatten(0, -2).split(step), strict=True):
        yield x.T[None], y.T


def _windows(layer: nn.modules.conv._ConvNd, inputs: Tensor, at: Tensor | None, places: Sequence[int]) -> Tensor:
    """Return a convolution's windows at some output places, (groups, d, positions)."""
    around, zeros = layer._reversed_padding_repeated_twice, layer.padding_mode == "zeros"
    if at is None or not zeros:
        inputs, around = F.pad(inputs, around, mode="constant" if zeros else layer.padding_mode), [0] * len(around)
    before = around[-2::-2]
    windows = _all_windows(layer, inputs, places) if at is None else _some_windows(layer, inputs, places, at, before)
    return windows.reshape(layer.groups, inputs.shape[1] // layer.groups * math.prod(layer.kernel_size), -1)


def _all_windows(layer: nn.modules.conv._ConvNd, padded: Tensor, places: Sequence[int]) -> Tensor:
    """Return a view, (channels, *kernel, examples, *places): a copy of one takes a third of the time of F.unfold."""
    padded = padded.contiguous()
    example, channel, *along = padded.stride()
    inside = [d * s for d, s in zip(layer.dilation, along, strict=True)]
    between = [d * s for d, s in zip(layer.stride, along, strict=True)]
    shape = (padded.shape[1], *layer.kernel_size, len(padded), *places)
    return padded.as_strided(shape, (channel, *inside, example, *between), padded.storage_offset())


def _some_windows(
    layer: nn.modules.conv._ConvNd, inputs: Tensor, places: Sequence[int], at: Tensor, before: Sequence[int]
) -> Tensor:
    """Return the windows at some places of each example, (channels, taps, examples, most); zeros lie outside."""
    index, within = at.new_zeros(*at.shape, 1), at.new_ones(*at.shape, 1)
    dims = zip(torch.unravel_index(at, tuple(places)), inputs.shape[2:], before, strict=True)
    kernel = zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    for (place, size, border), (taps, stride, apart) in zip(dims, kernel, strict=True):
        along = stride * place[..., None] - border + apart * torch.arange(taps, device=at.device)
        index = (index[..., None] * size + along.clamp(0, size - 1)[:, :, None]).flatten(2)
        within = (within[..., None] * ((along >= 0) & (along < size))[:, :, None]).flatten(2)
    found = _picked(inputs.flatten(2), index.flatten(1)) * within.flatten(1)[:, None]
    return found.unflatten(2, index.shape[1:]).permute(1, 3, 0, 2)


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
