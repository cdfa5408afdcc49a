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
...of (in, out) order   ``weight`` along 1, ``bias`` (transformers' Conv1D)   ``weight`` along 0
norms                   ``weight``, ``bias``, running statistics              (the same axis)
PReLU                   ``weight``                                            (the same axis)
embedding               ``weight`` along 1
MultiheadAttention X    ``in_proj`` along 0, three times over (q, k, v)       ``in_proj`` along 1
bare parameter          its last dimension longer than 1
======================  ====================================================  =========================================

``X.out_proj`` of a MultiheadAttention is a linear layer of its own. `register_layer` adds a type of the user's own. No
other module of the library knows layer types: they ask the functions here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UnknownNameError, check_name
from ..state import check_module


class LayerAxis(NamedTuple):
    """One axis of one layer: the layer's name in its model, and "out" or "in"."""

    layer: str
    axis: str

    @classmethod
    def of(cls, pair: Any) -> LayerAxis:
        """Return the axis that a pair names; raise ValueError for anything else."""
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"{pair!r} is no layer axis: expected a pair such as ('conv1', 'out')")
        return cls(*pair)

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
    """An axis of a layer: its width, its tensors, the attributes that hold its width, and whether it may be mixed.

    ``mixable``: the layer is linear along this axis, so that a compressor or decompressor can be merged into it.
    """

    width: int
    slots: tuple[Slot, ...]
    attributes: tuple[str, ...] = ()
    mixable: bool = False


class UnknownLayerError(ValueError):
    """A layer whose parameters the table does not describe."""


class LayerTypeError(ValueError):
    """A description of a layer type that contradicts itself, the table, or a layer of the type."""


ROLES = ("projection", "embedding", "attention", "norm", "scale", "parameter", "unknown")
STATISTICS = (None, "examples", "positions", "channels", "weights")


