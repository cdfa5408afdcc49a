"""A training that is killed, stopped or moved to another process goes on to the same numbers."""

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from killed_training import RECIPE, batches, network, train
from torch.utils.data import DataLoader, TensorDataset
from trainings import TRAIN, VAL, numbers, same_state, wait_for
from trainings import network as dropout_network

from obc_tools.data.data import load_data
from obc_tools.files import FolderInUseError, held
from obc_tools.models.networks import load_model
from obc_tools.pruning.equivalent import EquivalentModel
from obc_tools.pruning.plan import PruningPlan
from obc_tools.structure.groups import find_groups
from obc_tools.training.fit import fit
from obc_tools.training.folder import (
    CHECKPOINT,
    CONFIG,
    ENVIRONMENT,
    LOG,
    METRICS,
    History,
    Stopped,
    TrainingFolder,
    TrainingFolderError,
    read_history,
)
from obc_tools.training.recipe import Recipe


def progress(folder: Path) -> tuple[int, int]:
    path = folder / "progress.json"
    found = json.loads(path.read_text()) if path.is_file() else {"epoch": 0, "step": 0}
    return found["epoch"], found["step"]


def test_killed_in_the_middle_of_an_epoch_and_resumed(tmp_path):
    """Kill -9 a process within its second epoch; this one goes on from what it left."""
    expected = train(tmp_path / "whole", stop=lambda: False)
    folder = tmp_path / "killed"
    child = subprocess.Popen([sys.executable, "-m", "tests.killed_training", str(folder)])
    wait_for(lambda: progress(folder) >= (2, 3))
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert len(read_history(folder)) == 1
    weights = train(folder, stop=lambda: False)
    assert all(torch.equal(value, weights[name]) for name, value in expected.items())
    assert numbers(read_history(folder)) == numbers(read_history(tmp_path / "whole"))
    assert "resuming at epoch 2, step" in (folder / LOG).read_text()


@pytest.mark.parametrize("stop_at", [1, 4, 6, 8])
@pytest.mark.parametrize("ema_every", [0, 2])
def test_stopped_and_resumed(stop_at, ema_every, tmp_path):
    """Before any step, first and last of an epoch too; dropout and a shuffling loader draw as if nothing was."""
    tensors = [torch.cat(parts) for parts in zip(*TRAIN, strict=True)]
    recipe = Recipe(epochs=3, batch_size=7, optimizer="adamw", ema_every=ema_every, ema_decay=0.8, warmup_epochs=1)

    def run(model, **options):
        loader = DataLoader(TensorDataset(*tensors), 7, shuffle=True)
        return fit(model, loader, VAL, recipe, progress=False, **options)

    whole, model, calls = dropout_network(0.5), dropout_network(0.5), []
    expected = run(whole)
    folder = tmp_path / "run"
    with pytest.raises(Stopped, match=r"stopped before step \d of epoch \d"):
        run(model, run=folder, stop=lambda: calls.append(None) or len(calls) == stop_at)
    fresh = dropout_network(0.5)
    history = run(fresh, run=folder, resume=True)
    assert numbers(history) == numbers(expected)
    assert same_state(fresh, whole)
    again = dropout_network(0.5)
    assert run(again, run=folder, resume=True) == history
    assert same_state(again, whole)


def test_equivalent_pruning_resumes(tmp_path):
    def equivalent():
        model = network()
        groups = find_groups(model, torch.zeros(1, 1, 8, 8))
        kept = tuple(tuple(range(0, g.width, 2)) if g.prunable else tuple(range(g.width)) for g in groups)
        return EquivalentModel(model, PruningPlan(tuple(groups), kept))

    whole, model, resumed = equivalent(), equivalent(), equivalent()
    data = batches()
    few = (data[0].first(4), data[1].first(1))
    recipe = replace(RECIPE, epochs=2)
    fit(whole, *few, recipe, progress=False)
    calls = []
    with pytest.raises(Stopped):
        fit(model, *few, recipe, run=tmp_path, stop=lambda: calls.append(0) or len(calls) > 5, progress=False)
    fit(resumed, *few, recipe, run=tmp_path, resume=True, progress=False)
    assert same_state(whole, resumed)
    assert same_state(whole.merge(), resumed.merge())


def test_a_folder_tells_what_happened(tmp_path):
    history = fit(dropout_network(), TRAIN, VAL, Recipe(epochs=2), run=tmp_path, progress=False)
    assert read_history(tmp_path) == history
    assert json.loads((tmp_path / CONFIG).read_text())["recipe"] == Recipe(epochs=2).to_dict()
    assert "torch" in json.loads((tmp_path / ENVIRONMENT).read_text())["libraries"]
    assert "epoch 2: training loss" in (tmp_path / LOG).read_text()
    events = list(tmp_path.rglob("events.out.tfevents.*"))
    assert events and b"val_accuracy" in b"".join(path.read_bytes() for path in events)
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert state["place"]["number"] == 2
    assert len((tmp_path / METRICS).read_text().splitlines()) == 2


