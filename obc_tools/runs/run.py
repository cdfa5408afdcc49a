"""Run an experiment here, launch it in the background or by SLURM, and watch, stop and resume it from anywhere.

And the paper's tables from many runs: means over seeds, beside what the paper reports.

A launched run is a process of its own that lives on when a notebook's kernel ends or its browser closes. All that
anybody needs to know about it is in its folder.
"""

from __future__ import annotations

import html
import logging
import math
import os
import platform
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from .. import files
from ..errors import check_whole
from ..scoring.tasks import CLASSIFICATION
from ..training.folder import PROGRESS, History, Stopped, read_history
from ..training.processes import processes
from . import job as jobs
from .experiments import Experiment, get_experiment
from .job import PruningJob, RunFolderError
from .pipeline import work_on

logger = logging.getLogger(__name__)


BETWEEN_LOOKS = 0.2
STILL_RUNNING = 600.0
"""Seconds after its last sign of life in which a run on another machine counts as running."""

SELECTIONS = {"last": "test {}", "best_on_test": "test {} (best epoch, picked on test)"}
"""What `Run.table` calls the headline, by the epoch that it is of."""


def wait_while(goes_on: Callable[[], bool], timeout: float | None, complaint: str) -> None:
    """Wait until something has ended; raise TimeoutError with the complaint if it still goes on after so many s."""
    end = time.monotonic() + (math.inf if timeout is None else timeout)
    while goes_on():
        if time.monotonic() > end:
            raise TimeoutError(f"{complaint} after {timeout:g} s")
        time.sleep(BETWEEN_LOOKS)


@dataclass(frozen=True, repr=False)
class Run:
    """A run and its folder: what it does, how far it is, what came out."""

    folder: Path

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Run:
        """Attach to a run by its folder, from any process; raise RunFolderError where there is none."""
        jobs.read_job(folder)
        return cls(Path(folder).resolve())

    @property
    def job(self) -> PruningJob:
        """What the run does."""
        return jobs.read_job(self.folder)

    @property
    def status(self) -> str:
        """ "finished", "running", "failed", "stopped" (with a checkpoint), or "interrupted" (killed)."""
        if (self.folder / jobs.RESULTS).is_file():
            return "finished"
        if self._is_running():
            return "running"
        if (self.folder / jobs.ERROR).is_file():
            return "failed"
        return "stopped" if (self.folder / jobs.STOPPED).is_file() else "interrupted"

    @property
    def histories(self) -> dict[str, History]:
        """The trainings so far, by the models of `TITLES`."""
        found = {key: read_history(self.folder / f"{jobs.TRAINING}{key}") for key in jobs.TRAINED}
        return {key: history for key, history in found.items() if history is not None}

    @property
    def error(self) -> str | None:
        """What a failed run failed of."""
        path = self.folder / jobs.ERROR
        return files.read_json(path, "error")["error"] if path.is_file() else None

    @property
    def results(self) -> dict[str, Any]:
        """All figures of a finished run; raises RunFolderError before."""
        return jobs.read_results(self.folder)

    def log(self, lines: int = 20) -> str:
        """Return the last lines of the log."""
        path = self.folder / jobs.RUN_LOG
        return "\n".join(path.read_text("utf-8", "replace").splitlines()[-lines:]) if path.is_file() else ""

    def table(self, select: str = "last") -> pd.DataFrame:
        """Return one row a model of a finished run: its metrics, the headline first, its cost.

        Args:
            select: Which epoch's accuracy, or headline of another task: "last", or "best_on_test", as published: the
                epoch was then picked by the very images it is reported on, which overstates it, and the column says so.
        """
        if select not in SELECTIONS:
            raise ValueError(f"unknown select {select!r}; known are {', '.join(map(repr, SELECTIONS))}")
        results = self.results
        whole = results["models"]["original"]["cost"]["macs"]
        rows = []
        for key, found in results["models"].items():
            metrics = found["metrics"]
            values = metrics.get("values") or {name: metrics[name] for name in ("accuracy", "loss")}
            (headline, value), *others = values.items()
            if select == "best_on_test" and key in results["histories"]:
                better = min if metrics.get("directions", {}).get(headline) == "lower" else max
                value = better(row[f"val_{headline}"] for row in results["histories"][key])
            cost = found["cost"]
            row = {"model": jobs.TITLES[key], SELECTIONS[select].format(headline): value}
            row |= {f"test {name}": other for name, other in others}
            rows.append(row | {"MACs": cost["macs"], "speed-up": whole / cost["macs"], "parameters": cost["params"]})
        return pd.DataFrame(rows)

    def stop(self, timeout: float = 120.0) -> str:
        """Ask the run to end with a checkpoint, wait until it has, and return its status.

        Raises:
            TimeoutError: if it still runs then; it will stop at its next step.
        """
        if self.status == "running":
            (self.folder / jobs.STOP).touch()
        return self.wait(timeout)

    def resume(self, **options: Any) -> Run:
        """Launch the run again, to go on from its last checkpoint. Options are those of :func:`launch`."""
        return launch(self.job, self.folder, resume=True, **options)

    def wait(self, timeout: float | None = None) -> str:
        """Wait until the run has ended; return its status. Raises TimeoutError if it still runs after ``timeout`` s."""
        wait_while(lambda: self.status == "running", timeout, f"'{self.folder}' still runs")
        return self.status

    def follow(self) -> str:
        """Show the run's progress until it has ended; return its status. Interrupting this leaves the run alone."""
        with tqdm(unit="step", desc=self.job.title) as bar:
            while self.status == "running":
                self._show(bar)
                time.sleep(BETWEEN_LOOKS)
            self._show(bar)
        return self.status

    def progress(self) -> tuple[str, dict[str, Any]] | None:
        """Return the training under way and where it is; None before any.

        That is epoch, step, steps (of an epoch), epochs, lr and time, and of the epoch so far: loss, accuracy,
        images_per_second and gpu_memory (the most bytes on a GPU), null where there are none.
        """
        notes = {key: self.folder / f"{jobs.TRAINING}{key}" / PROGRESS for key in jobs.TRAINED}
        there = {key: files.read_json(path, "time") for key, path in notes.items() if path.is_file()}
        return max(there.items(), key=lambda entry: entry[1]["time"], default=None)

    def __repr__(self) -> str:
        lines = [f"Run('{self.folder}'): {self.job.title}, {self.status}"]
        lines += [f"  {jobs.TITLES[key]}: {history.last}" for key, history in self.histories.items()]
        return "\n".join([*lines, *([f"  {self.error}"] if self.status == "failed" else [])])

    def _repr_html_(self) -> str:
        lines = "<br>".join(html.escape(line) for line in repr(self).splitlines())
        if self.status != "finished":
            return lines
        directions = self.results["models"][jobs.ORIGINAL]["metrics"].get("directions", {})
        return f"{lines}{jobs.as_text(self.table(), directions).to_html(index=False)}"

    def _show(self, bar: tqdm) -> None:
        found = self.progress()
        if found is None:
            return
        key, place = found
        bar.total = place["steps"] * place["epochs"]
        bar.n = place["steps"] * (place["epoch"] - 1) + place["step"]
        bar.set_description(f"{jobs.TITLES[key]}, epoch {place['epoch']} of {place['epochs']}")

    def _is_running(self) -> bool:
        worker = files.worker_of(self.folder)
        if worker is None or worker["host"] == platform.node():
            return files.is_worked_on(self.folder)
        ended = (self.folder / jobs.ERROR).is_file() or (self.folder / jobs.STOPPED).is_file()
        signs = [path.stat().st_mtime for path in self.folder.rglob("*.json*") if not files.is_leftover(path)]
        return not ended and time.time() - max(signs) < STILL_RUNNING


