"""The studio without a browser: its controls set, its buttons clicked, its figure and tables read."""

import copy
import json
import math
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch

import obc_tools as obc
from obc_tools.measure.metrics import Metrics
from obc_tools.plots import coupling_graph
from obc_tools.plots.plans import SCORES, UPPER
from obc_tools.pruning.choices import Limits, Target
from obc_tools.pruning.plan import PruningPlan
from obc_tools.studio import MOST, POINTS, RATIOS, Choices, with_interval
from obc_tools.widgets import studio as studio_module
from obc_tools.widgets.controls import Click, close, note
from obc_tools.widgets.explorers import InteractionExplorer, JTJExplorer
from obc_tools.widgets.studio import CHANGED, FOLDS, FRONTIER, SENSITIVITY, PruningStudio

SOURCE = {"name": "resnet8", "in_channels": 1, "width": 8}


@pytest.fixture(scope="module")
def made():
    data = obc.load_data("digits")
    torch.manual_seed(0)
    model = obc.load_model("resnet8", 10, in_channels=1, width=8)
    return model, data


@pytest.fixture
def studio(made, tmp_path):
    """A studio that has scored and planned."""
    found = PruningStudio(*made, batches=2, batch_size=32, held_out=1, source=SOURCE)
    found._controls.path.value = str(tmp_path / "out")
    return found.wait(60)


def controls(studio):
    return studio._controls


def kept_bars(studio):
    return int(studio.figure.data[0].y.sum())


def test_it_starts_with_a_plan_by_the_jacobian_criterion(studio):
    assert studio.plan == obc.one_shot_plan(
        studio.session.scores(studio.state.choices.scoring), studio.session.costs, ratio=0.3
    )
    assert "speed-up" in controls(studio).table.value
    assert kept_bars(studio) == studio.plan.channels - studio.plan.channels_removed


def test_the_slider_makes_a_plan_without_a_forward_pass(studio):
    def refuse(*_):
        raise AssertionError("a forward pass")

    hook = studio.session.model.register_forward_pre_hook(refuse)
    before = studio.plan
    controls(studio).target.value = 0.5
    assert studio.plan.channels_removed == int(0.5 * studio.plan.channels)
    assert kept_bars(studio) == studio.plan.channels - studio.plan.channels_removed
    assert "Changed since" in studio.folds.titles[0] and before != studio.plan
    controls(studio).kind.value = "speedup"
    controls(studio).target.value = 2.0
    assert Target(speedup=2.0).met(studio.session.costs.of(studio.plan), studio.session.costs.original)
    hook.remove()


@pytest.mark.parametrize("kind", ["speedup", "macs", "params"])
def test_another_kind_of_target_begins_where_the_plan_is(studio, kind):
    controls(studio).target.value = 0.37
    before = studio.plan
    controls(studio).kind.value = kind
    assert studio.plan == before
    assert vars(studio.state.choices.target)[kind] is not None
    controls(studio).kind.value = "ratio"
    assert studio.plan == before


def test_undo_and_redo(studio):
    c, first = controls(studio), studio.plan
    c.scope.value = "local"
    second = studio.plan
    assert second != first
    studio.undo_button.click()
    assert (studio.plan, c.scope.value, studio.undo_button.disabled) == (first, "global", True)
    studio.redo_button.click()
    assert (studio.plan, c.scope.value, studio.redo_button.disabled) == (second, "local", True)


def test_a_drag_is_undone_at_once(studio):
    first = studio.plan
    for value in (0.35, 0.4, 0.45):
        controls(studio).target.value = value
    studio.undo_button.click()
    assert studio.plan == first and controls(studio).target.value == 0.3


def test_what_a_page_rounds_to_the_steps_of_a_slider_is_not_a_choice(studio):
    c, root = controls(studio), controls(studio).group.value
    studio.choose(Choices(target=Target(speedup=1.873), limits=Limits(max_ratio_of={root: 0.333})))
    before, plan, code = studio.state, studio.plan, studio.code
    c.target.value, c.limit.value = 1.88, 0.33
    assert (studio.state, studio.plan, studio.code) == (before, plan, code)
    c.scope.value = "local"
    assert studio.state.choices == replace(before.choices, limits=replace(before.choices.limits, scope="local"))
    c.target.value, c.limit.value = 1.9, 0.34
    assert studio.state.choices.target == Target(speedup=1.9)
    assert studio.state.choices.limits.max_ratio_of == {root: 0.34}


