"""The zoo's table for a reader: how many networks pass each column, and every other one with its reason."""

from __future__ import annotations

import re

import pandas as pd
import timm

BOUND = 1e-6
"""The largest relative error that counts as equal."""

_ERRORS = ("masked = pruned", "EP = naive", "merge = EP")
_COUNTS = "MACs = FLOPs/2"
_HEADINGS = (
    "networks", "families", "pruned by 0.3", "pruned to 1.5x", _COUNTS, *_ERRORS, "save = load", "ONNX", "all of it",
)  # fmt: skip


def families(table: pd.DataFrame) -> pd.Series:
    """Return the family of each network: timm's module, or the first word of torchvision's name."""
    modules = {name: module for module in timm.list_modules() for name in timm.list_models(module=module)}
    first = {name: re.match("[A-Za-z]+(_resnet)?", name).group() for name in table["model"]}
    pairs = zip(table["source"], table["model"], strict=True)
    return pd.Series([modules[name] if source == "timm" else first[name] for source, name in pairs], table.index)


def counts(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row a source: how many networks and families there are, and how many networks pass each column."""
    errors = table[list(_ERRORS)].apply(pd.to_numeric, errors="coerce") <= BOUND
    passed = {
        "networks": table["model"].notna(),
        "pruned by 0.3": pd.to_numeric(table["pruned 0.3"], errors="coerce") > 0,
        "pruned to 1.5x": pd.to_numeric(table["speed-up"], errors="coerce") >= 1.5,
        _COUNTS: pd.to_numeric(table.get(_COUNTS, pd.Series("", table.index)), errors="coerce") <= 1e-9,
        **{name: errors[name] for name in _ERRORS},
        "save = load": table["save/load"] == "equal",
        "ONNX": pd.to_numeric(table["ONNX"], errors="coerce").notna(),
        "all of it": table["ok"].astype(str) == "True",
    }
    found = pd.DataFrame(passed).groupby(table["source"]).sum()
    found["families"] = families(table).groupby(table["source"]).nunique()
    shown = [name for name in _HEADINGS if name != _COUNTS or _COUNTS in table]  # tables from before lack it
    return found.loc[sorted(found.index, reverse=True), shown]


def failures(table: pd.DataFrame) -> list[str]:
    """Return a line for each network that does not pass everything: its name and the reason."""
    rows = table[table["ok"].astype(str) != "True"]
    return [f"- `{row['source']}:{row['model']}`: {_short(row['reason'])}" for row in rows.to_dict("records")]


def _short(reason: str) -> str:
    text = " ".join(reason.replace("|", "/").split())
    return text if len(text) <= 200 else text[:199] + "…"


def markdown(table: pd.DataFrame, everything: int) -> str:
    """Return the table as Markdown: counts, shares, and the networks that do not pass; `everything`: the zoo's size."""
    found = counts(table)
    shares = [f"{row['all of it'] / row['networks']:.1%} of {source}'s" for source, row in found.iterrows()]
    run = f"{len(table)} of {everything} networks were run; {', '.join(shares)} pass everything."
    return "\n\n".join([_lines(found), run, "\n".join(failures(table))]).rstrip()


def _lines(frame: pd.DataFrame) -> str:
    rows = [
        ["", *frame.columns],
        ["---"] * (len(frame.columns) + 1),
        *([index, *row] for index, *row in frame.itertuples()),
    ]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
