"""The small parts that all views are built of, and work beside the kernel: in a thread, only the newest piece.

A cell's code and the callbacks of widgets run one after the other in the kernel, so work in either leaves every button
dead until it ends.
"""

from __future__ import annotations

import html
import json
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import anywidget
import ipywidgets as W
import pandas as pd
import plotly.graph_objects as go
import traitlets
from plotly.offline import get_plotlyjs
from torch import nn

from ..files import entries
from ..plots.looks import DARK, theme
from ..plots.stills import with_still

logger = logging.getLogger(__name__)

Control = TypeVar("Control", bound=W.Widget)
T = TypeVar("T")


class Text(W.Widget):
    """A text that a page knows."""

    text = traitlets.Unicode().tag(sync=True)


@cache
def library() -> Text:
    """Return the kernel's one copy of plotly.js, 5 MB, told to a page once."""
    return Text(text=get_plotlyjs())


@dataclass(frozen=True)
class Click:
    """Where in a figure somebody clicked: which trace, which of its points (row, column in a heatmap), its values."""

    trace: int
    place: tuple[int, ...]
    x: object
    y: object


class LiveFigure(anywidget.AnyWidget):
    """Shows one figure after another in the same place, whatever their panels, in every page that shows it.

    plotly's FigureWidget was tried: each brings plotly.js along and is dead where a page takes more than two seconds to
    load it, a page that is loaded again shows the figure as it was made, and axes of other panels stay.

    An anywidget that takes a busy page more than two seconds to make gets no message ever after. So the figure is told
    to the page by a widget of ipywidgets' own.

    Without a ``look`` a figure, drawn light, follows its page: ``dark`` is the template that it takes on a dark one.
    """

    _esm = Path(__file__).with_name("live.js")
    library = traitlets.Instance(W.Widget).tag(sync=True, **W.widget_serialization)
    drawing = traitlets.Instance(W.Widget).tag(sync=True, **W.widget_serialization)
    dark = traitlets.Unicode().tag(sync=True)

    def __init__(self, figure: go.Figure, clicked: Callable[[Click], None] | None = None, *, look: str | None = None):
        self.figure = figure
        dark = "" if look else json.dumps(theme(DARK).to_plotly_json())
        super().__init__(library=library(), drawing=Text(text=figure.to_json(validate=False)), dark=dark)
        if clicked is not None:
            self.on_msg(lambda _, told, buffers: clicked(Click(**told | {"place": tuple(told["place"])})))

    def show(self, figure: go.Figure) -> None:
        """Show another figure, or the same one after a change."""
        self.figure, self.drawing.text = figure, figure.to_json(validate=False)


NARROW = {"width": "330px"}
FITTING = {"width": "auto", "flex": "0 0 auto"}
WRAPPING = {"flex_flow": "row wrap"}
LABEL = {"description_width": "104px"}
COLUMN = {"width": "350px", "flex": "0 0 auto"}
"""Of controls, beside a figure that takes the rest, and goes below them where that is little."""
REST = {"flex": "1 1 440px", "min_width": "0"}
SCROLLING = {"overflow": "auto"}
"""Of tables: a narrow page scrolls them alone."""
TWO_LINES = {"height": "44px", "flex": "1 1 auto", "min_width": "0", "overflow": "auto"}
"""Of words that come and go: what stands below does not move."""
SHOWN = 6
"""Channels that a table names at most in one cell."""

STYLE = (
    "<style>.obc-table td, .obc-table th {padding: 1px 10px; line-height: 1.5; text-align: right; white-space: nowrap}"
    ".obc-table th {white-space: normal; vertical-align: bottom; min-width: 44px; max-width: 160px}"
    ".obc-table tr > :first-child {padding-left: 0; text-align: left}</style>"
)


def labelled(kind: type[Control], label: str, tooltip: str = "", *, width: str | None = None, **traits: Any) -> Control:
    """Return a control with a label: in a column, the label as wide as all others', or as wide as is said."""
    layout, style = (NARROW, LABEL) if width is None else ({"width": width}, {"description_width": "initial"})
    return kind(description=label, tooltip=tooltip, layout=layout, style=style, **traits)


