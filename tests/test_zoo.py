"""Networks of torchvision and timm through the zoo's row; `make zoo` takes all of them, each in its own process."""

import pandas as pd
import pytest
import timm
import torch
import torchvision
import zoo
import zoo_models
import zoo_table
from torch import nn
from zoo_models import Case, build, cases, example, randomize
from zoo_row import COLUMNS, Row

from obc_tools.pruning.check import Check, CheckError, Finding

BY_ID = {case.id: case for case in cases()}

SUBSET = (
    "torchvision:densenet121",
    "torchvision:googlenet",
    "torchvision:mnasnet0_5",
    "torchvision:mobilenet_v3_small",
    "torchvision:regnet_y_400mf",
    "torchvision:resnet18",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:squeezenet1_1",
    "timm:convnext_zepto_rms",
    "timm:dla46x_c",
    "timm:edgenext_xx_small",
    "timm:lcnet_035",
    "timm:mobilevit_xxs",
    "timm:starnet_s050",
    "timm:test_byobnet",
    "timm:test_coatnet",
    "timm:test_convnext3",
    "timm:test_efficientnet_gn",
    "timm:test_efficientnet_ln",
    "timm:test_mambaout",
    "timm:test_maxvit",
    "timm:test_nfnet",
    "timm:test_resnet",
    "timm:test_vit",
    "timm:test_vit2",
    "timm:test_vit3",
    "timm:test_vit_relpos",
)


@pytest.mark.parametrize("name", SUBSET)
@pytest.mark.filterwarnings("default")
def test_the_whole_way(name):
    case = BY_ID[name]
    row = Row(Case(case.source, case.name, case.size, case.options)).fill()
    assert row["ok"], row["reason"]
    assert 0.2 < row["pruned 0.3"] <= 0.3 and row["speed-up"] >= 1.5 and row["save/load"] == "equal"
    errors = [float(row[column]) for column in ("masked = pruned", "EP = naive", "merge = EP")]
    assert max(errors) < 1e-9


def test_every_builder_and_every_family_is_there():
    names = {case.name for case in cases() if case.source == "torchvision" and case.size}
    assert names == set(torchvision.models.list_models(module=torchvision.models))
    modules = {module: timm.list_models(module=module) for module in timm.list_modules()}
    listed = [case.name for case in cases() if case.source == "timm"]
    assert [module for module, models in modules.items() if not set(models) & set(listed)] == []
    assert len(listed) == len(set(listed)) >= 100


def test_the_lists_name_networks_of_the_zoo():
    marked = {f"{source}:{name}" for source, names in zoo_models._ONNX.items() for name in names.split()}
    assert marked == {case.id for case in cases() if case.onnx} and len(marked) >= 30
    assert {*zoo_models._TIMM_FIXED.split(), *zoo_models._TIMM_LARGER} <= {case.name for case in cases()}


def test_randomizing_leaves_nothing_constant():
    case = BY_ID["timm:test_convnext"]
    model, inputs = build(case), example(case)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    randomize(model, inputs)
    for name, parameter in model.named_parameters():
        assert parameter.numel() == 1 or parameter.std() > 0, name
    assert torch.equal(model.stem[0].weight, before["stem.0.weight"])
    norm = build(BY_ID["timm:test_resnet"])
    randomize(norm, inputs)
    assert norm.bn1.running_mean.std() > 0 and norm.bn1.momentum == 0.1 and not norm.training


def test_equal_seeds_build_equal_networks():
    case = BY_ID["timm:test_resnet"]
    first, second, other = build(case), build(case), build(case, seed=1)
    assert torch.equal(first.fc.weight, second.fc.weight) and not torch.equal(first.fc.weight, other.fc.weight)


