import copy
import logging
import re
import sys
import threading

import numpy as np
import pytest
import torch
from networks import NETWORKS, Attention, Tied, network, random_plan
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from obc_tools import (
    EquivalentModel,
    Forward,
    PruningPlan,
    compensate,
    find_groups,
    make_plan,
    prune,
    prune_to,
    recalibrate,
    score_groups,
)
from obc_tools.pruning.compensation import left_plain
from obc_tools.pruning.equivalent import MixedLayer
from obc_tools.pruning.moments import Moments
from obc_tools.pruning.readings import stopping


def images_like(images, count, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *images.shape[1:], generator=generator, dtype=images.dtype)


def error(model, network, images):
    return (model(images) - network(images)).square().mean().item()


def half_of(model, inputs, *roots):
    """Return the plan that keeps every other channel of some groups, of each block of theirs."""
    whole = PruningPlan.whole(find_groups(model, inputs))
    kept = [
        tuple(c for c in k if c % (g.width // g.blocks) % 2 == 0) if g.root.layer in roots else k
        for g, k in zip(whole.groups, whole.kept, strict=True)
    ]
    assert sum(group.root.layer in roots for group in whole.groups) == len(roots)
    return PruningPlan(whole.groups, tuple(kept))


ALL = 10_000
"""More positions than any output here has."""
LAYERS = {
    "Conv1d": lambda: nn.Conv1d(8, 6, 3, padding=1),
    "Conv2d": lambda: nn.Conv2d(8, 6, (3, 2), stride=2, padding=1),
    "dilated, same": lambda: nn.Conv2d(8, 6, 3, padding="same", dilation=2),
    "reflecting": lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"),
    "no bias": lambda: nn.Conv2d(8, 6, 3, bias=False),
    "Conv3d": lambda: nn.Conv3d(8, 6, 2),
    "grouped": lambda: nn.Conv2d(8, 6, 3, padding=1, groups=2),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(8, 6, 3, stride=2),
    "ConvTranspose2d, grouped": lambda: nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, groups=2),
    "Linear": lambda: nn.Linear(8, 6),
    "Linear, no bias": lambda: nn.Linear(8, 6, bias=False),
}
ALONE = {
    "depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "depthwise, twice as wide": lambda: nn.Conv2d(8, 16, 3, groups=8),
    "depthwise, transposed": lambda: nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8),
}
"""Layers that read each channel by itself, so that no channel can take over for another."""


def chain(name, *activations):
    """Return two layers that make eight channels, one of a kind, and one behind it; with data for them."""
    torch.manual_seed(0)
    middle = (LAYERS | ALONE)[name]()
    between = list(activations) * 2
    if isinstance(middle, nn.Linear):
        layers = [nn.Linear(5, 8), *between[:1], nn.Linear(8, 8), *between[1:], middle, *between[:1], nn.Linear(6, 3)]
        return nn.Sequential(*layers).double(), torch.randn(7, 9, 5).double()
    d = len(middle.kernel_size)
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[d]
    layers = [conv(5, 8, 1), *between[:1], conv(8, 8, 1), *between[1:], middle]
    layers += [*between[:1], conv(middle.out_channels, 3, 1)]
    return nn.Sequential(*layers).double(), torch.randn(24, 5, *[6] * d).double()


