"""Weight files: what is read, what is refused, and that a network stays as it was when something is wrong."""

import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from obc_tools.models.networks import load_weights, read_weights


def network(outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, outputs))


def assert_equal(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("ending", [".pth", ".pt", ".safetensors"])
def test_a_saved_state_dict_is_read(tmp_path: Path, ending: str) -> None:
    state = network().state_dict()
    path = tmp_path / f"weights{ending}"
    (save_file if ending == ".safetensors" else torch.save)(state, path)
    found = read_weights(path)
    assert_equal(dict(sorted(found.items())), dict(sorted(state.items())))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {f"module.{key}": tensor for key, tensor in state.items()},
        lambda state: {"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}},
    ],
    ids=["state_dict", "model", "module.", "state_dict and module."],
)
def test_common_wrappers_are_taken_off(tmp_path: Path, wrap) -> None:
    state = network().state_dict()
    torch.save(wrap(state), tmp_path / "weights.pth")
    assert_equal(read_weights(tmp_path / "weights.pth"), state)


def test_a_missing_file_or_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"weights file '{tmp_path / 'no.pth'}' does not exist")):
        read_weights(tmp_path / "no.pth")
    with pytest.raises(ValueError, match=re.escape(f"weights file '{tmp_path}' is a folder")):
        read_weights(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.95, 0.999])
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_truncated_file_is_named(tmp_path: Path, ending: str, share: float) -> None:
    path = tmp_path / f"weights{ending}"
    (save_file if ending == ".safetensors" else torch.save)(network().state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=re.escape(f"'{path}' is truncated or not a")):
        read_weights(path)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.95, 0.999])
def test_a_truncated_file_of_the_old_format_is_named(tmp_path: Path, share: float) -> None:
    path = tmp_path / "weights.pth"
    torch.save(network().state_dict(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=re.escape(f"'{path}' is truncated or not a file of weights")):
        read_weights(path)


@pytest.mark.parametrize("content", [b"<html>404</html>", b"version https://git-lfs", b"hello", b"PK\x03\x04"])
def test_a_file_of_another_kind_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(ValueError, match="is truncated or not a file of weights saved by torch"):
        read_weights(tmp_path / "weights.pth")


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_payload_is_refused_and_not_executed(tmp_path: Path, zipped: bool) -> None:
    path, trace = tmp_path / "weights.pth", tmp_path / "executed"
    content = {"state_dict": network().state_dict(), "extra": Payload(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"weights.pth' holds Python objects, not only tensors, and was refused"):
        read_weights(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the payload is a dud, and the test above proves nothing"


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(network(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"Save the state dict alone: torch.save\(model.state_dict\(\), file\)"):
        read_weights(tmp_path / "model.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "it holds a list"),
        (torch.zeros(2), "it holds a Tensor"),
        ({}, "it holds nothing"),
        ({"epoch": 3}, "its entry 'epoch' is a int"),
        ({"a": torch.zeros(2), "b": [torch.zeros(2)]}, "its entry 'b' is a list"),
        ({0: torch.zeros(2)}, "its entry 0 is a Tensor"),
    ],
)
def test_what_is_not_a_state_dict_is_described(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=f"is not a state dict of names and tensors: {message}"):
        read_weights(tmp_path / "weights.pth")


def test_load_weights_casts_to_the_network(tmp_path: Path) -> None:
    model, source = network().double(), network()
    state = {
        key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in source.state_dict().items()
    }
    save_file(state, tmp_path / "weights.safetensors")
    load_weights(model, read_weights(tmp_path / "weights.safetensors"), origin="file")
    assert model[0].weight.dtype == torch.float64
    assert torch.equal(model[0].weight, source[0].weight.half().double())


def test_missing_counters_of_batches_are_forgiven() -> None:
    model = network()
    state = {key: tensor + 1 for key, tensor in model.state_dict().items() if "num_batches" not in key}
    load_weights(model, state, origin="file")
    assert torch.equal(model[1].running_var, state["1.running_var"])
    assert model[1].num_batches_tracked == 0


def _without(state: dict, *keys: str) -> dict:
    return {key: tensor for key, tensor in state.items() if key not in keys}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: _without(state, "0.weight", "0.bias"),
            "file: these are weights of another architecture: 2 missing (0.weight, 0.bias)",
        ),
        (
            lambda state: state | {f"extra{index}": torch.zeros(1) for index in range(5)},
            "another architecture: 5 unexpected (extra0, extra1, extra2, ...)",
        ),
        (
            lambda state: _without(state, "0.bias") | {"new": torch.zeros(1), "1.bias": torch.zeros(9)},
            "another architecture: 1 missing (0.bias); 1 unexpected (new); 1 of another shape (1.bias (9,) for (4,))",
        ),
        (
            lambda state: state | {"0.weight": torch.zeros(4, 1, 3, 3)},
            "another architecture: 1 of another shape (0.weight (4, 1, 3, 3) for (4, 2, 3, 3))",
        ),
        (
            lambda state: state | {"1.num_batches_tracked": torch.ones(1)},
            "another architecture: 1 of another shape (1.num_batches_tracked (1,) for ())",
        ),
        (
            lambda state: state | {"3.weight": torch.zeros(7, 4), "3.bias": torch.zeros(7)},
            "file: file has 7 classes, model asked for 3 (layer '3')",
        ),
        (
            lambda state: state | {"3.weight": torch.tensor([[0, float("nan"), 0, float("inf")]] * 3)},
            "file: '3.weight' holds NaN or infinity in 6 of 12 numbers",
        ),
    ],
    ids=["missing", "unexpected", "all three", "shape", "rank", "classes", "not finite"],
)
def test_weights_that_do_not_fit_are_described_and_nothing_changes(change, message: str) -> None:
    model = network()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = change({key: tensor + 1 for key, tensor in before.items()})
    with pytest.raises(ValueError, match=re.escape(message)):
        load_weights(model, state, origin="file")
    assert_equal(model.state_dict(), before)


def test_an_infinite_buffer_that_the_network_has_itself_is_loaded() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))
    load_weights(model, {key: tensor.clone() for key, tensor in model.state_dict().items()}, origin="file")
    with pytest.raises(ValueError, match="file: 'weight' holds NaN or infinity in 4 of 4 numbers"):
        load_weights(model, model.state_dict() | {"weight": torch.full((2, 2), float("inf"))}, origin="file")
