"""Prune a real network: EfficientNet-Lite0 with ImageNet weights to 0.8 of its MACs by the Jacobian Criterion.

    python benchmarks/efficientnet_imagenet.py --weights tf_efficientnet_lite0_imagenet.safetensors \
        --images imagenet_sample [--steps 4 --batches 8 --batch-size 32]

The images are halved by a seed: one half scores, the other evaluates; no image is in both. Nothing is trained. The
network, the pruned one, Equivalent Pruning at its start and its merge are evaluated, and the plan is proven by
`check_plan`. With one image a class the sample shows what pruning does, not an accuracy to quote.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from obc_tools import EquivalentModel, check_plan, cost, evaluate, load_data, load_model, prune, prune_to, take
from obc_tools.data.data import Data
from obc_tools.data.images import ImageFiles
from obc_tools.files import environment

NAME = "timm:tf_efficientnet_lite0"


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        weights: the network's weights, safetensors.
        images: a folder with ``val/<class>/<image>``.
        share: of the network's MACs that stay.
        steps: rounds of scoring and removing.
        batches, batch_size: calibration images a round.
        limit: images of each half to use at most.
        size: height and width of the images.
        out: the results.
    """

    weights: Path
    images: Path
    share: float = 0.8
    steps: int = 4
    batches: int = 8
    batch_size: int = 32
    limit: int = 500
    size: int = 224
    seed: int = 0
    out: Path = Path(__file__).parents[1] / "results" / "efficientnet_lite0_imagenet.json"


def halves(root: Path, *, size: int, limit: int, seed: int) -> Data:
    """Return the held-out images of ImageNet as two disjoint splits, drawn by a seed: train scores, val evaluates."""
    data = load_data("imagenet", root, normalize="inception", image_size=size)
    order = torch.randperm(len(data.val), generator=torch.Generator().manual_seed(seed)).tolist()
    middle = len(order) // 2
    scoring, evaluating = (_part(data.val, half[:limit]) for half in (order[:middle], order[middle:]))
    return Data(scoring, evaluating, data.classes, data.normalization, data.name)


def _part(files: ImageFiles, chosen: list[int]) -> ImageFiles:
    return ImageFiles(tuple(files.paths[i] for i in chosen), files.labels[chosen], files.size)


def run(options: Options) -> dict[str, Any]:
    """Prune, prove and evaluate; return all figures."""
    start = time.perf_counter()
    model = load_model(NAME, weights=options.weights).eval()
    data = halves(options.images, size=options.size, limit=options.limit, seed=options.seed)
    scoring = take(data.batches("train", options.batch_size, seed=options.seed, workers=0), options.batches)
    held_out = list(data.batches("val", 50, workers=0))
    example = held_out[0][0][:1]
    plan = prune_to(model, example, scoring, speedup=1 / options.share, steps=options.steps, progress=False)
    pruned, equivalent = prune(model, plan), EquivalentModel(model, plan)
    networks = {"original": model, "pruned": pruned, "EP, start": equivalent, "EP, merged": equivalent.merge()}
    check = check_plan(model, plan, held_out[0][0][:2])
    return {
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in _public(options).items()},
        "images": {"scoring": len(data.train), "evaluated": len(data.val)},
        "channels": {"prunable": plan.channels, "removed": plan.channels_removed},
        "macs": {name: cost(networks[name], example).macs for name in ("original", "pruned", "EP, merged")},
        "parameters": {name: cost(networks[name], example).params for name in ("original", "pruned", "EP, merged")},
        "metrics": {name: asdict(evaluate(network, held_out)) for name, network in networks.items()},
        "largest logit difference to pruned": {
            name: _difference(networks[name], pruned, held_out[0][0]) for name in ("EP, start", "EP, merged")
        },
        "check": check.to_frame().to_dict("records"),
        "seconds": time.perf_counter() - start,
        "environment": environment(torch.device("cpu")),
    }


def _public(options: Options) -> dict[str, Any]:
    """Return the options without the folders of this machine."""
    chosen = vars(options) | {"weights": options.weights.name, "images": options.images.name}
    return {name: value for name, value in chosen.items() if name != "out"}


@torch.no_grad()
def _difference(first: nn.Module, second: nn.Module, images: Tensor) -> float:
    return (first.eval()(images) - second.eval()(images)).abs().max().item()


def main(options: Options) -> None:
    results = run(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for name, metrics in results["metrics"].items():
        print(f"{name}: top-1 {metrics['accuracy']:.2%}, top-5 {metrics['top5']:.2%}, loss {metrics['loss']:.4f}")
    print(results["macs"], results["largest logit difference to pruned"], f"{results['seconds']:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
