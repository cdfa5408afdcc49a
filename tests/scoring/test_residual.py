import pytest
import torch
from networks import network
from torch import nn

from obc_tools import find_groups, make_plan, score_groups
from obc_tools.scoring.residual import RIDGE


def chain(kind="linear"):
    """Return a network with six channels in the middle, groups of it, and one batch."""
    torch.manual_seed(0)
    layers = {
        "linear": lambda: [nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)],
        "conv": lambda: [nn.Conv2d(5, 6, 1), nn.Tanh(), nn.Conv2d(6, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1)],
        "flattened": lambda: [nn.Conv2d(5, 6, 1), nn.Tanh(), nn.Flatten(), nn.Linear(54, 4)],
        "grouped": lambda: [nn.Conv2d(5, 6, 1), nn.Tanh(), nn.Conv2d(6, 4, 3, groups=2), nn.AdaptiveAvgPool2d(1)],
    }[kind]()
    model = nn.Sequential(*layers, nn.Flatten()).double()
    inputs = torch.randn(40, 5, *([] if kind == "linear" else [3, 3])).double()
    return model, find_groups(model, inputs), (inputs, torch.randint(4, (40,)))


def rows_of(model, batch, kind):
    """Return x and ε at the reader of the six channels, (positions, 6), by autograd on the activation itself."""
    x = model[:2](batch[0]).detach().requires_grad_()
    nn.functional.cross_entropy(model[2:](x), batch[1], reduction="sum").backward()
    return [t if kind == "linear" else t.movedim(1, -1) for t in (x.detach(), x.grad)]


def lost(x, gradients, gone, blocks=1):
    """Return tr(M R), R the covariance of what least squares on the kept channels miss; both (examples, ..., 6)."""
    x, gradients = (t.unsqueeze(1).flatten(1, -2) if t.dim() == 2 else t.flatten(1, -2) for t in (x, gradients))
    rows = (x - x.mean((0, 1))).flatten(0, 1)
    own = (gradients * (x - x.mean((0, 1)))).sum(1).square().sum(0)
    factors = (own / (rows.square().mean(0) * gradients.square().sum((0, 1)))).sqrt()
    slopes = factors * gradients.flatten(0, 1)
    total = 0.0
    for block in torch.arange(x.shape[-1]).chunk(blocks):
        out = [c for c in block.tolist() if c in gone]
        kept = [c for c in block.tolist() if c not in gone]
        missing = rows[:, out]
        if kept:
            missing = missing - rows[:, kept] @ torch.linalg.lstsq(rows[:, kept], missing).solution
        total += ((slopes[:, out].T @ slopes[:, out]) * (missing.T @ missing)).sum().item() / len(rows)
    return total


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_it_is_what_greedy_removal_with_least_squares_loses(kind):
    model, groups, batch = chain(kind)
    score = score_groups(model, groups, "residual", [batch])[groups[0]]
    x, gradients = rows_of(model, batch, kind)
    gone, last, level = [], 0.0, 0.0
    for _ in range(5):
        losses = {c: lost(x, gradients, [*gone, c]) for c in range(6) if c not in gone}
        channel = min(losses, key=losses.get)
        level = max(level, losses[channel] - last)
        assert score[channel].item() == pytest.approx(level, rel=1e-7)
        gone, last = [*gone, channel], losses[channel]
    assert score[sum(range(6)) - sum(gone)] == score.max()


def test_groups_of_a_convolution_make_up_for_their_own_channels_alone():
    model, groups, batch = chain("grouped")
    assert groups[0].blocks == 2
    score = score_groups(model, groups, "residual", [batch])[groups[0]]
    x, gradients = rows_of(model, batch, "grouped")
    pairs = [[c, c + 3] for c in range(3)]
    singles = [lost(x, gradients, [c], 2) + lost(x, gradients, [c + 3], 2) for c in range(3)]
    first = min(range(3), key=singles.__getitem__)
    assert score[pairs[first]].tolist() == pytest.approx([singles[first] / 2] * 2, rel=1e-7)
    assert score[pairs[first]].max() == score.min()


