"""Small networks, one for each way in which channels are joined, cut, reshaped and mixed that pruning must follow.

They cover the kinds of architecture that torch_pruning's own tests and examples prune, and some that it cannot.
``prunable`` are the names of the groups that may lose channels, by their roots.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import DeformConv2d


@dataclass(frozen=True)
class Structure:
    """A network, the shapes of its inputs (keyword arguments where they are a dict), the groups that may shrink."""

    build: Callable[[], nn.Module]
    inputs: tuple[int, ...] | tuple[tuple[int, ...], ...] | dict[str, tuple[int, ...]]
    prunable: tuple[str, ...]

    def make(self) -> tuple[nn.Module, Any]:
        """Return the network in float64 with all parameters and running statistics at random, and inputs for it."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.build().double().eval()
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.5)
            for name, buffer in model.named_buffers():
                if name.endswith("running_var"):
                    buffer.uniform_(0.5, 2)
                elif name.endswith("running_mean"):
                    buffer.normal_()
            if isinstance(self.inputs, dict):
                return model, {name: torch.randn(shape).double() for name, shape in self.inputs.items()}
            if isinstance(self.inputs[0], tuple):
                return model, tuple(torch.randn(shape).double() for shape in self.inputs)
            return model, torch.randn(self.inputs).double()