@dataclass(frozen=True)
class LayerType:
    """What is known of a type of layers.

    ``role``: a "projection" makes channels from others (convolutions, linear layers), an "embedding" looks them up, a
    "norm" or a "scale" (PReLU) passes its own on.
    ``outputs``, ``inputs``: its tensors, each with the dimension that runs over the channels that it makes or reads.
    ``widths``: attributes that hold a width, each with the axis "out" or "in"; ``groups``: the one that holds a number
    of convolution groups, into which dimension 0 of the weight is split.
    ``channels``: the dimension of an activation that runs over the channels; None is the last but for a kernel's.
    ``parts``: how many times the output channels follow each other (q, k, v).
    ``mixes``: linear in its inputs, channel by channel, so that C·layer(D·x) is the layer of weight C·W·D and bias C·b.
    ``linear``: linear in all that ``outputs`` names together, but where ``fixed(layer, taken)`` is true.
    ``statistics``: over what means are taken: "examples" (and positions), "positions", "channels", or "weights" (each
    output's weights are standardised over its inputs). Zeros would count in the last two.
    ``declared``: by a user, so that every layer is held against it.
    """

    role: str
    outputs: Mapping[str, int] = field(default_factory=dict)
    inputs: Mapping[str, int] = field(default_factory=dict)
    widths: Mapping[str, str] = field(default_factory=dict)
    groups: str | None = None
    channels: int | None = None
    parts: int = 1
    mixes: bool = False
    linear: bool = True
    statistics: str | None = None
    fixed: Callable[[Any, Tensor], Tensor] | None = None
    declared: bool = False

    def __post_init__(self):
        for name in ("outputs", "inputs", "widths"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        check_name("role of a layer type", self.role, ROLES)
        check_name("statistics of a layer type", self.statistics, STATISTICS)
        dims = [*self.outputs.items(), *self.inputs.items()]
        wrong = [f"{tensor!r}: {dim!r}" for tensor, dim in dims if type(dim) is not int or dim < 0]
        if wrong:
            raise LayerTypeError(f"{', '.join(wrong)}: a dimension is a number from 0 on")
        if set(self.widths.values()) - {"out", "in"}:
            raise LayerTypeError(f"widths={dict(self.widths)}: each attribute holds the width of 'out' or of 'in'")
        shared = self.outputs.keys() & self.inputs.keys()
        if self.inputs and (shared != self.inputs.keys() or len(shared) > 1 or self.outputs == self.inputs):
            raise LayerTypeError("inputs name one tensor, the weight, which outputs name too, along another dimension")
        if not self.inputs and (self.mixes or self.groups):
            raise LayerTypeError("mixes and groups go with inputs, which are missing")
        if self.mixes and len(self.outputs) > 2:
            raise LayerTypeError("what mixes has a weight and at most a bias; other outputs would have to be mixed too")
        if self.groups and {self.outputs[weight] for weight in shared} | set(self.inputs.values()) != {0, 1}:
            raise LayerTypeError("groups split dimension 0 of a weight with its channels along dimensions 0 and 1")


_BOTH = {"weight": 0, "bias": 0}
_RUNNING = {"running_mean": 0, "running_var": 0}
_LINEAR = LayerType("projection", _BOTH, {"weight": 1}, {"out_features": "out", "in_features": "in"}, mixes=True)
_CONVOLUTION = replace(_LINEAR, widths={"out_channels": "out", "in_channels": "in"}, groups="groups")
_STANDARDISED = replace(_CONVOLUTION, outputs={**_BOTH, "gain": 0}, mixes=False, linear=False, statistics="weights")
_BATCH_NORM = LayerType("norm", _BOTH | _RUNNING, {}, {"num_features": "out"}, channels=1, statistics="examples")
_LAYER_NORM = LayerType("norm", _BOTH, {}, {"normalized_shape": "out"}, statistics="channels")
_IMAGE_NORM = replace(_LAYER_NORM, channels=1)
_TIMM_NORMS = {
    f"timm.layers.norm.{kind}Norm{form}": _IMAGE_NORM if "2d" in form else _LAYER_NORM
    for kind in ("Rms", "Simple")
    for form in ("", "Fp32", "2d", "2dFp32")
} | {f"timm.layers.norm.LayerNorm{form}": _IMAGE_NORM for form in ("2d", "2dFp32", "Exp2d")}
_TIMM_STANDARDISED = ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")


def _fixed_at_padding(layer: nn.Embedding, taken: Tensor) -> Tensor | None:
    return None if layer.padding_idx is None else (taken == layer.padding_idx).unsqueeze(-1)


_TABLE: dict[type | str, LayerType] = {
    nn.modules.conv._ConvNd: _CONVOLUTION,
    nn.modules.conv._ConvTransposeNd: replace(_CONVOLUTION, outputs={"weight": 1, "bias": 0}, inputs={"weight": 0}),
    **{f"timm.layers.std_conv.{name}": _STANDARDISED for name in _TIMM_STANDARDISED},
    nn.Linear: _LINEAR,
    "transformers.pytorch_utils.Conv1D": replace(
        _LINEAR, outputs={"weight": 1, "bias": 0}, inputs={"weight": 0}, widths={"nf": "out", "nx": "in"}
    ),
    nn.modules.batchnorm._BatchNorm: _BATCH_NORM,
    nn.modules.instancenorm._InstanceNorm: replace(_BATCH_NORM, statistics="positions"),
    nn.GroupNorm: replace(_IMAGE_NORM, widths={"num_channels": "out"}),
    nn.LayerNorm: _LAYER_NORM,
    nn.RMSNorm: _LAYER_NORM,
    **_TIMM_NORMS,
    "torchvision.models.convnext.LayerNorm2d": _IMAGE_NORM,
    "timm.layers.grn.GlobalResponseNorm": replace(_LAYER_NORM, widths={}),
    nn.PReLU: LayerType(
        "scale", {"weight": 0}, {}, {"num_parameters": "out"}, channels=1, fixed=lambda layer, taken: taken >= 0
    ),
    nn.Embedding: LayerType("embedding", {"weight": 1}, {}, {"embedding_dim": "out"}, fixed=_fixed_at_padding),
    nn.MultiheadAttention: LayerType(
        "attention",
        {"in_proj_weight": 0, "in_proj_bias": 0},
        {"in_proj_weight": 1},
        {"embed_dim": "out", "kdim": "out", "vdim": "out"},
        parts=3,
        mixes=True,
    ),
    Tensor: LayerType("parameter"),
}
"""Layer type, or the full name of one that is not imported -> what is known of it. The most specific one counts."""


UNKNOWN = LayerType("unknown")


@cache
def _type_of(kind: type) -> LayerType:
    names = ((ancestor, f"{ancestor.__module__}.{ancestor.__qualname__}") for ancestor in kind.__mro__)
    return next((_TABLE[key] for pair in names for key in pair if key in _TABLE), UNKNOWN)


def layer_type(layer: nn.Module | Tensor) -> LayerType:
    """Return what the table knows of a layer; `UNKNOWN` where that is nothing."""
    return _type_of(type(layer))


def is_known(layer: nn.Module | Tensor) -> bool:
    """Say whether the table describes a layer's type."""
    return layer_type(layer) is not UNKNOWN


def has_role(layer: nn.Module | Tensor, *roles: str) -> bool:
    """Say whether a layer's type has one of these `ROLES`; an "attention" calls its projections as functions."""
    return layer_type(layer).role in roles


def is_projection(layer: nn.Module | Tensor) -> bool:
    """Say whether a layer makes channels from others: convolutions of all kinds, linear layers."""
    return has_role(layer, "projection")


def is_norm(layer: nn.Module | Tensor, *statistics: str) -> bool:
    """Say whether a layer is a norm; with ``statistics``, one that takes its means over one of these `STATISTICS`."""
    return has_role(layer, "norm") and (not statistics or layer_type(layer).statistics in statistics)


def is_batch_norm(layer: nn.Module | Tensor) -> bool:
    """Say whether a layer is a batch norm."""
    return is_norm(layer, "examples")


def has_norm_within(layer: nn.Module | Tensor) -> bool:
    """Say whether a layer is a batch norm of a type with a forward of its own, as timm's with an activation."""
    known = isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.weight is not None
    return known and type(layer).forward is not nn.modules.batchnorm._BatchNorm.forward


def is_standardised(layer: nn.Module | Tensor) -> bool:
    """Say whether a layer standardises its weights, each output's over its inputs, before it uses them."""
    return layer_type(layer).statistics == "weights"


def is_grouped(layer: nn.Module | Tensor) -> bool:
    """Say whether a layer is a grouped convolution of several inputs a group."""
    return is_projection(layer) and any(slot.groups > 1 for axis in layer_axes(layer).values() for slot in axis.slots)


def kernel_dims(layer: nn.Module | Tensor) -> int:
    """Return how many dimensions the kernel of a projection has: 2 for images, 0 for linear layers and all others."""
    weights = (own_tensors(layer).get(name) for name in layer_type(layer).inputs if is_projection(layer))
    return max((weight.dim() - 2 for weight in weights if weight is not None), default=0)


def activation_dim(layer: nn.Module, activation: Tensor) -> int:
    """Return the dimension of a layer's input or output that runs over channels; 0 where there is none for examples."""
    dim = layer_type(layer).channels
    return activation.dim() - 1 - kernel_dims(layer) if dim is None else dim % activation.dim()


def fixed_outputs(layer: nn.Module, taken: Tensor) -> Tensor | None:
    """Return where an output is not linear in the layer's parameters, given the input; None where it is everywhere."""
    fixed = layer_type(layer).fixed
    return None if fixed is None else fixed(layer, taken)


def register_layer(kind: type[nn.Module], described: LayerType, *, replace: bool = False) -> ExitStack:
    """Describe a layer type of your own; all that works on torch's layers works on its layers from then on.

    Subclasses of known types need it only where they have parameters of their own. Prove what you wrote with
    `check_layer`. A registration holds for this process; put it beside the class.

    Args:
        kind: the class. Its subclasses are described too, unless by themselves.
        described: what is to be known of it.
        replace: the type is in the table already, and this takes its place.

    Returns:
        What undoes the registration by its ``close()``, or at the end of a ``with`` block.

    Raises:
        LayerTypeError: no class of modules, a type that is known already, or one without tensors. Later, where a layer
            is looked at: tensors or attributes that it does not have, or sizes that do not agree.

    Example:
        >>> described = LayerType(  # weight (inputs, outputs), as in GPT-2
        ...     "projection",
        ...     outputs={"weight": 1, "bias": 0},
        ...     inputs={"weight": 0},
        ...     widths={"nf": "out", "nx": "in"},
        ...     mixes=True,
        ... )
        >>> register_layer(Conv1D, described)
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise LayerTypeError(f"{kind!r} is no class of modules: register the type of a layer, not a layer")
    if kind in _TABLE and not replace:
        raise LayerTypeError(f"{kind.__name__} is in the table of layer types already: replace=True takes its place")
    if not isinstance(described, LayerType):
        raise LayerTypeError(f"{kind.__name__} is described by {described!r}: expected a LayerType")
    if not described.outputs:
        raise LayerTypeError(f"{kind.__name__}: outputs name no tensor, so that nothing of it could be pruned")
    undo = ExitStack()
    undo.callback(_enter, kind, _TABLE.get(kind))
    _enter(kind, dataclasses.replace(described, declared=True))
    return undo


def _enter(kind: type, described: LayerType | None) -> None:
    """Let the table say this of a type, or nothing."""
    _TABLE.pop(kind, None)
    _TABLE.update({} if described is None else {kind: described})
    _type_of.cache_clear()


def get_layer(model: nn.Module, name: str) -> nn.Module | Tensor:
    """Return the module, bare parameter or bare buffer called `name`; raise UnknownNameError otherwise."""
    check_module(model)
    owner, _, leaf = str(name).rpartition(".")
    try:
        return model.get_submodule(str(name))
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
        LayerTypeError: the layer is not as its registered type says.
    """
    kind, where = layer_type(layer), f"layer {name!r} ({type(layer).__name__})"
    if kind is UNKNOWN:
        what = f"layer {name!r}: type {type(layer).__name__} is not in the table of layer types"
        raise UnknownLayerError(f"{what}; register_layer describes it")
    if isinstance(layer, Tensor):
        longer = [dim for dim, size in enumerate(layer.shape) if size > 1]
        return {"out": Axis(layer.shape[longer[-1]], (Slot("", longer[-1]),))} if longer else {}
    if kind.declared:
        _check_layer_fits(layer, kind, where)
    strange = sorted(own_parameters(layer).keys() - kind.outputs.keys() - kind.inputs.keys())
    if strange or "parametrizations" in getattr(layer, "_modules", {}):
        computed = " (prune.remove or remove_spectral_norm first)" * any(name.endswith("_orig") for name in strange)
        what = f"parameters {strange}{computed}" if strange else "a parametrization (remove it first)"
        raise UnknownLayerError(f"{where} has {what} that its type does not explain")
    axes = _described_axes(layer, kind, where)
    if kind.declared:
        _check_sizes(layer, axes, where)
    return {} if kind.role == "scale" and axes and axes["out"].width == 1 else axes


def _described_axes(layer: nn.Module, kind: LayerType, where: str) -> dict[str, Axis]:
    """Return the axes of a layer as its type describes them."""
    groups = getattr(layer, kind.groups) if kind.groups else 1
    tensors, axes = own_tensors(layer), {}
    for key, described in (("out", kind.outputs), ("in", kind.inputs)):
        parts = kind.parts if key == "out" else 1
        present = [(tensor, dim) for tensor, dim in described.items() if tensor in tensors]
        slots = tuple(Slot(tensor, dim, parts, groups if dim == 1 else 1) for tensor, dim in present)
        attributes = tuple(attribute for attribute, axis in kind.widths.items() if axis == key)
        held = getattr(layer, attributes[0]) if attributes else None
        if isinstance(held, tuple) and len(held) != 1:
            raise UnknownLayerError(f"{where} normalizes over {len(held)} dimensions {held}")
        if slots or attributes:
            width = channel_view(tensors[slots[0].tensor], slots[0]).shape[0] if held is None else held
            axes[key] = Axis(width[0] if isinstance(width, tuple) else width, slots, attributes, kind.mixes)
    return _grouped_axes(axes, groups, kind.groups) if groups > 1 else axes


def _grouped_axes(axes: dict[str, Axis], groups: int, attribute: str) -> dict[str, Axis]:
    """Return the axes of a convolution whose groups may each have one input: depthwise, or with a multiplier."""
    out, into = axes["out"], axes["in"]
    along_first = tuple(replace(slot, dim=0, groups=1) for slot in out.slots)
    if groups == out.width == into.width:
        return {"out": Axis(out.width, along_first, (*out.attributes, *into.attributes, attribute))}
    if groups == into.width and into.slots[0].groups > 1:
        return {
            "out": replace(out, mixable=False),
            "in": Axis(into.width, (), (*into.attributes, attribute)),
        }
    return axes


def _check_layer_fits(layer: nn.Module, kind: LayerType, where: str) -> None:
    """Raise LayerTypeError unless a layer has all that its registered type names."""
    tensors = own_tensors(layer)
    for name, dim in (*kind.outputs.items(), *kind.inputs.items()):
        if name not in tensors and getattr(layer, name, layer) is not None:
            raise LayerTypeError(f"{where} has no tensor {name!r}, which its type names; it has {sorted(tensors)}")
        if name in tensors and dim >= tensors[name].dim():
            shape = tuple(tensors[name].shape)
            raise LayerTypeError(f"{where}: its {name!r} of shape {shape} has no dimension {dim}, as its type says")
    for name in (*kind.widths, *([kind.groups] if kind.groups else ())):
        if not hasattr(layer, name):
            raise LayerTypeError(f"{where} has no attribute {name!r}, which its type names")


def _check_sizes(layer: nn.Module, axes: Mapping[str, Axis], where: str) -> None:
    """Raise LayerTypeError unless all that holds an axis of a layer is equally wide."""
    tensors = own_tensors(layer)
    for key, axis in axes.items():
        sizes = {f"{s.tensor} along {s.dim}": len(channel_view(tensors[s.tensor], s)) for s in axis.slots}
        held = {name: getattr(layer, name) for name in axis.attributes}
        sizes |= {name: value[0] if isinstance(value, tuple) else value for name, value in held.items()}
        if len(set(sizes.values())) > 1:
            found = ", ".join(f"{name} is {size}" for name, size in sizes.items())
            raise LayerTypeError(f"{where}: the sizes of its axis {key!r} do not agree: {found}")


def all_axes(layer: nn.Module | Tensor, name: str = "") -> dict[str, Axis]:
    """Return the axes of a layer; of a bare parameter or buffer also all its other dimensions, "dim0", "dim1", ..."""
    axes = layer_axes(layer, name)
    if isinstance(layer, Tensor) and axes:
        last = axes["out"].slots[0].dim
        others = [dim for dim, size in enumerate(layer.shape) if size > 1 and dim != last]
        axes |= {f"dim{dim}": Axis(layer.shape[dim], (Slot("", dim),)) for dim in others}
    return axes


def named_axes(layer: nn.Module | Tensor, name: str = "") -> dict[str, Axis]:
    """Return the axes that a plan may name: `all_axes`, and that of what was left with one channel.

    A PReLU of one weight serves any number of channels and a tensor of one number has no axis, unless they are left.
    """
    axes = all_axes(layer, name)
    if not axes and isinstance(layer, Tensor) and layer.dim():
        return {"out": Axis(1, (Slot("", layer.dim() - 1),))}
    return axes or (_described_axes(layer, layer_type(layer), name) if has_role(layer, "scale") else {})


def scored_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over the modules that own parameters described by the table (bare parameters are not modules)."""
    for name, module in model.named_modules():
        if is_known(module) and own_parameters(module):
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


def affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return slope and shift of a batch norm in eval mode, y = slope·z + shift, each (channels,), at least float32."""
    dtype = torch.promote_types(norm.weight.dtype, torch.float32)
    slope = norm.weight.detach().to(dtype) * (norm.running_var.to(dtype) + norm.eps).rsqrt()
    return slope, norm.bias.detach().to(dtype) - slope * norm.running_mean.to(dtype)


def is_foldable(layer: nn.Module, norm: nn.Module) -> bool:
    """Say whether a projection can do the work of a batch norm behind it; both have torch's own forward."""
    plain = type(norm).forward is nn.modules.batchnorm._BatchNorm.forward and norm.running_mean is not None
    own = "forward" in vars(layer) or "forward" in vars(norm) or norm.weight is None or norm.bias is None
    made = is_projection(layer) and not is_standardised(layer) and "bias" in layer._parameters
    return plain and made and not own and not norm.training and "weight" in layer._parameters


def folded(layer: nn.Module, norm: nn.Module) -> dict[str, Tensor]:
    """Return the weight and bias with which a projection gives what a batch norm in eval mode makes of its output."""
    slope, shift = affine(norm)
    own, slots = own_parameters(layer), {slot.tensor: slot for slot in layer_axes(layer)["out"].slots}
    split, dims = channel_dims(own["weight"].detach(), slots["weight"])
    factors = slope.view([size if dim in dims else 1 for dim, size in enumerate(split.shape)])
    bias = shift + slope * own["bias"].detach() if "bias" in own else shift
    weight = (split * factors).reshape(own["weight"].shape)
    return {"weight": weight.to(own["weight"].dtype), "bias": bias.to(own["weight"].dtype)}


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


def find_axis(layer: nn.Module | nn.Parameter, name: LayerAxis) -> Axis:
    """Return one axis of a layer by its name.

    Besides "out" and "in" there are their parts "out_w" and "out_b", without and with nothing but the bias, and the
    other dimensions of a bare parameter, "dim0", "dim1", ...
    """
    key, _, part = name.axis.partition("_")
    axes = named_axes(layer, name.layer)
    if key not in axes or part not in ("", "w", "b"):
        raise UnknownNameError("axis", str(name), [f"{name.layer}.{known}" for known in axes])
    if not part:
        return axes[key]
    return replace(axes[key], slots=tuple(s for s in axes[key].slots if s.tensor.endswith("bias") == (part == "b")))
