"""The images of a split: in memory, for small ones, or as files on a disk.

Both kinds give the same ``Batches``. Small images are kept as one tensor on the device, where batches are cut,
augmented and normalised as whole tensors. Large ones are decoded by worker processes, one image at a time, and
normalised on the device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from ..state import LentRandomness
from .batches import Batch, Batches, Sampling, crop_and_flip


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
