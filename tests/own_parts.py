"""What a user may name as package.module:function: a model, data, a task; and what is none of them."""

import torch
from task_networks import Segmenter, masked_images

from obc_tools import TASKS, as_data


def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Segmenter()


def data():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        images, masks = masked_images(12)
    return as_data((images[:8], masks[:8]), (images[8:], masks[8:]), name="masks")


def pair():
    images, masks = masked_images(12)
    return (images[:8], masks[:8]), (images[8:], masks[8:])


def task():
    return TASKS["segmentation"]


def nothing():
    return None


NOT_A_FUNCTION = 3
