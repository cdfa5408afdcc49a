"""Products of the Jacobian with the weights, J·w: one number a channel and row, exact, without storing J.

Row n of J is the gradient of a loss L_n with respect to the parameters w of one channel of one layer axis. The
Jacobian Criterion (Chen et al. 2025, arXiv 2508.05521) scores the channel by wᵀ(JᵀJ)w = Σ_n (J_n w)², so only the
products J_n w are needed. After one backward pass of a batch's mean loss, W ⊙ ∂L/∂W summed over everything but the
channels is J_n w of every channel of the layer at once; a capture gives it without the weights' gradients (see
`capture`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import check_name, check_number
from ..state import numbered, without_weight_norms
from ..structure.layers import LayerAxis, UnknownLayerError, get_layer, layer_axes, scored_layers
from .objectives import Objective, classification
from .rows import ProductRows, Proof, Rows, examples_per_row, parameter_slots, uncompiled


@dataclass(frozen=True)
class JacobianProducts(Mapping[LayerAxis, Tensor]):
    """J·w of every channel of the scored layer axes: a mapping LayerAxis -> tensor of shape (rows, channels)."""

    values_: Mapping[LayerAxis, Tensor]
    rows: Rows

    def __getitem__(self, axis: LayerAxis) -> Tensor:
        axis = LayerAxis.of(axis)
        check_name("layer axis", axis, self.values_)
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

    A parameter that is used several times, by several layers if it is tied, has the sum over all uses in J·w: each of
    its names has the same product, which groups count once (see `score_groups`).

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
    check_number("max_bytes", max_bytes, "a number of bytes above 0", lambda number: number > 0)
    model = without_weight_norms(model)
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
    model = uncompiled(model)
    chosen = [layers] if isinstance(layers, str) else layers
    names = [name for name, _ in scored_layers(model)] if chosen is None else list(chosen)
    axes = []
    for name in names:
        layer = get_layer(model, name)
        found = {key: axis for key, axis in layer_axes(layer, name).items() if parameter_slots(layer, axis)}
        if not found:
            raise UnknownLayerError(f"layer {name!r} ({type(layer).__name__}) has no channels with parameters")
        axes += [LayerAxis(name, key) for key in found]
    return tuple(axes)


def stream_products(
    model: nn.Module,
    batches: Iterable[Any],
    axes: Sequence[LayerAxis],
    *,
    rows: Rows = "batch",
    objective: Objective = classification,
    proof: Proof | None = None,
    set_aside: bool = False,
) -> Iterator[dict[LayerAxis, Tensor]]:
    """Yield, batch by batch, J·w of the given axes: LayerAxis -> (rows of this batch, channels).

    Nothing is kept between batches, and the model is itself again whenever a batch's products are handed out. Sums are
    at least float32. A `proof` saves what the first batches show of the model for the next call, with the same rows, on
    what is pruned from it. With `set_aside` layers that a batch's loss does not depend on have products of zero; the
    proof's ``reached`` names all others. Raises as `jacobian_products` does.
    """
    read = ProductRows(model, axes, objective, examples_per_row(rows), proof, set_aside)
    for number, batch in numbered(batches):
        yield read(batch, number)
