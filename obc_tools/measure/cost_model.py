"""The cost of any plan for a model by arithmetic alone: no pruned copy, no forward pass.

MACs and parameters are terms in the widths of layer axes (`measure/cost_model.py`), and a width is linear in how
many channels the groups keep. So a plan's cost is a product of small integer matrices with these numbers. All of it is
deduced from one trace, and proven on real pruned copies before it is handed out.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pandas as pd
from torch import nn
from torch_pruning.utils import op_counter

from ..structure.groups import ChannelGroup, Follower, kept_positions, trace_groups
from ..structure.layers import (
    Axis,
    LayerAxis,
    UnknownLayerError,
    all_axes,
    get_layer,
    kernel_dims,
    layer_axes,
    layer_type,
    own_tensors,
)
from ..structure.shrinking import shrink_model
from .costs import Call, Cost, count_calls, example_count, formula, parameter_count

CallAxis = tuple[str, int, int]
"""A dimension of what a call gave: the module's name, the call's number, the dimension."""

Width = LayerAxis | CallAxis
"""What has a width: an axis of a layer, an attention's heads, a dimension of what a call of a module gave."""

Factor = tuple[Width, int]
"""x and d, standing for ⌊x / d⌋."""

Term = tuple[int, tuple[Factor, ...]]
"""The coefficient a and the factors."""


