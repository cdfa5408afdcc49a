"""The study of Equivalent Pruning at a tiny size, killed and gone on with; its tables on rows that are made up."""

import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import equivalent_report
import equivalent_study
import pandas as pd
import pytest
import torch
from equivalent_report import differences, markdown, pairs, plot_curves, plot_differences, read_table, tuning
from equivalent_study import COLUMNS, LADDER, Block, Cell, Study, Training, make_training, next_rungs, trainings_of

import obc_tools as obc

BLOCK = Block(
    "tiny",
    images=40,
    original_epochs=1,
    epochs=(1, 2, 3),
    validation=20,
    calibration=1,
    steps=1,
    data="digits",
    width=4,
    batch_size=20,
)
LRS = {"naive": 0.03, "ep": 0.1}
MEASURED = [name for name in COLUMNS if name not in ("seconds", "cpu_seconds")]
NEEDED = trainings_of(BLOCK, LRS)[:4]


def study(folder: Path) -> Study:
    folder.mkdir(exist_ok=True)
    return Study(BLOCK, None, folder / "table.csv", folder / "work")


def measured(folder: Path) -> list[tuple]:
    """Return a table's rows without times, in an order of their own."""
    rows = equivalent_report.read_rows(folder / "table.csv")
    return sorted(tuple(row[name] for name in MEASURED) for row in rows)


def killed_in_the_middle(folder: Path) -> None:
    """Do the first trainings and kill this process at the end of the third one's first epoch, before any checkpoint."""
    work, count = study(folder), 0

    def kill(history: obc.History) -> None:
        nonlocal count
        count += 1
        if count == 2 * BLOCK.centre.epochs + 1:
            os.kill(os.getpid(), signal.SIGKILL)

    equivalent_study.Clock.__call__ = lambda clock, history: kill(history)
    equivalent_study.Clock.total = lambda clock, epochs: ""
    work._do(NEEDED)


def test_a_killed_study_goes_on_to_the_same_table(tmp_path):
    study(tmp_path / "whole")._do(NEEDED)
    program = (
        "import sys, pathlib, torch; torch.set_num_threads(1); from test_equivalent_study import killed_in_the_middle;"
        "killed_in_the_middle(pathlib.Path(sys.argv[1]))"
    )
    path = os.pathsep.join(str(Path(__file__).parents[1] / part) for part in (".", "benchmarks", "tests"))
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "killed")], env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == -signal.SIGKILL
    assert len(measured(tmp_path / "killed")) == 2
    again = study(tmp_path / "killed")
    again._do(NEEDED)
    assert measured(tmp_path / "killed") == measured(tmp_path / "whole")
    assert len(measured(tmp_path / "killed")) == 4


def test_what_is_done_is_skipped_and_a_table_is_never_half_written(tmp_path, monkeypatch):
    work = study(tmp_path / "a")
    work._do(NEEDED[:1])
    monkeypatch.setattr(Study, "train", lambda self, training: pytest.fail(f"{training} was done"))
    work._do(NEEDED[:1])
    before = work.table.read_text(encoding="utf-8")

    def dies(fresh: Path) -> None:
        fresh.write_text("half", encoding="utf-8")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        equivalent_study.write_whole(work.table, dies)
    assert work.table.read_text(encoding="utf-8") == before


def test_without_compressors_it_is_naive_fine_tuning(tmp_path):
    work = study(tmp_path / "a")
    naive, frozen, ep = (
        work.train(make_training(BLOCK, "run", method, LRS, 0, BLOCK.centre))
        for method in ("naive", "ep, C and D frozen", "ep")
    )
    assert frozen["test_loss"] == pytest.approx(naive["test_loss"], abs=1e-4)
    assert frozen["parameters"] == naive["parameters"] == ep["parameters"]
    assert abs(ep["test_loss"] - naive["test_loss"]) > 1e-4


def test_images_of_a_study_are_balanced_and_apart():
    data = obc.load_data("digits")
    part = equivalent_study.balanced(data, 200, 100)
    assert torch.bincount(part.train.labels).tolist() == [20] * 10
    assert torch.bincount(part.val.labels).tolist() == [10] * 10
    seen = {pixels.numpy().tobytes() for pixels in part.train.pixels}
    assert not [1 for pixels in part.val.pixels if pixels.numpy().tobytes() in seen]
    with pytest.raises(ValueError, match=r"class '0' has 142 images, 200 are needed"):
        equivalent_study.balanced(data, 2000, 0)


def test_learning_rates_are_climbed_until_the_best_has_neighbours():
    assert next_rungs({}) == (0.03, 0.1)
    assert next_rungs({0.03: 0.5, 0.1: 0.6}) == (0.3,)
    assert next_rungs({0.03: 0.6, 0.1: 0.5}) == (0.01,)
    assert next_rungs({0.03: 0.5, 0.1: 0.6, 0.3: 0.4}) == ()
    assert next_rungs({lr: lr for lr in LADDER}) == ()


def test_running_before_tuning_is_refused(tmp_path):
    with pytest.raises(ValueError, match="learning rates of block 'tiny' are not chosen yet: run `tune` first"):
        study(tmp_path / "a").run()


def test_the_order_begins_with_pairs_at_the_centre():
    found = trainings_of(BLOCK, LRS)
    assert [(t.method, t.seed) for t in found[:4]] == [("naive", 0), ("ep", 0), ("naive", 1), ("ep", 1)]
    assert len(set(found)) == len(found)
    by_method = {training.method: training.lr for training in found}
    assert by_method["naive, larger lr"] == 0.09 and by_method["ep, W frozen"] == 0.1
    assert by_method["ep, C and D frozen"] == 0.03


