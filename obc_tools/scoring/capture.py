"""Gates: J·w of every example of a batch from one backward pass, without weight gradients.

A gate is a factor of one, one an example and channel, on what a layer puts out or takes in. The gradient of the summed
losses at it is J·w of that example's own loss (δ and ε are the gradients at the output z and the input x):

- at the output, Σ_t δ_t z_t over the example's positions t: the channel's weights and bias together, because z is
  linear in them (a PReLU or an embedding with a padding row only in a part of z, and only that part counts);
- at the input, Σ_t ε_t x_t: the weights that read the channel.

No factor is ever multiplied: the sums are taken in backward hooks from tensors that the graph keeps anyway. Two
identities save passes over memory, and are used only where the graph shows that nothing else reads the tensors between:

- y = BatchNorm(z) in eval mode: Σ δy (z − μ) and Σ δy, from one pass, give the products of the norm *and* of the layer
  that made z;
- ReLU and max pooling satisfy Σ ε x = Σ δ y for x = relu(y): the input's product is that of the output before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..state import hooks, no_fused_attention
from ..structure.layers import LayerAxis, activation_dim, layer_axes
from .sums import centred_sums, example_sums

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


Node = torch.autograd.graph.Node

HOMOGENEOUS = {"ReluBackward0", "MaxPool2DWithIndicesBackward0"}
"""Autograd nodes of channel-wise functions with Σ ε x = Σ δ y."""


class _Alias(torch.autograd.Function):
    """The same values under a node of their own, which requires grad even where `tensor` does not."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


@dataclass(eq=False)
class Gate:
    """One use of one layer axis in one forward pass.

    ``value``: the part of the activation that is linear in the parameters. ``arrange`` brings it and its gradient into
    the order (examples, ..., channels, ...), with the channels at ``activation_dim``. ``norm``: the BatchNorm of which
    ``value`` is the input. ``also``: the axes that have the same products. ``feeder``: the gate of the layer that made
    the BatchNorm's input. ``given``: another gate brings this one's products.
    """

    axis: LayerAxis
    value: Tensor
    activation_dim: int
    version: int
    arrange: Callable[[Tensor], Tensor]
    norm: nn.Module | None = None
    whole: bool = True
    also: list[LayerAxis] = field(default_factory=list)
    feeder: Gate | None = None
    given: bool = False

    @property
    def layout(self) -> tuple:
        """What two gates have in common if the same tensor, up to element-wise functions, lies the same way in both."""
        return self.activation_dim, self.value.dim(), self.arrange


