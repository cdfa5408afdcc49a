"""A training that a test kills: python -m tests.killed_training FOLDER."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from obc_tools.data.batches import Batches
from obc_tools.data.data import load_data
from obc_tools.models.networks import load_model
from obc_tools.training import folder as training_folder
from obc_tools.training.fit import fit
from obc_tools.training.recipe import Recipe

RECIPE = Recipe(epochs=3, batch_size=128, lr=0.05, mixup=0.3, erase=0.2, momentum=0.9, seed=3)


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return load_model("resnet8", num_classes=10, in_channels=1, width=4)


def batches() -> tuple[Batches, Batches]:
    data = load_data("digits")
    train = data.batches("train", RECIPE.batch_size, seed=RECIPE.seed, augment=RECIPE.augmentation)
    return train, data.batches("val", 256)


def train(folder: Path, stop: Callable[[], bool]) -> dict[str, Tensor]:
    """Train, with a checkpoint before every step; return the weights."""
    training_folder.SECONDS_BETWEEN_CHECKPOINTS = training_folder.SECONDS_BETWEEN_NOTES = 0.0
    model = network()
    fit(model, *batches(), RECIPE, run=folder, resume=True, stop=stop, progress=False)
    return model.state_dict()


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), stop=lambda: bool(time.sleep(0.2)))
