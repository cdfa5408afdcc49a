"""The graph of the coupled layers, against the groups that it draws."""

import pytest
import torch

import obc_tools as obc
from obc_tools.plots import coupling_graph
from obc_tools.plots.looks import COLORS
from obc_tools.plots.plans import HALF, LANES, ROWS
from obc_tools.pruning.plan import PruningPlan


@pytest.fixture(scope="module")
def drawn():
    torch.manual_seed(0)
    model, images = obc.load_model("resnet20", 10, in_channels=1), torch.zeros(1, 1, 8, 8)
    groups = obc.find_groups(model, images)
    plan = obc.make_plan(obc.score_groups(model, groups, "l1"), ratio=0.4)
    return plan, obc.layers_table(model, plan, images)


def boxes(figure):
    """Return (left, right, row, colour) of every box that has this kind of filling, whole ones first."""
    found = {True: {}, False: {}}
    for trace in figure.data:
        if trace.fill == "toself":
            whole = not trace.fillcolor.startswith("rgba")
            for start in range(0, len(trace.x), 6):
                row = round(sum(trace.y[start : start + 4]) / 4, 6)
                ends = min(trace.x[start : start + 4]), max(trace.x[start : start + 4])
                found[whole][row] = (*ends, trace.line.color, trace.line.dash)
    return found[True], found[False]


def test_every_layer_is_a_box_in_running_order_filled_as_far_as_its_channels_go(drawn):
    plan, table = drawn
    figure = coupling_graph(plan, table)
    layers = [name for name in table["layer"] if "conv" in name or "downsample.0" in name or name == "fc"]
    assert [text.split("  ")[0] for text in figure.layout.yaxis.ticktext] == layers and list(
        figure.layout.yaxis.tickvals
    ) == list(range(22))
    whole, gone = boxes(figure)
    assert sorted(whole) == list(range(22))
    for group, kept in zip(plan.groups, plan.kept, strict=True):
        rows = [layers.index(m.axis.layer) for m in group.members if m.role == "output"]
        assert len({whole[row][2:] for row in rows}) == len({whole[row][:2] for row in rows}) == 1
        for row in rows:
            share = 1 - len(kept) / group.width
            width = 2 * HALF * share
            assert (gone[row][1] - gone[row][0] == pytest.approx(width)) if share else row not in gone
            assert (whole[row][2] == COLORS["original"]) == (not group.prunable)
    assert len({box[2] for box in whole.values()}) > 6


@pytest.mark.parametrize("name", ["resnet20", "resnet56"])
def test_no_two_groups_look_alike(name):
    """13 and 31 groups, 8 colours: line or dash differ, and the number behind the names of their layers."""
    model, images = obc.load_model(name, 10, in_channels=1), torch.zeros(1, 1, 8, 8)
    plan = PruningPlan.whole(obc.find_groups(model, images))
    figure = coupling_graph(plan, obc.layers_table(model, plan, images))
    whole, _ = boxes(figure)
    layers, numbers = zip(*(text.split("  ") for text in figure.layout.yaxis.ticktext), strict=True)
    looks = {}
    for group in plan.groups:
        rows = [layers.index(member.axis.layer) for member in group.members if member.role == "output"]
        looks[group.root] = {(*whole[row][2:], numbers[row]) for row in rows}
        assert len(looks[group.root]) == 1
    drawn = [look.pop() for look in looks.values()]
    assert len({number for *_, number in drawn}) == len({look[:2] for look in drawn}) == len(plan.groups)


def test_lines_join_each_group_with_what_reads_it(drawn):
    plan, table = drawn
    figure = coupling_graph(plan, table)
    layers, (whole, _) = [text.split("  ")[0] for text in figure.layout.yaxis.ticktext], boxes(figure)
    segments = set()
    for trace in figure.data:
        if trace.mode == "lines" and trace.fill is None:
            for start in range(0, len(trace.x), 3):
                segments.add((trace.line.color, *trace.x[start : start + 2], *trace.y[start : start + 2]))
    for group in plan.groups:
        makes, reads = (
            sorted(layers.index(m.axis.layer) for m in group.members if m.role == role) for role in ("output", "input")
        )
        left, right, color, _ = whole[makes[0]]
        lane = round((left + right) / 2)
        assert (color, lane, lane, makes[0], max(makes + reads)) in segments
        for row in reads:
            there = round((whole[row][0] + whole[row][1]) / 2)
            assert there == lane or (color, lane, there, row, row) in segments


def test_boxes_show_widths_and_tell_the_rest(drawn):
    plan, table = drawn
    labels = coupling_graph(plan, table).data[-1]
    left = len(plan.kept_of(("layer1.0.conv1", "out")))
    assert left < 16 and labels.text[:3] == ("1 → 16", f"16 → {left}/16", f"{left}/16 → 16")
    row = table.set_index("layer").loc["layer1.0.conv1"]
    assert labels.customdata[1][0] == (
        f"layer1.0.conv1 (Conv2d): 16 → {left}/16<br>group layer1.0.conv1.out: {left} of 16 channels kept<br>"
        f"1 layer make them, 1 read them, 1 norm<br>"
        f"parameters: {row['parameters after']:,} of 2,304<br>MACs: {row['MACs after']:,.0f} of {row['MACs']:,.0f}"
    )
    assert labels.ids is None, "plotly draws one point of those that share an id"
    assert [root for _, root in labels.customdata[1:3]] == ["layer1.0.conv1.out", "conv1.out"]
    assert "kept whole: reaches the model's output" in labels.customdata[-1][0]


def test_a_long_network_shows_its_beginning_and_is_moved(drawn):
    torch.manual_seed(0)
    model, images = obc.load_model("resnet56", 10, in_channels=1), torch.zeros(1, 1, 8, 8)
    plan = PruningPlan.whole(obc.find_groups(model, images))
    figure = coupling_graph(plan, obc.layers_table(model, plan, images), look="dark")
    assert figure.layout.dragmode == "pan" and figure.layout.yaxis.range == (ROWS - 0.3, -0.7)
    assert len(figure.layout.yaxis.ticktext) > ROWS and figure.layout.xaxis.range[1] <= LANES
    assert not boxes(figure)[1], "nothing goes, nothing is filled"


def test_what_cannot_be_drawn(drawn):
    plan, table = drawn
    with pytest.raises(ValueError, match="no group to draw: give a plan for what find_groups returned"):
        coupling_graph(PruningPlan((), ()), table)
    with pytest.raises(ValueError, match="layer 'fc' of the plan is not in the table: give layers_table's of its net"):
        coupling_graph(plan, table[table["layer"] != "fc"])
    with pytest.raises(ValueError, match="unknown theme 'blue'"):
        coupling_graph(plan, table, look="blue")