def test_equal_ways_of_the_speed_up_are_equal_ratios(studio):
    c = controls(studio)
    c.kind.value = "speedup"
    slider = c.target
    middle = slider.base ** ((slider.min + slider.max) / 2)
    assert middle == pytest.approx(math.sqrt(1.02 * 10))
    slider.value = middle + 0.001
    assert studio.state.choices.target == Target(speedup=round(middle + 0.001, 2))
    assert slider.value == middle + 0.001, "it is not torn from the mouse"


def test_a_slider_keeps_its_range(studio):
    """A page that is told another range and value may clip either, and tell it back."""
    c, told = controls(studio), []
    for each in (*c.targets.values(), c.limit):
        each.observe(lambda change: told.append(change["name"]), ["min", "max", "step"])
    for kind in (*c.targets, "ratio"):
        c.kind.value = kind
        assert c.place.children == (c.target,) == (c.targets[kind],)
    studio.undo_button.click()
    assert c.kind.value == "params" and c.place.children == (c.targets["params"],)
    assert told == []


def test_what_the_slider_of_another_kind_tells_late_is_not_a_choice(studio):
    c = controls(studio)
    c.kind.value = "speedup"
    before = studio.state
    c.targets["ratio"].value = 0.99
    assert studio.state == before
    studio.undo_button.click()
    c.targets["speedup"].value = 5.0
    assert studio.state.choices.target == Target(ratio=0.3) and c.target.value == 0.3


def test_a_target_beyond_the_slider_stays(studio):
    c = controls(studio)
    studio.choose(Choices(target=Target(speedup=12.5)))
    assert c.target.value == 10.0 and Target(speedup=12.5).met(
        studio.session.costs.of(studio.plan), studio.session.costs.original
    )
    c.scope.value = "local"
    assert studio.state.choices.target == Target(speedup=12.5)
    c.target.value = 9.0
    assert studio.state.choices.target == Target(speedup=9.0)


@pytest.mark.parametrize("name", ["target", "limit"])
def test_a_slider_is_not_set_while_it_is_dragged(studio, name):
    slider, told = getattr(controls(studio), name), []
    slider.value = 0.29000000000000004
    slider.observe(told.append, "value")
    studio._show()
    assert told == [] and slider.value == 0.29000000000000004
    assert "0.29" in studio.code and "0000000" not in studio.code


def test_a_drag_is_one_step_where_plans_are_slow(studio, monkeypatch):
    plan = studio.session.plan
    monkeypatch.setattr("obc_tools.widgets.studio.SECONDS_OF_A_DRAG", 0.1)
    monkeypatch.setattr(studio.session, "plan", lambda choices: time.sleep(0.15) or plan(choices))
    test_a_drag_is_undone_at_once(studio)


def test_a_click_in_the_score_bar_toggles_a_channel(studio):
    root, data = controls(studio).group.value, studio.figure.data
    before = studio.plan.kept_of(root)
    studio.clicked(Click(SCORES, (0,), 1, 0.5))
    channel = int(data[SCORES].customdata[0])
    assert set(before) ^ set(studio.plan.kept_of(root)) == {channel}
    kept, removed = data[SCORES - 2 : SCORES]
    assert channel not in studio.plan.kept_of(root) and removed.x.min() < 1 < kept.x.min()
    studio.toggle(root, channel)
    assert studio.plan.kept_of(root) == before


def test_a_click_on_a_group_shows_its_channels(studio):
    c, groups = controls(studio), studio.plan.groups
    free = [index for index, group in enumerate(groups) if group.prunable]
    whole = next(index for index, group in enumerate(groups) if not group.prunable)
    for index, shown in ((free[-1], free[-1]), (whole, free[-1]), (free[0], free[0])):
        studio.clicked(Click(UPPER, (index,), 1, 0.5))
        assert c.group.value == groups[shown].root
        assert f"channels of {groups[shown].root} by score" in studio.figure.layout.xaxis2.title.text


def test_other_bars_are_those_of_layers(studio):
    c = controls(studio)
    c.bars.value = "parameters"
    assert studio.figure.layout.yaxis.title.text == "parameters (millions)"
    assert 1e6 * studio.figure.data[0].y.sum() <= studio.session.costs.of(studio.plan).params
    before = studio.figure.data[0].y.sum()
    c.target.value = 0.5
    assert studio.figure.data[0].y.sum() < before
    place = list(studio.figure.data[0].x).index("layer2.0.conv2")
    studio.clicked(Click(UPPER, (place,), 1, 0.5))
    assert c.group.value == ("layer2.0.downsample.0", "out")
    c.bars.value = "channels"
    assert kept_bars(studio) == studio.plan.channels - studio.plan.channels_removed


