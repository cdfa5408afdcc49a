import pytest
import torch
from torch import nn
from torch.func import functional_call

from obc_tools.scoring.sums import channel_sums, layer_row_gradients
from obc_tools.structure.layers import own_parameters


class Wrapped(nn.Linear):
    """A linear layer that is called in a way of its own."""

    def forward(self, inputs):
        return torch.tanh(super().forward(inputs))


LAYERS = {
    "linear": (lambda: nn.Linear(3, 4), (5, 3)),
    "linear without bias": (lambda: nn.Linear(3, 4, bias=False), (3,)),
    "convolution": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 6, 5)),
    "strided, dilated": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(2, 0), dilation=2), (3, 8, 7)),
    "1x1": (lambda: nn.Conv2d(3, 4, 1, bias=False), (3, 4, 5)),
    "strided 1x1": (lambda: nn.Conv2d(3, 4, 1, stride=2), (3, 5, 5)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), (6, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (6, 5, 5)),
    "circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 5, 5)),
    "same": (lambda: nn.Conv2d(3, 4, 3, padding="same"), (3, 5, 5)),
    "one-dimensional": (lambda: nn.Conv1d(3, 4, 3), (3, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 2, stride=2), (3, 4, 4)),
    "batch norm": (lambda: nn.BatchNorm2d(3).eval(), (3, 4, 4)),
    "layer norm": (lambda: nn.LayerNorm(3), (5, 3)),
    "called otherwise": (lambda: Wrapped(3, 4), (5, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("size", [1, 3])
def test_rows_are_those_of_autograd(name, size):
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer = build().double()
    inputs = torch.randn(4, size, *shape, dtype=torch.float64)
    parameters = {key: value.detach().requires_grad_() for key, value in own_parameters(layer).items()}
    outputs = torch.stack([functional_call(layer, parameters, (row,)) for row in inputs])
    deltas = torch.randn_like(outputs)
    found = layer_row_gradients(layer, inputs, deltas)
    assert set(found) == set(parameters)
    for row in range(4):
        wanted = torch.autograd.grad(outputs[row], list(parameters.values()), deltas[row], retain_graph=True)
        for key, gradient in zip(parameters, wanted, strict=True):
            torch.testing.assert_close(found[key][row], gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("side", [1, 2, 5])
def test_sums_over_places_are_those_of_the_definition(side, layout, centred, whole):
    torch.manual_seed(0)
    gradient, value = (torch.randn(3, 4, side, side).double() for _ in range(2))
    mean = torch.randn(4).double() if centred else None
    over = (0, 2, 3) if whole else (2, 3)
    first = (gradient * (value - (mean[:, None, None] if centred else 0))).sum(over).view(-1, 4)
    pair = (gradient.contiguous(memory_format=layout), value)  # the two need not lie alike
    found = channel_sums(*pair, 1, mean=mean, whole=whole)
    torch.testing.assert_close(found[0], first, rtol=1e-12, atol=1e-12)
    if centred:
        torch.testing.assert_close(found[1], gradient.sum(over).view(-1, 4), rtol=1e-12, atol=1e-12)
