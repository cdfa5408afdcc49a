"""Gradients of a few layers, one a row of the Jacobian: what the dense views of J are built from.

Row n of J is the gradient of the mean loss of the row's examples. A batch row is one backward pass, restricted to the
asked layers. For finer rows one backward pass of the summed losses brings δ_n, the gradient at the layer's output, of
every example at once, as long as examples do not see each other; the row's gradient is then the vector-Jacobian product
of the layer alone at (x_n, δ_n). A bare parameter that is broadcast over examples (class tokens, position embeddings)
is handed out as a copy an example. Where examples do see each other, or the layer is not called as a module (other
bare parameters, an attention's output projection, tied weights), it is one backward pass a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_leaves

from ..state import differentiable, evaluating, hooks, keeping_statistics, numbered
from ..structure.layers import LayerAxis, Slot, channel_dims, channel_view, get_layer, own_parameters
from .objectives import Objective, checked_losses, classification
from .rows import Rows, examples_per_row, in_rows, uncompiled
from .sums import layer_row_gradients

RowGradients = dict[tuple[str, str], Tensor]
"""(layer, name of its tensor) -> the gradients of some rows, shape (rows, *tensor.shape)."""

BYTES_AT_A_TIME = 256 * 2**20


@dataclass(frozen=True)
class ChannelParameters:
    """The parameters of some channels of one layer axis, as matrices of one row a channel, (channels, d)."""

    axis: LayerAxis
    tensors: Mapping[str, nn.Parameter]
    slots: tuple[Slot, ...]
    channels: tuple[int, ...]

    def weights(self) -> Tensor:
        """Return w, shape (channels, d), at least float32."""
        parts = [channel_view(self.tensors[slot.tensor].detach(), slot) for slot in self.slots]
        return _at_least_float32(torch.cat(parts, dim=1)[list(self.channels)])

    def jacobian(self, gradients: RowGradients) -> Tensor:
        """Return the channels' rows of J, shape (channels, rows, d), at least float32."""
        parts = []
        for slot in self.slots:
            views = vmap(lambda gradient, slot=slot: channel_view(gradient, slot))
            parts.append(views(gradients[self.axis.layer, slot.tensor])[:, list(self.channels)])
        return _at_least_float32(torch.cat(parts, dim=2).transpose(0, 1))

    def labels(self, taps: bool = True) -> list[str]:
        """Return the place of each of the d parameters in its tensor, such as "weight[:, 2, 0, 1]".

        ":" stands for the channel. Outputs of a grouped convolution count within their group, and of fused q, k and v
        the first index is the part. Without ``taps`` the places within a kernel read "*".
        """
        return [label for slot in self.slots for label in self._labels(slot, taps)]

    def _labels(self, slot: Slot, taps: bool) -> Iterator[str]:
        tensor = self.tensors[slot.tensor]
        split, dims = channel_dims(tensor, slot)
        kernel = range(split.dim() - max(tensor.dim() - 2, 0), split.dim())
        name = slot.tensor or self.axis.layer.rpartition(".")[2]
        first = 1 if slot.groups > 1 else 0
        for index in itertools.product(*(range(1 if dim in dims else n) for dim, n in enumerate(split.shape))):
            places = [":" if d in dims else "*" if d in kernel and not taps else str(i) for d, i in enumerate(index)]
            yield f"{name}[{', '.join(places[first:])}]"


def check_channels(what: str, channels: Iterable[int], width: int) -> tuple[int, ...]:
    """Return the channels as a tuple; raise ValueError when there are none, or one outside an axis of this width."""
    chosen = tuple(int(channel) for channel in channels)
    if not chosen:
        raise ValueError(f"{what}: no channels are asked for")
    wrong = next((channel for channel in chosen if not 0 <= channel < width), None)
    if wrong is not None:
        raise ValueError(f"{what}: no channel {wrong}; the channels are 0 to {width - 1}")
    return chosen


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@dataclass(frozen=True)
class _Call:
    """One call of a layer in a forward pass: its input, and its output while it is still a node of the graph."""

    layer: str
    inputs: Tensor
    outputs: Tensor


def stream_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Sequence[str],
    *,
    rows: Rows = "batch",
    objective: Objective = classification,
) -> Iterator[RowGradients]:
    """Yield, some rows at a time, the gradient of each row's loss with respect to the parameters of the given layers.

    The model runs in eval mode and only the asked parameters require grad; all is given back after each batch, or when
    the iterator is closed. Nothing is kept between batches.

    Raises:
        ValueError: no batches, an unknown layer, a layer that never ran, a loss that is not finite, rows that do not
            divide a batch, or rows finer than a batch of an objective that returns a scalar.
    """
    per_row, model = examples_per_row(rows), uncompiled(model)
    found = {name: get_layer(model, name) for name in dict.fromkeys(layers)}
    tensors = {(name, key): p for name, layer in found.items() for key, p in own_parameters(layer).items()}
    by_layer = None
    for number, batch in numbered(batches):
        calls: list[_Call] = []
        apart = per_row and by_layer is not False
        watched, bare = (_capture(found, calls), _broadcast(found)) if apart else ([], {})
        with evaluating(model), keeping_statistics(model), differentiable(model, tensors.values()):
            with hooks(watched), torch.compiler.set_stance("force_eager" if watched else "default"):
                losses = in_rows(_losses(model, batch, objective, number, bare, calls), per_row, number)
            if per_row and by_layer is None:
                by_layer = _examples_are_apart(found, calls, losses) and _calls_explain(found, tensors, calls, losses)
            if by_layer:
                yield from _layer_gradients(found, calls, losses)
            else:
                yield from (_gradients(loss, tensors) for loss in losses.mean(1))


