"""Structures that users bring, one small network each: what is coupled, and that pruning equals masking."""

import pytest
import torch
from oracles_pruning import masked
from torch import nn
from torch.nn import functional as F

from obc_tools import LayerAxis, PruningPlan, check_plan, find_groups, make_plan, prune


class Fused(nn.Module):
    """Attention with fused q, k, v that keeps its widths as attributes, as timm's does."""

    def __init__(self, width=12, heads=3, head=4):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim, self.scale = heads, head, heads * head, head**-0.5
        self.qkv, self.proj = nn.Linear(width, 3 * heads * head), nn.Linear(heads * head, width)

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        weights = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, length, self.attn_dim))


class Grouped(nn.Module):
    """Grouped-query attention from separate projections: two heads of k and v serve four of q."""

    def __init__(self):
        super().__init__()
        self.head_dim = 6
        self.q, self.k, self.v, self.proj = nn.Linear(8, 24), nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(24, 8)

    def forward(self, x):
        shape = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = (part.repeat_interleave(2, 1) for part in (k, v))
        out = (q @ k.transpose(-2, -1) / 3).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).flatten(2))


class Halves(nn.Module):
    """Chunks, one through a convolution, put together and shuffled."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        one, other = self.stem(x).relu().chunk(2, 1)
        x = torch.cat([one, self.inner(other).relu()], 1)
        batch, width, height, _ = x.shape
        x = x.view(batch, 2, width // 2, height, -1).transpose(1, 2).reshape(batch, width, height, -1)
        return self.last(x).mean((2, 3))


class Pixels(nn.Module):
    """Pixel shuffle, interpolation and a normalisation in groups."""

    def __init__(self):
        super().__init__()
        self.stem, self.up, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 32, 1), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = F.pixel_shuffle(self.up(self.stem(x).relu()), 2)
        return self.last(F.interpolate(self.norm(x).relu(), scale_factor=0.5))


class WithInput(nn.Module):
    """The raw input beside computed channels, and a constant cut."""

    def __init__(self):
        super().__init__()
        self.stem, self.mid, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(9, 8, 1), nn.Conv2d(5, 4, 1)

    def forward(self, x):
        return self.last(self.mid(torch.cat([self.stem(x).relu(), x], 1))[:, :5].relu()).mean((2, 3))


NETWORKS = {"chunks": Halves, "pixel shuffle": Pixels, "raw input": WithInput}
TOKENS = {"fused": lambda: nn.Sequential(nn.Linear(3, 12), Fused(), nn.Linear(12, 2)), "grouped query": Grouped}


def seeded(build, *shape):
    torch.manual_seed(0)
    return build().double().eval(), torch.randn(*shape, dtype=torch.float64)


def random_plan(model, inputs, **options):
    groups = find_groups(model, inputs, **options)
    generator = torch.Generator().manual_seed(0)
    return make_plan({g: torch.rand(g.width, generator=generator) for g in groups}, ratio=0.5, scope="local")


@pytest.mark.parametrize("name", NETWORKS)
def test_pruned_equals_masked(name):
    model, images = seeded(NETWORKS[name], 2, 3, 8, 8)
    plan = random_plan(model, images)
    assert plan.channels_removed > 0
    torch.testing.assert_close(prune(model, plan)(images), masked(model, plan)(images), rtol=0, atol=1e-12)


def test_all_heads_lose_the_same_positions_and_attributes_follow():
    model, tokens = seeded(TOKENS["fused"], 2, 5, 3)
    groups = {str(group.root): group for group in find_groups(model, tokens)}
    inner = groups["1.qkv.out"]
    assert (inner.width, inner.blocks) == (12, 3)
    assert {axis.axis.axis for axis in inner.attributes} == {".head_dim", ".attn_dim"}
    plan = random_plan(model, tokens)
    again = PruningPlan.from_json(plan.to_json())
    assert again == plan
    fresh, _ = seeded(TOKENS["fused"], 1)
    attention = prune(fresh, again)[1]
    assert (attention.num_heads, attention.head_dim, attention.attn_dim, attention.scale) == (3, 2, 6, 0.5)
    assert attention.qkv.weight.shape == (18, len(plan.kept_of(LayerAxis("0", "out"))))
    assert attention(torch.randn(1, 4, attention.qkv.in_features).double()).shape[1] == 4


def test_whole_heads_go_where_asked():
    model, tokens = seeded(TOKENS["fused"], 2, 5, 3)
    plan = random_plan(model, tokens, whole_heads=True)
    attention = prune(model, plan)[1]
    assert (attention.num_heads, attention.head_dim, attention.attn_dim, attention.scale) == (2, 4, 8, 0.5)
    kept = plan.selection(LayerAxis("1.proj", "in"))
    heads = sorted({position // 4 for position in kept})
    assert kept == tuple(4 * head + i for head in heads for i in range(4))


def test_queries_and_keys_are_coupled_and_values_with_the_projection():
    model, tokens = seeded(TOKENS["grouped query"], 2, 5, 8)
    groups = [{str(member.axis) for member in group.members} for group in find_groups(model, tokens)]
    assert any({"q.out", "k.out"} <= members for members in groups)
    plan = random_plan(model, tokens)
    pruned = prune(model, plan)
    heads, rest = divmod(pruned.q.out_features, pruned.head_dim)
    assert pruned.q.out_features == 2 * pruned.k.out_features and rest == 0 and heads in (2, 4)
    assert check_plan(model, plan, tokens).error_of("pruned = masked") < 1e-6
    assert pruned(tokens).shape == tokens.shape


def test_a_constant_width_is_said():
    groups = find_groups(*seeded(WithInput, 2, 3, 4, 4))
    assert [group.kept_whole for group in groups][1] == "has to have a constant width of 5"
    assert groups[0].prunable


def test_more_paths_than_can_be_counted_take_no_time():
    class Doubling(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            x = self.first(x)
            for _ in range(200):
                x = x + x.relu()
            return self.last(x)

    assert find_groups(Doubling(), torch.randn(1, 4))[0].prunable


class WritingIntoItself(nn.Module):
    """Changes its own parameters whenever it runs."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x):
        self.first.weight.mul_(2.0)
        self.second.weight.data.clamp_(0, 1)
        self.last.weight.data = self.last.weight.data * 2
        torch.add(self.first.bias, 1, out=self.first.bias.data)
        return self.last(self.second(self.first(x)))


