"""The figure of the studio: its bars of scores."""

import pytest
import torch

from obc_tools.groups import ChannelGroup, Member
from obc_tools.layers import LayerAxis
from obc_tools.plan import PruningPlan
from obc_tools.studio_plots import SCORES, studio_figure

ROOT = LayerAxis("layer", "out")


def group_of(width):
    places = tuple(range(width))
    return ChannelGroup(ROOT, width, (Member(ROOT, places, places, width, "Linear"),))


@pytest.mark.parametrize("scores, scale", [([3.0, 1.0, 2.0, 0.0], "linear"), ([1000.0, 1.0, 10.0, 2.0], "log")])
def test_the_bars_of_each_colour_are_one_outline(scores, scale):
    group = group_of(4)
    figure = studio_figure(PruningPlan((group,), ((0, 2),)), ROOT, torch.tensor(scores))
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
    figure = studio_figure(PruningPlan.whole([group_of(300)]), ROOT, torch.arange(300.0))
    assert list(figure.data[SCORES - 2].x[:5]) == [0.5, 0.5, 1.5, 1.5, 1.5]