def test_one_group_is_not_called_groups(studio):
    group, kept = next(
        (group, kept)
        for group, kept in zip(studio.plan.groups, studio.plan.kept, strict=True)
        if len(kept) < group.width
    )
    gone = min(set(range(group.width)) - set(kept))
    studio.choose(replace(studio.state.choices, by_hand=((group.root, gone, True), (group.root, kept[0], False))))
    assert studio.folds.titles[0].endswith(": 1 group")
    controls(studio).target.value = 0.6
    assert studio.folds.titles[0].endswith(" groups")


def test_what_cannot_be_toggled_is_said(studio):
    studio.toggle(("conv1", "out"), 1000)
    assert "no channel 1000" in studio.status.value


def test_locks_and_limits_of_a_group(studio):
    c = controls(studio)
    root = c.group.value
    c.limit.value = 0.0
    assert studio.plan.kept_of(root) == tuple(range(studio.plan.axes[root]))
    c.limit.value = 1.0
    assert studio.state.choices.limits.max_ratio_of == {}
    held = studio.plan.kept_of(root)
    c.locked.value = True
    c.target.value = 0.7
    assert studio.plan.kept_of(root) == held
    c.group.value = next(value for _, value in c.group.options if value != root)
    assert not c.locked.value
    c.group.value = root
    assert c.locked.value
    c.locked.value = False
    assert studio.state.choices.locked == ()


def test_another_criterion_is_scored_beside_the_kernel_and_kept(studio):
    c = controls(studio)
    c.criterion.value = "l1"
    studio.wait(60)
    scores = obc.score_groups(studio.session.model, studio.session.groups, "l1")
    assert studio.plan == obc.one_shot_plan(scores, studio.session.costs, ratio=0.3)
    c.criterion.value = "jacobian"
    assert not studio._worker.busy
    c.normalizer.value = "mean"
    studio.wait(60)
    assert studio.state.choices.scoring.normalizer == "mean"


def test_rows_go_with_criteria_that_have_them(studio):
    c = controls(studio)
    c.rows.value = "expected"
    studio.wait(60)
    assert studio.state.choices.scoring.rows == "expected" and "{'rows': 'expected'}" in studio.code
    c.criterion.value = "l1"
    studio.wait(60)
    assert studio.state.choices.scoring.rows is None and c.rows.value == "batch"


def test_a_new_setting_cancels_the_scoring_under_way(studio, monkeypatch):
    entered, go_on, scored = threading.Event(), threading.Event(), []
    score = studio.session.score

    def slow(scoring, batches):
        if scoring.criterion == "taylor":
            entered.set()
            assert go_on.wait(20)
        scored.append(scoring.criterion)
        return score(scoring, batches)

    monkeypatch.setattr(studio.session, "score", slow)
    first = studio.plan
    controls(studio).criterion.value = "taylor"
    assert entered.wait(20)
    controls(studio).target.value = 0.4
    assert studio.plan == first and scored == []
    with pytest.raises(ValueError, match="being scored"):
        studio.measure()
    controls(studio).criterion.value = "l2"
    go_on.set()
    studio.wait(60)
    assert scored == ["taylor", "l2"]
    assert studio.state.choices.scoring.criterion == "l2"
    scores = obc.score_groups(studio.session.model, studio.session.groups, "l2")
    assert studio.plan == obc.one_shot_plan(scores, studio.session.costs, ratio=0.4)
    assert studio.session.scores(studio.state.choices.scoring.__class__("taylor")) is None


def test_cancel_leaves_the_plan_and_goes_on_at_the_next_choice(studio, monkeypatch):
    go_on, score, first = threading.Event(), studio.session.score, studio.plan

    def slow(scoring, batches):
        assert go_on.wait(20)
        return score(scoring, batches)

    monkeypatch.setattr(studio.session, "score", slow)
    controls(studio).criterion.value = "whc"
    studio.cancel_button.click()
    go_on.set()
    assert not studio._worker.busy and studio.plan == first
    assert "cancelled" in studio.status.value
    assert controls(studio).criterion.value == "jacobian" and "'jacobian'" in studio.code
    controls(studio).target.value = 0.5
    studio.wait(60)
    assert studio.plan != first and studio.state.choices.scoring.criterion == "jacobian"


