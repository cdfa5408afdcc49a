"""Products of the Jacobian with the weights, J·w: one number a channel and row, exact, without storing J.

Row n of J is the gradient of a loss L_n with respect to the parameters w of one channel of one layer axis. The
Jacobian Criterion (Chen et al. 2025, arXiv 2508.05521) scores the channel by wᵀ(JᵀJ)w = Σ_n (J_n w)², so only the
products J_n w are needed. After one backward pass of a batch's mean loss, W ⊙ ∂L/∂W summed over everything but the
channels is J_n w of every channel of the layer at once; finer rows come from gates (see `gates`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import (
    LayerAxis,
    UnknownLayerError,
    UnknownNameError,
    channel_sum,
    get_layer,
    layer_axes,
    own_parameters,
    scored_layers,
)
from .state import differentiable, evaluating

Objective = Callable[[nn.Module, Any], Tensor]
Rows = str | int
"""One row of J a batch ("batch"), an example ("sample"), or k consecutive examples (a positive whole number)."""


def classification(model: nn.Module, batch: Any) -> Tensor:
    """Return the cross entropy of each example of a batch (images, labels), shape (examples,). Soft labels work too.

    Raises:
        ValueError: labels outside the model's outputs.
    """
    images, labels = batch
    outputs = model(images)
    if not labels.is_floating_point() and labels.numel():
        low, high = labels.aminmax()
        if low < 0 or high >= outputs.shape[-1]:
            wrong = (low if low < 0 else high).item()
            raise ValueError(f"label {wrong} for a model with {outputs.shape[-1]} outputs (0 to {outputs.shape[-1] - 1})")
    return F.cross_entropy(outputs, labels, reduction="none")


@dataclass(frozen=True)
class JacobianProducts(Mapping[LayerAxis, Tensor]):
    """J·w of every channel of the scored layer axes: a mapping LayerAxis -> tensor of shape (rows, channels)."""

    values_: Mapping[LayerAxis, Tensor]
    rows: Rows

    def __getitem__(self, axis: LayerAxis) -> Tensor:
        axis = LayerAxis(*axis)
        if axis not in self.values_:
            raise UnknownNameError("layer axis", str(axis), [str(known) for known in self.values_])
        return self.values_[axis]

    def __iter__(self) -> Iterator[LayerAxis]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)

    def scores(self) -> dict[LayerAxis, Tensor]:
        """Return Σ_n (J_n w)² of each channel: LayerAxis -> (channels,)."""
        return {axis: product.square().sum(0) for axis, product in self.items()}

    def __repr__(self) -> str:
        rows = next(iter(self.values_.values())).shape[0] if self.values_ else 0
        return f"JacobianProducts({rows} rows, one a {self.rows}, {len(self)} layer axes)"


def jacobian_products(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    rows: Rows = "batch",
    layers: Iterable[str] | None = None,
    objective: Objective = classification,
    max_bytes: int = 4 * 2**30,
) -> JacobianProducts:
    """Compute J·w for every channel of the given layers, all rows kept.

    Args:
        model: run in eval mode; its mode, gradients, hooks and flags are given back unchanged.
        batches: the calibration batches, whatever `objective` takes; (images, labels) for the default.
        rows: see `Rows`. A row's loss is the mean loss of its examples.
        layers: names of modules or bare parameters; by default every layer that the table of layer types knows.
        objective: (model, batch) -> the losses of its examples, shape (examples,), or one scalar.
        max_bytes: refuse to keep more rows than fit in this many bytes.

    Raises:
        ValueError: no batches, an unknown layer, a layer that never ran, a loss that is not finite, or rows that would
            take more than `max_bytes`.
    """
    axes = model_axes(model, layers)
    kept: dict[LayerAxis, list[Tensor]] = {axis: [] for axis in axes}
    used = 0
    for products in stream_products(model, batches, axes, rows=rows, objective=objective):
        used += sum(product.nbytes for product in products.values())
        if used > max_bytes:
            raise ValueError(f"the products need more than max_bytes={max_bytes}: score with streaming or fewer layers")
        for axis, product in products.items():
            kept[axis].append(product)
    return JacobianProducts({axis: torch.cat(parts) for axis, parts in kept.items()}, rows)


def model_axes(model: nn.Module, layers: Iterable[str] | None = None) -> tuple[LayerAxis, ...]:
    """Return the scorable axes of the named layers, or of all layers that the table knows."""
    names = [name for name, _ in scored_layers(model)] if layers is None else list(layers)
    axes = []
    for name in names:
        layer = get_layer(model, name)
        found = {key: axis for key, axis in layer_axes(layer, name).items() if parameter_slots(layer, axis)}
        if not found:
            raise UnknownLayerError(f"layer {name!r} ({type(layer).__name__}) has no channels with parameters")
        axes += [LayerAxis(name, key) for key in found]
    return tuple(axes)


def parameter_slots(layer: nn.Module, axis: Any) -> list:
    """Return the slots of an axis that lie in parameters (running statistics are buffers and have no gradient)."""
    parameters = own_parameters(layer)
    return [slot for slot in axis.slots if slot.tensor in parameters]


def stream_products(
    model: nn.Module,
    batches: Iterable[Any],
    axes: Sequence[LayerAxis],
    *,
    rows: Rows = "batch",
    objective: Objective = classification,
) -> Iterator[dict[LayerAxis, Tensor]]:
    """Yield, batch by batch, J·w of the given axes: LayerAxis -> (rows of this batch, channels).

    Nothing is kept between batches. Sums are at least float32. Raises as `jacobian_products` does.
    """
    layers = {axis.layer: get_layer(model, axis.layer) for axis in axes}
    parameters = {id(p): p for layer in layers.values() for p in own_parameters(layer).values()}
    count = 0
    with evaluating(model), differentiable(model, parameters.values()):
        for count, batch in enumerate(batches, start=1):
            loss = batch_loss(model, batch, objective, count)
            gradients = torch.autograd.grad(loss, tuple(parameters.values()), allow_unused=True)
            yield _row(layers, axes, dict(zip(parameters, gradients, strict=True)))
    if count == 0:
        raise ValueError("the batches yield no data: an empty data set, or an iterator that was already used up")


def batch_loss(model: nn.Module, batch: Any, objective: Objective, number: int) -> Tensor:
    """Return the mean loss of one batch; raise ValueError naming the batch when it is not a finite scalar with grad."""
    losses = objective(model, batch)
    if not isinstance(losses, Tensor) or losses.dim() > 1 or losses.numel() == 0:
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"batch {number}: the objective returned {got}; expected a scalar or one loss an example")
    loss = losses.float().mean() if losses.dtype in (torch.float16, torch.bfloat16) else losses.mean()
    if not torch.isfinite(loss):
        raise ValueError(f"batch {number}: the loss is {loss.item()}; look for NaN in the weights or the images")
    if loss.grad_fn is None:
        raise ValueError(f"batch {number}: the loss does not depend on the model's parameters through autograd")
    return loss


def _row(
    layers: Mapping[str, nn.Module], axes: Sequence[LayerAxis], gradients: dict[int, Tensor | None]
) -> dict[LayerAxis, Tensor]:
    """Turn the gradients of one loss into J·w of each axis, shape (1, channels), layer by layer."""
    wanted: dict[str, list[str]] = {}
    for axis in axes:
        wanted.setdefault(axis.layer, []).append(axis.axis)
    row = {}
    for name, keys in wanted.items():
        layer = layers[name]
        described = layer_axes(layer, name)
        products = {key: _product(p, gradients[id(p)], name) for key, p in own_parameters(layer).items()}
        for key in keys:
            sums = [channel_sum(products[s.tensor], s) for s in parameter_slots(layer, described[key])]
            row[LayerAxis(name, key)] = sum(sums[1:], sums[0])[None]
    return row


def _product(parameter: Tensor, gradient: Tensor | None, name: str) -> Tensor:
    if gradient is None:
        raise ValueError(f"layer {name!r} never ran, or the loss does not depend on it: score without it (layers=, ignore=)")
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.detach().to(dtype) * gradient.to(dtype)
