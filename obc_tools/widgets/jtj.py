"""Look into JᵀJ of single channels and of groups."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import ipywidgets as W
import numpy as np
import torch
from torch import nn

from ..data import Data
from ..dense import DenseJTJ, GroupJTJ, dense_jtj, group_jtj
from ..explorer_plots import filter_image
from ..groups import find_groups
from ..layers import LayerAxis, get_layer, layer_axes
from ..plots import MODES, group_jtj_heatmap, jtj_grid, jtj_heatmap, spectrum
from .controls import COLUMN, REST, button, code_area, dropdown, integer, note, set_options, table, text
from .explorer import Explorer

VIEWS = ("grid", "one channel", "filter", "spectrum", "group")


class JTJExplorer(Explorer):
    """Look into the Jacobian of single channels: JᵀJ as the paper's grid of heatmaps, and what it says.

    Choose a layer and channels; see all of them, one enlarged (hover tells which two weights), its filter as an image,
    the spectra, or the channel with all that its group couples to it. Scores and shares of off-diagonal terms are
    in the table, the call in the field below; the full matrices go to an ``.npz`` file.

    Args:
        model: left unchanged; the explorer works on a copy.
        data: a `load_data` data set; its split ``train`` gives the batches.
        batches, batch_size, seed: of the calibration batches, one row of J each.
        look: "light" or "dark".

    Attributes:
        dense: the `DenseJTJ` that is shown. group: the `GroupJTJ`, once the group was looked at.

    Raises:
        ValueError: an unknown look, a network without layers that have channels.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        *,
        batches: int = 10,
        batch_size: int = 64,
        seed: int = 0,
        look: str = "light",
    ):
        super().__init__(model, data, batches, batch_size, seed, look)
        self.dense: DenseJTJ | None = None
        self.group: GroupJTJ | None = None
        self.groups = find_groups(self.network, torch.zeros(1, *data.image_shape, device=self._device))
        self.layer = self.choose_layer()
        self.first = integer("first channel", 0, 0, 10**6)
        self.count = integer("channels", 16, 1, 64)
        self.view = dropdown("view", VIEWS, "grid")
        self.mode = dropdown("values", MODES, "absolute")
        self.channel = dropdown("channel", [0], 0)
        self.path = text("write to", "jtj.npz")
        self.save_button = button("save", self._save, "all matrices, weights and labels", "download")
        self.cancel_button = button("cancel", self._worker.cancel, "what is being computed", "times")
        self.table, self.code = W.HTML(), code_area()
        left = [self.layer, self.first, self.count, self.view, self.mode, self.channel, self.path]
        left.append(W.HBox([self.save_button, self.cancel_button]))
        right = W.VBox([self.picture, W.HBox([self.progress, self.status])], layout=REST)
        self.children = (W.HBox([W.VBox(left, layout=COLUMN), right]), self.table, self.code)
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
        np.savez_compressed(path, channels=np.array(shown.channels), labels=np.array(shown.labels), **arrays)
        return Path(path)

    def _compute(self) -> None:
        layer = self.layer.value
        width = layer_axes(get_layer(self.network, layer), layer)["out"].width
        with self._filling():
            self.first.max = width - 1
            self.first.value = min(self.first.value, width - 1)
        first = self.first.value
        channels = range(first, min(first + self.count.value, width))
        self.group = None
        self._say_code(f"jtj = obc.dense_jtj(model, batches, {layer!r}, {channels!r})")
        self.compute("computing JᵀJ", lambda batches: self._dense(batches, layer, channels), self._take)

    def _dense(self, batches: Collection[Any], layer: str, channels: range) -> DenseJTJ:
        """Return JᵀJ of the channels, pooled by kernels where they are too large for the memory that is allowed."""
        try:
            return dense_jtj(self.network, batches, layer, channels)
        except ValueError as error:
            if "pool='kernel'" not in str(error):
                raise
        return dense_jtj(self.network, batches, layer, channels, pool="kernel")

    def _take(self, dense: DenseJTJ) -> None:
        self.dense = dense
        pooled = ', pool="kernel"' if dense.pool else ""
        channels = range(dense.channels[0], dense.channels[-1] + 1)
        self._say_code(f"jtj = obc.dense_jtj(model, batches, {dense.axis.layer!r}, {channels!r}{pooled})")
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
        draw = {
            "grid": lambda: jtj_grid(dense, mode=mode, look=self.look),
            "one channel": lambda: jtj_heatmap(dense, channel, mode, look=self.look),
            "filter": lambda: filter_image(self.network, dense.axis.layer, channel, look=self.look),
            "spectrum": lambda: spectrum(dense, look=self.look),
        }
        self.show(draw[self.view.value]())
        self.status.value = note(repr(dense))

    def _show_group(self, axis: LayerAxis, channel: int, mode: str) -> None:
        """Show the channel with all members of its group, computed when that is first asked for."""
        group = next((group for group in self.groups if any(member.axis == axis for member in group.members)), None)
        if group is None or channel >= group.width:
            self._failed(ValueError(f"no group has channel {channel} of {axis}"))
            return
        if self.group is not None and (self.group.group, self.group.channel) == (group, channel):
            self._take_group(self.group)
            return
        self._say_code(
            "groups = obc.find_groups(model, example)\n"
            f"group = next(group for group in groups if group.root == {tuple(group.root)!r})\n"
            f"jtj = obc.group_jtj(model, batches, group, channel={channel})"
        )
        what = "computing the group's JᵀJ"
        self.compute(what, lambda batches: group_jtj(self.network, batches, group, channel), self._take_group)

    def _take_group(self, group: GroupJTJ) -> None:
        self.group = group
        self.show(group_jtj_heatmap(group, self.mode.value, look=self.look))
        self.status.value = note(repr(group))

    def _say_code(self, call: str) -> None:
        self.code.value = f"import obc_tools as obc\n\n{self.batches_code}\n{call}\njtj.plot()\n"

    def _save(self) -> None:
        try:
            self.status.value = note(f"wrote '{self.save(self.path.value)}'")
        except (ValueError, OSError) as error:
            self._failed(error)