def test_code_is_not_written_before_its_plan_is_there(studio, monkeypatch, tmp_path):
    go_on, score = threading.Event(), studio.session.score
    monkeypatch.setattr(studio.session, "score", lambda *given: go_on.wait(20) and score(*given))
    controls(studio).criterion.value = "l1"
    studio.code_button.click()
    assert "being scored" in studio.status.value and not (tmp_path / "out.py").exists()
    go_on.set()
    studio.wait(60)
    studio.code_button.click()
    assert "'l1'" in (tmp_path / "out.py").read_text()


def test_images_that_the_network_does_not_take_are_named(made):
    colour = obc.load_model("resnet8", 10, in_channels=3, width=8)
    said = r"the data's images: CifarResNet cannot work on \(1, 1, 8, 8\) float32: .*3 channels"
    with pytest.raises(ValueError, match=said):
        PruningStudio(colour, made[1])


def test_what_is_no_network_is_refused(made):
    with pytest.raises(ValueError, match=r"model: expected a network \(nn.Module\), not str"):
        PruningStudio("resnet8", made[1])


@pytest.mark.parametrize(
    ("right", "examples", "low", "high"), [(64, 64, 0.9434, 1.0), (0, 64, 0.0, 0.0566), (50, 100, 0.4038, 0.5962)]
)
def test_the_interval_of_an_accuracy_is_wilsons(right, examples, low, high):
    """Ends by the formula of Wilson (1927), worked out by hand; the table shows the longer way to one of them."""
    found = Metrics(0.1, right / examples, 1.0, examples)
    reach = max(found.accuracy - low, high - found.accuracy)
    assert with_interval(found) == f"{found.accuracy:.2%} ± {reach:.2%}"


def doubled(model):
    with torch.no_grad():
        model.conv1.weight.mul_(2)


def another_layer(model):
    model.conv1 = copy.deepcopy(model.conv1)


def another_type(model):
    model.double()


@pytest.mark.parametrize(
    ("view", "change"),
    [(PruningStudio, doubled), (JTJExplorer, another_layer), (InteractionExplorer, another_type)],
)
def test_a_model_that_changes_under_an_open_view_is_told(made, view, change):
    model = copy.deepcopy(made[0])
    shown = view(model, made[1], batches=1, batch_size=32).wait(60)
    batches = made[1].batches("train", 32)
    for step in (
        lambda: model.conv1.weight.data.shape,
        lambda: obc.evaluate(model, made[1].batches("val", 64)),
        lambda: obc.score_groups(
            model, obc.find_groups(model, torch.zeros(1, 1, 8, 8)), "jacobian", obc.take(batches, 1)
        ),
    ):
        step()
        shown.tell("looked")
        assert "has changed since" not in shown.status.value
    change(model)
    shown.tell("looked")
    assert "looked" in shown.status.value and "the model has changed since: shown is what it was" in shown.status.value


@pytest.mark.parametrize("view", [PruningStudio, JTJExplorer, InteractionExplorer])
def test_classes_that_do_not_fit_are_said(made, view):
    few = obc.load_model("resnet8", 7, in_channels=1, width=8)
    assert "for a model with 7 outputs (0 to 6)" in view(few, made[1], batches=1).wait(60).status.value


