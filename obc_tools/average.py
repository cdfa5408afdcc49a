"""An exponential moving average of a network's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .recipe import Recipe


class WeightAverage:
    """The average of a network's parameters and buffers over the steps of a training.

    Updated at every ``recipe.ema_every``-th step of an epoch, a ← d · a + (1 − d) · w with
    1 − d = (1 − ema_decay) · images a step · ema_every / epochs, at most 1: as torchvision's reference training does.
    Until the warm-up is over, every update copies. Of Equivalent Pruning, W, C and D are averaged, each by itself.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, images_a_step: int):
        self._recipe = recipe
        forgotten = (1 - recipe.ema_decay) * images_a_step * recipe.ema_every / recipe.epochs
        average = get_ema_multi_avg_fn(1 - min(1.0, forgotten))
        self._averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=True)

    @property
    def model(self) -> nn.Module:
        """The network with the averaged weights."""
        return self._averaged.module

    def update(self, model: nn.Module, epoch: int, step: int) -> None:
        """Take one step of an epoch into account; both are counted from 0."""
        if step % self._recipe.ema_every:
            return
        self._averaged.update_parameters(model)
        if epoch < self._recipe.warmup_epochs:
            self._averaged.n_averaged.zero_()

    def state_dict(self) -> dict[str, Any]:
        return self._averaged.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._averaged.load_state_dict(state)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Give a network the averaged weights."""
        model.load_state_dict(self.model.state_dict())
