"""How long networks take: one, or several side by side, in turns; and the model that predicts any plan's latency."""

from __future__ import annotations

import logging
import statistics
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.optimize import nnls
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import check_name, check_whole
from ..files import environment, read_json, write_json
from ..state import call_model, evaluating, hooks, running
from .costs import WHOLE, Cost, CostModel, Plan, example_count

logger = logging.getLogger(__name__)

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""What tells the seconds of a forward pass on the CPU."""
RUNTIMES = ("eager", "onnxruntime", "compile")
"""What may run a network: torch as it is, ONNX Runtime (`export_onnx`), or torch.compile."""


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
        return tuple(np.quantile(self.seconds, (0.25, 0.75)).tolist())

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
        stack.enter_context(evaluating(*models.values()))
        timers = {name: timer(model, example_inputs, clock) for name, model in models.items()}
        for number in range(warmup + repeats):
            for name, once in timers.items():
                with running(models[name], example_inputs, lambda: "example inputs"):
                    duration = once()
                if number >= warmup:
                    seconds[name].append(duration)
    found = {
        name: Latency(tuple(seconds[name]), size, str(_device(model)), _dtype(model), used_threads)
        for name, model in models.items()
    }
    return Latencies(found)


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


START = ""
"""The part of a pass before its first layer."""
Times = Mapping[str, float]
"""Seconds by layer."""


def time_layers(
    model: nn.Module, example_inputs: Any, layers: Sequence[str], *, repeats: int = 7, clock: str = "wall"
) -> dict[str, float]:
    """Return the seconds from the start of each layer to that of the next, the median of some forward passes.

    Less what the marking of these starts costs: passes with and without it take turns. ``clock``: as for `latency`.
    """
    device = next(model.parameters()).device
    read, marks, found, whole = clock_of(clock, device), [], defaultdict(list), ([], [])

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return read()

    named = {name: layer for name, layer in model.named_modules() if name in layers and name != START}
    with evaluating(model), torch.no_grad():
        once = timer(model, example_inputs, clock)
        for repeat in range(repeats + 2):
            alone = once()
            marks[:] = [(START, now())]
            with hooks(
                layer.register_forward_pre_hook(lambda *_, name=name: marks.append((name, now())))
                for name, layer in named.items()
            ):
                once()
            ends = [*(at for _, at in marks[1:]), now()]
            if repeat < 2:
                continue
            whole[0].append(alone)
            whole[1].append(ends[-1] - marks[0][1])
            spent = Counter()
            for (name, start), end in zip(marks, ends, strict=True):
                spent[name] += end - start
            for name, seconds in spent.items():
                found[name].append(seconds)
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    marking = max(0.0, min(whole[1]) - min(whole[0])) / len(marks)
    starts = Counter(name for name, _ in marks)
    return {name: max(0.0, seconds - starts[name] * marking) for name, seconds in medians.items()}


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """The latency of every plan, predicted.

    ``coefficients``: layer -> seconds for each of `_Shares.of`'s columns. ``of`` gives the cost of a plan with its
    ``latency`` in milliseconds, so that it stands wherever a `CostModel` does.
    """

    costs: CostModel
    coefficients: Mapping[str, tuple[float, ...]]

    @cached_property
    def shares(self) -> _Shares:
        """What is left of each layer."""
        return _Shares(self.costs, list(self.coefficients))

    @cached_property
    def original(self) -> Cost:
        """The cost of the network itself."""
        return self.of(WHOLE)

    def of(self, plan: Plan) -> Cost:
        """Return what a plan costs; raise as `CostModel.of` does."""
        seconds = np.array([*self.coefficients.values()]) * self.shares.of(plan)
        return replace(self.costs.of(plan), latency=1e3 * float(seconds.sum()))


WIDTHS = 2
"""How many widths of a layer's largest product a latency may depend on by themselves."""


