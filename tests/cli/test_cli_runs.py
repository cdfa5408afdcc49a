"""Commands on runs: every experiment end to end, what runs there are, evaluating, scripts for a cluster."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from terminal import assert_one_line, run
from torchvision.transforms.v2.functional import to_pil_image

from obc_tools.cli import options as checks
from obc_tools.cli.commands import RunExperiment
from obc_tools.data.data import load_data
from obc_tools.models.networks import load_model
from obc_tools.runs.experiments import EXPERIMENTS, RESNET56
from obc_tools.runs.run import Run

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def tiny(monkeypatch):
    """Let the experiment "tiny" be ResNet-56's, with a smaller network on digits."""
    base = replace(RESNET56.base, model="resnet8", model_options={"width": 4}, data="digits")
    monkeypatch.setattr(
        "obc_tools.runs.experiments.EXPERIMENTS", {"tiny": replace(RESNET56, name="tiny", title="tiny", base=base)}
    )
    for name in ("experiment", "grid"):
        monkeypatch.setitem(checks.KNOWN, name, ("tiny",))


def test_runs_an_experiment_and_tells_of_it(tiny, tmp_path, capsys):
    out = tmp_path / "runs" / "one"
    arguments = ["tiny", "--small", "--weights", "scratch", "--device", "cpu", "--speedup", 1.5, "--out", out]
    assert run("run", *arguments) == 0
    printed = capsys.readouterr().out
    assert (
        "tiny, small run, finished" in printed
        and "Equivalent Pruning, merged" in printed
        and "test accuracy" in printed
    )
    assert run("run", *arguments) == 2
    assert_one_line(capsys.readouterr().err, "already holds a run")
    assert run("run", *arguments, "--resume") == 0
    assert run("runs", tmp_path / "runs", "--log", 2) == 0
    printed = capsys.readouterr().out
    assert f"Run('{out}'): tiny, small run, finished" in printed and printed.strip().endswith("done")
    assert run("evaluate", out / "merged", "--data", "digits", "--device", "cpu") == 0
    assert "accuracy" in capsys.readouterr().out


def test_a_grid_in_the_background_is_waited_for_and_shown(tiny, tmp_path, capsys, monkeypatch):
    begun = []
    monkeypatch.setattr("obc_tools.runs.grid.Grid.resume", lambda self: begun.append(self.folder) or self)
    arguments = ["tiny", "--small", "--weights", "scratch", "--seeds", 0, 1, "--epochs", 2, "--out", tmp_path / "grid"]
    assert run("grid", *arguments, "--wait") == 0
    printed = capsys.readouterr().out
    assert begun == [tmp_path / "grid"] and printed.count("waiting") == 4
    assert run("runs", tmp_path / "grid") == 0
    assert "tiny_speedup2.55_seed1 waiting" in " ".join(capsys.readouterr().out.split())


def test_slurm_prints_the_command(tmp_path, capsys):
    assert run("slurm", "resnet50-imagenet", "--root", "/data", "--nodes", 2, "--out", tmp_path / "run") == 0
    assert capsys.readouterr().out == f"sbatch {tmp_path / 'run' / 'run.slurm'}\n"


def test_options_change_the_job():
    options = {"experiment": "vgg19-cifar100", "out": Path("out"), "weights": "scratch", "seed": 2}
    job = RunExperiment(**options, speedup=6.0, epochs=10, sparse_epochs=5, steps=7, batches=9, root="data").job()
    assert (job.target.speedup, job.seed, job.pretrain.epochs, job.root) == (6.0, 2, 200, "data")
    assert (job.steps, job.last_step, job.batches) == (7, "exact", 9)
    assert (job.pretrain.amp, job.sparse.amp, job.finetune.amp) == ("no", "no", "no")
    assert (job.finetune.epochs, job.finetune.milestones) == (10, (6, 8))
    assert (job.sparse.epochs, job.sparse.milestones) == (5, (3, 4))
    unlike = RunExperiment(**options, sparse_epochs=0, amp="bf16").job()
    assert (unlike.pretrain.amp, unlike.sparse, unlike.finetune.amp) == ("bf16", None, "bf16")
    skipping = RunExperiment(**options, sparse_weights="file.pth").job()
    assert (skipping.sparse, skipping.sparse_weights) == (None, "file.pth")
    vit = RunExperiment(experiment="vit-b16-imagenet", out=Path("out"), as_requested=True, train_from_val=True).job()
    assert (vit.finetune.repeats, vit.train_from_val) == (3, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "vgg", "--out", "x"), "unknown experiment 'vgg'"),
        (("run", "resnet56-cifar10", "--speedup", 2, "--macs", 1e6, "--out", "x"), "give one target"),
        (("runs", "nowhere"), "'nowhere' holds 0 runs"),
        (("grid", "paper", "--out", "x"), "unknown grid 'paper'"),
        (("evaluate", "resnet20", "--data", "digits"), "holds no saved model; for a network by name, pass --weights"),
    ],
)
def test_mistakes_get_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    assert_one_line(capsys.readouterr().err, message)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="session")
def cifar(tmp_path_factory) -> dict[str, str]:
    """CIFAR-10 where it is beside the repository, digits elsewhere."""
    if not (SHARED / "unpack.py").exists():
        return {"--data": "digits"}
    folder = tmp_path_factory.mktemp("cifar")
    subprocess.run([sys.executable, SHARED / "unpack.py", "cifar10", folder, "--npz"], check=True)
    return {"--data": "cifar10", "--root": str(folder / "cifar10.npz")}


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory) -> dict[str, str]:
    """The ImageNet sample where it is beside the repository, digits as image files elsewhere."""
    if (SHARED / "imagenet_sample").exists():
        return {"--root": str(SHARED / "imagenet_sample")}
    root = tmp_path_factory.mktemp("digits")
    images = load_data("digits").val
    for number in range(60):
        folder = root / "val" / str(int(images.labels[number]))
        folder.mkdir(parents=True, exist_ok=True)
        to_pil_image(images.pixels[number]).convert("RGB").save(folder / f"{number}.png")
    return {"--data": "folder", "--root": str(root)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet56-cifar10", "mobilenetv2-imagenet"])
def test_an_experiment_end_to_end(name, cifar, imagenet, tmp_path):
    """Real networks at a small setting: on real CIFAR-10 images, and on the ImageNet sample at 224 pixels.

    Notebooks 12 to 16 take all five experiments through the same stages.
    """
    experiment = EXPERIMENTS[name]
    options = dict(cifar) if "cifar" in name else {**imagenet, "--train-from-val": None}
    options["--weights"] = "scratch"
    if "imagenet" in name:
        classes = 1000 if "--data" not in imagenet else 10
        state = load_model(experiment.base.model, num_classes=classes).state_dict()
        torch.save(state, tmp_path / "random.pth")
        options["--weights"] = str(tmp_path / "random.pth")
    flags = [part for flag, value in options.items() for part in (flag, value) if part is not None]
    assert run("run", name, "--small", "--device", "cpu", *flags, "--out", tmp_path / "run") == 0
    done = Run.open(tmp_path / "run")
    assert done.status == "finished"
    if experiment.base.equivalent:
        assert done.results["equivalence"]["merged_from_trained"] <= 1e-4
