"""Independent counts of multiply-adds: torch's own counter, made to see everything."""

import warnings
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from obc_tools.state import call_model, evaluating


def counted_by_torch(model: nn.Module, inputs: Any) -> float:
    """Return half of what torch's flop counter counts of one call, of the whole batch.

    It sees attention by its math kernel alone, recurrent cells without mkldnn alone, and nn.MultiheadAttention with
    gradients on alone. It lacks matrix-vector products, bilinear layers and deformable convolutions.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "TF32 acceleration")
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.enable_grad())
        counter = stack.enter_context(FlopCounterMode(display=False))
        call_model(model, inputs)
    return counter.get_total_flops() / 2
