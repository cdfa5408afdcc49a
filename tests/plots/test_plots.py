import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from torch import nn

from obc_tools import plots
from obc_tools.plots.looks import COLORS, PALETTE, color_of, theme
from obc_tools.pruning.plan import PruningPlan
from obc_tools.scoring.jtj import DenseJTJ, FilterInteractions, group_jtj
from obc_tools.structure.groups import ChannelGroup, Member, find_groups
from obc_tools.structure.layers import LayerAxis
from obc_tools.training.folder import Epoch, History


def dense(channels=5, d=6, seed=0):
    jacobian = torch.randn(channels, 9, d, generator=torch.Generator().manual_seed(seed))
    jacobian[1] = 0
    labels = tuple(f"weight[:, {i}]" for i in range(d))
    shown = tuple(range(10, 10 + channels))
    return DenseJTJ(LayerAxis("conv", "out"), shown, jacobian.mT @ jacobian, torch.ones(channels, d), labels)


def group():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 2))
    model.append(nn.Flatten())
    found = find_groups(model, torch.randn(1, 3, 4, 4))[0]
    return group_jtj(model, [(torch.randn(6, 3, 4, 4), torch.randint(0, 2, (6,)))] * 2, found, 2, rows="sample")


def interactions():
    products = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).double()
    return FilterInteractions(LayerAxis("conv", "out"), products.T @ products)


def member(layer, axis, width):
    return Member(LayerAxis(layer, axis), tuple(range(width)), tuple(range(width)), width, "Conv2d")


def plan():
    groups = (
        ChannelGroup(LayerAxis("a", "out"), 4, (member("a", "out", 4), member("b", "in", 4))),
        ChannelGroup(LayerAxis("b", "out"), 8, (member("b", "out", 8),)),
        ChannelGroup(LayerAxis("fc", "out"), 3, (member("fc", "out", 3),), kept_whole="reaches the model's output"),
    )
    return PruningPlan(groups, ((0, 1, 3), (2, 5), (0, 1, 2)))


def history(epochs=3, base=0.5):
    rows = [(i, 0.1, 2 / i, base + i / 100, 3 / i, base + i / 200, 1.0, 10.0) for i in range(1, epochs + 1)]
    return History(tuple(Epoch(*row) for row in rows))


FIGURES = {
    "jtj_grid": lambda look: plots.jtj_grid(dense(), look=look),
    "jtj_heatmap": lambda look: plots.jtj_heatmap(dense(), 12, look=look),
    "group_jtj_heatmap": lambda look: plots.group_jtj_heatmap(group(), look=look),
    "interactions_heatmap": lambda look: plots.interactions_heatmap(interactions(), look=look),
    "spectrum": lambda look: plots.spectrum(dense(), look=look),
    "plot_plan": lambda look: plots.plot_plan(plan(), look=look),
    "plot_histories": lambda look: plots.plot_histories({"naive": history(), "EP": history()}, look=look),
}


@pytest.mark.parametrize("look", ["light", "dark"])
@pytest.mark.parametrize("name", FIGURES)
def test_figures_follow_the_look_and_name_no_background(name, look):
    figure = FIGURES[name](look)
    assert figure.layout.template.layout.paper_bgcolor == theme(look).layout.paper_bgcolor
    assert figure.layout.paper_bgcolor is None and figure.layout.plot_bgcolor is None
    assert json.loads(figure.to_json())["data"]


def test_looks_differ_and_unknown_ones_are_refused():
    assert theme("light").layout.font.color != theme("dark").layout.font.color
    with pytest.raises(ValueError, match="unknown theme 'drak'; closest: dark"):
        theme("drak")
    with pytest.raises(ValueError, match="unknown theme 'grey'"):
        plots.plot_plan(plan(), look="grey")


def test_colours_are_fixed_by_name():
    assert color_of("EP, merged") == color_of("ep") == COLORS["ep"]
    assert color_of("Naive") != color_of("EP")
    assert color_of("mine", 1) == PALETTE[1]
    assert color_of("", 0) == PALETTE[0]


def test_grid_shows_each_channel_scaled_by_itself_and_tells_the_values():
    figure, values = plots.jtj_grid(dense(), columns=3), dense().values.abs().numpy()
    assert len(figure.data) == 5
    for trace, value in zip(figure.data, values, strict=True):
        np.testing.assert_allclose(trace.z, value / (value.max() or 1), rtol=1e-6)
        np.testing.assert_array_equal(trace.customdata, value)
    assert list(figure.data[0].x) == list(dense().labels)
    titles = [note.text for note in figure.layout.annotations]
    assert titles[0] == f"10: {dense().score[0]:.2e}" and titles[1] == "11: 0"
    assert figure.layout.yaxis5.scaleanchor == "x5" and figure.layout.yaxis.autorange == "reversed"
    assert max(axis.domain[0] for axis in figure.select_xaxes()) > 0.6


