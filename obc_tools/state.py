"""Call a model, borrow its state and give it back: train/eval mode, requires_grad, hooks."""

from __future__ import annotations

import copy
import os
import sys
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_weight_norm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import register_pytree_node, tree_leaves, tree_map


class Restoring:
    """Puts borrowed state back, last first, when a `with` block ends, however it ends; the block is given ``lent``.

    Should Ctrl-C come while it does so, or before the block begins, it is done once nothing refers to this any more.
    """

    undo: Sequence[Callable[[], Any]] = ()

    def __init__(self, lent: Any = None, undo: Iterable[Callable[[], Any]] = ()):
        self.lent, self.undo = lent, [*undo]

    def __enter__(self) -> Any:
        return self.lent

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Put everything back."""
        while self.undo:
            self.undo[-1]()  # stays in the list until it is done: who is interrupted does it again
            self.undo.pop()

    __del__ = close


def within(*managers: AbstractContextManager) -> Restoring:
    """Enter context managers together. At the end of a `with` block Ctrl-C could keep others from being left."""
    restoring = Restoring()
    for manager in managers:
        manager.__enter__()
        restoring.undo.append(partial(manager.__exit__, None, None, None))
    return restoring


def check_module(model: Any) -> None:
    """Raise ValueError for what is no network."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a network (nn.Module), not {type(model).__name__}")


class _Randomness:
    """torch's generators of random numbers, which are the process's."""


RANDOMNESS = _Randomness()
_PROCESS = threading.Condition()
_HOLDERS: WeakKeyDictionary[Any, list[list[int]]] = WeakKeyDictionary()
"""What is borrowed -> the turns of those that have it, each a list of its thread."""
_AWAITED: dict[int, Sequence[Any]] = {}
"""Thread -> what it waits for."""


def alone(*borrowed: Any) -> Restoring:
    """Borrow models, or `RANDOMNESS`, as the one thread that does so: others, which would meet them changed, wait.

    It waits for all of them at once. A thread takes what it has already as often as it likes.

    Raises:
        ValueError: for what is no network, and where each thread of several has what the next one waits for.
    """
    for entry in borrowed:
        if entry is not RANDOMNESS:
            check_module(entry)
    turn = [threading.get_ident()]
    restoring = Restoring(borrowed[0], [partial(_give_back, borrowed, turn)])
    with _PROCESS:
        try:
            _AWAITED[turn[0]] = borrowed
            while _others(*turn):
                if _wait_for_each_other(*turn):
                    raise ValueError(
                        "a thread uses what this one waits for (a model, or torch's random numbers), and waits for "
                        "what this one uses: call one after the other"
                    )
                _PROCESS.wait()
            for entry in borrowed:
                _HOLDERS.setdefault(entry, []).append(turn)
        finally:
            _AWAITED.pop(turn[0], None)
    return restoring


def _others(thread: int) -> set[int]:
    """Return the other threads that have something of what a thread waits for."""
    return {turn[0] for entry in _AWAITED.get(thread, ()) for turn in _HOLDERS.get(entry, ())} - {thread}


def _wait_for_each_other(thread: int) -> bool:
    seen: set[int] = set()
    while new := {other for known in (thread, *seen) for other in _others(known)} - seen:
        seen |= new
    return thread in seen


def _give_back(borrowed: Sequence[Any], turn: list[int]) -> None:
    with _PROCESS:
        for entry in borrowed:
            _HOLDERS[entry] = [other for other in _HOLDERS.get(entry, ()) if other is not turn]
        _PROCESS.notify_all()


def _begin_in_a_child() -> None:
    """Forget, in a process that was forked, those threads that it does not have."""
    _PROCESS.__init__()
    _AWAITED.clear()
    for entry, turns in list(_HOLDERS.items()):
        _HOLDERS[entry] = [turn for turn in turns if turn[0] == threading.get_ident()]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_in_a_child)


