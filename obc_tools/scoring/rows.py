"""Rows of J from batches: from what a capture takes in one backward pass a batch, or from weights' gradients.

`ProductRows` and `GradientRows` are called with one batch after another. Each call borrows the model's mode, flags and
hooks and gives them back before it returns.
"""

from __future__ import annotations

import logging
import sys
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from ..errors import check_whole
from ..state import (
    LentRandomness,
    Restoring,
    differentiable,
    evaluating,
    flushing_denormals,
    keeping_statistics,
    numbered,
    passing,
    shared,
    stand_in,
    within,
)
from ..structure.groups import Member
from ..structure.layers import (
    LayerAxis,
    UnknownLayerError,
    channel_sum,
    find_axis,
    folded,
    get_layer,
    kernel_dims,
    layer_axes,
    own_parameters,
    scored_layers,
)
from .capture import NONE, Capture, Consume, never_ran
from .objectives import Objective, checked_losses, classification

logger = logging.getLogger(__name__)

LONG = 0.25
"""Seconds of a batch, the processor's, from which on the order of its channels in memory is chosen by measuring."""

GOLDEN = (5**0.5 - 1) / 2
"""Its multiples spread evenly between whole numbers."""

Rows = str | int | tuple[str, int]
"""One row of J a batch ("batch"), an example ("sample"), or k consecutive examples (a positive whole number).

For scores also "expected": of rows a batch, averaged over all ways to draw the batches from the examples seen; or
("expected", m), of rows of m examples (see `scores.SquareSums`).
"""
EXPECTED = "expected"


def check_rows(rows: Any) -> Rows:
    """Return what `score_groups` takes as rows, as it came or from JSON; raise ValueError for anything else."""
    if isinstance(rows, list | tuple) and len(rows) == 2 and rows[0] == EXPECTED:
        check_whole("rows='expected', m", rows[1], 1, " example in a row")
        return EXPECTED, rows[1]
    if rows != EXPECTED:
        examples_per_row(rows)
    return rows


def averages(rows: Rows) -> bool:
    """Say whether squares are averaged over ways to draw the rows, which takes the examples' own products."""
    return rows == EXPECTED or (isinstance(rows, tuple) and rows[:1] == (EXPECTED,))


def streamed(rows: Rows) -> Rows:
    """Return the rows of J that such scores come from."""
    return "sample" if averages(rows) else rows


def examples_per_row(rows: Rows) -> int | None:
    """Return how many examples make a row, None for a whole batch; raise ValueError for anything but rows of J."""
    if rows == "batch":
        return None
    if averages(rows):
        raise ValueError(f"rows={rows!r} is an average over many choices of rows: it goes with scores alone")
    if rows == "sample":
        return 1
    if isinstance(rows, int) and not isinstance(rows, bool) and rows > 0:
        return rows
    raise ValueError(
        f"rows={rows!r}: expected 'batch', 'sample' or how many consecutive examples make a row (1, 2, ...); scores "
        "take 'expected' and ('expected', m) too"
    )


Gradients = Mapping[int, Tensor | None]
"""The gradients of parameters, by id."""


@dataclass
class Proof:
    """What batches have shown of a model's layers, by name. It holds for what is pruned from the model too.

    ``proven``: the layers that were looked at; of these ``by_weights`` do not suit the capture, and ``absent`` did not
    run then. ``reached``: the layers that a loss has depended on so far. ``copied``: those whose output the model
    changes in place. ``folds``: the layers that do the work of a BatchNorm, each with its name; None: not tried yet.
    ``channels_last``: whether kernels of images are laid so; None: not tried yet.
    """

    proven: set[str] = field(default_factory=set)
    by_weights: set[str] = field(default_factory=set)
    absent: set[str] = field(default_factory=set)
    reached: set[str] = field(default_factory=set)
    copied: set[str] = field(default_factory=set)
    folds: Mapping[str, str] | None = None
    channels_last: bool | None = None


