"""Predicted costs against the costs of really pruned models: equal, not close."""

import copy
import random
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial

import pytest
import timm
import torch
import torch_pruning as tp
import torchvision.models as zoo
from flops import counted_by_torch
from networks import NETWORKS, network
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.resnet import Bottleneck

from obc_tools import find_groups
from obc_tools.measure.costs import Cost, CostModelError, analyse, cost, cost_model, layers_table
from obc_tools.pruning.plan import PruningPlan, prune
from obc_tools.structure.counting import count
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


class FlattenedTokens(nn.Module):
    """Channels and positions in one axis, in either order."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 4, 4)
        self.first, self.second = nn.Linear(24, 5), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.first(x.flatten(1)).sum(1, keepdim=True) + self.second(x.flatten(2).transpose(1, 2).flatten(1))


class FoldedHeads(nn.Module):
    """Attention by batched products: heads folded into the batch, tokens too long for one axis of heads."""

    def __init__(self):
        super().__init__()
        self.stem, self.qkv, self.out = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 3 * 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = (part.flatten(0, 1) for part in (q, k, v))
        mixed = torch.bmm((torch.bmm(q, k.transpose(1, 2)) * 0.4).softmax(-1), v)
        return self.out(mixed.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2)).mean(1)


class Scaled(nn.Module):
    """A linear layer or a convolution that scales its own parameter, as StyleGAN's do."""

    def __init__(self, function, *shape: int):
        super().__init__()
        self.function, self.scale = function, shape[1] ** -0.5
        self.weight, self.bias = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.zeros(shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight * self.scale, self.bias)


class Subclass(nn.Conv2d):
    """A convolution with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(nn.functional.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class Conv1D(nn.Module):
    """A linear layer whose weight is (in, out), as GPT-2's."""

    def __init__(self, outputs: int, inputs: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Cells(nn.Module):
    """A recurrent cell over the rows of an image, by torch's own kernels where they are (float32), else in parts."""

    def __init__(self, kind: type[nn.RNNBase]):
        super().__init__()
        self.front, self.memory = nn.Linear(24, 9), kind(9, 7, batch_first=True)
        self.out = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.memory(self.front(x.transpose(1, 2).flatten(2)).relu())[0][:, -1])


