"""Any data set as `Data`: tensors, a map-style data set, or a DataLoader's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from .data import Data
from .examples import Examples, Tensors, as_is


def as_data(
    train: Any,
    val: Any = None,
    *,
    classes: Sequence[str] | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    name: str = "data",
) -> Data:
    """Make `Data` of whatever holds examples, for all that wants one; `Data` itself is returned as it is.

    Of a DataLoader its data set, its collating and its workers are taken: batches are cut, and their order is drawn, by
    `Data.batches`, so that every pass is fixed by a seed.

    Args:
        train: A DataLoader, a map-style data set, or tensors whose first axes are examples: one, or a tuple or dict of
            them; batches have the same structure.
        val: Held-out examples, likewise; None where nothing is to be measured.
        classes: Names of classes; None: of the data set, or as many as whole labels of (inputs, labels) go up to.
        collate: Makes a batch of a list of examples; None: a DataLoader's own, or torch's default.
        name: For messages, tables and settings.

    Raises:
        ValueError: iterable data sets, lists (of batches?) and all else whose examples cannot be drawn by number.

    Example:
        >>> as_data((torch.zeros(8, 3), torch.arange(8) % 2), (torch.zeros(4, 3), torch.arange(4) % 2))
        Data('data', train=Examples(8), val=Examples(4), 2 classes)
    """
    if isinstance(train, Data):
        return train
    if classes is not None and (isinstance(classes, str) or not isinstance(classes, Sequence)):
        raise ValueError(f"as_data: classes={classes!r}; expected names, one a class")
    splits = [None if given is None else _split(given, collate) for given in (train, val)]
    if splits[0] is None and val is None:
        raise ValueError("as_data: there are neither train nor val examples")
    known = _classes(splits[0] or splits[1])
    names = known if classes is None else tuple(classes)
    if len(known) > len(names):
        raise ValueError(f"as_data: label {len(known) - 1} is out of range for {len(names)} classes")
    return Data(*splits, names, None, name)


def _split(given: Any, collate: Callable[[list[Any]], Any] | None, refused: tuple[type, ...] = (list,)) -> Examples:
    if isinstance(given, DataLoader):
        split = _split(given.dataset, collate or given.collate_fn, refused=())
        return replace(split, workers=given.num_workers)
    if isinstance(given, TensorDataset):
        given = given.tensors if collate in (None, default_collate) else given
    leaves = tree_leaves(given)
    if isinstance(given, Tensor | tuple | Mapping) and leaves and all(isinstance(leaf, Tensor) for leaf in leaves):
        return Examples(Tensors(given), as_is)
    whole = hasattr(given, "__getitem__") and hasattr(given, "__len__")
    if isinstance(given, (*refused, tuple, Mapping, IterableDataset)) or not whole:
        raise ValueError(
            f"as_data: a {type(given).__name__} holds no examples that could be drawn by number; pass a DataLoader or "
            "a data set with __getitem__ and __len__, or tensors whose first axes are examples; two of them as "
            "as_data(train, val)"
        )
    return Examples(given, collate or default_collate)


def _classes(split: Examples) -> tuple[str, ...]:
    tensors = split.examples.tensors if isinstance(split.examples, Tensors) else None
    if isinstance(tensors, tuple) and len(tensors) == 2 and tensors[1].ndim == 1 and not tensors[1].is_floating_point():
        if (least := int(tensors[1].min())) < 0:
            raise ValueError(f"as_data: label {least}; class numbers count from 0")
        return tuple(map(str, range(int(tensors[1].max()) + 1)))
    return tuple(map(str, getattr(split.examples, "classes", ())))