class LentRandomness(Restoring):
    """Borrows torch's generators of the CPU and of one device, `alone`, from a seed on or from a state of the CPU's."""

    def __init__(self, begin: int | Tensor | None = None, device: torch.device | None = None):
        super().__init__()
        self._device = device = device or torch.device("cpu")
        self._borrow()
        if isinstance(begin, Tensor):
            torch.set_rng_state(begin)
        elif begin is not None:
            torch.default_generator.manual_seed(begin)
            if device.type != "cpu":
                with torch.accelerator.device_index(device.index):
                    torch.get_device_module(device).manual_seed(begin)

    def _borrow(self) -> None:
        turn = alone(RANDOMNESS)
        self.undo += [turn.close, partial(set_random_state, random_state(self._device), self._device)]

    @contextmanager
    def given_back(self) -> Iterator[None]:
        """Give the generators back while a block lasts; go on with the numbers that would have come."""
        own = random_state(self._device)
        self.close()
        try:
            yield
        finally:
            self._borrow()
            set_random_state(own, self._device)

    def let_others(self) -> None:
        """Let other threads that wait for the generators have them for once."""
        if RANDOMNESS in chain.from_iterable(_AWAITED.copy().values()):
            with self.given_back():
                time.sleep(SECONDS_FOR_OTHERS)


SECONDS_FOR_OTHERS = 1e-4


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's generators of the CPU and of one device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Bring back what :func:`random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"], device)


def evaluating(*models: nn.Module) -> Restoring:
    """Put every module into eval mode, `alone`; on the way out each gets its own mode back, also after an exception."""
    restoring = alone(*models)
    for model in models:
        restoring.undo += [partial(setattr, module, "training", module.training) for module in model.modules()]
        model.eval()
    return restoring


def differentiable(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Restoring:
    """Make exactly the given parameters of a model require grad; restore every parameter's flag on the way out."""
    wanted, again = set(parameters), [partial(p.requires_grad_, p.requires_grad) for p in model.parameters()]
    restoring = Restoring(undo=[*again, partial(torch.set_grad_enabled, torch.is_grad_enabled())])
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in wanted)
    torch.set_grad_enabled(True)
    return restoring


def hooks(handles: Iterable[torch.utils.hooks.RemovableHandle]) -> Restoring:
    """Remove the given hooks on the way out, also after an exception; they are registered best while this iterates."""
    restoring = Restoring()
    restoring.undo.extend(map(attrgetter("remove"), handles))
    return restoring


_SHARED: dict[str, tuple[Callable[[], Any], set[object]]] = {}
"""What is changed now for the whole process: how to put it back, and for whom it is changed."""


def shared(name: str, change: Callable[[], Any], back: Callable[[], Any]) -> Restoring:
    """Change a setting of the whole process, which the last of the threads that need it puts back as the first met it.

    Both functions may be called several times; `back` is made before the change.
    """
    restoring, user = Restoring(), object()
    with _PROCESS:
        restoring.undo.append(partial(_leave, name, user))
        _SHARED.setdefault(name, (back, set()))[1].add(user)
        change()
    return restoring


def _leave(name: str, user: object) -> None:
    with _PROCESS:
        back, users = _SHARED.get(name, (None, {user}))
        users.discard(user)
        if back is not None and not users:
            back()
            del _SHARED[name]


def no_fused_attention() -> Restoring:
    """Keep torch from its fused transformer kernels: they have no backward, and their parts cannot be seen."""
    backend = torch.backends.mha
    back = partial(backend.set_fastpath_enabled, backend.get_fastpath_enabled())
    return shared("fused attention", partial(backend.set_fastpath_enabled, False), back)


def flushing_denormals() -> Restoring:
    """Let this thread take numbers that are too small for full precision, and slow, as zero."""
    restoring = Restoring(undo=[partial(torch.set_flush_denormal, sys.float_info.min / 2 == 0)])
    torch.set_flush_denormal(True)
    return restoring


def stand_in(layer: nn.Module, tensors: Mapping[str, Tensor]) -> Restoring:
    """Let a layer use other tensors in the place of parameters; it has its own again on the way out."""
    restoring = Restoring(undo=[partial(layer._parameters.update, dict(layer._parameters))])
    layer._parameters.update(tensors)
    return restoring


def passing(layer: nn.Module) -> Restoring:
    """Let a layer give what it takes."""
    return calling(layer, lambda taken: taken)


