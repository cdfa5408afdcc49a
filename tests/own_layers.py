"""Layer types of a user's own, and what `register_layer` is told of them."""

from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from obc_tools import LayerType, register_layer


class Turned(nn.Module):
    """A linear layer with its weight as (inputs, outputs), as GPT-2's."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.nx, self.nf = inputs, outputs
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


class Blur(nn.Module):
    """A grouped convolution that names everything its own way, and pads by its mean."""

    def __init__(self, inputs: int, outputs: int, parts: int = 1):
        super().__init__()
        self.parts = parts
        self.shift = nn.Parameter(torch.randn(outputs))
        self.kernel = nn.Parameter(torch.randn(outputs, inputs // parts, 3, 3))

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(F.pad(images, (1, 1, 1, 1), "reflect"), self.kernel, self.shift, groups=self.parts)


class Length(nn.Module):
    """A norm of one's own over the channels of images: by their largest, with a gain and no shift."""

    def __init__(self, width: int):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, images: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(images, dim=1, keepdim=True) * len(self.gain) ** -0.5
        return images / (length + 1e-3) * self.gain[:, None, None]


class LookUp(nn.Module):
    """A table of vectors, one a column."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.columns = nn.Parameter(torch.randn(width, count))

    def forward(self, numbers: Tensor) -> Tensor:
        return F.embedding(numbers, self.columns.T)


class Centred(nn.Module):
    """A linear layer that centres each output's weights before it uses them: it cannot be mixed."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(outputs, inputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight - self.weight.tanh(), self.bias)


TURNED = LayerType(
    "projection",
    outputs={"weight": 1, "bias": 0},
    inputs={"weight": 0},
    widths={"nf": "out", "nx": "in"},
    mixes=True,
)
BLUR = LayerType("projection", outputs={"kernel": 0, "shift": 0}, inputs={"kernel": 1}, groups="parts", mixes=True)
LENGTH = LayerType("norm", outputs={"gain": 0}, statistics="channels", channels=1)
LOOK_UP = LayerType("embedding", outputs={"columns": 0})
CENTRED = LayerType("projection", outputs={"weight": 0, "bias": 0}, inputs={"weight": 1}, linear=False)

OWN = {Turned: TURNED, Blur: BLUR, Length: LENGTH, LookUp: LOOK_UP, Centred: CENTRED}


@contextmanager
def registered():
    """Register all types of this file for a while."""
    with ExitStack() as stack:
        for kind, described in OWN.items():
            stack.enter_context(register_layer(kind, described))
        yield


def share_of(width: int) -> float:
    """Return one part in as many as a width."""
    return 1.0 / width
