"""What pruning to a latency takes: the predicted one of every plan, and the measured one of some, in new processes."""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ..errors import check_name, check_number, check_whole
from ..files import told
from ..measure.costs import CostModel
from ..measure.latency import (
    CLOCKS,
    RUNTIMES,
    LatencyModel,
    Times,
    conditions,
    kept_latency,
    learn_latency,
    time_layers,
)
from ..state import copy_of
from ..structure.groups import ChannelGroup
from .choices import Limits
from .order import unscored
from .plan import PruningPlan, prune

logger = logging.getLogger(__name__)
PLANS = 10
"""Pruned copies whose layers are timed."""
ROUNDS = 8
HELD = 15 / 16
"""With what probability an interval holds the median: that of the least to the largest of five."""


class LatencyError(ValueError):
    """A latency that is not reached, or cannot be told. ``plan`` is the nearest there is, ``measured`` its latency."""

    def __init__(self, said: str, plan: PruningPlan, measured: Measured):
        super().__init__(said)
        self.plan, self.measured = plan, measured


@dataclass(frozen=True)
class Measured:
    """Milliseconds of the unpruned and the pruned network, side by side, a pair for each of some new processes."""

    original: tuple[float, ...]
    pruned: tuple[float, ...]

    def __post_init__(self):
        if not self.pruned or len(self.original) != len(self.pruned) or min(*self.original, *self.pruned) <= 0:
            raise ValueError(f"latencies {self.original} and {self.pruned}: expected a pair of each process, above 0")

    def __add__(self, more: Measured) -> Measured:
        return Measured(self.original + more.original, self.pruned + more.pruned)

    def of(self, target: Timing) -> tuple[float, ...]:
        """Return what counts for a target: milliseconds, or the share of the unpruned network's."""
        if target.speedup is None:
            return self.pruned
        return tuple(b / a for a, b in zip(self.original, self.pruned, strict=True))


