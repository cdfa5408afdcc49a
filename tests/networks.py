"""Small seeded networks, one for each structure that pruning must follow; data, not code to read twice."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from obc_tools import find_groups, make_plan


def small_vgg() -> nn.Sequential:
    """The network of the golden file small_vgg.npz: convolutions with and without bias, a flattened linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(12, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 24),
        nn.ReLU(),
        nn.Linear(24, 10),
    )


def mlp_layernorm() -> nn.Sequential:
    """The network of the golden file mlp_layernorm.npz."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(192, 20),
        nn.LayerNorm(20),
        nn.GELU(),
        nn.Linear(20, 16),
        nn.LayerNorm(16),
        nn.GELU(),
        nn.Linear(16, 10),
    )


class Residual(nn.Module):
    """A stem, a block with a projection and a block without; in-place activations and `out += x`."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.conv1 = nn.Conv2d(8, 6, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 12, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(12)
        self.project = nn.Sequential(nn.Conv2d(8, 12, 1, stride=2, bias=False), nn.BatchNorm2d(12))
        self.conv3 = nn.Conv2d(12, 12, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(12)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.project(x)
        x = self.relu(out)
        out = self.bn3(self.conv3(x))
        out += x
        return self.fc(self.relu(out).mean((2, 3)))


class Grouped(nn.Module):
    """A bottleneck with a convolution in 4 groups, as in ResNeXt."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 1)
        self.conv2 = nn.Conv2d(16, 24, 3, padding=1, groups=4)
        self.bn = nn.BatchNorm2d(24)
        self.conv3 = nn.Conv2d(24, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv2(self.conv1(x).relu())).relu()
        return self.fc(self.conv3(x).relu().mean((2, 3)))


class Inverted(nn.Module):
    """An inverted residual with a depthwise convolution and squeeze-and-excitation, as in EfficientNet."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.expand = nn.Sequential(nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12), nn.ReLU6(inplace=True)
        )
        self.squeeze = nn.Conv2d(12, 4, 1)
        self.excite = nn.Conv2d(4, 12, 1)
        self.project = nn.Sequential(nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = self.depthwise(self.expand(x))
        scale = self.excite(self.squeeze(out.mean((2, 3), keepdim=True)).relu()).sigmoid()
        x = x + self.project(out * scale)
        return self.fc(x.mean((2, 3)))


class Concat(nn.Module):
    """Two branches side by side and their input, as in DenseNet and GoogLeNet."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.left = nn.Conv2d(6, 8, 1)
        self.right = nn.Conv2d(6, 10, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.last = nn.Conv2d(24, 12, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = torch.cat([x, self.left(x), self.right(x)], 1)
        return self.fc(self.last(self.norm(x).relu()).relu().mean((2, 3)))


class Upsampling(nn.Module):
    """A transposed convolution between a narrow middle and an output in pixels."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 10, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(10, 12, 3, padding=1)
        self.up = nn.ConvTranspose2d(12, 8, 2, stride=2)
        self.grouped = nn.ConvTranspose2d(8, 12, 3, padding=1, groups=2)
        self.out = nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.grouped(self.up(self.middle(self.down(x).relu()).relu()).relu()).relu())


class Shared(nn.Module):
    """One convolution used twice in a row."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.fc(self.twice(self.twice(x).relu()).relu().mean((2, 3)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "small_vgg": small_vgg,
    "residual": Residual,
    "grouped": Grouped,
    "inverted": Inverted,
    "concat": Concat,
    "upsampling": Upsampling,
    "shared": Shared,
}
"""Networks whose masked and pruned functions agree (norms act on each channel by itself)."""


def network(name: str) -> tuple[nn.Module, Tensor]:
    """Return a seeded network in float64 and eval mode, its running statistics off their start, and four images."""
    size = {"small_vgg": 16, "mlp_layernorm": 8}.get(name, 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = (NETWORKS | {"mlp_layernorm": mlp_layernorm})[name]().double()
        images = torch.randn(4, 3, size, size, dtype=torch.float64)
        model.train()(torch.randn(4, 3, size, size, dtype=torch.float64))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
    return model.eval(), images


def random_plan(name, ratio=0.4, seed=0):
    model, images = network(name)
    generator = torch.Generator().manual_seed(seed)
    groups = find_groups(model, images)
    return model, images, make_plan({g: torch.rand(g.width, generator=generator) for g in groups}, ratio=ratio)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 8)
        self.third = nn.Linear(8, 8)
        self.third.weight = self.second.weight
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x).relu()
        return self.head((x + self.second(x).relu()) + self.third(x).relu())


class Attention(nn.Module):
    """Three heads of eight from fused q, k, v; what becomes of q and k is up to subclasses."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim, self.scale = 3, 8, 8**-0.5
        self.qkv, self.proj = nn.Linear(7, 72), nn.Linear(24, 5)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)
