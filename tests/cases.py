"""Tiny seeded models as data, one for each layer type and structure that products must be exact for.

A case's batch has `EXAMPLES` examples. ``by_weights`` names the layers that gates do not suit, ``layers`` what to score
where it is not every module.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from obc_tools.scoring.objectives import Objective, classification

EXAMPLES = 6
CLASSES = 3


@dataclass(frozen=True)
class Case:
    """One model with a batch for it, in float64 and eval mode."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = ()
    batch: Callable[[], Any] | None = None
    objective: Objective = classification
    layers: tuple[str, ...] | None = None
    by_weights: frozenset[str] = frozenset()

    def model(self, seed: int = 0) -> nn.Module:
        """Build the model with every parameter and running statistic drawn at random."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build().double().eval()
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.5)
            for name, buffer in model.named_buffers():
                if name.endswith("running_mean"):
                    buffer.normal_()
                elif name.endswith("running_var"):
                    buffer.uniform_(0.5, 2)
        return model

    def data(self, seed: int = 1) -> Any:
        """Return one batch."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.batch() if self.batch else (torch.randn(EXAMPLES, *self.shape).double(), labels())


def labels() -> Tensor:
    return torch.randint(CLASSES, (EXAMPLES,))


def tokens(length: int = 5, vocabulary: int = 7) -> Tensor:
    return torch.randint(vocabulary, (EXAMPLES, length))


class Pooled(nn.Module):
    """A body, the mean over all positions, a linear head."""

    def __init__(self, *body: nn.Module, width: int, channels_last: bool = False):
        super().__init__()
        self.body = nn.Sequential(*body)
        self.head = nn.Linear(width, CLASSES)
        self.channels_last = channels_last

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.body(inputs)
        features = features.flatten(1, -2).mean(1) if self.channels_last else features.flatten(2).mean(2)
        return self.head(features)


class Residual(nn.Module):
    """Additions and activations in place, a block input with two readers, a plain convolution before an activation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 5, 1)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = F.leaky_relu_(self.stem(images), 0.1)
        out = F.relu_(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        out = F.max_pool2d(torch.relu_(out), 2)
        return self.head(F.silu(self.last(out), inplace=True).mean((2, 3)))


class ReadTwice(nn.Module):
    """Tensors between a norm and the next layer that something else reads too: nothing may be shared between gates."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 1)
        self.bn2 = nn.BatchNorm2d(4)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        made = self.conv1(images)
        active = torch.relu(self.bn1(made))
        out = torch.relu(self.bn2(self.conv2(active)))
        return self.head(torch.cat([made, active, out], 1).mean((2, 3)))


class Shared(nn.Module):
    """One convolution and one norm used twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(images)))
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


class Attention(nn.Module):
    """Self-attention, masked attention to other tokens, and bare parameters as vision transformers use them."""

    def __init__(self, **options: Any):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.position = nn.Parameter(torch.zeros(1, 5, 4))
        self.scale = nn.Parameter(torch.zeros(4))
        self.self_attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)
        self.cross_attention = nn.MultiheadAttention(4, 2, batch_first=True, bias=False)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(inputs), -1, -1), inputs], 1) + self.position
        y = self.norm(x)
        x = x + self.scale * self.self_attention(y, y, y, need_weights=False)[0]
        padded = torch.arange(4).expand(len(inputs), -1) == 3
        causal = torch.ones(5, 4, dtype=torch.bool).triu(1)
        x = x + self.cross_attention(x, inputs, inputs, key_padding_mask=padded, attn_mask=causal)[0]
        return self.head(x[:, 0])


class SequenceFirst(nn.Module):
    """Positions in the leading axis, as many as examples, so that only the check can tell."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(inputs.transpose(0, 1)))[0])


class Language(nn.Module):
    """Next-token prediction; the embedding has a padding row and, if tied, is the output layer too."""

    def __init__(self, tied: bool = False):
        super().__init__()
        self.embedding = nn.Embedding(7, 4, padding_idx=0)
        self.hidden = nn.Linear(4, 4)
        self.norm = nn.RMSNorm(4)
        self.out = nn.Linear(4, 7, bias=False)
        if tied:
            self.out.weight = self.embedding.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(self.norm(torch.tanh(self.hidden(self.embedding(inputs).cumsum(1)))))


class FunctionalUse(nn.Module):
    """A layer's weight used once by its module and once behind its back."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(torch.tanh(inputs @ self.mix.weight.T))))


class TwoInputs(nn.Module):
    """Two towers. `forward(images, words)` gives both embeddings."""

    def __init__(self):
        super().__init__()
        self.images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4))
        self.words = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4))

    def forward(self, images: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        return self.images(images), self.words(words).mean(1)


def next_token(model: nn.Module, batch: Tensor) -> Tensor:
    """The mean cross entropy of each sequence's next tokens."""
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").mean(1)


