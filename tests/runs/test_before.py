"""What was written before jobs and comparisons named their count still opens, reloads and resumes, in that count.

The files of ``data/before`` are from the commit before; ``make.py`` beside them says how they were made.
"""

import importlib.util
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from obc_tools import PruningPlan, Target, compare_criteria, load_data, load_model, load_pruned, prune, read_comparison
from obc_tools.comparing.compare import ComparisonError
from obc_tools.pruning.choices import TORCH_PRUNING
from obc_tools.runs.grid import Grid, GridJob, launch_grid
from obc_tools.runs.job import RunFolderError, read_job
from obc_tools.runs.run import Run, results_table, run_experiment

BEFORE = Path(__file__).parents[1] / "data" / "before"
SETTINGS = {"steps": 3, "ratio": 0.4, "batches": 1, "batch_size": 16, "repeats": 1, "progress": False}


@pytest.fixture
def before(tmp_path):
    """A copy of the files, to be worked on."""
    return Path(shutil.copytree(BEFORE, tmp_path / "before"))


def network():
    torch.manual_seed(0)
    return load_model("resnet8", 10, in_channels=1, width=2)


def test_plans_open_and_fit(before):
    text = (before / "finished" / "plan.json").read_text()
    plan = PruningPlan.from_json(text)
    assert json.loads(plan.to_json()) == json.loads(text)
    assert prune(network(), plan)(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_saved_models_reload(before):
    results = json.loads((before / "finished" / "results.json").read_text())
    model, data = load_pruned(before / "finished" / "merged"), load_data("digits").limited(48, 16)
    images, labels = next(iter(data.batches("val", 16, shuffle=False)))
    with torch.no_grad():
        accuracy = (model(images).argmax(1) == labels).double().mean().item()
    assert accuracy == results["models"]["merged"]["metrics"]["accuracy"]


def test_finished_runs_open(before):
    run = Run.open(before / "finished")
    assert run.status == "finished" and run.job.target == Target(speedup=1.3, counting=TORCH_PRUNING)
    assert list(run.histories) == ["original", "naive", "merged"]
    assert not run.job.compensate
    assert results_table([run])["target"].tolist() == ["speedup=1.3"] * 2
    assert run.table()["speed-up"].iloc[1] >= 1.3


@pytest.mark.parametrize("counting", ["operations", TORCH_PRUNING])
def test_interrupted_runs_go_on_in_the_count_that_was_meant(before, counting):
    known = read_job(before / "interrupted")
    again = replace(known, target=Target(speedup=1.3, counting=counting))
    run = run_experiment(again, before / "interrupted", progress=False)
    assert run.status == "finished" and run.job == known
    expected, found = (
        PruningPlan.from_json((before / name / "plan.json").read_text()) for name in ("finished", "interrupted")
    )
    assert found == expected
    macs = [json.loads((before / name / "results.json").read_text())["models"] for name in ("finished", "interrupted")]
    assert macs[0]["pruned"]["cost"]["macs"] == macs[1]["pruned"]["cost"]["macs"]
    assert '"counting": "torch_pruning"' in (before / "interrupted" / "job.json").read_text()
    if counting == "operations":
        with pytest.raises(RunFolderError, match=r"holds another job: target was .*torch_pruning.*, is .*operations"):
            run_experiment(again, before / "interrupted", progress=False)


def test_comparisons_open_and_go_on(before):
    folder, data = before / "comparison", load_data("digits").limited(48, 16)
    whole = read_comparison(folder / "comparison.csv").frame
    assert set(read_comparison(folder).frame["criterion"]) == {"l1"}
    with pytest.raises(ComparisonError, match="a comparison with another counting"):
        compare_criteria(network, data, ["l1", "jacobian"], folder=folder, counting="operations", **SETTINGS)
    more = compare_criteria(network, data, ["l1", "jacobian"], folder=folder, **SETTINGS)
    assert more.settings["counting"] == TORCH_PRUNING
    assert not more.settings["compensate"]
    columns = ["criterion", "step", "pruned_channels", "macs", "params", "accuracy", "loss"]
    pd.testing.assert_frame_equal(more.frame[columns], whole[columns], check_dtype=False, rtol=1e-4)


def test_grids_open_and_are_resumed_by_the_same_jobs(before, monkeypatch):
    monkeypatch.setattr(Grid, "resume", lambda self: self)
    grid = Grid.open(before / "grid")
    assert grid.statuses == {"one": "waiting", "two": "waiting"}
    assert {entry.job.target.counting for entry in grid.jobs} == {TORCH_PRUNING}
    job = read_job(before / "finished")
    assert launch_grid([GridJob("one", job), GridJob("two", job)], grid.folder, resume=True).jobs == grid.jobs
    with pytest.raises(ValueError, match="holds a grid"):
        launch_grid([GridJob("one", job)], grid.folder, resume=True)


def test_what_slurm_scripts_call_is_there(before):
    script = (before / "slurm" / "run.slurm").read_text()
    modules = re.findall(r"-m (obc_tools\S*) FOLDER", script)
    assert modules == ["obc_tools.worker"] and importlib.util.find_spec(modules[0])
    assert importlib.util.find_spec("obc_tools.grid_worker") and read_job(before / "slurm").target.speedup == 1.3