class _Rows(ABC):
    """Rows of `per_row` examples (None: a batch), from a capture where that is exact, else by one backward pass a row.

    The first batch shows which layers the capture suits. The sum over the rows must be what the weights' gradients
    give, and the graph must use no weight more often than was seen: so no use of a weight was missed. With more than
    one row two backward passes, of Σ_i l_i and of Σ_i c_i l_i with powers of two c_i, must give measures that differ by
    exactly c_i: so row i holds nothing of any other example. The measures are J·v of each axis: what is asked, or a
    likeness of it.
    """

    whole = False
    """Whether a batch's one row comes from the capture too; else no hook is in the model, which may stay compiled."""

    def __init__(
        self,
        model: nn.Module,
        axes: Sequence[LayerAxis],
        objective: Objective,
        per_row: int | None,
        proof: Proof | None = None,
        set_aside: bool = False,
    ):
        self.by_hooks = per_row is not None or (self.whole and uncompiled(model) is model)
        self.model = uncompiled(model) if self.by_hooks else model
        self.axes, self.objective, self.per_row = axes, objective, per_row
        self.layers = {axis.layer: get_layer(uncompiled(model), axis.layer) for axis in axes}
        self.families = families(uncompiled(model), self.layers) if self.by_hooks else {}
        self.proof = Proof() if proof is None else proof
        # Layers that a batch's loss does not depend on have rows of zeros; else they raise.
        self.set_aside = set_aside

    @property
    def checked(self) -> bool:
        return self.proof.proven.issuperset(self.layers)

    def __call__(self, batch: Any, number: int) -> Any:
        fast, slow = self._apart() if self.by_hooks else ((), self.axes)
        model, capture = self.model, self._capture(fast)
        wanted = self._parameters(slow if self.checked else self.axes)
        with self._borrowed(model, wanted), closing(capture):
            with capture.watching(model), _eagerly() if fast else nullcontext():
                losses = in_rows(checked_losses(model, batch, self.objective, number), self.per_row, number)
            if self.per_row is None:
                losses = losses.mean(1, keepdim=True)
            elif len(losses) == 1 and not self.checked:
                return self._read(capture, losses, (), self.axes)
            if self.checked or not fast:
                return self._read(capture, losses, fast, slow)
            measures = self._check(capture, losses)
            return self._read(capture, losses, *self._apart(), measures)

    def _borrowed(self, model: nn.Module, wanted: Sequence[nn.Parameter]) -> Restoring:
        return within(evaluating(model), keeping_statistics(model), differentiable(model, wanted))

    def _apart(self) -> tuple[list[LayerAxis], list[LayerAxis]]:
        """Return the axes that are captured, and those that go one backward pass a row."""
        fast = [axis for axis in self.axes if axis.layer not in self.proof.by_weights]
        return fast, [axis for axis in self.axes if axis.layer in self.proof.by_weights]

    @abstractmethod
    def _capture(self, axes: Sequence[LayerAxis]) -> Capture: ...

    @abstractmethod
    def _read(self, capture: Capture, losses: Tensor, fast: Sequence, slow: Sequence, measures: Mapping = NONE) -> Any:
        """Return what a batch gives, which `measures` may be already."""

    @abstractmethod
    def _measure(
        self, capture: Capture, losses: Tensor, factors: Tensor, retain: bool = True
    ) -> tuple[dict[LayerAxis, Tensor], Gradients]:
        """Backpropagate the losses of each row times its factor.

        Returns:
            J·v, LayerAxis -> (rows or examples, channels), freed of the factors again, and the weights' gradients.
        """

    @abstractmethod
    def _direction(self, parameter: Tensor) -> Tensor:
        """Return v of a parameter, at least in float32."""

    def _check(self, capture: Capture, losses: Tensor) -> dict[LayerAxis, Tensor]:
        """Find the layers that the capture does not suit, whose rows come from weight gradients. Return measures."""
        measures, gradients = self._measure(capture, losses, losses.new_ones(len(losses)))
        expected, terms = self._products(self.axes, gradients), self._products(self.axes, gradients, absolute=True)
        largest = max(term.max() for term in terms.values())
        # Powers of two, which scale without rounding, and differ between neighbours.
        factors = losses.new_tensor([2.0 ** (int(8 * (i * GOLDEN % 1)) - 3) for i in range(len(losses))])
        unscaled = measures if len(losses) == 1 else self._measure(capture, losses, factors)[0]
        elsewhere = capture.used_elsewhere()
        for axis, whole in expected.items():
            seen_before = axis.layer in self.proof.proven
            if self.set_aside and axis not in measures and (seen_before or axis.layer not in self.proof.reached):
                self.proof.absent |= set() if seen_before else {axis.layer}
                continue
            known = axis in measures and axis in unscaled and self._fits(capture, axis.layer)
            seen = known and elsewhere.isdisjoint(map(id, self._parameters([axis])))
            rounding = 100 * terms[axis].max() + largest
            if not seen or not _agree(measures[axis], unscaled[axis], whole[0], rounding, capture.coarse):
                self.proof.by_weights.add(axis.layer)
        self.proof.proven |= self.layers.keys()
        if self.proof.by_weights and len(losses) > 1:
            slow = ", ".join(sorted(self.proof.by_weights))
            logger.warning("one backward pass a row, exact but slow, for: %s", slow)
        return measures

    def _fits(self, capture: Capture, layer: str) -> bool:
        """Say whether the examples lead in all uses of a layer's parameters that were captured."""
        return capture.unfit.isdisjoint(self.families[layer])

    def _parameters(self, axes: Iterable[LayerAxis]) -> list[nn.Parameter]:
        """Return the parameters of the axes' layers, each once."""
        return list({id(p): p for axis in axes for p in own_parameters(self.layers[axis.layer]).values()}.values())

    def _weight_gradients(self, losses: Tensor, axes: Sequence[LayerAxis]) -> Iterator[Gradients]:
        """Yield the weights' gradients of one row after another: exact for whatever the examples share."""
        parameters = self._parameters(axes)
        for row, loss in enumerate(losses.mean(1) if axes else (), start=1):
            gradients = torch.autograd.grad(loss, parameters, retain_graph=row < len(losses), allow_unused=True)
            yield dict(zip(map(id, parameters), gradients, strict=True))

    def _products(
        self, axes: Iterable[LayerAxis], gradients: Gradients, *, absolute: bool = False
    ) -> dict[LayerAxis, Tensor]:
        """Turn the gradients of one loss into J·v of each axis, shape (1, channels); or into Σ |J_i v_i|."""
        wanted: dict[str, list[LayerAxis]] = defaultdict(list)
        for axis in axes:
            wanted[axis.layer].append(axis)
        found = {}
        for name, own in wanted.items():
            layer = self.layers[name]
            given = {key: (p, gradients.get(id(p))) for key, p in own_parameters(layer).items()}
            products = {key: self._product(*pair, name) for key, pair in given.items()}
            if any(gradient is not None for _, gradient in given.values()):
                self.proof.reached.add(name)
            if absolute:
                products = {key: product.abs() for key, product in products.items()}
            found |= {axis: channel_products(layer, axis, products)[None] for axis in own}
        return found

    def _product(self, parameter: Tensor, gradient: Tensor | None, name: str) -> Tensor:
        direction = self._direction(parameter)
        if gradient is None and self.set_aside:
            return torch.zeros_like(direction)
        return direction * _present(gradient, name).to(direction.dtype)