@torch.no_grad()
def make_redundant(layer, groups):
    """Make every odd output of each group of a layer's a mixture of the even ones."""
    for part in range(groups):
        rows = torch.arange(part * 8 // groups, (part + 1) * 8 // groups)
        mixture = torch.randn(len(rows) // 2, len(rows) // 2).double()
        for tensor in (layer.weight, layer.bias):
            tensor[rows[1::2]] = (mixture @ tensor[rows[::2]].flatten(1 if tensor.dim() > 1 else 0)).view_as(
                tensor[rows[1::2]]
            )


@pytest.mark.parametrize("positions", [None, 7], ids=["enough", "few"])
@pytest.mark.parametrize("name", LAYERS)
def test_channels_that_are_mixtures_of_kept_ones_leave_without_a_trace(name, positions):
    model, inputs = chain(name)
    make_redundant(model[1], getattr(model[2], "groups", 1))
    plan = half_of(model, inputs, "1")
    made = compensate(model, plan, [inputs], ridge=0, positions=positions)
    fresh = torch.randn_like(inputs)
    torch.testing.assert_close(made(fresh), model(fresh), rtol=0, atol=1e-10)
    assert (prune(model, plan)(fresh) - model(fresh)).abs().max() > 1e-3


def test_what_no_kept_channel_can_give_stays_missing():
    model, inputs = chain("Conv2d")
    plan = half_of(model, inputs, "1")
    assert error(model, compensate(model, plan, [inputs], ridge=0), torch.randn_like(inputs)) > 1e-4


def test_constant_channels_move_into_the_running_mean_of_the_norm():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.Tanh(), nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)
    ).double()
    model.train()(torch.randn(8, 3, 6, 6).double())
    model.eval()
    with torch.no_grad():
        model[0].weight[1::2] = 0
    inputs = torch.randn(8, 3, 6, 6).double()
    plan = half_of(model, inputs, "0")
    made = compensate(model, plan, [inputs], ridge=0)
    fresh = torch.randn_like(inputs)
    torch.testing.assert_close(made(fresh), model(fresh), rtol=0, atol=1e-10)
    assert not torch.allclose(made[3].running_mean, model[3].running_mean, rtol=0, atol=1e-2)
    torch.testing.assert_close(made[2].weight, prune(model, plan)[2].weight, rtol=0, atol=1e-10)


class ReadTwice(nn.Module):
    """A convolution without bias that a norm reads, and an addition."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1, bias=False)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        made = self.second(torch.tanh(self.first(x)))
        return self.head(self.norm(made).relu() + made)


def test_a_norm_that_is_not_alone_takes_no_intercept():
    torch.manual_seed(0)
    model, inputs = ReadTwice().double().eval(), torch.randn(16, 3, 5, 5).double()
    made = compensate(model, half_of(model, inputs, "first"), [inputs], ridge=0, positions=ALL)
    assert torch.equal(made.norm.running_mean, model.norm.running_mean)
    x, y = torch.tanh(made.first(inputs)), model.second(torch.tanh(model.first(inputs)))
    rows = [tensor.movedim(1, -1).flatten(0, -2).detach().numpy() for tensor in (x, y)]
    solution = np.linalg.lstsq(*rows, rcond=None)[0]
    np.testing.assert_allclose(made.second.weight.detach().numpy()[:, :, 0, 0], solution.T, rtol=0, atol=1e-10)


class Returning(ReadTwice):
    """A convolution without bias that a norm reads, and whoever called the network."""

    def forward(self, x):
        made = self.second(torch.tanh(self.first(x)))
        return {"head": self.head(self.norm(made).relu()), "features": made}


def test_a_norm_takes_no_intercept_of_what_the_network_returns():
    torch.manual_seed(0)
    model, inputs = Returning().double().eval(), torch.randn(16, 3, 5, 5).double()
    with torch.no_grad():
        model.first.bias += 1
    plan = half_of(model, inputs, "first")
    made, naive = compensate(model, plan, [inputs]), prune(model, plan)
    assert torch.equal(made.norm.running_mean, model.norm.running_mean)
    away = [(network(inputs)["features"] - model(inputs)["features"]).square().mean() for network in (made, naive)]
    assert away[0] < 0.5 * away[1]


class OverTokens(nn.Module):
    """A linear layer without bias and a norm whose channels are the tokens."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 6, bias=False)
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.norm(self.second(torch.tanh(self.first(x)))).relu())


