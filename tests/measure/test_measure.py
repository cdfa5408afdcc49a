import math

import pytest
import torch
from networks import network
from torch import Tensor, nn
from torch.nn import functional as F

from obc_tools.measure.costs import cost
from obc_tools.measure.latency import Latencies, Latency, latencies, latency
from obc_tools.measure.metrics import Metrics
from obc_tools.scoring.tasks import evaluate


class Table(nn.Module):
    """Looks its outputs up: row i for an image that is all i."""

    def __init__(self, rows: Tensor):
        super().__init__()
        self.rows = nn.Parameter(rows)

    def forward(self, images: Tensor) -> Tensor:
        return self.rows[images.flatten(1)[:, 0].long()]


class Counting(nn.Module):
    """Notes every forward pass, the mode and whether gradients were on."""

    def __init__(self, log: list, name: str = ""):
        super().__init__()
        self.weight, self.log, self.name = nn.Parameter(torch.ones(3)), log, name

    def forward(self, x: Tensor) -> Tensor:
        self.log.append((self.name, self.training, torch.is_grad_enabled(), torch.get_num_threads()))
        return x * self.weight


def images_of(rows: range) -> Tensor:
    return torch.tensor(list(rows), dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)


def batches_of(labels: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images_of(range(len(labels))).split(size), labels.split(size), strict=True))


@pytest.mark.parametrize("size", [1, 4, 7])
def test_metrics_are_exact_over_batches_of_any_size(size):
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(7, 9, dtype=torch.float64, generator=generator)
    labels = torch.randint(9, (7,), generator=generator)
    order = outputs.argsort(1, descending=True)
    found = evaluate(Table(outputs), iter(batches_of(labels, size)))
    assert found.loss == pytest.approx(F.cross_entropy(outputs, labels).item(), abs=1e-12)
    assert found.accuracy == sum(row[0] == label for row, label in zip(order, labels, strict=True)).item() / 7
    assert found.top5 == sum(label in row[:5] for row, label in zip(order, labels, strict=True)) / 7
    assert 0 < found.accuracy < found.top5 < 1 and found.examples == 7


def test_few_classes_have_no_top5():
    found = evaluate(Table(torch.eye(5)), batches_of(torch.tensor([0, 1, 2, 4, 3]), 2))
    assert (found.accuracy, found.top5) == (3 / 5, None)
    assert evaluate(Table(torch.eye(6)), batches_of(torch.arange(6), 4)).top5 == 1


def test_equal_outputs_rank_in_order():
    found = evaluate(Table(torch.zeros(7, 7)), batches_of(torch.arange(7), 7))
    assert (found.accuracy, found.top5) == (1 / 7, 5 / 7)


def test_half_precision_is_evaluated_in_single():
    outputs = torch.tensor([[8.0, 0.0, 1.0], [0.0, 1.0, 8.0]]).half()
    found = evaluate(Table(outputs), batches_of(torch.tensor([0, 2], dtype=torch.uint8), 2))
    assert found.loss == pytest.approx(F.cross_entropy(outputs.float(), torch.tensor([0, 2])).item(), rel=1e-6)


def test_evaluate_borrows_the_model():
    log: list = []
    model, images = Counting(log).train(), torch.eye(3)
    evaluate(model, [(images, torch.arange(3))])
    assert model.training and log[0][1:3] == (False, False)
    with pytest.raises(ValueError, match="label 3"):
        evaluate(model, [(images, torch.arange(3)), (images, torch.arange(1, 4))])
    assert model.training and torch.is_grad_enabled()


def test_progress_is_shown_only_when_asked_for(capsys):
    batches = [(torch.eye(3), torch.arange(3))]
    evaluate(nn.Identity(), batches)
    assert capsys.readouterr().err == ""
    evaluate(nn.Identity(), batches, progress=True)
    assert "evaluate" in capsys.readouterr().err


GOOD = (torch.eye(3), torch.arange(3))
BAD = {
    "no batches": (nn.Identity(), [], "the batches yield no data: an empty data set"),
    "empty batches": (nn.Identity(), [(torch.zeros(0, 3), torch.arange(0))], "yield no data: all of them are empty"),
    "large label": (
        nn.Identity(),
        [GOOD, (torch.eye(3), torch.arange(1, 4))],
        r"batch 2: label 3 for a model with 3 outputs \(0 to 2\)",
    ),
    "negative label": (nn.Identity(), [(torch.eye(3), torch.arange(3) - 1)], "batch 1: label -1 for a model with 3"),
    "NaN": (
        nn.Identity(),
        [GOOD, (torch.tensor([[1.0, math.nan], [1.0, 2.0]]), torch.arange(2))],
        "batch 2: the loss of 1 of 2 examples is not finite; look for NaN",
    ),
    "infinity": (nn.Identity(), [(torch.eye(3) * math.inf, torch.arange(3))], "batch 1: the loss of 3 of 3 examples"),
    "pixels": (
        nn.Identity(),
        [(torch.zeros(3, 4, 2), torch.arange(3))],
        r"batch 1: outputs of shape \(3, 4, 2\) for 3 labels; expected \(examples, classes\)",
    ),
    "fewer outputs": (nn.Identity(), [(torch.eye(3), torch.arange(2))], r"outputs of shape \(3, 3\) for 2 labels"),
    "a tuple": (nn.LSTM(3, 3), [GOOD], "batch 1: outputs of type tuple for 3 labels"),
    "images alone": (nn.Identity(), [torch.eye(2)], r"batch 1: expected a pair \(images, labels\)"),
    "soft labels": (nn.Identity(), [(torch.eye(3), torch.eye(3))], "labels integers of shape"),
    "no tensor": (nn.Identity(), [([[0.0]], torch.arange(1))], r"batch 1: expected a pair \(images, labels\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    model, batches, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        evaluate(model, batches)


def test_metrics_are_shown_with_units():
    found = Metrics(0.27131, 0.93341, 0.998, 10_000)
    assert repr(found) == "accuracy 93.34%, top-5 99.80%, loss 0.2713 (10,000 examples)"
    assert repr(Metrics(1.0, 0.5, None, 2)) == "accuracy 50.00%, loss 1.0000 (2 examples)"
    assert repr(found) in found._repr_html_()
    row = {"loss": 0.27131, "accuracy": 0.93341, "top5": 0.998, "examples": 10_000}
    assert found.to_frame().to_dict("records") == [row]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.0, 1.5, None, 3), "expected shares in"),
        ((0.0, 0.5, -0.1, 3), "expected shares in"),
        ((0.0, 0.5, None, 0), "metrics of 0 examples; expected at least 1"),
    ],
)
def test_impossible_metrics_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Metrics(*values)


