"""What is measured for tasks that are no classification: overlaps, perplexity, retrieval, closeness to an original.

Each takes ``predict(model, batch)``, which says how a batch is put through, the model and batches on its device, and
returns metric -> value. Sums are torchmetrics': they stay on the device and, in several processes, are added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.batches import inputs_and_targets

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
    low, high = (int(end) for end in targets.masked_fill(targets == IGNORED, 0).aminmax())
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise ValueError(f"{what} {wrong} for a model with {classes} outputs (0 to {classes - 1})")
    return targets


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
