"""The explorers without a browser: controls set, cells clicked, figures and tables read; the calls shown are run."""

import copy
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import obc_tools as obc
from obc_tools.plots.jtj import MODES, filter_image, filter_tiles, jtj_pair
from obc_tools.widgets import explorers
from obc_tools.widgets.controls import Click
from obc_tools.widgets.explorers import VIEWS, InteractionExplorer, JTJExplorer

OPTIONS = {"batches": 2, "batch_size": 16, "seed": 3}


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    return obc.load_model("resnet8", 10, in_channels=1, width=8), obc.load_data("digits")


@pytest.fixture(scope="module")
def batches(made):
    return list(obc.take(made[1].batches("train", 16, seed=3), 2))


def run_shown(explorer, made, name):
    """Run the Python that an explorer shows, as it stands; return what it calls `name`."""
    model, data = made
    namespace = {"model": model, "data": data}
    exec(explorer.code.value, namespace)
    return namespace[name]


def test_the_code_makes_the_figure_that_is_shown(made):
    """In every view and mode, whatever was looked at before; the channel of a group too."""
    explorer = JTJExplorer(*made, **OPTIONS).wait(60)
    explorer.layer.value = "layer2.0.conv1"
    explorer.wait(60)
    explorer.channel.value = 5
    for view in ("group", *VIEWS):
        for mode in MODES:
            explorer.view.value, explorer.mode.value = view, mode
            explorer.wait(60)
            assert_shown(explorer, made)
    together = InteractionExplorer(*made, **OPTIONS).wait(60)
    together.mode.value, together.order.value = "signed", "channel"
    assert_shown(together, made)
    together.look_at(1, 4)
    assert_shown(together.wait(60), made)
    together.back_button.click()
    assert_shown(together, made)


def assert_shown(explorer, made):
    """Run the Python that is shown out of the names that it says; its last line is the figure that is shown."""
    lines = explorer.code.value.splitlines()
    said = lines[0].removeprefix("# out of ").split(", ")
    namespace = {name: dict(zip(("model", "data"), made, strict=True))[name] for name in said}
    exec("\n".join(lines[:-1]), namespace)
    assert eval(lines[-1], namespace).to_json() == explorer.figure.to_json()


def test_a_data_loader_is_made_data_in_the_code(made):
    loader = DataLoader(TensorDataset(torch.rand(40, 1, 8, 8), torch.arange(40) % 10), batch_size=8)
    for view in (JTJExplorer, InteractionExplorer):
        assert_shown(view(made[0], loader, **OPTIONS).wait(60), (made[0], loader))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_inputs_follow_the_precision_of_the_network(made, dtype):
    model = copy.deepcopy(made[0]).to(dtype)
    for view in (JTJExplorer, InteractionExplorer):
        explorer = view(model, made[1], **OPTIONS).wait(60)
        assert f"dtype={dtype}" in explorer.code.value and explorer.figure.data, explorer.status.value
        assert_shown(explorer, (model, made[1]))
    explorer = JTJExplorer(model, made[1], **OPTIONS).wait(60)
    explorer.view.value = "group"
    assert_shown(explorer.wait(60), (model, made[1]))


def test_images_in_double_follow_a_network_in_single(made):
    data = obc.as_data((torch.rand(40, 1, 8, 8, dtype=torch.float64), torch.arange(40) % 10))
    explorer = InteractionExplorer(made[0], data, **OPTIONS).wait(60)
    assert "dtype=torch.float32" in explorer.code.value
    assert_shown(explorer, (made[0], data))


def test_the_paper_s_grid_and_its_call(made, batches):
    explorer = JTJExplorer(*made, **OPTIONS).wait(60)
    expected = obc.dense_jtj(made[0], batches, "conv1", range(8))
    assert torch.equal(explorer.dense.values, expected.values)
    assert len(explorer.figure.data) == 8
    assert "off-diagonal share" in explorer.table.value
    assert torch.equal(run_shown(explorer, made, "jtj").values, expected.values)


