"""How long networks take: latencies of one network, or of several side by side, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import check_name, check_whole
from ..state import call_model, evaluating, running
from .costs import example_count

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""What tells the seconds of a forward pass on the CPU."""


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
    model: nn.Module,
    example_inputs: Any,
    *,
    repeats: int = 30,
    warmup: int = 5,
    threads: int | None = None,
    clock: str = "wall",
) -> Latency:
    """Measure how long a forward pass of a model takes, in eval mode and without gradients.

    Args:
        model: runs where its parameters are; its train/eval mode is restored.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments; moved to the model's device.
        repeats: measured forward passes. CUDA time is that between two events.
        warmup: forward passes before those, which do not count.
        threads: CPU threads for the measurement; None leaves torch's setting.
        clock: of the CPU: "wall", or "cpu", the seconds that this process had a processor: what other work on the
            machine takes does not count. For one thread, where the two are alike on a quiet machine.

    Raises:
        ValueError: numbers of repeats, warm-ups or threads that are too small, a device other than CPU and CUDA, the
            processor's clock for several threads or for another device.
    """
    how = {"repeats": repeats, "warmup": warmup, "threads": threads, "clock": clock}
    return latencies({"model": model}, example_inputs, **how)["model"]


def latencies(
    models: Mapping[str, nn.Module],
    example_inputs: Any,
    *,
    repeats: int = 30,
    warmup: int = 5,
    threads: int | None = None,
    clock: str = "wall",
) -> Latencies:
    """Measure several models in turns, one forward pass of each a round, so that a busy machine slows them alike.

    Arguments and errors are those of :func:`latency`.
    """
    for name, value, least in (("models", len(models), 1), ("repeats", repeats, 1), ("warmup", warmup, 0)):
        check_whole(f"latency: {name}", value, least)
    size = example_count(example_inputs)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        used_threads = stack.enter_context(using_threads(threads))
        timers = {name: timer(stack.enter_context(evaluating(m)), example_inputs, clock) for name, m in models.items()}
        for number in range(warmup + repeats):
            for name, once in timers.items():
                with running(models[name], example_inputs, lambda: "example inputs"):
                    duration = once()
                if number >= warmup:
                    seconds[name].append(duration)
    return Latencies(
        {
            name: Latency(tuple(seconds[name]), size, str(_device(model)), _dtype(model), used_threads)
            for name, model in models.items()
        }
    )


def clock_of(clock: str, device: torch.device) -> Callable[[], float]:
    """Return what reads a clock, in seconds; raise ValueError where it says nothing of a forward pass there."""
    check_name("clock", clock, CLOCKS)
    if clock == "cpu" and (device.type != "cpu" or torch.get_num_threads() > 1):
        here = f"{torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
        raise ValueError(
            f"clock='cpu' is for one thread of the CPU, not for {here}: torch.set_num_threads(1), or 'wall'"
        )
    return CLOCKS[clock]


def timer(model: nn.Module, example_inputs: Any, clock: str = "wall") -> Callable[[], float]:
    """Return a function that runs a model once and returns the seconds that took."""
    device = _device(model)
    inputs = tree_map(lambda leaf: leaf.to(device, copy=True) if isinstance(leaf, Tensor) else leaf, example_inputs)
    now = clock_of(clock, device)

    def on_cpu() -> float:
        start = now()
        call_model(model, inputs)
        return now() - start

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
def using_threads(number: int | None) -> Iterator[int]:
    """Let torch use so many threads, None as many as now; yield how many."""
    before = torch.get_num_threads()
    if number is not None:
        check_whole("latency: threads", number, 1, f", or None for torch's setting of {before}")
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
