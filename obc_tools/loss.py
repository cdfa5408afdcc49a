"""The objective of training: cross entropy of labels or class shares, and distillation from a teacher."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .recipe import Recipe


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
