import pytest
import torch
from torch import nn

from obc_tools.scoring.jacobian import jacobian_products
from obc_tools.scoring.jtj import FilterInteractions, filter_interactions
from obc_tools.structure.layers import LayerAxis


@pytest.fixture
def products():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3)).double()
    batches = [(torch.randn(4, 3, 4, 4).double(), torch.randint(0, 3, (4,))) for _ in range(3)]
    return jacobian_products(model, batches, rows="sample")


def test_entries_are_sums_of_products(products):
    found, jw = filter_interactions(products, "0"), products["0", "out"]
    for i in range(5):
        for j in range(5):
            assert found.values[i, j].item() == pytest.approx((jw[:, i] * jw[:, j]).sum().item(), rel=1e-10)
    torch.testing.assert_close(found.score, products.scores()["0", "out"], rtol=1e-10, atol=0)
    assert found.values.dtype == torch.float64
    assert filter_interactions(products, "3", axis="in").values.shape == (20, 20)


def test_joint_is_the_squared_change_of_the_whole_set(products):
    found, jw = filter_interactions(products, "0"), products["0", "out"]
    expected = jw[:, [0, 3, 4]].sum(1).square().sum().item()
    assert found.joint([0, 3, 4]) == pytest.approx(expected, rel=1e-10)
    with pytest.raises(ValueError, match="0.out: no channel 5; the channels are 0 to 4"):
        found.joint([0, 5])
    with pytest.raises(ValueError, match="a channel is named twice"):
        found.joint([1, 1])


def of(rows):
    jw = torch.tensor(rows).double()
    return FilterInteractions(LayerAxis("conv", "out"), jw.T @ jw)


def test_correlation_leaves_dead_channels_alone():
    found = of([[1.0, 2, -1, 0], [1, 2, -1, 0]]).correlation
    expected = torch.tensor([[1.0, 1, -1, 0], [1, 1, -1, 0], [-1, -1, 1, 0], [0, 0, 0, 1]]).double()
    torch.testing.assert_close(found, expected)


def test_orders():
    found = of([[1.0, 0.1, 2.0, 0.2, 0.0], [0.1, 1.5, 0.3, 3.0, 0.0]])
    assert found.order("score") == (3, 2, 1, 0, 4)
    clustered = found.order("cluster")
    assert sorted(clustered) == list(range(5))
    place = {channel: index for index, channel in enumerate(clustered)}
    assert abs(place[0] - place[2]) == 1 and abs(place[1] - place[3]) == 1
    assert of([[2.0]]).order() == (0,)
    with pytest.raises(ValueError, match="unknown order 'scores'; closest: score"):
        found.order("scores")


def test_shows_itself(products):
    found = filter_interactions(products, "0")
    frame = found.to_frame()
    assert len(frame) == 10 and frame["correlation"].abs().is_monotonic_decreasing
    strongest = frame.iloc[0]
    assert strongest["K"] == found.values[int(strongest["i"]), int(strongest["j"])]
    assert repr(found) == "FilterInteractions(0.out, 5 channels)"
    assert "strongest pairs" in found._repr_html_()
    assert "0.out" in found.plot().layout.title.text


def test_unknown_layer(products):
    with pytest.raises(ValueError, match="unknown layer axis '7.out'"):
        filter_interactions(products, "7")
