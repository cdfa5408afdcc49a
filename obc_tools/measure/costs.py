"""What a model costs, and what every plan for it would cost, by arithmetic: no pruned copy, no forward pass.

MACs count what runs (`structure/counting.py`). One trace tells what every operation multiplies and which channels lie
along each dimension, so that a plan's cost is a product of widths an operation. ``counting="torch_pruning"`` is
`torch_pruning.utils.count_ops_and_params`, the count of the paper (Chen et al. 2025): exact module types, norms and
activations included; a plan's is that of a pruned copy.
"""

from __future__ import annotations

import io
import math
import traceback
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence, Sized
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd
import torch
from scipy.sparse import coo_array
from torch import Tensor, nn
from torch_pruning.utils import op_counter

from ..errors import check_name
from ..state import Forward, Wrapped, call_model, check_module, evaluating, hooks, running
from ..structure.counting import Product, count
from ..structure.coupling import Classes
from ..structure.groups import ChannelGroup, find_groups, groups_of, kept_positions, loses_heads
from ..structure.layers import LayerAxis
from ..structure.shrinking import shrink_model
from ..structure.tracing import Traced, trace_model

COUNTINGS = ("operations", "torch_pruning")
"""How MACs are counted."""


@dataclass(frozen=True, repr=False)
class Cost:
    """What a model costs: multiply-accumulate operations of one example, and parameters.

    ``unknown`` names operations that work on weights and that have no formula, "fft in layer 'mix'"; they count 0.
    ``latency``: of a batch in milliseconds, where it is predicted (`latency_model`).
    """

    macs: float
    params: int
    unknown: tuple[str, ...] = field(default=(), compare=False)
    latency: float | None = field(default=None, compare=False)

    def __post_init__(self):
        if not (self.macs >= 0 and self.params >= 0):
            raise ValueError(f"a cost of {self.macs} MACs and {self.params} parameters; both are at least 0")

    def __repr__(self) -> str:
        more = f"; not counted: {', '.join(self.unknown)}" if self.unknown else ""
        return f"{scaled(self.macs)}MACs, {scaled(self.params).rstrip()} parameters{more}"

    def to_frame(self) -> pd.DataFrame:
        """Return one row, its columns "MACs" (of one example) and "parameters"."""
        return pd.DataFrame({"MACs": [self.macs], "parameters": [self.params]})

    def _repr_html_(self) -> str:
        return f"<b>{self!r}</b>"


def scaled(number: float) -> str:
    """Return a number with its unit's prefix: 126.8 M, 0.856 M, 64.00 k."""
    steps = ((1e9, 1e9, "G"), (1e5, 1e6, "M"), (1e3, 1e3, "k"))
    unit, prefix = next(((unit, prefix) for least, unit, prefix in steps if number >= least), (1, ""))
    value = number / unit
    digits = 0 if unit == 1 else 1 if value >= 100 else 2 if value >= 10 else 3
    return f"{value:.{digits}f} {prefix}"


def cost(model: nn.Module, example_inputs: Any, *, counting: str = "operations") -> Cost:
    """Count the MACs of one example and the parameters of a model, by one forward pass in eval mode.

    Args:
        model: any module; it is left unchanged.
        example_inputs: a tensor, a tuple of arguments, a dict of keyword arguments or a `Forward`. The MACs of
            operations that work on the batch are divided by the number of examples, the length of the first input.
        counting: "operations" that run, or "torch_pruning": its own count, which divides all of them.

    Raises:
        ValueError: unknown ``counting``, inputs without examples, or a call that torch_pruning's formula cannot count.
    """
    check_name("counting", counting, COUNTINGS)
    check_module(model)
    examples = example_count(example_inputs)
    with running(model, example_inputs, lambda: "example inputs"):
        if counting == "torch_pruning":
            return _count_modules(model, example_inputs)[0]
        ledger = count(model, example_inputs)
    return Cost(_per_example(ledger.products, examples), parameter_count(model), tuple(ledger.unknown))


def _per_example(products: Iterable[Product], examples: int) -> float:
    sums = [0, 0]
    for product in products:
        sums[product.batched] += product.size
    return sums[0] + sums[1] / examples


