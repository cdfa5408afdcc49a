"""Train a model by a recipe, on Hugging Face Accelerate: one engine for naive and Equivalent Pruning."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from .batches import Batch, Batches
from .guard import DivergenceError, Guard, Where, reading_lag
from .history import Epoch, History
from .measure import Metrics, evaluate
from .recipe import Recipe, learning_rate_factor, make_optimizer, parameter_groups
from .state import evaluating

__all__ = ["DivergenceError", "Epoch", "History", "Recipe", "fit", "learning_rate_factor", "parameter_groups"]

SECONDS_BETWEEN_POSTFIXES = 0.5


@runtime_checkable
class Reiterable(Protocol):
    """Batches that can be gone through again and again, and know how many they are."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __len__(self) -> int: ...


def fit(
    model: nn.Module,
    train: Reiterable,
    val: Reiterable,
    recipe: Recipe,
    *,
    progress: bool = True,
    on_epoch: Callable[[History], None] | None = None,
) -> History:
    """Train a classifier in place, and evaluate it after every epoch.

    Works alike on plain models and on :class:`obc_tools.equivalent.EquivalentModel`. Everything random is fixed by
    ``recipe.seed``, and the caller's random state is left alone. Of :class:`obc_tools.batches.Batches`, the first epoch
    uses pass 0, the second pass 1, and so on, whatever was drawn from them before: two trainings with the same batches
    see the same images in the same order. Other batches (a DataLoader, a list) are simply gone through again.

    Mixed precision covers the training's forward pass; the loss, the weights and the evaluation keep the model's own
    precision. All modules are in train mode while training; each gets its own mode back. Gradients end as None.

    Args:
        model: Maps images (batch, …) to logits (batch, classes). Its device is where the training takes place.
        train: Batches of images and labels (batch,), class numbers from 0: anything re-iterable with a length.
        val: Held-out batches, likewise.
        recipe: How to train. ``batch_size`` and ``augment`` speak of the making of ``train``.
        progress: Show a bar over all steps.
        on_epoch: Called after every epoch with the history so far.

    Returns:
        One row an epoch.

    Raises:
        DivergenceError: at the first step whose loss or gradient is not finite. That step and its effect on buffers are
            undone: the model stays as the steps before left it.
        ValueError: if batches are a one-shot iterator, empty, of a wrong form or do not suit the model; for labels out
            of range; for weights that are not finite; for an ``amp`` that the device does not have.
    """
    _check_batches(train, "train")
    _check_batches(val, "val")
    _check_weights(model)
    parameter_groups(model, recipe)
    device = next(model.parameters()).device
    with evaluating(model), _seeded(recipe.seed, device):
        outputs = _count_outputs(model, val, device)
    with (
        evaluating(model),
        _seeded(recipe.seed, device),
        _accelerator(recipe.amp, device) as accelerator,
        tqdm(total=recipe.epochs * len(train), disable=not progress, unit="step") as bar,
    ):
        try:
            return _Training(model, recipe, accelerator, len(train), outputs, bar).run(train, val, on_epoch)
        finally:
            model.zero_grad(set_to_none=True)