def conv(into: int, out: int, size: int = 1, **options: Any) -> nn.Sequential:
    """Return a convolution that keeps the size of its input, and a batch norm."""
    return nn.Sequential(nn.Conv2d(into, out, size, padding=size // 2, **options), nn.BatchNorm2d(out))


class NestedConcat(nn.Module):
    """Branches of different widths, joined one after another."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList([nn.Sequential(conv(4, 4), nn.GELU(), conv(4, 6)), conv(4, 8), conv(4, 10)])
        self.out = nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        joined = self.branches[0](x)
        for branch in self.branches[1:]:
            joined = torch.cat([joined, branch(x)], 1)
        return self.out(joined)


class WideAndDeep(nn.Module):
    """A linear layer and a perceptron side by side on features in the last axis."""

    def __init__(self):
        super().__init__()
        self.deep = nn.Sequential(nn.Linear(12, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Dropout(), nn.Linear(10, 4))
        self.wide = nn.Linear(12, 6)
        self.out = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(x.shape[0], -1)
        return self.out(torch.concat([self.wide(x), self.deep(x)], dim=-1)).sigmoid()


class SplitByAttributes(nn.Module):
    """A split at the widths that other layers have; one part meets a parallel branch, the other skips to the end."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(conv(3, 6), nn.GELU(), conv(6, 12))
        self.parallel = nn.Sequential(conv(3, 6), nn.GELU(), conv(6, 6))
        self.join = conv(12, 6)
        self.out = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = self.first(x)
        left = self.join[0].in_channels - self.parallel[-1][1].num_features
        mixed, skipped = torch.split(both, (left, both.shape[1] - left), 1)
        return self.out(self.join(torch.cat([mixed, self.parallel(x)], 1)) + skipped)


class SplitInThree(nn.Module):
    """One output cut in three; two parts pass the same layer; the parts are the outputs."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(conv(3, 6), nn.GELU(), conv(6, 24))
        self.shared = nn.Sequential(conv(6, 8), nn.ReLU(), conv(8, 4))
        self.own = nn.Sequential(conv(12, 8), nn.ReLU(), conv(8, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shared, own = self.shared[0][0].in_channels, self.own[0][0].in_channels
        first, second, third = torch.split(self.stem(x), [shared, shared, own], dim=1)
        return self.shared(first), self.shared(second), self.own(third)


class SpatialConcat(nn.Module):
    """Two branches above each other in the image: the channels of one are the channels of the other."""

    def __init__(self):
        super().__init__()
        self.top, self.bottom = conv(3, 8), nn.Sequential(conv(3, 6), nn.GELU(), conv(6, 8))
        self.both, self.out = conv(8, 10), nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        top, bottom = self.top(x), self.bottom(x)
        mixed = self.both(torch.cat([top, bottom], dim=2))
        first, second = torch.split(mixed, [top.shape[2], bottom.shape[2]], dim=2)
        return self.out(first) + self.out(second)


class OwnLayer(nn.Module):
    """A layer of the user's own that divides by a norm over its features and scales by bare parameters."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.scale, self.shift = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        self.mix = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        length = x.pow(2).sum(dim=1, keepdim=True).sqrt()
        return self.mix(x / length * self.scale + self.shift)


class UsesOwnLayer(nn.Module):
    """A layer of the user's own between linear layers, and a parameter that nothing uses."""

    def __init__(self):
        super().__init__()
        self.before, self.own, self.after = nn.Linear(6, 10), OwnLayer(10), nn.Linear(10, 4)
        self.unused = nn.Parameter(torch.empty(10))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(F.gelu(self.own(self.before(x).relu())))


class TwoInputs(nn.Module):
    """Two inputs by name; the hidden features of both are outputs too."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(6, 8), nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 8))
        self.hidden, self.out = nn.Linear(16, 12), nn.Linear(12, 5)

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        left, right = self.left(first).relu(), self.right(second).relu()
        return left, {"right": right, "both": self.out(self.hidden(torch.cat([left, right], 1)).relu())}


class BareParameters(nn.Module):
    """A scale of each channel and an offset of each position as bare parameters, in a residual block."""

    def __init__(self):
        super().__init__()
        self.stem, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.scale = nn.Parameter(torch.empty(8, 1, 1))
        self.offset = nn.Parameter(torch.empty(1, 8, 4, 4))
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.offset
        return self.out(x + self.scale * self.block(x))


class Decoder(nn.Module):
    """A vector reshaped to an image of a layer's width, enlarged and flattened again."""

    def __init__(self):
        super().__init__()
        self.start = nn.Linear(6, 32)
        self.up1, self.up2 = nn.ConvTranspose2d(8, 6, 4, 2, padding=1), nn.ConvTranspose2d(6, 4, 2, 2)
        self.out = nn.Linear(4 * 64, 3)

    def forward(self, x: Tensor) -> Tensor:
        image = self.start(x).relu().view(-1, self.up1.in_channels, 2, 2)
        return self.out(torch.flatten(self.up2(self.up1(image).relu()).relu(), 1))


class OneChannel(nn.Module):
    """An output of one channel that multiplies all others, as a spatial attention does."""

    def __init__(self):
        super().__init__()
        self.stem, self.map, self.out = conv(3, 8), conv(8, 1, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.out(x * self.map(x).sigmoid())


class LinearResidual(nn.Module):
    """A skip around a linear layer, over the first layer's width."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.out(self.second(x).relu() + x)


class LeNet(nn.Module):
    """Convolutions, poolings, and a view instead of a flatten."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 8, 5)
        self.fc1, self.fc2 = nn.Linear(32, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x).relu(), 2)
        x = F.max_pool2d(self.conv2(x).relu(), 2)
        return self.fc2(self.fc1(x.view(x.shape[0], -1)).relu())


class PaddedShortcut(nn.Module):
    """A residual of a narrow input to a wider output whose last channels get nothing."""

    def __init__(self):
        super().__init__()
        self.stem, self.wide, self.out = conv(3, 6), conv(6, 10, 3), nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        wide = self.wide(x)
        return self.out(wide + F.pad(x, (0, 0, 0, 0, 0, wide.shape[1] - x.shape[1])))


class PartOfWider(nn.Module):
    """A narrow output added to the first channels of a wider one."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow, self.out = conv(3, 10), conv(3, 6), nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide, narrow = self.wide(x), self.narrow(x)
        share = self.narrow[0].out_channels
        return self.out(torch.cat([wide[:, :share] + narrow, wide[:, share:]], 1))


class PixelShuffling(nn.Module):
    """Channels that become pixels and pixels that become channels, with an interpolation between."""

    def __init__(self):
        super().__init__()
        self.stem, self.fine = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.coarse, self.out = nn.Conv2d(32, 10, 1), nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(F.pixel_shuffle(self.stem(x).relu(), 2))
        coarse = self.coarse(F.pixel_unshuffle(fine, 2)).relu()
        return self.out(F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False))


class UNet(nn.Module):
    """Down and up again by a transposed convolution, with a skip that is joined to it, and group norms."""

    def __init__(self):
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
        self.down2 = nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.GroupNorm(3, 12), nn.SiLU())
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.last, self.out = conv(14, 8, 3), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down1(x)
        return self.out(self.last(torch.cat([skip, self.up(self.down2(skip))], 1)).relu())


class ChannelShuffling(nn.Module):
    """Grouped convolutions with their channels exchanged between."""

    def __init__(self):
        super().__init__()
        self.stem, self.out = conv(3, 12), nn.Conv2d(12, 4, 1)
        self.grouped1, self.depthwise, self.grouped2 = (
            conv(12, 12, groups=3),
            conv(12, 12, 3, groups=12),
            conv(12, 12, groups=3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        made = self.grouped1(x).relu()
        count, _, height, width = made.shape
        made = made.view(count, 3, -1, height, width).transpose(1, 2).reshape(count, -1, height, width)
        return self.out((x + self.grouped2(self.depthwise(made))).relu())


class DepthMultiplier(nn.Module):
    """A depthwise convolution with two outputs a channel."""

    def __init__(self):
        super().__init__()
        self.stem, self.twice, self.out = conv(3, 8), conv(8, 16, 3, groups=8), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.twice(self.stem(x).relu()).relu())


class GrowingConcat(nn.Module):
    """One output in two halves; each further block reads the last piece; all pieces are joined (as detectors do)."""

    def __init__(self):
        super().__init__()
        self.first, self.last = conv(3, 16), conv(32, 8)
        self.blocks = nn.ModuleList([conv(8, 8, 3), conv(8, 8, 3)])
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        pieces = list(self.first(x).relu().chunk(2, 1))
        for block in self.blocks:
            pieces.append(block(pieces[-1]).relu())
        return self.out(self.last(torch.cat(pieces, 1)))


class SeparateAttention(nn.Module):
    """Queries, keys and values from layers of their own, with the numbers of heads kept as attributes."""

    def __init__(self):
        super().__init__()
        self.heads, self.head_width, self.all_width = 2, 4, 8
        self.query, self.key, self.value = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8)
        self.project, self.norm, self.out = nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, self.head_width).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self.split(layer(x)) for layer in (self.query, self.key, self.value))
        weights = (query @ key.transpose(-1, -2) * 0.5).softmax(-1)
        mixed = (weights @ value).transpose(1, 2).reshape(*x.shape[:-1], self.all_width)
        return self.out(self.norm(self.project(mixed)).mean(1))


class GroupedQueries(nn.Module):
    """Four heads of queries that share two heads of keys and values."""

    def __init__(self):
        super().__init__()
        self.width = 4
        self.query, self.key, self.value = nn.Linear(6, 16), nn.Linear(6, 8), nn.Linear(6, 8)
        self.project = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        count, length, _ = x.shape
        query = self.query(x).view(count, length, 4, self.width).transpose(1, 2)
        key = self.key(x).view(count, length, 2, self.width).transpose(1, 2)
        value = self.value(x).view(count, length, 2, self.width).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, key, value, enable_gqa=True, scale=0.5)
        return self.project(mixed.transpose(1, 2).flatten(2).mean(1))


class Transformer(nn.Module):
    """torch's own encoder layer behind an embedding of patches."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.encoder = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, batch_first=True, norm_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encoder(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


class GatedPerceptron(nn.Module):
    """One layer whose halves gate each other, by an operation that halves the features."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(6, 16), nn.Linear(8, 12), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.second(F.glu(self.first(x))).chunk(2, -1)
        return self.out(F.silu(gate) * value)


class Deformed(nn.Module):
    """A deformable convolution, which says by another layer where it looks."""

    def __init__(self):
        super().__init__()
        self.stem, self.offset = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 18, 3, padding=1)
        self.deformed, self.out = DeformConv2d(6, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.deformed(self.stem(x).relu(), self.offset(x)).relu())


class Volumes(nn.Module):
    """Convolutions over three dimensions, then over one."""

    def __init__(self):
        super().__init__()
        self.volume = nn.Sequential(nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6), nn.PReLU(6))
        self.line = nn.Sequential(nn.Conv1d(6, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU())
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.line(self.volume(x).flatten(2)).mean(2))


class Recurrent(nn.Module):
    """Convolutions in front of an LSTM, whose hidden width stays, and a perceptron behind it."""

    def __init__(self):
        super().__init__()
        self.front = nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 6, 1))
        self.memory = nn.LSTM(6, 10, batch_first=True)
        self.hidden, self.out = nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.memory(self.front(x).transpose(1, 2))
        return self.out(self.hidden(states[:, -1]).relu())


STRUCTURES = {
    "nested concat": Structure(
        NestedConcat, (3, 4, 5, 5), ("branches.0.0.0.out", "branches.0.2.0.out", "branches.1.0.out", "branches.2.0.out")
    ),
    "wide and deep": Structure(WideAndDeep, (3, 12), ("deep.0.out", "deep.4.out", "wide.out")),
    "split by attributes": Structure(
        SplitByAttributes,
        (3, 3, 5, 5),
        ("first.0.0.out", "first.2.0.out", "parallel.0.0.out", "parallel.2.0.out", "join.0.out"),
    ),
    "split in three": Structure(
        SplitInThree, (3, 3, 5, 5), ("stem.0.0.out", "stem.2.0.out", "stem.2.1.out", "shared.0.0.out", "own.0.0.out")
    ),
    "spatial concat": Structure(SpatialConcat, (3, 3, 5, 5), ("bottom.0.0.out", "bottom.2.0.out", "both.0.out")),
    "own layer": Structure(UsesOwnLayer, (3, 6), ("before.out", "own.mix.out")),
    "two inputs": Structure(TwoInputs, {"first": (3, 6), "second": (3, 4)}, ("right.0.out", "hidden.out")),
    "two inputs in order": Structure(TwoInputs, ((3, 6), (3, 4)), ("right.0.out", "hidden.out")),
    "bare parameters": Structure(BareParameters, (3, 3, 4, 4), ("block.1.out", "block.2.out")),
    "decoder": Structure(Decoder, (3, 6), ("start.out", "up1.out", "up2.out")),
    "one channel": Structure(OneChannel, (3, 3, 5, 5), ("stem.0.out",)),
    "linear residual": Structure(LinearResidual, (3, 6), ("first.out",)),
    "lenet": Structure(LeNet, (3, 1, 20, 20), ("conv1.out", "conv2.out", "fc1.out")),
    "part of wider": Structure(PartOfWider, (3, 3, 5, 5), ("wide.0.out", "wide.1.out")),
    "pixel shuffle": Structure(PixelShuffling, (3, 3, 4, 4), ("stem.out", "fine.out", "coarse.out")),
    "u-net": Structure(UNet, (3, 3, 8, 8), ("down1.0.out", "down2.0.out", "up.out", "last.0.out")),
    "channel shuffle": Structure(ChannelShuffling, (3, 3, 5, 5), ("grouped2.0.out",)),
    "depth multiplier": Structure(DepthMultiplier, (3, 3, 5, 5), ("twice.0.out",)),
    "growing concat": Structure(
        GrowingConcat, (3, 3, 5, 5), ("first.0.out", "last.0.out", "blocks.0.0.out", "blocks.1.0.out")
    ),
    "separate attention": Structure(SeparateAttention, (3, 5, 6), ("value.out", "project.out")),
    "grouped queries": Structure(GroupedQueries, (3, 5, 6), ("value.out",)),
    "transformer": Structure(Transformer, (3, 3, 8, 8), ("encoder.linear1.out", "encoder.linear2.out")),
    "gated perceptron": Structure(GatedPerceptron, (3, 6), ("first.out", "second.out")),
    "deformed": Structure(Deformed, (3, 3, 5, 5), ("stem.out", "deformed.weight.dim0")),
    "volumes": Structure(Volumes, (3, 2, 4, 4, 4), ("volume.0.out", "line.0.out")),
    "recurrent": Structure(Recurrent, (3, 3, 6), ("front.0.out", "front.2.out", "hidden.out")),
}

WHOLE = {"padded shortcut": Structure(PaddedShortcut, (3, 3, 5, 5), ())}
"""Networks of which nothing can be pruned."""
