"""One of two processes that train together: python -m tests.two_trainings FOLDER RANK PORT.

With a COUNT after these, one of so many of which the second has no batches; with "midway" too, of which it fails in
its second epoch and lives on.
"""

import os
import sys
import time
from pathlib import Path

import torch
from torch import nn

from obc_tools.data.batches import Batch
from obc_tools.data.data import Data
from obc_tools.data.images import Images, Normalization
from obc_tools.training import processes as together
from obc_tools.training import stepper
from obc_tools.training.fit import fit
from obc_tools.training.processes import processes
from obc_tools.training.recipe import Recipe

EACH = 4
RECIPES = {
    "plain": Recipe(epochs=2, batch_size=EACH, lr=0.1, accumulate=2, clip_norm=1.0, ema_every=1, ema_decay=0.9),
    "norms": Recipe(epochs=2, batch_size=EACH, lr=0.1, warmup_epochs=1),
}


def data() -> Data:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (37, 3, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.randint(3, (37,), generator=generator)
    splits = [Images(pixels[part], labels[part], padding=2) for part in (slice(0, 26), slice(26, 37))]
    return Data(*splits, ("a", "b", "c"), Normalization((0.5,) * 3, (0.5,) * 3))


def network(norms: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        middle = nn.BatchNorm2d(6) if norms else nn.Identity()
        layers = [nn.Conv2d(3, 6, 3), middle, nn.ReLU(), nn.Flatten(), nn.Linear(216, 3)]
        return nn.Sequential(*layers)


def train_both(folder: Path, count: int) -> None:
    """Train both networks in one of ``count`` processes; write weights, histories, images and learning rates."""
    own, found = processes(), {}
    for name, recipe in RECIPES.items():
        model, images, lrs = network(name == "norms"), [], []

        def remember(pass_number: int, number: int, batch: Batch, seen: list = images) -> Batch:
            seen.append((pass_number, number, batch[0].clone()))
            return batch

        # Alone, a process takes the batches of all.
        chosen = Recipe.from_dict(recipe.to_dict() | {"batch_size": EACH * 2 // count})
        train = data().batches("train", EACH * 2, augment=recipe.augmentation, share=own.share).map(remember)
        val = data().batches("val", 4, share=own.share)
        stepper.learning_rate_factor = _remembering(lrs)
        history = fit(model, train, val, chosen, run=folder / name, progress=False)
        rows = [(e.lr, e.train_loss, e.train_accuracy, e.val_loss, e.val_accuracy) for e in history]
        found[name] = {"state": model.state_dict(), "rows": rows, "images": images, "lrs": lrs}
    torch.save(found, folder / f"{own.rank}.pt")


def _remembering(lrs: list, original=stepper.learning_rate_factor):
    def factor(*arguments):
        lrs.append(original(*arguments))
        return lrs[-1]

    return factor


def train_without_data(folder: Path, count: int) -> None:
    """Train in one of ``count`` processes of which the second has no batches."""
    train = [] if processes().rank == 1 else data().batches("train", EACH * count, share=processes().share)
    val = data().batches("val", 4, share=processes().share)
    fit(network(False), train, val, RECIPES["plain"], run=folder / "run", progress=False)


def fail_midway(folder: Path, count: int) -> None:
    """Train in one of ``count`` processes of which the second fails in its second epoch, and lives on until killed."""

    def failing(pass_number: int, number: int, batch: Batch) -> Batch:
        if processes().rank == 1 and pass_number == 1:
            raise ValueError("an image that cannot be read")
        return batch

    train = data().batches("train", EACH * count, share=processes().share).map(failing)
    val = data().batches("val", 4, share=processes().share)
    try:
        fit(network(True), train, val, RECIPES["norms"], run=folder / "run", progress=False)
    except ValueError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    torch.set_num_threads(1)
    count = sys.argv[4] if len(sys.argv) > 4 else "2"
    os.environ |= {"RANK": sys.argv[2], "LOCAL_RANK": sys.argv[2], "WORLD_SIZE": count}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[3]}
    if len(sys.argv) == 4:  # the end is to find the thread that looks inside torch
        together.SECONDS_BETWEEN_LOOKS = 0.0
    train = {4: train_both, 5: train_without_data, 6: fail_midway}[len(sys.argv)]
    train(Path(sys.argv[1]), int(count))
    torch.distributed.destroy_process_group()
