"""What calls from Python demand of channels: the sizes with which they cut, shape and make tensors.

Operations see plain numbers only; here the numbers still know whether they are constants, attributes or the widths of
other tensors. `FUNCTIONS` maps the name of a function to what stands in for it while a model is traced.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .flow import HELD, Dimension, Flow, Size, into, tensors_in


class Tracing(Protocol):
    """What the stand-ins use of a tracer."""

    flow: Flow
    contractions: list[Any]
    paused: int
    default_scale: bool

    def saw(self, tensors: Sequence[Tensor]) -> None: ...


StandIn = Callable[[Tracing, Callable, tuple, dict], Any]
FUNCTIONS: dict[str, StandIn] = {}


stand_in = into(FUNCTIONS)


def sized_shape(flow: Flow, tensor: Tensor) -> torch.Size:
    """Return the shape of a tensor; the widths of its dimensions that may shrink know their labels."""
    with torch._C.DisableTorchFunction():
        shape = tensor.shape
    found = flow.of(tensor)
    if not found.labelled:
        return shape
    sizes = list(shape)
    for dim, labels in enumerate(found.dims):
        if labels is not None:
            sizes[dim] = Size(sizes[dim], Dimension(labels, flow.require, flow.rooted, flow.salt))
    return torch.Size(sizes)


TAKES_LAYERS = ("linear", "embedding", "batch_norm", "conv1d", "conv2d", "conv3d", "conv_transpose1d",
                "conv_transpose2d", "conv_transpose3d", "_conv_forward", "deform_conv2d")  # fmt: skip
"""Functions whose numbers are a layer's own or quotients of widths that are equal, or none at all."""


def use_as_numbers(values: Any, operation: str) -> None:
    """Note that a function outside the table takes widths: what it does with them cannot be followed."""
    for value in tree_leaves(values):
        if isinstance(value, Size):
            value.as_number(operation)


@stand_in("multi_head_attention_forward")
def _attention_as_function(tracer: Tracing, function: Callable, args: tuple, kwargs: dict) -> Any:
    """Follow torch's attention as a function by its steps; what is masked or extended by it stays whole.

    It holds the width of the queries against that of all heads, so that both lose the same channels.
    """
    given = inspect.signature(function).bind(*args, **kwargs)
    given.apply_defaults()
    options, flow = given.arguments, tracer.flow
    if not _attends_plainly(options):
        taken = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        reason = f"is taken by {flow.where('multi_head_attention_forward')}, called as a function"
        flow.freeze_all([flow.of(tensor) for tensor in taken], reason)
        return function(*args, **kwargs)
    width, mixed = flow.of(options["query"]).dims[-1], _attended(tracer, options)
    flow.require(options["embed_dim_to_check"], width)
    flow.require(options["num_heads"], None)
    numbers = {name: operator.index(options[name]) for name in ("embed_dim_to_check", "num_heads")}
    tracer.paused += 1
    try:
        return mixed, function(**(options | numbers))[1] if options["need_weights"] else None
    finally:
        tracer.paused -= 1


def _attends_plainly(options: Mapping[str, Any]) -> bool:
    extra = ("key_padding_mask", "attn_mask", "bias_k", "bias_v", "static_k", "static_v")
    added = options["add_zero_attn"] or (options["training"] and options["dropout_p"])
    return options["query"].dim() == 3 and not added and all(options[name] is None for name in extra)


def _attended(tracer: Tracing, options: Mapping[str, Any]) -> Tensor:
    """Return what the heads make of queries, keys and values, (length, batch, channels) each."""
    weights = [options[f"{name}_proj_weight"] for name in "qkv"]
    if not options["use_separate_proj_weight"]:
        weights = options["in_proj_weight"].chunk(3)
    biases = (None, None, None) if options["in_proj_bias"] is None else options["in_proj_bias"].chunk(3)
    heads, flow = operator.index(options["num_heads"]), tracer.flow
    query, before = flow.of(options["query"]), len(tracer.contractions)
    parts = []
    for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
        part = nn.functional.linear(options[name], weight, bias)
        flow.join(query.dims[-1], flow.of(part).dims[-1], query.origin)
        parts.append(part.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3))
    del tracer.contractions[before:]  # with weights, as within layers: none is of queries and keys
    mixed = _attention(tracer, nn.functional.scaled_dot_product_attention, tuple(parts), {})
    mixed = mixed.permute(2, 0, 1, 3).flatten(2)
    return nn.functional.linear(mixed, options["out_proj_weight"], options["out_proj_bias"])


