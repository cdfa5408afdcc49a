"""Names that users bring stay words in every figure: none of their tags is drawn, ours are."""

import json

import pandas as pd
import pytest
import torch
from cases import curve
from torch import nn

import obc_tools as obc
from obc_tools import plots
from obc_tools.comparing.compare import Comparison
from obc_tools.plots.curves import watch_figure
from obc_tools.plots.looks import escaped
from obc_tools.plots.plans import plot_sensitivity, studio_axes, studio_figure, studio_traces
from obc_tools.pruning.equivalent import removed_shares
from obc_tools.runs.watch import RunView, watch_traces
from obc_tools.scoring.jtj import group_jtj
from obc_tools.studio import BARS, studio_bars
from obc_tools.training.folder import Epoch, History

NAME = "<b>x</b><img alt=q><a href='y'>&"
SHOWN = "&lt;b>x&lt;/b>&lt;img alt=q>&lt;a href='y'>&"
BATCH = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2
HISTORY = History((Epoch(1, 0.1, 2.0, 0.5, 3.0, 0.5, 1.0, 10.0, {NAME: 0.5}, {NAME: "higher"}),))


class Network(nn.Module):
    """Convolutions that a user calls whatever he likes."""

    def __init__(self):
        super().__init__()
        parts = {f"{NAME}0": nn.Conv2d(3, 4, 3), f"{NAME}1": nn.BatchNorm2d(4), f"{NAME}2": nn.Conv2d(4, 2, 2)}
        self.parts = nn.ModuleDict(parts)

    def forward(self, images):
        for part in self.parts.values():
            images = part(images).relu()
        return images.flatten(1)


@pytest.fixture(scope="module")
def figures():
    """Every figure, of things with such names."""
    torch.manual_seed(0)
    model, images = Network().eval(), BATCH[0]
    groups = obc.find_groups(model, images[:1])
    plan = obc.make_plan(obc.score_groups(model, groups, "l1"), ratio=0.5)
    layers, layer = obc.layers_table(model, plan, images[:1]), f"parts.{NAME}0"
    dense = obc.dense_jtj(model, [BATCH], layer, [0, 1])
    start, trained = obc.EquivalentModel(model, plan), obc.EquivalentModel(model, plan)
    shares = removed_shares(start, trained)
    root, costs = groups[0].root, obc.cost_model(model, images[:1])
    score = torch.arange(4.0)
    pairs = obc.filter_interactions(obc.jacobian_products(model, [BATCH]), layer)
    comparison = Comparison(pd.DataFrame(curve(NAME, 0, (1, 0.5), (0.9, 0.7))), {"steps": 1}, {})
    networks = pd.DataFrame({"network": [NAME], "MACs left": [0.5], NAME: [0.9]})
    views = {NAME: RunView("failed", {"naive": HISTORY.epochs}, error=NAME), "b": RunView("running")}
    lost = pd.DataFrame([[0.1, 0.2]], index=[str(root)], columns=[0.1, 0.5])
    return {
        "grid": plots.jtj_grid(dense),
        "one channel": plots.jtj_heatmap(dense, 0),
        "pair": plots.jtj_pair(dense),
        "spectrum": plots.spectrum(dense),
        "group": plots.group_jtj_heatmap(group_jtj(model, [BATCH], groups[0], 0)),
        "interactions": plots.interactions_heatmap(pairs),
        "filter": plots.filter_image(model.get_submodule(layer).weight, layer, 0),
        "plan": plots.plot_plan(plan),
        "groups": plots.plot_groups(groups),
        "graph": plots.coupling_graph(plan, layers),
        "mixing": plots.mixing_heatmaps(trained, layer),
        "shares": plots.plot_removed_shares(shares),
        "sensitivity": plot_sensitivity(lost, NAME),
        **{
            f"studio, {bars}": studio_figure(
                studio_bars(plan, root, bars=bars, costs=costs), plan.kept_of(groups[0]), str(root), score
            )
            for bars in BARS
        },
        "criteria": plots.criteria_curves(comparison),
        "panels": plots.criteria_panels(comparison),
        "seconds": plots.scoring_seconds(comparison),
        "networks": plots.accuracy_over_macs(networks, headline=NAME),
        "histories": plots.plot_histories({NAME: HISTORY}),
        "watched": watch_figure(watch_traces(views), {NAME: "higher"}, failed=[NAME]),
    }


def texts(part):
    """Return all strings of a figure."""
    if isinstance(part, dict):
        return [text for inner in part.values() for text in texts(inner)]
    return [text for inner in part for text in texts(inner)] if isinstance(part, list) else [part]


def test_no_tag_of_a_name_is_drawn(figures):
    for name, figure in figures.items():
        found = [text for text in texts(json.loads(figure.to_json())) if isinstance(text, str)]
        assert not [text for text in found if any(tag in text for tag in ("<b>", "</b>", "<img", "<a "))], name
        assert any("&lt;b>x&lt;/b>" in text or "&lt;b&gt;x" in text for text in found), f"{name} tells no name at all"


def test_every_figure_of_the_library_was_tried(figures):
    assert len(figures) >= len(set(plots.__all__) - {"save_html", "save_png"})


def test_our_own_tags_stay_and_a_change_of_the_studio_is_like_its_first_figure(figures):
    assert "<br><sub>" in figures["graph"].layout.title.text
    assert figures["plan"].data[0].hovertemplate.endswith("<extra></extra>")
    assert escaped(f"a<br>{NAME}<sub>b</sub>") == f"a<br>{SHOWN}<sub>b</sub>"
    untouched = figures["seconds"].to_plotly_json()
    assert escaped(untouched) is untouched


def test_what_the_studio_changes_in_its_figure_is_drawn_alike(figures):
    torch.manual_seed(0)
    groups = obc.find_groups(Network().eval(), BATCH[0][:1])
    plan, root = obc.PruningPlan.whole(groups), groups[0].root
    traces = studio_traces(studio_bars(plan, root), plan.kept_of(groups[0]), torch.arange(4.0))
    assert next(iter(traces[0]["x"])) == f"parts.{SHOWN}0"
    assert SHOWN in studio_axes(str(root), torch.arange(4.0))["xaxis2"]["title"]["text"]