def test_grid_with_a_shared_scale_has_the_values_themselves():
    figure = plots.jtj_grid(dense(), shared_scale=True)
    np.testing.assert_array_equal(figure.data[2].z, dense().values[2].abs().numpy())
    assert figure.data[2].customdata is None and "%{z" in figure.data[2].hovertemplate
    assert figure.layout.coloraxis.cmin == 0


def test_modes():
    values = dense().values
    correlated = plots.jtj_grid(dense(), mode="correlation")
    assert (correlated.layout.coloraxis.cmin, correlated.layout.coloraxis.cmax) == (-1, 1)
    for index in (0, 2):
        scale = values[index].diagonal().sqrt()
        np.testing.assert_allclose(correlated.data[index].z, values[index] / torch.outer(scale, scale), atol=1e-5)
    assert not np.any(correlated.data[1].z)
    signed = plots.jtj_heatmap(dense(), 12, "signed")
    np.testing.assert_array_equal(signed.data[0].z, values[2].numpy())
    assert signed.layout.coloraxis.cmid == 0
    for draw in (
        lambda: plots.jtj_grid(dense(), mode="sign"),
        lambda: plots.jtj_heatmap(dense(), 12, "sign"),
        lambda: plots.interactions_heatmap(interactions(), mode="sign"),
        lambda: plots.group_jtj_heatmap(group(), "sign"),
    ):
        with pytest.raises(ValueError, match="unknown mode 'sign'; closest: signed"):
            draw()


def test_large_matrices_are_pooled_and_say_so():
    large = dense(2, 130)
    figure = plots.jtj_grid(large)
    assert figure.data[0].customdata.shape == (64, 64)
    cell = large.values[0, 0:3, 0:3].abs().mean().item()
    assert figure.data[0].customdata[0, 0] == pytest.approx(cell, rel=1e-5)
    assert figure.data[0].x[0] == "weight[:, 0] + 2"
    assert "130 × 130" in figure.layout.title.text
    with pytest.raises(ValueError, match="columns=0"):
        plots.jtj_grid(large, columns=0)


def test_one_channel_tells_its_facts():
    figure = plots.jtj_heatmap(dense(), 12)
    assert "channel 12" in figure.layout.title.text and "off-diagonal share" in figure.layout.title.text
    assert list(figure.layout.xaxis.tickvals) == list(dense().labels)
    assert figure.data[0].customdata is None and "%{z" in figure.data[0].hovertemplate
    with pytest.raises(ValueError, match="no JᵀJ of channel 3"):
        plots.jtj_heatmap(dense(), 3)


def test_group_borders_lie_between_the_members():
    figure, jtj = plots.group_jtj_heatmap(group(), "signed"), group()
    np.testing.assert_allclose(figure.data[0].z, jtj.values.numpy(), rtol=1e-6)
    borders = [block.start - 0.5 for block in jtj.members[1:]]
    across = [line for line in figure.layout.shapes if line.x0 == line.x1]
    along = [line for line in figure.layout.shapes if line.y0 == line.y1]
    assert sorted(line.x0 for line in across) == sorted(line.y0 for line in along) == borders
    assert {(line.y0, line.y1) for line in across} == {(-0.5, len(jtj.labels) - 0.5)}
    assert list(figure.layout.xaxis.ticktext) == [str(block.axis) for block in jtj.members]
    assert figure.layout.xaxis.tickvals[0] == jtj.labels[14]


def test_ticks_have_room_for_their_names_and_long_ones_show_their_ends(monkeypatch):
    figure = plots.group_jtj_heatmap(group())
    longest = max(figure.layout.xaxis.ticktext, key=len)
    assert figure.layout.margin.l == figure.layout.margin.b == 32 + 6 * len(longest)
    assert figure.layout.xaxis.automargin is figure.layout.yaxis.automargin is False
    monkeypatch.setattr("obc_tools.plots.jtj.LONGEST_TICK", 4)
    short = plots.group_jtj_heatmap(group()).layout.xaxis.ticktext
    assert short == ("…out", "…out", "3.in")


def test_group_is_pooled_member_by_member(monkeypatch):
    monkeypatch.setattr("obc_tools.plots.jtj.LARGE_CELLS", 10)
    figure, jtj = plots.group_jtj_heatmap(group()), group()
    factor = math.ceil(len(jtj.labels) / 10)
    sizes = [math.ceil((block.stop - block.start) / factor) for block in jtj.members]
    assert figure.data[0].z.shape == (sum(sizes), sum(sizes))
    first, second = jtj.members[:2]
    corner = jtj.values[first.start : factor, second.start : second.stop].abs().mean().item()
    assert figure.data[0].z[0, sizes[0]] == pytest.approx(corner, rel=1e-5)
    across = sorted({line.x0 for line in figure.layout.shapes if line.x0 == line.x1})
    assert across == [border - 0.5 for border in np.cumsum(sizes)[:-1]]


