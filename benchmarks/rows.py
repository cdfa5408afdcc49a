"""How many images do sample rows need for the ranking that batch rows give with 50 batches of 128?

    python benchmarks/rows.py --weights FILE --root DIR [--out results/rows_resnet56.csv]

On the published ResNet-56 and CIFAR-10's training images (no augmentation, benchmark normalisation). Two references
from 12,800 images each, one with a row a batch of 128 and one with a row an image. Then, from other draws, estimates
with a growing number of images: the Spearman correlation of all prunable channels' group scores with both references,
and the accuracy on held-out test images after pruning 30 % and 50 % of the channels in one step (global), three seeds.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pandas as pd
import torch
import tyro
from torch import Tensor, nn
from tqdm.auto import tqdm

from obc_tools import ChannelGroup, evaluate, find_groups, load_data, load_model, make_plan, prune
from obc_tools.scoring.jacobian import model_axes, stream_products
from obc_tools.scoring.scores import reduce_members, sum_squares


@dataclass(frozen=True)
class Options:
    """What to run."""

    weights: Path
    root: Path
    out: Path = Path("results/rows_resnet56.csv")
    batch_size: int = 128
    reference_batches: int = 100
    batches: tuple[int, ...] = (1, 2, 5, 10, 25, 50)
    ratios: tuple[float, ...] = (0.3, 0.5)
    seeds: tuple[int, ...] = (0, 1, 2)
    test_images: int = 2000


Scores = dict[ChannelGroup, Tensor]


def running_scores(
    model: nn.Module, groups: Iterable[ChannelGroup], batches: Iterable, rows: str, at: Iterable[int]
) -> Iterator[tuple[int, Scores]]:
    """Yield the group scores after each of the given numbers of batches, in one pass."""
    stream = stream_products(model, tqdm(batches, desc=f"{rows} rows", leave=False), model_axes(model), rows=rows)
    totals: dict = {}
    done = 0
    for wanted in at:
        for axis, squares in sum_squares(islice(stream, wanted - done)).items():
            totals[axis] = totals.get(axis, 0) + squares
        done = wanted
        yield done, {group: reduce_members(group, group.members, totals, "sum") for group in groups}


def spearman(a: Scores, b: Scores) -> float:
    """Return the rank correlation over all channels of all groups."""
    ours, theirs = (torch.cat(list(scores.values())).argsort().argsort().double() for scores in (a, b))
    return torch.corrcoef(torch.stack([ours, theirs]))[0, 1].item()


def main(options: Options) -> None:
    model = load_model("resnet56", num_classes=10, weights=options.weights)
    data = load_data("cifar10", root=options.root, normalize="benchmark")
    test = list(islice(data.batches("val", 500, seed=0, shuffle=True), options.test_images // 500))
    everything = find_groups(model, test[0][0][:1], ignore=["fc"])
    groups = [group for group in everything if group.prunable]
    whole = {group: torch.zeros(group.width) for group in everything if not group.prunable}

    def accuracy(scores: Scores, ratio: float) -> float:
        return evaluate(prune(model, make_plan(scores | whole, ratio=ratio)), test).accuracy

    def draw(seed: int, number: int) -> list:
        return list(islice(data.batches("train", options.batch_size, seed=seed, shuffle=True), number))

    reference_batches = draw(1000, options.reference_batches)
    references = {
        rows: next(running_scores(model, groups, reference_batches, rows, [options.reference_batches]))[1]
        for rows in ("batch", "sample")
    }
    records = []
    for seed in options.seeds:
        batches = draw(seed, max(options.batches))
        for rows in ("batch", "sample"):
            for count, scores in running_scores(model, groups, batches, rows, options.batches):
                record = {"rows": rows, "seed": seed, "images": count * options.batch_size}
                record |= {f"spearman with {name} reference": spearman(scores, r) for name, r in references.items()}
                record |= {f"accuracy at {ratio:.0%}": accuracy(scores, ratio) for ratio in options.ratios}
                records.append(record)
    frame = pd.DataFrame(records)
    frame["hardware"], frame["torch"] = (
        f"CPU {platform.machine()}, {torch.get_num_threads()} threads",
        torch.__version__,
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(options.out, index=False, float_format="%.5f")
    print(
        "accuracy by reference scores:",
        {(name, ratio): accuracy(scores, ratio) for name, scores in references.items() for ratio in options.ratios},
    )
    print("references with each other:", spearman(references["batch"], references["sample"]))
    summary = frame.drop(columns=["seed", "hardware", "torch"]).groupby(["rows", "images"]).agg(["mean", "std"])
    print(summary.to_string(float_format="{:.3f}".format))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
