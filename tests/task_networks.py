"""Tiny networks for tasks that are no classification, with a batch each; in float64 and seeded."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 11


class Segmenter(nn.Module):
    """Returns a class for every pixel, as torchvision's do: {"out": logits}."""

    def __init__(self, classes: int = 3):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, classes, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"out": self.second(torch.relu(self.norm(self.first(images))))}


class LanguageModel(nn.Module):
    """One block of causal attention over tokens of a small vocabulary."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, width), nn.Linear(width, VOCABULARY)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        q, k, v = (layer(x)[:, None] for layer in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])
        return self.head(x + self.down(F.gelu(self.up(x))))


class Detector(nn.Module):
    """Finds one box an image; as torchvision's do, returns its losses in train mode, and else what it found."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
        self.box, self.label = nn.Linear(24, 4), nn.Linear(24, 3)

    def forward(self, images: Any, targets: Any = None) -> Any:
        x = self.trunk(torch.stack(list(images))).flatten(1)
        corner, label = self.box(x), self.label(x)
        boxes = torch.cat([corner[:, :2], corner[:, :2] + corner[:, 2:].abs() + 1], 1)
        if not self.training:
            scores = label.softmax(1).max(1)
            parts = zip(boxes[:, None], scores.values[:, None], scores.indices[:, None], strict=True)
            return [dict(zip(("boxes", "scores", "labels"), part, strict=True)) for part in parts]
        there = [number for number, target in enumerate(targets) if len(target["boxes"])]
        wanted = torch.stack([targets[number]["boxes"][0] for number in there])
        kinds = torch.stack([targets[number]["labels"][0] for number in there])
        return {"box": F.smooth_l1_loss(boxes[there], wanted), "label": F.cross_entropy(label[there], kinds)}


class PairEncoder(nn.Module):
    """Returns features of images and of texts, and the scale of their closeness."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), nn.Embedding(VOCABULARY, 8)
        self.read = nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.image(images.flatten(1)), self.read(self.text(tokens).mean(1)), self.scale.exp()


class Depths(nn.Module):
    """Returns a number an example, and another of another shape, in a dict."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(7, 2)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        x = torch.tanh(self.first(inputs))
        return {"depth": self.second(x)[:, :, None], "weight": self.third(x)}


def masked_images(n: int = 4) -> tuple[Tensor, Tensor]:
    masks = torch.randint(3, (n, 5, 5))
    masks[0, :2], masks[1, 0] = 255, -100
    return torch.randn(n, 2, 5, 5), masks


def padded_tokens(n: int = 4) -> dict[str, Tensor]:
    lengths = torch.tensor([[7], [3], [5], [2]])[:n]
    mask = (torch.arange(7) < lengths).long()
    return {"input_ids": torch.randint(VOCABULARY, (n, 7)) * mask, "attention_mask": mask}


def boxed_images(n: int = 4) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    corner = 3 * torch.rand(n, 2)
    boxes = torch.cat([corner, corner + 1 + 2 * torch.rand(n, 2)], 1)
    targets = [{"boxes": boxes[i : i + 1], "labels": torch.tensor([i % 3])} for i in range(n)]
    targets[1] = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    return [torch.randn(1, 6, 6) for _ in range(n)], targets


@dataclass(frozen=True)
class TaskCase:
    """A network for a task and how to draw a batch for it."""

    task: str
    network: type[nn.Module]
    draw: Callable[[], Any]
    of_examples: bool = True
    """Whether losses are one an example."""

    def model(self, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.network().double().eval()

    def batch(self, seed: int = 1) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return torch.utils._pytree.tree_map(_double, self.draw())


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


CASES = (
    TaskCase("segmentation", Segmenter, masked_images),
    TaskCase("language_model", LanguageModel, padded_tokens),
    TaskCase("detection", Detector, boxed_images, of_examples=False),
    TaskCase(
        "image_text", PairEncoder, lambda: (torch.randn(4, 1, 6), torch.randint(VOCABULARY, (4, 3))), of_examples=False
    ),
    TaskCase("outputs", Depths, lambda: torch.randn(4, 5)),
)


def case_of(task: str) -> TaskCase:
    return next(case for case in CASES if case.task == task)
