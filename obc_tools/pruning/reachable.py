"""How far pruning can go: the range of every target, before any scoring."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import nn

from ..measure.costs import Cost, CostModel
from ..structure.groups import ChannelGroup
from .choices import OPERATIONS, Limits, Selection, Target, values_of
from .order import RemovalOrder, removal_order
from .plan import PruningPlan

logger = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class Reach:
    """What every target can be, from nothing removed to all that may go.

    Attributes:
        original, least: the cost of the whole network, and where all goes that may.
        ratio: the share of the prunable channels that goes then.
    """

    original: Cost
    least: Cost
    ratio: float

    def of(self, kind: str) -> tuple[float, float]:
        """Return the first and the last value of a kind of target: "speedup", "macs", "params" or "ratio"."""
        return tuple(self.to_frame().set_index("target").loc[kind])

    def to_frame(self) -> pd.DataFrame:
        """Return one row a kind of target: its value "from" where nothing goes "to" where all goes that may."""
        first, last = self.original, self.least
        rows = [
            ("speedup", 1.0, first.macs / last.macs),
            ("macs", first.macs, last.macs),
            ("params", first.params, last.params),
            ("ratio", 0.0, self.ratio),
        ]
        return pd.DataFrame(rows, columns=["target", "from", "to"])

    def __repr__(self) -> str:
        return self.to_frame().to_string(index=False, float_format="{:,.4g}".format)

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(index=False, float_format="{:,.4g}".format)


def reachable(model: nn.Module, example_inputs: Any, *, counting: str = OPERATIONS, **settings: Any) -> Reach:
    """Say how far a network can be pruned, in every kind of target at once; nothing is scored.

    Args:
        model: left unchanged.
        example_inputs: what one forward pass takes; MACs are counted for one example of it.
        counting: what MACs are, as in `prune_to`.
        settings: the keywords of `prune_to` that say what may go and what every group keeps: ignore, whole_heads,
            only, round_to, max_ratio, min_channels, scope.

    Raises:
        ValueError: an unknown setting, one out of range, nothing that can be pruned.
    """
    selection, limits = values_of(settings, Selection, Limits)
    return reach_of(*selection.analyse(model, example_inputs, counting), limits)


def reach_of(groups: Iterable[ChannelGroup], costs: CostModel, limits: Limits) -> Reach:
    """Return how far groups can be pruned within limits."""
    order = unscored(groups, limits)
    order.check_prunable()
    return Reach(costs.original, costs.of(order.least), order.share_gone(order.least))


def check_reachable(target: Target, whole: PruningPlan, limits: Limits, costs: CostModel) -> None:
    """Raise ValueError, before any scoring, where even all that the limits allow to go would not meet a target.

    The log says which operations a target of MACs leaves out, for want of a formula.
    """
    if costs.original.unknown and target.given[0] in ("speedup", "macs"):
        logger.warning("%s: MACs leave out %s, which has no formula", target, ", ".join(costs.original.unknown))
    unscored(whole.groups, limits).check(target, costs)


def unscored(groups: Iterable[ChannelGroup], limits: Limits) -> RemovalOrder:
    """Return an order of removal of groups that are not scored, for what does not depend on scores."""
    return removal_order({group: torch.zeros(group.width) for group in groups}, limits)
