"""Save and load a pruned model: tensors as safetensors, everything else as JSON, nothing pickled.

A folder holds three files. ``model.safetensors`` has the tensors of the pruned model; ``plan.json`` the plan that gives
an unpruned network their shapes; ``manifest.json`` how to build that network, digests of the other two and the
versions that wrote them. The manifest is data for `load_model`: it names no code.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..files import LONGEST_JSON, check_length, entries, parse_json, replacing
from ..pruning.equivalent import EquivalentModel
from ..pruning.plan import PruningPlan, check_is_plan, prune
from ..state import LentRandomness, check_module
from ..structure.layers import is_projection, layer_axes
from .networks import kind_of, load_model, load_weights, read_weights

FORMAT = 1
TENSORS, PLAN, MANIFEST = "model.safetensors", "plan.json", "manifest.json"
LIBRARIES = ("obc_tools", "torch", "torchvision", "timm", "safetensors")

# Options of torchvision's and timm's constructors that fetch or read weights, which a manifest must not make them do.
_WEIGHT_OPTIONS = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "weights_backbone"}


LARGEST_NUMBER, MOST_TENSORS, LONGEST_MANIFEST = 10**8, 10**5, 2**24
"""Of a source's options, and of the network that they describe: objects take memory beside their numbers."""


class StoreError(ValueError):
    """A folder that cannot be written or does not hold a saved model."""


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` holds; checked when built.

    Attributes:
        source: Arguments of `load_model` for the unpruned network, without ``weights``; or None.
        sha256: File name -> digest, of the other two files.
        tied: Name of a tensor -> name of the tensor that it shares its storage with, which is the one in the file.
        libraries: Library -> version that wrote the folder.
        format: Version of this layout.
    """

    source: Mapping[str, Any] | None
    sha256: Mapping[str, str]
    tied: Mapping[str, str]
    libraries: Mapping[str, str]
    format: int = FORMAT

    def __post_init__(self):
        if type(self.format) is not int or self.format != FORMAT:
            raise StoreError(f"format {self.format!r}; this version reads format {FORMAT}")
        if self.source is not None:
            _check_source(self.source)
        for name in ("sha256", "tied", "libraries"):
            value = getattr(self, name)
            if not isinstance(value, Mapping) or {type(text) for pair in value.items() for text in pair} - {str}:
                raise StoreError(f"{name} is no mapping of text to text: {value!r}")
        if set(self.sha256) != {TENSORS, PLAN}:
            raise StoreError(f"sha256 has digests of {', '.join(self.sha256)}; needed are {TENSORS} and {PLAN}")


def save_pruned(
    folder: str | os.PathLike[str],
    model: nn.Module,
    plan: PruningPlan,
    *,
    source: str | Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Save a pruned model, naively fine-tuned or merged, so that :func:`load_pruned` gives the same logits, bit by bit.

    The folder appears complete or not at all; nothing is written before every check has passed.

    Args:
        folder: Where to; made if need be. It is refused when it holds anything.
        model: What `prune` or the merge of Equivalent Pruning returned.
        plan: From the unpruned network to ``model``.
        source: How to build the unpruned network: the arguments given to `load_model` (a name
            alone will do; ``weights`` is left out; ``num_classes`` is read from the output layer where it is missing).
            None for a network of your own: :func:`load_pruned` then needs ``model=``.
        overwrite: Replace a model saved in ``folder`` before, once the new one is complete.

    Raises:
        ValueError: if the model is not what the plan makes of its source, or holds NaN or infinity (which tensor), or
            the folder is in use.
    """
    folder = Path(folder).resolve()
    _check_folder(folder, overwrite)
    check_module(model)
    check_is_plan(plan)
    if isinstance(model, EquivalentModel):
        raise StoreError("an EquivalentModel is saved after merging: pass model.merge()")
    plan.validate(model, pruned=True)
    _check_finite(model)
    tensors, tied = _separate(model)
    if source is not None:
        source = _complete_source(source, model)
        load_weights(_build(source, plan), _join(tensors, tied), origin=f"source {source}, pruned")
    with replacing(folder) as new:
        new.mkdir()
        save_file(tensors, new / TENSORS)
        (new / PLAN).write_text(plan.to_json(), encoding="utf-8")
        sha256 = {name: _digest(new / name) for name in (TENSORS, PLAN)}
        libraries = {name: version(name) for name in LIBRARIES}
        manifest = Manifest(source, sha256, tied, libraries)
        (new / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2, allow_nan=False), encoding="utf-8")


def load_pruned(folder: str | os.PathLike[str], *, model: nn.Module | None = None) -> nn.Module:
    """Load a pruned model: build the unpruned network, prune it by the saved plan, fill it with the saved tensors.

    Nothing in the folder is executed. The caller's random state is left alone.

    Args:
        folder: What :func:`save_pruned` wrote.
        model: A fresh unpruned instance of the network, needed where it was saved without a source; left unchanged.

    Returns:
        The pruned model in eval mode, on the CPU (on ``model``'s device when given), in the saved precision.

    Raises:
        ValueError: for a folder that is missing, incomplete, damaged or tampered with, or does not fit ``model``.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    for name, digest in manifest.sha256.items():
        if not (folder / name).is_file():
            raise StoreError(f"'{folder}' holds no {name}: it is no complete saved model")
        if name != TENSORS:
            check_length(folder / name, LONGEST_JSON)
        if _digest(folder / name) != digest:
            raise StoreError(f"'{folder / name}' is truncated or was changed: its SHA-256 is not that of {MANIFEST}")
    plan = PruningPlan.from_json((folder / PLAN).read_text(encoding="utf-8"))
    if model is not None:
        pruned = prune(model, plan)
    elif manifest.source is not None:
        pruned = _build(manifest.source, plan)
    else:
        raise StoreError(
            f"'{folder}' was saved without a source: pass model=, a fresh unpruned instance of its network"
        )
    state = _join(read_weights(folder / TENSORS), manifest.tied)
    _match_types(pruned, state)
    load_weights(pruned, state, origin=str(folder))
    return pruned.eval()


def _check_folder(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"'{folder}' is a file, not a folder")
    found = entries(folder)
    if found and not overwrite:
        raise StoreError(f"'{folder}' already holds {', '.join(found[:3])}: choose another, or pass overwrite=True")
    if others := sorted(set(found) - {TENSORS, PLAN, MANIFEST}):
        raise StoreError(f"'{folder}' holds more than a saved model ({', '.join(others[:3])}): choose another folder")


def _check_finite(model: nn.Module) -> None:
    """Refuse what a diverged training leaves; an infinite limit that a fixed buffer holds is none of that."""
    trained = {name for name, _ in model.named_parameters()}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise StoreError(f"'{name}' of the model's state is a {type(tensor).__name__}; only tensors are saved")
        fixed = name not in trained and "running_" not in name
        if tensor.isnan().any() or (tensor.isinf().any() and not fixed):
            raise StoreError(f"'{name}' holds NaN or infinity; the model was not saved")


def _separate(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split a model's state into tensors that share nothing and the names of those that repeat an earlier one."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple, str] = {}
    for name, tensor in model.state_dict().items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in first:
            tied[name] = first[place]
        else:
            first[place] = name
            tensors[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return tensors, tied


def _join(tensors: Mapping[str, Tensor], tied: Mapping[str, str]) -> dict[str, Tensor]:
    missing = [name for name in tied.values() if name not in tensors]
    if missing:
        raise StoreError(f"{MANIFEST} ties a tensor to '{missing[0]}', which {TENSORS} does not hold")
    return dict(tensors) | {name: tensors[first] for name, first in tied.items()}


def _complete_source(source: str | Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    source = {"name": source} if isinstance(source, str) else source
    if not isinstance(source, Mapping):
        raise StoreError(f"source is no name and no mapping of load_model's arguments: {source!r}")
    given = {key: value for key, value in source.items() if key != "weights"}
    if given.get("num_classes") is None:
        given["num_classes"] = _output_width(model)
    _check_source(given)
    return json.loads(json.dumps(given))


def _output_width(model: nn.Module) -> int:
    layers = [layer for layer in model.modules() if is_projection(layer)]
    if not layers:
        raise StoreError(f"{type(model).__name__} has no output layer to read num_classes from: put it into source")
    return layer_axes(layers[-1])["out"].width


def _check_source(source: object) -> None:
    if not isinstance(source, Mapping) or not isinstance(source.get("name"), str):
        raise StoreError(f"source is no mapping of load_model's arguments with a 'name': {source!r}")
    for key, value in source.items():
        if not isinstance(key, str) or not _is_plain(value):
            raise StoreError(
                f"source: {key!r} is {value!r}; only text, booleans, null, lists and numbers up to {LARGEST_NUMBER:,} "
                "are data"
            )
    classes = source.get("num_classes")
    if type(classes) is not int or classes < 1:
        raise StoreError(f"source: num_classes is {classes!r}; it is a whole number of at least 1")
    if refused := sorted(({"weights"} | _WEIGHT_OPTIONS) & set(source)):
        raise StoreError(f"source: {', '.join(refused)} would load weights; it only describes a network")


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, int | float):
        return abs(value) <= LARGEST_NUMBER  # nor NaN
    return value is None or isinstance(value, str)


class Sized(TorchDispatchMode):
    """Refuses to make tensors that are too many or together take more than so many bytes, before they are made."""

    def __init__(self, most: int):
        super().__init__()
        self.most, self.made, self.count = most, 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        arguments = function._schema.arguments
        if args and arguments and arguments[0].name == "size":
            self.made += math.prod(args[0]) * (kwargs.get("dtype") or torch.get_default_dtype()).itemsize
            self.count += 1
            if self.made > self.most:
                raise StoreError(f"its network would take {self.made:,} bytes; {self.most:,} are free")
            if self.count > MOST_TENSORS:
                raise StoreError(f"its network would take more than {MOST_TENSORS:,} tensors")
        return function(*args, **kwargs)


def _build(source: Mapping[str, Any], plan: PruningPlan) -> nn.Module:
    with LentRandomness(), Sized(psutil.virtual_memory().available):
        try:
            model = load_model(**source)
        except ValueError as error:
            raise StoreError(f"source {dict(source)}: load_model cannot take it: {error}") from error
    return prune(model, plan)


def _match_types(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give the tensors of a model the dtypes of a state dict, so that filling it rounds nothing.

    Raises:
        StoreError: parameters, or running statistics, of one layer of several dtypes, which cannot run.
    """
    for layer, module in model.named_modules():
        running = [key for key, _ in module.named_buffers(recurse=False) if key.startswith("running_")]
        kept = {"parameters": [key for key, _ in module.named_parameters(recurse=False)], "statistics": running}
        for kind, keys in kept.items():
            names = (f"{layer}.{key}".strip(".") for key in keys)
            floats = [state[name] for name in names if name in state and state[name].is_floating_point()]
            if len(found := {str(tensor.dtype) for tensor in floats}) > 1:
                raise StoreError(f"layer '{layer}' is half converted: its {kind} are {' and '.join(sorted(found))}")
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in state and isinstance(tensor, Tensor) and kind_of(tensor) == kind_of(state[name]):
            tensor.data = tensor.data.to(state[name].dtype)


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        raise StoreError(f"'{folder}' {'holds no ' + MANIFEST if folder.is_dir() else 'is no folder'}")
    check_length(path, LONGEST_MANIFEST)
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
        known = {field.name for field in fields(Manifest)}
        if not isinstance(data, dict) or set(data) != known:
            found = ", ".join(sorted(data)) if isinstance(data, dict) else f"a {type(data).__name__}"
            raise StoreError(f"its keys are {', '.join(sorted(known))}; found: {found}")
        return Manifest(**data)
    except (ValueError, TypeError) as error:
        raise StoreError(f"'{path}' is no manifest of a saved model: {error}") from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
