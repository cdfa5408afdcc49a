import pytest
import torch
import torch_pruning as tp
from networks import NETWORKS, network
from oracles_pruning import graph_groups
from torch import nn

from obc_tools import find_groups, score_groups
from obc_tools.interop import JacobianImportance, WHCImportance


def batches_for(images, classes=5):
    return [(images[:2], torch.tensor([0, 1])), (images[2:] * 2, torch.tensor([2, 3]))]


def loss_of(model, images, labels):
    out = model(images)
    return nn.functional.cross_entropy(out, labels) if out.dim() == 2 else out.square().mean()


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "upsampling"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "max", "prod", "first"])
def test_importances_agree_with_score_groups(name, reduction):
    model, images = network(name)
    batches = batches_for(images)
    groups = find_groups(model, images)
    expected = score_groups(model, groups, "jacobian", batches, group_reduction=reduction)
    importance = JacobianImportance(group_reduction=reduction).score(model, batches)
    found = graph_groups(model, images)
    for group in groups:
        if group.prunable:
            ours = importance(found[group.root.layer])
            torch.testing.assert_close(ours, expected[group].float(), msg=str(group))


def test_the_published_loop_gives_the_same_scores():
    model, images = network("residual")
    batches = batches_for(images)
    loop = JacobianImportance()
    loop.zero_grad()
    loop.zero_score()
    for batch in batches:
        model.zero_grad()
        loss_of(model, *batch).backward()
        loop.accumulate_grad(model)
    loop.accumulate_score(model)
    scored = JacobianImportance().score(model, batches)
    for group in graph_groups(model, images).values():
        torch.testing.assert_close(loop(group), scored(group))


def test_no_gradient_is_stored():
    model, images = network("small_vgg")
    importance = JacobianImportance()
    loss_of(model, images, torch.tensor([0, 1, 2, 3])).backward()
    importance.accumulate_grad(model)
    assert sum(value.numel() for value in importance._pending.values()) < 0.2 * sum(
        p.numel() for p in model.parameters()
    )


@pytest.mark.parametrize("interactive", [False, True])
@pytest.mark.parametrize("global_pruning", [False, True])
def test_torch_prunings_own_pruner_takes_it(interactive, global_pruning):
    model, images = network("residual")
    importance = JacobianImportance()
    pruner = tp.pruner.MetaPruner(
        model,
        images,
        importance,
        pruning_ratio=0.5,
        iterative_steps=2,
        global_pruning=global_pruning,
        ignored_layers=[model.fc],
        root_module_types=[nn.Conv2d, nn.Linear],
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
        customized_pruners={},
    )
    before = sum(p.numel() for p in model.parameters())
    for _ in range(2):
        importance.score(model, batches_for(images))
        if interactive:
            for group in pruner.step(interactive=True):
                group.prune()
        else:
            pruner.step()
    assert model(images).shape == (4, 5)
    assert sum(p.numel() for p in model.parameters()) < 0.6 * before


def test_whc_needs_no_data():
    model, images = network("small_vgg")
    groups = find_groups(model, images)
    expected = score_groups(model, groups, "whc")
    found = graph_groups(model, images)
    for group in groups:
        if group.prunable:
            torch.testing.assert_close(WHCImportance()(found[group.root.layer]), expected[group].float())


def test_what_is_missing_is_said():
    model, images = network("residual")
    importance = JacobianImportance()
    group = graph_groups(model, images)["conv1"]
    with pytest.raises(ValueError, match=r"a Conv2d was not scored: call score\(model, batches\)"):
        importance(group)
    with pytest.raises(ValueError, match="no parameter of the model holds a gradient"):
        importance.accumulate_grad(model)
    with pytest.raises(ValueError, match="no rows to score"):
        importance.accumulate_score(model)
    importance.score(model, batches_for(images))
    group.prune(idxs=[0, 1])
    with pytest.raises(ValueError, match=r"was scored with 6 channels and now has 4"):
        importance(graph_groups(model, images)["conv1"])
    with pytest.raises(ValueError, match="unknown group_reduction 'median'"):
        JacobianImportance("median")
    with pytest.raises(ValueError, match="unknown normalizer 'lamp'"):
        WHCImportance(normalizer="lamp")
