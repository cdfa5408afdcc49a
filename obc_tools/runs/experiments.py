"""The paper's experiments as data, each with its source.

Source of all: Chen et al. 2025 (arXiv 2508.05521), sections on experiments, Tables IV and IX, and the run scripts and
defaults of its published code (release v0). What those scripts ask for and their code ignores is in ``requested``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from ..errors import UnknownNameError, check_name
from ..pruning.choices import TORCH_PRUNING, Target
from ..training.recipe import Recipe
from .job import PruningJob

SCRATCH = "scratch"
SMALL_EPOCHS = 1


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One experiment of the paper: a job at paper settings, and how it varies.

    Attributes:
        name: Its key in `EXPERIMENTS`.
        title: For people.
        source: Where its settings are from, and what differs from there.
        base: The job at the paper's settings, at the first target.
        baseline: How to train the network from scratch, for ``weights="scratch"``; None: only from weights.
        targets: Those of the paper, the first one first.
        seeds: Repetitions in the paper.
        processes: GPUs of the paper's runs; ``batch_size`` is that of one.
        variants: What a grid goes through beside targets and seeds: changes of the job.
        requested: Changes of the fine-tuning recipe that the published scripts ask for and their code ignores.
    """

    name: str
    title: str
    source: str
    base: PruningJob
    targets: tuple[Target, ...]
    baseline: Recipe | None = None
    seeds: tuple[int, ...] = (0,)
    processes: int = 1
    variants: tuple[Mapping[str, Any], ...] = ({},)
    requested: Mapping[str, Any] = field(default_factory=dict)

    def job(
        self,
        *,
        target: Target | None = None,
        seed: int = 0,
        weights: str | None = None,
        as_requested: bool = False,
        counting: str = TORCH_PRUNING,
        **changes: Any,
    ) -> PruningJob:
        """Return the job at the paper's settings.

        Args:
            target: What to prune to; None: the first of the paper's.
            seed: Of everything random, in every recipe.
            weights: Of the unpruned network: a file, a name of `load_model`, or "scratch" to train it first. None: the
                paper's.
            as_requested: Train by what the published scripts ask for, also where their code ignores it.
            counting: What the target's MACs are, whatever it says itself; the paper's are torch_pruning's.
            **changes: Other fields of the job, such as ``root`` or ``criterion``. Other ``steps`` than the paper's go
                with ``last_step="exact"`` unless that is said too: the published rule stops after the whole step
                that passes the target, so that fewer steps would go far beyond it.

        Raises:
            ValueError: for "scratch" without a baseline, and for fields that contradict each other.
        """
        for name in changes:
            check_name("field of a job", name, [entry.name for entry in fields(PruningJob)])
        if changes.get("steps", self.base.steps) != self.base.steps:
            changes.setdefault("last_step", "exact")
        other_data = changes.get("data", self.base.data)
        title = self.title if other_data == self.base.data else f"{self.title}, here on {other_data}"
        target = replace(target or self.targets[0], counting=counting)
        job = replace(self.base, target=target, seed=seed, title=title)
        if weights == SCRATCH:
            if self.baseline is None:
                raise ValueError(f"{self.name} has no recipe from scratch: pass weights='pretrained' or a file")
            job = replace(job, weights=None, pretrain=self.baseline)
        elif weights is not None:
            job = replace(job, weights=weights)
        if as_requested:
            job = replace(job, finetune=replace(job.finetune, **self.requested))
        return replace(job.with_recipes(seed=seed), **changes)

    def small(self, **changes: Any) -> PruningJob:
        """Return the job at a size for a CPU and a few minutes: the same network and stages, little of everything.

        Takes the arguments of :meth:`job`. What comes out says that everything runs, and nothing about accuracy. So
        "scratch" goes where there is no baseline too: by the recipe of fine-tuning.
        """
        plain = replace(self.base.finetune, label_weight=1.0, distill_weight=0.0)
        imagenet = self.base.data == "imagenet"
        batch = 4 if imagenet else 32
        little = {"epochs": SMALL_EPOCHS, "batch_size": batch, "warmup_epochs": 0, "amp": "no"}
        sizes = {"train_images": 8, "val_images": 8} if imagenet else {"train_images": 128, "val_images": 128}
        sizes |= {"steps": 1 if imagenet else 2, "batches": 2, "batch_size": batch}
        job = replace(self, baseline=self.baseline or plain).job(**(sizes | changes))
        shortened = {name: _shortened(recipe, little) for name, recipe in job.recipes.items()}
        return replace(job, title=f"{job.title}, small run", **shortened)