def matching(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A loss on each pair alone, of a model with two inputs, from a dict that is used up."""
    images, words = model(batch["images"], words=batch["words"])
    return (images - words).square().mean(1)


def contrastive(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss that picks each image's text among all texts: examples see each other's texts, not their images."""
    images, words = model(batch["images"], batch["words"])
    similarity = F.normalize(images, dim=1) @ F.normalize(words, dim=1).T
    return F.cross_entropy(4 * similarity, torch.arange(len(similarity)), reduction="none")


def detection(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """A detector's losses, summed to one scalar."""
    images, targets = batch
    outputs = model(images)
    losses = {"class": F.cross_entropy(outputs, targets), "box": outputs[:, 1:].abs().mean()}
    return sum(losses.values())


def pairs() -> dict[str, Tensor]:
    return {"images": torch.randn(EXAMPLES, 3, 4, 4).double(), "words": tokens()}


conv2d = partial(nn.Conv2d, kernel_size=3, padding=1)

CASES = (
    Case("conv1d", lambda: Pooled(nn.Conv1d(3, 4, 3), nn.GELU(), nn.Conv1d(4, 4, 1), width=4), (3, 6)),
    Case("conv2d", lambda: Pooled(conv2d(3, 4), nn.GELU(), conv2d(4, 4, padding_mode="circular"), width=4), (3, 4, 4)),
    Case("conv3d", lambda: Pooled(nn.Conv3d(2, 3, 2), nn.ReLU(), nn.Conv3d(3, 4, 1), width=4), (2, 3, 3, 3)),
    Case("grouped", lambda: Pooled(conv2d(4, 6, groups=2), nn.ReLU(), conv2d(6, 4, groups=2), width=4), (4, 4, 4)),
    Case("depthwise", lambda: Pooled(conv2d(3, 3, groups=3), nn.ReLU6(True), nn.Conv2d(3, 4, 1), width=4), (3, 4, 4)),
    Case(
        "transposed",
        lambda: Pooled(nn.ConvTranspose2d(4, 6, 2, groups=2), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, 2), width=4),
        (4, 3, 3),
    ),
    Case("transposed1d", lambda: Pooled(nn.ConvTranspose1d(2, 3, 2), nn.Tanh(), width=3), (2, 3)),
    Case("transposed3d", lambda: Pooled(nn.ConvTranspose3d(2, 2, 2, groups=2), nn.Tanh(), width=2), (2, 2, 2, 2)),
    Case("linear", lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(True), nn.Linear(5, CLASSES, bias=False)), (4,)),
    Case("tokens", lambda: Pooled(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4), width=4, channels_last=True), (2, 3, 4)),
    Case("batch_norm1d", lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES)), (4,)),
    Case("batch_norm2d", lambda: Pooled(conv2d(3, 4), nn.BatchNorm2d(4), nn.ReLU(True), width=4), (3, 4, 4)),
    Case("batch_norm3d", lambda: Pooled(nn.BatchNorm3d(2), nn.Tanh(), width=2), (2, 2, 2, 2)),
    Case("batch_statistics", lambda: Pooled(
        conv2d(3, 4), nn.GELU(), nn.BatchNorm2d(4, track_running_stats=False), nn.Tanh(), width=4), (3, 2, 2),
         by_weights=frozenset({"body.0"})),
    Case("layer_norm", lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, CLASSES)), (4,)),
    Case("rms_norm", lambda: Pooled(nn.RMSNorm(4), nn.Tanh(), width=4, channels_last=True), (3, 4)),
    Case("group_norm", lambda: Pooled(conv2d(3, 4), nn.GroupNorm(2, 4), nn.ReLU(True), width=4), (3, 4, 4)),
    Case("instance_norm", lambda: Pooled(nn.InstanceNorm2d(3, affine=True), nn.Tanh(), width=3), (3, 4, 4)),
    Case("instance_norm_running", lambda: Pooled(
        nn.InstanceNorm1d(3, affine=True, track_running_stats=True), nn.Tanh(), width=3), (3, 4)),
    Case("prelu", lambda: Pooled(conv2d(3, 4), nn.PReLU(4), conv2d(4, 4), width=4), (3, 4, 4)),
    Case("attention", Attention, (4, 4), layers=(
        "token", "position", "scale", "self_attention", "self_attention.out_proj", "cross_attention",
        "cross_attention.out_proj", "norm", "head")),
    Case("residual", Residual, (3, 4, 4)),
    Case("read_twice", ReadTwice, (3, 4, 4)),
    Case("shared", Shared, (3, 4, 4)),
    Case("sequence_first", SequenceFirst, (EXAMPLES, 4), by_weights=frozenset({"mix"})),
    Case("functional_use", FunctionalUse, (4,), by_weights=frozenset({"mix"})),
    Case("next_token", Language, batch=tokens, objective=next_token),
    Case("tied", partial(Language, tied=True), batch=tokens, objective=next_token,
         by_weights=frozenset({"out"})),
    Case("two_inputs", TwoInputs, batch=pairs, objective=matching),
    Case("contrastive", TwoInputs, batch=pairs, objective=contrastive,
         by_weights=frozenset({"words.0", "words.1"})),
)  # fmt: skip
"""Every model whose objective returns one loss an example."""

SCALAR = Case("detection", Residual, (3, 4, 4), objective=detection)
"""A model whose objective returns one scalar: batch rows only."""


def case(name: str) -> Case:
    """Return the case of a name."""
    return next(case for case in CASES if case.name == name)


def curve(label, repeat, left, accuracy, at_chance=False):
    full = 1000
    return [
        {
            "criterion": label,
            "repeat": repeat,
            "step": step,
            "pruned_channels": round(10 * (1 - share)),
            "channels": 10,
            "macs": full * share**2,
            "params": full * share,
            "accuracy": value,
            "top5": None,
            "loss": 1 - value,
            "train_accuracy": value,
            "train_top5": None,
            "train_loss": None,
            "seconds": None if step == 0 else 1.5 + repeat,
            "images": 0,
            "at_chance": at_chance and step == len(left) - 1,
        }
        for step, (share, value) in enumerate(zip(left, accuracy, strict=True))
    ]
