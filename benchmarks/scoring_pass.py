"""Time scoring by the Jacobian Criterion against plain forward and backward passes over the same batches.

    python benchmarks/scoring_pass.py [--model vgg19 --classes 100 --device cuda --precisions no bf16]

Both take turns in one process after one warming pair. A plain pass computes the mean loss of a batch and the gradients
of all weights, in eval mode. Printed is the median of the paired ratios with its quartiles. Images are random.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from torch import Tensor, nn

import obc_tools as obc


@dataclass(frozen=True)
class Options:
    """What to time.

    Attributes:
        batches: scored in one go.
        pairs: that count; one more warms up.
        precisions: of the forward pass: no (float32) or bf16.
    """

    model: str = "vgg19"
    classes: int = 100
    size: int = 32
    batch_size: int = 128
    batches: int = 10
    pairs: int = 9
    device: str = "cpu"
    precisions: tuple[Literal["no", "bf16"], ...] = ("no",)


def plain_passes(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    for images, labels in batches:
        nn.functional.cross_entropy(model(images), labels).backward()
        model.zero_grad(set_to_none=True)


def seconds(work: Callable[[], object], options: Options, precision: str) -> float:
    """Return what something takes under a precision, with the device's work waited for."""
    device = torch.device(options.device)
    start = time.perf_counter()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(options: Options) -> None:
    torch.manual_seed(0)
    model = obc.load_model(options.model, num_classes=options.classes).to(options.device).eval()
    shape = (options.batch_size, 3, options.size, options.size)
    images = [torch.randn(shape, device=options.device) for _ in range(options.batches)]
    labels = torch.randint(options.classes, (options.batches, options.batch_size), device=options.device)
    batches = list(zip(images, labels, strict=True))
    groups = obc.find_groups(model, images[0][:1])
    for precision in options.precisions:
        works = (lambda: plain_passes(model, batches), lambda: obc.score_groups(model, groups, "jacobian", batches))
        pairs = [[seconds(work, options, precision) for work in works] for _ in range(options.pairs + 1)][1:]
        low, median, high = statistics.quantiles([ours / plain for plain, ours in pairs], n=4)
        plain = statistics.median(pair[0] for pair in pairs)
        print(
            f"scoring / forward and backward, {options.model}, {precision}, batch {options.batch_size}: {median:.3f} "
            f"(quartiles {low:.3f} to {high:.3f}, n = {options.pairs} pairs; plain pass {plain:.3f} s)"
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
