"""Runs in the background: watched, stopped, killed and resumed to the numbers of one that nothing happened to."""

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from trainings import numbers, wait_for

from obc_tools.files import PROCESS, is_alive, process_identity, write_json
from obc_tools.pruning.choices import Target
from obc_tools.runs.grid import Grid, GridJob, launch_grid, paper_grid
from obc_tools.runs.job import PruningJob, RunFolderError
from obc_tools.runs.run import Run, command, job_of, launch, run_experiment, write_slurm_script
from obc_tools.training.folder import Stopped
from obc_tools.training.recipe import Recipe

SPARSE = Recipe(epochs=2, lr=0.05, batch_size=64, weight_decay=0.0, group_penalty=1e-3)
JOB = PruningJob(
    title="tiny",
    model="resnet8",
    model_options={"width": 4},
    data="digits",
    train_images=256,
    val_images=64,
    target=Target(speedup=1.3),
    batches=1,
    batch_size=64,
    steps=2,
    pretrain=replace(SPARSE, group_penalty=0.0),
    sparse=SPARSE,
    finetune=Recipe(epochs=3, lr=0.02, batch_size=32, distill_weight=0.5, label_weight=0.5),
    equivalent=True,
    device="cpu",
)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The tiny job, done in this process from beginning to end."""
    return run_experiment(JOB, tmp_path_factory.mktemp("whole") / "run", progress=False)


def assert_same(run: Run, expected: Run) -> None:
    """Assert that two runs have the same plan, metrics and weights, bit by bit."""
    assert (run.folder / "plan.json").read_text() == (expected.folder / "plan.json").read_text()
    assert list(run.histories) == list(expected.histories) == ["original", "sparse", "naive", "merged"]
    for key, history in expected.histories.items():
        assert numbers(run.histories[key]) == numbers(history)
    for name in ("original.safetensors", "sparse.safetensors", "naive/model.safetensors", "merged/model.safetensors"):
        ours, theirs = load_file(run.folder / name), load_file(expected.folder / name)
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_a_run_tells_what_came_out(whole):
    assert whole.status == "finished"
    assert repr(whole).startswith(f"Run('{whole.folder}'): tiny, finished\n  original: epoch 2")
    shown = whole._repr_html_()
    assert "tiny, finished<br>" in shown and "<th>test accuracy</th>" in shown and "1.00x</td>" in shown
    assert whole.results["equivalence"]["merged_from_trained"] <= 1e-4
    assert "measuring" in whole.log() and whole.error is None
    last, best = whole.table(), whole.table(select="best_on_test")
    assert list(last["model"]) == list(best["model"]) and len(last) == 5
    assert last["test accuracy"].iloc[-1] == whole.histories["merged"].last.val_accuracy
    assert best.columns[1] == "test accuracy (best epoch, picked on test)"
    assert best.iloc[-1, 1] == whole.histories["merged"].best.val_accuracy
    with pytest.raises(ValueError, match="unknown select 'best'; known are 'last', 'best_on_test'"):
        whole.table(select="best")


def test_launched_stopped_and_resumed(whole, tmp_path):
    """A process is launched, seen and stopped; this one goes on from what it left."""
    run = launch(JOB, tmp_path / "run", devices="cpu")
    assert run.status == "running"
    with pytest.raises(RunFolderError, match="is being worked on: stop that run first"):
        run.resume()
    wait_for(lambda: "original" in run.histories)
    assert run.stop(900) == "stopped"
    opened = Run.open(run.folder)
    assert opened.status == "stopped" and opened.job == JOB
    with pytest.raises(RunFolderError, match=r"holds a run \(stopped\): pass resume=True"):
        launch(JOB, run.folder)
    with pytest.raises(RunFolderError, match="holds another job"):
        launch(replace(JOB, seed=1), run.folder, resume=True)
    assert_same(run_experiment(JOB, run.folder, progress=False), whole)
    assert opened.follow() == "finished"


@pytest.mark.slow
def test_a_grid_is_killed_and_resumed(whole, tmp_path):
    """The second job starts from what the first one trained; both processes are killed on the way."""
    second = replace(JOB, sparse=None, sparse_weights=str(tmp_path / "grid" / "first" / "sparse.safetensors"))
    second = replace(second, pretrain=None, weights=str(tmp_path / "grid" / "first" / "original.safetensors"))
    jobs = [GridJob("first", JOB), GridJob("second", second, ("first/sparse.safetensors",))]
    grid = launch_grid(jobs, tmp_path / "grid")
    first = Run(tmp_path / "grid" / "first")
    wait_for(lambda: "sparse" in first.histories)
    assert grid.statuses == {"first": "running", "second": "waiting"}
    for folder in (grid.folder, first.folder):
        os.kill(json.loads((folder / PROCESS).read_text())["pid"], signal.SIGKILL)
    wait_for(lambda: not grid.is_running and first.status == "interrupted")
    with pytest.raises(ValueError, match="holds a grid: pass resume=True with the same jobs"):
        launch_grid(jobs, grid.folder)
    assert launch_grid(jobs, grid.folder, resume=True).wait(900) == {"first": "finished", "second": "finished"}
    assert_same(first, whole)
    other = Run(tmp_path / "grid" / "second")
    assert (other.folder / "plan.json").read_text() == (first.folder / "plan.json").read_text()
    assert numbers(other.histories["merged"]) == numbers(first.histories["merged"])


@pytest.mark.slow
def test_a_grid_stops_and_a_failure_does_not_stop_the_others(tmp_path):
    short = replace(JOB, equivalent=False, finetune=None, sparse=None)
    jobs = [GridJob("bad", replace(short, root="nowhere")), GridJob("good", short), GridJob("never", short, ("none",))]
    grid = launch_grid(jobs, tmp_path / "grid", each=2)
    assert grid.wait(900) == {"bad": "failed", "good": "finished", "never": "waiting"}
    assert "digits come with scikit-learn" in Run(grid.folder / "bad").error
    assert list(grid.to_frame()["status"]) == ["failed", "finished", "waiting"]
    long = launch_grid([GridJob("long", JOB)], tmp_path / "long")
    wait_for(lambda: long.statuses["long"] == "running")
    assert long.stop(900) == {"long": "stopped"}
    assert Grid.open(long.folder).resume().wait(900) == {"long": "finished"}


@pytest.mark.slow
def test_two_processes_are_launched_together(tmp_path):
    run = launch(JOB, tmp_path / "run", processes=2, devices="cpu")
    assert run.wait(900) == "finished", (run.folder / "output.log").read_text()
    assert len(run.histories) == 4
    assert run.results["equivalence"]["merged_from_trained"] <= 1e-4
    config = json.loads((run.folder / "training_merged" / "config.json").read_text())
    assert config["recipe"]["batch_size"] == 32
    assert processes_of(run) == 2


def processes_of(run: Run) -> int:
    return json.loads((run.folder / "training_merged" / "environment.json").read_text())["processes"]


@pytest.mark.slow
def test_sigterm_stops_with_a_checkpoint(tmp_path):
    run = launch(JOB, tmp_path / "run", devices="cpu")
    wait_for(lambda: "original" in run.histories)
    os.kill(json.loads((run.folder / PROCESS).read_text())["pid"], signal.SIGTERM)
    assert run.wait(900) == "stopped"


def test_a_failed_run_says_why(tmp_path):
    bad = replace(JOB, root="nowhere")
    run = Run(tmp_path)
    write_json(tmp_path / "job.json", bad.to_dict())
    code = subprocess.run([sys.executable, "-m", "obc_tools.worker", str(tmp_path)], capture_output=True).returncode
    assert (code, run.status) == (1, "failed")
    assert run.error == "ValueError: digits come with scikit-learn: root must be None"
    assert "failed\n  ValueError: digits come" in repr(run)
    assert "failed<br>  ValueError: digits come" in run._repr_html_()


def test_a_run_in_the_foreground_is_seen_and_stopped_from_elsewhere(tmp_path):
    """While it works, it counts as running, nobody joins it, and `stop` ends it with a checkpoint."""
    seen = []

    def watch():
        wait_for(lambda: (tmp_path / "run" / "training_original" / "progress.json").is_file())
        run = Run.open(tmp_path / "run")
        seen.append(run.status)
        with pytest.raises(RunFolderError, match="is being worked on"):
            launch(JOB, run.folder, resume=True)
        seen.append(run.stop())

    thread = threading.Thread(target=watch)
    thread.start()
    with pytest.raises(Stopped):
        run_experiment(replace(JOB, pretrain=replace(SPARSE, epochs=200)), tmp_path / "run", progress=False)
    thread.join()
    assert seen == ["running", "stopped"]


def test_commands_for_one_and_several_processes(tmp_path):
    work = ["-m", "obc_tools.worker", str(tmp_path)]
    assert command(tmp_path, 1) == [sys.executable, *work]
    several = command(tmp_path, 4)
    assert several[1:3] == ["-m", "torch.distributed.run"] and several[-4:] == ["4", *work]


def test_what_cannot_be_launched(tmp_path):
    with pytest.raises(ValueError, match="3 processes on 2 devices: one a device"):
        launch(JOB, tmp_path / "run", processes=3, devices=[0, 1])
    with pytest.raises(ValueError, match="unknown experiment 'vgg'"):
        launch("vgg", tmp_path / "run")
    with pytest.raises(ValueError, match="a job is complete: small, seed belong to an experiment"):
        job_of(JOB, small=True, seed=1)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunFolderError, match="holds something else than a run"):
        launch(JOB, tmp_path)
    with pytest.raises(RunFolderError, match="holds no job"):
        Run.open(tmp_path)
    with pytest.raises(ValueError, match="holds something else than a grid"):
        launch_grid([GridJob("a", JOB)], tmp_path)
    with pytest.raises(ValueError, match="a job needs 2 devices, there are 1"):
        launch_grid([GridJob("a", JOB, processes=2)], tmp_path / "grid", devices=[0])
    with pytest.raises(ValueError, match="each with a name of its own"):
        launch_grid([GridJob("a", JOB), GridJob("a", JOB)], tmp_path / "grid")
    with pytest.raises(ValueError, match="holds no grid"):
        Grid.open(tmp_path)
    for text in ("{}", "null", "[]", "1"):
        (tmp_path / "grid.json").write_text(text)
        with pytest.raises(ValueError, match=r"grid.json' holds no jobs, devices, each"):
            print(Grid.open(tmp_path).statuses)


def test_processes_are_told_apart(tmp_path):
    own = process_identity(os.getpid())
    assert is_alive(own)
    assert not is_alive(own | {"created": own["created"] - 100})
    assert not is_alive(own | {"host": "elsewhere"})
    write_json(tmp_path / "job.json", JOB.to_dict())
    write_json(tmp_path / PROCESS, own | {"host": "elsewhere", "pid": 1})
    assert Run(tmp_path).status == "running"
    old = 1_000_000_000
    for path in tmp_path.iterdir():
        os.utime(path, (old, old))
    assert Run(tmp_path).status == "interrupted"
    assert platform.node() == own["host"]


def test_the_published_grids(tmp_path):
    cifar = paper_grid("paper-cifar", tmp_path, roots={"cifar100": "c100", "cifar10": "c10"})
    assert len(cifar) == 5 * 8 * 3 + 2 * 3
    assert len({entry.name for entry in cifar}) == len(cifar)
    assert {entry.job.root for entry in cifar} == {"c100", "c10"}
    training = [entry.name for entry in cifar if entry.job.sparse]
    assert len(training) == 2 * 3
    first = next(entry for entry in cifar if entry.job.seed == 1)
    others = [entry for entry in cifar if entry.job.seed == 1 and entry.job.model == "vgg19"][1:]
    assert {entry.needs for entry in others} == {(f"{first.name}/sparse.safetensors",)}
    assert {entry.job.sparse_weights for entry in others} == {str(tmp_path / first.name / "sparse.safetensors")}
    assert "vgg19-cifar100_speedup6_jacobian_sum_none_seed2" in {entry.name for entry in cifar}
    scratch = paper_grid("resnet56-cifar10", tmp_path, weights="scratch", seeds=(0,))
    assert [bool(entry.job.pretrain) for entry in scratch] == [True, False]
    assert len(scratch[1].needs) == 2
    skipping = paper_grid("resnet56-cifar10", tmp_path, sparse_weights="sparse.pth", seeds=(0,))
    assert all(entry.job.sparse_weights == "sparse.pth" and not entry.needs for entry in skipping)
    imagenet = paper_grid("paper-imagenet", tmp_path)
    assert [entry.processes for entry in imagenet] == [4, 4, 4]
    assert {entry.processes for entry in paper_grid("paper-imagenet", tmp_path, small=True, processes=1)} == {1}


def test_a_slurm_script(tmp_path):
    path = write_slurm_script("resnet50-imagenet", tmp_path / "run", nodes=2, gpus=2, root="/data", time="1:00:00")
    text = path.read_text()
    assert "#SBATCH --nodes=2" in text and "--nproc_per_node=2" in text and "--rdzv_backend=c10d" in text
    assert f"-m obc_tools.worker {tmp_path / 'run'}" in text
    assert Run.open(tmp_path / "run").job.root == "/data"
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    with pytest.raises(ValueError, match="nodes=0, gpus=4, cpus=32: at least 1 each"):
        write_slurm_script("resnet50-imagenet", tmp_path / "other", nodes=0)


def free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("localhost", 0))
        return chosen.getsockname()[1]


@pytest.mark.slow
def test_a_slurm_script_trains_on_two_nodes(tmp_path, monkeypatch):
    """The script as it is written; only SLURM's own commands are stood in for, by two nodes on this machine."""
    stand_ins = {"scontrol": "echo localhost", "srun": '"$@" & first=$!; "$@" & wait $! && wait $first'}
    for name, line in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    path = write_slurm_script(JOB, tmp_path / "run", nodes=2, gpus=1, port=free_port())
    done = subprocess.run(["bash", path], capture_output=True, text=True, timeout=900)
    run = Run.open(tmp_path / "run")
    assert (done.returncode, run.status) == (0, "finished"), done.stderr[-5000:]
    assert len(run.histories) == 4
    assert processes_of(run) == 2
    assert run.results["equivalence"]["merged_from_trained"] <= 1e-4


@pytest.mark.parametrize(("when", "said"), {"plan": "no room for scores", "begin": "no data here"}.items())
def test_a_second_process_ends_with_the_error_of_the_first_which_lives_on(when, said, tmp_path):
    command, port = [sys.executable, "-m", "tests.two_jobs", str(tmp_path / "run")], str(free_port())
    rest = [["0", port, when], ["1", port, when]]
    first, second = (subprocess.Popen([*command, *each], stdout=subprocess.PIPE, text=True) for each in rest)
    try:
        ended = second.communicate(timeout=300)[0].strip()
        assert ended == f"ValueError: process 0 of 2 raised ValueError: {said}; all end"
        assert first.poll() is None
    finally:
        first.kill()
    assert first.communicate()[0].strip() == f"ValueError: {said}"
    assert (tmp_path / "run").exists() == (when == "plan")
