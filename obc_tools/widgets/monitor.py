"""Watch runs that go on in the background, stop and resume them: a view of `runs.watch`."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import ipywidgets as W
import plotly.graph_objects as go

from ..plots.curves import watch_figure
from ..plots.looks import LIGHT
from ..plots.stills import with_still
from ..runs.job import STOP
from ..runs.run import Run
from ..runs.watch import RunView, describe, headlines, look_at, watch_traces
from ..studio import as_program
from .controls import LiveFigure, button, close, code_area, dropdown, note

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 2.0
LOG = "height: 220px; overflow: auto; margin: 0; white-space: pre-wrap; word-break: normal"
LOG_LINES = 12
GONE = "gone"
LINES_HEIGHT = 44
"""Pixels of what is said of one run, two lines: what stands below does not move."""


class RunMonitor(W.VBox):
    """Watch one run or several over each other, live: curves, where they stand, their logs; stop and resume them.

    All that is shown is read from the runs' folders. A monitor may be closed, the kernel restarted and another one
    opened at any time, also for a run that ended long ago; the runs do not notice.

    Args:
        runs: a `Run`, a run's folder, or several of them by name.
        every: seconds between two looks; None looks only when `refresh` is called.
        look: "light" or "dark"; None: as the page is.

    Raises:
        ValueError: a folder that holds no run, an unknown look, no run.

    Example:
        >>> RunMonitor({"naive": "runs/a", "EP": "runs/b"})  # doctest: +SKIP
    """

    def __init__(
        self,
        runs: Run | str | os.PathLike[str] | Mapping[str, Run | str | os.PathLike[str]],
        *,
        every: float | None = SECONDS_BETWEEN_LOOKS,
        look: str | None = None,
    ):
        self._lock, self._closed = threading.RLock(), threading.Event()
        given = runs if isinstance(runs, Mapping) else {"run": runs}
        if not given:
            raise ValueError("no run to watch: give a run, its folder, or {'name': run}")
        self.runs = {name: run if isinstance(run, Run) else Run.open(run) for name, run in given.items()}
        self.views: dict[str, RunView] = {name: look_at(run) for name, run in self.runs.items()}
        self._look, self._troubled = look or LIGHT, False
        self.picture = LiveFigure(self._draw(), look=look)
        self.chosen = dropdown("run", self.runs, next(iter(self.runs)), "whose log is shown, and that is stopped")
        self.stop_button = button("stop", self.stop, "it keeps a checkpoint", "stop")
        self.resume_button = button("resume", self.resume, "from its checkpoint", "play")
        room = f"{LINES_HEIGHT * len(self.runs)}px"
        self.lines, self.tail, self.code = W.HTML(layout={"min_height": room}), W.HTML(), code_area()
        self.said = W.HTML()
        buttons = W.HBox([self.chosen, self.stop_button, self.resume_button, self.said])
        super().__init__([self.lines, self.picture, buttons, self.tail, self.code])
        self.chosen.observe(lambda _: self.show(), "value")
        self.show()
        if every is not None:
            threading.Thread(target=self._watch, args=(every,), daemon=True).start()

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        return with_still(super()._repr_mimebundle_(**kwargs), lambda: self.wait().figure)

    def wait(self, timeout: float | None = None) -> Self:
        """Wait until all runs have ended, each for so many seconds, and show them; return the monitor."""
        for run in self.runs.values():
            run.wait(timeout)
        self.refresh()
        return self

    @property
    def figure(self) -> go.Figure:
        """The figure that is shown."""
        return self.picture.figure

    @property
    def run(self) -> Run:
        """The run that is chosen."""
        return self.runs[self.chosen.value]

    def __repr__(self) -> str:
        return f"RunMonitor({', '.join(f'{name}: {view.status}' for name, view in self.views.items())})"

    def stop(self) -> None:
        """Ask the chosen run to end with a checkpoint; does not wait until it has."""
        if self.run.folder.is_dir() and self.run.status == "running":
            (self.run.folder / STOP).touch()
            self.said.value = note("it will stop at its next step and keep a checkpoint")
        self.refresh()

    def resume(self) -> None:
        """Launch the chosen run again, from its last checkpoint; what keeps it from that is shown."""
        try:
            self.run.resume()
            self.said.value = note("resumed")
        except ValueError as error:
            self.said.value = note(str(error), bad=True)
        self.refresh()

    def refresh(self) -> None:
        """Look at the runs' folders and show what has changed."""
        with self._lock:
            before = self.views
            there = {name: run for name, run in self.runs.items() if run.folder.is_dir()}
            self.views = before | {name: look_at(run, before[name]) for name, run in there.items()}
            troubled = len(there) < len(self.runs)
            if self._troubled and not troubled:
                self.said.value = ""
            self._troubled = troubled
            if self.views != before:
                self.picture.show(self._draw())
            self.show()

    def close(self) -> None:
        """Stop looking; the runs go on."""
        self._closed.set()
        super().close()

    def show(self) -> None:
        """Show the last look."""
        with self._lock:
            self.lines.value = close(*(f"<b>{note(n)}</b> {self._described(n)}" for n in self.runs))
            status = self.views[self.chosen.value].status if self.run.folder.is_dir() else GONE
            self.stop_button.disabled = status != "running"
            self.resume_button.disabled = status in ("running", "finished", GONE)
            tail = note(self.run.log(LOG_LINES) if status != GONE else "")
            self.tail.value = f"<pre style='{LOG}'>{tail}</pre>"
            act = "run.stop()" if status == "running" else "run.results" if status == "finished" else "run.resume()"
            here, folder = Path.cwd(), self.run.folder
            shown = str(folder.relative_to(here) if folder.is_relative_to(here) else folder)
            self.code.value = as_program(f"run = obc.Run.open({shown!r})\nrun.log({LOG_LINES})\n{act}")

    def _described(self, name: str) -> str:
        folder = self.runs[name].folder
        if folder.is_dir():
            return note(describe(self.views[name]))
        return note(f"its folder '{folder}' is {GONE}: shown is the last that was seen of it", bad=True)

    def _draw(self) -> go.Figure:
        failed = [f"{name} failed: {view.error}" for name, view in self.views.items() if view.error]
        return watch_figure(watch_traces(self.views), headlines(self.views), failed=failed, look=self._look)

    def _watch(self, every: float) -> None:
        while not self._closed.wait(every):
            try:
                self.refresh()
            # A line that is being written, a folder that is gone: the next look tells, whatever it was.
            except Exception as error:
                logger.debug("a look failed", exc_info=True)
                self.said.value, self._troubled = note(str(error), bad=True), True
