"""Prove what the table of layer types says of a type, on a layer of it: the oracle of `register_layer`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..errors import check_number, check_whole
from ..state import check_module, running
from ..structure.groups import find_groups
from ..structure.layers import activation_dim, channel_sum, fixed_outputs, layer_axes, layer_type, own_parameters
from ..structure.shrinking import shrink_layer
from .check import TOLERANCE, Check, CheckError, Finding, check_plan, relative_error
from .equivalent import MixedLayer, Mixing
from .order import make_plan


def check_layer(layer: nn.Module, example_input: Tensor, *, tolerance: float = TOLERANCE, seed: int = 0) -> Check:
    """Compare what a layer does with what its type is said to do; all in float64, the layer in eval mode.

    - less inputs: the layer without some inputs against the whole one on an input in which these are zero,
    - less outputs: without some outputs, against the others of the whole one,
    - J·w = δ·z (``linear``): the products of an output channel's weights with their gradients, against those of the
      output with its own,
    - maps merged = maps inserted (``mixes``): the layer of weight C·W·D and bias C·b against C·layer(D·x),
    - and all of `check_plan`, in a network of linear maps before and behind it that loses half of its channels.

    Args:
        layer: of a known type; it takes one tensor and gives one. It is left unchanged.
        example_input: what it takes, two or more examples.

    Raises:
        LayerTypeError, UnknownLayerError: a layer that is not as its type is described, or of no known type.
        CheckError: none of its channels could go between linear maps.
    """
    check_module(layer)
    layer_axes(layer)
    check_number("tolerance", tolerance, "a number above 0", lambda number: number > 0)
    check_whole("seed", seed, 0)
    if not isinstance(example_input, Tensor):
        raise ValueError(f"example_input: expected a tensor, not {type(example_input).__name__}")
    layer = copy.deepcopy(layer).double().eval().requires_grad_()
    taken = example_input.double() if example_input.is_floating_point() else example_input
    generator = torch.Generator().manual_seed(seed)
    findings = [_compare(name, CHECKS[name], layer, taken, generator, tolerance) for name in CHECKS]
    with running(layer, taken, lambda: "example_input"):
        model = _Between(layer, taken, generator)
    groups = find_groups(model, taken)
    scores = {group: torch.rand(group.width, generator=generator) for group in groups}
    plan = make_plan(scores, ratio=0.5, scope="local")
    if not plan.channels_removed:
        raise CheckError("; ".join(f"{group.root}: {group.kept_whole or 'one channel'}" for group in groups))
    check = check_plan(model, plan, taken, tolerance=tolerance)
    return Check((*filter(None, findings), *check.findings), check.effect)


def _compare(
    name: str, check: Callable, layer: nn.Module, taken: Tensor, generator: torch.Generator, tolerance: float
) -> Finding | None:
    """Return what a comparison finds, None where the layer's type does not say that; what cannot run is found too."""
    try:
        sides = check(layer, taken, generator)
    except (RuntimeError, ValueError) as error:
        return Finding(name, math.inf, tolerance, note=f"{type(error).__name__}: {error}")
    return sides and Finding(name, relative_error([sides[0]], [sides[1]]), tolerance)


Sides = tuple[Tensor, Tensor] | None
"""What must be, and what is."""


@torch.no_grad()
def _less_inputs(layer: nn.Module, taken: Tensor, generator: torch.Generator) -> Sides:
    axis = layer_axes(layer).get("in")
    if axis is None or not axis.slots or layer_type(layer).statistics is not None:
        return None
    kept, dim = _draw(layer, axis.width, generator), activation_dim(layer, taken)
    passed = taken.index_select(dim, kept)
    return layer(torch.zeros_like(taken).index_copy(dim, kept, passed)), _shrunk(layer, {"in": kept})(passed)


@torch.no_grad()
def _less_outputs(layer: nn.Module, taken: Tensor, generator: torch.Generator) -> Sides:
    axes, kind = layer_axes(layer), layer_type(layer)
    if any(not axis.slots for axis in axes.values()) or kind.statistics == "channels":
        return None
    kept, whole = _draw(layer, axes["out"].width, generator), layer(taken)
    if "in" not in axes and kind.role != "embedding":
        taken = taken.index_select(activation_dim(layer, taken), kept)
    return whole.index_select(activation_dim(layer, whole), kept), _shrunk(layer, {"out": kept})(taken)


