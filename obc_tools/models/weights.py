"""Weight files: read without running anything from them, and checked against a network before any of it changes.

A state dict is a mapping from names to tensors. A file that holds more than that (pickled Python objects) is refused
unread, and one that does not fit its network is described (names, shapes, classes) instead of being loaded in part.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


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
    return _unwrap(_read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path), path)


def load_weights(model: nn.Module, state: Mapping[str, Tensor], *, origin: str) -> None:
    """Fill a network from a state dict, all of it or nothing; the numbers are cast to the network's types.

    Counters ``num_batches_tracked`` may be missing, as in files from before they existed.

    Args:
        model: Changed in place, once every check has passed.
        state: Every entry of the network with its shape, and no other.
        origin: Where the state dict is from; error messages begin with it.

    Raises:
        ValueError: For missing, unexpected or differently shaped entries, another number of classes, another kind of
            numbers, negative variances, NaN or infinity.
    """
    own = model.state_dict()
    _check_fit(own, state, origin)
    for key, tensor in state.items():
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


def other_classes(model: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """Return the number of classes of a state dict that differs from a network in that alone, else None."""
    rows = _output_rows(model.state_dict(), state)
    return rows and rows[1]


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path, device="cpu")
    except SafetensorError as error:
        raise ValueError(f"'{path}' is truncated or not a safetensors file: {error}") from error


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
