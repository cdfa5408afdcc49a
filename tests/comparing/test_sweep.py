"""Plans at many targets from one way, against `prune_to` for each of them."""

import json

import pandas as pd
import pytest
import torch
from networks import network
from torch.nn import functional as F

from obc_tools import PruningPlan, Task, compensate, cost, evaluate, prune, prune_to, recalibrate, sweep
from obc_tools.comparing.compare import ComparisonError, read_comparison
from obc_tools.data.batches import Batches

STEPS = {"steps": 6, "progress": False}
SPEEDUPS = (1.2, 1.5, 1.9, 2.4)


def fit_of(model, batches):
    outputs = torch.cat([model(images) for images, _ in batches])
    return {"size": outputs.square().mean().item()}


class Counting:
    """An objective that counts how often it is asked, and stops at a call."""

    def __init__(self, stop=None):
        self.calls, self.stop = 0, stop

    def __call__(self, model, batch):
        self.calls += 1
        if self.calls == self.stop:
            raise KeyError("stop")
        images, labels = batch
        return F.cross_entropy(model(images), labels, reduction="none")


TASK = Task("size", Counting(), fit_of, directions={"size": "higher"})


@pytest.fixture(scope="module", params=["small_vgg", "concat"])
def given(request):
    model, images = network(request.param)
    labels = torch.arange(4) % model(images).shape[-1]
    return model, images[:1], [(images[:2], labels[:2]), (images[2:], labels[2:])]


@pytest.mark.parametrize("last_step", ["exact", "full"])
def test_every_plan_is_that_of_prune_to(given, last_step):
    model, example, batches = given
    found = sweep(model, example, batches, targets={"speedup": SPEEDUPS}, last_step=last_step, **STEPS)
    for speedup in SPEEDUPS:
        alone = prune_to(model, example, batches, speedup=speedup, last_step=last_step, **STEPS)
        assert found.plan(f"speedup={speedup}").kept == alone.kept
        assert str(found.plan(f"speedup={speedup}").reached) == str(alone.reached)


def test_the_last_ratio_is_that_of_prune_to_and_the_others_end_where_they_say(given):
    model, example, batches = given
    ratios = (0.2, 0.35, 0.6)
    found = sweep(model, example, batches, targets={"ratio": ratios}, **STEPS)
    assert found.plan("ratio=0.6").kept == prune_to(model, example, batches, ratio=0.6, **STEPS).kept
    assert found.plan("ratio=0.2").kept == prune_to(model, example, batches, ratio=0.2, steps=2, progress=False).kept
    for ratio in ratios:
        plan = found.plan(f"ratio={ratio}")
        assert ratio - 2 / plan.channels < plan.channels_removed / plan.channels <= ratio


def test_kinds_of_targets_can_be_mixed_in_any_order(given):
    model, example, batches = given
    macs, params = cost(model, example).macs, cost(model, example).params
    asked = {"ratio": 0.3, "params": (0.5 * params, 0.8 * params), "macs": 0.6 * macs, "speedup": (1.9, 1.2)}
    found = sweep(model, example, batches, targets=asked, **STEPS)
    for name, plan in found.plans["jacobian"].items():
        if "ratio" not in name:
            kind, value = name.split("=")
            exact = next(v for v in (0.5 * params, 0.8 * params, 0.6 * macs, 1.9, 1.2) if f"{v:g}" == value)
            assert plan.kept == prune_to(model, example, batches, **{kind: exact}, **STEPS).kept
    assert len(found.plans["jacobian"]) == 6


def test_ten_targets_cost_no_more_passes_than_the_last(given):
    model, example, batches = given
    alone, all_ten = Counting(), Counting()
    prune_to(model, example, batches, speedup=2.4, objective=alone, **STEPS)
    ten = [1.1 + 1.3 * n / 9 for n in range(10)]
    found = sweep(model, example, batches, targets={"speedup": ten}, objective=all_ten, **STEPS)
    assert len(found.plans["jacobian"]) == 10
    assert all_ten.calls == alone.calls > 2


def test_each_is_measured_on_held_out_data(given):
    model, example, batches = given
    found = sweep(model, example, batches, targets={"speedup": SPEEDUPS}, held_out=batches, task=TASK, **STEPS)
    frame = found.to_frame()
    assert list(frame["target"]) == ["", *(f"speedup={speedup}" for speedup in SPEEDUPS)]
    assert frame["size"][0] == pytest.approx(evaluate(model, batches, task=TASK).values["size"], rel=1e-12)
    for row in frame.iloc[1:].to_dict("records"):
        pruned = prune(model, found.plan(row["target"]))
        assert row["size"] == pytest.approx(evaluate(pruned, batches, task=TASK).values["size"], rel=1e-12)
        assert (row["macs"], row["params"]) == (cost(pruned, example).macs, cost(pruned, example).params)
        assert row["speedup"] >= float(row["target"].split("=")[1])
    assert "latency_ms" not in frame and len(found.plot().data) == 1
    assert len(repr(found).splitlines()) == 6 and "<table" in found._repr_html_()


def test_what_is_measured_can_be_built_otherwise(given):
    model, example, batches = given
    seen = []

    def build(original, plan):
        seen.append(plan)
        return recalibrate(prune(original, plan), [images for images, _ in batches])

    found = sweep(model, example, batches, targets={"speedup": 1.5}, held_out=batches, task=TASK, build=build, **STEPS)
    assert seen == [found.plan("speedup=1.5")]
    with pytest.raises(KeyError, match="x"):
        sweep(model, example, batches, targets={"speedup": 1.5}, build=lambda *_: {}["x"], held_out=batches, **STEPS)