def test_parameters_that_the_forward_pass_writes_into_are_left_alone():
    model = WritingIntoItself()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    groups = find_groups(model, torch.randn(1, 4))
    assert [group.prunable for group in groups] == [True, True, False]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_queries_are_scaled_in_the_pruned_model_only():
    encoder = lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)  # noqa: E731
    model, tokens = seeded(lambda: nn.Sequential(nn.Linear(3, 8), encoder(), nn.Linear(8, 2)), 2, 5, 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = random_plan(model, tokens)
    pruned = prune(model, plan)
    for tensor in pruned.state_dict().values():
        tensor.zero_()
    assert plan.scaled
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class AsWideAsTheInput(nn.Module):
    """Lays its input out in the number of its first layer's channels."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        wide = self.first(x)
        return self.last(wide) + x.reshape(len(x), 1, wide.shape[1]).mean(2)


def test_a_fixed_tensor_that_takes_the_width_of_channels_keeps_them():
    groups = find_groups(*seeded(AsWideAsTheInput, 3, 6))
    assert groups[0].kept_whole == "a width that the model computes would not follow it"


class Matrices(nn.Module):
    """A matrix of weights for each of three positions."""

    def __init__(self):
        super().__init__()
        self.matrices, self.last = nn.Parameter(torch.randn(3, 4, 5)), nn.Linear(5, 2)

    def forward(self, x):
        return self.last(torch.bmm(x.transpose(0, 1), self.matrices).transpose(0, 1))


def test_matrices_of_weights_are_followed():
    model, x = seeded(Matrices, 2, 3, 4)
    plan = random_plan(model, x)
    assert plan.channels_removed
    torch.testing.assert_close(prune(model, plan)(x), masked(model, plan)(x))


class BiasFromQueries(nn.Module):
    """An attention whose queries also give its bias, by positions that are weights."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 3)
        self.positions = nn.Parameter(torch.randn(5, 4))

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(len(x), 5, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=q @ self.positions.T)
        return self.proj(out.transpose(1, 2).flatten(2))


def test_queries_that_meet_more_than_keys_keep_their_channels():
    groups = {str(group.root): group for group in find_groups(*seeded(BiasFromQueries, 2, 5, 8))}
    assert groups["qkv.out"].kept_whole == "is a head of an attention whose queries meet more than its keys"
