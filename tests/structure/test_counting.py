"""What operations multiply, against torch's own counter and formulas by hand; and that no label is lost."""

import pytest
import torch
import torchvision
from flops import counted_by_torch
from networks import NETWORKS, network
from structures import STRUCTURES, WHOLE
from torch import Tensor, nn
from torch.nn import functional as F

from obc_tools import find_groups
from obc_tools.structure.counting import count
from obc_tools.structure.coupling import Classes, LostChannelsError
from obc_tools.structure.tracing import trace_model


class Called(nn.Module):
    """A function of the inputs and of some layers or parameters of its own."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def convolution(kind: str, dims: int, **options) -> nn.Module:
    return getattr(nn, f"Conv{kind}{dims}d")(4, 8, 3, **options)


SEEN_BY_TORCH = {
    **{f"conv{d}d": (lambda d=d: convolution("", d, stride=2, padding=1), (2, 4, *[7] * d)) for d in (1, 2, 3)},
    **{f"transposed{d}d": (lambda d=d: convolution("Transpose", d, stride=2), (2, 4, *[5] * d)) for d in (1, 2, 3)},
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2), (2, 4, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 6, 6)),
    "depth multiplier": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 6, 6)),
    "transposed grouped": (lambda: nn.ConvTranspose2d(4, 8, 3, groups=2), (2, 4, 6, 6)),
    "transposed depth multiplier": (lambda: nn.ConvTranspose2d(4, 8, 3, groups=4), (2, 4, 6, 6)),
    "without batch": (lambda: nn.Conv2d(4, 8, 3), (4, 6, 6)),
    "linear": (lambda: nn.Linear(4, 8), (2, 3, 4)),
    "einsum": (lambda: Called(lambda m, x: torch.einsum("bti,oi->bot", x, m.w), w=parameter(5, 4)), (2, 3, 4)),
    "tensordot": (lambda: Called(lambda m, x: torch.tensordot(x, m.w, ([2], [1])), w=parameter(5, 4)), (2, 3, 4)),
    "baddbmm": (lambda: Called(lambda m, x: torch.baddbmm(m.b, x, m.w), w=parameter(2, 4, 5), b=parameter(5)),
                (2, 3, 4)),
    "sdpa": (lambda: Called(lambda m, x: F.scaled_dot_product_attention(x, x[:, :, :5], x[:, :, :5])), (2, 3, 6, 4)),
    "multihead": (lambda: Called(lambda m, x: m.a(x, x[:, :3], x[:, :3])[0],
                                 a=nn.MultiheadAttention(8, 2, batch_first=True)), (2, 5, 8)),
    "multihead widths": (lambda: Called(lambda m, x: m.a(value=x[:, :, :4], key=x[:, :, :6], query=x)[0],
                                        a=nn.MultiheadAttention(8, 2, kdim=6, vdim=4, add_bias_kv=True,
                                                                add_zero_attn=True)), (5, 2, 8)),
    "lstm": (lambda: Called(lambda m, x: m.l(x)[0], l=nn.LSTM(6, 5, 2, bidirectional=True, batch_first=True)),
             (2, 4, 6)),
    "lstm projected": (lambda: Called(lambda m, x: m.l(x)[0], l=nn.LSTM(6, 5, proj_size=3)), (4, 2, 6)),
    "gru": (lambda: Called(lambda m, x: m.l(x)[0], l=nn.GRU(6, 5, 2, bidirectional=True)), (4, 2, 6)),
    "rnn": (lambda: Called(lambda m, x: m.l(x)[0], l=nn.RNN(6, 5, nonlinearity="relu")), (4, 2, 6)),
    "gru cell": (lambda: nn.GRUCell(6, 5), (2, 6)),
    "lstm cell": (lambda: Called(lambda m, x: m.l(x)[0], l=nn.LSTMCell(6, 5)), (2, 6)),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), (2, 5, 8)),
    "norms and look-ups": (lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.GELU(), nn.AvgPool2d(2), nn.Softmax(1)),
                           (2, 4, 6, 6)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["mkldnn", "without mkldnn"])
@pytest.mark.parametrize("name", SEEN_BY_TORCH)
def test_operations_cost_what_torch_counts(name, dtype):
    build, shape = SEEN_BY_TORCH[name]
    torch.manual_seed(0)
    model, inputs = build().to(dtype).eval(), torch.randn(shape, dtype=dtype)
    products = count(model, inputs).products
    assert sum(product.size for product in products) == counted_by_torch(model, inputs)
    assert products or name == "norms and look-ups"


BY_HAND = {
    "matrix and vector": (lambda: Called(lambda m, x: x @ m.w, w=parameter(4)), ((6, 4),), 6 * 4),
    "addmv": (lambda: Called(lambda m, x: torch.addmv(m.b, x, m.w), w=parameter(4), b=parameter(6)), ((6, 4),), 6 * 4),
    "dot": (lambda: Called(lambda m, x: x[0] @ m.w, w=parameter(4)), ((6, 4),), 4),
    "addbmm": (lambda: Called(lambda m, x: torch.addbmm(m.b, x, m.w), w=parameter(2, 4, 5), b=parameter(5)),
               ((2, 3, 4),), 2 * 3 * 4 * 5),
    # each output: x1ᵀ W, then times x2
    "bilinear": (lambda: nn.Bilinear(3, 4, 5), ((6, 3), (6, 4)), 6 * 5 * (3 * 4 + 4)),
    "deformable": (lambda: torchvision.ops.DeformConv2d(4, 6, 3, groups=2), ((2, 4, 7, 7), (2, 18, 5, 5)),
                   2 * 6 * 25 * 2 * 9),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_operations_that_torch_does_not_count_cost_what_they_do_by_hand(name):
    build, shapes, expected = BY_HAND[name]
    model, inputs = build().eval(), tuple(torch.randn(shape) for shape in shapes)
    ledger = count(model, inputs)
    assert sum(product.size for product in ledger.products) == expected and not ledger.unknown


def test_an_operation_without_formula_is_named_and_leaves_its_channels_whole():
    mix = Called(lambda m, x: torch.fft.rfft(x, dim=1).real)
    model, inputs = nn.Sequential(nn.Linear(4, 6), mix, nn.Linear(4, 3)), torch.randn(2, 4)
    named = {"_fft_r2c in layer '1'"}
    assert set(count(model, inputs).unknown) == named
    assert set(trace_model(model, inputs).ledger.unknown) == named
    groups = {str(group.root): group.kept_whole for group in find_groups(model, inputs)}
    assert groups["0.out"] == "passes through _fft_r2c in layer '1', where its channels cannot be followed"
    assert not count(nn.Sequential(Called(lambda m, x: torch.fft.rfft(x).real), nn.Linear(3, 2)), inputs).unknown


def test_what_does_not_depend_on_the_batch_runs_once():
    """A table of relative positions by a perceptron, tokens as many as the batch is long, and a linear layer."""

    def attend(m, x):
        tokens = m.tokens.expand(len(x), -1)
        return m.last(x + m.made(tokens)) + m.position(m.table).mean()

    parts = {"tokens": parameter(1, 4), "table": parameter(9, 2), "made": nn.Linear(4, 4), "last": nn.Linear(4, 5)}
    model = Called(attend, position=nn.Linear(2, 3), **parts)
    sizes = {
        product.layer: (product.size, product.batched)
        for ledger in (count(model, torch.randn(3, 4)), trace_model(model, torch.randn(3, 4)).ledger)
        for product in ledger.products
    }
    assert sizes == {"made": (48, True), "last": (60, True), "position": (54, False)}


@pytest.mark.parametrize("name", [*NETWORKS, *STRUCTURES, *WHOLE])
def test_no_label_is_lost(name):
    model, inputs = network(name) if name in NETWORKS else (STRUCTURES | WHOLE)[name].make()
    Classes(trace_model(model, inputs).flow, strict=True)


def test_a_lost_label_is_an_error_of_the_trace(monkeypatch):
    """As it was with the tokens of learned queries before they were frozen."""
    model = Called(
        lambda m, x: m.last(F.scaled_dot_product_attention(m.tokens[:, None], x[:, None], x[:, None])),
        tokens=parameter(2, 7, 4), last=nn.Linear(4, 3),
    )  # fmt: skip
    tokens = torch.randn(2, 5, 4)
    Classes(trace_model(model, tokens).flow, strict=True)
    monkeypatch.setattr("obc_tools.structure.operations.keep_tokens", lambda *args: None)
    flow = trace_model(model, tokens).flow
    with pytest.raises(
        LostChannelsError, match=r"_scaled_dot_product_flash_attention_for_cpu in layer '': .* are lost"
    ):
        Classes(flow, strict=True)
    assert any("is lost in" in reason for reason in Classes(flow).reasons.values())


def prunable(model: nn.Module, inputs: Tensor) -> set[str]:
    return {str(member.axis) for group in find_groups(model, inputs) if group.prunable for member in group.members}


@pytest.mark.parametrize("fused", [True, False])
def test_learned_tokens_are_no_channels(fused):
    def pool(m, x):
        query = m.query(m.tokens.expand(len(x), -1, -1))
        return m.attend(query, x, x)[0] if fused else m.last(F.scaled_dot_product_attention(query, x, x))

    model = Called(pool, tokens=parameter(1, 7, 8), query=nn.Linear(8, 8), last=nn.Linear(8, 3),
                   attend=nn.MultiheadAttention(8, 2, batch_first=True))  # fmt: skip
    assert "tokens.dim1" not in prunable(model, torch.randn(1, 5, 8))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("function", [F.conv2d, F.conv_transpose2d])
def test_bare_kernels_keep_their_height_and_width(function, groups):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        Called(lambda m, x: function(x, m.kernel, m.bias, groups=groups), kernel=parameter(8, 8 // groups, 3, 3),
               bias=parameter(8)),
        nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    found = {axis for axis in prunable(model, torch.randn(2, 3, 6, 6)) if axis.startswith("1.kernel")}
    assert found == ({"1.kernel.dim0", "1.kernel.dim1"} if groups == 1 else set())
