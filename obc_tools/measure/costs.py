"""MACs and parameters of a model, by one forward pass.

MACs are those of ``torch_pruning.utils.count_ops_and_params``, whose own formulas do the counting here: convolutions
and linear layers with their biases, one or two operations an element for norms, poolings and ReLU- or GELU-like
activation *modules*. Functional operations and all other modules (SiLU, Softmax) count nothing. A module that counts as
a whole (nn.MultiheadAttention, timm's Attention) hides what is inside it; one reached through two parents counts twice.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch_pruning.utils import op_counter

from ..state import Forward, call_model, evaluating, hooks


@dataclass(frozen=True, repr=False)
class Cost:
    """What a model costs: multiply-accumulate operations of one example, and parameters.

    ``macs`` is a whole number where the example inputs hold one example. Of a larger batch it is the mean, slightly
    lower: torch_pruning adds the bias of a linear layer once a batch.
    """

    macs: float
    params: int

    def __post_init__(self):
        if not (self.macs >= 0 and self.params >= 0):
            raise ValueError(f"a cost of {self.macs} MACs and {self.params} parameters; both are at least 0")

    def __repr__(self) -> str:
        return f"{_scaled(self.macs)}MACs, {_scaled(self.params).rstrip()} parameters"

    def to_frame(self) -> pd.DataFrame:
        """Return one row, its columns "MACs" (of one example) and "parameters"."""
        return pd.DataFrame({"MACs": [self.macs], "parameters": [self.params]})

    def _repr_html_(self) -> str:
        return f"<b>{self!r}</b>"


def _scaled(number: float) -> str:
    """Return a number with its unit's prefix: 126.8 M, 0.856 M, 64.00 k."""
    steps = ((1e9, 1e9, "G"), (1e5, 1e6, "M"), (1e3, 1e3, "k"))
    unit, prefix = next(((unit, prefix) for least, unit, prefix in steps if number >= least), (1, ""))
    value = number / unit
    digits = 0 if unit == 1 else 1 if value >= 100 else 2 if value >= 10 else 3
    return f"{value:.{digits}f} {prefix}"


@dataclass(frozen=True)
class Call:
    """One call of a counted module: its number (from 0), its MACs for the whole batch, the shapes it took and gave."""

    layer: str
    number: int
    macs: int
    inputs: tuple[tuple[int, ...], ...]
    output: tuple[int, ...]


def cost(model: nn.Module, example_inputs: Any) -> Cost:
    """Count the MACs of one example and the parameters of a model, exactly as torch_pruning does.

    Args:
        model: any module; a copy of it runs once, in eval mode and without gradients.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments. The MACs are divided by the
            number of examples, the length of the first of them (for a dict torch_pruning does not divide).

    Raises:
        ValueError: inputs without examples, or a call that torch_pruning's formula cannot count.
    """
    calls = count_calls(copy.deepcopy(model), example_inputs)
    return Cost(sum(call.macs for call in calls) / example_count(example_inputs), parameter_count(model))


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


def count_calls(model: nn.Module, example_inputs: Any) -> list[Call]:
    """Run a model once, in eval mode and without gradients, and return every call that counts, in order.

    A call of a module that is reached through several parents is there once a parent, as torch_pruning adds them up.
    """
    times = Counter(_counted_modules(model))
    calls: list[Call] = []
    handles = [
        module.register_forward_hook(_counter(name, times[module], calls))
        for name, module in model.named_modules()
        if module in times
    ]
    with hooks(handles), evaluating(model), torch.no_grad():
        call_model(model, example_inputs)
    return calls


def _counted_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Iterate over the modules that torch_pruning adds up: it does not look inside one that it counts."""
    if formula(module):
        yield module
        return
    for child in module.children():
        yield from _counted_modules(child)


def formula(module: nn.Module) -> Callable[..., None] | None:
    """Return torch_pruning's counting hook for a module, or None if the module counts nothing by itself."""
    kind = type(module)
    return op_counter.CUSTOM_MODULES_MAPPING.get(kind) or op_counter.MODULES_MAPPING.get(kind)


def _counter(name: str, times: int, calls: list[Call]) -> Callable[..., None]:
    """Return a forward hook that appends a Call; torch_pruning's formulas add to the attribute ``__flops__``."""
    numbers = itertools.count()

    def count(module: nn.Module, inputs: tuple, output: Any) -> None:
        module.__flops__ = 0
        try:
            formula(module)(module, inputs, output)
        except (AttributeError, IndexError, TypeError, ValueError, AssertionError) as error:
            kind = type(module).__name__
            raise ValueError(f"module {name!r} ({kind}): torch_pruning cannot count its call, {error!r}") from error
        shapes = [tuple(leaf.shape) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        first = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        macs = module.__dict__.pop("__flops__")
        calls.extend([Call(name, next(numbers), macs, tuple(shapes), tuple(first.shape))] * times)

    return count
