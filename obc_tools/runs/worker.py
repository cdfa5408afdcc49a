"""Processes in the background: starting one, telling whether it lives, and what one does that works on a run."""

from __future__ import annotations

import math
import os
import platform
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from ..files import read_json, write_json
from ..training.folder import Stopped
from ..training.processes import processes
from .folder import ERROR, PROCESS, STOP, STOPPED, read_job, work_on

BETWEEN_LOOKS = 0.2

# Held on to, so that those that have ended can be asked for their status and vanish.
_CHILDREN: list[subprocess.Popen] = []


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


def is_worked_on(folder: Path) -> bool:
    """Say whether the process that a folder names runs on this machine."""
    path = folder / PROCESS
    return path.is_file() and is_alive(read_json(path))


def wait_while(goes_on: Callable[[], bool], timeout: float | None, complaint: str) -> None:
    """Wait until something has ended; raise TimeoutError with the complaint if it still goes on after so many s."""
    end = time.monotonic() + (math.inf if timeout is None else timeout)
    while goes_on():
        if time.monotonic() > end:
            raise TimeoutError(f"{complaint} after {timeout:g} s")
        time.sleep(BETWEEN_LOOKS)


def work_on_run(folder: Path) -> int:
    """Work on the job of a run folder; return the exit status: 0 done or stopped, 1 failed.

    ``stop`` in the folder, or SIGTERM (which schedulers send before they kill), ends the work with a checkpoint.
    """
    signal.signal(signal.SIGTERM, lambda *_: (folder / STOP).touch())
    # Launched from here, the folder already names the process, a launcher's where there are several.
    if processes().is_main and not is_worked_on(folder):
        write_json(folder / PROCESS, process_identity(os.getpid()))
    try:
        work_on(read_job(folder), folder, stop=(folder / STOP).exists, progress=False)
    except Stopped as stopped:
        _note(folder / STOPPED, {"why": str(stopped)})
    except Exception as error:
        _note(folder / ERROR, {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()})
        traceback.print_exc()
        return 1
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def _note(path: Path, content: dict[str, Any]) -> None:
    if processes().is_main:
        write_json(path, content | {"time": time.time()})
