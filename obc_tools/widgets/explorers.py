"""Explorers: JᵀJ of channels and groups, and the interactions of a layer's filters, in a notebook."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import ipywidgets as W
import numpy as np
import plotly.graph_objects as go
from torch import nn

from .. import plots
from ..data.data import as_data
from ..files import replacing
from ..plots.jtj import MODES
from ..plots.looks import LIGHT, finished
from ..scoring.jacobian import JacobianProducts, jacobian_products
from ..scoring.jtj import DenseJTJ, FilterInteractions, GroupJTJ, dense_jtj, filter_interactions, group_jtj
from ..scoring.tasks import CLASSIFICATION, Task, example_inputs, find_task
from ..state import copy_of, without_weight_norms
from ..structure.groups import find_groups
from ..structure.layers import LayerAxis, get_layer, is_projection, kernel_dims, layer_axes, scored_layers
from ..studio import Setup, as_program
from .controls import SCROLLING, Click, View, code_area, dropdown, integer, set_options, table, text, typed

T = TypeVar("T")


class Explorer(View):
    """A view of what a network's calibration batches tell of the channels of a layer. To be built upon.

    Args:
        model: copied, so that it stays free while the copy is looked at in a thread.
        data: made by `load_data`, or what `as_data` takes; its split ``train`` gives the batches.
        task: what the network is for, a `Task` or the name of one of `TASKS`.
        batches, batch_size, seed: of the calibration batches; None: 10 of them, or all there are.
        look: "light" or "dark"; None: as the page is.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        task: str | Task = CLASSIFICATION,
        batches: int | None = None,
        batch_size: int = 64,
        seed: int = 0,
        look: str | None = None,
    ):
        self.look = look or LIGHT
        super().__init__(self._wordy(""), look)
        self.network = copy_of(without_weight_norms(model)).eval()
        self.copied_from(model)
        self._data, self._task = as_data(data), find_task(task)
        self._made_data = "" if self._data is data else "data = obc.as_data(data)\n"
        self._setup = Setup.of(model, self._data, self._task, batches, batch_size, seed=seed)
        self._scored = {} if self._task is CLASSIFICATION else {"objective": self._task.losses}
        self._said = ", objective=task.losses" if self._scored else ""
        scored = scored_layers(self.network)
        layers = [name for name, layer in scored if is_projection(layer) and kernel_dims(layer) in (0, 2)]
        if not layers:
            raise ValueError("this network has no convolution or linear layer whose channels could be looked at")
        self.layer = dropdown("layer", layers, layers[0])
        self.cancel_button = self.button("cancel", self._cancel, "what is being computed", "times")
        self.table, self.code = W.HTML(layout=SCROLLING), code_area()
        self._begin()

    def _begin(self) -> None:
        """Make the other controls, and compute what is shown first."""
        raise NotImplementedError

    @property
    def batches(self) -> Collection[Any]:
        """The calibration batches, the same each time."""
        return self._setup.calibration(self._data)

    def compute(self, what: str, then: Callable[[T], None], work: Callable[..., T], *more: Any) -> None:
        """Do something with network, batches and more beside the kernel; what was under way is cancelled."""
        batches = self.batches
        self.tell(what)
        self._say_if_empty(what)
        self._worker.start(lambda task: work(self.network, task.watch(batches, what), *more, **self._scored), then)

    def show(self, figure: go.Figure) -> None:
        """Show another figure."""
        self.progress.value = 0
        self.picture.show(figure)

    def _say_code(self, calls: str) -> None:
        """Show the Python that makes what is shown out of ``model`` and ``data``, and of ``task`` where one is used."""
        calls = f"{self._setup.drawn}\n{calls}" if "batches" in calls else calls
        self.code.value = as_program(f"{self._made_data}{calls}" if "data." in calls else calls)

    def _wordy(self, words: str) -> go.Figure:
        """Return a figure without anything but words."""
        lines = "<br>".join(textwrap.wrap(html.escape(words, quote=False), 90))
        bare, said = {"visible": False}, {"text": lines, "x": 0.5, "y": 0.5, "xanchor": "center", "font_size": 13}
        return finished(go.Figure(), self.look, 420, x=bare, y=bare, title=said)

    def _say_if_empty(self, words: str) -> None:
        if not self.figure.data:
            self.picture.show(self._wordy(words))

    def _cancel(self) -> None:
        self._worker.cancel()
        self.say("cancelled")
        self._say_if_empty("cancelled")

    def _failed(self, error: Exception) -> None:
        super()._failed(error)
        self._say_if_empty(f"{type(error).__name__}: {error}")


