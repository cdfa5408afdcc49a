"""Who works on a folder: a process is told from all others, and one at a time holds a folder."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from .files import HOLDER, LOCK, entries, put_back, read_json, write_json

PROCESS = "process.json"
"""Names the process that a folder was handed to when that was started."""

# Held on to, so that those that have ended can be asked for their status and vanish.
_CHILDREN: list[subprocess.Popen] = []


class FolderInUseError(ValueError):
    """A folder that somebody else works on."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder, made if need be: nobody else can until the block or, however it ends, this process has ended.

    A folder that was made for it and in which nothing came to lie is gone afterwards.

    Raises:
        FolderInUseError: while another process, or another thread of this one, holds it.
    """
    put_back(folder)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise FolderInUseError(f"'{folder}' is being worked on{_by_whom(folder)}: wait for it, or stop it") from None
    except (OSError, NotImplementedError) as error:
        if made and not entries(folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise FolderInUseError(
            f"'{folder}' cannot be locked ({error}): nothing would keep a second process out; choose a folder on "
            "another file system"
        ) from error
    try:
        write_json(folder / HOLDER, process_identity(os.getpid()), synced=False)
        yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        if made and not entries(folder):
            shutil.rmtree(folder, ignore_errors=True)
        if os.name == "posix":  # who waits for a file that is gone by then looks for another
            (folder / LOCK).unlink(missing_ok=True)
        lock.release()


def keep_hold(folder: Path, new: Path) -> None:
    """Have what is about to take a held folder's place be held by the same lock; nothing without hard links."""
    for name in (LOCK, HOLDER):
        (new / name).unlink(missing_ok=True)
        with suppress(OSError):
            os.link(folder / name, new / name)


def _by_whom(folder: Path) -> str:
    identity = _identity(folder / HOLDER)
    return "" if identity is None else f" by process {identity['pid']} on '{identity['host']}'"


def _identity(path: Path) -> dict[str, Any] | None:
    """Return who is named in a file; None where there is none, any more, or where a holder's was never all there."""
    try:
        return read_json(path)
    except FileNotFoundError:
        return None
    except ValueError:
        if path.name == HOLDER:  # not synced: the machine stopped before it lay on the disk
            return None
        raise


def worker_of(folder: Path) -> dict[str, Any] | None:
    """Return the identity of who holds a folder or, else, of the process that it was handed to; None if of neither."""
    named = (_identity(folder / name) for name in (HOLDER, PROCESS))
    return next(filter(None, named), None)


def is_worked_on(folder: Path) -> bool:
    """Say whether the process that a folder names runs on this machine."""
    named = (_identity(folder / name) for name in (HOLDER, PROCESS))
    return any(map(is_alive, filter(None, named)))


def start(command: Sequence[str], output: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """Start a command in a session of its own, what it prints appended to a file; return the process's identity."""
    with output.open("ab") as file:
        child = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=dict(environment),
            start_new_session=True,
        )
    _CHILDREN.append(child)
    return process_identity(child.pid)


def process_identity(pid: int) -> dict[str, Any]:
    """Return what tells a process of this machine from all others, also from later ones of the same number."""
    return {"pid": pid, "created": psutil.Process(pid).create_time(), "host": platform.node()}


def is_alive(identity: Mapping[str, Any]) -> bool:
    """Say whether the process of an identity runs on this machine."""
    _CHILDREN[:] = [child for child in _CHILDREN if child.poll() is None]
    if identity["host"] != platform.node():
        return False
    try:
        process = psutil.Process(identity["pid"])
        # Clocks that are set while a process runs move its time of creation a little.
        same = abs(process.create_time() - identity["created"]) < 2
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
