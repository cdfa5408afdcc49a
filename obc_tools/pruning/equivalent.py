"""Equivalent Pruning: fine-tune with every original connection still contributing, then merge exactly.

After Chen et al. 2025 (arXiv 2508.05521, section on Equivalent Pruning). A compressor C (kept x full) stands right
after a pruned layer, a decompressor D (full x kept) right before each consumer; both start as the selection of the
kept channels and are trained with the full weights W. All three maps are linear and pointwise, so the network *is* the
pruned one with effective weights C·W·D and bias C·b. That is how it is computed here: the pruned skeleton runs on
effective weights, one small matrix product a layer and step, and merging stores them.

Grouped convolutions have one block of C and D a convolution group, torch's attention one each for q, k and v. Depthwise
weights, norms and bare parameters cannot be mixed; they are plainly selected.
"""

from __future__ import annotations

import functools
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ..state import alone, check_module, copy_of, without_weight_norms
from ..structure.layers import LayerAxis, get_layer, is_projection, kernel_dims, layer_axes, own_parameters
from ..structure.shrinking import is_attribute
from .plan import PlanMismatchError, PruningPlan, prune

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mixing:
    """How a weight is mixed: in the form (blocks, outputs, rest, inputs), for any number of outputs and inputs.

    ``out`` and ``into`` are the dimensions of the weight that run over them. ``blocks``: the convolution groups or
    ``parts`` (q, k, v) into which its first dimension is split. ``rest`` holds the kernel and the ``stride`` positions
    of one input channel, above 1 behind a flattening.
    """

    weight: str
    bias: str | None
    out: int
    into: int
    blocks: int
    parts: int
    stride: int
    rest: tuple[int, ...]

    @classmethod
    def of(cls, layer: nn.Module, name: str = "", stride: int = 1) -> Mixing | None:
        """Return how a layer is mixed, or None where it cannot be."""
        axes, parameters = layer_axes(layer, name), own_parameters(layer)
        if not any(axis.mixable for axis in axes.values()):
            return None
        into = axes["in"].slots[0]
        out = next(slot for slot in axes["out"].slots if slot.tensor == into.tensor)
        bias = next((slot.tensor for slot in axes["out"].slots if slot is not out), None)
        shape = parameters[out.tensor].shape
        rest = [stride if dim == into.dim else size for dim, size in enumerate(shape) if dim != out.dim]
        blocks = max(out.parts, out.groups, into.groups)
        return cls(out.tensor, bias, out.dim, into.dim, blocks, out.parts, stride, tuple(rest))

    @property
    def _dims(self) -> tuple[int, int]:
        """Where outputs and inputs lie in a weight with its blocks before and the stride behind the inputs."""
        return self.out + 1 + (self.out > self.into), self.into + 1

    def split(self, weight: Tensor) -> Tensor:
        """Return the layer's weight in mixing form."""
        apart = weight.unflatten(0, (self.blocks, -1)).unflatten(self.into + 1, (-1, self.stride))
        return apart.movedim(self._dims, (1, -1)).flatten(2, -2)

    def join(self, mixed: Tensor) -> Tensor:
        """Return a weight in the layer's own layout, contiguous: the inverse of `split`."""
        apart = mixed.unflatten(2, self.rest).movedim((1, -1), self._dims)
        return apart.flatten(self.into + 1, self.into + 2).flatten(0, 1).contiguous()


