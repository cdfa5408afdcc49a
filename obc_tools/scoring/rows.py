"""Rows of J from batches: from what a capture takes in one backward pass a batch, or from weights' gradients.

`ProductRows` and `GradientRows` are called with one batch after another. Each call borrows the model's mode, flags and
hooks and gives them back before it returns.
"""

from __future__ import annotations

import logging
import sys
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..state import differentiable, evaluating, keeping_statistics, numbered
from ..structure.groups import Member
from ..structure.layers import (
    LayerAxis,
    UnknownLayerError,
    channel_sum,
    find_axis,
    get_layer,
    layer_axes,
    own_parameters,
    scored_layers,
)
from .capture import Capture, Consume, never_ran
from .objectives import Objective, checked_losses, classification

logger = logging.getLogger(__name__)

GOLDEN = (5**0.5 - 1) / 2
"""Its multiples spread evenly between whole numbers."""

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


Gradients = Mapping[int, Tensor | None]
"""The gradients of parameters, by id."""


class _Rows(ABC):
    """Rows of `per_row` examples (None: a batch), from a capture where that is exact, else by one backward pass a row.

    The first batch with more than one row shows which layers the capture suits. Two backward passes, of Σ_i l_i and of
    Σ_i c_i l_i with powers of two c_i, must take what differs by exactly c_i: so row i holds nothing of any other
    example. And the sum over the rows must be what the weights' gradients give, and the graph must use no weight more
    often than was seen: so no use of a weight was missed.
    """

    def __init__(self, model: nn.Module, keys: Sequence[LayerAxis], objective: Objective, per_row: int | None):
        # A batch's row needs no hook inside the model, which may stay compiled.
        self.model = model if per_row is None else uncompiled(model)
        self.keys, self.objective, self.per_row = keys, objective, per_row
        self.layers = {key.layer: get_layer(uncompiled(model), key.layer) for key in keys}
        self.by_weights: set[str] = set()
        self.copied: set[str] = set()
        self.checked = False
        self.one_row = per_row is None

    def __call__(self, batch: Any, number: int) -> Any:
        fast, slow = ((), self.keys) if self.one_row else self._apart()
        model, capture = self.model, self._capture(fast)
        wanted = self._parameters(slow if self.checked else self.keys)
        with evaluating(model), keeping_statistics(model), differentiable(model, wanted), closing(capture):
            with capture.watching(model), _eagerly() if fast else nullcontext():
                losses = checked_losses(model, batch, self.objective, number)
            losses = in_rows(losses, self.per_row, number)
            self.one_row = len(losses) == 1
            if self.one_row and not self.checked:
                fast, slow = (), self.keys
            return self._read(capture, losses, fast, slow)

    def _apart(self) -> tuple[list[LayerAxis], list[LayerAxis]]:
        """Return the keys that are captured, and those that go one backward pass a row."""
        fast = [key for key in self.keys if key.layer not in self.by_weights]
        return fast, [key for key in self.keys if key.layer in self.by_weights]

    @abstractmethod
    def _capture(self, keys: Sequence[LayerAxis]) -> Capture: ...

    @abstractmethod
    def _read(self, capture: Capture, losses: Tensor, fast: Sequence[LayerAxis], slow: Sequence[LayerAxis]) -> Any:
        """Return what a batch gives, by `_check` the first time that there is something to capture."""

    @abstractmethod
    def _measure(self, capture: Capture, losses: Tensor, scale: Tensor | float) -> tuple[Mapping, Gradients]:
        """Return what is proven, key -> (rows or examples, numbers), and the weights' gradients; keeps the graph."""

    @abstractmethod
    def _expect(self, keys: Iterable[LayerAxis], gradients: Gradients, absolute: bool = False) -> Mapping:
        """Return what the rows must add up to by the weights' gradients, key -> (1, numbers); or Σ of absolute terms."""

    @abstractmethod
    def _sees_all(self, capture: Capture, key: LayerAxis) -> bool:
        """Say whether no more uses of the parameters of a key are in the graph than were captured."""

    def _check(self, capture: Capture, losses: Tensor, keys: Sequence[LayerAxis]) -> Mapping[LayerAxis, Tensor]:
        """Find the layers that the capture does not suit: their rows come from weight gradients. Return the measures."""
        found, gradients = self._measure(capture, losses, 1.0)
        expected, terms = self._expect(keys, gradients), self._expect(keys, gradients, absolute=True)
        largest = max(term.max() for term in terms.values())
        scaled, _ = self._measure(capture, losses, _powers_of_two(losses.shape).to(losses))
        for key, whole in expected.items():
            seen = key in found and key in scaled and self._sees_all(capture, key)
            rounding = 100 * terms[key].max() + largest
            if not seen or not _agree(found[key], scaled[key], whole[0], rounding, capture.coarse):
                self.by_weights.add(key.layer)
        self.checked = True
        if self.by_weights:
            logger.warning("one backward pass a row, exact but slow, for: %s", ", ".join(sorted(self.by_weights)))
        return found

    def _parameters(self, keys: Iterable[LayerAxis]) -> list[nn.Parameter]:
        """Return the parameters of the keys' layers, each once."""
        return list({id(p): p for key in keys for p in own_parameters(self.layers[key.layer]).values()}.values())

    def _weight_gradients(self, losses: Tensor, keys: Iterable[LayerAxis]) -> Iterable[Gradients]:
        """Yield the weights' gradients of one row after another: exact for whatever the examples share."""
        parameters = self._parameters(keys)
        for row, loss in enumerate(losses.mean(1), start=1):
            gradients = torch.autograd.grad(loss, parameters, retain_graph=row < len(losses), allow_unused=True)
            yield dict(zip(map(id, parameters), gradients, strict=True))