def _shortened(recipe: Recipe, little: Mapping[str, Any]) -> Recipe:
    schedule = {"milestones": (), "schedule": "cosine"} if recipe.milestones else {}
    # The learning rate belongs to the batch: one for 256 images blows up a step over 4 (Goyal et al. 2017).
    lr = recipe.lr * little["batch_size"] / recipe.batch_size
    return replace(recipe, **little, **schedule, lr=lr)


def get_experiment(name: str) -> Experiment:
    """Return an experiment by name; raise ValueError with the closest names otherwise."""
    if name not in EXPERIMENTS:
        raise UnknownNameError("experiment", name, list(EXPERIMENTS))
    return EXPERIMENTS[name]


_target = partial(Target, counting=TORCH_PRUNING)

_CIFAR_SHARED = {"batch_size": 128, "momentum": 0.9, "weight_decay": 5e-4, "schedule": "multistep", "gamma": 0.1}
_CIFAR = Recipe(epochs=100, lr=0.01, milestones=(60, 80), **_CIFAR_SHARED)
_CIFAR_BASELINE = Recipe(epochs=200, lr=0.1, milestones=(120, 150, 180), **_CIFAR_SHARED)
_CIFAR_SPARSE = replace(_CIFAR, weight_decay=0.0, group_penalty=5e-4)
_CIFAR_JOB = {"weights": "published", "steps": 400, "last_step": "full", "batches": 50, "batch_size": 128}
_CIFAR_JOB |= {"sparse": _CIFAR_SPARSE, "equivalent": True}

_IMAGENET = {"schedule": "cosine", "schedule_by": "epoch", "amp": "fp16"}
_IMAGENET_JOB = {"data": "imagenet", "weights": "pretrained", "steps": 100, "last_step": "full", "batches": 50}
_DISTILLED = {"label_weight": 0.5, "distill_weight": 0.5, "temperature": 4.0}

VGG19 = Experiment(
    name="vgg19-cifar100",
    title="VGG-19 on CIFAR-100",
    source=(
        "Tables IV and IX; run_cifar.sh and main_cifar.py. Compressors and decompressors: learning rate / 5, weight "
        "decay x 1. Table IX names normalizer None with reductions max, mean, sum, and mean with mean; the "
        "published script's grid is max, sum, first with None. Its sparse training regularises with torch_pruning's "
        "GroupNormPruner, normalizer max, which does not change the formula."
    ),
    base=PruningJob(
        model="vgg19",
        data="cifar100",
        target=_target(speedup=1.5),
        scope="local",
        finetune=replace(_CIFAR, compressor_lr_scale=1 / 5),
        **_CIFAR_JOB,
    ),
    baseline=_CIFAR_BASELINE,
    targets=tuple(_target(speedup=value) for value in (1.5, 3.0, 6.0, 9.0, 12.0)),
    seeds=(0, 1, 2),
    variants=(
        {"group_reduction": "max"},
        {"group_reduction": "mean"},
        {"group_reduction": "sum"},
        {"group_reduction": "mean", "normalizer": "mean"},
        {"group_reduction": "max", "criterion": "l2"},
        {"group_reduction": "mean", "criterion": "l2"},
        {"group_reduction": "sum", "criterion": "l2"},
        {"group_reduction": "mean", "normalizer": "mean", "criterion": "l2"},
    ),
)

RESNET56 = Experiment(
    name="resnet56-cifar10",
    title="ResNet-56 on CIFAR-10",
    source=(
        "Table IV; run_cifar.sh and main_cifar.py. Global, sum, no normalizer. Compressors and decompressors: "
        "learning rate x 2 (the script divides by 0.5), weight decay 0."
    ),
    base=PruningJob(
        model="resnet56",
        data="cifar10",
        target=_target(speedup=2.11),
        scope="global",
        finetune=replace(_CIFAR, compressor_lr_scale=2.0, compressor_weight_decay_scale=0.0),
        **_CIFAR_JOB,
    ),
    baseline=_CIFAR_BASELINE,
    targets=(_target(speedup=2.11), _target(speedup=2.55)),
    seeds=(0, 1, 2),
)

