"""What a training keeps on disk: its recipe, metrics, progress, log, environment and checkpoint.

``metrics.jsonl`` has one line an epoch, ``progress.json`` the step that was taken last, ``checkpoint.pt`` everything
that a killed training needs to go on to the same numbers. Each file appears complete or not at all.
"""

from __future__ import annotations

import html
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from ..files import environment, logging_to_file, write_text
from .guard import Where
from .processes import processes
from .recipe import Recipe

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class Epoch:
    """One epoch of a training.

    Attributes:
        epoch: Its number; the first is 1.
        lr: Base learning rate of its first step (a parameter group's own scale not applied).
        train_loss: Mean of the training objective over its images, label smoothing included, in train mode, while the
            weights moved.
        train_accuracy: Share of its images classified correctly, in [0, 1], measured likewise.
        val_loss: Mean cross entropy on the validation batches after it, in eval mode.
        val_accuracy: Share of validation images classified correctly after it, in [0, 1].
        seconds: Duration, validation included.
        images_per_second: Training images over the duration without validation.
    """

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    seconds: float
    images_per_second: float

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch}: training loss {self.train_loss:.4f}, accuracy {self.train_accuracy:.2%}; "
            f"validation loss {self.val_loss:.4f}, accuracy {self.val_accuracy:.2%}"
        )


@dataclass(frozen=True, repr=False)
class History:
    """The epochs of one training, in order. ``len``, iteration and indexing go over them.

    Report ``last``. ``best`` was picked by its validation accuracy, which that accuracy therefore overstates.
    """

    epochs: tuple[Epoch, ...]

    def __post_init__(self):
        numbers = [epoch.epoch for epoch in self.epochs]
        if not numbers:
            raise ValueError("a history needs at least one epoch")
        if numbers != list(range(1, len(numbers) + 1)):
            raise ValueError(f"the epochs of a history are numbered 1, 2, …, not {numbers}")

    def __len__(self) -> int:
        return len(self.epochs)

    def __iter__(self) -> Iterator[Epoch]:
        return iter(self.epochs)

    def __getitem__(self, index: int) -> Epoch:
        return self.epochs[index]

    @property
    def last(self) -> Epoch:
        """The last epoch: the model as it was left."""
        return self.epochs[-1]

    @property
    def best(self) -> Epoch:
        """The epoch of the highest validation accuracy (the first of several): picked on val."""
        return max(self.epochs, key=lambda epoch: epoch.val_accuracy)

    def to_frame(self) -> pd.DataFrame:
        """Return one row an epoch, with the fields of :class:`Epoch` as columns."""
        return pd.DataFrame([asdict(epoch) for epoch in self.epochs], columns=[field.name for field in fields(Epoch)])

    def plot(self, label: str = "training") -> go.Figure:
        """Draw loss and accuracy over the epochs; `plot_histories` draws several side by side."""
        from ..plots.curves import plot_histories

        return plot_histories({label: self})

    def _summary(self) -> tuple[str, str]:
        return f"last {self.last}", f"best {self.best} (picked on val)"

    def __repr__(self) -> str:
        title = f"History of {len(self)} epoch{'s' if len(self) > 1 else ''}"
        return "\n".join((title, *(f"  {line}" for line in self._summary())))

    def _repr_html_(self) -> str:
        lines = "<br>".join(html.escape(line) for line in self._summary())
        return f"{self.to_frame().to_html(index=False, float_format='{:.4g}'.format)}<p>{lines}</p>"


FORMAT = 1
CONFIG, METRICS, PROGRESS, CHECKPOINT = "config.json", "metrics.jsonl", "progress.json", "checkpoint.pt"
LOG, ENVIRONMENT = "training.log", "environment.json"
SECONDS_BETWEEN_CHECKPOINTS = 300.0
SECONDS_BETWEEN_NOTES = 1.0


class TrainingFolderError(ValueError):
    """A folder that a training cannot be kept in or resumed from."""


class Stopped(Exception):
    """A training that was asked to stop did so, and left a checkpoint to resume from."""


