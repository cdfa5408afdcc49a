"""The cost of any plan for a model by arithmetic alone: no pruned copy, no forward pass.

MACs and parameters are terms in the widths of layer axes (:mod:`obc_tools.cost_terms`), and a width is linear in how
many channels the groups keep. So a plan's cost is a product of small integer matrices with these numbers. All of it is
deduced from one trace, and proven on real pruned copies before it is handed out.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pandas as pd
from torch import nn

from .cost_terms import Terms, Width, head_counts, macs_terms, parameter_terms
from .costs import Call, Cost, count_calls, example_count, parameter_count
from .groups import ChannelGroup, Follower, kept_positions, trace_groups
from .layers import (
    Axis,
    LayerAxis,
    UnknownLayerError,
    all_axes,
    get_layer,
    layer_axes,
    own_tensors,
)
from .shrinking import shrink_model

PROBES = 2
"""Pruned copies with which a cost model is compared when it is built."""


class CostModelError(ValueError):
    """A module whose cost in a pruned model cannot be predicted, or a plan outside of what was proven."""


class Plan(Protocol):
    """What a cost model reads of a :class:`obc_tools.plan.PruningPlan`."""

    groups: tuple[ChannelGroup, ...]
    kept: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class _Channels:
    """Where a group's kept channels are counted: from column ``first`` on, one column a class of channels.

    ``classes`` is the class of each channel, or None where all occur alike and one column does for the group.
    """

    width: int
    first: int
    classes: np.ndarray | None

    def count(self, kept: Sequence[int], counts: np.ndarray) -> None:
        if self.classes is None:
            counts[self.first] = len(kept)
            return
        found = np.bincount(self.classes[np.asarray(kept)], minlength=self.classes.max() + 1)
        counts[self.first : self.first + len(found)] = found


@dataclass(frozen=True, eq=False)
class Widths:
    """All widths: ``offsets + multiplicity @ channels kept of each class``. Row 0 is the constant 1."""

    rows: Mapping[Width, int]
    offsets: np.ndarray
    multiplicity: np.ndarray
    channels: Mapping[LayerAxis, _Channels]

    @classmethod
    def learn(
        cls, original: Mapping[Width, int], groups: Iterable[ChannelGroup], followers: Iterable[Follower]
    ) -> Widths:
        """Build from the original widths, the groups that may shrink, and the calls that their channels pass."""
        rows = {width: row for row, width in enumerate(original, start=1)}
        channels, columns, first = {}, [np.zeros((len(rows) + 1, 0), dtype=np.int64)], 0
        for root, found in _occurrences(groups, followers, original).items():
            patterns, classes = np.unique(np.stack(list(found.values())), axis=1, return_inverse=True)
            column = np.zeros((len(rows) + 1, patterns.shape[1]), dtype=np.int64)
            column[[rows[width] for width in found]] = patterns
            channels[root] = _Channels(classes.size, first, classes.ravel() if patterns.shape[1] > 1 else None)
            columns.append(column)
            first += patterns.shape[1]
        shrinking = cls(rows, np.zeros(len(rows) + 1, dtype=np.int64), np.concatenate(columns, axis=1), channels)
        return replace(shrinking, offsets=np.array([1, *original.values()]) - shrinking.at({}))

    def at(self, kept: Mapping[LayerAxis, Sequence[int]]) -> np.ndarray:
        """Return every width where the groups with these roots keep these channels and all others are whole."""
        counts = np.zeros(self.multiplicity.shape[1], dtype=np.int64)
        for root, channels in self.channels.items():
            channels.count(kept.get(root, range(channels.width)), counts)
        return self.offsets + self.multiplicity @ counts


def _occurrences(
    groups: Iterable[ChannelGroup], followers: Iterable[Follower], widths: Container[Width]
) -> dict[LayerAxis, dict[Width, np.ndarray]]:
    """Count, for each group, how often each of its channels occurs in each width, numbers of heads among them."""
    found: dict[LayerAxis, dict[Width, np.ndarray]] = {}
    for group in groups:
        here = found.setdefault(group.root, {})
        counted = (member for member in group.attributes if member.axis in widths)
        for member in (*group.members, *counted):
            here[member.axis] = here.get(member.axis, 0) + np.bincount(member.channels, minlength=group.width)
    for follower in followers:
        if follower.root in found:
            here, axis = found[follower.root], (*follower.call, follower.dim)
            here[axis] = here.get(axis, 0) + np.array(follower.positions)
    return found


@dataclass(frozen=True, eq=False, repr=False)
class CostModel:
    """The cost of every plan for one model, by arithmetic. Built and proven by :func:`cost_model`.

    ``original`` is the cost of the model itself. ``fixed``: each group that cannot shrink, its width and why.
    """

    original: Cost
    fixed: Mapping[LayerAxis, tuple[int, str]]
    examples: int
    widths: Widths
    macs: Terms
    params: Terms
    callers: tuple[str, ...]
    owners: tuple[str, ...]

    def of(self, plan: Plan) -> Cost:
        """Return exactly what ``cost(prune(model, plan), example_inputs)`` returns.

        Raises:
            CostModelError: the plan has a group that the model lacks, or prunes one that cannot shrink.
        """
        widths = self._widths(plan)
        return Cost(self.macs.total(widths) / self.examples, self.params.total(widths))

    def by_layer(self, plan: Plan) -> pd.DataFrame:
        """Return what each layer costs where a plan is carried out; raise as `of` does.

        Columns "layer", "MACs" (of one example) and "parameters", which add up to what `of` returns. Layers with MACs
        come in the order in which they run, then those that have parameters alone.
        """
        widths = self._widths(plan)
        macs = pd.Series(self.macs.by_item(widths), self.callers, dtype=float) / self.examples
        params = pd.Series(self.params.by_item(widths), self.owners, dtype=int)
        layers = pd.Index(dict.fromkeys((*self.callers, *self.owners)), name="layer")
        sums = {"MACs": macs.groupby(level=0).sum(), "parameters": params.groupby(level=0).sum()}
        found = {name: numbers.reindex(layers, fill_value=0) for name, numbers in sums.items()}
        return pd.DataFrame(found).reset_index()

    def _widths(self, plan: Plan) -> np.ndarray:
        kept = {}
        for group, channels in zip(plan.groups, plan.kept, strict=True):
            known = self.widths.channels.get(group.root)
            width, reason = (known.width, "") if known else self.fixed.get(group.root, (0, ""))
            if width != group.width:
                there = f"is {width} wide" if width else "does not exist"
                raise CostModelError(f"group {group.root}, {group.width} wide in the plan, {there} in the costed model")
            if reason and len(channels) < width:
                way_out = f"keep it whole with ignore=['{group.root.layer}']"
                raise CostModelError(f"the plan prunes group {group.root}, but {reason}; {way_out}")
            kept[group.root] = channels
        return self.widths.at(kept)

    def __repr__(self) -> str:
        return f"CostModel({self.original!r}; {len(self.widths.channels)} groups may shrink, {len(self.fixed)} may not)"


def cost_model(model: nn.Module, example_inputs: Any, *, whole_heads: bool = False) -> CostModel:
    """Learn what every plan for a model costs, so that ``.of(plan)`` is arithmetic.

    The model is traced; then pruned copies of it (every group cut by a random amount, the same in every run) are run
    and compared with the prediction, call by call and parameter by parameter.

    Args:
        model: any module that `find_groups` can trace; it is left unchanged.
        example_inputs: as for :func:`obc_tools.costs.cost`.
        whole_heads: for plans of groups that were found so (see `find_groups`).

    Raises:
        CostModelError: the MACs of a module or the size of a parameter cannot be predicted; it is named.
        ValueError: as `find_groups` and `cost` raise.
    """
    trace = trace_groups(model, example_inputs, whole_heads=whole_heads)
    calls = count_calls(copy.deepcopy(model), example_inputs)
    fixed = {group.root: why for group in trace.groups if (why := _why_whole(group))}
    failures, probes = _run_probes(model, example_inputs, [g for g in trace.groups if g.root not in fixed])
    fixed |= failures
    groups = [group for group in trace.groups if group.root not in fixed]

    axes = _axes(model)
    original = {axis: entry.width for axis, entry in axes.items()} | head_counts(model)
    followers = _counted_followers(calls, groups, trace.followers)
    shapes = {(call.layer, call.number): call.output for call in calls}
    original |= {(*follower.call, follower.dim): shapes[follower.call][follower.dim] for follower in followers}
    widths = Widths.learn(original, groups, followers)
    macs = Terms.stack([macs_terms(get_layer(model, call.layer), call, original) for call in calls], widths.rows)
    params = Terms.stack(parameter_terms(model, axes), widths.rows)
    for probe in probes:
        _compare(model, calls, probe, macs.by_item(widths.at(probe.kept)), params.by_item(widths.at(probe.kept)))

    whole = {group.root: (group.width, fixed[group.root]) for group in trace.groups if group.root in fixed}
    examples = example_count(example_inputs)
    cost = Cost(sum(call.macs for call in calls) / examples, parameter_count(model))
    owners = tuple(name if (name, "out") in axes else name.rpartition(".")[0] for name, _ in model.named_parameters())
    return CostModel(cost, whole, examples, widths, macs, params, tuple(call.layer for call in calls), owners)


def _why_whole(group: ChannelGroup) -> str:
    if group.kept_whole is None and group.width < 2 * group.blocks:
        return "it is too narrow to lose a channel"
    return group.kept_whole or ""


@dataclass(frozen=True)
class _Probe:
    """A pruned copy that was run: the channels that groups kept, the calls, the sizes of the parameters."""

    kept: Mapping[LayerAxis, tuple[int, ...]]
    calls: Sequence[Call]
    sizes: Sequence[int]

    @classmethod
    def run(cls, model: nn.Module, example_inputs: Any, groups: Sequence[ChannelGroup], seed: int) -> _Probe:
        random = np.random.default_rng(seed)
        kept = {group: _random_cut(group, random) for group in groups}
        pruned = shrink_model(model, kept_positions(kept))
        sizes = [pruned.get_parameter(name).numel() for name, _ in model.named_parameters()]
        return cls(
            {group.root: channels for group, channels in kept.items()}, count_calls(pruned, example_inputs), sizes
        )


def _run_probes(
    model: nn.Module, example_inputs: Any, groups: Sequence[ChannelGroup]
) -> tuple[dict[LayerAxis, str], list[_Probe]]:
    """Run pruned copies; return why single groups cannot be cut, if some cannot, and the probes of all others."""
    try:
        return {}, [_Probe.run(model, example_inputs, groups, seed) for seed in range(PROBES)]
    except Exception as error:
        failures = _find_failures(model, example_inputs, groups, error)
    working = [group for group in groups if group.root not in failures]
    try:
        return failures, [_Probe.run(model, example_inputs, working, seed) for seed in range(PROBES)]
    except Exception as error:
        raise CostModelError(f"the model does not run with all its groups pruned together: {error}") from error


def _find_failures(
    model: nn.Module, example_inputs: Any, groups: Sequence[ChannelGroup], error: Exception
) -> dict[LayerAxis, str]:
    """Say why single groups of these, which cannot be cut together, cannot be cut, by halving."""
    if len(groups) < 2:
        return {group.root: f"the model does not run then ({type(error).__name__}: {error})" for group in groups}
    failures = {}
    for half in (groups[: len(groups) // 2], groups[len(groups) // 2 :]):
        try:
            for seed in range(PROBES):
                _Probe.run(model, example_inputs, half, seed)
        except Exception as narrower:
            failures |= _find_failures(model, example_inputs, half, narrower)
    return failures


def _random_cut(group: ChannelGroup, random: np.random.Generator) -> tuple[int, ...]:
    """Keep at least half of a group's channels but not all, the same positions in each of its blocks."""
    size = group.width // group.blocks
    inside = np.sort(random.permutation(size)[: random.integers(size // 2, size)])
    return tuple((np.arange(group.blocks)[:, None] * size + inside).ravel().tolist())


def _axes(model: nn.Module) -> dict[LayerAxis, Axis]:
    """Return all axes of all layers, bare parameters and bare buffers that the table of layer types describes."""
    found = {}
    for name, module in ((name, module) for name, module in model.named_modules() if own_tensors(module)):
        try:
            found.update({LayerAxis(name, key): axis for key, axis in layer_axes(module, name).items()})
        except UnknownLayerError:
            for leaf, tensor in own_tensors(module).items():
                full = f"{name}.{leaf}" if name else leaf
                found.update({LayerAxis(full, key): axis for key, axis in all_axes(tensor, full).items()})
    return found


def _counted_followers(
    calls: Sequence[Call], groups: Iterable[ChannelGroup], followers: Iterable[Follower]
) -> list[Follower]:
    """Return the followers of groups that may shrink on the calls that count."""
    counted, roots = {(call.layer, call.number) for call in calls}, {group.root for group in groups}
    return [follower for follower in followers if follower.call in counted and follower.root in roots]


def _compare(model: nn.Module, calls: Sequence[Call], probe: _Probe, macs: Sequence[int], sizes: Sequence[int]) -> None:
    """Raise CostModelError unless a pruned copy made the same calls, with the predicted MACs and parameters."""
    made, expected = ([(call.layer, call.number) for call in made] for made in (probe.calls, calls))
    if made != expected:
        odd = sorted({name for name, _ in set(made).symmetric_difference(expected)})
        raise CostModelError(f"modules {odd} run in another order or number in a pruned copy of the model")
    for call, found, predicted in zip(calls, probe.calls, macs, strict=True):
        if found.macs != predicted:
            kind = type(get_layer(model, call.layer)).__name__
            raise CostModelError(
                f"module {call.layer!r} ({kind}), call {call.number}: {found.macs} MACs in a pruned copy, {predicted} "
                f"predicted; its output shrinks from {call.output} to {found.output}, and its channels are not followed"
            )
    for (name, _), found, predicted in zip(model.named_parameters(), probe.sizes, sizes, strict=True):
        if found != predicted:
            raise CostModelError(f"parameter {name!r}: {found} numbers in a pruned copy, {predicted} predicted")
