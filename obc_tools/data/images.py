"""The images of a split: in memory, for small ones, or as files on a disk; CIFAR's from whichever form they lie in.

Both kinds give the same ``Batches``. Small images are kept as one tensor on the device, where batches are cut,
augmented and normalised as whole tensors. Large ones are decoded by worker processes, one image at a time, and
normalised on the device.

Forms of CIFAR, which is decoded once, into memory: torchvision's own (``cifar-10-batches-py``, ``cifar-100-python``;
the only one that can be downloaded), class folders (``train/<class>/*.png`` and ``test/`` or ``val/``), and one
``.npz`` with {train,test}_{images,labels} and classes, images being uint8 (n, 32, 32, 3). What is decoded from class
folders is kept in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
from torchvision.transforms import v2
from tqdm.auto import tqdm

from ..files import cache_folder, replacing
from ..state import LentRandomness
from .batches import Batch, Batches, Sampling, crop_and_flip

log = logging.getLogger(__name__)

CIFAR_CLASSES = {"cifar10": 10, "cifar100": 100}
SIDE = 32

_TORCHVISION = {"cifar10": CIFAR10, "cifar100": CIFAR100}
_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels", "classes")
_UNREADABLE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of each colour channel, for pixels from 0 to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(f"normalisation with {len(self.mean)} means and {len(self.std)} standard deviations")
        if not all(std > 0 for std in self.std):
            raise ValueError(f"normalisation: standard deviations must be positive, not {self.std}")

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalise pixels from 0 to 255, uint8 (n, channels, height, width), to float32, on their device."""
        mean, std = (255 * torch.tensor(values, device=pixels.device) for values in (self.mean, self.std))
        return pixels.float().sub_(mean[:, None, None]).div_(std[:, None, None])


class _Split:
    """What images in memory and on disk have in common."""

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} of shape {self.image_shape})"


@dataclass(frozen=True, eq=False, repr=False)
class Images(_Split):
    """A split in memory.

    Args:
        pixels: Uint8 (n, channels, height, width).
        labels: Int64 (n,), from 0.
        padding: Augmentation shifts an image by up to so many pixels.
        flip: Augmentation mirrors half of the images.
    """

    pixels: Tensor
    labels: Tensor
    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        if self.pixels.ndim != 4 or self.pixels.dtype != torch.uint8:
            raise ValueError(
                "images must be uint8 of shape (n, channels, height, width), not "
                f"{self.pixels.dtype} of shape {tuple(self.pixels.shape)}"
            )
        _check_labels(self.labels, len(self.pixels))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return tuple(self.pixels.shape[1:])

    def at(self, positions: Tensor) -> Images:
        """Return some of the images, by their positions, int64."""
        return replace(self, pixels=self.pixels[positions], labels=self.labels[positions])

    def batches(self, sampling: Sampling, normalization: Normalization, device: torch.device | str) -> Batches:
        """Return the batches of this split, cut, augmented and normalised on a device."""
        pixels, labels = self.pixels.to(device), self.labels.to(device)

        def draw(pass_number: int, start: int = 0) -> Iterator[Batch]:
            generator = sampling.generator(pass_number)
            order = sampling.order(len(self), generator).to(device)
            # For all images, also those that a pass leaves out: shares of processes and whole batches draw alike.
            shifts = torch.randint(2 * self.padding + 1, (len(self), 2), generator=generator).to(device)
            flips = (torch.rand(len(self), generator=generator) < 0.5 * self.flip).to(device)
            for here in sampling.rows(len(self), start):
                images = pixels[order[here]]
                if sampling.augment:
                    images = crop_and_flip(images, shifts[here], flips[here], self.padding)
                yield normalization(images), labels[order[here]]

        return Batches(draw, sampling.count(len(self)), parts=sampling.share[1])