def dropdown(
    label: str, options: Iterable[Any], value: Any, tooltip: str = "", *, width: str | None = None
) -> W.Dropdown:
    """Return a choice of one among several; options are values, or (label, value) pairs."""
    return labelled(W.Dropdown, label, tooltip, width=width, options=list(options), value=value)


def slider(
    label: str, low: float, high: float, step: float, value: float | None = None, tooltip: str = ""
) -> W.FloatSlider:
    """Return a slider over numbers that reacts while it is dragged; it stands at its lower end if nothing is said."""
    value = low if value is None else value
    return labelled(W.FloatSlider, label, tooltip, value=value, min=low, max=high, step=step)


def factor_slider(label: str, low: float, high: float) -> W.FloatLogSlider:
    """Return a slider over factors, of which equal ways are equal ratios; 200 steps; it stands at its lower end."""
    ends = math.log10(low), math.log10(high)
    step = (ends[1] - ends[0]) / 200
    return labelled(W.FloatLogSlider, label, value=low, min=ends[0], max=ends[1], step=step, readout_format=".2f")


def stands_at(slider: W.FloatSlider | W.FloatLogSlider, value: float) -> bool:
    """Say whether a slider shows a number as well as it can.

    It ends somewhere, and a page rounds what it is told to the slider's steps and tells that back.
    """
    at, asked = (slider.value, value) if isinstance(slider, W.FloatSlider) else map(math.log10, (slider.value, value))
    return abs(at - min(max(asked, slider.min), slider.max)) < 0.501 * slider.step


def set_slider(slider: W.FloatSlider | W.FloatLogSlider, value: float) -> None:
    """Set a slider, but not to what it shows already: told back, that tears it from the mouse."""
    if not stands_at(slider, value):
        slider.value = value


def integer(label: str, value: int, low: int, high: int, tooltip: str = "") -> W.BoundedIntText:
    """Return a field for a whole number."""
    return labelled(W.BoundedIntText, label, tooltip, value=value, min=low, max=high)


def text(label: str, value: str, tooltip: str = "", *, width: str | None = None) -> W.Text:
    """Return a field for a line of text."""
    return labelled(W.Text, label, tooltip, width=width, value=value)


def button(label: str, act: Callable[[], object], tooltip: str = "", icon: str = "") -> W.Button:
    """Return a button that does something."""
    made = W.Button(description=label, tooltip=tooltip, icon=icon, layout=FITTING)
    made.on_click(lambda _: act())
    return made


LONGEST = 200
"""Bytes of a file's name: systems take 255, and what is being written has a longer name for a while."""


def typed(field: W.Text, ending: str = "", *, folder: bool = False) -> Path:
    """Return the path that a field says, "~" for the user's home; raise ValueError, with the way out, if it is none.

    That is where a file is in the way of a folder, a folder of a file, a folder is in use, or no system takes the name.
    """
    said, other = field.value.strip(), f"type another name under '{field.description}'"
    if not said.strip("/.") or said.endswith("/"):
        raise ValueError(f"'{said}' names no file: {other}")
    try:
        path = Path(said.removesuffix(ending) + ending).expanduser()
    except RuntimeError as error:
        raise ValueError(f"'{said}': there is no such home: {other}") from error
    if "\0" in said or max(map(len, map(os.fsencode, path.parts))) > LONGEST:
        raise ValueError(f"{said[:30]!r} is no name: it is too long, or a NUL is in it: {other}")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ValueError(f"'{above}' is a file, nothing is written below it: {other}")
    if path.exists() and path.is_dir() != folder:
        wrong = "a file: no model is written over it" if folder else "a folder: no file is written over it"
        raise ValueError(f"'{path}' is {wrong}; {other}")
    if folder and entries(path):
        raise ValueError(f"'{path}' is in use: no model is written into it; {other}")
    return path


def code_area() -> W.Textarea:
    """Return the field in which a view shows the call that it makes; its text is selected and copied there.

    It grows with the call and does not shrink, so that nothing jumps where calls are of different lengths.
    """
    made = W.Textarea(description="Python", disabled=True, layout={"width": "98%"}, style={"description_width": "60px"})
    made.observe(lambda change: setattr(made, "rows", max(made.rows or 0, change["new"].count("\n") + 1)), "value")
    return made


def note(words: str, *, bad: bool = False) -> str:
    """Return words as HTML, in the colour of a warning where something is wrong."""
    color = "#B45309" if bad else "inherit"
    return f"<span style='color:{color}'>{html.escape(words)}</span>"


