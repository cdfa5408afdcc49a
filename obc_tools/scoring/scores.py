"""Scores of groups: the saliencies of a group's members, combined over the members and scaled within the group."""

from __future__ import annotations

import html
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any, Self

import pandas as pd
import torch
from torch import Tensor, nn

from ..errors import PlanMismatchError, check_name, check_whole
from ..state import differentiable, evaluating, numbered, without_weight_norms
from ..structure.groups import ChannelGroup, Member
from ..structure.layers import Axis, LayerAxis, find_axis, get_layer, own_parameters
from .capture import never_ran
from .criteria import Criterion, Evidence, resolve_criterion
from .jacobian import stream_products
from .objectives import Objective, batch_loss, classification, in_precision, sampled_classification
from .residual import residual_scores
from .rows import (
    EXPECTED,
    Proof,
    Rows,
    averages,
    distinct_members,
    parameter_slots,
    stream_gradients,
    streamed,
)

logger = logging.getLogger(__name__)

NEARLY_ZERO = 1e-12
"""Scores up to this, of a loss that is all but zero, are rounding: J·w of 1e-6, squared."""
Products = Mapping[LayerAxis, Tensor]
"""J·w of the channels of layer axes for some rows: LayerAxis -> (rows, channels)."""


@dataclass
class SquareSums:
    """Σ_n (J_n w)² over rows that are streamed, batch by batch; nothing is kept but sums, in float64.

    ``rows``: as `score_groups` has them. From S = Σ_i J_i w and Q = Σ_i (J_i w)² over n examples the sum over rows of m
    examples, averaged over all ways to draw the rows, is ((m − 1) S² + (n − m) Q) / (m² (n − 1)): two examples share a
    row with probability (m − 1) / (n − 1), and a row is the mean of its examples.
    """

    rows: Rows = "batch"
    size: int | None = None
    """Examples of a row that is drawn."""
    examples: int = 0
    sums: dict[Any, tuple[Tensor, ...]] = field(default_factory=dict)

    def add(self, products: Mapping[Any, Tensor]) -> Self:
        """Add a batch, key -> (rows, channels)."""
        if averages(self.rows):
            self._count(len(next(iter(products.values()), ())))
        for key, given in products.items():
            exact = given.double()
            found = (exact.square().sum(0), *((exact.sum(0),) if averages(self.rows) else ()))
            self.sums[key] = tuple(map(torch.add, self.sums[key], found)) if key in self.sums else found
        return self

    def _count(self, examples: int) -> None:
        if self.size is None:
            self.size = examples if self.rows == EXPECTED else self.rows[1]
        if self.rows == EXPECTED and examples != self.size:
            raise ValueError(
                f"rows='expected' draws batches of one size anew, and after one of {self.size} examples came one of "
                f"{examples}: leave it out, or say how many make a row, rows=('expected', {self.size})"
            )
        self.examples += examples

    def __sub__(self, other: SquareSums) -> SquareSums:
        """Return the sums without those of some of the batches."""
        sums = {key: tuple(map(torch.sub, mine, other.sums[key])) for key, mine in self.sums.items()}
        return replace(self, examples=self.examples - other.examples, sums=sums)

    @property
    def suffices(self) -> bool:
        """Whether there are examples enough for one row."""
        return self.size is None or self.examples >= self.size

    def totals(self) -> dict[Any, Tensor]:
        """Return the sum over the rows of each key: (channels,); raise ValueError where examples do not make a row."""
        if not self.suffices:
            raise ValueError(f"rows={self.rows!r}: {self.examples} examples make no row; give more, or a smaller m")
        n, m = self.examples, self.size
        if m is None or m == 1:
            return {key: squares.clamp(min=0) for key, (squares, *_) in self.sums.items()}
        return {
            key: ((m - 1) * total.square() + (n - m) * squares.clamp(min=0)) / (m * m * (n - 1))
            for key, (squares, total) in self.sums.items()
        }


def sum_squares(stream: Iterable[Products], rows: Rows = "batch") -> dict[LayerAxis, Tensor]:
    """Add up the squares of streamed products over all rows, in float64: LayerAxis -> (channels,)."""
    found = SquareSums(rows)
    for products in stream:
        found.add(products)
    return found.totals()