@dataclass(frozen=True, eq=False, repr=False)
class ImageFiles(_Split):
    """A split of image files.

    Augmented, an image is a random part of itself, scaled, and mirrored half of the time. Otherwise its middle: the
    shorter side is scaled to 256/224 of ``size``, the centre cut out.

    Args:
        paths: The files.
        labels: Int64 (n,), from 0.
        size: Height and width of the images in a batch, in pixels.
    """

    paths: tuple[str, ...]
    labels: Tensor
    size: int = 224

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"image size must be at least 1, not {self.size}")
        _check_labels(self.labels, len(self.paths))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image in a batch."""
        return (3, self.size, self.size)

    def at(self, positions: Tensor) -> ImageFiles:
        """Return some of the images, by their positions, int64."""
        paths = tuple(self.paths[position] for position in positions.tolist())
        return replace(self, paths=paths, labels=self.labels[positions])

    def batches(
        self,
        sampling: Sampling,
        normalization: Normalization,
        device: torch.device | str,
        workers: int | None = None,
        rand_augment: int = 0,
    ) -> Batches:
        """Return the batches of this split, decoded by ``workers`` processes: None, one a CPU up to 8; 0, this one.

        ``rand_augment`` is the magnitude of RandAugment (Cubuk et al. 2020), 0 for none.
        """
        workers = min(8, os.cpu_count() or 1) if workers is None else workers
        decoded = _Decoded(self, sampling.augment, rand_augment)
        draw = _FilePasses(decoded, sampling, normalization, torch.device(device), workers)
        return Batches(draw, sampling.count(len(self)), parts=sampling.share[1])


class ClassFolders(NamedTuple):
    """The image files below one folder a class: paths, labels int64 (n,), and class names in alphabetical order."""

    paths: tuple[str, ...]
    labels: Tensor
    classes: tuple[str, ...]


def find_images(folder: Path) -> ClassFolders:
    """Find the image files of a folder that holds one folder a class; raise ValueError where a class has none."""
    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise ValueError(f"'{folder}' should hold one folder of images a class: {error}") from error
    return ClassFolders(tuple(path for path, _ in found.samples), torch.tensor(found.targets), tuple(found.classes))


def held_out_folder(root: Path) -> Path:
    """Return ``root/val``, or ``root/test`` where only that is there."""
    return root / "test" if (root / "test").is_dir() and not (root / "val").is_dir() else root / "val"


def same_classes(root: Path, classes: tuple[str, ...], *others: tuple[str, ...]) -> tuple[str, ...]:
    """Return the classes of the splits below ``root``; raise ValueError, naming the folders, where they differ."""
    for other in others:
        if different := sorted(set(classes) ^ set(other)):
            named = ", ".join(different[:5]) + (", ..." if len(different) > 5 else "")
            raise ValueError(f"'{root}': train and held-out images need the same class folders; only one has {named}")
    return classes


def read_image(path: str) -> Image.Image:
    """Decode an image file as RGB; raise ValueError, with its path, if that fails."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    # Pillow answers a broken PNG with SyntaxError.
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"image '{path}' cannot be decoded: {error}") from error


class _Decoded(Dataset):
    """Uint8 images (3, size, size) and labels; asked for by (position, seed), so that workers share no random state."""

    def __init__(self, files: ImageFiles, augment: bool, rand_augment: int = 0) -> None:
        self.files = files
        if augment:
            steps = [v2.RandomResizedCrop(files.size), v2.RandomHorizontalFlip()]
            steps += [v2.RandAugment(magnitude=rand_augment)] if rand_augment else []
        else:
            steps = [v2.Resize(round(files.size * 256 / 224)), v2.CenterCrop(files.size)]
        self.transform = v2.Compose([*steps, v2.PILToTensor()])

    def __getitem__(self, request: tuple[int, int]) -> tuple[Tensor, int]:
        position, seed = request
        image = read_image(self.files.paths[position])
        # The transforms draw from torch's global generator: it is borrowed, and given back as it was.
        with LentRandomness(seed):
            return self.transform(image), int(self.files.labels[position])


class _Requests(Sampler):
    """The batches of one pass as lists of (position, seed)."""

    def __init__(self, sampling: Sampling, images: int) -> None:
        self.sampling = sampling
        self.images = images
        self.pass_number = self.start = 0

    def __len__(self) -> int:
        return self.sampling.count(self.images) - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = self.sampling.generator(self.pass_number)
        order = self.sampling.order(self.images, generator)
        seeds = torch.randint(2**31, (self.images,), generator=generator)
        for here in self.sampling.rows(self.images, self.start):
            yield list(zip(order[here].tolist(), seeds[here].tolist(), strict=True))


