"""The command line: help, the demo at a tiny size, and one clear line for everything a user may get wrong."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from terminal import assert_one_line, run

from obc_tools.cli import commands as cli
from obc_tools.data.data import DATA_SETS
from obc_tools.models.networks import load_model
from obc_tools.pruning.choices import SCOPES
from obc_tools.scoring.criteria import CRITERIA
from obc_tools.scoring.scores import NORMALIZERS, REDUCTIONS
from obc_tools.training.recipe import Recipe


def tiny_demo(seed=0):
    """The demo's own job, with less of everything."""
    pretrain = Recipe(epochs=1, lr=0.1, batch_size=128, augment=False, seed=seed)
    return replace(
        cli.Demo(seed=seed).job(),
        model="resnet8",
        model_options={"width": 4},
        steps=2,
        batches=2,
        pretrain=pretrain,
        finetune=replace(pretrain, lr=0.02),
    )


@pytest.fixture
def tiny(monkeypatch):
    """Let `obc demo` do the tiny job."""
    job = tiny_demo()
    monkeypatch.setattr(cli.Demo, "job", lambda self: replace(job, seed=self.seed))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Files of weights for a ResNet-8 on digits, good and bad."""
    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = load_model("resnet8", 10, in_channels=1).state_dict()
    save_file(state, folder / "good.safetensors")
    whole = (folder / "good.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    save_file(load_model("resnet14", 10, in_channels=1).state_dict(), folder / "resnet14.safetensors")
    save_file(load_model("resnet8", 7, in_channels=1).state_dict(), folder / "seven.safetensors")
    save_file(state | {"bn1.weight": torch.full((16,), torch.nan)}, folder / "nan.safetensors")
    torch.save(state | {"payload": Payload()}, folder / "pickle.pth")
    return folder


class Payload:
    """A pickle that ends the process when loaded carelessly."""

    def __reduce__(self):
        return sys.exit, (99,)


def test_help_names_the_commands_and_never_imports_torch():
    script = (
        "import sys; from obc_tools.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print('heavy:', sorted({'torch', 'timm', 'sklearn', 'plotly'} & set(sys.modules)))"
    )
    text = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert re.search(r"• demo +The whole job", text) and re.search(r"• prune +The same on your own", text)
    assert re.search(r"• compare +Criteria beside each other", text)
    assert "heavy: []" in text


def test_the_package_runs_as_the_command_without_being_on_the_path():
    command = [sys.executable, "-m", "obc_tools", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": ""}).stdout
    assert text.startswith("usage: obc ") and "compare" in text


@pytest.mark.parametrize("full", [False, True])
def test_what_cannot_be_printed(full):
    """`obc --help | head -1` ends in silence, a full disk in a sentence."""
    reads, writes = os.pipe()
    os.close(reads)
    if full:
        os.close(writes)
        writes = os.open("/dev/full", os.O_WRONLY)
    command = [sys.executable, "-m", "obc_tools", "prune", "--help"]
    ended = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True)
    os.close(writes)
    said = "obc: error: nothing can be printed (No space left on device)\n" if full else ""
    assert (ended.returncode, ended.stderr) == (2, said)


@pytest.mark.parametrize("command", ["prune", "compare", "sweep"])
def test_help_lists_what_is_known(command, capsys):
    assert run(command, "--help") == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    known = [*CRITERIA, *SCOPES, *REDUCTIONS, *filter(None, NORMALIZERS), *DATA_SETS]
    assert [name for name in known if not re.search(rf"\b{name}\b", text)] == []
    assert f"obc {command} --model resnet56" in text


def test_demo_writes_a_run_and_a_report_and_replaces_its_own(tiny, tmp_path, capsys):
    out = tmp_path / "runs" / "demo"
    assert run("demo", "--out", out) == 0
    printed = capsys.readouterr()
    assert "Equivalent Pruning, merged" in printed.out and f"report: {out / 'report.html'}" in printed.out
    assert "training resnet8 from scratch on digits" in printed.err and "step/s" in printed.err
    first = json.loads((out / "results.json").read_text())
    assert list(first["models"]) == ["original", "pruned", "naive", "merged"]
    assert_offline((out / "report.html").read_text(encoding="utf-8"))

    assert run("demo", "--out", out, "--seed", 1) == 0
    second = json.loads((out / "results.json").read_text())
    assert (first["job"]["seed"], second["job"]["seed"]) == (0, 1)


def assert_offline(page):
    """Assert that a page loads nothing and has the table and all figures."""
    assert "default-src 'none'" in page
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=", page)
    for heading in ("Results", "Kept channels", "JᵀJ of the filters of conv1", "Fine-tuning", "How this was measured"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("data-figure=") == 4


def test_demo_leaves_other_runs_alone(tiny, tmp_path, capsys):
    (tmp_path / "results.json").write_text('{"format": 1, "job": {"title": "mine"}}')
    assert run("demo", "--out", tmp_path) == 2
    assert "already holds a run: choose another folder, or overwrite it (--overwrite)" in capsys.readouterr().err
    assert json.loads((tmp_path / "results.json").read_text())["job"]["title"] == "mine"


def test_ctrl_c_ends_cleanly(tiny, tmp_path, monkeypatch, capsys):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("obc_tools.runs.pipeline.fit", interrupt)
        assert run("demo", "--out", tmp_path / "demo") == 130
    assert capsys.readouterr().err.endswith("obc: stopped; the same command goes on from the last finished step\n")
    assert not (tmp_path / "demo").exists()
    assert run("demo", "--out", tmp_path / "demo") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_prune_without_epochs_only_prunes(weights, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--model", "resnet8", "--weights", weights / "good.safetensors", "--data", "digits", "--out", out]
    arguments += ["--macs", "1e6", "--batches", 1, "--steps", 2, "--criterion", "l2", "--scope", "local"]
    arguments += ["--group-reduction", "mean", "--round-to", 4, "--ignore", "conv1", "--device", "cpu"]
    arguments += ["--only", "mlp", "--whole-heads", "--max-ratio", 0.9, "--counting", "torch_pruning"]
    arguments += ["--compensate"]
    assert run("prune", *arguments) == 0
    results = json.loads((out / "results.json").read_text())
    assert list(results["models"]) == ["original", "pruned", "compensated"]
    assert results["models"]["compensated"]["cost"]["macs"] == results["models"]["pruned"]["cost"]["macs"] <= 1e6
    report = (out / "report.html").read_text(encoding="utf-8")
    assert "pruned, no fine-tuning" in report and "pruned and compensated, no fine-tuning" in report
    assert results["equivalence"] is None and results["histories"] == {}
    assert (results["job"]["only"], results["job"]["whole_heads"]) == ("mlp", True)
    assert (results["job"]["max_ratio"], results["job"]["target"]["counting"]) == (0.9, "torch_pruning")
    capsys.readouterr()
    before = snapshot(out)
    assert run("prune", *arguments) == 2
    assert_one_line(capsys.readouterr().err, "already holds a run")
    assert snapshot(out) == before


def snapshot(folder):
    """The names, contents and times of a folder's files."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


