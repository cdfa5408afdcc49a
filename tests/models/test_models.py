"""Networks by name: sizes known from the literature, and every way in which a name or its weights can be wrong."""

import copy
import re
from pathlib import Path
from urllib.error import URLError

import pytest
import timm
import torch
import torch_pruning
import torchvision
from torch import nn

from obc_tools.models.networks import OWN_NETWORKS, CifarResNet, CifarVGG, load_model

SHARED = Path(__file__).parents[3] / "shared" / "data"
RESNET56 = "reg_cifar10_resnet56_Jacobian_0.0005.pth"


@pytest.mark.parametrize(
    ("name", "classes", "macs", "parameters"),
    [("resnet56", 10, 126_837_386, 855_770), ("vgg19", 100, 512_731_236, 20_086_692)],
)
def test_sizes_are_the_published_ones(name: str, classes: int, macs: int, parameters: int) -> None:
    counted = torch_pruning.utils.count_ops_and_params(load_model(name, classes), torch.zeros(1, 3, 32, 32))
    assert counted == (macs, parameters)


@pytest.mark.parametrize(("name", "blocks"), [("resnet20", 3), ("resnet32", 5), ("resnet8", 1)])
def test_resnet_keys(name: str, blocks: int) -> None:
    norm = [f".{part}" for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
    expected = ["conv1.weight", *(f"bn1{part}" for part in norm), "fc.weight", "fc.bias"]
    for stage in (1, 2, 3):
        for block in range(blocks):
            for index in (1, 2):
                expected += [f"layer{stage}.{block}.conv{index}.weight"]
                expected += [f"layer{stage}.{block}.bn{index}{part}" for part in norm]
    for stage in (2, 3):
        expected += [f"layer{stage}.0.downsample.0.weight"]
        expected += [f"layer{stage}.0.downsample.1{part}" for part in norm]
    assert sorted(load_model(name).state_dict()) == sorted(expected)


def test_vgg19_keys_and_widths() -> None:
    state = load_model("vgg19", width=2).state_dict()
    expected = {}
    before = 3
    for block, (width, convolutions) in enumerate([(2, 2), (4, 2), (8, 4), (16, 4), (16, 4)]):
        for index in range(convolutions):
            expected[f"block{block}.{3 * index}.weight"] = (width, before, 3, 3)
            expected[f"block{block}.{3 * index}.bias"] = (width,)
            for part in ("weight", "bias", "running_mean", "running_var"):
                expected[f"block{block}.{3 * index + 1}.{part}"] = (width,)
            expected[f"block{block}.{3 * index + 1}.num_batches_tracked"] = ()
            before = width
    expected |= {"classifier.weight": (10, 16), "classifier.bias": (10,)}
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == expected


@pytest.mark.parametrize(("name", "layers"), [("vgg11", 9), ("vgg13", 11), ("vgg16", 14), ("vgg19", 17)])
def test_vgg_depths(name: str, layers: int) -> None:
    # n layers in the literature: two of its three linear layers are not used for CIFAR.
    modules = list(load_model(name, width=1).modules())
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in modules) == layers


@pytest.mark.parametrize("side", [8, 9, 32, 40])
@pytest.mark.parametrize("name", OWN_NETWORKS)
def test_every_own_network_runs_at_any_size(name: str, side: int) -> None:
    torch.manual_seed(0)
    model = load_model(name, num_classes=7, in_channels=1, width=2).eval()
    with torch.no_grad():
        outputs = model(torch.randn(2, 1, side, side))
    assert outputs.shape == (2, 7)
    assert outputs.isfinite().all()
    assert (outputs[0] != outputs[1]).any()


def test_vgg_forward_applies_the_last_relu_of_each_block_before_pooling() -> None:
    torch.manual_seed(0)
    model = CifarVGG(11, 3, width=2).double().eval()
    x = expected = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    for index in range(5):
        expected = getattr(model, f"block{index}")(expected).clamp(min=0)
        if index < 3:
            expected = nn.functional.max_pool2d(expected, 2)
    expected = model.classifier(expected.mean((2, 3)))
    assert torch.allclose(model(x), expected, rtol=0, atol=1e-12)