@dataclass(frozen=True, eq=False)
class Terms:
    """Terms for all items (calls, parameters) at once.

    ``rows`` says where the factors of each term lie in the vector of widths, ``divisors`` by what they are divided,
    both of shape (terms, most factors).
    """

    coefficient: np.ndarray
    rows: np.ndarray
    divisors: np.ndarray
    item: np.ndarray

    @classmethod
    def stack(cls, items: Iterable[Sequence[Term]], rows: Mapping[Width, int]) -> Terms:
        """Build from the terms of each item and each width's row; row 0 is the constant 1."""
        table = [(item, *term) for item, terms in enumerate(items) for term in terms]
        most = max((len(factors) for _, _, factors in table), default=0)
        padded = [
            [*((rows[width], divisor) for width, divisor in factors), *[(0, 1)] * most][:most]
            for _, _, factors in table
        ]
        places, divisors = np.array(padded, dtype=np.int64).reshape(len(table), most, 2).transpose(2, 0, 1)
        numbers = np.array([(coefficient, item) for item, coefficient, _ in table], dtype=np.int64).reshape(-1, 2)
        return cls(numbers[:, 0], places, divisors, numbers[:, 1])

    def _values(self, widths: np.ndarray) -> np.ndarray:
        return self.coefficient * (widths[self.rows] // self.divisors).prod(axis=1)

    def total(self, widths: np.ndarray) -> int:
        """Return the sum over all items, in exact integers."""
        return int(self._values(widths).sum())

    def by_item(self, widths: np.ndarray) -> list[int]:
        """Return the sum of each item's terms, in exact integers."""
        sums = np.zeros(self.item[-1] + 1 if self.item.size else 0, dtype=np.int64)
        np.add.at(sums, self.item, self._values(widths))
        return sums.tolist()


def macs_terms(layer: nn.Module, call: Call, widths: Mapping[Width, int]) -> list[Term]:
    """Return the terms of one call's MACs, given the widths that are known and may change.

    It is one constant term for a type without a formula, for one whose width is not among the known, and where the
    formula does not give the MACs that were counted. Whoever uses the terms checks them on pruned copies.
    """
    count = formula(layer)
    if count in _PROPORTIONAL:
        terms = _proportional(layer, call, widths)
    elif count is op_counter.linear_flops_counter_hook:
        terms = _linear(layer, call, widths)
    else:
        terms = _FORMULAS[count](layer, call) if count in _FORMULAS else []
    known = all(width in widths for _, factors in terms for width, _ in factors)
    if terms and known and sum(_value(term, widths) for term in terms) == call.macs:
        return terms
    return [(call.macs, ())]


def _value(term: Term, widths: Mapping[Width, int]) -> int:
    coefficient, factors = term
    return coefficient * math.prod(widths[width] // divisor for width, divisor in factors)


def _proportional(layer: nn.Module, call: Call, widths: Mapping[Width, int]) -> list[Term]:
    axis = LayerAxis(call.layer, "out")
    if axis in widths:
        own = len(call.output) - 1 if layer_type(layer).channels is None and not kernel_dims(layer) else 1
        factors = ((axis, 1), *_passing(call, widths, own))
    else:
        factors = _passing(call, widths)
    return [(call.macs // math.prod(widths[width] for width, _ in factors), factors)]


def _passing(call: Call, widths: Mapping[Width, int], own: int | None = None) -> tuple[Factor, ...]:
    """Return the widths of the dimensions of what a call gave, but for the one of the layer's own channels."""
    dims = (dim for dim in range(len(call.output)) if dim != own)
    return tuple(((call.layer, call.number, dim), 1) for dim in dims if (call.layer, call.number, dim) in widths)


def _convolution(layer: nn.modules.conv._ConvNd, call: Call) -> list[Term]:
    positions = call.inputs[0][0] * math.prod(call.output[2:])
    taps = positions * math.prod(layer.kernel_size)
    out, into = LayerAxis(call.layer, "out"), LayerAxis(call.layer, "in")
    weight = ((out, 1),) if 1 < layer.groups == layer.in_channels else ((into, 1), (out, layer.groups))
    return [(taps, weight), *_bias(layer, positions, out)]


def _linear(layer: nn.Linear, call: Call, widths: Mapping[Width, int]) -> list[Term]:
    out, into = LayerAxis(call.layer, "out"), LayerAxis(call.layer, "in")
    passing = _passing(call, widths, len(call.output) - 1)
    fixed = math.prod(call.inputs[0][:-1]) // math.prod(widths[width] for width, _ in passing)
    return [(fixed, ((into, 1), (out, 1), *passing)), *_bias(layer, 1, out)]


def _bias(layer: nn.Module, times: int, out: LayerAxis) -> list[Term]:
    return [] if layer.bias is None else [(times, ((out, 1),))]


def _recurrent(layer: nn.RNNBase, call: Call) -> list[Term]:
    into = (LayerAxis(f"{call.layer}.weight_ih_l0", "out"), 1)
    directions, gates = 1 + layer.bidirectional, layer.weight_ih_l0.shape[0]
    length, features = call.inputs[0][-2:]
    times = directions * length
    fixed = call.macs // (times * features) - gates * features
    return [(times * fixed, (into,)), (times * gates, (into, into))]


def _torch_attention(layer: nn.MultiheadAttention, call: Call) -> list[Term]:
    batch, length = (0, 1) if layer.batch_first else (1, 0)
    lengths = [shape[length] for shape in call.inputs[:3]]
    width = (LayerAxis(call.layer, "out"), 1)
    heads = (heads_of(call.layer), 1)
    return _attention(heads, call.inputs[0][batch], lengths, layer.in_proj_bias is not None, width, width)


def _timm_attention(layer: nn.Module, call: Call) -> list[Term]:
    batch, length, _ = call.inputs[0]
    into, out = ((LayerAxis(f"{call.layer}.qkv", "in"), 1), (LayerAxis(f"{call.layer}.qkv", "out"), 3))
    return _attention((heads_of(call.layer), 1), batch, [length] * 3, layer.qkv.bias is not None, into, out)


def _attention(
    heads: Factor, batch: int, lengths: Sequence[int], biased: bool, into: Factor, inner: Factor
) -> list[Term]:
    """Return the terms of an attention from a width `into` to the width `inner` of q, k, v and the output."""
    queries, keys, _ = lengths
    pairs = queries * keys
    terms = [
        (queries, (inner,)),
        (sum(lengths), (into, inner)),
        (sum(lengths) * biased, (inner,)),
        (2 * pairs, (inner,)),
        (pairs, (heads,)),
        (queries, (inner, inner)),
        (queries, (inner,)),
    ]
    return [(batch * coefficient, factors) for coefficient, factors in terms]


def heads_of(layer: str) -> LayerAxis:
    """Return what stands for an attention's number of heads among the widths."""
    return LayerAxis(layer, ".num_heads")


def head_counts(model: nn.Module) -> dict[LayerAxis, int]:
    """Return the number of heads of every attention whose MACs depend on it."""
    return {
        heads_of(name): module.num_heads
        for name, module in model.named_modules()
        if _FORMULAS.get(formula(module)) in (_torch_attention, _timm_attention)
    }


_PROPORTIONAL = (
    op_counter.relu_flops_counter_hook,
    op_counter.pool_flops_counter_hook,
    op_counter.bn_flops_counter_hook,
    op_counter.ln_flops_counter_hook,
    op_counter.upsample_flops_counter_hook,
)

_FORMULAS: Mapping[Callable[..., None], Callable[[Any, Call], list[Term]]] = {
    op_counter.conv_flops_counter_hook: _convolution,
    op_counter.multihead_attention_counter_hook: _torch_attention,
    op_counter.timm_multihead_attention_counter_hook: _timm_attention,
    op_counter.rnn_flops_counter_hook: _recurrent,
}


def parameter_terms(model: nn.Module, axes: Mapping[LayerAxis, Axis]) -> Iterator[list[Term]]:
    """Yield one term for the size of each parameter of a model, a shared parameter once, under its first name."""
    factors: dict[str, list[tuple[LayerAxis, int, int]]] = defaultdict(list)
    for axis, entry in axes.items():
        for slot in entry.slots:
            name = ".".join(filter(None, (axis.layer, slot.tensor)))
            factors[name].append((axis, slot.groups, entry.width // slot.groups))
    for name, parameter in model.named_parameters():
        sizes = math.prod(size for _, _, size in factors[name])
        yield [(parameter.numel() // sizes, tuple((axis, groups) for axis, groups, _ in factors[name]))]


PROBES = 2
"""Pruned copies with which a cost model is compared when it is built."""


class CostModelError(ValueError):
    """A module whose cost in a pruned model cannot be predicted, or a plan outside of what was proven."""


class Plan(Protocol):
    """What a cost model reads of a `PruningPlan`."""

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
        example_inputs: as for `cost`.
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
