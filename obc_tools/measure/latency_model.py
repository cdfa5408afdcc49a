"""How long every plan for a network would take on this machine: each layer timed in place, in a few pruned copies.

A layer's time lasts from its start to that of the next layer, so that what runs between layers counts and the times
add up to the whole pass. It is a + b √s + c s of the share s that is left of a layer's MACs, or of its parameters where
it has no MACs, with a, b, c ≥ 0 by least squares: what does not shrink, what shrinks with one width and with two.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
import zlib
from collections import defaultdict
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
from ..state import call_model, evaluating, hooks, own_inputs
from .costs import Cost, CostModel, Plan, example_count

logger = logging.getLogger(__name__)
START = ""
"""The part of a pass before its first layer."""
Times = Mapping[str, float]
"""Seconds by layer."""


def time_layers(model: nn.Module, example_inputs: Any, layers: Sequence[str], *, repeats: int = 7) -> dict[str, float]:
    """Return the seconds from the start of each layer to that of the next, the median of some forward passes."""
    device = next(model.parameters()).device
    marks: list[tuple[str, float]] = []

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    found, inputs = defaultdict(list), own_inputs(example_inputs)
    named = dict(model.named_modules())
    handles = (
        named[name].register_forward_pre_hook(lambda *_, name=name: marks.append((name, now())))
        for name in layers
        if name in named and name != START
    )
    with evaluating(model), torch.no_grad(), hooks(handles):
        for repeat in range(repeats + 2):
            marks[:] = [(START, now())]
            call_model(model, inputs)
            ends = [*(at for _, at in marks[1:]), now()]
            spent: dict[str, float] = defaultdict(float)
            for (name, start), end in zip(marks, ends, strict=True):
                spent[name] += end - start
            for name, seconds in spent.items() if repeat >= 2 else ():
                found[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """The latency of every plan, predicted.

    ``coefficients``: layer -> (a, b, c), in seconds. ``of`` gives the cost of a plan with its ``latency`` in
    milliseconds, so that it stands wherever a `CostModel` does.
    """

    costs: CostModel
    coefficients: Mapping[str, tuple[float, float, float]]

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
        return 1e3 * float((np.array([*self.coefficients.values()]) * _features(shares)).sum())


class _Shares:
    """The share that is left of each layer's MACs, or parameters, in a plan."""

    def __init__(self, costs: CostModel, layers: Sequence[str]):
        self.costs, place = costs, {name: index for index, name in enumerate(layers)}
        self.macs, self.params = (
            np.array([place.get(owner, len(layers)) for owner in terms.owners], dtype=np.int64)
            for terms in (costs.macs, costs.params)
        )
        self.count = len(layers)
        self.start = self._sums(costs.original_terms)
        self.whole = np.where(sum(self.start) > 0, 1.0, 0.0)

    def of(self, plan: Plan) -> np.ndarray:
        macs, params = self._sums(self.costs.terms(plan))
        by_macs, by_params = (
            now / np.where(start > 0, start, 1) for now, start in zip((macs, params), self.start, strict=True)
        )
        return np.where(self.start[0] > 0, by_macs, by_params)

    def _sums(self, terms: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return tuple(
            np.bincount(owners, values, self.count + 1)[: self.count]
            for owners, values in zip((self.macs, self.params), terms, strict=True)
        )


def _features(shares: np.ndarray) -> np.ndarray:
    return np.stack([np.ones_like(shares), np.sqrt(shares), shares], axis=-1)


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
        fit, _ = nnls(_features(left[:, index]) * weights[:, None], seconds * weights)
        fits[name] = tuple(fit.tolist())
    return LatencyModel(costs, fits)


def conditions(model: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """Return what a latency depends on beside the plan: the network's shapes, batch, device, threads, versions."""
    device = next(model.parameters()).device
    here = environment(device)
    shapes = [(name, tuple(value.shape), str(value.dtype)) for name, value in model.state_dict().items()]
    return {
        "network": zlib.crc32(repr(shapes).encode()),
        "batch_size": example_count(example_inputs),
        "device": here["gpu"] or here["cpu"],
        "threads": here["threads"],
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
