"""Curves: of compared criteria with mean and standard deviation, of trainings that ended, of runs that go on.

A criterion has the same colour in all figures (see `looks`); variants of one criterion differ in their dashes.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .looks import COLORS, color_of, finished

AXES = {"channels": "pruned channels (%)", "macs": "MACs left (%)", "params": "parameters left (%)"}
TIMED = {"latency": "measured latency left (%)"}
TITLES = {
    "accuracy": "held-out accuracy (%)",
    "top5": "held-out top-5 accuracy (%)",
    "loss": "held-out loss (nats)",
    "train_accuracy": "training accuracy (%)",
    "train_top5": "training top-5 accuracy (%)",
    "train_loss": "training loss (nats)",
}
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
MOST_PANELS = 4
PANELS = ("train_accuracy", "accuracy", "train_loss", "loss")


def criteria_curves(
    comparison: Any, metric: str = "accuracy", over: str = "params", *, look: str = "light"
) -> go.Figure:
    """Draw a metric against what was pruned: a line a criterion, the mean of its repeats, its band their std.

    Args:
        metric: a column of the comparison's frame that was measured.
        over: "channels" (pruned), "macs" or "params" (left; to the right is less), or "latency" where it was timed.

    Raises:
        ComparisonError: an unknown axis, a metric that was not measured.
    """
    figure = go.Figure()
    _draw(figure, comparison, metric, over)
    _label(figure, _title(comparison, metric), over)
    title = f"{_title(comparison, metric).partition(' (')[0].capitalize()} after pruning"
    return finished(figure, look, 480, title=title, legend={"y": -0.16, "yanchor": "top"})


def criteria_panels(
    comparison: Any, metrics: Sequence[str] | None = None, axes: Sequence[str] = tuple(AXES), *, look: str = "light"
) -> go.Figure:
    """Draw the paper's panels (Fig. 5–7): a row a metric, of those that were measured, and a column an axis."""
    usual = PANELS if "accuracy" in comparison.directions else (comparison.headline, *comparison.directions)
    shown = [metric for metric in dict.fromkeys(metrics or usual) if metric in comparison.measured()][:MOST_PANELS]
    figure = make_subplots(len(shown), len(axes), shared_yaxes=True, horizontal_spacing=0.03, vertical_spacing=0.09)
    for row, metric in enumerate(shown, 1):
        for column, over in enumerate(axes, 1):
            place = {"row": row, "col": column}
            _draw(figure, comparison, metric, over, legend=row == column == 1, **place)
            _label(figure, _title(comparison, metric) if column == 1 else None, over, **place)
    legend = {"y": -0.25 / max(len(shown), 1), "yanchor": "top"}
    return finished(figure, look, 130 + 260 * len(shown), title="Pruned without fine-tuning", legend=legend)


def scoring_seconds(comparison: Any, *, look: str = "light") -> go.Figure:
    """Draw how long scoring took in a step: a bar a criterion, the median over steps and repeats, with quartiles."""
    scored = comparison.frame[comparison.frame["step"] > 0]
    seconds = scored.groupby("criterion", sort=False)["seconds"].quantile([0.25, 0.5, 0.75]).unstack()
    seconds = seconds.sort_values(0.5, ascending=False)
    bar = go.Bar(
        x=seconds[0.5],
        y=seconds.index,
        orientation="h",
        marker_color=[color_of(label) for label in seconds.index],
        error_x={"array": seconds[0.75] - seconds[0.5], "arrayminus": seconds[0.5] - seconds[0.25], "thickness": 1},
        hovertemplate="%{y}<br>%{x:.3g} s<extra></extra>",
    )
    x = {"type": "log", "title": "seconds a step, median and quartiles (log scale)"}
    return finished(go.Figure(bar), look, 130 + 28 * len(seconds), x=x, title="Scoring, seconds a step")


