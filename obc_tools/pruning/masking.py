"""The masked network: what a pruned one must equal, made without any of the code that traces, couples or shrinks.

The original network runs at full size, operation by operation, and every tensor knows which of its entries are *dead*:
those that the plan removes from the weights, and what follows from them. An operation computes as if the dead were not
there: products, sums and maxima leave them out, norms and means count the living alone. `RULES` says for each
of torch's operations how; no type of a layer matters. What an operation outside the rules does with dead entries is
noted as a doubt.

Masks are Boolean tensors with as many dimensions as the tensor, of length 1 where all is alike.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakIdKeyDictionary

from ..structure.flow import elementwise, handler_of, into, name_of, tensors_in
from ..structure.layers import LayerAxis, activation_dim, all_axes, channel_dims, get_layer, layer_type, own_tensors
from ..structure.operations import ATTENTIONS
from ..structure.shrinking import is_attribute, shrink_layer
from .plan import PruningPlan

Mask = Tensor | None


class Masking(TorchDispatchMode):
    """Runs a model as if what a plan removes were not there, within a `with` block; the model is left unchanged.

    ``doubts`` names the operations of which that cannot be said.

    Raises:
        PlanMismatchError: the plan does not fit the model.
    """

    def __init__(self, model: nn.Module, plan: PruningPlan):
        super().__init__()
        plan.validate(model)
        self.doubts: dict[str, None] = {}
        self._dead = WeakIdKeyDictionary()
        self._norms = dict(_declared_norms(model, plan))
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        for tensor, mask in dead_entries(model, plan):
            self._put(tensor, mask)

    def __enter__(self) -> Masking:
        self._hooks += [norm.register_forward_hook(self._norm_as_declared) for norm in self._norms]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        super().__exit__(*error)

    def _norm_as_declared(self, norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return what a norm of the user's own type gives for the living channels, which its type says it looks at."""
        narrow, kept = self._norms[norm]
        with _disable_current_modes():
            dim = activation_dim(norm, inputs[0])
            index = torch.as_tensor(kept, device=output.device)
            result = output.index_copy(dim, index, narrow(inputs[0].index_select(dim, index)))
        self._put(result, self._dead.get(output))
        return result

    def living(self, tensor: Tensor) -> Tensor:
        """Return the entries of a tensor that are not dead, flattened."""
        mask = self._dead.get(tensor)
        return tensor.flatten() if mask is None else tensor[~mask.expand_as(tensor)]

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if not any(tensor in self._dead for tensor in tensors_in((*args, *kwargs.values()))):
            return function(*args, **kwargs)
        call = Call(function, args, kwargs, self._dead)
        written = args[0] if args and isinstance(args[0], Tensor) and function._schema.is_mutable else None
        before = None if written is None else self._dead.get(written)
        out, masks = self._follow(call)
        for result, mask in zip(tensors_in((out,)), masks, strict=True):
            self._put(result, mask)
        if written is not None and written._is_view() and not _same(before, self._dead.get(written)):
            self.doubts[f"{call.name} into a part of a tensor"] = None
        return out

    def _follow(self, call: Call) -> tuple[Any, Sequence[Mask]]:
        rule = RULES.get(call.name)
        if rule is None and handler_of(call.function) is elementwise:
            rule = _elementwise
        if rule is not None and (rule in (_elementwise, _rearrange) or not call.function._schema.is_mutable):
            return rule(call)
        if not any(word in call.name for word in BESIDE_CHANNELS):
            self.doubts[call.name] = None
        out = call.run() if call.function._schema.is_mutable else call.run_on_living()
        return out, [call.like(result) for result in tensors_in((out,))]

    def _put(self, tensor: Tensor, mask: Mask) -> None:
        mask = None if mask is None else _thin(mask)
        if mask is not None and mask.any():
            self._dead[tensor] = mask
        else:
            self._dead.pop(tensor, None)


def _declared_norms(model: nn.Module, plan: PruningPlan) -> Iterator[tuple[nn.Module, tuple[nn.Module, tuple]]]:
    """Yield norms over channels, of registered types, that lose any: each with a narrow copy and what it keeps.

    They may compute with their width, which no operation shows. `check_layer` proves that they can be narrowed.
    """
    for name, layer in model.named_modules():
        kept, kind = plan.shrunk.get(LayerAxis(name, "out")), layer_type(layer)
        if kept is not None and kind.declared and kind.statistics == "channels":
            narrow = copy.deepcopy(layer)
            shrink_layer(narrow, {"out": kept}, name)
            yield layer, (narrow, kept)


