"""Real curves: criteria against each other on trained networks, without fine-tuning.

    python benchmarks/criteria.py resnet56 --weights FILE --root DIR --folder runs/criteria_resnet56
    python benchmarks/criteria.py variants --weights FILE --root DIR --folder runs/criteria_variants
    python benchmarks/criteria.py efficientnet --weights FILE --root DIR --folder runs/criteria_efficientnet

`resnet56`: the published sparse-trained ResNet-56 on CIFAR-10 with the published comparison's normalisation, all
criteria, 5 % of the channels a step, until accuracy is at chance. `variants`: variants of the Jacobian Criterion (rows,
couplings, selection of sets) on the same network in coarser steps. `efficientnet`: EfficientNet-Lite0 on a sample of
ImageNet, one seeded half to score with, the other held out, once each. Each can be stopped and goes on where it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from obc_tools import CRITERIA, compare_criteria, hold_out, load_data, load_model

# MACs as the published comparisons count them.
PUBLISHED = {"counting": "torch_pruning"}
CIFAR10 = PUBLISHED | {"batches": 10, "repeats": 3, "until_chance": True}
RESNET56 = CIFAR10 | {"steps": 19, "ratio": 0.95, "held_out": 2000, "training": 2000}
VARIANT_STEPS = CIFAR10 | {"steps": 9, "ratio": 0.9, "held_out": 250, "training": 1000}
VARIANTS = {
    "jacobian, 128 images a row": {},
    "jacobian, 32 images a row": {"rows": 32},
    "jacobian, 1 image a row": {"rows": "sample"},
    "jacobian, 128 images a row, group": {"coupling": "group"},
    "jacobian, 32 images a row, group": {"rows": 32, "coupling": "group"},
    "jacobian, 1 image a row, group": {"rows": "sample", "coupling": "group"},
    "jacobian, 128 images a row, set": {"coupling": "set"},
    "jacobian, 1 image a row, set": {"rows": "sample", "coupling": "set"},
}
EFFICIENTNET = PUBLISHED | {"steps": 5, "macs": 0.5, "batches": 4, "batch_size": 32, "repeats": 1, "training": 0}


@dataclass(frozen=True)
class Options:
    """What to run."""

    what: tyro.conf.Positional[Literal["resnet56", "variants", "efficientnet"]]
    weights: Path
    root: Path
    folder: Path
    criteria: tuple[str, ...] = tuple(CRITERIA)


def resnet56(options: Options, criteria: Any, settings: Mapping[str, Any]) -> None:
    """Compare on CIFAR-10."""
    data = load_data("cifar10", options.root, normalize="benchmark")
    model = load_model("resnet56", num_classes=10, weights=options.weights)
    compare_criteria(model, data, criteria, folder=options.folder, **settings)


def efficientnet(options: Options) -> None:
    """Compare on a sample of ImageNet."""
    data = hold_out(load_data("imagenet", options.root, normalize="inception"), "val", share=0.5, seed=0)
    model = load_model("timm:tf_efficientnet_lite0", num_classes=1000, weights=options.weights)
    compare_criteria(model, data, options.criteria, folder=options.folder, **EFFICIENTNET)


def main() -> None:
    """Run one comparison and print its summary."""
    options = tyro.cli(Options)
    if options.what == "efficientnet":
        efficientnet(options)
    elif options.what == "resnet56":
        resnet56(options, options.criteria, RESNET56)
    else:
        resnet56(options, {label: ("jacobian", given) for label, given in VARIANTS.items()}, VARIANT_STEPS)


if __name__ == "__main__":
    main()
