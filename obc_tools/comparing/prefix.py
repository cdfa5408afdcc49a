"""The start of a forward pass that several networks share, run once.

What is replayed is what code outside torch sees: the results of torch's functions, in their order. Of those only what
is still in use where the networks part is kept; the others are stood in for by tensors without data, so that whatever
would compute with one fails instead of giving a wrong number.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ..state import calling

logger = logging.getLogger(__name__)
Call = tuple[Callable, list[Any]]
"""A function of torch's and the numbers and names that it was called with."""


class PrefixError(RuntimeError):
    """A forward pass that does not begin as the one before."""


class _Pass(TorchFunctionMode):
    """One forward pass: what is known of its start is replayed, what follows is noted up to the first use of a tensor.

    Those tensors are ``parting``; ``calls`` and ``results`` are given of a pass before, or empty, and held of this one
    after it.
    """

    def __init__(self, calls: list[Call], results: list[Any], parting: Iterable[Tensor]):
        super().__init__()
        self.known, self.kept, self.given = calls, results, copy.deepcopy(results)
        self.parting = {id(tensor) for tensor in parting}
        self.calls: list[Call] = []
        self.results: list[Any] = []
        self.parted = False

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.parted:
            return func(*args, **kwargs)
        leaves, number = tree_leaves((args, kwargs)), len(self.calls)
        if any(id(leaf) in self.parting for leaf in leaves):
            self._part()
            return func(*args, **kwargs)
        call = (func, [leaf for leaf in leaves if not isinstance(leaf, Tensor)])
        if number < len(self.known):
            if self.known[number] != call:
                raise PrefixError(f"call {number} of {getattr(func, '__name__', func)} differs from the pass before")
            result, self.given[number] = self.given[number], None
        else:
            result = func(*args, **kwargs)
        self.calls.append(call)
        self.results.append(tree_map(lambda leaf: weakref.ref(leaf) if isinstance(leaf, Tensor) else leaf, result))
        return result

    def _part(self) -> None:
        if len(self.calls) < len(self.known):
            raise PrefixError(f"the networks part after {len(self.calls)} calls, the pass before after more")
        self.parted, nothing = True, torch.empty(0, device="meta")
        if len(self.calls) == len(self.known):
            self.results = self.kept
        else:
            self.results = copy.deepcopy(tree_map(lambda leaf: _alive(leaf, nothing), self.results))


def _alive(leaf: Any, nothing: Tensor) -> Any:
    if not isinstance(leaf, weakref.ref):
        return leaf
    tensor = leaf()
    return nothing if tensor is None else tensor


class Prefixes:
    """What networks share of the passes over the same batches, by the number of the pass; one start of each is kept."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[list[Call], list[Any]]] = {}

    def measure(self, network: nn.Module, parting: Iterable[Tensor], measured: Callable[[nn.Module], Any]) -> Any:
        """Return what a function makes of a network of our own, whose passes are replayed as far as they are known.

        ``parting``: tensors of the network before whose first use it is as those before. Where a pass cannot be
        replayed, whole ones are run.
        """
        parting, numbers, forward = list(parting), count(), network.forward

        def replayed(*args: Any, **kwargs: Any) -> Any:
            number = next(numbers)
            with _Pass(*self.kept.get(number, ([], [])), parting) as run:
                output = forward(*args, **kwargs)
            if run.parted:
                self.kept[number] = (run.calls, run.results)
            return output

        try:
            with calling(network, replayed):
                return measured(network)
        except Exception as error:
            logger.info("what comes before the group is run again: %s: %s", type(error).__name__, error)
            self.kept.clear()
            return measured(network)


def first_uses(network: nn.Module, measured: Callable[[nn.Module], Any]) -> tuple[Any, dict[str, int]]:
    """Return what a function makes of a network, and when each parameter and buffer is used first, in calls from 0."""
    uses, forward = _Uses(), network.forward

    def noted(*args: Any, **kwargs: Any) -> Any:
        with uses:
            return forward(*args, **kwargs)

    with calling(network, noted):
        found = measured(network)
    named = named_tensors(network).items()
    return found, {name: uses.first[id(tensor)] for name, tensor in named if id(tensor) in uses.first}


def named_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a network by name."""
    parameters = network.named_parameters(remove_duplicate=False)
    return dict([*parameters, *network.named_buffers(remove_duplicate=False)])


class _Uses(TorchFunctionMode):
    """Notes when each tensor is first handed to a function of torch's: ``first``, by its id, in calls from 0."""

    def __init__(self):
        super().__init__()
        self.calls, self.first = 0, {}

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self.first.setdefault(id(leaf), self.calls)
        self.calls += 1
        return func(*args, **(kwargs or {}))