class MixedLayer(nn.Module):
    """The full weights of one layer with its compressor and decompressor, in the form of a `Mixing`.

    Shapes: weight (blocks, outputs, rest, inputs), bias (blocks, outputs), compressor (blocks, kept, outputs),
    decompressor (blocks, inputs, kept). A compressor or decompressor is None where its axis lost nothing. Weight and
    bias train where those given do, the maps where the weight does.
    """

    def __init__(
        self,
        mixing: Mixing,
        weight: Tensor,
        bias: Tensor | None,
        compressor: Tensor | None,
        decompressor: Tensor | None,
    ):
        super().__init__()
        self.mixing = mixing
        trains = weight.requires_grad
        values = weight.detach().clone(memory_format=torch.contiguous_format)
        self.weight = nn.Parameter(values, requires_grad=trains)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        self.compressor = None if compressor is None else nn.Parameter(compressor, requires_grad=trains)
        self.decompressor = None if decompressor is None else nn.Parameter(decompressor, requires_grad=trains)

    @property
    def names(self) -> tuple[str, ...]:
        """What of the layer is mixed."""
        return (self.mixing.weight,) if self.bias is None else (self.mixing.weight, self.mixing.bias)

    def effective(self) -> dict[str, Tensor]:
        """Return C·W·D and, where it is mixed, C·b, by their names in the layer and in its own layout."""
        with torch.autocast(self.weight.device.type, enabled=False):
            if self._compress_first():
                weight = self._decompress(self._compress(self.weight))
            else:
                weight = self._compress(self._decompress(self.weight))
            bias = None if self.bias is None else (self.compressor @ self.bias[..., None]).flatten()
            return dict(zip(self.names, (self.mixing.join(weight), bias), strict=False))

    @torch.no_grad()
    def begin_at(self, parameters: Mapping[str, Tensor]) -> None:
        """Move D to the least squares of C·W·D on a pruned layer's weight, and W and b by what is still missing.

        Afterwards C·W·D is that weight and C·b, where b is mixed, that bias. All other rows of W and b stay.
        """
        weight = self.mixing.split(parameters[self.mixing.weight])
        if self.decompressor is not None:
            compressed = self._compress(self.weight).flatten(1, 2)
            missing = weight.flatten(1, 2) - compressed @ self.decompressor
            self.decompressor += torch.linalg.pinv(compressed) @ missing
        effective = self._compress(self._decompress(self.weight))
        missing = (weight - effective).flatten(1, 2)
        if self.decompressor is not None:
            missing = missing @ torch.linalg.pinv(self.decompressor)
        missing = missing.unflatten(1, weight.shape[1:3])
        back = None if self.compressor is None else torch.linalg.pinv(self.compressor)
        self.weight += missing if back is None else (back @ missing.flatten(2)).unflatten(2, missing.shape[2:])
        if self.bias is not None:
            bias = parameters[self.mixing.bias].view(len(self.bias), -1)
            self.bias += (back @ (bias - (self.compressor @ self.bias[..., None])[..., 0])[..., None])[..., 0]

    def _compress_first(self) -> bool:
        """Say which product first costs fewer multiplications."""
        if self.compressor is None or self.decompressor is None:
            return True
        kept_out, outputs = self.compressor.shape[1:]
        inputs, kept_in = self.decompressor.shape[1:]
        return kept_out * inputs * (outputs + kept_in) <= kept_in * outputs * (inputs + kept_out)

    def _compress(self, weight: Tensor) -> Tensor:
        if self.compressor is None:
            return weight
        return (self.compressor @ weight.flatten(2)).unflatten(2, weight.shape[2:])

    def _decompress(self, weight: Tensor) -> Tensor:
        if self.decompressor is None:
            return weight
        return (weight.flatten(1, 2) @ self.decompressor).unflatten(1, weight.shape[1:3])


