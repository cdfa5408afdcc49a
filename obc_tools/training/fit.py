"""Train a model by a recipe, in one process or several: one engine for naive and Equivalent Pruning."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import broadcast, gather_object, reduce
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.batches import Batch, Batches, as_batches, count_examples, to_device
from ..measure.metrics import Metrics, TaskMetrics
from ..scoring.tasks import CLASSIFICATION, Task, check_task, count_outputs, evaluate, find_task
from ..state import LentRandomness, check_module, evaluating, random_state, running, set_random_state
from ..structure.layers import kernel_dims, own_parameters
from .folder import Epoch, History, Stopped, TrainingFolder
from .processes import Processes, agreed, failing_together, processes
from .recipe import Recipe, learning_rate_factor
from .stepper import Stepper, Where, frozen, parameter_groups

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_POSTFIXES = 0.5
STEPS_BETWEEN_AGREEMENTS = 10
"""Of several processes: how often they agree on stopping and on checkpoints."""


def fit(
    model: nn.Module,
    train: Iterable[Batch],
    val: Iterable[Batch],
    recipe: Recipe,
    *,
    run: str | os.PathLike[str] | None = None,
    task: str | Task = CLASSIFICATION,
    teacher: nn.Module | None = None,
    resume: bool = False,
    regularize: Callable[[], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: bool = True,
    on_epoch: Callable[[History], None] | None = None,
) -> History:
    """Train a model in place, a classifier unless another task is given, and evaluate it after every epoch.

    Works alike on plain models and on `EquivalentModel`. Everything random is fixed by
    ``recipe.seed``, and the caller's random state is left alone. Of `Batches`, the first epoch
    uses pass 0, the second pass 1, and so on, whatever was drawn from them before: two trainings with the same batches
    see the same images in the same order. Other batches (a DataLoader, a list) are simply gone through again.

    Mixed precision covers the training's forward pass; the loss, the weights and the evaluation keep the model's own
    precision. All modules are in train mode while training; each gets its own mode back. Gradients end as None.

    Launched in several processes (accelerate launch, torchrun), each trains on its share of every batch, made by
    ``data.batches(..., share=processes().share)``, and gradients are averaged: a step sees ``batch_size`` images a
    process. A process that fails ends all, each with that error.

    Args:
        model: Maps images (batch, …) to logits (batch, classes), or does another task. Its device is where the training
            takes place.
        train: Batches of images and labels, class numbers (batch,) from 0 or shares of classes (batch, classes), or
            what the task takes: anything re-iterable with a length.
        val: Held-out batches, likewise, with class numbers.
        recipe: How to train. ``batch_size`` and the augmentation speak of the making of ``train``.
        run: A folder to keep metrics (``metrics.jsonl``, TensorBoard's files where it is installed), the log, the
            environment and checkpoints in. None: nothing is written.
        task: What the model is for, a `Task` or the name of one of `TASKS`: its training losses are minimised, its
            metrics measured.
        teacher: Taught from where ``recipe.distill_weight`` is above 0, or by a task that compares with the original,
            such as "outputs"; left unchanged.
        resume: Go on from the checkpoint in ``run``, if there is one, to the numbers of an uninterrupted training.
        regularize: Called with every step's gradients, to add to them.
        stop: Asked before every step; once it says True, a checkpoint is saved and `Stopped` raised.
        progress: Show a bar over all steps.
        on_epoch: Called after every epoch with the history so far.

    Returns:
        One row an epoch.

    Raises:
        DivergenceError: at the first step whose loss or gradient is not finite. That step and its effect on buffers are
            undone: the model stays as the steps before left it.
        Stopped: when ``stop`` said so.
        ValueError: if batches are a one-shot iterator, empty, of a wrong form or do not suit the model; for labels out
            of range; for weights that are not finite; for an ``amp`` that the device does not have; for a folder that
            holds another training or a damaged checkpoint, or that another process works on; for a task that does not
            fit the model or the recipe.
    """
    own, parameters = processes(), model.parameters() if isinstance(model, nn.Module) else ()
    device = next((parameter.device for parameter in parameters), torch.device("cpu"))
    with ExitStack() as stack:
        with agreed(device):  # before any writes, or one would find what another has just begun
            train, val = check_batches(train, "train"), check_batches(val, "val")
            _check_shares(train, own)
            check_weights(model)
            task = find_task(task)
            if not isinstance(recipe, Recipe):
                said = f"recipe: expected a Recipe, not {type(recipe).__name__}; Recipe.from_dict reads a mapping"
                raise ValueError(said)
            task, teacher = check_teacher(teacher, model, recipe, task)
            if resume and run is None:
                raise ValueError("resume=True goes on from a checkpoint: pass run=, the folder that holds it")
            folder = None if run is None else TrainingFolder(run, writes=own.is_main)
            stack.enter_context(frozen(model, recipe))
            parameter_groups(model, recipe)
            check_precision(recipe, device)
            stack.enter_context(evaluating(model, *task.beside, *filter(None, [teacher])))
            stack.enter_context(torch.accelerator.device_index(device.index))
            stack.enter_context(randomness := LentRandomness(recipe.seed + own.rank, device))
            with LentRandomness(device=device):
                classes = _check_fit(model, train.at(0), val.at(0), task, recipe, device)
            stack.enter_context(folder.held() if folder else nullcontext())
            checkpoint = folder.read(recipe, resume=resume) if folder else None
        stack.enter_context(failing_together())
        stack.enter_context(folder.kept(recipe, device, checkpoint) if folder else nullcontext())
        stack.enter_context(_channels_last(model, recipe))
        bar = stack.enter_context(tqdm(total=recipe.epochs * len(train), disable=not progress, unit="step"))
        stack.callback(model.zero_grad, set_to_none=True)
        stepper = Stepper(model, recipe, len(train), teacher, regularize, task)
        training = _Training(stepper, recipe, len(train), task, classes, device, randomness, bar, folder, stop)
        return training.run(train, val, checkpoint, on_epoch)


@dataclass
class _Epoch:
    """An epoch under way: its number from 0, steps taken, sums over its images, seconds spent before a resumption."""

    number: int = 0
    taken: int = 0
    images: int = 0
    totals: Tensor | None = None
    seconds: float = 0.0
    random: dict[str, Tensor] | None = None


@dataclass
class _Training:
    """One training: the epochs, what is kept of them, stopping and resuming."""

    stepper: Stepper
    recipe: Recipe
    steps: int
    task: Task
    classes: int | None
    device: torch.device
    randomness: LentRandomness
    bar: tqdm
    folder: TrainingFolder | None
    stop: Callable[[], bool]
    epochs: list[Epoch] = field(default_factory=list)
    several: bool = field(default_factory=lambda: processes().count > 1)
    shown: float = field(default_factory=time.monotonic)

    def run(
        self,
        train: Batches,
        val: Batches,
        checkpoint: dict[str, Any] | None,
        on_epoch: Callable[[History], None] | None,
    ) -> History:
        epoch = self._resume(checkpoint) if checkpoint else _Epoch()
        while epoch.number < self.recipe.epochs:
            start = time.perf_counter() - epoch.seconds
            self._train(epoch, train, start)
            trained = time.perf_counter()
            metrics = self._evaluate(epoch.number, val)
            self._record(epoch, metrics, trained - start, time.perf_counter() - start)
            epoch = _Epoch(epoch.number + 1)
            self._save(epoch)
            if on_epoch is not None:
                with self.randomness.given_back():
                    on_epoch(History(tuple(self.epochs)))
        self.stepper.finish()
        return History(tuple(self.epochs))

    def _train(self, epoch: _Epoch, train: Batches, start: float) -> None:
        """Train one epoch, or the rest of it."""
        self.stepper.begin_epoch()
        for batch in self._batches(epoch, train):
            if epoch.taken == self.steps:
                raise ValueError(f"train: this pass has more batches than the length {self.steps} of train says")
            self._keep_or_stop(epoch, start)
            lr = self.stepper.set_lr(epoch.number * self.steps + epoch.taken)
            where = Where(epoch.number + 1, epoch.taken + 1, self.steps, lr)
            batch = self._moved(batch, where)
            with running(self.stepper.model, batch, lambda where=where: f"train, {where}"):
                epoch.totals = epoch.totals + self.stepper.step(batch, where)
            epoch.images, epoch.taken = epoch.images + count_examples(batch), epoch.taken + 1
            self._show(where, epoch, start)
            self.randomness.let_others()
        self.stepper.settle()
        if epoch.taken < self.steps:
            number, taken = epoch.number, epoch.taken
            raise ValueError(f"train: pass {number} ended after {taken} batches; the length of train is {self.steps}")

    def _moved(self, batch: Batch, where: Where) -> Batch:
        """Return a batch on the model's device; images and labels checked."""
        if self.classes is None:
            return to_device(batch, self.device)
        images, labels = unpack(batch, f"train, {where}")
        # Reading labels off a device waits for it, so those are checked in the first pass only.
        if where.epoch == 1 or labels.device.type == "cpu":
            check_labels(labels, self.classes, f"train, {where}")
        return to_device((images, labels), self.device)

    def _batches(self, epoch: _Epoch, train: Batches) -> Iterator[Batch]:
        """Return the batches of an epoch that are still to come, with random state as it was then."""
        if epoch.totals is None:
            epoch.totals = torch.zeros(2, device=self.device)
        now = random_state(self.device)
        if epoch.random is not None:
            set_random_state(epoch.random, self.device)
        epoch.random = random_state(self.device)
        batches = iter(train.at(epoch.number, epoch.taken))
        return _continued(batches, lambda: set_random_state(now, self.device)) if epoch.taken else batches

    def _evaluate(self, number: int, val: Batches) -> Metrics | TaskMetrics:
        model = self.stepper.evaluated
        if self.several:
            for buffer in model.buffers():
                broadcast(buffer)
        try:
            metrics = evaluate(model, val.at(0), task=self.task)
        except ValueError as error:
            raise ValueError(f"val, after epoch {number + 1} of {self.recipe.epochs}: {error}") from error
        return _together(metrics) if val.parts > 1 and isinstance(metrics, Metrics) else metrics

    def _record(self, epoch: _Epoch, metrics: Metrics | TaskMetrics, trained: float, seconds: float) -> None:
        totals = torch.cat((epoch.totals.double().cpu(), torch.tensor([float(epoch.images)], dtype=torch.float64)))
        if self.several:
            totals = reduce(totals.to(self.device, torch.float32), reduction="sum").double().cpu()
        loss, correct, images = totals.tolist()
        lr = self.recipe.lr * learning_rate_factor(self.recipe, epoch.number * self.steps, self.steps)
        row, speed = (epoch.number + 1, lr, loss / images), (seconds, images / trained)
        if isinstance(metrics, Metrics):
            done = Epoch(*row, correct / images, metrics.loss, metrics.accuracy, *speed)
        else:
            done = Epoch(*row, None, metrics.values.get("loss"), None, *speed, metrics.values, metrics.directions)
        self.epochs.append(done)
        logger.info("%s", done)
        if self.folder is not None:
            self.folder.add_epoch(done)

    def _keep_or_stop(self, epoch: _Epoch, start: float) -> None:
        """Save a checkpoint if one is due; stop if that is asked for. Several processes do so at the same step."""
        if self.several and epoch.taken % STEPS_BETWEEN_AGREEMENTS:
            return
        stop, due = self.stop(), self.folder is not None and self.folder.is_due()
        if self.several:
            agreed = broadcast(torch.tensor([stop, due], dtype=torch.int64, device=self.device))
            stop, due = map(bool, agreed.tolist())
        if (stop or due) and self.folder is not None:
            self.stepper.settle()
            epoch.seconds = time.perf_counter() - start
            self._save(epoch)
        if stop:
            raise Stopped(f"stopped before step {epoch.taken + 1} of epoch {epoch.number + 1}")

    def _save(self, epoch: _Epoch) -> None:
        if self.folder is None:
            return
        own = {"now": random_state(self.device), "epoch": epoch.random}
        place = {key: getattr(epoch, key) for key in ("number", "taken", "images", "totals", "seconds")}
        kept = {"place": place, "history": [done.to_dict() for done in self.epochs], **self.stepper.state_dict()}
        self.folder.save({"random": gather_object([own]) if self.several else [own], **kept})

    def _resume(self, checkpoint: dict[str, Any]) -> _Epoch:
        states, own = checkpoint["random"], processes()
        if len(states) != own.count:
            raise ValueError(f"the training was begun in {len(states)} processes: resume it in as many")
        self.stepper.load_state_dict(checkpoint)
        self.epochs = [Epoch(**row) for row in checkpoint["history"]]
        epoch = _Epoch(**checkpoint["place"], random=states[own.rank]["epoch"])
        epoch.totals = None if epoch.totals is None else epoch.totals.to(self.device)
        set_random_state(states[own.rank]["now"], self.device)
        self.bar.update(epoch.number * self.steps + epoch.taken)
        logger.info("resuming at epoch %d, step %d", epoch.number + 1, epoch.taken + 1)
        return epoch

    def _show(self, where: Where, epoch: _Epoch, start: float) -> None:
        """Say where the training is, now and then: reading the sums waits for the device."""
        self.bar.update()
        if self.folder is not None and self.folder.is_note_due():
            loss, accuracy = (epoch.totals / epoch.images).tolist()
            memory = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
            speed = {"images_per_second": epoch.images / (time.perf_counter() - start), "gpu_memory": memory}
            self.folder.note(where, self.recipe.epochs, {"loss": loss, "accuracy": accuracy, **speed})
        if self.bar.disable or time.monotonic() - self.shown < SECONDS_BETWEEN_POSTFIXES:
            return
        loss, accuracy = (epoch.totals / epoch.images).tolist()
        shown = {"accuracy": f"{accuracy:.1%}"} if self.task is CLASSIFICATION else {}
        self.bar.set_postfix(epoch=where.epoch, loss=f"{loss:.3f}", **shown, refresh=False)
        self.shown = time.monotonic()


def _together(metrics: Metrics) -> Metrics:
    """Combine what all processes measured, each on its share of the images."""
    in_top = 0.0 if metrics.top5 is None else metrics.top5
    sums = torch.tensor([metrics.loss, metrics.accuracy, in_top, 1.0], dtype=torch.float64) * metrics.examples
    parts = gather_object([sums.tolist()])
    loss, correct, in_top, examples = (sum(column) for column in zip(*parts, strict=True))
    share = None if metrics.top5 is None else in_top / examples
    return Metrics(loss / examples, correct / examples, share, round(examples))


def _continued(batches: Iterator[Batch], begin: Callable[[], None]) -> Iterator[Batch]:
    """Fetch the first batch, then call ``begin``, then yield it and the others."""
    for number, batch in enumerate(batches):
        if number == 0:
            begin()
        yield batch


@contextmanager
def _channels_last(model: nn.Module, recipe: Recipe) -> Iterator[None]:
    """Store the kernels of 2-d convolutions channels last, if the recipe says so; bring back the usual order."""
    layers = [layer for layer in model.modules() if recipe.channels_last and kernel_dims(layer) == 2]
    kernels = [kernel for layer in layers for kernel in own_parameters(layer).values() if kernel.ndim == 4]
    try:
        for kernel in kernels:
            kernel.data = kernel.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for kernel in kernels:
            kernel.data = kernel.data.contiguous()


def _check_shares(train: Batches, own: Processes) -> None:
    """Raise ValueError unless training batches are those of one process among as many as were launched."""
    if (parts := train.parts) != own.count:
        raise ValueError(
            f"train: batches for {parts} process{'es' if parts > 1 else ''}, but {own.count} were launched; make them "
            "with data.batches(..., share=processes().share)"
        )


def check_precision(recipe: Recipe, device: torch.device) -> None:
    if recipe.amp == "fp16" and device.type == "cpu":
        raise ValueError("amp='fp16' needs a GPU; a model on the CPU trains with amp='bf16' or 'no'")


def check_teacher(
    teacher: nn.Module | None, model: nn.Module, recipe: Recipe, task: Task
) -> tuple[Task, nn.Module | None]:
    """Return the task, against the teacher where it wants one, and the teacher that is then left for distillation.

    Raises:
        ValueError: a recipe needs a teacher and has none, or has one too many; the teacher is what is trained.
    """
    if teacher is not None:
        check_module(teacher)
    if teacher is not None and {*teacher.parameters()} & {*model.parameters()}:
        raise ValueError("the teacher shares weights with the model that is trained: pass a copy")
    if task.against is not None:
        if teacher is None:
            raise ValueError(
                f"task '{task.name}' trains a model to do as the original does: pass teacher=, the original"
            )
        task, teacher = task.against(teacher), None
    if (teacher is None) == bool(recipe.distill_weight):
        raise ValueError(
            f"distill_weight is {recipe.distill_weight:g} and there is {'no' if teacher is None else 'a'} teacher: "
            "distillation needs both"
        )
    return task, teacher


def check_batches(batches: object, name: str) -> Batches:
    """Return as `Batches` what has a length and can be gone through again and again; raise ValueError for all else."""
    if isinstance(batches, Iterator):
        raise ValueError(f"{name} is a one-shot iterator ({type(batches).__name__}): pass a list or a DataLoader")
    if not isinstance(batches, Iterable) or not isinstance(batches, Sized):
        raise ValueError(f"{name} is no batches: {type(batches).__name__} cannot be iterated or has no length")
    if len(batches) == 0:
        raise ValueError(f"{name}: batches that yield no data")
    return as_batches(batches, len(batches))


def check_weights(model: nn.Module) -> None:
    check_module(model)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"parameter {name!r} holds values that are not finite: load or build the model again")