def test_a_flattened_channel_is_an_image_of_positions():
    model, groups, batch = chain("flattened")
    score = score_groups(model, groups, "residual", [batch])[groups[0]]
    x, gradients = rows_of(model, batch, "flattened")
    assert x.shape == (40, 3, 3, 6)
    centred = (x - x.mean(0)).flatten(1, 2)  # each position is an input of its own, with a mean of its own
    own = (gradients.flatten(1, 2) * centred).square().sum(0) / centred.square().mean(0)
    precision = torch.linalg.inv(centred.flatten(0, 1).T @ centred.flatten(0, 1) / 360)
    assert score.min().item() == pytest.approx((own.sum(0) / precision.diagonal()).min().item(), rel=1e-7)


def test_mixtures_of_others_lose_nothing_until_the_others_go():
    model, groups, batch = chain()
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias):
            tensor[1] = tensor[0]
            tensor[3] = 0
    score = score_groups(model, groups, "residual", [batch])[groups[0]]
    scale = score.max()
    order = score.argsort()
    assert set(order[:2].tolist()) in ({0, 3}, {1, 3}) and score[order[1]] < 100 * RIDGE * scale
    assert score[order[2]] > 1e-3 * scale


@pytest.mark.parametrize("mean", [0, 10])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", range(4))
def test_as_many_channels_lose_nothing_as_are_mixtures_of_others(seed, dtype, mean):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        model[0].weight[1::2] = torch.randn(4, 4).double() @ model[0].weight[::2]
        model[0].bias += mean
        model[1].bias -= mean * model[1].weight.sum(1)
    inputs = torch.randn(200, 10).to(dtype)
    model = model.to(dtype)
    groups = find_groups(model, inputs)
    score = score_groups(model, groups, "residual", [(inputs, torch.randint(3, (200,)))])[groups[0]].sort().values
    assert score[3] < 0.1 * score[4] and score[4] > 1e-2 * score.max()


class Branching(nn.Module):
    """Six channels that two layers read, one of them behind an activation."""

    def __init__(self):
        super().__init__()
        self.first, self.left, self.right = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        x = self.first(x)
        return self.left(x) + self.right(x.relu())


def test_consumers_add_up():
    torch.manual_seed(0)
    model = Branching().double()
    batch = torch.randn(60, 5).double(), torch.randint(4, (60,))
    groups = find_groups(model, batch[0])
    score = score_groups(model, groups, "residual", [batch])[groups[0]]
    x = model.first(batch[0]).detach()
    left, right = x.clone().requires_grad_(), x.relu().requires_grad_()
    nn.functional.cross_entropy(model.left(left) + model.right(right), batch[1], reduction="sum").backward()
    least = min(lost(left.detach(), left.grad, [c]) + lost(right.detach(), right.grad, [c]) for c in range(6))
    assert score.min().item() == pytest.approx(least, rel=1e-6)


def test_batches_add_up_and_the_model_is_left_alone():
    model, images = network("residual")
    images, labels = torch.randn(64, *images.shape[1:]).double(), torch.randint(5, (64,))
    groups = find_groups(model, images)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    whole = score_groups(model, groups, "residual", [(images, labels)])
    halves = score_groups(model, groups, "residual", [(images[:20], labels[:20]), (images[20:], labels[20:])])
    for group in groups:
        torch.testing.assert_close(whole[group], halves[group], rtol=1e-6, atol=0)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert make_plan(whole, ratio=0.5).channels_removed > 0


def test_what_it_does_not_go_with_is_refused():
    model, groups, batch = chain()
    with pytest.raises(ValueError, match=r"group_reduction='mean': criterion 'residual' already joins the members"):
        score_groups(model, groups, "residual", [batch], group_reduction="mean")
    with pytest.raises(ValueError, match="criterion 'residual' needs residuals: give it batches"):
        score_groups(model, groups, "residual")
