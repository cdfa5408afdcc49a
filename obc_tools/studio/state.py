"""What a session of interactive pruning knows, as data: the choices made, undo and redo, plans that are remembered.

A choice is a value, a plan a function of choices, scores and costs; `to_code` writes the same function as Python.
`widgets.PruningStudio` is a view of this.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..data.batches import inputs_and_targets
from ..data.data import Data
from ..errors import UnknownNameError
from ..measure.costs import CostModel
from ..pruning.choices import Limits, Scoring, Selection, Target
from ..pruning.order import RemovalOrder, removal_order
from ..pruning.plan import PlanMismatchError, PruningPlan
from ..scoring.tasks import CLASSIFICATION
from ..structure.groups import ChannelGroup
from ..structure.layers import LayerAxis

START = Target(ratio=0.3)
STEPS_BACK = 200
"""Choices that undo can go back to; older ones are forgotten."""


@dataclass(frozen=True)
class Choices:
    """Everything that a plan depends on but the scores and costs themselves.

    Attributes:
        scoring, target, limits: as of all pruning; in ``limits`` what single groups may lose at most.
        locked: groups that stay as they are, (root, kept channels) pairs.
        by_hand: (root, channel, whether it is kept), whatever its score; in a group of blocks the channel of the first
            block. The target is met with them counted in.
    """

    scoring: Scoring = field(default_factory=Scoring)
    target: Target = START
    limits: Limits = field(default_factory=Limits)
    locked: tuple[tuple[LayerAxis, tuple[int, ...]], ...] = ()
    by_hand: tuple[tuple[LayerAxis, int, bool], ...] = ()

    @property
    def ranking_key(self) -> Choices:
        """The choices without those that a ranking does not depend on: equal where a ranking can be used again."""
        return replace(self, target=START, by_hand=())

    def rank(self, scores: Mapping[ChannelGroup, Tensor]) -> RemovalOrder:
        """Rank the channels; what takes longest of a plan, and does not depend on the target."""
        return removal_order(scores, self.limits, fixed=dict(self.locked))

    def plan(self, order: RemovalOrder, costs: CostModel) -> PruningPlan:
        """Return the plan that these choices and a ranking by them lead to: where they miss the target, the nearest.

        Raises:
            ValueError: a group that the choices by hand leave without channels.
        """
        return order.by_hand(self.hands).reach(self.target, costs)

    @property
    def hands(self) -> dict[LayerAxis, tuple[list[int], list[int]]]:
        """The channels to keep and those to remove by hand, by root."""
        found: dict[LayerAxis, tuple[list[int], list[int]]] = {}
        for root, channel, keep in self.by_hand:
            found.setdefault(root, ([], []))[0 if keep else 1].append(channel)
        return found


@dataclass(frozen=True)
class StudioState:
    """The present choices, those to go back and forward to, and those that were given a name."""

    choices: Choices = Choices()
    past: tuple[Choices, ...] = ()
    future: tuple[Choices, ...] = ()
    remembered: tuple[tuple[str, Choices], ...] = ()


def change(state: StudioState, choices: Choices, *, merge: bool = False) -> StudioState:
    """Make other choices. With ``merge`` the present ones are not kept for undo: one drag of a slider is one step."""
    if choices == state.choices:
        return state
    past = state.past if merge and state.past else (*state.past, state.choices)[-STEPS_BACK:]
    return replace(state, choices=choices, past=past, future=())


def undo(state: StudioState) -> StudioState:
    """Go back to the choices before; where there are none, nothing changes."""
    if not state.past:
        return state
    return replace(state, choices=state.past[-1], past=state.past[:-1], future=(*state.future, state.choices))


def redo(state: StudioState) -> StudioState:
    """Take back an undo; where there is none, nothing changes."""
    if not state.future:
        return state
    return replace(state, choices=state.future[-1], past=(*state.past, state.choices), future=state.future[:-1])


def remember(state: StudioState, name: str) -> StudioState:
    """Give the present choices a name, in place of what had it before; raise ValueError for an empty one."""
    if not name.strip():
        raise ValueError("a plan to be remembered needs a name")
    others = tuple(entry for entry in state.remembered if entry[0] != name)
    return replace(state, remembered=(*others, (name, state.choices)))


def limit_of(choices: Choices, root: LayerAxis) -> float:
    """Return the share of a group's channels that may go at most: its own limit, or that of all groups."""
    return choices.limits.max_ratio_of.get(root, choices.limits.max_ratio)