def close(*notes: str) -> str:
    """Return notes as lines that stand close together."""
    return f"<div style='line-height:1.5'>{'<br>'.join(notes)}</div>"


def table(frame: pd.DataFrame) -> str:
    """Return a table as HTML, its text escaped: close rows, columns apart, all but the first to the right."""
    inner = frame.to_html(index=False, border=0, na_rep="", justify="right", classes="obc-table")
    return f"{STYLE}<div style='overflow-x: auto'>{inner}</div>"


def listed(channels: Sequence[int]) -> str:
    """Return channels as text that fits into a table."""
    first = ", ".join(map(str, channels[:SHOWN]))
    return first if len(channels) <= SHOWN else f"{first} and {len(channels) - SHOWN} more"


CHANGED_SINCE = "the model has changed since: shown is what it was; make another view to see it as it is"


def versions(model: nn.Module) -> tuple[tuple, ...]:
    """Return what changes with every change of a model's parameters in place, and with others in their stead.

    Not of buffers: scoring borrows a batch norm's statistics and gives them back, another version of the same numbers.
    What is written through ``.data`` has no version, and is not seen.
    """
    return tuple((name, p._version, p.data_ptr(), p.dtype, p.shape) for name, p in model.named_parameters())


class View(W.VBox):
    """A figure, the line that says what is going on, and controls that change what is shown. To be built upon.

    Attributes:
        picture: what shows the figure. progress, status: how far the work under way is, and what it is.
    """

    def __init__(self, figure: go.Figure, look: str | None = None):
        super().__init__()
        self.picture = LiveFigure(figure, self.clicked, look=look)
        self.progress = W.FloatProgress(value=0.0, min=0.0, max=1.0, layout={"width": "160px", "flex": "0 0 auto"})
        self.status = W.HTML(layout=TWO_LINES)
        self._worker = Worker(self._report, self._failed)
        self._filled = False
        self._model, self._versions = None, ()

    @property
    def figure(self) -> go.Figure:
        """The figure that is shown."""
        return self.picture.figure

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        return with_still(super()._repr_mimebundle_(**kwargs), lambda: self.wait().figure)

    def wait(self, timeout: float = 600.0) -> Self:
        """Wait until nothing is computed any more, as a script does that goes on with the outcome; return the view."""
        self._worker.wait(timeout)
        return self

    def say(self, words: str, *, bad: bool = False) -> None:
        """Show a line of words; nothing is under way."""
        self.progress.value = 0
        self.tell(words, bad=bad)

    def tell(self, words: str, *, bad: bool = False) -> None:
        """Show a line of words beside what is under way, and that the model changed since it was copied, if it has."""
        model = None if self._model is None else self._model()
        changed = model is not None and versions(model) != self._versions
        self.status.value = close(note(words, bad=bad), *([note(CHANGED_SINCE, bad=True)] if changed else []))

    def copied_from(self, model: nn.Module) -> None:
        """Note which model the view's copy was made of, to tell when that one changes."""
        self._model, self._versions = weakref.ref(model), versions(model)

    def clicked(self, click: Click) -> None:
        """Take a click in the figure; nothing happens unless a view says what."""

    def beside(self, controls: Sequence[W.Widget]) -> W.HBox:
        """Return controls in a column, and beside it the figure above the line that says what is going on."""
        right = W.VBox([self.picture, W.HBox([self.progress, self.status])], layout=REST)
        return W.HBox([W.VBox(controls, layout=COLUMN), right], layout=WRAPPING)

    def button(self, label: str, act: Callable[[], object], tooltip: str = "", icon: str = "") -> W.Button:
        """Return a button that does something, and shows what is wrong with it where that is its own fault."""
        return button(label, lambda: self._try(act), tooltip, icon)

    def on_change(self, controls: Iterable[W.Widget], act: Callable[[], object]) -> None:
        """Do something when somebody sets one of the controls, and not while an outcome is handed over."""

        def by_hand(_: dict) -> None:
            with self._worker.lock:
                if not self._filled:
                    self._try(act)

        for control in controls:
            control.observe(by_hand, "value")

    @contextmanager
    def _filling(self) -> Iterator[None]:
        """Set controls without their changes being taken for somebody's choice."""
        before, self._filled = self._filled, True
        try:
            yield
        finally:
            self._filled = before

    def _try(self, act: Callable[[], object]) -> None:
        with self._worker.lock:
            try:
                act()
            except (ValueError, OSError) as error:
                self._failed(error)

    def _report(self, what: str, share: float) -> None:
        self.progress.value = share
        self.tell(f"{what}, {share:.0%}")

    def _failed(self, error: Exception) -> None:
        self.say(f"{type(error).__name__}: {error}", bad=True)


