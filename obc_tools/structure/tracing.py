"""Trace a model: run it once under two of torch's modes, one that sees operations and one that sees calls from Python.

The operations tell how channels flow (`structure/flow.py`); the calls tell which numbers cut and shape tensors, and
so which attributes have to follow pruning (`structure/flow.py`). Nothing is differentiated, so a model with more
paths through it than can be counted takes no longer than its forward pass.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ..state import (
    call_model,
    copy_borrowing,
    hooks,
    is_torchs,
    misfit,
    no_fused_attention,
    own_inputs,
    refuse_wrapped,
    within,
    without_weight_norms,
)
from .attention import Contraction, Shadows
from .calls import FUNCTIONS, attended_tensors, sized_shape, use_as_numbers
from .counting import Factor, Ledger, Product, attention_factors
from .flow import (
    EQUAL,
    INPUT,
    Attribute,
    Channels,
    Flow,
    Size,
    follow,
    leaves,
    name_of,
    tensors_in,
    track_attributes,
)
from .layers import (
    LayerAxis,
    UnknownLayerError,
    all_axes,
    get_layer,
    has_role,
    is_known,
    is_projection,
    layer_axes,
    layer_type,
    own_tensors,
    scalable_slots,
)
from .operations import keep_tokens
from .plain_numbers import seen_by_python, watch_numbers
from .unseen import Levels, Unread, named_in, stored

WITHOUT_GRADIENT = ("detach", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")
"""Operations through whose arguments no gradient goes back."""


WAY_OUT = "pass Forward(run, inputs) as example inputs, which says what of its output counts"

RESHAPING = ("squeeze_", "unsqueeze_", "transpose_", "swapaxes_", "swapdims_", "t_")
"""Operations that change the shape of their argument in place."""

ROOT = "root"
"""The operation on a width that may give an attention's temperature."""


@dataclass
class History:
    """The operations of a forward pass: which made each tensor, from the results of which others."""

    parents: list[tuple[int, ...]] = field(default_factory=list)
    made_by: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    layers: dict[int, str] = field(default_factory=dict)

    def note(self, name: str, results: Sequence[Tensor], arguments: Sequence[Tensor]) -> None:
        """Note one operation."""
        follows = () if name in WITHOUT_GRADIENT or name.startswith("new_") else arguments
        found = (self.made_by.get(tensor) for tensor in follows if tensor.is_floating_point())
        self.parents.append(tuple(number for number in found if number is not None))
        for tensor in results:
            if tensor.is_floating_point():
                self.made_by[tensor] = len(self.parents) - 1

    def gave(self, layer: str, output: Tensor) -> None:
        """Note that a layer ended in the operation that made `output`."""
        number = self.made_by.get(output)
        if number is not None:
            self.layers[number] = layer

    def walk_back(self, outputs: Iterable[Tensor]) -> dict[str, int]:
        """Return the layers that lead to the outputs, each with its place in the order in which they are met."""
        met: dict[str, int] = {}
        visited: set[int] = set()
        for output in outputs:
            number = self.made_by.get(output)
            waiting = [] if number is None else [number]
            self._meet(waiting, met)
            while waiting:
                number = waiting.pop()
                if number not in visited:
                    visited.add(number)
                    self._meet(self.parents[number], met)
                    waiting += self.parents[number]
        return met

    def _meet(self, numbers: Iterable[int], met: dict[str, int]) -> None:
        for number in numbers:
            if number in self.layers:
                met.setdefault(self.layers[number], len(met))


@dataclass(frozen=True)
class Traced:
    """What tracing a model tells, all in labels.

    ``axes`` holds the labels of every layer axis in the order in which layers first ran, ``kinds`` the layers' types,
    ``met`` the places of convolutions and linear layers in the order in which they are met from the outputs back,
    ``ledger`` what its operations multiplied, ``parameters`` the sizes of all parameters, a shared one once.
    """

    flow: Flow
    axes: Mapping[LayerAxis, np.ndarray]
    kinds: Mapping[str, str]
    met: Mapping[str, int]
    ledger: Ledger
    parameters: Sequence[Product]


