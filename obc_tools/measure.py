"""Numbers with units about a model: MACs and parameters, latency, loss and accuracy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import length_hint
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from tqdm.auto import tqdm

from .cost_prediction import CostModel, CostModelError, cost_model
from .costs import Cost, cost, example_count
from .state import call_model, evaluating, numbered

__all__ = [
    "Cost",
    "CostModel",
    "CostModelError",
    "Latencies",
    "Latency",
    "Metrics",
    "cost",
    "cost_model",
    "evaluate",
    "latencies",
    "latency",
]

TOP = 5


@dataclass(frozen=True, repr=False)
class Latency:
    """How long one forward pass took, again and again, and on what.

    Attributes:
        seconds: One duration a repeat, in the order of measuring.
        batch_size: Examples in that forward pass.
        device, dtype: Of the model's parameters.
        threads: CPU threads that torch used within an operation.
    """

    seconds: tuple[float, ...]
    batch_size: int
    device: str
    dtype: str
    threads: int

    def __post_init__(self):
        if not self.seconds or not min(self.seconds) >= 0:
            raise ValueError(f"latency: durations {self.seconds[:5]}; expected at least one, none below 0 seconds")

    @property
    def median_seconds(self) -> float:
        """The median duration."""
        return statistics.median(self.seconds)

    @property
    def median_ms(self) -> float:
        """The median duration in milliseconds."""
        return 1e3 * self.median_seconds

    @property
    def quartiles_seconds(self) -> tuple[float, float]:
        """The first and the third quartile of the durations."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third

    def __repr__(self) -> str:
        first, third = (1e3 * seconds for seconds in self.quartiles_seconds)
        threads = f", {self.threads} threads" if self.device == "cpu" else ""
        return (
            f"{self.median_ms:.4g} ms (quartiles {first:.4g} and {third:.4g} ms of {len(self.seconds)} repeats; "
            f"batch size {self.batch_size}, {self.dtype}, {self.device}{threads})"
        )

    def _repr_html_(self) -> str:
        return f"<b>{self!r}</b>"


@dataclass(frozen=True, repr=False)
class Latencies(Mapping[str, Latency]):
    """The latencies of several models that were measured in turns; a mapping by the models' names."""

    by_name: Mapping[str, Latency]

    def __getitem__(self, name: str) -> Latency:
        return self.by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_name)

    def __len__(self) -> int:
        return len(self.by_name)

    def speedup(self, name: str) -> float:
        """Return how many times faster a model is than the first one: the median of the ratios of single rounds."""
        first = next(iter(self.by_name.values()))
        return statistics.median(a / b for a, b in zip(first.seconds, self[name].seconds, strict=True))

    def to_frame(self) -> pd.DataFrame:
        """Return one row a model: median and quartiles in milliseconds, the speed-up over the first, the conditions."""
        rows = [
            {
                "model": name,
                "median (ms)": measured.median_ms,
                "first quartile (ms)": 1e3 * measured.quartiles_seconds[0],
                "third quartile (ms)": 1e3 * measured.quartiles_seconds[1],
                "speed-up": self.speedup(name),
                "repeats": len(measured.seconds),
                "batch size": measured.batch_size,
                "dtype": measured.dtype,
                "device": measured.device,
                "threads": measured.threads,
            }
            for name, measured in self.items()
        ]
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        return self.to_frame().to_string(index=False, float_format="{:.4g}".format)

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(index=False, float_format="{:.4g}".format)


def latency(
    model: nn.Module, example_inputs: Any, *, repeats: int = 30, warmup: int = 5, threads: int | None = None
) -> Latency:
    """Measure how long a forward pass of a model takes, in eval mode and without gradients.

    Args:
        model: runs where its parameters are; its train/eval mode is restored.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments; moved to the model's device.
        repeats: measured forward passes. CPU time is the wall clock's, CUDA time that between two events.
        warmup: forward passes before those, which do not count.
        threads: CPU threads for the measurement; None leaves torch's setting.

    Raises:
        ValueError: numbers of repeats, warm-ups or threads that are too small, a device other than CPU and CUDA.
    """
    return latencies({"model": model}, example_inputs, repeats=repeats, warmup=warmup, threads=threads)["model"]


