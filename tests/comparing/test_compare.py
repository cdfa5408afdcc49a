import json
import math
import random

import numpy as np
import pandas as pd
import pytest
import torch
from cases import curve
from torch import nn

from obc_tools import (
    CRITERIA,
    PruningPlan,
    compare_criteria,
    compensate,
    cost,
    evaluate,
    find_groups,
    load_data,
    make_plan,
    prune,
    prune_to,
    score_groups,
)
from obc_tools.comparing.compare import Comparison, ComparisonError, read_comparison
from obc_tools.data.batches import take

SMALL = {"steps": 3, "ratio": 0.6, "batches": 2, "batch_size": 16, "held_out": 40, "training": 30, "progress": False}


@pytest.fixture(scope="module")
def data():
    return load_data("digits")


def network(width=6):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 8, 3, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(72, 10),
        )
    return model.eval()


def without_seconds(comparison):
    return comparison.frame.drop(columns="seconds")


def test_a_step_by_hand(data):
    model = network()
    frame = compare_criteria(network, data, ["jacobian"], repeats=1, seed=5, **SMALL).frame
    example = torch.zeros(1, 1, 8, 8)
    groups = find_groups(model, example)
    batches = take(data.batches("train", 16, seed=5).at(1), 2)
    plan = make_plan(score_groups(model, groups, "jacobian", batches), ratio=0.2)
    pruned = prune(model, plan)
    held_out = next(iter(data.batches("val", 250, seed=5, shuffle=True).at(0)))
    metrics = evaluate(pruned, [(held_out[0][:40], held_out[1][:40])])
    row = frame.iloc[1]
    assert (row["step"], row["pruned_channels"], row["channels"]) == (1, plan.channels_removed, 14)
    assert (row["macs"], row["params"]) == (cost(pruned, example).macs, cost(pruned, example).params)
    assert row["accuracy"] == metrics.accuracy and row["loss"] == pytest.approx(metrics.loss, rel=1e-12)
    assert row["top5"] == metrics.top5 and row["images"] == 32 and row["seconds"] > 0
    first = frame.iloc[0]
    assert first["pruned_channels"] == 0 and first["images"] == 0 and math.isnan(first["seconds"])


def test_a_network_is_copied_not_touched(data):
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = compare_criteria(model, data, ["l1"], **SMALL)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    pd.testing.assert_frame_equal(
        without_seconds(given), without_seconds(compare_criteria(network, data, ["l1"], **SMALL))
    )


def test_repeats_draw_other_images_and_only_where_something_is_drawn(data):
    comparison = compare_criteria(network, data, ["taylor", "l1", "random"], repeats=2, **SMALL)
    counts = comparison.frame.groupby("criterion")["repeat"].nunique()
    assert counts.to_dict() == {"taylor": 2, "l1": 1, "random": 2}
    by_repeat = comparison.frame[comparison.frame["criterion"] == "random"].groupby("repeat")["loss"].apply(list)
    assert by_repeat[0][0] == by_repeat[1][0] and by_repeat[0][1:] != by_repeat[1][1:]
    assert list(comparison.frame["step"][:4]) == [0, 1, 2, 3]


def test_every_criterion_can_be_compared(data):
    comparison = compare_criteria(network, data, CRITERIA, repeats=1, **SMALL)
    assert comparison.criteria == tuple(CRITERIA)
    assert not comparison.frame[["accuracy", "loss", "train_accuracy", "train_loss", "top5"]].isna().any().any()
    assert set(comparison.summary()["criterion"]) == set(CRITERIA)


def test_macs_targets_are_met_in_equal_steps(data):
    settings = SMALL | {"macs": 0.4}
    del settings["ratio"]
    frame = compare_criteria(network, data, ["l2"], **settings).frame
    shares = (frame["macs"] / frame["macs"].iloc[0]).to_numpy()
    assert (shares <= np.array([1, 0.8, 0.6, 0.4]) + 1e-12).all()
    assert (shares[1:] > np.array([0.8, 0.6, 0.4]) - 0.15).all()


def test_ends_that_the_limits_forbid_are_refused_before_any_scoring(data):
    for end, best in (
        ({"ratio": 0.6}, r"ratio=0.6 .* ratio=0.5$"),
        ({"ratio": None, "macs": 0.1}, r"macs=.* macs=\d"),
    ):
        with pytest.raises(ValueError, match=f"^{best}"):
            compare_criteria(network, data, {"l1": pytest.fail}, max_ratio=0.5, **SMALL | end)