class ProductRows(_Rows):
    """J·w of layer axes, row by row: a batch -> LayerAxis -> (rows, channels)."""

    whole = True

    def __init__(self, model: nn.Module, axes: Sequence[LayerAxis], *given: Any, **options: Any):
        super().__init__(model, axes, *given, **options)
        self.uses = {axis: tied_axes(axis, self.families[axis.layer]) for axis in axes if self.families}
        self.trying = False
        self.kept: tuple[Any, dict] = (None, {})

    def __call__(self, batch: Any, number: int) -> dict[LayerAxis, Tensor]:
        before, start = torch.get_rng_state(), _seconds()
        if not (self.by_hooks and self.checked and self.proof.folds is None):
            found = super().__call__(batch, number)
            late = self.proof.absent & self.proof.reached
            if late:
                # What runs for the first time is not proven: look again, at the layers themselves.
                self.proof.absent -= late
                self.proof.proven -= late
                self.proof.folds = None
                return super().__call__(batch, number)
            if self.by_hooks and self.proof.folds is not None and self.proof.channels_last is None:
                self._try_channels_last(found, batch, number, before, _seconds_since(start, found))
            return found
        self.foldable = {}
        plain = super().__call__(batch, number)
        if self.proof.absent & self.proof.reached:
            self.proof.folds = NONE
            return self(batch, number)
        self.proof.folds = self.foldable
        if self.foldable:
            self._try_folds(plain, batch, number, before)
        return plain

    def _try_folds(self, plain: Mapping[LayerAxis, Tensor], batch: Any, number: int, random: Tensor) -> None:
        """Score a batch again with folded norms; keep to the folds if it gives the same."""
        self.trying = True
        try:
            other = _differing(plain, self._again(batch, number, random))
        except BaseException:
            self.proof.folds = {}
            raise
        finally:
            self.trying = False
        if other is not None:
            logger.info("batch norms are scored unfolded: %s differs", other)
            self.proof.folds = {}

    def _try_channels_last(
        self, plain: Mapping[LayerAxis, Tensor], batch: Any, number: int, random: Tensor, seconds: float
    ) -> None:
        """Score a batch that took long again with channels last; keep to it if that is faster and gives the same."""
        self.proof.channels_last = False
        if seconds < LONG or torch.are_deterministic_algorithms_enabled() or not self._kernels():
            return
        start, faster = _seconds(), False
        self.proof.channels_last = True
        try:
            again = self._again(batch, number, random)
            took = _seconds_since(start, again)
            faster = took < seconds and _differing(plain, again) is None
            logger.info("a batch takes %.2f s with channels last, %.2f s without: %s", took, seconds, faster)
        except Exception as error:  # such as a view that is possible in one order alone
            logger.info("channels are not laid last: %s", error)
        finally:
            self.proof.channels_last = faster

    def _again(self, batch: Any, number: int, random: Tensor) -> dict[LayerAxis, Tensor]:
        with LentRandomness(random):
            return super().__call__(batch, number)

    def _borrowed(self, model: nn.Module, wanted: Sequence[nn.Parameter]) -> Restoring:
        parts = [super()._borrowed(model, wanted), *([flushing_denormals()] if self.by_hooks else [])]
        parts += [passing(self.layers[norm]) for norm in (self.proof.folds or {}).values()]
        return within(*parts, *(stand_in(*pair) for pair in self._instead().items()))

    def _instead(self) -> dict[nn.Module, dict[str, Tensor]]:
        """Return what layers use in place of their parameters, folded or with channels last; one such set is kept."""
        folds, last = self.proof.folds or {}, bool(self.proof.channels_last) and self.checked
        key = (last, tuple(folds.items()))
        if self.kept[0] != key:
            found = {self.layers[layer]: folded(self.layers[layer], self.layers[norm]) for layer, norm in folds.items()}
            for layer in self._kernels() if last else ():
                weight = found.get(layer, layer._parameters)["weight"].detach()
                found.setdefault(layer, {})["weight"] = weight.contiguous(memory_format=torch.channels_last)
            self.kept = key, found
        return self.kept[1]

    def _kernels(self) -> list[nn.Module]:
        """Return the layers whose kernels are of images, but those whose kernel's gradient is asked for."""
        asked = set(map(id, self._parameters(self._apart()[1])))
        kernels = (
            (layer, layer._parameters.get("weight")) for layer in self.model.modules() if kernel_dims(layer) == 2
        )
        return [layer for layer, kernel in kernels if kernel is not None and id(kernel) not in asked]

    def _capture(self, axes: Sequence[LayerAxis]) -> Capture:
        uses = dict.fromkeys(use for axis in axes for use in self.uses[axis])
        layers = {use.layer: self.families[axis.layer][use.layer] for axis in axes for use in self.uses[axis]}
        explore, folds = self.trying or not self.checked, self.proof.folds or NONE
        return Capture(layers, uses, copied=self.proof.copied, explore=explore, folds=folds)

    def _read(
        self, capture: Capture, losses: Tensor, fast: Sequence, slow: Sequence, measures: Mapping = NONE
    ) -> dict[LayerAxis, Tensor]:
        if fast and not measures:
            measures, _ = self._measure(capture, losses, losses.new_ones(len(losses)), retain=bool(slow))
        for axis in fast:
            absent = axis not in measures and not self.set_aside
            if absent or not self._fits(capture, axis.layer):
                raise ValueError(capture.missing(axis.layer))
        self.proof.reached |= {axis.layer for axis in measures}
        found = {axis: measures[axis].unflatten(0, losses.shape).mean(1) for axis in fast if axis in measures}
        for axis in (axis for axis in fast if axis not in found):
            found[axis] = losses.new_zeros(len(losses), find_axis(self.layers[axis.layer], axis).width).detach()
        rows = [self._products(slow, gradients) for gradients in self._weight_gradients(losses, slow)]
        found |= {axis: torch.cat([row[axis] for row in rows]) for axis in slow}
        return {axis: found[axis] for axis in self.axes}

    def _measure(
        self, capture: Capture, losses: Tensor, factors: Tensor, retain: bool = True
    ) -> tuple[dict[LayerAxis, Tensor], Gradients]:
        sums, gradients = capture.read(losses * factors[:, None], retain)
        self.foldable = {} if capture.coarse else capture.foldable()
        examples = factors.repeat_interleave(losses.shape[1])[:, None]
        parts = {axis: [sums[use] for use in uses if use in sums] for axis, uses in self.uses.items()}
        return {axis: sum(found[1:], found[0]) / examples for axis, found in parts.items() if found}, gradients

    def _direction(self, parameter: Tensor) -> Tensor:
        return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))