def test_latency_says_what_was_measured():
    model, images = network("small_vgg")
    found = latency(model.train(), images, repeats=4, warmup=1)
    assert model.training and len(found.seconds) == 4 and min(found.seconds) > 0
    assert (found.batch_size, found.device, found.dtype) == (4, "cpu", "float64")
    assert found.threads == torch.get_num_threads()


def test_models_take_turns_in_eval_mode_without_gradients_after_a_warm_up():
    log = []
    models = {name: Counting(log, name) for name in "ab"}
    models["b"].eval()
    before = torch.get_num_threads()
    found = latencies(models, torch.ones(2, 3), repeats=3, warmup=2, threads=1)
    assert [name for name, *_ in log] == list("ab") * 5
    assert {entry[1:] for entry in log} == {(False, False, 1)}
    assert [len(measured.seconds) for measured in found.values()] == [3, 3] and found["a"].threads == 1
    assert torch.get_num_threads() == before and models["a"].training and not models["b"].training


def test_state_is_restored_when_a_model_fails():
    model, before = Counting([]).train(), torch.get_num_threads()
    with pytest.raises(ValueError, match=r"example inputs: Counting cannot work on \(2, 5\) float32"):
        latency(model, torch.ones(2, 5), threads=before + 1)
    assert model.training and torch.get_num_threads() == before


def test_several_arguments_are_passed_on():
    model = nn.Bilinear(2, 3, 1)
    inputs = (torch.ones(5, 2), torch.ones(5, 3))
    assert latency(model, inputs, repeats=1, warmup=0).batch_size == 5
    named = dict(zip(("input1", "input2"), inputs, strict=True))
    assert latency(model, named, repeats=1, warmup=0).batch_size == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 0}, "latency: repeats=0: expected at least 1"),
        ({"warmup": -1}, "latency: warmup=-1: expected at least 0"),
        ({"threads": 0}, "latency: threads=0: expected at least 1, or None"),
    ],
)
def test_too_small_numbers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        latency(nn.Identity(), torch.ones(1, 3), **options)


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="latency: the model is on meta; move it to one of cpu, cuda"):
        latency(nn.Linear(3, 2, device="meta"), torch.ones(1, 3))
    with pytest.raises(ValueError, match="latency: models=0"):
        latencies({}, torch.ones(1, 3))


def test_latency_statistics_and_units():
    found = Latency((0.004, 0.001, 0.003, 0.002, 0.010), 8, "cpu", "float32", 2)
    assert (found.median_seconds, found.median_ms) == (0.003, 3.0)
    assert found.quartiles_seconds == (0.002, 0.004)
    text = "3 ms (quartiles 2 and 4 ms of 5 repeats; batch size 8, float32, cpu, 2 threads)"
    assert repr(found) == text and text in found._repr_html_()
    assert Latency((0.5,), 1, "cuda:0", "float16", 2).quartiles_seconds == (0.5, 0.5)
    assert repr(Latency((0.5,), 1, "cuda:0", "float16", 2)).endswith("of 1 repeats; batch size 1, float16, cuda:0)")


@pytest.mark.parametrize("seconds", [(), (0.1, -0.1), (math.nan,)])
def test_impossible_durations_are_refused(seconds):
    with pytest.raises(ValueError, match="expected at least one, none below 0 seconds"):
        Latency(seconds, 1, "cpu", "float32", 1)


def test_speedups_compare_round_with_round():
    """The machine was ten times slower in the last two rounds; each model always took its share."""
    slow, fast = (0.002, 0.002, 0.02, 0.02), (0.001, 0.001, 0.01, 0.01)
    found = Latencies({name: Latency(s, 1, "cpu", "float32", 1) for name, s in (("slow", slow), ("fast", fast))})
    assert (found.speedup("slow"), found.speedup("fast")) == (1, 2)
    frame = found.to_frame()
    assert frame["model"].tolist() == ["slow", "fast"] and frame["speed-up"].tolist() == [1, 2]
    assert frame["median (ms)"].tolist() == [11, 5.5] and frame["third quartile (ms)"].tolist() == [20, 10]
    assert len(found) == 2 and "speed-up" in repr(found) and "<table" in found._repr_html_()


def test_measure_is_the_one_door_to_costs():
    model, images = network("small_vgg")
    assert cost(model, images).params == sum(parameter.numel() for parameter in model.parameters())
