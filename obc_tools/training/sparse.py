"""Sparse training, the step before pruning: group regularisation drives the weakest channels towards zero.

After DepGraph (Fang et al. 2023, section 3.3, as torch_pruning's GroupNormPruner does it): in every step, each weight w
of a channel gets reg · 16^((s_max − s) / (s_max − s_min)) · w added to its gradient, s the norm of all weights of the
channel in its group, s_max and s_min the largest and smallest in the group. Biases are left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import to_device
from ..scoring.tasks import CLASSIFICATION, Task, find_task
from ..structure.groups import ChannelGroup, Member, find_groups
from ..structure.layers import Slot, channel_dims, channel_sum, get_layer, layer_axes, own_parameters
from .fit import check_batches, fit
from .folder import History
from .recipe import Recipe

STRONGEST = 16.0
"""How many times more the weakest channel of a group is shrunk than the strongest."""


class GroupPenalty:
    """Adds the gradient of group regularisation to a model's gradients; call it after backward.

    Args:
        model: Whose gradients are added to.
        groups: Its groups; those that are kept whole are left alone.
        strength: reg of the formula.
    """

    def __init__(self, model: nn.Module, groups: Iterable[ChannelGroup], strength: float):
        self._strength = strength
        prunable = [group for group in groups if group.prunable]
        self._groups = [(g.width, [part for m in g.members for part in _parts(model, m)]) for g in prunable]

    @torch.no_grad()
    def __call__(self) -> None:
        for width, parts in self._groups:
            squares = parts[0]._parameter.new_zeros(width)
            for part in parts:
                part.add_squares(squares)
            strengths = self._strength * _relative_strengths(squares.sqrt())
            for part in parts:
                part.shrink(strengths)


class _Part:
    """The weights of one tensor that belong to the channels of a group."""

    def __init__(self, parameter: nn.Parameter, slot: Slot, member: Member):
        self._parameter, self._slot, self._width = parameter, slot, member.width
        self._positions = torch.tensor(member.positions, device=parameter.device)
        self._channels = torch.tensor(member.channels, device=parameter.device)

    def add_squares(self, sums: Tensor) -> None:
        """Add the squares of each channel's weights to sums (channels,)."""
        squares = channel_sum(self._parameter.detach().square(), self._slot)
        sums.index_add_(0, self._channels, squares[self._positions])

    def shrink(self, strengths: Tensor) -> None:
        """Add each channel's strength times its weights to their gradients."""
        if self._parameter.grad is None:
            return
        at = strengths.new_zeros(self._width)
        at.index_add_(0, self._positions, strengths[self._channels])
        gradient, dims = channel_dims(self._parameter.grad, self._slot)
        weight, _ = channel_dims(self._parameter.detach(), self._slot)
        shape = [size if dim in dims else 1 for dim, size in enumerate(weight.shape)]
        gradient += at.view(shape) * weight


def _parts(model: nn.Module, member: Member) -> Iterator[_Part]:
    layer = get_layer(model, member.axis.layer)
    parameters = own_parameters(layer)
    for slot in layer_axes(layer, member.axis.layer)[member.axis.axis].slots:
        if slot.tensor in parameters and not slot.tensor.endswith("bias"):
            yield _Part(parameters[slot.tensor], slot, member)


def _relative_strengths(norms: Tensor) -> Tensor:
    """Return 16^((s_max − s) / (s_max − s_min)), and 1 where all norms are equal."""
    spread = norms.max() - norms.min()
    share = torch.where(spread > 0, (norms.max() - norms) / spread, torch.zeros_like(norms))
    return STRONGEST**share


def sparse_train(
    model: nn.Module,
    train: Iterable[Any],
    val: Iterable[Any],
    recipe: Recipe,
    *,
    ignore: Iterable[nn.Module | str] = (),
    task: str | Task = CLASSIFICATION,
    **options: Any,
) -> History:
    """Train a model in place with group regularisation, so that channels can be pruned at less loss.

    Args:
        model, train, val, task: As of `fit`.
        recipe: How to train; ``group_penalty`` is the strength. The paper: 5e-4 (CIFAR) or 1e-4, no weight decay.
        ignore: Layers whose outputs keep their width, and which are not regularised (see `find_groups`).
        **options: Handed to `fit`: ``run``, ``resume``, ``teacher``, ``stop``, ``progress``, ``on_epoch``.

    Raises:
        ValueError: for a recipe without group_penalty, and what `fit` raises.
    """
    if not recipe.group_penalty:
        raise ValueError("sparse training needs a recipe with group_penalty above 0 (the paper: 5e-4 on CIFAR)")
    check_batches(val, "val")
    task, first = find_task(task), next(iter(val))
    example = first[0][:1] if task is CLASSIFICATION else task.example(first)
    groups = find_groups(model, to_device(example, next(model.parameters()).device), ignore=ignore)
    penalty = GroupPenalty(model, groups, recipe.group_penalty)
    return fit(model, train, val, recipe, regularize=penalty, task=task, **options)