def run_experiment(
    experiment: str | Experiment | PruningJob,
    folder: str | os.PathLike[str],
    *,
    small: bool = False,
    progress: bool = True,
    **options: Any,
) -> Run:
    """Do an experiment in this process, and go on with what its folder already holds.

    Args:
        experiment: One of `EXPERIMENTS`, its name, or a job.
        folder: The run's folder.
        small: The small size, which says that everything runs and nothing more.
        progress: Show bars.
        **options: Of `Experiment.job`, such as ``target``, ``seed``, ``weights``, ``root``.

    Raises:
        Stopped: when it was asked to stop, as :meth:`Run.stop` does from anywhere.
        ValueError: for an unknown experiment, and what `work_on` raises.
    """
    job, path = job_of(experiment, small=small, **options), Path(folder).resolve()
    if not (path / jobs.JOB).is_file():
        jobs.check_run_folder(path, overwrite=False)
    if not files.is_worked_on(path):
        forget_outcome(path)
    with outcome_noted(path):
        work_on(job, path, stop=(path / jobs.STOP).exists, progress=progress)
    return Run(path)


def launch(
    experiment: str | Experiment | PruningJob,
    folder: str | os.PathLike[str],
    *,
    processes: int | None = None,
    devices: Sequence[int] | str | None = None,
    resume: bool = False,
    small: bool = False,
    **options: Any,
) -> Run:
    """Start an experiment in the background and return at once.

    Args:
        experiment: One of `EXPERIMENTS`, its name, or a job.
        folder: The run's folder; made if need be.
        processes: How many train together, on this machine. None: one a device.
        devices: Numbers of the GPUs to use, or "cpu". None: whatever torch finds, one of them.
        resume: Go on with what the folder holds; without it, a folder in use is refused.
        small: The small size.
        **options: Of `Experiment.job`.

    Raises:
        ValueError: for a folder in use, a run that is under way, and processes that devices do not suffice for.
    """
    job, path = job_of(experiment, small=small, **options), Path(folder).resolve()
    if processes is not None:
        check_whole("processes", processes, 1)
    if isinstance(devices, str) and devices != "cpu":
        raise ValueError(f"devices={devices!r}: expected numbers of GPUs, or 'cpu'")
    count = processes or (len(devices) if devices and devices != "cpu" else 1)
    if devices is not None and devices != "cpu" and count > len(devices):
        raise ValueError(f"{count} processes on {len(devices)} devices: one a device")
    if (path / jobs.JOB).is_file():
        job = jobs.as_begun(path, job)
        if (status := Run(path).status) == "running":
            raise RunFolderError(f"'{path}' is being worked on: stop that run first, or choose another folder")
        if not resume:
            raise RunFolderError(f"'{path}' holds a run ({status}): pass resume=True or choose another folder")
        jobs.check_same_job(path, job)
    else:
        jobs.check_run_folder(path, overwrite=False)
    path.mkdir(parents=True, exist_ok=True)
    forget_outcome(path)
    jobs.write_job(path, job)
    visible = "" if devices == "cpu" else ",".join(map(str, devices or ()))
    environment = {} if devices is None else {"CUDA_VISIBLE_DEVICES": visible}
    identity = files.start(command(path, count), path / jobs.OUTPUT, os.environ | environment)
    files.write_json(path / files.PROCESS, identity | {"devices": devices})
    logger.info("launched '%s' in %d process(es), pid %d", path, count, identity["pid"])
    return Run(path)