def own_layers() -> nn.Module:
    return nn.Sequential(
        Scaled(nn.functional.conv2d, 8, 3, 3, 3),
        nn.ReLU(),
        Subclass(8, 6, 3),
        nn.ReLU(),
        timm.layers.ScaledStdConv2d(6, 8, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        Conv1D(10, 8),
        nn.Tanh(),
        Scaled(nn.functional.linear, 6, 10),
        nn.Tanh(),
        nn.Linear(6, 4),
    )


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
    "flattened axes": (FlattenedTokens, 8),
    "folded heads": (FoldedHeads, 8),
    "own layers": (own_layers, 8),
    "lstm": (partial(Cells, nn.LSTM), 8),
    "gru": (partial(Cells, nn.GRU), 8),
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


def random_plan(groups, seed: int) -> PruningPlan:
    """Keep a random number of channels of every group that may shrink, at least one a block."""
    draw, kept = random.Random(seed), []
    for group in groups:
        size = group.width // group.blocks
        count = draw.randint(1, size) if group.prunable else size
        inside = sorted(draw.sample(range(size), count))
        kept.append(tuple(block * size + channel for block in range(group.blocks) for channel in inside))
    return PruningPlan(tuple(groups), tuple(kept))


def assert_exact(model: nn.Module, inputs: Tensor, seeds: int = 4) -> None:
    """Compare what is predicted of plans with three counts of the pruned networks: torch's, ours, the parameters'."""
    groups, predicted = analyse(model, inputs)
    assert predicted.original == predicted.of(PruningPlan.whole(groups)) == cost(model, inputs)
    plans = [random_plan(groups, seed) for seed in range(seeds)]
    for plan in plans:
        pruned, found, one = prune(model, plan), predicted.of(plan), tree_map(lambda leaf: leaf[:1], inputs)
        assert found == cost(pruned, inputs)
        assert found.macs == pytest.approx(counted_by_torch(pruned, one), rel=1e-9)
        assert found.params == sum(parameter.numel() for parameter in pruned.parameters())
        by_layer = predicted.by_layer(plan)
        assert by_layer["MACs"].sum() == pytest.approx(found.macs, rel=1e-12)
        assert by_layer["parameters"].sum() == found.params
    assert min(predicted.of(plan).macs for plan in plans) < predicted.original.macs


def test_each_layer_costs_what_it_costs_in_the_pruned_network():
    model, inputs = seeded(resnext, 3, 3, 32, 32)
    groups, predicted = analyse(model, inputs)
    plan = random_plan(groups, 0)
    pruned, found = prune(model, plan), predicted.by_layer(plan).set_index("layer")
    macs = Counter()
    for product in count(pruned, inputs).products:
        macs[product.layer] += product.size / len(inputs)
    assert list(found.index[: len(macs)]) == list(macs)
    assert found["MACs"].to_dict() == pytest.approx({name: macs[name] for name in found.index}, rel=1e-12)
    modules = {name: sum(p.numel() for p in pruned.get_submodule(name).parameters()) for name in found.index}
    assert dict(found["parameters"]) == modules
    assert found["MACs"].sum() < predicted.by_layer(PruningPlan.whole(groups))["MACs"].sum()


@pytest.mark.parametrize(
    "make, sizes, options",
    [(resnext, (3, 3, 32, 32), {}), (timm_transformer, (2, 3, 16, 16), {"only": "attention", "whole_heads": True})],
)
def test_the_table_of_layers_is_what_pruning_leaves_of_each(make, sizes, options):
    model, inputs = seeded(make, *sizes)
    plan = random_plan(find_groups(model, inputs, **options), 0)
    pruned, table = prune(model, plan), layers_table(model, plan, inputs).set_index("layer")
    assert (table["out after"] < table["out"]).any() and (table["in after"] < table["in"]).any()
    for end, built in (("", model), (" after", pruned)):
        macs = Counter()
        for product in count(built, inputs).products:
            macs[product.layer] += product.size / len(inputs)
        assert table[f"MACs{end}"].to_dict() == pytest.approx({name: macs[name] for name in table.index}, rel=1e-12)
        modules = {name: module for name, module in built.named_modules() if name in table.index}
        for name, module in modules.items():
            own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
            assert table[f"parameters{end}"][name] == own
            assert table["type"][name] in ("", type(module).__name__)
        for name in (name for name, module in modules.items() if isinstance(module, nn.Linear)):
            assert tuple(table.loc[name, [f"out{end}", f"in{end}"]]) == modules[name].weight.shape
        assert table[f"parameters{end}"].sum() == sum(parameter.numel() for parameter in built.parameters())
    ran = [name for name in table.index if table["MACs"][name] and table["type"][name]]
    assert ran == [name for name in dict.fromkeys(p.layer for p in count(model, inputs).products) if name in ran]


def test_groups_and_costs_of_one_trace_are_those_of_two():
    model, inputs = seeded(timm_transformer, 2, 3, 16, 16)
    for options in ({}, {"only": "attention", "whole_heads": True}, {"ignore": ["blocks.0.*"]}):
        groups, costs = analyse(model, inputs, **options)
        assert groups == find_groups(model, inputs, **options)
        plan = random_plan(groups, 0)
        assert costs.of(plan) == cost_model(model, inputs, whole_heads="whole_heads" in options).of(plan)
        assert costs.of(plan) == cost(prune(model, plan), inputs)


@pytest.mark.parametrize("name", ["residual", "concat"])
def test_torch_prunings_count_is_that_of_pruned_copies(name):
    model, inputs = network(name)
    groups, costs = analyse(model, inputs, counting="torch_pruning")
    assert costs.original == costs.of(PruningPlan.whole(groups)) == cost(model, inputs, counting="torch_pruning")
    plan = random_plan(groups, 0)
    expected = Cost(*tp.utils.count_ops_and_params(prune(model, plan), inputs))
    assert costs.of(plan) == cost_model(model, inputs, counting="torch_pruning").of(plan) == expected
    by_layer = costs.by_layer(plan)
    assert by_layer["MACs"].sum() == pytest.approx(expected.macs) and by_layer["parameters"].sum() == expected.params


def test_torch_prunings_count_counts_a_tied_parameter_once():
    model, inputs = seeded(Tied, 2, 3, 8, 8)
    groups, costs = analyse(model, inputs, counting="torch_pruning")
    plan = random_plan(groups, 1)
    assert costs.of(plan).params == sum(p.numel() for p in prune(model, plan).parameters())


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
    groups, predicted = analyse(model, inputs)
    least = [group.blocks if group.prunable else group.width for group in groups]
    plan = PruningPlan(
        groups,
        tuple(
            tuple(range(0, group.width, group.width // count)) if group.prunable else tuple(range(group.width))
            for group, count in zip(groups, least, strict=True)
        ),
    )
    assert predicted.of(plan) == cost(prune(model, plan), inputs)


def test_each_channel_counts_where_it_occurs():
    """Queries, keys and values of one layer: only the values' rows are inputs of the next one."""
    model, inputs = seeded(FoldedHeads, 1, 3, 8, 8)
    groups, predicted = analyse(model, inputs)
    names = {str(member.axis) for group in groups for member in group.members}
    assert {"qkv.out", "out.in"} <= names
    for number, group in enumerate(groups):
        if group.prunable:
            size = group.width // group.blocks
            stay = tuple(channel for channel in range(group.width) if channel % size)
            kept = [stay if other == number else tuple(range(g.width)) for other, g in enumerate(groups)]
            plan = PruningPlan(groups, tuple(kept))
            assert predicted.of(plan) == cost(prune(model, plan), inputs)


def test_a_plan_is_costed_without_running_anything(monkeypatch):
    model, inputs = network("residual")
    groups, predicted = analyse(model, inputs)
    plan = random_plan(groups, 0)

    def refuse(*args, **kwargs):
        raise AssertionError("a module was called")

    expected = cost(prune(model, plan), inputs)
    monkeypatch.setattr(nn.Module, "__call__", refuse)
    assert predicted.of(plan) == expected


def test_a_model_without_anything_to_prune_has_its_own_cost():
    model, inputs = seeded(lambda: nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(12, 4)), 2, 3, 2, 2)
    groups, predicted = analyse(model, inputs)
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


@dataclass(frozen=True)
class AnyPlan:
    groups: tuple
    kept: tuple


def test_a_plan_of_another_model_is_refused():
    model, inputs = network("small_vgg")
    groups, predicted = analyse(model, inputs)
    plan = random_plan(groups, seed=3)
    with pytest.raises(
        CostModelError, match=r"group 0\.out, \d wide in the plan, lies on an axis that is 8 wide in the"
    ):
        predicted.of(PruningPlan.whole(plan.pruned_groups()))
    stranger = replace(groups[0], root=LayerAxis("stranger", "out"))
    stranger = replace(stranger, members=(replace(stranger.members[0], axis=stranger.root),))
    with pytest.raises(CostModelError, match=r"group stranger\.out, 8 wide in the plan, does not exist in the costed"):
        predicted.of(PruningPlan.whole([stranger]))
    output = replace(groups[-1], kept_whole=None)
    with pytest.raises(CostModelError, match=r"the plan prunes group 13\.out, but reaches the model's output"):
        predicted.of(AnyPlan((output,), ((0, 1),)))


def test_a_table_of_layers_says_that_it_needs_an_example():
    model, images = network("small_vgg")
    with pytest.raises(ValueError, match=r"pass what one takes as a third argument, layers_table\(model, plan, images"):
        layers_table(model, PruningPlan.whole(find_groups(model, images)))
    with pytest.raises(ValueError, match="the second argument is a Sequential; expected a PruningPlan"):
        layers_table(model, torch.nn.Sequential(), images)