class _FilePasses:
    """Draws passes over image files, with worker processes that live as long as this object does."""

    def __init__(
        self, decoded: _Decoded, sampling: Sampling, normalization: Normalization, device: torch.device, workers: int
    ) -> None:
        self.requests = _Requests(sampling, len(decoded.files))
        self.normalization = normalization
        self.device = device
        self.workers = workers
        self.turn = 0
        self.loader = DataLoader(
            decoded,
            batch_sampler=self.requests,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            # Without one of its own, a loader draws from torch's global generator.
            generator=torch.Generator(),
        )

    def __call__(self, pass_number: int, start: int = 0) -> Iterator[Batch]:
        self.turn += 1
        turn = self.turn
        self.requests.pass_number, self.requests.start = pass_number, start
        try:
            for pixels, labels in self.loader:
                pixels, labels = (tensor.to(self.device, non_blocking=True) for tensor in (pixels, labels))
                yield self.normalization(pixels), labels
                if self.workers and turn != self.turn:
                    raise ValueError("a later pass over the same image files has begun; finish one before the next")
        except ValueError as error:
            # A worker's error arrives with its traceback in the message; the last line is what it said.
            raise ValueError(str(error).rpartition("ValueError: ")[2]) from error


def _check_labels(labels: Tensor, images: int) -> None:
    if images == 0:
        raise ValueError("there are no images")
    if labels.shape != (images,) or labels.dtype != torch.int64:
        raise ValueError(f"{images} images need int64 labels ({images},), not {labels.dtype} {tuple(labels.shape)}")
    if labels.min() < 0:
        raise ValueError(f"labels start at 0, but there is a {int(labels.min())}")


def read_folders(
    name: str, root: Path | None, size: int
) -> tuple[ImageFiles | None, ImageFiles | None, tuple[str, ...]]:
    """Read class folders below ``root``; raise ValueError for what is not there, or not ImageNet where it should be."""
    if root is None or not root.is_dir():
        found = "no root was given" if root is None else f"'{root}' is not a folder"
        raise ValueError(f"{name}: {found}; pass root=, a folder with class folders in 'train' and 'val'")
    folders = {"train": root / "train", "val": held_out_folder(root)}
    found = {split: find_images(folder) for split, folder in folders.items() if folder.is_dir()}
    if not found:
        raise ValueError(f"{name}: '{root}' has neither a folder 'train' nor one 'val'")
    classes = same_classes(root, *(files.classes for files in found.values()))
    if name == "imagenet" and len(classes) != 1000:
        raise ValueError(
            f"imagenet has 1000 classes, '{root}' has {len(classes)}: labels would not be ImageNet's; complete it, or "
            "load it as 'folder'"
        )
    splits = {split: ImageFiles(files.paths, files.labels, size) for split, files in found.items()}
    return splits.get("train"), splits.get("val"), classes


def read_cifar(name: str, root: Path | None, download: bool) -> tuple[Images, Images, tuple[str, ...]]:
    """Read a CIFAR data set.

    Args:
        name: "cifar10" or "cifar100".
        root: A folder with one of the forms above, or an .npz. None: the user's cache folder.
        download: Fetch torchvision's form into ``root`` where no other is there.

    Returns:
        The train images, the test images and the names of the classes.

    Raises:
        ValueError: If there is nothing to read, or what is there is damaged or of another form; it names the file.
    """
    root = cache_folder() / name if root is None else root
    packed = root if root.is_file() else root / f"{name}.npz"
    if packed.is_file():
        arrays, origin = read_arrays(packed), packed
    elif (root / "train").is_dir():
        arrays, origin = _read_class_folders(name, root), root
    elif download or (root / _TORCHVISION[name].base_folder).is_dir():
        arrays, origin = _read_torchvision(name, root, download), root
    else:
        raise ValueError(
            f"no {name} in '{root}': pass download=True to fetch it there, or as root= a folder that holds "
            f"'{_TORCHVISION[name].base_folder}' (torchvision's form) or class folders 'train' and 'test', or an .npz"
        )
    if (classes := len(arrays["classes"])) != CIFAR_CLASSES[name]:
        raise ValueError(f"{name} has {CIFAR_CLASSES[name]} classes, '{origin}' has {classes}")
    train, test = (_split(arrays, split, origin) for split in ("train", "test"))
    return train, test, tuple(str(label) for label in arrays["classes"])


