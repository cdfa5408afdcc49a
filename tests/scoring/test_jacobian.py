"""The public functions: goldens, bad input, what is given back, precision, compiled models, several processes."""

import gc
import weakref

import numpy as np
import pytest
import torch
from cases import SCALAR, case
from golden import DATA, PUBLISHED, RESNET56, assert_golden, golden_batches
from networks import mlp_layernorm, small_vgg
from oracles import interrupted, state_of
from torch import nn
from torch.nn import functional as F

from obc_tools.models.networks import load_model
from obc_tools.scoring.jacobian import jacobian_products, model_axes, stream_products
from obc_tools.scoring.objectives import classification

ROWS = {"layer": "batch", "sample": "sample"}


@pytest.mark.parametrize("prefix", ROWS)
@pytest.mark.parametrize("network", [small_vgg, mlp_layernorm], ids=lambda network: network.__name__)
def test_scores_of_the_published_code(network, prefix):
    golden = np.load(DATA / f"{network.__name__}.npz")
    model = network()
    state = {
        key.removeprefix("state/"): torch.from_numpy(golden[key]) for key in golden.files if key.startswith("state/")
    }
    model.load_state_dict(state)
    batches = golden_batches(golden, torch.from_numpy(golden["images"]))
    assert_golden(golden, prefix, jacobian_products(model, batches, rows=ROWS[prefix]).scores(), 1e-5)


@pytest.mark.parametrize("prefix", ROWS if RESNET56.exists() and PUBLISHED.exists() else [])
@pytest.mark.slow
def test_scores_of_the_published_resnet56(prefix):
    golden = np.load(RESNET56)
    model = load_model("resnet56", weights=str(PUBLISHED)).double()
    images = torch.from_numpy(golden["images_uint8"]).double().div(255)
    images = images.sub(torch.from_numpy(golden["mean"])).div(torch.from_numpy(golden["std"])).permute(0, 3, 1, 2)
    batches = golden_batches(golden, images.contiguous())
    assert_golden(golden, prefix, jacobian_products(model, batches, rows=ROWS[prefix]).scores(), 1e-7)


@pytest.mark.parametrize("rows", ["batch", "sample", 3])
@pytest.mark.parametrize("name", ["residual", "attention", "contrastive"])
def test_rows_of_several_batches_follow_one_another(name, rows):
    chosen = case(name)
    model, batches = chosen.model(), [chosen.data(seed) for seed in range(3)]
    options = {"rows": rows, "layers": chosen.layers, "objective": chosen.objective}
    together = jacobian_products(model, batches, **options)
    for axis, product in together.items():
        apart = torch.cat([jacobian_products(model, [batch], **options)[axis] for batch in batches])
        torch.testing.assert_close(product, apart, rtol=1e-10, atol=1e-12)


def test_batches_of_several_sizes_each_have_their_rows():
    chosen = case("residual")
    images, labels = chosen.data()
    parts = [(images[a:b], labels[a:b]) for a, b in ((0, 1), (1, 2), (2, 5), (5, 6), (0, 6))]
    together = jacobian_products(chosen.model(), parts, rows="sample")
    whole = jacobian_products(chosen.model(), [(images, labels)], rows="sample")
    for axis, product in together.items():
        torch.testing.assert_close(product, torch.cat([whole[axis], whole[axis]]), rtol=1e-10, atol=1e-12)


# What is wrong with the input


def not_finite(model, batch):
    losses = classification(model, batch)
    return torch.where(batch[0].flatten(1).sum(1) == 0, torch.nan, losses)


BAD_OBJECTIVES = {
    r"batch 1: the objective returned \(6, 3\) torch.float64; expected a scalar or one loss": lambda m, b: m(b[0]),
    r"batch 1: the objective returned float; expected": lambda m, b: classification(m, b).mean().item(),
    r"batch 1: the objective returned \(6,\) torch.int64; expected": lambda m, b: m(b[0]).argmax(1),
    r"batch 1: the loss does not depend on": lambda m, b: classification(m, b).detach(),
}


