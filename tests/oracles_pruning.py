"""Slow and obvious counterparts: a masked network, and compressors and decompressors as inserted maps."""

import copy

import torch
import torch_pruning as tp
from torch import Tensor, nn

from obc_tools import PruningPlan, prune
from obc_tools.pruning.equivalent import EquivalentModel, MixedLayer


def masked(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Return a copy of the full model whose consumers have zero weights at the removed input positions."""
    model = copy.deepcopy(model)
    for axis, kept in plan.shrunk.items():
        if axis.axis != "in":
            continue
        layer = model.get_submodule(axis.layer)
        with torch.no_grad():
            for position in sorted(set(range(plan.axes[axis])) - set(kept)):
                _input_weights(layer, position).zero_()
    return model


def _input_weights(layer: nn.Module, position: int) -> Tensor:
    if isinstance(layer, nn.Linear):
        return layer.weight[:, position]
    if layer.transposed:
        return layer.weight[position]
    group, inside = divmod(position, layer.in_channels // layer.groups)
    outputs = layer.out_channels // layer.groups
    return layer.weight[group * outputs : (group + 1) * outputs, inside]


class Inserted(nn.Module):
    """A full layer between two maps of its channels that are layers of their own, one matrix a convolution group.

    ``expand`` has shape (groups, inputs, kept), ``shrink`` (groups, kept, outputs); ``stride`` neighbouring positions
    of a flattened input are one channel.
    """

    def __init__(self, layer: nn.Module, mixed: MixedLayer, stride: int):
        super().__init__()
        self.layer, self.stride = copy.deepcopy(layer), stride
        self.expand = None if mixed.decompressor is None else nn.Parameter(mixed.decompressor.detach().clone())
        self.shrink = None if mixed.compressor is None else nn.Parameter(mixed.compressor.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.expand is not None:
            x = _map_channels(x, self.expand, self.stride)
        x = self.layer(x)
        return x if self.shrink is None else _map_channels(x, self.shrink, 1)


def _map_channels(x: Tensor, matrices: Tensor, stride: int) -> Tensor:
    """Multiply the channels of each group (axis 1 of x) by its matrix (new, old)."""
    parts = x.unflatten(1, (-1, stride)).chunk(matrices.shape[0], dim=1)
    mapped = [
        torch.tensordot(part, matrix, ([1], [1])).movedim(-1, 1) for part, matrix in zip(parts, matrices, strict=True)
    ]
    return torch.cat(mapped, dim=1).flatten(1, 2)


def inserted(model: nn.Module, plan: PruningPlan, equivalent: EquivalentModel) -> nn.Module:
    """Return the pruned model in which every mixed layer is the full one between inserted maps."""
    skeleton = prune(model, plan)
    for name, mixed in equivalent.mixed_layers.items():
        layer = model.get_submodule(name)
        owner, _, leaf = name.rpartition(".")
        stride = mixed.weight.shape[2] if isinstance(layer, nn.Linear) else 1
        setattr(skeleton.get_submodule(owner), leaf, Inserted(layer, mixed, stride))
    return skeleton


def graph_groups(model, images):
    graph = tp.DependencyGraph().build_dependency(model, images, verbose=False)
    return {group[0].dep.target.name.split(" ")[0]: group for group in graph.get_all_groups(ignored_layers=[])}
