"""MACs against torch's own counter, and against torch_pruning's, which is the definition of its count."""

import copy
from functools import partial

import pytest
import timm
import torch
import torch_pruning as tp
import torchvision
from flops import counted_by_torch
from networks import NETWORKS, network
from torch import Tensor, nn
from torch_pruning.utils import op_counter

from obc_tools import Forward
from obc_tools.measure.costs import Cost, analyse, cost, cost_model, example_count
from obc_tools.models.networks import load_model

by_modules = partial(cost, counting="torch_pruning")


class SharedActivation(nn.Module):
    """One ReLU that two blocks hold and call: torch_pruning adds it once a block."""

    def __init__(self):
        super().__init__()
        act = nn.ReLU()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), act)
        self.second = nn.Sequential(nn.Conv2d(4, 6, 3), act, nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)).mean((2, 3))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(6, 8, num_layers=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Keywords(nn.Module):
    """Takes keyword arguments, and calls its attention with some."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, tokens: Tensor, attend: bool = False) -> Tensor:
        x = self.embed(tokens)
        return self.attention(query=x, key=x, value=x)[0] if attend else x


def elementwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.GroupNorm(2, 6),
        nn.PReLU(6),
        nn.Upsample(scale_factor=2),
        nn.ConvTranspose2d(6, 4, 2, groups=2),
        nn.InstanceNorm2d(4),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.SiLU(),
        nn.Flatten(2),
        nn.AdaptiveMaxPool1d(5),
        nn.LayerNorm(5),
        nn.Linear(5, 3, bias=False),
    )


CASES = {
    "elementwise": (elementwise, (3, 8, 8)),
    "shared activation": (SharedActivation, (3, 8, 8)),
    "a single layer": (lambda: nn.Linear(6, 4), (5, 6)),
    "lstm": (Recurrent, (5, 6)),
    "nn.MultiheadAttention": (lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), (5, 8)),
    "timm's attention": (
        lambda: timm.models.VisionTransformer(16, 8, embed_dim=24, depth=2, num_heads=2, num_classes=3),
        (3, 16, 16),
    ),
}


@pytest.mark.parametrize("examples", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_layers_cost_what_torch_pruning_says(name, examples):
    build, shape = CASES[name]
    model, inputs = build(), torch.randn(examples, *shape)
    assert by_modules(model, inputs) == Cost(*tp.utils.count_ops_and_params(model, inputs))


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_cost_what_torch_pruning_says(name):
    model, images = network(name)
    assert by_modules(model, images) == Cost(*tp.utils.count_ops_and_params(model, images))


@pytest.mark.parametrize("examples", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_layers_cost_what_runs(name, examples):
    build, shape = CASES[name]
    model, inputs = build(), torch.randn(examples, *shape)
    found = cost(model, inputs)
    assert found.macs == counted_by_torch(model, inputs) / examples and not found.unknown
    assert found.params == sum(parameter.numel() for parameter in model.parameters())


def test_resnet56_costs_what_is_published():
    model, image = load_model("resnet56", num_classes=10), torch.zeros(1, 3, 32, 32)
    assert (by_modules(model, image).macs, by_modules(model, image).params) == (126_837_386, 855_770)
    assert cost(model, image).macs == counted_by_torch(model, image) == 125_747_840


def assert_published(name):
    """Compare with all figures that torchvision publishes of a classifier: giga-multiply-adds, to their last digit."""
    for weights in torchvision.models.get_model_weights(name):
        size, options = weights.transforms().crop_size[0], {}
        if name in ("googlenet", "inception_v3"):
            options["init_weights"] = False
        if name.startswith("vit"):
            options["image_size"] = size
        try:
            with torch.device("meta"):
                model = torchvision.models.get_model(name, **options)
        except NotImplementedError:  # it computes with tensors while it is built
            model = torchvision.models.get_model(name, **options).to("meta")
        found, published = cost(model, torch.zeros(1, 3, size, size, device="meta")).macs / 1e9, weights.meta["_ops"]
        assert found == pytest.approx(published, rel=0.005, abs=0.00051), (name, size)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "vit_b_32"])
def test_torchvisions_published_figures_are_met(name):
    assert_published(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
def test_all_of_torchvisions_published_figures_are_met(name):
    assert_published(name)


def test_an_unknown_counting_is_refused():
    for function in (cost, cost_model, analyse):
        with pytest.raises(ValueError, match=r"unknown counting 'operation'; closest: operations"):
            function(nn.Linear(6, 4), torch.zeros(1, 6), counting="operation")


def test_several_arguments_and_keyword_arguments_are_counted_for_one_example():
    model, tokens = Keywords(), torch.randn(3, 5, 6)
    assert cost(model, (tokens, False)).macs == 5 * 6 * 8
    assert by_modules(model, (tokens, False)).macs == (3 * 5 * 6 * 8 + 8) / 3
    one = {"tokens": tokens[:1]}
    assert by_modules(model, one) == Cost(*tp.utils.count_ops_and_params(model, one))
    for count in (cost, by_modules):
        assert count(model, {"tokens": tokens}) == count(model, tokens)
        assert count(model, Forward(lambda model, inputs: model(*inputs), (tokens,))) == count(model, tokens)


def test_counting_leaves_no_trace(capsys):
    model = SharedActivation().train()
    model.second.eval()
    before = copy.deepcopy(model.state_dict())
    marks = {name: (module.training, set(vars(module))) for name, module in model.named_modules()}
    with torch.enable_grad():
        for count in (cost, by_modules):
            count(model, torch.randn(2, 3, 8, 8))
        assert torch.is_grad_enabled()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert marks == {name: (module.training, set(vars(module))) for name, module in model.named_modules()}
    assert not any(module._forward_hooks for module in model.modules())
    assert capsys.readouterr() == ("", "")


def test_torch_prunings_custom_formulas_count_and_stay(monkeypatch):
    def five(module, inputs, output):
        module.__flops__ += 5

    custom = {nn.SiLU: five}
    monkeypatch.setattr(op_counter, "CUSTOM_MODULES_MAPPING", custom)
    assert by_modules(nn.Sequential(nn.SiLU(), nn.Sequential(nn.SiLU())), torch.zeros(1, 3)).macs == 10
    assert op_counter.CUSTOM_MODULES_MAPPING is custom and custom == {nn.SiLU: five}


def test_a_call_that_cannot_be_counted_is_named():
    with pytest.raises(ValueError, match=r"module 'attention' \(MultiheadAttention\): torch_pruning cannot count its"):
        by_modules(Keywords(), (torch.randn(2, 5, 6), True))
    assert cost(Keywords(), (torch.randn(2, 5, 6), True)).macs == 5 * 6 * 8 + 5 * 4 * 8 * 8 + 2 * 5 * 5 * 8


def test_an_error_of_the_model_is_its_own():
    with pytest.raises(ValueError, match="shapes cannot be multiplied"):
        by_modules(nn.Linear(6, 4), torch.zeros(1, 5))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.zeros(0, 3), "example inputs: they hold no example"),
        ((), "example inputs: they hold no example"),
        (torch.tensor(1.0), "example inputs: the first one is a single value"),
        ({"x": 5}, "example inputs: the first one is a single value"),
    ],
)
def test_inputs_without_examples_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        example_count(inputs)


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (Cost(126_837_386.0, 855_770), "126.8 MMACs, 0.856 M parameters"),
        (Cost(4_121_925_096.0, 25_557_032), "4.122 GMACs, 25.56 M parameters"),
        (Cost(1234.0, 56), "1.234 kMACs, 56 parameters"),
        (Cost(1234.0, 56, ("fft in layer 'a'",)), "1.234 kMACs, 56 parameters; not counted: fft in layer 'a'"),
    ],
)
def test_a_cost_is_shown_with_units(found, text):
    assert repr(found) == text
    assert text in found._repr_html_()
    assert found.to_frame().to_dict("records") == [{"MACs": found.macs, "parameters": found.params}]


@pytest.mark.parametrize(("macs", "params"), [(-1.0, 3), (float("nan"), 3), (1.0, -3)])
def test_an_impossible_cost_is_refused(macs, params):
    with pytest.raises(ValueError, match="both are at least 0"):
        Cost(macs, params)
