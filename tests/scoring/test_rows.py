import copy
import itertools
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad
from torch.nn import functional as F

from obc_tools.scoring import rows as module
from obc_tools.scoring.jacobian import jacobian_products, model_axes
from obc_tools.scoring.jtj import dense_jtj
from obc_tools.scoring.objectives import classification
from obc_tools.scoring.rows import GradientRows, ProductRows, Proof, _eagerly, stream_gradients
from obc_tools.scoring.scores import sum_square_gradients
from obc_tools.structure.layers import get_layer, own_parameters


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.embed = nn.Linear(3, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.embed(x.flatten(2).transpose(1, 2)) + self.token
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Reuse(nn.Module):
    """One convolution used twice, an in-place activation, and a linear weight also used outside its module."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.norm = nn.BatchNorm2d(4)
        self.tied = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.act(self.stem(x))
        x = self.act(self.norm(self.conv(x)))
        x = self.act(self.conv(x)).mean((2, 3))
        return self.head(self.tied(x) + F.linear(x, self.tied.weight.T))


class BatchCentred(nn.Module):
    """Examples see each other: each is centred by the batch's mean."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.first(x.mean((2, 3))).tanh()
        return self.head(x - x.mean(0))


def losses_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def make(kind, seed=0):
    torch.manual_seed(seed)
    model = kind().double()
    batches = [(torch.randn(4, 3, 4, 4).double(), torch.randint(0, 3, (4,))) for _ in range(2)]
    return model, batches


def pieces_of(model, batches, layers, **options):
    """Return what a consumer is handed, piece by piece: (layer, tensor) -> (rows, *shape)."""
    pieces = []

    def consume(layer, gradients):
        pieces.append({(layer, key): rows.clone() for key, rows in gradients.items()})

    for _ in stream_gradients(model, batches, layers, consume, **options):
        pass
    return pieces


def joined(pieces):
    keys = dict.fromkeys(key for piece in pieces for key in piece)
    return {key: torch.cat([piece[key] for piece in pieces if key in piece]) for key in keys}


def oracle(model, batches, layer, rows):
    """One gradient of one loss at a time, through the whole model."""
    model.eval()
    size = {"batch": 4, "sample": 1}.get(rows, rows)
    prefix = layer if isinstance(get_layer(model, layer), nn.Parameter) else f"{layer}."
    parameters = {name: p.detach() for name, p in model.named_parameters() if name.startswith(prefix)}
    found = []
    for images, labels in batches:
        for start in range(0, 4, size):

            def loss(given, images=images, labels=labels, start=start):
                each = F.cross_entropy(functional_call(model, given, (images,)), labels, reduction="none")
                return each[start : start + size].mean()

            found.append(grad(loss)(parameters))
    own = own_parameters(get_layer(model, layer))
    return {key: torch.stack([one[f"{layer}.{key}" if key else layer] for one in found]) for key in own}


LAYERS = [
    (Attention, "embed"),
    (Attention, "token"),
    (Attention, "attention"),
    (Attention, "attention.out_proj"),
    (Reuse, "stem"),
    (Reuse, "conv"),
    (Reuse, "norm"),
    (Reuse, "tied"),
    (Reuse, "head"),
    (BatchCentred, "first"),
]


@pytest.mark.parametrize("rows", ["batch", "sample", 2])
@pytest.mark.parametrize(("kind", "layer"), LAYERS, ids=[f"{kind.__name__}-{layer}" for kind, layer in LAYERS])
def test_equals_one_gradient_at_a_time(kind, layer, rows):
    model, batches = make(kind)
    pieces = pieces_of(model, batches, [layer], rows=rows)
    for key, expected in oracle(model, batches, layer, rows).items():
        found = joined(pieces)[layer, key]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_several_layers_at_once_and_in_small_pieces(monkeypatch):
    model, batches = make(Reuse)
    whole = pieces_of(model, batches, ["conv", "norm"], rows="sample")
    monkeypatch.setattr("obc_tools.scoring.capture.BYTES_AT_A_TIME", 1)
    pieces = pieces_of(model, batches, ["conv", "norm"], rows="sample")
    assert (len(whole), len(pieces)) == (2 * 2, 2 * 8)
    for key, rows in joined(whole).items():
        torch.testing.assert_close(joined(pieces)[key], rows)


def test_goes_row_by_row_only_where_examples_see_each_other(monkeypatch):
    def count(kind, layer):
        model, batches = make(kind)
        passes = []
        real = GradientRows._weight_gradients

        def counted(*args):
            for gradients in real(*args):
                passes.append(1)
                yield gradients

        monkeypatch.setattr(GradientRows, "_weight_gradients", counted)
        pieces_of(model, batches, [layer], rows="sample")
        monkeypatch.undo()
        return len(passes)

    assert count(Reuse, "conv") == count(Attention, "token") == 0
    assert count(BatchCentred, "first") == 2 * 4


def test_works_on_compiled_models_and_sparse_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(12, 3)).double()
    batches = [(torch.randint(0, 7, (4, 3)), torch.randint(0, 3, (4,)))]
    dense = copy.deepcopy(model)
    dense[0].sparse = False
    compiled = torch.compile(model, backend="eager")
    for rows in ("batch", "sample"):
        found = joined(pieces_of(compiled, batches, ["0"], rows=rows))
        torch.testing.assert_close(found, joined(pieces_of(dense, batches, ["0"], rows=rows)))


