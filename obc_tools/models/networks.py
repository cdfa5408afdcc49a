"""Networks: our own for CIFAR-sized images, and one door to torchvision's and timm's.

``load_model("resnet56")`` builds a network, ``load_model("resnet56", weights="file.pth")`` fills it from a file. The
state-dict keys of our ResNets and VGGs are those of the checkpoints published with Chen et al. (2025), and so are
their modules: pooling is functional in the ResNets and made of modules in the VGGs, because torch_pruning's MACs, in
which the paper's targets are given, count modules only.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import check_whole
from ..structure.layers import kernel_dims

OWN_NETWORKS = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "vgg11", "vgg13", "vgg16", "vgg19")

VGG_CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}

# The release that the README of the paper's published code points to.
PUBLISHED_ADDRESS = "https://github.com/ShaowuChen/Optimal_Brain_Connection/releases/download/v0/"
PUBLISHED_KINDS = ("published", "published-sparse")
PUBLISHED_FILES = {
    ("published", "resnet56"): "cifar10_resnet56.pth",
    ("published", "vgg19"): "cifar100_vgg19.pth",
    ("published-sparse", "resnet56"): "reg_cifar10_resnet56_Jacobian_0.0005.pth",
    ("published-sparse", "vgg19"): "reg_cifar100_vgg19_Jacobian_0.0005.pth",
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; where the shape changes, a strided 1x1 convolution and a norm (option B)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            convolution = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.downsample(x))


class CifarResNet(nn.Module):
    """ResNet for CIFAR-sized images, He et al. (2016), section 4.2, with option-B shortcuts.

    Args:
        depth: Number of layers, 6k + 2: three stages of k blocks.
        num_classes: Number of outputs.
        in_channels: Channels of an image.
        width: Channels of the first stage; the other two have twice and four times as many.

    Maps images (n, in_channels, height, width), 8 pixels or more a side, to logits (n, num_classes).
    ResNet-56 with 10 classes has 855,770 parameters.
    """

    def __init__(self, depth: int, num_classes: int = 10, *, in_channels: int = 3, width: int = 16) -> None:
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"a CIFAR ResNet has 6k + 2 layers (20, 32, 44, 56, 110, ...), not {depth}")
        _check_positive(num_classes=num_classes, in_channels=in_channels, width=width)
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.fc = nn.Linear(4 * width, num_classes)
        _initialize_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class CifarVGG(nn.Module):
    """VGG with batch normalisation for CIFAR-sized images, after Simonyan and Zisserman (2015), table 1.

    One linear layer follows a global average pooling, and there is no pooling between the last two blocks. A block
    ends with its last norm; ``forward`` applies that norm's ReLU before pooling.

    Args:
        depth: 11, 13, 16 or 19.
        num_classes: Number of outputs.
        in_channels: Channels of an image.
        width: Channels of the first block; the others have 2, 4, 8 and 8 times as many.

    Maps images (n, in_channels, height, width), 8 pixels or more a side, to logits (n, num_classes).
    """

    def __init__(self, depth: int, num_classes: int = 10, *, in_channels: int = 3, width: int = 64) -> None:
        if depth not in VGG_CONVOLUTIONS:
            raise ValueError(f"a VGG has {', '.join(map(str, VGG_CONVOLUTIONS))} layers, not {depth}")
        _check_positive(num_classes=num_classes, in_channels=in_channels, width=width)
        super().__init__()
        convolutions = VGG_CONVOLUTIONS[depth]
        self.block0 = _vgg_block(in_channels, width, convolutions[0])
        self.block1 = _vgg_block(width, 2 * width, convolutions[1])
        self.block2 = _vgg_block(2 * width, 4 * width, convolutions[2])
        self.block3 = _vgg_block(4 * width, 8 * width, convolutions[3])
        self.block4 = _vgg_block(8 * width, 8 * width, convolutions[4])
        self.pool0 = nn.MaxPool2d(2)
        self.pool1 = nn.MaxPool2d(2)
        self.pool2 = nn.MaxPool2d(2)
        self.pool4 = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(8 * width, num_classes)
        _initialize_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool0(F.relu(self.block0(x)))
        x = self.pool1(F.relu(self.block1(x)))
        x = self.pool2(F.relu(self.block2(x)))
        x = F.relu(self.block3(x))
        x = self.pool4(F.relu(self.block4(x)))
        return self.classifier(x.flatten(1))


def load_model(
    name: str, num_classes: int | None = None, weights: str | os.PathLike[str] | None = None, **options: Any
) -> nn.Module:
    """Build a network by name and, if asked, fill it with weights.

    Args:
        name: One of ours ("resnet20", 32, 44, 56, 110 or any other 6k + 2 but 50 and 152, which mean ImageNet's to
            everybody; "vgg11", 13, 16, 19), or a library's with its prefix: "torchvision:resnet50",
            "timm:vit_base_patch16_224", "ultralytics:yolo11n", or "transformers:" and a folder with a ``config.json``
            (code that lies beside it is never run).
        num_classes: Number of outputs. None: what the weights file has, else the network's default.
        weights: None, a fresh network, drawn from torch's global generator; "pretrained", what torchvision or timm
            downloads, or what lies in a folder of transformers; "published", the paper's baselines, or
            "published-sparse", those after its sparse training, from the folder that the environment variable
            OBC_TOOLS_WEIGHTS names or else downloaded once; or a file: ``.safetensors``, or a state dict saved by
            ``torch.save``.
        **options: Handed to the network's constructor, such as ``width=8`` or ``in_channels=1``.

    Returns:
        The network in training mode, on the CPU.

    Raises:
        ValueError: For an unknown name, a file that is missing, damaged, holds more than tensors, does not fit the
            network or holds numbers that are not finite, and for weights that cannot be downloaded.

    Example:
        >>> load_model("resnet20", num_classes=10, in_channels=1, width=8).fc
        Linear(in_features=32, out_features=10, bias=True)
    """
    _check_name(name)
    if num_classes is not None:
        _check_positive(num_classes=num_classes)
    if weights in (None, "pretrained"):
        return _build(name, num_classes, options, pretrained=weights is not None)
    path = _weights_file(name, weights)
    state = read_weights(path)
    model = _build(name, num_classes, options)
    if num_classes is None and (rows := _output_rows(model.state_dict(), state)):
        model = _build(name, rows[1], options)
    load_weights(model, state, origin=str(path))
    return model


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    rest = (BasicBlock(channels, channels, 1) for _ in range(blocks - 1))
    return nn.Sequential(BasicBlock(in_channels, channels, stride), *rest)


def _vgg_block(in_channels: int, channels: int, convolutions: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(convolutions):
        source = in_channels if index == 0 else channels
        layers += [nn.Conv2d(source, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


def _initialize_convolutions(model: nn.Module) -> None:
    """Draw convolution weights after He et al. (2015), fan-out; start their biases at zero."""
    for module in model.modules():
        if kernel_dims(module) == 2:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        check_whole(name, value, 1)


def _check_name(name: str) -> None:
    if not isinstance(name, str):
        raise ValueError(f"name={name!r}: expected that of a network, such as 'resnet56'")
    source, colon, entry = name.partition(":")
    if not colon:
        known = name in OWN_NETWORKS or _is_free_resnet(name)
    elif source in ADAPTERS:
        known = bool(entry)
    elif source == "torchvision":
        known = entry in torchvision.models.list_models()
    else:
        known = source == "timm" and timm.is_model(entry)
    if not known:
        closest = _closest_names(name)
        hint = f"; did you mean {', '.join(closest)}?" if closest else ""
        raise ValueError(
            f"unknown network '{name}'; known are {', '.join(OWN_NETWORKS)} (or any ResNet of 6k + 2 layers but "
            f"ImageNet's), 'torchvision:<name>', 'timm:<name>', 'ultralytics:<name>' and 'transformers:<folder>'{hint}"
        )


def _is_free_resnet(name: str) -> bool:
    """Whether the name is a CIFAR ResNet that nobody takes for ImageNet's: 50 and 152 are 6k + 2 too."""
    depth = re.fullmatch(r"resnet([1-9]\d*)", name)
    is_cifar_resnet = depth is not None and int(depth[1]) >= 8 and int(depth[1]) % 6 == 2
    return is_cifar_resnet and name not in torchvision.models.list_models()


