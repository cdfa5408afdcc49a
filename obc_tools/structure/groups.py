"""Which layer axes must shrink together: groups of coupled channels, found by tracing the model once.

A group is everything that goes when one channel goes: the producer's output channel with its bias, the norm's weight
and bias, each consumer's input channel, and the attributes of modules that hold its width.
"""

from __future__ import annotations

import fnmatch
import html
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from torch import Tensor, nn

from ..errors import UnknownNameError, check_name
from ..state import without_weight_norms
from .coupling import Bundle, Classes, Place, bundles
from .layers import LayerAxis, UnknownLayerError, get_layer, has_role, is_grouped, layer_axes
from .operations import HEAD_COUNTS
from .tracing import Traced, trace_model

_SCALES = ("Norm", "PReLU", "Parameter")


@dataclass(frozen=True)
class Member:
    """The part of one layer axis that belongs to a group.

    Position ``positions[i]`` of the axis holds channel ``channels[i]`` of the group. One channel may have several
    positions (a flattened axis), and the positions may be part of the axis (a concatenation).
    ``width`` is the length of the whole axis, ``kind`` the layer's type.
    """

    axis: LayerAxis
    positions: tuple[int, ...]
    channels: tuple[int, ...]
    width: int
    kind: str

    def __post_init__(self):
        if len(self.positions) != len(self.channels):
            raise ValueError(f"{self.axis}: {len(self.positions)} positions for {len(self.channels)} channels")
        if self.positions and not 0 <= min(self.positions) <= max(self.positions) < self.width:
            raise ValueError(f"{self.axis}: position {max(self.positions)} on an axis of width {self.width}")

    @property
    def role(self) -> str:
        """What its layer does with the channels: "output" makes them, "input" reads them, "scale" is a norm."""
        if self.axis.axis == "in":
            return "input"
        return "scale" if any(word in self.kind for word in _SCALES) else "output"


@dataclass(frozen=True, eq=True)
class ChannelGroup:
    """Channels that can only be removed together, over all the layer axes that hold them.

    ``root`` is the first member's axis and names the group; ``width`` its number of channels. ``kept_whole`` says why
    the group is never pruned, or is None. ``blocks``: equal runs of channels that lose the same positions (attention
    heads, convolution groups). ``attributes`` are numbers that modules keep beside their weights and that follow the
    width, as axes of their own: ".head_dim", ".sizes.0" (an item of a list), ".config.heads", ".scale^-0.5" (a power
    of the width); ".temperature" are the outputs of a layer that grow by the root of the share that stays, so that
    attentions with narrower heads keep their temperature. ``attends``: the channels are of queries, keys or values.
    ``least``: the fewest channels that a block is left with: with one, a grouped convolution becomes another type of
    layer, `squeeze` takes the whole axis away, and the axes of a bare parameter can no longer be told apart.
    """

    root: LayerAxis
    width: int
    members: tuple[Member, ...]
    kept_whole: str | None = None
    blocks: int = 1
    attributes: tuple[Member, ...] = ()
    attends: bool = False
    least: int = 1

    def __post_init__(self):
        if self.width < 1 or not self.members:
            raise ValueError(f"group {self.root}: width {self.width} and {len(self.members)} members")
        if self.width % self.blocks:
            raise ValueError(f"group {self.root}: width {self.width} does not divide into {self.blocks} blocks")

    def __hash__(self) -> int:
        return hash((self.root, self.width))

    def __repr__(self) -> str:
        kept = f", kept whole: {self.kept_whole}" if self.kept_whole else ""
        return f"ChannelGroup({self.root}, width={self.width}, {len(self.members)} members{kept})"

    @property
    def prunable(self) -> bool:
        """Say whether any channel of the group may be removed."""
        return self.kept_whole is None

    @property
    def part(self) -> str:
        """What the channels are: "stream" where several layers read them, else "attention" or "mlp"."""
        if len({member.axis.layer for member in self.members if member.axis.axis == "in"}) > 1:
            return "stream"
        return "attention" if self.attends else "mlp"

    @property
    def kind(self) -> tuple[tuple[str, str], ...]:
        """The layer types and axes of the members in order: equal for groups with the same structure."""
        return tuple((member.kind, member.axis.axis) for member in self.members)

    def to_frame(self) -> pd.DataFrame:
        """Return one row a member: layer, axis, type, positions taken and width of the axis."""
        rows = [(m.axis.layer, m.axis.axis, m.kind, len(m.positions), m.width) for m in self.members]
        return pd.DataFrame(rows, columns=["layer", "axis", "type", "positions", "axis width"])

    def _repr_html_(self) -> str:
        title = f"<b>{html.escape(str(self.root))}</b>, {self.width} channels"
        title += f", {html.escape(self.kept_whole)}" if self.kept_whole else ""
        return title + self.to_frame().to_html(index=False)