def work_on_run(folder: Path) -> int:
    """Work on the job of a run folder; return the exit status: 0 done or stopped, 1 failed.

    ``stop`` in the folder, or SIGTERM (which schedulers send before they kill), ends the work with a checkpoint.
    """
    signal.signal(signal.SIGTERM, lambda *_: (folder / jobs.STOP).touch())
    try:
        with outcome_noted(folder):
            work_on(jobs.read_job(folder), folder, stop=(folder / jobs.STOP).exists, progress=False)
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
    except files.FolderInUseError:
        raise
    except Stopped as stopped:
        _note(folder / jobs.STOPPED, {"why": str(stopped)})
        raise
    except Exception as error:
        _note(folder / jobs.ERROR, {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()})
        raise


def forget_outcome(folder: Path) -> None:
    """Take back, before work on a run begins anew, how it ended before and the wish that it stop."""
    for name in (jobs.STOP, jobs.STOPPED, jobs.ERROR):
        (folder / name).unlink(missing_ok=True)


def _note(path: Path, content: dict[str, Any]) -> None:
    if processes().is_main and (path.parent / jobs.JOB).is_file():
        # A disk that is full takes no note either; the error that it is about says more.
        with suppress(OSError):
            files.write_json(path, content | {"time": time.time()})


def command(folder: Path, processes: int) -> list[str]:
    """Return the command that works on a run folder in so many processes of this machine."""
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *(together if processes > 1 else ()), "-m", "obc_tools.worker", str(folder)]


def job_of(experiment: str | Experiment | PruningJob, *, small: bool = False, **options: Any) -> PruningJob:
    """Return the job that an experiment, its name, or a job stands for."""
    if isinstance(experiment, PruningJob):
        if small or options:
            raise ValueError(f"a job is complete: {', '.join(['small', *options])} belong to an experiment")
        return experiment
    found = experiment if isinstance(experiment, Experiment) else get_experiment(experiment)
    return found.small(**options) if small else found.job(**options)


SCRIPT = "run.slurm"
"""A run's script for sbatch; beside this module lies what it is made of."""


def write_slurm_script(
    experiment: str | Experiment | PruningJob,
    folder: str | os.PathLike[str],
    *,
    nodes: int = 1,
    gpus: int = 4,
    cpus: int = 32,
    time: str = "24:00:00",
    port: int = 29500,
    small: bool = False,
    **options: object,
) -> Path:
    """Write a run folder with its job and a script for sbatch; return the script's path.

    Args:
        experiment, small, **options: As of `launch`.
        folder: The run's folder, on a disk that all nodes share.
        nodes, gpus, cpus: Nodes, GPUs a node, CPUs a node.
        time: Longest duration, as SLURM writes it; two minutes before its end the run saves a checkpoint and stops.
        port: Where the nodes find each other, on the first of them.

    Raises:
        ValueError: for a folder in use, counts below 1, and what the experiment raises.
    """
    if min(nodes, gpus, cpus) < 1:
        raise ValueError(f"nodes={nodes}, gpus={gpus}, cpus={cpus}: at least 1 each")
    job, path = job_of(experiment, small=small, **options), Path(folder).resolve()
    jobs.check_run_folder(path, overwrite=False)
    jobs.write_job(path, job)
    values = {"name": path.name, "nodes": nodes, "gpus": gpus, "cpus": cpus, "time": time, "port": port}
    template = Path(__file__).with_name(SCRIPT).read_text(encoding="utf-8")
    text = template.format(**values, folder=shlex.quote(str(path)), python=shlex.quote(sys.executable))
    files.write_text(path / SCRIPT, text)
    return path / SCRIPT