def dead_entries(model: nn.Module, plan: PruningPlan) -> Iterable[tuple[Tensor, Tensor]]:
    """Return parameters and buffers of a model, each with a mask of what a plan removes of it."""
    removed: dict[LayerAxis, set[int]] = defaultdict(set)
    for group, kept in zip(plan.groups, plan.kept, strict=True):
        gone = set(range(group.width)).difference(kept)
        for member in group.members:
            pairs = zip(member.positions, member.channels, strict=True)
            removed[member.axis].update(position for position, channel in pairs if channel in gone)
    masks = WeakIdKeyDictionary()
    for axis, positions in removed.items():
        layer = get_layer(model, axis.layer)
        tensors = own_tensors(layer)
        for slot in () if is_attribute(axis.axis) or not positions else all_axes(layer, axis.layer)[axis.axis].slots:
            tensor = tensors[slot.tensor]
            mask = masks.setdefault(tensor, torch.zeros(tensor.shape, dtype=torch.bool, device=tensor.device))
            split, dims = channel_dims(mask, slot)
            channels = split.movedim(dims, tuple(range(len(dims))))
            channels[np.unravel_index(sorted(positions), channels.shape[: len(dims)])] = True
    return list(masks.items())


@dataclass(frozen=True)
class Call:
    """One operation on tensors of which some have dead entries."""

    function: Any
    args: tuple
    kwargs: dict
    dead: WeakIdKeyDictionary

    @cached_property
    def name(self) -> str:
        """The name of the operation; one in place has that of the other."""
        return name_of(self.function).rstrip("_")

    @cached_property
    def named(self) -> dict[str, Any]:
        """All arguments by their names."""
        known = self.function._schema.arguments
        given = {argument.name: value for argument, value in zip(known, self.args, strict=False)}
        return {a.name: a.default_value for a in known if a.has_default_value()} | given | self.kwargs

    def run(self) -> Any:
        """Run the operation as it is."""
        return self.function(*self.args, **self.kwargs)

    def run_on_living(self, value: float = 0) -> Any:
        """Run the operation with a value in place of dead entries."""
        args, kwargs = tree_map(lambda leaf: self.filled(leaf, value), (self.args, self.kwargs))
        return self.function(*args, **kwargs)

    def filled(self, leaf: Any, value: float = 0) -> Any:
        """Return a tensor with a value in place of its dead entries; all else as it is."""
        mask = self.dead.get(leaf) if isinstance(leaf, Tensor) else None
        return leaf if mask is None else leaf.masked_fill(mask, value)

    def whole(self, tensor: Tensor) -> Tensor:
        """Return the mask of a tensor in the tensor's shape."""
        mask = self.dead.get(tensor)
        mask = torch.zeros([1] * tensor.dim(), dtype=torch.bool, device=tensor.device) if mask is None else mask
        return mask.expand(tensor.shape)

    def union(self, shape: Sequence[int], tensors: Sequence[Tensor] | None = None) -> Mask:
        """Return where any of some tensors is dead, once they are stretched to a shape."""
        tensors = tensors_in((*self.args, *self.kwargs.values())) if tensors is None else tensors
        found = [self.dead[tensor] for tensor in tensors if isinstance(tensor, Tensor) and tensor in self.dead]
        try:
            united = torch.zeros([1] * len(shape), dtype=torch.bool, device=found[0].device) if found else None
            for mask in found:
                united = united | mask
            return None if united is None else united.expand(shape)
        except RuntimeError:  # not stretched element by element
            return None

    def like(self, result: Tensor) -> Mask:
        """Return the mask of a result that is as its arguments are along the dimensions in which any are dead."""
        mask = self.union(result.shape)
        return mask if mask is None or mask.dim() == result.dim() else None


def _thin(mask: Tensor) -> Tensor:
    """Let a mask have length 1 in the dimensions along which all is alike."""
    for compare in (False, True):
        for dim in range(mask.dim() if mask.numel() else 0):
            first = mask.narrow(dim, 0, 1)
            if mask.stride(dim) == 0 or (compare and torch.equal(mask, first.expand_as(mask))):
                mask = first
    return mask


def _same(one: Mask, other: Mask) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


Rule = Callable[[Call], tuple[Any, Sequence[Mask]]]
"""What an operation gives on living entries, and the mask of each tensor of it."""

RULES: dict[str, Rule] = {}
BESIDE_CHANNELS = ("pool", "upsample", "grid_sampler", "reflection_pad", "replication_pad")
"""Parts of the names of operations along height and width."""


rule = into(RULES)


def _elementwise(call: Call) -> tuple[Any, Sequence[Mask]]:
    out = call.run()
    return out, [call.union(result.shape) for result in tensors_in((out,))]


