"""Commands on runs: the paper's experiments, grids of them, what runs there are, and evaluating saved models."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from .options import Choice, ExperimentOptions, Flag, Folder, Name, Number, OneExperiment, Position, Root, Text, Whole

if TYPE_CHECKING:
    from ..runs.job import PruningJob

Devices = Annotated[tuple[int, ...], tyro.conf.arg(metavar="GPU ...", help_behavior_hint="")]
Place = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]

CAN_BE_RESUMED = "the same command with --resume goes on from the last checkpoint"


@dataclass(frozen=True, kw_only=True)
class RunExperiment(OneExperiment):
    """Do one of the paper's experiments: sparse training, pruning, naive fine-tuning, Equivalent Pruning, table.

    obc run vgg19-cifar100 --speedup 6 --root data/cifar100 --out runs/vgg19_6x
    """

    AFTER_STOP: ClassVar[str] = CAN_BE_RESUMED
    TARGETS: ClassVar[tuple[int, int]] = (0, 1)
    FRESH: ClassVar[bool] = True

    speedup: Number = None
    """Target: how many times fewer MACs. Default: the paper's first target."""
    macs: Number = None
    """Target: multiply-accumulate operations for one image."""
    criterion: Choice = None
    """What channels are scored by, instead of jacobian."""
    group_reduction: Choice = None
    """How scores of the layers that share a channel are combined, instead of the paper's."""
    processes: int = 1
    """GPUs of this machine that train together; the experiment's batch size is that of one."""
    devices: Devices = ()
    """Numbers of the GPUs to use."""
    background: Flag = False
    """Start it and return at once; `obc runs` says how far it is."""
    resume: Flag = False
    """Go on with what the folder holds."""

    def job(self, **chosen: Any) -> PruningJob:
        from ..pruning.choices import Target

        names = ("criterion", "group_reduction")
        chosen |= {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.speedup is not None or self.macs is not None:
            chosen["target"] = Target(self.speedup, self.macs)
        return super().job(**chosen)

    def run(self) -> None:
        from ..runs.folder import check_run_folder
        from ..runs.run import Run, launch, run_experiment

        job = self.job()
        if not self.resume:
            check_run_folder(self.out, overwrite=False)
        if self.background or self.processes != 1 or self.devices:
            devices = self.devices or ("cpu" if self.device == "cpu" else None)
            run = launch(job, self.out, processes=self.processes, devices=devices, resume=self.resume)
            if not self.background:
                run.follow()
        else:
            run = run_experiment(job, self.out)
        print(f"\n{Run.open(self.out)!r}")
        if run.status == "finished":
            print(f"\n{run.table().to_string(index=False)}")


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Say how far the runs below a folder are, and stop or resume one.

    obc runs runs
    """

    AFTER_STOP: ClassVar[str] = "runs go on"

    folder: Place = Path("runs")
    """A run, a grid, or a folder of them."""
    stop: Flag = False
    """Stop the run or grid, with a checkpoint."""
    resume: Flag = False
    """Start it again from its last checkpoint."""
    log: int = 0
    """Show so many last lines of the run's log."""

    def run(self) -> None:
        from ..runs.folder import JOB
        from ..runs.grid import GRID, Grid
        from ..runs.run import Run

        if (self.folder / GRID).is_file():
            grid = Grid.open(self.folder)
            _end_or_begin(grid, self.stop, self.resume)
            print(grid.to_frame().to_string(index=False))
            return
        found = (
            [self.folder] if (self.folder / JOB).is_file() else sorted(p.parent for p in self.folder.glob(f"*/{JOB}"))
        )
        if not found or (len(found) > 1 and (self.stop or self.resume)):
            raise ValueError(f"'{self.folder}' holds {len(found)} runs" + (": name one of them" if found else ""))
        for path in found:
            try:
                run = Run.open(path)
                _end_or_begin(run, self.stop, self.resume)
                print(repr(run) + (f"\n{run.log(self.log)}" if self.log else ""))
            except (ValueError, OSError) as error:
                if len(found) == 1:
                    raise
                print(f"Run('{path}'): cannot be read: {error}")


def _end_or_begin(target: Any, stop: bool, resume: bool) -> None:
    if stop:
        target.stop()
    if resume:
        target.resume()


@dataclass(frozen=True, kw_only=True)
class GridCommand(ExperimentOptions):
    """Do the jobs of a published run script, or all of one experiment, over this machine's GPUs, in the background.

    obc grid paper-cifar --roots cifar10 data/cifar10 cifar100 data/cifar100 --devices 0 1 --each 2 --out runs/cifar
    """

    AFTER_STOP: ClassVar[str] = "the grid goes on; `obc runs FOLDER --stop` stops it"

    grid: Position
    """paper-cifar, paper-imagenet, or an experiment."""
    out: Folder
    """Folder of the grid; each job has a run folder in it."""
    roots: Annotated[dict[str, str], tyro.conf.arg(metavar="DATA FOLDER ...", help_behavior_hint="")] = field(
        default_factory=dict
    )
    """Where each data set lies."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT ...", help_behavior_hint="")] = ()
    """Seeds instead of the paper's."""
    devices: Devices = ()
    """Numbers of the GPUs. Without them: on the CPU."""
    each: int = 1
    """Runs at a time on each GPU."""
    processes: Whole = None
    """GPUs of one job instead of the paper's."""
    resume: Flag = False
    """Go on with what the folder holds."""
    wait: Flag = False
    """Come back when all is done."""

    def run(self) -> None:
        from ..runs.grid import launch_grid, paper_grid

        changes = {key: value for key, value in self.changes().items() if key != "root"}
        jobs = paper_grid(
            self.grid,
            self.out,
            roots=self.roots or self.root,
            weights=self.weights,
            sparse_weights=self.sparse_weights,
            seeds=self.seeds or None,
            processes=1 if self.processes is None and not self.devices else self.processes,
            small=self.small,
            as_requested=self.as_requested,
            **changes,
        )
        plain = replace(self, sparse_weights=None)
        jobs = [replace(entry, job=plain.adapted(entry.job)) for entry in jobs]
        grid = launch_grid(jobs, self.out, devices=self.devices or "cpu", each=self.each, resume=self.resume)
        if self.wait:
            grid.wait()
        print(grid.to_frame().to_string(index=False))


@dataclass(frozen=True, kw_only=True)
class Slurm(OneExperiment):
    """Write a run folder, on a disk that all nodes share, with a script for sbatch, on one node or several.

    obc slurm resnet50-imagenet --root /data/imagenet --nodes 2 --gpus 2 --out runs/resnet50
    """

    AFTER_STOP: ClassVar[str] = "nothing was written"
    ELSEWHERE: ClassVar[bool] = True

    nodes: int = 1
    """Nodes."""
    gpus: int = 4
    """GPUs a node."""
    cpus: int = 32
    """CPUs a node."""
    time: str = "24:00:00"
    """Longest duration; the run saves a checkpoint and stops two minutes before."""

    def run(self) -> None:
        from ..runs.run import write_slurm_script

        sizes = {"nodes": self.nodes, "gpus": self.gpus, "cpus": self.cpus, "time": self.time}
        print(f"sbatch {write_slurm_script(self.job(), self.out, **sizes)}")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Evaluate a saved model, or a network with weights, on held-out images.

    obc evaluate runs/resnet56/merged --data cifar10 --root data/cifar10
    """

    AFTER_STOP: ClassVar[str] = "nothing was written"

    model: Position
    """A folder that holds a saved pruned model, a network's name, or your own function, package.module:function."""
    data: Name
    """Data set: digits, cifar10, cifar100, imagenet, folder, ...; or a function of your own."""
    task: Name = "classification"
    """What the network is for: classification, segmentation, ...; or a function of your own that returns a Task."""
    weights: Text = None
    """Weights of a network by name."""
    root: Root = None
    """Where the data lies."""
    normalize: Choice = None
    """Normalisation of the images, by name."""
    batch_size: int = 256
    """Images in a batch."""
    device: Name = "auto"
    """Where to compute: auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""

    def run(self) -> None:
        from ..data.data import check_classes
        from ..measure.costs import cost
        from ..models.store import MANIFEST, load_pruned
        from ..runs.job import find_data, find_device, find_model, own_task
        from ..scoring.tasks import CLASSIFICATION, count_outputs, evaluate, example_inputs

        device, data = find_device(self.device), find_data(self.data, self.root, self.normalize)
        if (Path(self.model) / MANIFEST).is_file():
            model = load_pruned(self.model).to(device)
        else:
            model = find_model(self.model, None, self.weights).to(device)
        batches, task = data.batches("val", self.batch_size, device=device), own_task(self.task)
        example = example_inputs(task, data, device)
        if task is CLASSIFICATION:
            check_classes(count_outputs(model, example), data)
        found = evaluate(model, batches, task=task, progress=True)
        print(f"{found!r}\n{cost(model, example)!r}")
