"""Run folders: a job on disk, growing while it runs (`work_on`), or there when all is done (`run_job`).

`work_on_run` is what a process in the background does.

A folder holds the job (`job.json`), the log, a folder for each training (`training_<name>`, as `fit` keeps it), the
plan as soon as it is found (before that `pruning.json`, what the last pruning step left; `refused_plan.json` where its
proof failed), `original.safetensors` and `sparse.safetensors` where the job trained them; in the end `results.json`
(all figures, with hardware and versions), `history_<training>.csv`, one folder a pruned model as `models/store.py`
writes them, and `report.html` where it was asked for. What a run goes on from carries digests.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..files import (
    begun_beside,
    entries,
    environment,
    logging_to_file,
    read_json,
    remove_leftovers,
    replacing,
    write_json,
    write_text,
)
from ..holding import PROCESS, FolderInUseError, held, keep_hold
from ..models.store import load_pruned, save_pruned
from ..pruning.check import ProofError
from ..pruning.choices import TORCH_PRUNING
from ..scoring.tasks import evaluate
from ..training.folder import Stopped
from ..training.processes import agreed, processes
from .job import (
    COMPENSATED,
    MERGED,
    NAIVE,
    ORIGINAL,
    PLAN,
    PRUNED,
    PRUNING,
    REFUSED_PLAN,
    SPARSE,
    WEIGHTS,
    JobInputs,
    JobResult,
    PruningJob,
    find_device,
)
from .pipeline import TRAINING, Keeping, keep_refused, perform, prepare, said

logger = logging.getLogger(__name__)

FORMAT = 1
RESULTS, REPORT, JOB, RUN_LOG = "results.json", "report.html", "job.json", "run.log"
SAVED_MODELS = (PRUNED, COMPENSATED, NAIVE, MERGED)
TRAINED = (ORIGINAL, SPARSE, NAIVE, MERGED)
STOP, STOPPED, ERROR, OUTPUT = "stop", "stopped.json", "error.json", "output.log"
ENTRIES = {
    RESULTS,
    PLAN,
    PRUNING,
    REFUSED_PLAN,
    REPORT,
    *WEIGHTS.values(),
    *SAVED_MODELS,
    *(f"history_{key}.csv" for key in TRAINED),
}
ENTRIES |= {JOB, RUN_LOG, STOP, STOPPED, ERROR, PROCESS, OUTPUT, "run.slurm", *(f"{TRAINING}{key}" for key in TRAINED)}


class RunFolderError(ValueError):
    """A folder that a run must not be written to, or that holds none."""


def run_job(
    job: PruningJob, out: str | os.PathLike[str], *, overwrite: bool = False, progress: bool = True
) -> JobResult:
    """Do a job as :func:`work_on` does, in a folder that appears when all is done.

    After Ctrl-C, or where the process was killed, another call for the same job goes on from what is kept beside it.

    Args:
        job: What to do.
        out: The folder to make. It is refused when it holds anything.
        overwrite: Replace the run that the folder holds; anything but a run is refused all the same.
        progress: Show bars.

    Raises:
        ValueError: what :func:`work_on` raises; a folder in use.
        ProofError: the plan is wrong; it is kept beside the folder, which does not appear.
    """
    folder = Path(out).resolve()
    check_run_folder(folder, overwrite=overwrite)
    with held(folder):
        begun = begun_beside(folder)
        if not _is_begun(begun, job):
            remove_leftovers(folder.parent, of=folder.name)
        try:
            with replacing(folder, begun=begun) as new:
                result = work_on(job, new, progress=progress)
                keep_hold(folder, new)
            return result
        except ProofError as error:
            raise keep_refused(error, folder.with_name(f"{folder.name}.{REFUSED_PLAN}")) from error


def _is_begun(folder: Path, job: PruningJob) -> bool:
    """Say whether a folder holds the beginning of a job."""
    try:
        check_same_job(folder, job)
    except RunFolderError:
        return False
    return True


def work_on(
    job: PruningJob,
    folder: str | os.PathLike[str],
    *,
    stop: Callable[[], bool] = lambda: False,
    progress: bool = True,
) -> JobResult:
    """Do a job in its folder, where it may be watched, stopped and killed; go on with what an earlier call left there.

    Everything that may be wrong with the job or the folder is raised before work begins and anything is written. In
    the end, saved models are loaded again and compared, bit by bit.

    Args:
        job: What to do.
        folder: Where; made if need be. One that holds another job is refused.
        stop: Asked again and again; once it says True, what there is is kept and `Stopped` raised.
        progress: Show bars.

    Raises:
        Stopped: when ``stop`` said so.
        ValueError: what `prepare` and `perform` raise; a folder that holds something else.
    """
    folder, main = Path(folder).resolve(), processes().is_main
    if (folder / JOB).is_file():
        job = as_begun(folder, job)
        check_same_job(folder, job)
    else:
        check_run_folder(folder, overwrite=False)
    with agreed(find_device(job.device)):
        inputs = prepare(job)
    with ExitStack() as stack:
        with agreed(inputs.device):
            if main:
                stack.enter_context(_begun(folder, job))
        result = perform(inputs, progress=progress, keeping=Keeping(folder, stop))
        if main:
            _finish(result, inputs, folder, progress)
        logger.info("done")
    return result


@contextmanager
def _begun(folder: Path, job: PruningJob) -> Iterator[None]:
    """Hold a run's folder, with its job and its log in it."""
    with held(folder):
        remove_leftovers(folder)
        write_job(folder, job)
        with logging_to_file(folder / RUN_LOG):
            yield


