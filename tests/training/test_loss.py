"""The training objective against its formula, written out."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from obc_tools.scoring.objectives import classification
from obc_tools.training.recipe import Recipe
from obc_tools.training.stepper import count_correct, training_loss


def example(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits, teacher = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    return logits, torch.randint(4, (6,), generator=generator), teacher


def test_distillation_is_temperature_squared_times_the_divergence():
    logits, labels, teacher = example()
    recipe = Recipe(epochs=1, label_weight=0.3, distill_weight=0.7, temperature=4.0, label_smoothing=0.1)
    targets = 0.9 * torch.nn.functional.one_hot(labels, 4).double() + 0.1 / 4
    entropy = -(targets * logits.log_softmax(1)).sum(1).mean()
    p, q = (teacher / 4).softmax(1), (logits / 4).softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean()
    expected = 0.3 * entropy + 0.7 * 16 * divergence
    assert training_loss(logits, labels, recipe, teacher).item() == pytest.approx(expected.item(), abs=1e-12)
    shares = torch.nn.functional.one_hot(labels, 4).double()
    assert training_loss(logits, shares, recipe, teacher).item() == pytest.approx(expected.item(), abs=1e-12)


def test_half_precision_is_widened():
    logits, labels, _ = example()
    loss = training_loss(logits.bfloat16(), labels, Recipe(epochs=1))
    assert loss.dtype == torch.float32


def test_counts_the_class_with_the_largest_share():
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    assert count_correct(logits, torch.tensor([0, 1, 1])) == 2
    assert count_correct(logits, torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8]])) == 1


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_whole_labels_of_any_type_are_class_numbers(dtype):
    torch.manual_seed(0)
    model, images, labels = nn.Linear(5, 3), torch.randn(4, 5), torch.tensor([0, 2, 1, 2])
    torch.testing.assert_close(
        training_loss(model(images), labels.to(dtype), Recipe(epochs=1)), F.cross_entropy(model(images), labels)
    )
    losses = classification(model, (images, labels.to(dtype)))
    torch.testing.assert_close(losses, F.cross_entropy(model(images), labels, reduction="none"))