BAD = {
    "missing weights": ({"weights": "nosuch.pth"}, "there is no such file"),
    "truncated weights": ({"weights": "truncated.safetensors"}, "truncated"),
    "weights of another architecture": (
        {"weights": "resnet14.safetensors"},
        "another architecture: 36 unexpected (layer1.1.",
    ),
    "weights with a pickle payload": ({"weights": "pickle.pth"}, "was refused; nothing in it was executed"),
    "NaN in weights": ({"weights": "nan.safetensors"}, "'bn1.weight' holds NaN"),
    "other class count": ({"weights": "seven.safetensors"}, "model has 7 outputs, data has 10 classes"),
    "class count asked for": ({"num-classes": 12}, "file has 10 classes, model asked for 12"),
    "unknown model": ({"model": "resnet57"}, "unknown network 'resnet57'; closest: resnet56"),
    "unknown data": ({"data": "cifar"}, "unknown --data 'cifar'; closest: cifar10"),
    "unknown criterion": ({"criterion": "jacobain"}, "unknown --criterion 'jacobain'; closest: jacobian"),
    "unknown reduction": ({"group-reduction": "median"}, "unknown --group-reduction 'median'"),
    "unknown part": ({"only": "heads"}, "unknown --only 'heads'"),
    "unknown normalizer": ({"normalizer": "l7"}, "unknown --normalizer 'l7'"),
    "unknown scope": ({"scope": "layer"}, "unknown --scope 'layer'"),
    "unknown normalisation": ({"normalize": "x"}, "unknown normalisation 'x' of digits; known are"),
    "unknown device": ({"device": "gpu"}, "--device gpu: expected auto, cpu, cuda, cuda:1"),
    "empty data folder": ({"data": "cifar10", "root": "empty"}, "no cifar10 in"),
    "missing data folder": ({"data": "folder", "root": "nosuch"}, "there is no such folder"),
    "labels out of range": ({"data": "cifar10", "root": "labels.npz"}, "label 10"),
    "speed-up out of reach": ({"speedup": 1000}, "--speedup 1000"),
    "ratio out of range": ({"speedup": None, "ratio": 1.5}, "--ratio 1.5: expected a share between 0 and 1"),
    "ratio that the limits forbid": (
        {"speedup": None, "ratio": 0.5, "round-to": 64},
        "--ratio 0.5 cannot be met: the best that can be had is --ratio 0",
    ),
    "unknown count": ({"counting": "fvcore"}, "unknown --counting 'fvcore'"),
    "two targets": ({"ratio": 0.5}, "ratio; got --speedup 1.5, --ratio 0.5"),
    "no target": ({"speedup": None}, "give one target: --speedup, --macs, --params or --ratio; got none"),
    "negative epochs": ({"epochs": -1}, "--epochs -1: expected at least 0"),
    "EP without epochs": ({"epochs": 0, "equivalent": True}, "give --epochs at least 1"),
    "too many batches": ({"batches": 1000}, "1000 batches were asked for"),
    "diverging training": ({"epochs": 1, "lr": 1e12, "batches": 1, "steps": 1}, "The step was not taken"),
    "a folder of something else": ({"out": "empty/.."}, "holds something else than a run"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_input_gets_one_line_and_leaves_nothing(change, message, weights, tmp_path, capsys):
    places = tmp_path / "places"
    (places / "empty").mkdir(parents=True)
    images, labels = np.zeros((12, 32, 32, 3), np.uint8), np.arange(12) % 11  # 11 classes where CIFAR-10 has 10
    arrays = {f"{split}_images": images for split in ("train", "test")}
    arrays |= {f"{split}_labels": labels for split in ("train", "test")}
    np.savez(places / "labels.npz", classes=np.array([*"abcdefghij"]), **arrays)
    options = {"model": "resnet8", "weights": "good.safetensors", "data": "digits", "speedup": 1.5, "epochs": 1}
    options |= {"device": "cpu", "batches": 2, "out": "out"} | change
    options |= {name: places / options[name] for name in ("root", "out") if name in options}
    options["weights"] = weights / options["weights"]
    flags = [part for name, value in options.items() if value is not None for part in (f"--{name}", value)]
    before = snapshot(tmp_path)
    assert run("prune", *[part for part in flags if part is not True]) == 2
    assert_one_line(capsys.readouterr().err, message)
    assert snapshot(tmp_path) == before
    assert sorted(path.name for path in places.iterdir()) == ["empty", "labels.npz"]


def test_the_best_that_can_be_had_is_said(weights, tmp_path, capsys):
    arguments = ["--model", "resnet8", "--weights", weights / "good.safetensors", "--data", "digits"]
    assert run("prune", *arguments, "--speedup", 1000, "--batches", 2, "--out", tmp_path / "out") == 2
    assert re.search(r"best .*--speedup \d", capsys.readouterr().err)


COMPARE = ["--data", "digits", "--model", "resnet8", "--criteria", "jacobian", "l1", "--batches", 1, "--repeats", 1]
COMPARE += ["--batch-size", 16, "--steps", 2, "--held-out", 40, "--training", 0]


def test_compare_draws_curves_and_goes_on(weights, tmp_path, capsys, monkeypatch):
    arguments = ["compare", *COMPARE, "--weights", weights / "good.safetensors", "--out", tmp_path / "out"]
    assert run(*arguments) == 0
    assert "jacobian" in capsys.readouterr().out and (tmp_path / "out" / "comparison.csv").exists()
    assert "held-out accuracy" in (tmp_path / "out" / "curves.html").read_text(encoding="utf-8")
    monkeypatch.setattr("obc_tools.pruning.choices.score_groups", pytest.fail)
    assert run(*arguments) == 0
    assert run(*arguments, "--ratio", 0.5) == 2
    assert "holds a comparison with another ratio" in capsys.readouterr().err
    assert run(*arguments, "--compensate") == 2
    assert "holds a comparison with another compensate" in capsys.readouterr().err


def test_compare_stopped_says_how_to_go_on(weights, tmp_path, capsys, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("obc_tools.pruning.choices.score_groups", interrupt)
    assert run("compare", *COMPARE, "--weights", weights / "good.safetensors", "--out", tmp_path / "out") == 130
    assert capsys.readouterr().err.endswith("obc: stopped; the same command goes on from the last finished step\n")


def test_compare_names_what_is_wrong(weights, tmp_path, capsys):
    given = ["compare", *COMPARE, "--weights", weights / "good.safetensors", "--out", tmp_path / "out"]
    assert run(*given, "--criteria", "jacobean") == 2
    assert "unknown --criteria 'jacobean'; closest: jacobian" in capsys.readouterr().err
    assert run(*given, "--hold-out", 2) == 2
    assert "--hold-out 2.0: expected a share between 0 and 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sweep_finds_plans_at_all_targets_and_goes_on(weights, tmp_path, capsys, monkeypatch):
    arguments = ["sweep", "--data", "digits", "--model", "resnet8", "--weights", weights / "good.safetensors"]
    arguments += ["--criteria", "jacobian", "l1", "--batches", 1, "--batch-size", 16, "--steps", 3]
    arguments += ["--speedup", 1.5, 2, "--ratio", 0.2, "--out", tmp_path / "out"]
    assert run(*arguments) == 0
    printed = capsys.readouterr().out
    assert all(printed.count(target) == 2 for target in ("speedup=1.5", "speedup=2", "ratio=0.2"))
    assert "held-out accuracy" in (tmp_path / "out" / "curves.html").read_text(encoding="utf-8")
    assert len(json.loads((tmp_path / "out" / "curve_l1_0.json").read_text(encoding="utf-8"))["plans"]) == 3
    monkeypatch.setattr("obc_tools.pruning.choices.score_groups", pytest.fail)
    assert run(*arguments) == 0
    assert run(*arguments, "--steps", 4) == 2
    assert "holds a comparison with another settings" in capsys.readouterr().err


def test_sweep_names_what_is_wrong(weights, tmp_path, capsys):
    given = ["sweep", "--data", "digits", "--model", "resnet8", "--out", tmp_path / "out"]
    assert run(*given, "--speedup", 2) == 2
    assert_one_line(capsys.readouterr().err, "--weights: which weights of 'resnet8'?")
    given += ["--weights", weights / "good.safetensors", "--batches", 1]
    assert run(*given) == 2
    assert_one_line(capsys.readouterr().err, "give one target: --speedup, --macs, --params or --ratio; got none")
    assert run(*given, "--speedup", 2, 1000) == 2
    assert_one_line(capsys.readouterr().err, "--speedup 1000 cannot be met: the best that can be had is")
    assert not (tmp_path / "out").exists()