@stand_in(*TAKES_LAYERS)
def _layer(tracer: Tracing, function: Callable, args: tuple, kwargs: dict) -> Any:
    return function(*args, **kwargs)


@stand_in("size")
def _size(tracer: Tracing, function: Callable, args: tuple, kwargs: dict) -> Any:
    asked = args[1] if len(args) > 1 else kwargs.get("dim")
    shape = sized_shape(tracer.flow, args[0])
    return shape if asked is None else shape[asked]


def _flat(sizes: Sequence[Any]) -> list[Any]:
    return list(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], list | tuple) else list(sizes)


@stand_in("view", "reshape", "unflatten")
def _reshape(tracer: Tracing, function: Callable, args: tuple, kwargs: dict) -> Any:
    if function.__name__ == "unflatten":
        dim, sizes = (args[1:] + tuple(kwargs.values()))[:2]
        dim %= args[0].dim()
        requested = [-1] * dim + list(sizes) + [-1] * (args[0].dim() - dim - 1)
    else:
        requested = _flat(args[1:]) if args[1:] else list(next(iter(kwargs.values())))
    if not tracer.flow.of(args[0]).labelled:
        for size in requested:
            tracer.flow.require(size, None)
    before, tracer.flow.requested = tracer.flow.requested, requested
    try:
        return function(*args, **kwargs)
    finally:
        tracer.flow.requested = before


@stand_in("numpy", "tolist", "__array__", "item", "__dlpack__")
def _leave(tracer: Tracing, function: Callable, args: tuple, kwargs: dict) -> Any:
    tracer.flow.freeze_all([tracer.flow.of(args[0])], "leaves torch, where its channels cannot be followed")
    return function(*args, **kwargs)


@stand_in("__len__")
def _length(tracer: Tracing, function: Callable, args: tuple, kwargs: dict) -> Any:
    """Note that Python makes a plain number of the length."""
    use_as_numbers(sized_shape(tracer.flow, args[0])[:1], "len")
    return function(*args, **kwargs)


@stand_in("stride")
def _stride(tracer: Tracing, function: Callable, args: tuple, kwargs: dict) -> Any:
    """Note the widths whose products the strides are."""
    asked = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    use_as_numbers(sized_shape(tracer.flow, args[0])[asked:][1:], "stride")
    return function(*args, **kwargs)


@stand_in("numel")
def _numel(tracer: Tracing, function: Callable, args: tuple, kwargs: dict) -> Any:
    return math.prod(sized_shape(tracer.flow, args[0]))


@stand_in("expand", "broadcast_to", "expand_as", "normalize")
def _expand(tracer: Tracing, function: Callable, args: tuple, kwargs: dict) -> Any:
    """Let stretched dimensions be as wide as what they meet, unless the width is given as a constant."""
    tracer.flow.stretching = True
    try:
        out = function(*args, **kwargs)
    finally:
        tracer.flow.stretching = False
    if function.__name__ in ("expand", "broadcast_to"):
        for size, labels in zip(_flat(args[1:]), tracer.flow.of(out).dims, strict=True):
            if size != -1:
                tracer.flow.require(size, labels)
    return out


@stand_in("einsum")
def _einsum(tracer: Tracing, function: Callable, args: tuple, kwargs: dict) -> Any:
    """Let what is summed over keep two channels: a sum over one is no product of matrices, nor are its sizes cut."""
    before = len(tracer.contractions)
    out = function(*args, **kwargs)
    for contraction in tracer.contractions[before:]:
        tracer.flow.keep_two(contraction.labels)
    return out


