"""Batches: what scoring, training and evaluation iterate over, and how the examples of any data set become some.

For most tasks any structure of tensors is a batch: a tensor, tuples, lists and dicts of them, lists with one entry an
example. A batch of images to classify is a pair (images, labels): images float32 (size, channels, height, width),
normalised, and labels int64 (size,), both on the device that was asked for. Going once through a split of a data set
is a *pass*. Everything that chance decides about a pass (the order, the crops, the flips) is fixed by a seed and the
number of the pass, and drawn on the CPU, so that it is the same on every device, in a resumed run and for two methods
that are to be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from operator import length_hint
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from torchvision.transforms import v2

from ..errors import check_number, check_whole
from ..state import LentRandomness, check_iterable

Batch = Any
Draw = Callable[..., Iterator[Batch]]


@dataclass(frozen=True)
class Sampling:
    """How a split is cut into batches.

    Args:
        size: Images in a batch; the last batch of a pass may be smaller.
        seed: Together with the number of a pass, it fixes that pass.
        shuffle: A new order each pass.
        augment: New crops and flips each pass.
        drop_last: Leave out a last batch that is smaller than ``size``.
        repeats: Copies of an image in a pass, each augmented by itself; as many images the fewer are in it (repeated
            augmentation, Hoffer et al. 2020).
        share: Of every batch, whose rows these are: (part, parts), rows part, part + parts, … of ``size``.
        equal_shares: All parts have equally many rows: up to parts - 1 images of a pass are left out.
    """

    size: int
    seed: int = 0
    shuffle: bool = False
    augment: bool = False
    drop_last: bool = False
    repeats: int = 1
    share: tuple[int, int] = (0, 1)
    equal_shares: bool = False

    def __post_init__(self) -> None:
        check_whole("batch size", self.size, 1)
        check_whole("seed", self.seed, 0)
        if self.repeats < 1 or (self.repeats > 1 and not self.shuffle):
            raise ValueError(f"repeats must be at least 1, and 1 without shuffle, not {self.repeats}")
        part, parts = self.share
        if not 0 <= part < parts or self.size % parts:
            raise ValueError(f"share {self.share} of batches of {self.size}: part below parts, which divides the size")

    def used(self, images: int) -> int:
        """Return how many of so many images are in a pass."""
        parts = self.share[1] if self.equal_shares else 1
        return images // self.size * self.size if self.drop_last else images // parts * parts

    def count(self, images: int) -> int:
        """Return the number of batches in a pass over so many images; raise ValueError if there is none."""
        batches = -(-self.used(images) // self.size)
        if batches == 0:
            raise ValueError(f"no batch of {self.size} in {images} images: make batches smaller or keep the last one")
        return batches

    def rows(self, images: int, start: int = 0) -> Iterator[slice]:
        """Yield where this share's rows of each batch of a pass lie in its order, from batch ``start`` on."""
        used, (part, parts) = self.used(images), self.share
        for first in range(start * self.size, used, self.size):
            if first + part < used:
                yield slice(first + part, min(first + self.size, used), parts)

    def generator(self, pass_number: int) -> torch.Generator:
        """Return the random number generator of a pass, in its first state."""
        if pass_number < 0:
            raise ValueError(f"passes are counted from 0, there is no pass {pass_number}")
        # Mixed, for torch's CPU generator reads 32 bits only, and neighbouring passes should not resemble each other.
        mixed = np.random.SeedSequence((self.seed, pass_number)).generate_state(1)
        return torch.Generator().manual_seed(int(mixed[0]))

    def order(self, images: int, generator: torch.Generator) -> Tensor:
        """Return the positions of the images of a pass, int64, those of a dropped last batch left out."""
        order = torch.randperm(images, generator=generator) if self.shuffle else torch.arange(images)
        return order.repeat_interleave(self.repeats)[: self.used(images)]


