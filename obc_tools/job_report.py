"""The report of a finished job: what came out, which channels stay, JᵀJ of the first filters, both fine-tunings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from .environment import environment
from .job_result import MERGED, NAIVE, ORIGINAL, JobResult
from .plots import jtj_grid, plot_histories, plot_plan
from .report import Figure, Section, Table, Text, write_report

CURVES = {ORIGINAL: "original, from scratch", NAIVE: "naive", MERGED: "EP"}


def write_job_report(result: JobResult, path: str | os.PathLike[str]) -> Path:
    """Write the report of a job as one offline HTML page; return its path."""
    return write_report(path, result.job.title, job_sections(result))


def job_sections(result: JobResult) -> Iterator[Section]:
    """Yield the sections of a job's report, those that the job has."""
    yield Text(_summary(result))
    yield _table(result)
    caption = (
        "Grey: removed. Layers that must keep the same channels, such as those of a residual stage, are one group."
    )
    yield Figure(plot_plan(result.plan), "Kept channels", caption)
    if result.filters is not None:
        yield Figure(jtj_grid(result.filters), f"JᵀJ of the filters of {result.filters.axis.layer}", _filters(result))
    tuned = {CURVES[key]: history for key, history in result.histories.items() if key != ORIGINAL}
    if tuned:
        yield Figure(plot_histories(tuned), "Fine-tuning", "The same images in the same order, the same recipe.")
    if ORIGINAL in result.histories:
        trained = {CURVES[ORIGINAL]: result.histories[ORIGINAL]}
        yield Figure(plot_histories(trained), "Training the original")
    yield Text(_how(result), "How this was measured")


def _summary(result: JobResult) -> str:
    job, plan = result.job, result.plan
    kept = f"{plan.channels - plan.channels_removed:,} of {plan.channels:,} channels stay"
    text = f"{job.model} on {job.data}, pruned to {job.target} by the {job.criterion} criterion: {kept}."
    if result.equivalence is None:
        return text
    found = result.equivalence
    return (
        f"{text}\n\nEquivalent Pruning starts where the pruned network starts (logits differ by at most "
        f"{found.start_from_naive:.1g}), and merging changes nothing (at most {found.merged_from_trained:.1g}). The "
        "merged network has the layers, shapes and cost of the naively pruned one; its logits differ from those of the "
        f"naively fine-tuned one by up to {found.merged_from_naive:.3g}."
    )


def _table(result: JobResult) -> Table:
    images = next(iter(result.measured.values())).metrics.examples
    formats = {"test accuracy": ".2%", "test loss": ".4f", "MACs": "si", "speed-up": ".2f", "parameters": ",d"}
    caption = (
        f"Accuracy and mean cross entropy on {images:,} held-out images, which decided nothing. MACs of one image, "
        "counted as torch_pruning counts them. Latency of one image at a time: median on the CPU, the models in turns; "
        "small networks wait for memory and calls more than for MACs."
    )
    return Table(result.to_frame(), "Results", caption, formats | {"CPU latency (ms)": ".2f"})


def _filters(result: JobResult) -> str:
    job = result.job
    return (
        f"Rows of J: {job.batches} batches of {job.batch_size} training images, in the original network. The score of "
        "a filter w, above its map, is wᵀ(JᵀJ)w; what is off the diagonal is how its weights act together."
    )


def _how(result: JobResult) -> str:
    found = environment(next(result.models[ORIGINAL].parameters()).device)
    libraries = ", ".join(f"{name} {version}" for name, version in found["libraries"].items())
    where = f"{found['cpu']}, CPUs: {found['cpus']}, threads: {found['threads']}, GPU: {found['gpu'] or 'none'}"
    stages = "; ".join(f"{stage}: {seconds:.0f} s" for stage, seconds in result.seconds.items())
    return f"{where}. Python {found['python']}, {libraries}. Seed {result.job.seed}.\n\n{stages}."