def _draw(figure: go.Figure, comparison: Any, metric: str, over: str, *, legend: bool = True, **place: int) -> None:
    """Add a line a criterion, with a band where it was repeated."""
    values = comparison.values_of(metric)
    left = 100 * comparison.left(over)
    frame = comparison.frame.assign(x=100 - left if over == "channels" else left)
    frame["y"] = values * (100 if "%" in _title(comparison, metric) else 1)
    used: Counter[str] = Counter()
    for label in comparison.criteria:
        mine = frame[frame["criterion"] == label]
        steps = mine.groupby("step").agg(x=("x", "mean"), y=("y", "mean"), std=("y", "std"), n=("y", "size"))
        # A step that some repeats did not reach would bend the mean.
        steps = steps[steps["n"] == mine["repeat"].nunique()].round(4)
        color = color_of(label)
        line = {"color": color, "width": 2, "dash": DASHES[used[color] % len(DASHES)]}
        used[color] += 1
        if steps["std"].notna().any():
            figure.add_trace(_band(steps, label, color), **place)
        figure.add_scatter(
            x=steps["x"],
            y=steps["y"],
            name=label,
            legendgroup=label,
            showlegend=legend,
            mode="lines+markers",
            line=line,
            marker={"size": 4},
            customdata=steps["std"].fillna(0),
            hovertemplate=f"{label}<br>%{{x:.1f}} %<br>%{{y:.4g}} ± %{{customdata:.2g}}<extra></extra>",
            **place,
        )


def _band(steps: pd.DataFrame, label: str, color: str) -> go.Scatter:
    """Return the area between mean - std and mean + std."""
    std = steps["std"].fillna(0)
    return go.Scatter(
        x=[*steps["x"], *steps["x"][::-1]],
        y=[*(steps["y"] + std), *(steps["y"] - std)[::-1]],
        fill="toself",
        fillcolor=color,
        opacity=0.2,
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        legendgroup=label,
        showlegend=False,
    )


def _title(comparison: Any, metric: str) -> str:
    """Return what a metric is called; of other tasks its name and which way is better."""
    if metric in TITLES:
        return TITLES[metric]
    name = f"training {metric.removeprefix('train_')}" if metric.startswith("train_") else f"held-out {metric}"
    return with_direction(name, comparison.directions[metric])


def headline_axis(directions: Mapping[str, str]) -> str:
    """Return the title of an axis for some headlines, the accuracy of classifiers in %."""
    usual = {"accuracy": QUANTITIES["accuracy"]}
    return ", ".join(usual.get(name) or with_direction(name, better) for name, better in directions.items())


def with_direction(metric: str, direction: str) -> str:
    """Return the name of another task's metric and which way is better, as axes say it."""
    return f"{metric.replace('_', ' ')} ({direction} is better)"


def _label(figure: go.Figure, title: str | None, over: str, **place: int) -> None:
    figure.update_xaxes(title=(AXES | TIMED)[over], autorange=None if over == "channels" else "reversed", **place)
    figure.update_yaxes(title=title, **place)


def accuracy_over_macs(
    table: pd.DataFrame, *, headline: str = "accuracy", direction: str = "higher", look: str = "light"
) -> go.Figure:
    """Draw what networks reach at what they cost; those of one name are joined.

    Args:
        table: columns "network" (names), "MACs left" and "accuracy" (shares), and where it is known "error", how far
            the accuracy may be off either way.
        headline, direction: what another task reaches, the column in the place of "accuracy", and which way is better.
        look: "light" or "dark".

    Raises:
        ValueError: an empty table, or an unknown look.
    """
    if table.empty:
        raise ValueError("no network to draw: give a table with a row for each")
    figure, (scale, unit) = go.Figure(), (100, " %") if headline == "accuracy" else (1, "")
    for index, (name, rows) in enumerate(table.groupby("network", sort=False)):
        color, rows = color_of(name, index), rows.sort_values("MACs left")
        figure.add_scatter(
            x=100 * rows["MACs left"],
            y=scale * rows[headline],
            error_y={"array": scale * rows["error"], "thickness": 1.2} if "error" in rows else None,
            name=name,
            mode="lines+markers",
            line={"color": color, "width": 1.5},
            marker={"size": 10},
            hovertemplate=f"{name}: %{{y:.4g}}{unit} with %{{x:.1f}} % of the MACs<extra></extra>",
        )
    _label(figure, TITLES.get(headline) or with_direction(headline, direction), "macs")
    title = f"{headline.replace('_', ' ').capitalize()} over MACs"
    return finished(figure, look, 380, title=title, legend={"y": -0.2, "yanchor": "top"})


