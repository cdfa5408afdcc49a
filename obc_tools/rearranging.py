"""How channels flow through operations that choose, reorder, cut, put together and reshape."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from .flow import Channels, Flow, Labels, meet, operation
from .sizes import Attribute, Dimension, Size, leaves

HEAD_COUNTS = ("num_heads", "n_heads", "heads", "num_attention_heads", "nhead", "n_head", "num_head")
"""Names of attributes that hold a number of attention heads."""


def _keep(flow: Flow, out: Tensor, dims: Sequence[Labels], source: Channels) -> None:
    flow.put(out, dims, source.origin)


@operation("permute")
def _permute(flow: Flow, out: Tensor, args: tuple, kwargs: dict) -> None:
    source = flow.of(args[0])
    _keep(flow, out, [source.dims[dim] for dim in args[1]], source)


@operation("transpose", "t", "swapaxes")
def _transpose(flow: Flow, out: Tensor, args: tuple, kwargs: dict) -> None:
    source, dims = flow.of(args[0]), list(flow.of(args[0]).dims)
    if len(dims) > 1:
        one, other = args[1:3] if len(args) > 2 else (0, 1)
        dims[one], dims[other] = dims[other], dims[one]
    _keep(flow, out, dims, source)


@operation("unsqueeze")
def _unsqueeze(flow: Flow, out: Tensor, args: tuple, kwargs: dict) -> None:
    source = flow.of(args[0])
    dims = list(source.dims)
    dims.insert(args[1] % out.dim(), None)
    _keep(flow, out, dims, source)


@operation("squeeze")
def _squeeze(flow: Flow, out: Tensor, args: tuple, kwargs: dict) -> None:
    tensor, source = args[0], flow.of(args[0])
    asked = args[1:] and ([args[1]] if isinstance(args[1], int) else args[1])
    which = {dim % max(tensor.dim(), 1) for dim in asked} if args[1:] else range(tensor.dim())
    gone = {dim for dim in which if tensor.shape[dim] == 1}
    _keep(flow, out, [labels for dim, labels in enumerate(source.dims) if dim not in gone], source)


@operation("select")
def _select(flow: Flow, out: Tensor, args: tuple, kwargs: dict) -> None:
    source, dim = flow.of(args[0]), args[1] % args[0].dim()
    flow.freeze(source.dims[dim], "one of its channels is taken by its number")
    _keep(flow, out, [labels for d, labels in enumerate(source.dims) if d != dim], source)


@operation("unbind")
def _unbind(flow: Flow, out: Sequence[Tensor], args: tuple, kwargs: dict) -> None:
    source = flow.of(args[0])
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % args[0].dim()
    flow.freeze(source.dims[dim], "its channels are taken apart one by one")
    for piece in out:
        _keep(flow, piece, [labels for d, labels in enumerate(source.dims) if d != dim], source)


@operation("slice")
def _slice(flow: Flow, out: Tensor, args: tuple, kwargs: dict) -> None:
    tensor, source = args[0], flow.of(args[0])
    dim = (args[1] if len(args) > 1 else 0) % tensor.dim()
    start, stop, step = (args[i] if len(args) > i else None for i in (2, 3, 4))
    dims = list(source.dims)
    if dims[dim] is not None:
        if step not in (None, 1):
            flow.freeze(dims[dim], "every so manieth of its channels is taken")
        dims[dim] = dims[dim][start:stop:step]
    _keep(flow, out, dims, source)


@operation("split", "split_with_sizes", "unsafe_split", "chunk")
def _split(flow: Flow, out: Sequence[Tensor], args: tuple, kwargs: dict) -> None:
    source = flow.of(args[0])
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % args[0].dim()
    start = 0
    for piece in out:
        dims = list(source.dims)
        width = piece.shape[dim]
        if dims[dim] is not None:
            dims[dim] = dims[dim][start : start + width]
        start += width
        _keep(flow, piece, dims, source)


@operation("flip", "roll")
def _reorder(flow: Flow, out: Tensor, args: tuple, kwargs: dict) -> None:
    source, moved = flow.of(args[0]), args[-1]
    for dim in [moved] if isinstance(moved, int) else moved:
        flow.freeze(source.dims[dim], "its channels are reordered")
    _keep(flow, out, source.dims, source)


@operation("expand")
def _expand(flow: Flow, out: Tensor, args: tuple, kwargs: dict) -> None:
    tensor, source = args[0], flow.of(args[0])
    missing = out.dim() - tensor.dim()
    sizes = [1] * missing + list(tensor.shape)
    dims = [None] * missing + list(source.dims)
    for dim, (size, new) in enumerate(zip(sizes, out.shape, strict=True)):
        if size != new:
            dims[dim] = flow.fresh(new) if flow.stretching else None
    _keep(flow, out, dims, source)


@operation("as_strided")
def _restride(flow: Flow, out: Tensor, args: tuple, kwargs: dict) -> None:
    """Follow the change of strides with which pooling to one pixel ends; all else is unknown."""
    source = flow.of(args[0])
    if out is args[0] and sum(size > 1 for size in out.shape) <= 2 and out.dim() == len(source.dims) > 2:
        return
    flow.freeze_all([source], "is laid out anew by strides")
    flow.put(out, [None] * out.dim())


@operation("new_zeros", "new_empty", "new_full", "new_ones", "new_empty_strided")
def _make(flow: Flow, out: Tensor, args: tuple, kwargs: dict) -> None:
    flow.put(out, [None] * out.dim())


@operation("repeat")
def _repeat(flow: Flow, out: Tensor, args: tuple, kwargs: dict) -> None:
    source, times = flow.of(args[0]), args[1]
    dims = [None] * (len(times) - len(source.dims)) + list(source.dims)
    tiled = [None if d is None else np.tile(d, n) for d, n in zip(dims, times, strict=True)]
    _keep(flow, out, tiled, source)


@operation("cat", "concatenate")
def _cat(flow: Flow, out: Tensor, args: tuple, kwargs: dict) -> None:
    pieces = [(tensor, flow.of(tensor)) for tensor in args[0] if tensor.dim() == out.dim()]
    along = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    dims: list[Labels] = []
    for dim in range(out.dim()):
        found = [entry.dims[dim] for _, entry in pieces]
        first = next((labels for labels in found if labels is not None), None)
        if first is not None and dim == along:
            first = np.concatenate([_fixed_labels(flow, t.shape[dim], e, e.dims[dim]) for t, e in pieces])
        else:
            first = meet(flow, [(labels, entry.origin) for (_, entry), labels in zip(pieces, found, strict=True)])
        dims.append(first)
    flow.put(out, dims)


def _fixed_labels(flow: Flow, width: int, source: Channels, labels: Labels) -> np.ndarray:
    """Return labels of a dimension that has none: new ones that never go."""
    if labels is None:
        labels = flow.fresh(width)
        flow.freeze(labels, source.origin)
    return labels


@operation("stack")
def _stack(flow: Flow, out: Tensor, args: tuple, kwargs: dict) -> None:
    sources = [flow.of(tensor) for tensor in args[0]]
    along = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    dims = [meet(flow, [(source.dims[dim], source.origin) for source in sources]) for dim in range(out.dim() - 1)]
    dims.insert(along, None)
    flow.put(out, dims)


@operation("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad2d", "pad")
def _pad(flow: Flow, out: Tensor, args: tuple, kwargs: dict) -> None:
    tensor, source = args[0], flow.of(args[0])
    dims = list(source.dims)
    for number in range(len(args[1]) // 2):
        dim = tensor.dim() - 1 - number
        before, after = args[1][2 * number : 2 * number + 2]
        if dims[dim] is None or (before, after) == (0, 0):
            continue
        if min(before, after) < 0:
            flow.freeze(dims[dim], "is cropped by padding")
        else:
            dims[dim] = np.concatenate([flow.fresh(before), dims[dim], flow.fresh(after)])
            flow.freeze(dims[dim], "is padded with zeros to a constant width")
    if any(d is not None and d.size != n for d, n in zip(dims, out.shape, strict=True)):
        flow.freeze_all([source], "is padded")
        dims = [None] * out.dim()
    _keep(flow, out, dims, source)


@operation("index", "index_select", "gather", "index_put", "_unsafe_index")
def _index(flow: Flow, out: Tensor, args: tuple, kwargs: dict) -> None:
    """Follow a lookup along dimensions without channels; channels that are looked up by number stay."""
    tensor, source = args[0], flow.of(args[0])
    indices = list(args[1]) if isinstance(args[1], list | tuple) else [None] * (args[1] % tensor.dim()) + [args[2]]
    used = [dim for dim, index in enumerate(indices) if index is not None]
    for dim in used:
        flow.freeze(source.dims[dim], "its channels are looked up by their numbers")
    apart = used and used != list(range(used[0], used[-1] + 1))
    if apart or len(indices) > tensor.dim() or (isinstance(args[1], int) and args[2].dim() == tensor.dim() > 1):
        flow.freeze_all([source], "its channels are looked up by their numbers")
        flow.put(out, [None] * out.dim())
        return
    rest = list(source.dims[len(indices) :]) if indices else list(source.dims)
    kept = [labels for dim, labels in enumerate(source.dims[: len(indices)]) if indices[dim] is None]
    middle = [None] * (out.dim() - len(rest) - len(kept))
    _keep(flow, out, [*kept[: used[0]], *middle, *kept[used[0] :], *rest], source)


@operation("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten")
def _view(flow: Flow, out: Tensor, args: tuple, kwargs: dict) -> None:
    tensor, source = args[0], flow.of(args[0])
    asked = flow.requested if flow.requested is not None and len(flow.requested) == out.dim() else [-1] * out.dim()
    dims: list[Labels] = [None] * out.dim()
    for old, new in matching_runs(tensor.shape, out.shape):
        labelled = [dim for dim in old if source.dims[dim] is not None]
        if len(labelled) > 1:
            for dim in labelled:
                flow.freeze(source.dims[dim], "is flattened together with another axis of channels")
        elif labelled:
            shape = [tensor.shape[dim] if dim in labelled else 1 for dim in old]
            whole = np.broadcast_to(source.dims[labelled[0]].reshape(shape), [tensor.shape[dim] for dim in old])
            split = whole.reshape([out.shape[dim] for dim in new])
            axis, labels = _choose(flow, split, [asked[dim] for dim in new])
            if axis is not None:
                dims[new[axis]] = labels
    for labels, size in zip(dims, asked, strict=True):
        if isinstance(size, Size) or (labels is not None and size != -1):
            flow.require(size, labels)
    flow.put(out, dims, source.origin, source.weight_of)


def matching_runs(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pair runs of dimensions before and after a reshaping that hold the same numbers; dimensions of 1 are left out."""
    ours, theirs = ([dim for dim, size in enumerate(shape) if size != 1] for shape in (old, new))
    runs = []
    while ours and theirs:
        left, right = [ours.pop(0)], [theirs.pop(0)]
        a, b = old[left[0]], new[right[0]]
        while a != b:
            if a < b:
                left.append(ours.pop(0))
                a *= old[left[-1]]
            else:
                right.append(theirs.pop(0))
                b *= new[right[-1]]
        runs.append((left, right))
    return runs


