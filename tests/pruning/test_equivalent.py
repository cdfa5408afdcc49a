import copy
from functools import partial

import pytest
import torch
from networks import NETWORKS, network, random_plan
from oracles_pruning import Inserted, inserted
from own_layers import Blur, Turned, registered
from torch import nn

from obc_tools import EquivalentModel, PruningPlan, find_groups, make_plan, prune, prune_to
from obc_tools.pruning.equivalent import Mixing


def train(model, images, steps, lr=0.02):
    """Take SGD steps with momentum and weight decay on fixed targets; norms in train mode."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        batch = torch.randn(images.shape, generator=generator, dtype=images.dtype)
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_it_starts_as_the_naively_pruned_model(name):
    model, images, plan = random_plan(name)
    torch.testing.assert_close(EquivalentModel(model, plan)(images), prune(model, plan)(images), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_it_trains_as_inserted_maps_do(name):
    model, images, plan = random_plan(name)
    equivalent = EquivalentModel(model, plan)
    oracle = inserted(model, plan, equivalent)
    start = copy.deepcopy(equivalent)
    train(equivalent, images, 20)
    train(oracle, images, 20)
    torch.testing.assert_close(equivalent(images), oracle(images), rtol=0, atol=1e-10)
    for key, mixed in equivalent.mixed_layers.items():
        twin, first = oracle.get_submodule(key), start.mixed_layers[key]
        assert isinstance(twin, Inserted)
        torch.testing.assert_close(mixed.mixing.join(mixed.weight), twin.layer.weight, rtol=0, atol=1e-10)
        for ours, theirs, before in (
            (mixed.compressor, twin.shrink, first.compressor),
            (mixed.decompressor, twin.expand, first.decompressor),
        ):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
                assert not torch.equal(ours, before), f"{key}: a map that training never moved"


@pytest.mark.parametrize("name", NETWORKS)
def test_merging_is_exact_and_not_vacuous(name):
    model, images, plan = random_plan(name)
    naive = prune(model, plan)
    equivalent = train(EquivalentModel(model, plan), images, 3)
    merged = equivalent.merge()
    torch.testing.assert_close(merged(images), equivalent(images), rtol=0, atol=1e-12)
    assert (merged(images) - naive(images)).abs().max() > 1e-6
    assert type(merged) is type(naive)
    assert [key for key, _ in merged.named_parameters()] == [key for key, _ in naive.named_parameters()]
    assert not any(isinstance(module, EquivalentModel) for module in merged.modules())
    naive.load_state_dict(merged.state_dict(), strict=True)
    torch.testing.assert_close(copy.deepcopy(equivalent).merge()(images), merged(images), rtol=0, atol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_training_and_merging_leave_the_model_alone(name):
    model, images, plan = random_plan(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    equivalent = EquivalentModel(model, plan)
    merged = equivalent.merge()
    with torch.no_grad():
        for tensor in (*equivalent.parameters(), *equivalent.buffers(), *merged.state_dict().values()):
            tensor.zero_()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Attention(nn.Module):
    """A residual stream around torch's attention."""

    def __init__(self):
        super().__init__()
        self.stem, self.attention, self.head = nn.Linear(5, 16), nn.MultiheadAttention(16, 2), nn.Linear(16, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


class MappedAttention(nn.Module):
    """`Attention` with full weights and inserted maps: before and after q, k and v each, and around all else."""

    def __init__(self, model, equivalent):
        super().__init__()
        self.heads, mixed = model.attention.num_heads, equivalent.mixed_layers
        self.parts = nn.ModuleDict({name.replace(".", "_"): copy.deepcopy(layer) for name, layer in mixed.items()})

    def apply_maps(self, name, part, x):
        layer = self.parts[name]
        x = x if layer.decompressor is None else x @ layer.decompressor[part].T
        x = x @ layer.weight[part, :, 0].T + (0 if layer.bias is None else layer.bias[part])
        return x if layer.compressor is None else x @ layer.compressor[part].T

    def forward(self, x):
        x = self.apply_maps("stem", 0, x)
        q, k, v = (self.apply_maps("attention", part, x).unflatten(-1, (self.heads, -1)) for part in range(3))
        scale = q.shape[-1] ** -0.5
        weights = torch.einsum("ibhd,jbhd->bhij", q * scale, k).softmax(-1)
        taken = torch.einsum("bhij,jbhd->ibhd", weights, v).flatten(2)
        return self.apply_maps("head", 0, x + self.apply_maps("attention_out_proj", 0, taken))


def test_attention_trains_as_inserted_maps_do():
    torch.manual_seed(0)
    model = Attention().double()
    nn.init.normal_(model.attention.in_proj_bias)
    tokens = torch.randn(4, 3, 5, dtype=torch.float64)
    groups = find_groups(model, tokens)
    assert groups[0].width == 16 and groups[0].blocks == 2
    plan = PruningPlan(groups, ((0, 1, 3, 5, 6, 8, 9, 11, 13, 14), *(tuple(range(g.width)) for g in groups[1:])))
    equivalent = EquivalentModel(model, plan)
    assert set(equivalent.mixed_layers) == {"stem", "attention", "attention.out_proj", "head"}
    assert equivalent.mixed_layers["attention"].compressor.shape == (3, 10, 16)
    oracle = MappedAttention(model, equivalent)
    # The head has full rows: its bias is no part of the mixed layer.
    oracle.parts["head"].bias = nn.Parameter(model.head.bias.detach()[None].clone())
    torch.testing.assert_close(equivalent(tokens), prune(model, plan)(tokens), rtol=0, atol=1e-12)
    train(equivalent, tokens, 3)
    train(oracle, tokens, 3)
    torch.testing.assert_close(equivalent(tokens), oracle(tokens), rtol=0, atol=1e-10)
    merged = equivalent.merge()
    torch.testing.assert_close(merged(tokens), equivalent(tokens), rtol=0, atol=1e-12)
    assert list(merged.state_dict()) == list(prune(model, plan).state_dict())


class Tokens(nn.Module):
    """Turns the first number of each example into one of ten tokens."""

    def forward(self, x):
        return (5 * x[:, 0]).long() % 10


class Scale(nn.Module):
    """Layer scale: a factor a channel."""

    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(width, 1, 1) + 0.5)

    def forward(self, x):
        return x * self.gamma


