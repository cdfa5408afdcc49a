"""What the study of Equivalent Pruning found so far: paired differences with intervals, tables and figures.

Reads the table that equivalent_study.py writes, complete or not. A pair is one EP training and the naive one of the
same plan, images, order, epochs and code; differences are EP minus naive, in points of test accuracy.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from scipy import stats

from obc_tools.plots.looks import COLORS, theme

PLACE = ["block", "speedup", "epochs", "criterion", "start"]
"""What an EP training shares with the naive one of its pair, beside the seed and the code."""
SETTING = [*PLACE, "scale", "decay", "method"]


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table as text; none where there is no table."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_table(path: str | Path) -> pd.DataFrame:
    """Return the table of finished trainings, accuracies in [0, 1]."""
    return pd.read_csv(path, dtype={"code": str})


def pairs(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row a pair: setting, seed, both test accuracies, ``difference`` in points, ``cost`` in CPU time.

    Trainings other than "naive" are each compared with the naive one; those without one are left out.
    """
    runs = table[table["purpose"] == "run"]
    naive = runs[runs["method"] == "naive"]
    columns = [*PLACE, "seed", "code"]
    own = naive[[*columns, "test_accuracy", "cpu_seconds", "curve"]]
    found = runs[runs["method"] != "naive"].merge(own, on=columns, suffixes=("", "_naive"))
    found["difference"] = 100 * (found["test_accuracy"] - found["test_accuracy_naive"])
    found["cost"] = found["cpu_seconds"] / found["cpu_seconds_naive"]
    return found


def half_width(differences: pd.Series) -> float:
    """Return half the width of the 95 % confidence interval of a mean, t distribution; NaN below two values."""
    n = len(differences)
    if n < 2:
        return math.nan
    return float(stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / math.sqrt(n))


def differences(table: pd.DataFrame, code: str | None = None) -> pd.DataFrame:
    """Return one row a setting: number of pairs, mean accuracies in %, mean difference, its interval, cost.

    Args:
        code: digest of the present code; settings measured by another are marked in the column ``other code``.
    """
    found = pairs(table)
    grouped = found.groupby([*SETTING, "code"], sort=False, dropna=False)
    frame = grouped.agg(
        n=("seed", "size"),
        naive=("test_accuracy_naive", "mean"),
        other=("test_accuracy", "mean"),
        difference=("difference", "mean"),
        half=("difference", half_width),
        cost=("cost", "median"),
    ).reset_index()
    frame[["naive", "other"]] *= 100
    frame["low"], frame["high"] = frame["difference"] - frame["half"], frame["difference"] + frame["half"]
    frame["other code"] = "" if code is None else (frame["code"] != code).map({True: "†", False: ""})
    return frame


def label(row: pd.Series) -> str:
    """Say a setting in a few words."""
    parts = [row["method"], f"{row['speedup']:g}x", f"{row['epochs']} epochs"]
    parts += [f"scale {row['scale']:g}", f"decay {row['decay']:g}"] if row["method"].startswith("ep") else []
    extra = [value for value, usual in ((row["criterion"], "jacobian"), (row["start"], "plain")) if value != usual]
    return ", ".join([*parts, *extra])


def markdown(table: pd.DataFrame, code: str) -> str:
    """Return the tables of learning rates and of paired differences, in Markdown; † marks other code than ``code``."""
    tuned = table[table["purpose"] == "tune"]
    lines = ["| block | method | learning rate | validation accuracy (%) | n |", "| --- | --- | --- | --- | --- |"]
    for (block, method, lr), rows in tuned.groupby(["block", "method", "lr"]):
        mark = "" if set(rows["code"]) == {code} else " †"
        lines.append(f"| {block} | {method} | {lr:g} | {100 * rows['val_accuracy'].mean():.2f}{mark} | {len(rows)} |")
    head = ("block", "setting", "n", "naive (%)", "this (%)", "difference, 95 % interval (points)", "CPU time")
    lines += ["", f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for _, row in differences(table, code).iterrows():
        interval = "" if math.isnan(row["half"]) else f" ± {row['half']:.2f}"
        cells = (row["block"], label(row), row["n"], f"{row['naive']:.2f}", f"{row['other']:.2f}")
        cells += (f"{row['difference']:+.2f}{interval} {row['other code']}".strip(), f"{row['cost']:.2f}x")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, "", "†: measured by other code than the present one."])


def plot_differences(table: pd.DataFrame, code: str | None = None, *, look: str = "light") -> go.Figure:
    """Draw each setting's pairs, their mean and its 95 % interval; right of zero, the setting beats naive."""
    frame = differences(table, code)
    single = pairs(table).groupby([*SETTING, "code"], sort=False, dropna=False)["difference"]
    figure = go.Figure()
    for (_, row), (_, dots) in zip(frame.iterrows(), single, strict=True):
        shared = {"mode": "markers", "showlegend": False}
        name = f"{label(row)}{row['other code']} (n = {row['n']})"
        faint = {"color": COLORS["ep"], "opacity": 0.35, "size": 7}
        figure.add_scatter(x=dots, y=[name] * len(dots), marker=faint, **shared)
        bar = {"type": "data", "array": [None if math.isnan(row["half"]) else row["half"]], "color": COLORS["ep"]}
        strong = {"color": COLORS["ep"], "size": 11, "symbol": "diamond"}
        figure.add_scatter(x=[row["difference"]], y=[name], error_x=bar, marker=strong, **shared)
    figure.add_vline(0, line_color=COLORS["naive"])
    figure.update_xaxes(title="test accuracy against naive fine-tuning (points)")
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(template=theme(look), height=140 + 36 * max(1, len(frame)), margin_l=280)
    return figure


def plot_curves(table: pd.DataFrame, block: str, *, look: str = "light") -> go.Figure:
    """Draw the validation accuracy of the pairs at the centre of a block over the epochs, seed by seed."""
    found = pairs(table)
    found = found[(found["block"] == block) & (found["method"] == "ep")]
    centre = found[SETTING].value_counts().index[:1].to_frame(index=False)
    figure = go.Figure()
    for _, row in found.merge(centre, on=SETTING).sort_values("seed").iterrows():
        for name, curve in (("naive", row["curve_naive"]), ("ep", row["curve"])):
            values = [100 * float(value) for value in curve.split()]
            shared = {"legendgroup": name, "showlegend": bool(row["seed"] == found["seed"].min()), "mode": "lines"}
            style = {"color": COLORS[name], "width": 1.5}
            text = f"{name}, seed {row['seed']}: %{{y:.2f}} %<extra></extra>"
            x = list(range(1, len(values) + 1))
            figure.add_scatter(x=x, y=values, name=name, line=style, hovertemplate=text, **shared)
    figure.update_xaxes(title="epoch")
    figure.update_yaxes(title="validation accuracy (%)")
    figure.update_layout(template=theme(look), height=400)
    return figure