@dataclass(frozen=True)
class Timing:
    """What is asked for: milliseconds or a speed-up, how near, measured in how many new processes by which clock.

    The interval of the median (`interval`) must lie within ``tolerance`` of the target. While it is neither there nor
    wholly off, ``processes`` more are measured, up to ``most_processes``. ``clock``: see `latency`. ``runtime``: what
    runs the networks, one of `RUNTIMES`; what is predicted is how torch runs them, and corrected by what is measured.
    """

    latency: float | None = None
    speedup: float | None = None
    tolerance: float = 0.04
    processes: int = 5
    most_processes: int = 30
    repeats: int = 30
    clock: str = "wall"
    runtime: str = "eager"
    file: str | Path | None = None

    def __post_init__(self):
        if (self.latency is None) == (self.speedup is None):
            raise ValueError("give one target: latency= (milliseconds) or latency_speedup=")
        if self.latency is not None:
            check_number("latency", self.latency, "milliseconds above 0", lambda time: time > 0)
        if self.speedup is not None:
            check_number("latency_speedup", self.speedup, "a number above 1", lambda times: times > 1)
        check_number("tolerance", self.tolerance, "a share in (0, 1)", lambda share: 0 < share < 1)
        check_whole("processes", self.processes, 2)
        check_whole("most_processes", self.most_processes, self.processes, " (processes)")
        check_whole("repeats", self.repeats, 1)
        check_name("clock", self.clock, CLOCKS)
        check_name("runtime", self.runtime, RUNTIMES)

    @property
    def aim(self) -> float:
        """The target in milliseconds, or as a share of the unpruned network's latency."""
        return self.latency if self.speedup is None else 1 / self.speedup

    def __str__(self) -> str:
        return f"latency={self.latency:g} ms" if self.speedup is None else f"latency_speedup={self.speedup:g}"

    def told(self, values: Sequence[float]) -> str:
        """Say what was measured in the target's own terms, with its interval."""
        middle, ends = statistics.median(values), interval(values)
        if self.speedup is not None:
            return f"{1 / middle:.3g}x ({1 / ends[1]:.3g} to {1 / ends[0]:.3g} in {len(values)} processes)"
        return f"{middle:.4g} ms ({ends[0]:.4g} to {ends[1]:.4g} in {len(values)} processes)"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the narrowest interval between two values, as many below as above, that holds the median by `HELD`.

    Values are independent draws; the k-th least and the k-th largest of n have the median between them but for a
    probability of 2 * sum of C(n, i) / 2^n over i < k (order statistics). The least and the largest where n is below 5.
    """
    count, ordered, outside, place = len(values), sorted(values), 0.0, 0
    while 2 * place + 2 < count and outside + 2 * math.comb(count, place) / 2**count <= 1 - HELD:
        outside += 2 * math.comb(count, place) / 2**count
        place += 1
    place = max(place - 1, 0)
    return ordered[place], ordered[-1 - place]


def climb(
    timing: Timing,
    fast: LatencyModel,
    rungs: np.ndarray,
    plan_of: Callable[[float], PruningPlan],
    measured: Callable[[PruningPlan], Measured],
) -> PruningPlan:
    """Return the plan, of those by predicted latency, whose measured one is the target's.

    ``rungs``: the predicted latencies, those of the network as it is first. ``plan_of`` gives the plan that gets to
    one of them. The next plan to measure is where an affine map from predicted to measured latencies puts the target.

    Raises:
        LatencyError: see `prune_to`.
    """
    seen: dict[float, tuple[PruningPlan, Measured]] = {}
    aim = timing.aim * (1.0 if timing.speedup is None else fast.original.latency)
    for _ in range(ROUNDS):
        plans = _around(aim, fast, rungs, plan_of)
        found = min(plans, key=lambda latency: abs(latency - aim))
        if found in seen:
            break
        seen[found] = plans[found], _told_apart(timing, plans[found], measured)
        if _judged(timing, *seen[found]):
            return plans[found]
        points = {predicted: statistics.median(found.of(timing)) for predicted, (_, found) in seen.items()}
        aim = _corrected(points, timing.aim)
    nearest = min(points, key=lambda predicted: abs(points[predicted] - timing.aim))
    said = "is not met: the nearest plan has"
    if nearest <= rungs[-1] and points[nearest] > timing.aim:
        said = "cannot be met: the best that can be had is"
    elif nearest == rungs[0] and points[nearest] < timing.aim:
        said = "asks for less than the network does as it is:"
    plan, times = seen[nearest]
    raise LatencyError(f"{timing} {said} {timing.told(times.of(timing))}", plan, times)


def _around(
    aim: float, fast: LatencyModel, rungs: np.ndarray, plan_of: Callable[[float], PruningPlan]
) -> dict[float, PruningPlan]:
    """Return the plans next to a predicted latency, above and below it, by their own; one at either end."""
    place = int(np.searchsorted(-rungs, -aim, side="right"))
    found = {}
    for rung in (*rungs[place : place + 1], *rungs[:place][::-1]):  # that below, then upwards
        plan = plan_of(rung)
        latency = fast.of(plan).latency
        found[latency] = plan
        if latency >= aim:
            break
    return found


def _told_apart(timing: Timing, plan: PruningPlan, measured: Callable[[PruningPlan], Measured]) -> Measured:
    """Measure a plan in more and more processes, until it is told whether it is within the tolerance, or enough."""
    found = measured(plan)
    while _verdict(timing, found) is None and len(found.pruned) + timing.processes <= timing.most_processes:
        found += measured(plan)
    return found


def _verdict(timing: Timing, measured: Measured) -> bool | None:
    """Say whether an interval is within the tolerance of the target, or wholly off; None where it is neither."""
    low, high = interval(measured.of(timing))
    least, most = timing.aim * (1 - timing.tolerance), timing.aim * (1 + timing.tolerance)
    if least <= low and high <= most:
        return True
    return False if high < least or low > most else None


def _judged(timing: Timing, plan: PruningPlan, measured: Measured) -> bool:
    """Say whether a plan is within the tolerance for sure; raise LatencyError where nobody could tell."""
    values = measured.of(timing)
    low, high = interval(values)
    logger.info("%s: measured %s", timing, timing.told(values))
    verdict = _verdict(timing, measured)
    if verdict is None and high - low > 2 * timing.tolerance * statistics.median(values):
        said = f"{timing} cannot be told within {timing.tolerance:.0%}: {timing.told(values)}; the machine is too noisy"
        clock = "" if timing.clock == "cpu" else "one thread with clock='cpu', "
        raise LatencyError(
            f"{said}: stop other work, {clock}more most_processes= or repeats=, or a larger tolerance=", plan, measured
        )
    return bool(verdict)


def _corrected(points: dict[float, float], aim: float) -> float:
    """Return the predicted latency at which the target would be measured, by the two nearest points, or by one."""
    (x, y), *others = sorted(points.items(), key=lambda point: abs(point[1] - aim))
    slope = next(((y - v) / (x - u) for u, v in others), y / x)
    return x + (aim - y) / (slope if slope > 0 else y / x)


def latency_model(
    model: nn.Module,
    example_inputs: Any,
    groups: Sequence[ChannelGroup],
    costs: CostModel,
    limits: Limits | None = None,
    file: str | Path | None = None,
    time_plan: Callable[[nn.Module], Times] | None = None,
    clock: str = "wall",
) -> LatencyModel:
    """Learn the latency of every plan for a network, or read it from a file measured under the same conditions.

    ``time_plan`` takes the place of what times the layers of a network.
    """
    layers = [name for name, _ in model.named_modules() if name in {*costs.macs.owners, *costs.params.owners}]
    time_plan = time_plan or (lambda network: time_layers(network, example_inputs, layers, clock=clock))

    def learn() -> LatencyModel:
        plans = [PruningPlan.whole(groups), *random_plans(groups, limits or Limits(), PLANS)]
        return learn_latency(costs, plans, layers, lambda plan: time_plan(prune(model, plan)))

    return kept_latency(file, costs, conditions(model, example_inputs, clock), learn)


def random_plans(groups: Sequence[ChannelGroup], limits: Limits, count: int, seed: int = 0) -> list[PruningPlan]:
    """Return plans that remove other shares of every group; every second one the same share of all."""
    random, plans = np.random.default_rng(seed), []
    for number in range(count):
        shared = random.uniform(0.1, 0.9)
        ratios = {g.root: shared if number % 2 else random.uniform(0, 0.9) for g in groups}
        ratios = {root: min(ratio, limits.max_ratio_of.get(root, limits.max_ratio)) for root, ratio in ratios.items()}
        order = unscored(groups, replace(limits, max_ratio_of=ratios))
        plans.append(order.plan(len(order)))
    return plans


def measure_apart(
    original: nn.Module, pruned: nn.Module, example_inputs: Any, timing: Timing, progress: bool = False
) -> Measured:
    """Measure two networks in turns, in several new processes one after the other, each some seconds to start."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "networks.pt"
        try:
            how = {"repeats": timing.repeats, "threads": torch.get_num_threads(), "clock": timing.clock}
            models = {"original": copy_of(original), "pruned": pruned}
            with told(path, "nothing was measured"), path.open("wb") as file:
                torch.save((models, example_inputs, timing.runtime, how), file)
        except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
            raise ValueError(f"the network cannot be handed to a new process: {error}") from error
        here = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "obc_tools.models.runtimes", str(path)]
        turns = tqdm(range(timing.processes), "measuring in new processes", disable=not progress, leave=False)
        found = [subprocess.run(command, capture_output=True, text=True, env=here) for _ in turns]
    for process in found:
        if process.returncode:
            last = (process.stderr.strip().splitlines() or ["it said nothing"])[-1]
            lost = " (its class must be in a module that can be imported there, not in a notebook)"
            hint = lost if last.startswith(("AttributeError", "ModuleNotFoundError")) else ""
            raise ValueError(f"the network could not be timed in a new process: {last}{hint}")
    pairs = [json.loads(process.stdout.splitlines()[-1]) for process in found]
    return Measured(tuple(pair["original"] for pair in pairs), tuple(pair["pruned"] for pair in pairs))
