"""What a pruning is asked for, as values: what may go, how it is scored, what stays, what to reach, in which steps.

Each is checked when built, made once where a user's keywords come in, and handed on.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from numbers import Real
from typing import Any

from torch import nn

from ..errors import check_name, check_number, check_whole
from ..measure.costs import COUNTINGS, Cost, CostModel, ModuleCosts, analyse, scaled
from ..scoring.criteria import Criterion, resolve_criterion
from ..scoring.objectives import AMP, Objective, classification
from ..scoring.rows import Rows, check_rows
from ..scoring.scores import NORMALIZERS, REDUCTIONS, Scores, score_groups
from ..structure.groups import PARTS, ChannelGroup
from ..structure.layers import LayerAxis

SCOPES = ("global", "local", "isomorphic")
OPERATIONS, TORCH_PRUNING = COUNTINGS
SIGNED = ("gaussian", "standarization")
"""Normalizers after which scores have signs."""
PER = ("macs", "latency")
"""What a channel's score may be divided by."""


def check_settings(settings: Iterable[str], known: Sequence[str]) -> None:
    """Raise ValueError for a setting that is not among those that are known."""
    if unknown := sorted({*settings} - {*known}):
        raise ValueError(f"unknown setting '{unknown[0]}'; known are {', '.join(known)}")


def values_of(settings: Mapping[str, Any], *kinds: type) -> list[Any]:
    """Return a value of each kind, built from those of the settings that are its fields.

    Raises ValueError for a setting that is no kind's.
    """
    known = {kind: [entry.name for entry in fields(kind)] for kind in kinds}
    check_settings(settings, [name for names in known.values() for name in names])
    return [kind(**{name: settings[name] for name in names if name in settings}) for kind, names in known.items()]


@dataclass(frozen=True)
class Selection:
    """Which channels may go at all; see `find_groups`."""

    ignore: tuple[nn.Module | str, ...] = ()
    whole_heads: bool = False
    only: str | None = None

    def __post_init__(self):
        single = isinstance(self.ignore, nn.Module | str) or not isinstance(self.ignore, Iterable)
        object.__setattr__(self, "ignore", (self.ignore,) if single else tuple(self.ignore))
        check_name("only", self.only, PARTS)

    def analyse(
        self, model: nn.Module, example_inputs: Any, counting: str = OPERATIONS
    ) -> tuple[tuple[ChannelGroup, ...], CostModel | ModuleCosts]:
        """Return a model's groups, those that are kept whole included, and what every plan for them costs."""
        return analyse(model, example_inputs, counting=counting, **vars(self))


@dataclass(frozen=True)
class Scoring:
    """What scores depend on: the criterion, how it is combined over members and scaled within groups, the objective.

    ``batches``: of those given the first so many are scored; None takes all. ``stop``: scoring ends before, after at
    least two, once other batches would be expected to exchange at most this share of the channels of a step, in
    (0, 0.5) (see `order.exchanged`); None scores all. ``rows``: of J, in place of the criterion's own. ``per``: a
    channel's score is divided by the MACs or by the milliseconds that its removal alone would save in what is left, so
    that what gains most for what it loses goes first; "latency" for targets that are one. None: the score as it is.
    ``amp``: "bf16" scores in bfloat16 (see `score_groups`).
    """

    criterion: Any = "jacobian"
    group_reduction: str = "sum"
    normalizer: str | None = None
    objective: Objective = classification
    batches: int | None = None
    stop: float | None = None
    per: str | None = None
    rows: Rows | None = None
    amp: str = "no"

    def __post_init__(self):
        check_name("amp", self.amp, AMP)
        if self.rows is not None:
            object.__setattr__(self, "rows", check_rows(self.rows))
        check_name("group_reduction", self.group_reduction, REDUCTIONS)
        check_name("normalizer", self.normalizer, NORMALIZERS)
        check_name("per", self.per, (None, *PER))
        if self.per is not None and self.normalizer in SIGNED:
            raise ValueError(f"per={self.per!r} divides scores: not with normalizer={self.normalizer!r}")
        criterion = self.resolved
        if self.batches is not None:
            check_whole("batches", self.batches, 1, ", or None for all")
        if self.stop is None:
            return
        check_number(
            "stop", self.stop, "a share of a step's channels in (0, 0.5), or None", lambda share: 0 < share < 0.5
        )
        if criterion.needs != "products" or criterion.coupling != "member":
            raise ValueError(f"stop={self.stop}: criterion {criterion.name!r} has no rows that add up; leave stop")
        if self.normalizer in SIGNED:
            raise ValueError(f"stop={self.stop} compares logarithms: not with normalizer={self.normalizer!r}")

    @property
    def resolved(self) -> Criterion:
        """The criterion itself."""
        criterion = resolve_criterion(self.criterion)
        return criterion if self.rows is None else replace(criterion, rows=self.rows)

    def of(self, criterion: Any) -> Scoring:
        """Return the same for another criterion; ``rows`` and ``stop`` go with those that have rows alone."""
        without = {} if resolve_criterion(criterion).needs == "products" else {"rows": None, "stop": None}
        return replace(self, criterion=criterion, **without)

    @property
    def needs_data(self) -> bool:
        """Whether scores depend on batches."""
        return self.resolved.needs != "weights"

    def score(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        batches: Iterable[Any] | None,
        seed: int = 0,
        **options: Any,
    ) -> Scores:
        """Score every channel of every group; batches are not touched where the criterion needs none.

        ``options``: `decided` and `proof` of `score_groups`.
        """
        options |= {name: getattr(self, name) for name in ("group_reduction", "normalizer", "objective", "amp")}
        batches = batches if self.needs_data else None
        if batches is not None and self.batches is not None:
            batches = islice(batches, self.batches)
        return score_groups(model, groups, self.resolved, batches, seed=seed, **options)


