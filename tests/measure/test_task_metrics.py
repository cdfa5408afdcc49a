"""Metrics of tasks against slow and obvious ones."""

import math

import pytest
import torch
from task_networks import case_of
from torch import nn
from torch.nn import functional as F

from obc_tools import TASKS, evaluate
from obc_tools.measure.detections import AveragePrecision
from obc_tools.scoring.tasks import language_task


def overlap(one, other):
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    common = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return common / (sum(areas) - common)


def slow_precision(found, targets, threshold):
    """Average precision of one threshold: loops over images, boxes and recalls, as COCO's rules read."""
    classes = sorted({label for target in targets for label in target["labels"].tolist()})
    means = []
    for kind in classes:
        verdicts, wanted = [], 0
        for own, target in zip(found, targets, strict=True):
            all_free = zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True)
            free = [box for box, label in all_free if label == kind]
            wanted += len(free)
            mine = zip(own["scores"].tolist(), own["boxes"].tolist(), own["labels"].tolist(), strict=True)
            for score, box, label in sorted(mine, reverse=True):
                if label != kind:
                    continue
                best = max(free, key=lambda other, box=box: overlap(box, other), default=None)
                hit = best is not None and overlap(box, best) >= threshold
                if hit:
                    free.remove(best)
                verdicts.append((score, hit))
        verdicts.sort(key=lambda verdict: -verdict[0])
        right = [sum(hit for _, hit in verdicts[: n + 1]) for n in range(len(verdicts))]
        points = [(r / wanted, r / (n + 1)) for n, r in enumerate(right)]
        means.append(sum(max((p for r, p in points if r >= level / 100), default=0.0) for level in range(101)) / 101)
    return sum(means) / len(means)


def boxes(generator, n):
    corner = 6 * torch.rand(n, 2, generator=generator)
    return torch.cat([corner, corner + 2 + 2 * torch.rand(n, 2, generator=generator)], 1)


def scene(seed):
    g = torch.Generator().manual_seed(seed)
    targets, found = [], []
    for number in (3, 0, 5, 2):
        own = boxes(g, number)
        labels = torch.randint(3, (number,), generator=g)
        targets.append({"boxes": own, "labels": labels})
        extra = int(torch.randint(3, (), generator=g))
        moved = own + 0.5 * torch.randn(own.shape, generator=g)
        moved[:, 2:] = torch.maximum(moved[:, 2:], moved[:, :2] + 0.1)
        guesses = torch.randint(3, (extra,), generator=g)
        found.append(
            {
                "boxes": torch.cat([moved, boxes(g, extra)]),
                "labels": torch.cat([labels, guesses]),
                "scores": torch.rand(number + extra, generator=g),
            }
        )
    return found, targets


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_equals_the_rules_by_loops(seed):
    found, targets = scene(seed)
    metric = AveragePrecision()
    metric.update(found[:2], targets[:2])
    metric.update(found[2:], targets[2:])
    values = metric.compute()
    wanted = [slow_precision(found, targets, 0.5 + 0.05 * step) for step in range(10)]
    assert values["map50"] == pytest.approx(wanted[0], abs=1e-10)
    assert values["map"] == pytest.approx(sum(wanted) / 10, abs=1e-10)
    assert 0 < values["map"] < values["map50"] < 1


def test_average_precision_of_perfect_missing_and_superfluous_boxes():
    _, targets = scene(0)
    perfect = [target | {"scores": torch.ones(len(target["labels"]))} for target in targets]
    metric = AveragePrecision()
    metric.update(perfect, targets)
    assert metric.compute() == {"map50": 1.0, "map": 1.0}
    nothing = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}] * 4
    metric = AveragePrecision()
    metric.update(nothing, targets)
    assert metric.compute() == {"map50": 0.0, "map": 0.0}
    metric = AveragePrecision()
    metric.update(perfect, [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}] * 4)
    assert math.isnan(metric.compute()["map50"])
    with pytest.raises(ValueError, match="boxes of 3 images for targets of 4"):
        metric.update(perfect[:3], targets)


