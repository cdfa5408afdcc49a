"""Gates on layers that are never called as modules: attention's projections and bare parameters.

nn.MultiheadAttention hands its weights to torch's functional attention, and a bare parameter meets the activations in
an addition, a product or an expansion. `gated_functions` stands in for those functions while the model runs. A use that
it does not know stays without gate; the check of `rows.FinerRows` sees that something is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .gates import Gates
from .layers import LayerAxis, layer_axes
from .state import no_fused_attention

BROADCASTING = {
    getattr(owner, name)
    for name in ("add", "sub", "mul")
    for owner, name in ((torch, name), (Tensor, name), (Tensor, f"{name}_"), (Tensor, f"__{name}__"))
} | {Tensor.__radd__, Tensor.__rmul__, Tensor.__iadd__, Tensor.__imul__}
"""Element-wise functions before which a bare parameter may be copied once an example."""


@contextmanager
def gated_functions(gates: Gates, model: nn.Module) -> Iterator[None]:
    """Gate the wanted attentions and bare parameters of a model; everything is itself again on the way out."""
    with ExitStack() as stack:
        stack.enter_context(no_fused_attention())
        if names := _attention_weights(gates, model):
            stack.enter_context(_linear_replaced(_Projection(gates, names)))
        if bare := {id(layer): name for name, layer in gates.layers.items() if isinstance(layer, nn.Parameter)}:
            stack.enter_context(_BareParameters(gates, bare))
        yield


@contextmanager
def _linear_replaced(stand_in: Callable) -> Iterator[None]:
    """Let torch's functional attention call `stand_in(linear, input, weight, bias)` where it calls its linear."""
    linear = F.linear
    F.linear = partial(stand_in, linear)
    try:
        yield
    finally:
        F.linear = linear


def _attention_weights(gates: Gates, model: nn.Module) -> dict[int, str]:
    """Return the weights of the attentions that have gates, and the layers that they belong to: id -> name."""
    found = {}
    for name, module in model.named_modules():
        output = f"{name}.out_proj" if name else "out_proj"
        if isinstance(module, nn.MultiheadAttention) and not gates.layers.keys().isdisjoint({name, output}):
            found[id(module.out_proj.weight)] = output
            found |= {id(w): name for w in (module.in_proj_weight, module.q_proj_weight) if w is not None}
    return found


class _Projection:
    """Stand in for torch's linear: gate the projections inside attentions, pass all other calls on."""

    def __init__(self, gates: Gates, names: Mapping[int, str]):
        self.gates, self.names = gates, names
        self.examples = 0

    def __call__(self, linear: Callable, taken: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        name = self.names.get(id(weight if weight._base is None else weight._base))
        if name is None:
            return linear(taken, weight, bias)
        if taken.dim() == 3:  # (positions, examples, width); before the output projection the first two are flattened
            self.examples = taken.shape[1]
        order = partial(_examples_first, examples=self.examples, width=weight.shape[1])
        out, into = LayerAxis(name, "out"), LayerAxis(name, "in")
        if into in self.gates.axes:
            taken = self.gates.take(into, taken, 3, order)
        output = linear(taken, weight, bias)
        return self.gates.put(out, output, 3, order) if out in self.gates.axes else output


def _examples_first(tensor: Tensor, *, examples: int, width: int) -> Tensor:
    """Bring (positions, examples, parts · width) into the order (examples, positions, parts, width)."""
    return tensor.reshape(-1, examples, tensor.shape[-1] // width, width).transpose(0, 1)


class _BareParameters(TorchFunctionMode):
    """Copy a bare parameter once an example before it is added, multiplied or expanded, and gate the copies."""

    def __init__(self, gates: Gates, names: Mapping[int, str]):
        super().__init__()
        self.gates, self.names = gates, names

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is Tensor.expand and id(args[0]) in self.names:
            sizes = args[1:] if isinstance(args[1], int) else args[1]
            args = (self._copied(args[0], len(sizes), sizes[0]), *args[1:])
        elif function in BROADCASTING and len(args) == 2 and all(isinstance(arg, Tensor) for arg in args):
            first, second = args
            if id(first) in self.names and second.dim():
                args = (self._copied(first, second.dim(), len(second)), second)
            elif id(second) in self.names and first.dim():
                args = (first, self._copied(second, first.dim(), len(first)))
        return function(*args, **(kwargs or {}))

    def _copied(self, parameter: Tensor, dims: int, examples: int) -> Tensor:
        """Return the parameter with one copy an example along a leading dimension; it broadcasts as the original."""
        missing = dims - parameter.dim()
        if missing < 0 or (missing == 0 and parameter.shape[0] != 1) or examples < 1:
            return parameter
        layer = self.names[id(parameter)]
        view = parameter.reshape((1,) * missing + parameter.shape)
        copies = view.expand(examples, *view.shape[1:])
        dim = layer_axes(self.gates.layers[layer], layer)["out"].slots[0].dim
        return self.gates.take(LayerAxis(layer, "out"), copies, missing + dim)
