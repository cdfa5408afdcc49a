import pytest
import torch
from networks import NETWORKS, Concat, network
from torch import nn

from obc_tools import ChannelGroup, LayerAxis, Member, find_groups
from obc_tools.structure.layers import get_layer


def test_a_group_holds_everything_that_goes_with_a_channel():
    model, images = network("residual")
    groups = {str(group.root): group for group in find_groups(model, images)}
    assert [str(member.axis) for member in groups["conv1.out"].members] == ["conv1.out", "bn1.out", "conv2.in"]
    stream = {str(member.axis) for group in groups.values() if group.width == 12 for member in group.members}
    assert stream == {
        *("conv2.out", "bn2.out", "project.0.out", "project.1.out"),
        *("conv3.out", "conv3.in", "bn3.out", "fc.in"),
    }
    assert groups["fc.out"].kept_whole == "reaches the model's output"


def test_a_flattened_axis_has_several_positions_a_channel():
    model, images = network("small_vgg")
    group = next(group for group in find_groups(model, images) if group.root == LayerAxis("7", "out"))
    linear = group.members[-1]
    assert (linear.axis, linear.width, len(linear.positions)) == (LayerAxis("11", "in"), 256, 256)
    assert [linear.channels[linear.positions.index(p)] for p in (0, 15, 16, 255)] == [0, 0, 1, 15]


def test_members_of_a_concatenation_are_parts_of_an_axis():
    groups = {str(group.root): group for group in find_groups(*network("concat"))}
    parts = {
        root: next(m for m in groups[root].members if m.axis == LayerAxis("last", "in"))
        for root in groups
        if root in ("stem.out", "left.out", "right.out")
    }
    assert [min(part.positions) for part in parts.values()] == [0, 6, 14]
    assert {part.width for part in parts.values()} == {24}


def test_convolution_groups_are_blocks():
    groups = {str(group.root): group for group in find_groups(*network("grouped"))}
    assert {root: group.blocks for root, group in groups.items()} == {
        "conv1.out": 4,
        "conv2.out": 4,
        "conv3.out": 1,
        "fc.out": 1,
    }


def test_channels_added_to_the_input_stay():
    class AddsInput(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Conv2d(3, 6, 1)
            self.outer = nn.Conv2d(6, 3, 1)
            self.head = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.head(x + self.outer(self.inner(x)))

    groups = {str(group.root): group for group in find_groups(AddsInput(), torch.randn(1, 3, 4, 4))}
    assert groups["inner.out"].prunable
    assert groups["outer.out"].kept_whole == "is coupled to the model's input"


def test_ignored_outputs_stay_and_their_inputs_may_shrink():
    model, images = network("small_vgg")
    for ignore in (["3"], [model[3]], "3"):
        groups = {group.root.layer: group for group in find_groups(model, images, ignore=ignore)}
        assert groups["3"].kept_whole == "ignored: 3"
        assert groups["0"].prunable
    groups = find_groups(*network("residual"), ignore=["conv*"])
    assert [group.root.layer for group in groups if group.prunable] == ["stem.0"]


def test_bad_ignore_is_refused():
    model, images = network("residual")
    with pytest.raises(ValueError, match=r"unknown layer to ignore 'conv9'; closest: conv"):
        find_groups(model, images, ignore=["conv9"])
    with pytest.raises(ValueError, match="a Linear that is not part of the model"):
        find_groups(model, images, ignore=[nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"unknown layer '0'; there is none that has a name$"):
        get_layer(nn.Linear(2, 2), "0")


class OfMatrices(nn.Module):
    def forward(self, weight):
        return torch.matrix_exp(weight)


def test_layers_that_are_not_understood_stay_and_say_so():
    scaled = nn.Conv2d(4, 6, 1)
    nn.utils.parametrize.register_parametrization(scaled, "weight", OfMatrices())
    model = nn.Sequential(nn.Conv2d(3, 4, 1), scaled, nn.ReLU(), nn.Conv2d(6, 2, 1))
    groups = {group.root.layer: group for group in find_groups(model, torch.randn(1, 3, 4, 4))}
    assert groups["0"].kept_whole == "meets a tensor of fixed width"
    assert not any(group.prunable for group in groups.values())


def test_a_model_that_uses_no_parameter_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    model.forward = lambda x: x + 1
    with pytest.raises(ValueError, match="no tensor that depends on its parameters"):
        find_groups(model, torch.randn(1, 3, 4, 4))


@pytest.mark.parametrize("name", NETWORKS)
def test_tracing_leaves_the_model_alone(name):
    model, images = network(name)
    model.train()
    next(model.parameters()).requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    find_groups(model, images)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert not next(model.parameters()).requires_grad


def test_values_are_checked():
    axis = LayerAxis("conv", "out")
    with pytest.raises(ValueError, match=r"conv\.out: position 4 on an axis of width 4"):
        Member(axis, (0, 4), (0, 1), 4, "Conv2d")
    with pytest.raises(ValueError, match="2 positions for 1 channels"):
        Member(axis, (0, 1), (0,), 4, "Conv2d")
    with pytest.raises(ValueError, match="width 4 does not divide into 3 blocks"):
        ChannelGroup(axis, 4, (Member(axis, (0,), (0,), 4, "Conv2d"),), None, 3)


def test_groups_show_themselves():
    group = find_groups(Concat(), torch.randn(1, 3, 8, 8))[0]
    assert repr(group) == f"ChannelGroup(stem.out, width=6, {len(group.members)} members)"
    assert "stem.out" in group._repr_html_()