class ProductRows(_Rows):
    """J·w of layer axes, row by row: a batch -> LayerAxis -> (rows, channels)."""

    def __init__(self, model: nn.Module, axes: Sequence[LayerAxis], objective: Objective, per_row: int | None):
        super().__init__(model, axes, objective, per_row)
        tied = {} if per_row is None else tied_axes(uncompiled(model))
        self.alike = {axis: tied.get(places(self.layers[axis.layer], axis), {}) | {axis: None} for axis in axes}
        self.uses = self.layers | {
            axis.layer: get_layer(uncompiled(model), axis.layer) for alike in self.alike.values() for axis in alike
        }

    def _capture(self, keys: Sequence[LayerAxis]) -> Capture:
        axes = list(dict.fromkeys(axis for key in keys for axis in self.alike[key]))
        return Capture(self.uses, axes, copied=self.copied, explore=not self.checked)

    def _read(
        self, capture: Capture, losses: Tensor, fast: Sequence[LayerAxis], slow: Sequence[LayerAxis]
    ) -> dict[LayerAxis, Tensor]:
        if fast and not self.checked:
            sums = self._check(capture, losses, fast)
            fast, slow = self._apart()
        else:
            sums = self._joined(capture.read(losses, 1.0, retain=bool(slow))[0]) if fast else {}
        found = {}
        for axis in fast:
            if axis not in sums:
                raise ValueError(capture.missing(axis.layer))
            found[axis] = sums[axis].unflatten(0, losses.shape).mean(1)
        if slow:
            rows = [self._expect(slow, gradients) for gradients in self._weight_gradients(losses, slow)]
            found |= {axis: torch.cat([row[axis] for row in rows]) for axis in slow}
        return {axis: found[axis] for axis in self.keys}

    def _measure(self, capture: Capture, losses: Tensor, scale: Tensor | float) -> tuple[Mapping, Gradients]:
        sums, gradients = capture.read(losses, scale, retain=True)
        factors = 1 / scale.reshape(-1, 1) if isinstance(scale, Tensor) else 1
        return {axis: value * factors for axis, value in self._joined(sums).items()}, gradients

    def _joined(self, sums: Mapping[LayerAxis, Tensor]) -> dict[LayerAxis, Tensor]:
        """Add up the sums of all uses of the same parameters, under whatever names."""
        uses = {axis: [sums[other] for other in alike if other in sums] for axis, alike in self.alike.items()}
        return {axis: sum(parts[1:], parts[0]) for axis, parts in uses.items() if parts}

    def _expect(
        self, keys: Iterable[LayerAxis], gradients: Gradients, absolute: bool = False
    ) -> dict[LayerAxis, Tensor]:
        wanted: dict[str, list[LayerAxis]] = defaultdict(list)
        for axis in keys:
            wanted[axis.layer].append(axis)
        row = {}
        for name, axes in wanted.items():
            layer = self.layers[name]
            products = {key: _product(p, gradients.get(id(p)), name) for key, p in own_parameters(layer).items()}
            if absolute:
                products = {key: product.abs() for key, product in products.items()}
            for axis in axes:
                slots = parameter_slots(layer, find_axis(layer, axis))
                row[axis] = sum(channel_sum(products[slot.tensor], slot) for slot in slots)[None]
        return row

    def _sees_all(self, capture: Capture, key: LayerAxis) -> bool:
        uses = sum(capture.uses[axis] for axis in self.alike[key])
        return all(capture.edges.get(place[0], 0) <= uses for place in places(self.layers[key.layer], key))


