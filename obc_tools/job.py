"""A pruning job as plain data, and what it works on: the model, the data and the device, loaded and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from .augment import Augmentation
from .batches import Batches, take
from .criteria import resolve_criterion
from .data import Data, load_data
from .groups import PARTS
from .layers import UnknownNameError
from .order import SCOPES, Limits
from .processes import processes
from .pruning import Target
from .scores import NORMALIZERS, REDUCTIONS
from .training import Recipe

VALIDATION_BATCH = 256
RECIPES = ("pretrain", "sparse", "finetune")


@dataclass(frozen=True, kw_only=True)
class PruningJob:
    """What to prune, to which target, and how to fine-tune it; plain values, checked when built.

    Attributes:
        model: Name of a network for :func:`obc_tools.models.load_model`.
        data: Name of a data set for :func:`obc_tools.data.load_data`.
        target: What the pruned network must reach.
        weights: What fills the network: a file or a name of `load_model`; None: it is trained first, by ``pretrain``.
        num_classes: Outputs of the network; None: what the weights have, or else the classes of the data.
        model_options: For the network's constructor, such as ``{"width": 8}``.
        root: Where the data lies.
        train_from_val: Cut the held-out images in two, to train on one half: for folders without training images.
        train_images, val_images: Use at most so many images of a split, for a small run.
        normalize: Normalisation of the data, by name; None: its default.
        criterion, scope, steps, group_reduction, normalizer, round_to, ignore: of :func:`obc_tools.pruning.prune_to`.
        schedule_ratio, last_step, whole_heads, only: likewise.
        batches: Calibration batches, drawn afresh from the training images for every pruning step.
        batch_size: Images in a calibration batch.
        augment: Whether calibration images are augmented, by crops and flips.
        calibrate_as_trained: Augment calibration images by all that ``finetune`` says, mixed labels included.
        pretrain: How to train the network from scratch; None where there are weights.
        sparse: How to train it sparsely before pruning; None: not at all.
        sparse_weights: A file of weights that a sparse training left, instead of one.
        finetune: How to fine-tune the pruned network; None: not at all.
        equivalent: Fine-tune with Equivalent Pruning too, by the same recipe, and merge.
        seed: Fixes fresh weights, calibration batches and random scores; recipes have their own.
        device: "auto" (a CUDA GPU where there is one), "cpu", "cuda", "cuda:1", …
        title: What the report calls the job.

    Raises:
        ValueError: if a value is unknown, out of range or contradicts another.
    """

    model: str
    data: str
    target: Target
    weights: str | None = None
    num_classes: int | None = None
    model_options: Mapping[str, Any] = field(default_factory=dict)
    root: str | None = None
    train_from_val: bool = False
    train_images: int | None = None
    val_images: int | None = None
    normalize: str | None = None
    criterion: str = "jacobian"
    scope: str = "global"
    steps: int = 20
    group_reduction: str = "sum"
    normalizer: str | None = None
    round_to: int | None = None
    ignore: tuple[str, ...] = ()
    whole_heads: bool = False
    only: str | None = None
    schedule_ratio: float = 1.0
    last_step: str = "exact"
    batches: int = 50
    batch_size: int = 128
    augment: bool = True
    calibrate_as_trained: bool = False
    pretrain: Recipe | None = None
    sparse: Recipe | None = None
    sparse_weights: str | None = None
    finetune: Recipe | None = None
    equivalent: bool = False
    seed: int = 0
    device: str = "auto"
    title: str = "pruning job"

    def __post_init__(self) -> None:
        resolve_criterion(self.criterion)
        chosen = {"scope": SCOPES, "group_reduction": REDUCTIONS, "normalizer": NORMALIZERS, "only": PARTS}
        for name, known in chosen.items():
            if getattr(self, name) not in known:
                raise UnknownNameError(name, str(getattr(self, name)), [str(value) for value in known])
        for name, least in (("steps", 1), ("batches", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        Limits(round_to=self.round_to)
        if (self.weights is None) == (self.pretrain is None):
            raise ValueError("give either weights or a recipe to train the network with (pretrain)")
        if self.equivalent and self.finetune is None:
            raise ValueError("Equivalent Pruning is a way of fine-tuning: give it at least 1 epoch")
        if self.sparse is not None and not self.sparse.group_penalty:
            raise ValueError("sparse training needs a recipe with group_penalty above 0")
        if self.calibrate_as_trained and self.finetune is None:
            raise ValueError("calibrate_as_trained asks for the augmentation of finetune, and there is none")

    def to_dict(self) -> dict[str, Any]:
        """Return the job as plain data that JSON can hold."""
        recipes = {name: getattr(self, name) for name in RECIPES}
        plain = asdict(self) | {"ignore": list(self.ignore), "model_options": dict(self.model_options)}
        return plain | {name: recipe and recipe.to_dict() for name, recipe in recipes.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruningJob:
        """Build a job from what :meth:`to_dict` returned.

        Raises:
            ValueError: for keys that are no fields, and values out of range.
        """
        if unknown := sorted(set(data) - {entry.name for entry in fields(cls)}):
            raise ValueError(f"a job has no {', '.join(unknown)}")
        recipes = {name: data[name] and Recipe.from_dict(data[name]) for name in RECIPES if name in data}
        return cls(**{**data, **recipes, "target": Target(**data["target"]), "ignore": tuple(data.get("ignore", ()))})

    def load(self) -> Data:
        """Load the data that the job names, as much of it as it asks for."""
        data = load_data(self.data, self.root, normalize=self.normalize)
        if self.train_from_val:
            data = data.with_train_from_val()
        return data.limited(self.train_images, self.val_images)


@dataclass(frozen=True, eq=False)
class JobInputs:
    """What a job works on, loaded and checked.

    ``source`` are the arguments of `load_model` for the unpruned network; ``example`` is one image, (1, …).
    """

    job: PruningJob
    data: Data
    model: nn.Module
    source: Mapping[str, Any]
    device: torch.device
    example: Tensor

    def training_batches(self, recipe: Recipe) -> Batches:
        """Return the batches of a training: the same images in the same order for every training by one recipe."""
        own = processes()
        return self.data.batches(
            "train",
            recipe.batch_size * own.count,
            seed=recipe.seed,
            augment=recipe.augmentation,
            device=self.device,
            share=own.share,
        )

    def calibration_batches(self) -> Batches:
        """Return the calibration batches, other ones each time they are iterated over."""
        job = self.job
        augment = job.finetune.augmentation if job.calibrate_as_trained else Augmentation(crop=job.augment)
        train = self.data.batches("train", job.batch_size, seed=job.seed, augment=augment, device=self.device)
        return take(train, job.batches)

    def held_out_batches(self, share: tuple[int, int] = (0, 1)) -> Batches:
        """Return the held-out images, which are for reporting alone; or one process's share of them."""
        size = max(1, min(VALIDATION_BATCH, len(self.data.val))) // share[1] * share[1]
        return self.data.batches("val", size, device=self.device, share=share)


def find_device(name: str) -> torch.device:
    """Return a device by name, "auto" being this process's GPU if there is one.

    Raises:
        ValueError: if it is unknown or not there.
    """
    if name == "auto":
        return torch.device(f"cuda:{processes().local_rank}" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise ValueError(f"unknown device '{name}'; known are auto, cpu, cuda, cuda:1, ...")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device '{name}' is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)
