"""Attentions whose heads become narrower keep their temperature: pruned = masked = Equivalent Pruning = reloaded."""

import math

import numpy as np
import pytest
import torch
from networks import Attention
from torch import nn
from torch.nn import functional as F

from obc_tools import LayerAxis, check_plan, find_groups, load_pruned, make_plan, prune, save_pruned
from obc_tools.pruning.equivalent import EquivalentModel


class Masked(Attention):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=q.new_ones(q.shape[-2], k.shape[-2]).tril())


class Normed(Attention):
    def __init__(self):
        super().__init__()
        self.q_norm, self.k_norm = nn.LayerNorm(8), nn.LayerNorm(8)

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)


class Biased(Attention):
    """Queries with a bias of their own, as in BEiT."""

    def __init__(self):
        super().__init__()
        self.u = nn.Parameter(torch.randn(3, 1, 8))

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q + self.u, k, v)


class Turned(Attention):
    """Rotary embedding: queries and keys are turned by constants."""

    def __init__(self):
        super().__init__()
        self.cos, self.sin = 0.8, 0.6

    def attend(self, q, k, v):
        q, k = (torch.cat([half[0] * self.cos - half[1] * self.sin, half[1] * self.cos + half[0] * self.sin], -1)
                for half in (x.chunk(2, -1) for x in (q, k)))  # fmt: skip
        return F.scaled_dot_product_attention(q, k, v)


class Computed(Attention):
    def attend(self, q, k, v):
        return ((q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])).softmax(-1) @ v