@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_given_back_as_it_was(rows, fails):
    model, batches = make(Reuse)
    model.train()
    model.norm.eval()
    model.stem.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def objective(model, batch):
        losses = losses_of(model, batch)
        return losses * float("nan") if fails else losses

    try:
        pieces_of(model, batches, ["conv"], rows=rows, objective=objective)
        assert not fails
    except ValueError as error:
        assert fails and "batch 1: the loss is nan" in str(error)
    assert [module.training for module in model.children()] == [True, True, True, False, True, True]
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["stem.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("rows", [0, -1, True, 1.5, "image"])
def test_refuses_unknown_rows(rows):
    model, batches = make(BatchCentred)
    with pytest.raises(ValueError, match="expected 'batch', 'sample' or how many"):
        pieces_of(model, batches, ["first"], rows=rows)


def test_refuses_what_it_cannot_compute():
    model, batches = make(Reuse)
    model.extra = nn.Linear(2, 2).double()
    with pytest.raises(ValueError, match="batch 1: rows=3 does not divide its 4 examples"):
        pieces_of(model, batches, ["conv"], rows=3)
    with pytest.raises(ValueError, match="returned one scalar, which allows only rows='batch'"):
        pieces_of(model, batches, ["conv"], rows=1, objective=lambda m, b: losses_of(m, b).mean())
    with pytest.raises(ValueError, match="unknown layer 'cnov'; closest: conv"):
        pieces_of(model, batches, ["cnov"])
    with pytest.raises(ValueError, match="the batches yield no data"):
        pieces_of(model, iter([]), ["conv"])
    for rows in ("batch", "sample"):
        with pytest.raises(ValueError, match=r"does not depend on the model's parameters|layer 'extra' never ran"):
            pieces_of(model, batches, ["extra"], rows=rows)


# What a proof must find out


class Running(nn.Module):
    """Example n sees examples 0..n, or with ``flip`` n.. on, behind a norm if there is one."""

    def __init__(self, flip=False, norm=None):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(3, 4), norm or nn.Identity(), nn.Linear(4, 3)
        self.flip = flip

    def forward(self, x):
        # (examples, positions, channels); J·w of what a layer without bias gives a norm over positions is 0.
        x = self.first(x.flatten(2).mT)
        x = self.norm(x.mT).mT.tanh().sum(1)
        x = x.flip(0).cumsum(0).flip(0) if self.flip else x.cumsum(0)
        return self.head(x / len(x))


class Behind(nn.Module):
    """A layer's weight also used behind the module's back, by a small share."""

    def __init__(self, share):
        super().__init__()
        self.first, self.head, self.share = nn.Linear(3, 4), nn.Linear(4, 3), share

    def forward(self, x):
        x = x.mean((2, 3))
        return self.head(torch.tanh(self.first(x) + self.share * F.linear(x, self.first.weight)))


SHARED = {
    "running": Running,
    "from the end": partial(Running, flip=True),
    "normalised": partial(Running, norm=nn.InstanceNorm1d(4)),
    "half a percent": partial(Behind, 5e-3),
    "one in a million": partial(Behind, 1e-6),
}


@pytest.mark.parametrize("rows", ["sample", 2])
@pytest.mark.parametrize("name", SHARED)
def test_what_examples_share_is_found_out_by_all_that_reads_rows(name, rows, caplog):
    model, batches = make(SHARED[name])
    expected = oracle(model, batches, "first", rows)
    weights = {key: p.detach() for key, p in own_parameters(model.first).items()}
    jacobian = torch.cat([expected["weight"], expected["bias"][..., None]], 2)
    w = torch.cat([weights["weight"], weights["bias"][:, None]], 1)
    exact = {"rtol": 1e-10, "atol": 1e-20}
    dense = dense_jtj(model, batches, "first", rows=rows)
    torch.testing.assert_close(dense.values, torch.einsum("nci,ncj->cij", jacobian, jacobian), **exact)
    found = jacobian_products(model, batches, rows=rows, layers=["first"])["first", "out"]
    torch.testing.assert_close(found, torch.einsum("nci,ci->nc", jacobian, w), rtol=1e-10, atol=1e-16)
    if rows == "sample":
        squares = sum_square_gradients(model, batches, ["first"])["first"]
        for key, gradient in expected.items():
            torch.testing.assert_close(squares[key], gradient.square().sum(0), **exact)
    assert any("exact but slow, for: first" in record.message for record in caplog.records)


@pytest.mark.parametrize("share", [1e-2, 1e-3, 1e-5])
def test_a_use_behind_the_back_is_seen_at_any_precision(share, caplog):
    model, batches = make(partial(Behind, share))
    jacobian_products(model.float(), [(images.float(), labels) for images, labels in batches], rows="sample")
    assert [record.message for record in caplog.records] == ["one backward pass a row, exact but slow, for: first"]


class Lists(nn.Module):
    """Uses a layer twice, the second time for a list that is longer than all examples once ``long`` is set."""

    def __init__(self):
        super().__init__()
        self.first, self.head, self.long = nn.Linear(3, 4), nn.Linear(4, 3), False

    def forward(self, x):
        x = x.flatten(2).mT[:, :3]
        parts = torch.tanh(self.first(x.flatten(0, 1)))
        listed = self.first(torch.cat([x.flatten(0, 1), x[0, :1]]) if self.long else x.flatten(0, 1))
        return self.head(parts.unflatten(0, x.shape[:2]).sum(1) + listed[: len(parts)].unflatten(0, x.shape[:2]).sum(1))


def test_a_use_that_is_no_longer_led_by_examples_is_an_error():
    model, batches = make(Lists)

    def lengthened():
        model.long = False
        yield batches[0]
        model.long = True
        yield batches[1]

    with pytest.raises(ValueError, match="layer 'first': the leading axis of its activations is not a multiple of 4"):
        jacobian_products(model, lengthened(), rows="sample", layers=["first"])
    with pytest.raises(ValueError, match="layer 'first': the leading axis of its activations is not a multiple of 4"):
        pieces_of(model, lengthened(), ["first"], rows="sample")


def test_scorings_that_overlap_leave_the_compiler_as_it_was():
    """One begins, another begins, the first ends, the second ends: as threads may."""
    torch.compile(nn.Linear(3, 2), backend="eager")
    before = torch._dynamo.eval_frame._stance
    first, second = _eagerly(), _eagerly()
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    second.__exit__(None, None, None)
    assert torch._dynamo.eval_frame._stance == before


class Images(nn.Module):
    """Convolutions of all kinds with norms that fold and one that does not; keeps how each kernel lay when it ran."""

    def __init__(self, views: bool = False):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.other = nn.GroupNorm(2, 8)
        self.last, self.head, self.views = nn.Conv2d(8, 6, 3), nn.Linear(6 * 16, 3), views
        self.laid = []

    def forward(self, x):
        self.laid.append(self.last.weight.is_contiguous(memory_format=torch.channels_last))
        x = self.norm(self.first(x)).relu()
        x = self.last(self.other(self.depthwise(x)).relu())
        return self.head(x.view(len(x), -1) if self.views else x.flatten(1))


def read_in_turn(monkeypatch, model, seconds, per_row=None, count=5, long=0.0):
    """Return the products of some batches, for which it is said how long the third took in either order."""
    told = iter(seconds)
    monkeypatch.setattr(module, "LONG", long)
    monkeypatch.setattr(module, "_seconds_since", lambda start, found: next(told))
    read = ProductRows(model.double().eval(), model_axes(model), classification, per_row)
    torch.manual_seed(1)
    batches = [(torch.randn(4, 3, 8, 8).double(), torch.randint(0, 3, (4,))) for _ in range(count)]
    return [read(batch, number) for number, batch in enumerate(batches)], read, batches


@pytest.mark.parametrize("per_row", [None, 1])
@pytest.mark.parametrize("faster", [True, False])
def test_channels_lie_last_where_a_long_batch_is_faster_so(monkeypatch, faster, per_row):
    torch.manual_seed(0)
    model = Images()
    found, read, batches = read_in_turn(monkeypatch, model, [2.0, 1.0 if faster else 3.0], per_row)
    assert read.proof.channels_last is faster and read.proof.folds == {"first": "norm"}
    assert model.laid == [False, False, False, False, True, faster, faster]  # proof, norms unfolded and folded, both
    assert model.last.weight.is_contiguous() and not model.last.weight.is_contiguous(memory_format=torch.channels_last)
    rows = "batch" if per_row is None else "sample"
    for batch, products in zip(batches, found, strict=True):
        for axis, expected in jacobian_products(model, [batch], rows=rows).items():
            torch.testing.assert_close(products[axis], expected, rtol=1e-10, atol=1e-12)


def test_the_order_of_channels_is_left_where_it_cannot_change_or_nobody_is_to_choose(monkeypatch):
    torch.manual_seed(0)
    viewing = Images(views=True)
    _, read, _ = read_in_turn(monkeypatch, viewing, [2.0, 1.0])
    assert read.proof.channels_last is False and viewing.laid.count(True) == 1
    short = Images()
    _, read, _ = read_in_turn(monkeypatch, short, [2.0], long=3.0)
    assert read.proof.channels_last is False and not any(short.laid)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    same = Images()
    _, read, _ = read_in_turn(monkeypatch, same, [2.0])
    assert read.proof.channels_last is False and not any(same.laid)


class Shared(nn.Module):
    """A kernel used by two layers, and once more by itself: its products come from its gradient."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.second.weight = self.first.weight
        self.other, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 3)

    def forward(self, x):
        x = self.second(self.first(x).tanh()).tanh() + F.conv2d(x, self.first.weight, padding=1)
        return self.head(self.other(x).tanh().mean((2, 3)))


def test_kernels_whose_gradients_are_asked_for_stay_where_they_are():
    torch.manual_seed(0)
    model = Shared().double()
    batches = [(torch.randn(4, 3, 8, 8).double(), torch.randint(0, 3, (4,))) for _ in range(3)]
    for layers in (["first"], ["first", "other"]):
        read = ProductRows(model, model_axes(model, layers), classification, None)
        assert read(batches[0], 0).keys() == read(batches[1], 1).keys() and read.proof.by_weights == {"first"}
        read.proof.channels_last = True
        found = read(batches[2], 2)
        for axis, expected in jacobian_products(model, batches[2:], layers=layers).items():
            torch.testing.assert_close(found[axis], expected, rtol=1e-10, atol=1e-14)


def test_norms_that_fold_wrongly_are_scored_unfolded(monkeypatch):
    torch.manual_seed(0)
    model, right = Images(), module.folded

    def wrong(layer, norm):
        tensors = right(layer, norm)
        return tensors | {"weight": tensors["weight"] * 1.5}

    monkeypatch.setattr(module, "folded", wrong)
    found, read, batches = read_in_turn(monkeypatch, model, [1.0, 2.0])
    assert read.proof.folds == {}
    for axis, expected in jacobian_products(model, batches[4:]).items():
        torch.testing.assert_close(found[4][axis], expected, rtol=1e-10, atol=1e-12)


class Routed(nn.Module):
    """Examples whose first number is positive take another linear layer, called as a module or not."""

    def __init__(self, functional):
        super().__init__()
        self.one, self.other, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 3)
        self.functional = functional

    def forward(self, x):
        x = x.mean((2, 3))
        chosen = x[:, 0] > 0
        if not chosen.any():
            return self.head(self.one(x).relu())
        other = F.linear(x, self.other.weight, self.other.bias) if self.functional else self.other(x)
        return self.head(torch.where(chosen[:, None], other, self.one(x)).relu())


class AlsoFunctional(nn.Module):
    """Examples whose first number is positive use a layer's weight once more, which no module calls."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        x = x.mean((2, 3))
        hidden, chosen = self.body(x).relu(), x[:, 0] > 0
        if chosen.any():
            hidden = torch.where(chosen[:, None], F.linear(hidden, self.body.weight, self.body.bias).relu(), hidden)
        return self.head(hidden)


class BesideTheNorm(nn.Module):
    """Examples whose first number is positive use what a norm takes too, so that it cannot be folded."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        chosen, before = x.mean((1, 2, 3)) > 0, self.body(x)
        hidden = self.norm(before).relu()
        if chosen.any():
            hidden = hidden + before * chosen[:, None, None, None]
        return self.head(hidden.mean((2, 3)))


class ByParts(nn.Module):
    """At most ten examples a time."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(3, 4), nn.ReLU()), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.cat([self.body(part) for part in x.mean((2, 3)).split(10)]))


def of_whole_batches(model, batch):
    if len(batch[0]) != 24:
        raise ValueError("24 examples, please")
    return classification(model, batch)


def contrastive(model, batch):
    return F.cross_entropy(model(batch[0]) @ model(batch[0]).T, torch.arange(len(batch[0])), reduction="none")


def of_pairs(model, batch):
    return classification(model, batch).view(-1, 2).mean(1)


def within_labels(model, batch):
    outputs = model(batch[0])
    centres = torch.stack([outputs[batch[1] == label].mean(0) for label in batch[1]])
    return (outputs - centres).square().sum(1) + classification(model, batch)


LATER = {
    "a weight used once more": (AlsoFunctional, classification),
    "a norm's input used too": (BesideTheNorm, classification),
    "a loss of pairs": (ByParts, of_pairs),
    "a loss within labels": (ByParts, within_labels),
    "a layer that later examples reach": (lambda: Routed(False), classification),
    "a weight that later examples reach": (lambda: Routed(True), classification),
    "a network that takes parts": (ByParts, classification),
    "an objective of whole batches": (lambda: Routed(False), of_whole_batches),
    "examples that see each other": (ByParts, contrastive),
}


@pytest.mark.parametrize("per_row", [None, 1, 12])
@pytest.mark.parametrize("case", LATER)
def test_what_is_proven_holds_for_the_examples_at_a_batch_s_end(case, per_row):
    torch.manual_seed(0)
    make_model, objective = LATER[case]
    model, images = make_model().double().eval(), torch.randn(24, 3, 2, 2, dtype=torch.float64)
    images[:, 0] = -images[:, 0].abs()
    images[20:, 0] *= -1
    labels = torch.cat((torch.arange(3), torch.randint(0, 3, (21,))))
    batch, axes = (images, labels), model_axes(model)
    read = ProductRows(model, axes, objective, per_row, set_aside=True)
    products = [read(batch, number) for number in range(3)]  # the layers, the norms, what was found of them
    layers = {axis.layer for axis in axes}
    slow = Proof(proven=set(layers), by_weights=set(layers), folds={})
    exact = ProductRows(model, axes, objective, per_row, slow, True)(batch, 0)
    for found, axis in itertools.product(products, axes):
        torch.testing.assert_close(found[axis], exact[axis], msg=str(axis))
