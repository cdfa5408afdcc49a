import copy

import pytest
import torch
from networks import NETWORKS, network
from oracles_pruning import Inserted, inserted
from test_plan import random_plan
from test_pruning import Tied
from torch import nn

from obc_tools import EquivalentModel, PruningPlan, find_groups, prune, prune_to
from obc_tools.layers import from_mixing, to_mixing


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
        torch.testing.assert_close(from_mixing(twin.layer, mixed.weight), twin.layer.weight, rtol=0, atol=1e-10)
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
    mixed = to_mixing(layer, layer.weight, stride)
    assert mixed.shape[3] * mixed.shape[0] * (stride if isinstance(layer, nn.Linear) else 1) == (
        layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    )
    assert torch.equal(from_mixing(layer, mixed), layer.weight)
    assert from_mixing(layer, mixed).is_contiguous()


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
    tied, x = Tied(), torch.randn(2, 6)
    plan = prune_to(tied, x, criterion="l1", ratio=0.4, steps=1, progress=False)
    with pytest.raises(ValueError, match=r"its weight is shared with another layer"):
        EquivalentModel(tied, plan)
