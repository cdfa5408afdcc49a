"""Prune by hand and by criterion, with the outcome at once: a view of `obc_tools.studio`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ipywidgets as W
import pandas as pd
import plotly.graph_objects as go
import torch
from torch import Tensor, nn

from .. import studio
from ..data.data import as_data
from ..files import write_text
from ..measure.costs import CostModel
from ..models.store import save_pruned
from ..plots.curves import accuracy_over_macs
from ..plots.looks import LIGHT, counted, escaped
from ..plots.plans import SCORES, UPPER, coupling_graph, studio_axes, studio_figure, studio_traces
from ..pruning.choices import SCOPES, Scoring, Selection, Target
from ..pruning.order import Reach, reach_of
from ..pruning.plan import PruningPlan
from ..scoring.criteria import CRITERIA
from ..scoring.scores import NORMALIZERS, REDUCTIONS
from ..scoring.tasks import CLASSIFICATION, Task, find_task
from ..state import check_module
from ..structure.layers import LayerAxis
from ..studio import BARS, MILLION, MOST, Bars, Choices, Setup, StudioSession, StudioState, Watch, studio_bars
from .controls import (
    FITTING,
    SCROLLING,
    TWO_LINES,
    WRAPPING,
    Click,
    LiveFigure,
    View,
    close,
    code_area,
    dropdown,
    factor_slider,
    integer,
    listed,
    note,
    set_options,
    set_slider,
    slider,
    stands_at,
    table,
    text,
    typed,
)

NONE = "none"
ROWS = ("batch", "sample", "expected")
"""Stands for None, which a choice of a widget cannot have."""

KINDS = {
    "share of channels removed": "ratio",
    "speed-up (times fewer MACs)": "speedup",
    "MACs of one image (millions)": "macs",
    "parameters (millions)": "params",
}


def target_of(kind: str, value: float) -> Target:
    """Return the target that the slider stands for."""
    return Target(**{kind: value * MILLION if kind in ("macs", "params") else value})


def shown_value(target: Target) -> tuple[str, float]:
    """Return a target's kind, and its value as the slider shows it."""
    kind, value = target.given
    return kind, value / MILLION if kind in ("macs", "params") else value


def slider_range(kind: str, reach: Reach) -> tuple[float, float, float]:
    """Return the least and largest value of the slider, and its step: no further than the network can be pruned."""
    if kind == "ratio":
        return 0.01, max(0.02, min(0.99, math.floor(100 * reach.ratio) / 100)), 0.01
    if kind == "speedup":
        return 1.02, max(1.04, min(MOST, math.floor(50 * reach.of("speedup")[1]) / 50)), 0.02
    whole, least = (getattr(cost, kind) / MILLION for cost in (reach.original, reach.least))
    step = whole / 200
    return step * min(197, max(4, math.ceil(least / step))), 0.99 * whole, step


def target_near(kind: str, plan: PruningPlan, costs: CostModel, reach: Reach) -> Target:
    """Return the target of a kind that a plan just meets, within what the slider can say."""
    cost, whole = costs.of(plan), costs.original
    # Rounded to the side on which the plan still meets it.
    here = {
        "ratio": math.ceil(MILLION * plan.channels_removed / plan.channels) / MILLION,
        "speedup": math.floor(MILLION * whole.macs / cost.macs) / MILLION,
        "macs": float(cost.macs),
        "params": float(cost.params),
    }[kind]
    low, high = (target_of(kind, end) for end in slider_range(kind, reach)[:2])
    return Target(**{kind: min(max(here, getattr(low, kind)), getattr(high, kind))})


