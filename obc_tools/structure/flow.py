"""How the channels of tensors flow through the operations of a forward pass.

Every position of a dimension that may shrink carries a *label*, a whole number; a dimension without labels has a fixed
width. `Flow` collects what the operations demand: labels that stand for one channel (`join`), and labels that may
never go (`freeze`). `OPERATIONS` says for each of torch's operations what it demands and how its results are labelled.
An operation that is not in the table freezes what goes into it, so that nothing is ever assumed.
"""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .layers import layer_type


@dataclass(frozen=True)
class Attribute:
    """A whole number that a module keeps; ``index`` is its place in a list or tuple, or its name in a configuration.

    ``rooted`` is called with a number made of it that shapes nothing, and the operation.
    """

    module: str
    name: str
    index: int | str | None = None
    rooted: Callable[[int, str], None] = field(default=lambda size, operation: None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.module}.{self.name}" + ("" if self.index is None else f"[{self.index}]")


@dataclass(frozen=True, eq=False)
class Dimension:
    """The width of a dimension of a tensor, by the labels of its positions.

    ``equal_to`` is called with what the width was compared with and found equal to, ``rooted`` with a number made of
    it that shapes nothing, and the operation. ``salt`` tells the widths of one trace from all other numbers where a
    table keeps results by them: what is kept for a plain number knows no labels.
    """

    labels: np.ndarray
    equal_to: Callable[[int, np.ndarray], None] = lambda size, labels: None
    rooted: Callable[[int, str], None] = lambda size, operation: None
    salt: int = 0


@dataclass(frozen=True, eq=False)
class Combined:
    """An arithmetic expression of two numbers."""

    operation: Callable[[int, int], int]
    left: int
    right: int


EQUAL = "equal"
"""What is said of the difference of two attributes that were found equal: it has to stay 0."""


