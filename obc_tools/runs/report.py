"""Reports as one offline HTML page, and the report of a finished job."""

from __future__ import annotations

import html
import math
import numbers
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from ..errors import check_name
from ..files import environment, write_text
from ..measure.metrics import Metrics
from ..plots.curves import plot_histories
from ..plots.jtj import jtj_grid
from ..plots.looks import LOOKS, theme
from ..plots.plans import plot_plan
from ..pruning.choices import OPERATIONS
from ..pruning.plan import Deciding
from .job import COMPENSATED, MERGED, NAIVE, ORIGINAL, PRUNED, JobResult, PruningJob

BESIDE = {
    kind: Path(__file__).with_name(f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
}
"""A page without its sections, its style and what draws its figures."""
SI = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Text:
    """Paragraphs, parted by empty lines, under an optional heading. Plain text: nothing in it is taken for HTML."""

    text: str
    heading: str | None = None


@dataclass(frozen=True)
class Table:
    """A table, numbers right-aligned and formatted, under an optional heading.

    Attributes:
        frame: the columns in order; its index is not shown.
        formats: column -> a format specification (".2%", ",d", ".3f") or "si" (126.8 M). By default whole numbers have
            thousands apart and others four significant digits.
        caption: what the table says, and how it was measured.

    Raises:
        ValueError: a format of a column that the frame lacks.
    """

    frame: pd.DataFrame
    heading: str | None = None
    caption: str | None = None
    formats: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        for column in self.formats:
            check_name("column of the table", column, self.frame.columns)


@dataclass(frozen=True)
class Figure:
    """A plotly figure under an optional heading; on the page it follows the reader's light or dark setting."""

    figure: go.Figure
    heading: str | None = None
    caption: str | None = None


Section = Text | Table | Figure


def write_report(path: str | os.PathLike[str], title: str, sections: Iterable[Section]) -> Path:
    """Write one self-contained page (about 5 MB, plotly.js included once) that needs no network; return its path.

    The file appears whole or not at all.

    Raises:
        ValueError: something else than a Text, Table or Figure among the sections, or a cell that its format does not
            suit (says the column).
    """
    path = Path(path)
    write_text(path, render_report(title, sections))
    return path


def render_report(title: str, sections: Iterable[Section]) -> str:
    """Return the page that `write_report` writes."""
    sections = list(sections)
    body = "\n".join(_render(section, number) for number, section in enumerate(sections))
    has_figures = any(isinstance(section, Figure) for section in sections)
    scripts = _scripts() if has_figures else ""
    return Template(BESIDE["html"]).substitute(
        title=html.escape(title), policy=POLICY, style=BESIDE["css"], body=body, scripts=scripts
    )


def _render(section: Section, number: int) -> str:
    heading = f"<h2>{html.escape(section.heading)}</h2>\n" if getattr(section, "heading", None) else ""
    match section:
        case Text():
            paragraphs = [part.strip() for part in section.text.split("\n\n") if part.strip()]
            content = "\n".join(f"<p>{html.escape(part)}</p>" for part in paragraphs)
        case Table():
            content = _table(section)
        case Figure():
            content = _figure(section, number)
        case _:
            raise ValueError(f"section {number + 1} is a {type(section).__name__}; expected Text, Table or Figure")
    return f"<section>\n{heading}{content}\n</section>"


def _table(table: Table) -> str:
    frame, caption = table.frame, f"<p class='caption'>{html.escape(table.caption)}</p>" if table.caption else ""
    right = {name: pd.api.types.is_numeric_dtype(frame[name]) for name in frame.columns}
    align = {name: " class='number'" if numeric else "" for name, numeric in right.items()}
    head = "".join(f"<th{align[name]}>{html.escape(str(name))}</th>" for name in frame.columns)
    rows = []
    for _, row in frame.astype(object).iterrows():
        cells = [_cell(name, row[name], table.formats.get(name)) for name in frame.columns]
        rows.append("".join(f"<td{align[name]}>{cell}</td>" for name, cell in zip(frame.columns, cells, strict=True)))
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    content = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>"
    return f"<div class='table'><table>\n{content}\n</table></div>{caption}"


def _cell(column: Any, value: Any, specification: str | None) -> str:
    try:
        return html.escape(format_number(value, specification))
    except (ValueError, TypeError) as error:
        raise ValueError(f"column {column!r}: {value!r} does not suit the format {specification!r}") from error


def format_number(value: Any, specification: str | None = None) -> str:
    """Format one cell: numbers by a format specification, "si" or the default; missing ones as "–"; the rest as text.

    Example:
        >>> format_number(126837386, "si"), format_number(0.93341, ".2%"), format_number(855770)
        ('126.8 M', '93.34%', '855,770')
    """
    if value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, str | bool) or not isinstance(value, numbers.Number):
        return str(value)
    if specification == "si":
        scale, prefix = next(((s, p) for s, p in SI if abs(value) >= s), (1, ""))
        return f"{value / scale:.4g} {prefix}".strip()
    if specification is None:
        specification = ",d" if isinstance(value, numbers.Integral) else ",.4g"
    return format(value, specification)


def _figure(section: Figure, number: int) -> str:
    bare = go.Figure(section.figure).update_layout(template=None)
    height = section.figure.layout.height or 450
    caption = f"<p class='caption'>{html.escape(section.caption)}</p>" if section.caption else ""
    return (
        f"<div class='figure' id='figure-{number}' style='height:{height}px'></div>"
        f"<script type='application/json' data-figure='figure-{number}'>{_json(bare)}</script>{caption}"
    )


