"""A split of any data set: how its examples become batches whose order a seed fixes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from .batches import Batch, Batches, Sampling, to_device


class Tensors(Dataset):
    """Examples along the first axis of tensors, in any structure; asked for a list of positions, a whole batch."""

    def __init__(self, tensors: Any):
        lengths = {len(tensor) if tensor.dim() else 0 for tensor in tree_leaves(tensors)}
        if len(lengths) != 1 or lengths == {0}:
            raise ValueError(f"as_data: tensors of {sorted(lengths)} examples; expected equally many, at least 1")
        self.tensors = tensors

    def __len__(self) -> int:
        return len(tree_leaves(self.tensors)[0])

    def __getitem__(self, position: int) -> Any:
        return tree_map(lambda tensor: tensor[position], self.tensors)

    def __getitems__(self, positions: Sequence[int]) -> Any:
        return self[torch.as_tensor(positions)]


def as_is(batch: Any) -> Any:
    """Return a batch that needs no collating."""
    return batch


@dataclass(frozen=True, eq=False, repr=False)
class Examples:
    """A split that is not images and class numbers alone.

    Args:
        examples: A map-style data set; what it augments, it augments itself.
        collate: Makes a batch of a list of examples.
        workers: Processes that read examples.
    """

    examples: Dataset
    collate: Callable[[list[Any]], Any] = default_collate
    workers: int = 0

    def __post_init__(self) -> None:
        if len(self) == 0:
            raise ValueError("as_data: the data set holds no examples")

    def __len__(self) -> int:
        return len(self.examples)

    def __repr__(self) -> str:
        return f"Examples({len(self)})"

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of the first tensor of an example, an image's where there are images."""
        first = next(iter(self.batches(Sampling(1), "cpu").at(0)))
        return tuple(next(leaf for leaf in tree_leaves(first) if isinstance(leaf, Tensor)).shape[1:])

    def at(self, positions: Tensor) -> Examples:
        """Return some of the examples, by their positions, int64."""
        if isinstance(self.examples, Tensors):
            return replace(self, examples=Tensors(self.examples[positions]))
        return replace(self, examples=Subset(self.examples, positions.tolist()))

    def batches(self, sampling: Sampling, device: torch.device | str) -> Batches:
        """Return the batches of this split on a device."""

        def draw(pass_number: int, start: int = 0) -> Iterator[Batch]:
            order = sampling.order(len(self), sampling.generator(pass_number))
            asked = [order[here].tolist() for here in sampling.rows(len(self), start)]
            # Without a generator of its own, a loader draws from torch's global one.
            own = {"num_workers": self.workers, "collate_fn": self.collate, "generator": torch.Generator()}
            for batch in DataLoader(self.examples, batch_sampler=asked, **own):
                yield to_device(batch, device)

        return Batches(draw, sampling.count(len(self)), parts=sampling.share[1])