def plot_histories(histories: Mapping[str, Any], *, look: str = "light") -> go.Figure:
    """Draw loss and accuracy of several trainings over the epochs: validation solid, training dotted.

    Of another task its headline instead of the accuracy.

    Raises:
        ValueError: no history, or an unknown look.
    """
    if not histories:
        raise ValueError("no history to draw: give {'name': history}")
    headlines = dict(history.last.better for history in histories.values())
    named = ", ".join(sorted(headlines)).replace("_", " ")
    figure = make_subplots(1, 2, subplot_titles=("Loss", named.capitalize()), horizontal_spacing=0.1)
    for index, (label, history) in enumerate(histories.items()):
        frame = history.to_frame()
        for part, name, dash in (("val", "validation", "solid"), ("train", "training", "dot")):
            style = {"color": color_of(label, index), "dash": dash, "width": 2 if part == "val" else 1.4}
            shared = {
                "x": frame["epoch"],
                "name": f"{label}, {name}" if label else name,
                "legendgroup": f"{label} {part}",
                "line": style,
            }
            shared["mode"] = "lines+markers" if len(frame) <= 20 else "lines"
            shared["marker"] = {"size": 5}
            if f"{part}_loss" in frame:
                figure.add_scatter(y=frame[f"{part}_loss"], hovertemplate="%{y:.4f}", **shared, row=1, col=1)
            headline = next(iter(history.last.values), None)
            if headline is None:
                percent = 100 * frame[f"{part}_accuracy"]
                figure.add_scatter(y=percent, hovertemplate="%{y:.2f} %", showlegend=False, **shared, row=1, col=2)
            elif part == "val":
                shared["showlegend"] = f"{part}_loss" not in frame
                figure.add_scatter(y=frame[f"val_{headline}"], hovertemplate="%{y:.4g}", **shared, row=1, col=2)
    of_images = headlines.keys() == {"accuracy"}
    figure.update_yaxes(title="cross entropy (nats)" if of_images else "loss", row=1, col=1)
    figure.update_yaxes(title=headline_axis(headlines), row=1, col=2)
    figure.update_annotations(font_size=12)
    x = {"title": "epoch", "rangemode": "tozero"}
    return finished(figure, look, 400, x=x, hovermode="x unified", legend_y=1.1)


MOST_WORDS = 110
"""Letters of a line in a picture."""
QUANTITIES = {"loss": "loss", "accuracy": "accuracy (%)", "lr": "learning rate", "images_per_second": "examples/s"}
"""The panels of the figure of runs: a quantity and the title of its axis. Other tasks have no accuracy, see below."""


def watch_figure(
    traces: Iterable[Mapping[str, Any]],
    directions: Mapping[str, str] | None = None,
    *,
    failed: Sequence[str] = (),
    look: str = "light",
) -> go.Figure:
    """Draw loss, accuracy, learning rate and speed of several runs, as far as they are.

    Args:
        traces: the properties of each curve; ``meta[2]`` is the number of its panel, from 0.
        directions: what is drawn in the place of the accuracy: headline of another task -> "higher" or "lower",
            whichever is better; "accuracy" where there are also runs that classify.
        failed: what runs failed of, a line each, to stand in the picture.
        look: "light" or "dark".

    Raises:
        ValueError: an unknown look.
    """
    figure = make_subplots(2, 2, horizontal_spacing=0.1, vertical_spacing=0.16)
    for trace in traces:
        row, column = divmod(trace["meta"][2], 2)
        figure.add_scatter(**trace, row=row + 1, col=column + 1)
    titles = QUANTITIES | ({"accuracy": headline_axis(directions)} if directions else {})
    for panel, title in enumerate(titles.values()):
        figure.update_yaxes(title=title, row=panel // 2 + 1, col=panel % 2 + 1)
    if failed:
        lines = [line if len(line) <= MOST_WORDS else f"{line[:MOST_WORDS]} …" for line in failed]
        text = "<br>".join(map(html.escape, lines))
        place = {"xref": "paper", "yref": "paper", "x": 0, "y": 1.1, "yanchor": "bottom", "align": "left"}
        figure.add_annotation(text=text, showarrow=False, font_color=COLORS["naive"], **place)
    x = {"title": "epochs", "rangemode": "tozero"}
    top = 40 if not failed else 64 + 14 * len(failed)
    return finished(figure, look, 520, x=x, margin_t=top, legend_y=1.04)
