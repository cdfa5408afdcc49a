"""CIFAR from each of its forms on a disk, the cache of decoded images, and everything that can be wrong with a root."""

import logging
import os
import pickle
import re
from hashlib import md5
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from obc_tools.data.images import read_cifar
from obc_tools.files import cache_folder

NAMES = [f"class{index}" for index in range(10)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "obc_tools"


def arrays(classes: int = 10) -> dict[str, np.ndarray]:
    """A tiny CIFAR: two train images and one test image a class."""
    random = np.random.default_rng(0)
    return {
        "train_images": random.integers(0, 256, (2 * classes, 32, 32, 3), dtype=np.uint8),
        "train_labels": np.repeat(np.arange(classes), 2),
        "test_images": random.integers(0, 256, (classes, 32, 32, 3), dtype=np.uint8),
        "test_labels": np.arange(classes),
        "classes": np.array([f"class{index}" for index in range(classes)]),
    }


def write_npz(path: Path, **changes) -> Path:
    np.savez(path, **arrays() | changes)
    return path


def write_folders(root: Path, held_out: str = "test") -> Path:
    content = arrays()
    for split, folder in (("train", "train"), ("test", held_out)):
        for index, (image, label) in enumerate(
            zip(content[f"{split}_images"], content[f"{split}_labels"], strict=True)
        ):
            (root / folder / NAMES[label]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(root / folder / NAMES[label] / f"{index:05d}.png")
    return root


def write_torchvision(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of torchvision's CIFAR10, and their checksums in place of the real ones."""
    content, folder = arrays(), root / CIFAR10.base_folder
    folder.mkdir(parents=True)

    def write(name: str, content: dict) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, md5((folder / name).read_bytes()).hexdigest()]

    for split, names in (("train", ("data_batch_1", "data_batch_2")), ("test", ("test_batch",))):
        parts = np.array_split(np.arange(len(content[f"{split}_labels"])), len(names))
        listed = []
        for name, rows in zip(names, parts, strict=True):
            pixels = content[f"{split}_images"][rows].transpose(0, 3, 1, 2).reshape(len(rows), -1)
            listed.append(write(name, {"data": pixels, "labels": content[f"{split}_labels"][rows].tolist()}))
        monkeypatch.setattr(CIFAR10, f"{split}_list", listed)
    name, checksum = write("batches.meta", {"label_names": NAMES})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": checksum})
    return root


def assert_is_the_tiny_one(found) -> None:
    content = arrays()
    *splits, classes = found
    assert classes == tuple(NAMES)
    for split, images in zip(("train", "test"), splits, strict=True):
        assert torch.equal(images.pixels, torch.from_numpy(content[f"{split}_images"]).permute(0, 3, 1, 2))
        assert images.pixels.is_contiguous()
        assert images.labels.tolist() == content[f"{split}_labels"].tolist()
        assert (images.padding, images.flip) == (4, True)


def test_npz_as_a_file_and_in_a_folder(tmp_path: Path) -> None:
    assert_is_the_tiny_one(read_cifar("cifar10", write_npz(tmp_path / "other.npz"), False))
    write_npz(tmp_path / "cifar10.npz")
    assert_is_the_tiny_one(read_cifar("cifar10", tmp_path, False))


def test_without_a_root_the_cache_folder_is_looked_into(cache: Path) -> None:
    (cache / "cifar10").mkdir(parents=True)
    write_npz(cache / "cifar10" / "cifar10.npz")
    assert_is_the_tiny_one(read_cifar("cifar10", None, False))


def test_cifar100(tmp_path: Path) -> None:
    np.savez(tmp_path / "cifar100.npz", **arrays(100))
    train, test, classes = read_cifar("cifar100", tmp_path, False)
    assert (len(train), len(test), len(classes)) == (200, 100, 100)


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_class_folders(tmp_path: Path, held_out: str) -> None:
    assert_is_the_tiny_one(read_cifar("cifar10", write_folders(tmp_path / "images", held_out), False))


def test_torchvisions_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_is_the_tiny_one(read_cifar("cifar10", write_torchvision(tmp_path, monkeypatch), False))


def test_download_goes_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []
    monkeypatch.setattr(
        CIFAR10,
        "download",
        lambda self: fetched or fetched.append(write_torchvision(Path(self.root), monkeypatch)),
    )
    assert_is_the_tiny_one(read_cifar("cifar10", tmp_path / "new", True))
    assert fetched == [tmp_path / "new"]


def test_download_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(CIFAR100, "download", fail)
    message = f"cifar100 could not be downloaded to '{tmp_path}' (<urlopen error no route to host>); fetch it elsewhere"
    with pytest.raises(ValueError, match=re.escape(message)):
        read_cifar("cifar100", tmp_path, True)


def test_torchvisions_files_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_torchvision(tmp_path, monkeypatch)
    (tmp_path / CIFAR10.base_folder / "test_batch").write_bytes(b"nothing")
    message = f"cifar10 in '{tmp_path}' is incomplete or damaged; remove it and pass download=True"
    with pytest.raises(ValueError, match=re.escape(message)):
        read_cifar("cifar10", tmp_path, False)


@pytest.mark.parametrize("exists", [True, False])
def test_a_root_without_data_says_how_to_get_it(tmp_path: Path, exists: bool) -> None:
    root = tmp_path / "nothing"
    if exists:
        root.mkdir()
    message = f"no cifar10 in '{root}': pass download=True to fetch it there, or as root= a folder that holds "
    with pytest.raises(ValueError, match=re.escape(message + "'cifar-10-batches-py'")):
        read_cifar("cifar10", root, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": np.zeros((20, 3, 32, 32), np.uint8)}, "train images must be uint8 of shape (n, 32, 32, 3)"),
        ({"test_images": np.zeros((10, 32, 32, 3))}, "test images must be uint8 of shape (n, 32, 32, 3), not float64"),
        ({"test_labels": np.arange(9)}, "10 test images need as many whole numbers as labels, not int64 (9,)"),
        ({"test_labels": np.arange(10.0)}, "10 test images need as many whole numbers as labels, not float64 (10,)"),
        ({"test_labels": np.arange(1, 11)}, "test label 10 is out of range for 10 classes (0 to 9)"),
        ({"test_labels": np.arange(10) - 1}, "test label -1 is out of range for 10 classes (0 to 9)"),
        (
            {"train_images": np.zeros((0, 32, 32, 3), np.uint8), "train_labels": np.zeros(0, int)},
            "0 train images need as many whole numbers as labels",
        ),
        ({"classes": np.array(["a", "b"])}, "cifar10 has 10 classes, '{path}' has 2"),
        ({"test_labels": np.array([object()] * 10)}, "cannot be read as an .npz of images: Object arrays cannot"),
    ],
)
def test_npz_with_other_content(tmp_path: Path, changes: dict, message: str) -> None:
    path = write_npz(tmp_path / "cifar10.npz", **changes)
    with pytest.raises(ValueError, match=re.escape(message.format(path=path))) as raised:
        read_cifar("cifar10", path, False)
    assert str(path) in str(raised.value)


def test_npz_that_lacks_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "cifar10.npz", train_images=arrays()["train_images"])
    with pytest.raises(ValueError, match="it lacks train_labels, test_images, test_labels, classes"):
        read_cifar("cifar10", tmp_path, False)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_npz_truncated(tmp_path: Path, share: float) -> None:
    path = write_npz(tmp_path / "cifar10.npz")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=re.escape(f"'{path}' is truncated or not an .npz file")):
        read_cifar("cifar10", path, False)