VIEWS = ("grid", "one channel", "filter", "spectrum", "group")


class JTJExplorer(Explorer):
    """Look into the Jacobian of single channels: JᵀJ as the paper's grid of heatmaps, and what it says.

    Choose a layer and channels; see all of them, one enlarged (hover tells which two weights), its filter as an image,
    the spectra, or the channel with all that its group couples to it. Scores and shares of off-diagonal terms are
    in the table, the call in the field below; the full matrices go to an ``.npz`` file.

    Args:
        model: left unchanged; the explorer works on a copy.
        data, task: as of `Explorer`.
        batches, batch_size, seed: of the calibration batches, one row of J each.
        look: "light" or "dark"; None: as the page is.

    Attributes:
        dense: the `DenseJTJ` that is shown. group: the `GroupJTJ`, once the group was looked at.

    Raises:
        ValueError: an unknown look, a network without layers that have channels.
    """

    dense: DenseJTJ | None = None
    group: GroupJTJ | None = None

    def _begin(self) -> None:
        place = self._setup.device, self._setup.dtype
        self.groups = find_groups(self.network, example_inputs(self._task, self._data, *place))
        self.first = integer("first channel", 0, 0, 10**6)
        self.count = integer("channels", 16, 1, 64)
        self.view = dropdown("view", VIEWS, "grid")
        self.mode = dropdown("values", MODES, "absolute")
        self.channel = dropdown("channel", [0], 0)
        self.path = text("write to", "jtj.npz")
        self.save_button = self.button("save", self._save, "all matrices, weights and labels", "download")
        buttons = W.HBox([self.save_button, self.cancel_button])
        left = [self.layer, self.first, self.count, self.view, self.mode, self.channel, self.path, buttons]
        self.children = (self.beside(left), self.table, self.code)
        self.on_change((self.layer, self.first, self.count), self._compute)
        self.on_change((self.view, self.mode, self.channel), self._show)
        self._compute()

    def __repr__(self) -> str:
        return f"JTJExplorer({self.layer.value}, {self.dense!r})"

    def save(self, path: str | Path) -> Path:
        """Write values, weights, channels and labels of what is shown to an ``.npz`` file; return its path.

        Raises:
            ValueError: nothing has been computed yet.
        """
        if self.dense is None:
            raise ValueError("nothing has been computed yet: wait for it")
        shown = self.dense
        arrays = {"values": shown.values.numpy(force=True), "weights": shown.weights.numpy(force=True)}
        path = Path(path if str(path).endswith(".npz") else f"{path}.npz")
        with replacing(path) as new, new.open("wb") as file:
            np.savez_compressed(file, channels=np.array(shown.channels), labels=np.array(shown.labels), **arrays)
        return path

    def _compute(self) -> None:
        layer = self.layer.value
        width = layer_axes(get_layer(self.network, layer), layer)["out"].width
        with self._filling():
            self.first.max = width - 1
            self.first.value = min(self.first.value, width - 1)
        first = self.first.value
        channels = range(first, min(first + self.count.value, width))
        self.group = None
        self.compute("computing JᵀJ", self._take, _dense, layer, channels)

    def _take(self, dense: DenseJTJ) -> None:
        self.dense = dense
        self.table.value = table(dense.to_frame().map("{:.4g}".format))
        with self._filling():
            known = self.channel.value if self.channel.value in dense.channels else dense.channels[0]
            set_options(self.channel, dense.channels, known)
        self._show()

    def _show(self) -> None:
        """Show the chosen view of what was computed."""
        dense, channel, mode = self.dense, self.channel.value, self.mode.value
        if dense is None:
            return
        if self.view.value == "group":
            self._show_group(dense.axis, channel, mode)
            return
        layer, channels = dense.axis.layer, range(dense.channels[0], dense.channels[-1] + 1)
        made = f"jtj = obc.dense_jtj(model, batches, {layer!r}, {channels!r}"
        made += (", pool='kernel'" if dense.pool else "") + f"{self._said})\n"
        weight = get_layer(self.network, layer).weight
        own = f"plots.filter_image(model.get_submodule({layer!r}).weight, {layer!r}, {channel})"
        draw = {
            "grid": (lambda: plots.jtj_grid(dense, mode=mode, look=self.look), f"{made}jtj.plot({mode!r})"),
            "one channel": (
                lambda: plots.jtj_heatmap(dense, channel, mode, look=self.look),
                f"{made}plots.jtj_heatmap(jtj, {channel}, {mode!r})",
            ),
            "filter": (lambda: plots.filter_image(weight, layer, channel, look=self.look), own),
            "spectrum": (lambda: plots.spectrum(dense, look=self.look), f"{made}plots.spectrum(jtj)"),
        }
        figure, code = draw[self.view.value]
        self.show(figure())
        self._say_code(code)
        self.tell(repr(dense))

    def _show_group(self, axis: LayerAxis, channel: int, mode: str) -> None:
        """Show the channel with all members of its group, computed when that is first asked for."""
        members = ((group, member) for group in self.groups for member in group.members if member.axis == axis)
        places = (
            (group, dict(zip(member.positions, member.channels, strict=True)).get(channel)) for group, member in members
        )
        group, channel = next((place for place in places if place[1] is not None), (None, channel))
        if group is None:
            raise ValueError(f"no group has channel {channel} of {axis}")
        if self.group is not None and (self.group.group, self.group.channel) == (group, channel):
            self._take_group(self.group)
            return
        self.compute("computing the group's JᵀJ", self._take_group, group_jtj, group, channel)

    def _take_group(self, group: GroupJTJ) -> None:
        self.group = group
        self.show(plots.group_jtj_heatmap(group, self.mode.value, look=self.look))
        self._say_code(
            f"{self._setup.example}\ngroups = obc.find_groups(model, example)\n"
            f"group = next(group for group in groups if group.root == {tuple(group.group.root)!r})\n"
            f"jtj = obc.group_jtj(model, batches, group, {group.channel}{self._said})\njtj.plot({self.mode.value!r})"
        )
        self.tell(repr(group))

    def _save(self) -> None:
        self.tell(f"wrote '{self.save(typed(self.path, '.npz'))}'")


