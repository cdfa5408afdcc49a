"""Modules that keep tensors computed from others: activations, weights by torch's pruning and its norms of weights."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from obc_tools import EquivalentModel, check_plan, explain, find_groups, make_plan, score_groups


class Caches(nn.Module):
    """Keeps its features, and those of all passes in a list."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.kept = nn.Linear(5, 8), nn.Linear(8, 3), []

    def forward(self, x):
        self.features = self.a(x).relu()
        self.kept.append({"features": self.features})
        return self.b(self.features)


def net(change):
    layers = [nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 6), nn.ReLU()]
    change(layers[0])
    change(layers[4])
    return nn.Sequential(*layers, nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3))


MODELS = {
    "cached activation": Caches,
    "torch.nn.utils.prune": lambda: net(lambda layer: prune.l1_unstructured(layer, "weight", 0.3)),
    "weight_norm": lambda: net(weight_norm),
    "spectral_norm": lambda: net(spectral_norm),
    "parametrized weight_norm": lambda: net(parametrizations.weight_norm),
    "parametrized spectral_norm": lambda: net(parametrizations.spectral_norm),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_what_is_computed_is_right_or_whole(name):
    torch.manual_seed(0)
    model, x = MODELS[name]().eval(), torch.randn(4, 5)
    model(x).sum().backward()
    groups = find_groups(model, x)
    assert any(group.prunable for group in groups)
    if name in ("torch.nn.utils.prune", "spectral_norm"):
        said = explain(groups).why_whole("0")
        assert "layer '0' (Linear) has parameters ['weight_orig'] (prune.remove or remove_spectral" in said
    batch = [(torch.randn(8, 5), torch.randint(0, 3, (8,)))]
    plan = make_plan(score_groups(model, groups, "jacobian", batch), ratio=0.4, scope="local")
    assert plan.channels_removed > 0 and check_plan(model, plan, x).ok
    equivalent = EquivalentModel(model, plan)
    equivalent(x).sum().backward()
    assert torch.allclose(equivalent.merge().eval()(x), equivalent.eval()(x), atol=1e-6)