class _Training:
    """One training: the state that its steps share."""

    def __init__(self, model: nn.Module, recipe: Recipe, accelerator: Accelerator, steps: int, outputs: int, bar: tqdm):
        self._model, self._recipe, self._accelerator, self._bar = model, recipe, accelerator, bar
        self._steps, self._outputs, self._shown = steps, outputs, time.monotonic()
        self._device = next(model.parameters()).device
        # Gradient scaling withholds updates itself, and fused SGD loses its momentum when the very first is withheld.
        self._fused = recipe.amp != "fp16"
        optimizer = make_optimizer(model, recipe, fused=self._fused)
        self._lrs = [group["lr"] for group in optimizer.param_groups]
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        fused_optimizer = optimizer if self._fused else None
        self._guard = Guard(model.buffers(), fused_optimizer, self._device, reading_lag(self._device))
        self._optimizer = accelerator.prepare(optimizer)

    def run(self, train: Reiterable, val: Reiterable, on_epoch: Callable[[History], None] | None) -> History:
        epochs: list[Epoch] = []
        for number in range(self._recipe.epochs):
            start = time.perf_counter()
            loss, accuracy, images = self._train_epoch(number, _pass(train, number))
            trained = time.perf_counter()
            metrics = self._evaluate(number, val)
            seconds, speed = time.perf_counter() - start, images / (trained - start)
            lr = self._recipe.lr * learning_rate_factor(self._recipe, number * self._steps, self._steps)
            epochs.append(Epoch(number + 1, lr, loss, accuracy, metrics.loss, metrics.accuracy, seconds, speed))
            if on_epoch is not None:
                on_epoch(History(tuple(epochs)))
        return History(tuple(epochs))

    def _train_epoch(self, number: int, batches: Iterable[Batch]) -> tuple[float, float, int]:
        """Train one epoch; return the mean loss, the share of correct images and the number of images."""
        self._model.train()
        totals, images, taken = torch.zeros(2, device=self._device), 0, 0
        for batch in batches:
            if taken == self._steps:
                raise ValueError(f"train: this pass has more batches than the length {self._steps} of train says")
            where = Where(number + 1, taken + 1, self._steps, self._set_lr(number * self._steps + taken))
            inputs, labels = _unpack(batch, f"train, {where}")
            # Reading labels off a device waits for it, so those are checked in the first pass only.
            if number == 0 or labels.device.type == "cpu":
                _check_labels(labels, self._outputs, f"train, {where}")
            totals = totals + self._step(*_to(self._device, inputs, labels), where)
            images, taken = images + len(labels), taken + 1
            self._show(where, totals, images)
        self._guard.read_all()
        if taken < self._steps:
            raise ValueError(f"train: pass {number} ended after {taken} batches; the length of train is {self._steps}")
        loss, correct = totals.tolist()
        return loss / images, correct / images, images

    def _evaluate(self, number: int, val: Reiterable) -> Metrics:
        try:
            return evaluate(self._model, _pass(val, 0))
        except ValueError as error:
            raise ValueError(f"val, after epoch {number + 1} of {self._recipe.epochs}: {error}") from error

    def _set_lr(self, step: int) -> float:
        factor = learning_rate_factor(self._recipe, step, self._steps)
        for group, lr in zip(self._optimizer.param_groups, self._lrs, strict=True):
            group["lr"] = lr * factor
        return self._recipe.lr * factor

    def _step(self, images: Tensor, labels: Tensor, where: Where) -> Tensor:
        """Take one step; return the batch's summed loss and number of correct images, on the device."""
        self._guard.keep_buffers()
        with self._accelerator.autocast():
            logits = self._model(images)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = functional.cross_entropy(logits, labels, label_smoothing=self._recipe.label_smoothing)
        self._optimizer.zero_grad()
        self._accelerator.backward(self._guard.blocked(loss))
        self._guard.judge(loss.detach(), self._gradient_norm(), where, images)
        self._optimizer.step()
        self._guard.read()
        correct = (logits.detach().argmax(1) == labels).sum()
        return torch.stack((loss.detach() * len(labels), correct.to(loss.dtype)))

    def _gradient_norm(self) -> Tensor | None:
        """Clip the gradient if the recipe says so; return its norm before that, None under gradient scaling."""
        if self._recipe.clip_norm is not None:
            norm = self._accelerator.clip_grad_norm_(self._parameters, self._recipe.clip_norm)
        elif self._fused:
            norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        return norm if self._fused else None

    def _show(self, where: Where, totals: Tensor, images: int) -> None:
        self._bar.update()
        # Reading the totals waits for the device, so the postfix changes only now and then.
        if self._bar.disable or time.monotonic() - self._shown < SECONDS_BETWEEN_POSTFIXES:
            return
        loss, accuracy = (totals / images).tolist()
        self._bar.set_postfix(epoch=where.epoch, loss=f"{loss:.3f}", accuracy=f"{accuracy:.1%}", refresh=False)
        self._shown = time.monotonic()


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators of the CPU and of one device; give them their state back on the way out."""
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield
        return
    with (
        torch.random.fork_rng(devices=[device], device_type=device.type),
        torch.accelerator.device_index(device.index),
    ):
        torch.default_generator.manual_seed(seed)
        torch.get_device_module(device).manual_seed(seed)
        yield


@contextmanager
def _accelerator(amp: str, device: torch.device) -> Iterator[Accelerator]:
    """Make an Accelerator for one precision and device, beside any that the process already has.

    Accelerate keeps one precision a process in shared state; that state is put aside and brought back.

    Raises:
        ValueError: if the device does not have the precision, or several processes were launched.
    """
    if amp == "fp16" and device.type == "cpu":
        raise ValueError("amp='fp16' needs a GPU; a model on the CPU trains with amp='bf16' or 'no'")
    shared = [state._shared_state for state in (PartialState, AcceleratorState, GradientState)]
    aside = [dict(state) for state in shared]
    for state in shared:
        state.clear()
    try:
        accelerator = Accelerator(
            mixed_precision=amp,
            cpu=device.type == "cpu",
            device_placement=False,
            # Said out loud, so that a launcher's environment cannot divide the gradient by another number.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
        if accelerator.num_processes > 1:
            raise ValueError(f"fit trains in one process; {accelerator.num_processes} were launched")
        if accelerator.device.type != device.type:
            raise ValueError(f"the model is on {device}, but Accelerate is set to {accelerator.device}: move the model")
        yield accelerator
    finally:
        for state, before in zip(shared, aside, strict=True):
            state.clear()
            state.update(before)


def _pass(batches: Reiterable, number: int) -> Iterable[Batch]:
    return batches.at(number) if isinstance(batches, Batches) else batches


def _check_batches(batches: object, name: str) -> None:
    if isinstance(batches, Iterator):
        raise ValueError(f"{name} is a one-shot iterator ({type(batches).__name__}): pass a list or a DataLoader")
    if not isinstance(batches, Reiterable):
        raise ValueError(f"{name} is no batches: {type(batches).__name__} cannot be iterated or has no length")
    if len(batches) == 0:
        raise ValueError(f"{name}: batches that yield no data")


def _check_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"parameter {name!r} holds values that are not finite: load or build the model again")


def _count_outputs(model: nn.Module, val: Reiterable, device: torch.device) -> int:
    """Run the first validation image through the model; return the number of logits."""
    batch = next(iter(_pass(val, 0)), None)
    if batch is None:
        raise ValueError("val: batches that yield no data")
    images, labels = _unpack(batch, "val, batch 1")
    try:
        with torch.no_grad():
            logits = model(images[:1].to(device))
    except RuntimeError as error:
        shape = tuple(images.shape[1:])
        raise ValueError(f"val: the model cannot take images of shape {shape} ({images.dtype}): {error}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"fit trains classifiers: logits (batch, classes) are needed, but the model returned {given}")
    _check_labels(labels, logits.shape[1], "val, batch 1")
    return logits.shape[1]


def _unpack(batch: object, where: str) -> tuple[Tensor, Tensor]:
    is_pair = isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)
    if not is_pair:
        raise ValueError(f"{where}: a batch is two tensors (images, labels), not {type(batch).__name__}")
    images, labels = batch
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex() or len(labels) != len(images):
        given = f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise ValueError(f"{where}: {len(images)} images need as many whole class numbers as labels, not {given}")
    if len(labels) == 0:
        raise ValueError(f"{where}: batches that yield no data (0 images)")
    return images, labels


def _check_labels(labels: Tensor, outputs: int, where: str) -> None:
    for label in map(int, labels.aminmax()):
        if not 0 <= label < outputs:
            raise ValueError(f"{where}: label {label}, but the model has {outputs} outputs (labels 0 to {outputs - 1})")


def _to(device: torch.device, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return images.to(device, non_blocking=True), labels.to(device, torch.int64, non_blocking=True)