def _dense(network: nn.Module, batches: Collection[Any], layer: str, channels: range, **scored: Any) -> DenseJTJ:
    """Return JᵀJ of the channels, pooled by kernels where they are too large for the memory that is allowed."""
    try:
        return dense_jtj(network, batches, layer, channels, **scored)
    except ValueError as error:
        if "pool='kernel'" not in str(error):
            raise
    return dense_jtj(network, batches, layer, channels, pool="kernel", **scored)


ORDERS = ("cluster", "score", "channel")
INTERACTION_MODES = ("correlation", "signed", "absolute")
PAIRS = 5


class InteractionExplorer(Explorer):
    """Look at how the filters of a layer act on the losses together: K = (JW)ᵀ(JW), and which pairs stand out.

    Choose a layer and an order; click a cell to see JᵀJ of both filters. The table has the pairs that duplicate each
    other most (their removals change the losses alike) and those that cancel.

    Args:
        model: left unchanged; the explorer works on a copy.
        data, task: as of `Explorer`.
        batches, batch_size, seed: of the calibration batches, one row of J each.
        look: "light" or "dark"; None: as the page is.

    Attributes:
        interactions: the `FilterInteractions` that are shown. pair: JᵀJ of the two filters that were clicked last.

    Raises:
        ValueError: an unknown look, a network without layers that have channels.
    """

    interactions: FilterInteractions | None = None
    pair: DenseJTJ | None = None
    _products: JacobianProducts | None = None
    _shows_pairs = False

    def _begin(self) -> None:
        self.order = dropdown("order", ORDERS, "cluster")
        self.mode = dropdown("values", INTERACTION_MODES, "correlation")
        self.back_button = self.button("back to K", self._show, "from the JᵀJ of a pair", "arrow-left")
        buttons = W.HBox([self.back_button, self.cancel_button])
        self.children = (self.beside([self.layer, self.order, self.mode, buttons, self.table]), self.code)
        self.on_change((self.layer, self.order, self.mode), self._show)
        self._show()

    def __repr__(self) -> str:
        return f"InteractionExplorer({self.layer.value}, {self.interactions!r})"

    def look_at(self, i: int, j: int) -> None:
        """Show JᵀJ of two filters of the layer, as a click on their cell does."""
        if self.interactions is None:
            raise ValueError("J·w is not computed yet: wait() for it first")
        what = f"computing JᵀJ of channels {i} and {j}"
        self.compute(what, self._take_pair, dense_jtj, self.layer.value, [i, j])

    def clicked(self, click: Click) -> None:
        """Show JᵀJ of both filters of the cell that was clicked."""
        if self._shows_pairs:
            self.look_at(int(click.y), int(click.x))

    def _take(self, products: JacobianProducts) -> None:
        self._products = products
        self._show()

    def _show(self) -> None:
        """Show K as it is chosen; J·w is computed first where it is not known, also after it was cancelled."""
        if self._products is None:
            if not self._worker.busy:
                self.compute("computing J·w", self._take, jacobian_products)
            return
        found = self.interactions = filter_interactions(self._products, self.layer.value)
        self.show(plots.interactions_heatmap(found, self.order.value, self.mode.value, look=self.look))
        self._shows_pairs = True
        self.table.value = self._pairs(found)
        self.tell(f"{found!r}; click a cell to see both filters")
        draw = f"k.plot(order={self.order.value!r}, mode={self.mode.value!r})"
        self._say_code(
            f"products = obc.jacobian_products(model, batches{self._said})\n"
            f"k = obc.filter_interactions(products, {self.layer.value!r})\n{draw}"
        )

    def _pairs(self, found: FilterInteractions) -> str:
        frame = found.to_frame().sort_values("correlation", ascending=False)
        ends = {"duplicate most": frame.head(PAIRS), "cancel most": frame[frame["correlation"] < 0].tail(PAIRS)[::-1]}
        return "".join(
            f"<b>{title}</b>{table(part.map(lambda v: f'{v:.3g}'))}" for title, part in ends.items() if len(part)
        )

    def _take_pair(self, dense: DenseJTJ) -> None:
        self.pair = dense
        self._shows_pairs = False
        self.show(plots.jtj_pair(dense, look=self.look))
        made = f"jtj = obc.dense_jtj(model, batches, {dense.axis.layer!r}, {list(dense.channels)}{self._said})"
        self._say_code(f"{made}\nplots.jtj_pair(jtj)")
        scored = zip(dense.channels, dense.score, strict=True)
        scores = ", ".join(f"{channel}: {score:.3e}" for channel, score in scored)
        together = self.interactions.joint(set(dense.channels))
        self.tell(f"scores {scores}; removed together {together:.3e}")