@rule("permute", "transpose", "t", "unsqueeze", "squeeze", "select", "unbind", "slice", "split", "split_with_sizes",
      "chunk", "expand", "clone", "contiguous", "alias", "detach", "cat", "stack", "flip", "roll", "repeat", "unfold",
      "index_select", "index", "_unsafe_index", "gather", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
      "native_channel_shuffle", "diagonal", "lift_fresh", "narrow", "embedding", "repeat_interleave")  # fmt: skip
def _rearrange(call: Call) -> tuple[Any, Sequence[Mask]]:
    """Rearrange the mask as the values are."""
    first = call.args[0]
    masks = [call.whole(each) for each in first] if isinstance(first, list | tuple) else call.whole(first)
    return call.run(), tensors_in((call.function(masks, *call.args[1:], **call.kwargs),))


@rule("view", "_unsafe_view", "reshape", "_reshape_alias")
def _view(call: Call) -> tuple[Any, Sequence[Mask]]:
    out = call.run()
    return out, [call.whole(call.args[0]).reshape(out.shape)]


@rule("constant_pad_nd")
def _pad(call: Call) -> tuple[Any, Sequence[Mask]]:
    return call.run(), [call.function(call.whole(call.args[0]), call.args[1], 0)]


@rule("new_zeros", "new_ones", "new_full", "new_empty")
def _make(call: Call) -> tuple[Any, Sequence[Mask]]:
    """Take a tensor that only asks another for its kind of numbers as it is."""
    return call.run(), [None]


@rule("im2col", "col2im")
def _columns(call: Call) -> tuple[Any, Sequence[Mask]]:
    out = call.run_on_living()
    return out, [call.function(call.whole(call.args[0]).to(out.dtype), *call.args[1:]) > 0]


@rule("glu")
def _glu(call: Call) -> tuple[Any, Sequence[Mask]]:
    one, other = call.whole(call.args[0]).chunk(2, call.named["dim"])
    return call.run(), [one | other]


@rule("mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addbmm", "addmv", "_addmm_activation")
def _multiply(call: Call) -> tuple[Any, Sequence[Mask]]:
    """Sum over what is alive on both sides; a result is dead where its whole row or column is."""
    out, first = call.run_on_living(), 1 if "add" in call.name else 0
    left, right = (call.whole(tensor) for tensor in call.args[first : first + 2])
    mask = left.all(-1)
    if right.dim() > 1:
        mask = mask.unsqueeze(-1) | right.all(-2).unsqueeze(-2)
    added = call.union(out.shape, call.args[:first])
    return out, [mask if added is None else mask | added]


@rule("convolution", "_convolution", "convolution_overrideable")
def _convolve(call: Call) -> tuple[Any, Sequence[Mask]]:
    out, weight = call.run_on_living(), call.whole(call.args[1])
    if call.args[6]:  # transposed
        weight = weight.unflatten(0, (call.args[8], -1)).transpose(1, 2).flatten(0, 1)
    gone = weight.flatten(1).all(1)
    if call.args[2] is not None:
        gone = gone | call.whole(call.args[2])
    return out, [gone.view(-1, *[1] * (weight.dim() - 2)).expand(out.shape)]


@rule(*ATTENTIONS)
def _attend(call: Call) -> tuple[Any, Sequence[Mask]]:
    query, key, value = call.args[:3]
    out = call.run_on_living()
    times = query.shape[1] // value.shape[1]
    heads = call.whole(value).all(-2, keepdim=True).repeat_interleave(times, 1)
    heads = heads | call.whole(query).all(-1, keepdim=True)
    return out, [heads.expand(out[0].shape), *[None] * (len(tensors_in((out,))) - 1)]


