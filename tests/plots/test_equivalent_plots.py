"""Figures of what Equivalent Pruning learns."""

import numpy as np
import pytest
import torch
from networks import network

import obc_tools as obc
from obc_tools.plots.plans import mixing_heatmaps, plot_removed_shares
from obc_tools.pruning.equivalent import removed_shares


def build(name):
    model, images = network(name)
    groups = obc.find_groups(model, images[:1])
    plan = obc.make_plan(obc.score_groups(model, groups, "l2"), ratio=0.4, scope="local")
    return obc.EquivalentModel(model, plan), obc.EquivalentModel(model, plan), plan


@pytest.mark.parametrize("name", ["small_vgg", "grouped"])
def test_before_training_nothing_lies_on_removed_channels(name):
    start, trained, _ = build(name)
    shares = removed_shares(start, trained)
    assert list(shares["layer"]) == list(start.mixed_layers)
    assert shares[["compressor", "decompressor"]].max().max() == 0


def test_shares_are_of_squared_entries():
    start, trained, plan = build("small_vgg")
    mixed = trained.mixed_layers["3"]
    with torch.no_grad():
        mixed.compressor.fill_(1.0)
        mixed.decompressor.fill_(2.0)
    row = removed_shares(start, trained).set_index("layer").loc["3"]
    assert row["compressor"] == pytest.approx(1 - len(plan.selection(("3", "out"))) / 12)
    assert row["decompressor"] == pytest.approx(1 - len(plan.selection(("3", "in"))) / 8)
    figure = plot_removed_shares(removed_shares(start, trained), look="dark")
    assert [bar.name for bar in figure.data] == ["compressor", "decompressor"]
    assert max(figure.data[0].y) == pytest.approx(100 * row["compressor"])


def test_heatmaps_show_the_selection():
    start, _, plan = build("small_vgg")
    figure = mixing_heatmaps(start, "3")
    assert [note.text for note in figure.layout.annotations] == ["C", "Dᵀ"]
    for heatmap, axis in zip(figure.data, ("out", "in"), strict=True):
        kept = plan.selection(("3", axis))
        assert np.array_equal(np.array(heatmap.z).argmax(1), kept) and np.array(heatmap.z).sum() == len(kept)
    assert len(mixing_heatmaps(start, "0").data) == 1


def test_what_changed_is_drawn_on_its_own_scale():
    start, trained, _ = build("small_vgg")
    mixed = trained.mixed_layers["3"]
    with torch.no_grad():
        mixed.compressor[0, 1, 2] += 0.01
        mixed.decompressor[0, 3, 1] -= 0.02
    figure = mixing_heatmaps(trained, "3", since=start)
    first, second = (np.array(heatmap.z) for heatmap in figure.data)
    assert first[1, 2] == pytest.approx(0.01) and second[1, 3] == pytest.approx(-0.02)
    assert np.count_nonzero(first) == np.count_nonzero(second) == 1 and "what changed" in figure.layout.title.text


def test_blocks_and_wrong_names():
    start, trained, _ = build("grouped")
    name, mixed = next((n, m) for n, m in start.mixed_layers.items() if len(m.weight) > 1)
    figure = mixing_heatmaps(start, name, block=1)
    assert "block 1 of" in figure.layout.title.text
    with pytest.raises(ValueError, match=f"layer '{name}': no block {len(mixed.weight)}; it has {len(mixed.weight)}"):
        mixing_heatmaps(start, name, block=len(mixed.weight))
    with pytest.raises(ValueError, match="unknown mixed layer 'nowhere'"):
        mixing_heatmaps(start, "nowhere")
    with pytest.raises(ValueError, match="mix different layers"):
        removed_shares(start, build("small_vgg")[0])
