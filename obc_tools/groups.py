"""Which layer axes must shrink together: groups of coupled channels, found by torch_pruning's dependency graph.

A group is everything that goes when one channel goes: the producer's output channel with its bias, the norm's weight
and bias, each consumer's input channel. This is the only module that imports torch_pruning's dependency graph.
"""

from __future__ import annotations

import copy
import fnmatch
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .layers import LAYERS, LayerAxis, UnknownLayerError, UnknownNameError, get_layer, layer_axes
from .state import call_model

ModuleCall = tuple[str, int]
"""A module's name and which of its calls in one forward pass, counted from 0."""


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


@dataclass(frozen=True, eq=True)
class ChannelGroup:
    """Channels that can only be removed together, over all the layer axes that hold them.

    ``root`` is the first member's axis and names the group; ``width`` its number of channels. ``kept_whole`` says why
    the group is never pruned, or is None. ``blocks``: equal runs of channels that lose the same positions (attention
    heads, convolution groups).
    """

    root: LayerAxis
    width: int
    members: tuple[Member, ...]
    kept_whole: str | None = None
    blocks: int = 1

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
    def kind(self) -> tuple[tuple[str, str], ...]:
        """The layer types and axes of the members in order: equal for groups with the same structure."""
        return tuple((member.kind, member.axis.axis) for member in self.members)

    def to_frame(self) -> pd.DataFrame:
        """Return one row a member: layer, axis, type, positions taken and width of the axis."""
        rows = [(m.axis.layer, m.axis.axis, m.kind, len(m.positions), m.width) for m in self.members]
        return pd.DataFrame(rows, columns=["layer", "axis", "type", "positions", "axis width"])

    def _repr_html_(self) -> str:
        title = f"<b>{self.root}</b>, {self.width} channels" + (f", {self.kept_whole}" if self.kept_whole else "")
        return title + self.to_frame().to_html(index=False)


def kept_positions(kept: Mapping[ChannelGroup, Sequence[int]]) -> dict[LayerAxis, tuple[int, ...]]:
    """Return the kept positions of every axis that loses any, given the kept channels of groups."""
    removed: dict[LayerAxis, set[int]] = defaultdict(set)
    widths: dict[LayerAxis, int] = {}
    for group, channels in kept.items():
        gone = set(range(group.width)).difference(channels)
        for member in group.members if gone else ():
            widths[member.axis] = member.width
            removed[member.axis].update(
                p for p, channel in zip(member.positions, member.channels, strict=True) if channel in gone
            )
    return {a: tuple(p for p in range(widths[a]) if p not in gone) for a, gone in removed.items() if gone}


@dataclass(frozen=True)
class Follower:
    """Channels of a group on the axis of a module without parameters (an activation, a pooling), for one of its calls.

    ``positions`` counts the positions that each of the group's channels takes there, shape (width of the group,).
    """

    call: ModuleCall
    root: LayerAxis
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Trace:
    """What one traced forward pass tells: the groups, and where their channels pass through unparametrised modules."""

    groups: tuple[ChannelGroup, ...]
    followers: tuple[Follower, ...]


def find_groups(
    model: nn.Module, example_inputs: Any, *, ignore: Iterable[nn.Module | str] = ()
) -> tuple[ChannelGroup, ...]:
    """Find the groups of coupled channels of a model.

    Args:
        model: any module that autograd can trace; it is left unchanged.
        example_inputs: what one forward pass takes: a tensor, a tuple of arguments or a dict of keyword arguments.
        ignore: modules, names or globs ("layer4.*"). Their outputs keep their width, so a group with an ignored
            output stays whole; their inputs may shrink.

    Returns:
        The groups in the model's order, those that are never pruned included with the reason in ``kept_whole``:
        an ignored output, channels that reach the model's output or are added to its input, unknown layer types.

    Raises:
        ValueError: an ignored name that does not exist, or a model that cannot be traced.
    """
    return trace_groups(model, example_inputs, ignore=ignore).groups


def trace_groups(model: nn.Module, example_inputs: Any, *, ignore: Iterable[nn.Module | str] = ()) -> Trace:
    """Trace a model once: its groups as `find_groups` returns them, and the followers of each."""
    ignored = _ignored_layers(model, ignore)
    traced = copy.deepcopy(model).requires_grad_(True)
    reader = _GraphReader(traced, example_inputs)
    found = [reader.read(group) for group in reader.all_groups()]
    groups = [_keep_whole_if_ignored(group, ignored) for group, _ in found]
    return Trace(tuple(_keep_overlaps_whole(groups)), tuple(f for _, followers in found for f in followers))