def test_interactions_in_the_order_asked_for():
    found = interactions()
    for order in ("cluster", "score"):
        figure, place = plots.interactions_heatmap(found, order), list(found.order(order))
        np.testing.assert_allclose(figure.data[0].z, found.correlation[place][:, place].numpy())
        assert list(figure.data[0].x) == [str(channel) for channel in place]
    plain = plots.interactions_heatmap(found, "channel", "signed")
    np.testing.assert_array_equal(plain.data[0].z, found.values.numpy())
    with pytest.raises(ValueError, match="unknown order 'alphabet'"):
        plots.interactions_heatmap(found, "alphabet")


def test_spectrum_shows_shares_of_the_sum():
    figure, found = plots.spectrum(dense()), dense()
    shares = (found.eigenvalues[0] / found.eigenvalues[0].sum()).numpy()
    np.testing.assert_allclose(figure.data[0].y, shares)
    assert len(figure.data[1].y) == 0
    assert figure.layout.yaxis.type == "log"


def test_a_spectrum_ends_at_the_rank():
    found = dense(channels=4, d=40)
    rows = torch.randn(4, 3, 40, generator=torch.Generator().manual_seed(1))
    figure = plots.spectrum(replace(found, values=rows.mT @ rows))
    assert [len(trace.y) for trace in figure.data] == [3] * 4


def test_plan_shows_kept_removed_and_whole():
    bars = {bar.name: list(bar.y) for bar in plots.plot_plan(plan()).data}
    assert bars == {"kept": [3, 2, 0], "removed": [1, 6, 0], "kept whole": [0, 0, 3]}
    figure = plots.plot_plan(plan())
    assert list(figure.data[0].x) == ["a", "b", "fc"]
    assert figure.layout.title.text == "Channels by group: 7 of 12 prunable channels removed"
    assert "reaches the model's output" in figure.data[0].customdata[2]
    whole = plots.plot_plan(PruningPlan.whole(plan().groups[:2]))
    assert [bar.name for bar in whole.data] == ["kept"]


def test_histories_share_axes_and_keep_their_colours():
    figure = plots.plot_histories({"naive": history(3, 0.5), "EP": history(3, 0.6), "other": history(40)})
    by_name = {(trace.name, trace.xaxis): trace for trace in figure.data}
    assert len(by_name) == 12
    np.testing.assert_allclose(by_name["EP, validation", "x"].y, [3, 1.5, 1])
    np.testing.assert_allclose(by_name["EP, validation", "x2"].y, [60.5, 61, 61.5])
    np.testing.assert_allclose(by_name["naive, training", "x2"].y, [51, 52, 53])
    assert by_name["naive, training", "x"].line.color == COLORS["naive"]
    assert by_name["EP, validation", "x"].line.dash == "solid"
    assert by_name["EP, validation", "x"].mode == "lines+markers" and by_name["other, training", "x"].mode == "lines"
    assert figure.layout.yaxis2.title.text == "accuracy (%)"
    with pytest.raises(ValueError, match="no history to draw"):
        plots.plot_histories({})


def test_save_html_needs_no_network(tmp_path):
    path = plots.save_html(plots.plot_plan(plan()), tmp_path / "plan.html")
    page = path.read_text(encoding="utf-8")
    assert "prunable channels removed" in page and "<script src=" not in page
    assert len(page) > 3e6


def test_save_png_needs_kaleido(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package kaleido"):
        plots.save_png(plots.plot_plan(plan()), tmp_path / "plan.png")
    written = {}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(go.Figure, "write_image", lambda figure, path, **options: written.update(options, path=path))
    plots.save_png(plots.plot_plan(plan()), tmp_path / "plan.png", width=800)
    assert written == {"path": tmp_path / "plan.png", "format": "png", "width": 800, "height": 420, "scale": 2}


def test_accuracy_over_macs_joins_networks_of_one_name():
    columns = ["network", "MACs left", "accuracy", "error"]
    rows = [("EP", 0.25, 0.8, 0.01), ("original", 1.0, 0.9, 0.02), ("EP", 0.5, 0.85, 0.03)]
    table = pd.DataFrame(rows, columns=columns)
    figure = plots.accuracy_over_macs(table)
    assert [trace.name for trace in figure.data] == ["EP", "original"] and figure.layout.xaxis.autorange == "reversed"
    for trace, expected in zip(figure.data, ([(25, 80, 1), (50, 85, 3)], [(100, 90, 2)]), strict=True):
        drawn = np.array([trace.x, trace.y, trace.error_y.array]).T
        assert drawn == pytest.approx(np.array(expected))
        assert trace.line.color == color_of(trace.name)
    assert plots.accuracy_over_macs(table.drop(columns="error")).data[0].error_y.array is None
    with pytest.raises(ValueError, match="no network to draw: give a table with a row for each"):
        plots.accuracy_over_macs(table[:0])
