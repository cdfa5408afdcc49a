"""Pruning criteria: a criterion is a saliency of one layer axis.

`CRITERIA` names the known ones. A new one is a plain function of weights, shape (channels, d) -> (channels,).
`scores` combines the saliencies of a group's members into the group's score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnknownNameError, check_name
from ..structure.layers import Axis, channel_view, is_batch_norm, is_projection, own_parameters
from .rows import Rows, averages, check_rows, parameter_slots

NEEDS = ("weights", "gradients", "squares", "products", "residuals")
COUPLINGS = ("member", "group", "set")


@dataclass(frozen=True)
class Evidence:
    """What a saliency may look at, for one layer axis; every matrix has one row a channel.

    ``gradients`` of the mean loss over all batches, ``squares`` Σ_n g_n² of the examples' own gradients, ``products``
    Σ_n (J_n w)² of each channel; there only if the criterion needs them.
    """

    layer: nn.Module
    axis: Axis
    gradient_of: Mapping[str, Tensor] = field(default_factory=dict)
    square_of: Mapping[str, Tensor] = field(default_factory=dict)
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

    @cached_property
    def squares(self) -> Tensor:
        """Σ_n g_n² of each of `parameters`, same shape."""
        return self._matrix(self.square_of, bias=True)

    @cached_property
    def weight_squares(self) -> Tensor:
        """Σ_n g_n² of each of `weights`, same shape."""
        return self._matrix(self.square_of, bias=False)

    def _matrix(self, tensors: Mapping[str, Tensor], bias: bool) -> Tensor:
        slots = [s for s in parameter_slots(self.layer, self.axis) if bias or not s.tensor.endswith("bias")]
        parts = [channel_view(tensors[slot.tensor].detach(), slot) for slot in slots]
        # What a tied layer has for itself may be its bias alone.
        return torch.cat(parts, dim=1) if parts else torch.zeros(self.axis.width, 0)


Saliency = Callable[[nn.Module, Axis, Evidence], Tensor]


@dataclass(frozen=True)
class Criterion:
    """A saliency of one layer axis and what it needs to see.

    ``needs``: "weights" (no data), "gradients" (of the mean loss), "squares" (of each example's gradient), "products"
    (J·w, row by row) or "residuals" (of activations, a group at a time).
    ``applies``, ``axes``: which layers and axes it scores; a group's other members are left out. All dimensions of a
    bare parameter but its last count as "in".
    ``rescale``: of the group's combined scores, shape (width,), before any normalizer.
    ``sampled_labels``: labels are drawn from the model's own outputs, by the seed.
    ``rows``, ``coupling``, ``split_bias`` go with products. ``coupling="member"`` adds up the members' squares (the
    paper's); "group" keeps the cross terms of a group, Σ_n (Σ_m Σ_p J_{m,p} w_{m,p})²; "set" those of all channels that
    go together: scores are ranks of a greedy removal (see `scores.removal_ranks`). ``split_bias`` scores weights
    and biases as members of their own, as the paper's published code does.
    ``batches``: the criterion's own budget, the first so many of the batches that it is given; None takes all.
    """

    name: str
    needs: str
    saliency: Saliency
    applies: Callable[[nn.Module], bool] = lambda layer: True
    axes: tuple[str, ...] = ("out", "in")
    rescale: Callable[[Tensor], Tensor] | None = None
    sampled_labels: bool = False
    rows: Rows = "batch"
    coupling: str = "member"
    split_bias: bool = False
    batches: int | None = None

    def __post_init__(self):
        check_name("need of a criterion", self.needs, NEEDS)
        check_name("coupling", self.coupling, COUPLINGS)
        object.__setattr__(self, "rows", check_rows(self.rows))
        if self.needs != "products" and (self.coupling, self.split_bias) != ("member", False):
            raise ValueError(f"criterion {self.name!r} needs {self.needs}: coupling and split_bias go with products")
        if self.needs != "products" and self.rows != "batch":
            raise ValueError(
                f"rows={self.rows!r}: criterion {self.name!r} has no rows, it needs {self.needs}; leave rows"
            )
        if self.coupling == "set" and averages(self.rows):
            raise ValueError(f"rows={self.rows!r}: coupling='set' needs the rows themselves; use 'batch' or 'sample'")
        if self.split_bias and (self.coupling != "member" or self.rows != "batch"):
            raise ValueError("split_bias goes with rows='batch' and coupling='member', as published")
        if self.batches is not None and self.batches < 1:
            raise ValueError(f"criterion {self.name!r}: batches={self.batches}; expected at least 1, or None for all")

    @property
    def by_example(self) -> bool:
        """Whether it needs losses one an example, which those of a task need not be."""
        return self.needs == "squares" or self.rows != "batch"

    @property
    def draws(self) -> bool:
        """Whether data or chance has a say, so that another seed gives other scores."""
        return self.needs != "weights" or self.saliency is _random


def _jacobian(layer: nn.Module, axis: Axis, evidence: Evidence) -> Tensor:
    """wᵀ(JᵀJ)w = Σ_n (J_n w)², off-diagonal interactions kept (Chen et al. 2025)."""
    return evidence.products


def _taylor(layer: nn.Module, axis: Axis, evidence: Evidence) -> Tensor:
    """Σ_i |w_i ∂L/∂w_i|, first-order loss change weight by weight (Molchanov et al. 2019)."""
    return (evidence.parameters * evidence.gradients).abs().sum(1)


def _hessian(layer: nn.Module, axis: Axis, evidence: Evidence) -> Tensor:
    """Σ_i w_i² Σ_n g_{n,i}², the diagonal empirical Fisher image by image (LeCun et al. 1989; Theis et al. 2018)."""
    return (evidence.parameters.square() * evidence.squares).sum(1)


def _obdc(layer: nn.Module, axis: Axis, evidence: Evidence) -> Tensor:
    """Σ_i w_i² Σ_n g_{n,i}² over a filter's weights, labels drawn from the model (C-OBD of Wang et al. 2019)."""
    return (evidence.weights.square() * evidence.weight_squares).sum(1)


def _l1(layer: nn.Module, axis: Axis, evidence: Evidence) -> Tensor:
    """Σ_i |w_i|, biases left out (Li et al. 2017)."""
    return evidence.weights.abs().sum(1)


def _l2(layer: nn.Module, axis: Axis, evidence: Evidence) -> Tensor:
    """Σ_i w_i², biases left out; summed over a group the squared group norm of DepGraph (Fang et al. 2023)."""
    return evidence.weights.square().sum(1)


def _fpgm(layer: nn.Module, axis: Axis, evidence: Evidence) -> Tensor:
    """Σ_j ‖w_i − w_j‖, biases left out: least at the geometric median (He et al. 2019, equation 7)."""
    weights = evidence.weights.double()
    return torch.cdist(weights, weights, compute_mode="donot_use_mm_for_euclid_dist").sum(1)


def _lamp(scores: Tensor) -> Tensor:
    """s_i / Σ_j s_j over the channels j that score at least as high (Lee et al. 2021, equation 6), of squared norms."""
    order = scores.argsort(descending=True)
    sums = scores[order].cumsum(0)
    return torch.empty_like(scores).scatter_(0, order, scores[order] / sums.clamp(min=torch.finfo(sums.dtype).tiny))


def _whc(layer: nn.Module, axis: Axis, evidence: Evidence) -> Tensor:
    """‖w_i‖ Σ_j ‖w_j‖ (1 − |cos(w_i, w_j)|), biases left out (Chen et al. 2023, weighted hybrid criterion)."""
    norms = evidence.weights.norm(dim=1)
    directions = torch.nn.functional.normalize(evidence.weights, dim=1)
    return norms * (norms.sum() - (directions @ directions.T).abs() @ norms)


def _bn_scale(layer: nn.Module, axis: Axis, evidence: Evidence) -> Tensor:
    """|γ| of the group's BatchNorms (Liu et al. 2017, network slimming)."""
    return evidence.weights.abs().sum(1)


def _residual(layer: nn.Module, axis: Axis, evidence: Evidence) -> Tensor:
    """(1 − R_i²) Σ_n (J_n w)², R_i² the share of x_i that other channels explain: lost after compensation (`residual`).

    It is of a group, not of one of its axes: `score_groups` asks `residual.residual_scores`.
    """
    raise ValueError("the residual of a channel is of its whole group: call score_groups")


def _random(layer: nn.Module, axis: Axis, evidence: Evidence) -> Tensor:
    """Uniform in [0, 1), drawn from the seed."""
    return torch.rand(axis.width, generator=evidence.generator)


CRITERIA: Mapping[str, Criterion] = MappingProxyType(
    {
        criterion.name: criterion
        for criterion in (
            Criterion("jacobian", "products", _jacobian),
            Criterion("taylor", "gradients", _taylor),
            Criterion("hessian", "squares", _hessian),
            Criterion("obdc", "squares", _obdc, applies=is_projection, axes=("out",), sampled_labels=True),
            Criterion("l1", "weights", _l1),
            Criterion("l2", "weights", _l2),
            Criterion("fpgm", "weights", _fpgm, applies=is_projection),
            Criterion("whc", "weights", _whc),
            Criterion("bn_scale", "weights", _bn_scale, applies=is_batch_norm),
            Criterion("lamp", "weights", _l2, rescale=_lamp),
            Criterion("random", "weights", _random),
            Criterion("residual", "residuals", _residual, axes=("in",)),
        )
    }
)
"""The known criteria by name."""


ALIASES: Mapping[str, str] = MappingProxyType(
    {"magnitude": "l2", "l1_norm": "l1", "l2_norm": "l2", "bn": "bn_scale", "jc": "jacobian", "taylor_fo": "taylor"}
)
"""What criteria are called elsewhere."""


def resolve_criterion(criterion: Any) -> Criterion:
    """Return a Criterion given one, its name, (name, options), or a plain function of weights (channels, d)."""
    if isinstance(criterion, Criterion):
        return criterion
    if isinstance(criterion, tuple) and len(criterion) == 2:
        found, options = resolve_criterion(criterion[0]), criterion[1]
        for name in options:
            check_name(f"option of criterion {found.name!r}", name, [entry.name for entry in fields(Criterion)])
        return replace(found, **options)
    if isinstance(criterion, str):
        name = ALIASES.get(criterion.lower(), criterion.lower())
        if name not in CRITERIA:
            raise UnknownNameError("criterion", criterion, list(CRITERIA))
        return CRITERIA[name]
    if callable(criterion):
        name = getattr(criterion, "__name__", type(criterion).__name__)
        return Criterion(name, "weights", lambda layer, axis, evidence: criterion(evidence.weights))
    raise ValueError(f"criterion {criterion!r}: expected a name ({', '.join(CRITERIA)}), a Criterion or a function")
