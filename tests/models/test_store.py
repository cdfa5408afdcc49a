import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from obc_tools.models import store
from obc_tools.models.networks import load_model
from obc_tools.models.store import load_pruned, save_pruned
from obc_tools.pruning.equivalent import EquivalentModel
from obc_tools.pruning.plan import PlanMismatchError, PruningPlan, prune
from obc_tools.structure.groups import find_groups

SOURCE = {"name": "resnet8", "num_classes": 5, "width": 4}
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
FILES = ["manifest.json", "model.safetensors", "plan.json"]


def half(model: nn.Module) -> PruningPlan:
    """Keep the odd channels of every prunable group."""
    groups = find_groups(model, IMAGES[:1])
    kept = (tuple(range(1 if group.prunable else 0, group.width, 2 if group.prunable else 1)) for group in groups)
    return PruningPlan(tuple(groups), tuple(kept))


def moved(model: nn.Module) -> nn.Module:
    """Give a model running statistics and weights of its own, as training does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.train()(torch.randn(8, 3, 16, 16, dtype=next(model.parameters()).dtype))
    return model.eval()


@pytest.fixture(scope="module")
def plan() -> PruningPlan:
    return half(load_model(**SOURCE))


@pytest.fixture
def model(plan) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return moved(prune(load_model(**SOURCE), plan))


class Tied(nn.Module):
    """A network of the user's own: one weight under two names, and a buffer."""

    def __init__(self, outputs: int = 3):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, bias=False)
        self.second = nn.Conv2d(3, 8, 3, bias=False)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, outputs)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)) + self.scale * self.norm(self.second(x))
        return self.fc(x.mean((2, 3)))


def test_reloads_the_same_logits(tmp_path, model, plan):
    save_pruned(tmp_path / "a" / "saved", model, plan, source=SOURCE)
    assert sorted(path.name for path in (tmp_path / "a" / "saved").iterdir()) == FILES
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["saved"]
    reloaded = load_pruned(tmp_path / "a" / "saved")
    assert torch.equal(reloaded(IMAGES), model(IMAGES))
    assert not reloaded.training
    assert list(reloaded.state_dict()) == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(reloaded.buffers(), model.buffers(), strict=True))
    assert reloaded.layer1[0].conv1.weight.shape == (2, 2, 3, 3)
    assert load_model(**SOURCE).layer1[0].conv1.weight.shape == (4, 4, 3, 3)


