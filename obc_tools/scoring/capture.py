"""The capture: what layers take and give in one forward pass, and the gradients there while a backward pass runs.

With x and z what a use of a layer takes and gives, and ε and δ the gradients of the summed losses there, each example's
share of three things is found from its own positions t alone, without a weight's gradient, for all examples at once:

- J·w of an output channel is Σ_t δ_t z_t: its weights and bias together, because z is linear in them (a PReLU or an
  embedding with a padding row only in a part of z, and only that part counts);
- J·w of an input channel is Σ_t ε_t x_t: the weights that read the channel;
- the gradient of the layer's parameters is the layer's own product at (x, δ) (see `sums`).

Whatever is used several times, under one name or several, has the sum over its uses. All is taken in backward hooks
from tensors that the graph keeps anyway, and nothing is kept. Two identities save passes over memory, and are used only
where the graph shows that nothing else reads the tensors between:

- y = BatchNorm(z) in eval mode: Σ δy (z − μ) and Σ δy, from one pass, give the products of the norm *and* of the layer
  that made z;
- where such a norm is folded into that layer (see `rows`), y is the layer's own output: Σ δy (y − shift) and Σ δy;
- ReLU and max pooling satisfy Σ ε x = Σ δ y for x = relu(y): the input's product is that of the output before it.

Attention's projections and bare parameters are not called as modules, and some batch norms are called inside a layer
that does more. A `TorchFunctionMode`, which is the thread's own, sees them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType, MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..state import hooks, within
from ..structure.layers import (
    LayerAxis,
    activation_dim,
    affine,
    find_axis,
    fixed_outputs,
    has_norm_within,
    has_role,
    is_batch_norm,
    is_foldable,
    own_parameters,
)
from .sums import channel_sums, layer_row_gradients

Consume = Callable[[str, dict[str, Tensor]], None]
"""Called with a layer's name and its parameters' gradients of some rows: name -> (rows, *shape)."""

Node = torch.autograd.graph.Node

MASKING = {"ReluBackward0", "HardtanhBackward0"}
"""Autograd nodes of activations that, in place, change a value only where its gradient vanishes."""

HOMOGENEOUS = {"ReluBackward0", "MaxPool2DWithIndicesBackward0"}
"""Autograd nodes of channel-wise functions with Σ ε x = Σ δ y."""

BROADCASTING = {
    getattr(owner, name)
    for name in ("add", "sub", "mul")
    for owner, name in ((torch, name), (Tensor, name), (Tensor, f"{name}_"), (Tensor, f"__{name}__"))
} | {Tensor.__radd__, Tensor.__rmul__, Tensor.__iadd__, Tensor.__imul__}
"""Element-wise functions before which a bare parameter may be copied once an example."""

NONE: Mapping = MappingProxyType({})

BYTES_AT_A_TIME = 256 * 2**20


class _Alias(torch.autograd.Function):
    """The same values under a node of their own, which requires grad even where `tensor` does not."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Seen:
    """A tensor of the forward pass, to be read in the backward pass as it was.

    ``order`` brings it and its gradient into the order (examples, ..., channels, ...).
    """

    def __init__(self, layer: str, value: Tensor, order: Callable[[Tensor], Tensor] | None = None):
        self.layer, self.value, self.order = layer, value.detach(), order or _same
        self._version = self.value._version

    @property
    def changed(self) -> bool:
        """Whether something was written into it since."""
        return self.value._version != self._version

    def masked(self) -> None:
        """Take what was written last into it as its value."""
        self._version = self.value._version

    def written_once(self) -> bool:
        return self.value._version == self._version + 1

    def copied(self) -> Seen:
        return Seen(self.layer, self.value.clone(), self.order)

    def read(self) -> Tensor:
        if self.changed:
            where = f"layer {self.layer!r}"
            raise RuntimeError(f"{where}: unlike in the first batch, its activations were changed in place after use")
        return self.order(self.value)


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(eq=False)
class Gate:
    """One use of one layer axis in one forward pass.

    ``seen``: the part of the activation that is linear in the parameters. ``dim``: that of the channels. ``norm``: the
    BatchNorm that takes the activation, or with ``folded`` made it. ``also``: the axes that have the same products.
    ``feeder``: the gate of the layer that made the BatchNorm's input. ``given``: another gate brings these products.
    """

    axis: LayerAxis
    seen: Seen
    dim: int
    norm: nn.Module | None = None
    folded: bool = False
    whole: bool = True
    also: list[LayerAxis] = field(default_factory=list)
    feeder: Gate | None = None
    given: bool = False

    @property
    def layout(self) -> tuple:
        """What two gates have in common if the same tensor, up to element-wise functions, lies the same way in both."""
        return self.dim, self.seen.value.dim(), self.seen.order