Parts = Mapping[ChannelGroup, Sequence[Member]]
"""The members of each group that are scored."""


def sum_group_squares(parts: Parts, stream: Iterable[Products], rows: Rows = "batch") -> dict[ChannelGroup, Tensor]:
    """Add up Σ_n (Σ_m Σ_p J_{m,p} w_{m,p})² of each channel over all rows, in float64: group -> (width,).

    The cross terms between a group's members m and positions p are kept: this is wᵀ(JᵀJ)w over the concatenated
    parameters of all that goes with a channel.
    """
    return sum_squares(
        ({group: _joined(group, parts[group], products) for group in parts} for products in stream), rows
    )


def removal_ranks(parts: Parts, stream: Iterable[Products]) -> dict[ChannelGroup, Tensor]:
    """Rank all channels of all groups in the order of a greedy removal together: group -> (width,), 0 goes first.

    Next goes the channel c that leaves the least 1ᵀK1 = Σ_n (Σ_{i ∈ S ∪ {c}} J_n w_i)² of the removed set S: the
    first-order squared loss change of removing the set, a group's members joined as in `sum_group_squares`. All rows
    are kept, rows x channels numbers, and the time grows with rows x channels².
    """
    rows = torch.cat([torch.cat([_joined(*part, products) for part in parts.items()], 1) for products in stream])
    squares = rows.square().sum(0)
    removed = rows.new_zeros(len(rows))
    ranks = torch.full_like(squares, torch.inf)
    for rank in range(rows.shape[1]):
        change = squares + 2 * (removed @ rows)
        change[ranks < torch.inf] = torch.inf
        channel = int(change.argmin())
        ranks[channel] = rank
        removed += rows[:, channel]
    return dict(zip(parts, ranks.split([group.width for group in parts]), strict=True))


def _joined(group: ChannelGroup, members: Sequence[Member], products: Products) -> Tensor:
    """Return Σ_m Σ_p J_{m,p} w_{m,p} of each channel of a group, (rows, width), in float64 on the CPU."""
    return sum(_by_channel(group.width, m, products[m.axis].double().cpu()) for m in members)


def sum_square_gradients(
    model: nn.Module, batches: Iterable[Any], layers: Iterable[str], *, objective: Objective = classification
) -> dict[str, dict[str, Tensor]]:
    """Return Σ_n g_n², the squared gradients of the examples' own losses: layer -> parameter name -> (*its shape,).

    One backward pass a batch where examples do not see each other. Layers that no loss depends on are left out. Raises
    ValueError as `stream_gradients` does.
    """
    totals: dict[str, dict[str, Tensor]] = defaultdict(dict)

    def consume(layer: str, rows: Mapping[str, Tensor]) -> None:
        for name, gradients in rows.items():
            squares = gradients.to(torch.promote_types(gradients.dtype, torch.float32)).square().sum(0)
            totals[layer][name] = totals[layer][name] + squares if name in totals[layer] else squares

    options = {"rows": "sample", "objective": objective, "set_aside": True}
    for _ in stream_gradients(model, batches, list(layers), consume, **options):
        pass
    return dict(totals)