def _products(layer: nn.Module, taken: Tensor, generator: torch.Generator) -> Sides:
    parameters = own_parameters(layer)
    axis = layer_axes(layer).get("out")
    slots = [slot for slot in axis.slots if slot.tensor in parameters] if axis else []
    if not layer_type(layer).linear or not slots:
        return None
    output = layer(taken)
    deltas = torch.randn(output.shape, generator=generator, dtype=output.dtype)
    gradients = torch.autograd.grad((output * deltas).sum(), [parameters[slot.tensor] for slot in slots])
    pairs = zip(slots, gradients, strict=True)
    products = sum(channel_sum(parameters[slot.tensor].detach() * gradient, slot) for slot, gradient in pairs)
    fixed = fixed_outputs(layer, taken)
    values = (output.detach() if fixed is None else output.detach().masked_fill(fixed, 0)) * deltas
    dim = activation_dim(layer, output) % output.dim()
    return products, values.sum([other for other in range(values.dim()) if other != dim])


@torch.no_grad()
def _maps(layer: nn.Module, taken: Tensor, generator: torch.Generator) -> Sides:
    mixing = Mixing.of(layer)
    if mixing is None:
        return None
    held = own_parameters(layer)
    weight = mixing.split(held[mixing.weight])
    blocks, outputs, _, inputs = weight.shape
    kept = {key: _draw(layer, blocks * size, generator) for key, size in (("out", outputs), ("in", inputs))}
    shapes = (blocks, len(kept["out"]) // blocks, outputs), (blocks, inputs, len(kept["in"]) // blocks)
    compressor, decompressor = (torch.randn(shape, generator=generator, dtype=weight.dtype) for shape in shapes)
    bias = held[mixing.bias].view(blocks, outputs) if mixing.bias else None
    mixed = MixedLayer(mixing, weight, bias, compressor, decompressor)
    small = _shrunk(layer, kept)
    for name, value in mixed.effective().items():
        setattr(small, name, nn.Parameter(value))
    into = activation_dim(layer, taken)
    narrow = taken.index_select(into, kept["in"])
    whole = layer(_map_channels(narrow, decompressor, into))
    return _map_channels(whole, compressor, activation_dim(layer, whole)), small(narrow)


CHECKS = {
    "less inputs": _less_inputs,
    "less outputs": _less_outputs,
    "J·w = δ·z": _products,
    "maps merged = maps inserted": _maps,
}


def _map_channels(activation: Tensor, matrices: Tensor, dim: int) -> Tensor:
    """Multiply the channels of each block, along a dimension, by its matrix (new, old)."""
    blocks = activation.movedim(dim, -1).unflatten(-1, (len(matrices), -1))
    return torch.einsum("bij,...bj->...bi", matrices, blocks).flatten(-2).movedim(-1, dim)


def _draw(layer: nn.Module, width: int, generator: torch.Generator) -> Tensor:
    """Return about half of an axis's positions, the same ones of every convolution group."""
    blocks = max((slot.groups for axis in layer_axes(layer).values() for slot in axis.slots), default=1)
    size = width // blocks
    inside = torch.randperm(size, generator=generator)[: (size + 1) // 2].sort().values
    return (torch.arange(blocks)[:, None] * size + inside).flatten()


def _shrunk(layer: nn.Module, kept: dict[str, Sequence[int]]) -> nn.Module:
    small = copy.deepcopy(layer)
    shrink_layer(small, kept)
    return small


class _Between(nn.Module):
    """A layer between linear maps of its channels, wherever in an activation these lie."""

    def __init__(self, layer: nn.Module, taken: Tensor, generator: torch.Generator):
        super().__init__()
        given = layer(taken)
        self.layer, self.into, self.out = layer, activation_dim(layer, taken), activation_dim(layer, given)
        width = taken.shape[self.into] if taken.is_floating_point() else 0
        self.before = _linear(width, width, generator) if width else None
        self.after = _linear(given.shape[self.out], 4, generator)

    def forward(self, taken: Tensor) -> Tensor:
        if self.before is not None:
            taken = self.before(taken.movedim(self.into, -1)).movedim(-1, self.into)
        return self.after(self.layer(taken).movedim(self.out, -1))


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    # On no device no numbers are drawn, so that the global generator stays as it is.
    layer = nn.Linear(inputs, outputs, dtype=torch.float64, device="meta").to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=generator)
    return layer
