"""Slow and obvious: the Jacobian itself, all of it, by torch.func, and w by spelled-out indices."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp
from torch.nn import functional as F

from obc_tools.structure.layers import LayerAxis, get_layer

Indices = list[tuple[str, tuple]]


def row_gradients(model: nn.Module, batch: Any, rows: str | int, objective: Callable) -> dict[str, Tensor]:
    """Return J: parameter name -> (rows, *shape), every parameter of the model at once, a row after the other."""

    def row_losses(parameters: dict[str, Tensor]) -> Tensor:
        losses = objective(lambda *args, **kwargs: functional_call(model, parameters, args, kwargs), batch)
        return (
            losses.mean()[None]
            if rows == "batch"
            else losses.unflatten(0, (-1, 1 if rows == "sample" else rows)).mean(1)
        )

    losses, pull = vjp(row_losses, {name: parameter.detach() for name, parameter in model.named_parameters()})
    each = [pull(one_hot)[0] for one_hot in torch.eye(len(losses), dtype=losses.dtype)]
    return {name: torch.stack([row[name] for row in each]) for name in each[0]}


def products(model: nn.Module, jacobian: dict[str, Tensor], axis: LayerAxis) -> Tensor:
    """Return J w of each channel of an axis, shape (rows, channels)."""
    return torch.stack([rows @ weights for rows, weights in channels(model, jacobian, axis)], 1)


def score(model: nn.Module, jacobian: dict[str, Tensor], axis: LayerAxis) -> Tensor:
    """Return wᵀ(JᵀJ)w of each channel, shape (channels,), with the dense JᵀJ."""
    return torch.stack([w @ (rows.T @ rows) @ w for rows, w in channels(model, jacobian, axis)])


def channels(model: nn.Module, jacobian: dict[str, Tensor], axis: LayerAxis) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut out each channel's J, shape (rows, d), and w, shape (d,)."""
    layer = get_layer(model, axis.layer)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for channel in range(width(layer, axis.axis)):
        rows, weights = [], []
        for tensor, index in indices(layer, axis.axis, channel):
            parameter = layer if tensor == "" else getattr(layer, tensor)
            if parameter is not None:
                each = jacobian[names[id(parameter)]]
                rows.append(torch.stack([row[index].flatten() for row in each]))
                weights.append(parameter.detach()[index].flatten())
        yield torch.cat(rows, 1), torch.cat(weights)


def width(layer: nn.Module, axis: str) -> int:
    """Count the channels of an axis."""
    attributes = {
        nn.modules.conv._ConvNd: ("out_channels", "in_channels"),
        nn.Linear: ("out_features", "in_features"),
        nn.Embedding: ("embedding_dim",) * 2,
        nn.MultiheadAttention: ("embed_dim",) * 2,
    }
    for kind, (out, into) in attributes.items():
        if isinstance(layer, kind):
            return getattr(layer, out if axis == "out" else into)
    return layer.shape[-1] if isinstance(layer, nn.Parameter) else len(layer.weight)


def indices(layer: nn.Module, axis: str, channel: int) -> Indices:
    """Return where a channel's parameters lie: (tensor, index) pairs."""
    every = slice(None)
    if isinstance(layer, nn.Parameter):
        return [("", (..., channel))]
    if isinstance(layer, nn.Embedding):
        return [("weight", (every, channel))]
    if isinstance(layer, nn.MultiheadAttention):
        qkv = [channel, layer.embed_dim + channel, 2 * layer.embed_dim + channel]
        return [("in_proj_weight", (qkv,)), ("in_proj_bias", (qkv,))] if axis == "out" else [
            ("in_proj_weight", (every, channel))
        ]  # fmt: skip
    if isinstance(layer, nn.Linear) and axis == "in":
        return [("weight", (every, channel))]
    if isinstance(layer, nn.modules.conv._ConvNd) and axis == "in":
        return _input_of_convolution(layer, channel)
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        outs, ins = layer.out_channels // layer.groups, layer.in_channels // layer.groups
        group = channel // outs
        return [("weight", (slice(group * ins, (group + 1) * ins), channel % outs)), ("bias", (channel,))]
    own = [("weight", (channel,))]
    return own if isinstance(layer, nn.PReLU | nn.RMSNorm) else [*own, ("bias", (channel,))]


def _input_of_convolution(layer: nn.modules.conv._ConvNd, channel: int) -> Indices:
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return [("weight", (channel,))]
    outs, ins = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    group = channel // ins
    return [("weight", (slice(group * outs, (group + 1) * outs), channel % ins))]


# What is borrowed


def state_of(model: nn.Module) -> dict:
    """Everything that scoring could leave behind on a model."""
    hook_kinds = [name for name in nn.Module().__dict__ if "hooks" in name]
    modules = dict(model.named_modules())
    return {
        "modes": {name: module.training for name, module in modules.items()},
        "hooks": {name: [dict(getattr(module, kind)) for kind in hook_kinds] for name, module in modules.items()},
        "attributes": {name: sorted(module.__dict__) for name, module in modules.items()},
        "flags": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "grads": {name: parameter.grad for name, parameter in model.named_parameters()},
        "values": {name: tensor.tolist() for name, tensor in model.state_dict().items()},
        "torch": (F.linear, torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled()),
    }


def interrupted(objective):
    def fail(model, batch):
        objective(model, batch)
        raise KeyError("stop")

    return fail