class StudioControls:
    """What is chosen, by name, and what tells of it in words."""

    def __init__(self, session: StudioSession, choices: Choices):
        roots = [(str(group.root), group.root) for group in session.groups if group.prunable]
        if not roots:
            raise ValueError("nothing can be pruned: every group of this network is kept whole")
        self.reach = reach_of(session.groups, session.costs, choices.limits)
        normalizers = [name or NONE for name in NORMALIZERS]
        self.criterion = dropdown("criterion", CRITERIA, "jacobian", "what a channel is scored by")
        self.rows = dropdown("rows", ROWS, ROWS[0], "of J, where the criterion has rows")
        self.reduction = dropdown("reduction", REDUCTIONS, REDUCTIONS[0], "over a group's members")
        self.normalizer = dropdown("normalizer", normalizers, NONE, "within each group")
        self.scope = dropdown("scope", SCOPES, SCOPES[0], "which channels are ranked together")
        self.kind = dropdown("target", KINDS.items(), "ratio")
        ranges = {each: slider_range(each, self.reach) for each in KINDS.values()}
        self.targets = {each: slider("to", *range_) for each, range_ in ranges.items()}
        self.targets["speedup"] = factor_slider("to", *ranges["speedup"][:2])
        self.place = W.Box([self.target])
        self.round_to = integer("multiple of", 1, 1, 1024, "of the channels a group keeps")
        self.bars = dropdown("bars", BARS, BARS[0], "what the upper bars show: channels of groups, or costs of layers")
        self.group = dropdown("group", roots, roots[0][1], "whose channels are shown below")
        self.limit = slider("at most goes", 0.0, 1.0, 0.01, 1.0, "the share of this group's channels")
        self.locked = W.ToggleButton(description="lock this group", icon="lock", tooltip="hold it as it is now")
        self.name = text("name", "plan 1", width="210px")
        self.compared = dropdown("compare with", [NONE], NONE, width="270px")
        told = "measure also what least squares make of each plan"
        self.compensate = W.ToggleButton(description="compensate", icon="magic", tooltip=told, layout=FITTING)
        self.path = text("write to", "runs/studio", "without the ending")
        self.there = W.HTML(layout=TWO_LINES | {"flex": "1 1 320px"})
        self.header = W.HTML(layout=TWO_LINES)
        self.table, self.changes, self.code = W.HTML(layout=SCROLLING), W.HTML(layout=SCROLLING), code_area()

    @property
    def target(self) -> W.FloatSlider | W.FloatLogSlider:
        """The slider of the kind of target that is chosen.

        Each kind has its own: told another range and another value, a page may take the value first, clip it to the
        range that it still has, and tell that back as if it were somebody's choice.
        """
        return self.targets[self.kind.value]

    @property
    def column(self) -> list[W.Widget]:
        """What scores depend on, what a plan is to meet, what is shown, and what is said of a single group."""
        scoring = [self.criterion, self.rows, self.reduction, self.normalizer]
        target = [self.scope, self.kind, self.place, self.round_to]
        return [*scoring, *target, self.bars, self.group, self.limit, self.locked]

    def read(self, choices: Choices) -> Choices:
        """Return choices with what the controls say in their place."""
        normalizer = None if self.normalizer.value == NONE else self.normalizer.value
        multiple = None if self.round_to.value == 1 else self.round_to.value
        rows = None if self.rows.value == ROWS[0] else self.rows.value
        return replace(
            choices,
            scoring=Scoring("jacobian", self.reduction.value, normalizer, rows=rows).of(self.criterion.value),
            target=self._read_target(choices.target),
            limits=replace(choices.limits, scope=self.scope.value, round_to=multiple),
        )

    def _read_target(self, target: Target) -> Target:
        kind, value = shown_value(target)
        stays = kind == self.kind.value and stands_at(self.target, value)
        said, plain = round(self.target.value, 6), round(self.target.value, 2)
        if self.kind.value == "speedup" and stands_at(self.target, plain):
            said = plain  # as a person would write it
        return target if stays else target_of(self.kind.value, said)

    def read_limit(self, choices: Choices) -> Choices:
        """Return choices with the limit of the group that is shown in their place."""
        root, share = self.group.value, self.limit.value
        if stands_at(self.limit, studio.limit_of(choices, root)):
            return choices
        return studio.set_limit(choices, root, None if share == 1 else round(share, 6))

    def show(self, choices: Choices) -> None:
        """Set every control to what was chosen."""
        scoring = choices.scoring
        self.criterion.value, self.reduction.value = scoring.criterion, scoring.group_reduction
        self.normalizer.value, self.rows.value = scoring.normalizer or NONE, scoring.rows or ROWS[0]
        self.scope.value, self.round_to.value = choices.limits.scope, choices.limits.round_to or 1
        self.show_target(choices.target)
        self.show_group(choices)

    def show_group(self, choices: Choices) -> None:
        """Set limit and lock to those of the group that is shown."""
        root = self.group.value
        set_slider(self.limit, studio.limit_of(choices, root))
        self.locked.value = root in dict(choices.locked)

    def show_target(self, target: Target) -> None:
        """Show the slider of a target's kind, and on it the target."""
        kind, value = shown_value(target)
        set_slider(self.targets[kind], value)
        self.place.children, self.kind.value = (self.targets[kind],), kind