@dataclass
class Tracer:
    """A copy of a model whose parameters carry labels, and what its forward passes tell.

    ``borrowed`` are the addresses of parameters that lie in the memory of the model that was copied.
    """

    model: nn.Module
    flow: Flow
    borrowed: frozenset[int] = frozenset()
    axes: dict[LayerAxis, np.ndarray] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    owners: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    slots: dict[str, list[Factor]] = field(default_factory=lambda: defaultdict(list))
    ran: dict[str, None] = field(default_factory=dict)
    history: History = field(default_factory=History)
    met: dict[str, int] = field(default_factory=dict)
    shadows: Shadows = field(default_factory=Shadows)
    contractions: list[Contraction] = field(default_factory=list)
    rooted: list[tuple[str, Size, str]] = field(default_factory=list)
    tempered: set[int] = field(default_factory=set)
    default_scale: bool = False
    paused: int = 0

    def __post_init__(self):
        self.ledger, self.levels, self.unread = Ledger(self.flow), Levels(self.flow), Unread(self.model)

    def register(self) -> None:
        """Give labels to the axes of all layers, bare parameters and buffers."""
        for name, module in self.model.named_modules():
            try:
                known = layer_axes(module, name) if is_known(module) else None
            except UnknownLayerError as error:
                self._register_unknown(name, module, str(error))
                continue
            if known:
                self._register(name, module, known)
            described = {slot.tensor for axis in (known or {}).values() for slot in axis.slots}
            for leaf, tensor in own_tensors(module).items():
                if leaf not in described and tensor.is_floating_point() and tensor.dim():
                    full = f"{name}.{leaf}" if name else leaf
                    self._register(full, tensor, all_axes(tensor, full))

    def _register(self, name: str, layer: nn.Module | Tensor, axes: Mapping[str, Any]) -> None:
        self.kinds[name] = type(layer).__name__
        tensors = own_tensors(layer)
        dims = {leaf: [None] * tensor.dim() for leaf, tensor in tensors.items()}
        labels = {key: self.flow.fresh(axis.width) for key, axis in axes.items()}
        weights = {"weight", *layer_type(layer).inputs}
        for key, axis in axes.items():
            for slot in axis.slots:
                full = ".".join(filter(None, (name, slot.tensor)))
                self.slots[full].append(Factor(axis.width, labels[key], slot.groups))
                if slot.groups == slot.parts == 1:
                    dims[slot.tensor][slot.dim] = labels[key]
                if slot.parts == 1 and key == "out" and (slot.groups == 1 or slot.dim == 0):
                    self.shadows.register(tensors[slot.tensor], slot.dim, labels[key])
        self.axes.update({LayerAxis(name, key): found for key, found in labels.items()})
        self.flow.grouped[name] = labels
        self.flow.declared.update(_declared_widths(name, layer, axes, labels))
        for leaf, tensor in tensors.items():
            if tensor in self.flow.tensors:
                self._tie(tensor, dims[leaf], labels)
            else:
                self.flow.put(tensor, dims[leaf], weight_of=name if leaf in weights else None)
            self.owners[id(tensor)].append(name)

    def _tie(self, tensor: Tensor, dims: Sequence[np.ndarray | None], labels: Mapping[str, np.ndarray]) -> None:
        """Let layers that share a parameter lose the same channels."""
        known = self.flow.of(tensor)
        for ours, theirs in zip(dims, known.dims, strict=True):
            if ours is not None or theirs is not None:
                self.flow.join(ours, theirs)
        if len(dims) > 1 and dims[1] is None:
            for key, theirs in self.flow.grouped.get(known.weight_of, {}).items():
                self.flow.join(labels.get(key), theirs)

    def _register_unknown(self, name: str, module: nn.Module, reason: str) -> None:
        self.kinds[name], self.unknown[name] = type(module).__name__, reason
        for leaf, tensor in own_tensors(module).items():
            dims = [self.flow.fresh(size) if size > 1 else None for size in tensor.shape]
            self.flow.put(tensor, dims)
            self.owners[id(tensor)].append(name)
            self.flow.freeze_all([Channels(dims)], reason)
            if leaf in ("weight", "bias") and dims and dims[0] is not None:
                self.axes.setdefault(LayerAxis(name, "out"), dims[0])

    def parameters(self) -> Iterator[Product]:
        """Yield the size of every parameter; a shared one is counted with its first layer."""
        for name, parameter in self.model.named_parameters():
            owner, known = name if name in self.kinds else name.rpartition(".")[0], self.slots[name]
            rest = parameter.numel() // Product(owner, tuple(known)).size
            yield Product(owner, (*known, Factor(rest)), batched=False)

    def run(self, example_inputs: Any) -> None:
        """Run the model once, on a copy of its inputs, and follow the channels through it."""
        example_inputs = own_inputs(example_inputs)
        self.ledger.take(example_inputs)
        for leaf in tree_leaves(example_inputs):
            if isinstance(leaf, Tensor):
                self.flow.put(leaf, [None] * leaf.dim(), INPUT)
                self.shadows.move([leaf])
        self.flow.contracted, self.flow.multiplied = self._note_contraction, self._note_product
        borrowed = torch.no_grad(), hooks(self._hooks()), no_fused_attention(), seen_by_python()
        with within(*borrowed, _Calls(self), _Operations(self)):
            output = call_model(self.model, example_inputs)
        found = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if not found:
            kind = type(output).__name__
            raise ValueError(f"the model returns a {kind}, in which no tensor is found; {WAY_OUT}")
        if not any(leaf in self.flow.tensors and self.flow.of(leaf).origin != INPUT for leaf in found):
            raise ValueError(f"the model's output holds no tensor that depends on its parameters; {WAY_OUT}")
        self.flow.freeze_all([self.flow.of(leaf) for leaf in found], "reaches the model's output")
        self.met = self.met or self.history.walk_back(found)

    def keep_unreached(self, example_inputs: Any) -> None:
        """Let what could meet layers that never ran stay as wide as they expect it."""
        idle = [name for name in self.kinds if name not in self.ran and own_tensors(get_layer(self.model, name))]
        unreached = {axis: labels for axis, labels in self.axes.items() if axis.layer in idle}
        run = getattr(example_inputs, "run", None)
        self.levels.keep_for(unreached, named_in(self.model, run) if unreached else set())

    def protect(self, tensors: Sequence[Tensor]) -> None:
        """Give memory of their own to tensors that an operation may write into."""
        for tensor in tensors:
            if tensor.untyped_storage().data_ptr() in self.borrowed:
                tensor.data = tensor.data.clone()

    def as_before(self, function: Any, args: tuple) -> tuple:
        """Return the arguments of an operation such that the first keeps its shape, should that change in place."""
        if name_of(function) not in RESHAPING or args[0] not in self.flow.tensors:
            return args
        alias = args[0].detach()
        self.flow.tensors[alias] = self.flow.tensors[args[0]]
        self.shadows.stand_in(alias, args[0])
        return alias, *args[1:]

    def saw(self, tensors: Sequence[Tensor]) -> None:
        """Note which layers ran."""
        for tensor in tensors:
            for owner in self.owners.get(id(tensor), ()):
                self.ran[owner] = None

    def _hooks(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        for name, module in self.model.named_modules():
            yield module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True, prepend=True)
            yield module.register_forward_hook(partial(self._leave, name), with_kwargs=True)

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.flow.stack.append(name)
        self.levels.note(tree_leaves((args, kwargs)))
        self.levels.cross("in", tree_leaves((args, kwargs)))
        self.paused += has_role(module, "attention")

    def _leave(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if is_projection(module):
            self.history.gave(name, output)
        if has_role(module, "attention"):
            self.paused -= 1
            if not self.paused:
                self._attend(name, module, args, kwargs, output)
        self.levels.cross("out", tree_leaves(output))
        self.flow.stack.pop()
        self.levels.note(tree_leaves(output))

    def _attend(self, name: str, layer: nn.MultiheadAttention, args: Any, kwargs: Any, output: Any) -> None:
        """Follow torch's attention as one layer: its heads, its projections and its inputs are equally wide."""
        projection = f"{name}.out_proj" if name else "out_proj"
        self.saw([*layer.parameters()])
        tensors = attended_tensors(args, kwargs)
        taken = [self.flow.of(tensor) for tensor in tensors]
        keep_tokens(self.flow, taken, range(tensors[0].dim() - 1))
        for entry in taken:
            self.flow.use_statistics(entry)
        self.ledger.add(attention_factors(layer, tensors, self.axes.get(LayerAxis(name, "in"))), tensors)
        if LayerAxis(name, "in") not in self.axes:
            frozen = [*taken, *(self.flow.of(parameter) for parameter in layer.parameters())]
            self.flow.freeze_all(frozen, self.unknown.get(name, "is not understood"))
            self.flow.put(output[0], [None] * output[0].dim())
            return
        width = self.axes[LayerAxis(name, "in")]
        for entry in taken:
            self.flow.join(width, entry.dims[-1], entry.origin)
        for axis in (LayerAxis(name, "out"), LayerAxis(projection, "in"), LayerAxis(projection, "out")):
            self.flow.join(width, self.axes[axis])
        rows = self.axes[LayerAxis(name, "out")]
        self.contractions.append(Contraction(name, self.flow.join_blocks(width, layer.num_heads), rows, follows=True))
        self.flow.put(output[0], [*[None] * (output[0].dim() - 1), width])

    def note_root(self, size: Size, operation: str) -> None:
        """Note that a module computes with a number that may follow pruning, perhaps with its root.

        What is followed as one operation, torch's attention, holds its numbers against each other.
        """
        if not self.paused:
            self.rooted.append((self.flow.module, size, operation))

    def keep_numbers(self) -> None:
        """Let widths stay that modules compute with, but for the roots that are an attention's temperature.

        A layer whose type a user registered may compute with its own width: `check_layer` proves it.
        """
        for number, (module, size, operation) in enumerate(self.rooted):
            if number in self.tempered or layer_type(self.model.get_submodule(module)).declared:
                continue
            if operation == EQUAL:
                self.flow.require(size, None)
                continue
            for source in leaves(size):
                self.flow.freeze(
                    self.flow.labels_of(source), f"its width is a number in {operation} in layer {module!r}"
                )

    def _note_contraction(self, labels: np.ndarray, left: Tensor, right: Tensor) -> None:
        queries, keys = self.shadows.of(left), self.shadows.of(right)
        if queries is not None and keys is not None and np.intersect1d(queries, keys).size:
            queries = keys = None
        rows = keys if queries is None else queries
        self.contractions.append(Contraction(self.flow.module, labels, rows, self.default_scale))

    def _note_product(self, left: Tensor, right: Tensor, labels: Sequence[np.ndarray | None]) -> None:
        """Note the channels of an attention: of queries, keys and values, of which neither is a weight."""
        if left in self.shadows.moving and right in self.shadows.moving:
            self.flow.attended += [found for found in labels if found is not None]

    def keep_temperatures(self) -> None:
        """Let attentions whose scale follows the number of their channels make up for it in their queries' weights.

        Where a root of that number is taken, it has to be once for each of the attention's products, or once for those
        of different queries: what is scaled by it otherwise is not known.
        """
        of_label = self.flow.components()[1]
        for contraction in self.contractions:
            labels, rows = contraction.labels, contraction.rows
            roots = self._roots_of(contraction, of_label)
            if labels.size == 1 or not (contraction.follows or roots):
                continue
            self.tempered.update(roots)
            if rows is None or not self._can_scale(rows):
                self.flow.freeze(labels, "is a head of an attention whose queries cannot be told from keys and values")
            elif roots and (contraction.follows or not self._scaled_once(contraction, len(roots), of_label)):
                self.flow.freeze(labels, "is a head of an attention that is not scaled once")
            elif self.shadows.spent(rows) or (contraction.follows and self._multiplied_elsewhere(contraction)):
                self.flow.freeze(labels, "is a head of an attention whose queries meet more than its keys")
            else:
                self.flow.temperatures.append((labels, rows))
                self._note_scales(contraction.module, labels)

    def _scaled_once(self, contraction: Contraction, roots: int, of_label: np.ndarray) -> bool:
        """Say whether its module takes a root for each product like this one, or one for those of different queries."""
        near = [each for each in self.contractions if each.module == contraction.module]
        alike = [each for each in near if np.array_equal(*_classes(of_label, each.labels, contraction.labels))]
        rows = [each.rows for each in alike if each.rows is not None]
        apart = len(rows) == len(alike) and np.unique(np.concatenate(rows)).size == sum(map(len, rows))
        return roots == len(alike) or (roots == 1 and apart)

    def _roots_of(self, contraction: Contraction, of_label: np.ndarray) -> list[int]:
        """Return which numbers are roots, taken in its module, of the number of a product's channels or a multiple."""
        found = []
        for number, (module, size, operation) in enumerate(self.rooted):
            if operation == ROOT and module == contraction.module:
                known = [self.flow.labels_of(source) for source in leaves(size)]
                known = [labels for labels in known if labels is not None]
                same = [np.array_equal(*_classes(of_label, labels, contraction.labels)) for labels in known]
                if same and all(same) and operator.index(size) % contraction.labels.size == 0:
                    found.append(number)
        return found

    def _multiplied_elsewhere(self, contraction: Contraction) -> bool:
        """Say whether the queries are also multiplied with something that torch's scale does not scale."""
        others = [other for other in self.contractions if other.module == contraction.module and not other.follows]
        return any(other.rows is not None and np.intersect1d(other.rows, contraction.rows).size for other in others)

    def _can_scale(self, rows: np.ndarray) -> bool:
        """Say whether all these labels are outputs of layers whose outputs can be multiplied by a number."""
        axes = list(self.axes)
        found = self._axis_of[rows]
        made = [axes[index] for index in np.unique(found[found >= 0])]
        outputs = (found >= 0).all() and all(axis.axis == "out" for axis in made)
        return outputs and all(scalable_slots(get_layer(self.model, axis.layer)) for axis in made)

    @cached_property
    def _axis_of(self) -> np.ndarray:
        """The place among the axes of the one to which each label belongs, or −1."""
        axis_of = np.full(self.flow.count, -1)
        for index, labels in enumerate(self.axes.values()):
            axis_of[labels] = index
        return axis_of

    def _note_scales(self, name: str, labels: np.ndarray) -> None:
        """Find numbers beside an attention, not read, that hold its head dimension to the power of −1/2."""
        watched = self.unread.watched.get(name)
        module = self.model.get_submodule(name)
        held, read = (vars(module), stored(type(module))) if watched is None else (watched.hidden, watched.read)
        for key, value in held.items():
            if isinstance(value, float) and key not in read and math.isclose(value, labels.size**-0.5):
                known = self.flow.scales.setdefault((name, key), labels)
                self.flow.join(known, labels)


def _classes(of_label: np.ndarray, *found: np.ndarray) -> list[np.ndarray]:
    return [np.unique(of_label[labels]) for labels in found]


def _declared_widths(
    name: str, layer: nn.Module | Tensor, axes: Mapping[str, Any], labels: Mapping[str, np.ndarray]
) -> Iterator[tuple[Attribute, np.ndarray]]:
    """Yield the attributes in which a layer keeps its widths, with the labels of the axes."""
    named = ((key, attribute) for key, axis in axes.items() if axis.slots for attribute in axis.attributes)
    for key, attribute in named:
        held = getattr(layer, attribute, None)
        index, width = (len(held) - 1, held[-1]) if isinstance(held, tuple) and held else (None, held)
        if isinstance(width, int) and operator.index(width) == labels[key].size:
            yield Attribute(name, attribute, index), labels[key]


class _Operations(TorchDispatchMode):
    def __init__(self, tracer: Tracer):
        super().__init__()
        self.tracer = tracer

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        arguments = tensors_in((*args, *kwargs.values()))
        if function._schema.is_mutable:
            self.tracer.protect(arguments)
        before = self.tracer.as_before(function, args)
        out = function(*args, **kwargs)
        args = before
        self.tracer.history.note(name_of(function), tensors_in((out,)), arguments)
        self.tracer.shadows.note(function, out, args, kwargs)
        if not self.tracer.paused:
            self.tracer.saw(tensors_in(args))
            follow(self.tracer.flow, function, out, args, kwargs)
            self.tracer.levels.note(tensors_in((out,)))
        self.tracer.ledger.note(function, out, args, kwargs, counted=not self.tracer.paused)
        return out


class _Calls(TorchFunctionMode):
    def __init__(self, tracer: Tracer):
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, flow = kwargs or {}, self.tracer.flow
        if self.tracer.paused:
            return function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if name == "__get__" and function == Tensor.shape.__get__:
            return sized_shape(flow, args[0])
        if name not in FUNCTIONS:
            use_as_numbers((args, kwargs), name)
            return function(*args, **kwargs)
        return FUNCTIONS[name](self.tracer, function, args, kwargs)


def trace_model(model: nn.Module, example_inputs: Any, *, whole_heads: bool = False) -> Traced:
    """Trace a copy of a model in eval mode; once more in train mode where layers are used only then.

    Raises:
        ValueError: the model does not run on its example inputs, its output depends on no parameter, or it is wrapped.
    """
    refuse_wrapped(model)
    try:
        tracer = _traced(model, example_inputs, whole_heads, attributes=True)
    except (TypeError, ValueError, RuntimeError, LookupError, NotImplementedError) as error:
        if isinstance(error, ValueError) and not is_torchs(error):
            raise
        # Scripted functions and the like refuse numbers that are not plain ones.
        try:
            tracer = _traced(model, example_inputs, whole_heads, attributes=False)
        except (TypeError, ValueError, RuntimeError, ArithmeticError, AttributeError, LookupError, NotImplementedError):
            said = misfit(model, example_inputs, error)
            raise ValueError(f"cannot trace this {type(model).__name__}: {said}") from error
    order = {name: index for index, name in enumerate(tracer.ran)}
    axes = sorted((axis for axis in tracer.axes if axis.layer in order), key=lambda axis: order[axis.layer])
    axes = {axis: tracer.axes[axis] for axis in axes}
    return Traced(tracer.flow, axes, tracer.kinds, tracer.met, tracer.ledger, tuple(tracer.parameters()))


def _traced(model: nn.Module, example_inputs: Any, whole_heads: bool, attributes: bool) -> Tracer:
    copied, borrowed = copy_borrowing(without_weight_norms(model))
    memory = frozenset(parameter.untyped_storage().data_ptr() for parameter in borrowed)
    tracer = Tracer(copied.eval(), Flow(whole_heads=whole_heads), memory)
    tracer.register()
    if attributes:
        tracer.flow.rooted = tracer.note_root
        track_attributes(tracer.model, tracer.note_root)
        watch_numbers(tracer.model)
        tracer.unread.watch()
    tracer.run(example_inputs)
    idle = [name for name in tracer.kinds if name not in tracer.ran]
    if idle:
        _run_training(tracer, example_inputs)
    tracer.keep_unreached(example_inputs)
    tracer.flow.follow_products()
    tracer.keep_temperatures()
    tracer.keep_numbers()
    for attribute, labels in tracer.unread.attributes(tracer.levels):
        tracer.flow.attributes.setdefault(attribute, labels)
    return tracer


def _run_training(tracer: Tracer, example_inputs: Any) -> None:
    """Trace the parts that run in train mode only, such as auxiliary classifiers; norms stay in eval mode."""
    for module in tracer.model.modules():
        module.training = any(True for _ in module.children()) and not is_known(module)
    ran, ledger = set(tracer.ran), tracer.ledger
    tracer.ledger = Ledger(tracer.flow)
    try:
        tracer.run(example_inputs)
    except (RuntimeError, ValueError, TypeError):
        for axis, labels in tracer.axes.items():
            if axis.layer in tracer.ran and axis.layer not in ran and axis.axis == "out":
                tracer.flow.freeze(labels, "is used in train mode only, in which the model does not run on this input")
    finally:
        tracer.model.eval()
        tracer.flow.stack.clear()
        tracer.paused = 0
        tracer.ledger = ledger