def test_a_criterion_has_its_own_budget_and_label(data):
    criteria = {"N = 1": ("jacobian", {"batches": 1}), "N = 4": ("jacobian", {"batches": 4})}
    frame = compare_criteria(network, data, criteria, repeats=1, **SMALL).frame
    scored = frame[frame["step"] > 0].groupby("criterion")["images"].unique()
    assert {label: list(images) for label, images in scored.items()} == {"N = 1": [16], "N = 4": [64]}


def test_a_killed_comparison_goes_on_where_it_was(data, tmp_path, monkeypatch):
    criteria = ["jacobian", "l1"]
    whole = compare_criteria(network, data, criteria, repeats=2, **SMALL)
    calls = []

    def dying(*arguments, **options):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return score_groups(*arguments, **options)

    monkeypatch.setattr("obc_tools.pruning.choices.score_groups", dying)
    folder = tmp_path / "curves"
    with pytest.raises(KeyboardInterrupt):
        compare_criteria(network, data, criteria, repeats=2, folder=folder, **SMALL)
    assert len(calls) == 5
    so_far = read_comparison(folder).frame
    assert list(zip(so_far["repeat"], so_far["step"], strict=True)) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    resumed = compare_criteria(network, data, criteria, repeats=2, folder=folder, **SMALL)
    assert len(calls) == 5 + (3 * 3 - 4), "finished steps were scored again"
    pd.testing.assert_frame_equal(without_seconds(resumed), without_seconds(whole))
    again = compare_criteria(network, data, criteria, repeats=2, folder=folder, **SMALL)
    assert len(calls) == 10
    pd.testing.assert_frame_equal(again.frame, resumed.frame)
    pd.testing.assert_frame_equal(
        read_comparison(folder / "comparison.csv").frame, resumed.frame, rtol=1e-6, check_dtype=False
    )


def test_steps_may_be_compensated_by_the_calibration_images_of_each(data, tmp_path, monkeypatch):
    asked = SMALL | {"repeats": 2, "compensate": True, "seed": 3}
    whole = compare_criteria(network, data, ["l1"], **asked)
    assert set(whole.frame["repeat"]) == {0, 1}, "weights alone decided, and so do the images now"
    held_out = [batch[:40] for batch in next(iter(data.batches("val", 250, seed=3, shuffle=True).at(0)))]
    for repeat, rows in whole.frame.groupby("repeat"):
        model = network()
        plan = make_plan(score_groups(model, find_groups(model, torch.zeros(1, 1, 8, 8)), "l1"), ratio=0.2)
        made = compensate(model, plan, take(data.batches("train", 16, seed=3 + repeat).at(1), 2))
        loss = evaluate(made, [held_out]).loss
        assert rows["loss"].iloc[1] == pytest.approx(loss, rel=1e-12)
        assert loss != evaluate(prune(model, plan), [held_out]).loss
    scored = []

    def dying(model, *arguments, **options):
        scored.append(model)
        if len(scored) == 3:
            raise KeyboardInterrupt
        return score_groups(model, *arguments, **options)

    monkeypatch.setattr("obc_tools.pruning.choices.score_groups", dying)
    with pytest.raises(KeyboardInterrupt):
        compare_criteria(network, data, ["l1"], folder=tmp_path, **asked)
    resumed = compare_criteria(network, data, ["l1"], folder=tmp_path, **asked)
    assert all(torch.equal(a, b) for a, b in zip(scored[2].parameters(), scored[3].parameters(), strict=True))
    pd.testing.assert_frame_equal(without_seconds(resumed), without_seconds(whole))
    assert read_comparison(tmp_path).settings["compensate"] is True
    with pytest.raises(ComparisonError, match="a comparison with another compensate"):
        compare_criteria(network, data, ["l1"], folder=tmp_path, **asked | {"compensate": False})
    with pytest.raises(ValueError, match="batches"):
        compare_criteria(network, data, ["l1"], **asked | {"batches": 1000})


def test_a_folder_takes_more_criteria_but_no_other_comparison(data, tmp_path):
    (tmp_path / ".comparison.json.new").write_text("{")  # of a comparison that was killed at its first write
    compare_criteria(network, data, ["l1"], folder=tmp_path, **SMALL)
    more = compare_criteria(network, data, ["l1", "l2"], folder=tmp_path, **SMALL)
    assert more.criteria == ("l1", "l2")
    with pytest.raises(ComparisonError, match=r"holds a comparison with another steps: choose another folder"):
        compare_criteria(network, data, ["l1"], folder=tmp_path, **SMALL | {"steps": 4})
    with pytest.raises(ComparisonError, match=r"another checksum_of_weights"):
        compare_criteria(lambda: network(7), data, ["l1"], folder=tmp_path, **SMALL)
    with pytest.raises(ComparisonError, match=r"another l1"):
        compare_criteria(network, data, {"l1": "l2"}, folder=tmp_path, **SMALL)
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.tex").write_text("mine")
    with pytest.raises(ComparisonError, match=r"holds something else than a comparison"):
        compare_criteria(network, data, ["l1"], folder=stranger, **SMALL)
    assert (stranger / "thesis.tex").read_text() == "mine"