def _closest_names(name: str) -> list[str]:
    libraries = {"torchvision": torchvision.models.list_models(), "timm": timm.list_models()}
    names = {own: own for own in OWN_NETWORKS}
    names |= {f"{source}:{entry}": entry for source, entries in libraries.items() for entry in entries}
    source, colon, entry = name.partition(":")
    if source in libraries:
        names = {full: short for full, short in names.items() if full.startswith(source + ":")}
    close = difflib.get_close_matches(entry if colon else name, set(names.values()), n=2)
    return [f"'{full}'" for match in close for full, short in names.items() if short == match]


def _build(name: str, num_classes: int | None, options: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
    given = dict(options) if num_classes is None else {"num_classes": num_classes, **options}
    source, colon, entry = name.partition(":")
    if pretrained and not colon:
        raise ValueError(
            f"'{name}' has no pretrained weights; pass weights='published', 'published-sparse' or a file, or take "
            "a library's network, such as 'torchvision:resnet50'"
        )
    if source in ADAPTERS:
        return ADAPTERS[source](entry, num_classes, options, pretrained)
    try:
        if not colon:
            family, depth = re.fullmatch(r"([a-z]+)(\d+)", name).groups()
            return {"resnet": CifarResNet, "vgg": CifarVGG}[family](int(depth), **given)
        if source == "torchvision":
            # Detectors fetch the weights of a backbone unless they are told not to.
            builder = inspect.signature(torchvision.models.get_model_builder(entry))
            empty = {"weights_backbone": None} if "weights_backbone" in builder.parameters else {}
            weights = "DEFAULT" if pretrained else None
            return torchvision.models.get_model(entry, weights=weights, **empty | given)
        return timm.create_model(entry, pretrained=pretrained, **given)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"network '{name}': {error}") from error
    except OSError as error:
        if not pretrained:
            raise
        raise ValueError(
            f"the pretrained weights of '{name}' could not be downloaded ({error}); without a network, fetch the file "
            "elsewhere and pass its path as weights="
        ) from error