def test_a_resnet_block_adds_its_shortcut() -> None:
    torch.manual_seed(0)
    block = CifarResNet(8, width=2).double().eval().layer2[0]
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    inner = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
    assert torch.allclose(block(x), (inner + block.downsample(x)).relu(), rtol=0, atol=1e-12)
    assert block(x).shape == (2, 4, 4, 4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CifarResNet(57), "a CIFAR ResNet has 6k + 2 layers (20, 32, 44, 56, 110, ...), not 57"),
        (lambda: CifarResNet(2), "a CIFAR ResNet has 6k + 2 layers (20, 32, 44, 56, 110, ...), not 2"),
        (lambda: CifarVGG(12), "a VGG has 11, 13, 16, 19 layers, not 12"),
        (lambda: load_model("resnet20", 0), "num_classes=0: expected at least 1"),
        (lambda: load_model("torchvision:resnet18", -1), "num_classes=-1: expected at least 1"),
        (lambda: load_model("resnet20", width=0), "width=0: expected at least 1"),
        (lambda: load_model("vgg11", in_channels=0), "in_channels=0: expected at least 1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


@pytest.mark.parametrize(
    ("name", "closest"),
    [
        ("resnet57", "'resnet56'"),
        ("vgg12", "'vgg19'"),
        ("resnet50", "'torchvision:resnet50'"),
        ("mobilenet_v2", "'torchvision:mobilenet_v2'"),
        ("torchvision:resnet51", "'torchvision:resnet50'"),
        ("timm:vit_base_patch16_225", "'timm:vit_base_patch16_224'"),
        ("keras:resnet50", "'torchvision:resnet50'"),
    ],
)
def test_an_unknown_name_lists_the_known_and_the_closest(name: str, closest: str) -> None:
    known = ", ".join(OWN_NETWORKS)
    message = rf"unknown network '{name}'; known are {known} .*did you mean .*{closest}"
    with pytest.raises(ValueError, match=message):
        load_model(name)


def test_an_unknown_name_without_anything_close() -> None:
    with pytest.raises(ValueError, match=r"unknown network 'qqqqqqqqqq'.*'transformers:<folder>'$"):
        load_model("qqqqqqqqqq")


@pytest.mark.parametrize(("name", "head"), [("torchvision:squeezenet1_1", "classifier.1"), ("timm:test_vit", "head")])
def test_libraries_build_with_the_asked_number_of_classes(name: str, head: str) -> None:
    assert len(load_model(name, 7).get_submodule(head).weight) == 7
    assert len(load_model(name).get_submodule(head).weight) == 1000


def test_options_reach_the_library() -> None:
    assert load_model("timm:test_vit", in_chans=1).patch_embed.proj.in_channels == 1
    with pytest.raises(ValueError, match=r"network 'timm:test_vit.nothing': Invalid pretrained tag \(nothing\)"):
        load_model("timm:test_vit.nothing")


@pytest.mark.parametrize(("name", "key"), [("resnet8", "fc.weight"), ("vgg11", "classifier.weight")])
def test_weights_from_a_file_bring_their_number_of_classes(tmp_path: Path, name: str, key: str) -> None:
    torch.manual_seed(1)
    source = load_model(name, 7, width=2)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    model = load_model(name, weights=tmp_path / "weights.pth", width=2)
    assert torch.equal(model.state_dict()[key], source.state_dict()[key])
    assert len(model.state_dict()[key]) == 7
    message = re.escape(f"{tmp_path / 'weights.pth'}: file has 7 classes, model asked for 100")
    with pytest.raises(ValueError, match=message):
        load_model(name, 100, weights=str(tmp_path / "weights.pth"), width=2)


def test_weights_of_another_architecture(tmp_path: Path) -> None:
    torch.save(load_model("vgg11", width=2).state_dict(), tmp_path / "vgg.pth")
    with pytest.raises(
        ValueError, match=r"another architecture: 47 missing \(conv1.weight, .*; 58 unexpected \(block0"
    ):
        load_model("resnet8", weights=tmp_path / "vgg.pth")


def test_weights_of_a_library_network_from_a_file(tmp_path: Path) -> None:
    source = load_model("timm:test_resnet", 5)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "weights.pth")
    model = load_model("timm:test_resnet", 5, tmp_path / "weights.pth")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))
    model = load_model("timm:test_resnet", weights=tmp_path / "weights.pth")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))
    with pytest.raises(ValueError, match="file has 5 classes, model asked for 1000"):
        load_model("timm:test_resnet", 1000, tmp_path / "weights.pth")


