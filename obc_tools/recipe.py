"""A training recipe as data: optimizer, learning-rate schedule and parameter groups."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)

_CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "optimizer": ("sgd", "adamw"),
        "schedule": ("cosine", "multistep", "step", "constant"),
        "amp": ("no", "bf16", "fp16"),
    }
)
_LEAST_WHOLE: Mapping[str, int] = MappingProxyType(
    {"epochs": 1, "batch_size": 1, "step_size": 1, "warmup_epochs": 0, "seed": 0}
)
_LEAST_NUMBER: Mapping[str, float] = MappingProxyType(
    {
        "lr": 0.0,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "gamma": 0.0,
        "warmup_start": 0.0,
        "min_lr": 0.0,
        "label_smoothing": 0.0,
        "compressor_lr_scale": 0.0,
        "compressor_weight_decay_scale": 0.0,
        "norm_weight_decay_scale": 0.0,
    }
)


class RecipeError(ValueError):
    """A recipe that cannot be trained with: which field, its value, and what it may be."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train, as plain data; checked when built.

    The learning rate of a step is ``lr`` times the factor of :func:`learning_rate_factor`: "cosine" and the warm-up
    move with every step; "multistep", "step" and "constant" hold for whole epochs.

    Attributes:
        epochs: Passes over the training batches.
        batch_size: Images a step, for whoever makes the training batches.
        lr: Base learning rate.
        optimizer: "sgd" (with ``momentum`` and ``nesterov``) or "adamw" (which ignores both; betas 0.9 and 0.999).
        momentum: Momentum of SGD, in [0, 1).
        nesterov: Nesterov's form of the momentum.
        weight_decay: L2 penalty of SGD, decoupled decay of AdamW.
        schedule: "cosine" from ``lr`` to ``min_lr`` over the epochs after the warm-up; "multistep", times ``gamma`` at
            each of ``milestones``; "step", times ``gamma`` every ``step_size`` epochs; "constant".
        milestones: Finished epochs after which "multistep" decays, counted from the start of training, rising.
        step_size: Epochs between two decays of "step", counted from the start of training.
        gamma: Factor of one decay.
        warmup_epochs: Epochs in which the learning rate rises linearly from ``warmup_start`` times to once its value.
        warmup_start: Factor of the very first step, in (0, 1].
        min_lr: Where "cosine" ends, for a parameter group at scale 1.
        label_smoothing: Share of the target spread evenly over all classes, in [0, 1).
        clip_norm: Largest norm of the whole gradient; longer ones are scaled down. None: no clipping.
        amp: Precision of the forward pass, "no" (the model's own), "bf16" or "fp16" (with loss scaling; needs a GPU).
        seed: Fixes the order and augmentation of the images, and everything random inside the model.
        augment: Whether whoever makes the training batches augments the images.
        compressor_lr_scale: Learning rate of compressors and decompressors, relative to ``lr``.
        compressor_weight_decay_scale: Weight decay of compressors and decompressors, relative to ``weight_decay``.
        norm_weight_decay_scale: Weight decay of norm layers and of all biases, relative to ``weight_decay``.

    Raises:
        RecipeError: if a field has a value it cannot have, or fields contradict each other.

    Example:
        >>> recipe = Recipe(epochs=100, lr=0.01, schedule="multistep", milestones=(60, 80))
        >>> [round(recipe.lr * learning_rate_factor(recipe, step, steps_per_epoch=1), 6) for step in (0, 59, 60, 99)]
        [0.01, 0.01, 0.001, 0.0001]
    """

    epochs: int
    batch_size: int = 128
    lr: float = 0.01
    optimizer: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    milestones: tuple[int, ...] = ()
    step_size: int = 30
    gamma: float = 0.1
    warmup_epochs: int = 0
    warmup_start: float = 0.01
    min_lr: float = 0.0
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    amp: str = "no"
    seed: int = 0
    augment: bool = True
    compressor_lr_scale: float = 1.0
    compressor_weight_decay_scale: float = 1.0
    norm_weight_decay_scale: float = 1.0

    def __post_init__(self):
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                self._refuse(name, f"known are {', '.join(map(repr, known))}")
        for name, least in _LEAST_WHOLE.items():
            if not _is_whole(getattr(self, name)) or getattr(self, name) < least:
                self._refuse(name, f"it is a whole number of at least {least}")
        for name, least in _LEAST_NUMBER.items():
            if not _is_number(getattr(self, name)) or getattr(self, name) < least:
                self._refuse(name, f"it is a finite number of at least {least:g}")
        for name in ("nesterov", "augment"):
            if not isinstance(getattr(self, name), bool):
                self._refuse(name, "it is True or False")
        self._check_milestones()
        self._check_bounds()

    def _refuse(self, name: str, why: str) -> None:
        raise RecipeError(f"recipe: {name} is {getattr(self, name)!r}; {why}")

    def _check_milestones(self) -> None:
        if not isinstance(self.milestones, list | tuple):
            self._refuse("milestones", "it is a list of epochs")
        object.__setattr__(self, "milestones", tuple(self.milestones))
        whole = all(_is_whole(milestone) and milestone >= 1 for milestone in self.milestones)
        if not whole or any(later <= earlier for earlier, later in pairwise(self.milestones)):
            self._refuse("milestones", "they are whole numbers of at least 1, rising")
        if bool(self.milestones) != (self.schedule == "multistep"):
            self._refuse("milestones", f"they belong to schedule 'multistep' and to no other, not {self.schedule!r}")

    def _check_bounds(self) -> None:
        if self.lr == 0:
            self._refuse("lr", "it is above 0")
        for name in ("momentum", "label_smoothing"):
            if getattr(self, name) >= 1:
                self._refuse(name, "it is below 1")
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            self._refuse("nesterov", "it needs optimizer 'sgd' and a momentum above 0")
        if self.warmup_epochs > self.epochs:
            self._refuse("warmup_epochs", f"training ends after {self.epochs} epochs, before the warm-up does")
        if not 0 < self.warmup_start <= 1:
            self._refuse("warmup_start", "it is a factor above 0 and at most 1")
        if self.min_lr > self.lr or (self.min_lr and self.schedule != "cosine"):
            self._refuse("min_lr", f"it is at most lr ({self.lr:g}), and only schedule 'cosine' goes down to it")
        if self.clip_norm is not None and (not _is_number(self.clip_norm) or self.clip_norm <= 0):
            self._refuse("clip_norm", "it is a finite number above 0, or None for no clipping")

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data that JSON can hold."""
        return asdict(self) | {"milestones": list(self.milestones)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Build a recipe from what :meth:`to_dict` returned; fields left out take their defaults.

        Raises:
            RecipeError: for a key that is no field (the fields are listed), a missing one, or a value of a wrong type.
        """
        if not isinstance(data, Mapping):
            raise RecipeError(f"recipe: a mapping of fields is needed, not {type(data).__name__}")
        known = [field.name for field in fields(cls)]
        unknown = sorted(str(key) for key in data if key not in known)
        if unknown:
            raise RecipeError(f"recipe: unknown fields {', '.join(unknown)}; known are {', '.join(known)}")
        missing = [field.name for field in fields(cls) if field.default is MISSING and field.name not in data]
        if missing:
            raise RecipeError(f"recipe: {', '.join(missing)} is missing")
        return cls(**data)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def learning_rate_factor(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Return what a recipe multiplies its learning rate with in one step, the first being step 0.

    With t = step / steps_per_epoch epochs gone, w warm-up epochs, E epochs and m = min_lr / lr:

        cosine      m + (1 − m) · (1 + cos(π (t − w) / (E − w))) / 2      for t ≥ w, and 1 before
        multistep   gamma^(number of milestones ≤ ⌊t⌋)
        step        gamma^⌊⌊t⌋ / step_size⌋
        warm-up     times  warmup_start + (1 − warmup_start) · t / w      for t < w

    Cosine annealing is that of Loshchilov and Hutter (2017), eq. 5, without restarts.
    """
    return _warmup(recipe, step / steps_per_epoch) * _decay(recipe, step, steps_per_epoch)


def _warmup(recipe: Recipe, time: float) -> float:
    if time >= recipe.warmup_epochs:
        return 1.0
    return recipe.warmup_start + (1 - recipe.warmup_start) * time / recipe.warmup_epochs


def _decay(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    epoch = step // steps_per_epoch
    if recipe.schedule == "multistep":
        return recipe.gamma ** sum(milestone <= epoch for milestone in recipe.milestones)
    if recipe.schedule == "step":
        return recipe.gamma ** (epoch // recipe.step_size)
    if recipe.schedule == "constant":
        return 1.0
    gone, total = (epochs - recipe.warmup_epochs for epochs in (step / steps_per_epoch, recipe.epochs))
    if gone <= 0:
        return 1.0
    least = recipe.min_lr / recipe.lr
    return least + (1 - least) * (1 + math.cos(math.pi * min(gone / total, 1.0))) / 2


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