def _ignored_layers(model: nn.Module, ignore: Iterable[nn.Module | str]) -> dict[str, str]:
    """Resolve modules, names and globs to the names of layers; a container stands for everything in it."""
    names = {module: name for name, module in model.named_modules()}
    known = [*names.values(), *(name for name, _ in model.named_parameters())]
    resolved = {}
    for item in [ignore] if isinstance(ignore, str | nn.Module) else ignore:
        if isinstance(item, nn.Module) and item not in names:
            raise ValueError(f"ignore: a {type(item).__name__} that is not part of the model")
        pattern = names[item] if isinstance(item, nn.Module) else item
        hits = [name for name in known if fnmatch.fnmatchcase(name, pattern)]
        if not hits:
            raise UnknownNameError("layer to ignore", pattern, [name for name in known if name])
        within = [name for name in known for hit in hits if name == hit or name.startswith(f"{hit}." if hit else "")]
        resolved.update(dict.fromkeys(within, str(pattern)))
    return resolved


def _keep_whole_if_ignored(group: ChannelGroup, ignored: Mapping[str, str]) -> ChannelGroup:
    outputs = [member.axis.layer for member in group.members if member.axis.axis == "out"]
    hit = next((layer for layer in outputs if layer in ignored), None)
    if hit is None or not group.prunable:
        return group
    return replace(group, kept_whole=f"ignored: {hit}")


