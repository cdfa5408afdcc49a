"""What a training did: one row an epoch, the last and the best of them."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

import pandas as pd

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
        """Draw loss and accuracy over the epochs; :func:`obc_tools.plots.plot_histories` draws several side by side."""
        from . import plots

        return plots.plot_histories({label: self})

    def _summary(self) -> tuple[str, str]:
        return f"last {self.last}", f"best {self.best} (picked on val)"

    def __repr__(self) -> str:
        title = f"History of {len(self)} epoch{'s' if len(self) > 1 else ''}"
        return "\n".join((title, *(f"  {line}" for line in self._summary())))

    def _repr_html_(self) -> str:
        lines = "<br>".join(html.escape(line) for line in self._summary())
        return f"{self.to_frame().to_html(index=False, float_format='{:.4g}'.format)}<p>{lines}</p>"