def test_what_cannot_be_resumed(tmp_path):
    recipe = Recipe(epochs=1)
    with pytest.raises(ValueError, match="resume=True goes on from a checkpoint: pass run="):
        fit(dropout_network(), TRAIN, VAL, recipe, resume=True, progress=False)
    fit(dropout_network(), TRAIN, VAL, recipe, run=tmp_path, resume=True, progress=False)
    with pytest.raises(TrainingFolderError, match="holds a training: pass resume=True or choose another folder"):
        fit(dropout_network(), TRAIN, VAL, recipe, run=tmp_path, progress=False)
    with pytest.raises(TrainingFolderError, match=r"by another recipe: epochs was 1, is 2; lr was 0.01, is 0.5"):
        fit(dropout_network(), TRAIN, VAL, Recipe(epochs=2, lr=0.5), run=tmp_path, resume=True, progress=False)
    (tmp_path / CHECKPOINT).write_bytes(b"no checkpoint")
    with pytest.raises(TrainingFolderError, match="is no checkpoint that can be read"):
        fit(dropout_network(), TRAIN, VAL, recipe, run=tmp_path, resume=True, progress=False)
    torch.save({"format": 0}, tmp_path / CHECKPOINT)
    with pytest.raises(TrainingFolderError, match="is not of format 1"):
        fit(dropout_network(), TRAIN, VAL, recipe, run=tmp_path, resume=True, progress=False)
    assert read_history(tmp_path / "nowhere") is None


def test_a_half_written_line_is_left_out_and_its_file_named(tmp_path, caplog):
    history = fit(dropout_network(), TRAIN, VAL, Recipe(epochs=2), run=tmp_path, progress=False)
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"epoch": 3, "lr"')
    assert read_history(tmp_path) == read_history(tmp_path) == history
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == [f"'{tmp_path / METRICS}': line 3 is no whole epoch and is left out"]
    first, second, _ = (tmp_path / METRICS).read_text().splitlines()
    for other in (second.replace('"epoch": 2', '"epoch": 5'), first, "null"):
        (tmp_path / METRICS).write_text(f"{first}\n{other}\n")
        assert read_history(tmp_path) == History(history.epochs[:1])
    (tmp_path / METRICS).write_text('{"epoch": 1}\n')
    assert read_history(tmp_path) is None


def test_a_process_that_does_not_write_leaves_nothing(tmp_path):
    folder = TrainingFolder(tmp_path / "none", writes=False)
    assert folder.read(Recipe(epochs=1), resume=False) is None
    with folder.kept(Recipe(epochs=1), torch.device("cpu"), None):
        folder.save({})
    assert not (tmp_path / "none").exists()


def test_both_ways_of_fine_tuning_see_the_same_images():
    """The batches of one recipe, drawn for naive fine-tuning and for Equivalent Pruning, epoch by epoch."""
    data = load_data("digits")
    one, other = (data.batches("train", 64, seed=5, augment=RECIPE.augmentation) for _ in range(2))
    for epoch in range(2):
        pairs = zip(one.at(epoch), other.at(epoch), strict=True)
        assert all(torch.equal(a, b) and torch.equal(x, y) for (a, x), (b, y) in pairs)
    assert isinstance(load_model("resnet8", 10, in_channels=1, width=4), torch.nn.Module)


def test_flipped_bits_are_refused_or_harmless(tmp_path):
    """One bit of a checkpoint, anywhere: another number would be a wrong one that nobody sees."""

    def resumed():
        model = dropout_network(0.5)
        return numbers(fit(model, TRAIN, VAL, recipe, run=tmp_path / "run", resume=True, progress=False)), model

    recipe, calls, draw = Recipe(epochs=2, batch_size=7), [], random.Random(0)
    with pytest.raises(Stopped):
        stop = {"stop": lambda: calls.append(None) or len(calls) == len(TRAIN) + 2}
        fit(dropout_network(0.5), TRAIN, VAL, recipe, run=tmp_path / "run", progress=False, **stop)
    path = tmp_path / "run" / CHECKPOINT
    good = path.read_bytes()
    expected, whole = resumed()
    refused = 0
    for _ in range(100):
        flipped = bytearray(good)
        flipped[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            found, model = resumed()
        except TrainingFolderError as error:
            assert "is no checkpoint that can be read" in str(error)
            refused += 1
        else:
            assert found == expected and same_state(model, whole)
    assert refused > 50


def test_a_training_that_is_worked_on_is_left_alone(tmp_path):
    folder = tmp_path / "run"
    with held(folder), pytest.raises(FolderInUseError, match=f"worked on by process {os.getpid()} on"):
        fit(dropout_network(), TRAIN, VAL, Recipe(epochs=1), run=folder, progress=False)
    assert not folder.exists()
    fit(dropout_network(), TRAIN, VAL, Recipe(epochs=1), run=folder, progress=False)


def test_a_checkpoint_that_is_not_written_whole_does_not_replace_the_last(tmp_path, monkeypatch):
    folder = TrainingFolder(tmp_path)
    folder.save({"place": torch.arange(1000)})
    good = (tmp_path / CHECKPOINT).read_bytes()

    def torn(content, file):
        file.write(good[:500] + bytes([good[500] ^ 1]) + good[501:])

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(ValueError, match="was changed after it was written"):
        folder.save({"place": torch.arange(1000)})
    assert (tmp_path / CHECKPOINT).read_bytes() == good