def test_a_damaged_folder_gives_no_other_numbers(data, tmp_path):
    """Of any bit that is turned over, and of files of another kind: refused by name, or the numbers stay."""
    asked, draw = SMALL | {"repeats": 1}, random.Random(0)
    whole = compare_criteria(network, data, ["l1"], folder=tmp_path, **asked)
    for name in ("curve_l1_0.json", "comparison.json"):
        good = (tmp_path / name).read_bytes()
        for place in draw.sample(range(len(good)), 25):
            flipped = good[place] ^ 1 << draw.randrange(8)
            (tmp_path / name).write_bytes(good[:place] + bytes([flipped]) + good[place + 1 :])
            try:
                again = compare_criteria(network, data, ["l1"], folder=tmp_path, **asked)
            except ValueError as error:
                assert str(tmp_path) in str(error)
            else:
                pd.testing.assert_frame_equal(without_seconds(again), without_seconds(whole))
        for other in ("{}", "null", "[]", "1"):
            (tmp_path / name).write_text(other)
            with pytest.raises(ComparisonError, match="holds (no curve|no settings|a comparison with another)"):
                compare_criteria(network, data, ["l1"], folder=tmp_path, **asked)
            with pytest.raises(ComparisonError, match="holds no comparison"):
                read_comparison(tmp_path)
        (tmp_path / name).write_bytes(good)


def test_steps_may_stop_where_criteria_have_rows(data, tmp_path):
    asked = SMALL | {"batches": 4, "repeats": 1, "rows": "expected", "stop": 0.4}
    found = compare_criteria(network, data, ["jacobian", "l1"], folder=tmp_path, **asked)
    curves = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    deciding = {name: kept["plan"].get("deciding", []) for name, kept in curves.items() if "plan" in kept}
    assert sorted(map(len, deciding.values())) == [0, 3]
    steps = max(deciding.values(), key=len)
    assert all(2 <= step["batches"] <= 4 and step["decided"] == (step["share"] <= 0.4) for step in steps)
    again = compare_criteria(network, data, ["jacobian", "l1"], folder=tmp_path, **asked)
    pd.testing.assert_frame_equal(again.frame, found.frame)
    by_rows = compare_criteria(network, data, [("jacobian", {"rows": "expected"})], **asked | {"rows": None})
    np.testing.assert_array_equal(by_rows.frame["macs"], found.frame[found.frame["criterion"] == "jacobian"]["macs"])


def test_scores_may_be_divided_by_what_a_channel_saves(data, tmp_path):
    compare_criteria(network, data, ["l2"], folder=tmp_path, per="macs", **SMALL | {"steps": 1, "ratio": 0.3})
    (kept,) = (found for path in tmp_path.glob("*.json") if "plan" in (found := json.loads(path.read_text())))
    how = {"criterion": "l2", "ratio": 0.3, "steps": 1, "progress": False}
    plan, plain = (prune_to(network(), torch.zeros(1, 1, 8, 8), per=per, **how) for per in ("macs", None))
    assert PruningPlan.from_json(json.dumps(kept["plan"])) == plan != plain


def test_a_curve_ends_at_chance(data):
    class Guess(nn.Module):
        """Pruned or not, it gives one class."""

        def __init__(self):
            super().__init__()
            self.body = network()

        def forward(self, images):
            return self.body(images) * 0 + torch.eye(10)[3]

    comparison = compare_criteria(Guess, data, ["l1"], until_chance=True, **SMALL)
    assert list(comparison.frame["step"]) == [0] and list(comparison.frame["at_chance"]) == [True]
    assert list(compare_criteria(Guess, data, ["l1"], **SMALL).frame["step"]) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"steps=0: expected at least 1"),
        ({"macs": 0.5, "ratio": 0.5}, r"give one end"),
        ({"ratio": 1.5}, r"ratio=1.5: expected a share in \(0, 1\)"),
        ({"training": -1}, r"training=-1: expected at least 0 images"),
        ({"batches": 1000}, r"1000 batches were asked for"),
        ({"bathces": 3}, r"unknown setting 'bathces'; known are .*steps, "),
        ({"max_ratio": 2.0}, r"max_ratio=2.0"),
        ({"scope": "galactic"}, r"unknown scope 'galactic'"),
        ({"group_reduction": "median"}, r"unknown group_reduction 'median'"),
        ({"normalizer": "medain"}, r"unknown normalizer 'medain'"),
        ({"stop": 0.5}, r"stop=0.5: expected a share of a step's channels"),
        ({"rows": "most"}, r"rows='most': expected 'batch'"),
    ],
)
def test_bad_settings_are_refused_before_any_work(data, options, message):
    with pytest.raises(ValueError, match=message):
        compare_criteria(pytest.fail, data, ["l1"], **SMALL | options) if "batches" not in options else (
            compare_criteria(network, data, ["jacobian"], **SMALL | options)
        )


