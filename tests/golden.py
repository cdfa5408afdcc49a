"""Expected scores, and the published network that some of them are of."""

from pathlib import Path

import torch

from obc_tools.structure.layers import LayerAxis

DATA = Path(__file__).parent / "data"
SHARED = Path(__file__).parents[2] / "shared"
RESNET56 = SHARED / "golden" / "resnet56_cifar10.npz"
PUBLISHED = SHARED / "data" / "weights" / "reg_cifar10_resnet56_Jacobian_0.0005.pth"


def golden_batches(golden, images: torch.Tensor):
    labels, size = torch.from_numpy(golden["labels"]), int(golden["batch_size"])
    return list(zip(images.split(size), labels.split(size), strict=True))


def assert_golden(golden, prefix: str, scores, tolerance: float):
    keys = [key for key in golden.files if key.startswith(f"{prefix}/")]
    assert len(keys) == len(scores) > 0
    for key in keys:
        layer, axis = key.removeprefix(f"{prefix}/").rsplit("/", 1)
        expected = torch.from_numpy(golden[key]).double()
        found = scores[LayerAxis(layer, axis)].double()
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * expected.max().item(), msg=key)
