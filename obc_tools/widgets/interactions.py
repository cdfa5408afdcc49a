"""Look at how the filters of a layer act together."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import ipywidgets as W
from torch import nn

from ..data import Data
from ..dense import DenseJTJ, dense_jtj
from ..explorer_plots import jtj_pair
from ..interactions import FilterInteractions, filter_interactions
from ..jacobian import JacobianProducts, jacobian_products
from ..plots import interactions_heatmap
from .controls import COLUMN, REST, button, code_area, dropdown, note, table
from .explorer import Explorer
from .live import Click

ORDERS = ("cluster", "score", "channel")
MODES = ("correlation", "signed", "absolute")
PAIRS = 5


class InteractionExplorer(Explorer):
    """Look at how the filters of a layer act on the losses together: K = (JW)ᵀ(JW), and which pairs stand out.

    Choose a layer and an order; click a cell to see JᵀJ of both filters. The table has the pairs that duplicate each
    other most (their removals change the losses alike) and those that cancel.

    Args:
        model: left unchanged; the explorer works on a copy.
        data: a `load_data` data set; its split ``train`` gives the batches.
        batches, batch_size, seed: of the calibration batches, one row of J each.
        look: "light" or "dark".

    Attributes:
        interactions: the `FilterInteractions` that are shown. pair: JᵀJ of the two filters that were clicked last.

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
        self._shows_pairs = False
        self.interactions: FilterInteractions | None = None
        self.pair: DenseJTJ | None = None
        self._products: JacobianProducts | None = None
        self.layer = self.choose_layer()
        self.order = dropdown("order", ORDERS, "cluster")
        self.mode = dropdown("values", MODES, "correlation")
        self.back_button = button("back to K", self._show, "from the JᵀJ of a pair", "arrow-left")
        self.cancel_button = button("cancel", self._worker.cancel, "what is being computed", "times")
        self.table, self.code = W.HTML(), code_area()
        buttons = W.HBox([self.back_button, self.cancel_button])
        left = W.VBox([self.layer, self.order, self.mode, buttons, self.table], layout=COLUMN)
        right = W.VBox([self.picture, W.HBox([self.progress, self.status])], layout=REST)
        self.children = (W.HBox([left, right]), self.code)
        self.on_change((self.layer, self.order, self.mode), self._show)
        self.compute("computing J·w", lambda batches: jacobian_products(self.network, batches), self._take)

    def __repr__(self) -> str:
        return f"InteractionExplorer({self.layer.value}, {self.interactions!r})"

    def look_at(self, i: int, j: int) -> None:
        """Show JᵀJ of two filters of the layer, as a click on their cell does."""
        layer = self.layer.value
        self._say_code(f"jtj = obc.dense_jtj(model, batches, {layer!r}, [{i}, {j}])\njtj.plot()")

        def work(batches: Collection[Any]) -> DenseJTJ:
            return dense_jtj(self.network, batches, layer, [i, j])

        self.compute(f"computing JᵀJ of channels {i} and {j}", work, self._take_pair)

    def clicked(self, click: Click) -> None:
        """Show JᵀJ of both filters of the cell that was clicked."""
        if self._shows_pairs:
            self.look_at(int(click.y), int(click.x))

    def _take(self, products: JacobianProducts) -> None:
        self._products = products
        self._show()

    def _show(self) -> None:
        if self._products is None:
            return
        found = self.interactions = filter_interactions(self._products, self.layer.value)
        self.show(interactions_heatmap(found, self.order.value, self.mode.value, look=self.look))
        self._shows_pairs = True
        self.table.value = self._pairs(found)
        self.status.value = note(f"{found!r}; click a cell to see both filters")
        draw = f"k.plot(order={self.order.value!r}, mode={self.mode.value!r})"
        self._say_code(
            "products = obc.jacobian_products(model, batches)\n"
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
        self.show(jtj_pair(dense, look=self.look))
        scores = ", ".join(
            f"{channel}: {score:.3e}" for channel, score in zip(dense.channels, dense.score, strict=True)
        )
        together = self.interactions.joint(set(dense.channels))
        self.status.value = note(f"scores {scores}; removed together {together:.3e}")

    def _say_code(self, call: str) -> None:
        self.code.value = f"import obc_tools as obc\n\n{self.batches_code}\n{call}\n"