def _broadcast(layers: Mapping[str, nn.Module | nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return the bare parameters that may be broadcast over examples: those with a leading dimension of 1."""
    bare = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Parameter)}
    return {name: parameter for name, parameter in bare.items() if parameter.dim() > 1 and len(parameter) == 1}


def _losses(
    model: nn.Module, batch: Any, objective: Objective, number: int, bare: Mapping[str, Tensor], calls: list[_Call]
) -> Tensor:
    """Return a batch's losses; where the model takes a copy of bare parameters an example, note these as calls."""
    try:
        with _copied(model, bare, batch) as copied:
            losses = checked_losses(model, batch, objective, number)
    except (RuntimeError, ValueError):
        if not bare:
            raise
        calls.clear()
        return checked_losses(model, batch, objective, number)
    calls += copied
    return losses


@contextmanager
def _copied(model: nn.Module, bare: Mapping[str, Tensor], batch: Any) -> Iterator[list[_Call]]:
    """Let bare parameters be as long as a batch; yield the copies as what calls gave."""
    examples = next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()), 1)
    copies = {name: parameter.expand(examples, *parameter.shape[1:]) for name, parameter in bare.items()}
    places = {name: (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in bare}
    try:
        for name, (owner, leaf) in places.items():
            owner._parameters[leaf] = copies[name]
        yield [_Call(name, copy.detach(), copy) for name, copy in copies.items()]
    finally:
        for name, (owner, leaf) in places.items():
            owner._parameters[leaf] = bare[name]


def _gradients(loss: Tensor, tensors: Mapping[tuple[str, str], nn.Parameter]) -> RowGradients:
    """Return the gradient of one row's loss by a backward pass."""
    gradients = torch.autograd.grad(loss, tuple(tensors.values()), allow_unused=True, retain_graph=True)
    for (layer, _), gradient in zip(tensors, gradients, strict=True):
        if gradient is None:
            raise ValueError(f"layer {layer!r} never ran, or the loss does not depend on it")
    return {key: gradient.to_dense()[None] for key, gradient in zip(tensors, gradients, strict=True)}


def _capture(layers: Mapping[str, nn.Module | nn.Parameter], calls: list[_Call]) -> list:
    """Register hooks that note every call of the layers that takes and gives one tensor."""

    def noting(name: str) -> Callable:
        def note(layer: nn.Module, inputs: tuple, outputs: Any) -> Any:
            if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not isinstance(outputs, Tensor):
                return outputs
            calls.append(_Call(name, inputs[0].detach(), outputs))
            # A later in-place activation must not overwrite the node whose gradient is asked for.
            return outputs.clone()

        return note

    modules = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Module)}
    return [layer.register_forward_hook(noting(name)) for name, layer in modules.items()]


def _examples_are_apart(layers: Mapping[str, Any], calls: Sequence[_Call], losses: Tensor) -> bool:
    """Say whether all layers were called and the leading axis of each call is the example, judged by example 0."""
    if {call.layer for call in calls} != set(layers):
        return False
    if any({len(call.inputs), len(call.outputs)} != {losses.numel()} for call in calls):
        return False
    outputs = [call.outputs for call in calls]
    first = torch.autograd.grad(losses[0, 0], outputs, retain_graph=True, allow_unused=True)
    return all(gradient is not None and not gradient[1:].any() for gradient in first)


def _calls_explain(
    layers: Mapping[str, nn.Module],
    tensors: Mapping[tuple[str, str], nn.Parameter],
    calls: Sequence[_Call],
    losses: Tensor,
) -> bool:
    """Say whether the calls give the whole gradient; a weight that is also used outside its module has more."""
    whole = torch.autograd.grad(losses.mean(1).sum(), tuple(tensors.values()), retain_graph=True, allow_unused=True)
    # vmap knows no sparse gradients.
    if any(gradient is None or gradient.is_sparse for gradient in whole):
        return False
    found = {key: torch.zeros_like(gradient) for key, gradient in zip(tensors, whole, strict=True)}
    for piece in _layer_gradients(layers, calls, losses):
        for key, gradient in piece.items():
            found[key] += gradient.sum(0)
    pairs = zip(found.values(), whole, strict=True)
    return all((given - gradient).norm() <= 0.01 * gradient.norm() for given, gradient in pairs)


def _layer_gradients(layers: Mapping[str, nn.Module], calls: Sequence[_Call], losses: Tensor) -> Iterator[RowGradients]:
    """Yield the rows' gradients from one backward pass to the layers' outputs and a product of each layer alone."""
    rows, size = losses.shape
    deltas = torch.autograd.grad(losses.mean(1).sum(), [call.outputs for call in calls], retain_graph=True)
    bytes_a_row = sum(p.nbytes for layer in layers.values() for p in own_parameters(layer).values())
    step = max(1, BYTES_AT_A_TIME // bytes_a_row)
    for start in range(0, rows, step):
        totals: RowGradients = {}
        for call, delta in zip(calls, deltas, strict=True):
            inputs, delta = (t.unflatten(0, (rows, size))[start : start + step] for t in (call.inputs, delta))
            for key, gradient in layer_row_gradients(layers[call.layer], inputs, delta).items():
                key = (call.layer, key)
                totals[key] = totals[key] + gradient if key in totals else gradient
        yield totals
