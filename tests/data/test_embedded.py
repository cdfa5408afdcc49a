"""The embedded data: what is known of it, that it is always the same, and that held-out parts are in no other."""

import pytest
import torch

from obc_tools import load_data
from obc_tools.data.embedded import ALPHABET, END, caption, encode_caption, hold_out_digits, module_files, read_digits


@pytest.mark.parametrize("name", ["digit_scenes", "digit_captions", "stdlib_text"])
def test_a_seed_fixes_every_batch(name):
    one, other = (next(iter(load_data(name).batches("train", 3, seed=5))) for _ in range(2))
    leaves, others = torch.utils._pytree.tree_leaves(one), torch.utils._pytree.tree_leaves(other)
    assert all(torch.equal(a, b) for a, b in zip(leaves, others, strict=True))
    with pytest.raises(ValueError, match=f"{name} is made of what is installed, ready as it is"):
        load_data(name, "somewhere")


def test_boxes_lie_tight_around_the_ink_of_their_digits():
    data = load_data("digit_scenes")
    assert (len(data.train), len(data.val), len(data.classes)) == (1200, 300, 11) and data.image_shape == (3, 64, 64)
    images, targets = next(iter(data.batches("val", 300, shuffle=False)))
    assert images.min() >= 0 and images.max() <= 1 and images.dtype == torch.float32
    counts = set()
    for target in targets:
        counts.add(len(target["boxes"]))
        left = target["mask"].clone()
        for (x0, y0, x1, y1), label in zip(target["boxes"].long().tolist(), target["labels"].tolist(), strict=True):
            ink = left[y0:y1, x0:x1] == label
            assert ink[0].any() and ink[-1].any() and ink[:, 0].any() and ink[:, -1].any()
            left[y0:y1, x0:x1] = 0
        assert not left.any()
    assert counts == {1, 2, 3, 4}


def test_held_out_digits_are_those_of_digits():
    _, labels = read_digits()
    chosen = hold_out_digits(labels)
    assert int(chosen.sum()) == len(load_data("digits").val)


def test_captions_say_which_digits_and_fit():
    texts = {caption(left, right) for left in range(10) for right in range(10)}
    assert len(texts) == 100 and "three left of seven" in texts
    tokens = torch.stack([encode_caption(text) for text in sorted(texts)])
    assert tokens.shape == (100, 24) and (tokens.max(1).values == END).all() and (tokens == END).sum() == 100
    back = "".join(ALPHABET[token - 1] for token in encode_caption("nine left of two").tolist() if 0 < token < END)
    assert back == "nine left of two"
    images, tokens = next(iter(load_data("digit_captions").batches("train", 4)))
    assert images.shape == (4, 3, 32, 32) and tokens.shape == (4, 24)


def test_whole_modules_are_held_out():
    train, held_out = module_files()
    assert not set(train) & set(held_out) and len(train) > 5 * len(held_out) > 0
    data = load_data("stdlib_text")
    (tokens,) = data.limited(val=2).batches("val", 2, shuffle=False)
    text = b"".join(path.read_bytes() for path in held_out)
    assert bytes(tokens[0].tolist()) in text and tokens.dtype == torch.int64 and tokens.shape == (2, 256)
    assert len(data.val) == len(text) // 256
