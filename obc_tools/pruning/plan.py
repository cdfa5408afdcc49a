"""Which channels of which group stay, as data."""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from numbers import Integral
from typing import Any

import pandas as pd
from torch import nn

from ..errors import PlanMismatchError, check_name
from ..files import parse_json
from ..state import without_weight_norms
from ..structure.configs import follow_config
from ..structure.groups import ChannelGroup, Member, kept_positions
from ..structure.layers import TEMPERATURE, LayerAxis, get_layer, named_axes
from ..structure.shrinking import shrink_model
from .choices import Reached

FORMAT = 1
MEMBERS = ("members", "attributes")
MOST_CHANNELS = 2**26
"""Of all axes of a plan that is read from text."""


@dataclass(frozen=True)
class Deciding:
    """How one step was decided: the batches scored, the share of its channels that others would be expected to
    exchange, and whether that is what was asked for."""

    batches: int
    share: float
    decided: bool


@dataclass(frozen=True)
class PruningPlan:
    """The channels that stay, group by group, in the numbering of the original model.

    ``kept[i]`` are the kept channels of ``groups[i]``, ascending. Checked when built: nothing unknown, no group empty,
    groups that are kept whole are whole, and blocks (attention heads, convolution groups) keep the same positions.
    ``deciding``: of the steps that the plan was found in, where scoring stopped when a step was decided. ``reached``:
    what it costs, of a plan that was made for a target; not in `to_json`.
    """

    groups: tuple[ChannelGroup, ...]
    kept: tuple[tuple[int, ...], ...]
    deciding: tuple[Deciding, ...] = field(default=(), compare=False)
    reached: Reached | None = field(default=None, compare=False)

    def __post_init__(self):
        if len(self.groups) != len(self.kept):
            raise PlanMismatchError(f"{len(self.groups)} groups, but kept channels for {len(self.kept)}")
        roots = [group.root for group in self.groups]
        if len(set(roots)) < len(roots):
            raise PlanMismatchError(f"group {max(roots, key=roots.count)} is there twice")
        for group, kept in zip(self.groups, self.kept, strict=True):
            _check_kept(group, kept)

    @classmethod
    def whole(cls, groups: Iterable[ChannelGroup]) -> PruningPlan:
        """Return the plan that keeps everything."""
        groups = tuple(groups)
        return cls(groups, tuple(tuple(range(group.width)) for group in groups))

    @cached_property
    def shrunk(self) -> Mapping[LayerAxis, tuple[int, ...]]:
        """The kept positions of every axis that loses any, in the original numbering."""
        return kept_positions(dict(zip(self.groups, self.kept, strict=True)))

    @cached_property
    def axes(self) -> Mapping[LayerAxis, int]:
        """The original width of every axis that belongs to a group."""
        return {member.axis: member.width for group in self.groups for member in group.members}

    @cached_property
    def scaled(self) -> Mapping[str, tuple[tuple[int, ...], float]]:
        """Layers that make the queries of attentions with narrower heads: their original positions, and the factor.

        The factor √(kept / all) makes up for a scale of 1/√(width of a head), which the pruned attention takes anew.
        """
        rows: dict[str, list[int]] = defaultdict(list)
        for member in (member for group in self.groups for member in group.attributes):
            if member.axis.axis == TEMPERATURE and member.axis in self.shrunk:
                rows[member.axis.layer] += member.positions
        stay = {layer: set(self.shrunk[LayerAxis(layer, TEMPERATURE)]).intersection(rows[layer]) for layer in rows}
        return {layer: (tuple(own), math.sqrt(len(stay[layer]) / len(own))) for layer, own in rows.items()}

    def selection(self, axis: LayerAxis) -> tuple[int, ...]:
        """Return the kept positions of an axis, ascending, in the original numbering."""
        axis = LayerAxis.of(axis)
        check_name("layer axis of this plan", axis, self.axes)
        return self.shrunk.get(axis, tuple(range(self.axes[axis])))

    def kept_of(self, root: LayerAxis | ChannelGroup) -> tuple[int, ...]:
        """Return the kept channels of one group, given the group or its root."""
        root = root.root if isinstance(root, ChannelGroup) else LayerAxis.of(root)
        check_name("group of this plan", root, self._index)
        return self.kept[self._index[root]]

    @cached_property
    def _index(self) -> dict[LayerAxis, int]:
        return {group.root: index for index, group in enumerate(self.groups)}

    @property
    def channels(self) -> int:
        """The number of channels of all prunable groups before pruning, each group's counted once."""
        return sum(group.width for group in self.groups if group.prunable)

    @property
    def channels_removed(self) -> int:
        """The number of channels that go, each group's counted once."""
        return sum(group.width - len(kept) for group, kept in zip(self.groups, self.kept, strict=True))

    def pruned_groups(self) -> tuple[ChannelGroup, ...]:
        """Return the groups of the pruned model, renumbered: what `find_groups` finds there, without tracing it."""
        rank = {axis: {p: i for i, p in enumerate(kept)} for axis, kept in self.shrunk.items()}
        return tuple(_renumber(group, kept, rank) for group, kept in zip(self.groups, self.kept, strict=True))

    def then(self, other: PruningPlan) -> PruningPlan:
        """Compose: first this plan, then `other`, a plan for the model that this one leaves."""
        check_is_plan(other)
        kept = list(self.kept)
        for group, more in zip(other.groups, other.kept, strict=True):
            index = self._index.get(group.root)
            if index is None or len(self.kept[index]) != group.width:
                here = "no such group" if index is None else f"{len(self.kept[index])} channels left"
                raise PlanMismatchError(f"group {group.root} of width {group.width} in the second plan; here {here}")
            kept[index] = tuple(self.kept[index][channel] for channel in more)
        return PruningPlan(self.groups, tuple(kept))

    def choose(
        self, root: LayerAxis | ChannelGroup, *, keep: Iterable[int] = (), remove: Iterable[int] = ()
    ) -> PruningPlan:
        """Return the plan in which some channels of one group are kept or removed by hand, whatever it did with them.

        In a group of blocks (attention heads, convolution groups) the same position of every block goes along.
        Raises PlanMismatchError for a channel that is not there or named for both, and where fewer are left than have
        to stay.
        """
        kept = set(self.kept_of(root))
        index = self._index[root.root if isinstance(root, ChannelGroup) else LayerAxis.of(root)]
        group = self.groups[index]
        back, gone = (with_blocks(group, channels) for channels in (keep, remove))
        if back & gone:
            raise PlanMismatchError(f"group {group.root}: channel {min(back & gone)} is to be kept and to be removed")
        chosen = tuple(sorted((kept | back) - gone))
        fewest = min(group.least, group.width // group.blocks) * group.blocks
        if 0 < len(chosen) < fewest:
            raise PlanMismatchError(
                f"group {group.root}: {len(chosen)} channels are kept; at least {fewest} have to stay"
            )
        return replace(self, kept=(*self.kept[:index], chosen, *self.kept[index + 1 :]), reached=None)

    def validate(self, model: nn.Module, *, pruned: bool = False) -> None:
        """Raise PlanMismatchError unless the plan's axes are as wide here as before or, pruned, as it leaves them."""
        model = without_weight_norms(model)
        for axis, width in self.axes.items():
            if axis not in self.shrunk:
                continue
            try:
                found = named_axes(get_layer(model, axis.layer), axis.layer)[axis.axis].width
            except (ValueError, KeyError) as error:
                raise PlanMismatchError(f"the plan's axis {axis} is not in this model: {error}") from error
            if pruned and found != (left := len(self.shrunk[axis])):
                raise PlanMismatchError(f"axis {axis} of this model is {found} wide; the plan leaves {left} channels")
            if not pruned and found != width:
                raise PlanMismatchError(f"layer {axis.layer!r}: the plan's axis {axis} is {width} wide, here {found}")

    def to_json(self) -> str:
        """Return the plan as JSON text that `from_json` reads back."""
        groups = [_group_to_data(group, kept) for group, kept in zip(self.groups, self.kept, strict=True)]
        steps = {"deciding": list(map(asdict, self.deciding))} if self.deciding else {}
        return json.dumps({"format": FORMAT, "groups": groups} | steps, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """Read a plan from JSON text; raise ValueError when it is no plan or not a valid one."""
        try:
            data = parse_json(text)
            if data["format"] != FORMAT:
                raise PlanMismatchError(f"plan format {data['format']}; this version reads format {FORMAT}")
            _check_sizes(data["groups"])
            read = [_group_from_data(entry) for entry in data["groups"]]
            steps = tuple(Deciding(**entry) for entry in data.get("deciding", ()))
        except PlanMismatchError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise PlanMismatchError(f"not a pruning plan: {type(error).__name__} {error}") from error
        return cls(tuple(group for group, _ in read), tuple(kept for _, kept in read), steps)

    def to_frame(self) -> pd.DataFrame:
        """Return one row a group: its root, channels before and after, the share that stays, and why it is whole."""
        rows = [
            (str(group.root), group.width, len(kept), len(group.members), group.kept_whole or "")
            for group, kept in zip(self.groups, self.kept, strict=True)
        ]
        frame = pd.DataFrame(rows, columns=["group", "channels", "kept", "members", "kept whole because"])
        frame.insert(3, "share", frame["kept"] / frame["channels"])
        return frame

    def __str__(self) -> str:
        return f"{self!r}\n{self.to_frame().to_string(index=False, float_format='{:.2f}'.format)}"

    def __repr__(self) -> str:
        open_steps = sum(not step.decided for step in self.deciding)
        left = f", {open_steps} of {len(self.deciding)} steps undecided" if open_steps else ""
        gone = f"{self.channels_removed} of {self.channels} channels removed"
        cost = f"; {self.reached}" if self.reached else ""
        return f"PruningPlan({len(self.groups)} group{'s' * (len(self.groups) != 1)}, {gone}{left}{cost})"

    def _repr_html_(self) -> str:
        return f"<b>{self!r}</b>{self.to_frame().to_html(index=False, float_format='{:.2f}'.format)}"

    def plot(self):
        """Draw the kept and removed channels of each group (a plotly figure)."""
        from ..plots.plans import plot_plan

        return plot_plan(self)


def check_is_plan(plan: Any) -> None:
    """Raise PlanMismatchError for what is no plan."""
    if not isinstance(plan, PruningPlan):
        kind = type(plan).__name__
        raise PlanMismatchError(f"plan: expected a PruningPlan, not {kind}; PruningPlan.from_json reads one from text")


def _check_kept(group: ChannelGroup, kept: tuple[int, ...]) -> None:
    if not kept:
        raise PlanMismatchError(f"group {group.root}: no channel is kept")
    if wrong := [channel for channel in kept if not isinstance(channel, Integral)]:
        raise PlanMismatchError(f"group {group.root}: {wrong[0]!r} is no number of a channel")
    if any(b <= a for a, b in itertools.pairwise(kept)):
        raise PlanMismatchError(f"group {group.root}: kept channels must ascend without repetition")
    if kept[0] < 0 or kept[-1] >= group.width:
        bad = kept[-1] if kept[-1] >= group.width else kept[0]
        raise PlanMismatchError(f"group {group.root}: kept channel {bad} in a group of width {group.width}")
    if not group.prunable and len(kept) < group.width:
        raise PlanMismatchError(f"group {group.root} is kept whole ({group.kept_whole}), yet the plan prunes it")
    size = group.width // group.blocks
    if len(kept) != group.blocks * len({channel % size for channel in kept}):
        raise PlanMismatchError(f"group {group.root}: its {group.blocks} blocks must keep the same positions")


def with_blocks(group: ChannelGroup, channels: Iterable[int]) -> set[int]:
    """Return the channels, and those at the same positions of the group's other blocks."""
    size = group.width // group.blocks
    found = set()
    for channel in channels if isinstance(channels, Iterable) else (channels,):
        if not isinstance(channel, Integral) or not 0 <= channel < group.width:
            raise PlanMismatchError(f"group {group.root}: no channel {channel} in a group of width {group.width}")
        found.update(range(channel % size, group.width, size))
    return found


def _renumber(group: ChannelGroup, kept: Sequence[int], rank: Mapping[LayerAxis, Mapping[int, int]]) -> ChannelGroup:
    channel_rank = {channel: index for index, channel in enumerate(kept)}

    def renumbered(members: Iterable[Member]) -> Iterator[Member]:
        for member in members:
            if member.axis not in rank:
                yield member
                continue
            place = rank[member.axis]
            stay = [(p, c) for p, c in zip(member.positions, member.channels, strict=True) if c in channel_rank]
            positions, channels = tuple(place[p] for p, _ in stay), tuple(channel_rank[c] for _, c in stay)
            yield replace(member, positions=positions, channels=channels, width=len(place))

    members, attributes = tuple(renumbered(group.members)), tuple(renumbered(group.attributes))
    return replace(group, width=len(kept), members=members, attributes=attributes)


def _group_to_data(group: ChannelGroup, kept: Sequence[int]) -> dict:
    data = {
        "root": list(group.root),
        "width": group.width,
        "blocks": group.blocks,
        "kept_whole": group.kept_whole,
        "kept": list(kept),
        "members": list(map(_member_to_data, group.members)),
    }
    data |= {"attends": True} if group.attends else {}
    data |= {"least": group.least} if group.least != _least_of(group.blocks) else {}
    return data | ({"attributes": list(map(_member_to_data, group.attributes))} if group.attributes else {})


def _least_of(blocks: int) -> int:
    """Return what a block keeps at least where a plan does not say so."""
    return 2 if blocks > 1 else 1


def _member_to_data(member: Member) -> dict:
    data = {"layer": member.axis.layer, "axis": member.axis.axis, "type": member.kind, "width": member.width}
    if member.positions == member.channels == tuple(range(member.width)):
        return data
    return data | {"positions": member.positions, "channels": member.channels}


def _group_from_data(data: Mapping) -> tuple[ChannelGroup, tuple[int, ...]]:
    members, attributes = (tuple(map(_member_from_data, data.get(key, ()))) for key in MEMBERS)
    width, blocks, attends = data["width"], _integer(data["blocks"]), data.get("attends", False) is True
    if blocks < 1 or width % blocks:
        raise PlanMismatchError(f"group {data['root']}: {blocks} blocks of {width} channels")
    root, least = LayerAxis(*map(str, data["root"])), _integer(data.get("least", _least_of(blocks)))
    group = ChannelGroup(root, width, members, data["kept_whole"], blocks, attributes, attends, least)
    return group, tuple(map(_integer, data["kept"]))


def _check_sizes(groups: Iterable[Mapping]) -> None:
    """Raise PlanMismatchError where axes are so wide that the numbers of their channels would fill the memory."""
    members = [member for group in groups for key in MEMBERS for member in group.get(key, ())]
    widths = [_integer(entry["width"]) for entry in (*groups, *members)]
    if min(widths, default=1) < 1 or sum(widths) > MOST_CHANNELS:
        raise PlanMismatchError(f"a plan for {sum(widths):,} channels of axes; from 1 to {MOST_CHANNELS:,} are read")


def _member_from_data(data: Mapping) -> Member:
    full = range(data["width"])
    positions, channels = (tuple(map(_integer, data.get(key, full))) for key in ("positions", "channels"))
    if len(positions) != len(channels) or not all(0 <= position < len(full) for position in positions):
        raise PlanMismatchError(f"axis {data['layer']}.{data['axis']}: positions outside its width of {len(full)}")
    return Member(LayerAxis(str(data["layer"]), str(data["axis"])), positions, channels, len(full), str(data["type"]))


def _integer(value: object) -> int:
    if type(value) is not int:
        raise TypeError(f"expected an integer, found {value!r}")
    return value


def prune(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Return a new model with only the kept channels; the given model is left unchanged.

    Parameters, buffers and the attributes of layers that hold widths follow; everything else is a deep copy. Weights
    learned by length and direction (torch's weight_norm) become plain ones of the same values. The `config` of
    transformers' networks follows where one describes the pruned network; else its `save_pretrained` raises an error
    that says why not.

    Raises:
        PlanMismatchError: the plan does not fit the model, or prunes tied parameters differently.
    """
    pruned = shrink(model, plan)
    follow_config(model, pruned)
    return pruned


def shrink(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Prune, and leave the configuration as it is: for networks that nobody is given."""
    check_is_plan(plan)
    plan.validate(model)
    return shrink_model(model, plan.shrunk, plan.scaled)
