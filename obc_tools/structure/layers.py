"""The table of layer types: where the channels of each axis lie, how to select them, whether they can be mixed.

The canonical layout. An *axis* of a layer ("out" or "in") has ``width`` channels. Each tensor that has the axis is
described by one :class:`Slot`; :func:`channel_view` turns that tensor into a matrix of shape ``(width, d)``, one row a
channel, whatever the layer type:

======================  ====================================================  =========================================
layer                   axis "out"                                            axis "in"
======================  ====================================================  =========================================
convolution             ``weight`` along 0, ``bias``                          ``weight`` along 1, per convolution group
transposed convolution  ``weight`` along 1, per convolution group, ``bias``   ``weight`` along 0
depthwise convolution   ``weight`` along 0, ``bias``                          (the same axis)
...with a multiplier    ``weight`` along 0, ``bias``                          none: its groups
standardised weights    with ``gain`` (timm); they cannot be mixed
linear                  ``weight`` along 0, ``bias``                          ``weight`` along 1
norms                   ``weight``, ``bias``, running statistics              (the same axis)
PReLU                   ``weight``                                            (the same axis)
embedding               ``weight`` along 1
MultiheadAttention X    ``in_proj`` along 0, three times over (q, k, v)       ``in_proj`` along 1
bare parameter          its last dimension longer than 1
======================  ====================================================  =========================================

``X.out_proj`` of a MultiheadAttention is a linear layer of its own. No other module of the library knows layer types.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UnknownNameError


class LayerAxis(NamedTuple):
    """One axis of one layer: the layer's name in its model, and "out" or "in"."""

    layer: str
    axis: str

    def __str__(self) -> str:
        return f"{self.layer}.{self.axis}"


TEMPERATURE = ".temperature"
"""The name of an axis of those outputs of a layer that make queries: they grow by the root of the share that stays."""


@dataclass(frozen=True)
class Slot:
    """Where an axis lies in one tensor of a layer.

    The channels run along dimension ``dim``, ``parts`` times over (q, k and v of an attention). With ``groups`` above 1
    they run along dimension 1 and dimension 0 is split into that many convolution groups, each with its own channels.
    """

    tensor: str
    dim: int
    parts: int = 1
    groups: int = 1


@dataclass(frozen=True)
class Axis:
    """An axis of a layer: its width, its tensors, the attributes that hold its width, and what may be mixed.

    ``mixable``: the layer is linear along this axis, so that a compressor or decompressor can be merged into it.
    ``blocks``: equal runs of channels that must keep the same positions (convolution groups, heads, norm groups).
    """

    width: int
    slots: tuple[Slot, ...]
    attributes: tuple[str, ...] = ()
    mixable: bool = False
    blocks: int = 1


class UnknownLayerError(ValueError):
    """A layer whose parameters the table does not describe."""


def _convolution(layer: nn.modules.conv._ConvNd) -> dict[str, Axis]:
    out = (Slot("weight", 0), Slot("bias", 0), Slot("gain", 0))
    plain = not is_standardised(layer)
    if is_depthwise(layer):
        return {"out": Axis(layer.out_channels, out, ("out_channels", "in_channels", "groups"))}
    if layer.groups == layer.in_channels > 1 and not layer.transposed:
        return {
            "out": Axis(layer.out_channels, out, ("out_channels",)),
            "in": Axis(layer.in_channels, (), ("in_channels", "groups")),
        }
    inputs = (Slot("weight", 1, groups=layer.groups),)
    return {
        "out": Axis(layer.out_channels, out, ("out_channels",), plain, layer.groups),
        "in": Axis(layer.in_channels, inputs, ("in_channels",), plain, layer.groups),
    }


def _transposed_convolution(layer: nn.modules.conv._ConvTransposeNd) -> dict[str, Axis]:
    if is_depthwise(layer):
        return _convolution(layer)
    out = (Slot("weight", 1, groups=layer.groups), Slot("bias", 0))
    return {
        "out": Axis(layer.out_channels, out, ("out_channels",), True, layer.groups),
        "in": Axis(layer.in_channels, (Slot("weight", 0),), ("in_channels",), True, layer.groups),
    }


def _linear(layer: nn.Linear) -> dict[str, Axis]:
    return {
        "out": Axis(layer.out_features, (Slot("weight", 0), Slot("bias", 0)), ("out_features",), True),
        "in": Axis(layer.in_features, (Slot("weight", 1),), ("in_features",), True),
    }


def _norm(width_attribute: str) -> Callable[[nn.Module], dict[str, Axis]]:
    slots = tuple(Slot(name, 0) for name in ("weight", "bias", "running_mean", "running_var"))
    return lambda layer: {"out": Axis(getattr(layer, width_attribute), slots, (width_attribute,))}


