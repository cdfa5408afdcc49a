"""Average precision of detected boxes, as COCO counts it (Lin et al. 2014), on the device of the boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from torchvision.ops import box_iou

THRESHOLDS = torch.arange(0.5, 1.0, 0.05, dtype=torch.float64)
RECALLS = torch.linspace(0, 1, 101, dtype=torch.float64)
MOST_BOXES = 100


class AveragePrecision(Metric):
    """Mean average precision over classes, at overlaps of 0.5 and averaged over 0.5, 0.55, …, 0.95.

    In each image and class, boxes in the order of their scores, at most 100 an image, take the free target they overlap
    most, by at least the threshold. Precision is made to fall with recall and averaged over 101 recalls. A class
    without any target does not count; an image without any box does.
    """

    def __init__(self):
        super().__init__()
        for name in ("scores", "labels", "hits", "wanted"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, found: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Tensor]]) -> None:
        """Add images: boxes (n, 4) as left, top, right, bottom, labels (n,), and of those found scores (n,)."""
        if len(found) != len(targets):
            raise ValueError(f"boxes of {len(found)} images for targets of {len(targets)}")
        for own, target in zip(found, targets, strict=True):
            order = own["scores"].argsort(descending=True, stable=True)[:MOST_BOXES]
            boxes, labels = own["boxes"][order].double(), own["labels"][order]
            self.scores.append(own["scores"][order].double())
            self.labels.append(labels.long())
            self.hits.append(_hits(boxes, labels, target["boxes"].double().reshape(-1, 4), target["labels"]))
            self.wanted.append(target["labels"].long())

    def compute(self) -> dict[str, float]:
        """Return {"map50": …, "map": …}, shares in [0, 1]; NaN where there was no target at all."""
        scores, labels, hits, wanted = (dim_zero_cat(getattr(self, n)) for n in ("scores", "labels", "hits", "wanted"))
        classes = wanted.unique()
        curves = [_precision(scores[labels == c], hits[labels == c], int((wanted == c).sum())) for c in classes]
        mean = torch.stack(curves).mean(0) if curves else torch.full((len(THRESHOLDS),), torch.nan)
        return {"map50": mean[0].item(), "map": mean.mean().item()}


def _hits(boxes: Tensor, labels: Tensor, targets: Tensor, wanted: Tensor) -> Tensor:
    """Say which boxes of an image, in order, take a target at each threshold: bool (boxes, thresholds)."""
    thresholds = THRESHOLDS.to(boxes.device)
    hits = torch.zeros(len(boxes), len(thresholds), dtype=torch.bool, device=boxes.device)
    if not len(targets) or not len(boxes):
        return hits
    overlaps = box_iou(boxes, targets) * (labels[:, None] == wanted)
    free = torch.ones(len(thresholds), len(targets), dtype=torch.bool, device=boxes.device)
    rows = torch.arange(len(thresholds), device=boxes.device)
    for number, overlap in enumerate(overlaps):
        best, target = (overlap * free).max(1)
        # 0.5 to 0.95 in floating point: a rounding below the threshold is on it.
        hits[number] = best >= thresholds - 1e-10
        free[rows, target] &= ~hits[number]
    return hits


def _precision(scores: Tensor, hits: Tensor, targets: int) -> Tensor:
    """Return the average precision of a class at each threshold, (thresholds,)."""
    hits = hits[scores.argsort(descending=True, stable=True)].double()
    right = hits.cumsum(0)
    recall = right / targets
    precision = right / torch.arange(1, len(hits) + 1, device=hits.device)[:, None]
    falling = precision.flip(0).cummax(0).values.flip(0) if len(hits) else precision
    # One more row: recalls that were never reached have precision 0.
    falling = torch.cat([falling, falling.new_zeros(1, hits.shape[1])])
    places = torch.searchsorted(recall.T.contiguous(), RECALLS.to(hits.device).expand(hits.shape[1], -1).contiguous())
    return falling.T.gather(1, places).mean(1)