def _build_transformer(folder: str, num_classes: int | None, options: Mapping[str, Any], pretrained: bool) -> nn.Module:
    """Build the network that a folder's ``config.json`` describes, with the folder's weights if asked."""
    if not Path(folder, "config.json").is_file():
        raise ValueError(f"'{folder}' is no folder with a config.json: transformers' networks are read from one")
    library = _imported("transformers")
    given = {} if num_classes is None else {"num_labels": num_classes}
    try:
        config = library.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **given, **options
        )
        kinds = config.architectures or []
        kind = getattr(library, kinds[0], None) if kinds else library.AutoModel
        if kind is None:
            raise ValueError(f"{kinds[0]} is no network of transformers itself")
        if pretrained:
            return kind.from_pretrained(folder, config=config, local_files_only=True, weights_only=True).train()
        return kind.from_config(config) if kind is library.AutoModel else kind(config)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"network 'transformers:{folder}': {error}") from error


def _build_yolo(name: str, num_classes: int | None, options: Mapping[str, Any], pretrained: bool) -> nn.Module:
    if pretrained:
        raise ValueError(f"pretrained weights of 'ultralytics:{name}' are not downloaded here: pass the network itself")
    given = {"nc": num_classes, "verbose": False, **options}
    try:
        return _imported("ultralytics.nn.tasks").DetectionModel(f"{name}.yaml", **given)
    except (OSError, KeyError) as error:
        raise ValueError(f"network 'ultralytics:{name}': {error}") from error


def _imported(library: str) -> Any:
    try:
        return import_module(library)
    except ImportError as error:
        name = library.partition(".")[0]
        raise ValueError(f"'{name}:…' needs {name}, which is not installed: pip install {name}") from error


ADAPTERS = {"transformers": _build_transformer, "ultralytics": _build_yolo}
"""Libraries that are imported only once a network of theirs is asked for by name."""


def _weights_file(name: str, weights: str | os.PathLike[str]) -> Path:
    """Return the file of weights that are one, or that have been published and are downloaded if need be."""
    if weights not in PUBLISHED_KINDS:
        if not Path(weights).exists():
            kinds = "', '".join(("pretrained", *PUBLISHED_KINDS))
            raise ValueError(f"weights '{weights}': there is no such file, and weights by name are '{kinds}'")
        return Path(weights)
    if (weights, name) not in PUBLISHED_FILES:
        known = ", ".join(f"'{network}'" for key, network in PUBLISHED_FILES if key == weights)
        raise ValueError(f"no {weights} weights of '{name}' are known, only of {known}")
    file, folder = PUBLISHED_FILES[weights, name], os.environ.get("OBC_TOOLS_WEIGHTS")
    path = Path(folder or Path(torch.hub.get_dir(), "checkpoints"), file)
    if path.is_file():
        return path
    address = PUBLISHED_ADDRESS + file
    if folder:
        raise ValueError(
            f"OBC_TOOLS_WEIGHTS names the folder '{folder}', where the {weights} weights of '{name}' should be the "
            f"file '{file}'; put it there, or unset the variable to download it from {PUBLISHED_ADDRESS}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(address, str(path))
    except OSError as error:
        raise ValueError(
            f"{address} could not be downloaded ({error}); fetch it elsewhere, then pass the file as weights= or put "
            f"'{file}' into a folder and name that folder in the environment variable OBC_TOOLS_WEIGHTS"
        ) from error
    return path


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict from a file, onto the CPU, without ever running code from it.

    Understood are safetensors (by the ending ``.safetensors``) and what ``torch.save`` writes for a state dict, also
    inside {"state_dict": ...} or {"model": ...} and with DataParallel's "module." before every name.

    Raises:
        ValueError: For a file that is missing, truncated, of another kind, or holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"weights file '{path}' {'is a folder' if path.is_dir() else 'does not exist'}")
    try:
        return _unwrap(load_file(path) if path.suffix == ".safetensors" else _read_torch(path), path)
    except SafetensorError as error:
        raise ValueError(f"'{path}' is truncated or not a safetensors file: {error}") from error


