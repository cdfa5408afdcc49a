"""Grids: many jobs over the devices of a machine, so many at a time, in the background, resumable.

A grid's folder holds ``grid.json`` and one run folder a job. The process that works on it may be killed at any time: on
resuming, finished runs are left alone, running ones waited for, all others go on from their checkpoints.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from ..errors import check_whole
from ..files import PROCESS, entries, held, is_worked_on, logging_to_file, read_json, start, write_json
from .experiments import SCRATCH, Experiment, get_experiment
from .job import JOB, ORIGINAL, OUTPUT, SPARSE, STOP, WEIGHTS, PruningJob
from .run import Run, launch, wait_while

logger = logging.getLogger(__name__)

FORMAT = 1
GRID, LOG = "grid.json", "grid.log"
SECONDS_BETWEEN_ROUNDS = 0.5

GRIDS: Mapping[str, tuple[str, ...]] = {
    "paper-cifar": ("vgg19-cifar100", "resnet56-cifar10"),
    "paper-imagenet": ("resnet50-imagenet", "mobilenetv2-imagenet", "vit-b16-imagenet"),
}
"""The published run scripts, as experiments."""


@dataclass(frozen=True)
class GridJob:
    """One job of a grid.

    Attributes:
        name: Its run folder in the grid's.
        job: What to do.
        needs: Files in the grid's folder, left by other jobs, without which it cannot begin.
        processes: Devices that it trains on together.
    """

    name: str
    job: PruningJob
    needs: tuple[str, ...] = ()
    processes: int = 1

    def __post_init__(self) -> None:
        check_whole(f"job '{self.name}': processes", self.processes, 1)
        if Path(self.name).name != self.name:
            raise ValueError(f"job '{self.name}': its name is that of a folder in the grid's")

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as plain data that JSON can hold."""
        return vars(self) | {"job": self.job.to_dict(), "needs": list(self.needs)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GridJob:
        """Build an entry from what :meth:`to_dict` returned."""
        return cls(**{**data, "job": PruningJob.from_dict(data["job"]), "needs": tuple(data["needs"])})


@dataclass(frozen=True)
class Grid:
    """A grid and its folder: its runs, how far they are, what came out."""

    folder: Path

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Grid:
        """Attach to a grid by its folder; raise ValueError where there is none."""
        path = Path(folder).resolve()
        if not (path / GRID).is_file():
            raise ValueError(f"'{folder}' holds no grid")
        return cls(path)

    @property
    def jobs(self) -> tuple[GridJob, ...]:
        """The jobs, in the order in which they begin."""
        return tuple(GridJob.from_dict(entry) for entry in self._read()["jobs"])

    @property
    def statuses(self) -> dict[str, str]:
        """Name -> the status of its run, or "waiting"."""
        return {entry["name"]: self._status(entry["name"]) for entry in self._read()["jobs"]}

    @property
    def runs(self) -> list[Run]:
        """The runs that have begun."""
        return [Run(self.folder / name) for name, status in self.statuses.items() if status != "waiting"]

    @property
    def is_running(self) -> bool:
        """Say whether a process works on the grid."""
        return is_worked_on(self.folder)

    def to_frame(self) -> pd.DataFrame:
        """Return one row a job: its name and status."""
        return pd.DataFrame(list(self.statuses.items()), columns=["job", "status"])

    def wait(self, timeout: float | None = None) -> dict[str, str]:
        """Wait until nobody works on the grid; return the statuses. Raises TimeoutError after ``timeout`` s."""
        wait_while(lambda: self.is_running, timeout, f"'{self.folder}' is still worked on")
        return self.statuses

    def stop(self, timeout: float = 120.0) -> dict[str, str]:
        """Ask all runs to end with a checkpoint, wait until they have, and return the statuses."""
        if self.is_running:
            (self.folder / STOP).touch()
        return self.wait(timeout)

    def resume(self) -> Grid:
        """Start working on the grid again, in the background."""
        if self.is_running:
            raise ValueError(f"'{self.folder}' is being worked on")
        (self.folder / STOP).unlink(missing_ok=True)
        work = [sys.executable, "-m", "obc_tools.grid_worker", str(self.folder)]
        write_json(self.folder / PROCESS, start(work, self.folder / OUTPUT, os.environ))
        return self

    def work(self) -> dict[str, str]:
        """Work on the grid in this process until nothing is left that can be begun; return the statuses."""
        with held(self.folder), logging_to_file(self.folder / LOG):
            tried: set[str] = set()
            while not (self.folder / STOP).exists():
                tried |= self._begin(tried)
                if not any(status == "running" for status in self.statuses.values()):
                    break
                time.sleep(SECONDS_BETWEEN_ROUNDS)
            for run in self.runs:
                run.stop()
            statuses = self.statuses
            logger.info("ended: %s", ", ".join(f"{name} {status}" for name, status in statuses.items()))
        return statuses

    def _begin(self, tried: set[str]) -> set[str]:
        """Launch what can be begun on devices that are free; return the names."""
        begun: set[str] = set()
        for entry in self.jobs:
            status = self._status(entry.name)
            ready = all((self.folder / file).is_file() for file in entry.needs)
            if entry.name in tried or status in ("finished", "running") or not ready:
                continue
            free = self._free_devices()
            if len(set(free)) < entry.processes:
                break
            devices = "cpu" if free[0] == "cpu" else sorted(set(free))[: entry.processes]
            launch(entry.job, self.folder / entry.name, processes=entry.processes, devices=devices, resume=True)
            logger.info("%s begins on %s", entry.name, devices)
            begun.add(entry.name)
        return begun

    def _free_devices(self) -> list[int | str]:
        """Return the devices, each as often as it may take another run."""
        settings = self._read()
        free = [device for device in settings["devices"] for _ in range(settings["each"])]
        for name, status in self.statuses.items():
            if status == "running":
                taken = read_json(self.folder / name / PROCESS, "devices")["devices"]
                for device in ["cpu"] if taken == "cpu" else taken:
                    if device in free:
                        free.remove(device)
        return sorted(free, key=free.count, reverse=True)

    def _status(self, name: str) -> str:
        return Run(self.folder / name).status if (self.folder / name / JOB).is_file() else "waiting"

    def _read(self) -> dict[str, Any]:
        return read_json(self.folder / GRID, "jobs", "devices", "each")


def launch_grid(
    jobs: Iterable[GridJob],
    folder: str | os.PathLike[str],
    *,
    devices: Sequence[int] | str = "cpu",
    each: int = 1,
    resume: bool = False,
) -> Grid:
    """Start working on many jobs in the background and return at once.

    Args:
        jobs: In the order in which they should begin; of :func:`paper_grid`, say.
        folder: The grid's folder; made if need be.
        devices: Numbers of GPUs, or "cpu".
        each: Runs at a time on each device.
        resume: Go on with the same jobs in the same folder.

    Raises:
        ValueError: for a folder in use, other jobs than it holds, names that are there twice, jobs that need more
            devices than there are.
    """
    path, jobs = Path(folder).resolve(), list(jobs)
    check_whole("each", each, 1)
    if isinstance(devices, str) and devices != "cpu":
        raise ValueError(f"devices={devices!r}: expected numbers of GPUs, or 'cpu'")
    names = [entry.name for entry in jobs]
    places = ["cpu"] if devices == "cpu" else list(devices)
    if not jobs or len(set(names)) < len(names):
        raise ValueError("a grid needs jobs, each with a name of its own")
    # On CPUs, processes are not bound to a device each.
    if devices != "cpu" and (widest := max(entry.processes for entry in jobs)) > len(places):
        raise ValueError(f"a job needs {widest} devices, there are {len(places)}")
    if (path / GRID).is_file():
        if not resume or Grid(path).jobs != tuple(jobs):
            raise ValueError(f"'{path}' holds a grid: pass resume=True with the same jobs, or choose another folder")
    elif path.is_file() or entries(path):
        raise ValueError(f"'{path}' holds something else than a grid: choose another folder")
    rows = [entry.to_dict() for entry in jobs]
    write_json(path / GRID, {"format": FORMAT, "jobs": rows, "devices": places, "each": each}, checked=True)
    return Grid(path).resume()


def paper_grid(
    name: str,
    folder: str | os.PathLike[str],
    *,
    roots: Mapping[str, str] | str | None = None,
    weights: str | None = None,
    sparse_weights: str | None = None,
    seeds: Sequence[int] | None = None,
    processes: int | None = None,
    small: bool = False,
    **changes: Any,
) -> list[GridJob]:
    """Return the jobs of one of `GRIDS`, or of one experiment: all its targets, variants and seeds.

    The first job of a seed does the sparse training (and the baseline, with ``weights="scratch"``); the others start
    from the weights that it leaves.

    Args:
        name: "paper-cifar", "paper-imagenet", or an experiment.
        folder: The grid's folder, in which jobs find each other's weights.
        roots: Where the data lies: one folder, or by data set.
        weights, small, **changes: As of `Experiment.job` and ``small``.
        sparse_weights: A file that a sparse training left, for all jobs.
        seeds: None: the paper's.
        processes: GPUs of a job. None: the paper's.
    """
    jobs: list[GridJob] = []
    for experiment in map(get_experiment, GRIDS.get(name, (name,))):
        make = experiment.small if small else experiment.job
        count = experiment.processes if processes is None else processes
        root = roots.get(experiment.base.data) if isinstance(roots, Mapping) else roots
        for seed in experiment.seeds if seeds is None else seeds:
            first = None
            for variant, target in product(experiment.variants, experiment.targets):
                job = make(seed=seed, root=root, weights=weights, target=target, **changes, **variant)
                entry, needs = _name(experiment, job), ()
                if sparse_weights is not None and job.sparse is not None:
                    job = replace(job, sparse=None, sparse_weights=sparse_weights)
                elif first is not None:
                    job, needs = _started_from(job, first, Path(folder).resolve(), scratch=weights == SCRATCH)
                first = first or entry
                jobs.append(GridJob(entry, job, needs, count))
    return jobs


def _started_from(job: PruningJob, first: str, folder: Path, *, scratch: bool) -> tuple[PruningJob, tuple[str, ...]]:
    """Let a job start from what the first one of its seed trained."""
    needs: list[str] = []
    if scratch:
        needs.append(f"{first}/{WEIGHTS[ORIGINAL]}")
        job = replace(job, pretrain=None, weights=str(folder / needs[-1]))
    if job.sparse is not None:
        needs.append(f"{first}/{WEIGHTS[SPARSE]}")
        job = replace(job, sparse=None, sparse_weights=str(folder / needs[-1]))
    return job, tuple(needs)


def _name(experiment: Experiment, job: PruningJob) -> str:
    parts = [str(job.target).replace("=", ""), job.criterion, job.group_reduction, job.normalizer or "none"]
    shown = parts if len(experiment.variants) > 1 else parts[:1]
    return "_".join([experiment.name, *shown, f"seed{job.seed}"])
