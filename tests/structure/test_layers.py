"""The table of layer types against slow oracles, and the door for types of the user's own."""

from dataclasses import replace

import pytest
import timm
import torch
import torchvision
from oracles import row_gradients
from own_layers import CENTRED, OWN, TURNED, Blur, Centred, Length, LookUp, Turned, registered
from torch import nn

import obc_tools as obc
from obc_tools.scoring.objectives import classification
from obc_tools.structure import layers as table

norms = timm.layers.norm


def randomized(layer):
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    for name, buffer in layer.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2) if name.endswith("var") else buffer.normal_()
    return layer


KNOWN = {
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 5)),
    "Conv2d, grouped": (lambda: nn.Conv2d(4, 6, (3, 2), groups=2, bias=False), (2, 4, 5, 5)),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 2), (2, 4, 3, 3, 3)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 5, 5)),
    "depthwise, twice as wide": (lambda: nn.Conv2d(6, 12, 3, groups=6), (2, 6, 5, 5)),
    "ConvTranspose2d, grouped": (lambda: nn.ConvTranspose2d(4, 8, 3, groups=2), (2, 4, 5, 5)),
    "ConvTranspose2d, depthwise": (lambda: nn.ConvTranspose2d(4, 4, 3, groups=4), (2, 4, 5, 5)),
    "StdConv2d": (lambda: timm.layers.StdConv2d(4, 6, 3, bias=True), (2, 4, 5, 5)),
    "ScaledStdConv2d": (lambda: timm.layers.ScaledStdConv2d(4, 6, 3, bias=True), (2, 4, 5, 5)),
    "Linear": (lambda: nn.Linear(6, 8), (3, 5, 6)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(6), (2, 6, 3, 3)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(6, affine=True), (2, 6, 3, 3)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 8), (2, 8, 3, 3)),
    "LayerNorm": (lambda: nn.LayerNorm(6), (2, 5, 6)),
    "RMSNorm": (lambda: nn.RMSNorm(6), (2, 5, 6)),
    "LayerNorm2d of torchvision": (lambda: torchvision.models.convnext.LayerNorm2d(6), (2, 6, 3, 3)),
    "RmsNorm of timm": (lambda: norms.RmsNorm(6), (2, 5, 6)),
    "PReLU": (lambda: nn.PReLU(6), (2, 6, 3)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_table_says_what_layers_do(name):
    build, shape = KNOWN[name]
    check = obc.check_layer(randomized(build()), torch.randn(shape))
    assert check.ok and check.effect > 0.01, check


@pytest.mark.parametrize("padding", [None, 0])
def test_look_ups(padding):
    check = obc.check_layer(randomized(nn.Embedding(7, 6, padding_idx=padding)), torch.randint(7, (3, 4)))
    assert check.ok and check.error_of("J·w = δ·z") < 1e-12, check


OWN_LAYERS = {
    "weight (inputs, outputs)": (lambda: Turned(6, 8), (3, 5, 6)),
    "convolution": (lambda: Blur(4, 6), (2, 4, 5, 5)),
    "grouped convolution": (lambda: Blur(6, 8, 2), (2, 6, 5, 5)),
    "depthwise convolution": (lambda: Blur(6, 6, 6), (2, 6, 5, 5)),
    "norm": (lambda: Length(6), (2, 6, 3, 3)),
    "standardised": (lambda: Centred(6, 8), (3, 6)),
}


@pytest.mark.parametrize("name", OWN_LAYERS)
def test_registered_types_are_proven(name):
    build, shape = OWN_LAYERS[name]
    with registered():
        check = obc.check_layer(randomized(build()), torch.randn(shape))
    assert check.ok, check
    names = {finding.name for finding in check.findings}
    assert ("maps merged = maps inserted" in names) == (name not in ("norm", "standardised", "depthwise convolution"))


def test_a_registered_look_up_is_proven():
    with registered():
        check = obc.check_layer(LookUp(7, 6), torch.randint(7, (3, 4)))
    assert check.ok, check


@pytest.mark.parametrize(
    ("layer", "shape", "wrong", "finding"),
    [
        (Turned(6, 6), (3, 6), replace(TURNED, outputs={"weight": 0, "bias": 0}, inputs={"weight": 1}), "less inputs"),
        (Centred(6, 8), (3, 6), replace(CENTRED, linear=True), "J·w = δ·z"),
        (Centred(6, 8), (3, 6), replace(CENTRED, mixes=True), "maps merged = maps inserted"),
        (Length(6), (2, 6, 3, 3), replace(OWN[Length], statistics=None), "less outputs"),
    ],
)
def test_a_wrong_description_shows(layer, shape, wrong, finding):
    with obc.register_layer(type(layer), wrong):
        check = obc.check_layer(layer, torch.randn(shape))
    assert not check.ok and check.error_of(finding) > 1e-3


class Net(nn.Module):
    """Registered layers of all kinds in one network."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(3, 8, 1), Blur(8, 12, 2), Length(12)
        self.flat, self.out = Turned(12, 10), nn.Linear(10, 3)

    def forward(self, x):
        x = self.norm(self.conv(self.stem(x).relu())).relu()
        return self.out(self.flat(x.mean((2, 3))).relu())


def own_network():
    torch.manual_seed(0)
    return Net().double().eval(), (torch.randn(6, 3, 5, 5).double(), torch.randint(3, (6,)))


@pytest.mark.parametrize("rows", ["batch", "sample", 2])
def test_registered_layers_are_scored(rows):
    with registered():
        model, batch = own_network()
        found = obc.jacobian_products(model, [batch], rows=rows)
    gradients = row_gradients(model, batch, rows, classification)
    product = {name: gradients[name] * parameter.detach() for name, parameter in model.named_parameters()}
    kernel = product["conv.kernel"].flatten(3).sum(3)
    expected = {
        "conv.out": kernel.sum(2) + product["conv.shift"],
        "conv.in": torch.cat([kernel[:, :6].sum(1), kernel[:, 6:].sum(1)], 1),
        "norm.out": product["norm.gain"],
        "flat.out": product["flat.weight"].sum(1) + product["flat.bias"],
        "flat.in": product["flat.weight"].sum(2),
    }
    for axis, products in expected.items():
        torch.testing.assert_close(found[tuple(axis.split("."))], products, rtol=0, atol=1e-10)


def test_registered_layers_are_pruned_trained_and_saved(tmp_path):
    with registered():
        model, batch = own_network()
        plan = obc.prune_to(model, batch[0], [batch], ratio=0.4, steps=2, progress=False)
        roots = {group.root.layer for group in plan.groups if group.prunable}
        assert roots == {"stem", "conv", "flat"}
        check = obc.check_plan(model, plan, batch[0])
        assert all(finding.ok for finding in check.findings if finding.name != "costs predicted = counted"), check
        equivalent = obc.EquivalentModel(model, plan)
        assert set(equivalent.mixed_layers) == {"stem", "conv", "flat", "out"}
        merged = equivalent.merge()
        kept = merged.flat.weight.shape
        assert (merged.flat.nx, merged.flat.nf) == tuple(kept) and kept[1] < 10
        obc.save_pruned(tmp_path / "saved", merged, plan)
        loaded = obc.load_pruned(tmp_path / "saved", model=Net().double()).eval()
        assert torch.equal(loaded(batch[0]), merged(batch[0]))
    with pytest.raises(ValueError, match="type Blur is not in the table of layer types; register_layer describes it"):
        obc.prune(model, plan)


def test_registering_ends():
    with obc.register_layer(Turned, TURNED):
        assert table.is_projection(Turned(2, 3)) and table.is_known(Turned(2, 3))
        with obc.register_layer(Turned, replace(TURNED, mixes=False), replace=True):
            assert not table.layer_type(Turned(2, 3)).mixes
        assert table.layer_type(Turned(2, 3)).mixes
    assert not table.is_known(Turned(2, 3))
    obc.register_layer(Turned, TURNED).close()
    assert not table.is_known(Turned(2, 3))


def test_subclasses_are_known_by_the_most_specific_type():
    class Own(nn.Conv2d):
        pass

    assert table.layer_type(Own(2, 3, 1)) is table.layer_type(nn.Conv2d(2, 3, 1))
    with obc.register_layer(Own, replace(table.layer_type(nn.Conv2d(2, 3, 1)), mixes=False)):
        assert not table.layer_axes(Own(2, 3, 1))["out"].mixable
        assert table.layer_axes(nn.Conv2d(2, 3, 1))["out"].mixable


def test_types_that_are_not_imported_are_known_by_name():
    kind = type("Conv1D", (Turned,), {"__module__": "transformers.pytorch_utils", "__qualname__": "Conv1D"})
    check = obc.check_layer(kind(6, 8), torch.randn(3, 5, 6))
    assert check.ok and check.error_of("maps merged = maps inserted") < 1e-12, check


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"outputs": {"kernel": 1, "bias": 0}, "inputs": {"kernel": 0}},
            "has no tensor 'kernel', which its type names",
        ),
        ({"outputs": {"weight": 1, "bias": 1}}, r"its 'bias' of shape \(3,\) has no dimension 1"),
        ({"widths": {"width": "out"}}, "has no attribute 'width'"),
        (
            {"widths": {"nx": "out"}},
            r"axis 'out' do not agree: weight along 1 is 3, bias along 0 is 3, nx is 2",
        ),
        ({"outputs": {"weight": 1}}, r"has parameters \['bias'\] that its type does not explain"),
    ],
)
def test_what_a_layer_contradicts_is_said(change, message):
    with obc.register_layer(Turned, replace(TURNED, **change)), pytest.raises(ValueError, match=message):
        table.layer_axes(Turned(2, 3), "own")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"role": "layer"}, "layer"),
        ({"statistics": "batches"}, "batches"),
        ({"outputs": {"weight": -1, "bias": 0}}, "'weight': -1: a dimension is a number from 0 on"),
        ({"widths": {"nf": "outputs"}}, "each attribute holds the width of 'out' or of 'in'"),
        ({"inputs": {"other": 0}}, "inputs name one tensor, the weight, which outputs name too"),
        ({"outputs": {"weight": 0}}, "along another dimension"),
        ({"inputs": {}}, "mixes and groups go with inputs"),
        ({"outputs": {"weight": 1, "bias": 0, "gain": 0}}, "a weight and at most a bias"),
        ({"outputs": {"weight": 2}, "groups": "nx"}, "channels along dimensions 0 and 1"),
    ],
)
def test_contradictions_are_refused_when_made(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TURNED, **change)


def test_what_cannot_be_registered_is_said():
    with pytest.raises(ValueError, match="Linear is in the table of layer types already: replace=True takes its place"):
        obc.register_layer(nn.Linear, TURNED)
    with pytest.raises(ValueError, match="register the type of a layer, not a layer"):
        obc.register_layer(Turned(2, 3), TURNED)
    with pytest.raises(ValueError, match="outputs name no tensor"):
        obc.register_layer(Turned, table.LayerType("scale"))
    assert not table.is_known(Turned(2, 3))


def test_facts_of_torchs_layers():
    conv, linear, norm = nn.Conv2d(4, 4, 3, groups=2), nn.Linear(2, 3), nn.LayerNorm(3)
    assert [table.kernel_dims(layer) for layer in (conv, linear, norm)] == [2, 0, 0]
    assert [table.is_projection(layer) for layer in (conv, linear, norm, nn.ReLU())] == [True, True, False, False]
    assert (
        table.is_grouped(conv) and not table.is_grouped(nn.Conv2d(4, 4, 3, groups=4)) and not table.is_grouped(linear)
    )
    assert table.is_norm(norm, "channels") and table.is_norm(norm) and not table.is_norm(norm, "examples", "positions")
    assert table.is_batch_norm(nn.SyncBatchNorm(3)) and table.is_norm(nn.InstanceNorm1d(3), "positions")
    assert table.has_role(nn.MultiheadAttention(4, 2), "attention") and table.has_role(nn.Embedding(2, 3), "embedding")
    assert table.is_standardised(timm.layers.StdConv2d(3, 4, 1)) and not table.is_standardised(conv)
    image, taken = torch.randn(2, 4, 5, 5), torch.tensor([[1.0, -1.0]])
    assert table.activation_dim(conv, image) == 1 and table.activation_dim(conv, image[0]) == 0
    assert table.fixed_outputs(linear, taken) is None
    assert table.fixed_outputs(nn.PReLU(2), taken).tolist() == [[True, False]]
    padded = table.fixed_outputs(nn.Embedding(3, 2, padding_idx=0), torch.tensor([0, 2]))
    assert padded.tolist() == [[True], [False]] and table.fixed_outputs(nn.Embedding(3, 2), torch.tensor([0])) is None


def test_layers_of_several_dimensions_are_not_understood():
    with pytest.raises(ValueError, match=r"layer 'norm' \(LayerNorm\) normalizes over 2 dimensions \(3, 4\)"):
        table.layer_axes(nn.LayerNorm((3, 4)), "norm")
    with pytest.raises(ValueError, match=r"parameters \['k_proj_weight', 'q_proj_weight', 'v_proj_weight'\]"):
        table.layer_axes(nn.MultiheadAttention(4, 2, kdim=3), "attention")