def load_weights(model: nn.Module, state: Mapping[str, Tensor], *, origin: str) -> None:
    """Fill a network from a state dict, all of it or nothing; the numbers are cast to the network's types.

    Counters ``num_batches_tracked`` may be missing, as in files from before they existed.

    Args:
        model: Changed in place, once every check has passed.
        state: Every entry of the network with its shape, and no other.
        origin: Where the state dict is from; error messages begin with it.

    Raises:
        ValueError: For missing, unexpected or differently shaped entries, another number of classes, another kind of
            numbers, numbers of 8 bits, packed or sparse ones, negative variances, NaN or infinity.
    """
    own = model.state_dict()
    _check_fit(own, state, origin)
    for key, tensor in state.items():
        packed = tensor.is_quantized or tensor.is_nested or tensor.is_meta or tensor.layout is not torch.strided
        if packed or (tensor.is_floating_point() and tensor.itemsize < 2):
            raise ValueError(f"{origin}: '{key}' is no plain tensor of usual numbers ({tensor.dtype}, {tensor.layout})")
        if key in own and kind_of(tensor) != kind_of(own[key]):
            raise ValueError(f"{origin}: '{key}' holds {tensor.dtype}, the network's is {own[key].dtype}")
        if key.endswith("running_var") and (tensor < 0).any():
            raise ValueError(f"{origin}: '{key}' holds a negative variance")
        # A buffer that is infinite by construction, such as an attention mask, may stay so.
        if not tensor.isfinite().all() and own[key].isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise ValueError(f"{origin}: '{key}' holds NaN or infinity in {count} of {tensor.numel()} numbers")
    # The network's own state dict adds missing counters and the version marks that some modules insist on.
    own.update(state)
    model.load_state_dict(own)


def kind_of(tensor: Tensor) -> tuple[bool, bool]:
    """Say whether a tensor holds complex numbers, and whether real ones; whole ones if neither."""
    return tensor.is_complex(), tensor.is_floating_point()


def _read_torch(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    # Damaged bytes make an unpickler fail in any way it can, KeyError and struct.error among them.
    except Exception as error:
        if "GLOBAL" in str(error):
            raise ValueError(
                f"'{path}' holds Python objects, not only tensors, and was refused; nothing in it was executed. Save "
                "the state dict alone: torch.save(model.state_dict(), file)"
            ) from error
        raise ValueError(f"'{path}' is truncated or not a file of weights saved by torch") from error


def _unwrap(content: object, path: Path) -> dict[str, Tensor]:
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        found = "nothing" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise ValueError(f"'{path}' is not a state dict of names and tensors: it holds {found}")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            found = f"its entry {key!r} is a {type(value).__name__}"
            raise ValueError(f"'{path}' is not a state dict of names and tensors: {found}")
    if all(key.startswith("module.") for key in content):
        return {key.removeprefix("module."): value for key, value in content.items()}
    return dict(content)


def _check_fit(own: Mapping[str, Tensor], state: Mapping[str, Tensor], origin: str) -> None:
    if rows := _output_rows(own, state):
        layer, found, asked = rows
        raise ValueError(f"{origin}: file has {found} classes, model asked for {asked} (layer '{layer}')")
    missing, unexpected, reshaped = _differences(own, state)
    shapes = [f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}" for key in reshaped]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    parts = [f"{len(entries)} {kind} ({_first(entries)})" for kind, entries in kinds.items() if entries]
    if parts:
        raise ValueError(f"{origin}: these are weights of another architecture: {'; '.join(parts)}")


def _differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
    """Return the names that are missing, that are unexpected, and those of entries of another shape."""
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    return missing, unexpected, [key for key in own if key in state and own[key].shape != state[key].shape]


def _output_rows(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[str, int, int] | None:
    """Where only one layer differs, and only in its rows (no other than the output can): its name, theirs, ours."""
    missing, unexpected, reshaped = _differences(own, state)
    layers = {key.rpartition(".")[0] for key in reshaped}
    rows = {(*state[key].shape[:1], *own[key].shape[:1]) for key in reshaped}
    rest = all(own[key].ndim == state[key].ndim and own[key].shape[1:] == state[key].shape[1:] for key in reshaped)
    single = not missing and not unexpected and len(layers) == len(rows) == 1 and rest
    return (layers.pop(), *rows.pop()) if single else None


def _first(entries: Iterable[str], count: int = 3) -> str:
    entries = list(entries)
    return ", ".join(entries[:count]) + (", ..." if len(entries) > count else "")