@dataclass(frozen=True)
class Limits:
    """What every group keeps whatever the scores say, and which channels are ranked together.

    At least ``min_channels`` channels and at most ``max_ratio`` of the original ones removed; the number of kept
    channels is rounded up to a multiple of ``round_to``. ``max_ratio_of``, by root, takes the place of ``max_ratio``
    for single groups; 0 keeps the group whole. ``scope`` "global" ranks all channels together, "local" within each
    group, "isomorphic" among the groups with the same structure (Fang et al. 2024); the last two remove the same share
    of each pool.
    """

    min_channels: int = 1
    max_ratio: float = 1.0
    round_to: int | None = None
    max_ratio_of: Mapping[LayerAxis, float] = field(default_factory=dict, hash=False)
    scope: str = "global"

    def __post_init__(self):
        check_name("scope", self.scope, SCOPES)
        check_whole("min_channels", self.min_channels, 1)
        check_number("max_ratio", self.max_ratio, "a share in (0, 1]", lambda share: 0 < share <= 1)
        if self.round_to is not None:
            check_whole("round_to", self.round_to, 1, ", or None")
        for root, ratio in self.max_ratio_of.items():
            name = f"max_ratio_of group {LayerAxis.of(root)}"
            check_number(name, ratio, "a share in [0, 1]", lambda share: 0 <= share <= 1)

    def fewest(self, root: LayerAxis, initial: int) -> int:
        """Return the least number of channels that a group keeps which had `initial` channels."""
        ratio = self.max_ratio_of.get(root, self.max_ratio)
        return max(self.min_channels, math.ceil(initial * (1 - ratio) - 1e-9))


@dataclass(frozen=True)
class Target:
    """What a pruned model must reach: one of a speed-up (times fewer MACs), MACs, parameters, a ratio of channels.

    Or a latency in milliseconds, where costs have one (see `latency_model`).

    MACs are those of the operations that run, or what torch_pruning counts (``counting="torch_pruning"``), in which
    the paper states its targets.
    """

    speedup: float | None = None
    macs: float | None = None
    params: float | None = None
    ratio: float | None = None
    counting: str = OPERATIONS
    latency: float | None = None

    def __post_init__(self):
        check_name("counting", self.counting, COUNTINGS)
        given = {name: value for name in KINDS if (value := getattr(self, name)) is not None}
        if len(given) != 1:
            raise ValueError(f"give one target: speedup=, macs=, params= or ratio=; got {given or 'none'}")
        name, value = self.given
        if name == "ratio":
            check_number(name, value, "a share of channels in (0, 1)", lambda share: 0 < share < 1)
        if name == "speedup":
            check_number(name, value, "a number above 1", lambda times: times > 1)
        check_number(
            name, value, "a positive number, not an infinite one", lambda number: 0 < number <= sys.float_info.max
        )

    @property
    def given(self) -> tuple[str, float]:
        """The kind of target and its value."""
        return next((name, getattr(self, name)) for name in KINDS if getattr(self, name) is not None)

    def met(self, cost: Cost, original: Cost, removed: float = 0.0) -> bool:
        """Say whether a cost, and the share of channels removed for it, reach the target."""
        kind, value = self.given
        if kind == "speedup":
            return cost.macs * value <= original.macs * (1 + 1e-12)
        return removed >= value - 1e-9 if kind == "ratio" else getattr(cost, kind) <= value

    def reached(self, cost: Cost, original: Cost, removed: float = 0.0) -> str:
        """Say how far a cost and a share of channels get, in the target's own terms."""
        kind, _ = self.given
        if kind == "ratio":  # not rounded up: asked for what is said, it is met
            return f"ratio={math.floor(removed * 1e4) / 1e4:g}"
        if kind == "latency":
            return f"latency={cost.latency:.4g} ms"
        return f"speedup={original.macs / cost.macs:.4g}" if kind == "speedup" else f"{kind}={getattr(cost, kind):,.0f}"

    def __str__(self) -> str:
        kind, value = self.given
        return f"{kind}={value:g}"