def mean_gradients(
    model: nn.Module, batches: Iterable[Any], layers: Iterable[str], *, objective: Objective = classification
) -> dict[str, dict[str, Tensor]]:
    """Return the gradient of the mean loss over all batches: layer -> parameter name -> gradient.

    Batches weigh equally. Layers that no loss depends on are left out. Raises ValueError as `stream_products` does.
    """
    owners = {name: own_parameters(get_layer(model, name)) for name in layers}
    named = {(name, key): p for name, own in owners.items() for key, p in own.items()}
    parameters = list(dict.fromkeys(named.values()))
    totals = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
    reached: set[Tensor] = set()
    with evaluating(model), differentiable(model, parameters):
        for count, batch in numbered(batches):
            loss = batch_loss(model, batch, objective, count)
            for total, gradient in zip(totals, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
                if gradient is not None:
                    total += gradient
                    reached.add(total)
    gradients = dict(zip(parameters, totals, strict=True))
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for (name, key), parameter in named.items():
        found[name][key] = gradients[parameter] / count
    alive = {name for (name, _), parameter in named.items() if gradients[parameter] in reached}
    return {name: own for name, own in found.items() if name in alive}


UNREACHED = "no loss depends on it, so that nothing scores it"
"""Why a group is kept whole whose layers have no gradients."""

JOINED = ("group", "set")
"""The couplings that join a group's members."""

REDUCTIONS = ("sum", "mean", "max", "prod", "first")
NORMALIZERS = (None, "sum", "mean", "max", "gaussian", "standarization", "parameters")


@dataclass(frozen=True)
class Scores(Mapping[ChannelGroup, Tensor]):
    """The score of every channel of every group: a mapping ChannelGroup -> tensor of shape (width,).

    Groups that no loss depends on are kept whole in it. ``left_out``: where scoring may stop, the scores without each
    of the batches in turn, group -> (batches, width).
    """

    values_: Mapping[ChannelGroup, Tensor]
    criterion: str
    left_out: Mapping[ChannelGroup, Tensor] | None = None

    def __getitem__(self, group: ChannelGroup) -> Tensor:
        return self.values_[group if group in self.values_ else replace(group, kept_whole=UNREACHED)]

    def __iter__(self) -> Iterator[ChannelGroup]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)

    def to_frame(self) -> pd.DataFrame:
        """Return one row a channel: group, channel, score."""
        rows = [(str(g.root), i, v) for g, score in self.items() for i, v in enumerate(score.tolist())]
        return pd.DataFrame(rows, columns=["group", "channel", "score"])

    def __repr__(self) -> str:
        return f"Scores({self.criterion}, {len(self)} groups, {sum(group.width for group in self)} channels)"

    def _repr_html_(self) -> str:
        summary = self.to_frame().groupby("group", sort=False)["score"].describe()[["count", "min", "50%", "max"]]
        return f"<b>{html.escape(repr(self))}</b>{summary.to_html(float_format='{:.3g}'.format)}"


Decided = Callable[[Scores], bool]
"""Says of the scores so far whether they suffice."""


def score_groups(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    criterion: Any,
    batches: Iterable[Any] | None = None,
    *,
    group_reduction: str = "sum",
    normalizer: str | None = None,
    objective: Objective = classification,
    seed: int = 0,
    decided: Decided | None = None,
    proof: Proof | None = None,
    amp: str = "no",
) -> Scores:
    """Score every channel of every group.

    A member's score of a channel is the sum over the channel's positions of the criterion's saliency; the group's
    score combines its members' by ``group_reduction`` and is then scaled by ``normalizer`` within the group. Parameters
    that are tied, such as an embedding's and an output layer's, are one member of their group, by the first of their
    names; its gradient and J·w are the sums over all uses under all names, before anything is squared.

    Where products of a batch take over 0.25 s of the processor (or of a GPU), the third batch is scored twice, also
    with the channels of images last in memory, and the faster way is kept: scores differ by rounding then, as they do
    between machines. `torch.use_deterministic_algorithms(True)` leaves the order as it is.

    Args:
        criterion: a name of `CRITERIA`, (name, options), a `Criterion`, or a function of weights (channels, d).
        batches: calibration batches, for criteria that need gradients or products.
        group_reduction: "sum", "mean", "max", "prod" or "first", over the members.
        normalizer: None, "sum", "mean", "max", "gaussian" or "standarization" as torch_pruning defines them, or
            "parameters": divide by the number of parameters of one channel of the group.
        decided: called with the scores so far after every batch from the second on that leaves the others a row; no
            more are scored once it says so. For criteria of products whose saliency passes leading dimensions on.
        proof: see `stream_products`.
        amp: "no", the model's own precision, or "bf16": under torch.autocast, for processors with AMX or AVX-512 bf16
            and for GPUs; sums stay in float32 or above. On the published ResNet-56 (4 batches of 128 images, one
            thread with AMX) the ranks' correlation with float32 is 0.988, of the lowest 40 % of channels 98 % are the
            same, in 0.60 of the processor's time (one pair of runs).

    Returns:
        Scores, every tensor on the CPU in float64.

    Raises:
        ValueError: unknown names, no batches where they are needed, a group none of whose members can be scored, or
            a score that is not finite (says the layer).
    """
    criterion, model = resolve_criterion(criterion), without_weight_norms(model)
    check_whole("seed", seed, 0)
    if not isinstance(groups, Iterable) or not all(isinstance(group, ChannelGroup) for group in groups):
        raise ValueError("groups: expected groups of channels, as find_groups returns them")
    _check_request(criterion, batches, group_reduction, normalizer)
    if batches is not None and criterion.batches is not None:
        batches = islice(batches, criterion.batches)
    if "meta" in (devices := sorted({str(parameter.device) for parameter in model.parameters()})):
        which = f": its parameters have several devices: {', '.join(devices)}" if devices[1:] else " is on meta alone"
        raise ValueError(f"the model{which}; on the meta device weights are no numbers: load them before scoring")
    if criterion.sampled_labels:
        objective = _sampling(criterion, objective, seed)
    objective, proof = in_precision(objective, amp), Proof() if proof is None else proof
    asked = _Scorer(model, groups, criterion, group_reduction, normalizer, objective, seed, proof)
    if criterion.needs == "residuals":
        return asked.scores(asked.scaled(residual_scores(model, asked.parts, batches, objective)))
    if criterion.coupling in JOINED:
        stream = asked.stream(batches, set_aside=False)
        if criterion.coupling == "set":
            return asked.scores(asked.scaled(removal_ranks(asked.parts, stream)))
        return asked.scores(asked.scaled(sum_group_squares(asked.parts, stream, criterion.rows)))
    if decided is not None:
        return asked.until(decided, batches)
    return asked.scores(asked.finish(asked.saliencies(batches)))