class Gates:
    """The gates of one batch: `attached` while the model runs, then `read`.

    ``copied`` names the layers whose output the model changes in place: their outputs are copied. With ``explore`` all
    are, and those found changed are added to it. After reading, ``unfit`` names the layers whose leading axis cannot be
    the examples, and ``coarse`` says whether half precision was seen.
    """

    def __init__(self, layers: Mapping[str, nn.Module], axes: Sequence[LayerAxis], copied: set[str], explore: bool):
        self.axes = set(axes)
        self.layers = {axis.layer: layers[axis.layer] for axis in axes}
        self.copied, self.explore = copied, explore
        self.unfit: set[str] = set()
        self.coarse = False
        self._anchor = torch.zeros((), requires_grad=True)
        self._made: dict[Node, Gate] = {}
        self._norm_inputs: list[tuple[Gate, Node]] = []
        self._taken: list[tuple[Gate, Node]] = []
        self._watched: list[tuple[Gate, Tensor, int]] = []
        self._leaves: list[Tensor] = []
        self._sums: dict[LayerAxis, Tensor] | None = None  # None: hooks have nothing to do
        self._examples = 0

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Put hooks on the layers that are called as modules, and let go of the graph on the way out."""
        try:
            with hooks(self._hooks()):
                yield
        finally:
            # The graph holds the tensor hooks, these hold the gates, and the gates must not hold the graph.
            self._made.clear()
            self._norm_inputs.clear()
            self._taken.clear()
            self._leaves.clear()

    def read(
        self, losses: Tensor, scale: Tensor | float, retain: bool
    ) -> tuple[dict[LayerAxis, Tensor], dict[int, Tensor | None]]:
        """Backpropagate Σ_n scale_n · losses_n; `retain` keeps the graph for another pass.

        Returns:
            J·w of each example, LayerAxis -> (examples, channels), for the gates that were reached; and the gradients
            of the parameters that require grad, by id.
        """
        self._sums = sums = {}
        self._examples = losses.numel()
        total = (losses * scale).sum()
        if not self._leaves:
            uses, self._leaves = _walk(total.grad_fn)
            self._share(uses)
        gradients = torch.autograd.grad(total, self._leaves, retain_graph=retain, allow_unused=True)
        self._sums = None
        return sums, {id(leaf): gradient for leaf, gradient in zip(self._leaves, gradients, strict=True)}

    def missing(self, layer: str) -> str:
        """Say why a layer has no products after `read`."""
        if layer in self.unfit:
            return (
                f"layer {layer!r}: the leading axis of its activations is not a multiple of {self._examples} examples"
            )
        return f"layer {layer!r} never ran, or the loss does not depend on it: score without it (layers=, ignore=)"

    def _hooks(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        for name, layer in self.layers.items():
            if isinstance(layer, nn.Parameter | nn.MultiheadAttention):
                continue
            if LayerAxis(name, "in") in self.axes:
                yield layer.register_forward_pre_hook(partial(self._input, name), with_kwargs=True)
            if LayerAxis(name, "out") in self.axes:
                yield layer.register_forward_hook(partial(self._output, name), with_kwargs=True, prepend=True)

    def _input(self, name: str, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (self.take(LayerAxis(name, "in"), args[0], activation_dim(layer, args[0])), *args[1:]), kwargs
        key, value = next(iter(kwargs.items()))
        return args, {**kwargs, key: self.take(LayerAxis(name, "in"), value, activation_dim(layer, value))}

    def _output(self, name: str, layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        axis = LayerAxis(name, "out")
        taken = args[0] if args else next(iter(kwargs.values()))
        dim = activation_dim(layer, output)
        if isinstance(layer, nn.PReLU):
            return self.put(axis, output, dim, part=output.detach().masked_fill(taken >= 0, 0))
        if isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
            padding = (taken == layer.padding_idx).unsqueeze(-1)
            return self.put(axis, output, dim, part=output.detach().masked_fill(padding, 0))
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and not layer.training and layer.running_mean is not None:
            return self._put_norm(axis, layer, taken, output)
        return self.put(axis, output, dim)

    def take(self, axis: LayerAxis, tensor: Tensor, activation_dim: int, arrange: Callable | None = None) -> Tensor:
        """Gate what a layer takes in: return the same values under a node whose gradient is this use's alone."""
        value = tensor.detach()
        gate = Gate(axis, value, activation_dim, value._version, arrange or _same)
        alias = _Alias.apply(tensor, self._anchor)
        alias.register_hook(partial(self._on_gradient, gate))
        self._taken.append((gate, alias.grad_fn))
        return alias

    def put(
        self,
        axis: LayerAxis,
        tensor: Tensor,
        activation_dim: int,
        arrange: Callable | None = None,
        part: Tensor | None = None,
    ) -> Tensor:
        """Gate what a layer puts out; `part` of it is linear in the parameters, by default all."""
        tensor = self._with_node(tensor)
        value = tensor.detach() if part is None else part
        gate = Gate(axis, value, activation_dim, value._version, arrange or _same, whole=part is None)
        if part is None and (self.explore or axis.layer in self.copied):
            self._watched.append((gate, value, value._version))
            gate.value = value.clone()
            gate.version = gate.value._version
        self._made[tensor.grad_fn] = gate
        tensor.register_hook(partial(self._on_gradient, gate))
        return tensor

    def _put_norm(self, axis: LayerAxis, norm: nn.Module, taken: Tensor, output: Tensor) -> Tensor:
        output = self._with_node(output)
        value = taken.detach()
        gate = Gate(axis, value, 1, value._version, _same, norm=norm)
        self._made[output.grad_fn] = gate
        if taken.grad_fn is not None:
            self._norm_inputs.append((gate, taken.grad_fn))
        output.register_hook(partial(self._on_gradient, gate))
        return output

    def _with_node(self, tensor: Tensor) -> Tensor:
        """Return the tensor itself, or under a node of ours where nothing before it requires grad."""
        return tensor if tensor.grad_fn is not None else _Alias.apply(tensor, self._anchor)

    def _share(self, uses: Counter[Node]) -> None:
        """Find the gates whose products another gate brings (see the module's docstring)."""
        for gate, node in self._norm_inputs:
            feeder = self._only_source(gate, node, uses)
            if feeder is not None and feeder.norm is None:
                gate.feeder, feeder.given = feeder, True
        for gate, alias in self._taken:
            node = alias.next_functions[0][0]
            while node is not None and node.name() in HOMOGENEOUS and uses[node] == 1:
                node = node.next_functions[0][0]
            source = self._only_source(gate, node, uses)
            if source is not None:
                giver, given = (source, gate) if source.norm is not None else (gate, source)
                giver.also.append(given.axis)
                given.given = True
        if self.explore:
            changed = {g.axis.layer for g, seen, version in self._watched if not g.given and seen._version != version}
            self.copied |= changed

    def _only_source(self, gate: Gate, node: Node | None, uses: Counter[Node]) -> Gate | None:
        """Return the gate on the output that `node` made, if only `gate` reads it and all of it counts."""
        source = self._made.get(node)
        alike = source is not None and source.whole and source.layout == gate.layout
        return source if alike and uses[node] == 1 else None

    def _on_gradient(self, gate: Gate, gradient: Tensor) -> None:
        if gate.given or self._sums is None:
            return
        if gate.value._version != gate.version:
            where = f"layer {gate.axis.layer!r}"
            raise RuntimeError(f"{where}: unlike in the first batch, its activations were changed in place after use")
        self.coarse |= torch.finfo(gradient.dtype).bits < 32
        gradient, value = gate.arrange(gradient), gate.arrange(gate.value)
        if gradient.shape[0] % self._examples or gate.activation_dim == 0:
            self.unfit.add(gate.axis.layer)
        elif gate.norm is None:
            self._add(gate, example_sums(gradient, value, gate.activation_dim))
        else:
            self._add_norm(gate, gradient, value)

    def _add_norm(self, gate: Gate, gradient: Tensor, value: Tensor) -> None:
        norm = gate.norm
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        mean, variance = norm.running_mean.to(dtype), norm.running_var.to(dtype)
        slope = norm.weight.detach() * (variance + norm.eps).rsqrt()
        first, zeroth = centred_sums(gradient, value, mean)
        self._add(gate, slope * first + norm.bias.detach() * zeroth)
        if gate.feeder is not None:
            self._add(gate.feeder, slope * (first + mean * zeroth))

    def _add(self, gate: Gate, sums: Tensor) -> None:
        sums = sums.unflatten(0, (self._examples, -1)).sum(1)
        for axis in (gate.axis, *gate.also):
            self._sums[axis] = self._sums[axis] + sums if axis in self._sums else sums


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _walk(root: Node) -> tuple[Counter[Node], list[Tensor]]:
    """Return how often the result of each node is used in an autograd graph, and the graph's leaves."""
    uses: Counter[Node] = Counter()
    leaves = []
    waiting, seen = [root], {root}
    while waiting:
        node = waiting.pop()
        if node.name() == "torch::autograd::AccumulateGrad":
            leaves.append(node.variable)
        for source, _ in node.next_functions:
            if source is None:
                continue
            uses[source] += 1
            if source not in seen:
                seen.add(source)
                waiting.append(source)
    return uses, leaves