def test_every_view_of_a_channel(made):
    explorer = JTJExplorer(*made, **OPTIONS).wait(60)
    explorer.count.value = 3
    explorer.first.value = 2
    explorer.wait(60)
    assert explorer.dense.channels == (2, 3, 4) and explorer.channel.options == (2, 3, 4)
    explorer.channel.value = 3
    explorer.view.value = "one channel"
    explorer.mode.value = "correlation"
    assert "channel 3" in explorer.figure.layout.title.text
    assert np.abs(explorer.figure.data[0].z).max() <= 1
    explorer.view.value = "filter"
    assert explorer.figure.data[0].z.shape == (3, 3)
    explorer.view.value = "spectrum"
    assert len(explorer.figure.data) == 3 and explorer.figure.data[0].type == "scatter"
    explorer.view.value = "grid"
    explorer.view.value = "one channel"
    assert "xaxis2" not in explorer.figure.layout.to_plotly_json()


def test_the_group_of_a_channel(made, batches):
    explorer = JTJExplorer(*made, **OPTIONS).wait(60)
    explorer.view.value = "group"
    explorer.wait(60)
    group = next(g for g in obc.find_groups(made[0], torch.zeros(1, 1, 8, 8)) if g.root.layer == "conv1")
    expected = obc.group_jtj(made[0], batches, group, 0)
    assert torch.equal(explorer.group.values, expected.values)
    assert len(explorer.figure.layout.shapes) == 2 * (len(expected.members) - 1)
    assert torch.equal(run_shown(explorer, made, "jtj").values, expected.values)
    explorer.view.value = "grid"
    assert not explorer.figure.layout.shapes


def test_another_layer_and_its_limits(made):
    explorer = JTJExplorer(*made, **OPTIONS).wait(60)
    explorer.layer.value = "fc" if "fc" in explorer.layer.options else explorer.layer.options[-1]
    explorer.first.value = 10**6
    explorer.wait(60)
    assert explorer.first.value == 9 and explorer.dense.channels == (9,)


def test_everything_is_saved(made, tmp_path):
    explorer = JTJExplorer(*made, **OPTIONS).wait(60)
    explorer.path.value = str(tmp_path / "jtj.npz")
    explorer.save_button.click()
    assert "wrote" in explorer.status.value
    with np.load(tmp_path / "jtj.npz") as saved:
        assert np.array_equal(saved["values"], explorer.dense.values.numpy())
        assert tuple(saved["labels"]) == explorer.dense.labels and saved["channels"].tolist() == list(range(8))
    explorer.dense = None
    explorer.save_button.click()
    assert "nothing has been computed yet" in explorer.status.value


def test_interactions_come_back_after_a_cancel(made, monkeypatch):
    go_on, real = threading.Event(), explorers.jacobian_products

    def held(*arguments, **options):
        go_on.wait(60)
        return real(*arguments, **options)

    monkeypatch.setattr(explorers, "jacobian_products", held)
    together = InteractionExplorer(*made, **OPTIONS)
    with pytest.raises(ValueError, match="J·w is not computed yet"):
        together.look_at(0, 1)
    together.cancel_button.click()
    go_on.set()
    together.wait(60)
    assert together.interactions is None and "cancelled" in together.status.value
    together.layer.value = "layer2.0.conv1"
    assert together.wait(60).interactions.axis.layer == "layer2.0.conv1"


def test_interactions_their_pairs_and_a_click(made, batches):
    explorer = InteractionExplorer(*made, **OPTIONS, look="dark").wait(60)
    expected = obc.filter_interactions(obc.jacobian_products(made[0], batches), "conv1")
    assert torch.equal(explorer.interactions.values, expected.values)
    assert torch.equal(run_shown(explorer, made, "k").values, expected.values)
    assert "duplicate most" in explorer.table.value
    explorer.order.value = "score"
    assert list(explorer.figure.data[0].x) == [str(channel) for channel in expected.order("score")]
    explorer.clicked(Click(0, (3, 4), "1", "5"))
    explorer.wait(60)
    assert explorer.pair.channels == (5, 1) and len(explorer.figure.data) == 2
    assert f"{expected.joint([1, 5]):.3e}" in explorer.status.value
    assert torch.equal(run_shown(explorer, made, "jtj").values, explorer.pair.values)
    explorer.back_button.click()
    assert len(explorer.figure.data) == 1
    explorer.layer.value = explorer.layer.options[1]
    assert explorer.interactions.axis.layer == explorer.layer.options[1]