def _group_norm(layer: nn.GroupNorm) -> dict[str, Axis]:
    slots = (Slot("weight", 0), Slot("bias", 0))
    return {"out": Axis(layer.num_channels, slots, ("num_channels",), blocks=layer.num_groups)}


def _layer_norm(layer: nn.LayerNorm | nn.RMSNorm) -> dict[str, Axis]:
    if len(layer.normalized_shape) != 1:
        raise UnknownLayerError(f"normalizes over {len(layer.normalized_shape)} dimensions {layer.normalized_shape}")
    return {"out": Axis(layer.normalized_shape[0], (Slot("weight", 0), Slot("bias", 0)), ("normalized_shape",))}


def _prelu(layer: nn.PReLU) -> dict[str, Axis]:
    if layer.num_parameters == 1:
        return {}
    return {"out": Axis(layer.num_parameters, (Slot("weight", 0),), ("num_parameters",))}


def _embedding(layer: nn.Embedding) -> dict[str, Axis]:
    return {"out": Axis(layer.embedding_dim, (Slot("weight", 1),), ("embedding_dim",))}


def _attention(layer: nn.MultiheadAttention) -> dict[str, Axis]:
    if layer.in_proj_weight is None or layer.bias_k is not None:
        raise UnknownLayerError("has separate q, k and v widths or learned biases of k and v")
    out = (Slot("in_proj_weight", 0, parts=3), Slot("in_proj_bias", 0, parts=3))
    widths = ("embed_dim", "kdim", "vdim")
    return {
        "out": Axis(layer.embed_dim, out, widths, True, layer.num_heads),
        "in": Axis(layer.embed_dim, (Slot("in_proj_weight", 1),), widths, True),
    }


def _parameter(parameter: Tensor) -> dict[str, Axis]:
    longer = [dim for dim, size in enumerate(parameter.shape) if size > 1]
    return {"out": Axis(parameter.shape[longer[-1]], (Slot("", longer[-1]),))} if longer else {}


LAYERS: Mapping[type, Callable[..., dict[str, Axis]]] = {
    nn.modules.conv._ConvTransposeNd: _transposed_convolution,
    nn.modules.conv._ConvNd: _convolution,
    nn.Linear: _linear,
    nn.modules.batchnorm._BatchNorm: _norm("num_features"),
    nn.modules.instancenorm._InstanceNorm: _norm("num_features"),
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _layer_norm,
    nn.PReLU: _prelu,
    nn.Embedding: _embedding,
    nn.MultiheadAttention: _attention,
    Tensor: _parameter,
}
"""Layer type -> its axes. First match by isinstance wins."""


def is_depthwise(layer: nn.Module) -> bool:
    """Say whether a layer is a depthwise convolution: one filter a channel, its inputs and outputs one axis."""
    if not isinstance(layer, nn.modules.conv._ConvNd) or layer.groups == 1:
        return False
    return layer.groups == layer.out_channels == layer.in_channels


def get_layer(model: nn.Module, name: str) -> nn.Module | Tensor:
    """Return the module, bare parameter or bare buffer called `name`; raise UnknownNameError otherwise."""
    owner, _, leaf = name.rpartition(".")
    try:
        return model.get_submodule(name)
    except AttributeError:
        pass
    try:
        tensor = own_tensors(model.get_submodule(owner)).get(leaf)
    except AttributeError:
        tensor = None
    if tensor is not None:
        return tensor
    known = [key for key, _ in model.named_modules() if key]
    raise UnknownNameError("layer", name, known)


def own_tensors(layer: nn.Module | Tensor) -> dict[str, Tensor]:
    """Return the tensors that belong to a layer itself, parameters and buffers, by name ("" for a bare one)."""
    if isinstance(layer, Tensor):
        return {"": layer}
    own = {**layer._parameters, **layer._buffers}
    return {name: tensor for name, tensor in own.items() if tensor is not None}


def own_parameters(layer: nn.Module | nn.Parameter) -> dict[str, nn.Parameter]:
    """Return a layer's own parameters by name ("" for a bare parameter)."""
    return {name: tensor for name, tensor in own_tensors(layer).items() if isinstance(tensor, nn.Parameter)}