@dataclass(frozen=True, eq=False)
class _Scorer:
    """What scores of groups depend on, but the batches; the proof's ``reached`` grows while it scores."""

    model: nn.Module
    groups: Sequence[ChannelGroup]
    criterion: Criterion
    group_reduction: str
    normalizer: str | None
    objective: Objective
    seed: int
    proof: Proof

    @cached_property
    def parts(self) -> Parts:
        """The members that the criterion scores; raise ValueError for a group that has none."""
        found = {group: _parts(self.model, group, self.criterion) for group in self.groups if group.prunable}
        for group, members in found.items():
            if not members:
                raise ValueError(f"group {group.root}: criterion {self.criterion.name!r} scores none of its members")
        return found

    @cached_property
    def axes(self) -> dict[LayerAxis, tuple[nn.Module, Axis]]:
        """The axes of these members."""
        names = dict.fromkeys(member.axis for members in self.parts.values() for member in members)
        layers = {name: get_layer(self.model, name.layer) for name in names}
        return {name: (layer, find_axis(layer, name)) for name, layer in layers.items()}

    def stream(self, batches: Iterable[Any], *, set_aside: bool = True) -> Iterator[Products]:
        """Yield J·w of the axes, batch by batch."""
        options = {"rows": streamed(self.criterion.rows), "objective": self.objective, "proof": self.proof}
        return stream_products(self.model, batches, list(self.axes), **options, set_aside=set_aside)

    def saliencies(self, batches: Iterable[Any] | None) -> dict[LayerAxis, Tensor]:
        """Return the criterion's saliency of every axis that a loss depends on, on the CPU in float64."""
        criterion, needs = self.criterion, self.criterion.needs
        given, objective = (self.model, batches, [axis.layer for axis in self.axes]), self.objective
        products = sum_squares(self.stream(batches), criterion.rows) if needs == "products" else {}
        gradients = mean_gradients(*given, objective=objective) if needs == "gradients" else {}
        squares = sum_square_gradients(*given, objective=objective) if needs == "squares" else {}
        generator = torch.Generator().manual_seed(self.seed)
        reached = self.proof.reached
        reached |= gradients.keys() | squares.keys()
        found = {}
        for name, (layer, axis) in self.axes.items():
            if needs != "weights" and name.layer not in reached:
                continue
            seen = (gradients.get(name.layer, {}), squares.get(name.layer, {}), products.get(name))
            found[name] = _saliency(criterion, name, Evidence(layer, axis, *seen, generator), (axis.width,))
        return found

    def finish(self, saliencies: Mapping[LayerAxis, Tensor]) -> dict[ChannelGroup, Tensor]:
        """Turn saliencies of axes, (..., channels), into scores of groups, (..., width)."""
        parts = self.parts if self.criterion.needs == "weights" else _reached(self.parts, self.proof.reached)
        return self.scaled({g: reduce_members(g, ms, saliencies, self.group_reduction) for g, ms in parts.items()})

    def scaled(self, combined: Mapping[ChannelGroup, Tensor]) -> dict[ChannelGroup, Tensor]:
        """Scale scores, (..., width), within each group."""
        if self.criterion.rescale:
            combined = {group: self.criterion.rescale(score) for group, score in combined.items()}
        if self.normalizer is None:
            return dict(combined)
        found = {}
        for group, score in combined.items():
            count = _channel_parameters(self.model, group) if self.normalizer == "parameters" else 1
            rows = [normalize(one, self.normalizer, count) for one in torch.atleast_2d(score)]
            found[group] = torch.stack(rows).view(score.shape)
        return found

    def scores(self, scored: Mapping[ChannelGroup, Tensor]) -> Scores:
        """Return the scores of all groups, zeros for those that are kept whole or that no loss depends on."""
        largest = max((score.abs().max().item() for score in scored.values()), default=math.inf)
        if self.criterion.needs != "weights" and largest <= NEARLY_ZERO:
            logger.warning(
                "criterion %r: all scores are zero or nearly so (at most %.2g), so that they say nothing: look at the "
                "calibration data (few batches, sorted by class?) and at the loss (already zero?)",
                self.criterion.name,
                largest,
            )
        zeros = {group: torch.zeros(group.width, dtype=torch.float64) for group in self.groups if group not in scored}
        aside = {group: replace(group, kept_whole=UNREACHED) for group in zeros if group.prunable}
        return Scores({aside.get(group, group): (scored | zeros)[group] for group in self.groups}, self.criterion.name)

    def until(self, decided: Decided, batches: Iterable[Any]) -> Scores:
        """Score batch after batch until the scores suffice, or none is left."""
        total, each, scores = SquareSums(self.criterion.rows), [], None
        for products in self.stream(batches):
            here = {axis: rows.cpu() for axis, rows in products.items()}
            total.add(here)
            each.append(SquareSums(self.criterion.rows, total.size).add(here))
            others = [total - one for one in each]
            if len(others) > 1 and all(sums.suffices for sums in others):
                scores = self._left_out(total, others)
                if decided(scores):
                    return scores
        return scores or self._left_out(total, ())

    def _left_out(self, total: SquareSums, others: Sequence[SquareSums]) -> Scores:
        """Return the scores by all batches, with those by all but one."""
        scale = len(others) / max(len(others) - 1, 1)
        left_out = [{axis: scale * squares for axis, squares in sums.totals().items()} for sums in others]
        tables, saliencies = [total.totals(), *left_out], {}
        for name, (layer, axis) in self.axes.items():
            seen = torch.stack([table[name] for table in tables])
            saliencies[name] = _saliency(self.criterion, name, Evidence(layer, axis, products=seen), seen.shape)
        found = self.finish(saliencies)
        whole = self.scores({group: score[0] for group, score in found.items()})
        return replace(whole, left_out={group: score[1:] for group, score in found.items()} if others else None)


