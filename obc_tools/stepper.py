"""One step of a training: forward, backward, verdict, update, average."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .average import WeightAverage
from .guard import Guard, Where, reading_lag
from .loss import count_correct, training_loss
from .optimizer import make_optimizer, set_train_mode
from .recipe import Recipe
from .schedule import learning_rate_factor


class Stepper:
    """Takes the steps of a training; holds all that changes in it.

    Args:
        model: Trained in place; on its device.
        recipe: How to train.
        accelerator: Precision, gradient scaling and processes.
        steps: Steps an epoch.
        teacher: Where the recipe distils.
        regularize: Called with the gradients there, before the update; may add to them.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        accelerator: Accelerator,
        steps: int,
        teacher: nn.Module | None = None,
        regularize: Callable[[], None] | None = None,
    ):
        self.model, self._recipe, self._accelerator, self._steps = model, recipe, accelerator, steps
        self._teacher, self._regularize = teacher, regularize
        self._device = next(model.parameters()).device
        # Gradient scaling withholds updates itself, and fused SGD loses its momentum when the very first is withheld.
        self._fused = recipe.amp != "fp16"
        self._forward = _distributed(model, accelerator, self._device)
        if recipe.compile:
            self._forward = torch.compile(self._forward)
        optimizer = make_optimizer(model, recipe, fused=self._fused)
        self._lrs = [group["lr"] for group in optimizer.param_groups]
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        fused_optimizer = optimizer if self._fused else None
        self._guard = Guard(model.buffers(), fused_optimizer, self._device, reading_lag(self._device))
        self._optimizer = accelerator.prepare(optimizer)
        images_a_step = recipe.batch_size * accelerator.num_processes
        self._average = WeightAverage(model, recipe, images_a_step) if recipe.ema_every else None

    @property
    def evaluated(self) -> nn.Module:
        """The network whose accuracy counts: the averaged one where there is an average."""
        return self._average.model if self._average else self.model

    def begin_epoch(self) -> None:
        """Put the network into the mode in which the recipe trains it."""
        set_train_mode(self.model, self._recipe)

    def set_lr(self, step: int) -> float:
        """Set the learning rates of a step, counted over all epochs; return the base one."""
        factor = learning_rate_factor(self._recipe, step, self._steps)
        for group, lr in zip(self._optimizer.param_groups, self._lrs, strict=True):
            group["lr"] = lr * factor
        return self._recipe.lr * factor

    def step(self, images: Tensor, labels: Tensor, where: Where) -> Tensor:
        """Take one step; return the batch's summed loss and number of correct images, on the device."""
        if self._recipe.channels_last and images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        self._guard.keep_buffers()
        self._optimizer.zero_grad()
        loss, correct = self._gradients(images, labels)
        norm = self._treat_gradients()
        self._guard.judge(loss, norm, where, images)
        self._optimizer.step()
        self._guard.read()
        if self._average:
            self._average.update(self.model, where.epoch - 1, where.step - 1)
        return torch.stack((loss * len(labels), correct.to(loss.dtype)))

    def settle(self) -> None:
        """Wait for the verdicts on all steps so far; raise DivergenceError if one was refused."""
        self._guard.read_all()

    def finish(self) -> None:
        """Leave the averaged weights in the model, where there is an average."""
        if self._average:
            self._average.copy_to(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Return all that changes from step to step, random state excepted."""
        state = {"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict()}
        if self._average:
            state["average"] = self._average.state_dict()
        if self._accelerator.scaler is not None:
            state["scaler"] = self._accelerator.scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Bring back what :meth:`state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._average:
            self._average.load_state_dict(state["average"])
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(state["scaler"])

    def _gradients(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradient of a batch, piece by piece; return its mean loss and its number of correct images."""
        pieces = list(zip(images.chunk(self._recipe.accumulate), labels.chunk(self._recipe.accumulate), strict=True))
        losses, correct = [], []
        for number, (part, own_labels) in enumerate(pieces, start=1):
            last = number == len(pieces)
            with nullcontext() if last else self._accelerator.no_sync(self._forward):
                loss, right = self._backward(part, own_labels, len(part) / len(images))
            losses.append(loss)
            correct.append(right)
        return torch.stack(losses).sum(), torch.stack(correct).sum()

    def _backward(self, images: Tensor, labels: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        with self._accelerator.autocast():
            logits = self._forward(images)
            with torch.no_grad():
                taught = self._teacher(images) if self._recipe.distill_weight else None
        loss = training_loss(logits, labels, self._recipe, taught) * weight
        self._accelerator.backward(self._guard.blocked(loss))
        return loss.detach(), count_correct(logits.detach(), labels)

    def _treat_gradients(self) -> Tensor | None:
        """Regularise and clip as the recipe says; return the norm before clipping, None under gradient scaling."""
        clip = self._recipe.clip_norm
        if self._regularize is not None or clip is not None:
            self._accelerator.unscale_gradients()
        if self._regularize is not None:
            self._regularize()
        if clip is not None:
            norm = nn.utils.clip_grad_norm_(self._parameters, clip)
        elif self._fused:
            norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        return norm if self._fused else None


def _distributed(model: nn.Module, accelerator: Accelerator, device: torch.device) -> nn.Module:
    if accelerator.num_processes == 1:
        return model
    devices = None if device.type == "cpu" else [device]
    return nn.parallel.DistributedDataParallel(model, device_ids=devices)
