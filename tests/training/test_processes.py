"""Two processes that train together, against one with twice the batch."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from two_trainings import train_both

from obc_tools.training import stepper
from obc_tools.training.folder import CHECKPOINT, LOG, read_history
from obc_tools.training.processes import MEETING, Processes, agreed, processes


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return door.getsockname()[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What one process found with twice the batch, what each of two found, and the two's folder."""
    folder, port = tmp_path_factory.mktemp("two"), str(free_port())
    command = [sys.executable, "-m", "tests.two_trainings", str(folder)]
    children = [subprocess.Popen([*command, str(rank), port]) for rank in (0, 1)]
    alone = tmp_path_factory.mktemp("one")
    original = stepper.learning_rate_factor
    try:
        train_both(alone, 1)
    finally:
        stepper.learning_rate_factor = original
    assert [child.wait(900) for child in children] == [0, 0]
    read = [torch.load(path, weights_only=True) for path in (alone / "0.pt", folder / "0.pt", folder / "1.pt")]
    return read, folder


def test_two_processes_take_the_step_of_one_with_twice_the_batch(trained):
    (one, first, second), _ = trained
    for name, value in one["plain"]["state"].items():
        torch.testing.assert_close(first["plain"]["state"][name], value, atol=1e-6, rtol=0, msg=name)
        assert torch.equal(first["plain"]["state"][name], second["plain"]["state"][name])
    for ours, theirs in zip(first["plain"]["rows"], one["plain"]["rows"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)
    assert first["plain"]["rows"] == second["plain"]["rows"]


def test_with_batch_norm_the_images_and_learning_rates_are_the_same(trained):
    (one, first, second), _ = trained
    assert first["norms"]["lrs"] == second["norms"]["lrs"] == one["norms"]["lrs"]
    assert len(set(one["norms"]["lrs"])) > 3
    assert len(one["norms"]["images"]) == 8
    for whole, *parts in zip(one["norms"]["images"], first["norms"]["images"], second["norms"]["images"], strict=True):
        assert {part[:2] for part in (whole, *parts)} == {whole[:2]}
        together = torch.stack([part[2] for part in parts], 1).flatten(0, 1)
        assert torch.equal(together, whole[2])
    assert first["norms"]["rows"] == second["norms"]["rows"]
    statistics = [each["norms"]["state"]["1.running_mean"] for each in (first, second)]
    assert torch.equal(*statistics)


def test_one_of_two_processes_writes(trained):
    _, folder = trained
    for name in ("plain", "norms"):
        assert len(read_history(folder / name)) == 2
        assert len(torch.load(folder / name / CHECKPOINT, weights_only=True)["random"]) == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_never_comes_is_waited_for_no_longer_than_said(rank, tmp_path):
    command = [sys.executable, "-m", "tests.two_trainings", str(tmp_path), str(rank), str(free_port())]
    alone = subprocess.run(
        command, stderr=subprocess.PIPE, text=True, timeout=300, env=os.environ | {MEETING: "0.05"}, check=False
    )
    assert alone.returncode == 1
    said = alone.stderr.strip().splitlines()[-1]
    assert f"TimeoutError: process {rank} of 2 waited 0.05 minutes for the others to begin, not all came" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("minutes", ["soon", "0", "nan", "inf", "-1", "361"])
def test_how_long_processes_wait_for_each_other_is_checked(minutes, monkeypatch):
    monkeypatch.setenv(MEETING, minutes)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=f"{MEETING}={minutes}: expected minutes, above 0 and at most 360"):
        agreed(torch.device("cpu")).__enter__()


def test_reads_what_a_launcher_says(monkeypatch):
    assert processes() == Processes(0, 1, 0) and processes().is_main
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert processes() == Processes(5, 8, 1)
    assert processes().share == (5, 8) and not processes().is_main


@pytest.mark.parametrize("count", [2, 4])
def test_a_process_that_fails_midway_ends_all_though_it_lives_on(count, tmp_path):
    """Those that wait for it end with its error while it is still alive."""
    command, port = [sys.executable, "-m", "tests.two_trainings", str(tmp_path)], str(free_port())
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    children = [subprocess.Popen([*command, str(rank), port, str(count), "midway"], **pipes) for rank in range(count)]
    failed, others = children[1], children[:1] + children[2:]
    try:
        said = [child.communicate(timeout=300)[1].strip().splitlines()[-1] for child in others]
        assert failed.poll() is None
    finally:
        for child in children:
            child.kill()
    own = "ValueError: an image that cannot be read"
    assert failed.communicate()[0].strip() == own
    assert said == [f"obc_tools: process 1 of {count} raised {own}; all end"] * (count - 1)
    assert [child.returncode for child in others] == [1] * (count - 1)
    assert f"raised {own}; all end" in (tmp_path / "run" / LOG).read_text()


@pytest.mark.parametrize("count", [2, 4])
def test_a_process_that_cannot_train_ends_all_with_its_error(count, tmp_path):
    command, port = [sys.executable, "-m", "tests.two_trainings", str(tmp_path)], str(free_port())
    children = [
        subprocess.Popen([*command, str(rank), port, str(count)], stderr=subprocess.PIPE, text=True)
        for rank in range(count)
    ]
    said = [child.communicate(timeout=600)[1].strip().splitlines()[-1] for child in children]
    own = "ValueError: train: batches that yield no data"
    others = f"ValueError: process 1 of {count} raised {own}; all end"
    assert said == [f"[rank{rank}]: {own if rank == 1 else others}" for rank in range(count)]
    assert not list(tmp_path.iterdir())
