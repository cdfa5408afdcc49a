"""One step of a training: forward, backward, verdict, update, average."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..errors import UnknownNameError
from ..structure.layers import is_norm
from .guard import Guard, Where, reading_lag
from .recipe import Recipe, learning_rate_factor


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


def training_loss(logits: Tensor, labels: Tensor, recipe: Recipe, teacher_logits: Tensor | None = None) -> Tensor:
    """Return label_weight · CE(logits, labels) + distill_weight · T² · KL(teacher / T ‖ logits / T), batch means.

    After Hinton et al. (2015), with the recipe's smoothing and temperature T. Computed in float32 or better.

    Args:
        logits: (images, classes).
        labels: Class numbers (images,), or shares of the classes (images, classes).
        teacher_logits: Like ``logits``; needed where ``recipe.distill_weight`` is above 0.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if labels.is_floating_point():
        labels = labels.to(logits.dtype)
    loss = recipe.label_weight * F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
    if not recipe.distill_weight:
        return loss
    student = F.log_softmax(logits / recipe.temperature, 1)
    teacher = F.log_softmax(teacher_logits.to(logits.dtype) / recipe.temperature, 1)
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return loss + recipe.distill_weight * recipe.temperature**2 * divergence


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Count the images whose largest logit is that of their class, or of the class with the largest share."""
    classes = labels.argmax(1) if labels.is_floating_point() else labels
    return (logits.argmax(1) == classes).sum()


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
    if leaf.endswith("bias") or is_norm(model.get_submodule(owner)):
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
            if is_norm(module, "examples", "positions"):
                module.eval()
