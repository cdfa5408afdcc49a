"""What the explorers share: calibration batches, work beside the kernel, one figure that is replaced by another."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

import ipywidgets as W
import plotly.graph_objects as go
from torch import nn

from ..batches import take
from ..data import Data
from ..layers import scored_layers
from ..looks import theme
from .controls import Filling, dropdown, note
from .live import Click, LiveFigure
from .tasks import Task, Worker

T = TypeVar("T")
BARE = {"xaxis": {"visible": False}, "yaxis": {"visible": False}}


class Explorer(W.VBox):
    """A figure, controls, and the line that says what is going on. To be built upon.

    Args:
        model: copied, so that it stays free while the copy is looked at in a thread.
        data: a `load_data` data set; its split ``train`` gives the batches.
        batches, batch_size, seed: of the calibration batches.
        look: "light" or "dark".
    """

    def __init__(self, model: nn.Module, data: Data, batches: int, batch_size: int, seed: int, look: str):
        super().__init__()
        self.picture = LiveFigure(go.Figure(layout={"template": theme(look), "height": 420, **BARE}), self.clicked)
        self.network, self.look = copy.deepcopy(model).eval(), look
        self._data, self._draw_options = data, (batches, batch_size, seed)
        self._device = next((str(parameter.device) for parameter in model.parameters()), "cpu")
        self.progress = W.FloatProgress(value=0.0, min=0.0, max=1.0, layout={"width": "160px"})
        self.status = W.HTML()
        self._worker = Worker(self._report, self._failed)
        self._filling = Filling()

    @property
    def batches(self) -> Collection[Any]:
        """The calibration batches, the same each time."""
        count, size, seed = self._draw_options
        return take(self._data.batches("train", size, seed=seed, device=self._device), count)

    @property
    def batches_code(self) -> str:
        """The Python that draws them."""
        count, size, seed = self._draw_options
        on = "" if self._device == "cpu" else f", device={self._device!r}"
        return f'batches = obc.take(data.batches("train", {size}, seed={seed}{on}), {count})'

    def wait(self, timeout: float = 600.0) -> Explorer:
        """Wait until nothing is computed any more; return the explorer."""
        self._worker.wait(timeout)
        return self

    def choose_layer(self) -> W.Dropdown:
        """Return the choice of a layer whose channels can be looked at; raise ValueError where there is none."""
        layers = [name for name, layer in scored_layers(self.network) if isinstance(layer, nn.Conv2d | nn.Linear)]
        if not layers:
            raise ValueError("this network has no convolution or linear layer whose channels could be looked at")
        return dropdown("layer", layers, layers[0])

    def compute(self, what: str, work: Callable[[Collection[Any]], T], then: Callable[[T], None]) -> None:
        """Do something with the batches beside the kernel; what was under way is cancelled."""
        self.status.value = note(what)

        def watched(task: Task) -> T:
            return work(task.watch(self.batches, what))

        self._worker.start(watched, then)

    def on_change(self, controls: Iterable[W.Widget], act: Callable[[], None]) -> None:
        """Do something when somebody sets one of the controls, and not while an outcome is handed over."""

        def by_hand(_: dict) -> None:
            with self._worker.lock:
                if not self._filling.now:
                    act()

        for control in controls:
            control.observe(by_hand, "value")

    @property
    def figure(self) -> go.Figure:
        """The figure that is shown."""
        return self.picture.figure

    def show(self, figure: go.Figure) -> None:
        """Show another figure."""
        self.progress.value = 0
        self.picture.show(figure)

    def clicked(self, click: Click) -> None:
        """Take a click in the figure; nothing happens unless an explorer says what."""

    def _report(self, what: str, share: float) -> None:
        self.progress.value, self.status.value = share, note(f"{what}, {share:.0%}")

    def _failed(self, error: Exception) -> None:
        self.progress.value, self.status.value = 0, note(f"{type(error).__name__}: {error}", bad=True)
