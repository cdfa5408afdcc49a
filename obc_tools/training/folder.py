"""What a training keeps on disk: its recipe, metrics, progress, log, environment and checkpoint.

``metrics.jsonl`` has one line an epoch, ``progress.json`` the step that was taken last, ``checkpoint.pt`` everything
that a killed training needs to go on to the same numbers. Each file appears complete or not at all.
"""

from __future__ import annotations

import functools
import html
import importlib.util
import json
import logging
import math
import os
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from .. import files
from ..measure.metrics import SIGNS
from .processes import processes
from .recipe import Recipe
from .stepper import Where

if TYPE_CHECKING:
    import plotly.graph_objects as go

logger = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class Epoch:
    """One epoch of a training.

    Attributes:
        epoch: Its number; the first is 1.
        lr: Base learning rate of its first step (a parameter group's own scale not applied).
        train_loss: Mean of the training objective over its images, label smoothing included, in train mode, while the
            weights moved.
        train_accuracy: Share of its images classified correctly, in [0, 1], measured likewise; None for other tasks.
        val_loss: Mean cross entropy on the validation batches after it, in eval mode; None where it is not measured.
        val_accuracy: Share of validation images classified correctly after it, in [0, 1]; None for other tasks.
        seconds: Duration, validation included.
        images_per_second: Training examples over the duration without validation.
        values: Of other tasks: metric -> value on the validation batches, the headline first.
        directions: Metric -> "higher" or "lower", whichever is better.
    """

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float | None
    val_loss: float | None
    val_accuracy: float | None
    seconds: float
    images_per_second: float
    values: Mapping[str, float] = field(default_factory=dict)
    directions: Mapping[str, str] = field(default_factory=dict)

    @property
    def headline(self) -> tuple[str, float]:
        """The metric that stands for all, and its value on the validation batches."""
        return next(iter(self.values.items()), ("accuracy", self.val_accuracy))

    @property
    def better(self) -> tuple[str, str]:
        """The headline, and which way of it is better."""
        return self.headline[0], self.directions.get(self.headline[0], "higher")

    @property
    def rank(self) -> float:
        """The headline's value: the higher, the better."""
        return -self.headline[1] if self.better[1] == "lower" else self.headline[1]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON holds them; those of other tasks only where there are any."""
        return {entry.name: value for entry in fields(self) if (value := getattr(self, entry.name)) != {}}

    def figures(self) -> dict[str, float]:
        """Return what was measured, flat: a metric of another task as ``val_`` and its name."""
        found = {key: value for key, value in self.to_dict().items() if not isinstance(value, Mapping)}
        if not self.values:
            return found
        found = {key: value for key, value in found.items() if value is not None}
        return found | {f"val_{name}": value for name, value in self.values.items()}

    def __repr__(self) -> str:
        return f"Epoch({', '.join(f'{name}={value!r}' for name, value in self.figures().items())})"

    def __str__(self) -> str:
        if self.values:
            shown = ", ".join(
                f"{name} {value:.4g} {SIGNS[self.directions[name]]}" for name, value in self.values.items()
            )
            return f"epoch {self.epoch}: training loss {self.train_loss:.4f}; validation {shown}"
        return (
            f"epoch {self.epoch}: training loss {self.train_loss:.4f}, accuracy {self.train_accuracy:.2%}; "
            f"validation loss {self.val_loss:.4f}, accuracy {self.val_accuracy:.2%}"
        )


@dataclass(frozen=True, repr=False)
class History:
    """The epochs of one training, in order. ``len``, iteration and indexing go over them.

    Report ``last``. ``best`` was picked by its validation accuracy, or its task's headline, which that value therefore
    overstates.
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
        """The epoch of the best validation accuracy or other headline (the first of several): picked on val."""
        return max(self.epochs, key=lambda epoch: epoch.rank)

    def to_frame(self) -> pd.DataFrame:
        """Return one row an epoch, with what was measured as columns (see `Epoch.figures`)."""
        return pd.DataFrame([epoch.figures() for epoch in self.epochs])

    def plot(self, label: str = "") -> go.Figure:
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
        self._writes, self._board = writes, None
        self._saved = self._noted = time.monotonic()

    def read(self, recipe: Recipe, *, resume: bool) -> dict[str, Any] | None:
        """Return the checkpoint to go on from, None for a fresh start; nothing is written.

        Raises:
            TrainingFolderError: for a folder that holds a training and is not to be resumed, or one by another recipe,
                and for a checkpoint that cannot be read.
        """
        if (self.path / CONFIG).is_file():
            if not resume:
                raise TrainingFolderError(f"'{self.path}' holds a training: pass resume=True or choose another folder")
            there, here = files.read_json(self.path / CONFIG, "recipe")["recipe"], recipe.to_dict()
            changed = sorted(key for key in {*there, *here} if there.get(key) != here.get(key))
            if changed:
                words = "; ".join(f"{key} was {there.get(key)!r}, is {here.get(key)!r}" for key in changed)
                raise TrainingFolderError(f"'{self.path}' holds a training by another recipe: {words}")
        path = self.path / CHECKPOINT
        if not path.is_file():
            return None
        try:
            _check_sums(path)
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        # Damaged bytes make an unpickler fail in any way it can.
        except Exception as error:
            raise TrainingFolderError(f"'{path}' is no checkpoint that can be read: {error}") from error
        if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
            raise TrainingFolderError(f"'{path}' is not of format {FORMAT}, the one that this version reads")
        return checkpoint

    def held(self) -> AbstractContextManager[None]:
        """Hold the folder, made if need be, in the process that writes; raise FolderInUseError if another does."""
        return files.held(self.path) if self._writes else nullcontext()

    @contextmanager
    def kept(self, recipe: Recipe, device: torch.device, checkpoint: Mapping[str, Any] | None) -> Iterator[None]:
        """Keep a training, its log and TensorBoard's files too, that goes on from what `read` returned everywhere."""
        if not self._writes:
            yield
            return
        files.remove_leftovers(self.path)
        files.write_json(self.path / CONFIG, {"format": FORMAT, "recipe": recipe.to_dict()})
        files.write_json(self.path / ENVIRONMENT, files.environment(device) | {"processes": processes().count})
        # The checkpoint decides: of a killed training, an epoch may be written down that it does not hold.
        rows = checkpoint["history"] if checkpoint else ()
        files.write_text(self.path / METRICS, "".join(json.dumps(row) + "\n" for row in rows))
        with files.logging_to_file(self.path / LOG), _tensorboard(self.path / "tensorboard") as self._board:
            yield

    def add_epoch(self, epoch: Epoch) -> None:
        """Append the line of an epoch, and hand its figures to TensorBoard."""
        if not self._writes:
            return
        figures = epoch.figures()
        path = self.path / METRICS
        with files.told(path, "its whole lines are, and the last checkpoint"), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(epoch.to_dict()) + "\n")
        if self._board is not None:
            for name in figures.keys() - {"epoch"}:
                self._board.add_scalar(name, figures[name], global_step=epoch.epoch)
            self._board.flush()

    def is_note_due(self) -> bool:
        """Say whether the last note is so old that another should be written."""
        return self._writes and time.monotonic() - self._noted >= SECONDS_BETWEEN_NOTES

    def note(self, where: Where, epochs: int, figures: Mapping[str, float | None]) -> None:
        """Write which step was taken last, and figures of the training then; those that are not finite as null."""
        self._noted = time.monotonic()
        finite = {key: None if value is None or not math.isfinite(value) else value for key, value in figures.items()}
        content = {**where._asdict(), "epochs": epochs, **finite, "time": time.time()}
        # Another note follows in a second: none is worth waiting for the disk.
        files.write_json(self.path / PROGRESS, content, synced=False)

    def is_due(self) -> bool:
        """Say whether the last checkpoint is so old that another should be saved within an epoch."""
        return time.monotonic() - self._saved >= SECONDS_BETWEEN_CHECKPOINTS

    def save(self, checkpoint: Mapping[str, Any]) -> None:
        """Save a checkpoint in place of the last one, once it was read back and found whole."""
        self._saved = time.monotonic()
        if self._writes:
            with files.replacing(self.path / CHECKPOINT) as new:
                # To a file of Python's, whose error says what the system said; torch's own says "unexpected pos".
                with new.open("wb") as file:
                    torch.save({"format": FORMAT, **checkpoint}, file)
                _check_sums(new)


