"""Runs whose folders are damaged, or of another version, are shown as such, and hide no other."""

import logging

import pytest
from run_folders import write
from terminal import run

from obc_tools import Run, find_runs, results_table
from obc_tools.files import read_json, write_json


def newer(folder):
    write_json(folder / "job.json", read_json(folder / "job.json") | {"phase": "moon"}, checked=True)


DAMAGES = {
    "no job any more": (lambda folder: (folder / "job.json").write_text(""), "holds no job"),
    "a newer version": (newer, "a job has no phase"),
    "half a progress": (lambda folder: (folder / "process.json").write_text('{"pid": 1'), "cannot be read"),
    "nested": (lambda folder: (folder / "job.json").write_text("[" * 100_000), "nested too deeply"),
    "no text": (lambda folder: (folder / "job.json").write_bytes(b"\x80{"), "job.json' cannot be read: 'utf-8' codec"),
    "a list": (lambda folder: (folder / "job.json").write_text("[1, 2]"), "holds no job"),
}


def test_a_line_that_is_no_text_is_left_out(tmp_path):
    metrics = write(tmp_path / "a", done=2, running=False) / "training_naive" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + b'{"epoch": 3, "\x80')
    assert len(Run.open(tmp_path / "a").histories["naive"]) == 2


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_shown_and_the_others_too(damage, said, tmp_path, capsys):
    for name in "abc":
        write(tmp_path / name, running=False)
    damage(write(tmp_path / "b"))
    assert run("runs", tmp_path) == 0
    printed = capsys.readouterr().out
    assert all(f"Run('{tmp_path / name}'): tiny, stopped" in printed for name in "ac")
    assert f"Run('{tmp_path / 'b'}'): cannot be read: " in printed
    assert said in printed
    assert run("runs", tmp_path / "b") == 2


def test_a_half_written_epoch_is_left_out_and_named(tmp_path, capsys, caplog):
    for name in "ab":
        write(tmp_path / name, done=2, running=False)
    metrics = tmp_path / "a" / "training_naive" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"epoch": 3, "lr"')
    with caplog.at_level(logging.WARNING, "obc_tools"):
        assert run("runs", tmp_path) == 0
    assert f"'{metrics}': line 3 is no whole epoch and is left out" in caplog.text
    assert capsys.readouterr().out.count("epoch 2") == 2


def test_a_deleted_history_leaves_the_run(tmp_path, capsys):
    (write(tmp_path / "a", running=False) / "training_naive" / "metrics.jsonl").unlink()
    assert run("runs", tmp_path) == 0
    assert "tiny, stopped" in capsys.readouterr().out


def test_tables_leave_damaged_runs_out_and_name_them(tmp_path, caplog):
    good, bad = (write(tmp_path / name, running=False) for name in ("good", "bad"))
    newer(bad)
    with caplog.at_level(logging.WARNING, "obc_tools"):
        assert [found.folder for found in find_runs(tmp_path)] == [good]
    assert f"left out: '{bad}' holds no job: a job has no phase" in caplog.text
    (good / "results.json").write_text('{"format": 99}')
    assert Run.open(good).status == "finished"
    with pytest.raises(ValueError, match="none of 1 runs has finished"):
        results_table(tmp_path)
    assert "is not of format 1" in caplog.text


def test_a_job_that_is_damaged_while_it_is_watched_is_left_out(tmp_path, caplog):
    watched = Run.open(write(tmp_path / "a", running=False))
    (tmp_path / "a" / "results.json").write_text('{"format": 99}')
    newer(tmp_path / "a")
    with caplog.at_level(logging.WARNING, "obc_tools"), pytest.raises(ValueError, match="none of 1 runs has finished"):
        results_table([watched])
    assert "left out: " in caplog.text and "a job has no phase" in caplog.text
