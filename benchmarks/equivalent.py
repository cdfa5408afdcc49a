"""Time a training step of Equivalent Pruning against a naive one: the same pruned network, batch and optimizer.

    python benchmarks/equivalent.py [--model resnet56 --speedup 2.11 --batch-size 128 --pairs 30 --precision bf16]

Steps alternate in one process (naive, EP, naive, ...) after a warm-up; the ratio is taken pair by pair and its median
and quartiles are printed, beside their limit: the multiplications that EP adds, counted. The plan comes from L2 scores
with random weights: timing does not depend on which channels go. Nothing is downloaded.
"""

from __future__ import annotations

import platform
import statistics
import time
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from torch import nn

from obc_tools import EquivalentModel, cost, load_model, prune, prune_to


@dataclass(frozen=True)
class Options:
    """What to time."""

    model: str = "resnet56"
    classes: int = 10
    speedup: float = 2.11
    batch_size: int = 128
    size: int = 32
    pairs: int = 30
    warmup: int = 3
    device: str = "cpu"
    precision: Literal["no", "bf16"] = "no"


def stepper(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, precision: str = "no"):
    """Return a function that takes one SGD step of the model and returns its seconds."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        if images.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return step


def multiplications(equivalent: EquivalentModel) -> int:
    """Return how many multiplications C·W·D takes for all layers in its cheaper order; backward it is twice as many.

    So it is for the naive step: each product's two gradients take as many as the product.
    """
    total = 0
    for mixed in equivalent.mixed_layers.values():
        blocks, outputs, rest, inputs = mixed.weight.shape
        kept_out = 0 if mixed.compressor is None else mixed.compressor.shape[1]
        kept_in = 0 if mixed.decompressor is None else mixed.decompressor.shape[2]
        first = kept_out * outputs * inputs + (kept_out or outputs) * inputs * kept_in
        second = outputs * inputs * kept_in + kept_out * outputs * (kept_in or inputs)
        total += blocks * rest * min(first, second)
    return total


def main(options: Options) -> None:
    torch.manual_seed(0)
    model = load_model(options.model, num_classes=options.classes).to(options.device)
    images = torch.randn(options.batch_size, 3, options.size, options.size, device=options.device)
    labels = torch.randint(options.classes, (options.batch_size,), device=options.device)
    plan = prune_to(model, images[:1], criterion="l2", speedup=options.speedup, scope="local", progress=False)
    naive, equivalent = prune(model, plan), EquivalentModel(model, plan)
    steps = [stepper(each, images, labels, options.precision) for each in (naive, equivalent)]
    pairs = [[step() for step in steps] for _ in range(options.warmup + options.pairs)][options.warmup :]
    ratios = sorted(ours / theirs for theirs, ours in pairs)
    low, median, high = statistics.quantiles(ratios, n=4)
    print(
        f"{options.model} at {options.speedup}x: {cost(naive, images[:1])}, batch {options.batch_size}, precision "
        f"{options.precision}"
    )
    print(
        f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}, torch {torch.__version__}"
    )
    wanted, mixing = options.batch_size * cost(naive, images[:1]).macs, multiplications(equivalent)
    print(f"C·W·D takes {mixing / wanted:.3f} of the multiplications that the naive step takes")
    seconds = [statistics.median(pair[index] for pair in pairs) for index in (0, 1)]
    print(f"naive step {seconds[0]:.3f} s, EP step {seconds[1]:.3f} s (medians)")
    print(f"EP / naive: {median:.3f} (quartiles {low:.3f} to {high:.3f}, n = {options.pairs} pairs)")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