def test_a_norm_of_other_channels_takes_no_intercept():
    torch.manual_seed(0)
    model, tokens = OverTokens().double().eval(), torch.randn(64, 4, 5).double()
    plan = half_of(model, tokens, "first")
    made = compensate(model, plan, [tokens])
    assert torch.equal(made.norm.running_mean, model.norm.running_mean)
    assert error(model, made, tokens) < error(model, prune(model, plan), tokens)


def test_examples_of_a_linear_layer_come_without_a_batch_too():
    model, inputs = chain("Linear", nn.Tanh())
    inputs = inputs.flatten(0, 1)
    plan = half_of(model, inputs, "2")
    alone, together = (compensate(model, plan, data) for data in (list(inputs), [inputs]))
    torch.testing.assert_close(alone(inputs), together(inputs), rtol=0, atol=1e-10)


class Writing(nn.Module):
    """A network that writes into what it is given."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x.sub_(1))))


def test_batches_stay_what_they_are():
    torch.manual_seed(0)
    model, inputs = Writing().double(), torch.randn(40, 5).double()
    whole, plan = inputs.clone(), half_of(model, inputs.clone(), "first")
    made = compensate(model, plan, [inputs], ridge=0)
    assert torch.equal(inputs, whole)
    x, y = torch.tanh(made.first(inputs - 1)), model(inputs.clone())
    oracle = np.linalg.lstsq(np.c_[x.detach().numpy(), np.ones(40)], y.detach().numpy(), rcond=None)[0]
    np.testing.assert_allclose(made.second.weight.detach().numpy(), oracle[:-1].T, rtol=0, atol=1e-10)


def taken_and_given(network, name, inputs):
    """Return what a layer of a network takes and gives."""
    seen = []
    handle = network.get_submodule(name).register_forward_hook(lambda _m, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        network(inputs)
    handle.remove()
    return seen[0]


def solved(layer, taken, target):
    """Return a layer's parameters by one numpy least squares over all of them, from the layer's own Jacobian."""
    parameters = {name: value.detach() for name, value in layer.named_parameters()}
    columns = jacrev(lambda given: functional_call(layer, given, (taken,)))(parameters)
    matrix = torch.cat([columns[name].flatten(target.dim()).flatten(0, -2) for name in parameters], 1).numpy()
    found = np.linalg.lstsq(matrix, target.flatten().numpy(), rcond=None)[0]
    parts = torch.from_numpy(found).split([value.numel() for value in parameters.values()])
    return {name: part.view_as(parameters[name]) for name, part in zip(parameters, parts, strict=True)}


@pytest.mark.parametrize("name", LAYERS | ALONE)
def test_every_layer_has_the_least_squares_of_its_own_inputs(name):
    model, inputs = chain(name, nn.Tanh())
    inputs = inputs[:5]
    plan = half_of(model, inputs, "0", "2" if name in LAYERS else "4")
    made = compensate(model, plan, inputs.split(2), ridge=0, positions=ALL)
    kept = plan.shrunk.get(("4", "out"), range(6))
    taken, _ = taken_and_given(made, "4", inputs)
    _, given = taken_and_given(model, "4", inputs)
    dim = given.dim() - 1 if isinstance(model[4], nn.Linear) else 1
    target = given.index_select(dim, torch.tensor(kept))
    oracle = solved(made[4], taken, target)
    plain = dict(prune(model, plan)[4].named_parameters())
    for key, value in made[4].named_parameters():
        torch.testing.assert_close(value.detach(), oracle[key], rtol=0, atol=1e-9)
        assert (value - plain[key]).abs().max() > 1e-4


def test_a_ridge_keeps_weights_near_the_pruned_ones():
    model, inputs = chain("Conv2d", nn.Tanh())
    plan = half_of(model, inputs, "2")
    plain = prune(model, plan)[4].weight
    moved = [(compensate(model, plan, [inputs], ridge=r)[4].weight - plain).norm().item() for r in (0, 1e-2, 1e9)]
    assert moved[0] > moved[1] > moved[2] and moved[2] < 1e-7
    taken, _ = taken_and_given(prune(model, plan), "4", inputs)
    _, y = taken_and_given(model, "4", inputs)
    _, own = taken_and_given(prune(model, plan), "4", inputs)
    x = nn.functional.unfold(taken, (3, 2), padding=1, stride=2).transpose(1, 2).flatten(0, 1)
    r = (y - own).flatten(2).transpose(1, 2).flatten(0, 1)
    x, r = x - x.mean(0), r - r.mean(0)
    second = x.T @ x / len(x)
    second += 1e-2 * second.diagonal().mean() * torch.eye(len(second))
    oracle = plain.flatten(1) + torch.linalg.solve(second, x.T @ r / len(x)).T
    found = compensate(model, plan, [inputs], ridge=1e-2, positions=ALL)[4].weight.flatten(1)
    torch.testing.assert_close(found, oracle, rtol=0, atol=1e-10)


@pytest.mark.parametrize("count", [9, 10, 40])
@pytest.mark.parametrize("ridge", [0, 1e-2])
@pytest.mark.parametrize("centred", [False, True])
def test_few_positions_give_what_their_moments_say(count, ridge, centred):
    torch.manual_seed(0)
    x, y = torch.randn(2, 9, count).double() + 3, torch.randn(2, 4, count).double()
    moments = Moments(2, 9, 4, centred=centred, device=x.device)
    for part in (slice(0, 4), slice(4, None)):
        moments.add(x[..., part], y[..., part])
    solution, intercept = moments.solve(ridge)
    mean = x.mean(2, keepdim=True) if centred else 0 * x[..., :1]
    second = (x - mean) @ (x - mean).mT / count
    level = ridge * second.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(9).double()
    oracle = (y @ (x - mean).mT / count) @ torch.linalg.pinv(second + level, rtol=1e-12)
    torch.testing.assert_close(solution, oracle, rtol=1e-9, atol=1e-10)
    if centred:
        missing = (y - solution @ x - intercept[..., None]).mean(2)
        torch.testing.assert_close(missing, torch.zeros(2, 4).double(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_comes_nearer_to_the_original_and_stays_plain(name):
    model, images, plan = random_plan(name)
    state = copy.deepcopy(model.state_dict())
    data = [(images_like(images, 16, seed), None) for seed in range(4)]
    model.train()
    made, naive = compensate(model, plan, data), prune(model, plan).eval()
    assert made.training and model.training and type(made) is type(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [(k, v.shape) for k, v in made.state_dict().items()] == [(k, v.shape) for k, v in naive.state_dict().items()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in (*model.modules(), *made.modules()))
    fresh = images_like(images, 64, 9)
    assert error(model.eval(), made.eval(), fresh) < 0.1 * error(model, naive, fresh)


def test_nothing_changes_where_nothing_is_pruned():
    model, images, plan = random_plan("residual", ratio=0.4)
    made = compensate(model, PruningPlan.whole(plan.groups), [images])
    assert all(torch.equal(value, made.state_dict()[key]) for key, value in model.state_dict().items())


class Attending(nn.Module):
    """A residual stream around torch's attention."""

    def __init__(self):
        super().__init__()
        self.stem, self.attention, self.head = nn.Linear(5, 16), nn.MultiheadAttention(16, 2), nn.Linear(16, 3)
        self.other = False

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        y = x * 1 if self.other else x
        return self.head(x + self.attention(x, y, y, need_weights=False)[0])


