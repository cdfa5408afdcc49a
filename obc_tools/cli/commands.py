"""The command line, `obc`. Torch is imported only once a command runs, so help comes at once.

A command is a dataclass of its arguments with a method `run`.
"""

from __future__ import annotations

import importlib
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from importlib.metadata import version
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro
from tqdm import tqdm

import obc_tools as obc

from ..files import logging_to, read_json
from .options import (
    A_COMPARISON,
    A_GRID,
    A_SHARE,
    GRID,
    JOB,
    MANIFEST,
    RESULTS,
    Choice,
    Command,
    Expected,
    ExperimentOptions,
    Flag,
    Folder,
    Makes,
    Name,
    Names,
    Number,
    Numbers,
    OneExperiment,
    Position,
    PruningOptions,
    Root,
    Text,
    Whole,
    check,
    spelled,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..data.data import Data


CURVES = "curves.html"
NOTHING_WRITTEN = "nothing was written"
DEMO_TITLE = "Demo: handwritten digits, a small ResNet, half the MACs"
HEAVY_IMPORTS = ("numpy", "torch", "torchvision", "timm", "torch_pruning", "accelerate", "sklearn.datasets", "plotly")


@dataclass(frozen=True, kw_only=True)
class Demo(Command):
    """Do the whole job on handwritten digits, which come with scikit-learn; nothing is downloaded.

    A small ResNet is trained from scratch, pruned by the Jacobian Criterion to half its MACs and fine-tuned twice with
    the same plan, recipe and seeds: naively and with Equivalent Pruning. Takes less than 2 minutes on 2 CPU cores.
    """

    out: Folder = Path("runs/demo")
    """Folder for the report, the models and all figures. A demo's own folder is replaced, no other."""
    overwrite: Flag = False
    """Replace whatever run the folder holds, not only an earlier demo."""
    seed: int = 0
    """Fixes the network's first weights, the order of the images and their augmentation."""

    def job(self) -> obc.PruningJob:
        return obc.PruningJob(
            title=DEMO_TITLE,
            model="resnet20",
            data="digits",
            target=obc.Target(speedup=2.0),
            batches=10,
            batch_size=64,
            steps=10,
            # Shifted by two of eight pixels, digits leave the picture.
            augment=False,
            pretrain=obc.Recipe(epochs=15, lr=0.1, batch_size=64, warmup_epochs=1, augment=False, seed=self.seed),
            finetune=obc.Recipe(epochs=6, lr=0.02, batch_size=64, augment=False, seed=self.seed),
            equivalent=True,
            seed=self.seed,
            device="cpu",
        )

    def run(self) -> None:
        import torch

        # 8 x 8 pixels are too few to share out: on a busy machine a second thread made the demo ten times slower.
        torch.set_num_threads(1)
        run_and_report(self.job(), self.out, self.may_overwrite)

    @property
    def may_overwrite(self) -> bool:
        try:
            return self.overwrite or read_json(self.out / RESULTS, "job")["job"]["title"] == DEMO_TITLE
        except (OSError, ValueError, TypeError, KeyError):
            return False


@dataclass(frozen=True, kw_only=True)
class Prune(PruningOptions):
    """Prune a trained network to a target, fine-tune it, and write models, figures and a report into a folder.

    Give one target: --speedup, --macs, --params or --ratio. For example:

    obc prune --model resnet56 --weights resnet56.pth --data cifar10 --root data/cifar10 --speedup 2.11
    --epochs 1 --equivalent --out runs/resnet56
    """

    TARGETS: ClassVar[tuple[int, float]] = (1, 1)

    speedup: Number = None
    """Target: how many times fewer MACs, such as 2.11."""
    macs: Number = None
    """Target: multiply-accumulate operations for one image, such as 60e6."""
    params: Number = None
    """Target: number of parameters, such as 400000."""
    ratio: Number = None
    """Target: share of all channels to remove, between 0 and 1."""
    criterion: Name = "jacobian"
    """What channels are scored by: jacobian, taylor, hessian, obdc, l1, l2, fpgm, whc, bn_scale, lamp,
    residual or random."""
    steps: int = 20
    """Pruning steps; what is left is scored again in each."""
    epochs: int = 0
    """Passes over the training images to fine-tune for. 0: prune only."""
    lr: float = 0.01
    """Learning rate at the start of fine-tuning (SGD); it falls to 0 along a cosine."""
    equivalent: Flag = False
    """Fine-tune with Equivalent Pruning too, merge, and compare."""
    speeds: Flag = False
    """Time all networks in the end: in PyTorch and ONNX Runtime, with one thread and all, 1 and 32 images at a time."""
    overwrite: Flag = False
    """Replace the run that the folder holds."""

    def job(self) -> obc.PruningJob:
        recipe = obc.Recipe(epochs=max(self.epochs, 1), batch_size=self.batch_size, lr=self.lr, seed=self.seed)
        return obc.PruningJob(
            title=f"Pruning {self.model} on {self.data}",
            target=obc.Target(**self.given(obc.Target)),
            finetune=recipe if self.epochs else None,
            **self.given(obc.PruningJob),
        )

    def run(self) -> None:
        run_and_report(self.job(), self.out, self.overwrite)


@dataclass(frozen=True, kw_only=True)
class ComparingOptions(PruningOptions):
    """What a trained network is pruned with in many ways, without fine-tuning."""

    MAKES: ClassVar[Makes] = A_COMPARISON

    hold_out: Number = None
    """Use this share of the one split there is, between 0 and 1, to measure on, and the rest as training images."""

    def trained(self) -> tuple[nn.Module, Data, torch.device]:
        """Return the trained network and the data, a share of it held out if asked, and where to compute."""
        from ..runs.job import find_data, find_device, find_model

        device, data = find_device(self.device), find_data(self.data, self.root, self.normalize)
        if self.hold_out is not None:
            data = obc.hold_out(data, "train" if data.train is not None else "val", share=self.hold_out, seed=self.seed)
        classes = len(data.classes) if self.num_classes is None else self.num_classes
        channels = {} if data.image_shape[0] == 3 else {"in_channels": data.image_shape[0]}
        return find_model(self.model, classes, self.weights, **channels).to(device), data, device

    def show(self, found: obc.Comparison | obc.Sweep) -> None:
        """Print a table and keep its figure."""
        from ..plots import save_html

        print(f"\n{found!r}\n\nfigures: {save_html(found.plot(), self.out / CURVES)}")


@dataclass(frozen=True, kw_only=True)
class Compare(ComparingOptions):
    """Compare criteria: prune a trained network step by step by each, without fine-tuning, and measure every step.

    What is finished is kept in the folder: the same command goes on after a stop. For example:

    obc compare --model resnet56 --weights resnet56.pth --data cifar10 --root data/cifar10 --criteria jacobian taylor l1
    --batches 10 --repeats 3 --out runs/criteria
    """

    TARGETS: ClassVar[tuple[int, float]] = (0, 1)
    EXPECTED: ClassVar[Mapping[str, Expected]] = {"macs": A_SHARE}
    criteria: Names = ("jacobian", "taylor", "hessian", "l1", "fpgm", "whc", "bn_scale", "random")
    """What to compare: jacobian, taylor, hessian, obdc, l1, l2, fpgm, whc, bn_scale, lamp, residual,
    random."""
    steps: int = 18
    """Pruning steps."""
    ratio: Number = None
    """Share of the channels removed at the end. Default: 0.9, unless --macs is given."""
    macs: Number = None
    """Share of the MACs left at the end, instead of --ratio."""
    repeats: int = 5
    """Repeats with other images, of the criteria that use any."""
    held_out: Whole = None
    """Held-out images to measure on. Default: all."""
    training: Whole = None
    """Training images to measure on; 0: none. Default: all."""
    until_chance: Flag = False
    """End a curve once the network only guesses."""

    def run(self) -> None:
        from ..comparing.compare import CompareSettings
        from ..runs.job import own_task

        model, data, _ = self.trained()
        comparison = obc.compare_criteria(
            model, data, self.criteria, task=own_task(self.task), folder=self.out, **self.given(CompareSettings)
        )
        self.show(comparison)


@dataclass(frozen=True, kw_only=True)
class Sweep(ComparingOptions):
    """Prune a trained network to many targets on one way, without fine-tuning, and measure it at each.

    Give the targets: --speedup, --macs, --params or --ratio, several values of each. All plans are kept in the folder,
    and the same command goes on after a stop. For example:

    obc sweep --model resnet56 --weights resnet56.pth --data cifar10 --root data/cifar10 --speedup 1.5 2 2.5 3
    --criteria jacobian l1 --out runs/frontier
    """

    TARGETS: ClassVar[tuple[int, float]] = (1, math.inf)

    speedup: Numbers = ()
    """Targets: how many times fewer MACs, such as 1.5 2 3."""
    macs: Numbers = ()
    """Targets: multiply-accumulate operations for one image, such as 100e6 60e6."""
    params: Numbers = ()
    """Targets: numbers of parameters, such as 600000 400000."""
    ratio: Numbers = ()
    """Targets: shares of all channels to remove, between 0 and 1."""
    criteria: Names = ("jacobian",)
    """What channels are scored by, one or several: jacobian, taylor, hessian, obdc, l1, l2, fpgm, whc, bn_scale, lamp,
    residual, random."""
    steps: int = 20
    """Pruning steps; what is left is scored again in each."""
    repeats: Whole = None
    """Forward passes to time each network with, beside the unpruned one. Default: none."""

    def run(self) -> None:
        from ..pruning.choices import OPERATIONS, TARGETS, Limits, Selection, Settings, Steps
        from ..runs.job import own_task
        from ..scoring.tasks import example_inputs

        task = own_task(self.task)
        model, data, device = self.trained()
        batches = obc.take(data.batches("train", self.batch_size, seed=self.seed, device=device), self.batches)
        found = obc.sweep(
            model,
            example_inputs(task, data, device),
            batches,
            targets={kind: values for kind in TARGETS if (values := getattr(self, kind))},
            criteria=self.criteria,
            held_out=data.batches("val", self.batch_size, shuffle=False, device=device).at(0),
            task=task,
            build=partial(obc.compensate, batches=batches.at(0), task=task) if self.compensate else obc.prune,
            counting=self.counting or OPERATIONS,
            repeats=self.repeats or 0,
            folder=self.out,
            seed=self.seed,
            group_reduction=self.group_reduction,
            normalizer=self.normalizer,
            **{name: value for name, value in self.given(Settings).items() if name in ("rows", "stop", "per")},
            **self.given(Selection) | self.given(Limits) | self.given(Steps),
        )
        self.show(found)


def run_and_report(job: obc.PruningJob, out: Path, overwrite: bool) -> None:
    """Do a job, keep it in its folder, and print the table."""
    from ..runs.job import REPORT
    from ..runs.pipeline import run_job
    from ..runs.report import write_job_report

    result = run_job(job, out, overwrite=overwrite)
    report = write_job_report(result, out / REPORT)
    print(f"\n{result!r}\n\nreport: {report}")


Devices = Annotated[tuple[int, ...], tyro.conf.arg(metavar="GPU ...", help_behavior_hint="")]
Place = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]


