"""What interactive pruning computes, and keeps so as not to compute it again: scores, rankings, measurements."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ..data.batches import take
from ..data.data import Data
from ..measure.costs import cost_model
from ..measure.latency import Latency, latencies
from ..measure.metrics import Metrics, evaluate
from ..pruning.order import Ranking
from ..pruning.plan import PruningPlan
from ..pruning.prune import prune
from ..scoring.criteria import resolve_criterion
from ..scoring.scores import Scores, score_groups
from ..structure.groups import find_groups
from .state import Choices, Scoring, Setup

KEPT_RANKINGS = 8
Watch = Callable[[Collection[Any], str], Iterable[Any]]
"""Takes batches and what is done with them, and returns them to be iterated over."""


@dataclass(frozen=True)
class Measurement:
    """What a forward pass tells of a pruned network: latency of one image, metrics on held-out images."""

    latency: Latency
    metrics: Metrics


class StudioSession:
    """A network to prune by choices: a copy of it, its groups and costs, and what was computed for choices so far.

    Args:
        model: copied, so that it stays free while this one is scored in a thread.
        data: an image data set with the split ``train`` for calibration and ``val`` held out.
        setup: how many calibration batches, and what `find_groups` ignores.
        held_out: how many held-out batches are evaluated, at most.

    Raises:
        ValueError: a model that does not run on the data's images; what `find_groups` and `cost_model` raise.
    """

    def __init__(self, model: nn.Module, data: Data, setup: Setup, held_out: int = 4):
        self.model = copy.deepcopy(model).eval()
        self.data, self.setup, self.held_out = data, setup, held_out
        self.example = torch.zeros(1, *setup.image_shape, device=setup.device)
        _check_runs(self.model, self.example)
        heads = setup.whole_heads
        self.groups = find_groups(self.model, self.example, ignore=setup.ignore, whole_heads=heads, only=setup.only)
        self.costs = cost_model(self.model, self.example, whole_heads=heads)
        self.whole = PruningPlan.whole(self.groups)
        self._scores: dict[Scoring, Scores] = {}
        self._rankings: dict[Choices, Ranking] = {}
        self._measured: dict[tuple[tuple[int, ...], ...], Measurement] = {}

    def calibration(self) -> Collection[Any]:
        """Return the calibration batches, the same each time."""
        split = self.data.batches("train", self.setup.batch_size, seed=self.setup.seed, device=self.setup.device)
        return take(split, self.setup.batches)

    def held_out_batches(self) -> Collection[Any]:
        """Return the held-out batches."""
        split = self.data.batches("val", self.setup.batch_size, device=self.setup.device)
        return take(split, min(self.held_out, len(split)))

    def scores(self, scoring: Scoring) -> Scores | None:
        """Return scores that were computed before."""
        return self._scores.get(scoring)

    def score(self, scoring: Scoring, watch: Callable[[Collection[Any]], Iterable[Any]] = iter) -> Scores:
        """Compute scores, and keep them; ``watch`` is handed the calibration batches where the criterion needs any."""
        needs_data = resolve_criterion(scoring.criterion).needs != "weights"
        options = {"group_reduction": scoring.group_reduction, "normalizer": scoring.normalizer}
        given = watch(self.calibration()) if needs_data else None
        found = score_groups(self.model, self.groups, scoring.criterion, given, **options)
        self._scores[scoring] = found
        return found

    def plan(self, choices: Choices) -> PruningPlan:
        """Return the plan of choices whose scores are there; arithmetic. Raises as `Choices.plan` does."""
        key = choices.ranking_key
        if key not in self._rankings:
            self._rankings = dict(list(self._rankings.items())[-(KEPT_RANKINGS - 1) :])
            self._rankings[key] = choices.rank(self._scores[choices.scoring])
        return choices.plan(self._rankings[key], self.costs)

    def measure(self, plans: Sequence[PruningPlan], watch: Watch = lambda batches, what: batches) -> None:
        """Measure loss and accuracy of the networks that plans leave, once each, and their latencies in turns.

        Latencies are measured anew each time: only those of one occasion can be compared.
        """
        networks = {plan.kept: prune(self.model, plan) for plan in plans}
        metrics = {kept: found.metrics for kept, found in self._measured.items() if kept in networks}
        missing = [kept for kept in networks if kept not in metrics]
        for number, kept in enumerate(missing, start=1):
            batches = watch(self.held_out_batches(), f"measuring plan {number} of {len(missing)}")
            metrics[kept] = evaluate(networks[kept], batches)
        named = {str(number): network for number, network in enumerate(networks.values())}
        took = latencies(named, self.example, repeats=10, warmup=2)
        self._measured |= {
            kept: Measurement(took[name], metrics[kept]) for name, kept in zip(named, networks, strict=True)
        }

    def measured(self, plan: PruningPlan) -> Measurement | None:
        """Return what was measured of a plan before."""
        return self._measured.get(plan.kept)

    def row(self, name: str, plan: PruningPlan) -> dict[str, Any]:
        """Return a plan's figures, those that were measured where they were."""
        cost, measured, original = self.costs.of(plan), self.measured(plan), self.costs.original
        row = {
            "plan": name,
            "channels": f"{plan.channels - plan.channels_removed:,}",
            "MACs": f"{cost.macs:,.0f}",
            "speed-up": f"{original.macs / cost.macs:.2f}x",
            "parameters": f"{cost.params:,}",
        }
        if measured is None:
            return row | {"latency (ms)": "", "accuracy": "", "loss": ""}
        found = {"latency (ms)": f"{measured.latency.median_ms:.2f}", "accuracy": f"{measured.metrics.accuracy:.2%}"}
        return row | found | {"loss": f"{measured.metrics.loss:.4f}"}

    def table(self, plans: dict[str, PruningPlan]) -> pd.DataFrame:
        """Return one row a plan, the whole network's first."""
        return pd.DataFrame([self.row(name, plan) for name, plan in ({"original": self.whole} | plans).items()])


def _check_runs(model: nn.Module, example: Tensor) -> None:
    try:
        with torch.no_grad():
            model(example)
    except RuntimeError as error:
        shape = tuple(example.shape[1:])
        raise ValueError(
            f"{type(model).__name__} does not run on the data's images, of shape {shape}: {error}"
        ) from error
