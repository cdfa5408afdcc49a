"""The paper's tables from run folders: means over seeds, beside what the paper reports."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from ..scoring.tasks import CLASSIFICATION
from .folder import JOB, RunFolderError
from .job import MERGED, NAIVE, ORIGINAL, TITLES
from .run import SELECTIONS, Run

logger = logging.getLogger(__name__)

T = TypeVar("T")

KEYS = ["experiment", "target", "criterion", "reduction", "normalizer", "method"]
METHODS = {NAIVE: "naive", MERGED: "EP"}


def find_runs(folder: str | os.PathLike[str]) -> list[Run]:
    """Return the runs in a folder, grids' among them, by name; raise ValueError where there is no folder.

    Those that cannot be read, damaged or of a newer version, are left out, and the log names them.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"'{folder}' is no folder")
    opened = (_unless_unreadable(lambda path=path: [Run.open(path.parent)]) for path in sorted(Path(folder).rglob(JOB)))
    return [run for runs in opened for run in runs]


def _unless_unreadable(read: Callable[[], Iterable[T]]) -> list[T]:
    """Return what is read of a run; nothing, and say so in the log, where its folder is damaged."""
    try:
        return list(read())
    except RunFolderError as error:
        logger.warning("left out: %s", error)
        return []


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
    finished = [run for run in found if run.status == "finished"]
    rows = [row for run in finished for row in _unless_unreadable(lambda run=run: _rows(run, select))]
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
        if TITLES[key] not in table.index:
            continue
        method += ", compensated start" * job.compensate
        values = (job.title, str(job.target), job.criterion, job.group_reduction, job.normalizer or "none", method)
        yield dict(zip(KEYS, values, strict=True)) | {
            "accuracy": 100 * table.loc[TITLES[key], name],
            "original": 100 * table.loc[TITLES[ORIGINAL], name],
            "speed-up": table.loc[TITLES[key], "speed-up"],
        }


def _paper_rows(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read the paper's Table IX, VGG-19 on CIFAR-100, with our names."""
    paper = pd.read_csv(path, keep_default_na=False)
    renamed = pd.DataFrame(
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
    return renamed