def set_limit(choices: Choices, root: LayerAxis, max_ratio: float | None) -> Choices:
    """Let at most this share of one group's channels go; None takes the limit away."""
    others = {key: value for key, value in choices.limits.max_ratio_of.items() if key != root}
    own = {} if max_ratio is None else {root: max_ratio}
    return replace(choices, limits=replace(choices.limits, max_ratio_of=others | own))


def lock(choices: Choices, plan: PruningPlan, root: LayerAxis) -> Choices:
    """Hold a group at what a plan keeps of it, choices by hand included, whatever the target becomes."""
    locked = dict(choices.locked) | {LayerAxis(*root): plan.kept_of(root)}
    by_hand = tuple(entry for entry in choices.by_hand if entry[0] != root)
    return replace(choices, locked=tuple(sorted(locked.items())), by_hand=by_hand)


def unlock(choices: Choices, root: LayerAxis) -> Choices:
    """Let a locked group follow the target again."""
    return replace(choices, locked=tuple(entry for entry in choices.locked if entry[0] != root))


def toggle_channel(choices: Choices, plan: PruningPlan, root: LayerAxis, channel: int) -> Choices:
    """Keep a channel that a plan of these choices removes, or remove one that it keeps.

    Raises:
        ValueError: an unknown group or channel, a group that is kept whole, or the last channel of a group that is not
            removed by hand: for another one that goes, one of those that the target removes comes back.
    """
    group = next((group for group in plan.groups if group.root == root), None)
    if group is None:
        raise UnknownNameError("group", str(LayerAxis(*root)), [str(known.root) for known in plan.groups])
    keep, first = channel not in plan.kept_of(root), channel % (group.width // group.blocks)
    others = [entry for entry in choices.by_hand if entry[:2] != (group.root, first)]
    gone = {channel for known, channel, stays in others if known == group.root and not stays}
    chosen = {"keep": [channel], "remove": gone} if keep else {"remove": gone | {channel}}
    PruningPlan.whole(plan.groups).choose(group, **chosen)
    return replace(choices, by_hand=tuple(sorted([*others, (group.root, first, keep)])))


def plan_changes(before: PruningPlan, after: PruningPlan) -> pd.DataFrame:
    """Return one row a group that two plans for one model treat differently.

    Columns: group, channels, kept before, kept after, removed (the channels that only the second removes), restored.

    Raises:
        PlanMismatchError: plans for different groups.
    """
    if before.groups != after.groups:
        raise PlanMismatchError("the two plans are for different groups and cannot be compared")
    rows = [
        (
            str(group.root),
            group.width,
            len(one),
            len(other),
            tuple(sorted(set(one) - set(other))),
            tuple(sorted(set(other) - set(one))),
        )
        for group, one, other in zip(before.groups, before.kept, after.kept, strict=True)
        if one != other
    ]
    return pd.DataFrame(rows, columns=["group", "channels", "kept before", "kept after", "removed", "restored"])


@dataclass(frozen=True)
class Setup:
    """How a session got what its choices work on; for `to_code`.

    Attributes:
        image_shape: of one image, (channels, height, width).
        selection: which channels may go at all.
        batches, batch_size: calibration batches of the split ``train``, those of the first pass by ``seed``.
        device: where model and batches are.
        dtype: of the network, where the data's inputs are in another; None: as the data is.
        task: name of what the network is for.
    """

    image_shape: tuple[int, ...]
    selection: Selection = field(default_factory=Selection)
    batches: int = 10
    batch_size: int = 64
    seed: int = 0
    device: str = "cpu"
    task: str = CLASSIFICATION.name
    dtype: torch.dtype | None = None


def place_of(model: nn.Module, data: Data) -> tuple[str, torch.dtype | None]:
    """Return a network's device, and the one precision of its parameters where the data's inputs have another."""
    parameters, one = list(model.parameters()), data.batches("val" if data.train is None else "train", 1)
    own, given = (
        {tensor.dtype for tensor in tensors if isinstance(tensor, Tensor) and tensor.is_floating_point()}
        for tensors in (parameters, tree_leaves(inputs_and_targets(next(iter(one.at(0))))[0]))
    )
    return str(parameters[0].device) if parameters else "cpu", own.pop() if len(own) == 1 and given - own else None


def as_keywords(device: str, dtype: torch.dtype | None) -> str:
    """Return where tensors are made as Python that follows other arguments: nothing where that is as usual."""
    said = "" if device == "cpu" else f", device={device!r}"
    return said if dtype is None else f"{said}, dtype={dtype}"


def usual_batches(data: Data, size: int) -> int:
    """Return how many calibration batches are used where nobody says: 10, or all that a pass holds."""
    return min(10, len(data.batches("train", size)))


def to_code(choices: Choices, setup: Setup, *, nearest: bool = False) -> str:
    """Return Python that makes the plan of some choices out of ``model`` and ``data``, and the pruned network of it.

    For a task that is no classification also out of ``task``. ``nearest``: of choices that miss their target.
    """
    scoring, limits, (kind, value) = choices.scoring, choices.limits, choices.target.given
    on = as_keywords(setup.device, setup.dtype)
    data = ["batches"] if scoring.needs_data else []
    drawn = f'batches = obc.take(data.batches("train", {setup.batch_size}, seed={setup.seed}{on}), {setup.batches})'
    chosen, heads = _unusual(setup.selection, "ignore", "whole_heads", "only"), _unusual(setup.selection, "whole_heads")
    by_task = setup.task != CLASSIFICATION.name
    criterion = scoring.criterion if scoring.rows is None else (scoring.criterion, {"rows": scoring.rows})
    scored = ["model", "groups", repr(criterion), *data, *_unusual(scoring, "group_reduction", "normalizer")]
    scored += ["objective=task.losses"] if by_task and data else []
    one = f'data.batches("train", 1{on})'
    zeros = f"torch.zeros({', '.join(map(str, (1, *setup.image_shape)))}{on})"
    limited = _unusual(limits, "scope", "round_to", "min_channels", "max_ratio")
    named = {"max_ratio_of": limits.max_ratio_of, "fixed": dict(choices.locked), "by_hand": choices.hands}
    for option, entries in named.items():
        limited += [f"{option}={ {tuple(root): entry for root, entry in entries.items()}!r}"] if entries else []
    limited += ["nearest=True"] if nearest else []
    lines = [
        f"example = {f'task.example(next(iter({one})))' if by_task else zeros}",
        *_call("groups = obc.find_groups", ["model", "example", *chosen]),
        *[drawn for _ in data],
        *_call("scores = obc.score_groups", scored),
        *_call("costs = obc.cost_model", ["model", "example", *heads]),
        *_call("plan = obc.one_shot_plan", ["scores", "costs", f"{kind}={value!r}", *limited]),
    ]
    return as_program("\n".join([*lines, "pruned = obc.prune(model, plan)"]))


def as_program(calls: str) -> str:
    """Return calls as a program that runs as it stands where the names are that it begins by saying."""
    names = [name for name in ("model", "data", "task") if re.search(rf"\b{name}\b(?! ?=)", calls)]
    said = f"# out of {', '.join(names)}\n" if names else ""
    torch, plots = (line * (f"{name}." in calls) for name, line in IMPORTED.items())
    return f"{said}{torch}import obc_tools as obc\n{plots}\n{calls}\n"


IMPORTED = {"torch": "import torch\n\n", "plots": "from obc_tools import plots\n"}


def _unusual(value: Selection | Scoring | Limits, *names: str) -> list[str]:
    """Return the fields of a value that are not as by default, as keyword arguments."""
    usual = type(value)()
    found = {name: getattr(value, name) for name in names if getattr(value, name) != getattr(usual, name)}
    return [f"{name}={list(value) if isinstance(value, tuple) else value!r}" for name, value in found.items()]


def _call(start: str, arguments: list[str]) -> list[str]:
    """Return the lines of a call: one if it fits, else one an argument."""
    line = f"{start}({', '.join(arguments)})"
    return [line] if len(line) <= 100 else [f"{start}(", *(f"    {argument}," for argument in arguments), ")"]
