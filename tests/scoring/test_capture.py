"""Products and gradients of any rows against the whole Jacobian, for every layer type and structure, by each way."""

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import CASES, EXAMPLES, Case
from oracles import products, row_gradients, score, state_of
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn import functional as F

from obc_tools.scoring.jacobian import jacobian_products, model_axes
from obc_tools.scoring.objectives import classification
from obc_tools.scoring.rows import ProductRows, Proof, stream_gradients
from obc_tools.structure.layers import get_layer, own_parameters

ROWS = ("batch", "sample", 1, 2, 3, EXAMPLES)


def by_name(case: Case) -> str:
    return case.name


def computed(case: Case, rows, batches=1):
    data = [case.data() for _ in range(batches)]
    return jacobian_products(case.model(), data, rows=rows, layers=case.layers, objective=case.objective)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_products_are_those_of_the_whole_jacobian(case, rows):
    model = case.model()
    jacobian = row_gradients(model, case.data(), rows, case.objective)
    found = computed(case, rows)
    scores = found.scores()
    for axis, product in found.items():
        expected = products(model, jacobian, axis)
        assert expected.abs().max() > 1e-6
        torch.testing.assert_close(product, expected, rtol=0, atol=1e-10 * expected.abs().max().item())
        quadratic = score(model, jacobian, axis)
        torch.testing.assert_close(scores[axis], quadratic, rtol=0, atol=1e-10 * quadratic.max().item())


@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_later_batches_have_the_products_of_the_first(case, rows):
    """They are scored without weight gradients, and from the third on with folded norms."""
    for product in computed(case, rows, batches=3).values():
        first, *later = product.chunk(3)
        for rows_later in later:
            torch.testing.assert_close(rows_later, first, rtol=0, atol=1e-10 * first.abs().max().item())


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_one_backward_pass_a_row_where_gates_do_not_suit_and_only_there(case, caplog):
    with caplog.at_level(logging.WARNING):
        computed(case, "sample")
    named = {name for record in caplog.records for name in record.message.partition("for: ")[2].split(", ")}
    assert named == case.by_weights


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_gradients_are_the_whole_jacobian(case, rows):
    model = case.model()
    layers = list(dict.fromkeys(axis.layer for axis in model_axes(model, case.layers)))
    jacobian = row_gradients(model, case.data(), rows, case.objective)
    found = {}

    def consume(layer, gradients):
        for key, gradient in gradients.items():
            found.setdefault((layer, key), []).append(gradient)

    assert list(stream_gradients(model, [case.data()], layers, consume, rows=rows, objective=case.objective)) == [1]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for layer in layers:
        for key, parameter in own_parameters(get_layer(model, layer)).items():
            expected = jacobian[names[id(parameter)]]
            tolerance = 1e-10 * expected.abs().max().item() + 1e-14
            torch.testing.assert_close(torch.cat(found[layer, key]), expected, rtol=0, atol=tolerance)


def test_layers_are_done_with_while_the_backward_pass_runs():
    chosen = next(case for case in CASES if case.name == "residual")
    model, order = chosen.model(), []

    def note(layer, taken, output):
        output.register_hook(lambda gradient: order.append("gradient of conv1"))

    model.conv1.register_forward_hook(note)

    def consume(layer, gradients):
        order.append(layer)

    list(stream_gradients(model, [chosen.data()] * 2, ["stem", "conv2", "head"], consume, rows="sample"))
    assert order[-4:] == ["head", "conv2", "gradient of conv1", "stem"]


def attending(seed):
    case = next(case for case in CASES if case.name == "attention")
    return case.model(seed), case.data(seed), case.layers


def test_two_threads_score_two_models_with_attention():
    linear, fused = F.linear, torch.backends.mha.get_fastpath_enabled()
    given = [attending(seed) for seed in range(4)]
    expected = [score_of(one) for one in given]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(score_of, given))
    for one, other in zip(found, expected, strict=True):
        for axis, product in other.items():
            torch.testing.assert_close(one[axis], product, rtol=1e-10, atol=1e-14)
    assert F.linear is linear and torch.backends.mha.get_fastpath_enabled() == fused


def score_of(given):
    model, batch, layers = given
    return jacobian_products(model, [batch] * 5, rows="sample", layers=layers)


def test_the_model_is_given_back_when_a_consumer_fails():
    model, batch, layers = attending(0)
    before, calls = state_of(model), []

    def consume(layer, gradients):
        calls.append(layer)
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        list(stream_gradients(model, [batch], layers, consume, rows="sample"))
    assert len(calls) == 1 and state_of(model) == before


class Overwriting(nn.Module):
    """Writes into what a layer took, as soon as a batch is all zeros."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, inputs):
        taken = torch.tanh(inputs)
        out = self.head(self.first(taken))
        if not inputs.any():
            taken += 1
        return out


def test_an_input_that_changes_in_place_only_later():
    torch.manual_seed(0)
    model, batch = Overwriting().double(), (torch.randn(6, 4).double(), torch.zeros(6, dtype=torch.long))
    batches = [batch, (batch[0] * 0, batch[1])]
    with pytest.raises(RuntimeError, match="layer 'first': unlike in the first batch, its activations were changed"):
        list(stream_gradients(model, batches, ["first"], lambda *args: None, rows="sample"))
    with pytest.raises(RuntimeError, match="layer 'first': unlike in the first batch, its activations were changed"):
        jacobian_products(model, batches, rows="sample", layers=["first"])


class NormAndActivation(nn.BatchNorm2d):
    """A batch norm with an activation behind it, in place, as timm's."""

    def forward(self, x):
        training = self.training
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training, 0.1, self.eps)
        return F.hardtanh(x, -0.3, 0.4, inplace=True)


class NormByHand(nn.BatchNorm2d):
    """Another that does not call torch's."""

    def forward(self, x):
        mean, deviation = self.running_mean[:, None, None], (self.running_var + self.eps).sqrt()[:, None, None]
        return ((x - mean) / deviation * self.weight[:, None, None] + self.bias[:, None, None]).tanh()


@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize("kind", [NormAndActivation, NormByHand, BatchNormAct2d])
def test_norms_inside_layers_that_do_more(kind, rows):
    torch.manual_seed(0)
    norm = kind(6) if kind is not BatchNormAct2d else kind(6, act_layer=nn.SiLU)
    body = [nn.Conv2d(3, 6, 3), norm, nn.Conv2d(6, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU()]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)).double().eval()
    for layer in (model[1], model[3]):
        layer.running_mean.uniform_(-0.3, 0.3), layer.running_var.uniform_(0.5, 2)
        layer.weight.data.uniform_(0.5, 1.5), layer.bias.data.uniform_(-0.3, 0.3)
    batches = [(torch.randn(4, 3, 8, 8).double(), torch.randint(0, 3, (4,))) for _ in range(3)]
    axes = model_axes(model)
    read = ProductRows(model, axes, classification, None if rows == "batch" else 1)
    found = [read(batch, number) for number, batch in enumerate(batches)][-1]
    assert read.proof.by_weights == ({"1"} if kind is NormByHand else set()) and read.proof.folds == {"2": "3"}
    slow = Proof(proven=set(read.layers), by_weights=set(read.layers), folds={})
    exact = ProductRows(model, axes, classification, read.per_row, slow)(batches[-1], 0)
    for axis in axes:
        torch.testing.assert_close(found[axis], exact[axis], rtol=1e-10, atol=1e-13)
