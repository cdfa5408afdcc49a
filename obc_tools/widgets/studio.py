"""Prune by hand and by criterion, with the outcome at once: a view of `studio_state` and `studio_session`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import ipywidgets as W
import plotly.graph_objects as go
import torch
from torch import Tensor, nn

from ..data.data import Data
from ..files import write_text
from ..models.store import save_pruned
from ..plots.studio import SCORES, UPPER, studio_axes, studio_figure, studio_traces
from ..pruning.choices import Scoring, Selection
from ..pruning.plan import PruningPlan
from ..pruning.prune import prune
from ..scoring.scores import Scores
from ..structure.layers import LayerAxis
from ..studio.session import Bars, StudioSession, studio_bars
from ..studio.state import (
    Choices,
    Setup,
    StudioState,
    change,
    lock,
    plan_changes,
    redo,
    remember,
    to_code,
    toggle_channel,
    undo,
    unlock,
)
from .controls import COLUMN, REST, Click, Filling, LiveFigure, listed, note, set_options, table
from .studio_controls import NONE, StudioControls, target_near
from .tasks import Task, Worker

SECONDS_OF_A_DRAG = 1.0
"""Moves of the target within so many seconds of each other are undone together."""


class PruningStudio(W.VBox):
    """Prune a network by hand and by criterion, and see at once what it costs.

    Display it in a notebook. Choose a criterion and a target, hold or limit single groups, click channels in the score
    bar to keep or remove them; measure when you like it; take the plan away as JSON, as a saved model, or as the Python
    that makes it, which is always shown.

    Args:
        model: left unchanged; the studio works on a copy.
        data: a `load_data` data set: ``train`` calibrates, ``val`` is held out.
        batches: calibration batches for criteria that need data.
        batch_size: images in a batch, of both kinds.
        held_out: held-out batches to evaluate, at most.
        seed: of the calibration batches.
        ignore, whole_heads, only: which channels may go at all (see `find_groups`).
        source: how `load_model` builds the unpruned network, for models that are saved (see `save_pruned`).
        look: "light" or "dark".

    Attributes:
        plan: the present plan; `prune(model, studio.plan)` and `EquivalentModel(model, studio.plan)` take it on.
        state: all choices, with those to undo and redo (see `studio_state`).
        code: the Python that makes the plan.

    Raises:
        ValueError: a network that cannot be traced or costed, an unknown look.

    Example:
        >>> studio = PruningStudio(model, obc.load_data("digits"))  # doctest: +SKIP
        >>> studio  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        *,
        batches: int = 10,
        batch_size: int = 64,
        held_out: int = 4,
        seed: int = 0,
        ignore: Iterable[str] = (),
        whole_heads: bool = False,
        only: str | None = None,
        source: str | dict | None = None,
        look: str = "light",
    ):
        device = next((str(parameter.device) for parameter in model.parameters()), "cpu")
        selection = Selection(ignore, whole_heads, only)
        setup = Setup(data.image_shape, selection, batches, batch_size, seed, device)
        self.session = StudioSession(model, data, setup, held_out)
        self.state, self.plan = StudioState(), self.session.whole
        self._source, self._filling, self._moved = source, Filling(), 0.0
        self._before: PruningPlan | None = None
        self._scoring: Scoring | None = None
        self._worker = Worker(self._report, self._failed)
        self._controls = c = StudioControls.build(self.session, self.state.choices)
        self._look = look
        self.picture = LiveFigure(self._drawn(), self._clicked)
        self._connect()
        left = W.VBox([c.scoring_box, c.target_box, c.group_box], layout=COLUMN)
        right = W.VBox([self.picture, c.status_box], layout=REST)
        super().__init__([c.action_box, W.HBox([left, right]), c.table, c.changes, c.keep_box, c.code])
        self._show()

    @property
    def figure(self) -> go.Figure:
        """The figure that is shown."""
        return self.picture.figure

    @property
    def code(self) -> str:
        """The Python that makes the present plan."""
        return to_code(self.state.choices, self.session.setup)

    def __repr__(self) -> str:
        return f"PruningStudio({self.plan!r})"

    def wait(self, timeout: float = 600.0) -> PruningStudio:
        """Wait until nothing is computed any more, as a script does that goes on with the plan; return the studio."""
        self._worker.wait(timeout)
        return self

    def choose(self, choices: Choices, *, merge: bool = False) -> None:
        """Make other choices, as the controls do; see `studio_state.change` for ``merge``."""
        with self._worker.lock:
            self.state = change(self.state, choices, merge=merge)
            self._show()

    def toggle(self, root: LayerAxis, channel: int) -> None:
        """Keep or remove one channel by hand, as a click in the score bar does."""
        self._try(lambda: self.choose(toggle_channel(self.state.choices, self.plan, LayerAxis(*root), channel)))

    def measure(self) -> None:
        """Measure latency, loss and accuracy of the plans that are shown and of the original, beside the kernel.

        Raises:
            ValueError: while scores are computed, which a measurement would hold up.
        """
        self._refuse_while_scoring()
        shown = (self.session.whole, self._compared(), self._before, self.plan)
        plans = list(dict.fromkeys(plan for plan in shown if plan is not None))
        work = partial(self.session.measure, plans)
        self._worker.start(lambda task: work(task.watch), lambda _: self._measured(len(plans)))

    def export_plan(self, path: str | Path) -> Path:
        """Write the plan as JSON, which `PruningPlan.from_json` reads."""
        write_text(Path(path), self.plan.to_json())
        return Path(path)

    def export_model(self, folder: str | Path) -> Path:
        """Save the pruned network, which `load_pruned` reads; a folder in use is refused."""
        save_pruned(folder, prune(self.session.model, self.plan), self.plan, source=self._source)
        return Path(folder)

    def _connect(self) -> None:
        c = self._controls
        for control in (c.criterion, c.reduction, c.normalizer, c.scope, c.round_to, c.kind, *c.targets.values()):
            control.observe(lambda changed: self._by_hand(lambda: self._changed(changed["owner"])), "value")
        shown = {c.group: self._show_group, c.limit: self._set_limit, c.locked: self._set_lock}
        for control, act in (shown | {c.compared: self._show_outcome}).items():
            control.observe(lambda _, act=act: self._by_hand(act), "value")
        c.bars.observe(lambda _: self._try(lambda: self.picture.show(self._drawn())), "value")
        actions: dict[W.Button, Callable[[], object]] = {
            c.undo: lambda: self._step(undo),
            c.redo: lambda: self._step(redo),
            c.measure: self.measure,
            c.cancel: self._cancel,
            c.remember: self._remember,
            c.save_plan: lambda: self._export(self.export_plan, ".json"),
            c.save_model: lambda: self._export(self.export_model, ""),
            c.save_code: lambda: self._export(self._write_code, ".py"),
        }
        for made, act in actions.items():
            made.on_click(lambda _, act=act: self._try(act))

    def _by_hand(self, act: Callable[[], object]) -> None:
        """Do what a control asks for that somebody set, and not while an outcome is handed over."""
        with self._worker.lock:
            if not self._filling.now:
                self._try(act)

    def _changed(self, control: W.Widget) -> None:
        c, choices = self._controls, self.state.choices
        dragged = control is c.target
        if control is c.kind:
            choices = replace(choices, target=target_near(c.kind.value, self.plan, self.session.costs))
            with self._filling():
                c.show_target(choices.target)
        choices = c.read(choices)
        if choices == self.state.choices:
            return
        merge = dragged and time.monotonic() - self._moved < SECONDS_OF_A_DRAG
        self.choose(choices, merge=merge)
        # Not before the plan is made: a slow one must not break a drag into two.
        self._moved = time.monotonic() if dragged else 0.0

    def _step(self, walk: Callable[[StudioState], StudioState]) -> None:
        with self._worker.lock:
            self.state = walk(self.state)
            self._show()

    def _measured(self, count: int) -> None:
        self._show_outcome()
        self._controls.say(f"measured {count} plans")

    def _set_limit(self) -> None:
        choices = self._controls.read_limit(self.state.choices)
        if choices != self.state.choices:
            self.choose(choices)

    def _set_lock(self) -> None:
        root, choices = self._controls.group.value, self.state.choices
        self.choose(lock(choices, self.plan, root) if self._controls.locked.value else unlock(choices, root))

    def _remember(self) -> None:
        c = self._controls
        self.state = remember(self.state, c.name.value)
        names = [name for name, _ in self.state.remembered]
        with self._filling():
            set_options(c.compared, [NONE, *names], c.name.value)
            c.name.value = f"plan {len(names) + 1}"
        self._show_outcome()

    def _clicked(self, click: Click) -> None:
        c = self._controls
        if click.trace == SCORES:
            self.toggle(c.group.value, int(self.figure.data[SCORES].customdata[click.place[0]]))
        elif click.trace == UPPER and (root := self._bars(None).roots[click.place[0]]) is not None:
            c.group.value = root

    def _refuse_while_scoring(self) -> None:
        if self._scoring is not None:
            raise ValueError("channels are being scored: wait for it, or cancel it")

    def _cancel(self) -> None:
        """Leave what is being computed, and go back to the last choices that were carried out."""
        self._worker.cancel()
        if self._scoring is not None:
            self._scoring = None
            scored = self.state
            while scored.past and self.session.scores(scored.choices.scoring) is None:
                scored = undo(scored)
            if self.session.scores(scored.choices.scoring) is not None:
                self._step(lambda _: scored)
        self._controls.progress.value = 0
        self._controls.say("cancelled")

    def _export(self, write: Callable[[str], Path], ending: str) -> None:
        path = self._controls.path.value + ending
        self._controls.say(f"wrote '{write(path)}'")

    def _write_code(self, path: str) -> Path:
        self._refuse_while_scoring()
        write_text(Path(path), self.code)
        return Path(path)

    def _try(self, act: Callable[[], object]) -> None:
        """Do what a control asks for; show what is wrong with it where that is its own fault."""
        with self._worker.lock:
            try:
                act()
            except (ValueError, OSError) as error:
                self._failed(error)

    def _report(self, what: str, share: float) -> None:
        self._controls.progress.value = share
        self._controls.status.value = note(f"{what}, {share:.0%}")

    def _failed(self, error: Exception) -> None:
        if not self._worker.busy:
            self._scoring = None
        self._controls.progress.value = 0
        self._controls.say(f"{type(error).__name__}: {error}", bad=True)

    def _show(self) -> None:
        """Show the present choices: at once where their scores are there, else when they have been computed."""
        choices = self.state.choices
        with self._filling():
            self._controls.show(self.state)
        self._controls.code.value = self.code
        if self.session.scores(choices.scoring) is not None:
            self._worker.cancel()
            self._scoring = None
            self._make_plan()
            return
        if self._scoring == choices.scoring:
            return

        def work(task: Task) -> Scores:
            return self.session.score(choices.scoring, lambda batches: task.watch(batches, "scoring"))

        self._controls.say(f"scoring by {choices.scoring.criterion}")
        self._scoring = choices.scoring
        self._worker.start(work, lambda scores: self._make_plan())

    def _make_plan(self) -> None:
        self._scoring = None
        start = time.perf_counter()
        try:
            plan = self.session.plan(self.state.choices)
        except ValueError as error:
            self._failed(error)
            return
        self._controls.say(f"{plan!r} ({1e3 * (time.perf_counter() - start):.0f} ms)")
        if plan != self.plan:
            self._before, self.plan = self.plan, plan
        self._show_outcome()

    def _score(self, root: LayerAxis) -> Tensor:
        scores = self.session.scores(self.state.choices.scoring)
        group = next(group for group in self.session.groups if group.root == root)
        return torch.zeros(group.width) if scores is None else scores[group]

    def _show_group(self) -> None:
        with self._filling():
            self._controls.show_group(self.state.choices)
        self._show_outcome()

    def _show_outcome(self) -> None:
        """Bring figure, tables and code up to the plan."""
        c, root = self._controls, self._controls.group.value
        compared, score, figure = self._compared(), self._score(root), self.figure
        plans = {c.compared.value: compared} if compared else {}
        plans |= {"before": self._before} if self._before else {}
        c.table.value = table(self.session.table(plans | {"now": self.plan}))
        name, other = (c.compared.value, compared) if compared else ("the plan before", self._before)
        c.changes.value = "" if other is None else self._changes(name, other)
        c.progress.value = 0
        # Last, since a page that draws takes nothing else meanwhile.
        traces = studio_traces(self._bars(compared), self.plan.kept_of(root), score)
        for old, new in zip(figure.data, traces, strict=True):
            old.update(new)
        self.picture.show(figure.update_layout(studio_axes(str(LayerAxis(*root)), score)))

    def _bars(self, compared: PruningPlan | None) -> Bars:
        c = self._controls
        return studio_bars(self.plan, c.group.value, bars=c.bars.value, costs=self.session.costs, compared=compared)

    def _drawn(self) -> go.Figure:
        root = self._controls.group.value
        bars, kept = self._bars(self._compared()), self.plan.kept_of(root)
        return studio_figure(bars, kept, str(LayerAxis(*root)), self._score(root), look=self._look)

    def _changes(self, name: str, other: PruningPlan) -> str:
        frame = plan_changes(other, self.plan)
        shown = frame.assign(removed=frame["removed"].map(listed), restored=frame["restored"].map(listed))
        return f"Changed since {note(name)}: {len(frame)} groups{table(shown) if len(shown) else ''}"

    def _compared(self) -> PruningPlan | None:
        """Return the remembered plan to compare with, if its scores are there."""
        choices = dict(self.state.remembered).get(self._controls.compared.value)
        if choices is None or self.session.scores(choices.scoring) is None:
            return None
        return self.session.plan(choices)
