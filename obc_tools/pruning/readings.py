"""Where a network reads channels by a linear map: which layers do, in which order, and how to stop a pass at them.

A forward pass runs to its end once begun, and hooks inside it cannot wait for another pass. Each `PausableCall` has a
thread of its own, and exactly one thread runs at any time, so that they are generators whose body may pause at any
depth: several forward passes go on side by side, one of them at a time.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ..scoring.capture import _attention_with
from ..state import calling, hooks, no_fused_attention, within
from ..structure.layers import (
    UnknownLayerError,
    activation_dim,
    has_role,
    is_norm,
    is_projection,
    is_standardised,
    layer_axes,
    layer_type,
    own_parameters,
)


@dataclass(frozen=True)
class Reading:
    """One call of a linear map: a layer's, or of the rows of an attention's in_proj that make these parts (q, k, v)."""

    layer: str
    parts: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"layer {self.layer!r}" + (f" ({', '.join('qkv'[part] for part in self.parts)})" if self.parts else "")


@dataclass(frozen=True, eq=False)
class Stop:
    """What a reading took and, where the pass stopped after it, gave."""

    reading: Reading
    inputs: Tensor
    outputs: Tensor | None = None


Visit = Callable[[Stop], None]


@dataclass(frozen=True)
class Survey:
    """What the pass of one batch tells: the readings in running order, and the norms that follow.

    ``norms`` maps a layer to the norm with running statistics that alone reads its outputs. ``plain`` maps a layer that
    reads channels to the reason why its weights cannot be fitted.
    """

    readings: tuple[Reading, ...]
    norms: Mapping[str, str]
    plain: Mapping[str, str]


def linear_map(model: nn.Module, reading: Reading) -> nn.Module:
    """Return the layer of a reading; of an attention, a linear layer on the memory of its in_proj's rows."""
    layer = model.get_submodule(reading.layer)
    if not has_role(layer, "attention"):
        return layer
    width = layer.in_proj_weight.shape[0] // 3
    rows = slice(width * reading.parts[0], width * (reading.parts[-1] + 1))
    linear = nn.Linear(1, 1, bias=layer.in_proj_bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.in_proj_weight.detach()[rows])
    if layer.in_proj_bias is not None:
        linear.bias = nn.Parameter(layer.in_proj_bias.detach()[rows])
    return linear


def readers(model: nn.Module) -> dict[str, str | None]:
    """Return the layers that read channels by a linear map, with the reason why one cannot be fitted, or None."""
    owners = Counter(p for module in model.modules() for p in module._parameters.values() if p is not None)
    found = {}
    for name, layer in model.named_modules():
        if has_role(layer, "embedding"):
            found[name] = "a look-up reads no channels"
        elif is_projection(layer) or has_role(layer, "attention"):
            found[name] = _unfit(layer, name, owners)
    return found


def _unfit(layer: nn.Module, name: str, owners: Counter[nn.Parameter]) -> str | None:
    try:
        layer_axes(layer, name)
    except UnknownLayerError as error:
        return str(error)
    if is_standardised(layer):
        return "its weights are standardised before they are used"
    if not layer_type(layer).mixes:
        return "its type is not linear in what it reads"
    if any(owners[parameter] > 1 for parameter in own_parameters(layer).values()):
        return "its parameters are shared with another layer"
    return None