def _json(figure: go.Figure) -> str:
    return figure.to_json().replace("<", "\\u003c")


def _scripts() -> str:
    templates = ",".join(f"{look}:{_json(go.Figure(layout={'template': theme(look)}))}" for look in LOOKS)
    return f"<script>{get_plotlyjs()}</script>\n<script>const LOOKS = {{{templates}}};\n{BESIDE['js']}</script>"


POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)

CURVES = {ORIGINAL: "original, from scratch", NAIVE: "naive", MERGED: "EP"}


def write_job_report(result: JobResult, path: str | os.PathLike[str]) -> Path:
    """Write the report of a job as one offline HTML page; return its path."""
    return write_report(path, result.job.title, job_sections(result))


def job_sections(result: JobResult) -> Iterator[Section]:
    """Yield the sections of a job's report, those that the job has."""
    yield Text(_summary(result))
    yield _job_table(result)
    if result.speeds is not None:
        caption = "A forward pass, the models in turns: medians and quartiles of 10, medians of ratios to the original."
        yield Table(result.speeds, "Latency on this machine", caption, {"speed-up": ".2f"})
    caption = (
        "Grey: removed. Layers that must keep the same channels, such as those of a residual stage, are one group."
    )
    yield Figure(plot_plan(result.plan), "Kept channels", caption)
    if result.filters is not None:
        yield Figure(jtj_grid(result.filters), f"JᵀJ of the filters of {result.filters.axis.layer}", _filters(result))
    tuned = {CURVES[key]: history for key, history in result.histories.items() if key != ORIGINAL}
    if tuned:
        yield Figure(plot_histories(tuned), "Fine-tuning", "The same examples in the same order, the same recipe.")
    if ORIGINAL in result.histories:
        trained = {CURVES[ORIGINAL]: result.histories[ORIGINAL]}
        yield Figure(plot_histories(trained), "Training the original")
    yield Text(_how(result), "How this was measured")


def _summary(result: JobResult) -> str:
    job, plan = result.job, result.plan
    kept = f"{plan.channels - plan.channels_removed:,} of {plan.channels:,} channels stay"
    text = f"{job.model} on {job.data}, pruned to {job.target} by the {job.criterion} criterion: {kept}."
    if plan.deciding:
        text = f"{text} {_deciding(plan.deciding, job)}"
    if result.equivalence is None:
        return text
    found = result.equivalence
    begun = COMPENSATED if COMPENSATED in result.models else PRUNED
    return (
        f"{text}\n\nEquivalent Pruning starts where the {begun} network starts (logits differ by at most "
        f"{found.start_from_naive:.1g}), and merging changes nothing (at most {found.merged_from_trained:.1g}). The "
        "merged network has the layers, shapes and cost of the naively pruned one; its logits differ from those of the "
        f"naively fine-tuned one by up to {found.merged_from_naive:.3g}."
    )


def _deciding(steps: Sequence[Deciding], job: PruningJob) -> str:
    scored = ", ".join(f"{step.batches} ({step.share:.2f}{'' if step.decided else ', undecided'})" for step in steps)
    return (
        f"Scoring stopped once other batches were expected to exchange at most {job.stop:g} of a step's channels, "
        f"or at {job.batches} batches; batches of each step, and that share: {scored}."
    )


def _job_table(result: JobResult) -> Table:
    metrics = next(iter(result.measured.values())).metrics
    measured = "Accuracy and mean cross entropy" if isinstance(metrics, Metrics) else metrics.describe()
    count = f"{metrics.examples:,} " if isinstance(metrics, Metrics) else ""
    formats = {"test accuracy": ".2%", "test loss": ".4f", "MACs": "si", "speed-up": ".2f", "parameters": ",d"}
    counted = "counted as torch_pruning counts them"
    if result.job.target.counting == OPERATIONS:
        counted = "of the operations that run"
    caption = (
        f"{measured} on {count}held-out examples, which decided nothing. MACs of one example, "
        f"{counted}. Latency of one at a time: median on the CPU, the models in turns; "
        "small networks wait for memory and calls more than for MACs."
    )
    frame = result.to_frame()
    usual = dict.fromkeys(frame.columns[1:], ".4g") | formats | {"CPU latency (ms)": ".2f"}
    return Table(frame, "Results", caption, {name: usual[name] for name in frame.columns[1:]})


def _filters(result: JobResult) -> str:
    job = result.job
    return (
        f"Rows of J: {job.batches} batches of {job.batch_size} training examples, in the original network. The score "
        "of a filter w, above its map, is wᵀ(JᵀJ)w; what is off the diagonal is how its weights act together."
    )


def _how(result: JobResult) -> str:
    found = environment(next(result.models[ORIGINAL].parameters()).device)
    libraries = ", ".join(f"{name} {version}" for name, version in found["libraries"].items())
    where = f"{found['cpu']}, CPUs: {found['cpus']}, threads: {found['threads']}, GPU: {found['gpu'] or 'none'}"
    stages = "; ".join(f"{stage}: {seconds:.0f} s" for stage, seconds in result.seconds.items())
    return f"{where}. Python {found['python']}, {libraries}. Seed {result.job.seed}.\n\n{stages}."
