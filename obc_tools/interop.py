"""Our criteria as torch_pruning importances, for any of its pruners and its interactive mode.

    importance = JacobianImportance()
    pruner = torch_pruning.pruner.BasePruner(model, example_inputs, importance, pruning_ratio=0.5)
    importance.score(model, batches)
    pruner.step()

`JacobianImportance` keeps the method names of the paper's published class, so that a loop written for it runs on:
``zero_grad``, ``zero_score``, ``accumulate_grad(model)`` after each backward pass, ``accumulate_score(model)`` after a
set of them. No gradient is stored: each row is squared and added up at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from .errors import check_name
from .scoring.criteria import Criterion, Evidence, resolve_criterion
from .scoring.jacobian import model_axes, stream_products
from .scoring.objectives import Objective, classification
from .scoring.rows import Rows, parameter_slots, places
from .scoring.scores import NORMALIZERS, REDUCTIONS, combine, normalize, sum_squares
from .structure.layers import (
    LayerAxis,
    channel_sum,
    find_axis,
    get_layer,
    has_role,
    layer_axes,
    own_parameters,
    scored_layers,
)

Axes = dict[tuple[nn.Module | nn.Parameter, str], Tensor]
"""(layer, "out" | "in") -> Σ_n (J_n w)² of its channels."""


class _GroupImportance(tp.importance.Importance):
    """Combines the saliencies of the members of a torch_pruning group."""

    def __init__(self, criterion: Any, group_reduction: str = "sum", normalizer: str | None = None):
        check_name("group_reduction", group_reduction, REDUCTIONS)
        check_name("normalizer", normalizer, NORMALIZERS)
        self.criterion: Criterion = resolve_criterion(criterion)
        self.group_reduction, self.normalizer = group_reduction, normalizer

    @torch.no_grad()
    def __call__(self, group: tp.dependency.Group) -> Tensor | None:
        """Return the score of each channel of a group, shape (channels,), or None where nothing of it can be scored."""
        channels = {channel: index for index, channel in enumerate(group[0].idxs)}
        parts, parameters, seen = [], 0.0, set()
        for item in group:
            for layer, key in _axes(item, group._DG):
                where = (places(layer, LayerAxis("", key)), tuple(item.idxs))
                if where in seen:  # tied parameters are one member
                    continue
                seen.add(where)
                positions = torch.tensor(item.idxs)
                axis = layer_axes(layer)[key]
                evidence = Evidence(layer, axis, products=self._products(layer, key))
                saliency = self.criterion.saliency(layer, axis, evidence).detach().double().cpu()[positions]
                index = torch.tensor([channels[channel] for channel in item.root_idxs])
                parts.append(torch.zeros(len(channels), dtype=torch.float64).index_add_(0, index, saliency))
                own = own_parameters(layer)
                of_one = sum(own[slot.tensor].numel() // axis.width for slot in parameter_slots(layer, axis))
                parameters += of_one * len(positions) / len(channels)
        if not parts:
            return None
        return normalize(combine(parts, self.group_reduction), self.normalizer, round(parameters)).float()

    def _products(self, layer: nn.Module, key: str) -> Tensor | None:
        return None


class WHCImportance(_GroupImportance):
    """The weighted hybrid criterion (Chen et al. 2023) for torch_pruning's pruners; needs no data."""

    def __init__(self, group_reduction: str = "sum", normalizer: str | None = None):
        super().__init__("whc", group_reduction, normalizer)


