"""Watching runs: the curves of a look, and the monitor without a browser, on folders as runs leave them."""

import json
import shutil
import threading
import time

import pytest
from run_folders import PLACE, detections, write

from obc_tools.plots.curves import watch_figure
from obc_tools.runs.job import RunFolderError
from obc_tools.runs.run import Run
from obc_tools.runs.watch import POINTS, LiveCurve, Point, RunView, describe, look_at, seconds_left, watch_traces
from obc_tools.training.folder import TrainingFolder
from obc_tools.training.stepper import Where
from obc_tools.widgets.monitor import RunMonitor


def point(epoch):
    return Point(epoch, 1.0, 0.5, 0.1, 10.0)


def test_a_curve_is_bounded_and_spread_over_the_training():
    curve = LiveCurve()
    for number in range(20 * POINTS):
        curve = curve.add(point(number / 100))
    assert POINTS / 2 <= len(curve.points) <= POINTS
    gaps = {round(b.epoch - a.epoch, 6) for a, b in zip(curve.points, curve.points[1:], strict=False)}
    assert gaps == {curve.stride / 100}
    assert curve.points[-1].epoch > 0.95 * 20 * POINTS / 100


def test_a_point_is_seen_once_and_a_resumed_training_goes_back():
    curve = LiveCurve().add(point(0.5)).add(point(1.0))
    assert curve.add(point(1.0)) == curve
    assert [p.epoch for p in curve.add(point(0.75)).points] == [0.5, 0.75]


def test_a_look_reads_a_run(tmp_path):
    run = Run.open(write(tmp_path))
    view = look_at(run)
    assert (view.status, len(view.epochs["naive"]), view.live["naive"].points) == (
        "running",
        1,
        (Point(1.5, 0.5, 0.75, 0.1, 1234.5),),
    )
    write(tmp_path, step=7)
    assert [p.epoch for p in look_at(run, view).live["naive"].points] == [1.5, 1.7]
    assert seconds_left(view) == 2.5 * 60
    assert describe(view, now=view.place[1]["time"]) == (
        "running: naive fine-tuning, epoch 2 of 4, step 5 of 10; loss 0.5000; accuracy 75.00%; learning rate 0.1; "
        "1,234 examples/s; at most 3.00 GiB on the GPU; about 2 min 30 s left in this training"
    )
    assert describe(view, now=view.place[1]["time"] + 7260).endswith("last heard of 2 h 01 min ago")


def test_looks_without_figures():
    assert describe(RunView("interrupted")) == "interrupted"
    assert describe(RunView("failed", error="ValueError: no")) == "failed: ValueError: no"
    bare = {key: PLACE[key] for key in ("epoch", "step", "steps", "lr", "epochs")} | {"time": 0.0, "loss": None}
    view = RunView("running", place=("naive", bare))
    assert describe(view, now=1.0).endswith("step 5 of 10; learning rate 0.1")
    assert seconds_left(view) is None


def test_several_runs_lie_over_each_other(tmp_path):
    views = {name: look_at(Run.open(write(tmp_path / name, done=2))) for name in ("naive", "EP")}
    figure = watch_figure(watch_traces(views), look="dark")
    assert {trace.name for trace in figure.data} == {
        f"{run}: naive fine-tuning, {seen}" for run in ("naive", "EP") for seen in ("validation", "training")
    }
    assert len({trace.line.color for trace in figure.data}) == 2
    losses = next(t for t in figure.data if tuple(t.meta) == ("EP", "naive", 0, "epochs"))
    accuracies = next(t for t in figure.data if tuple(t.meta) == ("EP", "naive", 1, "epochs"))
    assert (list(losses.y), list(accuracies.y)) == ([1.5, 0.75], [60.0, 60.0])
    assert [axis.title.text for axis in figure.select_yaxes()] == [
        "loss",
        "accuracy (%)",
        "learning rate",
        "examples/s",
    ]


def test_the_headline_of_another_task_is_drawn_and_named(tmp_path):
    monitor = RunMonitor(write(tmp_path, done=2, made=detections, accuracy=None), every=None)
    by_meta = {tuple(trace.meta): trace for trace in monitor.figure.data}
    assert list(by_meta["run", "naive", 1, "epochs"].y) == [pytest.approx(0.3), 0.4]
    titles = [axis.title.text for axis in monitor.figure.select_yaxes()]
    assert titles == ["loss", "map50 (higher is better)", "learning rate", "examples/s"]
    assert "loss 0.5000; learning rate 0.1" in monitor.lines.value
    mixed = {"a": tmp_path, "b": write(tmp_path / "b", done=2)}
    titles = [axis.title.text for axis in RunMonitor(mixed, every=None).figure.select_yaxes()]
    assert titles[1] == "map50 (higher is better), accuracy (%)"


def test_the_monitor_follows(tmp_path):
    monitor = RunMonitor(write(tmp_path), every=None)
    assert "epoch 2 of 4, step 5 of 10" in monitor.lines.value
    assert "line 39 &lt;b&gt;" in monitor.tail.value and "line 2 " not in monitor.tail.value
    assert not monitor.stop_button.disabled and monitor.resume_button.disabled
    write(tmp_path, done=2, epoch=3)
    write(tmp_path, key="merged", done=1)
    monitor.refresh()
    assert len(monitor.figure.data) == 16
    by_meta = {tuple(trace.meta): trace for trace in monitor.figure.data}
    assert list(by_meta["run", "naive", 0, "epochs"].x) == [1, 2]
    assert list(by_meta["run", "merged", 3, "epochs"].y) == [900.0]
    assert by_meta["run", "merged", 3, "epochs"].yaxis == "y4"