class Fails(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.layer, self.error = nn.Conv2d(3, 4, 1), error

    def forward(self, x):
        raise self.error


@pytest.mark.parametrize(
    ("error", "kind"), [(ValueError("no such thing"), "refused: ValueError"), (RuntimeError("x"), "unclear: Runtime")]
)
def test_a_row_says_why_it_failed(error, kind, monkeypatch):
    monkeypatch.setattr("zoo_row.build", lambda case: Fails(error))
    row = Row(Case("timm", "mine", 8)).fill()
    assert not row["ok"] and row["reason"].startswith(kind) and list(row) == list(COLUMNS)


def test_a_wrong_output_is_called_wrong(monkeypatch):
    wrong = Check((Finding("pruned = masked", 0.5, 1e-6), Finding("EP = naive", 0.0, 1e-6)), 1.0)
    monkeypatch.setattr("zoo_row.check_plan", lambda *args, **options: wrong)
    row = Row(BY_ID["timm:test_resnet"]).fill()
    assert not row["ok"] and row["masked = pruned"] == "5.0e-01"
    assert row["reason"].startswith("WRONG: pruned = masked: 0.5, must be at most 1e-06")
    vacuous = Check((Finding("pruned = masked", 0.0, 1e-6),), 1e-5)
    monkeypatch.setattr("zoo_row.check_plan", lambda *args, **options: vacuous)
    assert "nothing was shown" in Row(BY_ID["timm:test_resnet"]).fill()["reason"]


@pytest.mark.parametrize(
    ("note", "kind"), [("PlanMismatchError: x", "refused: CheckError: a: Plan"), ("KeyError: x", "unclear: a: Key")]
)
def test_parts_of_the_proof_that_end_in_errors_are_told_apart(note, kind, monkeypatch):
    failed = Check((Finding("a", float("inf"), 0, note=note), Finding("b", 0.0, 0)), 1.0)
    monkeypatch.setattr("zoo_row.check_plan", lambda *args, **options: failed)
    assert Row(BY_ID["timm:test_resnet"]).fill()["reason"].startswith(kind)


def test_a_proof_that_cannot_tell_is_no_wrong_output(monkeypatch):
    hidden = Check((Finding("a", 0.0, 1e-6, unclear="the output does not show it"), Finding("b", 0.0, 0)), 0.0)
    monkeypatch.setattr("zoo_row.check_plan", lambda *args, **options: hidden)
    reason = Row(BY_ID["timm:test_resnet"]).fill()["reason"]
    assert reason == "unclear: a: cannot tell: the output does not show it"


def test_what_the_proof_refuses_is_no_wrong_output(monkeypatch):
    def refuse(*args, **options):
        raise CheckError("the output is the same")

    monkeypatch.setattr("zoo_row.check_plan", refuse)
    assert Row(BY_ID["timm:test_resnet"]).fill()["reason"] == "refused: CheckError: the output is the same"


def test_rows_are_kept_by_code_or_by_success(tmp_path):
    rows = [
        {"source": "timm", "model": "a", "ok": True, "reason": "", "code": "1"},
        {"source": "timm", "model": "b", "ok": False, "reason": "refused: x", "code": "2"},
        {"source": "torchvision", "model": "c", "ok": False, "reason": "WRONG: x", "code": "2"},
    ]
    table = zoo.write(rows, tmp_path / "zoo.csv")
    assert list(table["model"]) == ["c", "a", "b"]
    read = pd.read_csv(tmp_path / "zoo.csv", dtype=str, keep_default_na=False)
    assert list(zoo.kept_rows(read, "passed", "2")["model"]) == ["a"]
    assert list(zoo.kept_rows(read, "same", "2")["model"]) == ["c", "b"]
    assert zoo.kept_rows(read, "none", "2").empty
    counted = zoo.summary(read)
    assert counted.loc["timm"].tolist() == [2, 1, "50.0%", 1, 0, 0]
    assert counted.loc["torchvision", "WRONG"] == 1


ROWS = [
    {"source": "torchvision", "model": "wide_resnet50_2", "pruned 0.3": "0.3", "speed-up": "1.5",
     "masked = pruned": "1e-15", "EP = naive": "0.0", "merge = EP": "0.0", "save/load": "equal", "ONNX": "1e-07",
     "ok": "True", "reason": ""},
    {"source": "torchvision", "model": "resnet18", "pruned 0.3": "0.3", "speed-up": "1.5", "masked = pruned": "1e-5",
     "EP = naive": "inf", "merge = EP": "", "save/load": "", "ONNX": "-", "ok": "False", "reason": "WRONG: a | b"},
    {"source": "timm", "model": "resnet18", "pruned 0.3": "", "speed-up": "", "masked = pruned": "", "EP = naive": "",
     "merge = EP": "", "save/load": "", "ONNX": "-", "ok": "False", "reason": "refused: " + 300 * "x"},
]  # fmt: skip


def test_the_table_counts_each_column_and_names_what_fails():
    table = pd.DataFrame(ROWS)
    found = zoo_table.counts(table)
    assert found.loc["torchvision"].tolist() == [2, 2, 2, 2, 1, 1, 1, 1, 1, 1]
    assert found.loc["timm"].tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    text = zoo_table.markdown(table, 225)
    assert "3 of 225 networks were run; 50.0% of torchvision's, 0.0% of timm's pass everything." in text
    assert "- `torchvision:resnet18`: WRONG: a / b" in text and "wide_resnet" not in text
    assert max(map(len, text.splitlines())) < 240


def test_families_are_timms_modules_and_torchvisions_first_words():
    table = pd.DataFrame({"source": ["timm", "torchvision"], "model": ["test_vit3", "mobilenet_v3_small"]})
    assert zoo_table.families(table).tolist() == ["vision_transformer", "mobilenet"]


RESULTS = zoo.ROOT / "results" / "zoo.csv"


@pytest.mark.parametrize("path", [RESULTS] if RESULTS.exists() else [])
def test_the_readme_shows_the_table_of_the_last_run(path):
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    assert zoo_table.markdown(table, len(cases())) in (zoo.ROOT / "results" / "README.md").read_text(encoding="utf-8")


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown network of the zoo 'timm:resnet10'; closest: timm:resnet10t"):
        zoo.chosen(cases(), ("timm:resnet10",))


@pytest.mark.slow
def test_a_process_that_takes_too_long_is_a_row(monkeypatch):
    row = zoo.run_case(BY_ID["timm:test_resnet"], 1, 12)
    assert not row["ok"] and row["reason"] == "refused: time: not done after 1 s of computing"
    assert zoo.run_case(BY_ID["timm:test_byobnet"], 100, 12)["ok"]
