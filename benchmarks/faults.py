"""What kills, flipped bits and a full disk cost a run, a pruning, a comparison and a sweep: it should be nothing.

    python benchmarks/faults.py [--kills 500] [--flips 200] [--sizes 20] [--seed 0] [--out results/faults.csv]

Each trial is a process of its own, forked from one that has everything loaded, so that a small command takes a second.
`kills`: SIGKILL before the k-th operation on a file or folder (k drawn anew, up to as many as an undisturbed one does),
or after a random share of its time; then the same command is given again. `flips`: one bit of one file of a stopped run
is turned over; then it is resumed. `full`: no file may grow beyond so many bytes, as under a quota; then it is resumed
without. A trial is kept as "same" where the numbers in the end are those of an undisturbed one (times
apart), as "refused" where it ends in an error that names what is wrong, and else as "lost" or "changed". Every row is
written when it is known; what is there is not done again. Linux alone.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import tyro
from torch import nn

from obc_tools import Recipe, compare_criteria, load_data, load_model, sweep, take
from obc_tools.pruning.choices import Target
from obc_tools.runs.folder import run_job, work_on
from obc_tools.runs.job import PruningJob
from obc_tools.training.folder import Stopped

JOB = PruningJob(
    title="tiny",
    model="resnet8",
    data="digits",
    model_options={"width": 4},
    target=Target(speedup=1.5),
    batches=2,
    batch_size=64,
    steps=3,
    pretrain=Recipe(epochs=2, lr=0.1, batch_size=128, augment=False),
    finetune=Recipe(epochs=1, lr=0.02, batch_size=128, augment=False),
    equivalent=True,
    device="cpu",
)
CHANGING = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")
"""Audit events of operations that change a folder, beside opening a file to write."""
SKIPPED = ("second", "latency", "time", "path")


@dataclass(frozen=True)
class Options:
    """How many trials."""

    kills: int = 500
    flips: int = 200
    sizes: int = 20
    seed: int = 0
    out: Path = Path("results/faults.csv")


def network() -> nn.Module:
    """Return a small network of random weights."""
    torch.manual_seed(0)
    return load_model("resnet8", num_classes=10, in_channels=1, width=4).eval()


def figures(frame: pd.DataFrame) -> str:
    """Return the numbers of a table that depend on no clock."""
    kept = [name for name in frame.columns if not any(word in str(name).lower() for word in SKIPPED)]
    return frame[kept].to_json(double_precision=15)


def run(folder: Path, stop: Callable[[], bool] = lambda: False) -> str:
    """Do the job where it may be watched, as `obc run` does."""
    result = work_on(JOB, folder, stop=stop, progress=False)
    return figures(result.to_frame()) + result.plan.to_json()


def prune(folder: Path) -> str:
    """Do the job in a folder that appears when all is done, as `obc prune` does."""
    result = run_job(JOB, folder, progress=False, overwrite=folder.exists())
    return figures(result.to_frame()) + result.plan.to_json()


def compare(folder: Path) -> str:
    """Compare two criteria, as `obc compare` does."""
    asked = {"steps": 3, "ratio": 0.6, "batches": 2, "batch_size": 16, "held_out": 100, "training": 50}
    found = compare_criteria(network, load_data("digits"), ["jacobian", "l1"], folder=folder, progress=False, **asked)
    return figures(found.frame)


def frontier(folder: Path) -> str:
    """Find plans at three targets, as `obc sweep` does."""
    data = load_data("digits")
    batches = take(data.batches("train", 16, seed=0), 2)
    held_out = take(data.batches("val", 100, shuffle=False), 1)
    targets, how = {"speedup": (1.3, 1.6, 2.0)}, {"steps": 4, "progress": False, "held_out": held_out.at(0)}
    found = sweep(network(), torch.zeros(1, 1, 8, 8), batches, targets=targets, folder=folder, **how)
    return figures(found.to_frame())


COMMANDS: dict[str, Callable[[Path], str]] = {"run": run, "prune": prune, "compare": compare, "sweep": frontier}


def forked(work: Callable[[], str], limit: float | None = None) -> tuple[str, str]:
    """Do work in a process of its own; return how it ended ("done", "refused", "killed", "hangs") and what it said.

    Killed after ``limit`` seconds, where that is given.
    """
    reads, writes = os.pipe()
    if not (child := os.fork()):
        status, said = 0, ""
        try:
            os.close(reads)
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), 2)
            said = work()
        except (ValueError, OSError, Stopped) as error:
            status, said = 1, f"{type(error).__name__}: {error}"
        except BaseException as error:
            status, said = 2, f"{type(error).__name__}: {error}"
        try:
            with os.fdopen(writes, "w") as pipe:
                pipe.write(said)
        finally:
            os._exit(status)
    os.close(writes)
    if limit is not None:
        time.sleep(limit)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reads) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "killed", said
    return ("done", "refused", "crashed")[os.WEXITSTATUS(status)], said


def watched(folder: Path, at: int | None, work: Callable[[], str]) -> str:
    """Work, killed before the operation with a number on what lies in or beside a folder; None counts them."""
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, str | bytes | os.PathLike) or not (flags or 0) & (os.O_WRONLY | os.O_RDWR):
                return
        elif event in CHANGING:
            path = arguments[0]
        else:
            return
        if str(folder.parent) in os.fsdecode(path):
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    said = work()
    return json.dumps({"operations": seen, "said": said}) if at is None else said


def judged(end: tuple[str, str], expected: str) -> tuple[str, str]:
    """Return what became of a command that was given again, and the error if there was one."""
    how, said = end
    if how == "done":
        return ("same" if said == expected else "changed"), ""
    return ("refused" if how == "refused" else "lost"), said[:200]


class Trials:
    """Trials of a kind with seeded draws, and a table that is kept."""

    def __init__(self, options: Options):
        self.options = options
        self.rows = pd.read_csv(options.out).to_dict("records") if options.out.exists() else []
        self.done = {(row["fault"], row["command"], row["trial"]) for row in self.rows}
        self.whole: dict[str, tuple[int, str, float]] = {}

    def undisturbed(self, command: str) -> tuple[int, str, float]:
        """Return the operations of an undisturbed command, its numbers and its seconds."""
        if command not in self.whole:
            with tempfile.TemporaryDirectory() as place:
                folder, start = Path(place) / "run", time.perf_counter()
                how, said = forked(partial(watched, folder, None, partial(COMMANDS[command], folder)))
                assert how == "done", said
                found = json.loads(said)
                self.whole[command] = found["operations"], found["said"], time.perf_counter() - start
        return self.whole[command]

    def add(
        self, fault: str, command: str, trial: int, tried: Callable[[random.Random, Path], tuple[str, ...]]
    ) -> None:
        """Do a trial that is not in the table yet, in a folder of its own."""
        if (fault, command, trial) in self.done:
            return
        draw = random.Random(f"{self.options.seed} {fault} {command} {trial}")
        with tempfile.TemporaryDirectory() as place:
            where, outcome, said = tried(draw, Path(place) / "run")
        row = {"fault": fault, "command": command, "trial": trial, "where": where, "outcome": outcome, "said": said}
        self.rows.append(row)
        pd.DataFrame(self.rows).to_csv(self.options.out, index=False)

    def kill(self, command: str, draw: random.Random, folder: Path) -> tuple[str, str, str]:
        """Kill a command, and give it again."""
        operations, expected, seconds = self.undisturbed(command)
        work = partial(COMMANDS[command], folder)
        if draw.random() < 0.75:
            at = draw.randint(1, operations)
            how, _ = forked(partial(watched, folder, at, work))
            where = f"operation {at} of {operations}"
        else:
            share = draw.random()
            how, _ = forked(work, share * seconds)
            where = f"after {share:.2f} of its time"
        outcome, said = judged(forked(work), expected)
        left = sorted(path.name for path in folder.parent.iterdir() if path.name != "run")
        return f"{where}, {how}", outcome, said or " ".join(left)

    def flip(self, stopped: Path, draw: random.Random, folder: Path) -> tuple[str, str, str]:
        """Turn over one bit of a stopped run, and resume it."""
        shutil.copytree(stopped, folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
        path = draw.choice(files)
        content = bytearray(path.read_bytes())
        bit = draw.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        outcome, said = judged(forked(partial(run, folder)), self.undisturbed("run")[1])
        return f"bit {bit} of {path.relative_to(folder)}", outcome, said

    def fill(self, draw: random.Random, folder: Path) -> tuple[str, str, str]:
        """Work where no file may grow beyond a size, then where it may."""
        size = int(10 ** draw.uniform(1, 6))

        def limited() -> str:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            return run(folder)

        how, first = forked(limited)
        outcome, said = judged(forked(partial(run, folder)), self.undisturbed("run")[1])
        return f"{size} bytes, {how}", "lost" if how == "crashed" else outcome, said or first[:200]


def stopped_run(place: Path) -> Path:
    """Return the folder of a run that was stopped in its last training."""
    folder, asked = place / "run", [0]

    def stop() -> bool:
        asked[0] += 1
        return asked[0] > 40

    how, said = forked(partial(run, folder, stop))
    assert how == "refused" and said.startswith("Stopped"), said
    return folder


def main() -> None:
    """Do what is missing, and say what became of all."""
    options = tyro.cli(Options)
    torch.set_num_threads(1)
    trials = Trials(options)
    for number in range(options.kills):
        command = list(COMMANDS)[number % len(COMMANDS)]
        trials.add("kill", command, number, partial(trials.kill, command))
    with tempfile.TemporaryDirectory() as place:
        stopped = stopped_run(Path(place))
        for number in range(options.flips):
            trials.add("flip", "run", number, partial(trials.flip, stopped))
    for number in range(options.sizes):
        trials.add("full", "run", number, trials.fill)
    print(pd.DataFrame(trials.rows).groupby(["fault", "command", "outcome"]).size().to_string())


if __name__ == "__main__":
    main()
