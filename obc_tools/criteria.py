"""Pruning criteria: a criterion is a saliency of one layer axis; a group's score combines those of its members.

`CRITERIA` names the known ones. A new one is a plain function of weights, shape (channels, d) -> (channels,).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from .groups import ChannelGroup, Member
from .jacobian import Objective, Rows, batch_loss, classification, parameter_slots, stream_products
from .layers import Axis, LayerAxis, UnknownNameError, channel_view, get_layer, layer_axes, own_parameters
from .state import differentiable, evaluating, numbered

REDUCTIONS = ("sum", "mean", "max", "prod", "first")
NORMALIZERS = (None, "sum", "mean", "max", "gaussian", "standarization", "parameters")
NEEDS = ("weights", "gradients", "products")


@dataclass(frozen=True)
class Evidence:
    """What a saliency may look at, for one layer axis; every matrix has one row a channel.

    ``gradients`` of the mean loss over all batches, ``products`` Σ_n (J_n w)² of each channel; None unless the
    criterion needs them.
    """

    layer: nn.Module
    axis: Axis
    gradient_of: Mapping[str, Tensor] = field(default_factory=dict)
    products: Tensor | None = None
    generator: torch.Generator | None = None

    @cached_property
    def weights(self) -> Tensor:
        """The channels' weights without biases, shape (channels, d)."""
        return self._matrix(own_parameters(self.layer), bias=False)

    @cached_property
    def parameters(self) -> Tensor:
        """The channels' weights and biases, shape (channels, d + 1 where there is a bias)."""
        return self._matrix(own_parameters(self.layer), bias=True)

    @cached_property
    def gradients(self) -> Tensor:
        """The gradients of `parameters`, same shape."""
        return self._matrix(self.gradient_of, bias=True)

    def _matrix(self, tensors: Mapping[str, Tensor], bias: bool) -> Tensor:
        slots = [s for s in parameter_slots(self.layer, self.axis) if bias or not s.tensor.endswith("bias")]
        return torch.cat([channel_view(tensors[slot.tensor].detach(), slot) for slot in slots], dim=1)


Saliency = Callable[[nn.Module, Axis, Evidence], Tensor]


@dataclass(frozen=True)
class Criterion:
    """A saliency of one layer axis and what it needs to see.

    ``needs``: "weights" (no data), "gradients" (of the mean loss) or "products" (J·w, row by row).
    ``applies``: which layers it scores; a group's members of other types are left out.
    """

    name: str
    needs: str
    saliency: Saliency
    applies: Callable[[nn.Module], bool] = lambda layer: True
    rows: Rows = "batch"

    def __post_init__(self):
        if self.needs not in NEEDS:
            raise UnknownNameError("need of a criterion", self.needs, NEEDS)


def _jacobian(layer: nn.Module, axis: Axis, evidence: Evidence) -> Tensor:
    """wᵀ(JᵀJ)w = Σ_n (J_n w)², off-diagonal interactions kept (Chen et al. 2025)."""
    return evidence.products


def _taylor(layer: nn.Module, axis: Axis, evidence: Evidence) -> Tensor:
    """Σ_i |w_i ∂L/∂w_i|, first-order loss change weight by weight (Molchanov et al. 2019)."""
    return (evidence.parameters * evidence.gradients).abs().sum(1)


def _l1(layer: nn.Module, axis: Axis, evidence: Evidence) -> Tensor:
    """Σ_i |w_i|, biases left out (Li et al. 2017)."""
    return evidence.weights.abs().sum(1)


def _l2(layer: nn.Module, axis: Axis, evidence: Evidence) -> Tensor:
    """Σ_i w_i², biases left out; summed over a group the squared group norm of DepGraph (Fang et al. 2023)."""
    return evidence.weights.square().sum(1)


def _bn_scale(layer: nn.Module, axis: Axis, evidence: Evidence) -> Tensor:
    """|γ| of the group's BatchNorms (Liu et al. 2017, network slimming)."""
    return evidence.weights.abs().sum(1)


def _random(layer: nn.Module, axis: Axis, evidence: Evidence) -> Tensor:
    """Uniform in [0, 1), drawn from the seed."""
    return torch.rand(axis.width, generator=evidence.generator)


