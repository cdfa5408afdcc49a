"""What each group alone is worth: one group pruned at a time, at several ratios, and the network measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..measure.costs import CostModel
from ..measure.metrics import Metrics, TaskMetrics
from ..pruning.choices import OPERATIONS, Limits, Scoring, Selection, values_of
from ..pruning.order import removal_order
from ..pruning.plan import PruningPlan, prune
from ..pruning.reachable import unscored
from ..scoring.objectives import Objective
from ..scoring.scores import Scores
from ..scoring.tasks import CLASSIFICATION, Task, evaluate, find_task
from ..structure.groups import ChannelGroup
from .comparison import ComparisonError
from .prefix import Prefixes, first_uses, named_tensors


@dataclass(frozen=True, eq=False, repr=False)
class Sensitivity:
    """What `sensitivity` found.

    Attributes:
        frame: one row a group and ratio, in the network's order, the whole network first, its ``group`` "". Columns:
            ``ratio`` asked for; ``removed`` of ``channels``; ``macs`` of one example and ``params``; the metrics.
        directions: metric -> "higher" or "lower", whichever is better; the first is the headline.
    """

    frame: pd.DataFrame
    directions: Mapping[str, str]

    def to_frame(self) -> pd.DataFrame:
        """Return the table, one row a group and ratio."""
        return self.frame

    def lost(self, metric: str | None = None) -> pd.DataFrame:
        """Return how much worse a metric is, by default the headline: a row a group, a column a ratio."""
        metric = metric or next(iter(self.directions))
        if metric not in self.frame:
            raise ComparisonError(f"'{metric}' was not measured; there are {', '.join(self.directions)}")
        table = (
            self.frame[1:].pivot(index="group", columns="ratio", values=metric).loc[self.frame["group"][1:].unique()]
        )
        worse = self.frame[metric][0] - table
        return worse if self.directions[metric] == "higher" else -worse

    def plot(self, metric: str | None = None, *, look: str = "light"):
        """Draw how much worse a metric gets, as a heat map of groups and ratios."""
        from ..plots.plans import plot_sensitivity

        return plot_sensitivity(self.lost(metric), metric or next(iter(self.directions)), look=look)

    def __repr__(self) -> str:
        return self.lost().to_string(float_format="{:.4g}".format)

    def _repr_html_(self) -> str:
        return self.lost().to_html(float_format="{:.4g}".format)


def sensitivity(
    model: nn.Module,
    example_inputs: Any,
    held_out: Iterable[Any],
    batches: Iterable[Any] | None = None,
    *,
    ratios: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    criterion: Any = "l2",
    task: str | Task = CLASSIFICATION,
    objective: Objective | None = None,
    reuse: bool = True,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> Sensitivity:
    """Prune each group alone, at several ratios, and measure what is left of the network.

    Channels are scored once, on the whole network; of a group the lowest-scored go. Nothing is trained.

    Args:
        model: left unchanged.
        example_inputs: what one forward pass takes; MACs are counted for one example of it.
        held_out: batches to measure on, gone through again for every network.
        batches: what to score on, for criteria that need data.
        ratios: shares of each group's channels that go at most, in (0, 1).
        criterion, task, objective: as in `prune_to`.
        reuse: run what comes before a group once, not for every ratio, and keep of it what the rest needs, for all of
            ``held_out``. The numbers are the same; where a network does not allow it, whole passes are run.
        settings: the other keywords of `prune_to` that say how channels are scored, which may go and what every group
            keeps.

    Raises:
        ValueError: no ratios or one out of range, batches that can be gone through only once, nothing that can be
            pruned, what `evaluate` and `score_groups` raise.
    """
    if not ratios or not all(0 < ratio < 1 for ratio in ratios):
        raise ValueError(f"ratios={tuple(ratios)}: expected shares of a group's channels in (0, 1)")
    if isinstance(held_out, Iterator):
        raise ValueError(f"held_out: a {type(held_out).__name__} can be gone through only once; pass a list of batches")
    task = find_task(task)
    task = task if task.against is None else task.against(model)
    scored = {"criterion": criterion, "objective": objective or task.losses}
    selection, scoring, limits = values_of(dict(settings, **scored), Selection, Scoring, Limits)
    groups, costs = selection.analyse(model, example_inputs, OPERATIONS)
    unscored(groups, limits).check_prunable()
    measured = partial(evaluate, batches=held_out, task=task)
    bench = _Bench(model, costs, limits, scoring.score(model, groups, batches, seed), measured, reuse)
    total = 1 + len(ratios) * sum(group.prunable for group in groups)
    found = list(tqdm(bench.rows(ratios), "sensitivity", total, disable=not progress, leave=False))
    order = ["", *(str(group.root) for group in groups)]
    return Sensitivity(pd.DataFrame(sorted(found, key=lambda row: order.index(row["group"]))), task.directions)


@dataclass(frozen=True, eq=False)
class _Bench:
    model: nn.Module
    costs: CostModel
    limits: Limits
    scores: Scores
    measured: Callable[[nn.Module], Metrics | TaskMetrics]
    reuse: bool

    def rows(self, ratios: Sequence[float]) -> Iterator[dict[str, Any]]:
        """Yield the rows, of the groups that are used last in the end, so that what is known of a pass grows."""
        whole = PruningPlan.whole(self.scores)
        network, prefixes = prune(self.model, whole), Prefixes()
        found, first = first_uses(network, self.measured)
        widths = {name: tensor.shape for name, tensor in named_tensors(network).items()}
        yield self._row(None, 0.0, whole, found)
        for group in sorted(filter(attrgetter("prunable"), self.scores), key=lambda group: _begin(group, first)):
            others = {other.root: 0.0 for other in self.scores if other is not group}
            alone = replace(self.limits, scope="local", max_ratio_of={**self.limits.max_ratio_of, **others})
            order = removal_order(self.scores, alone)
            for ratio in ratios:
                plan, values = order.plan(order.up_to(ratio)), found
                if plan.channels_removed:
                    pruned = prune(self.model, plan)
                    parting = _changed(named_tensors(pruned), widths)
                    values = prefixes.measure(pruned, parting, self.measured) if self.reuse else self.measured(pruned)
                yield self._row(group, ratio, plan, values)

    def _row(
        self, group: ChannelGroup | None, ratio: float, plan: PruningPlan, found: Metrics | TaskMetrics
    ) -> dict[str, Any]:
        cost, width = self.costs.of(plan), plan.channels if group is None else group.width
        return {
            "group": "" if group is None else str(group.root),
            "ratio": ratio,
            "removed": plan.channels_removed,
            "channels": width,
            "macs": cost.macs,
            "params": cost.params,
            **found.values,
        }


def _begin(group: ChannelGroup, first: Mapping[str, int]) -> int:
    """Return when a group's layers are used first."""
    layers = {member.axis.layer for member in (*group.members, *group.attributes)}
    return min((call for name, call in first.items() if _layer(name) in layers or name in layers), default=0)


def _changed(tensors: Mapping[str, Tensor], widths: Mapping[str, torch.Size]) -> list[Tensor]:
    """Return the tensors of the layers in which one has lost channels."""
    layers = {_layer(name) for name, tensor in tensors.items() if tensor.shape != widths[name]}
    return [tensor for name, tensor in tensors.items() if _layer(name) in layers]


def _layer(name: str) -> str:
    return name.rpartition(".")[0]