class Batches:
    """Batches of a split, to iterate over as often as needed: each iteration is the next pass.

    ``draw(pass_number)`` makes a pass, ``draw(pass_number, start)`` one from its batch ``start`` on. ``parts``: these
    are one of so many processes' shares.

    Example:
        >>> batches = load_data("digits").batches("train", 128, seed=0)
        >>> frozen = list(batches)           # pass 0, kept
        >>> for images, labels in batches:   # pass 1, in another order
        ...     ...
        >>> again = batches.at(0)            # pass 0, every time it is iterated over
    """

    def __init__(self, draw: Draw, length: int, numbers: Iterator[int] | None = None, parts: int = 1) -> None:
        self._draw = draw
        self._length = length
        self._numbers = count() if numbers is None else numbers
        self.parts = parts

    def __len__(self) -> int:
        """Return the number of batches in a pass."""
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        return self._pass(next(self._numbers))

    def at(self, pass_number: int, start: int = 0) -> Batches:
        """Return one pass, counted from 0, from its batch ``start`` on: the same whenever it is iterated over."""
        return Batches(lambda _, later=0: self._pass(pass_number, start + later), len(self) - start, parts=self.parts)

    def first(self, length: int) -> Batches:
        """Return the first batches of each pass; what is iterated over here and there counts the same passes."""
        _check_length(length, len(self))

        def draw(pass_number: int, start: int = 0) -> Iterator[Batch]:
            seen = start
            for batch in islice(self._pass(pass_number, start), length - start):
                seen += 1
                yield batch
            _check_length(length, seen)

        return Batches(draw, length, self._numbers, self.parts)

    def map(self, change: Callable[[int, int, Batch], Batch]) -> Batches:
        """Return these batches, each changed by ``change(number of the pass, number in the pass, batch)``."""

        def draw(pass_number: int, start: int = 0) -> Iterator[Batch]:
            for number, batch in enumerate(self._pass(pass_number, start), start):
                yield change(pass_number, number, batch)

        return Batches(draw, self._length, self._numbers, self.parts)

    def _pass(self, pass_number: int, start: int = 0) -> Iterator[Batch]:
        return self._draw(pass_number, start) if start else self._draw(pass_number)


def as_batches(batches: Iterable[Batch], length: int) -> Batches:
    """Return as `Batches` what can be gone through again and again, in passes of a length; each is as it comes."""
    return batches if isinstance(batches, Batches) else Batches(lambda _, start=0: islice(batches, start, None), length)


def take(batches: Iterable[Batch], length: int) -> Batches:
    """Take the first batches of every pass, lazily: each iteration gives those of the next pass.

    Args:
        batches: ``Batches``, a list of batches, a DataLoader: whatever can be gone through again and again.
        length: How many, at least 1 and at most what a pass holds.

    Raises:
        ValueError: For a generator or another one-shot iterator, and for more batches than a pass holds.

    Example:
        >>> batches = take(load_data("digits").batches("train", 128), 3)
        >>> len(batches)
        3
    """
    if isinstance(batches, Iterator):
        raise ValueError(
            f"take: a {type(batches).__name__} can be gone through only once; pass Batches, a DataLoader or "
            "a list of batches"
        )
    check_whole("take: length", length, 1)
    return as_batches(batches, length_hint(check_iterable(batches), length)).first(length)


def _check_length(length: int, available: int) -> None:
    check_whole("take: length", length, 1)
    if available < length:
        more = f": ask for at most {available}, or for smaller ones" if available else ""
        raise ValueError(f"take: {length} batches were asked for, a pass holds {available}{more}")


TARGETS = "labels"


def inputs_and_targets(batch: Any) -> tuple[Any, Any]:
    """Return what a model is called with, and what it is to say: None where the batch has no targets.

    A pair is (inputs, targets); a mapping holds targets as "labels", the rest are keyword arguments; all else is inputs
    (one tensor of a tuple of one).
    """
    if isinstance(batch, Mapping):
        return {key: part for key, part in batch.items() if key != TARGETS}, batch.get(TARGETS)
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    return (batch[0] if isinstance(batch, tuple | list) and len(batch) == 1 else batch), None


def with_inputs_of(batch: Any, dtype: torch.dtype) -> Any:
    """Return a batch with the floating tensors of its inputs in another precision; its targets stay as they are."""

    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    if isinstance(batch, Mapping):
        return {key: part if key == TARGETS else tree_map(cast, part) for key, part in batch.items()}
    if isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, targets = tree_map(cast, batch[0]), batch[1]
        return type(batch)(inputs, targets) if hasattr(batch, "_fields") else type(batch)((inputs, targets))
    return tree_map(cast, batch)


def to_device(batch: Any, device: torch.device | str) -> Any:
    """Return a batch with all of its tensors on a device; its structure and whatever else it holds stay."""
    return tree_map(lambda leaf: leaf.to(device, non_blocking=True) if hasattr(leaf, "to") else leaf, batch)


def count_examples(batch: Any) -> int:
    """Return the number of examples in a batch: the length of its first tensor or, within it, of its first list.

    Raises:
        ValueError: the batch holds neither.
    """
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else (batch,)
    for part in parts:
        if isinstance(part, list | tuple) or (isinstance(part, Tensor) and part.ndim):
            return len(part)
        if isinstance(part, Mapping):
            return count_examples(part)
    raise ValueError(f"a batch of type {type(batch).__name__} holds no tensor whose first axis counts its examples")