def _reached(parts: Parts, reached: set[str]) -> dict[ChannelGroup, list[Member]]:
    """Set members aside whose layers no loss depends on, and groups that have no others; some must be left."""
    aside = {m.axis.layer for members in parts.values() for m in members} - reached
    if not aside:
        return {group: list(members) for group, members in parts.items()}
    left = {group: [m for m in members if m.axis.layer in reached] for group, members in parts.items()}
    logger.info("no loss depends on, and scores leave out: %s", ", ".join(sorted(aside)))
    if parts and not any(left.values()):
        raise ValueError(never_ran(next(iter(parts)).root.layer))
    return {group: members for group, members in left.items() if members}


def _check_request(criterion: Criterion, batches: Any, group_reduction: str, normalizer: str | None) -> None:
    check_name("group_reduction", group_reduction, REDUCTIONS)
    check_name("normalizer", normalizer, NORMALIZERS)
    if criterion.needs != "weights" and batches is None:
        raise ValueError(f"criterion {criterion.name!r} needs {criterion.needs}: give it batches")
    joined = f"coupling={criterion.coupling!r}" if criterion.coupling in JOINED else None
    joined = f"criterion {criterion.name!r}" if criterion.needs == "residuals" else joined
    if joined and group_reduction != "sum":
        raise ValueError(f"group_reduction={group_reduction!r}: {joined} already joins the members, leave sum")


