"""How channels flow through operations that compute: products, norms, reductions, attention, resampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .flow import Channels, Flow, Labels, elementwise, operation, tensors_in


@operation("mm", "bmm", "mv", "dot", "matmul")
def _product(flow: Flow, out: Tensor, args: tuple, kwargs: dict) -> None:
    _multiply(flow, out, *args[:2])


@operation("addmm", "baddbmm", "addbmm", "addmv")
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
    flow.put(out, [*batch, *a[-2:-1], *(b[-1:] if len(b) > 1 else [])])


def contract(flow: Flow, one: Labels, other: Labels, left: Tensor, right: Tensor) -> None:
    """Join the two sides of a sum of products over channels."""
    labels = _both(flow, one, other, (flow.of(left), flow.of(right)))
    if labels is not None:
        flow.contracted(labels, left, right)


def _both(flow: Flow, one: Labels, other: Labels, sources: Sequence[Channels]) -> Labels:
    if one is None and other is None:
        return None
    return flow.join(one, other, sources[0 if one is None else 1].origin)


@operation("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution", "convolution_overrideable")
def _convolution(flow: Flow, out: Tensor, args: tuple, kwargs: dict) -> None:
    taken, weight, bias, stride, padding, dilation, transposed, _, groups = args[:9]
    source, kernel = flow.of(taken), flow.of(weight)
    first = out.dim() - weight.dim() + 2 - 1
    for dim in range(first + 1, taken.dim()):
        flow.freeze(source.dims[dim], "is convolved along its channels")
    axes = {"out": kernel.dims[1 if transposed else 0], "in": kernel.dims[0 if transposed else 1]}
    if groups > 1:
        axes = flow.grouped.get(kernel.weight_of, {"out": None, "in": None})
        axes = {"in": axes["out"]} | axes
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


@operation("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
           "_batch_norm_impl_index", "batch_norm", "_batch_norm_with_update", "miopen_batch_norm")  # fmt: skip
def _batch_norm(flow: Flow, out: Any, args: tuple, kwargs: dict) -> None:
    taken = args[0]
    source = flow.of(taken)
    for parameter in tensors_in(args[1:5]):
        flow.join(flow.of(parameter).dims[0], source.dims[1], source.origin)
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
    flow.join_blocks(source.dims[1], args[6])
    _like_first(flow, out, source)


@operation("mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "prod", "any", "all", "logsumexp",
           "argmax", "argmin", "norm", "std_mean", "median")  # fmt: skip
def _reduce(flow: Flow, out: Any, args: tuple, kwargs: dict) -> None:
    reduce_dims(flow, out, args, kwargs, frozen="is summed up or compared over its channels")


@operation("linalg_vector_norm")
def _vector_norm(flow: Flow, out: Any, args: tuple, kwargs: dict) -> None:
    # A channel that is masked adds nothing to a length, so it may go.
    dims = args[2] if len(args) > 2 else kwargs.get("dim")
    keep = args[3] if len(args) > 3 else kwargs.get("keepdim", False)
    reduce_dims(flow, out, (args[0], dims, keep), {}, frozen=None)


def reduce_dims(flow: Flow, out: Any, args: tuple, kwargs: dict, frozen: str | None) -> None:
    """Drop the reduced dimensions; freeze their channels for the reason `frozen`, if there is one."""
    tensor, source = args[0], flow.of(args[0])
    asked = args[1] if len(args) > 1 else kwargs.get("dim")
    if isinstance(asked, Tensor):  # max(a, b) of two tensors
        elementwise(flow, out, args, kwargs)
        return
    asked = range(tensor.dim()) if asked is None or asked == [] else [asked] if isinstance(asked, int) else asked
    gone = {dim % max(tensor.dim(), 1) for dim in asked}
    for dim in gone if frozen else ():
        if tensor.shape[dim] > 1:
            flow.freeze(source.dims[dim], frozen)
    for result in tensors_in((out,)):
        if result.dim() == tensor.dim():
            flow.put(result, [None if dim in gone else labels for dim, labels in enumerate(source.dims)], source.origin)
        else:
            flow.put(result, [labels for dim, labels in enumerate(source.dims) if dim not in gone], source.origin)


@operation(
    "_softmax", "_safe_softmax", "softmax", "_log_softmax", "log_softmax", "cumsum", "cumprod", "sort", "topk", "glu"
)
def _along(flow: Flow, out: Any, args: tuple, kwargs: dict) -> None:
    tensor, source = args[0], flow.of(args[0])
    numbers = [arg for arg in args[1:] if isinstance(arg, int) and not isinstance(arg, bool)]
    dim = (numbers[-1] if numbers else kwargs.get("dim", -1)) % tensor.dim()
    dims = list(source.dims)
    flow.freeze(dims[dim], "is normalised or ordered over its channels")
    for result in tensors_in((out,)):
        flow.put(result, [d if d is None or d.size == n else None for d, n in zip(dims, result.shape, strict=True)])


@operation("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
           "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
           "_scaled_dot_product_fused_attention_overrideable")  # fmt: skip
def _attention(flow: Flow, out: Any, args: tuple, kwargs: dict) -> None:
    query, key, value = (flow.of(tensor) for tensor in args[:3])
    contract(flow, query.dims[-1], key.dims[-1], *args[:2])
    flow.multiplied(*args[1:3], [query.dims[1], query.dims[-1], value.dims[-1]])
    heads = _both(flow, query.dims[1], key.dims[1], (query, key))
    heads = _both(flow, heads, value.dims[1], (query, value))
    mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
    if isinstance(mask, Tensor) and mask.dim() > 2 and mask.shape[-3] > 1:
        heads = _both(flow, heads, flow.of(mask).dims[-3], (query, flow.of(mask)))
    flow.put(out[0], [None, heads, None, value.dims[-1]])


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