def test_cancelling_the_first_scoring_leaves_the_whole_network(made, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr("obc_tools.studio.StudioSession.score", lambda *_: go_on.wait(20))
    studio = PruningStudio(*made, batches=1, batch_size=8)
    studio.cancel_button.click()
    go_on.set()
    assert studio.plan == studio.session.whole and "cancelled" in studio.status.value


def test_measuring_fills_the_table(studio, monkeypatch):
    controls(studio).target.value = 0.5
    studio.measure_button.click()
    studio.wait(60)
    batch = list(studio.session.held_out_batches())
    expected = obc.evaluate(obc.prune(studio.session.model, studio.plan), batch)
    assert studio.session.measured(studio.plan).metrics == expected
    whole = len(studio.session.data.val)
    assert f"accuracy ± 95 % ({expected.examples} of {whole:,} held-out examples)" in controls(studio).table.value
    assert controls(studio).table.value.count(" ± ") == 1 + 3
    latency = studio.session.measured(studio.plan).latency
    assert latency.median_ms > 0 and "measured 3 plans" in studio.status.value
    monkeypatch.setattr("obc_tools.studio.evaluate", lambda *_: pytest.fail("evaluated again"))
    studio.measure_button.click()
    studio.wait(60)
    assert studio.session.measured(studio.plan).metrics == expected
    assert studio.session.measured(studio.plan).latency != latency


def test_measuring_tells_what_compensation_gives(studio, tmp_path):
    session, table = studio.session, controls(studio).table
    controls(studio).target.value = 0.7
    studio.measure_button.click()
    studio.wait(60)
    assert "compensated" not in table.value and session.measured(studio.plan).compensated is None
    controls(studio).compensate.value = True
    studio.measure_button.click()
    studio.wait(60)
    made = obc.compensate(session.model, studio.plan, session.calibration())
    measured = session.measured(studio.plan)
    assert measured.compensated == obc.evaluate(made, list(session.held_out_batches())) != measured.metrics
    assert session.measured(session.whole).compensated is None
    row = session.row("now", studio.plan)
    assert row["accuracy, compensated"].startswith(f"{measured.compensated.accuracy:.2%} ± ")
    assert "<th>accuracy, compensated</th>" in table.value and row["accuracy, compensated"] in table.value
    assert session.row("original", session.whole)["accuracy, compensated"] == ""
    saved = obc.load_pruned(studio.export_model(tmp_path / "made"))
    assert all(torch.equal(value, made.state_dict()[key]) for key, value in saved.state_dict().items())


def test_a_hand_choice_at_the_end_of_a_target_leads_to_the_nearest_plan(studio, made, tmp_path):
    """The header says how far it gets; code and exports are those of the plan that is shown."""
    c, costs = controls(studio), studio.session.costs
    c.kind.value = "speedup"
    c.target.value = c.target.base**c.target.max
    met, asked = studio.plan, studio.state.choices.target.speedup
    assert f"x of {asked:.2f}x asked (operations that run), parameters " in c.header.value
    hands = tuple((group.root, n, True) for group in met.groups if group.prunable for n in range(group.width // 2))
    studio.choose(replace(studio.state.choices, by_hand=hands))
    reached = costs.original.macs / costs.of(studio.plan).macs
    assert reached < asked and studio.plan != met
    assert f"{reached:.2f}x of {asked:.2f}x asked" in c.header.value and "Error" not in studio.status.value
    assert c.code.value == studio.code and "nearest=True" in studio.code
    namespace = dict(zip(("model", "data"), made, strict=True))
    exec(studio.code, namespace)
    assert namespace["plan"] == studio.plan and repr(namespace["plan"]) == repr(studio.plan)
    studio.plan_button.click()
    assert PruningPlan.from_json((tmp_path / "out.json").read_text()) == studio.plan
    studio.undo_button.click()
    assert studio.plan == met and "nearest" not in studio.code


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_inputs_follow_the_precision_of_the_network(made, dtype):
    model = copy.deepcopy(made[0]).to(dtype)
    studio = PruningStudio(model, made[1], batches=2, batch_size=32, held_out=1).wait(60)
    studio._controls.compensate.value = True
    studio.measure()
    assert "measured 2 plans" in studio.wait(60).status.value
    namespace = {"model": model, "data": made[1]}
    exec(studio.code, namespace)
    assert namespace["plan"] == studio.plan and f"dtype={dtype}" in studio.code


def test_choices_that_make_no_plan_leave_plan_and_code(studio):
    plan, code, root = studio.plan, studio.code, controls(studio).group.value
    studio.choose(Choices(by_hand=tuple((root, channel, False) for channel in range(8))))
    assert "no channel is kept" in studio.status.value
    assert studio.plan == plan and studio.code == code == controls(studio).code.value


def test_a_failure_beside_the_kernel_is_shown(studio, monkeypatch):
    def fail(scoring, batches):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(studio.session, "score", fail)
    controls(studio).criterion.value = "random"
    studio._worker.wait(20)
    assert "RuntimeError: no memory left" in studio.status.value


def test_plans_are_compared(studio):
    c = controls(studio)
    c.name.value = "mild"
    studio.remember_button.click()
    mild = studio.plan
    c.target.value = 0.6
    assert c.compared.value == "mild" and c.compared.options == ("none", "mild")
    assert list(studio.figure.data[3].y) == [len(kept) for kept in mild.kept]
    assert studio.folds.titles[0].startswith("Changed since mild: ") and c.changes.value == "", (
        "closed, it costs nothing"
    )
    studio.folds.selected_index = FOLDS.index(CHANGED)
    assert "<table" in c.changes.value
    c.compared.value = "none"
    assert len(studio.figure.data[3].y) == 0


def test_the_graph_is_drawn_where_it_is_open_and_leads_to_groups(studio):
    c, boxes = controls(studio), lambda: studio.graph.figure.data
    c.target.value = 0.4
    assert not boxes(), "closed, it costs nothing"
    studio.folds.selected_index = 1
    drawn = coupling_graph(studio.plan, obc.layers_table(studio.session.model, studio.plan, studio.session.example))
    assert studio.graph.figure == drawn
    c.target.value = 0.6
    assert boxes()[-1].text != drawn.data[-1].text
    roots = [root for _, root in boxes()[-1].customdata]
    here = roots.index("layer3.0.conv1.out")
    for place, trace in ((here, len(boxes()) - 1), (0, 0), (len(roots) - 1, len(boxes()) - 1)):
        studio._clicked_layer(Click(trace, (place,), 0, 0))
        assert c.group.value == ("layer3.0.conv1", "out"), "neither a line nor what is kept whole is a group to show"


def test_the_frontier_shows_other_targets_and_where_the_plan_stands(studio):
    fold = FOLDS.index(FRONTIER)
    studio.folds.selected_index = fold
    assert not studio.frontier.figure.data, "nothing was measured yet"
    studio.frontier_button.click()
    studio.wait(60)
    (curve,) = studio.frontier.figure.data
    assert curve.name == "jacobian" and len(curve.x) > 4 and max(curve.x) == 100 and list(curve.x) == sorted(curve.x)
    assert "measured the frontier" in studio.status.value
    session, batch = studio.session, list(studio.session.held_out_batches())
    plan = session.plan(replace(studio.state.choices, target=Target(speedup=session_speedups(studio)[3])))
    left = 100 * session.costs.of(plan).macs / session.costs.original.macs
    place = [round(x, 6) for x in curve.x].index(round(left, 6))
    assert curve.y[place] == pytest.approx(100 * obc.evaluate(obc.prune(session.model, plan), batch).accuracy)
    studio.measure_button.click()
    studio.wait(60)
    assert [trace.name for trace in studio.frontier.figure.data] == ["jacobian", "now"]
    controls(studio).target.value = 0.6
    now = 100 * session.costs.of(studio.plan).macs / session.costs.original.macs
    assert studio.frontier.figure.layout.shapes[0].x0 == pytest.approx(now)
    assert [trace.name for trace in studio.frontier.figure.data] == ["jacobian"], "this plan was not measured"


def session_speedups(studio):
    most = min(MOST, controls(studio).reach.of("speedup")[1])
    return np.geomspace(most ** (1 / POINTS), most, POINTS)


def test_each_group_alone_is_a_map_that_leads_to_groups(studio):
    studio.folds.selected_index = FOLDS.index(SENSITIVITY)
    studio.sensitivity_button.click()
    studio.wait(60)
    (drawn,) = studio.sensitivity.figure.data
    roots = [str(group.root) for group in studio.plan.groups if group.prunable]
    assert list(drawn.y) == roots and len(drawn.x) == len(RATIOS)
    studio.sensitivity._handle_custom_msg({"trace": 0, "place": [2, 0], "x": "25", "y": roots[2]}, [])
    assert str(controls(studio).group.value) == roots[2]
    controls(studio).scope.value = "local"
    assert studio.session.sensed(studio.state.choices) is None and not studio.sensitivity.figure.data


def test_sliders_end_where_the_network_does(made):
    studio = PruningStudio(*made, batches=1, batch_size=32, ignore=["layer[12].*", "conv1", "layer3.0.downsample.0"])
    reach = studio.wait(60)._controls.reach
    targets = controls(studio).targets
    most = targets["speedup"].base ** targets["speedup"].max
    assert most == pytest.approx(reach.of("speedup")[1], abs=0.02) and most < 2
    assert targets["macs"].min == pytest.approx(reach.least.macs / 1e6, rel=0.02)
    controls(studio).kind.value = "speedup"
    controls(studio).target.value = targets["speedup"].max
    assert "x asked (operations that run)" in controls(studio).header.value


def test_what_an_export_will_do_is_said_before(studio, tmp_path):
    c = controls(studio)
    assert c.there.value == close(note(""))
    studio.plan_button.click()
    assert "out.json&#x27; will be replaced" in c.there.value and "in use" not in c.there.value
    studio.model_button.click()
    assert "out&#x27; is in use: no model is written into it" in c.there.value
    c.path.value = str(tmp_path / "other")
    assert c.there.value == close(note(""))


@pytest.mark.parametrize(
    ("typed", "model", "files"),
    [
        ("", "'' names no file", True),
        ("n" * 250, "is no name: it is too long", True),
        ("a\0b", "is no name: it is too long, or a NUL", True),
        ("there/", "'there/' names no file", True),
        ("~nobody-of-this-name/x", "there is no such home", True),
        ("file", "file' is a file: no model is written over it", False),
        ("file/x", "file' is a file, nothing is written below it", True),
        ("used", "used' is in use: no model is written into it", False),
        ("taken", None, True),
    ],
)
def test_what_cannot_be_written_is_said_before_and_names_the_way_out(
    studio, tmp_path, monkeypatch, typed, model, files
):
    """No file is written, and the words are those of the page's own controls."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").touch()
    for ending in (".json", ".py"):
        (tmp_path / f"taken{ending}").mkdir()
    c, before = controls(studio), sorted(tmp_path.rglob("*"))
    c.path.value = typed
    refused = [studio.model_button] if model else []
    for button in (*refused, *([studio.plan_button, studio.code_button] if files else [])):
        button.click()
        assert "type another name under &#x27;write to&#x27;" in studio.status.value
        assert "overwrite" not in studio.status.value and "type another name" in c.there.value
        assert sorted(tmp_path.rglob("*")) == before
    if model:
        assert note(model)[len("<span style='color:inherit'>") : -len("</span>")] in c.there.value


def test_home_is_home(studio, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    controls(studio).path.value = "~/studio.json"
    studio.plan_button.click()
    assert (tmp_path / "home" / "studio.json").is_file() and not (tmp_path / "~").exists()
    assert "studio.json&#x27; will be replaced" in controls(studio).there.value


def test_the_plan_is_taken_away(studio, made, tmp_path):
    model, data = made
    studio.toggle(controls(studio).group.value, 0)
    c = controls(studio)
    for made_button in (studio.plan_button, studio.model_button, studio.code_button):
        made_button.click()
        assert "wrote" in studio.status.value
    assert PruningPlan.from_json((tmp_path / "out.json").read_text()) == studio.plan
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["source"]["name"] == "resnet8"
    images = next(iter(data.batches("val", 4)))[0]
    loaded, direct = obc.load_pruned(tmp_path / "out"), obc.prune(studio.session.model, studio.plan)
    assert torch.equal(loaded(images), direct(images))
    namespace = {"model": model, "data": data}
    exec((tmp_path / "out.py").read_text(), namespace)
    assert namespace["plan"] == studio.plan
    assert c.code.value == studio.code == (tmp_path / "out.py").read_text()
    studio.model_button.click()
    assert "out" in studio.status.value and "wrote" not in studio.status.value


def test_the_model_is_left_alone(made):
    model, data = made
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    PruningStudio(model, data, batches=1, batch_size=32, ignore=["conv1"], look="dark").wait(60)
    assert model.training and not any(p.grad is not None for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="unknown theme 'loud'"):
        PruningStudio(model, data, look="loud")


def test_only_a_part_of_a_transformer_goes_and_the_code_says_so():
    data = obc.load_data("digits")
    options = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 4}
    model = timm.models.VisionTransformer(**options, num_classes=10)
    studio = PruningStudio(model, data, batches=1, batch_size=32, whole_heads=True, only="attention").wait(60)
    (group,) = (group for group in studio.plan.groups if group.prunable)
    assert (str(group.root), group.width) == ("blocks.0.attn.qkv.out", 16)
    namespace = {"model": model, "data": data}
    exec(studio.code, namespace)
    assert namespace["plan"] == studio.plan
    assert namespace["pruned"].blocks[0].attn.num_heads < 4
    with pytest.raises(ValueError, match="unknown only 'heads'"):
        PruningStudio(model, data, only="heads")


def test_the_top_level_resolves_it_lazily():
    assert obc.PruningStudio is studio_module.PruningStudio
