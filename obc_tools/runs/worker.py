"""The processes that work on what was launched: a run (its ``job.json`` says what to do), or a grid."""

from __future__ import annotations

import json
import os
import signal
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from ..files import write_json
from ..training.folder import Stopped
from ..training.processes import processes
from .folder import ERROR, PROCESS, STOP, STOPPED, read_job, work_on
from .run import is_alive, process_identity


def work_on_run(folder: Path) -> int:
    """Work on the job of a run folder; return the exit status: 0 done or stopped, 1 failed.

    ``stop`` in the folder, or SIGTERM (which schedulers send before they kill), ends the work with a checkpoint.
    """
    own = processes()

    def stop(signal_number: int, frame: FrameType | None) -> None:
        (folder / STOP).touch()

    signal.signal(signal.SIGTERM, stop)
    # Launched from here, the folder already names the process, a launcher's where there are several.
    if own.is_main and not _is_known(folder):
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


def _is_known(folder: Path) -> bool:
    path = folder / PROCESS
    return path.is_file() and is_alive(json.loads(path.read_text(encoding="utf-8")))


def _note(path: Path, content: dict[str, Any]) -> None:
    if processes().is_main:
        write_json(path, content | {"time": time.time()})