def layer_axes(layer: nn.Module | nn.Parameter, name: str = "") -> dict[str, Axis]:
    """Return the axes of a layer by name ("out", "in"), each with the slots of tensors that the layer really has.

    Raises:
        UnknownLayerError: the type is not in the table, or the layer owns a parameter that the table does not describe.
    """
    describe = next((entry for kind, entry in LAYERS.items() if isinstance(layer, kind)), None)
    if describe is None:
        raise UnknownLayerError(f"layer {name!r}: type {type(layer).__name__} is not in the table of layer types")
    tensors = own_tensors(layer)
    try:
        axes = describe(layer)
    except UnknownLayerError as error:
        raise UnknownLayerError(f"layer {name!r} ({type(layer).__name__}) {error}") from None
    described = {slot.tensor for axis in axes.values() for slot in axis.slots}
    strange = sorted(set(own_parameters(layer)) - described) if axes else []
    if strange or "parametrizations" in getattr(layer, "_modules", {}):
        what = f"parameters {strange}" if strange else "a parametrization (remove it first)"
        raise UnknownLayerError(f"layer {name!r} ({type(layer).__name__}) has {what} that its type does not explain")
    return {key: _with_slots(axis, tensors) for key, axis in axes.items()}


def all_axes(layer: nn.Module | Tensor, name: str = "") -> dict[str, Axis]:
    """Return the axes of a layer; of a bare parameter or buffer also all its other dimensions, "dim0", "dim1", ..."""
    axes = layer_axes(layer, name)
    if isinstance(layer, Tensor) and axes:
        last = axes["out"].slots[0].dim
        others = [dim for dim, size in enumerate(layer.shape) if size > 1 and dim != last]
        axes |= {f"dim{dim}": Axis(layer.shape[dim], (Slot("", dim),)) for dim in others}
    return axes


def _with_slots(axis: Axis, tensors: Mapping[str, Tensor]) -> Axis:
    present = tuple(slot for slot in axis.slots if slot.tensor in tensors)
    return replace(axis, slots=present)


def scored_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over the modules that own parameters described by the table (bare parameters are not modules)."""
    for name, module in model.named_modules():
        if isinstance(module, tuple(LAYERS)) and own_parameters(module):
            yield name, module


def channel_dims(tensor: Tensor, slot: Slot) -> tuple[Tensor, tuple[int, ...]]:
    """Return the tensor, reshaped without copying, and the dimensions in it that together run over the channels."""
    if slot.groups > 1:
        return tensor.unflatten(0, (slot.groups, -1)), (0, 2)
    if slot.parts > 1:
        return tensor.unflatten(slot.dim, (slot.parts, -1)), (slot.dim + 1,)
    return tensor, (slot.dim,)


def channel_view(tensor: Tensor, slot: Slot) -> Tensor:
    """Return the tensor as a matrix of shape (width, d): row i holds what belongs to channel i."""
    split, dims = channel_dims(tensor, slot)
    front = split.movedim(dims, tuple(range(len(dims))))
    return front.reshape(math.prod(front.shape[: len(dims)]), -1)


def channel_sum(tensor: Tensor, slot: Slot) -> Tensor:
    """Sum a tensor over everything but the channels of a slot; shape (width,). The row sums of `channel_view`."""
    split, dims = channel_dims(tensor, slot)
    others = [dim for dim in range(split.dim()) if dim not in dims]
    return (split.sum(others) if others else split).flatten()


def select_channels(tensor: Tensor, slot: Slot, kept: Tensor) -> Tensor:
    """Return the tensor with only the channels `kept` (positions along the axis, ascending)."""
    if slot.groups > 1:
        return _select_in_groups(tensor, slot.groups, kept)
    if slot.parts > 1:
        width = tensor.shape[slot.dim] // slot.parts
        kept = torch.cat([kept + part * width for part in range(slot.parts)])
    return tensor.index_select(slot.dim, kept)


def _select_in_groups(tensor: Tensor, groups: int, kept: Tensor) -> Tensor:
    split = tensor.unflatten(0, (groups, -1))
    width = split.shape[2]
    counts = torch.bincount(kept // width, minlength=groups)
    if (counts != counts[0]).any():
        raise ValueError(f"convolution groups must keep equally many channels; they keep {counts.tolist()}")
    inside = (kept % width).view(groups, -1)
    return torch.cat([part.index_select(1, index) for part, index in zip(split, inside, strict=True)])


def scalable_slots(layer: nn.Module | Tensor) -> tuple[Slot, ...]:
    """Return the slots by which a layer's outputs are multiplied by a number; none where its weights are standardised.

    The outputs of an attention are its queries, keys and values; the first of a slot's parts are the queries.
    """
    try:
        slots = layer_axes(layer).get("out", Axis(0, ())).slots
    except UnknownLayerError:
        return ()
    fixed = {"running_mean", "running_var"} | ({"weight"} if is_standardised(layer) else set())
    kept = tuple(slot for slot in slots if slot.tensor not in fixed)
    return kept if {slot.tensor for slot in kept} - {"bias"} else ()


def scale_outputs(layer: nn.Module | Tensor, positions: Sequence[int], factor: float) -> None:
    """Multiply some outputs of a layer by a number, in place (see `scalable_slots`)."""
    tensors = own_tensors(layer)
    for slot in scalable_slots(layer):
        tensor = tensors[slot.tensor].detach()
        tensor.movedim(slot.dim, 0)[torch.as_tensor(positions, device=tensor.device)] *= factor


def is_standardised(layer: nn.Module | Tensor) -> bool:
    """Say whether a layer standardises its weights, each output's over its inputs, before it uses them."""
    return type(layer).__module__.startswith("timm.layers.std_conv")