def _check_sums(path: Path) -> None:
    """Raise ValueError unless all that a file of torch.save holds has the checksums (CRC-32) that it was written with.

    torch writes them and does not look at them when it reads.
    """
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged} was changed after it was written")


def _tensorboard(folder: Path) -> AbstractContextManager[Any]:
    """Return what lends a writer of TensorBoard's files, None where it is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return nullcontext()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder)


def read_history(folder: str | os.PathLike[str]) -> History | None:
    """Return the history of a training from its folder, running or ended; None before its first epoch has ended.

    A line that was only half written, by a process that was killed or a disk that was full, or that is of another epoch
    is left out with whatever follows it, and the log names the file.
    """
    path = Path(folder) / METRICS
    epochs: list[Epoch] = []
    for line in path.read_text("utf-8", "replace").splitlines() if path.is_file() else ():
        try:
            epoch = Epoch(**json.loads(line))
            if epoch.epoch != len(epochs) + 1:
                raise ValueError
            epochs.append(epoch)
        except (ValueError, TypeError):
            _say_once(f"'{path}': line {len(epochs) + 1} is no whole epoch and is left out")
            break
    return History(tuple(epochs)) if epochs else None


@functools.cache
def _say_once(text: str) -> None:
    """Log a warning, but not again whenever somebody looks."""
    logger.warning("%s", text)
