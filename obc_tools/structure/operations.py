"""How channels flow through operations: those that compute, and those that choose, reorder, cut and reshape."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .flow import (
    SUMMED,
    Attribute,
    Channels,
    Dimension,
    Flow,
    Labels,
    Size,
    elementwise,
    leaves,
    meet,
    operation,
    tensors_in,
)


@operation("mm", "bmm", "mv", "dot", "matmul")
def _product(flow: Flow, out: Tensor, args: tuple, kwargs: dict) -> None:
    _multiply(flow, out, *args[:2])


@operation("addmm", "baddbmm", "addbmm", "addmv", "_addmm_activation")
def _product_with_bias(flow: Flow, out: Tensor, args: tuple, kwargs: dict) -> None:
    _multiply(flow, out, *args[1:3])
    elementwise(flow, out, (args[0], out), {})


def _multiply(flow: Flow, out: Tensor, left: Tensor, right: Tensor) -> None:
    a, b = flow.of(left).dims, flow.of(right).dims
    inner = a[-1], b[max(len(b) - 2, 0)]
    if left.shape[-1] > 1:
        contract(flow, *inner, left, right)
    flow.multiplied(left, right, [*inner, *a[:-1], *b[:-2], *b[-1:]])
    batch: list[Labels] = []
    if len(a) == len(b) == 3:
        batch = [_both(flow, a[0], b[0], (flow.of(left), flow.of(right)))]
        flow.spend(a[0], b[0])
    flow.put(out, [*batch[: out.dim() - 2], *a[-2:-1], *(b[-1:] if len(b) > 1 else [])])


@operation("_grouped_mm")
def _grouped_product(flow: Flow, out: Tensor, args: tuple, kwargs: dict) -> None:
    """Keep what is multiplied expert by expert in one kernel, which takes rows of multiples of 16 bytes alone."""
    way_out = "transformers' model.set_experts_implementation('eager') multiplies otherwise"
    reason = f"passes through {flow.where('grouped_mm')}, which needs widths of whole 16 bytes; {way_out}"
    flow.freeze_all([flow.of(tensor) for tensor in tensors_in((*args, *kwargs.values()))], reason)


@operation("index_add", "index_copy")
def _index_add(flow: Flow, out: Tensor, args: tuple, kwargs: dict) -> None:
    """Follow rows that are added into others, picked by number."""
    taken, dim, _, source = args[:4]
    into, added = flow.of(taken), flow.of(source)
    dims = list(into.dims)
    for place in range(len(dims)):
        if place == dim % len(dims):
            flow.freeze(into.dims[place], "its channels are looked up by their numbers")
            flow.freeze(added.dims[place], "its channels are looked up by their numbers")
        else:
            dims[place] = _both(flow, into.dims[place], added.dims[place], (into, added))
    flow.put(out, dims)


@operation("index_put", "_index_put_impl", "_unsafe_index_put")
def _index_put(flow: Flow, out: Tensor, args: tuple, kwargs: dict) -> None:
    """Follow rows that are written into others, picked by number or by a mask of the leading dimensions."""
    into, given = flow.of(args[0]), flow.of(args[2])
    picked = sum(index.dim() if index.dtype == torch.bool else 1 for index in args[1] if index is not None)
    leading = all(index is not None for index in args[1])
    dims = list(into.dims)
    for place in range(-len(dims), 0):
        if place >= picked - len(dims) and leading:
            same = -place <= args[2].dim() and args[2].shape[place] == args[0].shape[place]
            if same and args[2].shape[place] > 1:
                dims[place] = _both(flow, dims[place], given.dims[place], (into, given))
        else:
            flow.freeze(dims[place], "its channels are looked up by their numbers")
    for labels in given.dims[: max(len(given.dims) - len(dims) + picked, 0)] if leading else given.dims:
        flow.freeze(labels, "its channels are looked up by their numbers")
    flow.put(out, dims, into.origin)


def contract(flow: Flow, one: Labels, other: Labels, left: Tensor, right: Tensor) -> None:
    """Join the two sides of a sum of products over channels."""
    flow.spend(one, other)
    labels = _both(flow, one, other, (flow.of(left), flow.of(right)))
    if labels is not None:
        flow.contracted(labels, left, right)


def _both(flow: Flow, one: Labels, other: Labels, sources: Sequence[Channels]) -> Labels:
    if one is None and other is None:
        return None
    return flow.join(one, other, sources[0 if one is None else 1].origin)


@operation("convolution", "_convolution", "convolution_overrideable")
def _convolution(flow: Flow, out: Tensor, args: tuple, kwargs: dict) -> None:
    taken, weight, bias, stride, padding, dilation, transposed, _, groups = args[:9]
    source, kernel = flow.of(taken), flow.of(weight)
    first = out.dim() - weight.dim() + 2 - 1
    for dim in range(first + 1, taken.dim()):
        flow.freeze(source.dims[dim], "is convolved along its channels")
    for labels in kernel.dims[2:]:
        flow.freeze(labels, "is the height or width of a kernel")
    axes = {"out": kernel.dims[1 if transposed else 0], "in": kernel.dims[0 if transposed else 1]}
    if groups > 1:
        axes = flow.grouped.get(kernel.weight_of, {"out": None, "in": None})
        axes = {"in": axes["out"]} | axes
        if axes["out"] is None:
            flow.freeze_all(
                [kernel, source], f"meets {flow.where('convolution')} in groups, whose kernel is no layer's"
            )
    flow.spend(source.dims[first], axes["in"], kernel.dims[0 if transposed else 1])
    if taken.shape[first] > 1:
        flow.join(source.dims[first], axes["in"], source.origin)
    if groups > 1 and axes["in"] is not None and axes["in"].size == groups < axes["out"].size:
        flow.join(axes["in"], flow.join_rows(axes["out"].reshape(groups, -1).T))
    elif groups > 1 and axes["in"] is not axes["out"]:
        flow.join_blocks(axes["in"], groups)
        flow.join_blocks(axes["out"], groups)
    if bias is not None and axes["out"] is not None:
        flow.join(axes["out"], flow.of(bias).dims[0])
    flow.put(out, [*source.dims[:first], axes["out"], *[None] * (out.dim() - first - 1)])


@operation("mkldnn_rnn_layer")
def _recurrent(flow: Flow, out: Any, args: tuple, kwargs: dict) -> None:
    """Follow what a fused recurrent layer reads; its hidden width stays."""
    reason = f"passes through {flow.where('rnn')}, whose hidden width stays"
    source, weight = flow.of(args[0]), flow.of(args[1])
    if args[0].shape[-1] > 1:
        contract(flow, source.dims[-1], weight.dims[1], *args[:2])
    for labels in (*source.dims[:-1], weight.dims[0]):
        flow.freeze(labels, reason)
    flow.freeze_all([flow.of(tensor) for tensor in tensors_in(args[2:])], reason)
    for result in tensors_in((out,)):
        flow.put(result, [None] * result.dim())


@operation("deform_conv2d")
def _deformable_convolution(flow: Flow, out: Tensor, args: tuple, kwargs: dict) -> None:
    taken, weight, offset, mask, bias = (flow.of(tensor) for tensor in args[:5])
    moved = f"says where {flow.where('deform_conv2d')} looks"
    flow.freeze_all([offset, mask], moved)
    for labels in weight.dims[2:]:
        flow.freeze(labels, "is the height or width of a kernel")
    flow.spend(taken.dims[1], weight.dims[1])
    if args[11] > 1 or args[12] > 1:
        flow.freeze_all([taken, weight, bias], f"passes through {flow.where('deform_conv2d')} in groups")
    elif args[0].shape[1] > 1:
        flow.join(taken.dims[1], weight.dims[1], taken.origin)
    flow.put(out, [None, _both(flow, weight.dims[0], bias.dims[0], (weight, bias)), None, None])


@operation("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
           "_batch_norm_impl_index", "batch_norm", "_batch_norm_with_update", "miopen_batch_norm")  # fmt: skip
def _batch_norm(flow: Flow, out: Any, args: tuple, kwargs: dict) -> None:
    taken = args[0]
    source = flow.of(taken)
    for parameter in tensors_in(args[1:5]):
        flow.join(flow.of(parameter).dims[0], source.dims[1], source.origin)
    if kwargs.get("training", any(arg is True for arg in args[5:])):
        for labels in source.dims[2:]:
            flow.keep_two(labels)  # a variance of one value is refused
    _like_first(flow, out, source)


def _like_first(flow: Flow, out: Any, source: Channels) -> None:
    """Label the first result as the input; the others are statistics that nobody reads."""
    results = tensors_in((out,))
    flow.put(results[0], source.dims, source.origin, source.weight_of)


@operation("native_layer_norm", "layer_norm", "_fused_rms_norm")
def _layer_norm(flow: Flow, out: Any, args: tuple, kwargs: dict) -> None:
    source, over = flow.of(args[0]), len(args[1])
    for parameter in tensors_in(args[2:4]):
        for ours, theirs in zip(flow.of(parameter).dims, source.dims[-over:], strict=True):
            if ours is not None or theirs is not None:
                flow.join(ours, theirs, source.origin)
    _like_first(flow, out, source)


@operation("native_group_norm", "group_norm")
def _group_norm(flow: Flow, out: Any, args: tuple, kwargs: dict) -> None:
    source = flow.of(args[0])
    for parameter in tensors_in(args[1:3]):
        flow.join(flow.of(parameter).dims[0], source.dims[1], source.origin)
    if source.dims[1] is not None and args[6] == source.dims[1].size:
        flow.freeze(source.dims[1], f"passes through {flow.where('group_norm')}, of one channel a group")
    flow.join_blocks(source.dims[1], args[6])
    _like_first(flow, out, source)


@operation("max", "min", "prod", "any", "all", "logsumexp", "argmax", "argmin", "median")
def _reduce(flow: Flow, out: Any, args: tuple, kwargs: dict) -> None:
    for labels in reduce_dims(flow, out, args, kwargs):
        flow.freeze(labels, SUMMED)


@operation("mean", "sum", "amax", "amin")
def _summarise(flow: Flow, out: Any, args: tuple, kwargs: dict) -> None:
    """Note over which channels a number is taken; what becomes of it says whether they may go."""
    statistics = tuple(reduce_dims(flow, out, args, kwargs))
    for result in tensors_in((out,)):
        flow.of(result).statistics = statistics


@operation("var", "std", "var_mean", "std_mean")
def _vary(flow: Flow, out: Any, args: tuple, kwargs: dict) -> None:
    _summarise(flow, out, args, kwargs)
    for labels in flow.of(tensors_in((out,))[0]).statistics:
        flow.keep_two(labels)  # one value has no variance


@operation("linalg_vector_norm", "norm")
def _vector_norm(flow: Flow, out: Any, args: tuple, kwargs: dict) -> None:
    # A channel that is masked adds nothing to a length, so it may go; the smallest of numbers is no length.
    dims = args[2] if len(args) > 2 else kwargs.get("dim")
    keep = args[3] if len(args) > 3 else kwargs.get("keepdim", False)
    power = args[1] if len(args) > 1 else kwargs.get("ord", 2)
    for labels in reduce_dims(flow, out, (args[0], dims, keep), {}):
        if power is not None and power < 0:
            flow.freeze(labels, SUMMED)


def reduce_dims(flow: Flow, out: Any, args: tuple, kwargs: dict) -> list[np.ndarray]:
    """Drop the reduced dimensions, and return the labels of those with several channels."""
    tensor, source = args[0], flow.of(args[0])
    asked = args[1] if len(args) > 1 else kwargs.get("dim")
    if isinstance(asked, Tensor):  # max(a, b) of two tensors
        elementwise(flow, out, args, kwargs)
        return []
    asked = range(tensor.dim()) if asked is None or asked == [] else [asked] if isinstance(asked, int) else asked
    gone = {dim % max(tensor.dim(), 1) for dim in asked}
    for dim in gone:
        flow.spend(source.dims[dim])
    for result in tensors_in((out,)):
        if result.dim() == tensor.dim():
            flow.put(result, [None if dim in gone else labels for dim, labels in enumerate(source.dims)], source.origin)
        else:
            flow.put(result, [labels for dim, labels in enumerate(source.dims) if dim not in gone], source.origin)
    return [source.dims[dim] for dim in gone if source.dims[dim] is not None and tensor.shape[dim] > 1]


@operation("_softmax", "_safe_softmax", "softmax", "_log_softmax", "log_softmax", "cumsum", "cumprod", "sort", "topk")
def _along(flow: Flow, out: Any, args: tuple, kwargs: dict) -> None:
    tensor, source = args[0], flow.of(args[0])
    numbers = [arg for arg in args[1:] if isinstance(arg, int) and not isinstance(arg, bool)]
    dim = (numbers[-1] if numbers else kwargs.get("dim", -1)) % tensor.dim()
    dims = list(source.dims)
    flow.freeze(dims[dim], "is normalised or ordered over its channels")
    for result in tensors_in((out,)):
        flow.put(result, [d if d is None or d.size == n else None for d, n in zip(dims, result.shape, strict=True)])


@operation("glu")
def _gate(flow: Flow, out: Tensor, args: tuple, kwargs: dict) -> None:
    """Let the halves of an axis, of which one is the gate of the other, lose the same positions."""
    source, dim = flow.of(args[0]), (args[1] if len(args) > 1 else kwargs.get("dim", -1)) % out.dim()
    dims = [flow.join_blocks(labels, 2) if at == dim else labels for at, labels in enumerate(source.dims)]
    flow.spend(source.dims[dim])
    flow.put(out, dims, source.origin)


ATTENTIONS = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
              "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
              "_scaled_dot_product_fused_attention_overrideable",
              "_scaled_dot_product_attention_math_for_mps")  # fmt: skip
"""Kernels of attention: queries, keys and values come first among their arguments."""


@operation(*ATTENTIONS)
def _attention(flow: Flow, out: Any, args: tuple, kwargs: dict) -> None:
    query, key, value = (flow.of(tensor) for tensor in args[:3])
    contract(flow, query.dims[-1], key.dims[-1], *args[:2])
    flow.multiplied(*args[1:3], [query.dims[1], query.dims[-1], value.dims[-1]])
    heads = query.dims[1]
    for tensor, entry in zip(args[1:3], (key, value), strict=True):  # a head of theirs may serve several of queries
        shared = None if entry.dims[1] is None else np.repeat(entry.dims[1], args[0].shape[1] // tensor.shape[1])
        heads = _both(flow, heads, shared, (query, entry))
    mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
    if isinstance(mask, Tensor) and mask.dim() > 2 and mask.shape[-3] > 1:
        heads = _both(flow, heads, flow.of(mask).dims[-3], (query, flow.of(mask)))
    keep_tokens(flow, [query, key, value], [0, 2])
    flow.put(out[0], [None, heads, None, value.dims[-1]])


def keep_tokens(flow: Flow, taken: Sequence[Channels], dims: Iterable[int]) -> None:
    """Let the tokens of an attention stay: also learned ones are no channels."""
    for entry, dim in itertools.product(taken, dims):
        flow.freeze(entry.dims[dim], "is a token of an attention")


@operation("embedding")
def _embedding(flow: Flow, out: Tensor, args: tuple, kwargs: dict) -> None:
    flow.freeze(flow.of(args[0]).dims[0], "is looked up by number")
    flow.put(out, [*[None] * args[1].dim(), flow.of(args[0]).dims[1]])


def _resample(spatial: int) -> Any:
    def handle(flow: Flow, out: Any, args: tuple, kwargs: dict) -> None:
        source = flow.of(args[0])
        leading = len(source.dims) - spatial
        for labels in source.dims[leading:]:
            flow.freeze(labels, "is pooled or resampled along its channels")
        for result in tensors_in((out,)):
            flow.put(result, [*source.dims[:leading], *[None] * spatial], source.origin)

    return handle


for _spatial in (1, 2, 3):
    for _name in ("max_pool{}d_with_indices", "max_pool{}d", "avg_pool{}d", "adaptive_avg_pool{}d",
                  "_adaptive_avg_pool{}d", "adaptive_max_pool{}d", "upsample_nearest{}d", "_upsample_nearest_exact{}d",
                  "reflection_pad{}d", "replication_pad{}d", "grid_sampler_{}d"):  # fmt: skip
        operation(_name.format(_spatial))(_resample(_spatial))
for _name in ("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"):
    operation(_name)(_resample(2))
operation("upsample_linear1d")(_resample(1))
operation("upsample_trilinear3d")(_resample(3))


@operation("pixel_shuffle")
def _pixel_shuffle(flow: Flow, out: Tensor, args: tuple, kwargs: dict) -> None:
    source = flow.of(args[0])
    labels = source.dims[-3]
    if labels is not None:
        labels = flow.join_rows(labels.reshape(-1, args[1] ** 2).T)
    flow.put(out, [*source.dims[:-3], labels, None, None], source.origin)


@operation("pixel_unshuffle")
def _pixel_unshuffle(flow: Flow, out: Tensor, args: tuple, kwargs: dict) -> None:
    source = flow.of(args[0])
    labels = source.dims[-3]
    flow.put(out, [*source.dims[:-3], None if labels is None else np.repeat(labels, args[1] ** 2), None, None])


@operation("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(flow: Flow, out: Tensor, args: tuple, kwargs: dict) -> None:
    source = flow.of(args[0])
    dims = list(source.dims)
    if dims[1] is not None:
        dims[1] = np.repeat(flow.join_blocks(dims[1], args[1]), args[1])
    flow.put(out, dims, source.origin)


@operation("im2col")
def _im2col(flow: Flow, out: Tensor, args: tuple, kwargs: dict) -> None:
    source = flow.of(args[0])
    times = args[1][0] * args[1][1]
    labels = source.dims[-3]
    flow.put(out, [*source.dims[:-3], None if labels is None else np.repeat(labels, times), None], source.origin)


@operation("col2im")
def _col2im(flow: Flow, out: Tensor, args: tuple, kwargs: dict) -> None:
    source = flow.of(args[0])
    labels = source.dims[-2]
    if labels is not None:
        labels = flow.join_rows(labels.reshape(out.shape[-3], -1).T)
    flow.put(out, [*source.dims[:-2], labels, None, None], source.origin)


HEAD_COUNTS = ("num_heads", "n_heads", "heads", "num_attention_heads", "nhead", "n_head", "num_head",
               "num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads", "num_kv_head", "n_kv_head",
               "n_local_heads", "n_local_kv_heads")  # fmt: skip
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
    for dim in which:
        flow.keep_two(source.dims[dim])
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
        flow.spend(dims[dim])
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
            flow.stretched.update(() if dims[dim] is None else dims[dim].tolist())
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
    flow.spend(*flow.of(args[0]).dims)
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


@operation("index", "index_select", "gather", "_unsafe_index")
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
            copies = [dim for dim in labelled if flow.stretched.issuperset(source.dims[dim])]
            for dim in copies:
                flow.freeze(source.dims[dim], "is a number of copies")
            labelled = [dim for dim in labelled if dim not in copies]
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
    source = size.source if isinstance(size, Size) else None
    if isinstance(source, Attribute) and (source.name in HEAD_COUNTS or source.index in HEAD_COUNTS):
        return 3 if whole_heads else 0
    computed = size == -1 or any(isinstance(source, Dimension) for source in leaves(size))
    return 2 if computed else 1