class EquivalentModel(nn.Module):
    """The pruned network with every original connection still contributing; call and train it like the model.

    Methods, attributes and layers of the network are reached by their names (`generate`, `encode_image`, `config`) and
    run on effective weights; `skeleton` itself is not to be called. Activation checkpointing works.

    A weight that is frozen (``requires_grad`` False) stays what it is in the pruned network: its W, C and D are frozen,
    because a trained C or D would change it as surely as a trained W. A frozen bias of a weight that trains is plainly
    selected. Merging hands the flags on. Tied weights (an embedding and a head) share W and one map, and are merged
    tied.

    Args:
        model: the unpruned model; left unchanged.
        plan: which channels stay.
        start: a network with the keys and shapes of `prune(model, plan)`, such as `compensate` returns, to begin at;
            left unchanged.

    Before training it computes what `prune(model, plan)` computes, or what `start` does: its decompressors begin where
    C·W·D is nearest to the start's weights, and the full weights take what a mixture of channels cannot express.
    `merge` returns the plain pruned network.

    Raises:
        PlanMismatchError: the plan does not fit the model, or the start is not what the plan leaves of it.
        ValueError: a weight that is shared by layers which mix it differently (says which).
    """

    def __init__(self, model: nn.Module, plan: PruningPlan, *, start: nn.Module | None = None):
        super().__init__()
        with alone(model):
            self._build(model, plan, start)

    def _build(self, model: nn.Module, plan: PruningPlan, start: nn.Module | None) -> None:
        self.skeleton = prune(model, plan)
        model = without_weight_norms(model)
        if start is not None:
            self.skeleton = _like(self.skeleton, start)
        self.mixed = nn.ModuleDict()
        kept: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
        for axis, positions in plan.shrunk.items():
            if not is_attribute(axis.axis) and isinstance(get_layer(model, axis.layer), nn.Module):
                kept[axis.layer][axis.axis] = positions
        for name, positions in kept.items():
            mixed = _mix(model, plan, name, positions)
            if mixed is not None:
                if start is not None:
                    mixed.begin_at(self.skeleton.get_submodule(name)._parameters)
                self.mixed[name.replace("/", "%2F").replace(".", "/") or "/"] = mixed
        self._tied = _share_tied(model, self.mixed_layers)
        for layer, leaf in self._places():
            # Where they were: merged parameters come in the order of the pruned model's.
            layer._parameters[leaf] = None
        if plan.shrunk and not self.mixed:
            kinds = sorted({type(get_layer(model, axis.layer)).__name__ for axis in plan.shrunk})
            logger.warning("nothing can be mixed (%s): this trains as the pruned network alone", ", ".join(kinds))
        self.train(model.training)

    @property
    def mixed_layers(self) -> dict[str, MixedLayer]:
        """The layers that have a compressor or a decompressor, by name."""
        return {key.strip("/").replace("/", ".").replace("%2F", "/"): mixed for key, mixed in self.mixed.items()}

    def effective_parameters(self) -> dict[str, Tensor]:
        """Return the effective weights and biases by their names in the pruned model; differentiable in W, C and D.

        Tied ones are one tensor.
        """
        found = {}
        for name, mixed in self.mixed_layers.items():
            found |= {_join(name, leaf): value for leaf, value in mixed.effective().items()}
        return found | {name: found[source] for name, source in self._tied.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._effective():
            return self.skeleton(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "skeleton" not in self.__dict__.get("_modules", ()):
                raise
        return _reach(self, self.skeleton, name)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and files take W, C and D; what the last pass left in the layers is no leaf and cannot be copied.
        for layer, leaf in self._places():
            layer.__dict__.pop(leaf, None)
        return self.__dict__

    def _places(self) -> list[tuple[nn.Module, str]]:
        """Return the layers of the skeleton whose parameters are effective ones, with the parameters' names there."""
        names = [_join(name, leaf) for name, mixed in self.mixed_layers.items() for leaf in mixed.names]
        return [_place(self.skeleton, name) for name in dict.fromkeys((*names, *self._tied))]

    @contextmanager
    def _effective(self) -> Iterator[None]:
        """Let the skeleton's layers hold their effective parameters.

        Afterwards these are plain attributes, no parameters: activation checkpointing recomputes in the backward pass.
        """
        found = [(*_place(self.skeleton, name), value) for name, value in self.effective_parameters().items()]
        for layer, leaf, value in found:
            layer.__dict__.pop(leaf, None)
            layer._parameters[leaf] = value
        try:
            yield
        finally:
            for layer, leaf, value in found:
                layer._parameters[leaf] = None
                layer.__dict__[leaf] = value

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Return the plain pruned network: the keys and shapes of `prune(model, plan)`, the function of this model.

        Raises:
            ValueError: an effective weight is not finite (says the layer); nothing is built then.
        """
        effective = self.effective_parameters()
        for name, value in effective.items():
            if not torch.isfinite(value).all():
                raise ValueError(f"cannot merge: the effective {name!r} is not finite; training diverged")
        merged = copy_of(self).skeleton
        trains = self._trained()
        # In the order in which a saved weight comes back, or convolutions round differently after loading.
        made = {
            id(value): nn.Parameter(value.clone(memory_format=torch.contiguous_format), requires_grad=trains[name])
            for name, value in effective.items()
        }
        for name, value in effective.items():
            layer, leaf = _place(merged, name)
            layer._parameters[leaf] = made[id(value)]
        return merged

    def _trained(self) -> dict[str, bool]:
        """Say which of the effective parameters are not frozen."""
        found = {}
        for name, mixed in self.mixed_layers.items():
            held = zip(mixed.names, (mixed.weight, mixed.bias), strict=False)
            found |= {_join(name, leaf): parameter.requires_grad for leaf, parameter in held}
        return found | {name: found[source] for name, source in self._tied.items()}

    def extra_repr(self) -> str:
        mixed = self.mixed.values()
        compressors = sum(layer.compressor is not None for layer in mixed)
        decompressors = sum(layer.decompressor is not None for layer in mixed)
        return f"{compressors} compressors, {decompressors} decompressors"


class _Part:
    """A layer inside an `EquivalentModel`, reached by its name: it and what it holds run on effective weights."""

    def __init__(self, equivalent: EquivalentModel, layer: nn.Module):
        self._equivalent, self._layer = equivalent, layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._equivalent._effective():
            return self._layer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return _reach(self._equivalent, self._layer, name)

    def __getitem__(self, key: Any) -> Any:
        return _Part(self._equivalent, self._layer[key])

    def __iter__(self) -> Iterator[Any]:
        return (_Part(self._equivalent, layer) for layer in self._layer)

    def __len__(self) -> int:
        return len(self._layer)

    def __repr__(self) -> str:
        return repr(self._layer)


def _reach(equivalent: EquivalentModel, layer: nn.Module, name: str) -> Any:
    """Return an attribute of a layer of the skeleton so that what it runs sees the effective weights."""
    with equivalent._effective():
        found = getattr(layer, name)
    if isinstance(found, nn.Module):
        return _Part(equivalent, found)
    if getattr(found, "__self__", None) is not layer:
        return found

    @functools.wraps(found)
    def run(*args: Any, **kwargs: Any) -> Any:
        with equivalent._effective():
            return found(*args, **kwargs)

    return run


def _join(layer: str, leaf: str) -> str:
    return f"{layer}.{leaf}".strip(".")


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the layer that holds a parameter, and the parameter's name there."""
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner), leaf


def _like(pruned: nn.Module, start: nn.Module) -> nn.Module:
    """Return a copy of a start; raise PlanMismatchError unless it has the keys and shapes of the pruned network."""
    check_module(start)
    ours, theirs = ({key: tuple(value.shape) for key, value in m.state_dict().items()} for m in (pruned, start))
    wrong = next((key for key in ours | theirs if ours.get(key) != theirs.get(key)), None)
    if wrong is not None:
        found = f"{theirs.get(wrong, 'missing')} in the start, {ours.get(wrong, 'missing')} by the plan"
        raise PlanMismatchError(f"the start is not what the plan leaves of the model: {wrong!r} is {found}")
    return copy_of(start)


def _mix(model: nn.Module, plan: PruningPlan, name: str, kept: dict[str, tuple[int, ...]]) -> MixedLayer | None:
    """Return the mixed form of a layer of the unpruned model, or None where nothing that it lost can be mixed."""
    layer = get_layer(model, name)
    stride = _stride(plan, layer, LayerAxis(name, "in")) if "in" in kept else 1
    mixing = Mixing.of(layer, name, stride)
    if mixing is None:
        return None
    held = own_parameters(layer)
    weight = mixing.split(held[mixing.weight])
    blocks, outputs, _, inputs = weight.shape
    compressor = decompressor = bias = None
    if "out" in kept:
        positions = _in_parts(kept["out"], mixing.parts, outputs)
        compressor = (selection_matrix(positions, blocks, outputs) * _factors(plan, name, positions, blocks)).to(weight)
        # None that is frozen goes through a compressor that is trained.
        if mixing.bias and (held[mixing.bias].requires_grad or not held[mixing.weight].requires_grad):
            bias = held[mixing.bias].view(blocks, outputs)
    if "in" in kept:
        units = _in_parts([position // stride for position in kept["in"][::stride]], mixing.parts, inputs)
        decompressor = selection_matrix(units, blocks, inputs).mT.contiguous().to(weight)
    return MixedLayer(mixing, weight, bias, compressor, decompressor)


def _in_parts(kept: Sequence[int], parts: int, width: int) -> tuple[int, ...]:
    """Return kept positions of an axis for all parts (q, k and v) one after the other."""
    return tuple(part * width + position for part in range(parts) for position in kept)


def _factors(plan: PruningPlan, name: str, kept: tuple[int, ...], groups: int) -> Tensor:
    """Return what a layer's kept outputs are multiplied by so that attentions keep their temperature, as a column."""
    positions, factor = plan.scaled.get(name, ((), 1.0))
    queries = frozenset(positions)
    found = [factor if position in queries else 1.0 for position in kept]
    return torch.tensor(found, dtype=torch.float64).view(groups, -1, 1)


def selection_matrix(kept: tuple[int, ...], groups: int, width: int) -> Tensor:
    """Return the matrices that select the kept channels, one block a group: shape (groups, kept a group, width)."""
    inside = torch.tensor(kept).view(groups, -1) - width * torch.arange(groups)[:, None]
    return nn.functional.one_hot(inside, width)


def _share_tied(model: nn.Module, mixed: Mapping[str, MixedLayer]) -> dict[str, str]:
    """Let layers that share a parameter share W and the maps; return which parameter takes its value from which.

    Raises:
        ValueError: they mix it differently.
    """
    names: dict[Tensor, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    effective = {_join(name, leaf): name for name, layer in mixed.items() for leaf in layer.names}
    tied = {}
    for shared in names.values():
        source, *others = sorted(shared, key=lambda name: name not in effective)
        for other in others if source in effective else ():
            if _place(model, source) == _place(model, other):
                continue  # One layer under two names.
            if other in effective:
                _share_one(source, mixed[effective[source]], other, mixed[effective[other]])
            tied[other] = source
    return tied


def _share_one(source: str, first: MixedLayer, other: str, second: MixedLayer) -> None:
    """Let two layers with one weight share it and its maps."""
    if source.rpartition(".")[2] == first.mixing.bias:
        second.bias = first.bias
        return
    for leaf in ("weight", "compressor", "decompressor"):
        ours, theirs = getattr(first, leaf), getattr(second, leaf)
        if (ours is None) != (theirs is None) or (ours is not None and not torch.equal(ours, theirs)):
            raise ValueError(f"{source!r} and {other!r} are one parameter, but the two layers mix it differently")
        setattr(second, leaf, ours)


def _stride(plan: PruningPlan, layer: nn.Module, axis: LayerAxis) -> int:
    """Return how many neighbouring positions of an input axis are mixed as one channel.

    Above 1 only behind a flattening, where equal runs of positions belong to one channel each.
    """
    members = [member for group in plan.groups for member in group.members if member.axis == axis]
    strides = {len(member.positions) // len(set(member.channels)) for member in members}
    stride = strides.pop()
    regular = not strides and all(
        len({c for p, c in zip(m.positions, m.channels, strict=True) if p // stride == unit}) == 1
        for m in members
        for unit in {p // stride for p in m.positions}
    )
    return stride if regular and is_projection(layer) and not kernel_dims(layer) else 1


def removed_shares(start: EquivalentModel, trained: EquivalentModel) -> pd.DataFrame:
    """Return, layer by layer, which share of C and of D lies on channels that were removed.

    Columns: layer, compressor, decompressor; each the share of the squared entries, in [0, 1], None where a layer has
    none. All 0 before training.

    Args:
        start: as built, before any training: it says which channels were kept.
        trained: built of the same model by the same plan, then trained.

    Raises:
        ValueError: the two mix different layers.
    """
    if list(start.mixed_layers) != list(trained.mixed_layers):
        raise ValueError("the two models mix different layers: build both of one model by one plan")
    pairs = zip(start.mixed_layers.items(), trained.mixed_layers.values(), strict=True)
    rows = [
        (name, _share(before.compressor, after.compressor, 1), _share(before.decompressor, after.decompressor, 2))
        for (name, before), after in pairs
    ]
    return pd.DataFrame(rows, columns=["layer", "compressor", "decompressor"])


def _share(before: Tensor | None, after: Tensor | None, kept_dim: int) -> float | None:
    """Return the share of a matrix outside the channels that its start selects; ``kept_dim`` runs over kept ones."""
    if before is None or after is None:
        return None
    selected = before.detach().abs().sum(kept_dim, keepdim=True) > 0
    squares = after.detach().double().square()
    return (squares * ~selected).sum().item() / squares.sum().item()
