"""A job from end to end, tiny: its checks, what it promises, and that held-out images decide nothing."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from obc_tools.data.data import load_data
from obc_tools.files import FolderInUseError, entries, held, read_json, write_json
from obc_tools.models.networks import load_model
from obc_tools.models.store import load_pruned
from obc_tools.pruning.check import ProofError
from obc_tools.pruning.choices import Target
from obc_tools.pruning.compensation import compensate
from obc_tools.pruning.plan import PruningPlan
from obc_tools.runs import pipeline
from obc_tools.runs.job import (
    COMPENSATED,
    ENTRIES,
    MERGED,
    NAIVE,
    ORIGINAL,
    PRUNED,
    SPARSE,
    PruningJob,
    RunFolderError,
    check_run_folder,
    find_device,
    read_results,
)
from obc_tools.runs.pipeline import EquivalenceError, _check_equal, perform, prepare, run_job, work_on
from obc_tools.runs.report import Table, job_sections
from obc_tools.training.folder import Stopped
from obc_tools.training.recipe import Recipe

TINY = PruningJob(
    title="tiny",
    model="resnet8",
    data="digits",
    model_options={"width": 4},
    target=Target(speedup=1.5),
    batches=2,
    batch_size=64,
    steps=3,
    pretrain=Recipe(epochs=2, lr=0.1, batch_size=128, augment=False),
    finetune=Recipe(epochs=1, lr=0.02, batch_size=128, augment=False),
    equivalent=True,
    device="cpu",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The tiny job's result and its folder."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return run_job(TINY, folder, progress=False), folder


def test_all_models_are_measured_and_the_target_is_met(run):
    result, _ = run
    assert list(result.measured) == [ORIGINAL, PRUNED, NAIVE, MERGED]
    macs = {key: measured.cost.macs for key, measured in result.measured.items()}
    assert macs[PRUNED] == macs[NAIVE] == macs[MERGED] <= macs[ORIGINAL] / 1.5
    assert {measured.metrics.examples for measured in result.measured.values()} == {359}
    assert result.measured[NAIVE].metrics.loss < result.measured[PRUNED].metrics.loss


def test_equivalent_pruning_keeps_its_promises(run):
    result, _ = run
    assert result.equivalence.start_from_naive <= 1e-4
    assert result.equivalence.merged_from_trained <= 1e-4
    assert result.equivalence.merged_from_naive > 1e-3
    assert result.equivalence.merged_loads_into_naive
    shapes = [
        {key: value.shape for key, value in result.models[name].state_dict().items()} for name in (PRUNED, MERGED)
    ]
    assert shapes[0] == shapes[1]


def test_fine_tuning_begins_where_compensation_ends(tmp_path):
    finetune = replace(TINY.finetune, epochs=2)
    job = replace(TINY, compensate=True, speeds=True, finetune=finetune, target=Target(speedup=3.0))
    result = run_job(job, tmp_path / "run", progress=False)
    assert list(result.measured) == [ORIGINAL, PRUNED, COMPENSATED, NAIVE, MERGED]
    losses = {key: measured.metrics.loss for key, measured in result.measured.items()}
    assert losses[COMPENSATED] < losses[PRUNED]
    batches = prepare(job).calibration_batches().at(0)
    again = compensate(result.models[ORIGINAL], result.plan, batches)
    for key, value in result.models[COMPENSATED].state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    assert result.equivalence.start_from_naive <= 1e-4
    assert result.table()["model"].tolist()[2] == "pruned and compensated, no fine-tuning"
    assert "starts where the compensated network starts" in next(job_sections(result)).text
    figures = read_results(tmp_path / "run")
    assert figures["job"]["compensate"] and figures["models"]["compensated"]["metrics"]["loss"] == losses[COMPENSATED]
    assert figures["reloaded"]["compensated"]["bit_equal_logits"]
    assert {(row["runtime"], row["examples"]) for row in figures["speeds"]} >= {("eager", 1), ("onnxruntime", 32)}
    tables = [section for section in job_sections(result) if isinstance(section, Table)]
    assert [table.heading for table in tables] == ["Results", "Latency on this machine"]
    assert "MACs of one example, of the operations that run." in tables[0].caption
    assert set(tables[1].frame["model"]) == set(result.table()["model"].iloc[[0, 1, 4]])


def test_a_run_stopped_at_the_compensated_start_ends_as_one_that_was_not(tmp_path):
    job = replace(TINY, compensate=True, pretrain=replace(TINY.pretrain, epochs=1))
    whole = perform(prepare(job), progress=False)
    with pytest.raises(Stopped):
        steps = iter(range(10_000))
        work_on(job, tmp_path / "run", stop=lambda: next(steps) > 18, progress=False)
    assert (tmp_path / "run" / "training_naive").is_dir()
    resumed = work_on(job, tmp_path / "run", progress=False)
    for key in (COMPENSATED, NAIVE, MERGED):
        assert resumed.measured[key].metrics == whole.measured[key].metrics


def killed_while_pruning(job, folder, monkeypatch, steps):
    """Work on a job until so many pruning steps are kept."""
    kept = pipeline._keep_stage

    def keep_and_die(path, stage):
        kept(path, stage)
        if stage.step == steps:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "_keep_stage", keep_and_die)
        work_on(job, folder, progress=False)


def test_a_run_killed_while_pruning_goes_on_at_its_step(tmp_path, monkeypatch):
    """Calibration images differ from step to step, and are those of an undisturbed run after a resume."""
    job = replace(TINY, steps=6, finetune=None, equivalent=False, pretrain=replace(TINY.pretrain, epochs=1))
    whole = work_on(job, tmp_path / "whole", progress=False)
    steps = read_json(tmp_path / "whole" / "pruning.json")["step"]
    assert steps > 1
    for step in (1, steps):
        killed_while_pruning(job, tmp_path / "run", monkeypatch, step)
        assert not (tmp_path / "run" / "plan.json").is_file()
    assert work_on(job, tmp_path / "run", progress=False).plan == whole.plan
    log = (tmp_path / "run" / "run.log").read_text()
    assert all(f"pruning goes on after step {step}" in log for step in (1, steps))


@pytest.mark.parametrize("name", ["plan.json", "pruning.json", "job.json", "results.json"])
def test_a_digit_that_was_changed_is_noticed(name, run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run[1], folder)
    text = (folder / name).read_text()
    place = next(place for place in range(len(text) // 2, len(text)) if text[place] in "012345678")
    (folder / name).write_text(text[:place] + str(int(text[place]) + 1) + text[place + 1 :])
    with pytest.raises(ValueError, match=f"{name}' was changed after it was written"):
        if name == "results.json":
            read_results(folder)
        work_on(TINY, folder, progress=False)


def test_results_say_everything(run):
    result, folder = run
    results = read_results(folder)
    assert {*entries(folder)} == {
        *("job.json", "run.log", "results.json", "plan.json", "pruning.json", "original.safetensors"),
        *("pruned", "naive", "merged"),
        *(f"history_{key}.csv" for key in ("original", "naive", "merged")),
        *(f"training_{key}" for key in ("original", "naive", "merged")),
    }
    assert {*entries(folder)} < ENTRIES
    assert results["job"]["finetune"] == TINY.finetune.to_dict()
    assert results["job"]["target"]["speedup"] == 1.5
    assert results["equivalence"]["merged_loads_into_naive"]
    assert set(results["environment"]["libraries"]) >= {"torch", "torch-pruning", "obc_tools"}
    for key, measured in result.measured.items():
        assert results["models"][key]["metrics"]["accuracy"] == measured.metrics.accuracy
        assert results["models"][key]["median_latency_ms"] > 0
    for key in (PRUNED, NAIVE, MERGED):
        assert results["reloaded"][key]["bit_equal_logits"]
        assert results["reloaded"][key]["accuracy"] == result.measured[key].metrics.accuracy
    assert [len(history) for history in results["histories"].values()] == [2, 1, 1]


def test_a_new_process_loads_the_same_logits_without_pickle(run, tmp_path):
    result, folder = run
    images, _ = next(iter(load_data("digits").batches("val", 64)))
    torch.save(images, tmp_path / "images.pt")
    script = (
        "import sys, torch; from obc_tools.models.store import load_pruned; folder, path = sys.argv[1:]; "
        "torch.save(load_pruned(folder)(torch.load(path + '/images.pt', weights_only=True)), path + '/logits.pt')"
    )
    subprocess.run([sys.executable, "-c", script, folder / MERGED, tmp_path], check=True)
    with torch.no_grad():
        expected = result.models[MERGED].eval()(images)
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)
    assert {path.suffix for path in (folder / MERGED).iterdir()} == {".safetensors", ".json"}


def test_the_trained_original_can_be_pruned_again_without_fine_tuning(run, tmp_path):
    _, folder = run
    weights = str(folder / "original.safetensors")
    job = replace(TINY, weights=weights, pretrain=None, finetune=None, equivalent=False)
    result = run_job(job, tmp_path / "again", progress=False)
    assert list(result.measured) == [ORIGINAL, PRUNED]
    assert result.plan.kept == run[0].plan.kept
    assert result.equivalence is None and not result.histories
    assert load_pruned(tmp_path / "again" / PRUNED)(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_a_job_gives_the_same_results_again_and_held_out_images_decide_nothing(run, monkeypatch):
    """With other held-out images (here: a few of them) all weights and the plan come out the same."""
    inputs = prepare(TINY)
    monkeypatch.setattr(
        type(inputs), "held_out_batches", lambda self, share=(0, 1): self.data.batches("val", 32).first(1)
    )
    result = perform(inputs, progress=False)
    assert result.plan.kept == run[0].plan.kept
    for key, model in result.models.items():
        expected = run[0].models[key].state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert result.measured[ORIGINAL].metrics.examples == 32


def test_both_fine_tunings_see_the_same_images_and_every_pruning_step_sees_others():
    inputs = prepare(TINY)
    recipe = replace(TINY.finetune, augment=True)
    one, other = (inputs.training_batches(recipe).at(0) for _ in range(2))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(one, other, strict=True))
    calibration = inputs.calibration_batches()
    first, second = list(calibration), list(calibration)
    assert len(first) == len(second) == 2
    assert not torch.equal(first[0][0], second[0][0])


def test_a_repr_is_the_table(run):
    text = repr(run[0])
    assert "Equivalent Pruning, merged" in text and "CPU latency (ms)" in text
    assert "<table" in run[0]._repr_html_()
    assert run[0].to_frame()["speed-up"].iloc[0] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"criterion": "jacobain"}, "unknown criterion 'jacobain'; closest: jacobian"),
        ({"scope": "everywhere"}, "unknown scope 'everywhere'"),
        ({"group_reduction": "median"}, "unknown group_reduction 'median'"),
        ({"normalizer": "l7"}, "unknown normalizer 'l7'"),
        ({"steps": 0}, "steps=0: expected at least 1"),
        ({"batches": 0}, "batches=0: expected at least 1"),
        ({"pretrain": None}, "give either weights or a recipe"),
        ({"finetune": None}, "at least 1 epoch"),
        ({"round_to": 0}, "round_to=0"),
        ({"max_ratio": 0.0}, "max_ratio=0.0"),
        ({"last_step": "half"}, "unknown last_step 'half'"),
        ({"batch_size": 2.5}, "batch_size=2.5: expected at least 1 .a whole number"),
        ({"only": "heads"}, "unknown only 'heads'"),
    ],
)
def test_a_job_is_checked_when_built(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": Target(speedup=1000)}, "the best"),
        ({"target": Target(ratio=0.5), "round_to": 64}, "ratio=0.5 cannot be met: the best that can be had is ratio=0"),
        ({"target": Target(ratio=0.5), "num_classes": 7}, "model has 7 outputs, data has 10 classes"),
        ({"batches": 1000}, "take: 1000 batches were asked for"),
        ({"ignore": ("nosuch",)}, "nosuch"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not there"),
        ({"model": "vgg11", "model_options": {"in_channels": 3}}, "VGG cannot work on"),
    ],
)
def test_what_is_wrong_is_raised_before_training(change, message, monkeypatch):
    monkeypatch.setattr("obc_tools.runs.pipeline.fit", None)
    with pytest.raises(ValueError, match=message):
        prepare(replace(TINY, **change))


def test_finds_devices():
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ValueError, match="unknown device 'gpu'; known are auto, cpu"):
        find_device("gpu")


def test_networks_that_differ_are_reported():
    _check_equal(1e-5, "one and other")
    with pytest.raises(EquivalenceError, match="one and other: logits differ by up to 0.5"):
        _check_equal(0.5, "one and other")
    with pytest.raises(EquivalenceError):
        _check_equal(float("nan"), "one and other")


def test_only_a_run_is_overwritten(tmp_path):
    check_run_folder(tmp_path / "free", overwrite=False)
    check_run_folder(tmp_path, overwrite=False)
    (tmp_path / "results.json").write_text(json.dumps({"format": 1}))
    check_run_folder(tmp_path, overwrite=True)
    with pytest.raises(RunFolderError, match=r"already holds a run: .*--overwrite"):
        check_run_folder(tmp_path, overwrite=False)
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunFolderError, match=r"something else than a run \(thesis.tex\)"):
        check_run_folder(tmp_path, overwrite=True)
    with pytest.raises(RunFolderError, match="is a file"):
        check_run_folder(tmp_path / "thesis.tex", overwrite=True)


def test_a_run_killed_at_its_first_write_begins_anew(tmp_path):
    """All that it left is the temporary file of its job, by the name of this version or of one before."""
    for name in (".job.json.new", f".job.json.{'0' * 32}.new"):
        (tmp_path / name).write_text("{")
    check_run_folder(tmp_path, overwrite=False)
    (tmp_path / "job.json").write_text(json.dumps(TINY.to_dict()))
    with pytest.raises(RunFolderError, match="already holds a run"):
        check_run_folder(tmp_path, overwrite=False)
    check_run_folder(tmp_path, overwrite=True)


def test_a_folder_that_is_worked_on_is_left_alone(tmp_path):
    """Neither by a run in the foreground nor by one that appears when all is done; a dead one's leftovers go."""
    folder, dead = tmp_path / "run", tmp_path / f".run.{'0' * 32}.new"
    dead.mkdir()
    (tmp_path / f".other.{'0' * 32}.new").mkdir()
    with held(folder):
        for work in (work_on, run_job):
            with pytest.raises(FolderInUseError, match="is being worked on by process"):
                work(TINY, folder, progress=False)
    assert not folder.exists()
    with pytest.raises(ValueError, match="cannot be met"):
        run_job(replace(TINY, target=Target(speedup=1e6)), folder, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == [f".other.{'0' * 32}.new"]


def test_a_job_that_was_interrupted_goes_on_where_it_was(tmp_path, monkeypatch):
    """Its plan is not sought again, and the figures are those of one that went through; another job begins anew."""
    folder, job = tmp_path / "run", replace(TINY, equivalent=False)
    begun, plain = tmp_path / ".run.begun.new", pipeline.fit

    def interrupted(*arguments, **options):
        if "naive" in str(options["run"]):
            raise KeyboardInterrupt
        return plain(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr("obc_tools.runs.pipeline.fit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_job(job, folder, progress=False)
    assert not folder.exists() and read_json(begun / "plan.json")
    with monkeypatch.context() as patched:
        patched.setattr(pipeline.Stages, "_plan", lambda self, model, path: pipeline._read_plan(path))
        result = run_job(job, folder, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    whole = run_job(job, tmp_path / "whole", progress=False)
    assert result.plan == whole.plan
    for key, measured in whole.measured.items():
        assert result.measured[key].metrics == measured.metrics

    begun.mkdir()
    write_json(begun / "job.json", replace(job, seed=5).to_dict(), checked=True)
    (begun / "plan.json").write_text("of another job")
    assert run_job(job, folder, progress=False, overwrite=True).plan == whole.plan
    assert not begun.exists()


def test_weights_of_a_sparse_training_are_read_before_the_original_trains(tmp_path, monkeypatch):
    """And nothing is written, so that the mended job is not another one than the folder holds."""
    missing = replace(TINY, sparse_weights=str(tmp_path / "none.pth"))
    seven = load_model("resnet8", 7, in_channels=1, width=4)
    save_file(seven.state_dict(), tmp_path / "seven.safetensors")
    with monkeypatch.context() as patched:
        patched.setattr("obc_tools.runs.pipeline.fit", None)
        with pytest.raises(ValueError, match=r"weights file '.*none.pth' does not exist"):
            work_on(missing, tmp_path / "run", progress=False)
        with pytest.raises(ValueError, match="seven.safetensors: file has 7 classes, model asked for 10"):
            work_on(replace(missing, sparse_weights=str(tmp_path / "seven.safetensors")), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    save_file(load_model("resnet8", 10, in_channels=1, width=4).state_dict(), tmp_path / "right.safetensors")
    mended = replace(missing, sparse_weights=str(tmp_path / "right.safetensors"), finetune=None, equivalent=False)
    assert list(work_on(mended, tmp_path / "run", progress=False).measured) == [ORIGINAL, SPARSE, PRUNED]


def test_reading_what_is_no_run(tmp_path):
    with pytest.raises(RunFolderError, match="holds no run"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(RunFolderError, match="not of format 1"):
        read_results(tmp_path)


def test_a_refused_plan_is_kept(tmp_path, monkeypatch):
    job = replace(TINY, pretrain=Recipe(epochs=1), finetune=None, equivalent=False, criterion="l1", steps=1)

    def refuse(model, plan, *args, **options):
        raise ProofError("the plan is wrong", plan)

    def prepared(job):
        inputs = prepare(job)
        monkeypatch.setattr("obc_tools.pruning.prune.prove", refuse)
        return inputs

    monkeypatch.setattr("obc_tools.runs.pipeline.prepare", prepared)
    with pytest.raises(ProofError, match="the plan is wrong; the plan is kept in '.*run/refused_plan.json'") as raised:
        work_on(job, tmp_path / "run", progress=False)
    kept = PruningPlan.from_json((tmp_path / "run" / "refused_plan.json").read_text())
    assert kept == raised.value.plan and not (tmp_path / "run" / "plan.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr("obc_tools.runs.pipeline.prepare", prepared)
    place = tmp_path / "whole.refused_plan.json"
    with pytest.raises(ProofError) as raised:
        run_job(job, tmp_path / "whole", progress=False)
    assert str(raised.value) == f"the plan is wrong; the plan is kept in '{place}'"
    assert PruningPlan.from_json(place.read_text()) == kept and not (tmp_path / "whole").exists()
