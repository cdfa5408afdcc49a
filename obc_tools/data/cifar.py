"""CIFAR-10 and CIFAR-100 from whichever form they lie in on a disk, decoded once, into memory.

Forms: torchvision's own (``cifar-10-batches-py``, ``cifar-100-python``; the only one that can be downloaded), class
folders (``train/<class>/*.png`` and ``test/`` or ``val/``), and one ``.npz`` with {train,test}_{images,labels} and
classes, images being uint8 (n, 32, 32, 3). What is decoded from class folders is kept in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100
from tqdm.auto import tqdm

from ..files import cache_folder, replacing
from .images import Images, find_images, held_out_folder, read_image, same_classes

log = logging.getLogger(__name__)

CLASSES = {"cifar10": 10, "cifar100": 100}
SIDE = 32

_TORCHVISION = {"cifar10": CIFAR10, "cifar100": CIFAR100}
_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels", "classes")
_UNREADABLE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)

Arrays = Mapping[str, np.ndarray]


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
    if (classes := len(arrays["classes"])) != CLASSES[name]:
        raise ValueError(f"{name} has {CLASSES[name]} classes, '{origin}' has {classes}")
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