class GradientRows(_Rows):
    """The gradients of layers' parameters, row by row: of each batch handed to `consume`, some rows of a layer a time.

    Rows of one layer come in their order, layers in that of the backward pass. Of layers that share parameters each
    has the sum over all uses.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        objective: Objective,
        per_row: int | None,
        consume: Consume,
        set_aside: bool = False,
    ):
        axes = [LayerAxis(name, "out") for name in layers]
        super().__init__(model, axes, objective, per_row, set_aside=set_aside)
        self.consume = consume

    def _capture(self, axes: Sequence[LayerAxis]) -> Capture:
        return Capture({}, families=[self.families[axis.layer] for axis in axes])

    def _read(self, capture: Capture, losses: Tensor, fast: Sequence, slow: Sequence, measures: Mapping = NONE) -> None:
        left = {axis.layer for axis in fast}

        def consume(name: str, gradients: dict[str, Tensor]) -> None:
            if name in asked:
                left.discard(name)
                self.consume(name, {key: gradient / losses.shape[1] for key, gradient in gradients.items()})

        if asked := set(left):
            capture.read(losses, bool(slow), consume)
        for name in asked:
            if (name in left and not self.set_aside) or not self._fits(capture, name):
                raise ValueError(capture.missing(name))
        for gradients in self._weight_gradients(losses, slow):
            for name, _ in slow:
                own = own_parameters(self.layers[name])
                if self.set_aside and all(gradients[id(p)] is None for p in own.values()):
                    continue
                self.consume(name, {key: _present(gradients[id(p)], name)[None] for key, p in own.items()})

    def _measure(
        self, capture: Capture, losses: Tensor, factors: Tensor, retain: bool = True
    ) -> tuple[dict[LayerAxis, Tensor], Gradients]:
        found: dict[LayerAxis, list[Tensor]] = defaultdict(list)

        def project(name: str, gradients: dict[str, Tensor]) -> None:
            if name in self.layers:
                layer, axis = self.layers[name], LayerAxis(name, "out")
                directions = {key: self._direction(p) for key, p in own_parameters(layer).items()}
                products = {key: rows * directions[key] for key, rows in gradients.items()}
                found[axis].append(vmap(partial(channel_products, layer, axis))(products))

        _, gradients = capture.read(losses * factors[:, None], retain, project)
        return {axis: torch.cat(parts) / factors[:, None] for axis, parts in found.items()}, gradients

    def _direction(self, parameter: Tensor) -> Tensor:
        # Not the weights: J·w of what is normalised vanishes whatever J is. Multiples of an irrational are everywhere.
        numbers = torch.arange(parameter.numel(), dtype=torch.float64, device=parameter.device)
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        return ((numbers * GOLDEN) % 1 - 0.5).to(dtype).view(parameter.shape)


def _differing(rows: Mapping[LayerAxis, Tensor], others: Mapping[LayerAxis, Tensor]) -> LayerAxis | None:
    """Return the first axis whose rows are not the same but for rounding."""
    largest = max(products.abs().max() for products in rows.values())
    for axis, products in rows.items():
        eps = torch.finfo(products.dtype).eps
        bound = eps ** (1 / 3) * products.abs().max() + 100 * eps * largest
        if not (others[axis] - products).abs().max() <= bound:
            return axis
    return None


def _seconds() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def _seconds_since(start: tuple[float, float], found: Mapping[LayerAxis, Tensor]) -> float:
    """Return the seconds until products were there: the processor's, which other work leaves alone, or a GPU's."""
    products = list(found.values())[-1]
    products.sum().item()  # waits for a GPU
    return _seconds()[products.device.type != "cpu"] - start[products.device.type != "cpu"]


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
    set_aside: bool = False,
) -> Iterator[int]:
    """Hand the gradient of each row's loss with respect to the parameters of layers to `consume`; yield batch numbers.

    `consume` is called with a layer's name and its parameters' gradients of some rows, name -> (rows, *shape), while a
    batch is worked on: rows in their order, layers in any. The model runs in eval mode and is itself again whenever a
    batch is done. Nothing is kept. With `set_aside` layers that a batch's loss does not depend on are passed by.

    Raises:
        ValueError: no batches, an unknown layer, a layer that never ran, a loss that is not finite, rows that do not
            divide a batch, or rows finer than a batch of an objective that returns a scalar.
    """
    names = list(dict.fromkeys(layers))
    read = GradientRows(model, names, objective, examples_per_row(rows), consume, set_aside)
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


def families(model: nn.Module, layers: Mapping[str, nn.Module | nn.Parameter]) -> dict[str, dict[str, Any]]:
    """Return, for each layer, the layers that may share parameters with it, by name: itself, or all tied ones."""
    owners = _owners(model).values()
    tied = {name: layer for owning in owners if len(owning) > 1 for name, layer in owning}
    return {name: tied if name in tied else {name: layer} for name, layer in layers.items()}


def tied_axes(axis: LayerAxis, family: Mapping[str, nn.Module | nn.Parameter]) -> list[LayerAxis]:
    """Return all axes that lie in the same parameters along the same dimensions as an axis; itself first."""
    found, where = [axis], places(family[axis.layer], axis)
    for name, layer in family.items() if len(family) > 1 else ():
        with suppress(UnknownLayerError):
            found += [LayerAxis(name, key) for key in layer_axes(layer) if places(layer, LayerAxis(name, key)) == where]
    return list(dict.fromkeys(found))


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that torch.compile wrapped, whose names have no prefix; any other model is returned itself."""
    dynamo = _compiler()
    return model._orig_mod if dynamo is not None and isinstance(model, dynamo.OptimizedModule) else model


def _eagerly() -> AbstractContextManager:
    """Let compiled parts of a model run eagerly, since a capture is hooks inside them; threads may overlap."""
    if _compiler() is None:
        return nullcontext()
    stances = []
    return shared(
        "eager",
        lambda: stances.append(torch.compiler.set_stance("force_eager")),
        lambda: stances and stances.pop(0).__exit__(None, None, None),
    )


def _compiler() -> Any:
    # Importing it takes seconds, and what is compiled has imported it.
    return sys.modules.get("torch._dynamo")


def parameter_slots(layer: nn.Module, axis: Any) -> list:
    """Return the slots of an axis that lie in parameters (running statistics are buffers and have no gradient)."""
    parameters = own_parameters(layer)
    return [slot for slot in axis.slots if slot.tensor in parameters]


def channel_products(layer: nn.Module | nn.Parameter, axis: LayerAxis, products: Mapping[str, Tensor]) -> Tensor:
    """Sum a layer's products, of the shapes of its parameters, over all that belongs to each channel: (channels,)."""
    return sum(channel_sum(products[slot.tensor], slot) for slot in parameter_slots(layer, find_axis(layer, axis)))
