"""What there is to see of a run while it goes on: its curves, bounded however long it takes, and where it stands."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..plots.curves import QUANTITIES
from ..plots.looks import color_of
from .job import MERGED, TITLES
from .run import Run

POINTS = 400
"""Points of a live curve at most; when they are reached, every second one goes."""

FIGURES = {
    "loss": "loss {:.4f}",
    "accuracy": "accuracy {:.2%}",
    "lr": "learning rate {:.3g}",
    "images_per_second": "{:,.0f} examples/s",
}


class Point(NamedTuple):
    """One look at a training: how many epochs are done, and the figures of the epoch under way."""

    epoch: float
    loss: float | None
    accuracy: float | None
    lr: float
    images_per_second: float | None


@dataclass(frozen=True)
class LiveCurve:
    """Points of a training in order, spread evenly over it and never more than `POINTS`.

    ``stride``: of so many points that are offered one is kept; ``offered`` counts them.
    """

    points: tuple[Point, ...] = ()
    stride: int = 1
    offered: int = 0

    def add(self, point: Point) -> LiveCurve:
        """Return the curve with one point more; one that was seen before, or that is due to be left out, changes none.

        A training that was resumed at an earlier step goes back: the points behind it are dropped.
        """
        if self.points and point.epoch == self.points[-1].epoch:
            return self
        earlier = tuple(known for known in self.points if known.epoch < point.epoch)
        offered = self.offered + 1
        if self.offered % self.stride:
            return LiveCurve(earlier, self.stride, offered)
        points = (*earlier, point)
        if len(points) > POINTS:
            return LiveCurve(points[::2], 2 * self.stride, offered)
        return LiveCurve(points, self.stride, offered)


@dataclass(frozen=True)
class RunView:
    """A run as it was at one look.

    Attributes:
        status: as `Run.status`.
        epochs: rows of each training's finished epochs, by the models of `TITLES`.
        live: the curve within the epochs of each training, as far as somebody looked.
        place: the training under way and where it is, or None.
        error: what a failed run failed of.
    """

    status: str
    epochs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    live: Mapping[str, LiveCurve] = field(default_factory=dict)
    place: tuple[str, Mapping[str, Any]] | None = None
    error: str | None = None


def look_at(run: Run, before: RunView | None = None) -> RunView:
    """Read a run's folder; the live curves go on from those of a look before."""
    live = dict(before.live) if before else {}
    place, status = run.progress(), run.status
    if place is not None:
        key, now = place
        done = now["epoch"] - 1 + now["step"] / now["steps"]
        figures = (now.get(name) for name in ("loss", "accuracy", "lr", "images_per_second"))
        live[key] = live.get(key, LiveCurve()).add(Point(done, *figures))
    epochs = {key: history.epochs for key, history in run.histories.items()}
    return RunView(status, epochs, live, place, run.error if status == "failed" else None)


def seconds_left(view: RunView) -> float | None:
    """Return about how long the training under way still takes, validation left out; None where nothing tells."""
    if view.status != "running" or view.place is None:
        return None
    key, now = view.place
    left = now["epochs"] - (now["epoch"] - 1 + now["step"] / now["steps"])
    if finished := view.epochs.get(key):
        return left * finished[-1].seconds
    return None


def describe(view: RunView, *, now: float | None = None) -> str:
    """Return where a run stands in one line."""
    if view.error:
        return f"failed: {view.error}"
    if view.place is None:
        return view.status
    key, place = view.place
    steps = f"epoch {place['epoch']} of {place['epochs']}, step {place['step']} of {place['steps']}"
    words = [f"{view.status}: {TITLES[key]}, {steps}"]
    words += [text.format(place[name]) for name, text in FIGURES.items() if place.get(name) is not None]
    if place.get("gpu_memory") is not None:
        words.append(f"at most {place['gpu_memory'] / 2**30:.2f} GiB on the GPU")
    if (left := seconds_left(view)) is not None:
        words.append(f"about {_duration(left)} left in this training")
    age = (time.time() if now is None else now) - place["time"]
    return "; ".join(words if age < 120 else [*words, f"last heard of {_duration(age)} ago"])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def headlines(views: Mapping[str, RunView]) -> dict[str, str]:
    """Return the headlines of runs, as far as there are epochs: metric -> "higher" or "lower", whichever is better."""
    return dict(epochs[-1].better for view in views.values() for epochs in view.epochs.values() if epochs)


def watch_traces(views: Mapping[str, RunView]) -> list[dict[str, Any]]:
    """Return the curves of runs, by their names: properties of a trace each.

    Validation over the epochs is solid with markers; what was seen within epochs, of the training images, is dotted.
    ``meta`` tells a trace from all others: the run's name, its training, the panel's number from 0, "epochs" or "live".
    """
    traces = []
    for index, (name, view) in enumerate(views.items()):
        for key in dict.fromkeys([*view.epochs, *view.live]):
            label = f"{name}: {TITLES[key]}" if len(views) > 1 else TITLES[key]
            color = color_of(name, index) if len(views) > 1 else color_of("ep" if key == MERGED else key)
            for panel, quantity in enumerate(QUANTITIES):
                finished = _finished(view.epochs.get(key, ()), quantity, color)
                live = _live(view.live.get(key, LiveCurve()), quantity, color)
                for kind, seen, trace in (("epochs", "validation", finished), ("live", "training", live)):
                    named = {"legendgroup": label, "name": f"{label}, {seen}", "meta": [name, key, panel, kind]}
                    traces.append(trace | named | {"showlegend": panel == 0 and bool(trace["x"])})
    return traces


def _finished(epochs: tuple[Any, ...], quantity: str, color: str) -> dict[str, Any]:
    values = [_measured(epoch, quantity) for epoch in epochs]
    line = {"color": color, "width": 2}
    # An epoch's figures are those of its end, but the learning rate is the one that it began with.
    begun = quantity == "lr"
    return {"x": [epoch.epoch - begun for epoch in epochs], "y": values, "mode": "lines+markers", "line": line}


def _measured(epoch: Any, quantity: str) -> float | None:
    if quantity == "accuracy" and epoch.values:
        return epoch.headline[1]
    field_of = {"loss": "val_loss", "accuracy": "val_accuracy"}.get(quantity, quantity)
    return _scaled(getattr(epoch, field_of), quantity)


def _live(curve: LiveCurve, quantity: str, color: str) -> dict[str, Any]:
    values = [_scaled(getattr(point, quantity), quantity) for point in curve.points]
    line = {"color": color, "width": 1.2, "dash": "dot"}
    return {"x": [point.epoch for point in curve.points], "y": values, "mode": "lines", "line": line}


def _scaled(value: float | None, quantity: str) -> float | None:
    return 100 * value if value is not None and quantity == "accuracy" else value