def test_a_missing_weights_file_lists_the_weights_by_name() -> None:
    message = (
        "weights 'pretraned': there is no such file, and weights by name are 'pretrained', 'published', 'published-"
    )
    with pytest.raises(ValueError, match=message):
        load_model("resnet20", weights="pretraned")


def test_pretrained_weights_come_from_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, **given: asked.update({name: given}))
    monkeypatch.setattr(timm, "create_model", lambda name, **given: asked.update({name: given}))
    load_model("torchvision:resnet18", weights="pretrained")
    load_model("timm:test_vit", 5, "pretrained")
    assert asked == {"resnet18": {"weights": "DEFAULT"}, "test_vit": {"pretrained": True, "num_classes": 5}}


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:test_vit"])
def test_pretrained_weights_without_a_network(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fail(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.models, "get_model", fail)
    monkeypatch.setattr(timm, "create_model", fail)
    message = rf"pretrained weights of '{name}' could not be downloaded .*no route to host.* pass its path as weights="
    with pytest.raises(ValueError, match=message):
        load_model(name, weights="pretrained")


def test_pretrained_weights_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="'resnet56' has no pretrained weights; pass weights='published'"):
        load_model("resnet56", weights="pretrained")
    with pytest.raises(
        ValueError, match="network 'torchvision:resnet18': .*'num_classes' expected value 1000 but got 5"
    ):
        load_model("torchvision:resnet18", 5, "pretrained")


def test_published_weights_from_the_folder_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OBC_TOOLS_WEIGHTS", str(tmp_path))
    message = f"'{tmp_path}', where the published-sparse weights of 'resnet56' should be the file '{RESNET56}'"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_model("resnet56", weights="published-sparse")
    source = load_model("resnet56", width=1)
    torch.save(source.state_dict(), tmp_path / RESNET56)
    model = load_model("resnet56", weights="published-sparse", width=1)
    assert torch.equal(model.fc.weight, source.fc.weight)


def test_published_weights_are_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OBC_TOOLS_WEIGHTS", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    source, addresses = load_model("vgg19", 100, width=1), []

    def download(address: str, path: str) -> None:
        addresses.append(address)
        torch.save(source.state_dict(), path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    models = [load_model("vgg19", weights="published", width=1) for _ in range(2)]
    assert all(torch.equal(model.classifier.weight, source.classifier.weight) for model in models)
    assert [address.rpartition("/")[2] for address in addresses] == ["cifar100_vgg19.pth"]


def test_published_weights_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_):
        raise URLError("no route to host")

    monkeypatch.delenv("OBC_TOOLS_WEIGHTS", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(ValueError, match=f"{RESNET56} could not be downloaded .*OBC_TOOLS_WEIGHTS"):
        load_model("resnet56", weights="published-sparse")
    with pytest.raises(ValueError, match="no published weights of 'resnet20' are known, only of 'resnet56', 'vgg19'"):
        load_model("resnet20", weights="published")


def test_a_copy_and_a_seed_give_the_same_network() -> None:
    torch.manual_seed(3)
    first = load_model("resnet20", width=2)
    torch.manual_seed(3)
    second = copy.deepcopy(load_model("resnet20", width=2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


if (SHARED / "weights" / RESNET56).is_file():

    def test_the_published_checkpoint_loads_and_nothing_else_fits_it() -> None:
        path = SHARED / "weights" / RESNET56
        model = load_model("resnet56", weights=path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
        assert len(state) == len(model.state_dict())
        with pytest.raises(ValueError, match="file has 10 classes, model asked for 100"):
            load_model("resnet56", 100, path)
        with pytest.raises(
            ValueError, match=r"another architecture: 216 unexpected \(layer1.3.conv1.weight, .*, \.\.\.\)"
        ):
            load_model("resnet20", weights=path)

    def test_efficientnet_lite_is_cast_from_float16() -> None:
        path = SHARED / "weights" / "tf_efficientnet_lite0_imagenet.safetensors"
        model = load_model("timm:tf_efficientnet_lite0", weights=path)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