def kept_positions(kept: Mapping[ChannelGroup, Sequence[int]]) -> dict[LayerAxis, tuple[int, ...]]:
    """Return the kept positions of every axis that loses any, given the kept channels of groups."""
    removed: dict[LayerAxis, set[int]] = defaultdict(set)
    widths: dict[LayerAxis, int] = {}
    for group, channels in kept.items():
        gone = set(range(group.width)).difference(channels)
        for member in (*group.members, *group.attributes) if gone else ():
            widths[member.axis] = member.width
            removed[member.axis].update(
                p for p, channel in zip(member.positions, member.channels, strict=True) if channel in gone
            )
    return {a: tuple(p for p in range(widths[a]) if p not in gone) for a, gone in removed.items() if gone}


def find_groups(
    model: nn.Module,
    example_inputs: Any,
    *,
    ignore: Iterable[nn.Module | str] = (),
    whole_heads: bool = False,
    only: str | None = None,
) -> tuple[ChannelGroup, ...]:
    """Find the groups of coupled channels of a model.

    Args:
        model: any module that runs on `example_inputs`; it is left unchanged.
        example_inputs: what one forward pass takes: a tensor, a tuple of arguments, a dict of keyword arguments, or a
            `Forward`, which says how to run the model and what of its output counts.
        ignore: modules, names or globs ("layer4.*"). Their outputs keep their width, so a group with an ignored
            output stays whole; their inputs may shrink.
        whole_heads: attentions lose whole heads, where their module keeps the number of heads and the width of one as
            attributes. By default all heads lose the same positions.
        only: "mlp": hidden channels, which one layer reads; "attention": those of queries, keys and values or, with
            ``whole_heads``, heads; "bottleneck": both, so that the residual stream of a transformer stays. All other
            groups are kept whole.

    Returns:
        The groups in the model's order, those that are never pruned included with the reason in ``kept_whole``:
        an ignored output, channels that reach the model's output or are added to its input, unknown layer types,
        operations that mix channels.

    Raises:
        ValueError: an ignored name that does not exist, or a model that cannot be traced.
    """
    traced = trace_model(model, example_inputs, whole_heads=whole_heads)
    return groups_of(model, traced, Classes(traced.flow), ignore=ignore, only=only)


PARTS = {None: ("mlp", "attention", "stream"), "mlp": ("mlp",), "attention": ("attention",),
         "bottleneck": ("mlp", "attention")}  # fmt: skip
"""Which parts of a network (`ChannelGroup.part`) are pruned by each choice of ``only``."""


def loses_heads(groups: Iterable[ChannelGroup]) -> bool:
    """Say whether groups were found with ``whole_heads``: a number of heads follows one that may be pruned."""
    followers = (member.axis.axis for group in groups if group.prunable for member in group.attributes)
    return any(name.rpartition(".")[2] in HEAD_COUNTS for name in followers)


def groups_of(
    model: nn.Module,
    traced: Traced,
    classes: Classes,
    *,
    ignore: Iterable[nn.Module | str] = (),
    only: str | None = None,
) -> tuple[ChannelGroup, ...]:
    """Return the groups of a model that was traced, as `find_groups` does."""
    check_name("only", only, PARTS)
    ignored = ignored_layers(model, ignore)
    model = without_weight_norms(model)
    order = {name: index for index, name in enumerate(_layer_names(model))}
    ranks = {axis: _rank(model, axis, order, traced.met) for axis in traced.axes}
    reasons = {layer: f"ignored: {layer}" for layer in ignored}
    found = list(bundles(traced, classes, reasons, lambda axis: ranks[axis][0] < NO_PRODUCER))
    found = [
        bundle
        for bundle in found
        if bundle.reason is None or min(ranks[place.axis][0] for place in bundle.places) < BARE
    ]
    found.sort(key=lambda bundle: min((ranks[place.axis], int(place.positions.min())) for place in bundle.places))
    taken: dict[LayerAxis, int] = {}
    groups = []
    for bundle in found:
        places = sorted(bundle.places, key=lambda place: ranks[place.axis])
        root = next((place.axis for place in places if place.axis not in taken), None)
        if root is None:  # without an axis to name it after, it stays whole
            continue
        taken[root] = len(groups)
        groups.append(_group(model, bundle, root, traced.kinds))
    groups = [_kept_whole_unless(group, PARTS[only], only) for group in groups]
    return tuple(sorted(groups, key=lambda group: order[group.root.layer]))


BARE, NO_PRODUCER = 2, 4


def _layer_names(model: nn.Module) -> Iterable[str]:
    for name, module in model.named_modules():
        yield name
        for leaf in (*module._parameters, *module._buffers):
            yield f"{name}.{leaf}" if name else leaf


def _rank(model: nn.Module, axis: LayerAxis, order: Mapping[str, int], met: Mapping[str, int]) -> tuple[int, int, str]:
    """Rank an axis as a group's root: torch_pruning's root, outputs of other layers, bare parameters; then all others.

    torch_pruning's is the first output of a convolution or linear layer that is met from the model's outputs back.
    """
    layer = get_layer(model, axis.layer)
    if not isinstance(layer, nn.Module):
        kind = BARE if isinstance(layer, nn.Parameter) else NO_PRODUCER
    elif axis.axis == "in":
        kind = NO_PRODUCER + 1
    elif axis.layer in met:
        return 0, met[axis.layer], axis.axis
    elif has_role(layer, "projection", "embedding", "attention"):
        kind = 1
    else:
        kind = NO_PRODUCER
    return kind, order[axis.layer], axis.axis


