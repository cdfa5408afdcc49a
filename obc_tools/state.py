"""Call a model, borrow its state and give it back: train/eval mode, requires_grad, hooks."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node, tree_map


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put every module into eval mode; on the way out each gets its own mode back, also after an exception."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield model.eval()
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def differentiable(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Make exactly the given parameters of a model require grad; restore every parameter's flag on the way out."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    wanted = set(parameters)
    try:
        for parameter in flags:
            parameter.requires_grad_(parameter in wanted)
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


@contextmanager
def hooks(handles: Iterable[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    """Remove the given hooks on the way out, also after an exception."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


@contextmanager
def no_fused_attention() -> Iterator[None]:
    """Keep torch from its fused transformer kernels: they have no backward, and their parts cannot be seen."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@dataclass(frozen=True)
class Forward:
    """Example inputs of a model that is not simply called: `run(model, inputs)` runs it and returns what counts.

    For models with a forward function of their own or an output to be taken apart, wherever example inputs are taken.

    Example:
        >>> find_groups(model, Forward(lambda model, tokens: model(tokens, use_cache=False).logits, tokens))
    """

    run: Callable[[nn.Module, Any], Any]
    inputs: Any


register_pytree_node(
    Forward, lambda forward: ([forward.inputs], forward.run), lambda children, run: Forward(run, *children)
)


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Run a model on example inputs.

    They are one tensor, a tuple or list of arguments, a dict of keyword arguments, or a `Forward`.
    """
    if isinstance(inputs, Forward):
        return inputs.run(model, inputs.inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def logits_of(output: Any) -> Tensor:
    """Return the logits in what a model returned: itself, its ``logits`` or ``out``, or the first of a tuple.

    Raises:
        ValueError: there are none.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits", output.get("out"))
    elif not isinstance(output, Tensor):
        found = getattr(output, "logits", output[0] if isinstance(output, tuple) and output else None)
    if not isinstance(found, Tensor):
        raise ValueError(f"the model returned {type(output).__name__} without logits")
    return found


WRAPPERS = {"DataParallel": "module", "DistributedDataParallel": "module", "FullyShardedDataParallel": "module",
            "OptimizedModule": "_orig_mod"}  # fmt: skip
"""Modules around a model, each with the attribute that holds it."""


def refuse_wrapped(model: nn.Module) -> None:
    """Raise ValueError for a model that is wrapped: its layers have other names than the plan's."""
    name = type(model).__name__
    if name in WRAPPERS and hasattr(model, WRAPPERS[name]):
        raise ValueError(f"the model is wrapped in a {name}: give the model itself, model.{WRAPPERS[name]}")


def own_inputs(inputs: Any) -> Any:
    """Return example inputs with copies of their tensors: a model may write into what it is given."""
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, inputs)


TABLES = (dict, OrderedDict, set)


def copy_borrowing(model: nn.Module) -> tuple[nn.Module, list[nn.Parameter]]:
    """Return a deep copy of a model and those of its parameters that lie in the memory of the model's.

    Whoever writes into one of them gives it memory of its own before.
    """
    plain = [parameter for parameter in model.parameters() if type(parameter) is nn.Parameter]
    borrowed = {id(parameter): nn.Parameter(parameter.detach(), parameter.requires_grad) for parameter in plain}
    # Every module keeps some ten empty tables of hooks, which deepcopy takes its time over.
    tables = (table for module in model.modules() for table in vars(module).values() if type(table) in TABLES)
    empty = {id(table): type(table)() for table in tables if not table}
    return copy.deepcopy(model, borrowed | empty), list(borrowed.values())


def numbered(batches: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Iterate over batches with their numbers from 1; raise ValueError when there are none."""
    number = 0
    for number, batch in enumerate(batches, start=1):
        yield number, batch
    if number == 0:
        raise ValueError("the batches yield no data: an empty data set, or an iterator that was already used up")


@contextmanager
def keeping_statistics(model: nn.Module) -> Iterator[None]:
    """Put back the running statistics of norms on the way out, should an objective have switched to train mode."""
    norms = (nn.modules.batchnorm._NormBase,)
    buffers = [b for module in model.modules() if isinstance(module, norms) for b in module.buffers(recurse=False)]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