def _is_batch_norm(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.batchnorm._BatchNorm)


CRITERIA: Mapping[str, Criterion] = MappingProxyType(
    {
        criterion.name: criterion
        for criterion in (
            Criterion("jacobian", "products", _jacobian),
            Criterion("taylor", "gradients", _taylor),
            Criterion("l1", "weights", _l1),
            Criterion("l2", "weights", _l2),
            Criterion("bn_scale", "weights", _bn_scale, applies=_is_batch_norm),
            Criterion("random", "weights", _random),
        )
    }
)
"""The known criteria by name."""


@dataclass(frozen=True)
class Scores(Mapping[ChannelGroup, Tensor]):
    """The score of every channel of every group: a mapping ChannelGroup -> tensor of shape (width,)."""

    values_: Mapping[ChannelGroup, Tensor]
    criterion: str

    def __getitem__(self, group: ChannelGroup) -> Tensor:
        return self.values_[group]

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
        return f"<b>{self!r}</b>{summary.to_html(float_format='{:.3g}'.format)}"


def resolve_criterion(criterion: Any) -> Criterion:
    """Return a Criterion given one, its name, (name, options), or a plain function of weights (channels, d)."""
    if isinstance(criterion, Criterion):
        return criterion
    if isinstance(criterion, tuple) and len(criterion) == 2:
        return replace(resolve_criterion(criterion[0]), **criterion[1])
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            raise UnknownNameError("criterion", criterion, list(CRITERIA))
        return CRITERIA[criterion]
    if callable(criterion):
        name = getattr(criterion, "__name__", type(criterion).__name__)
        return Criterion(name, "weights", lambda layer, axis, evidence: criterion(evidence.weights))
    raise ValueError(f"criterion {criterion!r}: expected a name ({', '.join(CRITERIA)}), a Criterion or a function")


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
) -> Scores:
    """Score every channel of every group.

    A member's score of a channel is the sum over the channel's positions of the criterion's saliency; the group's
    score combines its members' by ``group_reduction`` and is then scaled by ``normalizer`` within the group.

    Args:
        criterion: a name of `CRITERIA`, (name, options), a `Criterion`, or a function of weights (channels, d).
        batches: calibration batches, for criteria that need gradients or products.
        group_reduction: "sum", "mean", "max", "prod" or "first", over the members.
        normalizer: None, "sum", "mean", "max", "gaussian" or "standarization" as torch_pruning defines them, or
            "parameters": divide by the number of parameters of one channel of the group.

    Returns:
        Scores, every tensor on the CPU in float64.

    Raises:
        ValueError: unknown names, no batches where they are needed, a group none of whose members can be scored, or
            a score that is not finite (says the layer).
    """
    criterion = resolve_criterion(criterion)
    if group_reduction not in REDUCTIONS:
        raise UnknownNameError("group_reduction", group_reduction, REDUCTIONS)
    if normalizer not in NORMALIZERS:
        raise UnknownNameError("normalizer", normalizer, [str(name) for name in NORMALIZERS])
    if criterion.needs != "weights" and batches is None:
        raise ValueError(f"criterion {criterion.name!r} needs {criterion.needs}: give it batches")
    saliencies = _saliencies(model, groups, criterion, batches, objective, seed)
    scores = {}
    for group in groups:
        members = [member for member in group.members if member.axis in saliencies]
        if not members and group.prunable:
            raise ValueError(f"group {group.root}: criterion {criterion.name!r} scores none of its members")
        if members:
            combined = reduce_members(group, members, saliencies, group_reduction)
            scores[group] = normalize(combined, normalizer, _channel_parameters(model, group))
        else:
            scores[group] = torch.zeros(group.width, dtype=torch.float64)
    return Scores(scores, criterion.name)