def set_options(choice: W.Dropdown, options: Sequence[Any], value: Any) -> None:
    """Give a choice other options, of which one is chosen."""
    with choice.hold_sync():
        choice.options = tuple(options)
        choice.value = value


class Cancelled(Exception):
    """Work that is not wanted any more."""


class Task:
    """One piece of work: it is told when to stop, and tells how far it is."""

    def __init__(self, report: Callable[[str, float], None]):
        self._report = report
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Let the work end where it next looks."""
        self._cancelled.set()

    def check(self) -> None:
        """Raise Cancelled if the work is not wanted any more."""
        if self._cancelled.is_set():
            raise Cancelled

    def at(self, what: str, share: float) -> None:
        """Tell what is being done and how much of it is done, a share in [0, 1]; raise as `check` does."""
        self.check()
        self._report(what, share)

    def watch(self, items: Collection[T], what: str) -> Watched[T]:
        """Return the items, telling before each how far it is, and stopping there when that is asked for."""
        return Watched(self, items, what)


class Watched(Generic[T]):
    """Items whose iteration is watched by a task; may be gone through again and again."""

    def __init__(self, task: Task, items: Collection[T], what: str):
        self._task, self._items, self._what = task, items, what

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[T]:
        for number, item in enumerate(self._items):
            self._task.at(self._what, number / len(self._items))
            yield item
        self._task.check()


class Worker:
    """Does the newest piece of work in a thread; one that is under way is cancelled, and has ended before it begins.

    Attributes:
        lock: held while outcomes are handed over. What changes the same state elsewhere holds it too.
    """

    def __init__(self, report: Callable[[str, float], None], failed: Callable[[Exception], None]):
        self.lock = threading.RLock()
        self._report, self._failed = report, failed
        self._turn = threading.Lock()
        self._task: Task | None = None

    @property
    def busy(self) -> bool:
        """Say whether work is under way."""
        with self.lock:
            return self._task is not None

    def start(self, work: Callable[[Task], T], then: Callable[[T], None]) -> Task:
        """Begin a piece of work; ``then`` takes its outcome, in the thread, unless the work was cancelled meanwhile."""
        with self.lock:
            self.cancel()
            task = self._task = Task(lambda what, share: self._tell(task, what, share))
        threading.Thread(target=self._run, args=(task, work, then), daemon=True).start()
        return task

    def cancel(self) -> None:
        """Cancel the work under way; its outcome is dropped."""
        with self.lock:
            if self._task is not None:
                self._task.cancel()
                self._task = None

    def wait(self, timeout: float = 60.0) -> None:
        """Wait until no work is under way; raise TimeoutError if some still is after so many seconds."""
        end = time.monotonic() + timeout
        while self.busy:
            if time.monotonic() > end:
                raise TimeoutError(f"work is still under way after {timeout:g} s")
            time.sleep(0.005)

    def _tell(self, task: Task, what: str, share: float) -> None:
        with self.lock:
            task.check()
            self._report(what, share)

    def _run(self, task: Task, work: Callable[[Task], T], then: Callable[[T], None]) -> None:
        with self._turn:
            try:
                task.check()
                outcome = work(task)
            except Cancelled:
                logger.debug("work was cancelled")
            # Whatever it is, it is shown where the work was asked for; nobody looks at a thread's traceback.
            except Exception as error:
                logger.debug("work failed", exc_info=True)
                self._finish(task, lambda error=error: self._failed(error))
            else:
                self._finish(task, lambda: then(outcome))

    def _finish(self, task: Task, hand_over: Callable[[], None]) -> None:
        with self.lock:
            if task is not self._task:
                return
            self._task = None
            try:
                hand_over()
            except Exception as error:
                logger.debug("an outcome could not be shown", exc_info=True)
                self._failed(error)
