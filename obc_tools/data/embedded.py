"""Data that is there without downloading: scikit-learn's handwritten digits, and scenes, captions and text made of
what is installed. Everything drawn is fixed by a seed; held-out digits and modules are in no training example.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .batches import Examples, Tensors, as_is

Splits = tuple[Examples, Examples, tuple[str, ...]]
DIGITS = tuple("0123456789")
SCENES = {"train": 1200, "val": 300}
CANVAS = 64
SIZES = (14, 24)
"""Least and most pixels of a digit's side in a scene."""
MOST_DIGITS = 4

PAIRS = {"train": 4000, "val": 1000}
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ALPHABET = " abcdefghijklmnopqrstuvwxyz"
END = len(ALPHABET) + 1
"""The last token of a caption, the largest of all, by which CLIP's text encoders find its end; 0 pads."""
CAPTION_TOKENS = 24

CONTEXT = 256
"""Tokens of a sequence of text."""
HELD_OUT_MODULES = 10
"""One module in so many is held out."""


def read_digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits: uint8 (1797, 1, 8, 8) and int64 (1797,)."""
    # Here, since nothing else needs scikit-learn, which takes its time to import.
    from sklearn.datasets import load_digits

    digits = load_digits()
    # 17 grey levels, 0 to 16, spread over a byte.
    pixels = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))[:, None]
    return pixels, torch.from_numpy(digits.target.astype(np.int64))


def write_digit_files(folder: str | Path, count: int = 60) -> Path:
    """Write the first held-out digits as image files in class folders below ``val``, for whoever reads files."""
    pixels, labels = read_digits()
    held_out = hold_out_digits(labels)
    for number, (image, label) in enumerate(zip(pixels[held_out][:count], labels[held_out][:count], strict=True)):
        path = Path(folder) / "val" / str(int(label)) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).convert("RGB").save(path)
    return Path(folder)


def hold_out_digits(labels: Tensor) -> Tensor:
    """Choose a fifth of each class, always the same: numpy keeps the stream of RandomState for ever."""
    random, labels = np.random.RandomState(0), labels.numpy()
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        chosen[members[: round(len(members) / 5)]] = True
    return chosen


def _digits_of(split: str) -> tuple[Tensor, Tensor]:
    """Return the digits of a split: float32 (n, 1, 8, 8), 0 to 1, and int64 (n,)."""
    pixels, labels = read_digits()
    chosen = hold_out_digits(labels) == (split == "val")
    return pixels[chosen] / 255, labels[chosen]


def _scene(pixels: Tensor, digits: Tensor, random: np.random.RandomState) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw one scene, in bytes: 1 to 4 digits of different sizes that do not overlap, over noise."""
    image = torch.from_numpy(random.uniform(0, 0.15, (1, CANVAS, CANVAS)).astype(np.float32))
    mask = torch.zeros(CANVAS, CANVAS, dtype=torch.uint8)
    taken = np.zeros((CANVAS, CANVAS), dtype=bool)
    boxes, labels = [], []
    for _ in range(random.randint(1, MOST_DIGITS + 1)):
        which, side = random.randint(len(digits)), random.randint(SIZES[0], SIZES[1] + 1)
        top, left = random.randint(0, CANVAS - side + 1, 2)
        if taken[top : top + side, left : left + side].any():
            continue
        taken[top : top + side, left : left + side] = True
        ink = F.interpolate(pixels[which][None], (side, side), mode="bilinear", align_corners=False)[0, 0]
        here = (slice(top, top + side), slice(left, left + side))
        image[0][here] = torch.maximum(image[0][here], ink)
        mask[here][ink > 0.3] = int(digits[which]) + 1
        rows, columns = (ink > 0.3).nonzero().T
        corner = [columns.min() + left, rows.min() + top, columns.max() + 1 + left, rows.max() + 1 + top]
        boxes.append(torch.stack([torch.as_tensor(edge) for edge in corner]).float())
        labels.append(int(digits[which]) + 1)
    return (255 * image).round().byte(), {"boxes": torch.stack(boxes), "labels": torch.tensor(labels), "mask": mask}


