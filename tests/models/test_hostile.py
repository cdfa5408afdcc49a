"""Folders of saved models whose files were made up, digests and all: refused, without downloads and without memory."""

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from obc_tools import PruningPlan, find_groups, load_model, load_pruned, make_plan, prune, save_pruned, score_groups
from obc_tools.models import store
from obc_tools.models.networks import load_weights

SOURCE = {"name": "resnet8", "num_classes": 3, "width": 4}


@pytest.fixture
def saved(tmp_path):
    model = load_model(**SOURCE)
    plan = make_plan(score_groups(model, find_groups(model, torch.zeros(1, 3, 8, 8)), "l1"), ratio=0.3)
    save_pruned(tmp_path / "saved", prune(model, plan), plan, source=SOURCE)
    return tmp_path / "saved"


def forge(folder, *, plan=None, tensors=None, **manifest):
    """Change what a folder holds, and give it the digests that belong to it."""
    if plan is not None:
        (folder / "plan.json").write_text(plan)
    if tensors is not None:
        save_file(load_file(folder / "model.safetensors") | tensors, folder / "model.safetensors")
    names = ("model.safetensors", "plan.json")
    sha256 = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    held = json.loads((folder / "manifest.json").read_text()) | {"sha256": sha256} | manifest
    (folder / "manifest.json").write_text(json.dumps(held))


def planned(folder, change):
    data = json.loads((folder / "plan.json").read_text())
    change(data["groups"])
    return json.dumps(data)


def attribute(groups, axis):
    """Let the first group that loses channels have another attribute."""
    group = next(group for group in groups if len(group["kept"]) < group["width"])
    group["attributes"] = [{"layer": group["root"][0], "axis": axis, "type": "", "width": group["width"]}]


PLANS = {
    "a wide axis": (lambda g: g[0]["members"][0].update(width=10**12), "channels of axes; from 1 to"),
    "a wide group": (lambda g: g[0].update(width=10**12), "channels of axes; from 1 to"),
    "many axes": (lambda g: g[0].update(members=[{"width": 2**25}] * 3), "channels of axes"),
    "no width": (lambda g: g[0]["members"][0].update(width=0), "from 1 to"),
    "less than none": (lambda g: g[0].update(width=-(10**12)), "from 1 to"),
    "no blocks": (lambda g: g[0].update(blocks=0), "0 blocks of"),
    "uneven blocks": (lambda g: g[0].update(blocks=3), "3 blocks of"),
    "positions outside": (lambda g: g[0]["members"][0].update(positions=[99], channels=[0]), "outside its width"),
    "half a number": (lambda g: g[0].update(width=4.5), "expected an integer"),
    "a method": (lambda g: attribute(g, ".forward"), "'.forward' is no number that a"),
    "a type": (lambda g: attribute(g, ".__class__"), "'.__class__' is no number that a"),
    "a flag": (lambda g: attribute(g, ".training"), "'.training' is no number that a"),
    "nothing": (lambda g: attribute(g, ".nosuch"), "'.nosuch' is no number that a"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), PLANS.values(), ids=PLANS)
def test_made_up_plans(saved, change, message):
    forge(saved, plan=planned(saved, change))
    with pytest.raises(ValueError, match=message):
        load_pruned(saved)


@pytest.mark.parametrize("text", ["[" * 10**6, '{"format":' * 10**5, "{", "null", "9" * 10**6])
def test_text_that_is_no_plan(saved, text):
    forge(saved, plan=text)
    with pytest.raises(ValueError, match="not a pruning plan"):
        load_pruned(saved)
    (saved / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="is no manifest of a saved model"):
        load_pruned(saved)


def test_long_files_are_not_read(saved, monkeypatch):
    for name, file in (("LONGEST_JSON", "plan"), ("LONGEST_MANIFEST", "manifest")):
        monkeypatch.setattr(store, name, 10)
        with pytest.raises(ValueError, match=rf"{file}.json' has [\d,]+ bytes; at most 10 are read"):
            load_pruned(saved)