def _saliencies(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    criterion: Criterion,
    batches: Any,
    objective: Objective,
    seed: int,
) -> dict[LayerAxis, Tensor]:
    """Return the criterion's saliency of every axis that it scores, on the CPU in float64."""
    axes = _scored_axes(model, groups, criterion)
    products: dict[LayerAxis, Tensor] = {}
    gradients: dict[str, dict[str, Tensor]] = {}
    if criterion.needs == "products":
        products = sum_squares(stream_products(model, batches, list(axes), rows=criterion.rows, objective=objective))
    if criterion.needs == "gradients":
        gradients = mean_gradients(model, batches, [axis.layer for axis in axes], objective=objective)
    generator = torch.Generator().manual_seed(seed)
    saliencies = {}
    for name, (layer, axis) in axes.items():
        evidence = Evidence(layer, axis, gradients.get(name.layer, {}), products.get(name), generator)
        value = criterion.saliency(layer, axis, evidence).detach().double().cpu()
        if value.shape != (axis.width,):
            raise ValueError(f"criterion {criterion.name!r} gave {tuple(value.shape)} for {name}, not ({axis.width},)")
        if not torch.isfinite(value).all():
            raise ValueError(f"criterion {criterion.name!r}: the score of {name} is not finite; check its weights")
        saliencies[name] = value
    return saliencies


def _scored_axes(
    model: nn.Module, groups: Sequence[ChannelGroup], criterion: Criterion
) -> dict[LayerAxis, tuple[nn.Module, Axis]]:
    axes = {}
    for member in (member for group in groups if group.prunable for member in group.members):
        layer = get_layer(model, member.axis.layer)
        if member.axis in axes or not criterion.applies(layer):
            continue
        axis = layer_axes(layer, member.axis.layer)[member.axis.axis]
        if parameter_slots(layer, axis):
            axes[member.axis] = (layer, axis)
    return axes


def sum_squares(stream: Iterable[Mapping[LayerAxis, Tensor]]) -> dict[LayerAxis, Tensor]:
    """Add up the squares of streamed products over all rows, in float64: LayerAxis -> (channels,)."""
    totals: dict[LayerAxis, Tensor] = {}
    for products in stream:
        for axis, product in products.items():
            squares = product.double().square().sum(0)
            totals[axis] = totals[axis] + squares if axis in totals else squares
    return totals


def mean_gradients(
    model: nn.Module, batches: Iterable[Any], layers: Iterable[str], *, objective: Objective = classification
) -> dict[str, dict[str, Tensor]]:
    """Return the gradient of the mean loss over all batches: layer -> parameter name -> gradient.

    Batches weigh equally. Raises ValueError as `stream_products` does.
    """
    owners = {name: own_parameters(get_layer(model, name)) for name in layers}
    named = {(name, key): p for name, own in owners.items() for key, p in own.items()}
    parameters = list(dict.fromkeys(named.values()))
    totals = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
    with evaluating(model), differentiable(model, parameters):
        for count, batch in numbered(batches):
            loss = batch_loss(model, batch, objective, count)
            for total, gradient in zip(totals, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
                if gradient is not None:
                    total += gradient
    gradients = dict(zip(parameters, totals, strict=True))
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for (name, key), parameter in named.items():
        found[name][key] = gradients[parameter] / count
    return dict(found)


def reduce_members(
    group: ChannelGroup, members: Sequence[Member], saliencies: Mapping[LayerAxis, Tensor], reduction: str
) -> Tensor:
    """Combine the saliencies of a group's members into one score a channel, shape (width,)."""
    stacked = torch.stack([_by_channel(group.width, member, saliencies[member.axis]) for member in members])
    if reduction == "first":
        return stacked[0]
    if reduction == "max":
        return stacked.amax(0)
    return getattr(stacked, reduction)(0)


def _by_channel(width: int, member: Member, saliency: Tensor) -> Tensor:
    """Sum an axis' saliency over the positions of each of the group's channels."""
    at = saliency[torch.tensor(member.positions)]
    return torch.zeros(width, dtype=at.dtype).index_add_(0, torch.tensor(member.channels), at)


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
    for member in group.members:
        layer = get_layer(model, member.axis.layer)
        axis = layer_axes(layer, member.axis.layer).get(member.axis.axis)
        slots = parameter_slots(layer, axis) if axis else []
        one = sum(own_parameters(layer)[slot.tensor].numel() // axis.width for slot in slots)
        total += one * len(member.positions) // group.width
    return total