def test_models_without_layers_and_unknown_looks_are_refused(made):
    for explorer in (JTJExplorer, InteractionExplorer):
        with pytest.raises(ValueError, match="unknown theme 'loud'"):
            explorer(*made, look="loud")
    with pytest.raises(ValueError, match="no convolution or linear layer"):
        InteractionExplorer(nn.Sequential(nn.Flatten()), made[1])


def test_a_failure_is_shown(made):
    model, data = made
    broken = obc.load_model("resnet8", 10, in_channels=1, width=8)
    with torch.no_grad():
        broken.conv1.weight.fill_(float("nan"))
    explorer = InteractionExplorer(broken, data, **OPTIONS).wait(60)
    assert "ValueError" in explorer.status.value and "the loss is nan" in explorer.status.value


def test_an_explorer_that_is_empty_says_why(made, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr("obc_tools.widgets.explorers.jacobian_products", lambda *_: go_on.wait(20))
    explorer = InteractionExplorer(*made, **OPTIONS)
    assert explorer.figure.layout.title.text == "computing J·w"
    explorer.cancel_button.click()
    go_on.set()
    assert explorer.figure.layout.title.text == "cancelled" and "cancelled" in explorer.status.value

    def fail(*_):
        raise RuntimeError("no <memory> left")

    monkeypatch.setattr("obc_tools.widgets.explorers.jacobian_products", fail)
    explorer = InteractionExplorer(*made, **OPTIONS).wait(60)
    assert explorer.figure.layout.title.text == "RuntimeError: no &lt;memory&gt; left"
    assert not explorer.figure.data and "no &lt;memory&gt; left" in explorer.status.value


def test_a_failure_leaves_the_figure_that_is_there(made, monkeypatch):
    explorer = JTJExplorer(*made, **OPTIONS).wait(60)
    before = explorer.figure
    monkeypatch.setattr("obc_tools.widgets.explorers.dense_jtj", lambda *_, **options: 1 / 0)
    explorer.count.value = 2
    explorer.wait(60)
    assert "ZeroDivisionError" in explorer.status.value and explorer.figure is before


def test_batches_that_cannot_be_drawn_are_refused_at_once(made):
    for explorer in (JTJExplorer, InteractionExplorer):
        with pytest.raises(ValueError, match="take: 1000 batches were asked for"):
            explorer(*made, batches=1000)


def test_one_channel_is_not_called_channels(made):
    explorer = JTJExplorer(*made, **OPTIONS).wait(60)
    explorer.count.value = 1
    explorer.wait(60)
    assert explorer.figure.layout.title.text.startswith("|JᵀJ| of conv1.out: 1 channel, 9 × 9")
    explorer.view.value = "spectrum"
    assert explorer.figure.layout.title.text == "Spectra of JᵀJ of conv1.out: 1 channel"


def test_filters_as_tiles():
    model = nn.Sequential(nn.Conv2d(5, 3, (2, 3)), nn.Flatten(), nn.Linear(4, 2), nn.ReLU())
    tiles, shown, count = filter_tiles(model[0].weight, "0", 1)
    assert (tiles.shape, shown, count) == ((2 * 3 - 1, 3 * 4 - 1), 5, 5)
    weight = model[0].weight[1].detach().numpy()
    assert np.array_equal(tiles[3:5, 4:7], weight[4]) and np.isnan(tiles[2]).all()
    assert filter_tiles(model[2].weight, "2", 0)[0].shape == (3, 3)
    assert "the first 64 of 70" in filter_image(nn.Conv2d(70, 1, 1).weight, "0", 0).layout.title.text
    with pytest.raises(ValueError, match="layer '0' has no filters"):
        filter_image(model[0].bias, "0", 0)
    with pytest.raises(ValueError, match="no channel 3; the channels are 0 to 2"):
        filter_image(model[0].weight, "0", 3)


def test_a_pair_is_two(made, batches):
    with pytest.raises(ValueError, match="JᵀJ of 3 channels; two are drawn side by side"):
        jtj_pair(obc.dense_jtj(made[0], batches, "conv1", range(3)))
