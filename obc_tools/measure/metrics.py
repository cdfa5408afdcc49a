"""How good a network is on batches: what is measured, in one pass, task by task.

What is no classification (overlaps, perplexity, retrieval, closeness to an original) takes ``predict(model, batch)``,
which says how a batch is put through, the model and batches on its device, and returns metric -> value. Sums are
torchmetrics': they stay on the device and, in several processes, are added up.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.batches import inputs_and_targets

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
        return f"<b>{html.escape(repr(self))}</b>"


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
        return f"<b>{html.escape(repr(self))}</b>"


def classification_metrics(model: nn.Module, batches: Iterable[Any]) -> Metrics:
    """Measure loss and accuracies of a classifier on batches (images, labels), labels integers of shape (examples,).

    Raises:
        ValueError: no examples, a batch that is not such a pair, a label that the model has no output for, outputs that
            are not (examples, classes), a loss that is NaN or infinite. All but the first name the batch, from 1.
    """
    tallies = [_tally(model, batch, number) for number, batch in enumerate(batches, start=1)]
    examples, loss, correct, in_top = map(sum, zip(*tallies, strict=True)) if tallies else (0, 0.0, 0, 0)
    if not examples:
        raise ValueError("the batches yield no data: all of them are empty")
    return Metrics(loss / examples, correct / examples, None if math.isnan(in_top) else in_top / examples, examples)


def _tally(model: nn.Module, batch: Any, number: int) -> tuple[int, float, int, float]:
    """Return the examples of a batch, their summed loss, how many are right, and in the top (NaN: too few classes)."""
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
    in_top = int((ranks < TOP).sum()) if outputs.shape[1] > TOP else math.nan
    return len(labels), losses.cpu().double().sum().item(), int((ranks == 0).sum()), in_top


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
    check_range(labels, outputs.shape[1], f"batch {number}: label")
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


Predict = Callable[[nn.Module, Any], Any]
IGNORED = -100
"""A target that does not count, as torch's losses have it; 255 in masks means the same."""
MOST_BYTE_TOKENS = 512


def mask_targets(batch: Any, logits: Tensor) -> Tensor:
    """Return the class of every pixel, int64 (examples, height, width); raise ValueError where they do not fit logits.

    Logits are (examples, classes, height, width). Pixels of 255 or -100 do not count. Targets are masks, or a list of
    mappings that hold one as "mask".
    """
    _, masks = inputs_and_targets(batch)
    if isinstance(masks, list) and all(isinstance(target, Mapping) and "mask" in target for target in masks):
        masks = torch.stack([target["mask"] for target in masks])
    if not isinstance(masks, Tensor) or masks.is_floating_point() or masks.ndim != 3 or logits.ndim != 4:
        got = f"{masks.dtype} {tuple(masks.shape)}" if isinstance(masks, Tensor) else type(masks).__name__
        raise ValueError(
            f"targets {got} for outputs {tuple(logits.shape)}; expected whole numbers (examples, height, width) for "
            "(examples, classes, height, width)"
        )
    masks = masks.long()
    return _in_range(masks.masked_fill(masks == 255, IGNORED), logits.shape[1], "class")


def box_targets(batch: Any) -> list[Mapping[str, Tensor]]:
    """Return the boxes of each image, {"boxes": (boxes, 4), "labels": (boxes,)}; raise ValueError where there are none.

    An image without any box has boxes (0, 4).
    """
    _, targets = inputs_and_targets(batch)
    entries = targets if isinstance(targets, list | tuple) else [targets]
    for entry in entries:
        parts = [entry.get(name) for name in ("boxes", "labels")] if isinstance(entry, Mapping) else [None]
        if not all(isinstance(part, Tensor) for part in parts) or len(parts[0]) != len(parts[1]):
            raise ValueError(
                f"targets of type {type(targets).__name__}; expected a list of {{'boxes', 'labels'}}, equally many, "
                "one such mapping an image"
            )
    return entries


def token_targets(batch: Any, logits: Tensor, *, shift: bool = True) -> Tensor:
    """Return what each position is to predict, int64 (examples, tokens), `IGNORED` for padding and for the last one.

    From "labels", or else from the tokens themselves where "attention_mask" is not 0.

    Args:
        shift: a position predicts the next token; False: itself (masked language models).
    """
    inputs, targets = inputs_and_targets(batch)
    tokens = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    targets = tokens if targets is None else targets
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.shape != logits.shape[:2]:
        got = f"{targets.dtype} {tuple(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(f"tokens {got} for outputs {tuple(logits.shape)}; expected whole numbers (examples, tokens)")
    targets = targets.long()
    if isinstance(inputs, Mapping) and inputs.get("attention_mask") is not None:
        targets = targets.masked_fill(inputs["attention_mask"] == 0, IGNORED)
    return _in_range(F.pad(targets[:, 1:], (0, 1), value=IGNORED) if shift else targets, logits.shape[-1], "token")


def _in_range(targets: Tensor, classes: int, what: str) -> Tensor:
    check_range(targets.masked_fill(targets == IGNORED, 0), classes, what)
    return targets


def check_range(targets: Tensor, classes: int, what: str) -> None:
    """Raise ValueError unless targets are numbers of a model's outputs."""
    low, high = map(int, targets.aminmax()) if targets.numel() else (0, 0)
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise ValueError(f"{what} {wrong} for a model with {classes} outputs (0 to {classes - 1})")


