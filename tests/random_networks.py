"""Random networks whose channels are known by construction, and their pruning by hand: no line of the library is used.

Every channel has a number of its own. A block says of each of its tensors which channels lie along each dimension;
channels that can only go together have one number. So the same seed builds the whole network, and the one without
some channels, into which the whole one's weights are cut.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Maker:
    """Builds one network; ``gone`` are the channels left out. ``kind`` of each channel, and whether it is removable."""

    seed: int
    gone: frozenset[int] = frozenset()
    kinds: list[str] = field(default_factory=list)
    removable: list[bool] = field(default_factory=list)
    tensors: list[tuple[Tensor, tuple[np.ndarray | None, ...]]] = field(default_factory=list)

    def __post_init__(self):
        self.random = random.Random(self.seed)

    def new(self, count: int, kind: str, removable: bool = True) -> np.ndarray:
        """Return new channels."""
        self.kinds += [kind] * count
        self.removable += [removable] * count
        return np.arange(len(self.kinds) - count, len(self.kinds))

    def width(self, channels: np.ndarray) -> int:
        """Return how many of the channels are left."""
        return int(self.left(channels).sum())

    def left(self, channels: np.ndarray) -> np.ndarray:
        return np.array([channel not in self.gone for channel in channels])

    def note(self, tensor: Tensor | None, *dims: np.ndarray | None) -> None:
        if tensor is not None:
            self.tensors.append((tensor, dims))

    def conv(self, into: np.ndarray, out: np.ndarray, size: int = 1, groups: int = 1, **options) -> nn.Conv2d:
        layer = nn.Conv2d(self.width(into), self.width(out), size, padding=size // 2, groups=groups, **options)
        self.note(layer.weight, out, into[: len(into) // groups])
        self.note(layer.bias, out)
        return layer

    def depthwise(self, into: np.ndarray, times: int = 1) -> nn.Conv2d:
        width = self.width(into)
        layer = nn.Conv2d(width, times * width, 3, padding=1, groups=width)
        self.note(layer.weight, np.repeat(into, times))
        self.note(layer.bias, np.repeat(into, times))
        return layer

    def linear(self, into: np.ndarray, out: np.ndarray, bias: bool = True) -> nn.Linear:
        layer = nn.Linear(self.width(into), self.width(out), bias=bias)
        self.note(layer.weight, out, into)
        self.note(layer.bias, out)
        return layer

    def norm(self, layer: nn.Module, channels: np.ndarray) -> nn.Module:
        for tensor in (*layer.parameters(), *(b for b in layer.buffers() if b.dim())):
            self.note(tensor, channels)
        return layer

    def batch_norm(self, channels: np.ndarray) -> nn.Module:
        return self.norm(nn.BatchNorm2d(self.width(channels)), channels)

    def parameter(self, *dims: np.ndarray | int) -> nn.Parameter:
        shape = [dim if isinstance(dim, int) else self.width(dim) for dim in dims]
        value = nn.Parameter(torch.randn(shape) * 0.3)
        self.note(value, *(None if isinstance(dim, int) else dim for dim in dims))
        return value


class Block(nn.Module):
    """Layers by name and a function of them; ``call(self, x)``."""

    def __init__(self, call: Callable[[Block, Tensor], Tensor], **parts: object):
        super().__init__()
        self.call = call
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


Step = tuple[nn.Module, np.ndarray]
IMAGES: list[Callable[[Maker, np.ndarray], Step]] = []
TOKENS: list[Callable[[Maker, np.ndarray], Step]] = []


def image(block: Callable[[Maker, np.ndarray], Step]) -> Callable[[Maker, np.ndarray], Step]:
    IMAGES.append(block)
    return block


def token(block: Callable[[Maker, np.ndarray], Step]) -> Callable[[Maker, np.ndarray], Step]:
    TOKENS.append(block)
    return block


@image
def plain(m: Maker, into: np.ndarray) -> Step:
    out = m.new(m.random.randint(4, 9), "plain")
    act = m.random.choice([nn.ReLU, nn.SiLU, nn.GELU])()
    return nn.Sequential(m.conv(into, out, m.random.choice([1, 3])), m.batch_norm(out), act), out


@image
def transposed(m: Maker, into: np.ndarray) -> Step:
    out = m.new(m.random.randint(4, 8), "transposed")
    layer = nn.ConvTranspose2d(m.width(into), m.width(out), 3, padding=1)
    m.note(layer.weight, into, out)
    m.note(layer.bias, out)
    return nn.Sequential(layer, nn.PReLU()), out


@image
def residual(m: Maker, into: np.ndarray) -> Step:
    mid = m.new(m.random.randint(3, 8), "residual's inside")
    slope = nn.PReLU(m.width(mid))
    m.note(slope.weight, mid)
    inside = nn.Sequential(m.conv(into, mid, 3), m.batch_norm(mid), slope, m.conv(mid, into))
    return Block(
        lambda self, x: (x + self.scale * self.inside(x)).relu(), inside=inside, scale=m.parameter(into, 1, 1)
    ), into


@image
def grouped(m: Maker, into: np.ndarray) -> Step:
    groups = m.random.choice([2, 3])
    one, two = (np.tile(m.new(m.random.randint(3, 5), "convolution in groups"), groups) for _ in range(2))
    inside = [m.conv(into, one), nn.ReLU(), m.conv(one, two, 3, groups=groups), m.batch_norm(two), nn.ReLU()]
    return nn.Sequential(*inside), two


@image
def depthwise(m: Maker, into: np.ndarray) -> Step:
    mid, times = m.new(m.random.randint(4, 8), "depthwise"), m.random.choice([1, 2])
    inside = nn.Sequential(m.conv(into, mid), nn.Hardswish(), m.depthwise(mid, times), nn.ReLU6())
    return Block(
        lambda self, x: x + self.out(self.inside(x)), inside=inside, out=m.conv(np.repeat(mid, times), into)
    ), into


@image
def squeeze_excite(m: Maker, into: np.ndarray) -> Step:
    mid = m.new(m.random.randint(3, 6), "squeeze and excite")
    parts = {"down": m.linear(into, mid), "up": m.linear(mid, into)}
    return Block(
        lambda self, x: x * self.up(self.down(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None], **parts
    ), into


@image
def squeezed(m: Maker, into: np.ndarray) -> Step:
    mid = m.new(m.random.randint(3, 6), "squeeze")
    parts = {"down": m.conv(into, mid), "up": m.linear(mid, into)}

    def call(self: Block, x: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(self.down(x), 1).squeeze(-1).squeeze(-1)
        return x + self.up(pooled.relu()).unsqueeze(-1).unsqueeze(-1)

    return Block(call, **parts), into


@image
def branches(m: Maker, into: np.ndarray) -> Step:
    one, two = m.new(m.random.randint(3, 6), "branches"), m.new(m.random.randint(3, 6), "branches")
    parts = {"one": m.conv(into, one), "two": m.conv(into, two, 3)}
    if m.random.random() < 0.5:
        return Block(lambda self, x: torch.cat([self.one(x).relu(), self.two(x)], 1), **parts), np.r_[one, two]
    return Block(lambda self, x: torch.cat((x, self.one(self_relu(x)), self.two(x)), dim=1), **parts), np.r_[
        into, one, two
    ]


def self_relu(x: Tensor) -> Tensor:
    return x.relu()


@image
def gated(m: Maker, into: np.ndarray) -> Step:
    out = m.new(m.random.randint(3, 6), "chunks")

    def call(self: Block, x: Tensor) -> Tensor:
        one, two = self.wide(x).chunk(2, dim=1)
        return one * two.sigmoid()

    return Block(call, wide=m.conv(into, np.r_[out, out])), out


@image
def split(m: Maker, into: np.ndarray) -> Step:
    one, two = m.new(m.random.randint(3, 6), "split"), m.new(m.random.randint(3, 6), "split")

    def call(self: Block, x: Tensor) -> Tensor:
        first, second = self.wide(x).split(self.sizes, dim=1)
        return self.one(first.relu()) + self.two(second.tanh())

    out = m.new(m.random.randint(4, 7), "sum")
    sizes = [m.width(one), m.width(two)]
    return Block(call, wide=m.conv(into, np.r_[one, two]), one=m.conv(one, out), two=m.conv(two, out), sizes=sizes), out


@image
def own_norm(m: Maker, into: np.ndarray) -> Step:
    out = m.new(m.random.randint(4, 8), "own norm")
    parts = {"conv": m.conv(into, out), "weight": m.parameter(out), "bias": m.parameter(out)}

    def layer_norm(self: Block, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * self.weight[:, None, None] + self.bias[:, None, None]

    def rms_norm(self: Block, x: Tensor) -> Tensor:
        x = self.conv(x).permute(0, 2, 3, 1)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight + self.bias
        return x.permute(0, 3, 1, 2)

    return Block(m.random.choice([layer_norm, rms_norm]), **parts), out


@image
def group_norm(m: Maker, into: np.ndarray) -> Step:
    groups = m.random.choice([1, 2, 4])
    out = np.tile(m.new(m.random.randint(3, 5), "group norm"), groups)
    return nn.Sequential(m.conv(into, out, 3), m.norm(nn.GroupNorm(groups, m.width(out)), out), nn.SiLU()), out


@image
def bare_kernel(m: Maker, into: np.ndarray) -> Step:
    out = m.new(m.random.randint(4, 8), "bare kernel")
    parts = {"kernel": m.parameter(out, into, 3, 3), "shift": m.parameter(out)}
    return Block(lambda self, x: F.conv2d(x, self.kernel, self.shift, padding=1).relu(), **parts), out


@image
def shared(m: Maker, into: np.ndarray) -> Step:
    out = m.new(m.random.randint(4, 8), "shared module")
    parts = {"first": m.conv(into, out), "again": m.conv(out, out, 3)}
    return Block(lambda self, x: self.again(self.again(self.first(x)).relu()), **parts), out


@image
def share_of_width(m: Maker, into: np.ndarray) -> Step:
    out = m.new(m.random.randint(3, 6), "view by share")

    def call(self: Block, x: Tensor) -> Tensor:
        x = self.conv(x)
        batch, width, height, breadth = x.shape
        return x.view(batch, width // 2, 2, height, breadth).amax(2)

    return Block(call, conv=m.conv(into, np.repeat(out, 2))), out


@image
def shuffled(m: Maker, into: np.ndarray) -> Step:
    out = m.new(m.random.randint(3, 6), "channel shuffle")

    def call(self: Block, x: Tensor) -> Tensor:
        x = self.conv(x)
        batch, width, height, breadth = x.shape
        return x.view(batch, 2, width // 2, height, breadth).transpose(1, 2).reshape(batch, width, height, breadth)

    return Block(call, conv=m.conv(into, np.tile(out, 2))), np.repeat(out, 2)


@image
def cached(m: Maker, into: np.ndarray) -> Step:
    out, table = m.new(m.random.randint(4, 8), "cache by shape"), {}

    def call(self: Block, x: Tensor) -> Tensor:
        x = self.conv(x)
        if (shape := tuple(x.shape)) not in table:
            table[shape] = (shape[0], shape[1], shape[2] * shape[3])
        return x.reshape(table[shape]).tanh().reshape(shape)

    return Block(call, conv=m.conv(into, out)), out


@image
def number(m: Maker, into: np.ndarray) -> Step:
    """A width that becomes a number; by hand it stays what it was."""
    out = m.new(8, "width as a number", removable=False)
    fixed = 8 if m.gone else None
    uses: list[Callable[[Tensor, int], Tensor]] = [
        lambda x, width: x / width,
        lambda x, width: x * width**-0.5,
        lambda x, width: x.relu() if width >= 7 else x,
        lambda x, width: x + sum(0.1 * i for i in range(width)),
        lambda x, width: x * float(np.sqrt(width)),
    ]
    use = m.random.choice(uses)
    return Block(lambda self, x: use(y := self.conv(x), fixed or y.shape[1]), conv=m.conv(into, out)), out


@image
def taken_by_number(m: Maker, into: np.ndarray) -> Step:
    out = m.new(m.random.randint(4, 7), "one taken by its number", removable=False)
    return Block(
        lambda self, x: (y := self.conv(x)) + y[:, 0:1].sigmoid() * y[:, 2].unsqueeze(1), conv=m.conv(into, out)
    ), out


@token
def perceptron(m: Maker, into: np.ndarray) -> Step:
    mid = m.new(m.random.randint(4, 9), "perceptron")
    norm = m.norm(nn.LayerNorm(m.width(into)), into)
    inside = nn.Sequential(norm, m.linear(into, mid), nn.GELU(), m.linear(mid, into))
    return Block(lambda self, x: x + self.inside(x), inside=inside), into


@token
def gated_perceptron(m: Maker, into: np.ndarray) -> Step:
    mid = m.new(m.random.randint(4, 8), "gated perceptron")
    parts = {"gate": m.linear(into, mid, False), "up": m.linear(into, mid), "down": m.linear(mid, into)}
    return Block(lambda self, x: x + self.down(F.silu(self.gate(x)) * self.up(x)), **parts), into


@token
def attention(m: Maker, into: np.ndarray) -> Step:
    heads, size, size_v = m.random.choice([1, 2, 3]), 4, m.random.randint(3, 5)
    match, value = m.new(size, "attention: query and key"), m.new(size_v, "attention: value")
    q, v = np.tile(match, heads), np.tile(value, heads)
    parts = {"q": m.linear(into, q), "k": m.linear(into, q), "v": m.linear(into, v), "out": m.linear(v, into)}
    fixed = size**-0.5
    fused = m.random.random() < 0.5 and not m.gone

    def call(self: Block, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (f(x).view(batch, tokens, heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v) if fused else (q @ k.mT * fixed).softmax(-1) @ v
        return x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, -1))

    return Block(call, **parts), into


@token
def grouped_queries(m: Maker, into: np.ndarray) -> Step:
    match, value = m.new(4, "grouped queries: query and key"), m.new(4, "grouped queries: value")
    parts = {"q": m.linear(into, np.tile(match, 4)), "k": m.linear(into, np.tile(match, 2))}
    parts |= {"v": m.linear(into, np.tile(value, 2)), "out": m.linear(np.tile(value, 4), into)}

    def call(self: Block, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, 4, -1).transpose(1, 2)
        k, v = (f(x).view(batch, tokens, 2, -1).transpose(1, 2).repeat_interleave(2, dim=1) for f in (self.k, self.v))
        mixed = (q @ k.mT * 0.5).softmax(-1) @ v
        return x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, -1))

    return Block(call, **parts), into


@token
def experts(m: Maker, into: np.ndarray) -> Step:
    count = 3
    inside = [m.new(m.random.randint(3, 6), "experts") for _ in range(count)]
    route = nn.Linear(m.width(into), count)
    m.note(route.weight, None, into)
    m.note(route.bias)
    parts = [nn.Sequential(m.linear(into, mid), nn.GELU(), m.linear(mid, into)) for mid in inside]

    def call(self: Block, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        share, which = self.route(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for i, part in enumerate(self.parts):
            rows = (which == i).nonzero()[:, 0]
            out.index_add_(0, rows, part(flat[rows]) * share[rows, None])
        return x + out.view_as(x)

    return Block(call, route=route, parts=nn.ModuleList(parts)), into


class Network(nn.Module):
    """A stem, blocks on images, perhaps blocks on tokens, a head; ``flat``: of one resolution only."""

    def __init__(self, m: Maker):
        super().__init__()
        channels = m.new(m.random.randint(4, 8), "stem")
        colours = m.new(3, "input", removable=False)
        self.stem = m.conv(colours, channels, 3)
        self.images, self.tokens = nn.ModuleList(), nn.ModuleList()
        for make in m.random.choices(IMAGES, k=m.random.randint(2, 5)):
            block, channels = make(m, channels)
            self.images.append(block)
        for make in m.random.choices(TOKENS, k=m.random.choice([0, 0, 1, 2])):
            block, channels = make(m, channels)
            self.tokens.append(block)
        self.flat = not self.tokens and m.random.random() < 0.3
        self.head = m.linear(np.repeat(channels, 16) if self.flat else channels, m.new(5, "output", removable=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.images:
            x = block(x)
        if self.flat:
            return self.head(F.adaptive_avg_pool2d(x, 4).flatten(1))
        if not len(self.tokens):
            return self.head(x.mean((2, 3)))
        x = x.flatten(2).transpose(1, 2)
        for block in self.tokens:
            x = block(x)
        return self.head(x.mean(1))


@dataclass
class Known:
    """A network and what is known of it: the channels along each dimension of each tensor, by name."""

    seed: int
    network: Network
    maker: Maker
    dims: dict[str, tuple[np.ndarray | None, ...]]

    def along(self, layer: str, axis: str) -> np.ndarray | None:
        """Return the channels along a layer's outputs, or along a dimension of a bare parameter."""
        if axis.startswith("dim"):
            return self.dims[layer][int(axis[3:])]
        dims = self.dims.get(f"{layer}.weight")
        if dims is None or axis != "out":
            return None
        return dims[isinstance(self.network.get_submodule(layer), nn.ConvTranspose2d)]

    def without(self, gone: Collection[int]) -> Network:
        """Return the network without these channels, pruned by hand."""
        fewer = build(self.seed, frozenset(gone))
        theirs = dict(self.network.state_dict())
        with torch.no_grad():
            for name, tensor in fewer.network.state_dict(keep_vars=True).items():
                value = theirs[name]
                for dim, channels in enumerate(self.dims.get(name, ())):
                    if channels is not None:
                        value = value.index_select(dim, torch.from_numpy(np.flatnonzero(fewer.maker.left(channels))))
                tensor.data.copy_(value)
        return fewer.network


def build(seed: int, gone: frozenset[int] = frozenset()) -> Known:
    """Build a seed's network, in float64 and eval mode, without some channels; all weights at random."""
    maker = Maker(seed, gone)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network(maker)
        places = {id(tensor): dims for tensor, dims in maker.tensors}
        names = [*network.named_parameters(), *network.named_buffers()]
        dims = {name: places[id(tensor)] for name, tensor in names if id(tensor) in places}
        network = network.double().eval()
        with torch.no_grad():
            for name, tensor in names:
                if tensor.dim() == 1:
                    tensor.uniform_(0.4, 1.6) if "var" in name or "weight" in name else tensor.normal_(std=0.3)
    return Known(seed, network, maker, dims)