class JacobianImportance(_GroupImportance):
    """The Jacobian Criterion for torch_pruning's pruners: wᵀ(JᵀJ)w of every member (Chen et al. 2025).

    Score before each pruning step, by `score`, or by a loop of ``loss.backward()``, ``accumulate_grad(model)`` and a
    final ``accumulate_score(model)``.
    """

    def __init__(self, group_reduction: str = "sum", normalizer: str | None = None):
        super().__init__("jacobian", group_reduction, normalizer)
        self._pending: Axes = {}
        self._scores: Axes = {}

    def zero_grad(self) -> None:
        """Forget the rows accumulated since the last `accumulate_score`."""
        self._pending = {}

    def zero_score(self) -> None:
        """Forget the scores."""
        self._scores = {}

    def accumulate_grad(self, model: nn.Module) -> None:
        """Add one row of J: the gradients that the model's parameters hold after one backward pass.

        Clear them before the next one (``model.zero_grad()``), as in training.

        Raises:
            ValueError: no parameter holds a gradient.
        """
        seen = False
        for name in _all_axes(model):
            layer = get_layer(model, name.layer)
            gradients = {key: p.grad for key, p in own_parameters(layer).items()}
            slots = parameter_slots(layer, find_axis(layer, name))
            if any(gradients[slot.tensor] is None for slot in slots):
                continue
            products = [channel_sum(own_parameters(layer)[s.tensor].detach() * gradients[s.tensor], s) for s in slots]
            _add(self._pending, (layer, name.axis), sum(products).double().square())
            seen = True
        if not seen:
            raise ValueError("no parameter of the model holds a gradient: call accumulate_grad after loss.backward()")

    def accumulate_score(self, model: nn.Module) -> None:
        """Add the accumulated rows to the scores."""
        if not self._pending:
            raise ValueError("no rows to score: call accumulate_grad(model) after each loss.backward() first")
        for axis, squares in self._pending.items():
            _add(self._scores, axis, squares)
        self.zero_grad()

    def score(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        rows: Rows = "batch",
        objective: Objective = classification,
    ) -> JacobianImportance:
        """Score the model afresh on batches (see `jacobian_products` for rows and objective); return self."""
        squares = sum_squares(stream_products(model, batches, _all_axes(model), rows=rows, objective=objective))
        self._scores = {(get_layer(model, name.layer), name.axis): value for name, value in squares.items()}
        return self

    def _products(self, layer: nn.Module, key: str) -> Tensor:
        squares = self._scores.get((layer, key))
        if squares is None:
            raise ValueError(f"a {type(layer).__name__} was not scored: call score(model, batches) before pruning")
        width = layer_axes(layer)[key].width
        if len(squares) != width:
            raise ValueError(
                f"a {type(layer).__name__} was scored with {len(squares)} channels and now has {width}: "
                "call score(model, batches) again before the next pruning step"
            )
        return squares


def _all_axes(model: nn.Module) -> tuple[LayerAxis, ...]:
    """Return the axes of all known layers and of the parameters that no known layer owns."""
    owned = {id(p) for _, layer in scored_layers(model) for p in layer.parameters()}
    bare = [LayerAxis(name, "out") for name, p in model.named_parameters() if id(p) not in owned and layer_axes(p)]
    return (*model_axes(model), *bare)


def _add(totals: Axes, axis: tuple[nn.Module, str], value: Tensor) -> None:
    known = totals.get(axis)
    totals[axis] = value if known is None or known.shape != value.shape else known + value


def _axes(item: Any, graph: tp.DependencyGraph) -> list[tuple[nn.Module, str]]:
    """Return the (layer, axis) pairs with parameters that one item of a torch_pruning group stands for."""
    layer = item.dep.target.module
    if tp.ops.module2type(layer) not in tp.function.PrunerBox:
        return []
    key = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
    pairs = [(layer.get_submodule(name) if name else layer, axis) for name, axis, _ in expand_axes(layer, "", key)]
    return [(part, axis) for part, axis in pairs if parameter_slots(part, layer_axes(part)[axis])]


def expand_axes(module: nn.Module | nn.Parameter, name: str, key: str) -> list[tuple[str, str, int]]:
    """Return (layer, axis, width) of all axes that torch_pruning treats as one item, given its module and direction."""
    if has_role(module, "attention"):
        both = [(name, "in", module.embed_dim), (name, "out", module.embed_dim)]
        projection = f"{name}.out_proj" if name else "out_proj"
        return [*both, (projection, "in", module.embed_dim), (projection, "out", module.embed_dim)]
    axes = layer_axes(module, name)
    key = key if key in axes else "out"
    return [(name, key, axes[key].width)] if axes else []
