"""Rows of J·w from batches: by weight gradients, one backward pass a row, or by gates, one a batch.

`BatchRows` and `FinerRows` are called with one batch after another. Each call borrows the model's mode, flags and hooks
and gives them back before it returns.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..state import differentiable, evaluating, keeping_statistics
from ..structure.layers import LayerAxis, channel_sum, find_axis, get_layer, own_parameters
from .capture import Gates, gated_functions
from .objectives import Objective, batch_loss, checked_losses

logger = logging.getLogger(__name__)

Rows = str | int
"""One row of J a batch ("batch"), an example ("sample"), or k consecutive examples (a positive whole number)."""


def examples_per_row(rows: Rows) -> int | None:
    """Return how many examples make a row, None for a whole batch; raise ValueError for anything that is not `Rows`."""
    if rows == "batch":
        return None
    if rows == "sample":
        return 1
    if isinstance(rows, int) and not isinstance(rows, bool) and rows > 0:
        return rows
    raise ValueError(
        f"rows={rows!r}: expected 'batch', 'sample' or how many consecutive examples make a row (1, 2, ...)"
    )


class BatchRows:
    """One row a batch, from the weights' gradients of the batch's mean loss."""

    def __init__(self, model: nn.Module, axes: Sequence[LayerAxis], objective: Objective):
        self.model, self.axes, self.objective = model, axes, objective
        self.layers = _layers(model, axes)

    def __call__(self, batch: Any, number: int) -> dict[LayerAxis, Tensor]:
        parameters = _parameters(self.layers, self.axes)
        with evaluating(self.model), keeping_statistics(self.model), differentiable(self.model, parameters):
            loss = batch_loss(self.model, batch, self.objective, number)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return _row(self.layers, self.axes, dict(zip(map(id, parameters), gradients, strict=True)))


class FinerRows:
    """Rows of `per_row` examples, by gates where those are exact and by one backward pass a row elsewhere.

    The first batch with more than one row shows which layers gates suit. Two backward passes, of Σ_i l_i and of
    Σ_i c_i l_i with powers of two c_i, must give products that differ by exactly c_i: so row i holds nothing of any
    other example. And the products' sum must be what the weights' gradients give: so no use of a weight was missed.
    """

    def __init__(self, model: nn.Module, axes: Sequence[LayerAxis], objective: Objective, per_row: int):
        self.model, self.axes, self.objective, self.per_row = uncompiled(model), axes, objective, per_row
        self.layers = _layers(model, axes)
        self.by_weights: set[str] = set()
        self.copied: set[str] = set()
        self.checked = False
        self.one_row = False

    def __call__(self, batch: Any, number: int) -> dict[LayerAxis, Tensor]:
        gated = [axis for axis in self.axes if not self.one_row and axis.layer not in self.by_weights]
        plain = [axis for axis in self.axes if axis not in set(gated)]
        gates = Gates(self.layers, gated, self.copied, explore=not self.checked)
        wanted = _parameters(self.layers, plain if self.checked else self.axes)
        model = self.model
        with evaluating(model), keeping_statistics(model), differentiable(model, wanted), gates.attached():
            with gated_functions(gates, model), _eagerly():
                losses = checked_losses(model, batch, self.objective, number)
            return self._products(gates, gated, in_rows(losses, self.per_row, number))

    def _products(self, gates: Gates, gated: Sequence[LayerAxis], losses: Tensor) -> dict[LayerAxis, Tensor]:
        """Return the products of a batch whose losses have the shape (rows, examples a row)."""
        self.one_row = len(losses) == 1
        if self.one_row and not self.checked:
            return self._weight_rows(losses, self.axes)
        sums: dict[LayerAxis, Tensor] = {}
        if gated:
            again = not self.checked or len(gated) < len(self.axes)
            sums, gradients = gates.read(losses.flatten(), 1.0, retain=again)
            if not self.checked:
                self._check(gates, losses.flatten(), sums, gated, gradients)
                gated = [axis for axis in gated if axis.layer not in self.by_weights]
        for axis in gated:
            if axis not in sums:
                raise ValueError(gates.missing(axis.layer))
        products = {axis: sums[axis].unflatten(0, losses.shape).mean(1) for axis in gated}
        if plain := [axis for axis in self.axes if axis not in products]:
            products |= self._weight_rows(losses, plain)
        return {axis: products[axis] for axis in self.axes}

    def _weight_rows(self, losses: Tensor, axes: Sequence[LayerAxis]) -> dict[LayerAxis, Tensor]:
        """One backward pass a row: exact for whatever the examples share."""
        parameters = _parameters(self.layers, axes)
        rows = []
        for loss in losses.mean(1):
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            rows.append(_row(self.layers, axes, dict(zip(map(id, parameters), gradients, strict=True))))
        return {axis: torch.cat([row[axis] for row in rows]) for axis in axes}

    def _check(
        self,
        gates: Gates,
        losses: Tensor,
        sums: Mapping[LayerAxis, Tensor],
        gated: Sequence[LayerAxis],
        gradients: Mapping[int, Tensor | None],
    ) -> None:
        """Find the layers whose gates are not exact: their rows will come from weight gradients."""
        expected, terms = _row(self.layers, gated, gradients), _row(self.layers, gated, gradients, absolute=True)
        largest = max(term.max() for term in terms.values())
        powers = _powers_of_two(len(losses)).to(losses)
        scaled, _ = gates.read(losses, powers, retain=True)
        for axis, weights in expected.items():
            known = axis in sums and axis in scaled
            rows = (sums[axis], scaled[axis] / powers[:, None]) if known else ()
            if not known or not _agree(*rows, weights[0], 100 * terms[axis].max() + largest, gates.coarse):
                self.by_weights.add(axis.layer)
        self.checked = True
        if self.by_weights:
            logger.warning("one backward pass a row, exact but slow, for: %s", ", ".join(sorted(self.by_weights)))


def _powers_of_two(count: int) -> Tensor:
    """Return factors that differ between neighbours; a power of two scales without rounding."""
    golden = (5**0.5 - 1) / 2
    return torch.tensor([2.0 ** (int(8 * (i * golden % 1)) - 3) for i in range(count)])


def _agree(sums: Tensor, unscaled: Tensor, expected: Tensor, terms: Tensor, coarse: bool) -> bool:
    """Say whether rows, shape (examples, channels), hold their own example's products alone and nothing is missing.

    ``terms``: the size of the numbers that add up to ``expected`` and of those of the whole model; of both, rounding
    errors are left where the sum vanishes, as in a layer that no longer sees anything.
    """
    if sums.shape[1:] != expected.shape:
        return False
    own, whole = (1e-2, 5e-2) if coarse else (1e-10, 1e-8) if sums.dtype == torch.float64 else (1e-4, 2e-3)
    size = sums.abs().sum(0).max() + expected.abs().max()
    rounding = torch.finfo(sums.dtype).eps * terms
    alone = (unscaled - sums).abs().max() <= own * sums.abs().max()
    return bool(alone & ((sums.sum(0) - expected).abs().max() <= whole * size + rounding))


def _layers(model: nn.Module, axes: Iterable[LayerAxis]) -> dict[str, nn.Module]:
    model = uncompiled(model)
    return {axis.layer: get_layer(model, axis.layer) for axis in axes}


def _parameters(layers: Mapping[str, nn.Module], axes: Iterable[LayerAxis]) -> list[nn.Parameter]:
    """Return the parameters of the axes' layers, each once."""
    return list({id(p): p for axis in axes for p in own_parameters(layers[axis.layer]).values()}.values())