KEYS = ["experiment", "target", "criterion", "reduction", "normalizer", "method"]
METHODS = {jobs.NAIVE: "naive", jobs.MERGED: "EP"}


def find_runs(folder: str | os.PathLike[str]) -> list[Run]:
    """Return the runs in a folder, grids' among them, by name; raise ValueError where there is no folder.

    Those that cannot be read, damaged or of a newer version, are left out, and the log names them.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"'{folder}' is no folder")
    runs = []
    for path in sorted(Path(folder).rglob(jobs.JOB)):
        with _leaving_out():
            runs.append(Run.open(path.parent))
    return runs


@contextmanager
def _leaving_out() -> Iterator[None]:
    """Go on where the folder of a run is damaged, and say so in the log."""
    try:
        yield
    except RunFolderError as error:
        logger.warning("left out: %s", error)


def results_table(
    runs: Iterable[Run] | str | os.PathLike[str],
    *,
    select: str = "last",
    paper: str | os.PathLike[str] | None = None,
) -> pd.DataFrame:
    """Return one row for each thing that finished runs repeat over seeds.

    Args:
        runs: Runs, or a folder that holds them; those that have not finished, or that are no
            classifiers', are left out.
        select: Which epoch's accuracy, as of `Run.table`.
        paper: A file like ``results/paper/table9_vgg19_cifar100.csv``, whose figures to show beside.

    Returns:
        Experiment, target, criterion, reduction, normalizer and method; the accuracy in %, mean and standard deviation
        over ``n`` seeds (the column names say of which epoch); the accuracy of the original; the speed-up.

    Raises:
        ValueError: for an unknown ``select``, and where no run has finished.
    """
    found = find_runs(runs) if isinstance(runs, str | os.PathLike) else list(runs)
    rows = []
    for run in found:
        with _leaving_out():
            rows += [*_rows(run, select)] if run.status == "finished" else []
    if not rows:
        raise ValueError(f"none of {len(found)} runs has finished with a fine-tuned classifier")
    grouped = pd.DataFrame(rows).groupby(KEYS, sort=False, dropna=False)
    name = SELECTIONS[select].format("accuracy")
    table = grouped.agg(
        **{
            f"{name} (%)": ("accuracy", "mean"),
            "standard deviation": ("accuracy", "std"),
            "n": ("accuracy", "size"),
            "original (%)": ("original", "mean"),
            "speed-up": ("speed-up", "mean"),
        }
    ).reset_index()
    return table if paper is None else table.merge(_paper_rows(paper), on=KEYS, how="left")


def _rows(run: Run, select: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each fine-tuned network of a run; none where it is no classifier."""
    job = run.job
    if job.task != CLASSIFICATION.name:
        return
    table = run.table(select).set_index("model")
    name = SELECTIONS[select].format("accuracy")
    for key, method in METHODS.items():
        if jobs.TITLES[key] not in table.index:
            continue
        method += ", compensated start" * job.compensate
        values = (job.title, str(job.target), job.criterion, job.group_reduction, job.normalizer or "none", method)
        yield dict(zip(KEYS, values, strict=True)) | {
            "accuracy": 100 * table.loc[jobs.TITLES[key], name],
            "original": 100 * table.loc[jobs.TITLES[jobs.ORIGINAL], name],
            "speed-up": table.loc[jobs.TITLES[key], "speed-up"],
        }


def _paper_rows(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read the paper's Table IX, VGG-19 on CIFAR-100, with our names."""
    paper = pd.read_csv(path, keep_default_na=False)
    return pd.DataFrame(
        {
            "experiment": "VGG-19 on CIFAR-100",
            "target": [f"speedup={value:g}" for value in paper["speedup"]],
            "criterion": paper["method"].replace({"group_l2": "l2"}),
            "reduction": paper["reduction"],
            "normalizer": paper["normalizer"],
            "method": paper["ep"].map({"no": "naive", "yes": "EP"}),
            "paper (%)": paper["accuracy_mean"],
            "paper's standard deviation": paper["accuracy_std"],
        }
    )
