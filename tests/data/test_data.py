"""Data sets by name: digits, real images where they lie beside the checkout, and every way to ask for them wrongly."""

import hashlib
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from obc_tools.data.batches import take
from obc_tools.data.data import NORMALIZATIONS, Data, check_classes, hold_out, load_data
from obc_tools.data.images import ImageFiles, Images, Normalization
from obc_tools.models.networks import load_model

SHARED = Path(__file__).parents[3] / "shared" / "data"
SPLITS = {"train": 1438, "val": 359}


def write_photos(root: Path, *splits: str, classes: int = 2) -> Path:
    for split in splits:
        for label in range(classes):
            (root / split / f"class{label}").mkdir(parents=True)
            Image.new("RGB", (20, 30), (100 * label, 0, 255)).save(root / split / f"class{label}" / "photo.jpg")
    return root


def tiny(classes: int = 10, channels: int = 3) -> Data:
    images = Images(torch.zeros(6, channels, 8, 8).byte(), torch.arange(6))
    return Data(images, images, tuple("abcdefghij"[:classes]), Normalization((0.5,) * channels, (1.0,) * channels))


def test_digits_are_scikit_learns_and_every_one_is_in_one_split() -> None:
    data, digits = load_data("digits"), load_digits()
    assert {split: len(getattr(data, split)) for split in SPLITS} == SPLITS
    assert data.classes == tuple("0123456789")
    assert data.image_shape == (1, 8, 8)
    pixels = torch.cat([data.train.pixels, data.val.pixels])[:, 0]
    assert pixels.max() == 255
    found = {
        (image.tobytes(), int(label))
        for image, label in zip(pixels.numpy(), torch.cat([data.train.labels, data.val.labels]), strict=True)
    }
    expected = {
        (np.rint(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(digits.images, digits.target, strict=True)
    }
    assert found == expected


def test_the_split_of_digits_is_stratified_and_never_changes() -> None:
    val = load_data("digits").val
    shares = np.bincount(val.labels.numpy()) / np.bincount(load_digits().target)
    assert ((shares > 0.195) & (shares < 0.205)).all()
    digest = hashlib.sha256(val.pixels.numpy().tobytes() + val.labels.numpy().tobytes()).hexdigest()
    assert digest.startswith("617b4fe6e84afdb82030a5760d61ccec")


def test_digits_are_normalised_by_their_own_train_images() -> None:
    data = load_data("digits")
    images = torch.cat([images for images, _ in data.batches("train", 128)]).double()
    assert images.mean().abs() < 1e-5
    assert (images.std(correction=0) - 1).abs() < 1e-5
    assert load_data("digits", normalize="training").normalization == data.normalization


def test_digits_are_shifted_by_two_and_never_mirrored() -> None:
    train = load_data("digits").train
    assert (train.padding, train.flip) == (2, False)


def test_train_is_shuffled_and_val_is_not() -> None:
    data = load_data("digits")
    train, val = (torch.cat([labels for _, labels in data.batches(split, 100)]) for split in SPLITS)
    assert torch.equal(val, data.val.labels)
    assert not torch.equal(train, data.train.labels)
    assert torch.equal(train.sort().values, data.train.labels.sort().values)
    ordered = data.batches("train", 100, shuffle=False)
    assert torch.equal(torch.cat([labels for _, labels in ordered]), data.train.labels)


def test_batches_by_size_seed_and_pass() -> None:
    data = load_data("digits")
    assert [len(data.batches("train", size)) for size in (1438, 719, 720)] == [1, 2, 2]
    assert len(data.batches("train", 1000, drop_last=True)) == 1
    first, same, other = (data.batches("train", 64, seed=seed, augment=True) for seed in (1, 1, 2))
    (images, labels), (again, _), (different, _) = (next(iter(take(batches, 1))) for batches in (first, same, other))
    assert torch.equal(images, again)
    assert not torch.equal(images, different)
    assert (images.shape, labels.shape) == ((64, 1, 8, 8), (64,))
    assert torch.equal(next(iter(first.at(0)))[0], images)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_by_name(tmp_path: Path, name: str) -> None:
    classes = int(name.removeprefix("cifar"))
    images, labels = np.full((classes, 32, 32, 3), (125, 123, 114), np.uint8), np.arange(classes)
    names = np.array([f"c{index:02d}" for index in labels])
    splits = {
        f"{split}_{kind}": value
        for split in ("train", "test")
        for kind, value in (("images", images), ("labels", labels))
    }
    np.savez(tmp_path / f"{name}.npz", classes=names, **splits)
    data = load_data(name, str(tmp_path))
    assert repr(data) == (
        f"Data('{name}', train=Images({classes} of shape (3, 32, 32)), val=Images({classes} of shape (3, 32, 32)), "
        f"{classes} classes)"
    )
    assert data.normalization == NORMALIZATIONS[name]["training"]
    pixels, _ = next(iter(load_data(name, tmp_path, normalize="benchmark").batches("val", 4)))
    expected = torch.tensor([(125 - 125.3) / 63.0, 0, (114 - 113.9) / 66.7])
    assert torch.allclose(pixels[0, :, 5, 5], expected, rtol=0, atol=1e-5)
    pixels, _ = next(iter(load_data(name, tmp_path, normalize=([0, 0, 0], [1, 1, 1])).batches("val", 4)))
    assert torch.allclose(pixels[0, :, 5, 5], torch.tensor([125, 123, 114]) / 255, rtol=0, atol=1e-6)


def test_normalisations_by_name_are_the_published_numbers() -> None:
    table = {
        (data, name): (each.mean, each.std) for data, known in NORMALIZATIONS.items() for name, each in known.items()
    }
    benchmark = ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255))
    assert table["cifar10", "training"] == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert table["cifar100", "training"] == ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
    assert table["cifar10", "benchmark"] == table["cifar100", "benchmark"] == benchmark
    assert table["folder", "inception"] == ((0.5,) * 3, (0.5,) * 3)
    assert next(iter(NORMALIZATIONS["imagenet"])) == "imagenet"


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_a_folder_of_photos(tmp_path: Path, held_out: str) -> None:
    data = load_data("folder", write_photos(tmp_path, "train", held_out), image_size=16)
    assert (len(data.train), len(data.val), data.classes) == (2, 2, ("class0", "class1"))
    assert data.image_shape == (3, 16, 16)
    images, labels = next(iter(data.batches("val", 2, workers=0)))
    expected = (torch.tensor([0, 0, 1.0]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(images[0, :, 8, 8], expected, rtol=0, atol=0.02)
    assert labels.tolist() == [0, 1]
    assert next(iter(data.batches("train", 2, augment=True, workers=0)))[0].shape == (2, 3, 16, 16)


@pytest.mark.parametrize(("there", "absent"), [("val", "train"), ("train", "val")])
def test_one_split_of_a_folder_is_enough(tmp_path: Path, there: str, absent: str) -> None:
    data = load_data("folder", write_photos(tmp_path, there), image_size=8)
    assert getattr(data, absent) is None
    assert len(next(iter(data.batches(there, 2, workers=0)))[1]) == 2
    with pytest.raises(ValueError, match=f"folder was loaded from a folder without {absent} images"):
        data.batches(absent, 2)


def test_imagenet_needs_its_thousand_classes(tmp_path: Path) -> None:
    message = f"imagenet has 1000 classes, '{tmp_path}' has 2: labels would not be ImageNet's; complete it, or load it"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_data("imagenet", write_photos(tmp_path, "val"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mnist",), "unknown data set 'mnist'; known are digits, cifar10, cifar100, imagenet, folder"),
        (("digits", "somewhere"), "digits come with scikit-learn: root must be None"),
        (("digits", None, True), "digits cannot be downloaded; only cifar10 and cifar100 can"),
        (("imagenet", None, True), "imagenet cannot be downloaded; only cifar10 and cifar100 can"),
        (("imagenet",), "imagenet: no root was given; pass root=, a folder with class folders in 'train' and 'val'"),
        (("folder", "nowhere"), "folder: 'nowhere' is not a folder; pass root="),
        (
            ("cifar10", None, False, "imagenet"),
            "unknown normalisation 'imagenet' of cifar10; known are training, benchmark, or pass (mean, std)",
        ),
        (("digits", None, False, "benchmark"), "unknown normalisation 'benchmark' of digits; known are training, or"),
        (
            ("digits", None, False, ((0.5, 0.5, 0.5), (1, 1, 1))),
            "digits: images have 1 channels, the normalisation is for 3",
        ),
        (("digits", None, False, ((0.5,), (0,))), "standard deviations must be positive, not (0,)"),
    ],
)
def test_what_cannot_be_loaded(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_data(*arguments)


def test_an_empty_folder_and_folders_that_differ(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"folder: '{tmp_path}' has neither a folder 'train' nor one 'val'")):
        load_data("folder", tmp_path)
    write_photos(tmp_path, "train", "val")
    (tmp_path / "val" / "class1").rename(tmp_path / "val" / "cats")
    with pytest.raises(ValueError, match="need the same class folders; only one has cats, class1"):
        load_data("folder", tmp_path)
    (tmp_path / "val" / "cats" / "photo.jpg").unlink()
    with pytest.raises(ValueError, match="val' should hold one folder of images a class: .* classes cats"):
        load_data("folder", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("test", 8), {}, "unknown split 'test'; there are 'train' and 'val'"),
        (("train", 0), {}, "batch size=0: expected at least 1"),
        (("train", 8), {"seed": -1}, "seed=-1: expected at least 0"),
        (("train", 8), {"drop_last": True}, "no batch of 8 in 6 images"),
    ],
)
def test_batches_that_cannot_be(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny().batches(*arguments, **options)


def test_data_is_checked_when_built() -> None:
    with pytest.raises(ValueError, match="data: train label 5 is out of range for 5 classes"):
        tiny(classes=5)
    with pytest.raises(ValueError, match="data: there are neither train nor val images"):
        Data(None, None, ("a",), Normalization((0.5,), (1.0,)))
    assert tiny(channels=2).image_shape == (2, 8, 8)


def test_a_model_with_another_number_of_classes() -> None:
    check_classes(10, tiny())
    with pytest.raises(ValueError, match="model has 100 outputs, data has 10 classes"):
        check_classes(100, tiny())


def measure(model: torch.nn.Module, data: Data, size: int) -> tuple[int, float]:
    """How many val images a model classifies correctly, and its mean loss."""
    with torch.inference_mode():
        batches = [(model.eval()(images), labels) for images, labels in data.batches("val", size, workers=0)]
    outputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return int((outputs.argmax(1) == labels).sum()), float(torch.nn.functional.cross_entropy(outputs, labels))


if (SHARED / "cifar10.webps").is_file():

    @pytest.fixture(scope="module")
    def cifar10(tmp_path_factory: pytest.TempPathFactory) -> Path:
        """The test images of CIFAR-10 as an .npz, which uses some of them as train images too."""
        specification = importlib.util.spec_from_file_location("unpack", SHARED / "unpack.py")
        unpack = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(unpack)
        sheets = [(images, np.full(len(images), label)) for label, images in unpack.mosaics("cifar10", "test")]
        images, labels = (np.concatenate(parts) for parts in zip(*sheets, strict=True))
        names = np.array(["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"])
        path = tmp_path_factory.mktemp("data") / "cifar10.npz"
        np.savez(
            path,
            train_images=images[:10],
            train_labels=labels[:10],
            test_images=images,
            test_labels=labels,
            classes=names,
        )
        return path

    @pytest.fixture(scope="module")
    def resnet56() -> torch.nn.Module:
        return load_model("resnet56", weights=SHARED / "weights" / "reg_cifar10_resnet56_Jacobian_0.0005.pth")

    @pytest.mark.parametrize(("normalize", "expected"), [("training", 0.2231), ("benchmark", 0.2175)])
    def test_the_published_model_on_a_hundred_images(
        cifar10: Path, resnet56: torch.nn.Module, normalize: str, expected: float
    ) -> None:
        data = load_data("cifar10", cifar10, normalize=normalize)
        some = Images(data.val.pixels[::100].contiguous(), data.val.labels[::100])
        correct, loss = measure(resnet56, Data(None, some, data.classes, data.normalization), 50)
        assert 94 <= correct <= 96
        assert loss == pytest.approx(expected, abs=5e-4)

    @pytest.mark.slow
    @pytest.mark.parametrize(("normalize", "expected"), [("training", 9334), ("benchmark", 9280)])
    def test_the_published_accuracy_on_all_test_images(
        cifar10: Path, resnet56: torch.nn.Module, normalize: str, expected: int
    ) -> None:
        correct, _ = measure(resnet56, load_data("cifar10", cifar10, normalize=normalize), 500)
        assert abs(correct - expected) <= 1


if (SHARED / "imagenet_sample").is_dir():

    def test_the_imagenet_sample_and_its_efficientnet() -> None:
        data = load_data("imagenet", SHARED / "imagenet_sample", normalize="inception")
        assert (data.train, len(data.val), len(data.classes)) == (None, 1000, 1000)
        some = ImageFiles(data.val.paths[::125], data.val.labels[::125])
        path = SHARED / "weights" / "tf_efficientnet_lite0_imagenet.safetensors"
        model = load_model("timm:tf_efficientnet_lite0", weights=path)
        correct, loss = measure(model, Data(None, some, data.classes, data.normalization), 4)
        assert correct == 5
        assert loss == pytest.approx(1.19, abs=0.05)


def test_holding_out_divides_one_split():
    data = load_data("digits")
    parts = hold_out(data, "train", share=0.25, seed=3)
    assert (len(parts.train), len(parts.val)) == (1438 - 360, 360) and parts.classes == data.classes
    rows = torch.cat([parts.train.pixels, parts.val.pixels]).flatten(1)
    assert torch.equal(rows.unique(dim=0), data.train.pixels.flatten(1).unique(dim=0))
    again, other = hold_out(data, "train", share=0.25, seed=3), hold_out(data, "train", share=0.25, seed=4)
    assert torch.equal(again.val.pixels, parts.val.pixels) and not torch.equal(other.val.pixels, parts.val.pixels)
    with pytest.raises(ValueError, match=r"share=1.0: expected a share of the images"):
        hold_out(data, "train", share=1.0)


def test_holding_out_divides_files(tmp_path):
    for index in range(4):
        path = tmp_path / "val" / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (index, 0, 0)).save(path)
    parts = hold_out(load_data("folder", tmp_path, image_size=8), "val")
    assert sorted(parts.train.paths + parts.val.paths) == sorted(map(str, (tmp_path / "val").rglob("*.png")))
    assert all(f"class{label}" in path for path, label in zip(parts.val.paths, parts.val.labels.tolist(), strict=True))
    with pytest.raises(ValueError, match=r"without train images"):
        hold_out(load_data("folder", tmp_path, image_size=8), "train")