class GradientRows(_Rows):
    """The gradients of layers' parameters, row by row: of each batch handed to `consume`, some rows of a layer a time.

    Rows of one layer come in their order, layers in that of the backward pass. Of layers that share parameters each
    has the sum over all uses.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str], objective: Objective, per_row: int | None, consume: Consume
    ):
        plain = uncompiled(model)
        keys = [LayerAxis(name, key) for name in layers for key in own_parameters(get_layer(plain, name))]
        super().__init__(model, keys, objective, per_row)
        self.consume = consume
        self.families = [] if per_row is None else families(plain, self.layers)

    def _capture(self, keys: Sequence[LayerAxis]) -> Capture:
        wanted = {key.layer for key in keys}
        return Capture({}, families=[family for family in self.families if wanted & family.keys()])

    def _read(self, capture: Capture, losses: Tensor, fast: Sequence[LayerAxis], slow: Sequence[LayerAxis]) -> None:
        if fast and not self.checked:
            self._check(capture, losses, fast)
            fast, slow = self._apart()
        left = dict.fromkeys(key.layer for key in fast)

        def consume(name: str, gradients: dict[str, Tensor]) -> None:
            if name in layers:
                left.pop(name, None)
                self.consume(name, {key: gradient / losses.shape[1] for key, gradient in gradients.items()})

        if layers := set(left):
            capture.read(losses, 1.0, retain=bool(slow), consume=consume)
        for name in left:
            raise ValueError(capture.missing(name))
        for gradients in self._weight_gradients(losses, slow) if slow else ():
            for name in dict.fromkeys(key.layer for key in slow):
                own = own_parameters(self.layers[name])
                self.consume(name, {key: _present(gradients[id(p)], name)[None] for key, p in own.items()})

    def _measure(self, capture: Capture, losses: Tensor, scale: Tensor | float) -> tuple[Mapping, Gradients]:
        found: dict[LayerAxis, list[Tensor]] = defaultdict(list)

        def project(name: str, gradients: dict[str, Tensor]) -> None:
            for key, rows in gradients.items():
                found[LayerAxis(name, key)].append(rows.flatten(1) @ _direction(rows[0]))

        _, gradients = capture.read(losses, scale, retain=True, consume=project)
        factors = 1 / scale[:, :1] if isinstance(scale, Tensor) else 1
        return {key: torch.cat(parts) * factors for key, parts in found.items()}, gradients

    def _expect(
        self, keys: Iterable[LayerAxis], gradients: Gradients, absolute: bool = False
    ) -> dict[LayerAxis, Tensor]:
        expected = {}
        for key in keys:
            gradient = _present(gradients.get(id(own_parameters(self.layers[key.layer])[key.axis])), key.layer)
            terms = gradient.flatten()[:, None] * _direction(gradient)
            expected[key] = (terms.abs() if absolute else terms).sum(0)[None]
        return expected

    def _sees_all(self, capture: Capture, key: LayerAxis) -> bool:
        place = id(own_parameters(self.layers[key.layer])[key.axis])
        return capture.edges.get(place, 0) <= capture.families[key.layer].uses_of(place)


def _direction(gradient: Tensor) -> Tensor:
    """Return a direction without structure, the same for all gradients of one size, along which these are compared."""
    numbers = torch.arange(gradient.numel(), dtype=torch.float64, device=gradient.device)
    return ((numbers * GOLDEN) % 1 - 0.5).to(gradient.dtype)[:, None]


def _powers_of_two(shape: Sequence[int]) -> Tensor:
    """Return factors that differ between neighbouring rows; a power of two scales without rounding."""
    return torch.tensor([2.0 ** (int(8 * (i * GOLDEN % 1)) - 3) for i in range(shape[0])])[:, None].expand(*shape)


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


def stream_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Sequence[str],
    consume: Consume,
    *,
    rows: Rows = "batch",
    objective: Objective = classification,
) -> Iterator[int]:
    """Hand the gradient of each row's loss with respect to the parameters of layers to `consume`; yield batch numbers.

    `consume` is called with a layer's name and its parameters' gradients of some rows, name -> (rows, *shape), while a
    batch is worked on: rows in their order, layers in any. The model runs in eval mode and is itself again whenever a
    batch is done. Nothing is kept.

    Raises:
        ValueError: no batches, an unknown layer, a layer that never ran, a loss that is not finite, rows that do not
            divide a batch, or rows finer than a batch of an objective that returns a scalar.
    """
    read = GradientRows(model, list(dict.fromkeys(layers)), objective, examples_per_row(rows), consume)
    for number, batch in numbered(batches):
        read(batch, number)
        yield number


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


def _product(parameter: Tensor, gradient: Tensor | None, name: str) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.detach().to(dtype) * _present(gradient, name).to(dtype)


def _present(gradient: Tensor | None, name: str) -> Tensor:
    if gradient is None:
        raise ValueError(never_ran(name))
    return gradient.to_dense()


def places(layer: nn.Module | nn.Parameter, axis: LayerAxis) -> frozenset[Hashable]:
    """Return where the channels of an axis lie in parameters: two axes with equal places are tied."""
    own, slots = own_parameters(layer), parameter_slots(layer, find_axis(layer, axis))
    return frozenset((id(own[s.tensor]), s.dim, s.parts, s.groups) for s in slots)


def _owners(model: nn.Module) -> dict[int, list[tuple[str, nn.Module | nn.Parameter]]]:
    """Return the layers that own each parameter of a model, by its id; more than one where it is tied."""
    found: dict[int, list[tuple[str, nn.Module | nn.Parameter]]] = defaultdict(list)
    known = {name for name, _ in scored_layers(model)}
    for name, module in model.named_modules():
        for key, parameter in own_parameters(module).items():
            bare = (f"{name}.{key}".lstrip("."), parameter)
            found[id(parameter)].append((name, module) if name in known else bare)
    return found


def distinct_members(model: nn.Module, members: Iterable[Member]) -> list[Member]:
    """Return the members of a group, tied ones once; what else a tied layer has, such as a bias, stays a member."""
    seen: set[Hashable] = set()
    found = []
    for member in members:
        layer, axis = get_layer(model, member.axis.layer), member.axis
        where = (member.positions, member.channels)
        new = {place for place in places(layer, axis) if (place, where) not in seen}
        tied = len(new) < len(places(layer, axis))
        for part in (f"{axis.axis}_w", f"{axis.axis}_b") if tied and new else ():
            if places(layer, LayerAxis(axis.layer, part)) == new:
                axis = LayerAxis(axis.layer, part)
        if new or not tied:
            found.append(replace(member, axis=axis))
        seen |= {(place, where) for place in new}
    return found


def tied_axes(model: nn.Module) -> dict[frozenset[Hashable], dict[LayerAxis, None]]:
    """Return the axes that lie in parameters with more than one owner, by their `places`."""
    tied: dict[frozenset[Hashable], dict[LayerAxis, None]] = defaultdict(dict)
    for name, layer in (owner for owners in _owners(model).values() if len(owners) > 1 for owner in owners):
        with suppress(UnknownLayerError):
            for key in layer_axes(layer, name):
                tied[places(layer, LayerAxis(name, key))][LayerAxis(name, key)] = None
    tied.pop(frozenset(), None)
    return tied


def families(model: nn.Module, layers: Mapping[str, nn.Module | nn.Parameter]) -> list[dict[str, Any]]:
    """Return the layers, those that share parameters with each other, asked for or not, together: name -> layer."""
    owners = _owners(model)
    found: list[dict[str, Any]] = []
    for name, layer in layers.items():
        together = {name: layer}
        for parameter in own_parameters(layer).values():
            together |= dict(owners[id(parameter)]) if len(owners[id(parameter)]) > 1 else {}
        joined = [family for family in found if family.keys() & together.keys()]
        found = [family for family in found if family not in joined] + [together.copy()]
        for family in joined:
            found[-1] |= family
    return found


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