class Size(int):
    """A whole number with its source; arithmetic on it keeps the sources.

    What makes a plain number of it notes that (`as_number`). Python asks nobody where it takes a number as an index,
    looks one up in a table, or divides a float by it: there the other side notes it, as far as `plain_numbers` reaches,
    and beyond, such as in a table that a function makes, the proof alone finds a width so used.
    """

    source: Attribute | Dimension | Combined

    def __new__(cls, value: int, source: Attribute | Dimension | Combined) -> Size:
        size = super().__new__(cls, value)
        size.source = source
        return size

    def __eq__(self, other: object) -> bool:
        equal = int.__eq__(self, other)
        sizes = [size for size in (self, other) if isinstance(size, Size)]
        widths = [size for size in sizes if isinstance(size.source, Dimension)]
        for size in widths if equal is True else ():
            size.source.equal_to(other if size is self else self, size.source.labels)
        if equal is True and not widths and len(sizes) == 2:
            (self - other).as_number(EQUAL)
        elif equal is not NotImplemented and not (widths and equal) and operator.index(other) > 1:
            for size in sizes:
                size.as_number("comparison")
        return equal

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        salts = {source.salt for source in leaves(self) if isinstance(source, Dimension)}
        return hash((operator.index(self), *sorted(salts))) if any(salts) else hash(operator.index(self))

    def __float__(self) -> float:
        return float(self.as_number("float"))

    def __int__(self) -> int:
        return self.as_number("int")

    def __format__(self, how: str) -> str:
        return format(self.as_number("format"), how)

    def __str__(self) -> str:
        return str(self.as_number("str"))

    def __neg__(self) -> Size:
        return 0 - self

    def __pow__(self, power: Any, *modulus: Any) -> Any:
        if isinstance(power, float):
            return self.as_number("root" if abs(power) == 0.5 else "pow") ** float(power)
        return int.__pow__(self.as_number("pow"), plain(power, "pow"), *modulus)

    def as_number(self, operation: str) -> int:
        """Return the plain number, for an operation that shapes no tensor: it would change with the width."""
        source = next(leaves(self), None)
        if source is not None:
            source.rooted(self, operation)
        return operator.index(self)

    def __array_ufunc__(self, function: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        name = "root" if function.__name__ == "sqrt" else function.__name__
        return getattr(function, method)(*(plain(arg, name) for arg in args), **kwargs)

    def __reduce__(self) -> tuple:
        return int, (operator.index(self),)


def _arithmetic(operation: Callable[[Any, Any], Any], swapped: bool) -> Callable[[Size, Any], Any]:
    def combine(self: Size, other: Any) -> Any:
        left, right = (other, self) if swapped else (self, other)
        if isinstance(other, float | complex):
            number = self.as_number(operation.__name__)
            return operation(other, number) if swapped else operation(number, other)
        if not isinstance(other, int):
            self.as_number(operation.__name__)  # such as a list that is repeated
            return NotImplemented
        return Size(operation(operator.index(left), operator.index(right)), Combined(operation, left, right))

    return combine


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    _operation = getattr(operator, _name)
    setattr(Size, f"__{_name}__", _arithmetic(_operation, swapped=False))
    setattr(Size, f"__r{_name}__", _arithmetic(_operation, swapped=True))


def plain(value: Any, operation: str) -> Any:
    """Return a value without its source; the number that it is would change with a width."""
    return value.as_number(operation) if isinstance(value, Size) else value


def _numeric(method: str) -> Callable[..., Any]:
    name = method.strip("_")

    def compute(self: Size, *others: Any) -> Any:
        return getattr(int, method)(self.as_number(name), *(plain(other, name) for other in others))

    return compute


for _name in ("truediv", "divmod", "lshift", "rshift", "and", "or", "xor"):
    for _method in (f"__{_name}__", f"__r{_name}__"):
        setattr(Size, _method, _numeric(_method))
for _method in ("__rpow__", "__invert__", "__abs__", "bit_length"):
    setattr(Size, _method, _numeric(_method))
for _name in ("numerator", "real"):
    setattr(Size, _name, property(lambda self, name=_name: self.as_number(name)))
for _method in ("__round__", "__floor__", "__ceil__", "__trunc__", "__pos__"):
    setattr(Size, _method, lambda self, *digits: self)


def _comparison(method: str, trivial: int | None) -> Callable[[Size, Any], bool]:
    """Compare widths, which are never less than one: `width > 0` is no question."""

    def compare(self: Size, other: Any) -> bool:
        asks = not (trivial is not None and isinstance(other, int) and other <= trivial)
        return getattr(int, method)(self.as_number("comparison") if asks else operator.index(self), other)

    return compare


for _method, _trivial in {"__lt__": None, "__le__": None, "__gt__": 0, "__ge__": 1}.items():
    setattr(Size, _method, _comparison(_method, _trivial))


def leaves(value: int) -> Iterator[Attribute | Dimension]:
    """Iterate over the sources of a number; a constant has none."""
    if isinstance(value, Size):
        if isinstance(value.source, Combined):
            yield from leaves(value.source.left)
            yield from leaves(value.source.right)
        else:
            yield value.source


def evaluate(value: int, look_up: Callable[[int, Attribute | Dimension], int]) -> int:
    """Compute a number anew from what `look_up(value, source)` says that its sources are."""
    if not isinstance(value, Size):
        return value
    if not isinstance(value.source, Combined):
        return look_up(operator.index(value), value.source)
    left, right = (evaluate(side, look_up) for side in (value.source.left, value.source.right))
    if right == 0 and value.source.operation in (operator.floordiv, operator.mod):
        return -1
    return value.source.operation(left, right)


HELD = (list, tuple, torch.Size)
"""What holds widths in attributes; a shape is one that the model remembers of an earlier pass."""


def track_attributes(model: nn.Module, rooted: Callable[[int, str], None]) -> None:
    """Replace, in place, the whole numbers that modules keep by `Size` values that know their attribute."""
    for name, module in model.named_modules():
        plain_torch, widths = type(module).__module__.startswith("torch.nn"), layer_type(module).widths
        for key, value in vars(module).items():
            if key.startswith("_"):
                continue
            if type(value) is int:
                module.__dict__[key] = Size(value, Attribute(name, key, rooted=rooted))
            elif type(value) in HELD and (key in widths or not plain_torch) and int in map(type, value):
                module.__dict__[key] = type(value)(_tracked(enumerate(value), name, key, rooted).values())
            elif _is_configuration(value):
                vars(value).update(_tracked(vars(value).items(), name, key, rooted))


def _tracked(items: Iterable[tuple], name: str, key: str, rooted: Callable[[int, str], None]) -> dict[Any, Any]:
    return {i: Size(v, Attribute(name, key, i, rooted)) if type(v) is int else v for i, v in items}


def _is_configuration(value: Any) -> bool:
    """Say whether a value is an object that keeps numbers by names, of which a copied model has a copy of its own."""
    held = () if callable(value) or isinstance(value, Tensor) else getattr(value, "__dict__", {}).values()
    simple = not any(isinstance(each, nn.Module | Tensor) for each in held)
    return simple and int in map(type, held) and copy.deepcopy(value) is not value


Labels = np.ndarray | None
INPUT = "is coupled to the model's input"
FIXED = "meets a tensor of fixed width"


SUMMED = "is summed up or compared over its channels"

BROADCASTING = ("add", "sub", "rsub", "mul", "div", "neg", "abs", "pow", "sqrt", "rsqrt", "reciprocal", "clamp",
                "clamp_min", "maximum", "_to_copy", "clone", "detach", "alias", "expand")  # fmt: skip
NORMALISING = (*BROADCASTING, "unsqueeze", "squeeze", "view", "_unsafe_view", "permute", "transpose", "slice", "mean",
               "sum")  # fmt: skip
"""Operations by which a number taken over channels goes on, until the same channels are normalised by it."""


@dataclass
class Channels:
    """The labels of each dimension of a tensor; ``origin`` says why unlabelled ones are fixed.

    ``weight_of`` names the layer whose weight this is, as it is or standardised. ``statistics`` are the channels over
    which its values were taken and to which they were not given back.
    """

    dims: list[Labels]
    origin: str = FIXED
    weight_of: str | None = None
    statistics: tuple[np.ndarray, ...] = ()

    @property
    def labelled(self) -> bool:
        """Say whether any dimension carries labels."""
        return any(labels is not None for labels in self.dims)


@dataclass(frozen=True, eq=False)
class Passage:
    """Labels that went into an operation, and those that came out of it or were summed over in it."""

    operation: str
    entered: Sequence[np.ndarray]
    left: Sequence[np.ndarray]


@dataclass
class Flow:
    """What one or more forward passes demand of the labels.

    ``stack`` are the modules that are running, ``spent`` what the current operation sums over or cuts off,
    ``returned`` statistics over channels with what was normalised by them, ``stretched`` the labels of dimensions that
    are copies of one. ``attributes`` are those that were seen to shape something, ``declared`` what the table of layer
    types says of widths.
    """

    count: int = 0
    joined: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    frozen: list[tuple[np.ndarray, str]] = field(default_factory=list)
    sizes: list[tuple[int, Labels]] = field(default_factory=list)
    attributes: dict[Attribute, np.ndarray] = field(default_factory=dict)
    declared: dict[Attribute, np.ndarray] = field(default_factory=dict)
    scales: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    attended: list[np.ndarray] = field(default_factory=list)
    temperatures: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    pairs: list[np.ndarray] = field(default_factory=list)
    tensors: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    grouped: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    requested: Sequence[Any] | None = None
    stretching: bool = False
    stretched: set[int] = field(default_factory=set)
    salt: int = field(default_factory=itertools.count(1).__next__)
    whole_heads: bool = False
    stack: list[str] = field(default_factory=list)
    spent: list[np.ndarray] = field(default_factory=list)
    returned: list[tuple[np.ndarray, Sequence[np.ndarray]]] = field(default_factory=list)
    passages: list[Passage] = field(default_factory=list)
    contracted: Callable[[np.ndarray, Tensor, Tensor], None] = lambda labels, left, right: None
    multiplied: Callable[[Tensor, Tensor, Sequence[Labels]], None] = lambda left, right, labels: None
    rooted: Callable[[int, str], None] = lambda size, operation: None

    @property
    def module(self) -> str:
        """The name of the module that is running."""
        return self.stack[-1] if self.stack else ""

    def where(self, operation: str) -> str:
        """Name an operation and the layer in which it runs."""
        return f"{operation} in layer {self.module!r}"

    def fresh(self, width: int) -> np.ndarray:
        """Return labels that nothing else carries."""
        self.count += width
        return np.arange(self.count - width, self.count)

    def of(self, tensor: Tensor) -> Channels:
        """Return the channels of a tensor; an unknown tensor has none."""
        found = self.tensors.get(tensor)
        return found if found is not None else Channels([None] * tensor.dim())

    def labels_of(self, source: Attribute | Dimension) -> Labels:
        """Return the labels whose number a source holds; None where it is not known to follow any."""
        if isinstance(source, Dimension):
            return source.labels
        return self.attributes.get(source, self.declared.get(source))

    def put(self, tensor: Tensor, dims: Sequence[Labels], origin: str = FIXED, weight_of: str | None = None) -> None:
        """Set the labels of a tensor."""
        self.tensors[tensor] = Channels(list(dims), origin, weight_of)

    def join(self, one: Labels, other: Labels, reason: str = FIXED) -> Labels:
        """Let equally long labels stand for the same channels, position by position; return them.

        None stands for a fixed width: what it is joined with never goes, and is a fixed width from there on.
        """
        if one is None or other is None:
            self.freeze(one if other is None else other, reason)
            return None
        if one.size != other.size:
            self.freeze(one, "meets an axis of another length")
            self.freeze(other, "meets an axis of another length")
            return None
        if one is not other:
            self.joined.append((one, other))
        return one

    def freeze(self, labels: Labels, reason: str) -> None:
        """Let channels never go."""
        if labels is not None and labels.size:
            self.frozen.append((labels.ravel(), reason))

    def spend(self, *dims: Labels) -> None:
        """Note that channels rightly end in the current operation, such as those that a product sums over."""
        self.spent += [labels for labels in dims if labels is not None]

    def note_passage(self, operation: str, known: Iterable[Channels], results: Iterable[Tensor]) -> None:
        """Note which labels went into an operation, for the check that none is lost; a single channel never goes."""
        left = [labels for result in results for labels in self.of(result).dims if labels is not None]
        left += self.spent
        same = {id(labels) for labels in left}
        dims = (labels for entry in known for labels in entry.dims)
        entered = [labels for labels in dims if labels is not None and labels.size > 1 and id(labels) not in same]
        if entered:
            self.passages.append(Passage(self.where(operation), entered, left))

    def keep_two(self, labels: Labels) -> None:
        """Let an axis never be left with one channel, with which an operation does something else."""
        if labels is not None and labels.size > 1:
            self.pairs.append(labels.ravel())

    def freeze_all(self, channels: Iterable[Channels], reason: str) -> None:
        """Let no channel of any of these tensors ever go, nor any over which their values were taken."""
        for entry in channels:
            for labels in entry.dims:
                self.freeze(labels, reason)
            self.use_statistics(entry)

    def use_statistics(self, taken: Channels) -> None:
        """Let channels stay over which the values of a tensor were taken that go on as features."""
        for labels in taken.statistics:
            self.freeze(labels, SUMMED)

    def join_blocks(self, labels: Labels, blocks: int) -> Labels:
        """Let equal runs of an axis lose the same positions; return the labels of one run."""
        if labels is None or blocks == 1:
            return labels
        return self.join_rows(labels.reshape(blocks, -1))

    def join_rows(self, rows: np.ndarray) -> np.ndarray:
        """Let the rows of a matrix of labels lose the same positions; return the labels of the first."""
        if len(rows) > 1:
            self.joined.append((np.broadcast_to(rows[0], rows[1:].shape), rows[1:]))
        return rows[0]

    def components(self) -> tuple[int, np.ndarray]:
        """Return how many classes the joined labels make, and the class of each label."""
        none = np.zeros(0, dtype=np.int64)
        rows, columns = (np.concatenate([none, *(pair[side].ravel() for pair in self.joined)]) for side in (0, 1))
        graph = coo_array((np.ones(rows.size, dtype=bool), (rows, columns)), shape=(self.count, self.count))
        return connected_components(graph, directed=False)

    def follow_products(self) -> None:
        """Let an attribute follow runs of channels that go together, where it is a factor of a width: heads · head_dim.

        What a network computes from such numbers is checked as all sizes are (`coupling.Classes`).
        """
        products = [
            (size.source.left, size.source.right, labels)
            for whole, run in self.sizes
            for size, labels in ([] if run is None else _terms(whole, run))
            if isinstance(size, Size) and isinstance(size.source, Combined) and size.source.operation is operator.mul
        ]
        found = [each for each in products if all(_is_attribute(number) for number in each[:2])]
        of_label = self.components()[1] if found else None
        for left, right, labels in found:
            whole = labels.reshape(operator.index(left), operator.index(right))
            for count, runs in ((left, whole), (right, whole.T)):
                if (of_label[runs] == of_label[runs[:, :1]]).all() and runs.shape[1] > 1:
                    self.require(count, runs[:, 0])

    def require(self, size: int, labels: Labels) -> None:
        """Demand that a number which cuts or shapes an axis is the number of its kept channels, whatever is pruned."""
        if labels is not None and not isinstance(size, Size):
            self.freeze(labels, f"has to have a constant width of {size}")
            return
        if not isinstance(size, Size) or not any(True for _ in leaves(size)):
            return
        self.sizes.append((size, labels))
        if labels is None:
            return
        source = size.source
        if isinstance(source, Attribute) and self.labels_of(source) is None:
            self.attributes[source] = labels
        elif not isinstance(source, Combined):
            self._join_equal(self.labels_of(source), labels, size)
        else:
            self._join_share(source, labels)
            self._follow_multiple(source, labels)

    def _join_equal(self, one: np.ndarray, other: np.ndarray, size: int) -> None:
        """Join two axes that one number shapes; it may also cut off a shorter rest, which then stays."""
        if one.size == other.size:
            self.join(_in_runs(one), _in_runs(other))
        else:
            self.freeze(one, f"shares a width of {operator.index(size)} with an axis of another length")
            self.freeze(other, f"shares a width of {operator.index(size)} with an axis of another length")

    def _follow_multiple(self, source: Combined, labels: np.ndarray) -> None:
        """Let an attribute follow an axis that is a multiple of it: `head_dim * 3`."""
        one, times = (source.left, source.right) if isinstance(source.left, Size) else (source.right, source.left)
        single = isinstance(one, Size) and isinstance(one.source, Attribute) and not isinstance(times, Size)
        if single and source.operation is operator.mul and labels.size == operator.index(one) * times:
            self.require(one, self.join_blocks(labels, times))

    def _join_share(self, source: Combined, labels: np.ndarray) -> None:
        """Join an axis with the wider one of which it is an equal share: `width // heads` channels a head."""
        whole = source.left.source if isinstance(source.left, Size) else None
        shares = isinstance(whole, Dimension) and whole.labels.size == labels.size * operator.index(source.right)
        if shares and not np.isin(labels, whole.labels).all():  # a part of it is joined as it was cut
            self.join(self.join_rows(whole.labels.reshape(-1, labels.size)), labels)


def _is_attribute(number: int) -> bool:
    return isinstance(number, Size) and isinstance(number.source, Attribute)


def _terms(size: int, labels: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the terms of a sum that is a width, each with its run of the labels."""
    if isinstance(size, Size) and isinstance(size.source, Combined) and size.source.operation is operator.add:
        first = operator.index(size.source.left)
        yield from _terms(size.source.left, labels[:first])
        yield from _terms(size.source.right, labels[first:])
    elif operator.index(size) == labels.size:
        yield size, labels


def _in_runs(labels: np.ndarray) -> np.ndarray:
    """Order labels as runs of all different ones, where each occurs equally often; any order keeps widths equal."""
    unique, first, counts = np.unique(labels, return_index=True, return_counts=True)
    if (counts == 1).all() or (counts != counts[0]).any():
        return labels
    return np.tile(unique[np.argsort(first)], counts[0])


Handler = Callable[[Flow, Any, tuple, dict], None]
OPERATIONS: dict[str, Handler] = {}
T = TypeVar("T")


def into(table: dict[str, T]) -> Callable[..., Callable[[T], T]]:
    """Return what enters functions into a table under the names of torch's operations."""

    def named(*names: str) -> Callable[[T], T]:
        def enter(function: T) -> T:
            table.update(dict.fromkeys(names, function))
            return function

        return enter

    return named


operation = into(OPERATIONS)


def tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors among arguments, also those in lists."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(value)
    return found


def follow(flow: Flow, function: Any, out: Any, args: tuple, kwargs: dict) -> None:
    """Label the results of one operation and note what it demands."""
    tensors = tensors_in((*args, *kwargs.values()))
    if not any(tensor in flow.tensors for tensor in tensors):
        return
    known, name, results = [flow.of(tensor) for tensor in tensors], name_of(function), tensors_in((out,))
    handler = handler_of(function)
    if not any(entry.labelled for entry in known) and not (flow.stretching and name == "expand"):
        origin = INPUT if any(entry.origin == INPUT for entry in known) else FIXED
        for result in results:
            flow.put(result, [None] * result.dim(), origin)
    elif handler is None:
        flow.freeze_all(known, f"passes through {flow.where(name)}, where its channels cannot be followed")
        for result in results:
            flow.put(result, [None] * result.dim())
    else:
        flow.spent = []
        handler(flow, out, args, kwargs)
        flow.note_passage(name, known, results)
    for tensor, entry in zip(tensors, known, strict=True):
        if entry.statistics:
            _follow_statistics(flow, name, results, tensor, entry)


def _follow_statistics(flow: Flow, name: str, results: Sequence[Tensor], tensor: Tensor, taken: Channels) -> None:
    """Carry what was taken over channels on to where they are normalised by it; used otherwise, it keeps them."""
    into_another = name.endswith("_") and tensor is not results[0]
    if name.removesuffix("_") not in NORMALISING:
        flow.use_statistics(taken)
        return
    for result in results:
        channels = flow.of(result)
        stretched = _stretched(tensor.shape, result.shape) if name.removesuffix("_") in BROADCASTING else ()
        met = [channels.dims[dim] for dim in stretched if channels.dims[dim] is not None]
        if met:
            flow.returned += [(labels, met) for labels in taken.statistics]
        elif into_another:  # perhaps a part of a tensor that knows nothing of it
            flow.use_statistics(taken)
        else:
            known = {id(labels) for labels in channels.statistics}
            channels.statistics += tuple(labels for labels in taken.statistics if id(labels) not in known)


def _stretched(old: Sequence[int], new: Sequence[int]) -> list[int]:
    """Return the dimensions, counted from the last, along which values of a tensor of shape `old` are repeated."""
    return [dim for dim in range(-len(new), 0) if new[dim] > 1 and (-dim > len(old) or old[dim] == 1)]


def handler_of(function: Any) -> Handler | None:
    """Return what follows the channels through one of torch's operations, or None."""
    name = name_of(function)
    handler = OPERATIONS.get(name) or OPERATIONS.get(name.rstrip("_"))
    return handler or (elementwise if torch.Tag.pointwise in getattr(function, "tags", ()) else None)


def name_of(function: Any) -> str:
    """Return the name of one of torch's operations; those of a higher order have no overloads."""
    return getattr(function, "overloadpacket", function).__name__


@operation(
    "_to_copy", "clone", "contiguous", "detach", "alias", "lift_fresh", "copy", "empty_like", "zeros_like", "ones_like",
    "hardswish", "hardsigmoid", "hardtanh", "leaky_relu", "_prelu_kernel", "native_dropout", "rand_like", "randn_like",
    "full_like", "where", "masked_fill", "threshold", "relu6", "elu", "celu", "softplus", "bernoulli", "dropout",
    "fill", "zero", "lerp", "addcmul", "addcdiv", "nan_to_num", "uniform", "normal", "_fused_dropout",
    "log_sigmoid_forward", "rrelu_with_noise",
)  # fmt: skip
def elementwise(flow: Flow, out: Any, args: tuple, kwargs: dict) -> None:
    """Join what stands at the same position; dimensions of length 1 stretch."""
    tensors = tensors_in((*args, *kwargs.values()))
    for result in tensors_in((out,)):
        dims: list[Labels] = []
        for dim in range(-result.dim(), 0):
            here = [t for t in tensors if t.dim() >= -dim and t.shape[dim] == result.shape[dim] and t.shape[dim] > 1]
            dims.append(meet(flow, [(flow.of(t).dims[dim], flow.of(t).origin) for t in here]))
        same = [flow.of(t).weight_of for t in tensors if t.shape == result.shape and flow.of(t).weight_of]
        flow.put(result, dims, weight_of=same[0] if same else None)


def meet(flow: Flow, found: Sequence[tuple[Labels, str]]) -> Labels:
    """Join the labels of one dimension of several tensors, and return them."""
    first = next((labels for labels, _ in found if labels is not None), None)
    result = first
    for labels, origin in found if first is not None else ():
        result = None if flow.join(first, labels, origin) is None else result
    return result
