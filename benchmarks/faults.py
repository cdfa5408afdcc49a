"""What kills, flipped bits and a full disk cost runs, prunings, comparisons, sweeps and grids: it should be nothing.

    python benchmarks/faults.py [--kills 500] [--pairs 40] [--grids 20] [--flips 200] [--sizes 40] [--soak MINUTES]
        [--seed 0] [--out results/faults.csv]

Each trial is a process of its own, forked from one that has everything loaded, so that a small command takes a second.
`kills`: SIGKILL before the k-th operation on a file or folder (k drawn anew, up to as many as an undisturbed one does),
or after a random share of its time; then the same command is given again. `pairs`: the same of a run in two processes,
either of which is killed. `grids`: the process that works on a grid, or one of its workers, at a random moment.
`flips`: one bit of one file of a stopped run is turned over; then it is resumed. `sizes`: no file may grow beyond so
many bytes, as under a quota, or (as root) a disk has no more; then it is resumed without. `--soak`: a grid of twenty
jobs, of which a worker or the grid itself is killed every 5 to 40 seconds for so many minutes, and nothing else is
done; `--out` has a line a kill then.

A trial is kept as "same" where the numbers in the end are those of an undisturbed one (times apart), as "refused" where
it ends in an error that names what is wrong, and else as "lost" or "changed". Every row is written when it is known;
what is there is not done again. Linux alone.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import tyro
from torch import nn

from obc_tools import Recipe, compare_criteria, load_data, load_model, sweep, take
from obc_tools.files import HOLDER, PROCESS, is_alive
from obc_tools.pruning.choices import Target
from obc_tools.runs.grid import Grid, GridJob, launch_grid
from obc_tools.runs.job import PLAN, PruningJob
from obc_tools.runs.pipeline import run_job, work_on
from obc_tools.training.folder import Stopped
from obc_tools.training.processes import MEETING

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
FEW_STEPS = {"pretrain": replace(JOB.pretrain, batch_size=360), "finetune": replace(JOB.finetune, batch_size=360)}
FOR_TWO = replace(JOB, **FEW_STEPS)
"""On a busy machine every step of two processes waits for both to get their turn."""
CHANGING = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")
"""Audit events of operations that change a folder, beside opening a file to write."""
SLOW_DISK = "import os, time; sync = os.fsync; os.fsync = lambda file: (time.sleep(2), sync(file))[1]"
"""Python's start-up file under which a file takes two seconds more to reach the disk."""
SKIPPED = ("second", "latency", "time", "path")


@dataclass(frozen=True)
class Options:
    """How many trials."""

    kills: int = 500
    pairs: int = 40
    grids: int = 20
    flips: int = 200
    sizes: int = 40
    soak: float = 0
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


def run(folder: Path, stop: Callable[[], bool] = lambda: False, job: PruningJob = JOB) -> str:
    """Do a job where it may be watched, as `obc run` does."""
    result = work_on(job, folder, stop=stop, progress=False)
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


def pair(folder: Path, other_lives: float | None = None) -> str:
    """Do the job in this process and another one together, as a launcher has them do; the other may be killed."""
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        port = door.getsockname()[1]
    os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), MEETING: "1"}
    this = os.getpid()
    child = os.fork()
    os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), "0" if child else "1")
    if not child:
        # A launcher ends the others with the first.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() == this:
            run(folder, job=FOR_TWO)
        os._exit(0)
    if other_lives is not None:
        threading.Timer(other_lives, os.kill, (child, signal.SIGKILL)).start()
    return run(folder, job=FOR_TWO)


ALONE: dict[str, Callable[[Path], str]] = {"run": run, "prune": prune, "compare": compare, "sweep": frontier}
COMMANDS = ALONE | {"pair": pair}


def grid_jobs(count: int, epochs: int) -> list[GridJob]:
    """Return so many jobs that differ in their seeds."""
    recipe = replace(JOB.pretrain, epochs=epochs)
    return [GridJob(f"seed{seed}", replace(JOB, seed=seed, pretrain=recipe, finetune=recipe)) for seed in range(count)]


