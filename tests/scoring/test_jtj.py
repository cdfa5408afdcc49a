import pytest
import torch
from torch import nn
from torch.func import functional_call, grad
from torch.nn import functional as F

from obc_tools.plots.jtj import pool_cells
from obc_tools.scoring.jacobian import jacobian_products
from obc_tools.scoring.jtj import DenseJTJ, dense_jtj, effective_rank, group_jtj
from obc_tools.scoring.scores import score_groups
from obc_tools.structure.groups import find_groups

EXACT = {"rtol": 1e-10, "atol": 1e-14}


class Net(nn.Module):
    """One of most layer types on a small image, then a flattened linear layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.grouped = nn.Conv2d(4, 6, 1, groups=2)
        self.transposed = nn.ConvTranspose2d(6, 4, 2, groups=2)
        self.scale = nn.Parameter(torch.randn(4, 1, 1))
        self.hidden = nn.Linear(4 * 25, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = self.norm(self.conv(x)).tanh()
        x = self.grouped(self.depthwise(x).tanh()).tanh()
        x = self.transposed(x).tanh() * self.scale
        return self.head(self.hidden(x.flatten(1)).tanh())


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.embed(x.flatten(2).transpose(1, 2))
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


def make(kind=Net):
    torch.manual_seed(0)
    model = kind().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model, [(torch.randn(4, 3, 4, 4).double(), torch.randint(0, 3, (4,))) for _ in range(3)]


def flat(*parts):
    return torch.cat([part.reshape(*part.shape[:1], -1) for part in parts], dim=1)


# (model, layer, axis, channel): that channel's parameters, shape (rows, d), from tensors of shape (rows, *shape).
CASES = {
    (Net, "conv", "out", 2): lambda t: flat(t["weight"][:, 2], t["bias"][:, 2, None]),
    (Net, "conv", "in", 1): lambda t: flat(t["weight"][:, :, 1]),
    (Net, "norm", "out", 3): lambda t: flat(t["weight"][:, 3, None], t["bias"][:, 3, None]),
    (Net, "depthwise", "out", 1): lambda t: flat(t["weight"][:, 1], t["bias"][:, 1, None]),
    (Net, "grouped", "out", 4): lambda t: flat(t["weight"][:, 4], t["bias"][:, 4, None]),
    (Net, "grouped", "in", 3): lambda t: flat(t["weight"][:, 3:6, 1]),
    (Net, "transposed", "out", 3): lambda t: flat(t["weight"][:, 3:6, 1], t["bias"][:, 3, None]),
    (Net, "transposed", "in", 2): lambda t: flat(t["weight"][:, 2]),
    (Net, "scale", "out", 2): lambda t: flat(t[""][:, 2]),
    (Net, "hidden", "out", 4): lambda t: flat(t["weight"][:, 4], t["bias"][:, 4, None]),
    (Net, "hidden", "in", 7): lambda t: flat(t["weight"][:, :, 7]),
    (Attending, "attention", "in", 1): lambda t: flat(t["in_proj_weight"][:, :, 1]),
    (Attending, "attention", "out", 1): lambda t: flat(t["in_proj_weight"][:, 1::4], t["in_proj_bias"][:, 1::4]),
    (Attending, "attention.out_proj", "out", 3): lambda t: flat(t["weight"][:, 3], t["bias"][:, 3, None]),
    (Attending, "attention.out_proj", "in", 3): lambda t: flat(t["weight"][:, :, 3]),
}


def jacobians(model, batches, rows):
    """All rows of J of every parameter, by torch.func: name -> (rows, *shape); and the parameters, with one row."""
    model.eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    size = {"batch": 4, "sample": 1}.get(rows, rows)

    def loss(given, images, labels, start):
        each = F.cross_entropy(functional_call(model, given, (images,)), labels, reduction="none")
        return each[start : start + size].mean()

    found = [grad(loss)(parameters, *batch, start) for batch in batches for start in range(0, 4, size)]
    return {key: torch.stack([one[key] for one in found]) for key in parameters}, {
        k: p[None] for k, p in parameters.items()
    }


def of_layer(tensors, layer):
    return {name.removeprefix(layer).lstrip("."): t for name, t in tensors.items() if name.startswith(layer)}


@pytest.mark.parametrize("rows", ["batch", "sample", 2])
@pytest.mark.parametrize("case", CASES, ids=[f"{layer}-{axis}" for _, layer, axis, _ in CASES])
def test_equals_the_full_jacobian(case, rows):
    kind, layer, axis, channel = case
    model, batches = make(kind)
    dense = dense_jtj(model, batches, layer, [0, channel], rows=rows, axis=axis)
    jacobian, parameters = ({**of_layer(t, layer)} for t in jacobians(model, batches, rows))
    jacobian, weights = CASES[case](jacobian), CASES[case](parameters)[0]
    torch.testing.assert_close(dense.values[1], jacobian.T @ jacobian, **EXACT)
    torch.testing.assert_close(dense.weights[1], weights, **EXACT)
    torch.testing.assert_close(dense.score[1], (jacobian @ weights).square().sum(), **EXACT)
    diagonal = (jacobian * weights).square().sum()
    torch.testing.assert_close(dense.diagonal_score[1], diagonal, **EXACT)
    torch.testing.assert_close(dense.offdiagonal_share[1], 1 - diagonal / dense.score[1], **EXACT)
    singular = torch.linalg.svdvals(jacobian)
    torch.testing.assert_close(dense.eigenvalues[1][: len(singular)], singular.square(), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("rows", ["batch", "sample"])
@pytest.mark.parametrize("pool", [None, "kernel"])
def test_scores_are_those_of_the_products(rows, pool):
    model, batches = make()
    for axis, scores in jacobian_products(model, batches, rows=rows).scores().items():
        dense = dense_jtj(model, batches, axis.layer, axis=axis.axis, rows=rows, pool=pool)
        torch.testing.assert_close(dense.score, scores, **EXACT)


def test_scores_of_a_float32_model_agree_closely():
    model, batches = make()
    model, batches = model.float(), [(images.float(), labels) for images, labels in batches]
    dense = dense_jtj(model, batches, "conv")
    assert dense.values.dtype == torch.float32
    scores = jacobian_products(model, batches, layers=["conv"]).scores()["conv", "out"]
    torch.testing.assert_close(dense.score.float(), scores, rtol=1e-4, atol=0)


def test_labels_name_the_place_of_each_parameter():
    model, batches = make()
    assert dense_jtj(model, batches, "conv", 0).labels[:2] == ("weight[:, 0, 0, 0]", "weight[:, 0, 0, 1]")
    assert dense_jtj(model, batches, "conv", 0).labels[-1] == "bias[:]"
    assert dense_jtj(model, batches, "grouped", 0, axis="in").labels == tuple(f"weight[{o}, :, 0, 0]" for o in range(3))
    assert dense_jtj(model, batches, "scale", 0).labels == ("scale[:, 0, 0]",)
    attention = dense_jtj(*make(Attending), "attention", 0)
    assert attention.labels[4] == "in_proj_weight[1, :, 0]" and attention.labels[-1] == "in_proj_bias[2, :]"


def test_pooled_by_kernel_sums_weighted_blocks():
    model, batches = make()
    full, pooled = dense_jtj(model, batches, "conv"), dense_jtj(model, batches, "conv", pool="kernel")
    assert pooled.labels == ("weight[:, 0, *, *]", "weight[:, 1, *, *]", "weight[:, 2, *, *]", "bias[:]")
    weighted = full.values * full.weights[:, :, None] * full.weights[:, None]
    for a, b, block in ((0, 0, weighted[:, :9, :9]), (1, 2, weighted[:, 9:18, 18:27]), (3, 1, weighted[:, 27:, 9:18])):
        torch.testing.assert_close(pooled.values[:, a, b], block.sum((1, 2)), **EXACT)
    assert torch.equal(pooled.weights, torch.ones(4, 4).double())


def test_pooled_for_display_is_the_mean_of_absolute_cells():
    model, batches = make()
    dense = dense_jtj(model, batches, "conv", 1)
    cells = dense.pooled(14)
    assert cells.shape == (1, 14, 14)
    torch.testing.assert_close(cells[0, 3, 5], dense.values[0, 6:8, 10:12].abs().mean())
    assert torch.equal(dense.pooled(28), dense.values.abs())
    with pytest.raises(ValueError, match="size=29: a JᵀJ of 28 parameters has from 1 to 28 cells a side"):
        dense.pooled(29)


def test_cells_of_unequal_size_are_averaged():
    matrix = torch.arange(9.0).view(3, 3)
    expected = torch.tensor([[0.0, 1.5], [4.5, 6.0]])
    assert torch.equal(pool_cells(matrix, torch.tensor([0, 1, 1])), expected)


def test_effective_rank():
    spectra = torch.tensor([[1.0, 1, 1, 1], [3, 0, 0, 0], [0, 0, 0, 0], [0.5, 0.25, 0.25, 0]])
    torch.testing.assert_close(effective_rank(spectra), torch.tensor([4.0, 1.0, 0.0, 2**1.5]))


def test_shows_itself():
    dense = dense_jtj(*make(), "conv", [3, 1])
    assert repr(dense) == "DenseJTJ(conv.out, 2 channels, 28 x 28, rows='batch')"
    frame = dense.to_frame()
    assert frame["channel"].tolist() == [3, 1]
    assert frame["score"].tolist() == dense.score.tolist()
    assert "effective rank" in dense._repr_html_()
    assert "conv.out" in dense.plot().layout.title.text


def test_refuses_unknown_names_and_channels():
    model, batches = make()
    model.act = nn.ReLU()
    wrong = {
        "unknown layer 'convv'; closest: conv": {"layer": "convv"},
        "unknown axis of layer 'norm' 'in'; known: out": {"layer": "norm", "axis": "in"},
        "conv.out: no channel 4; the channels are 0 to 3": {"channels": [0, 4]},
        "conv.out: no channel -1": {"channels": -1},
        "conv.out: no channels are asked for": {"channels": []},
        "unknown pool 'kernels'; closest: kernel": {"pool": "kernels"},
        "type ReLU is not in the table": {"layer": "act"},
    }
    for message, options in wrong.items():
        with pytest.raises(ValueError, match=message):
            dense_jtj(model, batches, **{"layer": "conv"} | options)
    model.affineless = nn.BatchNorm2d(4, affine=False)
    with pytest.raises(ValueError, match=r"layer 'affineless' \(BatchNorm2d\) has no channels with parameters"):
        dense_jtj(model, batches, "affineless")


def test_says_what_a_request_would_cost_before_it_runs():
    model = nn.Conv2d(512, 512, 3, bias=False)
    message = (
        r"of 512 channels of 4,608 parameters takes 43.5 GB, more than max_bytes \(2.15 GB\); "
        r"ask for fewer channels \(up to 25\), pool='kernel' \(0.537 GB\), a larger max_bytes"
    )
    with pytest.raises(ValueError, match=message):
        dense_jtj(model, None, "", axis="out")
    with pytest.raises(ValueError, match=r"more than max_bytes \(1e-07 GB\); ask for a larger max_bytes"):
        dense_jtj(nn.Linear(50, 2), None, "", max_bytes=100)


def test_the_model_is_given_back_after_an_error():
    model, batches = make()
    with pytest.raises(ValueError, match="batch 2: rows=4 does not divide its 3 examples"):
        dense_jtj(model, [batches[0], tuple(part[:3] for part in batches[1])], "conv", rows=4)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_values_must_fit_the_labels():
    with pytest.raises(ValueError, match=r"shapes \(1, 2, 2\) and \(1, 3\) for 1 channels of 3 parameters"):
        DenseJTJ(("conv", "out"), (0,), torch.zeros(1, 2, 2), torch.zeros(1, 3), ("a", "b", "c"))
    with pytest.raises(ValueError, match="no JᵀJ of channel 7"):
        dense_jtj(*make(), "conv", [1, 2]).index_of(7)


@pytest.mark.parametrize("rows", ["batch", "sample", 2])
def test_group_is_the_concatenation_of_its_members(rows):
    model, batches = make()
    group = next(g for g in find_groups(model, batches[0][0][:1]) if any(m.axis.layer == "conv" for m in g.members))
    jtj = group_jtj(model, batches, group, 2, rows=rows)
    jacobian, parameters = jacobians(model, batches, rows)
    picked = [[pick(of_layer(t, layer)) for layer, pick in GROUP_OF_CONV_2] for t in (jacobian, parameters)]
    whole, weights = torch.cat(picked[0], dim=1), torch.cat(picked[1], dim=1)[0]
    names = [layer for layer, _ in GROUP_OF_CONV_2]
    sizes = [part.shape[1] for part in picked[0]]
    assert [block.stop - block.start for block in jtj.members] == [
        sizes[names.index(b.axis.layer)] for b in jtj.members
    ]
    columns = dict(zip(names, torch.arange(whole.shape[1]).split(sizes), strict=True))
    place = torch.cat([columns[block.axis.layer] for block in jtj.members])
    torch.testing.assert_close(jtj.values, (whole.T @ whole)[place][:, place], **EXACT)
    torch.testing.assert_close(jtj.weights, weights[place], **EXACT)
    assert jtj.coupled_score == pytest.approx((whole @ weights).square().sum().item(), rel=1e-10)


GROUP_OF_CONV_2 = [
    ("conv", CASES[Net, "conv", "out", 2]),
    ("norm", lambda t: flat(t["weight"][:, 2, None], t["bias"][:, 2, None])),
    ("depthwise", lambda t: flat(t["weight"][:, 2], t["bias"][:, 2, None])),
    ("grouped", lambda t: flat(t["weight"][:, 3:6, 0])),
]


def flattened():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).double()
    return model, make()[1]


@pytest.mark.parametrize("given", [make, flattened])
def test_group_scores_are_those_of_score_groups(given):
    model, batches = given()
    groups = find_groups(model, batches[0][0][:1])
    scores = score_groups(model, groups, "jacobian", batches)
    prunable = [group for group in groups if group.prunable]
    assert prunable
    for group in prunable:
        jtj = group_jtj(model, batches, group, 1)
        assert jtj.score == pytest.approx(scores[group][1].item(), rel=1e-10)


def test_group_over_a_flattened_axis_has_one_block_a_position():
    model, batches = flattened()
    group = find_groups(model, batches[0][0][:1])[0]
    jtj = group_jtj(model, batches, group, 1)
    positions = [block.position for block in jtj.members if block.axis == ("3", "in")]
    assert positions == [4, 5, 6, 7]
    assert "3.weight[0, :] of in 5" in jtj.labels
    assert len(set(jtj.labels)) == len(jtj.labels) == jtj.values.shape[0]
    assert jtj.interactions.sum().item() == pytest.approx(jtj.coupled_score)
    assert jtj.to_frame()["score"].sum() == pytest.approx(jtj.score)
    assert 1 <= jtj.effective_rank <= 3 + 1e-6
    assert "0.out, channel 1" in repr(jtj) and "3.in[5]" in jtj._repr_html_()
    assert "0.out" in jtj.plot().layout.title.text


def test_group_refuses_what_it_cannot_do():
    model, batches = make()
    group = find_groups(model, batches[0][0][:1])[0]
    with pytest.raises(ValueError, match=f"group {group.root}: no channel 4; the channels are 0 to 3"):
        group_jtj(model, batches, group, 4)
    with pytest.raises(ValueError, match="JᵀJ of 43 parameters takes 1.48e-05 GB, more than max_bytes"):
        group_jtj(model, batches, group, 0, max_bytes=1000)