@dataclass(frozen=True, kw_only=True)
class RunExperiment(OneExperiment):
    """Do one of the paper's experiments: sparse training, pruning, naive fine-tuning, Equivalent Pruning, table.

    obc run vgg19-cifar100 --speedup 6 --root data/cifar100 --out runs/vgg19_6x
    """

    AFTER_STOP: ClassVar[str] = "the same command with --resume goes on from the last checkpoint"
    TARGETS: ClassVar[tuple[int, float]] = (0, 1)

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

    def job(self, **chosen: Any) -> obc.PruningJob:
        names = ("criterion", "group_reduction")
        chosen |= {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.speedup is not None or self.macs is not None:
            chosen["target"] = obc.Target(self.speedup, self.macs)
        return super().job(**chosen)

    def run(self) -> None:
        job = self.job()
        if self.background or self.processes != 1 or self.devices:
            devices = self.devices or ("cpu" if self.device == "cpu" else None)
            run = obc.launch(job, self.out, processes=self.processes, devices=devices, resume=self.resume)
            if not self.background:
                run.follow()
        else:
            run = obc.run_experiment(job, self.out)
        print(f"\n{obc.Run.open(self.out)!r}")
        if run.status == "failed":
            raise ValueError(run.error)
        if run.status == "finished":
            print(f"\n{run.table().to_string(index=False)}")


@dataclass(frozen=True, kw_only=True)
class Runs(Command):
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
        if (self.folder / GRID).is_file():
            grid = obc.Grid.open(self.folder)
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
                run = obc.Run.open(path)
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
    MAKES: ClassVar[Makes] = A_GRID

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
        changes = {key: value for key, value in self.changes().items() if key != "root"}
        jobs = obc.paper_grid(
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
        grid = obc.launch_grid(jobs, self.out, devices=self.devices or "cpu", each=self.each, resume=self.resume)
        if self.wait:
            grid.wait()
        print(grid.to_frame().to_string(index=False))


@dataclass(frozen=True, kw_only=True)
class Slurm(OneExperiment):
    """Write a run folder, on a disk that all nodes share, with a script for sbatch, on one node or several.

    obc slurm resnet50-imagenet --root /data/imagenet --nodes 2 --gpus 2 --out runs/resnet50
    """

    AFTER_STOP: ClassVar[str] = NOTHING_WRITTEN
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
class Evaluate(Command):
    """Evaluate a saved model, or a network with weights, on held-out images.

    obc evaluate runs/resnet56/merged --data cifar10 --root data/cifar10
    """

    AFTER_STOP: ClassVar[str] = NOTHING_WRITTEN

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
        from ..runs.job import find_data, find_device, find_model, own_task
        from ..scoring.tasks import CLASSIFICATION, count_outputs, example_inputs

        device, data = find_device(self.device), find_data(self.data, self.root, self.normalize)
        if (Path(self.model) / MANIFEST).is_file():
            model = obc.load_pruned(self.model).to(device)
        else:
            model = find_model(self.model, None, self.weights).to(device)
        batches, task = data.batches("val", self.batch_size, device=device), own_task(self.task)
        example = example_inputs(task, data, device)
        if task is CLASSIFICATION:
            check_classes(count_outputs(model, example), data)
        found = obc.evaluate(model, batches, task=task, progress=True)
        print(f"{found!r}\n{obc.cost(model, example)!r}")


# For `obc --help` alone all commands at once: there one line each is enough.
COMMANDS = {
    "demo": (Demo, "The whole job on handwritten digits, in 2 minutes."),
    "prune": (Prune, "The same on your own network and data."),
    "compare": (Compare, "Criteria beside each other, no fine-tuning."),
    "sweep": (Sweep, "One network at many targets, no fine-tuning."),
    "run": (RunExperiment, "One of the paper's experiments."),
    "runs": (Runs, "What runs there are; stop and resume them."),
    "grid": (GridCommand, "Many experiments over many GPUs."),
    "slurm": (Slurm, "A script for the SLURM scheduler."),
    "evaluate": (Evaluate, "Accuracy of a saved model."),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; exit with 2 after an error that the user can mend, with 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments) == ["--version"]:
        print(f"obc_tools {version('obc_tools')}")
        return
    command = parse(arguments)
    try:
        check(command)
        run(command)
    except KeyboardInterrupt:
        print(f"\nobc: stopped; {command.AFTER_STOP}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.stdout.flush()  # raises where it was printing that failed
        print(f"obc: error: {spelled(' '.join(str(error).split()), command)}", file=sys.stderr)
        sys.exit(2)


def parse(arguments: Sequence[str]) -> Command:
    """Return the command that the arguments spell; print help or what is wrong and exit where they spell none."""
    arguments = ["--help"] if list(arguments) == ["help"] else arguments
    if arguments and arguments[0] in COMMANDS:
        name, *rest = arguments
        return tyro.cli(COMMANDS[name][0], prog=f"obc {name}", args=rest, config=(tyro.conf.FlagCreatePairsOff,))
    listed = [Annotated[kind, tyro.conf.subcommand(name, description=text)] for name, (kind, text) in COMMANDS.items()]
    description = "Prune networks by whole channels, after Optimal Brain Connection (Chen et al. 2025)."
    return tyro.cli(reduce(or_, listed), prog="obc", args=arguments, description=description)


def run(command: Command) -> None:
    """Import what takes seconds, with a bar that moves meanwhile, and do what a command says."""
    for name in tqdm(HEAVY_IMPORTS, desc="loading libraries", unit="library", leave=False):
        importlib.import_module(name)
    with logging_to(logging.StreamHandler(sys.stderr)):
        command.run()