def segmentation_metrics(predict: Predict, model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
    """Return the mean over classes of intersection over union, the share of right pixels, and the mean loss (nats)."""
    from torchmetrics import MeanMetric, MetricCollection
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

    scores = losses = None
    for batch in batches:
        logits = predict(model, batch)
        masks = mask_targets(batch, logits)
        if scores is None:
            classes, options = logits.shape[1], {"ignore_index": IGNORED, "validate_args": False}
            overlap = MulticlassJaccardIndex(classes, **options)
            right = MulticlassAccuracy(classes, average="micro", **options)
            scores = MetricCollection({"mean_iou": overlap, "pixel_accuracy": right}, compute_groups=False)
            scores, losses = scores.to(logits.device), MeanMetric().to(logits.device)
        scores.update(logits.argmax(1), masks)
        losses.update(F.cross_entropy(logits.float(), masks, ignore_index=IGNORED), (masks != IGNORED).sum())
    return {} if scores is None else {**scores.compute(), "loss": losses.compute()}


def language_metrics(
    predict: Predict, model: nn.Module, batches: Iterable[Any], *, shift: bool = True
) -> dict[str, float]:
    """Return perplexity, bits a byte and mean loss (nats), a token that counts for one.

    A batch's "bytes" says how many bytes each example has; without it, a token of a small vocabulary is a byte, and
    there are no bits a byte for a large one.
    """
    from torchmetrics import SumMetric

    sums = None
    for batch in batches:
        logits = predict(model, batch)
        targets = token_targets(batch, logits, shift=shift)
        sums = [SumMetric().set_dtype(torch.float64).to(logits.device) for _ in range(3)] if sums is None else sums
        counted = (targets != IGNORED).sum()
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        known = batch["bytes"].sum() if isinstance(batch, Mapping) and "bytes" in batch else None
        size = known if known is not None else counted if logits.shape[-1] <= MOST_BYTE_TOKENS else 0 * counted
        for total, value in zip(sums, (loss.double(), counted.double(), size.double()), strict=True):
            total.update(value)
    loss, tokens, size = (total.compute().item() for total in sums) if sums else (0.0, 0.0, 0.0)
    if not tokens:
        return {}
    mean = loss / tokens
    found = {"perplexity": math.exp(min(mean, 700.0)), "loss": mean}
    return found | ({"bits_a_byte": loss / size / math.log(2)} if size else {})


def detection_metrics(
    predict: Predict, wanted: Callable[[Any], Any], model: nn.Module, batches: Iterable[Any]
) -> dict[str, float]:
    """Return mean average precision at overlaps of 0.5, and over 0.5 to 0.95 (see `detections.AveragePrecision`)."""
    from .detections import AveragePrecision

    precision = AveragePrecision()
    for batch in batches:
        found = predict(model, batch)
        if not isinstance(found, list) or not all({"boxes", "scores", "labels"} <= {*entry} for entry in found):
            raise ValueError(
                "outputs are no detections: expected a list of {'boxes', 'scores', 'labels'}, one an image"
            )
        precision.update(found, wanted(batch))
    return precision.compute()


def retrieval_metrics(predict: Predict, model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
    """Return how well images and texts find each other among all distinct texts of the batches.

    ``predict`` returns features of images and of texts, (examples, width) both, and the texts' tokens.
    zero_shot_accuracy: share of images closest to their own text; recall_at_1: of texts whose closest image has it.
    """
    parts = [predict(model, batch) for batch in batches]
    if not parts:
        return {}
    images, texts, tokens = (torch.cat(column) for column in zip(*(part[:3] for part in parts), strict=True))
    distinct, own = tokens.unique(dim=0, return_inverse=True)
    first = torch.full((len(distinct),), len(own), device=own.device)
    first = first.scatter_reduce(0, own, torch.arange(len(own), device=own.device), "amin")
    closeness = F.normalize(images.double(), dim=1) @ F.normalize(texts[first].double(), dim=1).T
    right = (closeness.argmax(1) == own).double().mean()
    back = (own[closeness.argmax(0)] == torch.arange(len(distinct), device=own.device)).double().mean()
    return {"zero_shot_accuracy": right.item(), "recall_at_1": back.item()}


def closeness_metrics(
    pairs: Callable[[nn.Module, Any], Iterable[tuple[Tensor, Tensor]]], model: nn.Module, batches: Iterable[Any]
) -> dict[str, float]:
    """Return the mean cosine of examples' outputs with the original's, and the relative error of all of them.

    ``pairs`` returns outputs of both networks, (examples, …) each. relative_error is √(Σ|f - g|² / Σ|g|²).
    """
    from torchmetrics import MeanMetric, SumMetric

    cosine, error, size = MeanMetric(), SumMetric(), SumMetric()
    for batch in batches:
        for own, original in pairs(model, batch):
            first, second = own.flatten(1).double(), original.flatten(1).double()
            for metric in (cosine, error, size):
                metric.set_dtype(torch.float64).to(own.device)
            cosine.update(F.cosine_similarity(first, second, dim=1))
            error.update((first - second).square().sum())
            size.update(second.square().sum())
    return {"cosine": cosine.compute().item(), "relative_error": (error.compute() / size.compute()).sqrt().item()}
