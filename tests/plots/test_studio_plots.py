"""The figure of the studio: its bars of groups or layers, and of scores."""

import pytest
import timm
import torch

import obc_tools as obc
from obc_tools.plots.plans import SCORES, UPPER, studio_figure
from obc_tools.pruning.plan import PruningPlan
from obc_tools.structure.groups import ChannelGroup, Member
from obc_tools.structure.layers import LayerAxis
from obc_tools.studio import BARS, studio_bars

ROOT = LayerAxis("layer", "out")


def group_of(width):
    places = tuple(range(width))
    return ChannelGroup(ROOT, width, (Member(ROOT, places, places, width, "Linear"),))


def drawn(plan, scores):
    return studio_figure(studio_bars(plan, ROOT), plan.kept_of(ROOT), str(ROOT), scores)


@pytest.mark.parametrize("scores, scale", [([3.0, 1.0, 2.0, 0.0], "linear"), ([1000.0, 1.0, 10.0, 2.0], "log")])
def test_the_bars_of_each_colour_are_one_outline(scores, scale):
    group = group_of(4)
    figure = drawn(PruningPlan((group,), ((0, 2),)), torch.tensor(scores))
    kept, removed, told = figure.data[SCORES - 2 :]
    falling = sorted(range(4), key=lambda channel: -scores[channel])
    assert list(told.customdata) == falling and list(told.y) == sorted(scores, reverse=True)
    for outline, channels in ((kept, {0, 2}), (removed, {1, 3})):
        shown = [channel for channel in falling if channel in channels]
        assert [x + 0.42 for x in outline.x[::4]] == pytest.approx([falling.index(c) + 1 for c in shown])
        assert list(outline.y[1::4]) == list(outline.y[2::4]) == [scores[channel] for channel in shown]
    assert figure.layout.yaxis2.type == scale
    assert 0 < kept.y[0] < 1 if scale == "log" else kept.y[0] == 0


def test_many_bars_have_no_gaps():
    figure = drawn(PruningPlan.whole([group_of(300)]), torch.arange(300.0))
    assert list(figure.data[SCORES - 2].x[:5]) == [0.5, 0.5, 1.5, 1.5, 1.5]


@pytest.fixture(scope="module")
def resnet20():
    """A network's plans, whole and of half its channels, and its costs."""
    torch.manual_seed(0)
    model = obc.load_model("resnet20", 10, in_channels=1)
    images = torch.zeros(1, 1, 8, 8)
    groups = obc.find_groups(model, images)
    half = obc.make_plan(obc.score_groups(model, groups, "l1"), ratio=0.5, scope="local")
    return PruningPlan.whole(groups), half, obc.cost_model(model, images)


@pytest.mark.parametrize("quantity", BARS[1:])
def test_bars_of_layers_hold_what_their_layers_cost(resnet20, quantity):
    whole, half, costs = resnet20
    root = LayerAxis("layer1.0.conv1", "out")
    shown = studio_bars(half, root, bars=quantity, costs=costs, compared=whole)
    before, after = (costs.by_layer(plan).set_index("layer")[quantity] for plan in (whole, half))
    assert len(shown.names) > 9 and all(before[name] >= before.sum() / 1000 for name in shown.names)
    assert before.drop(shown.names).max() < before.sum() / 1000
    assert shown.whole.tolist() == shown.marks.tolist() == [before[name] / 1e6 for name in shown.names]
    assert shown.now.tolist() == [after[name] / 1e6 for name in shown.names]
    assert shown.unit == f"{quantity} (millions)" and not shown.fixed.any()
    place = shown.names.index("layer1.0.conv2")
    assert shown.roots[place] == LayerAxis("conv1", "out")
    roots = dict(zip(shown.names, shown.roots, strict=True))
    assert ("fc" in roots) == (quantity == "parameters") and roots.get("fc") is None, quantity
    assert shown.notes[place] == f"layer1.0.conv2: {after.iloc[4]:,.0f} of {before.iloc[4]:,.0f} {quantity}"
    assert [name for name, chosen in zip(shown.names, shown.chosen, strict=True) if chosen] == ["layer1.0.conv1"]
    figure = studio_figure(shown, half.kept_of(root), str(root), torch.arange(16.0))
    assert figure.layout.yaxis.title.text == shown.unit and figure.layout.xaxis.title.text == shown.title
    assert [trace.name for trace in figure.data[UPPER : UPPER + 4] if trace.showlegend is not False] == [
        "kept",
        "removed",
        "kept by the compared plan",
    ]


def test_a_layer_that_counts_as_a_whole_leads_to_the_groups_within():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32, depth=1, embed_dim=24, num_heads=2)
    images = torch.zeros(1, 3, 32, 32)
    plan, costs = PruningPlan.whole(obc.find_groups(model, images)), obc.cost_model(model, images)
    shown = studio_bars(plan, plan.groups[0].root, bars="MACs", costs=costs)
    assert shown.roots[shown.names.index("blocks.0.attn")].layer.startswith("blocks.0.attn.")


def test_unknown_bars_and_bars_without_costs(resnet20):
    whole, _, costs = resnet20
    root = whole.groups[0].root
    for options in ({"bars": "MACs"}, {"bars": "seconds", "costs": costs}):
        with pytest.raises(
            ValueError, match="bars of '(MACs|seconds)'; expected one of 'channels', 'MACs', 'parameters'"
        ):
            studio_bars(whole, root, **options)
