"""The command line, `obc`. Torch is imported only once a command runs, so help comes at once.

A command is a dataclass of its arguments with a method `run`.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro
from tqdm import tqdm

from ..files import logging_to
from .arguments import Choice, Flag, Folder, Name, Names, Number, Whole
from .compare import Compare
from .runs import Evaluate, GridCommand, RunExperiment, Runs, Slurm

if TYPE_CHECKING:
    from ..runs.job import PruningJob


NOTHING_WRITTEN = "nothing was written"
DEMO_TITLE = "Demo: handwritten digits, a small ResNet, half the MACs"
HEAVY_IMPORTS = ("numpy", "torch", "torchvision", "timm", "torch_pruning", "accelerate", "sklearn.datasets", "plotly")


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Do the whole job on handwritten digits, which come with scikit-learn; nothing is downloaded.

    A small ResNet is trained from scratch, pruned by the Jacobian Criterion to half its MACs and fine-tuned twice with
    the same plan, recipe and seeds: naively and with Equivalent Pruning. Takes less than 2 minutes on 2 CPU cores.
    """

    AFTER_STOP: ClassVar[str] = NOTHING_WRITTEN

    out: Folder = Path("runs/demo")
    """Folder for the report, the models and all figures. A demo's own folder is replaced, no other."""
    overwrite: Flag = False
    """Replace whatever run the folder holds, not only an earlier demo."""
    seed: int = 0
    """Fixes the network's first weights, the order of the images and their augmentation."""

    def job(self) -> PruningJob:
        from ..pruning.choices import Target
        from ..runs.job import PruningJob
        from ..training.recipe import Recipe

        return PruningJob(
            title=DEMO_TITLE,
            model="resnet20",
            data="digits",
            target=Target(speedup=2.0),
            batches=10,
            batch_size=64,
            steps=10,
            # Shifted by two of eight pixels, digits leave the picture.
            augment=False,
            pretrain=Recipe(epochs=15, lr=0.1, batch_size=64, warmup_epochs=1, augment=False, seed=self.seed),
            finetune=Recipe(epochs=6, lr=0.02, batch_size=64, augment=False, seed=self.seed),
            equivalent=True,
            seed=self.seed,
            device="cpu",
        )

    def run(self) -> None:
        import torch

        # 8 x 8 pixels are too few to share out: on a busy machine a second thread made the demo ten times slower.
        torch.set_num_threads(1)
        run_and_report(self.job(), self.out, self.may_overwrite())

    def may_overwrite(self) -> bool:
        from ..runs.folder import RunFolderError, read_results

        try:
            return self.overwrite or read_results(self.out)["job"]["title"] == DEMO_TITLE
        except RunFolderError:
            return False


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Prune a trained network to a target, fine-tune it, and write models, figures and a report into a folder.

    Give one target: --speedup, --macs, --params or --ratio. For example:

    obc prune --model resnet56 --weights resnet56.pth --data cifar10 --root data/cifar10 --speedup 2.11
    --epochs 1 --equivalent --out runs/resnet56
    """

    AFTER_STOP: ClassVar[str] = NOTHING_WRITTEN

    model: Name
    """Network: resnet20, resnet56, vgg19, ...; torchvision:resnet50, timm:vit_base_patch16_224, ..."""
    weights: Annotated[str, tyro.conf.arg(metavar="FILE")]
    """Its weights: a file (.safetensors, or a state dict saved by torch.save), "pretrained" (torchvision's or timm's),
    "published" or "published-sparse" (the paper's)."""
    data: Name
    """Data set: digits, cifar10, cifar100, imagenet, or folder (class folders in train/ and val/ or test/)."""
    out: Folder
    """Folder to make for the report, the models and all figures."""
    root: Annotated[str | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Where the data lies: torchvision's files, class folders, or (CIFAR) one .npz file. Digits need none."""
    num_classes: Whole = None
    """Outputs of the network. Default: as many as the weights have."""
    normalize: Choice = None
    """Normalisation of the images. CIFAR: training (default) or benchmark; others: imagenet (default) or inception."""
    speedup: Number = None
    """Target: how many times fewer MACs, such as 2.11."""
    macs: Number = None
    """Target: multiply-accumulate operations for one image, such as 60e6."""
    params: Number = None
    """Target: number of parameters, such as 400000."""
    ratio: Number = None
    """Target: share of all channels to remove, between 0 and 1."""
    criterion: Name = "jacobian"
    """What channels are scored by: jacobian, taylor, hessian, obdc, l1, l2, fpgm, whc, bn_scale, lamp or random."""
    scope: Name = "global"
    """Which channels are ranked together: global (all), local (those of a layer), isomorphic (those of like layers)."""
    group_reduction: Name = "sum"
    """How scores of the layers that share a channel are combined: sum, mean, max, prod or first."""
    normalizer: Choice = None
    """How scores are scaled within a layer's group: sum, mean, max, gaussian, standarization or parameters."""
    round_to: Whole = None
    """Keep a multiple of so many channels in every layer."""
    ignore: Names = ()
    """Layers that keep their width: names or patterns, such as conv1 'layer1.*'."""
    whole_heads: Flag = False
    """Let attentions lose whole heads; by default all heads lose the same positions."""
    only: Choice = None
    """Prune only this part: mlp (hidden channels), attention (its channels, or heads), bottleneck (both)."""
    steps: int = 20
    """Pruning steps; what is left is scored again in each."""
    batches: int = 50
    """Batches of training images to score with, drawn afresh (and augmented) for every step."""
    batch_size: int = 128
    """Images in a batch, for scoring and for fine-tuning."""
    epochs: int = 0
    """Passes over the training images to fine-tune for. 0: prune only."""
    lr: float = 0.01
    """Learning rate at the start of fine-tuning (SGD); it falls to 0 along a cosine."""
    equivalent: Flag = False
    """Fine-tune with Equivalent Pruning too, merge, and compare."""
    seed: int = 0
    """Fixes the order of the images and their augmentation; both ways of fine-tuning see the same."""
    device: Name = "auto"
    """Where to compute: auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    overwrite: Flag = False
    """Replace the run that the folder holds."""

    def job(self) -> PruningJob:
        from ..pruning.choices import Target
        from ..runs.job import PruningJob
        from ..training.recipe import Recipe

        if self.epochs < 0:
            raise ValueError(f"epochs must be at least 0, not {self.epochs}")
        recipe = Recipe(epochs=max(self.epochs, 1), batch_size=self.batch_size, lr=self.lr, seed=self.seed)
        same = ("model", "weights", "data", "root", "num_classes", "normalize", "criterion", "scope", "group_reduction")
        same += ("normalizer", "round_to", "ignore", "whole_heads", "only", "steps", "batches", "batch_size")
        same += ("equivalent", "seed", "device")
        return PruningJob(
            title=f"Pruning {self.model} on {self.data}",
            target=Target(self.speedup, self.macs, self.params, self.ratio),
            finetune=recipe if self.epochs else None,
            **{name: getattr(self, name) for name in same},
        )

    def run(self) -> None:
        run_and_report(self.job(), self.out, self.overwrite)


def run_and_report(job: PruningJob, out: Path, overwrite: bool) -> None:
    """Do a job, keep it in its folder, and print the table."""
    from ..runs.folder import REPORT, run_job
    from ..runs.report import write_job_report

    result = run_job(job, out, overwrite=overwrite)
    report = write_job_report(result, out / REPORT)
    print(f"\n{result!r}\n\nreport: {report}")


Command = Demo | Prune | Compare | RunExperiment | Runs | GridCommand | Slurm | Evaluate
COMMANDS: dict[str, type[Command]] = {
    "demo": Demo,
    "prune": Prune,
    "compare": Compare,
    "run": RunExperiment,
    "runs": Runs,
    "grid": GridCommand,
    "slurm": Slurm,
    "evaluate": Evaluate,
}
# All commands at once, for `obc --help` alone: there one line each is enough.
OVERVIEW = (
    Annotated[Demo, tyro.conf.subcommand("demo", description="The whole job on handwritten digits, in 2 minutes.")]
    | Annotated[Prune, tyro.conf.subcommand("prune", description="The same on your own network and data.")]
    | Annotated[Compare, tyro.conf.subcommand("compare", description="Criteria beside each other, no fine-tuning.")]
    | Annotated[RunExperiment, tyro.conf.subcommand("run", description="One of the paper's experiments.")]
    | Annotated[Runs, tyro.conf.subcommand("runs", description="What runs there are; stop and resume them.")]
    | Annotated[GridCommand, tyro.conf.subcommand("grid", description="Many experiments over many GPUs.")]
    | Annotated[Slurm, tyro.conf.subcommand("slurm", description="A script for the SLURM scheduler.")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate", description="Accuracy of a saved model.")]
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; exit with 2 after an error that the user can mend, with 130 after Ctrl-C."""
    command = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        run(command)
    except KeyboardInterrupt:
        print(f"\nobc: stopped; {command.AFTER_STOP}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"obc: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def parse(arguments: Sequence[str]) -> Command:
    """Return the command that the arguments spell; print help or what is wrong and exit where they spell none."""
    if arguments and arguments[0] in COMMANDS:
        name, *rest = arguments
        return tyro.cli(COMMANDS[name], prog=f"obc {name}", args=rest, config=(tyro.conf.FlagCreatePairsOff,))
    description = "Prune networks by whole channels, after Optimal Brain Connection (Chen et al. 2025)."
    return tyro.cli(OVERVIEW, prog="obc", args=arguments, description=description)


def run(command: Command) -> None:
    """Do what a command says."""
    _import_libraries()
    with logging_to(logging.StreamHandler(sys.stderr)):
        command.run()


def _import_libraries() -> None:
    """Import what takes seconds, with a bar that moves meanwhile."""
    for name in tqdm(HEAVY_IMPORTS, desc="loading libraries", unit="library", leave=False):
        importlib.import_module(name)