class Family:
    """Layers that share parameters with each other, or one layer alone: its calls, until all have their gradients."""

    def __init__(self, layers: Mapping[str, nn.Module | nn.Parameter]):
        self.layers = layers
        self.uses = 0
        self.calls: list[tuple[Seen, Tensor]] = []

    def consume(self, rows: int, consume: Consume) -> None:
        """Hand out the gradients of the summed losses of equally many examples a row, some rows a time; forget all."""
        calls, self.calls = self.calls, []
        sizes = {id(p): p.nbytes for layer in self.layers.values() for p in own_parameters(layer).values()}
        step = max(1, BYTES_AT_A_TIME // sum(sizes.values()))
        for start in range(0, rows, step) if calls else ():
            totals: dict[int, Tensor] = {}
            for seen, delta in calls:
                layer = self.layers[seen.layer]
                pair = (t.unflatten(0, (rows, -1))[start : start + step] for t in (seen.read(), delta))
                for key, gradient in layer_row_gradients(layer, *pair).items():
                    place = id(own_parameters(layer)[key])
                    totals[place] = totals[place] + gradient if place in totals else gradient
            for name, layer in self.layers.items():
                named = {key: totals.get(id(p)) for key, p in own_parameters(layer).items()}
                if all(gradient is not None for gradient in named.values()):
                    consume(name, named)


class Capture:
    """The uses of some layers in one batch: `watching` while the model runs, then `read` as often as asked.

    Takes J·w of ``axes`` or the whole gradients of ``families`` of layers. ``copied`` names the layers whose output the
    model changes in place: their outputs are copied. With ``explore`` all are, and those found changed are added to it.
    ``folds``: layers that do a BatchNorm's work, each with its name.
    After reading, ``unfit`` names the layers whose leading axis cannot be the examples, and ``coarse`` says whether
    half precision was seen.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module | nn.Parameter],
        axes: Iterable[LayerAxis] = (),
        families: Iterable[Mapping[str, nn.Module | nn.Parameter]] = (),
        copied: set[str] | None = None,
        explore: bool = False,
        folds: Mapping[str, str] = NONE,
    ):
        self.axes = set(axes)
        distinct = {id(layers): Family(layers) for layers in families}
        self.families = {name: family for family in distinct.values() for name in family.layers}
        self.layers = {**layers, **{name: family.layers[name] for name, family in self.families.items()}}
        self.copied, self.explore, self.folds = set() if copied is None else copied, explore, folds
        self.unfit: set[str] = set()
        self.coarse = False
        self._uses: Counter[tuple[str, str]] = Counter()
        self._edges: dict[int, int] = {}
        self._anchor = torch.zeros((), requires_grad=True)
        self._made: dict[Node, Gate] = {}
        self._norm_inputs: list[tuple[Gate, Node]] = []
        self._taken: list[tuple[Gate, Node]] = []
        self._watched: list[tuple[Gate, Seen, Tensor, Node]] = []
        self._leaves: list[Tensor] = []
        self._sums: dict[LayerAxis, Tensor] | None = None  # None: hooks have nothing to do
        self._examples = self._rows = 0
        self._consume: Consume | None = None

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Note the uses of the layers while the model runs; nothing stays on it or in torch on the way out."""
        wanted = {axis.layer for axis in self.axes if axis.axis == "out"} | self.families.keys()
        bare = {id(self.layers[name]): name for name in wanted if isinstance(self.layers[name], Tensor)}
        attention = _attention_weights(self.layers, model)
        norms = {id(layer.weight): name for name, layer in self.layers.items() if self._is_within(name)}
        functions = _Functions(self, bare, attention, norms) if bare or attention or norms else nullcontext()
        with within(hooks(self._hooks()), functions):
            yield

    def close(self) -> None:
        """Let go of the graph: it holds the tensor hooks, these hold the gates, and the gates must not hold it."""
        for kept in (self._made, self._norm_inputs, self._taken, self._leaves, self._watched):
            kept.clear()

    def read(
        self, losses: Tensor, retain: bool, consume: Consume | None = None
    ) -> tuple[dict[LayerAxis, Tensor], dict[int, Tensor | None]]:
        """Backpropagate the sum of losses, shape (rows, examples a row); `retain` keeps the graph for another pass.

        The gradients of families of layers go to `consume`, each as soon as the last of its uses has been reached.

        Returns:
            J·w of each example, LayerAxis -> (examples, channels), for the gates that were reached; and the gradients
            of the parameters that require grad, by id.
        """
        self._sums, self._consume = {}, consume
        self._examples, self._rows = losses.numel(), len(losses)
        total = losses.sum()
        if not self._leaves:
            uses, leaves = _walk(total.grad_fn)
            self._leaves = [node.variable for node in leaves]
            self._edges = {id(node.variable): uses[node] for node in leaves}
            self._share(uses)
        try:
            gradients = torch.autograd.grad(total, self._leaves, retain_graph=retain, allow_unused=True)
            for family in dict.fromkeys(self.families.values()):
                self._hand_out(family)
            return self._sums, {id(leaf): gradient for leaf, gradient in zip(self._leaves, gradients, strict=True)}
        finally:
            self._sums = self._consume = None

    def foldable(self) -> dict[str, str]:
        """Return the layers that could do the work of a BatchNorm, the only one that reads them, after `read`."""
        pairs = [(gate.feeder.axis, gate.axis) for gate, _ in self._norm_inputs if gate.feeder and not gate.folded]
        return {
            layer.layer: norm.layer
            for layer, norm in pairs
            if self._uses[layer] == self._uses[norm] == 1
            and is_foldable(self.layers[layer.layer], self.layers[norm.layer])
        }

    def used_elsewhere(self) -> set[int]:
        """Return the ids of the parameters that the graph uses more often than was noted, after `read`."""
        seen: Counter[int] = Counter()
        for name, layer in self.layers.items():
            uses = max(self._uses[name, "out"], self._uses[name, "in"])
            seen.update({id(p): uses for p in own_parameters(layer).values()})
        return {parameter for parameter, edges in self._edges.items() if edges > seen[parameter]}

    def missing(self, layer: str) -> str:
        """Say why a layer has no products after `read`."""
        if layer in self.unfit:
            return (
                f"layer {layer!r}: the leading axis of its activations is not a multiple of {self._examples} examples"
            )
        return never_ran(layer)

    def _hooks(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        for name, layer in self.layers.items():
            if isinstance(layer, Tensor) or has_role(layer, "attention"):
                continue
            if LayerAxis(name, "in") in self.axes:
                yield layer.register_forward_pre_hook(partial(self._input, name), with_kwargs=True)
            folded = name in self.folds.values()
            own = LayerAxis(name, "out") in self.axes and not self._is_within(name)
            if not folded and (own or name in self.families or name in self.folds):
                yield layer.register_forward_hook(partial(self._output, name), with_kwargs=True, prepend=True)

    def _is_within(self, name: str) -> bool:
        """Say whether a layer is a batch norm inside a call that does more, such as an activation behind it."""
        layer = self.layers[name]
        asked = LayerAxis(name, "out") in self.axes and name not in self.families
        return asked and has_norm_within(layer) and not layer.training and layer.running_mean is not None

    def _input(self, name: str, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (self.take(LayerAxis(name, "in"), args[0], activation_dim(layer, args[0])), *args[1:]), kwargs
        key, value = next(iter(kwargs.items()))
        return args, {**kwargs, key: self.take(LayerAxis(name, "in"), value, activation_dim(layer, value))}

    def _output(self, name: str, layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        axis = LayerAxis(name, "out")
        taken = args[0] if args else next(iter(kwargs.values()))
        if name in self.families:
            alone = len(args) + len(kwargs) == 1 and isinstance(taken, Tensor) and isinstance(output, Tensor)
            return self.call(name, taken, output) if alone else output
        if name in self.folds:
            norm = self.folds[name]
            return self.put(LayerAxis(norm, "out"), output, 1, norm=self.layers[norm], feeder=axis)
        if is_batch_norm(layer) and not layer.training and layer.running_mean is not None:
            return self.put(axis, output, 1, part=taken, norm=layer)
        fixed = fixed_outputs(layer, taken)
        part = None if fixed is None else output.detach().masked_fill(fixed, 0)
        return self.put(axis, output, activation_dim(layer, output), part=part)

    def call(self, layer: str, taken: Tensor, output: Tensor, order: Callable | None = None) -> Tensor:
        """Note one use of a layer for its parameters' gradients."""
        if not torch.is_grad_enabled():  # no loss looks through this use
            return output
        output = self._with_node(output)
        self.families[layer].uses += 1
        self._uses[layer, "out"] += 1
        output.register_hook(partial(self._on_call, Seen(layer, taken, order)))
        return output

    def take(self, axis: LayerAxis, tensor: Tensor, dim: int, order: Callable | None = None) -> Tensor:
        """Gate what a layer takes in: return the same values under a node whose gradient is this use's alone."""
        if not torch.is_grad_enabled():
            return tensor
        gate = Gate(axis, Seen(axis.layer, tensor, order), dim)
        self._uses[axis] += 1
        # A linear function of strided inputs, whose weight asks for no gradient, falls into many small products.
        alias = _Alias.apply(tensor if dim < tensor.dim() - 1 else tensor.contiguous(), self._anchor)
        alias.register_hook(partial(self._on_gradient, gate))
        self._taken.append((gate, alias.grad_fn))
        return alias

    def put(
        self,
        axis: LayerAxis,
        tensor: Tensor,
        dim: int,
        order: Callable | None = None,
        part: Tensor | None = None,
        norm: nn.Module | None = None,
        feeder: LayerAxis | None = None,
    ) -> Tensor:
        """Gate what a layer puts out; `part` of it (else all) is linear in the parameters, or is what a norm took.

        The norm is folded into the layer of the axis `feeder` if there is one.
        """
        if not torch.is_grad_enabled():
            return tensor
        tensor = self._with_node(tensor)
        seen = Seen(axis.layer, tensor if part is None else part, order)
        gate = self._made[tensor.grad_fn] = Gate(axis, seen, dim, norm, feeder is not None)
        gate.whole = part is None or norm is not None
        if part is None:
            self._watched.append((gate, seen, tensor, tensor.grad_fn))
            gate.seen = seen.copied() if self.explore or axis.layer in self.copied else seen
        if feeder is not None:
            gate.feeder = Gate(feeder, seen, dim)
        elif norm is not None and part.grad_fn is not None:
            self._norm_inputs.append((gate, part.grad_fn))
        self._uses[axis] += 1
        tensor.register_hook(partial(self._on_gradient, gate))
        return tensor

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
        for gate, seen, tensor, node in self._watched:
            if seen.written_once() and tensor.grad_fn.name() in MASKING and tensor.grad_fn.next_functions[0][0] is node:
                seen.masked()
            elif self.explore and seen.changed and not gate.given:
                self.copied.add(gate.axis.layer)

    def _only_source(self, gate: Gate, node: Node | None, uses: Counter[Node]) -> Gate | None:
        """Return the gate on the output that `node` made, if only `gate` reads it and all of it counts."""
        source = self._made.get(node)
        alike = source is not None and source.whole and source.layout == gate.layout
        return source if alike and uses[node] == 1 else None

    def _fits(self, layer: str, tensor: Tensor) -> bool:
        """Say whether the leading axis may be the examples."""
        fits = tensor.dim() > 0 and len(tensor) % self._examples == 0
        if not fits:
            self.unfit.add(layer)
        return fits

    def _on_call(self, seen: Seen, gradient: Tensor) -> None:
        if self._consume is None:
            return
        family = self.families[seen.layer]
        self.coarse |= gradient.dtype.itemsize < 4
        gradient = seen.order(gradient)
        if self._fits(seen.layer, gradient) and self._fits(seen.layer, seen.read()):
            family.calls.append((seen, gradient))
        if len(family.calls) == family.uses:
            self._hand_out(family)

    def _hand_out(self, family: Family) -> None:
        if self._consume is not None:
            family.consume(self._rows, self._consume)

    def _on_gradient(self, gate: Gate, gradient: Tensor) -> None:
        if gate.given or self._sums is None:
            return
        self.coarse |= gradient.dtype.itemsize < 4
        value, gradient = gate.seen.read(), gate.seen.order(gradient)
        if not self._fits(gate.axis.layer, gradient):
            return
        if gate.dim == 0 and self._examples > 1:
            self.unfit.add(gate.axis.layer)
        elif gate.norm is None:
            self._add(gate, channel_sums(gradient, value, gate.dim, whole=self._examples == 1)[0])
        else:
            self._add_norm(gate, gradient, value)

    def _add_norm(self, gate: Gate, gradient: Tensor, value: Tensor) -> None:
        norm, (slope, shift) = gate.norm, affine(gate.norm)
        centre = shift if gate.folded else norm.running_mean.to(slope.dtype)
        first, zeroth = channel_sums(gradient, value, gate.dim, mean=centre, whole=self._examples == 1)
        first = first if gate.folded else slope * first
        # Σ δy·slope·(z − mean) differs by Σ δy from the norm's product, Σ δy·y, and from the layer's, Σ δy·slope·z.
        self._add(gate, first + (shift if gate.folded else norm.bias.detach()) * zeroth)
        if gate.feeder is not None:
            self._add(gate.feeder, first if gate.folded else first + slope * centre * zeroth)

    def _add(self, gate: Gate, sums: Tensor) -> None:
        sums = sums.unflatten(0, (self._examples, -1)).sum(1)
        for axis in (gate.axis, *gate.also):
            self._sums[axis] = self._sums[axis] + sums if axis in self._sums else sums


def never_ran(layer: str) -> str:
    """Say that a layer has no gradient."""
    return f"layer {layer!r} never ran, or the loss does not depend on it: score without it (layers=, ignore=)"


def _walk(root: Node) -> tuple[Counter[Node], list[Node]]:
    """Return how often the result of each node is used in an autograd graph, and the graph's leaves."""
    uses: Counter[Node] = Counter()
    leaves = []
    waiting, seen = [root], {root}
    while waiting:
        node = waiting.pop()
        if node.name() == "torch::autograd::AccumulateGrad":
            leaves.append(node)
        for source, _ in node.next_functions:
            if source is None:
                continue
            uses[source] += 1
            if source not in seen:
                seen.add(source)
                waiting.append(source)
    return uses, leaves


def _attention_weights(names: Mapping[str, Any], model: nn.Module) -> dict[int, str]:
    """Return the weights of the attentions that are wanted, and the layers that they belong to: id -> name."""
    found = {}
    for name, module in model.named_modules():
        output = f"{name}.out_proj" if name else "out_proj"
        if has_role(module, "attention") and not names.keys().isdisjoint({name, output}):
            found[id(module.out_proj.weight)] = output
            found |= {id(w): name for w in (module.in_proj_weight, module.q_proj_weight) if w is not None}
    return found


class _Functions(TorchFunctionMode):
    """Capture what is not called as a module: projections inside attentions, norms inside layers, bare parameters.

    While it is there, torch takes none of its fused kernels for whole attention layers: these have no backward.
    """

    def __init__(
        self, capture: Capture, bare: Mapping[int, str], attention: Mapping[int, str], norms: Mapping[int, str]
    ):
        super().__init__()
        self.capture, self.bare, self.weights, self.norms = capture, bare, attention, norms
        self.attention = _attention_with(self._linear)
        self.examples = 0

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is F.multi_head_attention_forward:
            function = self.attention
        elif function is F.batch_norm and id(kwargs.get("weight")) in self.norms:  # torch names it on the way here
            name, output = self.norms[id(kwargs["weight"])], function(*args, **kwargs)
            return self.capture.put(LayerAxis(name, "out"), output, 1, part=args[0], norm=self.capture.layers[name])
        elif function is Tensor.expand and id(args[0]) in self.bare:
            sizes = args[1:] if isinstance(args[1], int) else args[1]
            args = (self._copied(args[0], len(sizes), sizes[0]), *args[1:])
        elif function in BROADCASTING and len(args) == 2 and all(isinstance(arg, Tensor) for arg in args):
            first, second = args
            if id(first) in self.bare and second.dim():
                args = (self._copied(first, second.dim(), len(second)), second)
            elif id(second) in self.bare and first.dim():
                args = (first, self._copied(second, first.dim(), len(first)))
        return function(*args, **kwargs)

    def _copied(self, parameter: Tensor, dims: int, examples: int) -> Tensor:
        """Return the parameter with one copy an example along a leading dimension; it broadcasts as the original."""
        missing = dims - parameter.dim()
        if missing < 0 or (missing == 0 and parameter.shape[0] != 1) or examples < 1:
            return parameter
        layer = self.bare[id(parameter)]
        view = parameter.reshape((1,) * missing + parameter.shape)
        copies = view.expand(examples, *view.shape[1:])
        if layer in self.capture.families:
            return self.capture.call(layer, copies, copies)
        out = LayerAxis(layer, "out")
        return self.capture.take(out, copies, missing + find_axis(self.capture.layers[layer], out).slots[0].dim)

    def _linear(self, taken: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Stand in for the linear that torch's attention calls."""
        whole = weight if weight._base is None else weight._base
        name = self.weights.get(id(whole))
        if name is None:
            return F.linear(taken, weight, bias)
        if taken.dim() == 3:  # (positions, examples, width); before the output projection the first two are flattened
            self.examples = taken.shape[1]
        examples_first = partial(_examples_first, examples=self.examples)
        order = partial(examples_first, width=weight.shape[1])
        out, into = LayerAxis(name, "out"), LayerAxis(name, "in")
        if into in self.capture.axes:
            taken = self.capture.take(into, taken, 3, order)
        output = F.linear(taken, weight, bias)
        if name in self.capture.families and whole is weight:
            return self.capture.call(name, taken, output, examples_first)
        return self.capture.put(out, output, 3, order) if out in self.capture.axes else output


def _attention_with(linear: Callable) -> Callable:
    """Return torch's functional attention, of which all that calls torch's linear is copied and calls another."""
    names: dict[str, Any] = {**vars(F), "linear": linear}
    for name, function in vars(F).items():
        if isinstance(function, FunctionType) and "linear" in function.__code__.co_names:
            names[name] = FunctionType(function.__code__, names, name, function.__defaults__, function.__closure__)
            names[name].__kwdefaults__ = function.__kwdefaults__
    return names[F.multi_head_attention_forward.__name__]


def _examples_first(tensor: Tensor, *, examples: int, width: int | None = None) -> Tensor:
    """Bring (positions, examples, parts · width) into the order (examples, positions, parts, width)."""
    width = width or tensor.shape[-1]
    return tensor.reshape(-1, examples, tensor.shape[-1] // width, width).transpose(0, 1)
