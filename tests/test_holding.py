"""A folder is held by one at a time, and by nobody once its holder has ended, however that was."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from obc_tools.files import (
    HOLDER,
    LOCK,
    FolderInUseError,
    entries,
    held,
    is_worked_on,
    keep_hold,
    replacing,
    worker_of,
    write_text,
)

HOLDS = """
import sys, time
from pathlib import Path
from obc_tools.files import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_another_process_is_refused_until_the_holder_is_killed(tmp_path):
    folder = tmp_path / "a folder, größer"
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(folder)], stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"held\n"
        assert worker_of(folder)["pid"] == child.pid and is_worked_on(folder)
        message = f"is being worked on by process {child.pid} on '.+': wait for it"
        with pytest.raises(FolderInUseError, match=message), held(folder):
            pass
        os.kill(child.pid, signal.SIGKILL)
    assert (folder / HOLDER).is_file() and not is_worked_on(folder)
    with held(folder):
        assert worker_of(folder)["pid"] == os.getpid()
    assert not is_worked_on(folder) and list(folder.iterdir()) == []


def test_another_thread_is_refused_and_errors_let_go(tmp_path):
    refused = []

    def try_it():
        try:
            with held(tmp_path):
                pass
        except FolderInUseError as error:
            refused.append(error)

    with pytest.raises(RuntimeError, match="in the middle"), held(tmp_path):
        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join()
        raise RuntimeError("in the middle")
    assert len(refused) == 1
    try_it()
    assert len(refused) == 1


def test_only_a_folder_that_stays_empty_goes_again(tmp_path):
    with held(tmp_path / "empty"):
        assert (tmp_path / "empty").is_dir()
    assert not (tmp_path / "empty").exists()
    with held(tmp_path / "used"):
        write_text(tmp_path / "used" / "a.txt", "a")
    assert entries(tmp_path / "used") == ["a.txt"]
    (tmp_path / "there").mkdir()
    with held(tmp_path / "there"):
        pass
    assert (tmp_path / "there").is_dir()


def test_of_many_at_once_one_holds(tmp_path):
    """Ten threads take turns; each finds itself alone."""
    inside, most, done = [0], [0], []

    def work():
        while len(done) < 30:
            try:
                with held(tmp_path):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    time.sleep(0.001)
                    inside[0] -= 1
                    done.append(1)
            except FolderInUseError:
                time.sleep(0.001)

    threads = [threading.Thread(target=work) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_what_takes_a_held_folders_place_is_held(tmp_path):
    folder, lets_in = tmp_path / "run", []

    def try_it():
        with contextlib.suppress(FolderInUseError), held(folder):
            lets_in.append(sorted(path.name for path in folder.iterdir()))

    folder.mkdir()
    with held(folder):
        with replacing(folder) as new:
            with held(new):
                write_text(new / "a.txt", "a")
            keep_hold(folder, new)
        assert worker_of(folder)["pid"] == os.getpid()
        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join()
        assert lets_in == []
    assert [path.name for path in folder.iterdir()] == ["a.txt"]
    try_it()
    assert lets_in == [[HOLDER, LOCK, "a.txt"]]


def test_a_holder_that_was_never_all_there_is_nobody(tmp_path):
    write_text(tmp_path / HOLDER, "")
    assert worker_of(tmp_path) is None and not is_worked_on(tmp_path)
    with held(tmp_path):
        assert is_worked_on(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="locks of another kind")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EIO])
def test_a_file_system_without_locks_is_refused_and_left_as_it_was(number, tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a.txt").touch()
    for name in ("new", "there"):
        with (
            pytest.raises(FolderInUseError, match=f"{name}' cannot be locked .*choose a folder on another file system"),
            held(tmp_path / name),
        ):
            pytest.fail("it was let in")
    assert [path.name for path in tmp_path.iterdir()] == ["there"] and entries(tmp_path / "there") == ["a.txt"]
