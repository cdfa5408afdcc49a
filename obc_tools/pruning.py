"""Apply a plan (`prune`), and find a plan for a target in steps (`prune_to`)."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .layers import get_layer, layer_axes, select_channels, shrink_layer
from .plan import PruningPlan


def prune(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Return a new model with only the kept channels; the given model is left unchanged.

    Parameters, buffers and the attributes of layers that hold widths follow; everything else is a deep copy.

    Raises:
        PlanMismatchError: the plan does not fit the model (nothing is built then).
    """
    plan.validate(model)
    pruned = copy.deepcopy(model)
    kept: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for axis, positions in plan.shrunk.items():
        kept[axis.layer][axis.axis] = positions
    for name, axes in kept.items():
        layer = get_layer(pruned, name)
        if isinstance(layer, nn.Parameter):
            _shrink_parameter(pruned, name, axes["out"])
        else:
            shrink_layer(layer, axes, name)
    return pruned


def _shrink_parameter(model: nn.Module, name: str, kept: tuple[int, ...]) -> None:
    owner, _, leaf = name.rpartition(".")
    parameter = get_layer(model, name)
    slot = layer_axes(parameter, name)["out"].slots[0]
    index = torch.as_tensor(kept, device=parameter.device)
    value = select_channels(parameter.detach(), slot, index)
    setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=parameter.requires_grad))
