"""MACs and parameters as terms  a · ⌊x / d⌋ · ⌊y / e⌋ · …  in the widths x, y of layer axes; nearly all have d = e = 1.

What torch_pruning counts for one call, and the terms of it (P: positions, everything but channels and kernel; C_in and
C_out stand for widths):

====================================  ===================================================================
convolution, k: size of the kernel    k·P · C_in · ⌊C_out / groups⌋  +  P · C_out if it has a bias
depthwise convolution                 k·P · C_out  +  P · C_out if it has a bias
linear                                P · C_in · C_out  +  C_out if it has a bias (once, whatever P is)
norm, activation, pooling, upsampling proportional to the widths that it keeps
LSTM, GRU, RNN                        D · L · C_in · (a + b · C_in): torch_pruning takes the features for a length
attention                             scaling, projections, the products with all heads, and the output projection
====================================  ===================================================================

Where positions are channels too (a linear layer over tokens), P is a product of their widths.
The size of a parameter is a constant times the widths along which the table of layer types says it is laid out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from torch_pruning.utils import op_counter

from .costs import Call, formula
from .layers import CHANNELS_LAST, Axis, LayerAxis

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
        own = len(call.output) - 1 if isinstance(layer, CHANNELS_LAST) else 1
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
