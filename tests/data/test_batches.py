"""Batches: passes that are new each time and the same every time, and taking the first few."""

import re

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from torchvision.transforms.v2 import functional as transforms

from obc_tools.data.batches import Batches, Sampling, crop_and_flip, take


def numbered(length: int = 4) -> Batches:
    """Batches whose images say which pass they are of, and whose labels say which batch they are."""

    def draw(pass_number: int):
        for index in range(length):
            yield torch.tensor(pass_number), torch.tensor(index)

    return Batches(draw, length)


def seen(batches) -> list[tuple[int, int]]:
    return [(int(images), int(labels)) for images, labels in batches]


def test_each_iteration_is_the_next_pass() -> None:
    batches = numbered(2)
    assert len(batches) == 2
    assert seen(batches) == [(0, 0), (0, 1)]
    assert seen(batches) == [(1, 0), (1, 1)]


def test_passes_that_overlap_in_time_do_not_mix() -> None:
    batches = numbered(2)
    first, second = iter(batches), iter(batches)
    assert seen([next(second), next(first), next(first), next(second)]) == [(1, 0), (0, 0), (0, 1), (1, 1)]


def test_a_pinned_pass_stays_and_moves_nothing() -> None:
    batches = numbered(1)
    pinned = batches.at(7)
    assert len(pinned) == 1
    assert seen(pinned) == seen(pinned) == [(7, 0)]
    assert seen(batches) == [(0, 0)]


def test_take_gives_the_first_batches_of_the_next_pass() -> None:
    batches = numbered()
    taken = take(batches, 2)
    assert len(taken) == 2
    assert seen(taken) == [(0, 0), (0, 1)]
    assert len(seen(batches)) == 4
    assert seen(taken) == [(2, 0), (2, 1)]
    assert seen(taken.at(9)) == [(9, 0), (9, 1)]
    assert seen(take(taken, 1)) == [(3, 0)]


def test_take_is_lazy() -> None:
    drawn = []

    def draw(pass_number: int):
        for index in range(9):
            drawn.append(index)
            yield torch.tensor(pass_number), torch.tensor(index)

    iterator = iter(take(Batches(draw, 9), 5))
    assert drawn == []
    next(iterator)
    assert drawn == [0]
    list(iterator)
    assert drawn == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("source", [list(numbered(3)), numbered(3).at(5), DataLoader(list(range(3)))])
def test_take_from_whatever_can_be_gone_through_again(source) -> None:
    taken = take(source, 2)
    assert isinstance(taken, Batches)
    expected = list(source)[:2]
    assert list(taken) == list(taken) == expected


@pytest.mark.parametrize("source", [lambda: iter([1, 2]), lambda: (i for i in [1, 2]), lambda: map(str, [1, 2])])
def test_take_refuses_what_can_be_gone_through_only_once(source) -> None:
    with pytest.raises(ValueError, match=r"take: a \w+ can be gone through only once; pass Batches, a DataLoader"):
        take(source(), 1)


@pytest.mark.parametrize("source", [numbered(4), list(range(4)), numbered(4).at(0)])
def test_take_says_how_many_batches_there_are(source) -> None:
    with pytest.raises(ValueError, match="take: 5 batches were asked for, a pass holds 4"):
        take(source, 5)
    with pytest.raises(ValueError, match="take: length=0: expected at least 1"):
        take(source, 0)


class Stream(IterableDataset):
    """A data set that does not know its length."""

    def __iter__(self):
        return iter(range(3))


def test_take_from_a_source_without_a_length_fails_where_it_ends() -> None:
    iterator = iter(take(DataLoader(Stream(), batch_size=None), 4))
    assert [next(iterator) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="take: 4 batches were asked for, a pass holds 3"):
        next(iterator)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "batch size=0: expected at least 1"),
        ({"size": -3}, "batch size=-3: expected at least 1"),
        ({"size": 1, "seed": -1}, "seed=-1: expected at least 0"),
    ],
)
def test_sampling_is_checked(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Sampling(**arguments)


def test_passes_are_counted_from_zero() -> None:
    with pytest.raises(ValueError, match="passes are counted from 0, there is no pass -1"):
        Sampling(1).generator(-1)


@pytest.mark.parametrize(("drop_last", "batches", "images"), [(False, 4, 10), (True, 3, 9)])
def test_the_last_batch(drop_last: bool, batches: int, images: int) -> None:
    sampling = Sampling(3, drop_last=drop_last)
    assert sampling.count(10) == batches
    assert sampling.order(10, sampling.generator(0)).tolist() == list(range(images))


def test_a_pass_without_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="no batch of 8 in 7 images: make batches smaller or keep the last one"):
        Sampling(8, drop_last=True).count(7)


def test_the_seed_and_the_pass_fix_the_order() -> None:
    def order(seed: int, pass_number: int) -> tuple[int, ...]:
        sampling = Sampling(8, seed, shuffle=True)
        return tuple(sampling.order(50, sampling.generator(pass_number)).tolist())

    assert order(1, 2) == order(1, 2)
    assert sorted(order(1, 2)) == list(range(50))
    assert len({order(seed, number) for seed in range(5) for number in range(5)}) == 25


def test_the_callers_random_state_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    sampling = Sampling(8, shuffle=True)
    sampling.order(50, sampling.generator(0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("channels", "height", "width", "padding"), [(3, 6, 6, 4), (1, 8, 5, 2), (2, 4, 7, 0)])
def test_crop_and_flip_against_one_image_at_a_time(channels: int, height: int, width: int, padding: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (20, channels, height, width), dtype=torch.uint8, generator=generator)
    shifts = torch.randint(2 * padding + 1, (20, 2), generator=generator)
    flips = torch.rand(20, generator=generator) < 0.5
    expected = []
    for image, (top, left), flip in zip(images, shifts.tolist(), flips.tolist(), strict=True):
        crop = transforms.crop(transforms.pad(image, padding), top, left, height, width)
        expected.append(transforms.horizontal_flip(crop) if flip else crop)
    found = crop_and_flip(images, shifts, flips, padding)
    assert found.dtype == torch.uint8
    assert torch.equal(found, torch.stack(expected))
