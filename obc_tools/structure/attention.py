"""Which channels of which layers the queries of an attention are made of.

An attention whose heads become narrower must keep its temperature, softmax(q·k / √(old width)); what it loses by a
scale that follows the width is put into the weights that make its queries. To find them, every tensor is shadowed by
the labels of the parameters that made it, and what rearranges the tensor rearranges the shadow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakIdKeyDictionary

from .flow import name_of, tensors_in
from .operations import ATTENTIONS

REARRANGING = ("view", "_unsafe_view", "_reshape_alias", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze",
               "select", "unbind", "slice", "split", "split_with_sizes", "chunk", "expand", "clone", "contiguous",
               "alias", "detach", "cat", "stack", "flip", "roll", "repeat", "index_select")  # fmt: skip
"""Operations that leave values as they are."""
PRODUCTS = {"mm": 1, "bmm": 1, "addmm": 2, "baddbmm": 2, "convolution": 1}
"""Operations linear in a weight, with the place of the weight among their arguments."""
NORMS = {"native_batch_norm": 1, "_native_batch_norm_legit_no_training": 1, "cudnn_batch_norm": 1,
         "native_group_norm": 1, "native_layer_norm": 2, "_fused_rms_norm": 2}  # fmt: skip
"""Norms, with the place of the weight, before the bias, among their arguments."""
MATRICES = {"mm": {0: -1, 1: -2}, "bmm": {0: -1, 1: -2}, "baddbmm": {1: -1, 2: -2}}
MATRICES |= {name: {0: -1, 1: -1} for name in ATTENTIONS}
"""Operations that sum over products, with the dimension that each of their arguments is summed over."""
SUMS = ("add", "sub")
FACTORS = ("mul", "div", "neg", "_to_copy")


@dataclass(frozen=True, eq=False)
class Shadow:
    """The labels that made a tensor, in its shape; one a summand. ``bare``: of a parameter, not of what it gave."""

    summands: tuple[Tensor, ...]
    bare: bool = False


@dataclass
class Shadows:
    """The shadows of the tensors of a forward pass.

    ``lost`` are the labels that made what went into other things than a sum of products over them.
    """

    known: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    moving: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    lost: list[np.ndarray] = field(default_factory=list)

    def register(self, parameter: Tensor, dim: int, labels: np.ndarray) -> None:
        """Shadow a parameter by the labels of its outputs."""
        shape = [-1 if other == dim else 1 for other in range(parameter.dim())]
        self.known[parameter] = Shadow((torch.from_numpy(labels).view(shape).expand(parameter.shape),), bare=True)

    def stand_in(self, alias: Tensor, tensor: Tensor) -> None:
        """Shadow an alias of a tensor as the tensor itself."""
        self._set(alias, self.known.get(tensor))
        if tensor in self.moving:
            self.move([alias])

    def move(self, tensors: Sequence[Tensor]) -> None:
        """Note that tensors depend on the model's input."""
        for tensor in tensors:
            self.moving[tensor] = True

    def of(self, tensor: Tensor) -> np.ndarray | None:
        """Return the labels that made a tensor, ascending, or None where they are not known."""
        found = self.known.get(tensor)
        if found is None:
            return None
        return np.unique(np.concatenate([_once(summand).reshape(-1).numpy() for summand in found.summands]))

    def note(self, function: Any, out: Any, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Shadow the results of one operation."""
        name = name_of(function).removesuffix("_")
        results = tensors_in((out,))
        if not results:
            return
        if any(tensor in self.moving for tensor in tensors_in((*args, *kwargs.values()))):
            self.move(results)
        if name in REARRANGING:
            self._rearrange(function, results, args, kwargs)
        elif name in PRODUCTS:
            self._set(results[0], self._product(name, results[0], args))
        elif name in NORMS:
            self._set(results[0], self._norm(name, results[0], args))
        else:
            self._set(results[0], self._elementwise(name, results[0], args))
        if not name.endswith("_like") and not name.startswith("new_"):
            self._lose(name, results, tensors_in((*args, *kwargs.values())))

    def spent(self, labels: np.ndarray) -> bool:
        """Say whether what any of these labels made went into other things than a sum of products over them."""
        return any(np.isin(labels, lost).any() for lost in self.lost)

    def _lose(self, name: str, results: Sequence[Tensor], taken: Sequence[Tensor]) -> None:
        """Note which labels go into an operation whose result is no more theirs."""
        if name in (*REARRANGING, *SUMS, *FACTORS) and results[0] in self.known:
            return
        shadows = [self.known.get(tensor) for tensor in taken]
        weighted = any(shadow is not None and shadow.bare for shadow in shadows)
        summed = {} if weighted else MATRICES.get(name, {})
        for place, shadow in enumerate(shadows):
            for summand in () if shadow is None or shadow.bare else shadow.summands:
                if place not in summed or not _varies(summand, summed[place]):
                    self.lost.append(_once(summand).reshape(-1).numpy())

    def _set(self, result: Tensor, shadow: Shadow | None) -> None:
        if shadow is not None:
            self.known[result] = shadow
        else:
            self.known.pop(result, None)

    def _rearrange(self, function: Any, results: Sequence[Tensor], args: tuple, kwargs: Mapping[str, Any]) -> None:
        shadows = [self.known.get(tensor) for tensor in tensors_in(args)]
        if (
            not shadows
            or None in shadows
            or isinstance(args[-1], torch.dtype)
            or len({len(shadow.summands) for shadow in shadows}) > 1
        ):
            return
        made = []
        for index in range(len(shadows[0].summands)):
            taken = tree_map(lambda leaf, i=index: self._summand(leaf, i), args)
            made.append(tensors_in((_apply(function, taken, kwargs),)))
        for number, result in enumerate(results):
            summands = tuple(pieces[number] for pieces in made)
            self.known[result] = Shadow(summands, all(shadow.bare for shadow in shadows))

    def _summand(self, leaf: Any, index: int) -> Any:
        return self.known[leaf].summands[index] if isinstance(leaf, Tensor) else leaf

    def _product(self, name: str, result: Tensor, args: tuple) -> Shadow | None:
        weight = self.known.get(args[PRODUCTS[name]])
        if weight is None or not weight.bare:
            return None
        if name == "convolution":
            taken = [_spread(w.select(1, 0).flatten(1)[:, 0], result, 1) for w in weight.summands if not args[6]]
            bias = args[2]
        else:
            taken = [w.narrow(-2, 0, 1).expand(result.shape) for w in weight.summands]
            bias = args[0] if "add" in name else None
        if bias is not None and bias in self.known:
            axis = 1 if name == "convolution" else result.dim() - 1
            taken += [_spread(b, result, axis) for b in self.known[bias].summands]
        elif bias is not None:
            return None
        return Shadow(tuple(taken)) if taken else None

    def _norm(self, name: str, result: Tensor, args: tuple) -> Shadow | None:
        place = NORMS[name]
        weights = [tensor for tensor in tensors_in(args[place : place + 2]) if tensor.dim() == 1]
        if not weights or any(weight not in self.known for weight in weights):
            return None
        dim = 1 if place == 1 else result.dim() - 1
        return Shadow(tuple(_spread(s, result, dim) for w in weights for s in self.known[w].summands))

    def _elementwise(self, name: str, result: Tensor, args: tuple) -> Shadow | None:
        if name not in SUMS + FACTORS:
            return None
        tensors = [tensor for tensor in tensors_in(args) if tensor.dim()]
        found = [(tensor, self.known.get(tensor)) for tensor in tensors]
        if name in SUMS and any(shadow is None for _, shadow in found):
            return None
        if name in FACTORS and sum(tensor in self.moving for tensor, _ in found) > 1:
            return None  # such as a norm, which undoes what its input is multiplied by
        whole = [shadow for tensor, shadow in found if shadow is not None and tensor.shape == result.shape]
        chosen = [shadow for _, shadow in found] if name in SUMS else whole[:1]
        summands = tuple(summand.expand(result.shape) for shadow in chosen for summand in shadow.summands)
        return Shadow(summands, all(shadow.bare for shadow in chosen)) if summands else None


def _apply(function: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    if name_of(function) in ("view", "_unsafe_view", "_reshape_alias"):
        return args[0].reshape(args[1])
    return function(*args, **kwargs)


def _once(summand: Tensor) -> Tensor:
    """Return a tensor without the copies of its values along dimensions that it was only expanded to."""
    return summand[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in summand.stride())]


def _varies(summand: Tensor, dim: int) -> bool:
    """Say whether different labels lie along a dimension."""
    return summand.shape[dim] > 1 and bool((summand.select(dim, 0) != summand.select(dim, 1)).all())


def _spread(labels: Tensor, result: Tensor, dim: int) -> Tensor:
    """Stretch labels along one dimension of a result to its shape."""
    return labels.reshape([-1 if other == dim else 1 for other in range(result.dim())]).expand(result.shape)


@dataclass(frozen=True, eq=False)
class Contraction:
    """A sum of products over channels in a module: its channels, and what one of its factors is made of.

    ``follows``: it is computed with torch's default scale, which follows the number of channels.
    """

    module: str
    labels: np.ndarray
    rows: np.ndarray | None
    follows: bool
