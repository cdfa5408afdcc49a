"""What is coupled with what, and why a layer is not pruned: groups of channels as a table and a figure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from .groups import ChannelGroup, Member

_COLUMNS = (
    "group", "channels", "blocks", "outputs of", "inputs of", "norms and parameters", "kept whole because",
)  # fmt: skip


@dataclass(frozen=True, repr=False)
class Explanation:
    """The groups of a model, to look at. Built by `explain`."""

    groups: tuple[ChannelGroup, ...]

    @property
    def prunable(self) -> tuple[ChannelGroup, ...]:
        """The groups that may lose channels."""
        return tuple(group for group in self.groups if group.prunable)

    def to_frame(self) -> pd.DataFrame:
        """Return one row a group: channels, blocks, whose outputs shrink together, who reads them, why it is whole.

        ``blocks``: equal runs of channels that lose the same positions. Depthwise convolutions count as outputs; norms
        and bare parameters are only counted.
        """
        rows = [
            (
                str(group.root),
                group.width,
                group.blocks,
                _names(member for member in group.members if role_of(member) == "output"),
                _names(member for member in group.members if role_of(member) == "input"),
                sum(role_of(member) == "scale" for member in group.members),
                group.kept_whole or "",
            )
            for group in self.groups
        ]
        return pd.DataFrame(rows, columns=list(_COLUMNS))

    def members_frame(self) -> pd.DataFrame:
        """Return one row a member: its group, layer, axis, type, positions taken and width of the axis."""
        rows = [
            (str(g.root), m.axis.layer, m.axis.axis, m.kind, len(m.positions), m.width)
            for g in self.groups
            for m in g.members
        ]
        columns = ["group", "layer", "axis", "type", "positions", "axis width"]
        return pd.DataFrame(rows, columns=columns)

    def why_whole(self, layer: str) -> str | None:
        """Return why a layer keeps all its output channels, or None where it may lose some.

        Raises:
            ValueError: no group holds an output of that layer.
        """
        owners = [g for g in self.groups if any(m.axis.layer == layer and m.axis.axis == "out" for m in g.members)]
        if not owners:
            raise ValueError(f"layer {layer!r}: no group holds its output; see members_frame()")
        if any(group.prunable for group in owners):
            return None
        return owners[0].kept_whole

    def plot(self):
        """Draw which layers each group couples (a plotly figure)."""
        from .group_plots import plot_groups

        return plot_groups(self.groups)

    def __repr__(self) -> str:
        return f"{self._title()}\n{self.to_frame().to_string(index=False, max_colwidth=60)}"

    def _repr_html_(self) -> str:
        return f"<b>{self._title()}</b>{self.to_frame().to_html(index=False)}"

    def _title(self) -> str:
        channels = sum(group.width for group in self.prunable)
        return f"{len(self.groups)} groups, {len(self.prunable)} prunable with {channels:,} channels"


def explain(groups: Iterable[ChannelGroup]) -> Explanation:
    """Show what is coupled with what, and why a layer is not pruned.

    Args:
        groups: what `find_groups` returned, or a plan's.

    Example:
        >>> explain(find_groups(model, images)).why_whole("fc")
        "reaches the model's output"
    """
    return Explanation(tuple(groups))


_SCALES = ("Norm", "PReLU", "Parameter")


def role_of(member: Member) -> str:
    """Return what a layer does with a group's channels: "output" makes them, "input" reads them, "scale" is a norm."""
    if member.axis.axis == "in":
        return "input"
    return "scale" if any(word in member.kind for word in _SCALES) else "output"


def _names(members: Iterable[Member]) -> str:
    return ", ".join(dict.fromkeys(member.axis.layer for member in members))