def calling(layer: nn.Module, forward: Callable[..., Any]) -> Restoring:
    """Let another function be what a module does when it is called."""
    own = vars(layer)
    again = partial(own.update, forward=own["forward"]) if "forward" in own else partial(own.pop, "forward", None)
    restoring = Restoring(undo=[again])
    layer.forward = forward
    return restoring


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


class Wrapped(nn.Module):
    """A model that a function runs, ``run(model, inputs)``, for whatever takes modules alone."""

    def __init__(self, model: nn.Module, run: Callable[[nn.Module, Any], Any]):
        super().__init__()
        self.model, self._run = model, run

    def forward(self, inputs: Any) -> Any:
        """Return what the function returns."""
        return self._run(self.model, inputs)


@contextmanager
def running(model: nn.Module, inputs: Any, where: Callable[[], str]) -> Iterator[None]:
    """Say of whatever keeps a model from running on inputs where, and how these differ from what the model takes.

    Errors that the library or a user's own code raises, and those of a full memory, pass.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, ValueError) and not is_torchs(error):
            raise
        name, said = type(model).__name__, misfit(model, inputs, error)
        raise ValueError(f"{where()}: {name} cannot work on {shapes(inputs)}: {said}") from error


def is_torchs(error: Exception) -> bool:
    """Say whether torch raised an error."""
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(os.path.dirname(torch.__file__))


def misfit(model: nn.Module, inputs: Any, error: Exception) -> str:
    """Say how the tensors of inputs differ from a model's parameters or, where they do not, what the error says."""
    parameters = [*model.parameters()]
    leaves = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if "more than 1 value per channel" in str(error):
        return "a batch norm in train mode needs two values a channel; make batches larger, or drop_last=True"
    for name in ("device", "dtype"):
        here = {getattr(parameter, name) for parameter in parameters}
        if len(here) > 1:
            return f"its parameters have several {name}s: {', '.join(sorted(map(_short, here)))}"
        there = {getattr(leaf, name) for leaf in leaves if name == "device" or leaf.is_floating_point()}
        if here and there - here:
            return f"{name} {_short((there - here).pop())}, the model's is {_short(*here)}"
    if not leaves:
        return "there is no tensor among them"
    if leaves[0].dim() > 3 and not leaves[0].is_floating_point():
        kind = "complex" if leaves[0].is_complex() else "whole"
        return f"images of {kind} numbers; make them floating point numbers and normalise them"
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _short(name: Any) -> str:
    return str(name).removeprefix("torch.")


def shapes(batch: Any) -> str:
    """Describe the tensors in a batch, such as "(8, 3, 32, 32) float32"."""
    if isinstance(batch, Forward):
        return shapes(batch.inputs)
    if isinstance(batch, Tensor):
        return f"{tuple(batch.shape)} {_short(batch.dtype)}"
    if isinstance(batch, Mapping):
        return ", ".join(f"{key}: {shapes(value)}" for key, value in batch.items())
    if isinstance(batch, tuple | list):
        rest = [f"{len(batch) - 4} more"] if len(batch) > 5 else []
        return ", ".join([*map(shapes, batch[: 4 if rest else None]), *rest]) or "nothing"
    return type(batch).__name__


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
    """Raise ValueError for a wrapped model, whose layers have other names than the plan's, or cannot be read."""
    check_module(model)
    name = type(model).__name__
    if name in WRAPPERS and hasattr(model, WRAPPERS[name]):
        raise ValueError(f"the model is wrapped in a {name}: give the model itself, model.{WRAPPERS[name]}")
    for name, module in model.named_modules():
        where = f"layer {name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{where} is compiled by torch.jit: give the model before it was scripted or traced")
        whole = [p for p in module.parameters(recurse=False) if not p.is_floating_point() and not p.is_complex()]
        if whole or ".quantized" in type(module).__module__:
            raise ValueError(f"{where} is quantised: give the model before that, and quantise what is pruned")


def own_inputs(inputs: Any) -> Any:
    """Return example inputs with copies of their tensors: a model may write into what it is given."""
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, inputs)


TABLES = (dict, OrderedDict, set)


