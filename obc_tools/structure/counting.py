"""What the operations of a forward pass multiply: products of dimensions, each with the channels along it.

MACs are the multiply-adds of every convolution, matrix product and attention that runs, whichever module, subclass or
function calls it; norms, activations, pooling and look-ups are 0. These are the figures that torchvision publishes, and
half of what torch's FlopCounterMode counts where that sees all operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ..state import call_model, evaluating, hooks, no_fused_attention, own_inputs, within
from .flow import Flow, Labels, handler_of, into, name_of, tensors_in
from .operations import ATTENTIONS


class Factor(NamedTuple):
    """One dimension of a product: ⌊size / divisor⌋, and the labels of its positions (None: a fixed width)."""

    size: int
    labels: Labels = None
    divisor: int = 1


@dataclass(frozen=True, eq=False)
class Product:
    """What one operation multiplies and adds, or how many numbers a parameter holds: the product of its factors.

    ``batched``: it is so for all examples of a batch together; else it runs once, however large the batch.
    """

    layer: str
    factors: tuple[Factor, ...]
    batched: bool = True

    @property
    def size(self) -> int:
        """The product of all factors."""
        return math.prod(factor.size // factor.divisor for factor in self.factors)


Formula = Callable[[Flow, Any, tuple], Iterator[Sequence[Factor]]]
FORMULAS: dict[str, Formula] = {}
"""What each of torch's operations multiplies, given the labels of its tensors, its result and its arguments."""

WITHOUT_PRODUCTS = (
    "_local_scalar_dense", "equal", "nonzero", "_unique2", "bincount", "argsort", "searchsorted", "bucketize", "nms",
    "roi_align", "roi_pool", "scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill",
    "masked_select", "masked_scatter", "take", "diagonal", "tril", "triu", "unfold", "_embedding_bag", "kthvalue",
    "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "view_as_complex", "view_as_real", "complex", "polar",
    "aminmax",
)  # fmt: skip
"""Operations that the trace does not follow and that multiply no matrices all the same."""

STRETCHING = ("expand", "repeat", "zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")
"""Operations by which a tensor gets as long as the batch."""

BATCHED, WEIGHTED = 1, 2


counts = into(FORMULAS)


def _dims(flow: Flow, tensor: Tensor) -> list[Factor]:
    return [Factor(size, labels) for size, labels in zip(tensor.shape, flow.of(tensor).dims, strict=True)]


@counts("mm", "bmm", "mv", "dot", "vdot", "_int_mm", "_scaled_mm", "_grouped_mm")
def _product(flow: Flow, out: Tensor, args: tuple) -> Iterator[Sequence[Factor]]:
    left, right = args[:2]
    yield [*_dims(flow, left), *(_dims(flow, right)[-1:] if right.dim() > 1 else [])]


@counts("addmm", "baddbmm", "addbmm", "addmv", "_addmm_activation")
def _product_with_bias(flow: Flow, out: Tensor, args: tuple) -> Iterator[Sequence[Factor]]:
    return _product(flow, out, args[1:])


@counts("convolution", "_convolution", "convolution_overrideable")
def _convolution(flow: Flow, out: Tensor, args: tuple) -> Iterator[Sequence[Factor]]:
    taken, kernel = args[:2]
    transposed, groups = args[6], args[8]
    first = out.dim() - kernel.dim() + 1
    source, result = _dims(flow, taken), _dims(flow, out)
    moving, other = (source, result) if transposed else (result, source)
    # Every channel its own group: groups and channels go together.
    alone = groups == taken.shape[first] and (not transposed or groups == out.shape[first])
    depth = Factor(1) if alone else other[first]._replace(divisor=groups)
    yield [*moving, depth, *map(Factor, kernel.shape[2:])]


@counts("deform_conv2d")
def _deformable_convolution(flow: Flow, out: Tensor, args: tuple) -> Iterator[Sequence[Factor]]:
    yield [*_dims(flow, out), *_dims(flow, args[1])[1:]]


@counts(*ATTENTIONS)
def _attention(flow: Flow, out: Any, args: tuple) -> Iterator[Sequence[Factor]]:
    query, key, value = (_dims(flow, tensor) for tensor in args[:3])
    yield [*query, key[-2]]
    yield [*query[:-1], key[-2], value[-1]]


@counts("mkldnn_rnn_layer")
def _recurrent_layer(flow: Flow, out: Any, args: tuple) -> Iterator[Sequence[Factor]]:
    return _recurrent(flow, out, (args[0], args[1:3]))


