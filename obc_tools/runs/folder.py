"""Run folders: a job's outcome on disk, complete or not there at all (`run_job`), or growing while it runs (`work_on`).

A folder holds `results.json` (all figures, with hardware and versions), `plan.json`, `history_<training>.csv`, one
folder a pruned model as `models/store.py` writes them, `original.safetensors` and `sparse.safetensors` where the job
trained them, and `report.html`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import nn

from ..files import environment, logging_to_file, write_text
from ..measure.metrics import evaluate
from ..models.store import load_pruned, replacing, save_pruned
from ..pruning.choices import TORCH_PRUNING
from ..state import evaluating
from ..training.folder import write_json
from ..training.processes import processes
from .job import MERGED, NAIVE, ORIGINAL, PLAN, PRUNED, SPARSE, WEIGHTS, JobInputs, JobResult, Measured, PruningJob
from .pipeline import TRAINING, Keeping, perform, prepare

logger = logging.getLogger(__name__)

FORMAT = 1
RESULTS, REPORT, JOB, RUN_LOG = "results.json", "report.html", "job.json", "run.log"
SAVED_MODELS = (PRUNED, NAIVE, MERGED)
TRAINED = (ORIGINAL, SPARSE, NAIVE, MERGED)
STOP, STOPPED, ERROR, PROCESS, OUTPUT = "stop", "stopped.json", "error.json", "process.json", "output.log"
ENTRIES = {RESULTS, PLAN, REPORT, *WEIGHTS.values(), *SAVED_MODELS, *(f"history_{key}.csv" for key in TRAINED)}
ENTRIES |= {JOB, RUN_LOG, STOP, STOPPED, ERROR, PROCESS, OUTPUT, "run.slurm", *(f"{TRAINING}{key}" for key in TRAINED)}


class RunFolderError(ValueError):
    """A folder that a run must not be written to, or that holds none."""


def run_job(
    job: PruningJob, out: str | os.PathLike[str], *, overwrite: bool = False, progress: bool = True
) -> JobResult:
    """Do a job and keep its outcome in a folder.

    Everything that may be wrong with the job or the folder is raised before work begins; the folder appears when all
    is done. Saved models are loaded again and compared, bit by bit.

    Args:
        job: What to do.
        out: The folder to make. It is refused when it holds anything.
        overwrite: Replace the run that the folder holds; anything but a run is refused all the same.
        progress: Show bars.

    Raises:
        ValueError: what `prepare` and `perform` raise; a folder in use.
    """
    folder = Path(out).resolve()
    check_run_folder(folder, overwrite=overwrite)
    inputs = prepare(job)
    with replacing(folder) as new:
        result = perform(inputs, progress=progress)
        _write(result, inputs, new, progress)
    return result


def work_on(
    job: PruningJob,
    folder: str | os.PathLike[str],
    *,
    stop: Callable[[], bool] = lambda: False,
    progress: bool = True,
) -> JobResult:
    """Do a job in its folder, where it may be watched, stopped and killed; go on with what an earlier call left there.

    The folder holds the job (``job.json``), the log, a folder for each training (``training_<name>``, as `fit` keeps
    it), the plan as soon as it is found, and in the end everything that :func:`run_job` writes.

    Args:
        job: What to do.
        folder: Where; made if need be. One that holds another job is refused.
        stop: Asked again and again; once it says True, what there is is kept and `Stopped` raised.
        progress: Show bars.

    Raises:
        Stopped: when ``stop`` said so.
        ValueError: what `prepare` and `perform` raise; a folder that holds something else.
    """
    folder = Path(folder).resolve()
    known = read_job(folder) if (folder / JOB).is_file() else None
    job = as_begun(folder, job) if known is not None else job
    if known is not None and known != job:
        raise RunFolderError(f"'{folder}' holds another job: {_difference(known, job)}; choose another folder")
    if known is None:
        check_run_folder(folder, overwrite=False)
    if processes().is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / JOB, job.to_dict())
    with logging_to_file(folder / RUN_LOG) if processes().is_main else nullcontext():
        inputs = prepare(job)
        result = perform(inputs, progress=progress, keeping=Keeping(folder, stop))
        if processes().is_main:
            _write(result, inputs, folder, progress)
        logger.info("done")
    return result


def read_job(folder: str | os.PathLike[str]) -> PruningJob:
    """Read the job of a run folder; raise RunFolderError if it holds none."""
    path = Path(folder) / JOB
    try:
        return PruningJob.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunFolderError(f"'{folder}' holds no job: {error}") from error


def as_begun(folder: Path, job: PruningJob) -> PruningJob:
    """Return a job as the run in a folder goes on with it: in torch_pruning's count, where it was begun in none."""
    begun = json.loads((folder / JOB).read_text(encoding="utf-8"))["target"]
    return job if "counting" in begun else replace(job, target=replace(job.target, counting=TORCH_PRUNING))


