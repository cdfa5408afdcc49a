"""Shrink layers: parameters, buffers, and the attributes that hold widths."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import PlanMismatchError
from ..state import copy_borrowing, without_weight_norms
from .layers import TEMPERATURE, LayerAxis, all_axes, get_layer, has_role, own_tensors, scale_outputs, select_channels

ROOT = "^-0.5"
"""What ends the axis of an attribute that holds a width to the power of −1/2."""


def shrink_model(
    model: nn.Module,
    kept: Mapping[LayerAxis, Sequence[int]],
    scaled: Mapping[str, tuple[Sequence[int], float]] = MappingProxyType({}),
) -> nn.Module:
    """Return a copy of the model in which the given axes keep only these positions (ascending).

    ``scaled`` maps a layer whose outputs are cut to original positions of them and the number that multiplies these.

    Raises:
        PlanMismatchError: tied parameters would be cut differently.
    """
    model = without_weight_norms(model)
    shrunk, borrowed = copy_borrowing(model)
    by_layer: dict[str, dict[str, Sequence[int]]] = defaultdict(dict)
    for axis, positions in kept.items():
        by_layer[axis.layer][axis.axis] = positions
    for name, axes in by_layer.items():
        layer = get_layer(shrunk, name)
        if isinstance(layer, Tensor):
            _shrink_bare(shrunk, name, layer, {k: positions for k, positions in axes.items() if not is_attribute(k)})
            continue
        shrink_layer(layer, {key: positions for key, positions in axes.items() if not is_attribute(key)}, name)
        for key, positions in axes.items():
            if is_attribute(key) and key != TEMPERATURE:
                _set_attribute(layer, key, len(positions))
    for name, (positions, factor) in scaled.items():
        outputs = by_layer[name]["out"]
        scale_outputs(get_layer(shrunk, name), np.flatnonzero(np.isin(outputs, positions)), factor)
    left = set(shrunk.parameters())
    _own(parameter for parameter in borrowed if parameter in left)
    _tie(model, shrunk)
    return shrunk


def _tie(model: nn.Module, shrunk: nn.Module) -> None:
    """Let parameters that are one object in the model be one object in its copy."""
    first: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        source = first.setdefault(parameter, name)
        if source == name:
            continue
        ours, theirs = shrunk.get_parameter(name), shrunk.get_parameter(source)
        if ours.shape != theirs.shape or not torch.equal(ours, theirs):
            raise PlanMismatchError(f"{source!r} and {name!r} are one parameter, but the plan prunes them differently")
        owner, _, leaf = name.rpartition(".")
        setattr(shrunk.get_submodule(owner), leaf, theirs)


def _own(parameters: Iterable[nn.Parameter]) -> None:
    """Give parameters memory of their own."""
    for parameter in parameters:
        parameter.data = parameter.data.clone()


def is_attribute(axis: str) -> bool:
    """Say whether an axis is a number that a module keeps (see `groups.ChannelGroup`)."""
    return axis.startswith(".")


def _set_attribute(layer: nn.Module, axis: str, width: int) -> None:
    name, *path = axis.removesuffix(ROOT).removeprefix(".").split(".")
    try:
        changed = _with(getattr(layer, name), path, width**-0.5 if axis.endswith(ROOT) else width)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise PlanMismatchError(f"the plan's {axis!r} is no number that a {type(layer).__name__} keeps") from error
    setattr(layer, name, changed)


def _with(held: Any, path: Sequence[str], number: float) -> Any:
    """Return what an attribute holds with a number in it, at the places in lists, dicts and objects that lead to it."""
    if not path:
        if isinstance(held, bool) or not isinstance(held, Real):
            raise TypeError(f"{held!r} is no number")
        return number
    if isinstance(held, dict):
        return held | {path[0]: _with(held[path[0]], path[1:], number)}
    if not isinstance(held, list | tuple):  # a configuration, which several modules may share
        setattr(held, path[0], _with(getattr(held, path[0]), path[1:], number))
        return held
    return type(held)(_with(item, path[1:], number) if i == int(path[0]) else item for i, item in enumerate(held))


def shrink_layer(layer: nn.Module, kept: Mapping[str, Sequence[int]], name: str = "") -> None:
    """Keep only some channels of a layer, in place: parameters, buffers and the attributes that hold widths.

    `kept` maps an axis name to the kept positions, in ascending order. New parameters keep their requires_grad.
    """
    axes = all_axes(layer, name) if kept else {}
    for key, positions in kept.items():
        axis = axes[key]
        for slot in axis.slots:
            tensor = own_tensors(layer)[slot.tensor]
            index = torch.as_tensor(positions, device=tensor.device)
            _replace(layer, slot.tensor, select_channels(tensor.detach(), slot, index))
        for attribute in axis.attributes:
            old = getattr(layer, attribute)
            setattr(layer, attribute, (len(positions),) if isinstance(old, tuple) else len(positions))
    if kept and has_role(layer, "attention"):
        layer.head_dim = layer.embed_dim // layer.num_heads


def _shrink_bare(model: nn.Module, name: str, tensor: Tensor, kept: Mapping[str, Sequence[int]]) -> None:
    axes = all_axes(tensor, name)
    value = tensor.detach()
    for key, positions in kept.items():
        value = select_channels(value, axes[key].slots[0], torch.as_tensor(positions, device=value.device))
    owner, _, leaf = name.rpartition(".")
    _replace(model.get_submodule(owner), leaf, value)


def _replace(layer: nn.Module, name: str, value: Tensor) -> None:
    old = own_tensors(layer)[name]
    fresh = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
    setattr(layer, name, fresh)