def _keep_overlaps_whole(groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """Keep groups whole that claim the same position of an axis: removing them apart would contradict each other."""
    owners: dict[tuple[LayerAxis, int], list[int]] = {}
    for index, group in enumerate(groups):
        for member in group.members:
            for position in member.positions:
                owners.setdefault((member.axis, position), []).append(index)
    shared = {index: axis for (axis, _), indices in owners.items() if len(set(indices)) > 1 for index in indices}
    return [
        replace(group, kept_whole=f"shares channels of {shared[i]} with another group")
        if i in shared and group.prunable
        else group
        for i, group in enumerate(groups)
    ]


class _GraphReader:
    """Reads torch_pruning's graph of a traced copy of the model into our values."""

    def __init__(self, model: nn.Module, example_inputs: Any):
        self.model = model
        self.layer_names: dict[Any, str] = {module: name for name, module in model.named_modules()}
        self.layer_names.update({parameter: name for name, parameter in model.named_parameters()})
        self.calls: dict[Any, list[ModuleCall]] = defaultdict(list)
        self.input_nodes: list[Any] = []
        self.graph = self._trace(example_inputs)

    def _trace(self, example_inputs: Any) -> tp.DependencyGraph:
        counts: dict[str, int] = {}

        def remember(module: nn.Module, args: Any, output: Any) -> None:
            name = self.layer_names[module]
            first = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
            if first is not None and first.grad_fn is not None:
                self.calls[first.grad_fn].append((name, counts.get(name, 0)))
            counts[name] = counts.get(name, 0) + 1

        for module in self.model.modules():
            if not any(True for _ in module.children()):
                module.register_forward_hook(remember)
        graph = tp.DependencyGraph()
        inputs, bare = self._tracked(example_inputs), _bare_parameters(self.model)
        options = {"output_transform": _mark_outputs, "unwrapped_parameters": bare, "verbose": False}
        with torch.enable_grad():
            try:
                return graph.build_dependency(self.model, inputs, forward_fn=call_model, **options)
            except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
                raise ValueError(
                    f"torch_pruning cannot trace this {type(self.model).__name__}: {type(error).__name__}: {error}"
                ) from error

    def _tracked(self, example_inputs: Any) -> Any:
        """Give every floating input a node in the graph, so that channels added to it are seen."""

        def track(leaf: Any) -> Any:
            if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
                return leaf
            tracked = leaf.detach().requires_grad_() * 1
            self.input_nodes.append(tracked.grad_fn)
            return tracked

        return tree_map(track, example_inputs)

    def all_groups(self) -> Iterable[Any]:
        """Iterate over torch_pruning's groups in the model's order."""
        order = {module: index for index, module in enumerate(self.model.modules())}
        found = self.graph.get_all_groups(ignored_layers=[])
        return sorted(found, key=lambda group: order[group[0].dep.target.module])

    def read(self, group: Any) -> tuple[ChannelGroup, list[Follower]]:
        width = len(group[0].idxs)
        members: list[Member] = []
        followers: list[Follower] = []
        reasons: list[str] = []
        for item in group:
            module = item.dep.target.module
            if isinstance(module, tp.ops._OutputOp):
                reasons.append("reaches the model's output")
            elif item.dep.target.grad_fn in self.input_nodes:
                reasons.append("is coupled to the model's input")
            elif module in self.layer_names:
                members += self._members(item, reasons)
            followers += self._followers(item, _root(group), width)
        blocks, reason = _blocks(members, width, self.model)
        reasons += [reason] if reason else []
        whole = reasons[0] if reasons else None
        return ChannelGroup(members[0].axis, width, tuple(members), whole, blocks), followers

    def _followers(self, item: Any, root: LayerAxis, width: int) -> list[Follower]:
        """Return the calls of modules whose output this item of torch_pruning's group removes channels of."""
        target = item.dep.target
        is_input = target.module in self.layer_names and not self.graph.is_out_channel_pruning_fn(item.dep.handler)
        if is_input or None in item.root_idxs:
            return []
        counts = tuple(torch.bincount(torch.tensor(item.root_idxs), minlength=width).tolist())
        # Several: a dropout or identity in eval mode hands on its input, and timm's norms hold their activation.
        return [Follower(call, root, counts) for call in self.calls[target.grad_fn]]

    def _members(self, item: Any, reasons: list[str]) -> list[Member]:
        """Return the members that one item of torch_pruning's group stands for; add a reason where there are none."""
        module, handler = item.dep.target.module, item.dep.handler
        name = self.layer_names[module]
        if isinstance(module, nn.Parameter):
            name, module = _owner(self.model, name, module)
        kind = type(module).__name__
        key = "out" if self.graph.is_out_channel_pruning_fn(handler) else "in"
        positions, channels = tuple(item.idxs), tuple(item.root_idxs)
        if None in channels:
            reasons.append(f"the channels of {name} cannot be followed")
            channels = positions
        try:
            axes = layer_axes(module, name)
        except UnknownLayerError as error:
            reasons.append(str(error))
            return [Member(LayerAxis(name, key), positions, channels, max(positions) + 1, kind)]
        if not axes:
            return []
        members = []
        for layer, axis, width in expand_axes(module, name, key):
            if max(positions) >= width:
                reasons.append(f"position {max(positions)} on {layer}.{axis} of width {width}")
                continue
            members.append(Member(LayerAxis(layer, axis), positions, channels, width, kind))
        if len(set(positions)) < len(positions):
            reasons.append(f"two channels share a position of {name}")
        return members


def _owner(model: nn.Module, name: str, parameter: nn.Parameter) -> tuple[str, nn.Module | nn.Parameter]:
    """Return the layer of a known type that owns a parameter torch_pruning takes for a bare one, else itself."""
    owner = name.rpartition(".")[0]
    layer = model.get_submodule(owner)
    return (owner, layer) if isinstance(layer, tuple(LAYERS)) else (name, parameter)


def expand_axes(module: nn.Module | nn.Parameter, name: str, key: str) -> list[tuple[str, str, int]]:
    """Return (layer, axis, width) of all axes that torch_pruning treats as one item, given its module and direction."""
    if isinstance(module, nn.MultiheadAttention):
        both = [(name, "in", module.embed_dim), (name, "out", module.embed_dim)]
        projection = f"{name}.out_proj" if name else "out_proj"
        return [*both, (projection, "in", module.embed_dim), (projection, "out", module.embed_dim)]
    axes = layer_axes(module, name)
    key = key if key in axes else "out"
    return [(name, key, axes[key].width)] if axes else []


def _root(group: Any) -> LayerAxis:
    return LayerAxis(group._DG._module2name[group[0].dep.target.module], "out")


def _blocks(members: Sequence[Member], width: int, model: nn.Module) -> tuple[int, str | None]:
    """Return how many equal blocks of a group lose the same positions, and why it must stay whole if it must."""
    blocks = 1
    for member in members:
        try:
            axis = layer_axes(get_layer(model, member.axis.layer), member.axis.layer)[member.axis.axis]
        except UnknownLayerError:
            continue
        if axis.blocks == 1:
            continue
        if member.positions != tuple(range(width)) or member.channels != member.positions or member.width != width:
            return 1, f"only part of it feeds the {axis.blocks} blocks of {member.axis.layer}"
        blocks = math.lcm(blocks, axis.blocks)
    if width % blocks or width == blocks:
        return 1, f"each of its {blocks} blocks has fewer than two channels"
    return blocks, None


def _bare_parameters(model: nn.Module) -> list[tuple[nn.Parameter, int]]:
    """Return the parameters that no known layer type owns, each with the dimension of its channels."""
    owned = set()
    for module in model.modules():
        if tp.ops.module2type(module) in tp.function.PrunerBox:
            owned.update(module.parameters())
    bare = []
    for name, parameter in model.named_parameters():
        axis = layer_axes(parameter, name).get("out") if parameter not in owned else None
        if axis is not None:
            bare.append(tp._helpers.UnwrappedParameters(parameters=parameter, pruning_dim=axis.slots[0].dim))
    return bare


def _mark_outputs(output: Any) -> list[Tensor]:
    """Append one operation to every output, so that the graph ends in output nodes whatever the last layer is."""
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
    if not leaves:
        raise ValueError("the model's output holds no tensor that depends on its parameters through autograd")
    return [leaf * 1 for leaf in leaves]