def test_npz_with_a_flipped_byte(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "cifar10.npz")
    content = bytearray(path.read_bytes())
    content[5000] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cifar10.npz' cannot be read as an .npz of images: Bad CRC-32"):
        read_cifar("cifar10", path, False)


def test_class_folders_with_something_wrong(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "images")
    broken = root / "train" / "class3" / "00006.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=re.escape(f"image '{broken}' cannot be decoded")):
        read_cifar("cifar10", root, False)
    Image.new("RGB", (30, 28)).save(broken)
    with pytest.raises(ValueError, match=re.escape(f"image '{broken}' has 28 x 30 pixels, CIFAR's have 32 x 32")):
        read_cifar("cifar10", root, False)
    broken.write_bytes(whole)
    assert_is_the_tiny_one(read_cifar("cifar10", root, False))
    (root / "test" / "class3").rename(root / "test" / "dogs")
    with pytest.raises(ValueError, match=f"'{root}': .*need the same class folders; only one has class3, dogs"):
        read_cifar("cifar10", root, False)


def test_class_folders_without_held_out_images(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "images")
    (root / "test").rename(root / "elsewhere")
    with pytest.raises(ValueError, match=f"'{root}/val' should hold one folder of images a class"):
        read_cifar("cifar10", root, False)


def test_class_folders_are_decoded_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folders(tmp_path / "images")
    read_cifar("cifar10", root, False)
    (file,) = cache.iterdir()
    assert re.fullmatch(r"cifar10-\w{12}-\w{16}\.npz", file.name)
    monkeypatch.setattr("obc_tools.data.images.read_image", None)
    assert_is_the_tiny_one(read_cifar("cifar10", root, False))


def test_a_changed_image_is_decoded_again(tmp_path: Path, cache: Path) -> None:
    root = write_folders(tmp_path / "images")
    other = write_folders(tmp_path / "other")
    before, _, _ = read_cifar("cifar10", root, False)
    read_cifar("cifar10", other, False)
    path = root / "train" / "class0" / "00000.png"
    Image.new("RGB", (32, 32), "red").save(path)
    after, _, _ = read_cifar("cifar10", root, False)
    assert torch.equal(after.pixels[0], torch.tensor([255, 0, 0]).byte()[:, None, None].expand(3, 32, 32))
    assert torch.equal(after.pixels[1:], before.pixels[1:])
    assert len(list(cache.iterdir())) == 2, "one file for each of the two roots, none for a state that is gone"


def test_a_damaged_cache_is_written_anew(tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_folders(tmp_path / "images")
    read_cifar("cifar10", root, False)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with caplog.at_level(logging.WARNING):
        assert_is_the_tiny_one(read_cifar("cifar10", root, False))
    assert "is truncated or not an .npz file; decoding the images again" in caplog.text
    assert len(file.read_bytes()) == len(whole)


def test_an_interrupted_write_leaves_no_cache(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folders(tmp_path / "images")

    def stop(path: Path, **_) -> None:
        path.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", stop)
    with pytest.raises(KeyboardInterrupt):
        read_cifar("cifar10", root, False)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert_is_the_tiny_one(read_cifar("cifar10", write_folders(tmp_path / "images"), False))
    assert f"decoded images could not be cached in '{cache}'" in caplog.text


def test_the_cache_folder_follows_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == Path(os.environ["XDG_CACHE_HOME"], "obc_tools")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "obc_tools"