def latencies(
    models: Mapping[str, nn.Module],
    example_inputs: Any,
    *,
    repeats: int = 30,
    warmup: int = 5,
    threads: int | None = None,
) -> Latencies:
    """Measure several models in turns, one forward pass of each a round, so that a busy machine slows them alike.

    Arguments and errors are those of :func:`latency`.
    """
    for name, value, least in (("models", len(models), 1), ("repeats", repeats, 1), ("warmup", warmup, 0)):
        if value < least:
            raise ValueError(f"latency: {name} is {value}; expected at least {least}")
    size = example_count(example_inputs)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        used_threads = stack.enter_context(_threads(threads))
        timers = {name: _timer(stack.enter_context(evaluating(m)), example_inputs) for name, m in models.items()}
        for number in range(warmup + repeats):
            for name, timer in timers.items():
                duration = timer()
                if number >= warmup:
                    seconds[name].append(duration)
    return Latencies(
        {
            name: Latency(tuple(seconds[name]), size, str(_device(model)), _dtype(model), used_threads)
            for name, model in models.items()
        }
    )


def _timer(model: nn.Module, example_inputs: Any) -> Callable[[], float]:
    """Return a function that runs a model once and returns the seconds that took."""
    device = _device(model)
    inputs = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, example_inputs)

    def on_cpu() -> float:
        start = time.perf_counter()
        call_model(model, inputs)
        return time.perf_counter() - start

    def on_cuda() -> float:
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            call_model(model, inputs)
            end.record()
            torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    timers = {"cpu": on_cpu, "cuda": on_cuda}
    if device.type not in timers:
        raise ValueError(f"latency: the model is on {device}; move it to one of {', '.join(timers)}")
    return timers[device.type]


@contextmanager
def _threads(number: int | None) -> Iterator[int]:
    before = torch.get_num_threads()
    if number is not None and number < 1:
        raise ValueError(f"latency: threads is {number}; expected at least 1, or None for torch's setting of {before}")
    torch.set_num_threads(number or before)
    try:
        yield number or before
    finally:
        torch.set_num_threads(before)


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _dtype(model: nn.Module) -> str:
    dtype = next((parameter.dtype for parameter in model.parameters()), torch.get_default_dtype())
    return str(dtype).removeprefix("torch.")


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

    def to_frame(self) -> pd.DataFrame:
        """Return one row; the shares in [0, 1]."""
        return pd.DataFrame([vars(self)])

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


def evaluate(model: nn.Module, batches: Iterable[Any], *, progress: bool = False) -> Metrics:
    """Evaluate a classifier on all of some batches, in eval mode and without gradients.

    Args:
        model: returns outputs (logits) of shape (examples, classes); its train/eval mode is restored.
        batches: pairs (images, labels), labels integers of shape (examples,); moved to the model's device. A one-shot
            iterator will do.
        progress: show a progress bar.

    Raises:
        ValueError: no data, a batch that is not such a pair, a label that the model has no output for, outputs that are
            not (examples, classes), a loss that is NaN or infinite. All but the first name the batch, counted from 1.
    """
    tally = _Tally()
    bar = tqdm(batches, desc="evaluate", total=length_hint(batches) or None, disable=not progress, leave=False)
    with evaluating(model), torch.no_grad():
        for number, batch in numbered(bar):
            tally += _tally(model, batch, number)
    if not tally.examples:
        raise ValueError("the batches yield no data: all of them are empty")
    share = None if tally.in_top is None else tally.in_top / tally.examples
    return Metrics(tally.loss / tally.examples, tally.correct / tally.examples, share, tally.examples)


def _tally(model: nn.Module, batch: Any, number: int) -> _Tally:
    images, labels = _pair(batch, number)
    device = _device(model)
    labels = labels.to(device)
    outputs = _outputs(model(images.to(device)), labels, number)
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
    if not pair or batch[1].dim() != 1 or batch[1].is_floating_point():
        raise ValueError(f"batch {number}: expected a pair (images, labels), labels integers of shape (examples,)")
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
