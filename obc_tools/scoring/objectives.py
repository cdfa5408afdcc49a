"""What is differentiated: objectives, and the checks of what they return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import check_name
from ..measure.metrics import check_range
from ..state import logits_of, running, shapes

Objective = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> the losses of the batch's examples, shape (examples,), or one scalar."""
AMP = ("no", "bf16")
"""Precisions of what is scored: the model's own, or bfloat16 where torch.autocast has it."""


def in_precision(objective: Objective, amp: str) -> Objective:
    """Return an objective that runs in a precision of `AMP`, on the device of the model's parameters."""
    check_name("amp", amp, AMP)
    if amp == "no":
        return objective

    def autocast(model: nn.Module, batch: Any) -> Tensor:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        with torch.autocast(device.type, torch.bfloat16):
            return objective(model, batch)

    return autocast


def classification(model: nn.Module, batch: Any) -> Tensor:
    """Return the cross entropy of each example of a batch (images, labels), shape (examples,). Soft labels work too.

    Raises:
        ValueError: a batch that is no such pair, labels outside the model's outputs.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        raise ValueError(f"a batch is two tensors (images, labels), not {shapes(batch)}")
    images, labels = batch
    outputs = logits_of(model(images))
    if len(labels) != len(outputs) or labels.dim() != 1 + labels.is_floating_point() or labels.dtype is torch.bool:
        raise ValueError(
            f"labels {shapes(labels)} for outputs {shapes(outputs)}: expected a class number an example (whole), "
            "or shares of the classes (examples, classes)"
        )
    if not labels.is_floating_point():
        check_range(labels, outputs.shape[-1], "label")
        labels = labels.long()
    return F.cross_entropy(outputs, labels, reduction="none")


def sampled_classification(seed: int) -> Objective:
    """Return `classification` with labels drawn from the model's own outputs, softmax(model(images)), by a seed.

    Squared gradients under such labels estimate the Fisher information matrix itself, not the empirical one (Martens
    2020, section 5). Each call draws on.
    """
    generator = torch.Generator().manual_seed(seed)

    def objective(model: nn.Module, batch: Any) -> Tensor:
        outputs = model(batch[0])
        probabilities = outputs.detach().double().softmax(-1).cpu()
        labels = torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
        return F.cross_entropy(outputs, labels.to(outputs.device), reduction="none")

    return objective


def batch_loss(model: nn.Module, batch: Any, objective: Objective, number: int) -> Tensor:
    """Return the mean loss of one batch; raise ValueError naming the batch when it is not a finite scalar with grad."""
    return checked_losses(model, batch, objective, number).mean()


def checked_losses(model: nn.Module, batch: Any, objective: Objective, number: int) -> Tensor:
    """Call the objective; return its losses, a scalar or one an example, at least float32.

    Raises:
        ValueError: what the objective does not work on, neither a scalar nor one number an example, not finite, or
            without grad; names the batch.
    """
    with running(model, batch, lambda: f"batch {number}"):
        losses = objective(model, batch)
    check_losses(losses, f"batch {number}")
    if losses.grad_fn is None:
        raise ValueError(f"batch {number}: the loss does not depend on the model's parameters through autograd")
    return losses.to(torch.promote_types(losses.dtype, torch.float32))


def check_losses(losses: Any, where: str) -> None:
    """Raise ValueError unless losses are a finite scalar or one finite number an example."""
    if not isinstance(losses, Tensor) or losses.dim() > 1 or losses.numel() == 0 or not losses.is_floating_point():
        got = f"{tuple(losses.shape)} {losses.dtype}" if isinstance(losses, Tensor) else type(losses).__name__
        got = "no loss of any example" if isinstance(losses, Tensor) and losses.numel() == 0 else got
        raise ValueError(f"{where}: the objective returned {got}; expected a scalar or one loss an example")
    if not torch.isfinite(losses).all():
        wrong = losses.detach()[~torch.isfinite(losses)].flatten()[0].item()
        raise ValueError(f"{where}: the loss is {wrong}; look for NaN in the weights or the inputs")