def test_steps_and_what_is_measured_can_be_compensated():
    model, images = network("residual")
    images = torch.randn(32, *images.shape[1:], generator=torch.Generator().manual_seed(3), dtype=images.dtype)
    batches, how = [(images, torch.arange(32) % 5)], {"task": TASK, "compensate": True, "steps": 2, "progress": False}
    plan = prune_to(model, images[:1], batches, ratio=0.5, criterion="taylor", **how)
    how |= {"targets": {"ratio": 0.5}, "criteria": "taylor", "held_out": batches}
    found, plain = (sweep(model, images[:1], batches, **how | {"compensate": made}) for made in (True, False))
    assert found.plan("ratio=0.5") == plan != plain.plan("ratio=0.5")
    size = evaluate(compensate(model, plan, batches, task=TASK), batches, task=TASK).values["size"]
    assert found.frame["size"].iloc[-1] == pytest.approx(size, rel=1e-12)


def test_networks_can_be_timed_beside_the_unpruned_one(given):
    model, example, batches = given
    found = sweep(model, example, batches, targets={"speedup": 1.5}, criteria="l2", repeats=2, **STEPS)
    assert (found.frame["latency_ms"] > 0).all() and (found.curves.left("latency") > 0).all()


def test_criteria_over_each_other(given):
    model, example, batches = given
    criteria = {"mine": "jacobian", "size": "l2"}
    found = sweep(
        model, example, batches, targets={"speedup": (1.5, 2)}, criteria=criteria, held_out=batches, task=TASK, **STEPS
    )
    assert list(found.plans) == ["mine", "size"] == list(found.curves.criteria)
    alone = prune_to(model, example, criterion="l2", speedup=2, **STEPS)
    assert found.plan("speedup=2", "size").kept == alone.kept != found.plan("speedup=2").kept
    assert [trace.name for trace in found.plot(over="params").data] == ["mine", "size"]


def test_a_stopped_sweep_goes_on_where_it_was(given, tmp_path):
    model, example, batches = given
    drawn = Batches(lambda number, start=0: iter(batches[number % 2 :] + batches[: number % 2]), 2)
    asked = {"targets": {"speedup": SPEEDUPS}, "criteria": ["jacobian", "l2"], "held_out": batches, "task": TASK}
    whole = sweep(model, example, drawn, objective=Counting(), **asked, **STEPS)
    counted = Counting()
    sweep(model, example, drawn, objective=counted, **asked, **STEPS)
    with pytest.raises(KeyError, match="stop"):
        sweep(model, example, drawn, objective=Counting(stop=counted.calls), folder=tmp_path, **asked, **STEPS)
    assert len(read_comparison(tmp_path).frame) < len(whole.frame)
    rest = Counting()
    resumed = sweep(model, example, drawn, objective=rest, folder=tmp_path, **asked, **STEPS)
    assert 0 < rest.calls < counted.calls
    pd.testing.assert_frame_equal(resumed.frame.drop(columns="seconds"), whole.frame.drop(columns="seconds"))
    assert resumed.plans == whole.plans
    again = sweep(model, example, drawn, objective=Counting(stop=1), folder=tmp_path, **asked, **STEPS)
    assert again.plans == whole.plans
    kept = json.loads((tmp_path / "curve_jacobian_0.json").read_text())["plans"]
    assert PruningPlan.from_json(json.dumps(kept["speedup=1.5"])) == whole.plan("speedup=1.5")
    with pytest.raises(ComparisonError, match="holds a comparison with another settings, steps, targets"):
        sweep(model, example, targets={"speedup": 2}, criteria="l2", folder=tmp_path, task=TASK, scope="local", **STEPS)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"targets": {}}, "no targets: give some, such as targets={'speedup': "),
        ({"targets": {"speed": 2}}, "unknown setting 'speed'; known are speedup, macs, params, ratio"),
        ({"targets": {"speedup": (2, 0.5)}}, "speedup=0.5: expected a number above 1"),
        ({"targets": {"speedup": (2, 1e9)}}, r"speedup=1e\+09 cannot be met: the best that can be had is speedup="),
        ({"targets": {"speedup": 2}, "held_out": iter([])}, "held_out: a list_iterator can be gone through only once"),
        ({"targets": {"speedup": 2}, "repeats": -1}, "repeats=-1: expected at least 0"),
        ({"targets": {"speedup": 2}, "verify": "maybe"}, "verify='maybe': True, False or 'float32'"),
        ({"targets": {"speedup": 2}, "pace": 3}, "unknown setting 'pace'; known are ignore, "),
        ({"targets": {"speedup": 2}, "criteria": ["l2", "l2"]}, "criteria need labels of their own, got l2, l2"),
    ],
)
def test_bad_input_is_named_before_anything_is_scored(given, asked, said):
    model, example, batches = given
    with pytest.raises(ValueError, match=said):
        sweep(model, example, batches, objective=Counting(stop=1), **asked, **STEPS)


def test_a_schedule_that_ends_before_the_target(given):
    model, example, batches = given
    with pytest.raises(ValueError, match=r"speedup=2.4 is not met: the schedule ends at schedule_ratio=0.2 with "):
        sweep(model, example, batches, targets={"speedup": 2.4}, schedule_ratio=0.2, **STEPS)
