"""How good a network is on batches: what is measured, in one pass, task by task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

TOP = 5
SIGNS = {"higher": "↑", "lower": "↓"}
"""Which way of a metric is better."""


@dataclass(frozen=True, repr=False)
class Metrics:
    """How well a classifier does.

    Attributes:
        loss: Mean cross entropy over the examples, in nats.
        accuracy: Share of examples whose label has the largest output, in [0, 1].
        top5: Share of examples whose label is among the five largest outputs; None for fewer than 6 classes.
        examples: How many there were.
    """

    loss: float
    accuracy: float
    top5: float | None
    examples: int

    def __post_init__(self):
        if self.examples < 1:
            raise ValueError(f"metrics of {self.examples} examples; expected at least 1")
        if not all(0 <= share <= 1 for share in (self.accuracy, self.top5 or 0.0)):
            raise ValueError(f"accuracy {self.accuracy}, top-5 {self.top5}: expected shares in [0, 1]")

    def __repr__(self) -> str:
        top5 = "" if self.top5 is None else f"top-5 {self.top5:.2%}, "
        return f"accuracy {self.accuracy:.2%}, {top5}loss {self.loss:.4f} ({self.examples:,} examples)"

    @property
    def values(self) -> dict[str, float | None]:
        """The metrics by name."""
        return {"accuracy": self.accuracy, "top5": self.top5, "loss": self.loss}

    def to_frame(self) -> pd.DataFrame:
        """Return one row; the shares in [0, 1]."""
        return pd.DataFrame([vars(self)])

    def _repr_html_(self) -> str:
        return f"<b>{self!r}</b>"


@dataclass(frozen=True, repr=False)
class TaskMetrics:
    """How well a network does its task.

    Attributes:
        task: The task's name.
        values: Metric -> value, the headline first.
        directions: Metric -> "higher" or "lower", whichever is better.
    """

    task: str
    values: Mapping[str, float]
    directions: Mapping[str, str]

    def __post_init__(self):
        headline = next(iter(self.directions))
        if strange := [name for name in self.values if name not in self.directions]:
            known = ", ".join(self.directions)
            raise ValueError(f"task '{self.task}' measured {strange[0]!r}, which has no direction; known are {known}")
        if self.values.get(headline) is None:
            raise ValueError(f"the metrics of task '{self.task}' returned no {headline!r}, its headline")
        ordered = [name for name in self.directions if self.values.get(name) is not None]
        object.__setattr__(self, "directions", dict(self.directions))
        object.__setattr__(self, "values", {name: float(self.values[name]) for name in ordered})

    def describe(self) -> str:
        """Name the metrics and say which way is better."""
        return ", ".join(f"{name.replace('_', ' ')} ({self.directions[name]} is better)" for name in self.values)

    def __repr__(self) -> str:
        shown = (f"{name} {value:.4g} {SIGNS[self.directions[name]]}" for name, value in self.values.items())
        return f"{self.task}: {', '.join(shown)}"

    def to_frame(self) -> pd.DataFrame:
        """Return one row, a column a metric."""
        return pd.DataFrame([dict(self.values)])

    def _repr_html_(self) -> str:
        return f"<b>{self!r}</b>"


@dataclass(frozen=True)
class _Tally:
    """What the batches add up to: counts of examples, and the sum of their losses."""

    loss: float = 0.0
    correct: int = 0
    in_top: int | None = None
    examples: int = 0

    def __add__(self, other: _Tally) -> _Tally:
        in_top = None if other.in_top is None else (self.in_top or 0) + other.in_top
        return _Tally(self.loss + other.loss, self.correct + other.correct, in_top, self.examples + other.examples)


def classification_metrics(model: nn.Module, batches: Iterable[Any]) -> Metrics:
    """Measure loss and accuracies of a classifier on batches (images, labels), labels integers of shape (examples,).

    Raises:
        ValueError: no examples, a batch that is not such a pair, a label that the model has no output for, outputs that
            are not (examples, classes), a loss that is NaN or infinite. All but the first name the batch, from 1.
    """
    tally = _Tally()
    for number, batch in enumerate(batches, start=1):
        tally += _tally(model, batch, number)
    if not tally.examples:
        raise ValueError("the batches yield no data: all of them are empty")
    share = None if tally.in_top is None else tally.in_top / tally.examples
    return Metrics(tally.loss / tally.examples, tally.correct / tally.examples, share, tally.examples)


def _tally(model: nn.Module, batch: Any, number: int) -> _Tally:
    images, labels = _pair(batch, number)
    outputs = _outputs(model(images), labels, number)
    losses = F.cross_entropy(outputs, labels, reduction="none")
    bad = int((~losses.isfinite()).sum())
    if bad:
        raise ValueError(
            f"batch {number}: the loss of {bad} of {len(labels)} examples is not finite; look for NaN or infinity in "
            "the model's weights, its running statistics or the images"
        )
    ranks = _ranks(outputs, labels)
    in_top = int((ranks < TOP).sum()) if outputs.shape[1] > TOP else None
    return _Tally(losses.cpu().double().sum().item(), int((ranks == 0).sum()), in_top, len(labels))


def _ranks(outputs: Tensor, labels: Tensor) -> Tensor:
    """Count the outputs ahead of each label's, shape (examples,); of equal ones the first is ahead, as in argmax."""
    own = outputs.gather(1, labels[:, None])
    earlier = torch.arange(outputs.shape[1], device=outputs.device) < labels[:, None]
    return ((outputs > own) | ((outputs == own) & earlier)).sum(1)


def _pair(batch: Any, number: int) -> tuple[Tensor, Tensor]:
    pair = isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)
    if not pair or batch[1].dim() != 1 or batch[1].is_floating_point() or batch[1].dtype is torch.bool:
        raise ValueError(
            f"batch {number}: expected a pair (images, labels), labels integers of shape (examples,), or another task="
        )
    return batch[0], batch[1].long()


def _outputs(outputs: Any, labels: Tensor, number: int) -> Tensor:
    """Return the outputs in float32 or better; raise ValueError where they are no logits for the labels."""
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or len(outputs) != len(labels):
        got = f"of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"of type {type(outputs).__name__}"
        raise ValueError(f"batch {number}: outputs {got} for {len(labels)} labels; expected (examples, classes)")
    low, high = (int(label) for label in labels.aminmax()) if labels.numel() else (0, 0)
    classes = outputs.shape[1]
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise ValueError(f"batch {number}: label {wrong} for a model with {classes} outputs (0 to {classes - 1})")
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))
