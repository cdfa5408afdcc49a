"""Small trainings, and what their outcomes are compared by."""

import time

import torch
from torch import Tensor, nn


def wait_for(condition, seconds: float = 600.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


CLASSES = 3


class Net(nn.Sequential):
    """A convolution, a norm, dropout and a classifier for 3 x 6 x 6 images."""

    def __init__(self, dropout: float = 0.0, outputs: int = CLASSES):
        super().__init__(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(4, outputs),
        )


def network(dropout: float = 0.0, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net(dropout).double()


def batches_of(sizes: tuple[int, ...], seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 3, 6, 6, generator=generator, dtype=torch.float64),
            torch.randint(CLASSES, (size,), generator=generator),
        )
        for size in sizes
    ]


TRAIN = batches_of((8, 8, 5))
VAL = batches_of((7, 4), seed=1)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def numbers(history) -> list[tuple[float, ...]]:
    """Everything in a history that does not depend on the clock."""
    return [(e.lr, e.train_loss, e.train_accuracy, e.val_loss, e.val_accuracy) for e in history]