@dataclass(frozen=True)
class Reached:
    """What a plan leaves of a network's MACs and parameters, by which count, and what it was asked for.

    ``removed``: the share that goes of all channels that may go. ``met``: whether the target can be met at all.
    """

    cost: Cost
    original: Cost
    counting: str
    target: Target | None = None
    removed: float = 0.0
    met: bool = True

    @classmethod
    def of(cls, plan: Any, costs: CostModel | ModuleCosts, target: Target | None = None) -> Reached:
        """Return what a plan, which meets a target, reaches."""
        removed = plan.channels_removed / max(plan.channels, 1)
        return cls(costs.of(plan), costs.original, costs.counting, target, removed)

    def __str__(self) -> str:
        kind, value = (None, 0.0) if self.target is None else self.target.given
        before, after = ((scaled(cost.macs), scaled(cost.params).rstrip()) for cost in (self.original, self.cost))
        speedup = f"{self.original.macs / self.cost.macs if self.cost.macs else math.inf:.2f}x"
        speedup += f" of {value:.2f}x asked" if kind == "speedup" else " fewer"
        count = "operations that run" if self.counting == OPERATIONS else f"as {self.counting} counts"
        asked = {
            "ratio": f"; {self.removed:.1%} of {value:.1%} of channels asked",
            "macs": f"; {scaled(value)}MACs asked",
            "params": f"; {scaled(value).rstrip()} parameters asked",
        }
        said = f"MACs {before[0].rstrip()} → {after[0].rstrip()}, {speedup} ({count})"
        return f"{said}, parameters {before[1]} → {after[1]}{asked.get(kind, '')}"


TARGETS = ("speedup", "macs", "params", "ratio")
KINDS = (*TARGETS, "latency")


def targets_of(targets: Mapping[str, float | Iterable[float]], counting: str) -> list[Target]:
    """Return the targets, of each kind the easiest first; raise ValueError where there are none, or unknown kinds."""
    check_settings(targets, TARGETS)
    given = {kind: {values} if isinstance(values, Real) else {*values} for kind, values in targets.items()}
    found = [
        Target(**{kind: value}, counting=counting)
        for kind, values in given.items()
        for value in sorted(values, reverse=kind in ("macs", "params"))
    ]
    if not found:
        raise ValueError("no targets: give some, such as targets={'speedup': (1.5, 2, 3)}")
    return found


@dataclass(frozen=True)
class Steps:
    """In how many steps a target is approached, up to which share of all channels, and how the last one ends.

    ``last_step`` "exact" removes as few channels as the target needs; "full", the published rule, the whole step.
    """

    steps: int = 20
    schedule_ratio: float = 1.0
    last_step: str = "exact"

    def __post_init__(self):
        check_whole("steps", self.steps, 1)
        check_number("schedule_ratio", self.schedule_ratio, "a share in (0, 1]", lambda share: 0 < share <= 1)
        check_name("last_step", self.last_step, ("exact", "full"))

    def shares(self, target: Target) -> Iterator[float]:
        """Yield the share of the channels prunable at the start that is gone at most after each step."""
        final = self.schedule_ratio if target.ratio is None else target.ratio
        return (final * step / self.steps for step in range(1, self.steps + 1))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keywords of `Selection`, `Scoring` and `Limits` side by side, flat as in JSON, for jobs and comparisons.

    Attributes:
        ignore, whole_heads, only: which channels may go at all (see `find_groups`).
        group_reduction, normalizer: how scores are combined and scaled (see `score_groups`).
        rows, stop, per: the rows of J, when a step is decided, what scores are divided by (see `Scoring`).
        scope, min_channels, max_ratio, round_to: what every group keeps (see `Limits`).
        batches, batch_size: calibration batches of a pruning step, images in one.
        compensate: make up for what is removed in least squares over calibration batches (see `compensate`): at the
            end, and before what is left is scored again.
        seed: fixes all that is drawn.
    """

    ignore: tuple[str, ...] = ()
    whole_heads: bool = False
    only: str | None = None
    group_reduction: str = "sum"
    normalizer: str | None = None
    rows: Rows | None = None
    stop: float | None = None
    per: str | None = None
    scope: str = "global"
    min_channels: int = 1
    max_ratio: float = 1.0
    round_to: int | None = None
    batches: int = 50
    batch_size: int = 128
    compensate: bool = False
    seed: int = 0

    def __post_init__(self):
        for name, least in (("batches", 1), ("batch_size", 1), ("seed", 0)):
            check_whole(name, getattr(self, name), least)
        object.__setattr__(self, "ignore", self.selection.ignore)
        object.__setattr__(self, "rows", self.scoring().rows)
        _ = self.limits

    @property
    def selection(self) -> Selection:
        """Which channels may go at all."""
        return Selection(self.ignore, self.whole_heads, self.only)

    def scoring(self, criterion: Any = "jacobian", objective: Objective = classification) -> Scoring:
        """Return how channels are scored by a criterion."""
        how = {"rows": self.rows, "stop": self.stop, "per": self.per}
        return Scoring(criterion, self.group_reduction, self.normalizer, objective, **how)

    @property
    def limits(self) -> Limits:
        """What every group keeps."""
        return Limits(self.min_channels, self.max_ratio, self.round_to, scope=self.scope)