@pytest.mark.parametrize("cross", [False, True], ids=["self-attention", "cross-attention"])
def test_attention_projections_have_least_squares_too(cross):
    torch.manual_seed(0)
    model = Attending().double()
    model.other = cross
    nn.init.normal_(model.attention.in_proj_bias)
    tokens = torch.randn(6, 32, 5).double()
    plan = half_of(model, tokens, "stem")
    made = compensate(model, plan, tokens.split(8, 1), ridge=0, positions=ALL)
    kept, (positions, factor) = list(plan.shrunk["attention", "out"]), plan.scaled["attention"]
    with torch.no_grad():
        x, own = (torch.tanh(network.stem(tokens)).flatten(0, 1) for network in (model, made))
        y = x @ model.attention.in_proj_weight.T + model.attention.in_proj_bias
        y[:, list(positions)] *= factor
        y = y.unflatten(1, (3, 16))[:, :, kept].flatten(1)
        solution = np.linalg.lstsq(np.c_[own.numpy(), np.ones(len(own))], y.numpy(), rcond=None)[0]
        np.testing.assert_allclose(made.attention.in_proj_weight.numpy(), solution[:-1].T, rtol=0, atol=1e-10)
        np.testing.assert_allclose(made.attention.in_proj_bias.numpy(), solution[-1], rtol=0, atol=1e-10)
        x, own = (torch.tanh(network.stem(tokens)) for network in (model, made))
        y = model.attention(x, x, x, need_weights=False)[0][..., kept].flatten(0, 1)
        given = made.attention(own, own, own, need_weights=False)[0].flatten(0, 1)
    torch.testing.assert_close((y - given).mean(0), torch.zeros(8).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close((y - given).T @ given, torch.zeros(8, 8).double(), rtol=0, atol=1e-8)


def test_threads_compensate_networks_of_their_own():
    torch.manual_seed(0)
    tokens, linear = torch.randn(6, 8, 5).double(), F.linear
    models = [Attending().double() for _ in range(2)]
    plans = [half_of(model, tokens, "stem") for model in models]
    wanted = [compensate(*pair, [tokens]) for pair in zip(models, plans, strict=True)]
    found = [[], []]

    def run(number):
        for _ in range(4 + number):
            found[number].append(compensate(models[number], plans[number], [tokens]))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert F.linear is linear and [len(made) for made in found] == [4, 5]
    for made, one in zip(found, wanted, strict=True):
        assert all(torch.equal(again(tokens), one(tokens)) for again in made)


def test_a_process_that_is_forked_beside_a_thread_compensates():
    torch.manual_seed(0)
    tokens, linear, begun, end = torch.randn(6, 8, 5).double(), F.linear, threading.Event(), threading.Event()
    model, other = Attending().double(), Attending().double()
    plan = half_of(model, tokens, "stem")

    def patch():
        with stopping(other, ["attention", "attention.out_proj"], visit=id, after=True):
            begun.set()
            end.wait()

    thread = threading.Thread(target=patch)
    thread.start()
    begun.wait()
    context = torch.multiprocessing.get_context("fork")
    child = context.Process(target=lambda: sys.exit(F.linear is not linear or not compensate(model, plan, [tokens])))
    child.start()
    child.join(60)
    child.kill()
    end.set()
    thread.join()
    assert child.exitcode == 0 and F.linear is linear


class Fused(Attention):
    """Attention from fused q, k, v with an example of tokens behind a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(5, 7)

    def forward(self, x):
        return super().forward(torch.tanh(self.stem(x)))


def test_narrower_heads_aim_at_queries_of_their_temperature():
    torch.manual_seed(0)
    model, tokens = Fused().double(), torch.randn(16, 6, 5).double()
    plan = prune_to(model, tokens[:1], criterion="l1", ratio=0.4, steps=1, progress=False)
    positions, factor = plan.scaled["qkv"]
    made = compensate(model, plan, [tokens], ridge=0, positions=ALL)
    taken, _ = taken_and_given(made, "qkv", tokens)
    _, given = taken_and_given(model, "qkv", tokens)
    given[..., list(positions)] *= factor
    oracle = solved(made.qkv, taken[:4], given[:4, :, list(plan.shrunk["qkv", "out"])])
    again = compensate(model, plan, [tokens[:4]], ridge=0, positions=ALL)
    torch.testing.assert_close(again.qkv.weight.detach(), oracle["weight"], rtol=0, atol=1e-9)


def test_layers_left_plain_are_named_with_the_reason(caplog):
    model, images, plan = random_plan("shared")
    assert left_plain(model, plan, images) == {"twice": "runs 2 times a pass"}
    with caplog.at_level(logging.INFO):
        made = compensate(model, plan, [images_like(images, 8)])
    assert "layer 'twice' stays as it was pruned: runs 2 times a pass" in caplog.text
    assert torch.equal(made.twice.weight, prune(model, plan).twice.weight)
    tied, x = Tied(), torch.randn(64, 6)
    plan = prune_to(tied, x, criterion="l1", ratio=0.4, steps=1, progress=False)
    reasons = left_plain(tied, plan, x)
    assert reasons == dict.fromkeys(("second", "third"), "its parameters are shared with another layer")
    made = compensate(tied, plan, [x])
    assert made.second.weight is made.third.weight
    assert error(tied, made, x) < error(tied, prune(tied, plan), x)


def test_a_layer_whose_weights_are_computed_is_named():
    model, x = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), spectral_norm(nn.Linear(8, 4))), torch.randn(20, 5)
    reasons = left_plain(model, half_of(model, x, "0"), x)
    assert list(reasons) == ["2"] and "has a parametrization" in reasons["2"]


def test_ignored_layers_stay_plain():
    model, images, plan = random_plan("residual")
    made, naive = compensate(model, plan, [images_like(images, 8)], ignore="conv*"), prune(model, plan)
    assert torch.equal(made.conv2.weight, naive.conv2.weight) and not torch.equal(made.fc.weight, naive.fc.weight)
    with pytest.raises(ValueError, match=r"unknown layer to ignore 'convolution'"):
        compensate(model, plan, [images], ignore=["convolution"])


def test_some_positions_serve_about_as_well_as_all():
    model, images, plan = random_plan("residual")
    data, fresh = [images_like(images, 64)], images_like(images, 64, 9)
    few = compensate(model, plan, data, positions=8)
    assert error(model, few, fresh) < 0.1 * error(model, prune(model, plan), fresh)
    again = compensate(model, plan, data, positions=8)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in few.state_dict().items())
    other = compensate(model, plan, data, positions=8, seed=1)
    assert not torch.equal(few.conv2.weight, other.conv2.weight)


def test_dead_inputs_and_few_positions_leave_finite_weights(caplog):
    model, images, plan = random_plan("small_vgg")
    with torch.no_grad():
        model[0].weight[:4] = 0
    for ridge in (0, 1e-3):
        made = compensate(model, plan, [images[:1]], ridge=ridge)
        assert all(value.isfinite().all() for value in made.state_dict().values())
    few = r"layer '11': 1 positions of calibration data for \d+ inputs: there are many solutions, and the ridge decides"
    assert re.search(few, caplog.text)


def test_half_precision_sums_in_more(monkeypatch):
    summed, add = [], Moments.add
    monkeypatch.setattr(Moments, "add", lambda self, *given: summed.extend(given) or add(self, *given))
    model, images, plan = random_plan("residual")
    data = [images_like(images, 32)]
    made = compensate(model.float(), plan, [data[0].float()])
    half = compensate(model.bfloat16(), plan, [data[0].bfloat16()])
    assert half.conv2.weight.dtype == torch.bfloat16 and {tensor.dtype for tensor in summed} == {torch.float32}
    torch.testing.assert_close(half.conv3.weight.float(), made.conv3.weight, rtol=0, atol=0.1)


def test_bad_input_is_refused():
    model, images, plan = random_plan("residual")
    with pytest.raises(ValueError, match="the batches yield no data"):
        compensate(model, plan, [])
    with pytest.raises(ValueError, match="ridge=-1: expected a number of 0 or more"):
        compensate(model, plan, [images], ridge=-1)
    with pytest.raises(ValueError, match="seed=a: expected at least 0"):
        compensate(model, plan, [images], seed="a")
    with pytest.raises(ValueError, match="max_bytes=a: expected at least 1"):
        compensate(model, plan, [images], max_bytes="a")
    with pytest.raises(
        ValueError, match=r"layer 'conv1': .* 45 inputs take [\d,]+ bytes, over max_bytes=20,000: .*ignore="
    ):
        compensate(model, plan, [images], max_bytes=20_000)
    for batches, number in (([images[:, :2]], 1), ([images, images[:, :2]], 2)):
        with pytest.raises(ValueError, match=rf"batch {number}: Residual cannot work on .*channels"):
            compensate(model, plan, batches)
    with pytest.raises(ValueError, match=r"batch 1: Residual cannot work on .*channels"):
        recalibrate(model, [images[:, :2]])
    broken = images.clone()
    broken[1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layer 'stem.0': .* is not finite in batch 2"):
        compensate(model, plan, [images, broken])
    with torch.no_grad():
        model.conv2.weight[:, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"layer 'conv2': what it takes or gives is not finite in batch 1"):
        compensate(model, plan, [images])
    assert not any(module._forward_hooks for module in model.modules())


class Skipping(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.first(x).relu()
        return self.head(self.second(x).relu() if len(x) > 4 else x + self.second.bias)


def test_batches_must_run_the_same_layers():
    model, x = Skipping(), torch.randn(8, 4)
    plan = half_of(model, x, "first")
    with pytest.raises(ValueError, match=r"batch 2 runs layer 'head' where batch 1 runs layer 'second'"):
        compensate(model, plan, [x, x[:4]])


def test_recalibration_is_a_plain_loop_of_means():
    model, images, plan = random_plan("residual")
    pruned = prune(model, plan)
    state = copy.deepcopy(pruned.state_dict())
    data = [images_like(images, count, count) for count in (8, 16, 4)]
    made = recalibrate(pruned, data)
    assert all(torch.equal(value, state[key]) for key, value in pruned.state_dict().items())
    reference = copy.deepcopy(pruned)
    sums = {name: [0, 0, 0] for name, m in reference.named_modules() if isinstance(m, nn.BatchNorm2d)}

    def add(name, taken):
        n = taken.numel() // taken.shape[1]
        moments = n, n * taken.mean((0, 2, 3)), n * taken.var((0, 2, 3))
        sums[name] = [total + new for total, new in zip(sums[name], moments, strict=True)]

    for name in sums:
        reference.get_submodule(name).register_forward_pre_hook(lambda _m, args, name=name: add(name, args[0]))
        reference.get_submodule(name).train()
    with torch.no_grad():
        for batch in data:
            reference(batch)
    for name, (n, mean, variance) in sums.items():
        torch.testing.assert_close(made.get_submodule(name).running_mean, mean / n, rtol=0, atol=1e-10)
        torch.testing.assert_close(made.get_submodule(name).running_var, variance / n, rtol=0, atol=1e-10)
    assert made.bn1.momentum == pruned.bn1.momentum and not made.training
    with pytest.raises(ValueError, match="no batch norm"):
        recalibrate(network("mlp_layernorm")[0], [images])
    with pytest.raises(ValueError, match=r"norm 'stem.1': its new statistics are not finite"):
        recalibrate(pruned, [images * float("nan")])


def test_recalibration_leaves_norms_that_no_batch_reaches():
    model, x = nn.ModuleDict({"used": nn.BatchNorm1d(3), "unused": nn.BatchNorm1d(3)}), torch.randn(8, 3)
    model["unused"].running_mean.fill_(5)
    made = recalibrate(model, [Forward(lambda model, x: model["used"](x), x)])
    assert torch.equal(made["unused"].running_mean, model["unused"].running_mean)
    torch.testing.assert_close(made["used"].running_mean, x.mean(0))


@pytest.mark.parametrize("name", NETWORKS)
def test_equivalent_pruning_begins_where_compensation_ends(name):
    model, images, plan = random_plan(name)
    made = compensate(model, plan, [images_like(images, 32)])
    equivalent = EquivalentModel(model, plan, start=made)
    assert all(isinstance(mixed, MixedLayer) for mixed in equivalent.mixed_layers.values())
    torch.testing.assert_close(equivalent(images), made(images), rtol=0, atol=1e-10)
    merged = equivalent.merge()
    torch.testing.assert_close(merged(images), made(images), rtol=0, atol=1e-10)
    assert list(merged.state_dict()) == list(made.state_dict())
    plain = EquivalentModel(model, plan)
    moved = [
        (mixed.decompressor - plain.mixed_layers[key].decompressor).abs().max()
        for key, mixed in equivalent.mixed_layers.items()
        if mixed.decompressor is not None
    ]
    assert max(moved) > 1e-3


@pytest.mark.parametrize("name", LAYERS | ALONE)
def test_every_layer_begins_at_its_compensated_weights_and_merges_what_it_has_learned(name):
    model, inputs = chain(name, nn.Tanh())
    plan = half_of(model, inputs, "0", "2" if name in LAYERS else "4")
    made = compensate(model, plan, [inputs])
    state = copy.deepcopy(made.state_dict())
    equivalent = EquivalentModel(model, plan, start=made)
    torch.testing.assert_close(equivalent(inputs), made(inputs), rtol=0, atol=1e-10)
    optimizer = torch.optim.SGD(equivalent.parameters(), lr=0.1)
    equivalent(inputs).square().mean().backward()
    optimizer.step()
    merged = equivalent.merge()
    torch.testing.assert_close(merged(inputs), equivalent(inputs), rtol=0, atol=1e-10)
    assert (merged(inputs) - made(inputs)).abs().max() > 1e-4
    assert [(k, v.shape) for k, v in merged.state_dict().items()] == [(k, v.shape) for k, v in state.items()]
    assert all(torch.equal(value, state[key]) for key, value in made.state_dict().items())


def test_attention_begins_where_compensation_ends():
    torch.manual_seed(0)
    model, tokens = Attending().double(), torch.randn(6, 8, 5).double()
    plan = half_of(model, tokens, "stem")
    made = compensate(model, plan, [tokens])
    torch.testing.assert_close(EquivalentModel(model, plan, start=made)(tokens), made(tokens), rtol=0, atol=1e-10)


def test_decompressors_alone_carry_what_a_mixture_of_channels_can():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 20, 1), nn.Tanh(), nn.Conv2d(20, 4, 1)).double()
    inputs = torch.randn(8, 3, 6, 6).double()
    plan = half_of(model, inputs, "0")
    made = compensate(model, plan, [inputs])
    mixed = EquivalentModel(model, plan, start=made).mixed_layers["2"]
    torch.testing.assert_close(mixed.weight, EquivalentModel(model, plan).mixed_layers["2"].weight, rtol=0, atol=1e-10)


def test_steps_score_what_compensation_leaves():
    model, images, _ = random_plan("residual")
    data = [(images_like(images, 32), torch.arange(32) % 5)]
    first = make_plan(score_groups(model, find_groups(model, images[:1]), "taylor", data), ratio=0.25)
    made = compensate(model, first, data)
    left = first.channels - first.channels_removed
    more = (int(0.5 * first.channels) - first.channels_removed) / left
    second = make_plan(score_groups(made, first.pruned_groups(), "taylor", data), ratio=more)
    options = {"criterion": "taylor", "ratio": 0.5, "steps": 2, "progress": False}
    found = prune_to(model, images[:1], data, compensate=True, **options)
    assert found == first.then(second) != prune_to(model, images[:1], data, **options)
    with pytest.raises(ValueError, match="compensate=True needs batches"):
        prune_to(model, images[:1], compensate=True, **options)


def test_a_start_of_another_plan_is_refused():
    model, images, plan = random_plan("residual")
    with pytest.raises(ValueError, match=r"the start is not what the plan leaves of the model: '.*weight' is"):
        EquivalentModel(model, plan, start=model)