def mixing_tensors(layer: nn.Module) -> tuple[str, str]:
    """Return the names of the weight and the bias that compressors and decompressors act on."""
    if isinstance(layer, nn.MultiheadAttention):
        return "in_proj_weight", "in_proj_bias"
    return "weight", "bias"


def to_mixing(layer: nn.Module, weight: Tensor, stride: int = 1) -> Tensor:
    """Return a mixable layer's weight in mixing form: (groups, outputs a group, rest, inputs a group).

    Outputs and inputs are what compressors and decompressors act on. ``rest`` holds the kernel, or, for a linear layer
    behind a flattening, the ``stride`` positions of one input channel. The groups of an attention are q, k and v.
    """
    if isinstance(layer, nn.MultiheadAttention):
        return weight.unflatten(0, (3, -1)).unsqueeze(2)
    if isinstance(layer, nn.Linear):
        return weight.unflatten(1, (-1, stride)).transpose(1, 2)[None]
    grouped = weight.flatten(2).unflatten(0, (layer.groups, -1))
    return grouped.permute(0, 2, 3, 1) if layer.transposed else grouped.permute(0, 1, 3, 2)


def from_mixing(layer: nn.Module, mixed: Tensor) -> Tensor:
    """Return a weight in the layer's own layout, contiguous: the inverse of `to_mixing` for any number of channels."""
    if isinstance(layer, nn.MultiheadAttention):
        return mixed.flatten(0, 2)
    if isinstance(layer, nn.Linear):
        return mixed[0].transpose(1, 2).flatten(1)
    grouped = mixed.permute(0, 3, 1, 2) if layer.transposed else mixed.permute(0, 1, 3, 2)
    return grouped.flatten(0, 1).unflatten(2, layer.kernel_size).contiguous()


def find_axis(layer: nn.Module | nn.Parameter, name: LayerAxis) -> Axis:
    """Return one axis of a layer by its name.

    Besides "out" and "in" there are their parts "out_w" and "out_b", without and with nothing but the bias, and the
    other dimensions of a bare parameter, "dim0", "dim1", ...
    """
    key, _, part = name.axis.partition("_")
    axes = all_axes(layer, name.layer)
    if key not in axes or part not in ("", "w", "b"):
        raise UnknownNameError("axis", str(name), [f"{name.layer}.{known}" for known in axes])
    if not part:
        return axes[key]
    return replace(axes[key], slots=tuple(s for s in axes[key].slots if s.tensor.endswith("bias") == (part == "b")))


CHANNELS_LAST = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)
"""Layers whose activations have their channels in the last dimension; all others have them behind the examples."""


def activation_dim(layer: nn.Module, activation: Tensor) -> int:
    """Return the dimension of a layer's input or output that runs over channels; 0 where there is none for examples."""
    if isinstance(layer, CHANNELS_LAST):
        return activation.dim() - 1
    if isinstance(layer, nn.modules.conv._ConvNd):
        return activation.dim() - 1 - len(layer.kernel_size)
    return 1


def is_projection(layer: nn.Module | Tensor) -> bool:
    """Say whether a layer makes channels from others: convolutions of all kinds, linear layers."""
    return isinstance(layer, nn.modules.conv._ConvNd | nn.Linear)


def is_attention(layer: nn.Module | Tensor) -> bool:
    """Say whether a layer is torch's attention, which calls its projections as functions."""
    return isinstance(layer, nn.MultiheadAttention)


def is_batch_norm(layer: nn.Module | Tensor) -> bool:
    """Say whether a layer is a batch norm."""
    return isinstance(layer, nn.modules.batchnorm._BatchNorm)


def fixed_outputs(layer: nn.Module, taken: Tensor) -> Tensor | None:
    """Return where an output is not linear in the layer's parameters, given the input; None where it is everywhere."""
    if isinstance(layer, nn.PReLU):
        return taken >= 0
    padded = isinstance(layer, nn.Embedding) and layer.padding_idx is not None
    return (taken == layer.padding_idx).unsqueeze(-1) if padded else None