def _difference(known: PruningJob, job: PruningJob) -> str:
    there, here = known.to_dict(), job.to_dict()
    return ", ".join(f"{key} was {there[key]!r}, is {here[key]!r}" for key in here if there[key] != here[key])


def check_run_folder(folder: Path, *, overwrite: bool) -> None:
    """Raise RunFolderError unless a run may be written to a folder: free, or holding a run that may be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"'{folder}' is a file, not a folder")
    found = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    if not found:
        return
    if RESULTS not in found or (others := sorted(set(found) - ENTRIES)):
        stranger = found[0] if RESULTS not in found else others[0]
        raise RunFolderError(f"'{folder}' holds something else than a run ({stranger}): choose another folder")
    if not overwrite:
        raise RunFolderError(f"'{folder}' already holds a run: choose another folder, or overwrite it (--overwrite)")


def read_results(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the results of a run; raise RunFolderError if the folder holds none."""
    path = Path(folder) / RESULTS
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunFolderError(f"'{folder}' holds no run: {error}") from error
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        raise RunFolderError(f"'{path}' is not of format {FORMAT}, the one that this version reads")
    return results


def _write(result: JobResult, inputs: JobInputs, folder: Path, progress: bool) -> None:
    logger.info("saving, loading again and comparing")
    write_text(folder / PLAN, result.plan.to_json())
    for key, history in result.histories.items():
        history.to_frame().to_csv(folder / f"history_{key}.csv", index=False)
    for key, name in WEIGHTS.items():
        if key in result.histories:
            save_model(result.models[key], str(folder / name))
    saved = [key for key in SAVED_MODELS if key in result.models]
    reloaded = {key: _save_and_reload(result, key, inputs, folder, progress) for key in saved}
    write_json(folder / RESULTS, _results(result, inputs, reloaded))


def _save_and_reload(result: JobResult, key: str, inputs: JobInputs, folder: Path, progress: bool) -> dict[str, Any]:
    """Save a model, load it again and evaluate what was loaded; raise RunFolderError if it is not the same network."""
    model = result.models[key]
    save_pruned(folder / key, model, result.plan, source=inputs.source, overwrite=True)
    loaded = load_pruned(folder / key).to(inputs.device)
    images, _ = next(iter(inputs.held_out_batches()))
    if not _same_logits(loaded, model, images):
        raise RunFolderError(f"the {key} model computes other logits after saving and loading")
    metrics = evaluate(loaded, inputs.held_out_batches(), progress=progress)
    return asdict(metrics) | {"bit_equal_logits": True}


def _same_logits(one: nn.Module, other: nn.Module, images: torch.Tensor) -> bool:
    with torch.no_grad(), evaluating(one), evaluating(other):
        return torch.equal(one(images), other(images))


def _figures(measured: Measured) -> dict[str, Any]:
    return asdict(measured) | {"median_latency_ms": measured.latency.median_ms}


def _results(result: JobResult, inputs: JobInputs, reloaded: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    data, plan = inputs.data, result.plan
    return {
        "format": FORMAT,
        "job": result.job.to_dict(),
        "data": {"train_images": len(data.train), "held_out_images": len(data.val), "classes": len(data.classes)},
        "plan": {"channels": plan.channels, "channels_removed": plan.channels_removed},
        "models": {key: _figures(measured) for key, measured in result.measured.items()},
        "reloaded": reloaded,
        "equivalence": asdict(result.equivalence) if result.equivalence else None,
        "histories": {key: history.to_frame().to_dict("records") for key, history in result.histories.items()},
        "seconds": dict(result.seconds),
        "environment": environment(inputs.device),
    }
