from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from obc_tools.measure.cost_model import Terms, head_counts, macs_terms, parameter_terms
from obc_tools.measure.costs import count_calls, parameter_count
from obc_tools.structure.layers import LayerAxis, get_layer, layer_axes

IMAGES, TOKENS = (2, 8, 6, 6), (2, 5, 8)

LAYERS = {
    "convolution": (nn.Conv2d(8, 6, 3), IMAGES),
    "without bias": (nn.Conv2d(8, 6, (3, 1), bias=False), IMAGES),
    "grouped": (nn.Conv2d(8, 12, 3, groups=4), IMAGES),
    "depthwise": (nn.Conv2d(8, 8, 3, groups=8), IMAGES),
    "transposed": (nn.ConvTranspose2d(8, 6, 3, groups=2), IMAGES),
    "one-dimensional": (nn.Conv1d(5, 6, 3), TOKENS),
    "linear": (nn.Linear(8, 3), TOKENS),
    "batch norm": (nn.BatchNorm2d(8), IMAGES),
    "plain batch norm": (nn.BatchNorm2d(8, affine=False), IMAGES),
    "group norm": (nn.GroupNorm(2, 8), IMAGES),
    "layer norm": (nn.LayerNorm(8), TOKENS),
    "PReLU": (nn.PReLU(8), IMAGES),
}


def evaluate_terms(terms, widths):
    rows = {width: row for row, width in enumerate(widths, start=1)}
    return Terms.stack(terms, rows).by_item(torch.tensor([1, *widths.values()]).numpy())


@pytest.mark.parametrize("name", LAYERS)
def test_terms_of_a_layer_give_its_counts(name):
    layer, shape = LAYERS[name]
    model = nn.Sequential(layer)
    (call,) = count_calls(model, torch.randn(shape))
    axes = {LayerAxis("0", key): axis for key, axis in layer_axes(layer).items()}
    widths = {axis: entry.width for axis, entry in axes.items()}
    terms = macs_terms(layer, call, widths)
    assert {axis for _, factors in terms for axis, _ in factors} == set(axes)
    assert evaluate_terms([terms], widths) == [call.macs]
    assert sum(evaluate_terms(parameter_terms(model, axes), widths)) == parameter_count(model)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_terms_of_torchs_attention(batch_first, biased):
    layer = nn.MultiheadAttention(8, 2, batch_first=batch_first, bias=biased)
    queries, keys = torch.randn(2, 5, 8), torch.randn((2, 4, 8) if batch_first else (3, 5, 8))
    (call,) = count_calls(layer, (queries, keys, keys))
    widths = {LayerAxis("", "out"): 8, LayerAxis("", ".num_heads"): 2}
    terms = macs_terms(layer, call, widths)
    assert len(terms) > 1 and evaluate_terms([terms], widths) == [call.macs]


@pytest.mark.parametrize("biased", [True, False])
def test_terms_of_timms_attention(biased):
    layer = timm.layers.attention.Attention(8, 2, qkv_bias=biased, attn_head_dim=3)
    (call,) = count_calls(nn.Sequential(layer), torch.randn(TOKENS))
    widths = {LayerAxis("0.qkv", "in"): 8, LayerAxis("0.qkv", "out"): 18, LayerAxis("0", ".num_heads"): 2}
    assert head_counts(nn.Sequential(layer)) == {LayerAxis("0", ".num_heads"): 2}
    terms = macs_terms(layer, call, widths)
    assert len(terms) > 1 and evaluate_terms([terms], widths) == [call.macs]


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 2, "bias": False}], ids=str)
def test_terms_of_recurrent_layers_hold_at_other_widths(kind, options):
    wide, narrow = (kind(width, 3, batch_first=True, **options) for width in (8, 5))
    (call,), (expected,) = count_calls(wide, torch.randn(2, 4, 8)), count_calls(narrow, torch.randn(2, 4, 5))
    axis = LayerAxis("memory.weight_ih_l0", "out")
    terms = macs_terms(wide, replace(call, layer="memory"), {axis: 8})
    assert evaluate_terms([terms], {axis: 8}) == [call.macs] and evaluate_terms([terms], {axis: 5}) == [expected.macs]


def test_terms_of_a_module_without_parameters_take_the_width_of_that_call():
    model = nn.Sequential(nn.ReLU())
    (call,) = count_calls(model, torch.randn(IMAGES))
    assert macs_terms(get_layer(model, "0"), call, {("0", 0, 1): 8}) == [(2 * 36, ((("0", 0, 1), 1),))]


@pytest.mark.parametrize(
    ("layer", "widths"),
    [
        (nn.ReLU(), {}),
        (nn.Linear(8, 3), {LayerAxis("0", "in"): 8}),
        (nn.LSTM(8, 3), {LayerAxis("0", "out"): 3}),
        (nn.Linear(8, 3), {LayerAxis("0", "in"): 8, LayerAxis("0", "out"): 4}),
    ],
    ids=["no width", "a width missing", "another axis", "another count"],
)
def test_what_has_no_terms_is_a_constant(layer, widths):
    (call,) = count_calls(nn.Sequential(layer), torch.randn(TOKENS))
    assert macs_terms(layer, call, widths) == [(call.macs, ())]


def test_terms_divide_before_they_multiply():
    terms = Terms.stack([[(3, (("x", 2), ("y", 4)))], [(1, (("x", 1),)), (5, ())]], {"x": 1, "y": 2})
    widths = torch.tensor([1, 5, 11]).numpy()
    assert terms.by_item(widths) == [3 * 2 * 2, 5 + 5]
    assert terms.total(widths) == 22


def test_counts_beyond_32_bits_are_exact():
    terms = Terms.stack([[(10**9, (("x", 1), ("x", 1)))]], {"x": 1})
    assert terms.total(torch.tensor([1, 12345]).numpy()) == 10**9 * 12345**2