@stand_in("repeat_interleave")
def _repeat_interleave(tracer: Tracing, function: Callable, args: tuple, kwargs: dict) -> Any:
    """Let the number of copies stay, whatever it is computed from: `heads // key_value_heads`."""
    for size in tree_leaves((args[1:], kwargs)):
        tracer.flow.require(size, None)
    return function(*args, **kwargs)


@stand_in("zeros", "ones", "empty", "full", "randn", "rand", "new_zeros", "new_ones", "new_empty", "new_full")
def _make(tracer: Tracing, function: Callable, args: tuple, kwargs: dict) -> Any:
    out = function(*args, **kwargs)
    given = [arg for arg in args if not isinstance(arg, Tensor)]
    sizes = list(given[0]) if given and isinstance(given[0], list | tuple) else [a for a in given if isinstance(a, int)]
    sizes = list(kwargs["size"]) if "size" in kwargs else sizes
    if function.__name__.endswith("full"):
        use_as_numbers((given[1:], kwargs.get("fill_value")), function.__name__)
    _label_made(tracer.flow, out, sizes)
    return out


def _label_made(flow: Flow, out: Tensor, sizes: Sequence[Any]) -> None:
    """Label the dimensions that were made as wide as a dimension with labels; all others must keep their width."""
    found = flow.of(out)
    if len(sizes) != out.dim():
        return
    for dim, size in enumerate(sizes):
        is_width = isinstance(size, Size) and isinstance(size.source, Dimension)
        if is_width and found.dims[dim] is None:
            found.dims[dim] = size.source.labels
        elif isinstance(size, Size):
            flow.require(size, found.dims[dim])
    flow.put(out, found.dims, found.origin)


@stand_in("chunk", "tensor_split")
def _chunk(tracer: Tracing, function: Callable, args: tuple, kwargs: dict) -> Any:
    """Let equal pieces lose the same positions, so that the pieces of the pruned model are cut at the same places."""
    pieces = function(*args, **kwargs)
    flow, places = tracer.flow, next((each for each in (*args[1:], *kwargs.values()) if isinstance(each, HELD)), ())
    for cut in places:
        for dim, labels in enumerate(flow.of(args[0]).dims):
            if labels is not None and flow.of(pieces[0]).dims[dim] is not labels:
                _require_slice(flow, labels, slice(cut))
    use_as_numbers(() if places else (args[1:], kwargs), "chunk")
    for dim in range(args[0].dim()):
        found = [flow.of(piece).dims[dim] for piece in pieces]
        whole = flow.of(args[0]).dims[dim]
        if places or whole is None or found[0] is None or found[0].size == whole.size:
            continue
        if len({labels.size for labels in found}) > 1:
            flow.freeze(whole, "is cut into pieces of different widths")
        for labels in found[1:]:
            flow.join(found[0], labels)
    return pieces


@stand_in("split", "split_with_sizes")
def _split(tracer: Tracing, function: Callable, args: tuple, kwargs: dict) -> Any:
    pieces = function(*args, **kwargs)
    sizes = args[1] if len(args) > 1 else next(iter(v for k, v in kwargs.items() if "split" in k))
    sizes = list(sizes) if isinstance(sizes, list | tuple) else [sizes] * len(pieces)
    for piece, size in zip(pieces, sizes, strict=True):
        for dim, labels in enumerate(tracer.flow.of(piece).dims):
            if labels is not None and labels.size < tracer.flow.of(args[0]).dims[dim].size:
                tracer.flow.require(size, labels)
    return pieces


@stand_in("narrow")
def _narrow(tracer: Tracing, function: Callable, args: tuple, kwargs: dict) -> Any:
    out = function(*args, **kwargs)
    tensor, dim, start, length = args[:4] if len(args) > 3 else (args[0], *kwargs.values())[:4]
    labels = tracer.flow.of(tensor).dims[dim]
    if labels is not None:
        tracer.flow.require(start, labels[: operator.index(start)])
        tracer.flow.require(length, labels[operator.index(start) : operator.index(start) + operator.index(length)])
    return out