def _moments(call: Call, tensor: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the living entries' mean over some dimensions, their mean square distance from it, and their number."""
    dead = call.whole(tensor)
    count = (~dead).sum(dims, keepdim=True, dtype=tensor.dtype)
    mean = call.filled(tensor).sum(dims, keepdim=True) / count
    return mean, (tensor - mean).masked_fill(dead, 0).square().sum(dims, keepdim=True) / count, count


def _scaled(call: Call, normed: Tensor, dim: int | None) -> Tensor:
    """Multiply by a norm's weight and add its bias, along one dimension or the last ones."""
    shape = [1, -1, *[1] * (normed.dim() - 2)]
    weight, bias = (call.named.get(name) for name in ("weight", "bias"))
    normed = normed if weight is None else normed * (weight if dim is None else weight.view(shape))
    return normed if bias is None else normed + (bias if dim is None else bias.view(shape))


def _normed_mask(call: Call, out: Tensor, others: int) -> Sequence[Mask]:
    return [call.union(out.shape, call.args[:1]), *[None] * others]


@rule("native_layer_norm", "_fused_rms_norm")
def _layer_norm(call: Call) -> tuple[Any, Sequence[Mask]]:
    taken, shape, eps = call.args[0], call.named["normalized_shape"], call.named["eps"]
    mean, variance, _ = _moments(call, taken, list(range(-len(shape), 0)))
    if call.name == "_fused_rms_norm":
        scale = (variance + mean.square() + (torch.finfo(taken.dtype).eps if eps is None else eps)).rsqrt()
        out = _scaled(call, taken * scale, None)
        return (out, scale), _normed_mask(call, out, 1)
    scale = (variance + eps).rsqrt()
    out = _scaled(call, (taken - mean) * scale, None)
    return (out, mean, scale), _normed_mask(call, out, 2)


@rule("native_group_norm")
def _group_norm(call: Call) -> tuple[Any, Sequence[Mask]]:
    taken, groups = call.args[0], call.named["group"]
    blocks = taken.reshape(len(taken), groups, -1)
    inner = replace(call, dead={blocks: call.whole(taken).reshape(blocks.shape)})
    mean, variance, _ = _moments(inner, blocks, [2])
    scale = (variance + call.named["eps"]).rsqrt()
    out = _scaled(call, ((blocks - mean) * scale).view(taken.shape), 1)
    return (out, mean.flatten(1), scale.flatten(1)), _normed_mask(call, out, 2)


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
      "miopen_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update")  # fmt: skip
def _batch_norm(call: Call) -> tuple[Any, Sequence[Mask]]:
    """Take statistics anew where a norm does, such as of weights that are standardised over their inputs."""
    out, taken = list(call.run()), call.args[0]
    if call.named.get("training", call.name == "_batch_norm_with_update"):
        mean, variance, _ = _moments(call, taken, [dim for dim in range(taken.dim()) if dim != 1])
        eps = call.named.get("eps", call.named.get("epsilon"))
        out[0] = _scaled(call, (taken - mean) * (variance + eps).rsqrt(), 1)
    return tuple(out), _normed_mask(call, out[0], len(tensors_in(out)) - 1)


NEUTRAL = {"sum": 0, "linalg_vector_norm": 0, "norm": 0, "any": 0, "cumsum": 0, "prod": 1, "all": 1, "cumprod": 1,
           "amax": -math.inf, "max": -math.inf, "logsumexp": -math.inf, "amin": math.inf, "min": math.inf,
           "_softmax": -math.inf, "_safe_softmax": -math.inf, "_log_softmax": -math.inf}  # fmt: skip
"""Operations along dimensions, each with the value that changes nothing in it."""


def _reduced(call: Call, taken: Tensor, result: Tensor) -> Mask:
    """Return the mask of what an operation leaves of a tensor: where all that it took is dead."""
    dims, mask = _dims(call, taken), call.whole(taken)
    for dim in dims:
        mask = mask.all(dim, keepdim=True)
    return mask.reshape(result.shape) if result.numel() == mask.numel() else mask.expand(result.shape)


def _dims(call: Call, taken: Tensor) -> list[int]:
    asked = call.named.get("dim")
    asked = range(taken.dim()) if asked is None or asked == [] else [asked] if isinstance(asked, int) else asked
    return sorted({dim % max(taken.dim(), 1) for dim in asked})


@rule("sum", "linalg_vector_norm", "norm", "any", "prod", "all", "amax", "amin", "max", "min", "logsumexp")
def _reduce(call: Call) -> tuple[Any, Sequence[Mask]]:
    if "other" in call.named:  # of two tensors
        return _elementwise(call)
    taken = call.args[0]
    out = call.run_on_living(NEUTRAL[call.name])
    return out, [_reduced(call, taken, result) for result in tensors_in((out,))]


@rule("mean", "var", "std", "var_mean", "std_mean")
def _average(call: Call) -> tuple[Any, Sequence[Mask]]:
    taken = call.args[0]
    dims = _dims(call, taken)
    mean, variance, count = _moments(call, taken, dims)
    correction = call.named.get("correction", call.named.get("unbiased", 1))
    spread = variance * (count / (count - (1 if correction is None else correction)))
    found = {"mean": mean, "var": spread, "std": spread.sqrt()}
    results = [found[name] for name in call.name.split("_")]
    if not call.named.get("keepdim", False):
        results = [result.reshape([n for dim, n in enumerate(taken.shape) if dim not in dims]) for result in results]
    masks = [_reduced(call, taken, result) for result in results]
    return (results[0] if len(results) == 1 else tuple(results)), masks


@rule("_softmax", "_safe_softmax", "_log_softmax", "cumsum", "cumprod")
def _along(call: Call) -> tuple[Any, Sequence[Mask]]:
    return call.run_on_living(NEUTRAL[call.name]), [call.whole(call.args[0])]