def _group(model: nn.Module, bundle: Bundle, root: LayerAxis, kinds: Mapping[str, str]) -> ChannelGroup:
    """Return a bundle as a group: its root first, the other members in the order in which their layers run."""
    places = sorted(bundle.places, key=lambda place: place.axis != root)
    members = tuple(_member(place, kinds[place.axis.layer]) for place in places)
    beside = [place for place in bundle.attributes if not _in_table(model, place.axis)]
    attributes = tuple(_member(place, "attribute") for place in beside)
    reason = bundle.reason
    in_groups = bundle.blocks > 1 and any(_is_grouped(model, place.axis) for place in places)
    least = 2 if in_groups or any(_names_another(model, place.axis) for place in places) else bundle.least
    if reason is None and in_groups and bundle.width == bundle.blocks:
        reason = f"each of its {bundle.blocks} blocks has fewer than two channels"
    if reason is None and bundle.width == 1:
        reason = "is one channel alone"
    if reason is None and bundle.blocks == 1 and any(_is_grouped(model, place.axis) for place in places):
        reason = "its convolution groups cannot be told apart"
    return ChannelGroup(root, bundle.width, members, reason, bundle.blocks, attributes, bundle.attends, least)


def _kept_whole_unless(group: ChannelGroup, parts: Sequence[str], only: str | None) -> ChannelGroup:
    if not group.prunable or group.part in parts:
        return group
    return replace(group, kept_whole=f"is of the {group.part}, and only={only!r} is pruned")


def _member(place: Place, kind: str) -> Member:
    return Member(place.axis, tuple(place.positions.tolist()), tuple(place.channels.tolist()), place.width, kind)


def _in_table(model: nn.Module, axis: LayerAxis) -> bool:
    """Say whether the table of layer types already lets an attribute follow a layer's weights."""
    layer, name = get_layer(model, axis.layer), axis.axis[1:].partition(".")[0]
    try:
        axes = layer_axes(layer, axis.layer)
    except UnknownLayerError:
        return False
    return any(name in entry.attributes and entry.slots for entry in axes.values())


def _is_grouped(model: nn.Module, axis: LayerAxis) -> bool:
    return is_grouped(get_layer(model, axis.layer))


def _names_another(model: nn.Module, axis: LayerAxis) -> bool:
    """Say whether a bare tensor, left with one channel, would give the axis's name to another of its dimensions."""
    layer = get_layer(model, axis.layer)
    return isinstance(layer, Tensor) and sum(size > 1 for size in layer.shape) > 1


def ignored_layers(model: nn.Module, ignore: Iterable[nn.Module | str]) -> dict[str, str]:
    """Resolve modules, names and globs to the names of layers; a container stands for everything in it."""
    names = {module: name for name, module in model.named_modules()}
    known = [*names.values(), *(name for name, _ in model.named_parameters())]
    resolved = {}
    for item in [ignore] if isinstance(ignore, str | nn.Module) or not isinstance(ignore, Iterable) else ignore:
        if not isinstance(item, nn.Module | str):
            raise ValueError(f"ignore: {item!r} is neither a module nor the name or pattern of one")
        if isinstance(item, nn.Module) and item not in names:
            raise ValueError(f"ignore: a {type(item).__name__} that is not part of the model")
        pattern = names[item] if isinstance(item, nn.Module) else item
        hits = [name for name in known if fnmatch.fnmatchcase(name, pattern)]
        if not hits:
            raise UnknownNameError("layer to ignore", pattern, [name for name in known if name])
        within = [name for name in known for hit in hits if name == hit or name.startswith(f"{hit}." if hit else "")]
        resolved.update(dict.fromkeys(within, str(pattern)))
    return resolved


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
                _names(member for member in group.members if member.role == "output"),
                _names(member for member in group.members if member.role == "input"),
                sum(member.role == "scale" for member in group.members),
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
        from ..plots.plans import plot_groups

        return plot_groups(self.groups)

    def __repr__(self) -> str:
        return f"{self._title()}\n{self.to_frame().to_string(index=False, max_colwidth=60)}"

    def _repr_html_(self) -> str:
        return f"<b>{self._title()}</b>{self.to_frame().to_html(index=False)}"

    def _title(self) -> str:
        channels = sum(group.width for group in self.prunable)
        several = "s" * (len(self.groups) != 1)
        return f"{len(self.groups)} group{several}, {len(self.prunable)} prunable with {channels:,} channels"


def explain(groups: Iterable[ChannelGroup]) -> Explanation:
    """Show what is coupled with what, and why a layer is not pruned.

    Args:
        groups: what `find_groups` returned, or a plan's.

    Example:
        >>> explain(find_groups(model, images)).why_whole("fc")
        "reaches the model's output"
    """
    return Explanation(tuple(groups))


def _names(members: Iterable[Member]) -> str:
    return ", ".join(dict.fromkeys(member.axis.layer for member in members))
