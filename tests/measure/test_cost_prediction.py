"""Predicted costs against the costs of really pruned models: equal, not close."""

import copy
import random
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import timm
import torch
import torchvision.models as zoo
from networks import NETWORKS, network
from torch import Tensor, nn
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.resnet import Bottleneck

from obc_tools.measure.cost_model import CostModelError, Widths, cost_model
from obc_tools.measure.costs import cost, count_calls
from obc_tools.pruning.plan import PruningPlan
from obc_tools.pruning.prune import prune
from obc_tools.structure.groups import ChannelGroup, Follower, Member, trace_groups
from obc_tools.structure.layers import LayerAxis


class Activations(nn.Module):
    """One ReLU and one pooling for three groups of different widths and sizes; a scale that is a bare parameter."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 5, 3), nn.Conv2d(5, 7, 3), nn.Conv2d(7, 9, 3, bias=False)])
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.AvgPool2d(2, stride=1)
        self.scale = nn.Parameter(torch.ones(9, 1, 1))
        self.fc = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = self.pool(self.act(conv(x)))
        return self.fc((x * self.scale).mean((2, 3)))


class Tied(nn.Module):
    """Two convolutions in one residual group that are one parameter."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.one, self.two = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.two.weight = self.one.weight
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.one(x)
        return self.fc((x + self.two(x)).mean((2, 3)))


class Squared(nn.Module):
    """An activation on all products of two channels, whose number is no multiple of that of the channels.

    Where it is ``hidden``, the activation sees a tensor that was made from a plain number instead.
    """

    def __init__(self, hidden: bool = False):
        super().__init__()
        self.first, self.watch, self.fc = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.watch(torch.ones(2, int(x.shape[1]) ** 2) if self.hidden else x[:, :, None] * x[:, None])
        return self.fc(x)


class TokenMixer(nn.Module):
    """Linear layers, an activation and a norm over tokens, then over channels: two widths vary in what they give."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 4)
        self.tokens = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 4))
        self.channels = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 10), nn.GELU(), nn.Linear(10, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2)
        x = (x + self.tokens(x)).transpose(1, 2)
        return self.fc((x + self.channels(x)).mean(1))


class Strict(nn.Module):
    """Refuses any width of its first layer but the one it was built with."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.fc = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if int(x.shape[1]) < 12:
            raise RuntimeError("too narrow")
        return self.fc(self.second(x).relu())


