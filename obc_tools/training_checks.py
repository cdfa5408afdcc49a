"""What may be wrong with a model and batches, said before, or at the step where, it would go wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .batches import Batch
from .recipe import Recipe


@runtime_checkable
class Reiterable(Protocol):
    """Batches that can be gone through again and again, and know how many they are."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __len__(self) -> int: ...


def check_teacher(teacher: nn.Module | None, model: nn.Module, recipe: Recipe) -> None:
    """Raise ValueError where a recipe needs a teacher and has none, and where the teacher is what is trained."""
    if (teacher is None) == bool(recipe.distill_weight):
        raise ValueError(
            f"distill_weight is {recipe.distill_weight:g} and there is {'no' if teacher is None else 'a'} teacher: "
            "distillation needs both"
        )
    if teacher is not None and {*teacher.parameters()} & {*model.parameters()}:
        raise ValueError("the teacher shares weights with the model that is trained: pass a copy")


def check_batches(batches: object, name: str) -> None:
    if isinstance(batches, Iterator):
        raise ValueError(f"{name} is a one-shot iterator ({type(batches).__name__}): pass a list or a DataLoader")
    if not isinstance(batches, Reiterable):
        raise ValueError(f"{name} is no batches: {type(batches).__name__} cannot be iterated or has no length")
    if len(batches) == 0:
        raise ValueError(f"{name}: batches that yield no data")


def check_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"parameter {name!r} holds values that are not finite: load or build the model again")


def count_outputs(model: nn.Module, val: Iterable[Batch], device: torch.device) -> int:
    """Run the first validation image through the model; return the number of logits."""
    batch = next(iter(val), None)
    if batch is None:
        raise ValueError("val: batches that yield no data")
    images, labels = unpack(batch, "val, batch 1")
    try:
        with torch.no_grad():
            logits = model(images[:1].to(device))
    except RuntimeError as error:
        shape = tuple(images.shape[1:])
        raise ValueError(f"val: the model cannot take images of shape {shape} ({images.dtype}): {error}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"fit trains classifiers: logits (batch, classes) are needed, but the model returned {given}")
    check_labels(labels, logits.shape[1], "val, batch 1")
    return logits.shape[1]


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
    return images, labels


def check_labels(labels: Tensor, outputs: int, where: str) -> None:
    if labels.is_floating_point():
        if labels.shape[1] != outputs:
            raise ValueError(f"{where}: labels share {labels.shape[1]} classes, but the model has {outputs} outputs")
        return
    for label in map(int, labels.aminmax()):
        if not 0 <= label < outputs:
            raise ValueError(f"{where}: label {label}, but the model has {outputs} outputs (labels 0 to {outputs - 1})")
