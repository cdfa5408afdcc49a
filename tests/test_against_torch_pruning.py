"""Our criteria beside torch_pruning's: equal where its own is right, and where it is not, the difference shown."""

import pytest
import torch
import torch_pruning as tp
from networks import network
from oracles_pruning import graph_groups
from torch import nn
from torch.nn import functional as F

from obc_tools import CRITERIA, Criterion, find_groups, score_groups

LABELS = torch.tensor([0, 1, 2, 3])


def theirs(model, images, importance):
    """Return torch_pruning's score of each group, by the name of its root."""
    return {name: importance(group) for name, group in graph_groups(model, images).items()}


def assert_same(ours, found):
    compared = [group for group in ours if group.prunable]
    assert compared
    for group in compared:
        torch.testing.assert_close(ours[group].float(), found[group.root.layer].float(), msg=str(group.root))


@pytest.mark.parametrize("name", ["small_vgg", "residual", "concat"])
@pytest.mark.parametrize(
    ("criterion", "importance"),
    [
        ("l1", tp.importance.GroupMagnitudeImportance(p=1, group_reduction="sum", normalizer=None)),
        ("l2", tp.importance.GroupMagnitudeImportance(p=2, group_reduction="sum", normalizer=None)),
        ("lamp", tp.importance.LAMPImportance(group_reduction="sum")),
    ],
)
def test_weight_criteria_agree(name, criterion, importance):
    model, images = network(name)
    assert_same(score_groups(model, find_groups(model, images), criterion), theirs(model, images, importance))


def test_bn_scale_agrees():
    model, images = network("residual")
    importance = tp.importance.BNScaleImportance(group_reduction="sum", normalizer=None)
    assert_same(score_groups(model, find_groups(model, images), "bn_scale"), theirs(model, images, importance))


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
def test_obdc_agrees_for_the_same_labels():
    # torch_pruning's own fails on layers with a bias.
    layers = [nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(), nn.Conv2d(6, 8, 3, bias=False), nn.ReLU(), nn.Flatten()]
    torch.manual_seed(0)
    model = nn.Sequential(*layers, nn.Linear(128, 5, bias=False)).double()
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    generator = torch.Generator().manual_seed(7)
    labels = torch.multinomial(model(images).detach().double().softmax(-1), 1, generator=generator).squeeze(-1)
    importance = tp.importance.OBDCImportance(group_reduction="sum", normalizer=None, num_classes=5)
    for layer in (module for module in model if isinstance(module, nn.Conv2d | nn.Linear)):
        importance.modules.append(layer)
        layer.register_forward_pre_hook(importance._save_input)
        layer.register_backward_hook(importance._save_grad_output)
    F.cross_entropy(model(images), labels).backward()
    importance.step()
    importance._rm_hooks(model)
    ours = score_groups(model, find_groups(model, images), "obdc", [(images, LABELS)], seed=7)
    assert_same(ours, theirs(model, images, importance))
    other = score_groups(model, find_groups(model, images), "obdc", [(images, LABELS)], seed=8)
    assert any(not torch.equal(ours[group], other[group]) for group in ours)


def test_torch_prunings_taylor_ignores_norms_and_biases():
    model, images = network("small_vgg")
    groups = find_groups(model, images)
    ours = score_groups(model, groups, "taylor", [(images, LABELS)])
    F.cross_entropy(model(images), LABELS).backward()
    found = theirs(model, images, tp.importance.GroupTaylorImportance(group_reduction="sum", normalizer=None))
    first, conv, after = next(iter(ours)), model[0], model[3]
    weights = (conv.weight * conv.weight.grad).abs().sum((1, 2, 3)) + (after.weight * after.weight.grad).abs().sum(
        (0, 2, 3)
    )
    torch.testing.assert_close(found["0"].double(), weights.detach(), rtol=1e-5, atol=0)
    alive = weights > 0
    assert alive.any() and (ours[first][alive] > 1.001 * weights[alive]).all()


def test_torch_prunings_hessian_keeps_only_the_last_image():
    model, images = network("small_vgg")
    groups = find_groups(model, images)
    importance = tp.importance.GroupHessianImportance(group_reduction="sum", normalizer=None)
    for loss in F.cross_entropy(model(images), LABELS, reduction="none"):
        model.zero_grad()
        loss.backward(retain_graph=True)
        importance.accumulate_grad(model)
    found = theirs(model, images, importance)
    without_biases = Criterion("no biases", "squares", lambda m, a, e: (e.weights.square() * e.weight_squares).sum(1))
    last = score_groups(model, groups, without_biases, [(images[-1:], LABELS[-1:])])
    all_images = score_groups(model, groups, without_biases, [(images, LABELS)])
    assert_same(last, found)
    assert all((all_images[group] > 1.01 * last[group]).any() for group in groups if group.prunable)


def test_torch_prunings_fpgm_measures_between_squared_weights():
    model, images = network("small_vgg")
    group = find_groups(model, images)[0]
    found = theirs(model, images, tp.importance.FPGMImportance(group_reduction="sum", normalizer=None))["0"]
    out, into = model[0].weight.flatten(1), model[3].weight.transpose(0, 1).flatten(1)

    def distances(weights):
        return torch.stack([(weights - row).norm(dim=1).sum() for row in weights])

    squared = (distances(out.square()) + distances(into.square())).detach()
    plain = (distances(out) + distances(into)).detach()
    torch.testing.assert_close(found.double(), squared, rtol=1e-4, atol=0)
    torch.testing.assert_close(score_groups(model, [group], "fpgm")[group], plain)
    assert not torch.equal(plain.argsort(), squared.argsort())


def test_every_criterion_of_torch_pruning_is_here():
    names = {"taylor", "hessian", "obdc", "l1", "l2", "fpgm", "bn_scale", "lamp", "random"}
    assert set(CRITERIA) == names | {"jacobian", "whc", "residual"}
    assert CRITERIA["obdc"].applies(nn.Linear(1, 1)) and not CRITERIA["obdc"].applies(nn.BatchNorm2d(1))
