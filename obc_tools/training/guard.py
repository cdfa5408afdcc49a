"""Stop a training at the first step that is not finite, with the model as the steps before left it."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


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
        while len(self._verdicts) > self._lag:
            self._read(self._verdicts.popleft())

    def read_all(self) -> None:
        """Read every verdict, waiting for the device if need be. Raises as :meth:`read` does."""
        while self._verdicts:
            self._read(self._verdicts.popleft())

    def _read(self, verdict: _Verdict) -> None:
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