def test_an_image_without_a_box_is_no_error():
    case = case_of("detection")
    images, targets = case.batch()
    assert len(targets[1]["boxes"]) == 0
    assert 0 <= evaluate(case.model(), [(images, targets)], task="detection").values["map50"] <= 1


def test_perplexity_and_bits_count_tokens_without_padding():
    case = case_of("language_model")
    model, batches = case.model(), [case.batch(1), case.batch(2)]
    losses = []
    for batch in batches:
        for tokens, length in zip(batch["input_ids"], batch["attention_mask"].sum(1), strict=True):
            logits = model(tokens[None, :length])[0]
            losses += [F.cross_entropy(logits[at], tokens[at + 1]).item() for at in range(length - 1)]
    mean = sum(losses) / len(losses)
    values = evaluate(model, batches, task="language_model").values
    assert values["perplexity"] == pytest.approx(math.exp(mean), rel=1e-6)
    assert values["bits_a_byte"] == pytest.approx(mean / math.log(2), rel=1e-6)
    task = language_task(lambda model, batch: model(batch["input_ids"]))
    counted = evaluate(model, [batch | {"bytes": torch.tensor([9, 9, 9, 9])} for batch in batches], task=task)
    assert counted.values["bits_a_byte"] == pytest.approx(sum(losses) / 72 / math.log(2), rel=1e-6)


def test_a_large_vocabulary_has_no_bits_a_byte():
    model = nn.Sequential(nn.Embedding(600, 4), nn.Linear(4, 600))
    values = evaluate(model, [torch.randint(600, (2, 5), generator=torch.Generator())], task="language_model").values
    assert {*values} == {"perplexity", "loss"}


def test_mean_overlap_counts_pixels_by_hand():
    case = case_of("segmentation")
    model, (images, masks) = case.model(), case.batch()
    chosen = model(images)["out"].argmax(1)
    counted = (masks >= 0) & (masks != 255)
    shares = []
    for kind in range(3):
        own, wanted = (chosen == kind) & counted, masks == kind
        shares.append(((own & wanted).sum() / (own | wanted).sum()).item())
    values = evaluate(model, [(images[:1], masks[:1]), (images[1:], masks[1:])], task="segmentation").values
    assert values["mean_iou"] == pytest.approx(sum(shares) / 3, abs=1e-6)
    assert values["pixel_accuracy"] == pytest.approx((chosen == masks)[counted].double().mean().item(), abs=1e-6)


def test_retrieval_is_over_distinct_texts():
    images = torch.eye(3)[[0, 0, 1, 2]]
    tokens = torch.tensor([[5], [5], [6], [7]])
    texts = torch.eye(3)[[0, 0, 2, 1]]  # of 6 and 7 each is closest to the other's image

    class Known(nn.Module):
        def forward(self, images, tokens):
            return images, texts, torch.tensor(1.0)

    values = evaluate(Known(), [(images, tokens)], task="image_text").values
    assert values == {"zero_shot_accuracy": 0.5, "recall_at_1": pytest.approx(1 / 3)}


def test_closeness_of_a_network_to_itself_and_to_its_double():
    case = case_of("outputs")
    model = case.model()
    task = TASKS["outputs"].against(model)
    same = evaluate(model, [case.batch(1), case.batch(2)], task=task).values
    assert same == {"cosine": pytest.approx(1, abs=1e-12), "relative_error": 0}
    twice = case.model()
    for layer in (twice.second, twice.third):
        for parameter in layer.parameters():
            parameter.data *= 2
    found = evaluate(twice, [case.batch(1), case.batch(2)], task=task).values
    assert found == {"cosine": pytest.approx(1, abs=1e-12), "relative_error": pytest.approx(1, abs=1e-12)}
