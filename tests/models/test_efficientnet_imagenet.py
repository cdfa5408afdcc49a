"""The benchmark on real weights and images, where they are, with few images."""

from pathlib import Path

import pytest
import torch
from efficientnet_imagenet import Options, halves, run
from PIL import Image

DATA = Path(__file__).parents[3] / "shared" / "data"
WEIGHTS = DATA / "weights" / "tf_efficientnet_lite0_imagenet.safetensors"


def test_no_image_is_in_both_halves(tmp_path):
    for index in range(1000):
        folder = tmp_path / "val" / f"n{index:04}"
        folder.mkdir(parents=True)
        if index:
            (folder / "image.jpg").symlink_to(tmp_path / "val" / "n0000" / "image.jpg")
        else:
            Image.new("RGB", (32, 32), (index % 255, 0, 0)).save(folder / "image.jpg")
    data = halves(tmp_path, size=32, limit=500, seed=0)
    assert len(data.train) == len(data.val) == 500
    assert not set(data.train.paths) & set(data.val.paths)
    assert len(set(data.train.labels.tolist() + data.val.labels.tolist())) == 1000
    again, other = (halves(tmp_path, size=32, limit=10, seed=seed).val for seed in (0, 1))
    assert torch.equal(again.labels, data.val.labels[:10]) and not torch.equal(other.labels, again.labels)


if WEIGHTS.is_file():

    @pytest.mark.slow
    def test_efficientnet_loses_a_fifth_of_its_macs():
        options = Options(WEIGHTS, DATA / "imagenet_sample", steps=2, batches=2, batch_size=8, limit=50)
        found = run(options)
        assert found["macs"]["pruned"] <= 0.8 * found["macs"]["original"] < 1.02 * found["macs"]["pruned"]
        assert found["macs"]["EP, merged"] == found["macs"]["pruned"]
        assert all(row["ok"] for row in found["check"])
        assert max(found["largest logit difference to pruned"].values()) < 1e-3
        assert found["metrics"]["original"]["accuracy"] > 0.7
        assert found["metrics"]["EP, start"]["accuracy"] == found["metrics"]["pruned"]["accuracy"]
        assert "results" not in str(found["options"])
