"""What the study of Equivalent Pruning found so far: paired differences with intervals, tables and figures.

Reads the table that equivalent_study.py writes, complete or not. A pair is one EP training and the naive one of the
same network, plan, images, order, epochs and code; differences are EP minus naive, in points of test accuracy.
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
SHARED = [*PLACE, "seed", "original", "plan", "code"]
"""What an EP training shares with the naive one of its pair."""
TEXTS = ("block", "purpose", "method", "criterion", "start", "original", "plan", "curve", "code", "torch", "cpu")
SETTING = [*PLACE, "scale", "decay", "method"]


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table as text; none where there is no table."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_table(path: str | Path) -> pd.DataFrame:
    """Return the table of finished trainings, accuracies in [0, 1]; numbers also where it is empty."""
    table = pd.read_csv(path, dtype=dict.fromkeys(TEXTS, str))
    return table.astype({name: float for name in table if name not in TEXTS and table[name].dtype == object})


def tuning(table: pd.DataFrame, code: str | None = None) -> pd.DataFrame:
    """Return one row a block and learning rate: validation accuracies in %, how many seeds, EP minus naive of them.

    The difference is a mean over the seeds that both methods have. ``other code`` is as in `differences`.
    """
    rows = table[table["purpose"] == "tune"].assign(accuracy=100 * table["val_accuracy"])
    wide = rows.pivot_table(index=["block", "lr", "seed"], columns="method", values="accuracy")
    wide = wide.reindex(columns=["naive", "ep"]).assign(both=lambda frame: frame["ep"] - frame["naive"])
    grouped = wide.groupby(["block", "lr"])
    frame = grouped.mean().rename(columns={"both": "difference"}).assign(n=grouped["both"].count())
    stale = rows.groupby(["block", "lr"])["code"].agg(lambda found: set(found) != {code})
    frame["other code"] = "" if code is None else stale.map({True: "†", False: ""})
    return frame.reset_index()


def pairs(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row a pair: setting, seed, both test accuracies, ``difference`` in points, ``cost`` in CPU time.

    Trainings other than "naive" are each compared with the naive one; those without one are left out.
    """
    runs = table[table["purpose"] == "run"]
    naive = runs[runs["method"] == "naive"]
    own = naive[[*SHARED, "test_accuracy", "cpu_seconds", "curve"]]
    found = runs[runs["method"] != "naive"].merge(own, on=SHARED, suffixes=("", "_naive"))
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
    head = ("block", "learning rate", "naive (%)", "EP (%)", "EP - naive on validation images (points)", "n")
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for _, row in tuning(table, code).iterrows():
        figures = ("" if math.isnan(row[name]) else f"{row[name]:.2f}" for name in ("naive", "ep", "difference"))
        cells = (row["block"], f"{row['lr']:g} {row['other code']}".strip(), *figures, row["n"])
        lines.append(f"| {' | '.join(map(str, cells))} |")
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


def plot_curves(table: pd.DataFrame, block: str | None = None, *, look: str = "light") -> go.Figure:
    """Draw the validation accuracy over the epochs of the EP setting with the most pairs, and of naive, seed by seed.

    Args:
        block: None: whichever has the most pairs.
    """
    found = pairs(table)
    found = found[(found["method"] == "ep") & ((found["block"] == block) | (block is None))]
    most = found[SETTING].value_counts().index[:1].to_frame(index=False)
    chosen = most.merge(found, on=SETTING).sort_values("seed") if len(found) else found
    figure = go.Figure()
    for _, row in chosen.iterrows():
        for name, curve in (("naive", row["curve_naive"]), ("ep", row["curve"])):
            values = [100 * float(value) for value in curve.split()]
            shared = {"legendgroup": name, "showlegend": bool(row["seed"] == chosen["seed"].min()), "mode": "lines"}
            style = {"color": COLORS[name], "width": 1.5}
            text = f"{name}, seed {row['seed']}: %{{y:.2f}} %<extra></extra>"
            x = list(range(1, len(values) + 1))
            figure.add_scatter(x=x, y=values, name=name, line=style, hovertemplate=text, **shared)
    figure.update_xaxes(title="epoch")
    figure.update_yaxes(title="validation accuracy (%)")
    figure.update_layout(template=theme(look), height=400)
    return figure
