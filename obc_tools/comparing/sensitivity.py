"""What each group alone is worth: one group pruned at a time, at several ratios, and the network measured.

The start of a forward pass that these networks share is run once. What is replayed is what code outside torch sees: the
results of torch's functions, in their order. Of those only what is still in use where the networks part is kept; the
others are stood in for by tensors without data, so that whatever would compute with one fails instead of giving a wrong
number.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from tqdm.auto import tqdm

from ..measure.costs import CostModel
from ..measure.metrics import Metrics, TaskMetrics
from ..pruning.choices import OPERATIONS, Limits, Scoring, Selection, values_of
from ..pruning.order import removal_order, unscored
from ..pruning.plan import PruningPlan, prune
from ..scoring.objectives import Objective
from ..scoring.scores import Scores
from ..scoring.tasks import CLASSIFICATION, Task, evaluate
from ..state import calling
from ..structure.groups import ChannelGroup
from .compare import ComparisonError, measured_task

logger = logging.getLogger(__name__)


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
        alone = self.frame[1:]
        table = alone.pivot(index="group", columns="ratio", values=metric).loc[alone["group"].unique()]
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
    task = measured_task(task, model, held_out)
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
        network, starts = prune(self.model, whole), {}
        found, running = self.measured(network), [axis.layer for axis in self.costs.axes]
        widths = {name: tensor.shape for name, tensor in named_tensors(network).items()}
        yield self._row(None, 0.0, whole, found)
        prunable = [group for group in self.scores if group.prunable]
        for group in sorted(prunable, key=lambda group: min(running.index(m.axis.layer) for m in group.members)):
            others = {other.root: 0.0 for other in self.scores if other is not group}
            alone = replace(self.limits, scope="local", max_ratio_of={**self.limits.max_ratio_of, **others})
            order = removal_order(self.scores, alone)
            for ratio in ratios:
                plan, values = order.plan(order.up_to(ratio)), found
                if plan.channels_removed:
                    pruned = prune(self.model, plan)
                    parting = _changed(named_tensors(pruned), widths)
                    values = replay(starts, pruned, parting, self.measured) if self.reuse else self.measured(pruned)
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


def _changed(tensors: Mapping[str, Tensor], widths: Mapping[str, torch.Size]) -> list[Tensor]:
    """Return the tensors of the layers in which one has lost channels."""
    layers = {_layer(name) for name, tensor in tensors.items() if tensor.shape != widths[name]}
    return [tensor for name, tensor in tensors.items() if _layer(name) in layers]


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


Call = tuple[Callable, list[Any]]
"""A function of torch's and the numbers and names that it was called with."""


class PrefixError(RuntimeError):
    """A forward pass that does not begin as the one before."""


class _Pass(TorchFunctionMode):
    """One forward pass: what is known of its start is replayed, what follows is noted up to the first use of a tensor.

    Those tensors are ``parting``; ``calls`` and ``results`` are given of a pass before, or empty, and held of this one
    after it.
    """

    def __init__(self, calls: list[Call], results: list[Any], parting: Iterable[Tensor]):
        super().__init__()
        self.known, self.kept, self.given = calls, results, copy.deepcopy(results)
        self.parting = {id(tensor) for tensor in parting}
        self.calls: list[Call] = []
        self.results: list[Any] = []
        self.parted = False

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.parted:
            return func(*args, **kwargs)
        leaves, number = tree_leaves((args, kwargs)), len(self.calls)
        if any(id(leaf) in self.parting for leaf in leaves):
            self._part()
            return func(*args, **kwargs)
        call = (func, [leaf for leaf in leaves if not isinstance(leaf, Tensor)])
        if number < len(self.known):
            if self.known[number] != call:
                raise PrefixError(f"call {number} of {getattr(func, '__name__', func)} differs from the pass before")
            result, self.given[number] = self.given[number], None
        else:
            result = func(*args, **kwargs)
        self.calls.append(call)
        self.results.append(tree_map(lambda leaf: weakref.ref(leaf) if isinstance(leaf, Tensor) else leaf, result))
        return result

    def _part(self) -> None:
        if len(self.calls) < len(self.known):
            raise PrefixError(f"the networks part after {len(self.calls)} calls, the pass before after more")
        self.parted, nothing = True, torch.empty(0, device="meta")
        if len(self.calls) == len(self.known):
            self.results = self.kept
        else:
            self.results = copy.deepcopy(tree_map(lambda leaf: _alive(leaf, nothing), self.results))


def _alive(leaf: Any, nothing: Tensor) -> Any:
    if not isinstance(leaf, weakref.ref):
        return leaf
    tensor = leaf()
    return nothing if tensor is None else tensor


Starts = dict[int, tuple[list[Call], list[Any]]]
"""What networks share of the passes over the same batches, by the number of the pass; one start of each is kept."""


def replay(starts: Starts, network: nn.Module, parting: Iterable[Tensor], measured: Callable[[nn.Module], Any]) -> Any:
    """Return what a function makes of a network of our own, whose passes are replayed as far as they are known.

    ``parting``: tensors of the network before whose first use it is as those before. Where a pass cannot be replayed,
    whole ones are run.
    """
    parting, numbers, forward = list(parting), count(), network.forward

    def replayed(*args: Any, **kwargs: Any) -> Any:
        number = next(numbers)
        with _Pass(*starts.get(number, ([], [])), parting) as run:
            output = forward(*args, **kwargs)
        if run.parted:
            starts[number] = (run.calls, run.results)
        return output

    try:
        with calling(network, replayed):
            return measured(network)
    except Exception as error:
        logger.info("what comes before the group is run again: %s: %s", type(error).__name__, error)
        starts.clear()
        return measured(network)


def named_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a network by name."""
    parameters = network.named_parameters(remove_duplicate=False)
    return dict([*parameters, *network.named_buffers(remove_duplicate=False)])