def read_arrays(path: Path) -> Arrays:
    """Read the arrays of an .npz of images; raise ValueError if it is damaged, lacks one, or holds pickled objects."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"'{path}' is truncated or not an .npz file")
    try:
        with np.load(path, allow_pickle=False) as file:
            if missing := [key for key in _ARRAYS if key not in file.files]:
                raise ValueError(f"it lacks {', '.join(missing)}")
            return {key: file[key] for key in _ARRAYS}
    except _UNREADABLE as error:
        raise ValueError(f"'{path}' cannot be read as an .npz of images: {error}") from error


def _split(arrays: Arrays, split: str, origin: Path) -> Images:
    images, labels, classes = arrays[f"{split}_images"], arrays[f"{split}_labels"], len(arrays["classes"])
    if images.dtype != np.uint8 or images.shape[1:] != (SIDE, SIDE, 3):
        raise ValueError(
            f"'{origin}': {split} images must be uint8 of shape (n, {SIDE}, {SIDE}, 3), not {images.dtype} of shape "
            f"{images.shape}"
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or not len(labels):
        raise ValueError(
            f"'{origin}': {len(images)} {split} images need as many whole numbers as labels, not "
            f"{labels.dtype} {labels.shape}"
        )
    if labels.min() < 0 or labels.max() >= classes:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise ValueError(
            f"'{origin}': {split} label {wrong} is out of range for {classes} classes (0 to {classes - 1})"
        )
    return Images(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels.astype(np.int64)))


def _read_torchvision(name: str, root: Path, download: bool) -> Arrays:
    try:
        train, test = (_TORCHVISION[name](root, train=train, download=download) for train in (True, False))
    except OSError as error:
        raise ValueError(
            f"{name} could not be downloaded to '{root}' ({error}); fetch it elsewhere and pass its folder as root="
        ) from error
    except RuntimeError as error:
        raise ValueError(f"{name} in '{root}' is incomplete or damaged; remove it and pass download=True") from error
    splits = {"train": train, "test": test}
    arrays = {f"{split}_images": data.data for split, data in splits.items()}
    arrays |= {f"{split}_labels": np.array(data.targets) for split, data in splits.items()}
    return arrays | {"classes": np.array(train.classes)}


def _read_class_folders(name: str, root: Path) -> Arrays:
    folders = {"train": root / "train", "test": held_out_folder(root)}
    found = {split: find_images(folder) for split, folder in folders.items()}
    classes = same_classes(root, found["train"].classes, found["test"].classes)
    cache = _cache_file(name, root, [*found["train"].paths, *found["test"].paths])
    if cache.is_file():
        try:
            return read_arrays(cache)
        except ValueError as error:
            log.warning("%s; decoding the images again", error)
    arrays = {f"{split}_images": _decode(files.paths, f"{name} {split}") for split, files in found.items()}
    arrays |= {f"{split}_labels": files.labels.numpy() for split, files in found.items()}
    arrays["classes"] = np.array(classes)
    _write_cache(cache, arrays)
    return arrays


def _decode(paths: tuple[str, ...], title: str) -> np.ndarray:
    pixels = np.empty((len(paths), SIDE, SIDE, 3), np.uint8)
    for position, path in enumerate(tqdm(paths, desc=f"decoding {title}", unit="image", leave=False)):
        image = read_image(path)
        if image.size != (SIDE, SIDE):
            width, height = image.size
            raise ValueError(f"image '{path}' has {height} x {width} pixels, CIFAR's have {SIDE} x {SIDE}")
        pixels[position] = np.asarray(image)
    return pixels


def _cache_file(name: str, root: Path, paths: list[str]) -> Path:
    """Name a cache file by a folder and by the sizes and times of its images, so that a change is noticed."""
    place = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]
    state = hashlib.sha256()
    for path in paths:
        status = os.stat(path)
        state.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    return cache_folder() / f"{name}-{place}-{state.hexdigest()[:16]}.npz"


def _write_cache(path: Path, arrays: Arrays) -> None:
    """Write a whole cache file or none, in place of older ones of the same folder."""
    try:
        with replacing(path) as new, new.open("wb") as file:
            np.savez(file, **arrays)
        for older in path.parent.glob(path.stem.rpartition("-")[0] + "-*.npz"):
            if older != path:
                older.unlink()
    except OSError as error:
        log.warning("decoded images could not be cached in '%s' (%s); they will be decoded again", path.parent, error)
