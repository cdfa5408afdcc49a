"""Figures of a comparison of criteria: curves with mean and standard deviation, and the seconds of scoring.

A criterion has the same colour in all of them (see `looks`); variants of one criterion differ in their dashes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .looks import color_of, theme

AXES = {"channels": "pruned channels (%)", "macs": "MACs left (%)", "params": "parameters left (%)"}
TITLES = {
    "accuracy": "held-out accuracy (%)",
    "top5": "held-out top-5 accuracy (%)",
    "loss": "held-out loss (nats)",
    "train_accuracy": "training accuracy (%)",
    "train_top5": "training top-5 accuracy (%)",
    "train_loss": "training loss (nats)",
}
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
PANELS = ("train_accuracy", "accuracy", "train_loss", "loss")


def criteria_curves(
    comparison: Any, metric: str = "accuracy", over: str = "params", *, look: str = "light"
) -> go.Figure:
    """Draw a metric against what was pruned: a line a criterion, the mean of its repeats, its band their std.

    Args:
        metric: a column of the comparison's frame that was measured.
        over: "channels" (pruned), "macs" or "params" (left; to the right is less).

    Raises:
        ComparisonError: an unknown axis, a metric that was not measured.
    """
    figure = go.Figure()
    _draw(figure, comparison, metric, over)
    _label(figure, metric, over)
    title = f"{TITLES[metric].partition(' (')[0].capitalize()} after pruning"
    figure.update_layout(template=theme(look), title=title, height=480, legend={"y": -0.16, "yanchor": "top"})
    return figure


def criteria_panels(
    comparison: Any, metrics: Sequence[str] = PANELS, axes: Sequence[str] = tuple(AXES), *, look: str = "light"
) -> go.Figure:
    """Draw the paper's panels (Fig. 5–7): a row a metric, of those that were measured, and a column an axis."""
    shown = [metric for metric in metrics if metric in comparison.measured()]
    figure = make_subplots(len(shown), len(axes), shared_yaxes=True, horizontal_spacing=0.03, vertical_spacing=0.09)
    for row, metric in enumerate(shown, 1):
        for column, over in enumerate(axes, 1):
            place = {"row": row, "col": column}
            _draw(figure, comparison, metric, over, legend=row == column == 1, **place)
            _label(figure, metric, over, title=column == 1, **place)
    figure.update_layout(template=theme(look), height=130 + 260 * len(shown), title="Pruned without fine-tuning")
    figure.update_layout(legend={"y": -0.25 / max(len(shown), 1), "yanchor": "top"})
    return figure


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
    figure = go.Figure(bar)
    figure.update_layout(template=theme(look), title="Scoring, seconds a step", height=130 + 28 * len(seconds))
    figure.update_xaxes(type="log", title="seconds a step, median and quartiles (log scale)")
    return figure


def _draw(figure: go.Figure, comparison: Any, metric: str, over: str, *, legend: bool = True, **place: int) -> None:
    """Add a line a criterion, with a band where it was repeated."""
    values = comparison.values_of(metric)
    left = 100 * comparison.left(over)
    frame = comparison.frame.assign(x=100 - left if over == "channels" else left)
    frame["y"] = values * (1 if "loss" in metric else 100)
    used: Counter[str] = Counter()
    for label in comparison.criteria:
        mine = frame[frame["criterion"] == label]
        steps = mine.groupby("step").agg(x=("x", "mean"), y=("y", "mean"), std=("y", "std"), n=("y", "size"))
        # A step that some repeats did not reach would bend the mean.
        steps = steps[steps["n"] == mine["repeat"].nunique()]
        color = color_of(label)
        line = {"color": color, "width": 2, "dash": DASHES[used[color] % len(DASHES)]}
        used[color] += 1
        if steps["std"].notna().any():
            figure.add_trace(_band(steps, label, color), **place)
        figure.add_trace(
            go.Scatter(
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
            ),
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


def _label(figure: go.Figure, metric: str, over: str, *, title: bool = True, **place: int) -> None:
    figure.update_xaxes(title=AXES[over], **place)
    if over != "channels":
        figure.update_xaxes(autorange="reversed", **place)
    figure.update_yaxes(title=TITLES[metric] if title else None, **place)
