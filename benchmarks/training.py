"""Time `fit` against the usual training script, and a step of Equivalent Pruning against a naive one.

    python benchmarks/training.py --root data/cifar10.npz                    # on a CPU, minutes
    python benchmarks/training.py --root data/cifar100 --data cifar100 --model vgg19 --device cuda --images 50000 \
        --precisions no bf16 --speedup 3.3

The usual script: torchvision's transforms on single images in a DataLoader with worker processes, the optimizer and
schedule stepped by hand. Both train the same network on as many augmented images with SGD, take turns, and are measured
without their first, warming, epoch. Prints one CSV row a measurement, with hardware and versions first.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import tyro
from equivalent import Options as StepOptions
from equivalent import main as compare_steps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import obc_tools as obc
from obc_tools.data.data import Data
from obc_tools.files import environment


@dataclass(frozen=True)
class Options:
    """What to time.

    Attributes:
        root: Where the data lies.
        images: Training images an epoch.
        repeats: Epochs that count, of each; one more warms up.
        workers: Worker processes of the DataLoader.
        precisions: Of the forward pass: no, bf16, fp16.
        speedup: Of the pruned network in the comparison of steps; 0 leaves it out.
    """

    root: str
    data: str = "cifar10"
    model: str = "resnet56"
    batch_size: int = 128
    images: int = 2560
    repeats: int = 3
    workers: int = 2
    device: str = "cpu"
    precisions: tuple[str, ...] = ("no",)
    speedup: float = 2.2
    pairs: int = 20


class SingleImages(Dataset):
    """Single images as the usual script reads them: PIL-sized arrays, transformed one by one."""

    def __init__(self, data: Data):
        self.images = data.train
        mean, std = data.normalization.mean, data.normalization.std
        steps = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)]
        self.transform = v2.Compose([*steps, v2.Normalize(mean, std)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images.pixels[index]), int(self.images.labels[index])


def usual_epochs(model: nn.Module, data: Data, options: Options, precision: str) -> Iterator[float]:
    """Train epoch by epoch as the usual script does; yield the seconds of each."""
    loader = DataLoader(
        SingleImages(data), options.batch_size, shuffle=True, num_workers=options.workers, persistent_workers=True
    )
    device = torch.device(options.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    kind = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    while True:
        start = time.perf_counter()
        model.train()
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            with torch.autocast(device.type, dtype=kind, enabled=precision != "no"):
                loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            # As scripts that print a running loss do.
            loss.item()
        yield time.perf_counter() - start


def fit_speed(model: nn.Module, data: Data, options: Options, precision: str) -> float:
    """Train one epoch by `fit`; return images per second, validation left out."""
    recipe = obc.Recipe(epochs=1, batch_size=options.batch_size, lr=0.01, schedule="constant", amp=precision)
    train = data.batches("train", options.batch_size, augment=True, device=options.device)
    val = data.batches("val", 256, device=options.device).first(1)
    return obc.fit(model, train, val, recipe, progress=False).last.images_per_second


def compare_loops(data: Data, options: Options, precision: str) -> None:
    """Print images per second of both ways, which take turns."""
    models = [obc.load_model(options.model, num_classes=len(data.classes)).to(options.device) for _ in range(2)]
    usual = usual_epochs(models[0], data, options, precision)
    speeds: dict[str, list[float]] = {"usual script": [], "fit": []}
    for repeat in range(options.repeats + 1):
        found = (len(data.train) / next(usual), fit_speed(models[1], data, options, precision))
        for name, speed in zip(speeds, found, strict=True):
            if repeat:
                speeds[name].append(speed)
    for name, values in speeds.items():
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        mean = statistics.mean(values)
        epochs = 60 * mean / len(data.train)
        row = (options.model, options.data, options.batch_size, precision, name, f"{mean:.1f}", f"{deviation:.1f}")
        print(*row, len(values), f"{epochs:.2f}", sep=",")
    ratios = [ours / theirs for theirs, ours in zip(*speeds.values(), strict=True)]
    print(f"# fit / usual script: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


def main(options: Options) -> None:
    found = environment(torch.device(options.device))
    print(f"# {found['cpu']}, {found['cpus']} CPUs, {found['threads']} threads, GPU: {found['gpu'] or 'none'}")
    print(f"# Python {platform.python_version()}, {found['libraries']}")
    print("model,data,batch,precision,loop,images/s,standard deviation,n,epochs/min")
    data = obc.load_data(options.data, options.root).limited(train=options.images)
    for precision in options.precisions:
        compare_loops(data, options, precision)
    for precision in options.precisions if options.speedup else ():
        if precision == "fp16":  # needs the scaling of losses, which the comparison of steps leaves out
            continue
        steps = StepOptions(
            model=options.model,
            classes=len(data.classes),
            speedup=options.speedup,
            batch_size=options.batch_size,
            pairs=options.pairs,
            device=options.device,
            precision=precision,
        )
        compare_steps(steps)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
