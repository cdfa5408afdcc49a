"""Our groups are torch_pruning's wherever it is right: the same channels go together, under the same names."""

from collections import defaultdict

import pytest
import torch
import torch_pruning as tp
import torchvision
from networks import NETWORKS, network
from torch import nn

from obc_tools import LayerAxis, find_groups, load_model
from obc_tools.interop import expand_axes
from obc_tools.state import call_model

IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
MODELS = {
    "resnet56": lambda: load_model("resnet56", 10),
    "vgg19": lambda: load_model("vgg19", 10, width=8),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(width_mult=0.25),
    "densenet": lambda: torchvision.models.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8),
    "googlenet": lambda: torchvision.models.googlenet(aux_logits=False, init_weights=False),
    "vit": lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 24, num_classes=5),
}


def graph_of(model, images):
    graph = tp.DependencyGraph()
    return graph.build_dependency(model, (images,), forward_fn=call_model, verbose=False)


def read(graph, model):
    """Return what each channel of each of torch_pruning's groups stands for, by the group's root."""
    names = {module: name for name, module in model.named_modules()}
    names |= {parameter: name for name, parameter in model.named_parameters()}
    found = {}
    for group in graph.get_all_groups(ignored_layers=[]):
        channels = defaultdict(set)
        for item in group:
            module = item.dep.target.module
            if module not in names:
                continue
            key = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
            for layer, axis, _ in expand_axes(module, names[module], key):
                for position, channel in zip(item.idxs, item.root_idxs, strict=True):
                    channels[channel].add((layer, axis, position))
        found[LayerAxis(names[group[0].dep.target.module], "out")] = set(map(frozenset, channels.values()))
    return found


def parts(group):
    """Return what each channel of one of our groups stands for; attention heads and convolution groups apart."""
    channels = defaultdict(set)
    for member in group.members:
        for position, channel in zip(member.positions, member.channels, strict=True):
            channels[channel].add((*member.axis, position))
    return set(map(frozenset, channels.values()))


def assert_same_groups(model, images):
    model.eval()
    theirs = read(graph_of(model, images), model)
    ours = find_groups(model, images)
    order = {module: index for index, (module, _) in enumerate(model.named_modules())}
    assert [group.root for group in ours] == sorted(theirs, key=lambda root: order[root.layer])
    for group in ours:
        assert group.members[0].axis == group.root
        assert parts(group) == theirs[group.root], str(group.root)


@pytest.mark.parametrize("name", NETWORKS)
def test_small_networks(name):
    assert_same_groups(*network(name))


@pytest.mark.parametrize("name", MODELS)
def test_known_models(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert_same_groups(MODELS[name](), IMAGE)


def test_one_input_channel_binds_no_outputs():
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.Flatten(), nn.Linear(128, 3))
    assert_same_groups(model, torch.randn(1, 1, 8, 8))
    assert [group.width for group in find_groups(model, torch.randn(1, 1, 8, 8))] == [6, 8, 3]