def test_an_epochs_learning_rate_stands_where_it_began(tmp_path):
    monitor = RunMonitor(write(tmp_path, done=2), every=None)
    by_meta = {tuple(trace.meta): trace for trace in monitor.figure.data}
    assert list(by_meta["run", "naive", 2, "epochs"].x) == [0, 1]
    assert list(by_meta["run", "naive", 0, "epochs"].x) == [1, 2]
    shown = [trace.name for trace in monitor.figure.data if trace.showlegend]
    assert shown == ["naive fine-tuning, validation", "naive fine-tuning, training"]


def test_the_picture_says_why_a_run_failed(tmp_path):
    (write(tmp_path, running=False) / "error.json").write_text(
        json.dumps({"error": "ValueError: a <b> of 3 > 2 " + 99 * "x"})
    )
    monitor = RunMonitor(tmp_path, every=None)
    (told,) = (note for note in monitor.figure.layout.annotations if "failed" in note.text)
    assert told.text.startswith("run failed: ValueError: a &lt;b&gt; of 3 &gt; 2 xxx") and told.text.endswith("x …")
    assert not watch_figure(watch_traces(monitor.views)).layout.annotations


def test_stop_and_resume_are_asked_for(tmp_path, monkeypatch):
    monitor = RunMonitor(Run.open(write(tmp_path)), every=None)
    monitor.stop_button.click()
    assert (tmp_path / "stop").is_file() and "it will stop" in monitor.said.value
    write(tmp_path, running=False)
    monitor.refresh()
    assert monitor.stop_button.disabled and not monitor.resume_button.disabled
    assert "run.resume()" in monitor.code.value and str(tmp_path) in monitor.code.value
    asked = []
    monkeypatch.setattr(Run, "resume", lambda run: asked.append(run.folder))
    monitor.resume_button.click()
    assert asked == [tmp_path.resolve()] and "resumed" in monitor.said.value

    def refuse(run):
        raise RunFolderError("it is being worked on")

    monkeypatch.setattr(Run, "resume", refuse)
    monitor.resume_button.click()
    assert "it is being worked on" in monitor.said.value


def test_it_looks_by_itself_until_it_is_closed(tmp_path):
    monitor = RunMonitor({"a": write(tmp_path)}, every=0.01)
    write(tmp_path, step=9)
    end = time.monotonic() + 20
    while "step 9" not in monitor.lines.value and time.monotonic() < end:
        time.sleep(0.01)
    assert "step 9" in monitor.lines.value
    monitor.close()
    write(tmp_path, step=10)
    time.sleep(0.1)
    assert "step 10" not in monitor.lines.value


def test_a_run_whose_folder_is_deleted_is_said_to_be_gone(tmp_path):
    write(tmp_path / "a")
    monitor = RunMonitor(tmp_path / "a", every=None)
    seen = monitor.figure
    shutil.rmtree(tmp_path / "a")
    for act in (monitor.refresh, monitor.stop, monitor.resume):
        act()
        assert "is gone: shown is the last that was seen of it" in monitor.lines.value
        assert monitor.stop_button.disabled and monitor.resume_button.disabled and monitor.figure == seen
    assert not (tmp_path / "a").exists() and monitor.said.value
    write(tmp_path / "a", done=2, epoch=3)
    monitor.refresh()
    assert "epoch 3" in monitor.lines.value and not monitor.stop_button.disabled and not monitor.said.value


def test_an_error_of_a_look_is_gone_after_one_that_works(tmp_path, monkeypatch):
    monitor, failing = RunMonitor(write(tmp_path), every=None), threading.Event()

    def look(run, before):
        if failing.is_set():
            raise OSError("no such device")
        return look_at(run, before)

    monkeypatch.setattr("obc_tools.widgets.monitor.look_at", look)
    failing.set()
    threading.Thread(target=monitor._watch, args=(0.01,), daemon=True).start()
    for said in (True, False):
        end = time.monotonic() + 20
        while ("no such device" in monitor.said.value) != said and time.monotonic() < end:
            time.sleep(0.01)
        assert ("no such device" in monitor.said.value) == said
        failing.clear()
    monitor.close()


def test_who_waits_sees_the_end(tmp_path, monkeypatch):
    monitor = RunMonitor(write(tmp_path), every=None)
    with pytest.raises(TimeoutError, match="still runs"):
        monitor.wait(0.01)
    write(tmp_path, running=False, step=9)
    assert monitor.wait(0.01) is monitor and "step 9" in monitor.lines.value


def test_the_code_runs_as_it_stands(tmp_path):
    monitor, namespace = RunMonitor(write(tmp_path, running=False), every=None), {}
    exec("\n".join(monitor.code.value.splitlines()[:-1]), namespace)
    assert namespace["run"].folder == tmp_path


def test_wrong_runs_are_refused(tmp_path):
    with pytest.raises(RunFolderError, match="holds no job"):
        RunMonitor(tmp_path, every=None)
    with pytest.raises(ValueError, match="no run to watch"):
        RunMonitor({})


def test_a_note_has_the_figures_and_null_for_what_is_not_finite(tmp_path, monkeypatch):
    monkeypatch.setattr("obc_tools.training.folder.SECONDS_BETWEEN_NOTES", 1000.0)
    folder = TrainingFolder(tmp_path)
    assert not folder.is_note_due()
    folder.note(Where(1, 2, 3, 0.1), 4, {"loss": float("nan"), "accuracy": 0.5, "gpu_memory": None})
    written = json.loads((tmp_path / "progress.json").read_text())
    assert (written["loss"], written["accuracy"], written["gpu_memory"], written["epochs"]) == (None, 0.5, None, 4)
