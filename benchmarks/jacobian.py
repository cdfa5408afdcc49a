"""What J·w costs beyond a plain forward and backward pass: python -m benchmarks.jacobian [--pairs 9] [--networks ...].

Time: every pair runs a plain forward and backward pass of the mean loss (weight gradients, eval mode) and one batch of
products, in alternating order, in one process; the figure is the median of the paired ratios, with the quartiles. The
first batch, in which finer rows check themselves, is timed apart. Scored are all axes but the image's own channels.
Per-example gradients by torch.func.vmap run on a part of the batch, and so does what they are compared with.

Memory: the peak resident set of a process of its own after 50 batches of 2 images, above that of plain passes, as a
share of what a process needs that stores the gradients of every batch.
"""

import argparse
import csv
import itertools
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from obc_tools.models.networks import load_model
from obc_tools.scoring.jacobian import model_axes, stream_products
from obc_tools.structure.layers import LayerAxis

RESULTS = Path(__file__).parents[1] / "results" / "jacobian_cpu.csv"
NETWORKS = {
    "vgg19": (128, 32),
    "resnet56": (128, 32),
    "torchvision:resnet50": (8, 224),
    "torchvision:vit_b_16": (8, 224),
}
VMAP_EXAMPLES = {"vgg19": 64, "resnet56": 128}
BATCHES_IN_MEMORY = 50


@dataclass(frozen=True)
class Result:
    """The median of n paired ratios, with quartiles."""

    network: str
    batch: int
    measured: str
    against: str
    n: int
    ratio: float
    lower: float
    upper: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--memory", nargs="*", default=["vgg19", "torchvision:resnet50"])
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak(*options.peak))
        return
    results = []
    for network in options.networks:
        for result in times(network, options.pairs):
            report(result)
            results.append(result)
    for network in options.memory:
        result = memory(network)
        report(result)
        results.append(result)
    write(results)


def times(network: str, pairs: int) -> Iterator[Result]:
    model, batch = prepare(network, NETWORKS[network][0])
    size = len(batch[1])
    for rows in ("batch", "sample"):
        stream = products(model, batch, rows)
        first = paired(lambda: plain(model, batch), lambda stream=stream: next(stream), 1)
        yield summary(network, size, f"{rows} rows, first batch", "forward + backward", first)
        ratios = paired(lambda: plain(model, batch), lambda stream=stream: next(stream), pairs)
        yield summary(network, size, f"{rows} rows", "forward + backward", ratios)
    if network in VMAP_EXAMPLES:
        part = tuple(tensor[: VMAP_EXAMPLES[network]] for tensor in batch)
        stream = products(model, part, "sample")
        next(stream)
        ratios = paired(lambda: next(stream), lambda: each_gradient(model, part), max(3, pairs // 3))
        yield summary(network, len(part[1]), "gradients by torch.func.vmap", "sample rows", ratios)


def prepare(network: str, examples: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Return a seeded network and a batch of noise: the time does not depend on the values."""
    torch.manual_seed(0)
    model = load_model(network, num_classes=10).eval()
    side = NETWORKS[network][1]
    return model, (torch.randn(examples, 3, side, side), torch.randint(10, (examples,)))


def products(model: nn.Module, batch: tuple, rows: str) -> Iterator[dict]:
    """Stream the products of the same batch for ever."""
    axes = model_axes(model)
    image = LayerAxis(axes[0].layer, "in")
    return stream_products(model, itertools.repeat(batch), [axis for axis in axes if axis != image], rows=rows)


def plain(model: nn.Module, batch: tuple) -> tuple[Tensor, ...]:
    """One forward and backward pass of the mean loss."""
    return torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), tuple(model.parameters()), allow_unused=True)


def each_gradient(model: nn.Module, batch: tuple) -> dict[str, Tensor]:
    """The gradients of each example's own loss, all at once."""

    def loss(parameters: dict, image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (image[None],)), label[None])

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return vmap(grad(loss), in_dims=(None, 0, 0))(parameters, *batch)


def paired(base: Callable[[], object], measured: Callable[[], object], pairs: int) -> list[float]:
    """Return the ratios measured / base of adjacent runs, in alternating order; one run of `base` to warm up."""
    base()
    ratios = []
    for pair in range(pairs):
        order = (base, measured) if pair % 2 else (measured, base)
        seconds = {run: elapsed(run) for run in order}
        ratios.append(seconds[measured] / seconds[base])
    return ratios


def elapsed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def summary(network: str, batch: int, measured: str, against: str, ratios: list[float]) -> Result:
    lower, middle, upper = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return Result(network, batch, measured, against, len(ratios), middle, lower, upper)


def memory(network: str) -> Result:
    """Compare the peak memory of streaming with that of storing every gradient, each above plain passes."""
    kilobytes = {}
    for way in ("plain", "stream", "store"):
        command = [sys.executable, "-m", "benchmarks.jacobian", "--peak", network, way]
        kilobytes[way] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    share = (kilobytes["stream"] - kilobytes["plain"]) / (kilobytes["store"] - kilobytes["plain"])
    return Result(network, 2, "peak memory of batch rows above plain", "storing 50 gradients", 1, share, share, share)


def peak(network: str, way: str) -> int:
    """Return the peak resident set of this process in KiB after 50 batches."""
    model, batch = prepare(network, 2)
    stream = products(model, batch, "batch")
    stored = []
    for _ in range(BATCHES_IN_MEMORY):
        # A result that is not stored must die here: one set of gradients is a fiftieth of what is compared.
        if way == "stream":
            next(stream)
        elif way == "plain":
            plain(model, batch)
        else:
            stored.append(plain(model, batch))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def report(result: Result) -> None:
    what = f"{result.network:22} batch {result.batch:3}  {result.measured:38} / {result.against:20}"
    print(f"{what} {result.ratio:6.3f}  [{result.lower:.3f}, {result.upper:.3f}]  n = {result.n}", flush=True)


def write(results: list[Result]) -> None:
    machine = {"processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    rows = [{**asdict(result), **machine} for result in results]
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0]} ({len(names)} cores)" if names else platform.processor()


if __name__ == "__main__":
    main()
