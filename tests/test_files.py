"""Files and folders are whole or not there, whatever happens while they are written."""

import json
import logging
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from obc_tools.files import (
    entries,
    held,
    is_leftover,
    logging_to_file,
    read_json,
    remove_leftovers,
    replacing,
    write_json,
    write_text,
)
from obc_tools.training.folder import TrainingFolder


def make_folder(path: Path, text: str) -> None:
    path.mkdir()
    (path / "results.json").write_text(text)


@pytest.mark.parametrize("synced", [True, False])
def test_a_folder_is_replaced_only_on_success(tmp_path, synced):
    folder = tmp_path / "run"
    make_folder(folder, "old")
    with pytest.raises(ZeroDivisionError), replacing(folder, synced=synced) as new:
        make_folder(new, "new")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (folder / "results.json").read_text() == "old"
    with replacing(folder, synced=synced) as new:
        make_folder(new, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (folder / "results.json").read_text() == "new"


def test_a_file_is_replaced_only_on_success(tmp_path):
    path = tmp_path / "new folder" / "file"
    write_text(path, "ü")
    with pytest.raises(ZeroDivisionError), replacing(path) as new:
        new.write_text("half of it")
        raise ZeroDivisionError
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, [float("nan")])
    assert [found.name for found in path.parent.iterdir()] == ["file"]
    assert path.read_bytes() == "ü".encode()
    write_json(path, {"a": 1})
    assert read_json(path) == read_json(path, "a") == {"a": 1} == json.loads(path.read_text())
    with pytest.raises(ValueError, match="holds no b, c$"):
        read_json(path, "a", "b", "c")


def test_everything_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    seen, replace = [], Path.replace

    def opened(path, flags):
        seen.append(Path(path).name if "." not in Path(path).name else "new")
        return 0

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(os, "close", lambda descriptor: None)
    monkeypatch.setattr(Path, "replace", lambda self, target: seen.append("moved") or replace(self, target))
    with replacing(tmp_path / "run") as new:
        make_folder(new, "text")
    assert seen == ["new", "new", "moved", tmp_path.name]
    seen.clear()
    write_text(tmp_path / "note", "text", synced=False)
    assert seen == ["moved"]


def test_what_a_killed_process_leaves_is_told_apart(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from obc_tools.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as new: new.write_text('{'); os.kill(os.getpid(), 9)"
    )
    code = subprocess.run([sys.executable, "-c", script, tmp_path / "job.json"]).returncode
    assert code == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert is_leftover(left) and entries(tmp_path) == []
    (tmp_path / ".job.json.new").touch()  # as versions before named it
    for name in (".hidden", "report.new", "thesis.tex"):
        (tmp_path / name).touch()
    assert entries(tmp_path) == [".hidden", "report.new", "thesis.tex"] and entries(tmp_path / "nowhere") == []
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == entries(tmp_path)


def write_folder(path: Path) -> None:
    with replacing(path) as new:
        new.mkdir()
        write_text(new / "a.txt", "a" * 40_000)


def write_tensors(path: Path) -> None:
    with replacing(path) as new:
        save_file({"a": torch.zeros(10_000)}, new)


WRITERS = {
    "text": lambda path: write_text(path, "a" * 40_000),
    "a checkpoint": lambda path: TrainingFolder(path.parent).save({"a": torch.zeros(10_000)}),
    "tensors": write_tensors,
    "a folder": write_folder,
}


@contextmanager
def room(size: int):
    """Let no file grow beyond a size, as under a quota; a full disk ends in the same place."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


@pytest.mark.parametrize("size", [100, 10_000, 39_000])
@pytest.mark.parametrize("what", WRITERS)
def test_a_file_that_may_grow_no_further_is_named_with_what_is_safe(what, size, tmp_path):
    """Whoever writes: Python, torch, safetensors."""
    path, write = tmp_path / "checkpoint.pt", WRITERS[what]
    for safe in ("nothing was there before", "what was there before is as it was"):
        with pytest.raises(OSError, match="not written") as raised, room(size):
            write(path)
        assert str(raised.value) == f"[Errno 27] File too large, it was not written; {safe}: '{path}'"
        write(path)
        files = [file for file in tmp_path.rglob("*") if file.is_file()]
        assert len(files) == 1 and files[0].stat().st_size >= 40_000


def test_a_log_that_may_grow_no_further_stops_no_work(tmp_path, capsys):
    with room(1000), logging_to_file(tmp_path / "training.log"):
        for _ in range(40):
            logging.getLogger("obc_tools").info("a" * 60)
    assert 900 < (tmp_path / "training.log").stat().st_size <= 1000
    assert capsys.readouterr().err == ""


def test_other_errors_stay_as_they_are(tmp_path):
    """Only of the file that is written, and of a disk, is said that it was not."""
    for error in (FileNotFoundError(2, "no such file", "images.npz"), ValueError("(os error 2)"), OSError(5, "input")):
        with pytest.raises(type(error)) as raised, replacing(tmp_path / "run"):
            raise error
        assert raised.value is error
    refused = pytest.raises(PermissionError, match="Permission denied, it was not written; nothing was there")
    with refused as raised, replacing(tmp_path / "run") as new:
        raise PermissionError(13, "Permission denied", str(new))
    assert raised.value.filename == str(tmp_path / "run")


KILLED_BETWEEN = """
import os, sys
from pathlib import Path
from obc_tools.files import replacing
folder, replace = Path(sys.argv[1]), Path.replace
def killed_after(self, target):
    replace(self, target)
    if str(target).endswith(".old"):
        os.kill(os.getpid(), 9)
Path.replace = killed_after
with replacing(folder) as new:
    new.mkdir()
    (new / "results.json").write_text("new")
"""


@pytest.mark.parametrize("next_one", ["holds", "removes", "writes", "removes all"])
def test_a_folder_is_never_lost_between_its_old_and_its_new_content(tmp_path, next_one):
    folder, other = tmp_path / "run [1]", tmp_path / f".run [1].b.{'0' * 32}.new"
    make_folder(folder, "old")
    other.mkdir()  # what another, "run [1].b", is about to be
    assert subprocess.run([sys.executable, "-c", KILLED_BETWEEN, folder]).returncode == -signal.SIGKILL
    assert not folder.exists()
    if next_one == "holds":
        with held(folder):
            remove_leftovers(tmp_path, of=folder.name)
    elif next_one == "removes":
        remove_leftovers(tmp_path, of=folder.name)
    elif next_one == "removes all":
        other.rmdir()
        remove_leftovers(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    else:
        with pytest.raises(ZeroDivisionError), replacing(folder):
            raise ZeroDivisionError
        remove_leftovers(tmp_path, of=folder.name)
    assert (folder / "results.json").read_text() == "old"
    assert other.exists() == (next_one != "removes all")
    assert len(list(tmp_path.iterdir())) == 1 + other.exists()