class Choosy(nn.Module):
    """Calls its activation only while it is as wide as it was built."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.fc = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.fc(self.act(x) if int(x.shape[1]) == 8 else x)


def every_activation() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.PReLU(),
        nn.Dropout(),
        nn.Conv2d(8, 6, 3),
        nn.InstanceNorm2d(6, affine=True),
        nn.PReLU(6),
        nn.Identity(),
        nn.Upsample(scale_factor=2),
        nn.ConvTranspose2d(6, 12, 2, groups=2),
        nn.GroupNorm(3, 12),
        nn.LeakyReLU(),
        nn.MaxPool2d(3),
        nn.Flatten(),
        nn.Linear(12 * 9, 10),
        nn.ELU(inplace=True),
        nn.Dropout(),
        nn.Linear(10, 4),
    )


def resnext() -> nn.Module:
    return zoo.ResNet(Bottleneck, [1, 1, 1, 1], num_classes=4, groups=4, width_per_group=4)


def efficientnet() -> nn.Module:
    blocks = [MBConvConfig(4, 3, 2, 8, 12, 2, 1.0, 1.0), MBConvConfig(2, 5, 1, 12, 16, 1, 1.0, 1.0)]
    return zoo.EfficientNet(blocks, dropout=0.1, num_classes=4, last_channel=32)


def mobilenet() -> nn.Module:
    stages = [[1, 8, 1, 1], [3, 12, 2, 2], [2, 16, 2, 2]]
    return zoo.MobileNetV2(num_classes=4, inverted_residual_setting=stages)


def vision_transformer() -> nn.Module:
    return zoo.VisionTransformer(16, 8, num_layers=2, num_heads=2, hidden_dim=12, mlp_dim=20, num_classes=4)


def timm_transformer() -> nn.Module:
    return timm.models.VisionTransformer(16, 8, embed_dim=12, depth=2, num_heads=2, num_classes=4)


MODELS = {
    "activations": (Activations, 12),
    "every activation": (every_activation, 8),
    "tied": (Tied, 8),
    "token mixer": (TokenMixer, 8),
    "norm with activation": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), timm.layers.BatchNormAct2d(8), zoo_head(8)), 8),
    "mobilenet": (mobilenet, 16),
    "resnext": (resnext, 32),
    "densenet": (lambda: zoo.DenseNet(4, (2, 3), num_init_features=8, num_classes=4), 32),
    "efficientnet": (efficientnet, 16),
    "vision transformer": (vision_transformer, 16),
    "timm's transformer": (timm_transformer, 16),
}


def zoo_head(width: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


def seeded(build, *shape) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval(), torch.randn(shape)


def random_plan(groups, fixed, seed: int, least: int = 1) -> PruningPlan:
    """Keep a random number of channels of every group that may shrink, at least `least` a block."""
    draw, kept = random.Random(seed), []
    for group in groups:
        size = group.width // group.blocks
        count = size if group.root in fixed else draw.randint(min(least, size), size)
        inside = sorted(draw.sample(range(size), count))
        kept.append(tuple(block * size + channel for block in range(group.blocks) for channel in inside))
    return PruningPlan(tuple(groups), tuple(kept))


def assert_exact(model: nn.Module, inputs: Tensor, seeds: int = 4) -> None:
    predicted, groups = cost_model(model, inputs), trace_groups(model, inputs).groups
    assert predicted.original == predicted.of(PruningPlan.whole(groups)) == cost(model, inputs)
    plans = [random_plan(groups, predicted.fixed, seed) for seed in range(seeds)]
    pruned = [cost(prune(model, plan), inputs) for plan in plans]
    assert [predicted.of(plan) for plan in plans] == pruned
    assert min(found.macs for found in pruned) < predicted.original.macs
    for plan, found in zip(plans, pruned, strict=True):
        by_layer = predicted.by_layer(plan)
        assert by_layer["MACs"].sum() == pytest.approx(found.macs, rel=1e-12)
        assert by_layer["parameters"].sum() == found.params


def test_each_layer_costs_what_it_costs_in_the_pruned_network():
    model, inputs = seeded(resnext, 3, 3, 32, 32)
    predicted, groups = cost_model(model, inputs), trace_groups(model, inputs).groups
    plan = random_plan(groups, predicted.fixed, 0)
    pruned, found = prune(model, plan), predicted.by_layer(plan).set_index("layer")
    macs = Counter()
    for call in count_calls(pruned, inputs):
        macs[call.layer] += call.macs / len(inputs)
    assert list(found.index[: len(macs)]) == list(macs)
    assert found["MACs"].to_dict() == pytest.approx({name: macs[name] for name in found.index}, rel=1e-12)
    modules = {name: sum(p.numel() for p in pruned.get_submodule(name).parameters()) for name in found.index}
    assert dict(found["parameters"]) == modules
    assert found["MACs"].sum() < predicted.by_layer(PruningPlan.whole(groups))["MACs"].sum()


@pytest.mark.parametrize("name", NETWORKS)
def test_small_networks_are_predicted_exactly(name):
    assert_exact(*network(name))


@pytest.mark.parametrize("name", MODELS)
def test_models_are_predicted_exactly(name):
    build, size = MODELS[name]
    assert_exact(*seeded(build, 2, 3, size, size))


def test_googlenet_is_predicted_exactly():
    build = lambda: zoo.GoogLeNet(num_classes=4, aux_logits=False, init_weights=False)  # noqa: E731
    assert_exact(*seeded(build, 1, 3, 32, 32), seeds=1)


def test_the_narrowest_plan_is_predicted_exactly():
    model, inputs = seeded(resnext, 3, 3, 32, 32)
    groups = trace_groups(model, inputs).groups
    predicted = cost_model(model, inputs)
    least = [group.blocks if group.prunable else group.width for group in groups]
    plan = PruningPlan(
        groups,
        tuple(
            tuple(range(0, group.width, group.width // count)) if group.prunable else tuple(range(group.width))
            for group, count in zip(groups, least, strict=True)
        ),
    )
    assert predicted.of(plan) == cost(prune(model, plan), inputs)


def test_widths_count_each_channel_where_it_occurs():
    """Six channels: the last three feed a narrower axis (as v does in attention), the first occurs twice in a call."""
    root, narrow, call = LayerAxis("qkv", "out"), LayerAxis("proj", "in"), ("act", 1, 2)
    members = (
        Member(root, tuple(range(6)), tuple(range(6)), 6, "Linear"),
        Member(narrow, (1, 2, 3), (3, 4, 5), 4, "Linear"),
    )
    group = ChannelGroup(root, 6, members)
    original = {root: 6, narrow: 4, call: 10}
    widths = Widths.learn(original, [group], [Follower(call[:2], root, (2, 1, 1, 1, 1, 1), dim=2)])

    def at(*kept):
        return {width: widths.at({root: kept})[row] for width, row in widths.rows.items()}

    assert at(*range(6)) == original and widths.at({})[0] == 1
    assert at(1, 2, 3, 4, 5) == {root: 5, narrow: 4, call: 8}
    assert at(0, 1, 5) == {root: 3, narrow: 2, call: 7}
    assert at(2) == {root: 1, narrow: 1, call: 4}


def test_a_plan_is_costed_without_running_anything(monkeypatch):
    model, inputs = network("residual")
    predicted, plan = cost_model(model, inputs), random_plan(trace_groups(model, inputs).groups, {"fc"}, 0)

    def refuse(*args, **kwargs):
        raise AssertionError("a module was called")

    expected = cost(prune(model, plan), inputs)
    monkeypatch.setattr(nn.Module, "__call__", refuse)
    assert predicted.of(plan) == expected


def test_a_model_without_anything_to_prune_has_its_own_cost():
    model, inputs = seeded(lambda: nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(12, 4)), 2, 3, 2, 2)
    predicted, groups = cost_model(model, inputs), trace_groups(model, inputs).groups
    assert predicted.of(PruningPlan.whole(groups)) == predicted.original == cost(model, inputs)


def test_building_leaves_the_model_alone(capsys):
    model, inputs = network("small_vgg")
    model.train()[1].eval()
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        cost_model(model, inputs)
        assert not torch.is_grad_enabled()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model] == [index != 1 for index in range(len(model))]
    assert [parameter.requires_grad for parameter in model.parameters()][:2] == [False, True]
    assert not any(module._forward_hooks for module in model.modules())
    assert capsys.readouterr().out == ""


def test_a_module_that_cannot_be_followed_is_named():
    message = (
        r"module 'watch' \(ReLU\), call 0: .* MACs in a pruned copy, \d+ predicted; its output shrinks from \(2, 64\)"
    )
    with pytest.raises(CostModelError, match=message):
        cost_model(*seeded(lambda: Squared(hidden=True), 2, 6))


def test_two_dimensions_of_one_group_are_predicted_exactly():
    assert_exact(*seeded(Squared, 2, 6))


def test_a_formula_that_does_not_hold_is_noticed():
    convolutions = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Flatten(0), nn.Linear(96, 4))
    with pytest.raises(CostModelError, match=r"module '1' \(Conv2d\), call 0"):
        cost_model(convolutions, torch.randn(3, 8, 8))


def test_a_model_that_runs_differently_once_pruned_is_refused():
    with pytest.raises(CostModelError, match=r"modules \['act'\] run in another order or number in a pruned copy"):
        cost_model(*seeded(Choosy, 2, 6))


def test_groups_that_break_the_model_are_refused_and_others_are_not():
    model, inputs = seeded(Strict, 2, 6)
    predicted, groups = cost_model(model, inputs), trace_groups(model, inputs).groups
    embedding = next(group for group in groups if group.root == LayerAxis("first", "out"))
    assert embedding.prunable and predicted.fixed[embedding.root][0] == 12
    assert "1 groups may shrink, 2 may not" in repr(predicted)
    message = (
        rf"the plan prunes group {embedding.root}, but the model does not run then \(.*\); keep it whole with ignore"
    )
    with pytest.raises(CostModelError, match=message):
        predicted.of(random_plan([embedding], {}, seed=1))


@dataclass(frozen=True)
class AnyPlan:
    groups: tuple
    kept: tuple


def test_a_plan_of_another_model_is_refused():
    model, inputs = network("small_vgg")
    predicted, groups = cost_model(model, inputs), trace_groups(model, inputs).groups
    plan = random_plan(groups, predicted.fixed, seed=3)
    with pytest.raises(CostModelError, match=r"group 0\.out, \d wide in the plan, is 8 wide in the costed model"):
        predicted.of(PruningPlan.whole(plan.pruned_groups()))
    stranger = replace(groups[0], root=LayerAxis("stranger", "out"))
    with pytest.raises(CostModelError, match=r"group stranger\.out, 8 wide in the plan, does not exist in the costed"):
        predicted.of(PruningPlan.whole([stranger]))
    output = replace(groups[-1], kept_whole=None)
    with pytest.raises(CostModelError, match=r"the plan prunes group 13\.out, but reaches the model's output"):
        predicted.of(AnyPlan((output,), ((0, 1),)))
