import pytest
import torch
from networks import network
from torch import nn

from obc_tools import PruningPlan, explain, find_groups
from obc_tools.plots.looks import COLORS


def explained(name="residual"):
    model, images = network(name)
    return explain(find_groups(model, images, ignore=["stem.0"] if name == "residual" else ()))


def test_a_row_a_group_says_what_is_coupled():
    frame = explained("inverted").to_frame().set_index("group")
    row = frame.loc["excite.out"]
    assert row["channels"] == 12 and row["norms and parameters"] == 2
    assert row["outputs of"] == "excite, expand.0, depthwise.0"
    assert row["inputs of"] == "squeeze, project.0"
    assert frame.loc["fc.out", "kept whole because"] == "reaches the model's output"


def test_a_row_a_member_says_where():
    frame = explained("small_vgg").members_frame()
    row = frame[(frame["layer"] == "11") & (frame["axis"] == "in")].iloc[0]
    assert (row["group"], row["type"], row["positions"], row["axis width"]) == ("7.out", "Linear", 256, 256)


def test_why_a_layer_is_not_pruned():
    found = explained()
    assert found.why_whole("conv1") is None
    assert found.why_whole("fc") == "reaches the model's output"
    assert found.why_whole("stem.1") == "ignored: stem.0"
    with pytest.raises(ValueError, match="layer 'relu': no group holds its output"):
        found.why_whole("relu")


def test_what_a_person_sees():
    found = explained()
    assert repr(found).startswith("4 groups, 2 prunable with 18 channels")
    assert "ignored: stem.0" in repr(found) and "<table" in found._repr_html_()


@pytest.mark.parametrize("look", ["light", "dark"])
def test_the_figure_has_a_column_a_group_and_a_row_a_layer(look):
    from obc_tools.plots.plans import plot_groups

    found = explained()
    figure = plot_groups(found.groups, look=look)
    marks = [trace for trace in figure.data if trace.mode == "markers"]
    members = [(g, m) for g in found.groups for m in g.members]
    assert sum(len(trace.x) for trace in marks) == len(members)
    drawn = {(x, y) for trace in marks for x, y in zip(trace.x, trace.y, strict=True)}
    assert drawn == {(found.groups.index(g), m.axis.layer) for g, m in members}
    assert list(figure.layout.yaxis.categoryarray) == list(dict.fromkeys(m.axis.layer for _, m in members))
    notes = [note for trace in marks for note in trace.customdata if trace.marker.color == COLORS["original"]]
    assert len([note for note in notes if "kept whole: ignored: stem.0" in note]) > 2
    assert figure.layout.title.text == "Coupled layers: 2 of 4 groups prunable, 18 channels"
    assert found.plot().layout.title.text == figure.layout.title.text


def test_large_figures_label_some_layers_only_and_none_is_refused(monkeypatch):
    from obc_tools.plots import plans as group_plots

    monkeypatch.setattr(group_plots, "_MOST_LABELS", 4)
    figure = explained().plot()
    assert 2 <= len(figure.layout.yaxis.tickvals) <= 4
    with pytest.raises(ValueError, match="no group to draw"):
        group_plots.plot_groups([])


def test_one_group_is_not_called_groups():
    found = find_groups(nn.Sequential(nn.Linear(3, 2)), torch.zeros(1, 3))
    assert repr(explain(found)).startswith("1 group, 0 prunable")
    assert repr(PruningPlan.whole(found)).startswith("PruningPlan(1 group, ")