def _stack_scenes(scenes: Sequence[tuple[Tensor, dict[str, Tensor]]]) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Make a batch of images and a list of their targets."""
    images = torch.stack([(grey / 255).expand(3, -1, -1) for grey, _ in scenes])
    return images, [targets | {"mask": targets["mask"].long()} for _, targets in scenes]


def read_scenes() -> Splits:
    """Return "digit_scenes": 1,200 scenes to train on and 300 held out; the classes begin with the background.

    Digits on a canvas: images float32 (n, 3, 64, 64), 0 to 1, and a list of {"boxes", "labels", "mask"}. boxes
    (digits, 4) are left, top, right, bottom in pixels, tight around the ink; labels (digits,) and mask (64, 64) are 1
    more than the digit, 0 is the background.
    """
    splits = []
    for split, count in SCENES.items():
        (pixels, digits), random = _digits_of(split), np.random.RandomState(split == "val")
        splits.append(Examples([_scene(pixels, digits, random) for _ in range(count)], _stack_scenes))
    return *splits, ("background", *DIGITS)


def caption(left: int, right: int) -> str:
    """Say which digits stand beside each other."""
    return f"{WORDS[left]} left of {WORDS[right]}"


def encode_caption(text: str) -> Tensor:
    """Return the tokens of a caption of small letters and spaces, int64 (24,)."""
    tokens = [ALPHABET.index(letter) + 1 for letter in text] + [END]
    return torch.tensor(tokens + [0] * (CAPTION_TOKENS - len(tokens)))


def _captioned(split: str) -> Examples:
    """Draw pairs of digits, 14 pixels large, at some distance of each other on a canvas of 32 x 32."""
    pixels, digits = _digits_of(split)
    random = np.random.RandomState(2 + (split == "val"))
    large = F.interpolate(pixels, (14, 14), mode="bilinear", align_corners=False)
    images, tokens = torch.zeros(PAIRS[split], 1, 32, 32), []
    for image in images:
        pair = random.randint(len(digits), size=2)
        for side, which in enumerate(pair):
            top, left = random.randint(0, 19), 17 * side + random.randint(0, 2)
            image[0, top : top + 14, left : left + 14] = large[which, 0]
        tokens.append(encode_caption(caption(*digits[pair].tolist())))
    return Examples(Tensors((images.expand(-1, 3, -1, -1), torch.stack(tokens))), as_is)


def read_captions() -> Splits:
    """Return "digit_captions": 4,000 and 1,000 pairs of an image (3, 32, 32) and the tokens of one of 100 captions."""
    return _captioned("train"), _captioned("val"), ()


def module_files() -> tuple[list[Path], list[Path]]:
    """Return the modules of the running Python's standard library, to train on and held out; tests are in neither."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    files = [path for path in sorted(root.rglob("*.py")) if not left_out & {*path.relative_to(root).parts}]
    held_out = files[HELD_OUT_MODULES - 1 :: HELD_OUT_MODULES]
    return [path for path in files if path not in set(held_out)], held_out


def read_text() -> Splits:
    """Return "stdlib_text": the modules of the standard library in sequences of 256 bytes, every tenth held out.

    A batch are their tokens, one a byte: int64 (n, 256).
    """
    splits = []
    for files in module_files():
        text = b"".join(path.read_bytes() for path in files)
        whole = bytearray(text[: len(text) // CONTEXT * CONTEXT])
        splits.append(Examples(Tensors(torch.frombuffer(whole, dtype=torch.uint8).view(-1, CONTEXT)), Tensor.long))
    return *splits, ()


EMBEDDED: Mapping[str, Callable[[], Splits]] = {
    "digit_scenes": read_scenes,
    "stdlib_text": read_text,
    "digit_captions": read_captions,
}