def _check_fit(
    model: nn.Module, train: Iterable[Batch], val: Iterable[Batch], task: Task, recipe: Recipe, device: torch.device
) -> int | None:
    """Run first batches through the model; return the number of classes, None for a task that is no classification."""
    if task is CLASSIFICATION:
        images, labels = unpack(_first(val, "val"), "val, batch 1")
        outputs = count_outputs(model, images.to(device), "val, batch 1")
        check_labels(labels, outputs, "val, batch 1")
        return outputs
    if recipe.label_smoothing:
        raise ValueError(f"label_smoothing={recipe.label_smoothing:g} is for classification, not for '{task.name}'")
    firsts = to_device([_first(train, "train"), _first(val, "val")], device)
    found = check_task(task, model, *firsts, distils=bool(recipe.distill_weight))
    if any(math.isnan(value) for value in found.values.values()):
        # One batch may say nothing, such as one without any box; all of them have to, before an epoch is spent on it.
        evaluate(model, val, task=task)
    return None


def _first(batches: Iterable[Batch], name: str) -> Batch:
    batch = next(iter(batches), None)
    if batch is None:
        raise ValueError(f"{name}: batches that yield no data")
    return batch


def unpack(batch: object, where: str) -> tuple[Tensor, Tensor]:
    is_pair = isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)
    if not is_pair:
        raise ValueError(f"{where}: a batch is two tensors (images, labels), not {type(batch).__name__}")
    images, labels = batch
    shares = labels.is_floating_point() and labels.ndim == 2
    numbers = labels.ndim == 1 and not labels.is_floating_point() and not labels.is_complex()
    if not (shares or numbers) or len(labels) != len(images):
        given = f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise ValueError(f"{where}: {len(images)} images need as many whole class numbers as labels, not {given}")
    if len(labels) == 0:
        raise ValueError(f"{where}: batches that yield no data (0 images)")
    if images.is_meta or labels.is_meta:
        raise ValueError(f"{where}: the device meta holds no numbers")
    return images, labels


def check_labels(labels: Tensor, outputs: int, where: str) -> None:
    if labels.is_floating_point():
        if labels.shape[1] != outputs:
            raise ValueError(f"{where}: labels share {labels.shape[1]} classes, but the model has {outputs} outputs")
        return
    for label in map(int, labels.aminmax()):
        if not 0 <= label < outputs:
            raise ValueError(f"{where}: label {label}, but the model has {outputs} outputs (labels 0 to {outputs - 1})")