_RESNET50_SHARED = {"batch_size": 256, "momentum": 0.9, **_IMAGENET, **_DISTILLED}
RESNET50 = Experiment(
    name="resnet50-imagenet",
    title="ResNet-50 on ImageNet",
    source=(
        "Table of ImageNet results; run_Imagenet.sh and main_imagenet_EP_resnet.py, 4 GPUs. torchvision's "
        "pretrained weights start and teach; stem, downsamples and each block's last convolution keep their width. "
        "Mixed precision is fp16, as the script's. The schedule moves once an epoch. Its options lr-step-size and "
        "sl-lr-step-size have no effect beside a cosine."
    ),
    base=PruningJob(
        model="torchvision:resnet50",
        target=_target(macs=2.04e9),
        scope="global",
        batch_size=256,
        ignore=("conv1", "layer*.downsample.0", "layer*.conv3", "fc"),
        sparse=Recipe(epochs=30, lr=0.08, weight_decay=0.0, group_penalty=1e-4, **_RESNET50_SHARED),
        finetune=Recipe(
            epochs=100,
            lr=0.04,
            weight_decay=1e-4,
            compressor_lr_scale=1 / 4,
            compressor_weight_decay_scale=0.0,
            **_RESNET50_SHARED,
        ),
        equivalent=True,
        **_IMAGENET_JOB,
    ),
    targets=(_target(macs=2.04e9),),
    processes=4,
)

_MOBILENET_SHARED = {"batch_size": 512, "lr": 0.036, "momentum": 0.9, **_IMAGENET}
MOBILENETV2 = Experiment(
    name="mobilenetv2-imagenet",
    title="MobileNetV2 on ImageNet",
    source=(
        "Table of ImageNet results; run_Imagenet.sh and main_imagenet_EP_mobilenet.py, 4 GPUs. Global over "
        "isomorphic groups, the last convolution keeps its width, dropout 0.2. Published without Equivalent "
        "Pruning, whose path in that script cannot run; ours offers it, with compressors at learning rate and "
        "weight decay x 1 (not the paper's). group_penalty regularises depthwise kernels too, which torch_pruning "
        "leaves out."
    ),
    base=PruningJob(
        model="torchvision:mobilenet_v2",
        model_options={"dropout": 0.2},
        target=_target(macs=0.154e9),
        scope="isomorphic",
        batch_size=256,
        ignore=("features.18.0", "classifier.1"),
        sparse=Recipe(epochs=150, weight_decay=0.0, group_penalty=1e-4, **_MOBILENET_SHARED),
        finetune=Recipe(epochs=300, weight_decay=2e-5, **_MOBILENET_SHARED),
        **_IMAGENET_JOB,
    ),
    targets=(_target(macs=0.154e9),),
    processes=4,
)

VIT = Experiment(
    name="vit-b16-imagenet",
    title="ViT-B/16 on ImageNet",
    source=(
        "Table of ImageNet results; run_Imagenet.sh and main_imagenet_EP_VIT.py, 4 GPUs. Global over the hidden "
        "widths of the MLPs, multiples of 12 (the script rounds to the number of heads). Scored on the training "
        "pipeline, its mixed labels included. The script asks for repeated augmentation (3 copies) and for clipping "
        "at norm 1; its code uses neither (the sampler is commented out, clipping sits in the branch without mixed "
        "precision)."
    ),
    base=PruningJob(
        model="torchvision:vit_b_16",
        target=_target(macs=10e9),
        scope="global",
        round_to=12,
        ignore=("conv_proj", "encoder.layers.*.self_attention"),
        batch_size=64,
        calibrate_as_trained=True,
        finetune=Recipe(
            epochs=100,
            batch_size=128,
            optimizer="adamw",
            lr=1.25e-4,
            weight_decay=0.05,
            warmup_epochs=30,
            warmup_start=0.033,
            mixup=0.8,
            cutmix=1.0,
            rand_augment=9,
            erase=0.25,
            label_smoothing=0.11,
            ema_every=32,
            ema_decay=0.99998,
            compressor_lr_scale=1 / 5,
            compressor_weight_decay_scale=0.0,
            **_IMAGENET,
            **_DISTILLED,
        ),
        equivalent=True,
        **_IMAGENET_JOB,
    ),
    targets=(_target(macs=10e9),),
    processes=4,
    requested={"repeats": 3, "clip_norm": 1.0},
)

EXPERIMENTS: Mapping[str, Experiment] = MappingProxyType(
    {experiment.name: experiment for experiment in (VGG19, RESNET56, RESNET50, MOBILENETV2, VIT)}
)
"""The paper's experiments by name."""
