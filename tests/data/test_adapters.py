"""`as_data`: tensors, data sets and loaders as `Data`, their passes, and what is no data set."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
)
from trainings import network

from obc_tools import (
    InteractionExplorer,
    JTJExplorer,
    PruningStudio,
    as_data,
    compare_criteria,
    fit,
    load_data,
    take,
)
from obc_tools.data.batches import count_examples, cut_batch, first_examples, inputs_and_targets, with_inputs_of
from obc_tools.training.recipe import Recipe


def images(n=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 6, 6, generator=g, dtype=torch.float64), torch.arange(n) % 3


class Sequences(Dataset):
    """Token lists of varying length."""

    classes = ("first", "second")

    def __len__(self):
        return 7

    def __getitem__(self, position):
        return torch.full((position + 1,), position)


def pad(examples):
    return torch.nn.utils.rnn.pad_sequence(examples, batch_first=True)


GIVEN = {
    "tensors": lambda: images(),
    "a data set": lambda: TensorDataset(*images()),
    "a loader": lambda: DataLoader(TensorDataset(*images()), 4, shuffle=True),
    "a loader with workers' collating": lambda: DataLoader(
        TensorDataset(*images()), 4, collate_fn=lambda rows: tuple(map(torch.stack, zip(*rows, strict=True)))
    ),
    "a list-like data set": lambda: DataLoader([*zip(*images(), strict=True)], 4),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_passes_are_fixed_by_the_seed_alone(kind):
    data = as_data(GIVEN[kind](), images(6, seed=1))
    before = torch.get_rng_state()
    batches = data.batches("train", 8, seed=3)
    first, second = list(batches), list(batches)
    assert torch.equal(torch.get_rng_state(), before)
    assert [count_examples(batch) for batch in first] == [8, 8, 4]
    everything, labels = images()
    order = torch.cat([(batch[0][:, None] == everything[None]).flatten(2).all(2).int().argmax(1) for batch in first])
    assert sorted(order.tolist()) == list(range(20)) != order.tolist()
    assert torch.equal(torch.cat([batch[1] for batch in first]), labels[order])
    assert not torch.equal(first[0][0], second[0][0])
    again = list(as_data(GIVEN[kind](), None).batches("train", 8, seed=3).at(0, 1))
    assert all(torch.equal(one, other) for one, other in zip(again[0], first[1], strict=True)) and len(again) == 2
    halves = [list(data.batches("train", 8, seed=3, share=(part, 2)).at(0)) for part in (0, 1)]
    assert torch.equal(torch.stack([half[0][0] for half in halves], 1).flatten(0, 1), first[0][0])


@pytest.mark.parametrize("kind", ["tensors", "examples"])
def test_a_loader_of_a_part_of_its_data_set_is_that_part(kind):
    everything, labels = images()
    given = TensorDataset(everything, labels) if kind == "tensors" else [*zip(everything, labels, strict=True)]
    held_out = [3, 7, 11, 19]
    data = as_data(DataLoader(given, 4), DataLoader(given, 2, sampler=SubsetRandomSampler(held_out)))
    assert (len(data.train), len(data.val)) == (20, 4)
    (batch,) = data.batches("val", 4, shuffle=False)
    assert torch.equal(batch[0], everything[held_out]) and torch.equal(batch[1], labels[held_out])


def test_a_loader_that_may_leave_examples_out_is_refused():
    class Every(Sampler):
        def __iter__(self):
            return iter(range(0, 20, 2))

    given = TensorDataset(*images())
    for loader in (
        DataLoader(given, 4, sampler=Every()),
        DataLoader(given, batch_sampler=BatchSampler(Every(), 2, False)),
    ):
        with pytest.raises(ValueError, match=r"a DataLoader with a Every may leave examples out.*Subset\("):
            as_data(loader)
    whole = DataLoader(given, batch_sampler=BatchSampler(RandomSampler(given), 2, drop_last=False))
    assert len(as_data(whole).train) == 20 and len(as_data(DataLoader(given, batch_size=None)).train) == 20


def test_structures_stay():
    tokens = torch.arange(12).view(6, 2)
    (batch,) = as_data(tokens).batches("train", 6, shuffle=False)
    assert torch.equal(batch, tokens)
    (batch,) = as_data({"input_ids": tokens, "labels": tokens[:, 0]}).batches("train", 6, shuffle=False)
    assert torch.equal(batch["input_ids"], tokens) and torch.equal(batch["labels"], tokens[:, 0])
    padded = list(as_data(Sequences(), collate=pad).batches("train", 4, shuffle=False))
    assert [batch.shape for batch in padded] == [(4, 4), (3, 7)]


def test_what_is_known_of_the_data():
    data = as_data(images(), images(6), name="mine")
    assert repr(data) == "Data('mine', train=Examples(20), val=Examples(6), 3 classes)"
    assert data.image_shape == (3, 6, 6) and data.classes == ("0", "1", "2")
    assert as_data(Sequences(), collate=pad).classes == ("first", "second")
    assert as_data(torch.zeros(3, 2)).classes == () and as_data(torch.zeros(3, 2), classes=["a"]).classes == ("a",)
    some = as_data(TensorDataset(*images()), Sequences(), collate=pad).limited(train=5, val=2)
    assert (len(some.train), len(some.val)) == (5, 2)
    digits = load_data("digits")
    assert as_data(digits) is digits


def test_data_of_one_s_own_goes_where_data_goes(tmp_path):
    data = as_data(DataLoader(TensorDataset(*images()), 4), DataLoader(TensorDataset(*images(6, seed=1)), 4))
    model = network()
    fit(model, data.batches("train", 5), data.batches("val", 5), Recipe(epochs=1), progress=False)
    options = {"batches": 2, "batch_size": 5, "steps": 2, "ratio": 0.5, "progress": False}
    found = compare_criteria(model, data, ["l1", "random"], repeats=1, folder=tmp_path, **options)
    assert found.settings["data"] == "data" and len(found.frame) == 6
    assert len(list(take(data.batches("train", 5), 3))) == 3


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Stream(), "a Stream holds no examples that could be drawn by number; pass a DataLoader"),
        (
            [images()] * 2,
            r"a list may hold batches or examples; pass .* tensors, \(images, labels\), whose",
        ),
        ("digits", "'digits' is a name or a path, load_data reads such; or pass a DataLoader"),
        (Path("images"), "'images' is a name or a path, load_data reads such"),
        (torch.nn.Sequential(torch.nn.ReLU()), "a Sequential holds no examples"),
        (torch.utils.data.TensorDataset, "TensorDataset is a class, not an instance of it; pass a DataLoader"),
        (pd.DataFrame({"pixel": [1.0]}), "a DataFrame holds no examples"),
        (np.array(["a", "b"]), "an array of <U1 is no tensor; pass numbers"),
        (None, "there are neither train nor val examples"),
        (iter([1]), "a list_iterator holds no examples"),
        ((DataLoader([1]), DataLoader([1])), "a tuple holds no examples.*; two of them as as_data"),
        ((torch.zeros(3), torch.zeros(4)), r"tensors of \[3, 4\] examples; expected equally many, at least 1"),
        (torch.zeros(0, 4), r"tensors of \[0\] examples"),
    ],
    ids=[
        *("stream", "batches", "name", "path", "model", "class", "frame", "words"),
        *("none", "iterator", "loaders", "unequal", "empty"),
    ],
)
def test_what_holds_no_examples_is_refused(given, message):
    with pytest.raises(ValueError, match=f"^as_data: {message}"):
        as_data(given)


@pytest.mark.parametrize("wanted", [PruningStudio, JTJExplorer, InteractionExplorer, compare_criteria])
def test_no_data_is_a_type_error_that_names_the_adapter(wanted):
    options = {"criteria": ["l1"]} if wanted is compare_criteria else {}
    for given in ("digits", [images()], 5, None, network(), DataLoader, np.array([None])):
        with pytest.raises(TypeError, match="^as_data: "):
            wanted(network(), given, **options)


def test_arrays_are_tensors():
    everything, labels = images()
    data = as_data((everything.numpy(), labels.numpy()), everything.float().numpy())
    assert data.image_shape == (3, 6, 6) and data.classes == ("0", "1", "2")
    (batch,) = data.batches("train", 20, shuffle=False)
    assert torch.equal(batch[0], everything.float()) and torch.equal(batch[1], labels)
    assert next(iter(data.batches("val", 20))).dtype == torch.float32


def test_fewer_batches_than_usual_are_all_that_are_compared_on():
    data, settings = as_data(images(), images(6, seed=1)), {"batch_size": 4, "steps": 1, "ratio": 0.5, "repeats": 1}
    found = compare_criteria(network(), data, ["taylor"], progress=False, **settings)
    assert found.settings["batches"] == 5
    with pytest.raises(ValueError, match="a pass holds 5: ask for at most 5, or for smaller ones"):
        compare_criteria(network(), data, ["taylor"], progress=False, batches=50, **settings)


def test_classes_without_examples_can_be_told():
    pixels, labels = images()
    few, settings = (pixels, labels % 2), {"ratio": 0.5, "steps": 1, "batch_size": 4, "progress": False}
    with pytest.raises(ValueError, match=r"3 outputs, data has 2 classes; as_data\(train, val, classes=names\) tells"):
        compare_criteria(network(), as_data(few, few), ["l1"], **settings)
    told = as_data(few, few, classes=["a", "b", "c"])
    assert len(compare_criteria(network(), told, ["l1"], **settings).frame) == 2


def test_what_is_missing_is_said():
    with pytest.raises(ValueError, match=r"data was made without val examples: pass as_data\(train, val\)"):
        compare_criteria(network(), DataLoader(TensorDataset(*images()), 4), ["l1"])
    with pytest.raises(ValueError, match="data: only images with one label each are mixed or erased in here"):
        as_data(images()).batches("train", 4, augment=Recipe(epochs=1, mixup=0.2).augmentation)


def test_batches_are_cut_in_every_structure():
    batch = {"images": [torch.full((2,), n) for n in range(5)], "boxes": torch.arange(5), "name": "some"}
    pieces = cut_batch(batch, 2)
    assert [len(piece["images"]) for piece in pieces] == [3, 2] == [len(piece["boxes"]) for piece in pieces]
    assert pieces[1]["name"] == "some" and pieces[1]["images"][0][0] == 3
    pairs = cut_batch(([torch.zeros(2)] * 4, [{"boxes": torch.zeros(3, 4)}] * 4), 4)
    assert [(len(one), len(other)) for one, other in pairs] == [(1, 1)] * 4
    assert torch.equal(first_examples(torch.arange(5), 2), torch.arange(2))
    with pytest.raises(ValueError, match="a batch of 5 examples holds 3 of something: it cannot be cut in pieces"):
        cut_batch((torch.zeros(5), torch.zeros(3)), 2)


class Pair(NamedTuple):
    image: torch.Tensor
    label: torch.Tensor


@pytest.mark.parametrize("make", [tuple, list, Pair._make])
def test_inputs_in_another_precision_keep_their_structure(make):
    batch = make((torch.zeros(2, 3), torch.ones(2)))
    found = with_inputs_of(batch, torch.float64)
    assert type(found) is type(batch) and found[0].dtype == torch.float64 and found[1] is batch[1]


def test_inputs_and_targets_of_every_structure():
    x, y = torch.zeros(2, 3), torch.ones(2)
    assert inputs_and_targets((x, y)) == (x, y)
    inputs, targets = inputs_and_targets({"input_ids": x, "labels": y})
    assert [*inputs] == ["input_ids"] and targets is y
    assert inputs_and_targets((x,))[0] is x and inputs_and_targets(x)[0] is x and inputs_and_targets(x)[1] is None