class TrainingFolder:
    """The files of one training.

    Args:
        path: The folder; made if need be.
        writes: Whether this process writes; of several, one does.
    """

    def __init__(self, path: str | os.PathLike[str], *, writes: bool = True):
        self.path = Path(path)
        self._writes = writes
        self._saved = self._noted = time.monotonic()

    def read(self, recipe: Recipe, *, resume: bool) -> dict[str, Any] | None:
        """Return the checkpoint to go on from, None for a fresh start; nothing is written.

        Raises:
            TrainingFolderError: for a folder that holds a training and is not to be resumed, or one by another recipe,
                and for a checkpoint that cannot be read.
        """
        known = self._read_config()
        if known is not None and not resume:
            raise TrainingFolderError(f"'{self.path}' holds a training: pass resume=True or choose another folder")
        config = _config(recipe)
        if known is not None and known != json.loads(json.dumps(config)):
            raise TrainingFolderError(f"'{self.path}' holds a training by another recipe: {_difference(known, config)}")
        return self._read_checkpoint()

    def begin(self, recipe: Recipe, device: torch.device, checkpoint: Mapping[str, Any] | None) -> None:
        """Make the folder ready for a training that goes on from what `read` returned in every process."""
        if self._writes:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / CONFIG, _config(recipe))
            write_json(self.path / ENVIRONMENT, environment(device) | {"processes": processes().count})
            self.write_metrics(_history(checkpoint))

    def write_metrics(self, epochs: tuple[Epoch, ...]) -> None:
        """Write one line for each epoch, in place of what was there."""
        lines = "".join(json.dumps(asdict(epoch)) + "\n" for epoch in epochs)
        write_text(self.path / METRICS, lines)

    def add_epoch(self, epoch: Epoch) -> None:
        """Append the line of an epoch."""
        if self._writes:
            with (self.path / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(epoch)) + "\n")

    def is_note_due(self) -> bool:
        """Say whether the last note is so old that another should be written."""
        return self._writes and time.monotonic() - self._noted >= SECONDS_BETWEEN_NOTES

    def note(self, where: Where, epochs: int, figures: Mapping[str, float | None]) -> None:
        """Write which step was taken last, and figures of the training then; those that are not finite as null."""
        self._noted = time.monotonic()
        finite = {key: None if value is None or not math.isfinite(value) else value for key, value in figures.items()}
        write_json(self.path / PROGRESS, {**where._asdict(), "epochs": epochs, **finite, "time": time.time()})

    def is_due(self) -> bool:
        """Say whether the last checkpoint is so old that another should be saved within an epoch."""
        return time.monotonic() - self._saved >= SECONDS_BETWEEN_CHECKPOINTS

    def save(self, checkpoint: Mapping[str, Any]) -> None:
        """Save a checkpoint in place of the last one."""
        self._saved = time.monotonic()
        if not self._writes:
            return
        fresh = self.path / f".{CHECKPOINT}.new"
        with fresh.open("wb") as file:
            torch.save({"format": FORMAT, **checkpoint}, file)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.path / CHECKPOINT)

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Append what the library logs to the folder's log."""
        if not self._writes:
            yield
            return
        with logging_to_file(self.path / LOG):
            yield

    def _read_config(self) -> dict[str, Any] | None:
        path = self.path / CONFIG
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def _read_checkpoint(self) -> dict[str, Any] | None:
        path = self.path / CHECKPOINT
        if not path.is_file():
            return None
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        # Damaged bytes make an unpickler fail in any way it can.
        except Exception as error:
            raise TrainingFolderError(f"'{path}' is no checkpoint that can be read: {error}") from error
        if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
            raise TrainingFolderError(f"'{path}' is not of format {FORMAT}, the one that this version reads")
        return checkpoint


def read_history(folder: str | os.PathLike[str]) -> History | None:
    """Return the history of a training from its folder, running or ended; None before its first epoch has ended."""
    path = Path(folder) / METRICS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    epochs = tuple(Epoch(**json.loads(line)) for line in lines)
    return History(epochs) if epochs else None


def write_json(path: Path, content: Any) -> None:
    """Write JSON that appears complete or not at all."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _config(recipe: Recipe) -> dict[str, Any]:
    return {"format": FORMAT, "recipe": recipe.to_dict()}


def _history(checkpoint: Mapping[str, Any] | None) -> tuple[Epoch, ...]:
    return tuple(Epoch(**row) for row in checkpoint["history"]) if checkpoint else ()


def _difference(known: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    there, here = known.get("recipe", {}), config["recipe"]
    changed = sorted(key for key in {*there, *here} if there.get(key) != json.loads(json.dumps(here.get(key))))
    return "; ".join(f"{key} was {there.get(key)!r}, is {here.get(key)!r}" for key in changed)
