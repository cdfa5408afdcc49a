"""Data sets by name: digits (built in), CIFAR-10 and -100, ImageNet, any folder of images; or made by `as_data`.

    data = load_data("cifar10", root="~/data", download=True)
    for images, labels in data.batches("train", 128, seed=0, augment=True, device="cuda"):
        ...

``data.train`` and ``data.val`` are the two splits; held-out images are ``val`` also where a data set says "test".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from ..errors import NoDataError, check_number, check_whole
from .batches import Augmentation, Batches, Examples, Sampling, Tensors, as_is, augment_batches, with_inputs_of
from .embedded import DIGITS, EMBEDDED, hold_out_digits, read_digits
from .images import CIFAR_CLASSES, ImageFiles, Images, Normalization, read_cifar, read_folders

Split = Images | ImageFiles | Examples
DATA_SETS = ("digits", "cifar10", "cifar100", "imagenet", "folder", *EMBEDDED)

_LARGE = {
    "imagenet": Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
# The published curves of criteria use these for both CIFARs; trainings use each set's own statistics.
_BENCHMARK = Normalization((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255))

NORMALIZATIONS: Mapping[str, Mapping[str, Normalization]] = {
    "cifar10": {
        "training": Normalization((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        "benchmark": _BENCHMARK,
    },
    "cifar100": {
        "training": Normalization((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
        "benchmark": _BENCHMARK,
    },
    "imagenet": _LARGE,
    "folder": _LARGE,
}
"""By data set, the default first."""


@dataclass(frozen=True, eq=False, repr=False)
class Data:
    """A data set: two splits, the names of the classes, and how images are normalised.

    Attributes:
        train: Images to learn from; None where only held-out images are there.
        val: Held-out images; the test images of a data set that has no others.
        classes: Names, in the order in which labels count them; none where examples have no single label.
        normalization: Of every batch of images; None for examples that are ready as they are.
        name: As given to ``load_data``.
    """

    train: Split | None
    val: Split | None
    classes: tuple[str, ...]
    normalization: Normalization | None
    name: str = "data"

    def __post_init__(self) -> None:
        splits = {name: split for name, split in (("train", self.train), ("val", self.val)) if split is not None}
        if not splits:
            raise ValueError(f"{self.name}: there are neither train nor val images")
        for name, split in splits.items():
            if isinstance(split, Examples):
                continue
            if (label := int(split.labels.max())) >= len(self.classes):
                raise ValueError(f"{self.name}: {name} label {label} is out of range for {len(self.classes)} classes")
            if len(self.normalization.mean) != split.image_shape[0]:
                raise ValueError(
                    f"{self.name}: images have {split.image_shape[0]} channels, the normalisation is for "
                    f"{len(self.normalization.mean)}"
                )

    def __repr__(self) -> str:
        return f"Data('{self.name}', train={self.train}, val={self.val}, {len(self.classes)} classes)"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image, as a network needs to know them."""
        return (self.train or self.val).image_shape

    def batches(
        self,
        split: str,
        size: int,
        *,
        seed: int = 0,
        augment: bool | Augmentation = False,
        shuffle: bool | None = None,
        drop_last: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        workers: int | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> Batches:
        """Return the batches of a split: each iteration is the next pass, fixed by the seed and its number.

        Args:
            split: "train" or "val".
            size: Images in a batch.
            seed: Fixes the order and the augmentation of every pass, the same on every device.
            augment: Random crops and flips, as in training, or all that an `Augmentation` says. Off by default, also
                for "train". Examples of one's own are augmented by their data set alone.
            shuffle: A new order each pass. None: for "train" only.
            drop_last: Leave out a last batch that is smaller than ``size``.
            device: Where batches are made, normalised and returned; the model's.
            dtype: Of floating inputs, such as a network's own; None: as they are.
            workers: Processes that decode images from disk. None: one a CPU, at most 8. Images in memory need none.
            share: (rank, processes) where several train together: this process gets every so-manieth image of each
                batch of ``size``. Shares of "train" are equally large.

        Raises:
            ValueError: For a split that is unknown or not there, a size below 1, or a pass without any batch.
        """
        images = self._split(split)
        shuffle = split == "train" if shuffle is None else shuffle
        chosen = augment if isinstance(augment, Augmentation) else Augmentation(crop=augment)
        sampling = Sampling(size, seed, shuffle, chosen.crop, drop_last, chosen.repeats, share, split == "train")
        if isinstance(images, Examples):
            if chosen.changes_batches or chosen.rand_augment:
                raise ValueError(f"{self.name}: only images with one label each are mixed or erased in here")
            drawn = images.batches(sampling, device)
        elif isinstance(images, ImageFiles):
            drawn = images.batches(sampling, self.normalization, device, workers, chosen.rand_augment)
        elif chosen.rand_augment:
            raise ValueError(f"{self.name}: RandAugment works on image files, not on images in memory")
        else:
            drawn = images.batches(sampling, self.normalization, device)
        drawn = augment_batches(drawn, chosen, len(self.classes), seed, share[0])
        return drawn if dtype is None else drawn.map(lambda number, place, batch: with_inputs_of(batch, dtype))

    def with_train_from_val(self, seed: int = 0) -> Data:
        """Return the data with the held-out images cut in two halves, by chance: one to train on, one held out.

        For a folder that has held-out images only; what is measured then says little.

        Raises:
            ValueError: where there are training images.
        """
        if self.train is not None:
            raise ValueError(f"{self.name} has training images: leave the held-out ones alone")
        train, val = _cut(self.val, -(-len(self.val) // 2), seed)
        return replace(self, train=train, val=val)

    def limited(self, train: int | None = None, val: int | None = None, *, seed: int = 0) -> Data:
        """Return the data with at most so many images of each split, drawn by chance; None keeps a split whole."""
        return replace(self, train=_limited(self.train, train, seed), val=_limited(self.val, val, seed))

    def _split(self, split: str) -> Split:
        if split not in ("train", "val"):
            raise ValueError(f"unknown split '{split}'; there are 'train' and 'val'")
        images = self.train if split == "train" else self.val
        if images is None:
            if self.normalization is None:
                raise ValueError(f"{self.name} was made without {split} examples: pass as_data(train, val)")
            raise ValueError(
                f"{self.name} was loaded from a folder without {split} images; there is only the other split"
            )
        return images


def _cut(images: Split, count: int, seed: int) -> tuple[Split, Split]:
    """Return so many of the images, drawn by chance, and the others, both in their order."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    chosen, others = (images.at(part.sort().values) for part in (order[:count], order[count:]))
    return chosen, others


def _limited(images: Split | None, count: int | None, seed: int) -> Split | None:
    if images is None or count is None or count >= len(images):
        return images
    if count < 1:
        raise ValueError(f"at least 1 image of a split is needed, not {count}")
    return _cut(images, count, seed)[0]


def load_data(
    name: str,
    root: str | os.PathLike[str] | None = None,
    download: bool = False,
    normalize: str | tuple[Sequence[float], Sequence[float]] | None = None,
    *,
    image_size: int = 224,
) -> Data:
    """Load a data set by name.

    - "digits": 1,797 handwritten digits of 8 x 8 pixels, which come with scikit-learn; nothing is downloaded. Split
      once and for all into 1,438 train and 359 val images.
    - "digit_scenes": several of those digits on a canvas of 64 x 64, with their boxes and a mask, for detection and
      segmentation; "digit_captions": two of them beside each other, and words that say which, for image and text;
      "stdlib_text": the source text of the Python installation that runs, for language models (see `data.embedded`).
    - "cifar10", "cifar100": from torchvision's files, class folders ``train`` and ``test`` or ``val``, or one .npz.
    - "imagenet": class folders ``train`` and ``val``, 1,000 each, in the order of their names; ``val`` alone is enough.
    - "folder": any class folders ``train`` and ``val`` or ``test``, one of them at least; read as ImageNet is.

    Args:
        name: One of the above.
        root: Where the data lies. None: nowhere for digits; for CIFAR the user's cache folder.
        download: Fetch CIFAR into ``root`` if it is not there.
        normalize: For CIFAR "training" (default; each set's own statistics) or "benchmark" (the published curves'); for
            digits "training"; for the others "imagenet" (default) or "inception" (0.5, 0.5); or mean and std, one
            number a channel each, for pixels from 0 to 1.
        image_size: Height and width, in pixels, of the images cut from files.

    Raises:
        ValueError: For an unknown data set or normalisation, for data that is not there, not complete or damaged.

    Example:
        >>> load_data("digits").train
        Images(1438 of shape (1, 8, 8))
    """
    if name not in DATA_SETS:
        raise ValueError(f"unknown data set '{name}'; known are {', '.join(DATA_SETS)}")
    _check_normalization(name, normalize)
    if download and name not in CIFAR_CLASSES:
        raise ValueError(f"{name} cannot be downloaded; only cifar10 and cifar100 can")
    root = None if root is None else Path(root).expanduser()
    if name in EMBEDDED:
        if root is not None or normalize is not None:
            raise ValueError(f"{name} is made of what is installed, ready as it is: root and normalize must be None")
        train, val, classes = EMBEDDED[name]()
        return Data(train, val, classes, None, name)
    if name == "digits":
        if root is not None:
            raise ValueError("digits come with scikit-learn: root must be None")
        pixels, labels = read_digits()
        held_out, classes = hold_out_digits(labels), DIGITS
        train, val = (Images(pixels[own], labels[own], padding=2, flip=False) for own in (~held_out, held_out))
    elif name in CIFAR_CLASSES:
        train, val, classes = read_cifar(name, root, download)
    else:
        train, val, classes = read_folders(name, root, image_size)
    return Data(train, val, classes, _normalization(name, normalize, train), name)


def check_classes(outputs: int, data: Data) -> None:
    """Raise ValueError unless a model with so many outputs can tell the classes of a data set apart."""
    if data.classes and outputs != len(data.classes):
        more = outputs > len(data.classes) and isinstance(data.val, Examples)
        way = "; as_data(train, val, classes=names) tells of classes without examples" if more else ""
        raise ValueError(f"model has {outputs} outputs, data has {len(data.classes)} classes{way}")


def _check_normalization(name: str, normalize: object) -> None:
    known = NORMALIZATIONS.get(name, ("training",))
    if isinstance(normalize, str) and normalize not in known:
        raise ValueError(
            f"unknown normalisation '{normalize}' of {name}; known are {', '.join(known)}, or pass (mean, std)"
        )
    pair = isinstance(normalize, str | None) or (
        isinstance(normalize, Sequence)
        and len(normalize) == 2
        and all(isinstance(part, Sequence) for part in normalize)
    )
    if not pair:
        raise ValueError(f"normalize={normalize!r}: expected a name or (mean, std), one number a channel each")


def _normalization(name: str, normalize: str | tuple | None, train: Split | None) -> Normalization:
    if normalize is not None and not isinstance(normalize, str):
        mean, std = normalize
        return Normalization(tuple(mean), tuple(std))
    if name in NORMALIZATIONS:
        known = NORMALIZATIONS[name]
        return known[normalize or next(iter(known))]
    std, mean = torch.std_mean(train.pixels / 255, dim=(0, 2, 3), correction=0)
    return Normalization(tuple(mean.tolist()), tuple(std.tolist()))


def hold_out(data: Data, split: str, *, share: float = 0.5, seed: int = 0) -> Data:
    """Divide one split into train images and held-out images, at random: for sets of which only one split is there.

    Args:
        split: "train" or "val"; the other one is left out.
        share: of its images to hold out, in (0, 1).

    Raises:
        ValueError: a split that is not there, a share that leaves one side without images.
    """
    images = data._split(split)
    check_number("share", share, "a share of the images in (0, 1)", lambda part: 0 < part < 1)
    check_whole("seed", seed, 0)
    held_out = round(share * len(images))
    if not 0 < held_out < len(images):
        raise ValueError(f"share={share} holds out {held_out} of {len(images)} images; leave some on each side")
    val, train = _cut(images, held_out, seed)
    return replace(data, train=train, val=val)


WHOLE = SequentialSampler, RandomSampler, WeightedRandomSampler, DistributedSampler
"""Samplers that draw from all of a data set, in whatever order and share."""


def as_data(
    train: Any,
    val: Any = None,
    *,
    classes: Sequence[str] | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    name: str = "data",
) -> Data:
    """Make `Data` of whatever holds examples, for all that wants one; `Data` itself is returned as it is.

    Of a DataLoader its data set, the subset that a `SubsetRandomSampler` draws from, its collating and its workers are
    taken: batches are cut, and their order is drawn, by `Data.batches`, so that every pass is fixed by a seed. The
    weights of a `WeightedRandomSampler` are not: every example of its data set comes as often as any other.

    Args:
        train: A DataLoader, a map-style data set, or tensors whose first axes are examples: one, or a tuple or dict of
            them; batches have the same structure. NumPy's arrays are taken as tensors, those in double as torch's
            default type.
        val: Held-out examples, likewise; None where nothing is to be measured.
        classes: Names of classes; None: of the data set, or as many as whole labels of (inputs, labels) go up to.
        collate: Makes a batch of a list of examples; None: a DataLoader's own, or torch's default.
        name: For messages, tables and settings.

    Raises:
        NoDataError: a TypeError and ValueError: names, paths, models, lists (of batches or of examples?), iterable data
            sets and all else whose examples cannot be drawn by number.
        ValueError: DataLoaders with samplers of other kinds, which may leave examples out.

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
        raise NoDataError("as_data: there are neither train nor val examples")
    known = _classes(splits[0] or splits[1])
    names = known if classes is None else tuple(classes)
    if len(known) > len(names):
        raise ValueError(f"as_data: label {len(known) - 1} is out of range for {len(names)} classes")
    return Data(*splits, names, None, name)


def _split(given: Any, collate: Callable[[list[Any]], Any] | None, refused: tuple[type, ...] = (list,)) -> Examples:
    if isinstance(given, DataLoader):
        split = _split(_drawn_from(given), collate or given.collate_fn, refused=())
        return replace(split, workers=given.num_workers)
    if isinstance(given, TensorDataset):
        given = given.tensors if collate in (None, default_collate) else given
    leaves, arrays = tree_leaves(given), Tensor | np.ndarray
    if isinstance(given, arrays | tuple | Mapping) and leaves and all(isinstance(leaf, arrays) for leaf in leaves):
        return Examples(Tensors(tree_map(_as_tensor, given)), as_is)
    drawn = hasattr(given, "__getitem__") and hasattr(given, "__len__")
    drawn = drawn and not hasattr(given, "iloc")  # pandas gives columns
    if isinstance(given, (*refused, str, bytes, type, tuple, Mapping, IterableDataset, nn.Module)) or not drawn:
        raise NoDataError(f"as_data: {_no_data(given)}; two of them as as_data(train, val)")
    return Examples(given, collate or default_collate)


def _as_tensor(leaf: Tensor | np.ndarray) -> Tensor:
    single = isinstance(leaf, np.ndarray) and leaf.dtype == np.float64
    try:
        return torch.as_tensor(leaf, dtype=torch.get_default_dtype() if single else None)
    except TypeError as error:
        raise NoDataError(f"as_data: an array of {leaf.dtype} is no tensor; pass numbers") from error


def _no_data(given: Any) -> str:
    """Say why something is no data, and what is."""
    kind, ways = type(given).__name__, "pass a DataLoader, a data set with __getitem__ and __len__, or tensors"
    if isinstance(given, str | os.PathLike):
        return f"{str(given)!r} is a name or a path, load_data reads such; or {ways} whose first axes are examples"
    if isinstance(given, type):
        return f"{given.__name__} is a class, not an instance of it; {ways} whose first axes are examples"
    if isinstance(given, list):
        return f"a list may hold batches or examples; {ways}, (images, labels), whose first axes are examples"
    return f"a {kind} holds no examples that could be drawn by number; {ways} whose first axes are examples"


def _drawn_from(loader: DataLoader) -> Any:
    """Return the data set of a DataLoader, or what of it its sampler draws from."""
    cut, given = loader.batch_sampler, loader.dataset
    sampler = loader.sampler if cut is None else getattr(cut, "sampler", cut)
    if isinstance(given, IterableDataset) or isinstance(sampler, WHOLE):
        return given
    if not isinstance(sampler, SubsetRandomSampler):
        raise ValueError(
            f"as_data: a DataLoader with a {type(sampler).__name__} may leave examples out: pass those that it draws "
            "from, as torch.utils.data.Subset(data_set, indices)"
        )
    indices = list(sampler.indices)
    if isinstance(given, TensorDataset):
        return TensorDataset(*(tensor[indices] for tensor in given.tensors))
    part = Subset(given, indices)
    if hasattr(given, "classes"):
        part.classes = given.classes
    return part


def _classes(split: Examples) -> tuple[str, ...]:
    tensors = split.examples.tensors if isinstance(split.examples, Tensors) else None
    if isinstance(tensors, tuple) and len(tensors) == 2 and tensors[1].ndim == 1 and not tensors[1].is_floating_point():
        if (least := int(tensors[1].min())) < 0:
            raise ValueError(f"as_data: label {least}; class numbers count from 0")
        return tuple(map(str, range(int(tensors[1].max()) + 1)))
    return tuple(map(str, getattr(split.examples, "classes", ())))