def cut_batch(batch: Any, pieces: int) -> list[Any]:
    """Cut a batch into at most so many pieces of consecutive examples.

    Raises:
        ValueError: a tensor or list in it has no entry an example, so that nobody knows which piece it belongs to.
    """
    examples = count_examples(batch)
    size = -(-examples // pieces)
    return [_slice(batch, slice(start, start + size), examples) for start in range(0, examples, size)]


def first_examples(batch: Any, count: int) -> Any:
    """Return a batch of the first examples of another; raise ValueError as `cut_batch` does."""
    return _slice(batch, slice(count), count_examples(batch))


def _slice(batch: Any, chosen: slice, examples: int, outermost: bool = True) -> Any:
    if isinstance(batch, Mapping):
        return {key: _slice(part, chosen, examples, False) for key, part in batch.items()}
    if isinstance(batch, tuple | list) and outermost:
        return type(batch)(_slice(part, chosen, examples, False) for part in batch)
    if not isinstance(batch, Tensor | tuple | list) or (isinstance(batch, Tensor) and not batch.ndim):
        return batch
    if len(batch) != examples:
        raise ValueError(f"a batch of {examples} examples holds {len(batch)} of something: it cannot be cut in pieces")
    return batch[chosen]


def crop_and_flip(images: Tensor, shifts: Tensor, flips: Tensor, padding: int) -> Tensor:
    """Shift each image within a border of zeros, then mirror some: the usual augmentation for small images, batched.

    Args:
        images: (n, channels, height, width), any type.
        shifts: Int64 (n, 2), first row and column of each crop in the padded image, 0 to 2 * padding.
        flips: Bool (n,), which crops to mirror left to right.
        padding: Pixels of zeros added to each side.

    Returns:
        The crops, of the images' shape and type.
    """
    n, channels, height, width = images.shape
    padded = F.pad(images, [padding] * 4).flatten(2)
    rows = shifts[:, :1] + torch.arange(height, device=images.device)
    columns = shifts[:, 1:] + torch.arange(width, device=images.device)
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    positions = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]
    # One gather over flattened images takes a third of the time of indexing rows and columns.
    return padded.gather(2, positions.reshape(n, 1, -1).expand(-1, channels, -1)).reshape(images.shape)


RAND_AUGMENT_LEVELS = 31


@dataclass(frozen=True)
class Augmentation:
    """How training images are augmented; checked when built.

    Attributes:
        crop: Random crops and flips, those of the kind of images.
        rand_augment: Magnitude of RandAugment (Cubuk et al. 2020), two operations an image, 0 to 30; 0: none. Image
            files only.
        erase: Share of images of which a random rectangle becomes the mean colour (Zhong et al. 2020), in [0, 1].
        mixup: α of Mixup (Zhang et al. 2018), 0: none. Labels become shares of the classes, (images, classes).
        cutmix: α of CutMix (Yun et al. 2019), likewise. With both, each batch gets one of them, evenly drawn.
        repeats: Copies of an image in a pass, see `Sampling`.
    """

    crop: bool = True
    rand_augment: int = 0
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    repeats: int = 1

    def __post_init__(self) -> None:
        check_whole("rand_augment", self.rand_augment, 0)
        if not 0 <= self.rand_augment < RAND_AUGMENT_LEVELS or (self.rand_augment and not self.crop):
            most = RAND_AUGMENT_LEVELS - 1
            raise ValueError(f"rand_augment is {self.rand_augment}; it is 0 to {most}, and 0 without crop")
        check_number("erase", self.erase, "a share of images, 0 to 1", lambda share: 0 <= share <= 1)
        for name in ("mixup", "cutmix"):
            check_number(name, getattr(self, name), "a number of 0 or above", lambda alpha: 0 <= alpha < math.inf)
        check_whole("repeats", self.repeats, 1)

    @property
    def changes_batches(self) -> bool:
        """Say whether it does anything to whole batches."""
        return bool(self.erase or self.mixup or self.cutmix)


def augment_batches(batches: Batches, augmentation: Augmentation, classes: int, seed: int, part: int = 0) -> Batches:
    """Erase in, and mix, normalised batches; ``part`` sets the draws of one process's share apart from the others'."""
    if not augmentation.changes_batches:
        return batches
    erase = v2.RandomErasing(p=augmentation.erase)
    mixes = [v2.MixUp(alpha=augmentation.mixup, num_classes=classes)] if augmentation.mixup else []
    mixes += [v2.CutMix(alpha=augmentation.cutmix, num_classes=classes)] if augmentation.cutmix else []
    mix = v2.RandomChoice(mixes) if mixes else None

    def change(pass_number: int, number: int, batch: Batch) -> Batch:
        images, labels = batch
        drawn = np.random.SeedSequence((seed, pass_number, number, part)).generate_state(1)
        # The transforms draw from torch's global generator: it is borrowed, and given back as it was.
        with LentRandomness(int(drawn[0])):
            if augmentation.erase:
                images = torch.stack([erase(image) for image in images])
            return mix(images, labels) if mix else (images, labels)

    return batches.map(change)


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