def _choose(flow: Flow, labels: np.ndarray, sizes: Sequence[int]) -> tuple[int | None, Labels]:
    """Return along which of the dimensions into which an axis is split its channels run on, and their labels.

    Along all others the channels at equal positions go together: a head, a convolution group, a part of q, k, v.
    """
    first = [np.take(labels, [0], axis=axis) for axis in range(labels.ndim)]
    varying = [axis for axis in range(labels.ndim) if (labels != first[axis]).any()]
    free = [axis for axis in varying if sizes[axis] == -1 or isinstance(sizes[axis], Size)]
    if not free:
        flow.freeze(labels, "is reshaped to a constant width" if varying else "is reshaped")
        return None, None
    axis = max(free, key=lambda axis: (_preference(sizes[axis], flow.whole_heads), axis))
    rows = np.moveaxis(labels, axis, -1).reshape(-1, labels.shape[axis])
    return axis, flow.join_rows(rows if len(varying) > 1 else rows[:1])


def _preference(size: int, whole_heads: bool) -> int:
    """Rank the dimensions that may shrink: inferred or computed sizes before attributes; counts of heads as asked."""
    names = [source.name for source in leaves(size) if isinstance(source, Attribute)]
    if isinstance(size, Size) and isinstance(size.source, Attribute) and names[0] in HEAD_COUNTS:
        return 3 if whole_heads else 0
    computed = size == -1 or any(isinstance(source, Dimension) for source in leaves(size))
    return 2 if computed else 1