def test_reloads_the_same_logits_in_a_new_process_without_pickle(tmp_path, model, plan):
    save_pruned(tmp_path / "saved", model, plan, source=SOURCE)
    save_file({"images": IMAGES}, tmp_path / "images.safetensors")
    program = f"""
import pickle, sys
from safetensors.torch import load_file, save_file
from obc_tools.models.store import load_pruned
def refuse(*args, **kwargs): raise AssertionError("a pickle was read")
pickle.load = pickle.loads = pickle.Unpickler = refuse
folder = {str(tmp_path)!r}
logits = load_pruned(folder + "/saved")(load_file(folder + "/images.safetensors")["images"])
save_file({{"logits": logits.detach()}}, folder + "/logits.safetensors")
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(store.__file__).parents[1])
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], model(IMAGES))


def test_reads_num_classes_from_the_output_layer(tmp_path, model, plan):
    save_pruned(tmp_path / "saved", model, plan, source={"name": "resnet8", "width": 4, "weights": "x.pth"})
    manifest = json.loads((tmp_path / "saved" / "manifest.json").read_text())
    assert manifest["source"] == SOURCE
    assert manifest["libraries"]["torch"] == version("torch")
    assert torch.equal(load_pruned(tmp_path / "saved")(IMAGES), model(IMAGES))


def test_a_name_is_source_enough(tmp_path):
    full = load_model("vgg11", num_classes=3)
    plan = half(full)
    model = prune(full, plan).eval()
    save_pruned(tmp_path / "saved", model, plan, source="vgg11")
    assert torch.equal(load_pruned(tmp_path / "saved")(IMAGES), model(IMAGES))


def test_merged_models_are_saved_and_equivalent_ones_refused(tmp_path, plan):
    equivalent = moved(EquivalentModel(load_model(**SOURCE), plan))
    with pytest.raises(ValueError, match="an EquivalentModel is saved after merging"):
        save_pruned(tmp_path / "saved", equivalent, plan, source=SOURCE)
    save_pruned(tmp_path / "saved", equivalent.merge(), plan, source=SOURCE)
    assert torch.equal(load_pruned(tmp_path / "saved")(IMAGES), equivalent.merge()(IMAGES))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_keeps_the_precision(tmp_path, model, plan, dtype):
    model.to(dtype)
    save_pruned(tmp_path / "saved", model, plan, source=SOURCE)
    reloaded = load_pruned(tmp_path / "saved")
    assert torch.equal(reloaded(IMAGES.to(dtype)), model(IMAGES.to(dtype)))
    assert reloaded.bn1.num_batches_tracked.dtype == torch.int64


def test_own_networks_with_tied_weights(tmp_path):
    plan = half(Tied())
    model = moved(prune(Tied(), plan))
    assert model.first.weight.shape == (4, 3, 3, 3)
    save_pruned(tmp_path / "saved", model, plan)
    assert "second.weight" not in load_file(tmp_path / "saved" / "model.safetensors")
    fresh = Tied()
    before = fresh.first.weight.clone()
    reloaded = load_pruned(tmp_path / "saved", model=fresh)
    assert torch.equal(reloaded(IMAGES), model(IMAGES))
    assert reloaded.first.weight is reloaded.second.weight
    assert torch.equal(fresh.first.weight, before)
    with pytest.raises(ValueError, match=r"was saved without a source: pass model=, a fresh unpruned instance"):
        load_pruned(tmp_path / "saved")
    with pytest.raises(ValueError, match="file has 3 classes, model asked for 4"):
        load_pruned(tmp_path / "saved", model=Tied(4))


def test_random_state_and_model_stay(tmp_path, model, plan):
    state, weights = torch.get_rng_state(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_pruned(tmp_path / "saved", model, plan, source=SOURCE)
    load_pruned(tmp_path / "saved")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["layer2.0.conv1.weight", "bn1.running_var"])
def test_refuses_what_is_not_finite(tmp_path, model, plan, name, value):
    model.state_dict()[name].view(-1)[1] = value
    with pytest.raises(ValueError, match=f"'{name}' holds NaN or infinity"):
        save_pruned(tmp_path / "saved", model, plan, source=SOURCE)
    assert list(tmp_path.iterdir()) == []


def test_a_buffer_may_hold_an_infinite_limit(tmp_path, model, plan):
    model.register_buffer("highest", torch.tensor(torch.inf))
    save_pruned(tmp_path / "saved", model, plan)
    fresh = load_model(**SOURCE)
    fresh.register_buffer("highest", torch.tensor(torch.inf))
    assert load_pruned(tmp_path / "saved", model=fresh).highest == torch.inf


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"width": 4}, "no mapping of load_model's arguments with a 'name'"),
        (3, "source is no name and no mapping of load_model's arguments: 3"),
        ({"name": "resnet8", "num_classes": "5"}, "num_classes is '5'; it is a whole number"),
        ({"name": "resnet8", "num_classes": 0}, "num_classes is 0; it is a whole number"),
        ({"name": "resnet8", "num_classes": 5, "width": nn.Conv2d}, "'width' is <class .*; only text, booleans"),
        ({"name": "resnet8", "num_classes": 5, "width": float("nan")}, "'width' is nan; only text, booleans"),
        ({"name": "timm:resnet18", "pretrained": True}, "source: pretrained would load weights"),
        ({"name": "timm:resnet18", "checkpoint_path": "a.pth"}, "source: checkpoint_path would load weights"),
        ({"name": "resnet9", "width": 4}, "unknown network 'resnet9'"),
        ({"name": "resnet8", "depth": 3}, "load_model cannot take it: .*depth"),
        ({"name": "resnet8", "width": 8}, "the plan's axis .* is 4 wide, here 8"),
        ({"name": "resnet8", "num_classes": 6, "width": 4}, "file has 5 classes, model asked for 6"),
        ({"name": "resnet14", "num_classes": 5, "width": 4}, "weights of another architecture: .* missing"),
    ],
)
def test_refuses_a_source_that_does_not_lead_to_the_model(tmp_path, model, plan, source, message):
    with pytest.raises(ValueError, match=message):
        save_pruned(tmp_path / "saved", model, plan, source=source)
    assert list(tmp_path.iterdir()) == []


def test_refuses_a_model_that_is_not_what_the_plan_leaves(tmp_path, plan):
    with pytest.raises(PlanMismatchError, match=r"axis .* of this model is 4 wide; the plan leaves 2 channels"):
        save_pruned(tmp_path / "saved", load_model(**SOURCE), plan)
    with pytest.raises(PlanMismatchError, match=r"the plan's axis .* is not in this model"):
        save_pruned(tmp_path / "saved", Tied(), plan)
    assert list(tmp_path.iterdir()) == []


class WithExtraState(Tied):
    def get_extra_state(self):
        return {"anything": 1}


def test_refuses_state_that_is_no_tensor(tmp_path):
    with pytest.raises(ValueError, match="'_extra_state' of the model's state is a dict; only tensors are saved"):
        save_pruned(tmp_path / "saved", WithExtraState(), PruningPlan((), ()))


def test_an_existing_folder_is_safe(tmp_path, model, plan):
    folder = tmp_path / "saved"
    folder.mkdir()
    save_pruned(folder, model, plan, source=SOURCE)
    with pytest.raises(
        ValueError, match=r"already holds manifest.json, model.safetensors, plan.json: .*overwrite=True"
    ):
        save_pruned(folder, model, plan, source=SOURCE)
    old = model(IMAGES)
    model.fc.bias.data += 1
    save_pruned(folder, model, plan, source=SOURCE, overwrite=True)
    assert torch.equal(load_pruned(folder)(IMAGES), model(IMAGES))
    assert not torch.equal(model(IMAGES), old)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds more than a saved model \(notes.txt\)"):
        save_pruned(folder, model, plan, source=SOURCE, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    with pytest.raises(ValueError, match=r"notes.txt' is a file, not a folder"):
        save_pruned(folder / "notes.txt", model, plan, source=SOURCE, overwrite=True)


@pytest.mark.parametrize("failing", ["save_file", "Path.replace"])
def test_a_failed_overwrite_leaves_the_old_model(tmp_path, model, plan, monkeypatch, failing):
    folder = tmp_path / "saved"
    save_pruned(folder, model, plan, source=SOURCE)
    old = model(IMAGES)
    model.fc.bias.data += 1
    replace = Path.replace

    def fail(*args):
        # The old folder steps aside before the new one moves in.
        if failing == "save_file" or args[0].suffix == ".new":
            raise OSError("no space left")
        return replace(*args)

    monkeypatch.setattr(*((store, "save_file") if failing == "save_file" else (Path, "replace")), fail)
    with pytest.raises(OSError, match="no space left"):
        save_pruned(folder, model, plan, source=SOURCE, overwrite=True)
    monkeypatch.undo()
    assert torch.equal(load_pruned(folder)(IMAGES), old)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def edit(folder: Path, **values) -> None:
    manifest = json.loads((folder / "manifest.json").read_text()) | values
    (folder / "manifest.json").write_text(
        json.dumps({key: value for key, value in manifest.items() if value != "gone"})
    )


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: truncate(f / "model.safetensors"), "model.safetensors' is truncated or was changed: its SHA-256"),
        (lambda f: flip(f / "model.safetensors"), "model.safetensors' is truncated or was changed"),
        (lambda f: flip(f / "plan.json"), "plan.json' is truncated or was changed"),
        (lambda f: (f / "plan.json").unlink(), "holds no plan.json: it is no complete saved model"),
        (lambda f: (f / "manifest.json").unlink(), "holds no manifest.json"),
        (lambda f: truncate(f / "manifest.json"), "manifest.json' is no manifest of a saved model"),
        (lambda f: (f / "manifest.json").write_text("[]"), "its keys are .*; found: a list"),
        (lambda f: (f / "manifest.json").write_bytes(b"\xff"), "is no manifest of a saved model: .*decode"),
        (lambda f: edit(f, code="os.system('x')"), "its keys are format, .* tied; found: code, format"),
        (lambda f: edit(f, tied="gone"), "its keys are .*; found: format, libraries, sha256, source"),
        (lambda f: edit(f, format=2), "format 2; this version reads format 1"),
        (lambda f: edit(f, format="1"), "format '1'; this version reads"),
        (lambda f: edit(f, source=["resnet8"]), "source is no mapping of load_model's arguments"),
        (lambda f: edit(f, source=SOURCE | {"weights": "x.pth"}), "source: weights would load weights"),
        (lambda f: edit(f, source=SOURCE | {"norm": {"a": 1}}), "source: 'norm' is {'a': 1}; only text"),
        (lambda f: edit(f, source=SOURCE | {"name": "os.system"}), "unknown network 'os.system'"),
        (lambda f: edit(f, sha256={}), "sha256 has digests of ; needed are model.safetensors and plan.json"),
        (lambda f: edit(f, sha256=3), "sha256 is no mapping of text to text: 3"),
        (lambda f: edit(f, libraries={"torch": 2}), "libraries is no mapping of text to text"),
        (
            lambda f: edit(f, tied={"bn1.bias": "bn9.bias"}),
            "ties a tensor to 'bn9.bias', which model.safetensors does not",
        ),
    ],
)
def test_refuses_a_damaged_folder(tmp_path, model, plan, damage, message):
    folder = tmp_path / "saved"
    save_pruned(folder, model, plan, source=SOURCE)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load_pruned(folder)


def test_refuses_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="nowhere' is no folder"):
        load_pruned(tmp_path / "nowhere")