@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize("message", BAD_OBJECTIVES)
def test_bad_losses(message, rows):
    chosen = case("linear")
    with pytest.raises(ValueError, match=message):
        jacobian_products(chosen.model(), [chosen.data()], rows=rows, objective=BAD_OBJECTIVES[message])


@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_a_loss_that_is_not_finite_names_its_batch(rows):
    chosen = case("linear")
    images, labels = chosen.data()
    with pytest.raises(ValueError, match="batch 2: the loss is nan"):
        jacobian_products(chosen.model(), [(images, labels), (images * 0, labels)], rows=rows, objective=not_finite)


def test_finer_rows_need_one_loss_an_example():
    assert len(jacobian_products(SCALAR.model(), [SCALAR.data()], objective=SCALAR.objective)["head", "out"]) == 1
    with pytest.raises(ValueError, match="one scalar, which allows only rows='batch'"):
        jacobian_products(SCALAR.model(), [SCALAR.data()], rows="sample", objective=SCALAR.objective)


@pytest.mark.parametrize("rows", [0, -1, True, 2.0, "image"])
def test_rows_that_mean_nothing(rows):
    with pytest.raises(ValueError, match="rows=.*expected 'batch', 'sample' or how many"):
        jacobian_products(case("linear").model(), [case("linear").data()], rows=rows)


@pytest.mark.parametrize("rows", [4, 7])
def test_rows_that_do_not_divide_the_batch(rows):
    with pytest.raises(ValueError, match=f"batch 1: rows={rows} does not divide its 6 examples"):
        jacobian_products(case("linear").model(), [case("linear").data()], rows=rows)


@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_a_layer_that_never_ran(rows):
    model = case("linear").model()
    model.forward = lambda inputs: model[2](torch.relu(inputs.repeat(1, 2)[:, :5]))
    with pytest.raises(ValueError, match="layer '0' never ran"):
        jacobian_products(model, [case("linear").data()], rows=rows)


def test_a_layer_that_stops_running():
    class Routed(nn.Sequential):
        def forward(self, inputs):
            return super().forward(inputs) if inputs.sum() else self[2](inputs.repeat(1, 2)[:, :5])

    model = Routed(*case("linear").model())
    images, labels = case("linear").data()
    with pytest.raises(ValueError, match="layer '0' never ran"):
        jacobian_products(model, [(images, labels), (images * 0, labels)], rows="sample")


def test_activations_that_change_in_place_only_later():
    class Moody(nn.Sequential):
        def forward(self, inputs):
            return self[2](F.silu(self[0](inputs), inplace=not inputs.sum()))

    model = Moody(*case("linear").model())
    images, labels = case("linear").data()
    with pytest.raises(
        RuntimeError, match="layer '0': unlike in the first batch, its activations were changed in place"
    ):
        jacobian_products(model, [(images, labels), (images * 0, labels)], rows="sample", layers=["0"])


@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_a_batch_of_another_shape_keeps_the_message_of_torch(rows):
    batch = (torch.randn(2, 9).double(), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"batch 1: .* \(2, 9\) float64, \(2,\) int64: .*shapes cannot be multiplied"):
        jacobian_products(case("linear").model(), [batch], rows=rows)


def test_unknown_layers_and_axes_say_the_closest():
    chosen = case("residual")
    with pytest.raises(ValueError, match=r"unknown layer 'conv3'; closest: conv"):
        jacobian_products(chosen.model(), [chosen.data()], layers=["conv3"])
    found = jacobian_products(chosen.model(), [chosen.data()], layers=["conv1"])
    with pytest.raises(ValueError, match=r"unknown layer axis 'conv1.oud'; closest: conv1.out"):
        found["conv1", "oud"]


def test_a_label_beyond_the_outputs():
    images, labels = case("linear").data()
    with pytest.raises(ValueError, match="label 4 for a model with 3 outputs"):
        jacobian_products(case("linear").model(), [(images, labels * 0 + 4)])


@pytest.mark.parametrize("rows", ["batch", "sample"])
def test_no_batches(rows):
    with pytest.raises(ValueError, match="the batches yield no data"):
        jacobian_products(case("linear").model(), [], rows=rows)