def test_the_digest_follows_the_sources_and_the_protocol(monkeypatch, tmp_path):
    before = equivalent_study.code_digest()
    monkeypatch.setattr(equivalent_study, "PROTOCOL", "another")
    assert equivalent_study.code_digest() != before
    package = tmp_path / "obc_tools"
    (package / "training").mkdir(parents=True)
    (package / "state.py").write_text("")
    monkeypatch.setattr(equivalent_study.obc, "__file__", str(package / "__init__.py"))
    without = equivalent_study.code_digest()
    (package / "training" / "fit.py").write_text("x = 1")
    assert equivalent_study.code_digest() != without


def row(method: str, seed: int, accuracy: float, code: str = "now", **changes) -> dict:
    cell = replace(Cell(), **{key: changes.pop(key) for key in list(changes) if key in Cell.__dataclass_fields__})
    training = Training("full", changes.pop("purpose", "run"), method, 0.1, seed, **vars(cell))
    own = {"val_accuracy": accuracy, "test_accuracy": accuracy, "cpu_seconds": 100 if method == "naive" else 110}
    return {
        **dict.fromkeys(COLUMNS, ""),
        **vars(training),
        **own,
        "curve": "0.1 0.5",
        "code": code,
        "original": "a",
        "plan": "b",
    } | changes


def table_of(path: Path, rows: list[dict]) -> pd.DataFrame:
    pd.DataFrame(rows).to_csv(path, index=False)
    return read_table(path)


MADE_UP = [
    *(row("naive", seed, value) for seed, value in enumerate((0.60, 0.61, 0.62))),
    *(row("ep", seed, value) for seed, value in enumerate((0.61, 0.63, 0.65))),
    row("ep", 0, 0.59, scale=0.2),
    row("naive", 0, 0.50, speedup=8.0),
    row("naive", 100, 0.55, purpose="tune"),
]


def test_pairs_and_intervals_of_made_up_rows(tmp_path):
    table = table_of(tmp_path / "t.csv", MADE_UP)
    assert pairs(table)["difference"].round(9).tolist() == [1, 2, 3, -1]
    found = differences(table, "now")
    assert found["n"].tolist() == [3, 1]
    assert found["difference"].tolist() == pytest.approx([2, -1])
    # t(0.975, 2) = 4.30265, s = 1
    assert found["half"][0] == pytest.approx(4.30265 / math.sqrt(3), abs=1e-4)
    assert math.isnan(found["half"][1])
    assert found["cost"].tolist() == pytest.approx([1.1, 1.1])


def test_rows_of_other_code_are_marked_and_other_code_or_plans_make_no_pair(tmp_path):
    rows = [*MADE_UP, row("ep", 0, 0.9, code="old", speedup=8.0), row("ep", 1, 0.6, code="old")]
    rows += [
        row("naive", 1, 0.5, code="old"),
        row("naive", 0, 0.5, speedup=2.0),
        row("ep", 0, 0.9, speedup=2.0, plan="c"),
    ]
    table = table_of(tmp_path / "t.csv", rows)
    found = differences(table, "now")
    assert found.loc[found["code"] == "old", ["n", "difference"]].to_numpy().tolist() == [[1, pytest.approx(10)]]
    assert found["other code"].tolist() == ["", "", "†"]
    text = markdown(table, "now")
    assert "| +2.00 ± 2.48 |" in text and "| +10.00 † |" in text
    assert "| full | 0.1 | 55.00 |  |  | 0 |" in text
    assert "| full | 0.1 † | 55.00 |  |  | 0 |" in markdown(table, "later")


def test_figures_show_every_pair_and_mean(tmp_path):
    table = table_of(tmp_path / "t.csv", MADE_UP)
    dots, mean, single, alone = plot_differences(table).data
    assert sorted(dots.x) == pytest.approx([1, 2, 3]) and mean.x == pytest.approx((2,))
    assert mean.y == ("ep, 4x, 20 epochs, scale 1, decay 0 (n = 3)",)
    assert single.x == pytest.approx(alone.x) and alone.error_x.array == (None,)
    curves = plot_curves(table, "full").data
    assert len(curves) == 6 and curves[0].y == (10, 50)


def test_tables_and_figures_of_a_study_that_has_not_begun_or_only_begun(tmp_path):
    path = tmp_path / "none.csv"
    path.write_text(",".join(COLUMNS) + "\n")
    table = table_of(tmp_path / "t.csv", [row("naive", 100, 0.55, purpose="tune", test_accuracy="")])
    for early in (read_table(path), table):
        assert len(differences(early)) == 0 and not plot_differences(early).data and not plot_curves(early).data
    assert len(tuning(read_table(path))) == 0
    assert "| full | 0.1 | 55.00 |  |  | 0 |" in markdown(table, "now")


def test_learning_rates_are_compared_on_the_seeds_that_both_methods_have(tmp_path):
    rows = [row(m, s, a, purpose="tune") for m, s, a in (("naive", 100, 0.5), ("naive", 101, 0.6), ("ep", 100, 0.53))]
    found = tuning(table_of(tmp_path / "t.csv", rows))
    assert found[["naive", "ep", "difference", "n"]].to_numpy().tolist() == [[55, 53, pytest.approx(3), 1]]
