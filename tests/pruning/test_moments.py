import pytest
import torch
from torch import nn
from torch.nn import functional as F

from obc_tools.pruning.moments import BLOCK, Draw, Moments, from_weight_matrix, unfolded_chunks, weight_matrix

CPU = torch.device("cpu")
LAYERS = {
    "Conv2d": (nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, groups=2), (4, 7, 8)),
    "Conv1d": (nn.Conv1d(4, 6, 3, padding="same", dilation=2), (4, 9)),
    "Conv3d": (nn.Conv3d(4, 6, 2, bias=False), (4, 3, 3, 4)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), (4, 5, 5)),
    "depthwise, transposed": (nn.ConvTranspose2d(4, 4, 2, stride=2, groups=4), (4, 3, 3)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 5, 5)),
    "Linear": (nn.Linear(4, 6), (5, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("drawn", [False, True], ids=["all", "some"])
def test_a_layer_is_its_matrix_times_what_it_sees(name, drawn, monkeypatch):
    monkeypatch.setattr("obc_tools.pruning.moments.CHUNK", 40)
    layer, shape = LAYERS[name]
    layer = layer.double()
    inputs = torch.randn(7, *shape, dtype=torch.float64)
    draw = Draw(3, torch.Generator().manual_seed(0)) if drawn else None
    with torch.no_grad():
        outputs = layer(inputs)
        pieces = list(unfolded_chunks(layer, inputs, outputs, draw))
        matrix = weight_matrix(layer, layer.weight)
        for x, given in pieces:
            y = given.unflatten(0, (len(x), -1))  # (groups, outputs, positions)
            bias = torch.zeros(y.shape[:2]) if layer.bias is None else layer.bias.view(y.shape[:2])
            torch.testing.assert_close(matrix @ x + bias[..., None], y, rtol=0, atol=1e-12)
    assert len(pieces) > 1
    count = sum(x.shape[2] for x, _ in pieces)
    positions = outputs.numel() // 6 if "depthwise" not in name else outputs.numel() // outputs.shape[1]
    assert count == (7 * 3 if drawn else positions)
    assert torch.equal(from_weight_matrix(layer, matrix), layer.weight)


def test_positions_are_drawn_all_over_each_example():
    draw = Draw(4, torch.Generator().manual_seed(0))
    found = draw(500, 10)
    assert found.shape == (500, 4) and (found.diff() >= 0).all()
    assert torch.bincount(found.flatten(), minlength=10).float().sub(200).abs().max() < 45
    assert draw(3, 4) is None and Draw(9, draw.generator)(3, 4) is None


def test_windows_are_those_of_unfold():
    layer = nn.Conv2d(3, 5, 3, stride=2, padding=1).double()
    inputs = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    ((x, _),) = unfolded_chunks(layer, inputs, layer(inputs).detach())
    oracle = F.unfold(inputs, 3, padding=1, stride=2).transpose(0, 1).flatten(1)
    assert torch.equal(x[0], oracle)


def test_moments_of_many_inputs_and_chunks_are_those_of_all_at_once():
    torch.manual_seed(0)
    d = 2 * BLOCK + 3
    x, y = 3 + torch.randn(1, d, 900, dtype=torch.float64), torch.randn(1, 4, 900, dtype=torch.float64)
    moments = Moments(1, d, 4, centred=True, device=CPU)
    for part in torch.arange(900).split(200):
        moments.add(x[..., part], y[..., part])
    found, intercept = moments.solve(0)
    design = torch.cat([x[0], torch.ones(1, 900, dtype=torch.float64)]).T
    oracle = torch.linalg.lstsq(design, y[0].T).solution
    torch.testing.assert_close(found[0], oracle[:-1].T, rtol=0, atol=1e-10)
    torch.testing.assert_close(intercept[0], oracle[-1], rtol=0, atol=1e-10)


def test_without_a_ridge_the_least_solution_is_taken():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 50, dtype=torch.float64)
    x = torch.cat([x, x.sum(1, keepdim=True), torch.zeros_like(x[:, :1])], 1)
    y = torch.randn(2, 2, 50, dtype=torch.float64)
    moments = Moments(2, 5, 2, centred=False, device=CPU)
    moments.add(x, y)
    found, intercept = moments.solve(0)
    torch.testing.assert_close(found, y @ torch.linalg.pinv(x), rtol=0, atol=1e-10)
    assert not intercept.any()
    assert torch.isfinite(moments.solve(1e-18)[0]).all()