def test_more_rows_than_memory_allows():
    with pytest.raises(ValueError, match="need more than max_bytes=100"):
        jacobian_products(case("linear").model(), [case("linear").data()], rows="sample", max_bytes=100)


def in_train_mode(objective):
    def train(model, batch):
        model.train()
        return objective(model, batch)

    return train


@pytest.mark.parametrize(
    "change", [lambda objective: objective, interrupted, in_train_mode], ids=["", "error", "train"]
)
@pytest.mark.parametrize("rows", ["batch", "sample", 3])
@pytest.mark.parametrize("name", ["residual", "attention", "contrastive", "instance_norm_running"])
def test_the_model_is_given_back_as_it_was(name, rows, change):
    chosen = case(name)
    model = chosen.model()
    next(model.children()).train()
    next(model.parameters()).requires_grad_(False)
    stream = stream_products(
        model, [chosen.data()] * 2, model_axes(model, chosen.layers), rows=rows, objective=change(chosen.objective)
    )
    before = state_of(model)
    if change is interrupted:
        with pytest.raises(KeyError, match="stop"):
            next(stream)
    else:
        next(stream)
    assert state_of(model) == before


class Watched:
    """Something that lives as long as what holds it."""


def test_the_graph_is_freed_without_a_garbage_collector():
    chosen = case("residual")
    model, watched = chosen.model(), []

    def watch(module, args, output):
        output.grad_fn.metadata["watched"] = part = Watched()
        watched.append(weakref.ref(part))

    model.bn1.register_forward_hook(watch)
    gc.disable()
    try:
        jacobian_products(model, [chosen.data()] * 2, rows="sample")
        # The second batch runs twice, which shows whether norms can be folded.
        assert [reference() for reference in watched] == [None] * 3
    finally:
        gc.enable()


# Precision, layout, compilation


def autocast(dtype):
    def objective(model, batch):
        with torch.autocast("cpu", dtype):
            return classification(model, batch)

    return objective


def close(found, expected, tolerance: float):
    for axis, product in expected.items():
        assert found[axis].dtype == torch.float32
        difference = (found[axis].double() - product.double()).norm() / product.double().norm()
        assert difference < tolerance, (axis, difference)


HALF_CASES = [case(name) for name in ("residual", "grouped", "tokens", "attention")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", ["batch", "sample", 2])
@pytest.mark.parametrize("chosen", HALF_CASES, ids=lambda case: case.name)
def test_half_precision_is_summed_in_float32(chosen, rows, dtype, caplog):
    images, labels = chosen.data()
    batch = (images.float(), labels)
    options = {"rows": rows, "layers": chosen.layers}
    exact = jacobian_products(chosen.model().float(), [batch], **options)
    close(jacobian_products(chosen.model().float(), [batch], objective=autocast(dtype), **options), exact, 0.15)
    half = jacobian_products(chosen.model().to(dtype), [(images.to(dtype), labels)], **options)
    close(half, exact, 0.15)
    assert not caplog.records


@pytest.mark.parametrize("rows", ["batch", "sample", 3])
def test_channels_last(rows):
    chosen = case("residual")
    images, labels = chosen.data()
    plain = jacobian_products(chosen.model(), [(images, labels)], rows=rows)
    model = chosen.model().to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
    for axis, product in jacobian_products(model, [(images, labels)], rows=rows).items():
        torch.testing.assert_close(product, plain[axis], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows", ["batch", "sample", 3])
@pytest.mark.parametrize("whole", [True, False], ids=["model", "block"])
def test_compiled_models(whole, rows):
    chosen = case("batch_norm2d")
    plain = jacobian_products(chosen.model(), [chosen.data()] * 2, rows=rows)
    model = chosen.model()
    if whole:
        model = torch.compile(model, backend="eager")
    else:
        model.body.compile(backend="eager")
    found = jacobian_products(model, [chosen.data()] * 2, rows=rows)
    assert list(found) == list(plain)
    for axis, product in found.items():
        torch.testing.assert_close(product, plain[axis], rtol=1e-10, atol=1e-12)


# Several processes
