"""Tables of runs: grouped over seeds, beside the paper's figures."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from obc_tools.files import write_json
from obc_tools.pruning.choices import Target
from obc_tools.runs.experiments import EXPERIMENTS
from obc_tools.runs.run import find_runs, results_table

PAPER = Path(__file__).parents[2] / "results" / "paper" / "table9_vgg19_cifar100.csv"


def fake_run(folder: Path, seed: int, naive: float, equivalent: float, reduction: str = "sum") -> None:
    """Write what a finished run leaves, as far as tables look at it."""
    job = EXPERIMENTS["vgg19-cifar100"].job(target=Target(speedup=3.0), seed=seed, group_reduction=reduction)
    cost = {"original": 300.0, "naive": 100.0, "merged": 100.0}
    accuracy = {"original": 0.74, "naive": naive, "merged": equivalent}
    models = {
        key: {"metrics": {"accuracy": value, "loss": 1.0}, "cost": {"macs": cost[key], "params": 10}}
        for key, value in accuracy.items()
    }
    histories = {key: [{"val_accuracy": accuracy[key] + 0.01}, {"val_accuracy": accuracy[key]}] for key in models}
    folder.mkdir(parents=True)
    write_json(folder / "job.json", job.to_dict())
    write_json(folder / "results.json", {"format": 1, "models": models, "histories": histories})


def test_means_over_seeds_beside_the_paper(tmp_path):
    fake_run(tmp_path / "grid" / "a", 0, 0.73, 0.735)
    fake_run(tmp_path / "grid" / "b", 1, 0.75, 0.745)
    fake_run(tmp_path / "c", 0, 0.70, 0.71, reduction="max")
    unfinished = tmp_path / "d"
    unfinished.mkdir()
    write_json(unfinished / "job.json", replace(EXPERIMENTS["vgg19-cifar100"].job(), seed=1).to_dict())
    assert len(find_runs(tmp_path)) == 4
    table = results_table(tmp_path, paper=PAPER)
    assert list(table["method"]) == ["naive", "EP"] * 2
    ours = table[(table["reduction"] == "sum") & (table["method"] == "naive")].iloc[0]
    assert ours["test accuracy (%)"] == pytest.approx(74) and ours["n"] == 2
    assert ours["standard deviation"] == pytest.approx(2**0.5)
    assert ours["speed-up"] == 3 and ours["original (%)"] == pytest.approx(74)
    assert (ours["paper (%)"], ours["paper's standard deviation"]) == (73.09, 0.20)
    assert pd.isna(table[table["reduction"] == "max"]["standard deviation"]).all()
    picked = results_table(find_runs(tmp_path), select="best_on_test")
    assert list(picked["test accuracy (best epoch, picked on test) (%)"])[:2] == pytest.approx([71, 72])


def test_nothing_to_show(tmp_path):
    with pytest.raises(ValueError, match="none of 0 runs has finished"):
        results_table(tmp_path)


def test_a_half_written_line_of_one_run_does_not_hide_the_others(tmp_path):
    fake_run(tmp_path / "a", 0, 0.73, 0.735)
    broken = tmp_path / "b" / "training_naive"
    broken.mkdir(parents=True)
    write_json(tmp_path / "b" / "job.json", EXPERIMENTS["vgg19-cifar100"].job().to_dict())
    (broken / "metrics.jsonl").write_text('{"epoch": 2, "lr"')
    assert len(results_table(tmp_path)) == 2
    assert [repr(run).count("interrupted") for run in find_runs(tmp_path)] == [0, 1]
