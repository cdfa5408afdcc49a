"""What a process does that works on a run, in the background or not, and waiting for one."""

from __future__ import annotations

import math
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ..files import write_json
from ..holding import FolderInUseError
from ..training.folder import Stopped
from ..training.processes import processes
from .folder import ERROR, JOB, STOP, STOPPED, read_job, work_on

BETWEEN_LOOKS = 0.2


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
    try:
        with outcome_noted(folder):
            work_on(read_job(folder), folder, stop=(folder / STOP).exists, progress=False)
    except Stopped:
        pass
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


@contextmanager
def outcome_noted(folder: Path) -> Iterator[None]:
    """Leave a word in a run's folder when work on it is stopped or fails; whoever else works on it is left alone."""
    try:
        yield
    except FolderInUseError:
        raise
    except Stopped as stopped:
        _note(folder / STOPPED, {"why": str(stopped)})
        raise
    except Exception as error:
        _note(folder / ERROR, {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()})
        raise


def forget_outcome(folder: Path) -> None:
    """Take back, before work on a run begins anew, how it ended before and the wish that it stop."""
    for name in (STOP, STOPPED, ERROR):
        (folder / name).unlink(missing_ok=True)


def _note(path: Path, content: dict[str, Any]) -> None:
    if processes().is_main and (path.parent / JOB).is_file():
        # A disk that is full takes no note either; the error that it is about says more.
        with suppress(OSError):
            write_json(path, content | {"time": time.time()})