@counts("_cudnn_rnn", "miopen_rnn")
def _recurrent(flow: Flow, out: Any, args: tuple) -> Iterator[Sequence[Factor]]:
    """Yield what each weight of a recurrent network multiplies, once a step and example."""
    for weight in args[1]:
        if weight.dim() == 2:
            yield [*_dims(flow, args[0])[:-1], *_dims(flow, weight)]


@counts("_trilinear")
def _bilinear(flow: Flow, out: Any, args: tuple) -> Iterator[Sequence[Factor]]:
    outputs, lefts, rights = _dims(flow, args[1])[-3:]
    examples = Factor(args[0].shape[0])
    yield [examples, outputs, lefts, rights]
    yield [examples, outputs, rights]


def attention_factors(layer: nn.MultiheadAttention, taken: Sequence[Tensor], width: Labels) -> Iterator[list[Factor]]:
    """Yield what torch's attention of these queries, keys and values multiplies, its ``width`` labels given."""
    flat = taken[0].dim() == 2
    batch = 1 if flat else taken[0].shape[0 if layer.batch_first else 1]
    queries, keys, values = (tensor.shape[-2 if flat or layer.batch_first else 0] for tensor in taken)
    channels = Factor(layer.embed_dim, width)
    widths = (layer.embed_dim, layer.kdim, layer.vdim)
    for length, size in zip((queries, keys, values), widths, strict=True):
        yield [Factor(batch * length), Factor(size, width), channels]
    attended = keys + (layer.bias_k is not None) + layer.add_zero_attn
    yield [Factor(2 * batch * queries), Factor(attended), channels]
    yield [Factor(batch * queries), channels, channels]


@dataclass
class Ledger:
    """What the operations of a forward pass multiplied, as they ran.

    ``unknown`` names operations that work on weights, or on what was made of them, and that have no formula.
    """

    flow: Flow
    batch: int = 1
    products: list[Product] = field(default_factory=list)
    unknown: dict[str, None] = field(default_factory=dict)
    marks: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)

    def take(self, example_inputs: Any) -> None:
        """Note the tensors that a batch of examples consists of."""
        leaves = [leaf for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor)]
        self.batch = next((len(leaf) for leaf in leaves if leaf.dim()), 1)
        for leaf in leaves:
            self.marks[leaf] = BATCHED

    def note(self, function: Any, out: Any, args: tuple, kwargs: dict, counted: bool = True) -> None:
        """Note one operation, after the labels of its results are known; only what it is made of unless ``counted``."""
        name = name_of(function).removesuffix("_")
        arguments, results = tensors_in((*args, *kwargs.values())), tensors_in((out,))
        mark = self._mark(arguments)
        if self.batch > 1 and name in STRETCHING and any(self.batch in tensor.shape[:2] for tensor in results):
            mark |= BATCHED
        for tensor in results if mark else ():
            self.marks[tensor] = mark
        formula = FORMULAS.get(name)
        if counted and formula is not None:
            self.add(formula(self.flow, out, args), arguments)
        elif counted and mark & WEIGHTED and name not in WITHOUT_PRODUCTS and handler_of(function) is None:
            self.unknown[self.flow.where(name)] = None

    def add(self, products: Iterable[Sequence[Factor]], taken: Iterable[Tensor]) -> None:
        """Note what the layer that is running multiplies of the tensors ``taken``."""
        batched = bool(self._mark(taken) & BATCHED)
        self.products += [Product(self.flow.module, tuple(factors), batched) for factors in products]

    def _mark(self, tensors: Iterable[Tensor]) -> int:
        """Say whether any of these is made of the batch's examples, or as long as it, and whether of weights."""
        mark = 0
        for tensor in tensors:
            mark |= self.marks.get(tensor, 0) | (WEIGHTED if isinstance(tensor, nn.Parameter) else 0)
        return mark


class _Counting(TorchDispatchMode):
    def __init__(self, ledger: Ledger):
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.ledger.note(function, out, args, kwargs or {})
        return out


def count(model: nn.Module, example_inputs: Any) -> Ledger:
    """Run a model once, in eval mode and without gradients, and return what its operations multiply."""
    ledger, example_inputs = Ledger(Flow()), own_inputs(example_inputs)
    ledger.take(example_inputs)
    names = hooks(_naming(model, ledger.flow.stack))
    with within(evaluating(model), torch.no_grad(), no_fused_attention(), names, _Counting(ledger)):
        call_model(model, example_inputs)
    return ledger


def _naming(model: nn.Module, stack: list[str]) -> Iterator[torch.utils.hooks.RemovableHandle]:
    """Let modules put their names on a stack while they run."""

    def leave(*_: Any) -> None:
        stack.pop()

    for name, module in model.named_modules():
        yield module.register_forward_pre_hook(lambda *_, name=name: stack.append(name), prepend=True)
        yield module.register_forward_hook(leave)
