"""Mixing and erasing, shares of several processes, repeats: all fixed by the seed, the pass and the batch."""

from collections import Counter
from itertools import chain

import pytest
import torch
from PIL import Image

from obc_tools.data.batches import Augmentation, Batches, Sampling, augment_batches
from obc_tools.data.data import Data
from obc_tools.data.images import ImageFiles, Images, Normalization

PLAIN = Normalization((0.0,), (1 / 255,))


def numbered(count: int) -> Images:
    """Images whose every pixel is their number, of 4 classes."""
    pixels = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 1, 6, 6)
    return Images(pixels.contiguous(), torch.arange(count) % 4, padding=0, flip=False)


DATA = Data(numbered(23), numbered(7), tuple("abcd"), PLAIN, "numbers")


def flat(lists) -> list[int]:
    return sorted(chain.from_iterable(lists))


def numbers(batches) -> list[list[int]]:
    return [images[:, 0, 0, 0].int().tolist() for images, _ in batches]


def test_labels_are_mixed_as_the_images_are():
    """MixUp of images that are their numbers: the labels' shares say how much of which number is in each."""
    batches = DATA.batches("train", 8, augment=Augmentation(mixup=0.8))
    plain = DATA.batches("train", 8, augment=True)
    for (images, labels), (before, classes) in zip(batches.at(0), plain.at(0), strict=True):
        assert labels.shape == (len(images), 4)
        torch.testing.assert_close(labels.sum(1), torch.ones(len(images)))
        weight = labels.gather(1, classes[:, None])[:, 0]
        partners = before.roll(1, 0)
        other = classes.roll(1)
        same = other == classes
        expected = weight[:, None, None, None] * before + (1 - weight[:, None, None, None]) * partners
        torch.testing.assert_close(images[~same], expected[~same])


def test_mixing_erasing_and_repeating_are_fixed_by_seed_and_pass():
    chosen = Augmentation(mixup=0.2, cutmix=1.0, erase=0.5, repeats=2)
    state = torch.get_rng_state()
    one, same, other = (DATA.batches("train", 8, seed=seed, augment=chosen) for seed in (1, 1, 2))
    first, again, second, apart = list(one.at(0)), list(same.at(0)), list(one.at(1)), list(other.at(0))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], second[0][0]) and not torch.equal(first[0][0], apart[0][0])
    assert torch.equal(torch.get_rng_state(), state)
    tail = list(one.at(0, start=1))
    assert len(tail) == len(one.at(0, start=1)) == 2
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(tail, first[1:], strict=True))


def test_half_of_the_images_are_erased():
    ones = Images(torch.full((400, 1, 8, 8), 255, dtype=torch.uint8), torch.zeros(400, dtype=torch.int64))
    batches = Batches(lambda number: iter([(PLAIN(ones.pixels), ones.labels)]), 1)
    ((images, labels),) = augment_batches(batches, Augmentation(erase=0.5), 4, seed=0).at(0)
    erased = (images == 0).flatten(1).any(1)
    assert 160 <= erased.sum() <= 240
    assert torch.equal(labels, ones.labels)
    assert augment_batches(batches, Augmentation(), 4, seed=0) is batches


def test_repeated_images_share_a_pass():
    drawn = numbers(DATA.batches("train", 8, augment=Augmentation(crop=False, repeats=3)).at(0))
    counts = Counter(flat(drawn))
    assert sum(counts.values()) == 23
    assert set(counts.values()) == {3, 2}


@pytest.mark.parametrize("parts", [2, 4])
def test_shares_are_the_batches_of_one_process(parts):
    """What all processes see in a step is what one sees, images left out at the end of a pass aside."""
    whole = numbers(DATA.batches("train", 8, seed=3).at(1))
    shares = [DATA.batches("train", 8, seed=3, share=(part, parts)) for part in range(parts)]
    assert {share.parts for share in shares} == {parts} == {share.first(1).parts for share in shares}
    together = [flat(batches) for batches in zip(*(numbers(share.at(1)) for share in shares), strict=True)]
    assert together[:2] == [sorted(batch) for batch in whole[:2]]
    left = 7 // parts * parts
    assert together[2] == sorted(whole[2][:left])
    held_out = [numbers(DATA.batches("val", 4, share=(part, parts))) for part in range(parts)]
    assert flat(map(flat, held_out)) == list(range(7))


def test_shares_of_augmented_images_are_cropped_as_one_process_crops_them():
    images = Images(torch.arange(23 * 36).view(23, 1, 6, 6).byte(), torch.arange(23) % 4, padding=2)
    data = Data(images, None, tuple("abcd"), PLAIN)
    whole = next(iter(data.batches("train", 8, augment=True).at(0)))[0]
    parts = [next(iter(data.batches("train", 8, augment=True, share=(part, 2)).at(0)))[0] for part in (0, 1)]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), whole)


def test_files_start_anywhere_in_a_pass_and_are_shared(tmp_path):
    for number in range(9):
        Image.new("RGB", (12, 12), (number, 0, 0)).save(tmp_path / f"{number}.png")
    files = ImageFiles(tuple(str(tmp_path / f"{n}.png") for n in range(9)), torch.arange(9) % 4, 8)
    data = Data(files, None, tuple("abcd"), Normalization((0.0,) * 3, (1 / 255,) * 3))
    whole = numbers(data.batches("train", 4, workers=0).at(2))
    assert numbers(data.batches("train", 4, workers=0).at(2, start=1)) == whole[1:]
    shares = [numbers(data.batches("train", 4, workers=0, share=(part, 2)).at(2)) for part in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == [sorted(batch) for batch in whole[:2]]
    changed = data.batches("train", 4, workers=0, augment=Augmentation(rand_augment=9))
    assert not torch.equal(next(iter(changed.at(0)))[0], next(iter(data.batches("train", 4, workers=0).at(0)))[0])


def test_splits_can_be_cut():
    only_val = Data(None, numbered(9), tuple("abcd"), PLAIN)
    halves = only_val.with_train_from_val()
    seen = [flat(numbers(halves.batches(split, 4, shuffle=False))) for split in ("train", "val")]
    assert sorted(seen[0] + seen[1]) == list(range(9)) and len(seen[0]) == 5
    few = DATA.limited(train=5, val=100)
    assert (len(few.train), len(few.val)) == (5, 7)
    assert numbers(few.batches("train", 5, shuffle=False)) == numbers(
        DATA.limited(train=5).batches("train", 5, shuffle=False)
    )
    with pytest.raises(ValueError, match="numbers has training images: leave the held-out ones alone"):
        DATA.with_train_from_val()
    with pytest.raises(ValueError, match="at least 1 image of a split is needed, not 0"):
        DATA.limited(val=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"erase": 1.5}, "erase=1.5: expected a share of images"),
        ({"mixup": -1.0}, "mixup=-1.0: expected a number of 0 or above"),
        ({"rand_augment": 31}, "rand_augment is 31; it is 0 to 30, and 0 without crop"),
        ({"rand_augment": 9, "crop": False}, "rand_augment is 9; it is 0 to 30, and 0 without crop"),
    ],
)
def test_an_augmentation_is_checked_when_built(values, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**values)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="numbers: RandAugment works on image files"):
        DATA.batches("train", 4, augment=Augmentation(rand_augment=9))
    with pytest.raises(ValueError, match="repeats must be at least 1, and 1 without shuffle, not 3"):
        DATA.batches("val", 4, augment=Augmentation(repeats=3))
    with pytest.raises(ValueError, match=r"share \(0, 3\) of batches of 4: part below parts, which divides the size"):
        Sampling(4, share=(0, 3))
