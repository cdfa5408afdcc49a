"""JᵀJ against an independent library: curvlinops' empirical Fisher, Σ_n g_n g_nᵀ over single examples."""

import warnings

import pytest
import torch
from torch import nn

from obc_tools import dense_jtj, jacobian_products
from obc_tools.structure.layers import own_parameters

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a library that it imports uses torch.jit.script
    from curvlinops import EFLinearOperator

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")


@pytest.mark.parametrize("layer", ["0", "3"])
def test_a_row_an_image_is_the_empirical_fisher(layer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)).double().eval()
    images, labels = torch.randn(10, 2, 5, 5).double(), torch.randint(3, (10,))
    batches = [(images[:6], labels[:6]), (images[6:], labels[6:])]
    parameters = {f"{layer}.{name}": p for name, p in own_parameters(model.get_submodule(layer)).items()}
    loss = nn.CrossEntropyLoss(reduction="sum")
    fisher = EFLinearOperator(model, loss, list(parameters.values()), batches) @ torch.eye(
        sum(p.numel() for p in parameters.values()), dtype=torch.float64
    )
    dense = dense_jtj(model, batches, layer, rows="sample")
    weight, bias = (p.detach() for p in parameters.values())
    channels, d = weight.shape[0], weight[0].numel()
    for channel in range(channels):
        own = [*range(channel * d, (channel + 1) * d), channels * d + channel]
        torch.testing.assert_close(dense.values[channel], fisher[own][:, own], rtol=0, atol=1e-10)
    scores = jacobian_products(model, batches, rows="sample", layers=[layer]).scores()[layer, "out"]
    flat = torch.cat([weight.flatten(1), bias[:, None]], 1)
    torch.testing.assert_close(scores, torch.einsum("ci,cij,cj->c", flat, dense.values, flat), rtol=0, atol=1e-10)
