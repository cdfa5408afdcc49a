"""What a session of interactive pruning knows, as data, and what it computes and keeps so as not to compute it again.

That is the choices made, undo and redo, plans that are remembered; scores, rankings, measurements, bars. A choice is a
value, a plan a function of choices, scores and costs; `to_code` writes the same function as Python.
`widgets.PruningStudio` is a view of this.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .comparing.sensitivity import Sensitivity, sensitivity
from .data.batches import Batches, inputs_and_targets, take
from .data.data import Data, as_data
from .errors import UnknownNameError
from .measure.costs import CostModel
from .measure.latency import Latency, latencies
from .measure.metrics import Metrics, TaskMetrics
from .plots.plans import group_names
from .pruning.choices import Limits, Scoring, Selection, Target
from .pruning.compensation import compensate
from .pruning.order import Reach, RemovalOrder, removal_order
from .pruning.plan import PlanMismatchError, PruningPlan, prune
from .scoring.scores import Scores
from .scoring.tasks import CLASSIFICATION, Task, evaluate, example_inputs, fitting
from .state import call_model, copy_of, running
from .structure.groups import ChannelGroup
from .structure.layers import LayerAxis

START = Target(ratio=0.3)
STEPS_BACK = 200
"""Choices that undo can go back to; older ones are forgotten."""


@dataclass(frozen=True)
class Choices:
    """Everything that a plan depends on but the scores and costs themselves.

    Attributes:
        scoring, target, limits: as of all pruning; in ``limits`` what single groups may lose at most.
        locked: groups that stay as they are, (root, kept channels) pairs.
        by_hand: (root, channel, whether it is kept), whatever its score; in a group of blocks the channel of the first
            block. The target is met with them counted in.
    """

    scoring: Scoring = field(default_factory=Scoring)
    target: Target = START
    limits: Limits = field(default_factory=Limits)
    locked: tuple[tuple[LayerAxis, tuple[int, ...]], ...] = ()
    by_hand: tuple[tuple[LayerAxis, int, bool], ...] = ()

    @property
    def ranking_key(self) -> Choices:
        """The choices without those that a ranking does not depend on: equal where a ranking can be used again."""
        return replace(self, target=START, by_hand=())

    def rank(self, scores: Mapping[ChannelGroup, Tensor]) -> RemovalOrder:
        """Rank the channels; what takes longest of a plan, and does not depend on the target."""
        return removal_order(scores, self.limits, fixed=dict(self.locked))

    def plan(self, order: RemovalOrder, costs: CostModel) -> PruningPlan:
        """Return the plan that these choices and a ranking by them lead to: where they miss the target, the nearest.

        Raises:
            ValueError: a group that the choices by hand leave without channels.
        """
        return order.by_hand(self.hands).reach(self.target, costs)

    @property
    def hands(self) -> dict[LayerAxis, tuple[list[int], list[int]]]:
        """The channels to keep and those to remove by hand, by root."""
        found: dict[LayerAxis, tuple[list[int], list[int]]] = {}
        for root, channel, keep in self.by_hand:
            found.setdefault(root, ([], []))[0 if keep else 1].append(channel)
        return found


@dataclass(frozen=True)
class StudioState:
    """The present choices, those to go back and forward to, and those that were given a name."""

    choices: Choices = Choices()
    past: tuple[Choices, ...] = ()
    future: tuple[Choices, ...] = ()
    remembered: tuple[tuple[str, Choices], ...] = ()


def change(state: StudioState, choices: Choices, *, merge: bool = False) -> StudioState:
    """Make other choices. With ``merge`` the present ones are not kept for undo: one drag of a slider is one step."""
    if choices == state.choices:
        return state
    past = state.past if merge and state.past else (*state.past, state.choices)[-STEPS_BACK:]
    return replace(state, choices=choices, past=past, future=())


def undo(state: StudioState) -> StudioState:
    """Go back to the choices before; where there are none, nothing changes."""
    if not state.past:
        return state
    return replace(state, choices=state.past[-1], past=state.past[:-1], future=(*state.future, state.choices))


def redo(state: StudioState) -> StudioState:
    """Take back an undo; where there is none, nothing changes."""
    if not state.future:
        return state
    return replace(state, choices=state.future[-1], past=(*state.past, state.choices), future=state.future[:-1])


def remember(state: StudioState, name: str) -> StudioState:
    """Give the present choices a name, in place of what had it before; raise ValueError for an empty one."""
    if not name.strip():
        raise ValueError("a plan to be remembered needs a name")
    others = tuple(entry for entry in state.remembered if entry[0] != name)
    return replace(state, remembered=(*others, (name, state.choices)))


def limit_of(choices: Choices, root: LayerAxis) -> float:
    """Return the share of a group's channels that may go at most: its own limit, or that of all groups."""
    return choices.limits.max_ratio_of.get(root, choices.limits.max_ratio)


