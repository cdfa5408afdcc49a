"""A training recipe as data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any

from ..data.batches import Augmentation

_CHOICES: Mapping[str, tuple[str, ...]] = {
    "optimizer": ("sgd", "adamw"),
    "schedule": ("cosine", "multistep", "step", "constant"),
    "schedule_by": ("step", "epoch"),
    "amp": ("no", "bf16", "fp16"),
}
# All other numbers are at least 0.
_LEAST: Mapping[str, int] = {"epochs": 1, "batch_size": 1, "accumulate": 1, "step_size": 1, "repeats": 1}
_LISTS: Mapping[str, str] = {"milestones": "epochs", "freeze": "names or patterns"}
_WITHOUT_AUGMENTATION: Mapping[str, float] = {"rand_augment": 0, "erase": 0, "mixup": 0, "cutmix": 0, "repeats": 1}


class RecipeError(ValueError):
    """A recipe that cannot be trained with: which field, its value, and what it may be."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train, as plain data; checked when built.

    The learning rate of a step is ``lr`` times the factor of `learning_rate_factor`.

    Attributes:
        epochs: Passes over the training batches.
        batch_size: Images a step and process, for whoever makes the training batches.
        accumulate: Pieces that a batch is cut into, whose gradients add up to the batch's: less memory.
        lr: Base learning rate.
        optimizer: "sgd" (with ``momentum`` and ``nesterov``) or "adamw" (which ignores both; betas 0.9 and 0.999).
        momentum: Momentum of SGD, in [0, 1).
        nesterov: Nesterov's form of the momentum.
        weight_decay: L2 penalty of SGD, decoupled decay of AdamW.
        schedule: "cosine" from ``lr`` to ``min_lr`` over the epochs after the warm-up; "multistep", times ``gamma`` at
            each of ``milestones``; "step", times ``gamma`` every ``step_size`` epochs; "constant".
        schedule_by: "step": "cosine" and the warm-up move with every step. "epoch": they hold for whole epochs.
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
        rand_augment, erase, mixup, cutmix, repeats: Of `Augmentation`, for whoever makes the
            training batches. Only with ``augment``.
        ema_every: Steps between two updates of an average of the weights, which is what is evaluated and left in the
            end; 0: none. The average starts anew until the warm-up is over.
        ema_decay: The average keeps 1 − (1 − ema_decay) · images a step · ema_every / epochs of itself an update.
        label_weight: Weight of the cross entropy.
        distill_weight: Weight of the distillation from a teacher; above 0 needs one.
        temperature: T of the distillation, T² KL(teacher / T, student / T) (Hinton et al. 2015).
        group_penalty: Strength of the group regularisation of `sparse_train`; 0: none.
        channels_last: Compute on images in channels-last order, which some GPUs prefer.
        compile: Compile the network for training (torch.compile).
        freeze: Patterns of names of parameters, or of modules, that keep their values.
        freeze_statistics: Batch norms normalise by their running statistics, which then stay.
        compressor_lr_scale: Learning rate of compressors and decompressors, relative to ``lr``.
        compressor_weight_decay_scale: Weight decay of compressors and decompressors, relative to ``weight_decay``.
        norm_weight_decay_scale: Weight decay of norm layers and of all biases, relative to ``weight_decay``.

    Raises:
        RecipeError: if a field has a value it cannot have, or fields contradict each other.

    Example:
        >>> Recipe(epochs=100, lr=0.01, schedule="multistep", milestones=(60, 80)).weight_decay
        0.0005
    """

    epochs: int
    batch_size: int = 128
    accumulate: int = 1
    lr: float = 0.01
    optimizer: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    schedule_by: str = "step"
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
    rand_augment: int = 0
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    repeats: int = 1
    ema_every: int = 0
    ema_decay: float = 0.99998
    label_weight: float = 1.0
    distill_weight: float = 0.0
    temperature: float = 4.0
    group_penalty: float = 0.0
    channels_last: bool = False
    compile: bool = False
    freeze: tuple[str, ...] = ()
    freeze_statistics: bool = False
    compressor_lr_scale: float = 1.0
    compressor_weight_decay_scale: float = 1.0
    norm_weight_decay_scale: float = 1.0

    def __post_init__(self):
        for field in fields(self):
            name, value, least = field.name, getattr(self, field.name), _LEAST.get(field.name, 0)
            if name in _CHOICES and value not in _CHOICES[name]:
                self._refuse(name, f"known are {', '.join(map(repr, _CHOICES[name]))}")
            if field.type == "int" and (not _is_whole(value) or value < least):
                self._refuse(name, f"it is a whole number of at least {least}")
            if field.type == "float" and (not _is_number(value) or value < 0):
                self._refuse(name, "it is a finite number of at least 0")
            if field.type == "bool" and not isinstance(value, bool):
                self._refuse(name, "it is True or False")
            if name in _LISTS:
                if not isinstance(value, list | tuple):
                    self._refuse(name, f"it is a list of {_LISTS[name]}")
                object.__setattr__(self, name, tuple(value))
        for wrong, name, why in self._contradictions():
            if wrong:
                self._refuse(name, why)
        try:
            Augmentation(rand_augment=self.rand_augment, erase=self.erase)
        except ValueError as error:
            raise RecipeError(f"recipe: {error}") from error

    @property
    def augmentation(self) -> Augmentation:
        """What the recipe asks of whoever makes the training batches."""
        return Augmentation(crop=self.augment, **{name: getattr(self, name) for name in _WITHOUT_AUGMENTATION})

    def _refuse(self, name: str, why: str) -> None:
        raise RecipeError(f"recipe: {name} is {getattr(self, name)!r}; {why}")

    def _contradictions(self) -> Iterator[tuple[bool, str, str]]:
        """Yield whether something is wrong, with which field, and what that may be; each needs those before it."""
        stones = self.milestones
        whole = all(_is_whole(stone) and stone >= 1 for stone in stones)
        rising = whole and all(earlier < later for earlier, later in pairwise(stones))
        yield not rising, "milestones", "they are whole numbers of at least 1, rising"
        only = f"they belong to schedule 'multistep' and to no other, not {self.schedule!r}"
        yield bool(stones) != (self.schedule == "multistep"), "milestones", only
        yield not all(isinstance(name, str) for name in self.freeze), "freeze", f"it is a list of {_LISTS['freeze']}"
        yield self.lr == 0, "lr", "it is above 0"
        yield self.momentum >= 1, "momentum", "it is below 1"
        yield self.label_smoothing >= 1, "label_smoothing", "it is below 1"
        plain = self.optimizer != "sgd" or self.momentum == 0
        yield self.nesterov and plain, "nesterov", "it needs optimizer 'sgd' and a momentum above 0"
        late = f"training ends after {self.epochs} epochs, before the warm-up does"
        yield self.warmup_epochs > self.epochs, "warmup_epochs", late
        yield not 0 < self.warmup_start <= 1, "warmup_start", "it is a factor above 0 and at most 1"
        high = self.min_lr > self.lr or (self.min_lr and self.schedule != "cosine")
        yield high, "min_lr", f"it is at most lr ({self.lr:g}), and only schedule 'cosine' goes down to it"
        yield self.ema_decay >= 1, "ema_decay", "it is a number from 0 to below 1"
        yield self.temperature == 0, "temperature", "it is a finite number above 0"
        nothing = self.label_weight + self.distill_weight == 0
        yield nothing, "label_weight", "nothing is left to learn: distill_weight is 0 too"
        clips = self.clip_norm is None or (_is_number(self.clip_norm) and self.clip_norm > 0)
        yield not clips, "clip_norm", "it is a finite number above 0, or None for no clipping"
        for name, off in _WITHOUT_AUGMENTATION.items():
            yield getattr(self, name) != off and not self.augment, name, "it needs augment=True"

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data that JSON can hold."""
        return asdict(self) | {"milestones": list(self.milestones), "freeze": list(self.freeze)}

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


