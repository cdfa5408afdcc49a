"""Processes in the background: starting one that outlives this one, and telling whether it is still there."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

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