class Powered(Attention):
    def attend(self, q, k, v):
        return ((q * self.head_dim**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


class Keeping(Attention):
    """Uses the scale that it keeps."""

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale)


class Torchs(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.attention, self.proj = nn.Linear(7, 24), nn.MultiheadAttention(24, 3), nn.Linear(24, 5)

    def forward(self, x):
        x = self.stem(x)
        return self.proj(self.attention(x, x, x, need_weights=False)[0])


FOLLOWING = [Attention, Masked, Normed, Biased, Turned, Computed, Powered, Torchs]


def made(kind):
    torch.manual_seed(0)
    model = kind().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    tokens = torch.randn(2, 6, 7, dtype=torch.float64)
    groups = find_groups(model, tokens)
    plan = make_plan({group: torch.rand(group.width) for group in groups}, ratio=0.5, scope="local")
    return model, tokens, plan


@pytest.mark.parametrize("kind", FOLLOWING)
def test_the_temperature_stays(kind):
    model, tokens, plan = made(kind)
    ((_, factor),) = {name: found for name, found in plan.scaled.items() if name != "u"}.values()
    assert factor == math.sqrt(0.5)
    check = check_plan(model, plan, tokens)
    assert check.ok and check.error_of("pruned = masked") < 1e-12 and check.effect > 0.01, check


@pytest.mark.parametrize("kind", [Attention, Normed])
def test_a_reload_gives_the_same_outputs(tmp_path, kind):
    model, tokens, plan = made(kind)
    equivalent = EquivalentModel(model, plan)
    optimizer = torch.optim.SGD(equivalent.parameters(), 1e-3)
    equivalent(tokens).square().sum().backward()
    optimizer.step()
    merged = equivalent.merge().eval()
    save_pruned(tmp_path / "saved", merged, plan)
    loaded = load_pruned(tmp_path / "saved", model=kind().double())
    assert torch.equal(loaded(tokens), merged(tokens))


def test_a_second_plan_goes_on_from_the_first():
    model, tokens, plan = made(Attention)
    pruned = prune(model, plan)
    second = find_groups(pruned, tokens)
    assert [group.width for group in second] == [group.width for group in plan.pruned_groups()]
    for groups in (second, plan.pruned_groups()):
        more = make_plan({g: torch.arange(g.width).double() for g in groups}, channels=3)
        twice, once = prune(pruned, more), prune(model, plan.then(more))
        torch.testing.assert_close(twice(tokens), once(tokens), rtol=1e-12, atol=0)


def test_a_scale_that_a_module_keeps_and_uses_stays():
    model, tokens, plan = made(Keeping)
    assert not plan.scaled and plan.channels_removed
    assert prune(model, plan).scale == 8**-0.5
    assert check_plan(model, plan, tokens).ok


def test_a_scale_beside_torchs_own_follows_it():
    model, tokens, plan = made(Attention)
    pruned = prune(model, plan)
    assert pruned.scale == pruned.head_dim**-0.5 == 4**-0.5
    expected = pruned(tokens)
    pruned.attend = lambda q, k, v: ((q * pruned.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
    torch.testing.assert_close(pruned(tokens), expected)


def test_queries_that_are_their_own_keys_stay_whole():
    class Same(Attention):
        def attend(self, q, k, v):
            return F.scaled_dot_product_attention(q, q, v)

    model, tokens, plan = made(Same)
    group = next(group for group in plan.groups if group.root == LayerAxis("qkv", "out"))
    assert group.kept_whole == "is a head of an attention whose queries cannot be told from keys and values"


def test_queries_behind_a_nonlinearity_stay_whole():
    class Rectified(Attention):
        def attend(self, q, k, v):
            return F.scaled_dot_product_attention(q.tanh(), k.tanh(), v)

    assert not any(group.prunable for group in made(Rectified)[2].groups)


def soft(products, v):
    return products.softmax(-1) @ v


SCALED_OTHERWISE = {
    "twice": lambda q, k, v: F.scaled_dot_product_attention(q * q.shape[-1] ** -0.5, k, v),
    "queries and keys": lambda q, k, v: soft(q * q.shape[-1] ** -0.5 @ (k * k.shape[-1] ** -0.5).mT, v),
    "another power": lambda q, k, v: soft(q @ k.mT * q.shape[-1] ** -0.25, v),
    "no root": lambda q, k, v: soft(q @ k.mT / float(q.shape[-1]), v),
    "numpy": lambda q, k, v: soft(q @ k.mT / float(np.cbrt(q.shape[-1])), v),
    "one of two products": lambda q, k, v: soft(q @ k.mT / math.sqrt(k.shape[-1]) + q @ k[:, :, :1].mT, v),
}
MEETING_MORE = {
    "added": lambda q, k, v: q + F.scaled_dot_product_attention(q, k, v),
    "set transformer": lambda q, k, v: q + soft(q @ k.mT / math.sqrt(k.shape[-1]), v),
    "pooled": lambda q, k, v: F.scaled_dot_product_attention(q, k, v) + q.mean(2, keepdim=True),
    "gates": lambda q, k, v: F.scaled_dot_product_attention(q, k, v) * q.sigmoid(),
    "values": lambda q, k, v: F.scaled_dot_product_attention(q, k, v + q),
}


@pytest.mark.parametrize("name", [*SCALED_OTHERWISE, *MEETING_MORE])
def test_queries_that_are_scaled_otherwise_or_meet_more_than_keys_stay(name):
    attend = (SCALED_OTHERWISE | MEETING_MORE)[name]
    model, tokens, plan = made(type("Otherwise", (Attention,), {"attend": lambda self, q, k, v: attend(q, k, v)}))
    assert not plan.scaled and check_plan(model, plan, tokens).ok
    reasons = {group.kept_whole for group in plan.groups}
    expected = ("number in", "not scaled once") if name in SCALED_OTHERWISE else ("meet more than its keys",)
    assert any(part in str(reason) for reason in reasons for part in expected)


class Streamed(Attention):
    """An attention whose scale is computed from the width of the stream."""

    def __init__(self, scale):
        super().__init__()
        self.stem, self.width_scale = nn.Linear(7, 24), scale
        self.qkv = nn.Linear(24, 72)

    def forward(self, x):
        x = self.stem(x)
        self.now = self.width_scale(self, x)
        return super().forward(x)

    def attend(self, q, k, v):
        return soft(q @ k.mT * self.now, v)


@pytest.mark.parametrize(
    "scale",
    [
        lambda model, x: x.shape[-1] ** -0.5,
        lambda model, x: 1 / math.sqrt(x.shape[-1] // model.num_heads),
        lambda model, x: model.qkv.in_features**-0.5,
    ],
)
def test_a_scale_by_another_width_keeps_that_width(scale):
    model, tokens, plan = made(lambda: Streamed(scale))
    stream = next(group for group in plan.groups if group.root == ("stem", "out"))
    assert "number in root" in stream.kept_whole and plan.channels_removed and not plan.scaled
    assert check_plan(model, plan, tokens).ok


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_scale_that_is_used_beside_torchs_own_stays(where):
    class Twice(Attention):
        def attend(self, q, k, v):
            if where == "before":
                return F.scaled_dot_product_attention(q * self.scale, k, v)
            return self.scale * F.scaled_dot_product_attention(q, k, v)

    model, tokens, plan = made(Twice)
    assert plan.scaled and prune(model, plan).scale == 8**-0.5 and check_plan(model, plan, tokens).ok


class HeadByHead(Attention):
    """One root for the products of all heads, each with queries of its own."""

    def attend(self, q, k, v):
        scale = q.shape[-1] ** -0.5
        return torch.stack([soft(q[:, h] @ k[:, h].mT * scale, v[:, h]) for h in range(self.num_heads)], 1)


class Chunked(Attention):
    def attend(self, q, k, v):
        return torch.cat([soft(part @ k.mT / math.sqrt(part.shape[-1]), v) for part in q.split(4, 2)], 2)


class Together(Attention):
    """Heads as rows of a batch, multiplied by an operation that scales as well."""

    def attend(self, q, k, v):
        rows, zeros = [each.flatten(0, 1) for each in (q, k, v)], q.new_zeros(1, 1, 1)
        products = torch.baddbmm(zeros, rows[0], rows[1].mT, beta=0, alpha=1 / math.sqrt(q.shape[-1]))
        return soft(products, rows[2]).unflatten(0, q.shape[:2])


class Setting(Attention):
    """Sets its scale anew in every pass."""

    def attend(self, q, k, v):
        self.scale = 1 / math.sqrt(q.shape[-1])
        return soft(q @ k.mT * self.scale, v)


@pytest.mark.parametrize("kind", [HeadByHead, Chunked, Together, Setting])
def test_one_root_for_each_product_is_the_temperature(kind):
    model, tokens, plan = made(kind)
    assert set(plan.scaled.values()) == {plan.scaled["qkv"]} and plan.channels_removed
    assert plan.scaled["qkv"][1] == math.sqrt(0.5) and check_plan(model, plan, tokens).ok
    assert not any(axis.axis.startswith(".scale") for axis in plan.shrunk) or kind is not Setting
