"""Group regularisation against torch_pruning's, and what it does to the weakest channels."""

import pytest
import torch
import torch_pruning as tp
from networks import NETWORKS, network
from torch import nn

from obc_tools.data.data import load_data
from obc_tools.models.networks import load_model
from obc_tools.structure.groups import find_groups
from obc_tools.training.fit import fit
from obc_tools.training.recipe import Recipe
from obc_tools.training.sparse import GroupPenalty, sparse_train


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def with_gradients(model: nn.Module, images: torch.Tensor) -> nn.Module:
    model.zero_grad()
    model(images).square().mean().backward()
    return model


@pytest.mark.parametrize(("depth", "width"), [(8, 4), (56, 16)])
def test_is_torch_prunings_on_residual_networks(depth, width):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = load_model(f"resnet{depth}", 10, width=width).double().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.2, 1.5)
        images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    importance = tp.importance.GroupMagnitudeImportance(p=2, normalizer="max")
    pruner = tp.pruner.GroupNormPruner(
        model,
        images[:1],
        importance,
        reg=5e-4,
        ignored_layers=[model.fc],
        channel_groups={},
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
    )
    pruner.regularize(with_gradients(model, images))
    expected = gradients(model)
    before = gradients(with_gradients(model, images))
    GroupPenalty(model, find_groups(model, images[:1]), 5e-4)()
    found = gradients(model)
    scale = max((expected[name] - before[name]).abs().max().item() for name in expected)
    assert scale > 1e-3
    # torch_pruning adds up a group's norms in float32, also those of a float64 network.
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-6 * scale, rtol=0, msg=name)


@pytest.mark.parametrize("name", NETWORKS)
def test_is_the_formula_channel_by_channel(name):
    """Masking a group's channel one by one gives its norm; its weights are those that change."""
    model, images = network(name)
    groups = [group for group in find_groups(model, images[:1]) if group.prunable]
    assert groups
    group = groups[0]
    with_gradients(model, images)
    before = gradients(model)
    norms = torch.tensor([_norm_by_hand(model, group, channel) for channel in range(group.width)], dtype=torch.float64)
    strengths = 16 ** ((norms.max() - norms) / (norms.max() - norms.min()))
    GroupPenalty(model, [group], 0.1)()
    added = {name: value - before[name] for name, value in gradients(model).items()}
    for member in group.members:
        layer = model.get_submodule(member.axis.layer)
        if member.axis.axis == "out" and not getattr(layer, "transposed", False):
            shape = (-1, *[1] * (layer.weight.ndim - 1))
            own = added[f"{member.axis.layer}.weight"][list(member.positions)]
            expected = 0.1 * strengths[list(member.channels)].view(shape) * layer.weight[list(member.positions)]
            if [other.axis.layer for other in group.members].count(member.axis.layer) == 1:
                torch.testing.assert_close(own, expected, atol=1e-12, rtol=1e-10)
            if layer.bias is not None:
                assert not added[f"{member.axis.layer}.bias"].any()


def _norm_by_hand(model: nn.Module, group, channel: int) -> float:
    total = 0.0
    for member in group.members:
        weight = model.get_submodule(member.axis.layer).weight.detach()
        layer = model.get_submodule(member.axis.layer)
        positions = [p for p, c in zip(member.positions, member.channels, strict=True) if c == channel]
        for position in positions:
            total += _slice(layer, weight, member.axis.axis, position).square().sum().item()
    return total**0.5


def _slice(layer: nn.Module, weight: torch.Tensor, axis: str, position: int) -> torch.Tensor:
    if weight.ndim == 1:
        return weight[position]
    groups = getattr(layer, "groups", 1)
    along_rows = (axis == "out") != getattr(layer, "transposed", False)
    if along_rows or (groups > 1 and layer.groups == layer.in_channels == layer.out_channels):
        return weight[position]
    rows, inside = weight.shape[0] // groups, weight.shape[1]
    block = position // inside
    return weight[block * rows : (block + 1) * rows, position % inside]


def test_equal_channels_are_shrunk_alike():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    for layer in (model[0], model[2]):
        nn.init.ones_(layer.weight)
    with_gradients(model, torch.randn(2, 3))
    before = gradients(model)
    GroupPenalty(model, find_groups(model, torch.randn(1, 3)), 0.5)()
    torch.testing.assert_close(gradients(model)["0.weight"] - before["0.weight"], torch.full((4, 3), 0.5))


def test_sparse_training_widens_the_gap_between_channels():
    data = load_data("digits").limited(train=512, val=128)
    train, val = data.batches("train", 64), data.batches("val", 128)
    recipe = Recipe(epochs=3, batch_size=64, lr=0.05, weight_decay=0.0, group_penalty=0.02)

    def model():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return load_model("resnet8", 10, in_channels=1, width=4)

    plain, sparse = model(), model()
    fit(plain, train, val, recipe, progress=False)
    history = sparse_train(sparse, train, val, recipe, progress=False)
    assert len(history) == 3

    def spread(network):
        norms = network.layer1[0].conv1.weight.detach().flatten(1).norm(dim=1)
        return (norms.max() / norms.min()).item()

    assert spread(sparse) > 1.5 * spread(plain)
    with pytest.raises(ValueError, match="sparse training needs a recipe with group_penalty above 0"):
        sparse_train(model(), train, val, Recipe(epochs=1), progress=False)
