"""A user's own model, data and task through jobs and the command line."""

import dataclasses
import json

import own_parts
import pytest

from obc_tools import TASKS, PruningJob, Target, compare_criteria, evaluate, load_pruned
from obc_tools.cli import main
from obc_tools.data.data import Data
from obc_tools.runs.job import find_data, find_model, is_own, own_task, read_job
from obc_tools.runs.pipeline import run_job
from obc_tools.runs.report import write_job_report
from obc_tools.runs.run import Run, results_table
from obc_tools.training.recipe import Recipe


def job(**changes):
    recipe = Recipe(epochs=1, batch_size=4, lr=0.01, augment=False)
    given = {
        "model": "own_parts:model",
        "data": "own_parts:data",
        "task": "own_parts:task",
        "target": Target(ratio=0.3),
        "steps": 2,
        "batches": 2,
        "batch_size": 4,
        "finetune": recipe,
        "equivalent": True,
        "device": "cpu",
    }
    return PruningJob(**given | changes)


def test_a_job_of_one_s_own_from_end_to_end(tmp_path):
    result = run_job(job(), tmp_path / "run", progress=False)
    frame = result.to_frame()
    assert {"test mean_iou", "test pixel_accuracy", "test loss"} <= {*frame.columns} and len(frame) == 4
    assert result.plan.channels_removed and result.equivalence.merged_from_trained < 1e-4
    merged = load_pruned(tmp_path / "run" / "merged", model=own_parts.model())
    values = evaluate(merged, own_parts.data().batches("val", 4), task="segmentation").values
    assert values == pytest.approx(dict(result.measured["merged"].metrics.values))
    assert read_job(tmp_path / "run") == job()
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    assert stored["models"]["merged"]["metrics"]["directions"]["mean_iou"] == "higher"
    run, measured = Run.open(tmp_path / "run"), result.measured
    last, best = run.table(), run.table("best_on_test")
    assert last["test mean_iou"].tolist() == [m.metrics.values["mean_iou"] for m in measured.values()]
    assert best["test mean_iou (best epoch, picked on test)"].iloc[-1] == result.histories["merged"].best.headline[1]
    for shown in (repr(result), result._repr_html_(), run._repr_html_()):
        assert "test mean_iou ↑" in shown and "test loss ↓" in shown
    with pytest.raises(ValueError, match="none of 1 runs has finished with a fine-tuned classifier"):
        results_table([run])
    report = write_job_report(result, tmp_path / "report.html").read_text()
    assert "mean iou (higher is better)" in report


def test_a_job_without_labels(tmp_path):
    result = run_job(job(task="outputs"), tmp_path / "run", progress=False)
    assert [*result.measured["original"].metrics.values.values()] == pytest.approx([1.0, 0.0], abs=1e-6)
    assert result.measured["pruned"].metrics.values["relative_error"] > 0


def test_criteria_that_want_a_loss_an_example_are_refused_before_training(tmp_path, monkeypatch):
    """The mean over a batch, as contrastive losses are."""
    whole = dataclasses.replace(
        TASKS["segmentation"], losses=lambda *given: TASKS["segmentation"].losses(*given).mean()
    )
    monkeypatch.setattr(own_parts, "task", lambda: whole)
    message = "criterion 'hessian' takes rows of single examples, and the loss of task 'segmentation' is one a batch"
    with pytest.raises(ValueError, match=message):
        run_job(job(criterion="hessian", pretrain=Recipe(epochs=1, batch_size=4)), tmp_path / "run", progress=False)
    assert not [*(tmp_path / "run").glob("training_*")]
    with pytest.raises(ValueError, match=message.replace("hessian", "jacobian")):
        rows = ["random", ("jacobian", {"rows": "sample"})]
        compare_criteria(own_parts.model(), own_parts.data(), rows, task=whole, steps=1, batches=1, progress=False)


def test_a_job_says_nothing_of_the_task_that_was_the_only_one():
    plain = PruningJob(model="resnet20", data="digits", target=Target(ratio=0.3), weights="file").to_dict()
    assert "task" not in plain and PruningJob.from_dict(plain).task == "classification"
    assert PruningJob.from_dict(job().to_dict()) == job()


def test_commands_take_one_s_own(tmp_path, capsys):
    own = ["--data", "own_parts:data", "--task", "segmentation", "--device", "cpu"]
    main(["evaluate", "own_parts:model", *own])
    assert "segmentation: mean_iou " in capsys.readouterr().out
    few = ["--batches", "2", "--batch-size", "4", "--steps", "2", "--ratio", "0.3"]
    main(
        [
            "compare",
            "--model",
            "own_parts:model",
            *own,
            *few,
            "--criteria",
            "l1",
            "--repeats",
            "1",
            "--out",
            str(tmp_path / "c"),
        ]
    )
    assert "area (train_mean_iou over params left)" in capsys.readouterr().out
    main(["prune", "--model", "own_parts:model", *own, *few, "--out", str(tmp_path / "p")])
    assert "test mean_iou" in capsys.readouterr().out


WRONG = {
    "own_parts:modle": "'own_parts:modle' is no function that could be called without arguments: .*modle",
    "own_partz:model": "'own_partz:model' is no function that could be called without arguments: No module",
    "own_parts:NOT_A_FUNCTION": "'own_parts:NOT_A_FUNCTION' is no function .*not callable",
    "own_parts:nothing": "'own_parts:nothing' returned NoneType; expected a network",
}


@pytest.mark.parametrize(("name", "message"), WRONG.items())
def test_what_does_not_exist_or_is_something_else(name, message):
    with pytest.raises(ValueError, match=message):
        find_model(name, None, None)


def test_what_returns_something_else():
    with pytest.raises(ValueError, match=r"returned NoneType; expected Data or a pair \(train, val\)"):
        find_data("own_parts:nothing")
    with pytest.raises(ValueError, match="'own_parts:model' returned Segmenter; expected a Task"):
        own_task("own_parts:model")
    with pytest.raises(ValueError, match="'own_parts:model' returns a network as it is: give no weights"):
        job(weights="file.pth")
    found = find_data("own_parts:pair")
    assert isinstance(found, Data) and (len(found.train), len(found.val), found.name) == (8, 4, "own_parts:pair")


def test_names_of_libraries_are_not_imported():
    assert [is_own(name) for name in ("resnet20", "torchvision:resnet18", "timm:vit", "a.b:c", "C:\\file")] == [
        False,
        False,
        False,
        True,
        False,
    ]


def test_a_command_without_weights_or_with_another_task_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--model", "resnet20", "--data", "digits", "--out", str(tmp_path / "c")])
    assert "which weights of 'resnet20'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", "own_parts:model", "--data", "own_parts:data", "--task", "language_model"])
    assert "task 'language_model' does not fit Segmenter" in capsys.readouterr().err