@stand_in("__getitem__", "__setitem__")
def _index(tracer: Tracing, function: Callable, args: tuple, kwargs: dict) -> Any:
    out = function(*args, **kwargs)
    flow = tracer.flow
    dims = flow.of(args[0]).dims if isinstance(args[0], Tensor) else []
    if any(labels is not None for labels in dims):
        for labels, cut in _slices(dims, args[1]):
            _require_slice(flow, labels, cut)
    return out


def _slices(dims: Sequence[Any], index: Any) -> Iterator[tuple[Any, slice]]:
    """Pair the labelled dimensions that an index cuts with their slices."""
    items = list(index) if isinstance(index, tuple) else [index]
    used = [item for item in items if item is not None and item is not Ellipsis]
    taken = sum(item.dim() if isinstance(item, Tensor) and item.dtype == torch.bool else 1 for item in used)
    dim = 0
    for item in items:
        if item is Ellipsis:
            dim += len(dims) - taken
        elif item is not None:
            if isinstance(item, slice) and dims[dim] is not None:
                yield dims[dim], item
            dim += item.dim() if isinstance(item, Tensor) and item.dtype == torch.bool else 1


def _require_slice(flow: Flow, labels: Any, cut: slice) -> None:
    """Demand that both ends of a slice stay where they are among the channels that are kept."""
    for end in (cut.start, cut.stop):
        if end is None or operator.index(end) == 0 or operator.index(end) >= labels.size:
            continue
        if operator.index(end) > 0:
            flow.require(end, labels[: operator.index(end)])
        else:
            flow.require(-end, labels[operator.index(end) :])


@stand_in("layer_norm")
def _layer_norm(tracer: Tracing, function: Callable, args: tuple, kwargs: dict) -> Any:
    out = function(*args, **kwargs)
    shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
    for labels, size in zip(tracer.flow.of(args[0]).dims[-len(shape) :], shape, strict=True):
        tracer.flow.require(size, labels)
    return out


@stand_in("rms_norm")
def _rms_norm(tracer: Tracing, function: Callable, args: tuple, kwargs: dict) -> Any:
    """Follow this norm as one operation; on some devices it is made of several that look like sums of channels."""
    tracer.paused += 1
    try:
        out = function(*args, **kwargs)
    finally:
        tracer.paused -= 1
    flow, shape = tracer.flow, args[1] if len(args) > 1 else kwargs["normalized_shape"]
    source = flow.of(args[0])
    flow.use_statistics(source)
    tracer.saw(tensors_in((*args, *kwargs.values())))
    for parameter in tensors_in((*args[2:], *kwargs.values())):
        for ours, theirs in zip(flow.of(parameter).dims, source.dims[-parameter.dim() :], strict=True):
            if ours is not None or theirs is not None:
                flow.join(ours, theirs, source.origin)
    for labels, size in zip(source.dims[-len(shape) :], shape, strict=True):
        flow.require(size, labels)
    flow.put(out, source.dims, source.origin)
    return out


@stand_in("scaled_dot_product_attention")
def _attention(tracer: Tracing, function: Callable, args: tuple, kwargs: dict) -> Any:
    tracer.default_scale = kwargs.get("scale") is None
    for tensor in attended_tensors(args, kwargs):
        # Also where neither queries nor keys depend on the input.
        tracer.flow.attended += [labels for labels in tracer.flow.of(tensor).dims[-3::2] if labels is not None]
    try:
        return function(*args, **kwargs)
    finally:
        tracer.default_scale = False


def attended_tensors(args: tuple, kwargs: dict) -> list[Tensor]:
    """Return the queries, keys and values of an attention, however they are given."""
    names = ("query", "key", "value")
    given = dict(zip(names, args, strict=False)) | kwargs
    return [given[name] for name in names]
