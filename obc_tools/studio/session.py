"""What interactive pruning computes, and keeps so as not to compute it again: scores, rankings, measurements, bars."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ..data.batches import take
from ..data.data import Data
from ..measure.costs import CostModel
from ..measure.latency import Latency, latencies
from ..measure.metrics import Metrics, evaluate
from ..plots.plans import group_names
from ..pruning.choices import Scoring
from ..pruning.order import RemovalOrder
from ..pruning.plan import PruningPlan, prune
from ..scoring.scores import Scores
from ..state import copy_of
from ..structure.groups import ChannelGroup
from ..structure.layers import LayerAxis
from .state import Choices, Setup

CHANNELS = "channels"
BARS = (CHANNELS, "MACs", "parameters")
"""What the upper bars may show: the channels of groups, or what layers cost."""
LEAST_SHARE = 1e-3
MILLION = 1e6
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
        setup: how many calibration batches, and which channels may go at all.
        held_out: how many held-out batches are evaluated, at most.

    Raises:
        ValueError: a model that does not run on the data's images; what `find_groups` and `cost_model` raise.
    """

    def __init__(self, model: nn.Module, data: Data, setup: Setup, held_out: int = 4):
        self.model = copy_of(model).eval()
        self.data, self.setup, self.held_out = data, setup, held_out
        self.example = torch.zeros(1, *setup.image_shape, device=setup.device)
        _check_runs(self.model, self.example)
        self.groups, self.costs = setup.selection.analyse(self.model, self.example)
        self.whole = PruningPlan.whole(self.groups)
        self._scores: dict[Scoring, Scores] = {}
        self._rankings: dict[Choices, RemovalOrder] = {}
        self._measured: dict[tuple[tuple[int, ...], ...], Measurement] = {}

    def calibration(self) -> Collection[Any]:
        """Return the calibration batches, the same each time."""
        split = self.data.batches("train", self.setup.batch_size, seed=self.setup.seed, device=self.setup.device)
        return take(split, self.setup.batches)

    def held_out_batches(self) -> Collection[Any]:
        """Return the held-out batches, the same each time: a random choice, for files may lie class by class."""
        split = self.data.batches("val", self.setup.batch_size, shuffle=True, seed=0, device=self.setup.device)
        return take(split, min(self.held_out, len(split)))

    def scores(self, scoring: Scoring) -> Scores | None:
        """Return scores that were computed before."""
        return self._scores.get(scoring)

    def score(self, scoring: Scoring, watch: Callable[[Collection[Any]], Iterable[Any]] = iter) -> Scores:
        """Compute scores, and keep them; ``watch`` is handed the calibration batches where the criterion needs any."""
        given = watch(self.calibration()) if scoring.needs_data else None
        self._scores[scoring] = scoring.score(self.model, self.groups, given)
        return self._scores[scoring]

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
        found = {"latency (ms)": f"{measured.latency.median_ms:.2f}", "accuracy": with_interval(measured.metrics)}
        return row | found | {"loss": f"{measured.metrics.loss:.4f}"}

    def table(self, plans: dict[str, PruningPlan]) -> pd.DataFrame:
        """Return one row a plan, the whole network's first; the accuracy says on how many images it was measured."""
        rows = [self.row(name, plan) for name, plan in ({"original": self.whole} | plans).items()]
        whole = len(self.data.val)
        images = f"{min(self.held_out * self.setup.batch_size, whole):,} of {whole:,} held-out images"
        return pd.DataFrame(rows).rename(columns={"accuracy": f"accuracy ± 95 % ({images})"})


def with_interval(metrics: Metrics) -> str:
    """Return an accuracy and the half-width of its 95 % interval (normal approximation to the binomial)."""
    half = 1.96 * math.sqrt(metrics.accuracy * (1 - metrics.accuracy) / metrics.examples)
    return f"{metrics.accuracy:.2%} ± {half:.2%}"


def _check_runs(model: nn.Module, example: Tensor) -> None:
    try:
        with torch.no_grad():
            model(example)
    except RuntimeError as error:
        shape = tuple(example.shape[1:])
        raise ValueError(
            f"{type(model).__name__} does not run on the data's images, of shape {shape}: {error}"
        ) from error