def parameter_count(model: nn.Module) -> int:
    """Return the number of parameters, a shared one counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def example_count(example_inputs: Any) -> int:
    """Return the number of examples in example inputs: the length of the first one; raise ValueError if it has none."""
    if isinstance(example_inputs, Forward):
        return example_count(example_inputs.inputs)
    first = example_inputs
    if isinstance(example_inputs, Mapping | tuple | list):
        values = example_inputs.values() if isinstance(example_inputs, Mapping) else example_inputs
        first = next(iter(values), ())
    if not isinstance(first, Sized) or (isinstance(first, Tensor) and not first.dim()):
        raise ValueError("example inputs: the first one is a single value; expected examples along its first axis")
    if not len(first):
        raise ValueError("example inputs: they hold no example")
    return len(first)


class CostModelError(ValueError):
    """A plan that does not fit the model whose costs are known."""


class Plan(Protocol):
    """What a cost model reads of a `PruningPlan`."""

    groups: tuple[ChannelGroup, ...]
    kept: tuple[Sequence[int], ...]


class Kept(NamedTuple):
    """Kept channels that only a cost model looks at, unchecked."""

    groups: tuple[ChannelGroup, ...]
    kept: Sequence[Sequence[int] | np.ndarray]


WHOLE = Kept((), ())
"""What prunes no group."""


@dataclass(frozen=True, eq=False)
class _Widths:
    """The lengths of dimensions, given how many channels of each pattern are gone.

    Classes of channels that occur equally often on every dimension share a pattern: ``pattern`` has the shape
    (classes,), ``occurrences`` (dimensions, patterns), ``whole`` (dimensions,).
    """

    pattern: np.ndarray
    occurrences: np.ndarray
    whole: np.ndarray

    @classmethod
    def learn(cls, dims: Sequence[np.ndarray], count: int) -> _Widths:
        """Build from the classes of the positions of each dimension, of ``count`` in all."""
        rows = np.repeat(np.arange(len(dims)), [found.size for found in dims])
        entries = np.ones(rows.size, dtype=np.int64), (np.concatenate(dims), rows)
        table = coo_array(entries, shape=(count, len(dims))).tocsr()
        # Equal rows of the table have equal sums of random numbers.
        marks = table @ np.random.default_rng(0).integers(1, 2**50, len(dims))
        _, first, pattern = np.unique(marks, return_index=True, return_inverse=True)
        return cls(pattern, table[first].toarray().T, np.asarray(table.sum(axis=0)))

    def without(self, gone: np.ndarray) -> np.ndarray:
        return self.whole - self.occurrences @ gone


@dataclass(frozen=True, eq=False)
class _Terms:
    """Products of widths: ``coefficient`` times all ⌊width / divisor⌋; ``owners`` names each one's layer.

    ``rows`` are the dimensions of each term, ``divisors`` what they are divided by, both of shape (terms, most
    factors), row 0 the constant 1.
    """

    owners: tuple[str, ...]
    batched: np.ndarray
    coefficient: np.ndarray
    rows: np.ndarray
    divisors: np.ndarray

    @classmethod
    def of(cls, products: Sequence[Product], rows: Mapping[bytes, int], classes: Classes) -> _Terms:
        known = [[factor for factor in product.factors if factor.labels is not None] for product in products]
        most = max(map(len, known), default=0)
        places, divisors = np.zeros((len(known), most), dtype=np.int64), np.ones((len(known), most), dtype=np.int64)
        for term, factors in enumerate(known):
            for place, factor in enumerate(factors):
                places[term, place] = rows[_key(factor.labels, classes)]
                divisors[term, place] = factor.divisor
        fixed = [
            math.prod(factor.size // factor.divisor for factor in product.factors if factor.labels is None)
            for product in products
        ]
        batched = np.array([product.batched for product in products], dtype=bool)
        owners = tuple(product.layer for product in products)
        return cls(owners, batched, np.array(fixed, dtype=np.int64), places, divisors)

    def at(self, widths: np.ndarray) -> np.ndarray:
        """Return every term, in exact integers."""
        return self.coefficient * (widths[self.rows] // self.divisors).prod(axis=1)


def _key(labels: np.ndarray, classes: Classes) -> bytes:
    return classes.of(labels.ravel()).tobytes()


@dataclass(frozen=True, eq=False, repr=False)
class CostModel:
    """The cost of every plan for one model, by arithmetic. Built by :func:`cost_model`.

    ``original`` is the cost of the model itself, ``axes`` the classes of channels along every axis of its layers in
    the order in which these first run, ``kinds`` the layers' types.
    """

    original: Cost
    examples: int
    axes: Mapping[LayerAxis, np.ndarray]
    kinds: Mapping[str, str]
    reasons: Mapping[int, str]
    widths: _Widths
    macs: _Terms
    params: _Terms
    channels: dict[tuple, tuple[np.ndarray | int, str | None]] = field(default_factory=dict)
    counting = COUNTINGS[0]

    def of(self, plan: Plan) -> Cost:
        """Return exactly what ``cost(prune(model, plan), example_inputs)`` returns.

        Raises:
            CostModelError: the plan has a group that the model lacks, or prunes one that cannot shrink.
        """
        sizes, params = self.terms(plan)
        batched, once = int(sizes[self.macs.batched].sum()), int(sizes[~self.macs.batched].sum())
        return Cost(once + batched / self.examples, int(params.sum()), self.original.unknown)

    def terms(self, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
        """Return what `macs` and `params` are in a plan, one number a term, MACs of the whole batch."""
        widths = self.widths_of(plan)
        return self.macs.at(widths), self.params.at(widths)

    def by_layer(self, plan: Plan) -> pd.DataFrame:
        """Return what each layer costs where a plan is carried out; raise as `of` does.

        Columns "layer", "MACs" (of one example) and "parameters", which add up to what `of` returns. Layers with MACs
        come in the order in which they run, then those that have parameters alone.
        """
        sizes, params = self.terms(plan)
        macs = sizes / np.where(self.macs.batched, self.examples, 1)
        return _by_layer((self.macs.owners, macs), (self.params.owners, params))

    def layers(self, plan: Plan) -> pd.DataFrame:
        """Return what a plan makes of every layer, as `layers_table` does; raise as `of` does."""
        before, after = self.by_layer(WHOLE), self.by_layer(plan)
        shrunk = kept_positions(dict(zip(plan.groups, plan.kept, strict=True)))
        wide = {axis: (classes.size, len(shrunk.get(axis, classes))) for axis, classes in self.axes.items()}
        layers = list(dict.fromkeys((*(axis.layer for axis in self.axes), *before["layer"])))
        table = pd.DataFrame({"layer": layers, "type": [self.kinds.get(layer, "") for layer in layers]})
        for axis in ("in", "out"):
            pairs = [wide.get(LayerAxis(layer, axis), (None, None)) for layer in layers]
            table[[axis, f"{axis} after"]] = pd.DataFrame(pairs, dtype="Int64")
        for name in ("parameters", "MACs"):
            for column, costs in ((name, before), (f"{name} after", after)):
                table[column] = costs.set_index("layer")[name].reindex(layers, fill_value=0).to_numpy()
        return table

    def widths_of(self, plan: Plan) -> np.ndarray:
        """Return the length of each known dimension in a plan; raise as `of` does."""
        gone = np.zeros(self.widths.occurrences.shape[1], dtype=np.int64)
        for group, channels in zip(plan.groups, plan.kept, strict=True):
            key = group.root, group.width, group.blocks
            if key not in self.channels:
                self.channels[key] = self._patterns(group)
            if len(channels) == group.width:
                continue
            found, reason = self.channels[key]
            if reason:
                raise CostModelError(f"the plan prunes group {group.root}, but {reason} in the costed model")
            size = group.width // group.blocks
            here = channels[: bisect_left(channels, size)]
            if isinstance(found, int):
                gone[found] += size - len(here)
            else:
                np.add.at(gone, np.delete(found, here), 1)
        return self.widths.without(gone)

    def _patterns(self, group: ChannelGroup) -> tuple[np.ndarray | int, str | None]:
        """Return the pattern of each channel of a group's first block, one number where they are alike.

        And why the group cannot shrink, if it cannot.
        """
        member, where = group.members[0], f"group {group.root}, {group.width} wide in the plan,"
        classes = self.axes.get(member.axis)
        if classes is None:
            raise CostModelError(f"{where} does not exist in the costed model")
        if classes.size != member.width:
            raise CostModelError(f"{where} lies on an axis that is {classes.size} wide in the costed model")
        found = np.empty(group.width, dtype=np.int64)
        found[list(member.channels)] = classes[list(member.positions)]
        reason = next((self.reasons[number] for number in found.tolist() if number in self.reasons), None)
        patterns = self.widths.pattern[found[: group.width // group.blocks]]
        return (int(patterns[0]) if (patterns == patterns[0]).all() else patterns), reason

    def __repr__(self) -> str:
        return f"CostModel({self.original!r})"


def _by_layer(macs: tuple[Iterable[str], Any], params: tuple[Iterable[str], Any]) -> pd.DataFrame:
    """Sum up the MACs and the parameters of each layer, given the layers and their numbers."""
    layers = pd.Index(dict.fromkeys((*macs[0], *params[0])), name="layer")
    found = {
        name: pd.Series(numbers, list(owners), dtype=dtype).groupby(level=0).sum().reindex(layers, fill_value=0)
        for name, (owners, numbers), dtype in (("MACs", macs, float), ("parameters", params, int))
    }
    return pd.DataFrame(found).reset_index()


def cost_model(
    model: nn.Module, example_inputs: Any, *, whole_heads: bool = False, counting: str = "operations"
) -> CostModel | ModuleCosts:
    """Learn what every plan for a model costs, so that ``.of(plan)`` is arithmetic.

    Args:
        model: any module that `find_groups` can trace; it is left unchanged.
        example_inputs: as for `cost`.
        whole_heads: for plans of groups that were found so (see `find_groups`).
        counting: "operations", or "torch_pruning": then every plan costs a pruned copy and its forward pass.

    Raises:
        ValueError: as `find_groups` and `cost` raise.
    """
    check_name("counting", counting, COUNTINGS)
    if counting == "torch_pruning":
        return ModuleCosts(model, example_inputs, _count_modules(model, example_inputs)[0])
    traced = trace_model(model, example_inputs, whole_heads=whole_heads)
    return _learn(traced, Classes(traced.flow), example_inputs)


def layers_table(model: nn.Module, plan: Plan, example_inputs: Any = None) -> pd.DataFrame:
    """Tell what a plan makes of every layer: its widths, parameters and MACs before and after.

    Args:
        model: the original, which is left unchanged; nothing is pruned.
        plan: for this model.
        example_inputs: as for `cost`; the MACs are those of one example. Neither a model nor a plan knows any.

    Returns:
        One row a layer in the order in which they first run. Columns: layer, type, in, in after, out, out after
        (channels; missing where a layer has no such axis), parameters, parameters after, MACs, MACs after.

    Raises:
        ValueError: no example inputs, no plan, one that does not fit the model, or a model that `find_groups` cannot
            trace.
    """
    if example_inputs is None:
        raise ValueError(
            "layers_table: MACs and the order of layers are those of a forward pass: pass what one takes as a third "
            "argument, layers_table(model, plan, images[:1])"
        )
    if not hasattr(plan, "kept"):
        raise ValueError(f"layers_table: the second argument is a {type(plan).__name__}; expected a PruningPlan")
    return cost_model(model, example_inputs, whole_heads=loses_heads(plan.groups)).layers(plan)


def analyse(
    model: nn.Module,
    example_inputs: Any,
    *,
    ignore: Iterable[nn.Module | str] = (),
    whole_heads: bool = False,
    only: str | None = None,
    counting: str = "operations",
) -> tuple[tuple[ChannelGroup, ...], CostModel | ModuleCosts]:
    """Return what `find_groups` and `cost_model` return, from one trace."""
    check_name("counting", counting, COUNTINGS)
    if counting == "torch_pruning":
        groups = find_groups(model, example_inputs, ignore=ignore, whole_heads=whole_heads, only=only)
        return groups, cost_model(model, example_inputs, counting=counting)
    traced = trace_model(model, example_inputs, whole_heads=whole_heads)
    classes = Classes(traced.flow)
    return groups_of(model, traced, classes, ignore=ignore, only=only), _learn(traced, classes, example_inputs)


def _learn(traced: Traced, classes: Classes, example_inputs: Any) -> CostModel:
    products, examples = traced.ledger.products, example_count(example_inputs)
    # Row 0 is the constant 1: a class of its own, which never goes.
    rows, dims = {b"": 0}, [np.array([classes.count])]
    for factor in (factor for product in (*products, *traced.parameters) for factor in product.factors):
        if factor.labels is not None and (key := _key(factor.labels, classes)) not in rows:
            rows[key] = len(dims)
            dims.append(classes.of(factor.labels.ravel()))
    params = sum(parameter.size for parameter in traced.parameters)
    return CostModel(
        Cost(_per_example(products, examples), params, tuple(traced.ledger.unknown)),
        examples,
        {axis: classes.of(labels) for axis, labels in traced.axes.items()},
        traced.kinds,
        classes.reasons,
        _Widths.learn(dims, classes.count + 1),
        _Terms.of(products, rows, classes),
        _Terms.of(traced.parameters, rows, classes),
    )


@dataclass(frozen=True, eq=False)
class ModuleCosts:
    """The cost of every plan as torch_pruning counts it: that of a pruned copy. Built by :func:`cost_model`."""

    model: nn.Module
    example_inputs: Any
    original: Cost
    counting = COUNTINGS[1]

    def of(self, plan: Plan) -> Cost:
        """Return what ``cost(prune(model, plan), example_inputs, counting="torch_pruning")`` returns."""
        return _count_modules(self._pruned(plan), self.example_inputs)[0]

    def by_layer(self, plan: Plan) -> pd.DataFrame:
        """Return what each layer costs where a plan is carried out, in the columns "layer", "MACs", "parameters"."""
        pruned = self._pruned(plan)
        macs = _count_modules(pruned, self.example_inputs)[1]
        sizes = {name: parameter.numel() for name, parameter in pruned.named_parameters()}
        owners = [name.rpartition(".")[0] for name in sizes]
        return _by_layer((macs.keys(), list(macs.values())), (owners, list(sizes.values())))

    def _pruned(self, plan: Plan) -> nn.Module:
        kept = {group: tuple(map(int, channels)) for group, channels in zip(plan.groups, plan.kept, strict=True)}
        return shrink_model(self.model, kept_positions(kept))


def _count_modules(model: nn.Module, example_inputs: Any) -> tuple[Cost, dict[str, float]]:
    """Return what torch_pruning counts of a model, and of each of its modules."""
    examples, custom = example_count(example_inputs), op_counter.CUSTOM_MODULES_MAPPING
    called = Wrapped(model, lambda model, batch: call_model(model, example_inputs))
    batch, entered = torch.empty(examples), [("", type(model).__name__)]
    handles = (
        module.register_forward_pre_hook(lambda module, _, name=name: entered.append((name, type(module).__name__)))
        for name, module in model.named_modules()
    )
    try:
        with hooks(handles), evaluating(model), torch.no_grad(), redirect_stdout(io.StringIO()):
            # It divides by the length of what the outermost module is called with.
            macs, _, by_module, _ = op_counter.count_ops_and_params(called, batch, layer_wise=True)
    except (AttributeError, IndexError, TypeError, ValueError, AssertionError) as error:
        if traceback.extract_tb(error.__traceback__)[-1].filename != op_counter.__file__:
            raise
        name, kind = entered[-1]
        raise ValueError(f"module {name!r} ({kind}): torch_pruning cannot count its call, {error!r}") from error
    finally:
        op_counter.CUSTOM_MODULES_MAPPING = custom
    counted = {
        name: by_module[module] / examples
        for name, module in model.named_modules()
        if type(module) in (op_counter.MODULES_MAPPING | custom) and by_module.get(module)
    }
    return Cost(macs, parameter_count(model)), counted
