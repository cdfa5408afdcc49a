"""One step of a training: forward, backward, verdict, update, average.

A training stops at the first step that is not finite, with the model as the steps before left it (`Guard`).
"""

from __future__ import annotations

import copy
import fnmatch
import itertools
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._pytree import tree_leaves, tree_map

from ..data.batches import count_examples, cut_batch
from ..errors import UnknownNameError
from ..scoring.tasks import CLASSIFICATION, Task
from ..state import Restoring, hooks
from ..structure.layers import is_norm
from .processes import processes
from .recipe import Recipe, learning_rate_factor

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Stepper:
    """Takes the steps of a training; holds all that changes in it.

    Args:
        model: Trained in place; on its device.
        recipe: How to train.
        steps: Steps an epoch.
        teacher: Where the recipe distils.
        regularize: Called with the gradients there, before the update; may add to them.
        task: What the model is trained for.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        steps: int,
        teacher: nn.Module | None = None,
        regularize: Callable[[], None] | None = None,
        task: Task = CLASSIFICATION,
    ):
        self.model, self._recipe, self._steps = model, recipe, steps
        self._teacher, self._regularize, self._task = teacher, regularize, task
        device = next(model.parameters()).device
        self._precision = torch.autocast(device.type, PRECISIONS[recipe.amp]) if recipe.amp != "no" else nullcontext()
        # Gradient scaling withholds updates itself, and fused SGD loses its momentum when the very first is withheld.
        self._scaled = recipe.amp == "fp16"
        self._scaler = torch.amp.GradScaler(device.type, enabled=self._scaled)
        self._network = model if task is CLASSIFICATION else _TaskLoss(model, task, recipe)
        self._together = processes().count > 1
        if self._together:
            devices = None if device.type == "cpu" else [device]
            self._network = nn.parallel.DistributedDataParallel(self._network, device_ids=devices)
        self._forward = torch.compile(self._network) if recipe.compile else self._network
        self._optimizer = make_optimizer(model, recipe, fused=not self._scaled)
        self._lrs = [group["lr"] for group in self._optimizer.param_groups]
        self._parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        skipping = None if self._scaled else self._optimizer
        self._guard = Guard(model.buffers(), skipping, device, reading_lag(device))
        images_a_step = recipe.batch_size * processes().count
        self._average = average_of(model, recipe, images_a_step) if recipe.ema_every else None

    @property
    def evaluated(self) -> nn.Module:
        """The network whose accuracy counts: the averaged one where there is an average."""
        return self._average.module if self._average else self.model

    def begin_epoch(self) -> None:
        """Put the network into train mode, norms excepted where the recipe freezes their running statistics."""
        self.model.train()
        for module in self.model.modules() if self._recipe.freeze_statistics else ():
            if is_norm(module, "examples", "positions"):
                module.eval()

    def set_lr(self, step: int) -> float:
        """Set the learning rates of a step, counted over all epochs; return the base one."""
        factor = learning_rate_factor(self._recipe, step, self._steps)
        for group, lr in zip(self._optimizer.param_groups, self._lrs, strict=True):
            group["lr"] = lr * factor
        return self._recipe.lr * factor

    def step(self, batch: Any, where: Where) -> Tensor:
        """Take one step; return the batch's summed loss and number of correct images, on the device.

        The number is NaN for tasks that do not classify.
        """
        if self._recipe.channels_last:
            batch = tree_map(_channels_last, batch)
        self._guard.keep_buffers()
        self._optimizer.zero_grad()
        loss, correct = self._gradients(batch)
        norm = self._treat_gradients()
        self._guard.judge(loss, norm, where, batch)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._guard.read()
        if self._average and (where.step - 1) % self._recipe.ema_every == 0:
            self._average.update_parameters(self.model)
            if where.epoch <= self._recipe.warmup_epochs:
                self._average.n_averaged.zero_()
        return torch.stack((loss * count_examples(batch), correct.to(loss.dtype)))

    def settle(self) -> None:
        """Wait for the verdicts on all steps so far; raise DivergenceError if one was refused."""
        self._guard.read_all()

    def finish(self) -> None:
        """Leave the averaged weights in the model, where there is an average."""
        if self._average:
            self.model.load_state_dict(self._average.module.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return all that changes from step to step, random state excepted."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Bring back what :meth:`state_dict` returned."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self._optimizer}
        parts |= {"average": self._average} if self._average else {}
        return parts | ({"scaler": self._scaler} if self._scaled else {})

    def _gradients(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Compute the gradient of a batch, piece by piece; return its mean loss and its number of correct images."""
        pieces = cut_batch(batch, self._recipe.accumulate) if self._recipe.accumulate > 1 else [batch]
        losses, correct = [], []
        for number, piece in enumerate(pieces, start=1):
            # Several processes add up their gradients once, with the last piece.
            with self._network.no_sync() if self._together and number < len(pieces) else nullcontext():
                loss, right = self._backward(piece, count_examples(piece) / count_examples(batch))
            losses.append(loss)
            correct.append(right)
        return torch.stack(losses).sum(), torch.stack(correct).sum()

    def _backward(self, piece: Any, weight: float) -> tuple[Tensor, Tensor]:
        loss, correct = (self._classify if self._task is CLASSIFICATION else self._do_task)(piece)
        loss = loss * weight
        self._scaler.scale(self._guard.blocked(loss)).backward()
        return loss.detach(), correct

    def _classify(self, piece: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the loss of images and labels, and how many are classified correctly."""
        images, labels = piece
        with self._precision:
            logits = self._forward(images)
            with torch.no_grad():
                taught = self._teacher(images) if self._recipe.distill_weight else None
        return training_loss(logits, labels, self._recipe, taught), count_correct(logits.detach(), labels)

    def _do_task(self, piece: Any) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch by the task, and NaN: nothing is classified."""
        with self._precision:
            loss, logits = self._forward(piece)
            if logits is not None:
                with torch.no_grad():
                    taught = self._task.logits(self._task.forward(self._teacher, piece), piece)
                loss = loss + distillation(logits, taught, self._recipe)
        return loss, loss.new_tensor(torch.nan)

    def _treat_gradients(self) -> Tensor | None:
        """Regularise and clip as the recipe says; return the norm before clipping, None under gradient scaling."""
        clip = self._recipe.clip_norm
        if self._regularize is not None or clip is not None:
            self._scaler.unscale_(self._optimizer)
        if self._regularize is not None:
            self._regularize()
        if clip is not None:
            norm = nn.utils.clip_grad_norm_(self._parameters, clip)
        elif not self._scaled:
            norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        return None if self._scaled else norm


class _TaskLoss(nn.Module):
    """A network that returns the loss of a batch, and the logits to distil where there are: for DDP and compilers.

    The logits are made of what the network returned while its losses were computed, by one forward pass.
    """

    def __init__(self, model: nn.Module, task: Task, recipe: Recipe):
        super().__init__()
        self.model, self.task, self.recipe = model, task, recipe

    def forward(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        outputs: list[Any] = []
        watched = [self.model] if self.recipe.distill_weight else []
        with hooks(model.register_forward_hook(lambda *call: outputs.append(call[-1])) for model in watched):
            losses = (self.task.training or self.task.losses)(self.model, batch)
        loss = self.recipe.label_weight * losses.to(torch.promote_types(losses.dtype, torch.float32)).mean()
        if not self.recipe.distill_weight:
            return loss, None
        again = copy.copy(self.model)
        again.forward = lambda *arguments, **keywords: outputs[-1]
        return loss, self.task.logits(self.task.forward(again, batch), batch)


def _channels_last(leaf: Any) -> Any:
    images = isinstance(leaf, Tensor) and leaf.ndim == 4
    return leaf.contiguous(memory_format=torch.channels_last) if images else leaf


def training_loss(logits: Tensor, labels: Tensor, recipe: Recipe, teacher_logits: Tensor | None = None) -> Tensor:
    """Return label_weight · CE(logits, labels) + distill_weight · T² · KL(teacher / T ‖ logits / T), batch means.

    After Hinton et al. (2015), with the recipe's smoothing and temperature T. Computed in float32 or better.

    Args:
        logits: (images, classes).
        labels: Class numbers (images,), or shares of the classes (images, classes).
        teacher_logits: Like ``logits``; needed where ``recipe.distill_weight`` is above 0.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels.to(logits.dtype) if labels.is_floating_point() else labels.long()
    loss = recipe.label_weight * F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
    return loss + distillation(logits, teacher_logits, recipe) if recipe.distill_weight else loss


def distillation(logits: Tensor, teacher_logits: Tensor, recipe: Recipe) -> Tensor:
    """Return distill_weight · T² · KL(teacher / T ‖ logits / T), the mean over rows, in float32 or better."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    student = F.log_softmax(logits / recipe.temperature, 1)
    teacher = F.log_softmax(teacher_logits.to(logits.dtype) / recipe.temperature, 1)
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return recipe.distill_weight * recipe.temperature**2 * divergence


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Count the images whose largest logit is that of their class, or of the class with the largest share."""
    classes = labels.argmax(1) if labels.is_floating_point() else labels
    return (logits.argmax(1) == classes).sum()


def average_of(model: nn.Module, recipe: Recipe, images_a_step: int) -> AveragedModel:
    """Return the average of a network's parameters and buffers over the steps of a training, as it begins.

    Updated at every ``recipe.ema_every``-th step of an epoch, a ← d · a + (1 − d) · w with
    1 − d = (1 − ema_decay) · images a step · ema_every / epochs, at most 1: as torchvision's reference training does.
    Until the warm-up is over, every update copies. Of Equivalent Pruning, W, C and D are averaged, each by itself.
    """
    forgotten = (1 - recipe.ema_decay) * images_a_step * recipe.ema_every / recipe.epochs
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(1 - min(1.0, forgotten)), use_buffers=True)


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


def frozen(model: nn.Module, recipe: Recipe) -> Restoring:
    """Let no parameter that matches a pattern of ``recipe.freeze`` require grad; give each its flag back at the end.

    A pattern names a parameter itself, or a module that holds it.

    Raises:
        ValueError: for a pattern that matches no parameter.
    """
    names = dict(model.named_parameters())
    chosen: set[str] = set()
    for pattern in recipe.freeze:
        matches = {*fnmatch.filter(names, pattern), *fnmatch.filter(names, f"{pattern}.*")}
        if not matches:
            raise UnknownNameError("parameter to freeze", pattern, list(names))
        chosen |= matches
    stopped = [names[name] for name in chosen if names[name].requires_grad]
    restoring = Restoring(undo=[partial(parameter.requires_grad_, True) for parameter in stopped])
    for parameter in stopped:
        parameter.requires_grad_(False)
    return restoring


class DivergenceError(ValueError):
    """A step whose loss or gradient is not finite; the model holds the state before that step."""


class Where(NamedTuple):
    """Which step of a training; epochs and steps count from 1."""

    epoch: int
    step: int
    steps: int
    lr: float

    def __str__(self) -> str:
        return f"epoch {self.epoch}, step {self.step} of {self.steps} (learning rate {self.lr:.4g})"


class _Verdict(NamedTuple):
    stopped: Tensor
    arrived: torch.Event | None
    kept: list[list[Tensor]]
    loss: Tensor
    gradient_norm: Tensor | None
    batch: Any
    where: Where


def reading_lag(device: torch.device) -> int:
    """Return how many steps the reading of a verdict may trail: none where the host computes, one on an accelerator."""
    return 0 if device.type == "cpu" else 1


class Guard:
    """Withholds updates from the first step on whose loss or gradient is not finite, without waiting for the device.

    A step's verdict stays on the device, where it masks that step's update and all later ones. The host reads it
    ``lag`` steps later, when it has long arrived, and then undoes what the forward passes since did to the buffers.
    Each step calls, in this order: :meth:`keep_buffers`, the forward pass, backward of :meth:`blocked`, :meth:`judge`,
    the optimizer's step, :meth:`read`.

    Args:
        buffers: The model's buffers (running statistics), which a forward pass in train mode changes.
        optimizer: A fused optimizer, which skips a step on the device when ``found_inf`` is 1; None where gradient
            scaling withholds the update.
        device: Of the losses.
        lag: Steps by which reading trails; see :func:`reading_lag`.
    """

    def __init__(
        self, buffers: Iterable[Tensor], optimizer: torch.optim.Optimizer | None, device: torch.device, lag: int
    ):
        self._buffers = _by_type(buffers)
        self._slots = itertools.cycle([_clone(self._buffers) for _ in range(lag + 1)])
        self._kept = next(self._slots)
        self._optimizer, self._lag = optimizer, lag
        self._stopped = torch.zeros((), dtype=torch.bool, device=device)
        self._verdicts: deque[_Verdict] = deque()

    def keep_buffers(self) -> None:
        """Remember the buffers as they are before a step."""
        self._kept = next(self._slots)
        _copy(self._buffers, self._kept)

    def blocked(self, loss: Tensor) -> Tensor:
        """Return the loss, times NaN once a step was refused: its gradient is then NaN, for gradient scaling to see."""
        return loss * torch.where(self._stopped, torch.nan, 1.0)

    def judge(self, loss: Tensor, gradient_norm: Tensor | None, where: Where, batch: Any) -> None:
        """Refuse a step, and all after it, if its loss or its gradient's norm (when given) is not finite."""
        finite = torch.isfinite(loss)
        if gradient_norm is not None:
            finite = finite & torch.isfinite(gradient_norm)
        self._stopped = self._stopped | ~finite
        if self._optimizer is not None:
            self._optimizer.found_inf = self._stopped.float()
        on_host, arrived = _send(self._stopped)
        self._verdicts.append(_Verdict(on_host, arrived, self._kept, loss, gradient_norm, batch, where))

    def read(self) -> None:
        """Read the verdicts that are at least ``lag`` steps old.

        Raises:
            DivergenceError: if one refused its step.
        """
        self._read_to(self._lag)

    def read_all(self) -> None:
        """Read every verdict, waiting for the device if need be. Raises as :meth:`read` does."""
        self._read_to(0)

    def _read_to(self, left: int) -> None:
        while len(self._verdicts) > left:
            verdict = self._verdicts.popleft()
            if verdict.arrived is not None:
                verdict.arrived.synchronize()
            if verdict.stopped:
                _copy(verdict.kept, self._buffers)
                raise DivergenceError(_explain(verdict))


def _explain(verdict: _Verdict) -> str:
    tensors = (leaf for leaf in tree_leaves(verdict.batch) if isinstance(leaf, Tensor))
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        cause, advice = "the inputs of its batch hold values that are not finite", "Look at the data."
    else:
        advice = "Lower lr, lengthen warmup_epochs or set clip_norm."
        if not torch.isfinite(verdict.loss):
            cause = f"the loss is {verdict.loss.item()}"
        else:
            cause = f"the loss is {verdict.loss.item():.4g}, but the gradient's norm is {verdict.gradient_norm.item()}"
    return f"{verdict.where}: {cause}. The step was not taken; the model is as the steps before left it. {advice}"


def _send(flag: Tensor) -> tuple[Tensor, torch.Event | None]:
    """Copy a flag to the host without waiting; the event says when it is there."""
    on_host = flag.to("cpu", non_blocking=True, copy=True)
    if flag.device.type == "cpu":
        return on_host, None
    event = torch.Event(flag.device)
    event.record(torch.accelerator.current_stream(flag.device))
    return on_host, event


def _by_type(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Sort tensors by device and dtype, as torch's kernels for lists of tensors want them."""
    lists: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        lists.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(lists.values())


def _clone(lists: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[tensor.detach().clone() for tensor in tensors] for tensors in lists]


@torch.no_grad()
def _copy(source: list[list[Tensor]], target: list[list[Tensor]]) -> None:
    for sources, targets in zip(source, target, strict=True):
        torch._foreach_copy_(targets, sources)