def survey(model: nn.Module, run: Callable[[], Any]) -> Survey:
    """Run a model once (in eval mode, without gradients) and see which of its linear maps read channels, and when."""
    plain = {name: reason for name, reason in readers(model).items() if reason is not None}
    names = [name for name in readers(model) if name not in plain]
    uses = _Uses()
    seen: list[Reading] = []
    normed: list[tuple[str, str | None]] = []

    def visit(stop: Stop) -> None:
        seen.append(stop.reading)
        uses.made[stop.outputs] = stop.reading.layer

    def visit_norm(name: str, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        source = uses.made.get(inputs[0])
        alike = source is not None and _same_channels(model.get_submodule(source), norm, inputs[0])
        normed.append((name, source if alike else None))

    # Those that take off a running mean in eval mode, channel by channel.
    norms = {name: layer for name, layer in model.named_modules() if is_norm(layer, "examples", "positions")}
    norms = {name: layer for name, layer in norms.items() if layer.running_mean is not None}
    handles = [layer.register_forward_pre_hook(partial(visit_norm, name)) for name, layer in norms.items()]
    with hooks(handles), stopping(model, names, visit, after=True), uses:
        uses.add(run())
    times = Counter(seen)
    plain |= {reading.layer: f"runs {n} times a pass" for reading, n in times.items() if n > 1}
    plain |= {name: "never runs as a module" for name in names if name not in {reading.layer for reading in seen}}
    readings = tuple(reading for reading in seen if reading.layer not in plain)
    once = Counter(name for name, _ in normed)
    following = {source: name for name, source in normed if once[name] == 1 and uses.count[source] == 1}
    return Survey(readings, following, plain)


def _same_channels(layer: nn.Module, norm: nn.Module, between: Tensor) -> bool:
    """Say whether a norm's channels are those of the layer that made what it reads, not a linear layer's tokens."""
    layer = layer.out_proj if has_role(layer, "attention") else layer
    return activation_dim(layer, between) == activation_dim(norm, between)


class _Uses(TorchDispatchMode):
    """Count what takes the outputs of layers: ``made`` maps tensor to layer, ``count`` layer to uses."""

    def __init__(self):
        super().__init__()
        self.made = WeakIdKeyDictionary()
        self.count: Counter[str | None] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.add((args, kwargs or {}))
        return function(*args, **(kwargs or {}))

    def add(self, taken: Any) -> None:
        """Count one use of every output of a layer in what an operation, or whoever called the model, takes."""
        tensors = [leaf for leaf in tree_leaves(taken) if isinstance(leaf, Tensor) and leaf in self.made]
        self.count.update(self.made[tensor] for tensor in tensors)


@contextmanager
def stopping(model: nn.Module, layers: list[str], visit: Visit, *, after: bool) -> Iterator[None]:
    """Call `visit` at every reading of the named layers, before it is computed or, with ``after``, with its outputs.

    Torch's attention calls its projections functionally; its readings are those of `X` (in_proj) and `X.out_proj`.
    """
    modules = {name: model.get_submodule(name) for name in layers}
    inside = {name: f"{name}.out_proj".strip(".") for name, m in modules.items() if has_role(m, "attention")}
    outside = {name: m for name, m in modules.items() if name not in {*inside, *inside.values()}}
    lent = [
        calling(modules[name], _attending(modules[name], name, output if output in modules else None, visit, after))
        for name, output in inside.items()
    ]
    with hooks(list(_hooks(outside, visit, after))), no_fused_attention(), within(*lent):
        yield


def _hooks(modules: Mapping[str, nn.Module], visit: Visit, after: bool) -> Iterator[Any]:
    for name, module in modules.items():

        def seen(_: nn.Module, args: tuple, kwargs: dict, outputs: Tensor | None = None, name: str = name) -> None:
            visit(Stop(Reading(name), args[0] if args else next(iter(kwargs.values())), outputs))

        register = module.register_forward_hook if after else module.register_forward_pre_hook
        yield register(seen, with_kwargs=True)


def _attending(attention: nn.MultiheadAttention, name: str, output: str | None, visit: Visit, after: bool) -> Callable:
    """Return what runs an attention and visits the linear maps in it, the last one if it has a name."""
    forward, rows = attention.forward, attention.in_proj_weight.untyped_storage().data_ptr()

    def seen(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if output is not None and weight is attention.out_proj.weight:
            reading = Reading(output)
        elif weight.untyped_storage().data_ptr() == rows:
            reading = Reading(name, _parts(attention, weight))
        else:
            return F.linear(inputs, weight, bias)
        outputs = F.linear(inputs, weight, bias) if after else None
        visit(Stop(reading, inputs, outputs))
        return F.linear(inputs, weight, bias) if outputs is None else outputs

    functions = {F.multi_head_attention_forward: _attention_with(seen), F.linear: seen}

    def run(*args: Any, **kwargs: Any) -> Any:
        with _Instead(functions):
            return forward(*args, **kwargs)

    return run


class _Instead(TorchFunctionMode):
    """Calls other functions in the place of torch's."""

    def __init__(self, functions: Mapping[Callable, Callable]):
        super().__init__()
        self.functions = functions

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self.functions.get(function, function)(*args, **(kwargs or {}))


def _parts(attention: nn.MultiheadAttention, weight: Tensor) -> tuple[int, ...]:
    """Return which of q, k and v the rows of an in_proj make."""
    width = attention.in_proj_weight.shape[0] // 3
    first = (weight.storage_offset() - attention.in_proj_weight.storage_offset()) // attention.in_proj_weight.shape[1]
    return tuple(range(first // width, (first + weight.shape[0]) // width))


_here = threading.local()


class PausableCall:
    """A call of a function without arguments that stops wherever `pause` is called inside; gradients are off in it.

    A context manager: on the way out, the call is unwound from where it stopped, so that no thread is left.
    """

    def __init__(self, function: Callable[[], Any]):
        self._function = function
        self._go, self._back = threading.Semaphore(0), SimpleQueue()
        self._closing = self._ended = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> PausableCall:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        self._go.release()
        if self._thread.is_alive():  # else it has ended, or ends as soon as it begins
            self._thread.join()

    def resume(self) -> Any:
        """Go on to the next `pause`; return the value given there, or None when the call has come to its end.

        Raises what the call raises.
        """
        if self._ended:
            return None
        if self._thread.ident is None:  # not on the way in: Ctrl-C while it starts would leave it behind
            self._thread.start()
        self._go.release()
        value, error = self._back.get()
        if error is not None:
            raise error
        return value

    def _run(self) -> None:
        self._go.acquire()
        _here.call, raised = self, None
        try:
            if not self._closing:
                with torch.no_grad():
                    self._function()
        except GeneratorExit:
            pass
        except BaseException as error:  # handed on to whoever resumes
            raised = error
        self._ended = True
        self._back.put((None, raised))

    def _pause(self, value: Any) -> None:
        self._back.put((value, None))
        del value
        self._go.acquire()
        if self._closing:
            raise GeneratorExit


def pause(value: Any) -> None:
    """Stop the running `PausableCall` here and hand a value, not None, to whoever resumed it; elsewhere do nothing."""
    call = getattr(_here, "call", None)
    if call is not None:  # none in another thread that happens to run the same network
        call._pause(value)
