"""`obc compare`: criteria against each other without fine-tuning, from a terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import tyro

from .arguments import Choice, Flag, Folder, Name, Names, Number, Whole

REPORT = "curves.html"


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Compare criteria: prune a trained network step by step by each, without fine-tuning, and measure every step.

    What is finished is kept in the folder: the same command goes on after a stop. For example:

    obc compare --model resnet56 --weights resnet56.pth --data cifar10 --root data/cifar10 --criteria jacobian taylor l1
    --batches 10 --repeats 3 --out runs/criteria
    """

    AFTER_STOP: ClassVar[str] = "the same command goes on from the last finished step"

    model: Name
    """Network: resnet20, resnet56, vgg19, ...; torchvision:resnet50, timm:vit_base_patch16_224, ..."""
    weights: Annotated[str, tyro.conf.arg(metavar="FILE")]
    """Its weights: a file, "pretrained", "published" or "published-sparse"."""
    data: Name
    """Data set: digits, cifar10, cifar100, imagenet, or folder. Calibration images are its training images."""
    out: Folder
    """Folder for the curves, the table and the figures."""
    root: Annotated[str | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Where the data lies. Digits need none."""
    num_classes: Whole = None
    """Outputs of the network. Default: the classes of the data."""
    normalize: Choice = None
    """Normalisation of the images. CIFAR: training (default) or benchmark; others: imagenet (default) or inception."""
    hold_out: Number = None
    """Use this share of the one split there is, between 0 and 1, to measure on, and the rest as training images."""
    criteria: Names = ("jacobian", "taylor", "hessian", "l1", "fpgm", "whc", "bn_scale", "random")
    """What to compare: jacobian, taylor, hessian, obdc, l1, l2, fpgm, whc, bn_scale, lamp, random."""
    steps: int = 18
    """Pruning steps."""
    ratio: Number = None
    """Share of the channels removed at the end. Default: 0.9, unless --macs is given."""
    macs: Number = None
    """Share of the MACs left at the end, instead of --ratio."""
    scope: Name = "global"
    """Which channels are ranked together: global (all), local (those of a layer), isomorphic (those of like layers)."""
    batches: int = 50
    """Batches of training images to score with in a step."""
    batch_size: int = 128
    """Images in a batch."""
    repeats: int = 5
    """Repeats with other images, of the criteria that use any."""
    held_out: Whole = None
    """Held-out images to measure on. Default: all."""
    training: Whole = None
    """Training images to measure on; 0: none. Default: all."""
    until_chance: Flag = False
    """End a curve once the network only guesses."""
    group_reduction: Name = "sum"
    """How scores of the layers that share a channel are combined: sum, mean, max, prod or first."""
    normalizer: Choice = None
    """How scores are scaled within a layer's group: sum, mean, max, gaussian, standarization or parameters."""
    ignore: Names = ()
    """Layers that keep their width: names or patterns."""
    whole_heads: Flag = False
    """Let attentions lose whole heads; by default all heads lose the same positions."""
    only: Choice = None
    """Prune only this part: mlp (hidden channels), attention (its channels, or heads), bottleneck (both)."""
    round_to: Whole = None
    """Keep a multiple of so many channels in every layer."""
    seed: int = 0
    """Fixes the images that are drawn."""
    device: Name = "auto"
    """Where to compute: auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""

    def run(self) -> None:
        from ..comparing.compare import compare_criteria
        from ..data.data import hold_out, load_data
        from ..models.networks import load_model
        from ..plots.jtj import save_html
        from ..runs.job import find_device

        device = find_device(self.device)
        data = load_data(self.data, self.root, normalize=self.normalize)
        if self.hold_out is not None:
            data = hold_out(data, "train" if data.train is not None else "val", share=self.hold_out, seed=self.seed)
        classes = self.num_classes or len(data.classes)
        channels = {} if data.image_shape[0] == 3 else {"in_channels": data.image_shape[0]}
        same = ("steps", "macs", "scope", "batches", "batch_size", "repeats", "held_out", "training", "until_chance")
        same += ("group_reduction", "normalizer", "ignore", "whole_heads", "only", "round_to", "seed")
        end = {} if self.ratio is None else {"ratio": self.ratio}
        comparison = compare_criteria(
            lambda: load_model(self.model, num_classes=classes, weights=self.weights, **channels).to(device),
            data,
            self.criteria,
            folder=self.out,
            **{name: getattr(self, name) for name in same},
            **end,
        )
        figure = save_html(comparison.plot(), self.out / REPORT)
        print(f"\n{comparison!r}\n\nfigures: {figure}")
