"""How long every plan for a network would take on this machine: each layer timed in place, in a few pruned copies.

A layer's time lasts from its start to that of the next layer, so that what runs between layers counts and the times
add up to the whole pass. It is a + Σ b s + c t, with a, b, c ≥ 0 by least squares: s are the shares that are left of
the widths of its largest product, or of its largest parameter where it has no product (what reads or writes activations
shrinks with one width), t is the share left of all its MACs or parameters (what multiplies shrinks with both).
"""

from __future__ import annotations

import json
import logging
import statistics
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import nn

from ..files import environment, read_json, write_json
from ..state import evaluating, hooks
from .costs import Cost, CostModel, Plan, example_count
from .latency import clock_of, timer

logger = logging.getLogger(__name__)
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
            for name, seconds in _by_name(marks, ends).items():
                found[name].append(seconds)
    spent = {name: statistics.median(seconds) for name, seconds in found.items()}
    marking = max(0.0, min(whole[1]) - min(whole[0])) / len(marks)
    starts = Counter(name for name, _ in marks)
    return {name: max(0.0, seconds - starts[name] * marking) for name, seconds in spent.items()}


def _by_name(marks: Sequence[tuple[str, float]], ends: Sequence[float]) -> dict[str, float]:
    spent: dict[str, float] = defaultdict(float)
    for (name, start), end in zip(marks, ends, strict=True):
        spent[name] += end - start
    return spent


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

    @property
    def original(self) -> Cost:
        """The cost of the network itself."""
        return replace(self.costs.original, latency=self._milliseconds(self.shares.whole))

    def of(self, plan: Plan) -> Cost:
        """Return what a plan costs; raise as `CostModel.of` does."""
        return replace(self.costs.of(plan), latency=self._milliseconds(self.shares.of(plan)))

    def _milliseconds(self, shares: np.ndarray) -> float:
        return 1e3 * float((np.array([*self.coefficients.values()]) * shares).sum())


WIDTHS = 2
"""How many widths of a layer's largest product a latency may depend on by themselves."""


class _Shares:
    """What is left of each layer in a plan: 1, the shares of `WIDTHS` of its widths, and of its MACs or parameters."""

    def __init__(self, costs: CostModel, layers: Sequence[str]):
        self.costs, self.layers = costs, {name: index for index, name in enumerate(layers)}
        products = {name for name, size in zip(costs.macs.owners, costs.original_terms[0], strict=True) if size}
        # Of its products where a layer has any, else of its parameters.
        outside = len(layers)
        self.sides = tuple(
            np.array([self.layers.get(n, outside) if (n in products) == wanted else outside for n in owners], np.int64)
            for owners, wanted in ((costs.macs.owners, True), (costs.params.owners, False))
        )
        self.rows = self._largest(costs)
        self.start = self._sums(costs.original_terms)
        self.whole = self._columns(costs.widths.whole, self.start)

    def of(self, plan: Plan) -> np.ndarray:
        """Return the shares, of shape (layers, 2 + WIDTHS)."""
        return self._columns(self.costs.widths_of(plan), self._sums(self.costs.terms(plan)))

    def _largest(self, costs: CostModel) -> np.ndarray:
        """Return the dimensions of each layer's largest term; 0, the constant, where there are fewer."""
        rows, most = np.zeros((len(self.layers), WIDTHS), dtype=np.int64), np.zeros(len(self.layers) + 1)
        for side, terms, sizes in zip(self.sides, (costs.macs, costs.params), costs.original_terms, strict=True):
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
        write_json(Path(path), {"conditions": dict(here), "coefficients": dict(found.coefficients)})
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        kept = read_json(path)
        if kept.keys() == {"conditions", "coefficients"}:
            return kept
    except (json.JSONDecodeError, AttributeError, UnicodeDecodeError):
        pass
    raise ValueError(f"'{path}' holds no latencies: name another file")