def embedded():
    return nn.Sequential(
        Tokens(), nn.Embedding(10, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)
    ).double()


def one_kind(name):
    """Return a chain with one layer of a kind in the middle, and inputs for it."""
    if name == "Embedding":
        return embedded(), torch.randn(16, 3, dtype=torch.float64)
    d = {"Conv1d": 1, "Conv3d": 3}.get(name, 2)
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[d]
    middle = {
        "Conv1d": lambda: conv(8, 12, 3),
        "Conv3d": lambda: conv(8, 12, 2),
        "ConvTranspose2d, grouped": lambda: nn.ConvTranspose2d(8, 12, 2, groups=2),
        "depthwise, twice as wide": lambda: conv(8, 16, 3, groups=8),
        "GroupNorm": lambda: nn.Sequential(conv(8, 12, 1), nn.GroupNorm(2, 12)),
        "PReLU": lambda: nn.Sequential(conv(8, 12, 1), nn.PReLU(12)),
        "layer scale": lambda: nn.Sequential(conv(8, 12, 1), Scale(12)),
        "InstanceNorm": lambda: nn.Sequential(conv(8, 12, 1), nn.InstanceNorm2d(12, affine=True)),
    }[name]()
    width = 16 if "twice" in name else 12
    model = nn.Sequential(conv(3, 8, 1), nn.Tanh(), middle, nn.Tanh(), conv(width, 4, 1)).double()
    return model, torch.randn(2, 3, *[6] * d, dtype=torch.float64)


KINDS = ["Conv1d", "Conv3d", "ConvTranspose2d, grouped", "depthwise, twice as wide", "GroupNorm", "PReLU"]


@pytest.mark.parametrize("name", [*KINDS, "InstanceNorm", "Embedding", "layer scale"])
def test_every_layer_type_trains_as_inserted_maps_do(name):
    torch.manual_seed(0)
    model, images = one_kind(name)
    groups = find_groups(model, images)
    plan = make_plan({group: torch.rand(group.width) for group in groups}, ratio=0.5, scope="local")
    assert plan.channels_removed >= 4
    equivalent = EquivalentModel(model, plan)
    oracle = inserted(model, plan, equivalent)
    naive = prune(model, plan)
    train(equivalent, images, 3)
    train(oracle, images, 3)
    torch.testing.assert_close(equivalent(images), oracle(images), rtol=0, atol=1e-10)
    torch.testing.assert_close(equivalent.merge()(images), equivalent(images), rtol=0, atol=1e-12)
    assert (equivalent(images) - naive(images)).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("own", "shape"), [(Turned(8, 12), (4, 3)), (Blur(8, 12), (2, 3, 6, 6)), (Blur(8, 12, 2), (2, 3, 6, 6))]
)
def test_registered_types_train_as_inserted_maps_do(own, shape):
    torch.manual_seed(0)
    around = nn.Linear if len(shape) == 2 else partial(nn.Conv2d, kernel_size=1)
    model = nn.Sequential(around(3, 8), nn.Tanh(), copy.deepcopy(own), nn.Tanh(), around(12, 4)).double()
    inputs = torch.randn(shape).double()
    with registered():
        scores = {group: torch.rand(group.width) for group in find_groups(model, inputs)}
        plan = make_plan(scores, ratio=0.5, scope="local")
        equivalent = EquivalentModel(model, plan)
        oracle = inserted(model, plan, equivalent)
        assert set(equivalent.mixed_layers) == {"0", "2", "4"}
        train(equivalent, inputs, 3)
        train(oracle, inputs, 3)
        torch.testing.assert_close(equivalent(inputs), oracle(inputs), rtol=0, atol=1e-10)
        merged = equivalent.merge()
        torch.testing.assert_close(merged(inputs), equivalent(inputs), rtol=0, atol=1e-12)
        naive = prune(model, plan)
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in naive.named_parameters()]
    assert (merged(inputs) - naive(inputs)).abs().max() > 1e-6


