"""What chance does to training images beyond crops and flips, fixed by the seed, the pass and the batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torchvision.transforms import v2

from .batches import Batch, Batches

RAND_AUGMENT_LEVELS = 31


@dataclass(frozen=True)
class Augmentation:
    """How training images are augmented; checked when built.

    Attributes:
        crop: Random crops and flips, those of the kind of images.
        rand_augment: Magnitude of RandAugment (Cubuk et al. 2020), two operations an image, 0 to 30; 0: none. Image
            files only.
        erase: Share of images of which a random rectangle becomes the mean colour (Zhong et al. 2020), in [0, 1].
        mixup: α of Mixup (Zhang et al. 2018), 0: none. Labels become shares of the classes, (images, classes).
        cutmix: α of CutMix (Yun et al. 2019), likewise. With both, each batch gets one of them, evenly drawn.
        repeats: Copies of an image in a pass, see :class:`obc_tools.batches.Sampling`.
    """

    crop: bool = True
    rand_augment: int = 0
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    repeats: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rand_augment < RAND_AUGMENT_LEVELS or (self.rand_augment and not self.crop):
            most = RAND_AUGMENT_LEVELS - 1
            raise ValueError(f"rand_augment is {self.rand_augment}; it is 0 to {most}, and 0 without crop")
        if not 0 <= self.erase <= 1:
            raise ValueError(f"erase is {self.erase}; it is a share of images, 0 to 1")
        if min(self.mixup, self.cutmix) < 0:
            raise ValueError(f"mixup is {self.mixup} and cutmix {self.cutmix}; they are 0 or above")

    @property
    def changes_batches(self) -> bool:
        """Say whether it does anything to whole batches."""
        return bool(self.erase or self.mixup or self.cutmix)


def augment_batches(batches: Batches, augmentation: Augmentation, classes: int, seed: int, part: int = 0) -> Batches:
    """Erase in, and mix, normalised batches; ``part`` sets the draws of one process's share apart from the others'."""
    if not augmentation.changes_batches:
        return batches
    erase = v2.RandomErasing(p=augmentation.erase)
    mixes = [v2.MixUp(alpha=augmentation.mixup, num_classes=classes)] if augmentation.mixup else []
    mixes += [v2.CutMix(alpha=augmentation.cutmix, num_classes=classes)] if augmentation.cutmix else []
    mix = v2.RandomChoice(mixes) if mixes else None

    def change(pass_number: int, number: int, batch: Batch) -> Batch:
        images, labels = batch
        drawn = np.random.SeedSequence((seed, pass_number, number, part)).generate_state(1)
        # The transforms draw from torch's global generator: it is borrowed, and given back as it was.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(drawn[0]))
            if augmentation.erase:
                images = torch.stack([erase(image) for image in images])
            return mix(images, labels) if mix else (images, labels)

    return batches.map(change)
