"""A recipe's optimizer: which parameters are treated apart, and what is frozen."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .layers import UnknownNameError
from .recipe import Recipe

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Sort a model's trainable parameters into the groups that a recipe treats apart.

    "compressor": the compressors and decompressors of Equivalent Pruning, told by the last part of their name; "norm":
    the weights of norm layers and every bias; "rest": all others. Each trainable parameter is in exactly one group, a
    tied one once; groups without parameters are left out.

    Returns:
        Groups as torch.optim takes them, each with ``name``, ``params``, ``lr`` and ``weight_decay``.

    Raises:
        ValueError: if no parameter of the model requires grad.
    """
    sorted_parameters: dict[str, list[nn.Parameter]] = {"compressor": [], "norm": [], "rest": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            sorted_parameters[_group_of(name, model)].append(parameter)
    scales = {
        "compressor": (recipe.compressor_lr_scale, recipe.compressor_weight_decay_scale),
        "norm": (1.0, recipe.norm_weight_decay_scale),
        "rest": (1.0, 1.0),
    }
    groups = [
        {"name": name, "params": params, "lr": recipe.lr * lr, "weight_decay": recipe.weight_decay * decay}
        for (name, params), (lr, decay) in zip(sorted_parameters.items(), scales.values(), strict=True)
        if params
    ]
    if not groups:
        raise ValueError(f"{type(model).__name__} has no parameter that requires grad: there is nothing to train")
    return groups


def _group_of(name: str, model: nn.Module) -> str:
    owner, _, leaf = name.rpartition(".")
    if leaf in ("compressor", "decompressor"):
        return "compressor"
    if leaf.endswith("bias") or isinstance(model.get_submodule(owner), _NORMS):
        return "norm"
    return "rest"


def make_optimizer(model: nn.Module, recipe: Recipe, *, fused: bool = True) -> torch.optim.Optimizer:
    """Build a recipe's optimizer over a model's parameter groups; ``fused`` updates all tensors in one kernel."""
    groups = parameter_groups(model, recipe)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=fused)
    return torch.optim.SGD(groups, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=fused)


@contextmanager
def frozen(model: nn.Module, recipe: Recipe) -> Iterator[None]:
    """Let no parameter that matches a pattern of ``recipe.freeze`` require grad; give each its flag back at the end.

    Raises:
        ValueError: for a pattern that matches no parameter.
    """
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    names = dict(model.named_parameters())
    chosen = {pattern: _matches(names, pattern) for pattern in recipe.freeze}
    for pattern, matches in chosen.items():
        if not matches:
            raise UnknownNameError("parameter to freeze", pattern, list(names))
    try:
        for name in {name for matches in chosen.values() for name in matches}:
            names[name].requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _matches(names: Iterable[str], pattern: str) -> list[str]:
    """Return the parameters that a pattern names, itself or by a module that holds them."""
    return [name for name in names if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")]


def set_train_mode(model: nn.Module, recipe: Recipe) -> None:
    """Put a model into train mode, norms excepted where the recipe freezes their running statistics."""
    model.train()
    if recipe.freeze_statistics:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.eval()