def write_job(folder: Path, job: PruningJob) -> None:
    """Write the job of a run folder."""
    write_json(folder / JOB, job.to_dict(), checked=True)


def read_job(folder: str | os.PathLike[str]) -> PruningJob:
    """Read the job of a run folder; raise RunFolderError if it holds none."""
    try:
        return PruningJob.from_dict(read_json(Path(folder, JOB)))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunFolderError(f"'{folder}' holds no job: {error}") from error


def check_same_job(folder: Path, job: PruningJob) -> None:
    """Raise RunFolderError unless a run folder holds this very job."""
    there, here = read_job(folder).to_dict(), job.to_dict()
    keys = [key for key in here | there if there.get(key) != here.get(key)]
    if other := [f"{key} was {there.get(key)!r}, is {here.get(key)!r}" for key in keys]:
        raise RunFolderError(f"'{folder}' holds another job: {', '.join(other)}; choose another folder")


def as_begun(folder: Path, job: PruningJob) -> PruningJob:
    """Return a job as the run in a folder goes on with it: in torch_pruning's count, where it was begun in none."""
    begun = read_json(folder / JOB, "target")["target"]
    return job if "counting" in begun else replace(job, target=replace(job.target, counting=TORCH_PRUNING))


def check_run_folder(folder: Path, *, overwrite: bool) -> None:
    """Raise RunFolderError unless a run may be written to a folder: free, or holding a run that may be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"'{folder}' is a file, not a folder")
    found = entries(folder)
    strangers = found if not {RESULTS, JOB} & {*found} else sorted({*found} - ENTRIES)
    if strangers:
        raise RunFolderError(f"'{folder}' holds something else than a run ({strangers[0]}): choose another folder")
    if found and not overwrite:
        raise RunFolderError(f"'{folder}' already holds a run: choose another folder, or overwrite it (--overwrite)")


def read_results(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the results of a run; raise RunFolderError if the folder holds none."""
    path = Path(folder, RESULTS)
    try:
        results = read_json(path)
    except (OSError, ValueError) as error:
        raise RunFolderError(f"'{folder}' holds no run: {error}") from error
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        raise RunFolderError(f"'{path}' is not of format {FORMAT}, the one that this version reads")
    return results


def _finish(result: JobResult, inputs: JobInputs, folder: Path, progress: bool) -> None:
    """Add histories as tables, the pruned models and all figures to what a job has left in its folder."""
    logger.info("saving, loading again and comparing")
    for key, history in result.histories.items():
        write_text(folder / f"history_{key}.csv", history.to_frame().to_csv(index=False))
    saved = [key for key in SAVED_MODELS if key in result.models]
    reloaded = {key: _save_and_reload(result, key, inputs, folder, progress) for key in saved}
    write_json(folder / RESULTS, _results(result, inputs, reloaded), checked=True)


def _save_and_reload(result: JobResult, key: str, inputs: JobInputs, folder: Path, progress: bool) -> dict[str, Any]:
    """Save a model, load it again and evaluate what was loaded; raise RunFolderError if it is not the same network."""
    model = result.models[key]
    save_pruned(folder / key, model, result.plan, source=inputs.source, overwrite=True)
    own = {} if inputs.source else {"model": inputs.model}
    loaded = load_pruned(folder / key, **own).to(inputs.device)
    batch = next(iter(inputs.held_out_batches()))
    pairs = zip(said(loaded, batch, inputs.task), said(model, batch, inputs.task), strict=True)
    if not all(torch.equal(one, other) for one, other in pairs):
        raise RunFolderError(f"the {key} model computes other logits after saving and loading")
    metrics = evaluate(loaded, inputs.held_out_batches(), task=inputs.task, progress=progress)
    return asdict(metrics) | {"bit_equal_logits": True}


def _results(result: JobResult, inputs: JobInputs, reloaded: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    data, plan = inputs.data, result.plan
    return {
        "format": FORMAT,
        "job": result.job.to_dict(),
        "data": {"train_images": len(data.train), "held_out_images": len(data.val), "classes": len(data.classes)},
        "plan": {"channels": plan.channels, "channels_removed": plan.channels_removed},
        "models": {
            key: asdict(measured) | {"median_latency_ms": measured.latency.median_ms}
            for key, measured in result.measured.items()
        },
        "reloaded": reloaded,
        "equivalence": asdict(result.equivalence) if result.equivalence else None,
        "histories": {key: history.to_frame().to_dict("records") for key, history in result.histories.items()},
        "seconds": dict(result.seconds),
        "speeds": None if result.speeds is None else result.speeds.to_dict("records"),
        "environment": environment(inputs.device),
    }


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