def rescaled(recipe: Recipe, epochs: int) -> Recipe:
    """Return the recipe for another number of epochs, its milestones and warm-up at the same shares of them.

    Milestones that coincide become one.
    """
    factor = epochs / recipe.epochs
    milestones = sorted({max(1, round(milestone * factor)) for milestone in recipe.milestones})
    warmup = round(recipe.warmup_epochs * factor)
    return replace(recipe, epochs=epochs, milestones=tuple(milestones), warmup_epochs=warmup)


def learning_rate_factor(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Return what a recipe multiplies its learning rate with in one step, the first being step 0.

    With t = step / steps_per_epoch epochs gone, w warm-up epochs, E epochs and m = min_lr / lr:

        cosine      m + (1 − m) · (1 + cos(π (t − w) / (E − w))) / 2      for t ≥ w, and 1 before
        multistep   gamma^(number of milestones ≤ ⌊t⌋)
        step        gamma^⌊⌊t⌋ / step_size⌋
        warm-up     times  warmup_start + (1 − warmup_start) · t / w      for t < w

    With ``schedule_by="epoch"``, t is the number of whole epochs gone. Cosine annealing is that of Loshchilov and
    Hutter (2017), eq. 5, without restarts.

    Example:
        >>> recipe = Recipe(epochs=100, lr=0.01, schedule="multistep", milestones=(60, 80))
        >>> [round(recipe.lr * learning_rate_factor(recipe, step, steps_per_epoch=1), 6) for step in (0, 59, 60, 99)]
        [0.01, 0.01, 0.001, 0.0001]
    """
    if recipe.schedule_by == "epoch":
        step, steps_per_epoch = step // steps_per_epoch, 1
    time, factor = step / steps_per_epoch, 1.0
    if time < recipe.warmup_epochs:
        factor = recipe.warmup_start + (1 - recipe.warmup_start) * time / recipe.warmup_epochs
    return factor * _decay(recipe, step, steps_per_epoch)


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