def test_where_nothing_can_be_mixed_it_says_so(caplog):
    torch.manual_seed(0)
    model, inputs = nn.Sequential(Turned(3, 8), nn.Tanh(), Turned(8, 4)), torch.randn(4, 3)
    plan = make_plan({group: torch.rand(group.width) for group in find_groups(model, inputs)}, ratio=0.5)
    with caplog.at_level("WARNING"):
        EquivalentModel(model, plan)
    assert caplog.messages == ["nothing can be mixed (Parameter, Turned): this trains as the pruned network alone"]
    with registered(), caplog.at_level("WARNING"):
        plan = make_plan({group: torch.rand(group.width) for group in find_groups(model, inputs)}, ratio=0.5)
        assert EquivalentModel(model, plan).mixed_layers and len(caplog.messages) == 1


def test_layers_that_lost_nothing_have_no_maps():
    model, images = network("small_vgg")
    whole = PruningPlan.whole(find_groups(model, images))
    kept = [k if g.root.layer not in ("3", "7") else k[::2] for g, k in zip(whole.groups, whole.kept, strict=True)]
    plan = PruningPlan(whole.groups, tuple(kept))
    mixed = EquivalentModel(model, plan).mixed_layers
    assert set(mixed) == {"3", "7", "11"}
    assert mixed["3"].decompressor is None and mixed["3"].compressor is not None
    assert mixed["11"].compressor is None and mixed["11"].decompressor is not None


def test_maps_of_grouped_convolutions_are_block_diagonal():
    model, _, plan = random_plan("grouped")
    mixed = EquivalentModel(model, plan).mixed_layers["conv2"]
    assert mixed.compressor.shape[0] == mixed.decompressor.shape[0] == 4
    assert mixed.compressor.shape[2] == 6 and mixed.decompressor.shape[1] == 4


def test_flattened_inputs_are_mixed_by_channel():
    model, _, plan = random_plan("small_vgg")
    mixed = EquivalentModel(model, plan).mixed_layers["11"]
    assert mixed.decompressor.shape[1] == 16 and mixed.weight.shape == (1, 24, 16, 16)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 3),
        nn.Conv2d(4, 6, (3, 2), groups=2),
        nn.Conv3d(4, 6, 2),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.Linear(8, 5),
    ],
)
def test_mixing_form_round_trip(layer):
    stride = 4 if isinstance(layer, nn.Linear) else 1
    mixing = Mixing.of(layer, stride=stride)
    mixed = mixing.split(layer.weight)
    assert mixed.shape[3] * mixed.shape[0] * (stride if isinstance(layer, nn.Linear) else 1) == (
        layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    )
    assert torch.equal(mixing.join(mixed), layer.weight)
    assert mixing.join(mixed).is_contiguous()


def test_names_of_layers_may_hold_slashes():
    torch.manual_seed(0)
    inner = nn.Sequential()
    inner.add_module("<b>one</b>", nn.Linear(4, 6))
    model = nn.Sequential(inner, nn.ReLU(), nn.Linear(6, 3))
    plan = prune_to(model, torch.zeros(1, 4), criterion="l1", ratio=0.3, progress=False)
    equivalent, x = EquivalentModel(model, plan), torch.randn(2, 4)
    assert set(equivalent.mixed_layers) == {"0.<b>one</b>", "2"}
    torch.testing.assert_close(equivalent(x), prune(model, plan)(x))
    torch.testing.assert_close(equivalent.merge()(x), equivalent(x))


def test_its_state_survives_saving():
    model, images, plan = random_plan("residual")
    equivalent = train(EquivalentModel(model, plan), images, 2)
    fresh = EquivalentModel(model, plan).eval()
    fresh.load_state_dict(equivalent.state_dict(), strict=True)
    assert torch.equal(fresh(images), equivalent(images))


def test_mixing_happens_in_full_precision_under_autocast():
    model, images, plan = random_plan("residual")
    equivalent = EquivalentModel(model.float(), plan)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {value.dtype for value in equivalent.effective_parameters().values()} == {torch.float32}


def test_what_cannot_be_merged_or_mixed_is_refused():
    model, _, plan = random_plan("residual")
    equivalent = EquivalentModel(model, plan)
    with torch.no_grad():
        equivalent.mixed_layers["conv1"].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="the effective 'conv1.weight' is not finite"):
        equivalent.merge()