class _Shares:
    """What is left of each layer in a plan: 1, the shares of `WIDTHS` of its widths, and of its MACs or parameters."""

    def __init__(self, costs: CostModel, layers: Sequence[str]):
        self.costs, self.layers = costs, {name: index for index, name in enumerate(layers)}
        whole = costs.terms(WHOLE)
        products = {name for name, size in zip(costs.macs.owners, whole[0], strict=True) if size}
        # Of its products where a layer has any, else of its parameters.
        outside = len(layers)
        self.sides = tuple(
            np.array([self.layers.get(n, outside) if (n in products) == wanted else outside for n in owners], np.int64)
            for owners, wanted in ((costs.macs.owners, True), (costs.params.owners, False))
        )
        self.rows = self._largest(costs, whole)
        self.start = self._sums(whole)

    def of(self, plan: Plan) -> np.ndarray:
        """Return the shares, of shape (layers, 2 + WIDTHS)."""
        return self._columns(self.costs.widths_of(plan), self._sums(self.costs.terms(plan)))

    def _largest(self, costs: CostModel, whole: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """Return the dimensions of each layer's largest term; 0, the constant, where there are fewer."""
        rows, most = np.zeros((len(self.layers), WIDTHS), dtype=np.int64), np.zeros(len(self.layers) + 1)
        for side, terms, sizes in zip(self.sides, (costs.macs, costs.params), whole, strict=True):
            for layer, dims, size in zip(side, terms.rows, sizes, strict=True):
                if layer < len(self.layers) and size > most[layer]:
                    most[layer], found = size, [row for row in dict.fromkeys(dims.tolist()) if row][:WIDTHS]
                    rows[layer] = found + [0] * (WIDTHS - len(found))
        return rows

    def _columns(self, widths: np.ndarray, sums: np.ndarray) -> np.ndarray:
        shares = np.where(self.rows > 0, widths[self.rows] / self.costs.widths.whole[self.rows], 0)
        left = np.where(self.start > 0, sums / np.where(self.start > 0, self.start, 1), 0)
        return np.column_stack([np.ones(len(self.layers)), shares, left])

    def _sums(self, terms: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        count = len(self.layers)
        return sum(np.bincount(side, sizes, count + 1)[:count] for side, sizes in zip(self.sides, terms, strict=True))


def learn_latency(
    costs: CostModel, plans: Sequence[Plan], layers: Sequence[str], timed: Callable[[Plan], Times]
) -> LatencyModel:
    """Fit the times of layers in some plans; ``timed`` measures one."""
    layers = [START, *(name for name in layers if name != START)]
    shares = _Shares(costs, layers)
    left = np.stack([shares.of(plan) for plan in plans])
    times = [timed(plan) for plan in plans]
    fits = {}
    for index, name in enumerate(layers):
        seconds = np.array([found.get(name, 0.0) for found in times])
        # Relative errors count: a plan that is fast is to be as exact as one that is slow.
        weights = 1 / np.array([sum(found.values()) for found in times])
        fit, _ = nnls(left[:, index] * weights[:, None], seconds * weights)
        fits[name] = tuple(fit.tolist())
    return LatencyModel(costs, fits)


def conditions(model: nn.Module, example_inputs: Any, clock: str = "wall") -> dict[str, Any]:
    """Return what a latency depends on beside the plan: the network's shapes, batch, device, threads, versions."""
    device = next(model.parameters()).device
    here = environment(device)
    shapes = [(name, tuple(value.shape), str(value.dtype)) for name, value in model.state_dict().items()]
    return {
        "network": zlib.crc32(repr(shapes).encode()),
        "batch_size": example_count(example_inputs),
        "device": here["gpu"] or here["cpu"],
        "threads": here["threads"],
        "clock": clock,
        "platform": here["platform"],
        "torch": here["libraries"]["torch"],
    }


def kept_latency(
    path: str | Path | None, costs: CostModel, here: Mapping[str, Any], learn: Callable[[], LatencyModel]
) -> LatencyModel:
    """Return the latency model in a file, or one that is learnt and kept there; what it was measured on must be here.

    The log says where it was measured on something else, and is therefore measured anew.
    """
    kept = None if path is None or not Path(path).exists() else _read(Path(path))
    if kept is not None and kept["conditions"] == here:
        return LatencyModel(costs, {name: tuple(fit) for name, fit in kept["coefficients"].items()})
    if kept is not None:
        other = [name for name in here if kept["conditions"].get(name) != here[name]]
        told = "; ".join(f"{name} {kept['conditions'].get(name)}, here {here[name]}" for name in other)
        logger.warning("'%s' was measured on another %s (%s): measured anew", path, ", ".join(other), told)
    found = learn()
    if path is not None:
        kept = {"conditions": dict(here), "coefficients": dict(found.coefficients)}
        write_json(Path(path), kept, checked=True)
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, "conditions", "coefficients")
    except ValueError as error:
        raise ValueError(f"'{path}' holds no latencies: name another file; {error}") from error