def without_weight_norms(model: nn.Module) -> nn.Module:
    """Return a model or, where weights in it are learned by length and direction, its copy with these weights plain.

    Both of torch's weight norms (Salimans and Kingma 2016). The copy computes the same, and shares all other tensors.
    """
    check_module(model)
    if not any(True for module in model.modules() for _ in _weight_norms(module)):
        return model
    kept = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    computed = {id(tensor): tensor.detach().clone() for tensor in _computed(model)}
    plain = copy.deepcopy(model, kept | computed)
    for module in plain.modules():
        _make_plain(module, dict(_weight_norms(module)))
    return plain


def _weight_norms(module: nn.Module) -> Iterator[tuple[str, bool]]:
    """Yield the name of each weight of a module that is learned by length and direction, and whether it trains."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            yield hook.name, any(module._parameters[f"{hook.name}_{part}"].requires_grad for part in "gv")
    made = module.parametrizations if parametrize.is_parametrized(module) else {}
    if all(type(step).__name__ == "_WeightNorm" for steps in made.values() for step in steps):
        yield from ((name, any(part.requires_grad for part in steps.parameters())) for name, steps in made.items())


@torch.no_grad()
def _make_plain(module: nn.Module, trained: Mapping[str, bool]) -> None:
    """Let a module hold these weights instead of their lengths and directions, in place."""
    weights = {name: getattr(module, name) for name in trained if parametrize.is_parametrized(module, name)}
    if weights:
        # torch's own removal would take the weights from the class, which the model that was copied has too.
        del module._modules["parametrizations"]
        module.__class__ = type(module).__bases__[0]
    for name, trains in trained.items():
        if name in weights:
            setattr(module, name, nn.Parameter(weights[name]))
        else:
            remove_weight_norm(module, name)
        module._parameters[name].requires_grad_(trains)


def copy_borrowing(model: nn.Module) -> tuple[nn.Module, list[nn.Parameter]]:
    """Return a deep copy of a model and those of its parameters that lie in the memory of the model's.

    Whoever writes into one of them gives it memory of its own before.
    """
    check_module(model)
    with alone(model):
        plain = [parameter for parameter in model.parameters() if type(parameter) is nn.Parameter]
        borrowed = {id(parameter): nn.Parameter(parameter.detach(), parameter.requires_grad) for parameter in plain}
        # Every module keeps some ten empty tables of hooks, which deepcopy takes its time over.
        tables = (table for module in model.modules() for table in vars(module).values() if type(table) in TABLES)
        empty = {id(table): type(table)() for table in tables if not table}
        computed = {id(tensor): tensor.detach().clone() for tensor in _computed(model)}
        return copy.deepcopy(model, borrowed | empty | computed), list(borrowed.values())


def copy_of(model: nn.Module) -> nn.Module:
    """Return a deep copy of a model, also of one that keeps tensors which were computed from others."""
    with alone(model):
        return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in _computed(model)})


def _computed(model: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors that modules keep and that are computed from others, which deepcopy refuses.

    Activations of the last pass, and weights that torch's pruning and its older weight norm compute before each.
    """
    for module in model.modules():
        for key, value in vars(module).items():
            if not key.startswith("_") and isinstance(value, Tensor | list | tuple | dict):
                yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and not leaf.is_leaf)


def check_iterable(batches: Any) -> Iterable[Any]:
    """Return batches; raise ValueError for what is none."""
    if not isinstance(batches, Iterable):
        kind = type(batches).__name__
        raise ValueError(f"batches: not a {kind}; pass a list of batches, a DataLoader or data.batches(...)")
    return batches


def numbered(batches: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Iterate over batches with their numbers from 1; raise ValueError when there are none."""
    number = 0
    for number, batch in enumerate(check_iterable(batches), start=1):
        yield number, batch
    if number == 0:
        raise ValueError("the batches yield no data: an empty data set, or an iterator that was already used up")


def keeping_statistics(model: nn.Module) -> Restoring:
    """Put back the running statistics of norms on the way out, should an objective have switched to train mode."""
    norms = (nn.modules.batchnorm._NormBase,)
    buffers = [b for module in model.modules() if isinstance(module, norms) for b in module.buffers(recurse=False)]
    return Restoring(undo=[partial(buffer.copy_, buffer.clone()) for buffer in buffers])
