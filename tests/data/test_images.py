"""Splits in memory and on disk: batches against doing it one image at a time."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from obc_tools.data.batches import Sampling
from obc_tools.data.images import (
    ImageFiles,
    Images,
    Normalization,
    find_images,
    held_out_folder,
    read_image,
    same_classes,
)

NORMALIZATION = Normalization((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def normalize(image: torch.Tensor) -> torch.Tensor:
    """What torchvision does to one uint8 image."""
    return v2.functional.normalize(image.double() / 255, list(NORMALIZATION.mean), list(NORMALIZATION.std))


def images_in_memory(n: int = 20, **options) -> Images:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.arange(n) % 5, **options)


@pytest.fixture
def files(tmp_path: Path) -> ImageFiles:
    """Twelve smooth images of different sizes, one of them grey, of three classes."""
    random = np.random.default_rng(0)
    for index in range(12):
        folder = tmp_path / "photos" / f"class{index % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        shape = (40 + index, 50 - index, 3)[: 2 if index == 4 else 3]
        coarse = random.integers(0, 256, (5, 5, *shape[2:]), dtype=np.uint8)
        Image.fromarray(coarse).resize((shape[1], shape[0]), Image.Resampling.BILINEAR).save(folder / f"{index}.png")
    found = find_images(tmp_path / "photos")
    return ImageFiles(found.paths, found.labels, 16)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((0.5, 0.5), (0.5,), "normalisation with 2 means and 1 standard deviations"),
        ((), (), "normalisation with 0 means and 0 standard deviations"),
        ((0.5,), (0.0,), "standard deviations must be positive, not (0.0,)"),
        ((0.5,), (float("nan"),), "standard deviations must be positive, not (nan,)"),
    ],
)
def test_normalization_is_checked(mean: tuple, std: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Normalization(mean, std)


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (torch.zeros(2, 3, 8, 8), torch.zeros(2).long(), "images must be uint8 of shape (n, channels, height, width)"),
        (torch.zeros(2, 8, 8).byte(), torch.zeros(2).long(), "not torch.uint8 of shape (2, 8, 8)"),
        (torch.zeros(0, 3, 8, 8).byte(), torch.zeros(0).long(), "there are no images"),
        (
            torch.zeros(2, 3, 8, 8).byte(),
            torch.zeros(3).long(),
            "2 images need int64 labels (2,), not torch.int64 (3,)",
        ),
        (torch.zeros(2, 3, 8, 8).byte(), torch.zeros(2), "2 images need int64 labels (2,), not torch.float32 (2,)"),
        (torch.zeros(2, 3, 8, 8).byte(), torch.tensor([0, -1]), "labels start at 0, but there is a -1"),
    ],
)
def test_images_are_checked(pixels: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Images(pixels, labels)


def test_image_files_are_checked() -> None:
    with pytest.raises(ValueError, match="image size must be at least 1, not 0"):
        ImageFiles(("a.png",), torch.tensor([0]), 0)
    with pytest.raises(ValueError, match="there are no images"):
        ImageFiles((), torch.tensor([]).long())


def test_images_show_their_number_and_shape(files: ImageFiles) -> None:
    assert repr(images_in_memory()) == "Images(20 of shape (3, 8, 8))"
    assert repr(files) == "ImageFiles(12 of shape (3, 16, 16))"


def test_batches_in_memory_in_order() -> None:
    split = images_in_memory()
    batches = split.batches(Sampling(8), NORMALIZATION, "cpu")
    assert [len(labels) for _, labels in batches] == [8, 8, 4]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert torch.equal(labels, split.labels)
    assert torch.allclose(images.double(), torch.stack([normalize(image) for image in split.pixels]), rtol=0, atol=1e-6)


def test_batches_in_memory_shuffled() -> None:
    split = images_in_memory()
    batches = split.batches(Sampling(8, seed=1, shuffle=True), NORMALIZATION, "cpu")
    frozen = list(batches)
    images, labels = (torch.cat(parts) for parts in zip(*frozen, strict=True))
    order = Sampling(8, seed=1, shuffle=True).order(20, Sampling(8, seed=1).generator(0))
    assert order.tolist() != list(range(20))
    assert torch.equal(labels, split.labels[order])
    assert torch.allclose(images[0].double(), normalize(split.pixels[order[0]]), rtol=0, atol=1e-6)
    for (images, labels), (again, same) in zip(frozen, batches.at(0), strict=True):
        assert torch.equal(images, again) and torch.equal(labels, same)
    assert not torch.equal(torch.cat([labels for _, labels in batches]), split.labels[order])


def test_augmented_batches_in_memory_hold_crops_of_the_same_images() -> None:
    plain, identity = images_in_memory(), Normalization((0.0,) * 3, (1 / 255,) * 3)
    batches = plain.batches(Sampling(20, seed=3, augment=True), identity, "cpu")
    (images, labels), (later, _) = next(iter(batches)), next(iter(batches))
    assert torch.equal(labels, plain.labels)
    assert not torch.equal(images, later)
    moved = 0
    for image, original in zip(images, plain.pixels, strict=True):
        padded = v2.functional.pad(original, 4)
        crops = [v2.functional.crop(padded, top, left, 8, 8) for top in range(9) for left in range(9)]
        crops += [v2.functional.horizontal_flip(crop) for crop in crops]
        matches = [index for index, crop in enumerate(crops) if torch.allclose(crop.float(), image, rtol=0, atol=1e-3)]
        assert matches
        moved += matches[0] != 40
    assert moved > 10


def test_the_order_is_the_same_with_and_without_augmentation() -> None:
    split = images_in_memory()
    labels = [
        torch.cat([labels for _, labels in split.batches(sampling, NORMALIZATION, "cpu").at(2)])
        for sampling in (Sampling(8, 5, shuffle=True), Sampling(8, 5, shuffle=True, augment=True))
    ]
    assert torch.equal(*labels)


def test_what_augmentation_may_do_belongs_to_the_split() -> None:
    identity = Normalization((0.0,) * 3, (1 / 255,) * 3)
    still = images_in_memory(padding=0, flip=False)
    images, _ = next(iter(still.batches(Sampling(20, augment=True), identity, "cpu")))
    assert torch.allclose(images, still.pixels.float(), rtol=0, atol=1e-3)
    mirrored = images_in_memory(padding=0, flip=True)
    images, _ = next(iter(mirrored.batches(Sampling(20, augment=True), identity, "cpu")))
    flipped = [
        torch.allclose(a, b.flip(2), rtol=0, atol=1e-3) for a, b in zip(images, still.pixels.float(), strict=True)
    ]
    assert 4 <= sum(flipped) <= 16


def test_the_images_themselves_are_never_changed() -> None:
    split = images_in_memory()
    before = split.pixels.clone()
    for images, labels in split.batches(Sampling(8, augment=True), NORMALIZATION, "cpu"):
        images.zero_(), labels.zero_()
    assert torch.equal(split.pixels, before)
    assert split.labels.max() == 4


def test_batches_of_files_in_order_against_torchvision(files: ImageFiles) -> None:
    transform = v2.Compose([v2.Resize(18), v2.CenterCrop(16), v2.PILToTensor()])
    batches = files.batches(Sampling(5), NORMALIZATION, "cpu", workers=0)
    assert len(batches) == 3
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    expected = [normalize(transform(Image.open(path).convert("RGB"))) for path in files.paths]
    assert torch.allclose(images.double(), torch.stack(expected), rtol=0, atol=1e-6)
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_augmented_batches_of_files_do_not_depend_on_the_workers(files: ImageFiles) -> None:
    sampling = Sampling(5, seed=2, shuffle=True, augment=True)
    alone, helped = (files.batches(sampling, NORMALIZATION, "cpu", workers) for workers in (0, 2))
    passes = [[list(batches) for _ in range(2)] for batches in (alone, helped)]
    for one, other in zip(*passes, strict=True):
        assert all(
            torch.equal(a, b) for left, right in zip(one, other, strict=True) for a, b in zip(left, right, strict=True)
        )
    first, second = (torch.cat([labels for _, labels in batches]) for batches in passes[0])
    assert not torch.equal(first, second)
    assert torch.equal(next(iter(alone.at(0)))[0], passes[0][0][0][0])


def test_augmented_files_are_other_parts_of_the_image_each_pass(files: ImageFiles) -> None:
    batches = files.batches(Sampling(12, augment=True), NORMALIZATION, "cpu", workers=0)
    (first, labels), (second, same) = next(iter(batches)), next(iter(batches))
    assert torch.equal(labels, same)
    assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_reading_files_leaves_the_callers_random_state_alone(files: ImageFiles) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(files.batches(Sampling(5, shuffle=True, augment=True), NORMALIZATION, "cpu", workers=0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_serve_one_pass_at_a_time(files: ImageFiles) -> None:
    batches = files.batches(Sampling(5), NORMALIZATION, "cpu", workers=1)
    first = iter(batches)
    next(first)
    assert len(list(batches)) == 3
    with pytest.raises(ValueError, match="a later pass over the same image files has begun"):
        next(first)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named(files: ImageFiles, workers: int) -> None:
    broken = Path(files.paths[7])
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(ValueError, match=f"^image '{re.escape(str(broken))}' cannot be decoded: ") as raised:
        list(files.batches(Sampling(5), NORMALIZATION, "cpu", workers))
    assert "Traceback" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"image '{tmp_path / 'a.png'}' cannot be decoded: ")):
        read_image(str(tmp_path / "a.png"))


def test_classes_are_folders_in_alphabetical_order(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (2, 2)).save(tmp_path / name / "image.png")
    found = find_images(tmp_path)
    assert found.classes == ("a", "b", "c")
    assert found.labels.tolist() == [0, 1, 2]
    assert [Path(path).parent.name for path in found.paths] == ["a", "b", "c"]


def test_folders_without_images_are_named(tmp_path: Path) -> None:
    message = re.escape(f"'{tmp_path}' should hold one folder of images a class: ")
    with pytest.raises(ValueError, match=message):
        find_images(tmp_path)
    (tmp_path / "cats").mkdir()
    with pytest.raises(ValueError, match=message + "Found no valid file for the classes cats"):
        find_images(tmp_path)
    with pytest.raises(ValueError, match="'.*nothing' should hold one folder of images a class"):
        find_images(tmp_path / "nothing")


def test_held_out_images_are_in_val_or_test(tmp_path: Path) -> None:
    assert held_out_folder(tmp_path) == tmp_path / "val"
    (tmp_path / "test").mkdir()
    assert held_out_folder(tmp_path) == tmp_path / "test"
    (tmp_path / "val").mkdir()
    assert held_out_folder(tmp_path) == tmp_path / "val"


def test_splits_need_the_same_classes() -> None:
    assert same_classes(Path("root"), ("a", "b"), ("a", "b")) == ("a", "b")
    assert same_classes(Path("root"), ("a", "b")) == ("a", "b")
    with pytest.raises(ValueError, match="'root': .*need the same class folders; only one has b, c$"):
        same_classes(Path("root"), ("a", "b"), ("a", "c"))