def grid_figures(grid: Grid) -> str:
    """Return the numbers of all runs of a grid that depend on no clock, weights included."""
    found = {}
    for run in grid.runs:
        saved = {
            path.parent.name: json.loads(path.read_text())["sha256"] for path in run.folder.glob("*/manifest.json")
        }
        histories = {key: figures(history.to_frame()) for key, history in run.histories.items()}
        found[run.folder.name] = [figures(run.table()), (run.folder / PLAN).read_text(), saved, histories]
    return json.dumps(found, sort_keys=True)


def workers_of(grid: Grid) -> dict[str, int]:
    """Return the processes that live of a grid: its own as "grid", those of its runs by their names."""
    found = {}
    for path in (grid.folder, *sorted(grid.folder.glob("seed*"))):
        for name in (PROCESS, HOLDER):
            try:
                identity = json.loads((path / name).read_text())
            except (FileNotFoundError, ValueError):
                continue
            if is_alive(identity):
                found["grid" if path == grid.folder else path.name] = identity["pid"]
    return found


def is_complete(grid: Grid) -> bool:
    """Say whether all runs of a grid are finished."""
    return set(grid.statuses.values()) == {"finished"}


def complete(grid: Grid, limit: float = 600) -> None:
    """Go on with a grid until all its runs are finished, as somebody who gives the command again does."""
    for _ in range(10):
        grid.wait(limit)
        if is_complete(grid):
            return
        grid.resume()
    raise ValueError(f"a grid did not end: {grid.statuses}")


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

    def kill_pair(self, draw: random.Random, folder: Path) -> tuple[str, str, str]:
        """Kill either of two processes that train together, and begin both again."""
        operations, expected, seconds = self.undisturbed("pair")
        first, share = draw.random() < 0.7, draw.random()
        if first and draw.random() < 0.75:
            at = draw.randint(1, operations)
            how, _ = forked(partial(watched, folder, at, partial(pair, folder)))
            where = f"first at operation {at} of {operations}"
        elif first:
            how, _ = forked(partial(pair, folder), share * seconds)
            where = f"first after {share:.2f} of its time"
        else:
            begun = time.perf_counter()
            how, _ = forked(partial(pair, folder, share * seconds))
            waited = time.perf_counter() - begun - share * seconds
            where = f"second after {share:.2f} of its time, the first ended {waited:.1f} s later"
        return f"{where}, {how}", *judged(forked(partial(pair, folder)), expected)

    def kill_grid(self, expected: tuple[str, float], draw: random.Random, folder: Path) -> tuple[str, str, str]:
        """Kill the process that works on a grid, or one of its workers, and give the command again."""
        numbers, seconds = expected
        grid = launch_grid(grid_jobs(3, 1), folder, each=2)
        share = draw.random()
        time.sleep(share * seconds)
        living = workers_of(grid)
        name = draw.choice(sorted(living)) if living else None
        if living:
            os.kill(living[name], signal.SIGKILL)
        if name == "grid":
            grid.wait(60)  # a process that was killed takes its time to go
            grid.resume()
        complete(grid)
        outcome = "same" if grid_figures(grid) == numbers else "changed"
        return f"{name} after {share:.2f} of its time, {'killed' if living else 'done'}", outcome, ""

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
        """Work where no file may grow beyond a size, or a disk is no larger; then where there is room."""
        of_disk = draw.random() < 0.5 and os.geteuid() == 0
        size = int(10 ** (draw.uniform(4.5, 6.2) if of_disk else draw.uniform(1, 5.4)))

        def limited() -> str:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            return run(folder)

        with small_disk(folder.parent, size) if of_disk else nullcontext():
            how, first = forked(partial(run, folder) if of_disk else limited)
            if of_disk:
                subprocess.run(["mount", "-o", "remount,size=100m", folder.parent], check=True)
            outcome, said = judged(forked(partial(run, folder)), self.undisturbed("run")[1])
        # In torch's words, or naming no file: nobody knows what to do.
        named = how == "done" or (how == "refused" and str(folder) in first)
        where = f"{'disk' if of_disk else 'file'} of {size} bytes, {how}"
        return where, outcome if named else f"{outcome}, unclear", said or ("" if how == "done" else first[:300])


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[None]:
    """Have a folder be a disk of so many bytes, pages of 4096 each."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


def stopped_run(place: Path) -> Path:
    """Return the folder of a run that was stopped in its last training."""
    folder, asked = place / "run", [0]

    def stop() -> bool:
        asked[0] += 1
        return asked[0] > 40

    how, said = forked(partial(run, folder, stop))
    assert how == "refused" and said.startswith("Stopped"), said
    return folder


def undisturbed_grid(jobs: list[GridJob]) -> tuple[str, float]:
    """Return the numbers of a grid that nobody disturbs, and its seconds."""
    with tempfile.TemporaryDirectory() as place:
        start = time.perf_counter()
        grid = launch_grid(jobs, Path(place) / "grid", each=2)
        complete(grid)
        return grid_figures(grid), time.perf_counter() - start


def soak(options: Options) -> None:
    """Kill workers of a grid of twenty jobs, and the grid itself, for so many minutes; say what came of it.

    A grid that nobody disturbs comes first. While there are kills, the disk of the other one is slow, so that its jobs
    last, most of the time with a file half written, whatever else the machine does. Every kill is written down before
    it is done: the minute, of what, and how many runs are finished.
    """
    jobs, draw = grid_jobs(20, 20), random.Random(options.seed)
    expected, _ = undisturbed_grid(jobs)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as place, options.out.open("a", buffering=1) as kept:
        (Path(place) / "sitecustomize.py").write_text(SLOW_DISK)
        os.environ["PYTHONPATH"] = os.pathsep.join([place, *filter(None, [os.environ.get("PYTHONPATH")])])
        grid = launch_grid(jobs, Path(place) / "grid", each=2)

        def note(what: str) -> None:
            finished = list(grid.statuses.values()).count("finished")
            kept.write(f"{(time.perf_counter() - start) / 60:.1f},{what},{finished}\n")

        while time.perf_counter() - start < 60 * options.soak and not is_complete(grid):
            time.sleep(draw.uniform(5, 40))
            living = workers_of(grid)
            workers = sorted(living.keys() - {"grid"})
            name = draw.choice(workers) if workers and draw.random() < 0.7 else "grid"
            if workers and name in living:  # a grid that has begun nothing yet is left alone
                note("grid" if name == "grid" else "worker")
                os.kill(living[name], signal.SIGKILL)
                if name == "grid":
                    grid.wait(600)  # a process that was killed takes its time to go
            if not grid.is_running:
                grid.resume()
        note("no more kills")
        (Path(place) / "sitecustomize.py").write_text("")
        complete(grid, 7200)
        note("complete")
        note("same" if grid_figures(grid) == expected else "changed")


def main() -> None:
    """Do what is missing, and say what became of all."""
    options = tyro.cli(Options)
    torch.set_num_threads(1)
    if options.soak:
        soak(options)
        return
    trials = Trials(options)
    for number in range(options.sizes):
        trials.add("full", "run", number, trials.fill)
    for number in range(options.kills):
        command = list(ALONE)[number % len(ALONE)]
        trials.add("kill", command, number, partial(trials.kill, command))
    with tempfile.TemporaryDirectory() as place:
        stopped = stopped_run(Path(place))
        for number in range(options.flips):
            trials.add("flip", "run", number, partial(trials.flip, stopped))
    for number in range(options.pairs):
        trials.add("kill", "pair", number, trials.kill_pair)
    alone = undisturbed_grid(grid_jobs(3, 1)) if options.grids else ("", 0.0)
    for number in range(options.grids):
        trials.add("kill", "grid", number, partial(trials.kill_grid, alone))
    print(pd.DataFrame(trials.rows).groupby(["fault", "command", "outcome"]).size().to_string())


if __name__ == "__main__":
    main()