def test_equal_labels_and_unfit_models_are_refused(data):
    with pytest.raises(ValueError, match=r"criteria need labels of their own, got l1, l1"):
        compare_criteria(network, data, ["l1", "l1"], **SMALL)
    with pytest.raises(ValueError, match=r"got none"):
        compare_criteria(network, data, [], **SMALL)
    with pytest.raises(ValueError, match=r"model has 3 outputs, data has 10 classes"):
        compare_criteria(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), data, ["l1"], **SMALL)


def test_areas_by_hand():
    rows = curve("a", 0, (1, 0.5, 0.2), (0.9, 0.7, 0.1)) + curve("a", 1, (1, 0.5, 0.25), (0.9, 0.5, 0.3))
    rows += curve("at chance", 0, (1, 0.6), (0.9, 0.1), at_chance=True)
    rows += curve("still running", 0, (1, 0.9), (0.9, 0.8))
    comparison = Comparison(pd.DataFrame(rows), {"steps": 2}, {})
    areas = comparison.areas().set_index(["criterion", "repeat"])["area"]
    # From 0.2, the largest end of the curves that went all the way... the second ends at 0.25.
    at_end = 0.1 + (0.25 - 0.2) / 0.3 * 0.6
    assert areas["a", 0] == pytest.approx(0.5 * 0.8 + 0.25 * (0.7 + at_end) / 2)
    assert areas["a", 1] == pytest.approx(0.5 * 0.7 + 0.25 * 0.4)
    assert areas["at chance", 0] == pytest.approx(0.4 * 0.5 + 0.35 * 0.1)
    summary = comparison.summary()
    assert list(summary["criterion"]) == ["a", "at chance"] and summary["repeats"].tolist() == [2, 1]
    assert summary["seconds a step (median)"].tolist() == [2.0, 1.5]
    assert comparison.left("channels").tolist()[:3] == pytest.approx([1, 0.5, 0.2])
    assert comparison.left("macs").tolist()[:3] == pytest.approx([1, 0.25, 0.04])
    assert list(comparison.summary("loss")["criterion"]) == ["a", "at chance"]
    with pytest.raises(ComparisonError, match=r"unknown axis 'watts'; known are channels, macs, params"):
        comparison.left("watts")
    with pytest.raises(ComparisonError, match=r"'top5' was not measured; there are accuracy, loss, train_accuracy"):
        comparison.areas("top5")
    assert "at chance" in repr(comparison) and "<table" in comparison._repr_html_()


def test_csv_comes_back_with_settings_and_environment(tmp_path):
    frame = pd.DataFrame(curve("a", 0, (1, 0.5), (0.9, 0.7))).astype(
        {"top5": float, "train_top5": float, "train_loss": float}
    )
    comparison = Comparison(frame, {"steps": 1}, {"cpu": "of today"})
    path = comparison.to_csv(tmp_path / "curves.csv")
    assert json.loads(path.read_text().splitlines()[0].removeprefix("# "))["environment"] == {"cpu": "of today"}
    back = read_comparison(path)
    assert back.settings == comparison.settings and back.environment == comparison.environment
    pd.testing.assert_frame_equal(back.frame, comparison.frame, check_dtype=False)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for name, reason in (("other.csv", ""), ("absent.csv", "No such file"), ("", "comparison.json")):
        with pytest.raises(ComparisonError, match=rf"{name}' holds no comparison: .*{reason}"):
            read_comparison(tmp_path / name)
    broken = tmp_path / "broken.csv"
    broken.write_text(path.read_text().replace("accuracy", "acuracy"))
    with pytest.raises(ComparisonError, match=r"columns accuracy, train_accuracy are missing"):
        read_comparison(broken)