FOLDS = CHANGED, GRAPH, FRONTIER, SENSITIVITY = ("What changed", "Coupled layers", "Frontier", "Sensitivity")
"""What opens below the tables: channels that two plans treat differently, the graph of what goes together, what other
targets would cost, and what single groups do."""
SECONDS_OF_A_DRAG = 1.0
"""Moves of the target within so many seconds of each other are undone together."""


class PruningStudio(View):
    """Prune a network by hand and by criterion, and see at once what it costs.

    Display it in a notebook. Choose a criterion and a target, hold or limit single groups, click channels in the score
    bar to keep or remove them; measure when you like it; take the plan away as JSON, as a saved model, or as the Python
    that makes it, which is always shown.

    Args:
        model: left unchanged; the studio works on a copy.
        data: made by `load_data` or `as_data`: ``train`` calibrates, ``val`` is held out.
        task: what the network is for, a `Task` or the name of one of `TASKS`.
        batches: calibration batches for criteria that need data; None: 10, or all there are.
        batch_size: images in a batch, of both kinds.
        held_out: held-out batches to evaluate, at most.
        seed: of the calibration batches.
        ignore, whole_heads, only: which channels may go at all (see `find_groups`).
        source: how `load_model` builds the unpruned network, for models that are saved (see `save_pruned`).
        look: "light" or "dark"; None: as the page is.

    Attributes:
        plan: the present plan; `prune(model, studio.plan)` and `EquivalentModel(model, studio.plan)` take it on.
        state: all choices, with those to undo and redo (see `studio.StudioState`).
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
        data: Any,
        *,
        task: str | Task = CLASSIFICATION,
        batches: int | None = None,
        batch_size: int = 64,
        held_out: int = 4,
        seed: int = 0,
        ignore: Iterable[str] = (),
        whole_heads: bool = False,
        only: str | None = None,
        source: str | dict | None = None,
        look: str | None = None,
    ):
        check_module(model)
        data, task = as_data(data), find_task(task)
        selection = Selection(ignore, whole_heads, only)
        setup = Setup.of(model, data, task, batches, batch_size, seed=seed, selection=selection)
        self.session = StudioSession(model, data, setup, held_out, task)
        self.state, self.plan = StudioState(), self.session.whole
        self._planned = self.state.choices
        self._source, self._look, self._moved = source, look or LIGHT, 0.0
        self._before: PruningPlan | None = None
        self._scoring: Scoring | None = None
        self._controls = c = StudioControls(self.session, self.state.choices)
        c.code.value = self.code
        super().__init__(self._drawn(), look)
        self.copied_from(model)
        self._connect()
        above, below = self._buttons()
        self.graph = LiveFigure(go.Figure(), self._clicked_layer, look=look)
        self.frontier = LiveFigure(go.Figure(), look=look)
        self.sensitivity = LiveFigure(go.Figure(), lambda click: self._choose(click.y), look=look)
        self.folds = W.Accordion([c.changes, self.graph, *self._measured_folds()], titles=FOLDS)
        self.folds.observe(lambda _: self._try(self._show_fold), "selected_index")
        self.children = (above, c.header, self.beside(c.column), c.table, self.folds, below, c.code)
        self._show()

    @property
    def code(self) -> str:
        """The Python that makes the present plan."""
        reached = self.plan.reached
        return studio.to_code(self._planned, self.session.setup, nearest=reached is not None and not reached.met)

    def __repr__(self) -> str:
        return f"PruningStudio({self.plan!r})"

    def choose(self, choices: Choices, *, merge: bool = False) -> None:
        """Make other choices, as the controls do; see `studio.change` for ``merge``."""
        with self._worker.lock:
            self.state = studio.change(self.state, choices, merge=merge)
            self._show()

    def toggle(self, root: LayerAxis, channel: int) -> None:
        """Keep or remove one channel by hand, as a click in the score bar does."""
        self._try(lambda: self.choose(studio.toggle_channel(self.state.choices, self.plan, LayerAxis(*root), channel)))

    def measure(self) -> None:
        """Measure latency and the task's metrics of the plans that are shown and of the original, beside the kernel.

        With "compensate" pressed, also the headline of what `compensate` makes of each, on the calibration batches.

        Raises:
            ValueError: while scores are computed, which a measurement would hold up.
        """
        shown = (self.session.whole, self._compared(), self._before, self.plan)
        plans = list(dict.fromkeys(plan for plan in shown if plan is not None))
        work = partial(self.session.measure, plans, compensated=self._controls.compensate.value)
        self._measure(work, counted(len(plans), "plan"))

    def measure_frontier(self) -> None:
        """Evaluate plans at several speed-ups by the present choices, beside the kernel; raises as `measure` does."""
        self._measure(partial(self.session.frontier, self.state.choices, self._controls.reach), "the frontier")

    def measure_sensitivity(self) -> None:
        """Evaluate each group pruned alone, beside the kernel; raises as `measure` does."""
        self._measure(partial(self.session.sense, self.state.choices), "each group alone")

    def _measure(self, work: Callable[[Watch], None], what: str) -> None:
        self._refuse_while_scoring()

        def then(_: None) -> None:
            self._show_outcome()
            self.say(f"measured {what}")

        self._worker.start(lambda task: work(task.watch), then)

    def export_plan(self, path: str | Path) -> Path:
        """Write the plan as JSON, which `PruningPlan.from_json` reads."""
        write_text(Path(path), self.plan.to_json())
        return Path(path)

    def export_model(self, folder: str | Path) -> Path:
        """Save the pruned network, compensated if that is pressed, for `load_pruned`; a folder in use is refused."""
        network = self.session.network(self.plan, self._controls.compensate.value)
        save_pruned(folder, network, self.plan, source=self._source)
        return Path(folder)

    def _connect(self) -> None:
        c = self._controls
        self.on_change([c.criterion, c.rows, c.reduction, c.normalizer, c.scope, c.round_to], self._changed)
        self.on_change(c.targets.values(), partial(self._changed, dragged=True))
        self.on_change([c.kind], self._change_kind)
        self.on_change([c.group], self._show_group)
        self.on_change([c.limit], self._set_limit)
        self.on_change([c.locked], self._set_lock)
        self.on_change([c.compared], self._show_outcome)
        self.on_change([c.bars], lambda: self.picture.show(self._drawn()))
        self.on_change([c.path], self._look_there)
        self._look_there()

    def _buttons(self) -> tuple[W.HBox, W.HBox]:
        """Return the line of what is done with plans, and the line of what takes one away."""
        c = self._controls
        self.undo_button = self.button("undo", lambda: self._step(studio.undo), icon="undo")
        self.redo_button = self.button("redo", lambda: self._step(studio.redo), icon="repeat")
        self.measure_button = self.button("measure", self.measure, "latency and metrics", "tachometer")
        self.cancel_button = self.button("cancel", self._cancel, "what is being computed", "times")
        self.remember_button = self.button("remember", self._remember, "to compare other plans with this one")
        above = [self.undo_button, self.redo_button, self.measure_button, c.compensate, self.cancel_button]
        above += [c.name, self.remember_button, c.compared]
        self.plan_button = self.button("plan (JSON)", lambda: self._export(self.export_plan, ".json"), icon="download")
        self.model_button = self.button("pruned model", lambda: self._export(self.export_model, ""), icon="download")
        self.code_button = self.button("Python", lambda: self._export(self._write_code, ".py"), icon="download")
        below = [c.path, self.plan_button, self.model_button, self.code_button, c.there]
        return W.HBox(above, layout=WRAPPING), W.HBox(below, layout=WRAPPING)

    def _measured_folds(self) -> list[W.VBox]:
        """Return the folds whose figures are measured when that is asked for."""
        on = "on the held-out examples"
        self.frontier_button = self.button("measure other targets", self.measure_frontier, on, "line-chart")
        self.sensitivity_button = self.button("measure each group alone", self.measure_sensitivity, on, "th")
        folds = (self.frontier_button, self.frontier), (self.sensitivity_button, self.sensitivity)
        return [W.VBox([W.HBox([measure]), figure]) for measure, figure in folds]

    def _change_kind(self) -> None:
        c = self._controls
        near = target_near(c.kind.value, self.plan, self.session.costs, c.reach)
        with self._filling():
            c.show_target(near)
        self._changed(replace(self.state.choices, target=near))

    def _changed(self, choices: Choices | None = None, *, dragged: bool = False) -> None:
        choices = self._controls.read(choices or self.state.choices)
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

    def _set_limit(self) -> None:
        choices = self._controls.read_limit(self.state.choices)
        if choices != self.state.choices:
            self.choose(choices)

    def _set_lock(self) -> None:
        root, choices, locked = self._controls.group.value, self.state.choices, self._controls.locked.value
        self.choose(studio.lock(choices, self.plan, root) if locked else studio.unlock(choices, root))

    def _remember(self) -> None:
        c = self._controls
        self.state = studio.remember(self.state, c.name.value)
        names = [name for name, _ in self.state.remembered]
        with self._filling():
            set_options(c.compared, [NONE, *names], c.name.value)
            c.name.value = f"plan {len(names) + 1}"
        self._show_outcome()

    def clicked(self, click: Click) -> None:
        """Keep or remove the channel whose score was clicked, or show the group whose bar was."""
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
                scored = studio.undo(scored)
            if self.session.scores(scored.choices.scoring) is not None:
                self._step(lambda _: scored)
        self.say("cancelled")

    def _export(self, write: Callable[[Path], Path], ending: str) -> None:
        self.say(f"wrote '{write(typed(self._controls.path, ending, folder=not ending))}'")
        self._look_there()

    def _look_there(self) -> None:
        """Say what writing would replace, and what it would refuse to."""
        said = []
        for ending in (".json", ".py", ""):
            try:
                path = typed(self._controls.path, ending, folder=not ending)
                said += [f"'{path}' will be replaced"] if ending and path.exists() else []
            except ValueError as error:
                said.append(str(error))
        self._controls.there.value = close(note("; ".join(dict.fromkeys(said))))

    def _write_code(self, path: Path) -> Path:
        self._refuse_while_scoring()
        write_text(path, self.code)
        return path

    def _failed(self, error: Exception) -> None:
        if not self._worker.busy:
            self._scoring = None
        super()._failed(error)

    def _show(self) -> None:
        """Show the present choices: at once where their scores are there, else when they have been computed."""
        choices = self.state.choices
        with self._filling():
            self._controls.show(self.state.choices)
        self.undo_button.disabled, self.redo_button.disabled = not self.state.past, not self.state.future
        if self.session.scores(choices.scoring) is not None:
            self._worker.cancel()
            self._scoring = None
            self._make_plan()
            return
        if self._scoring == choices.scoring:
            return
        self.say(f"scoring by {choices.scoring.criterion}")
        self._scoring = choices.scoring
        score = partial(self.session.score, choices.scoring)
        self._worker.start(lambda task: score(partial(task.watch, what="scoring")), lambda _: self._make_plan())

    def _make_plan(self) -> None:
        self._scoring = None
        start = time.perf_counter()
        try:
            plan = self.session.plan(self.state.choices)
        except ValueError as error:
            self._failed(error)
            return
        self.say(f"made the plan in {1e3 * (time.perf_counter() - start):.0f} ms")
        self._before, self.plan = self._before if plan == self.plan else self.plan, plan
        self._planned = self.state.choices
        removed = f"{plan.channels_removed:,} of {counted(plan.channels, 'channel')} removed"
        self._controls.header.value = close(note(f"{removed}; {plan.reached}", bad=not plan.reached.met))
        self._controls.code.value = self.code
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
        frame, since = self._changes()
        self.folds.titles = (f"Changed since {since}: {counted(len(frame), 'group')}", *FOLDS[1:])
        # Last, since a page that draws takes nothing else meanwhile.
        traces = studio_traces(self._bars(compared), self.plan.kept_of(root), score)
        for old, new in zip(figure.data, traces, strict=True):
            old.update(new)
        self.picture.show(figure.update_layout(studio_axes(str(LayerAxis(*root)), score)))
        self._show_fold()

    def _bars(self, compared: PruningPlan | None) -> Bars:
        c = self._controls
        return studio_bars(self.plan, c.group.value, bars=c.bars.value, costs=self.session.costs, compared=compared)

    def _drawn(self) -> go.Figure:
        root = self._controls.group.value
        bars, kept = self._bars(self._compared()), self.plan.kept_of(root)
        return studio_figure(bars, kept, str(LayerAxis(*root)), self._score(root), look=self._look)

    def _changes(self) -> tuple[pd.DataFrame, str]:
        """Return what the plan changes, and since which plan: the one to compare with, or the one before."""
        compared, before = self._compared(), self._before or self.plan
        if compared is not None:
            return studio.plan_changes(compared, self.plan), self._controls.compared.value
        return studio.plan_changes(before, self.plan), "the plan before"

    def _show_fold(self) -> None:
        """Draw what belongs into the fold that is open."""
        opened = None if self.folds.selected_index is None else FOLDS[self.folds.selected_index]
        if opened == CHANGED:
            frame, _ = self._changes()
            shown = frame.assign(removed=frame["removed"].map(listed), restored=frame["restored"].map(listed))
            self._controls.changes.value = table(shown) if len(shown) else ""
        elif opened == GRAPH:
            self.graph.show(coupling_graph(self.plan, self.session.costs.layers(self.plan), look=self._look))
        elif opened == FRONTIER:
            self.frontier.show(self._curve())
        elif opened == SENSITIVITY:
            found = self.session.sensed(self.state.choices)
            self.sensitivity.show(go.Figure() if found is None else found.plot(look=self._look))

    def _curve(self) -> go.Figure:
        """Return the frontier as far as it was measured, and where the present plan stands."""
        session, task = self.session, self.session.task
        points, left = session.curve(self.state.choices, self.plan), session.costs.of(self.plan).macs
        if points.empty:
            return go.Figure()
        better = task.directions[task.headline]
        drawn = accuracy_over_macs(points, headline=task.headline, direction=better, look=self._look)
        return drawn.add_vline(100 * left / session.costs.original.macs, line_dash="dot", line_width=1)

    def _clicked_layer(self, click: Click) -> None:
        """Show the group of the layer whose box was clicked."""
        drawn = self.graph.figure.data
        if click.trace == len(drawn) - 1:
            _, root = drawn[-1].customdata[click.place[0]]
            self._choose(root)

    def _choose(self, drawn: object) -> None:
        """Show the group that a figure names so."""
        chosen = self._controls.group
        chosen.value = {escaped(name): root for name, root in chosen.options}.get(drawn, chosen.value)

    def _compared(self) -> PruningPlan | None:
        """Return the remembered plan to compare with, if its scores are there."""
        choices = dict(self.state.remembered).get(self._controls.compared.value)
        if choices is None or self.session.scores(choices.scoring) is None:
            return None
        return self.session.plan(choices)