def _sampling(criterion: Criterion, objective: Objective, seed: int) -> Objective:
    """Return classification with sampled labels; raise ValueError for an objective that has no labels to sample."""
    if objective is not classification:
        raise ValueError(f"criterion {criterion.name!r} draws labels from the model: it goes with classification alone")
    return sampled_classification(seed)


def _parts(model: nn.Module, group: ChannelGroup, criterion: Criterion) -> list[Member]:
    """Return the members of a group that a criterion scores; with split_bias, weights and biases apart."""
    parts = []
    for member in group.members:
        layer = get_layer(model, member.axis.layer)
        side = "out" if member.axis.axis == "out" else "in"
        if not criterion.applies(layer) or side not in criterion.axes:
            continue
        keys = [member.axis]
        if criterion.split_bias and member.axis.axis == "out":
            keys = [LayerAxis(member.axis.layer, "out_w"), LayerAxis(member.axis.layer, "out_b")]
        parts += [replace(member, axis=key) for key in keys if parameter_slots(layer, find_axis(layer, key))]
    return distinct_members(model, parts)


def _saliency(criterion: Criterion, name: LayerAxis, evidence: Evidence, shape: Sequence[int]) -> Tensor:
    """Return the checked saliency of one axis, on the CPU in float64."""
    value = criterion.saliency(evidence.layer, evidence.axis, evidence)
    if not isinstance(value, Tensor):
        raise ValueError(f"criterion {criterion.name!r} gave {type(value).__name__} for {name}, not a tensor")
    value = value.detach().double().cpu()
    if value.shape != tuple(shape):
        raise ValueError(f"criterion {criterion.name!r} gave {tuple(value.shape)} for {name}, not {tuple(shape)}")
    if not torch.isfinite(value).all():
        raise ValueError(f"criterion {criterion.name!r}: the score of {name} is not finite; check its weights")
    return value


def reduce_members(
    group: ChannelGroup, members: Sequence[Member], saliencies: Mapping[LayerAxis, Tensor], reduction: str
) -> Tensor:
    """Combine the saliencies of a group's members into one score a channel, shape (width,)."""
    return combine([_by_channel(group.width, member, saliencies[member.axis]) for member in members], reduction)


def combine(parts: Sequence[Tensor], reduction: str) -> Tensor:
    """Combine the members' scores, each of shape (width,), into one of that shape."""
    stacked = torch.stack(list(parts))
    if reduction == "first":
        return stacked[0]
    if reduction == "max":
        return stacked.amax(0)
    return getattr(stacked, reduction)(0)


def _by_channel(width: int, member: Member, values: Tensor) -> Tensor:
    """Sum what is known of an axis, (..., positions), over the positions of each of the group's channels."""
    if member.width != values.shape[-1]:
        raise PlanMismatchError(f"group of axis {member.axis}: {member.width} wide, in this model {values.shape[-1]}")
    at = values[..., torch.tensor(member.positions)]
    return at.new_zeros(*at.shape[:-1], width).index_add_(-1, torch.tensor(member.channels), at)


def normalize(score: Tensor, normalizer: str | None, parameters: int) -> Tensor:
    """Scale the scores of one group (see `score_groups` for the normalizers)."""
    if normalizer is None:
        return score
    if normalizer == "gaussian":
        return (score - score.mean()) / (score.std() + 1e-8)
    if normalizer == "standarization":
        return (score - score.min()) / (score.max() - score.min() + 1e-8)
    if normalizer == "parameters":
        return score / parameters
    scale = getattr(score, normalizer)()
    return score / scale if scale != 0 else score


def _channel_parameters(model: nn.Module, group: ChannelGroup) -> int:
    """Count the parameters of one channel of a group, over all its members and positions."""
    total = 0
    for member in distinct_members(model, group.members):
        layer = get_layer(model, member.axis.layer)
        axis = find_axis(layer, member.axis)
        slots = parameter_slots(layer, axis)
        one = sum(own_parameters(layer)[slot.tensor].numel() // axis.width for slot in slots)
        total += one * len(member.positions) // group.width
    return total