def test_lists_within_lists_are_not_followed_for_ever(saved):
    forge(saved, source=SOURCE | {"width": json.loads("[" * 600 + "]" * 600)})
    with pytest.raises(ValueError, match="is no manifest of a saved model: JSON that is nested too deeply"):
        load_pruned(saved)


SIZES = ({"num_classes": 10**8}, {"width": 10**4}, {"name": "torchvision:vgg11", "num_classes": 10**8})


@pytest.mark.parametrize("source", SIZES)
def test_sizes_are_bounded_before_memory_is_asked_for(saved, source, monkeypatch):
    held = SOURCE | source
    held = {key: held[key] for key in ("name", "num_classes")} if ":" in held["name"] else held
    monkeypatch.setattr(store, "psutil", SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=10**9)))
    forge(saved, source=held)
    with pytest.raises(ValueError, match=r"would take [\d,]+ bytes; [\d,]+ are free"):
        load_pruned(saved)


def test_numbers_of_layers_are_bounded(saved, monkeypatch):
    forge(saved, source=SOURCE | {"width": 10**12})
    with pytest.raises(ValueError, match=r"'width' is 10+; only .* numbers up to 100,000,000 are data"):
        load_pruned(saved)
    monkeypatch.setattr(store, "MOST_TENSORS", 200)
    forge(saved, source=SOURCE | {"name": "resnet60000002"})
    with pytest.raises(ValueError, match="would take more than 200 tensors"):
        load_pruned(saved)


def test_tensors_of_another_kind(saved):
    tensors = load_file(saved / "model.safetensors")
    bias, variance = tensors["fc.bias"], tensors["bn1.running_var"]
    forge(saved, tensors={"bn1.running_var": variance.half()})
    with pytest.raises(ValueError, match="layer 'bn1' is half converted: its statistics are torch.float16 and torch.f"):
        load_pruned(saved)
    forge(saved, tensors={"bn1.running_var": variance})
    for tensor, message in (
        (bias.to(torch.complex64), "'fc.bias' holds torch.complex64, the network's is"),
        (bias.to(torch.int64), "'fc.bias' holds torch.int64, the network's is"),
        (bias.to(torch.float8_e4m3fn), "half converted"),
        (bias.half(), r"layer 'fc' is half converted: its parameters are torch.float16 and torch.float32"),
    ):
        forge(saved, tensors={"fc.bias": tensor})
        with pytest.raises(ValueError, match=message):
            load_pruned(saved)


def test_tensors_that_no_network_runs_with(saved):
    narrow = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in load_file(saved / "model.safetensors").items()}
    forge(saved, tensors={key: tensor for key, tensor in narrow.items() if "num_batches" not in key})
    with pytest.raises(ValueError, match=r"'.*' is no plain tensor of usual numbers \(torch.float8_e4m3fn"):
        load_pruned(saved)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("kind", ["to_sparse", "to_sparse_csr", "to_mkldnn", "meta"])
def test_packed_tensors_are_no_weights(kind):
    model = load_model(**SOURCE)
    state = model.state_dict()
    weight = state["fc.weight"]
    packed = weight.to("meta") if kind == "meta" else getattr(weight, kind)()
    with pytest.raises(ValueError, match=r"here: 'fc.weight' is no plain tensor of usual numbers"):
        load_weights(model, state | {"fc.weight": packed}, origin="here")


def test_negative_variances(saved):
    variance = load_file(saved / "model.safetensors")["bn1.running_var"]
    forge(saved, tensors={"bn1.running_var": -variance})
    with pytest.raises(ValueError, match=r"'bn1.running_var' holds a negative variance"):
        load_pruned(saved)


def test_detectors_are_built_empty(tmp_path, monkeypatch):
    def fetch(*arguments, **options):
        raise AssertionError("a backbone was fetched")

    for place in ("torch.hub.load_state_dict_from_url", "torchvision.models._api.load_state_dict_from_url"):
        monkeypatch.setattr(place, fetch)
    source = {"name": "torchvision:ssdlite320_mobilenet_v3_large", "num_classes": 3}
    model = load_model(**source)
    assert isinstance(model, nn.Module)
    save_pruned(tmp_path / "saved", model, PruningPlan((), ()), source=source)
    loaded = load_pruned(tmp_path / "saved")
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
