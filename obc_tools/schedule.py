"""The learning rate of every step, as a function of the recipe and the step alone."""

from __future__ import annotations

import math

from .recipe import Recipe


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