@dataclass(frozen=True)
class Bars:
    """What stands in the upper panel: for each bar its name, its heights, what it tells and the group it leads to.

    Attributes:
        names, title: of the bars, and of all of them.
        now, whole: heights of what a plan leaves and of what there was, shape (bars,).
        fixed: which bars cannot become lower, shape (bars,).
        notes: what is shown under the mouse.
        roots: the group whose channels a click shows; None where there is no single one that can be pruned.
        chosen: which bars belong to the group that is shown.
        marks: heights of another plan, or None.
        unit: of all heights.
    """

    names: list[str]
    title: str
    now: np.ndarray
    whole: np.ndarray
    fixed: np.ndarray
    notes: list[str]
    roots: list[LayerAxis | None]
    chosen: list[bool]
    marks: np.ndarray | None
    unit: str


def studio_bars(
    plan: PruningPlan,
    root: LayerAxis,
    *,
    bars: str = CHANNELS,
    costs: CostModel | None = None,
    compared: PruningPlan | None = None,
) -> Bars:
    """Return the bars of the upper panel: channels of groups, or MACs or parameters of layers.

    Args:
        root: of the group whose channels are shown below.
        bars: one of `BARS`.
        costs: what MACs and parameters are taken from; layers with less than a thousandth of all are left out.
        compared: another plan for the same groups.

    Raises:
        ValueError: unknown ``bars``, or ones that need ``costs``.
    """
    if bars == CHANNELS:
        return _channel_bars(plan, root, compared)
    if bars not in BARS or costs is None:
        raise ValueError(
            f"bars of {bars!r}; expected one of {', '.join(map(repr, BARS))}, all but the first with costs"
        )
    return _layer_bars(plan, root, bars, costs, compared)


def _channel_bars(plan: PruningPlan, root: LayerAxis, compared: PruningPlan | None) -> Bars:
    kept = np.array([len(channels) for channels in plan.kept])
    notes = [
        f"{group.root}: {count} of {group.width} channels kept"
        + (f"<br>{group.kept_whole}" if group.kept_whole else "")
        for group, count in zip(plan.groups, kept, strict=True)
    ]
    return Bars(
        names=group_names(plan),
        title="group (its first layer); click one to see its channels",
        now=kept,
        whole=np.array([group.width for group in plan.groups]),
        fixed=np.array([not group.prunable for group in plan.groups]),
        notes=notes,
        roots=[group.root if group.prunable else None for group in plan.groups],
        chosen=[group.root == root for group in plan.groups],
        marks=None if compared is None else np.array([len(channels) for channels in compared.kept]),
        unit=CHANNELS,
    )


def _layer_bars(
    plan: PruningPlan, root: LayerAxis, quantity: str, costs: CostModel, compared: PruningPlan | None
) -> Bars:
    whole, now = (costs.by_layer(of) for of in (PruningPlan.whole(plan.groups), plan))
    shown = whole[quantity] >= LEAST_SHARE * whole[quantity].sum()
    names, before, after = whole["layer"][shown], whole[quantity][shown], now[quantity][shown]
    groups = [_made_by(name, plan.groups) for name in names]
    return Bars(
        names=list(names),
        title="layer; click one to see the channels of its group",
        now=after.to_numpy() / MILLION,
        whole=before.to_numpy() / MILLION,
        fixed=np.zeros(len(names), dtype=bool),
        notes=[f"{n}: {a:,.0f} of {b:,.0f} {quantity}" for n, a, b in zip(names, after, before, strict=True)],
        roots=[group.root if group is not None and group.prunable else None for group in groups],
        chosen=[group is not None and group.root == root for group in groups],
        marks=None if compared is None else costs.by_layer(compared)[quantity][shown].to_numpy() / MILLION,
        unit=f"{quantity} (millions)",
    )


def _made_by(layer: str, groups: Sequence[ChannelGroup]) -> ChannelGroup | None:
    """Return the group of a layer's output channels, or the first one within a layer that counts as a whole."""
    out = LayerAxis(layer, "out")
    within = (group for group in groups if group.root.layer.startswith(f"{layer}."))
    return next((group for group in groups if any(m.axis == out for m in group.members)), next(within, None))
