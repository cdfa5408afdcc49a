"""The README as it stands: its length, its links, its programs, and that every command in it is one."""

import re
import shlex
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import obc_tools as obc
from obc_tools.cli import main
from obc_tools.cli.commands import parse
from obc_tools.cli.options import check
from obc_tools.models import networks

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^obc .*$", README.replace("\\\n", " "), re.MULTILINE)


def program(words):
    """Return the one program that holds some words."""
    (found,) = (text for text in PROGRAMS if words in text)
    return found


class MyNetwork(nn.Sequential):
    """Somebody's own network."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 10)
        )


def loader(examples):
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(examples, 1, 8, 8, generator=generator), torch.arange(examples) % 10
    return DataLoader(TensorDataset(images, labels), batch_size=32)


def test_it_is_short_and_leads_to_what_is_there():
    assert len(README.splitlines()) < 150
    links = re.findall(r"\]\(([^)#]+)\)|srcset=\"([^\"]+)\"|src=\"([^\"]+)\"", README)
    paths = [next(filter(None, found)) for found in links]
    assert len(paths) > 20 and not [path for path in paths if not (ROOT / path).exists()]
    assert README.index("<picture>") < README.index("make demo") < README.index("## Ten lines")
    targets = set(re.findall(r"\bmake ([a-z-]+)", README)) - {"it"}
    assert targets >= {"demo", "test", "lab"}
    assert not [name for name in targets if f"\n{name}:" not in (ROOT / "Makefile").read_text(encoding="utf-8")]


def test_the_program_for_a_network_of_ones_own_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    given = {"obc": obc, "torch": torch, "MyNetwork": MyNetwork, "model": MyNetwork()}
    given |= {"train": loader(256), "val": loader(64)}
    exec(program("MyNetwork()"), given)
    with torch.no_grad():
        assert torch.equal(given["again"](given["images"]), given["merged"].eval()(given["images"]))
    original, pruned = (obc.cost(given[name], given["images"]).macs for name in ("model", "again"))
    assert original / pruned >= 2 and (tmp_path / "runs" / "mine.onnx").is_file()


@pytest.mark.slow
def test_the_ten_lines_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = program("resnet20")
    with torch.random.fork_rng(devices=[]):
        exec(lines, given := {})
    accuracies = re.findall(r"accuracy (\d+\.\d+)%", capsys.readouterr().out)
    assert len(accuracies) == 2 and min(map(float, accuracies)) > 90
    assert obc.load_pruned("runs/quickstart") is not None and given["plan"].channels_removed


@pytest.mark.slow
def test_the_program_for_another_task_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    classes = len(obc.load_data("digit_scenes").classes)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, classes, 3, padding=1))
    exec(program("digit_scenes"), given := {"obc": obc, "model": model})
    assert given["plan"].channels_removed


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one(command, tmp_path, monkeypatch):
    """Its options exist and nothing is wrong with them, where the files that it names are there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("obc_tools.cli.options.GPUS", ("null",))
    (tmp_path / "val").mkdir()
    files = ("resnet56.pth", "data/cifar10", "data/cifar100", "runs/a/job.json", "runs/resnet56/merged/manifest.json")
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    command = command.replace("/data/imagenet", ".").replace("--out runs/resnet56", "--out runs/new")
    check(parse(shlex.split(command, comments=True)[1:]))


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with the README's files: images of 8 x 8 pixels, and a "resnet56" of eight narrow layers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("obc_tools.data.images.SIDE", 8)
    stage = networks._stage
    monkeypatch.setattr(networks, "_stage", lambda entering, width, blocks, stride: stage(entering, width, 1, stride))
    monkeypatch.setattr(networks, "CifarResNet", partial(networks.CifarResNet, width=8))
    torch.save(obc.load_model("resnet56", 10).state_dict(), "resnet56.pth")
    draw, arrays = np.random.default_rng(0), {"classes": np.array(list("abcdefghij"))}
    for split, images in (("train", 50 * 128), ("test", 40)):  # as many as --batches 50 takes
        arrays[f"{split}_images"] = draw.integers(0, 256, (images, 8, 8, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(images) % 10
    Path("data/cifar10").mkdir(parents=True)
    np.savez("data/cifar10/cifar10.npz", **arrays)


@pytest.mark.slow
def test_its_commands_do_what_they_say(small, capsys):
    """Those for one process on a machine of any kind, one after another; the others have small runs of their own."""
    seen = {}
    for command in COMMANDS:
        name, *words = shlex.split(command, comments=True)[1:]
        if name in ("prune", "compare", "sweep", "runs", "evaluate"):
            main([name, *words])
            seen[name] = capsys.readouterr().out
    assert Path("runs/resnet56/report.html").is_file() and Path("runs/criteria/curves.html").is_file()
    assert all(criterion in seen["compare"] for criterion in ("jacobian", "taylor", "l1"))
    reached = re.findall(r"speedup=([\d.]+) .* ([\d.]+) +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+$", seen["sweep"], re.MULTILINE)
    assert len(reached) == 3 and all(float(asked) <= float(got) for asked, got in reached)
    assert "finished" in seen["runs"] and "Equivalent Pruning, merged" in seen["runs"]
    assert "kMACs" in seen["evaluate"]