def set_limit(choices: Choices, root: LayerAxis, max_ratio: float | None) -> Choices:
    """Let at most this share of one group's channels go; None takes the limit away."""
    others = {key: value for key, value in choices.limits.max_ratio_of.items() if key != root}
    own = {} if max_ratio is None else {root: max_ratio}
    return replace(choices, limits=replace(choices.limits, max_ratio_of=others | own))


def lock(choices: Choices, plan: PruningPlan, root: LayerAxis) -> Choices:
    """Hold a group at what a plan keeps of it, choices by hand included, whatever the target becomes."""
    locked = dict(choices.locked) | {LayerAxis(*root): plan.kept_of(root)}
    by_hand = tuple(entry for entry in choices.by_hand if entry[0] != root)
    return replace(choices, locked=tuple(sorted(locked.items())), by_hand=by_hand)


def unlock(choices: Choices, root: LayerAxis) -> Choices:
    """Let a locked group follow the target again."""
    return replace(choices, locked=tuple(entry for entry in choices.locked if entry[0] != root))


def toggle_channel(choices: Choices, plan: PruningPlan, root: LayerAxis, channel: int) -> Choices:
    """Keep a channel that a plan of these choices removes, or remove one that it keeps.

    Raises:
        ValueError: an unknown group or channel, a group that is kept whole, or the last channel of a group that is not
            removed by hand: for another one that goes, one of those that the target removes comes back.
    """
    group = next((group for group in plan.groups if group.root == root), None)
    if group is None:
        raise UnknownNameError("group", str(LayerAxis(*root)), [str(known.root) for known in plan.groups])
    keep, first = channel not in plan.kept_of(root), channel % (group.width // group.blocks)
    others = [entry for entry in choices.by_hand if entry[:2] != (group.root, first)]
    gone = {channel for known, channel, stays in others if known == group.root and not stays}
    chosen = {"keep": [channel], "remove": gone} if keep else {"remove": gone | {channel}}
    PruningPlan.whole(plan.groups).choose(group, **chosen)
    return replace(choices, by_hand=tuple(sorted([*others, (group.root, first, keep)])))


def plan_changes(before: PruningPlan, after: PruningPlan) -> pd.DataFrame:
    """Return one row a group that two plans for one model treat differently.

    Columns: group, channels, kept before, kept after, removed (the channels that only the second removes), restored.

    Raises:
        PlanMismatchError: plans for different groups.
    """
    if before.groups != after.groups:
        raise PlanMismatchError("the two plans are for different groups and cannot be compared")
    rows = []
    for group, one, other in zip(before.groups, before.kept, after.kept, strict=True):
        if one != other:
            removed, restored = (tuple(sorted({*a} - {*b})) for a, b in ((one, other), (other, one)))
            rows.append((str(group.root), group.width, len(one), len(other), removed, restored))
    return pd.DataFrame(rows, columns=["group", "channels", "kept before", "kept after", "removed", "restored"])


@dataclass(frozen=True)
class Setup:
    """How a session got what its choices work on; for `to_code`.

    Attributes:
        image_shape: of one image, (channels, height, width).
        selection: which channels may go at all.
        batches, batch_size: calibration batches of the split ``train``, those of the first pass by ``seed``.
        device: where model and batches are.
        dtype: of the network, where the data's inputs are in another; None: as the data is.
        task: name of what the network is for.
    """

    image_shape: tuple[int, ...]
    selection: Selection = field(default_factory=Selection)
    batches: int = 10
    batch_size: int = 64
    seed: int = 0
    device: str = "cpu"
    task: str = CLASSIFICATION.name
    dtype: torch.dtype | None = None

    @classmethod
    def of(cls, model: nn.Module, data: Data, task: Task, batches: int | None, batch_size: int, **more: Any) -> Setup:
        """Return what fits a network and data: the network's device, and the one precision of its parameters.

        As many batches as are said, or else 10, or all that a pass holds.
        """
        parameters, one = list(model.parameters()), data.batches("val" if data.train is None else "train", 1)
        own, given = (
            {tensor.dtype for tensor in tensors if isinstance(tensor, Tensor) and tensor.is_floating_point()}
            for tensors in (parameters, tree_leaves(inputs_and_targets(next(iter(one.at(0))))[0]))
        )
        more |= {"device": str(parameters[0].device)} if parameters else {}
        more |= {"dtype": own.pop()} if len(own) == 1 and given - own else {}
        batches = min(10, len(data.batches("train", batch_size))) if batches is None else batches
        return cls(data.image_shape, batches=batches, batch_size=batch_size, task=task.name, **more)

    def batches_of(self, data: Data, split: str, **order: Any) -> Batches:
        """Return the batches of a split, as the network takes them."""
        return data.batches(split, self.batch_size, device=self.device, dtype=self.dtype, **order)

    def calibration(self, data: Data) -> Collection[Any]:
        """Return the calibration batches, the same each time."""
        return take(self.batches_of(data, "train", seed=self.seed), self.batches)

    @property
    def drawn(self) -> str:
        """The Python that draws the calibration batches."""
        drawn = f'data.batches("train", {self.batch_size}, seed={self.seed}{self._on})'
        return f"batches = obc.take({drawn}, {self.batches})"

    @property
    def example(self) -> str:
        """The Python that makes example inputs."""
        if self.task == CLASSIFICATION.name:
            return f"example = torch.zeros({', '.join(map(str, (1, *self.image_shape)))}{self._on})"
        return f'example = task.example(next(iter(data.batches("train", 1{self._on}))))'

    @property
    def _on(self) -> str:
        """Where tensors are made, as Python that follows other arguments: nothing where that is as usual."""
        said = "" if self.device == "cpu" else f", device={self.device!r}"
        return said if self.dtype is None else f"{said}, dtype={self.dtype}"


def to_code(choices: Choices, setup: Setup, *, nearest: bool = False) -> str:
    """Return Python that makes the plan of some choices out of ``model`` and ``data``, and the pruned network of it.

    For a task that is no classification also out of ``task``. ``nearest``: of choices that miss their target.
    """
    scoring, limits, (kind, value) = choices.scoring, choices.limits, choices.target.given
    data = ["batches"] if scoring.needs_data else []
    chosen, heads = _unusual(setup.selection, "ignore", "whole_heads", "only"), _unusual(setup.selection, "whole_heads")
    criterion = scoring.criterion if scoring.rows is None else (scoring.criterion, {"rows": scoring.rows})
    scored = ["model", "groups", repr(criterion), *data, *_unusual(scoring, "group_reduction", "normalizer")]
    scored += ["objective=task.losses"] if setup.task != CLASSIFICATION.name and data else []
    limited = _unusual(limits, "scope", "round_to", "min_channels", "max_ratio")
    named = {"max_ratio_of": limits.max_ratio_of, "fixed": dict(choices.locked), "by_hand": choices.hands}
    for option, entries in named.items():
        limited += [f"{option}={ {tuple(root): entry for root, entry in entries.items()}!r}"] if entries else []
    limited += ["nearest=True"] if nearest else []
    lines = [
        setup.example,
        *_call("groups = obc.find_groups", ["model", "example", *chosen]),
        *[setup.drawn for _ in data],
        *_call("scores = obc.score_groups", scored),
        *_call("costs = obc.cost_model", ["model", "example", *heads]),
        *_call("plan = obc.one_shot_plan", ["scores", "costs", f"{kind}={value!r}", *limited]),
    ]
    return as_program("\n".join([*lines, "pruned = obc.prune(model, plan)"]))


def as_program(calls: str) -> str:
    """Return calls as a program that runs as it stands where the names are that it begins by saying."""
    names = [name for name in ("model", "data", "task") if re.search(rf"\b{name}\b(?! ?=)", calls)]
    said = f"# out of {', '.join(names)}\n" if names else ""
    torch, plots = (line * (f"{name}." in calls) for name, line in IMPORTED.items())
    return f"{said}{torch}import obc_tools as obc\n{plots}\n{calls}\n"


IMPORTED = {"torch": "import torch\n\n", "plots": "from obc_tools import plots\n"}


def _unusual(value: Selection | Scoring | Limits, *names: str) -> list[str]:
    """Return the fields of a value that are not as by default, as keyword arguments."""
    usual = type(value)()
    found = {name: getattr(value, name) for name in names if getattr(value, name) != getattr(usual, name)}
    return [f"{name}={list(value) if isinstance(value, tuple) else value!r}" for name, value in found.items()]


def _call(start: str, arguments: list[str]) -> list[str]:
    """Return the lines of a call: one if it fits, else one an argument."""
    line = f"{start}({', '.join(arguments)})"
    return [line] if len(line) <= 100 else [f"{start}(", *(f"    {argument}," for argument in arguments), ")"]


CHANNELS = "channels"
BARS = (CHANNELS, "MACs", "parameters")
"""What the upper bars may show: the channels of groups, or what layers cost."""
LEAST_SHARE = 1e-3
MILLION = 1e6
KEPT_RANKINGS = 8
POINTS, MOST = 8, 10.0
"""Speed-ups of a frontier, evenly apart on a logarithmic scale, and the largest of them."""
RATIOS = (0.25, 0.5, 0.75)
"""Shares of a group's channels that go when it is pruned alone."""
Kept = tuple[tuple[int, ...], ...]
Watch = Callable[[Collection[Any], str], Iterable[Any]]
"""Takes batches and what is done with them, and returns them to be iterated over."""


@dataclass(frozen=True)
class Measurement:
    """What a forward pass tells of a pruned network: latency of one example, metrics on held-out ones.

    ``compensated``: the metrics of the network that `compensate` makes of it; None: not measured.
    """

    latency: Latency
    metrics: Metrics | TaskMetrics
    compensated: Metrics | TaskMetrics | None = None


class StudioSession:
    """A network to prune by choices: a copy of it, its groups and costs, and what was computed for choices so far.

    Args:
        model: copied, so that it stays free while this one is scored in a thread.
        data: `Data`, or what `as_data` takes, with the split ``train`` for calibration and ``val`` held out.
        setup: how many calibration batches, and which channels may go at all.
        held_out: how many held-out batches are evaluated, at most.
        task: what the network is for.

    Raises:
        ValueError: a model that does not run on the data's examples; what `find_groups` and `cost_model` raise.
    """

    def __init__(self, model: nn.Module, data: Any, setup: Setup, held_out: int = 4, task: Task = CLASSIFICATION):
        self.model = copy_of(model).eval()
        self.data, self.setup, self.held_out = as_data(data), setup, held_out
        self.task = task if task.against is None else task.against(self.model)
        self.held_out_batches()
        self.example = example_inputs(task, self.data, setup.device, setup.dtype)
        plain = running(self.model, self.example, lambda: "the data's images")
        runs = plain if isinstance(self.example, Tensor) else fitting(self.task, self.model, lambda: "data")
        with torch.no_grad(), runs:
            call_model(self.model, self.example)
        self.groups, self.costs = setup.selection.analyse(self.model, self.example)
        self.whole = PruningPlan.whole(self.groups)
        self._scores: dict[Scoring, Scores] = {}
        self._rankings: dict[Choices, RemovalOrder] = {}
        self._metrics: dict[tuple[Kept, bool], Metrics | TaskMetrics] = {}
        self._latencies: dict[Kept, Latency] = {}
        self._frontiers: dict[Choices, list[PruningPlan]] = {}
        self._sensitivities: dict[Choices, Sensitivity] = {}

    def calibration(self) -> Collection[Any]:
        """Return the calibration batches, the same each time."""
        return self.setup.calibration(self.data)

    def held_out_batches(self) -> Collection[Any]:
        """Return the held-out batches, the same each time: a random choice, for files may lie class by class."""
        split = self.setup.batches_of(self.data, "val", shuffle=True, seed=0)
        return take(split, min(self.held_out, len(split)))

    def scores(self, scoring: Scoring) -> Scores | None:
        """Return scores that were computed before."""
        return self._scores.get(scoring)

    def score(self, scoring: Scoring, watch: Callable[[Collection[Any]], Iterable[Any]] = iter) -> Scores:
        """Compute scores, and keep them; ``watch`` is handed the calibration batches where the criterion needs any."""
        given = watch(self.calibration()) if scoring.needs_data else None
        by_task = replace(scoring, objective=self.task.losses)
        self._scores[scoring] = by_task.score(self.model, self.groups, given)
        return self._scores[scoring]

    def plan(self, choices: Choices) -> PruningPlan:
        """Return the plan of choices whose scores are there; arithmetic. Raises as `Choices.plan` does."""
        key = choices.ranking_key
        if key not in self._rankings:
            self._rankings = dict(list(self._rankings.items())[-(KEPT_RANKINGS - 1) :])
            self._rankings[key] = choices.rank(self._scores[choices.scoring])
        return choices.plan(self._rankings[key], self.costs)

    def measure(
        self, plans: Sequence[PruningPlan], watch: Watch = lambda batches, what: batches, *, compensated: bool = False
    ) -> None:
        """Measure how good the networks are that plans leave, once each, and their latencies in turns.

        With ``compensated`` also how good they are as `compensate` leaves them with the calibration batches. Latencies
        are measured anew each time: only those of one occasion can be compared.
        """
        plans = list({plan.kept: plan for plan in plans}.values())
        wanted = [(plan, made) for made in (False, compensated) for plan in plans]
        self._evaluate(wanted, watch)
        networks = {str(number): prune(self.model, plan) for number, plan in enumerate(plans)}
        took = latencies(networks, self.example, repeats=10, warmup=2)
        self._latencies |= {plan.kept: took[name] for name, plan in zip(networks, plans, strict=True)}

    def _evaluate(self, wanted: Iterable[tuple[PruningPlan, bool]], watch: Watch) -> None:
        """Find the metrics of plans, as they are or compensated, that are not known yet."""
        known = {*self._metrics, (self.whole.kept, True)}
        missing = {(plan.kept, made): plan for plan, made in wanted if (plan.kept, made) not in known}
        for number, ((kept, made), plan) in enumerate(missing.items(), start=1):
            batches = watch(self.held_out_batches(), f"measuring plan {number} of {len(missing)}")
            self._metrics[kept, made] = evaluate(self.network(plan, made), batches, task=self.task)

    def network(self, plan: PruningPlan, compensated: bool = False) -> nn.Module:
        """Return what a plan leaves, as it is or as `compensate` leaves it with the calibration batches."""
        if not compensated:
            return prune(self.model, plan)
        return compensate(self.model, plan, self.calibration(), task=self.task)

    def frontier(self, choices: Choices, reach: Reach, watch: Watch = lambda batches, what: batches) -> None:
        """Evaluate what choices lead to at `POINTS` speed-ups up to the largest, or to `MOST`, for `curve`."""
        most = min(reach.of("speedup")[1], MOST)
        plans = [self.whole]
        for speedup in np.geomspace(most ** (1 / POINTS), most, POINTS):
            # Choices by hand may leave a group without channels.
            with suppress(ValueError):
                plans.append(self.plan(replace(choices, target=Target(speedup=float(speedup)))))
        # Limits and choices by hand may not allow what the network does: the nearest plan is that of many targets then.
        plans = list(dict.fromkeys(plans))
        self._evaluate([(plan, False) for plan in plans], watch)
        self._frontiers[replace(choices, target=START)] = plans

    def curve(self, choices: Choices, plan: PruningPlan) -> pd.DataFrame:
        """Return what `frontier` found for choices, and what was measured of a plan, as `accuracy_over_macs` takes it.

        Columns: network (the criterion, or "now"), MACs left, the task's headline, and of classifiers error.
        """
        named = [(choices.scoring.criterion, each) for each in self._frontiers.get(replace(choices, target=START), ())]
        rows = []
        for name, each in [*named, ("now", plan)]:
            found = self._metrics.get((each.kept, False))
            if found is not None:
                left = self.costs.of(each).macs / self.costs.original.macs
                row = {"network": name, "MACs left": left, self.task.headline: found.values[self.task.headline]}
                rows.append(row | ({"error": _margin(found)} if isinstance(found, Metrics) else {}))
        return pd.DataFrame(rows)

    def sense(self, choices: Choices, watch: Watch = lambda batches, what: batches) -> None:
        """Prune each group alone, scored and limited as choices say, and keep what `sensitivity` tells of it."""
        held_out, calibration = watch(self.held_out_batches(), "each group alone"), self.calibration()
        scored = ("criterion", "group_reduction", "normalizer", "rows")
        how = {name: getattr(choices.scoring, name) for name in scored} | {"round_to": choices.limits.round_to}
        how |= vars(self.setup.selection) | {"ratios": RATIOS, "task": self.task, "progress": False}
        found = sensitivity(self.model, self.example, held_out, calibration, **how)
        self._sensitivities[choices.ranking_key] = found

    def sensed(self, choices: Choices) -> Sensitivity | None:
        """Return what `sense` found for choices, whatever their target."""
        return self._sensitivities.get(choices.ranking_key)

    def measured(self, plan: PruningPlan) -> Measurement | None:
        """Return what was measured of a plan before."""
        latency, kept = self._latencies.get(plan.kept), plan.kept
        return latency and Measurement(latency, self._metrics[kept, False], self._metrics.get((kept, True)))

    def row(self, name: str, plan: PruningPlan) -> dict[str, Any]:
        """Return a plan's figures, those that were measured where they were."""
        cost, measured, original = self.costs.of(plan), self.measured(plan), self.costs.original
        row = {
            "plan": name,
            "channels": f"{plan.channels - plan.channels_removed:,}",
            "MACs": f"{cost.macs:,.0f}",
            "speed-up": f"{original.macs / cost.macs:.2f}x",
            "parameters": f"{cost.params:,}",
            "latency (ms, quartiles)": "" if measured is None else with_quartiles(measured.latency),
            **self._texts(measured and measured.metrics),
        }
        if any(made for _, made in self._metrics):
            headline = self.task.headline
            row[f"{headline}, compensated"] = self._texts(measured and measured.compensated)[headline]
        return row

    def _texts(self, metrics: Metrics | TaskMetrics | None) -> dict[str, str]:
        """Return metrics as the table shows them."""
        values, digits = {} if metrics is None else metrics.values, {"loss": "{:.4f}"}
        shown = [name for name in self.task.directions if name != "top5"]
        found = {n: digits.get(n, "{:.4g}").format(values[n]) if n in values else "" for n in shown}
        if isinstance(metrics, Metrics):
            found["accuracy"] = with_interval(metrics)
        return found

    def table(self, plans: dict[str, PruningPlan]) -> pd.DataFrame:
        """Return one row a plan, the whole network's first; a classifier's accuracy says on how many examples."""
        rows = [self.row(name, plan) for name, plan in ({"original": self.whole} | plans).items()]
        whole = len(self.data.val)
        sample = f"{min(self.held_out * self.setup.batch_size, whole):,} of {whole:,} held-out examples"
        named = {"accuracy": f"accuracy ± 95 % ({sample})"} if self.task.name == CLASSIFICATION.name else {}
        return pd.DataFrame(rows).rename(columns=named)


def with_interval(metrics: Metrics) -> str:
    """Return an accuracy and the half-width of its 95 % interval."""
    return f"{metrics.accuracy:.2%} ± {_margin(metrics):.2%}"


def _margin(metrics: Metrics) -> float:
    """Return how far an accuracy's 95 % interval after Wilson (1927) reaches at most: not 0 where all are right."""
    share, examples, z = metrics.accuracy, metrics.examples, 1.96
    middle = (share + z**2 / (2 * examples)) / (1 + z**2 / examples)
    half = math.sqrt(share * (1 - share) / examples + (z / (2 * examples)) ** 2) * z / (1 + z**2 / examples)
    return half + abs(middle - share)


def with_quartiles(latency: Latency) -> str:
    """Return a median in milliseconds, and between which quartiles it lies."""
    first, third = (1e3 * seconds for seconds in latency.quartiles_seconds)
    return f"{latency.median_ms:.2f} ({first:.2f}–{third:.2f})"


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