def in_rows(losses: Tensor, per_row: int | None, number: int) -> Tensor:
    """Arrange the losses of a batch in rows, shape (rows, examples of a row); None makes the batch one row."""
    if per_row is None:
        return losses.reshape(1, -1)
    if losses.dim() == 0:
        raise ValueError(
            f"batch {number}: the objective returned one scalar, which allows only rows='batch'; "
            "finer rows need one loss an example"
        )
    if len(losses) % per_row:
        raise ValueError(f"batch {number}: rows={per_row} does not divide its {len(losses)} examples")
    return losses.unflatten(0, (-1, per_row))


def _row(
    layers: Mapping[str, nn.Module],
    axes: Sequence[LayerAxis],
    gradients: Mapping[int, Tensor | None],
    *,
    absolute: bool = False,
) -> dict[LayerAxis, Tensor]:
    """Turn the gradients of one loss into J·w of each axis, shape (1, channels); or into Σ |J_i w_i|."""
    wanted: dict[str, list[str]] = {}
    for axis in axes:
        wanted.setdefault(axis.layer, []).append(axis.axis)
    row = {}
    for name, keys in wanted.items():
        layer = layers[name]
        products = {key: _product(p, gradients.get(id(p)), name) for key, p in own_parameters(layer).items()}
        if absolute:
            products = {key: product.abs() for key, product in products.items()}
        for key in keys:
            axis = LayerAxis(name, key)
            sums = [channel_sum(products[s.tensor], s) for s in parameter_slots(layer, find_axis(layer, axis))]
            row[axis] = sum(sums[1:], sums[0])[None]
    return row


def _product(parameter: Tensor, gradient: Tensor | None, name: str) -> Tensor:
    if gradient is None:
        raise ValueError(
            f"layer {name!r} never ran, or the loss does not depend on it: score without it (layers=, ignore=)"
        )
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.detach().to(dtype) * gradient.to_dense().to(dtype)


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that torch.compile wrapped, whose names have no prefix; any other model is returned itself."""
    dynamo = _compiler()
    return model._orig_mod if dynamo is not None and isinstance(model, dynamo.OptimizedModule) else model


def _eagerly() -> AbstractContextManager:
    """Let compiled parts of a model run eagerly: gates are hooks inside them."""
    return nullcontext() if _compiler() is None else torch.compiler.set_stance("force_eager")


def _compiler() -> Any:
    # Importing it takes seconds, and what is compiled has imported it.
    return sys.modules.get("torch._dynamo")


def parameter_slots(layer: nn.Module, axis: Any) -> list:
    """Return the slots of an axis that lie in parameters (running statistics are buffers and have no gradient)."""
    parameters = own_parameters(layer)
    return [slot for slot in axis.slots if slot.tensor in parameters]
