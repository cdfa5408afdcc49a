"""Tasks: their losses row by row, what `evaluate` makes of their metrics, a task of one's own, what does not fit."""

import copy
import dataclasses

import pytest
import torch
import torchmetrics
from oracles import products, state_of
from task_networks import CASES, VOCABULARY, LanguageModel, PairEncoder, Segmenter, TaskCase, case_of
from torch import nn
from torch.nn import functional as F

from obc_tools import TASKS, Task, evaluate, find_groups, jacobian_products, prune, prune_to
from obc_tools.data.batches import count_examples
from obc_tools.errors import UnknownNameError
from obc_tools.scoring.tasks import pair_logits

OF_EXAMPLES = [case for case in CASES if case.of_examples]


def row_gradients(model, batch, rows, losses):
    """Return J: parameter name -> (rows, *shape), one backward pass a row."""
    values, parameters = losses(model, batch), dict(model.named_parameters())
    size = {"sample": 1, "batch": values.numel()}.get(rows, rows)
    found = [
        torch.autograd.grad(row, [*parameters.values()], retain_graph=True, allow_unused=True)
        for row in values.reshape(-1, size).mean(1)
    ]
    whole = [
        [torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), row, strict=True)]
        for row in found
    ]
    return {name: torch.stack(column) for name, column in zip(parameters, zip(*whole, strict=True), strict=True)}


@pytest.mark.parametrize(
    ("case", "rows"),
    [(case, "batch") for case in CASES] + [(case, rows) for case in OF_EXAMPLES for rows in ("sample", 2)],
    ids=lambda value: value.task if isinstance(value, TaskCase) else str(value),
)
def test_rows_equal_brute_force(case, rows):
    model, batches = case.model(), [case.batch(1), case.batch(2)]
    losses = TASKS[case.task].losses
    found = jacobian_products(model, batches, rows=rows, objective=losses)
    jacobians = [row_gradients(model, batch, rows, losses) for batch in batches]
    jacobian = {name: torch.cat([part[name] for part in jacobians]) for name in jacobians[0]}
    assert len(found) >= 4
    for axis, values in found.items():
        torch.testing.assert_close(values, products(model, jacobian, axis), atol=1e-10, rtol=1e-7)


@pytest.mark.parametrize("case", [case for case in CASES if not case.of_examples], ids=lambda case: case.task)
def test_losses_that_see_the_whole_batch_allow_batch_rows_only(case):
    with pytest.raises(ValueError, match="returned one scalar, which allows only rows='batch'"):
        jacobian_products(case.model(), [case.batch()], rows="sample", objective=TASKS[case.task].losses)


def test_contrastive_losses_a_row_each_are_caught(caplog):
    case = case_of("image_text")
    model, batch = case.model(), case.batch()

    def losses(model, batch):
        logits = pair_logits(TASKS["image_text"].forward(model, batch))
        return F.cross_entropy(logits, torch.arange(len(logits)), reduction="none")

    found = jacobian_products(model, [batch], rows="sample", objective=losses)
    jacobian = row_gradients(model, batch, "sample", losses)
    for axis, values in found.items():
        torch.testing.assert_close(values, products(model, jacobian, axis), atol=1e-10, rtol=1e-7)
    assert "one backward pass a row, exact but slow, for: " in caplog.text and "read" in caplog.text


def test_a_sequence_is_scored_as_if_it_stood_alone_without_padding():
    case = case_of("language_model")
    model, batch = case.model(), case.batch()
    losses = TASKS["language_model"].losses(model, batch)
    for row, length in enumerate(batch["attention_mask"].sum(1)):
        alone = TASKS["language_model"].losses(model, batch["input_ids"][row : row + 1, :length])
        torch.testing.assert_close(losses[row : row + 1], alone)


def test_pixels_that_do_not_count_change_nothing():
    case = case_of("segmentation")
    model, (images, masks) = case.model(), case.batch()
    logits = model(images)["out"]
    found = TASKS["segmentation"].losses(model, (images, masks))
    for row, (own, mask) in enumerate(zip(logits, masks, strict=True)):
        counted = (mask >= 0) & (mask != 255)
        torch.testing.assert_close(found[row], F.cross_entropy(own[:, counted].T, mask[counted]))


def test_equal_texts_share_a_target():
    case = case_of("image_text")
    model, (images, tokens) = case.model(), case.batch()
    distinct = TASKS["image_text"].losses(model, (images, tokens))
    logits = pair_logits(TASKS["image_text"].forward(model, (images, tokens)))
    wanted = (F.cross_entropy(logits, torch.arange(4)) + F.cross_entropy(logits.T, torch.arange(4))) / 2
    torch.testing.assert_close(distinct, wanted)
    equal = TASKS["image_text"].losses(model, (images, tokens[:1].expand(4, -1)))
    logits = pair_logits(TASKS["image_text"].forward(model, (images, tokens[:1].expand(4, -1))))
    torch.testing.assert_close(equal, -(logits.log_softmax(1).mean() + logits.log_softmax(0).mean()) / 2)


def test_projections_estimate_the_change_of_the_outputs():
    """Over many seeds, the mean of Σ (J w)² of ⟨r, f⟩ is that of the outputs themselves, one row an output."""
    from obc_tools.scoring.tasks import outputs_task

    case = case_of("outputs")
    model, batch = case.model(), case.batch()
    by_projection = [
        jacobian_products(model, [batch], rows="sample", objective=outputs_task(seed=seed).losses, layers=["first"])
        .scores()["first", "out"]
        .double()
        for seed in range(400)
    ]
    outputs = torch.cat([leaf.flatten(1) for leaf in model(batch).values()], 1)
    exact = 0
    for value in outputs.flatten():
        grads = torch.autograd.grad(value, [model.first.weight, model.first.bias], retain_graph=True)
        exact = exact + ((model.first.weight * grads[0]).sum(1) + model.first.bias * grads[1]).square()
    assert (torch.stack(by_projection).mean(0) / exact).sub(1).abs().max() < 0.2


def test_projections_are_those_of_the_batch():
    case = case_of("outputs")
    model, losses = case.model(), TASKS["outputs"].losses
    assert torch.equal(losses(model, case.batch(1)), losses(model, case.batch(1)))
    assert not torch.allclose(losses(model, case.batch(1)), losses(model, case.batch(2)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.task)
def test_evaluate_names_metrics_and_directions_and_borrows_the_model(case):
    model, task = case.model().train(), TASKS[case.task]
    task = task if task.against is None else task.against(copy.deepcopy(model))
    before = state_of(model)
    found = evaluate(model, iter([case.batch(1), case.batch(2)]), task=task)
    assert state_of(model) == before
    assert next(iter(found.values)) == task.headline == next(iter(task.directions))
    assert {*found.values} <= {*task.directions} and found.directions == task.directions
    assert repr(found).startswith(f"{case.task}: {task.headline} ") and found.to_frame().shape == (1, len(found.values))


def test_one_s_own_task():
    def losses(model, batch):
        return (model(batch[0]) - batch[1]).square().mean(1)

    def metrics(model, batches):
        error = torchmetrics.MeanAbsoluteError()
        for inputs, depths in batches:
            error.update(model(inputs), depths)
        return {"error": error.compute()}

    depth = Task("depth", losses, metrics, directions={"error": "lower"})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, batch = (
            nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
            (torch.randn(6, 4), torch.randn(6, 2)),
        )
    found = evaluate(model, [batch], task=depth)
    assert found.values["error"] == pytest.approx((model(batch[0]) - batch[1]).abs().mean().item())
    assert repr(found) == f"depth: error {found.values['error']:.4g} ↓"
    plan = prune_to(model, batch[0][:1], [batch], ratio=0.5, steps=2, task=depth, progress=False)
    other = prune_to(model, batch[0][:1], [batch], ratio=0.5, steps=2, objective=losses, progress=False)
    assert plan == other and prune(model, plan)[0].out_features == 4


@pytest.mark.parametrize("case", [case for case in CASES if case.task != "detection"], ids=lambda case: case.task)
def test_a_batch_is_an_example_to_trace(case):
    model, task = case.model(), TASKS[case.task]
    groups = find_groups(model, task.example(case.batch()))
    assert any(group.prunable for group in groups)


def constant(value):
    return lambda model, batches: value


BAD = {
    r"batch 1: task 'segmentation' does not fit Segmenter: its metrics returned NoneType; expected a mapping": None,
    r"the metrics of task 'segmentation' returned no 'mean_iou', its headline": {},
    r"metric 'mean_iou' of task 'segmentation' is NaN": {"mean_iou": float("nan")},
    r"measured 'depth', which has no direction; known are mean_iou, pixel_accuracy, loss": {"mean_iou": 1, "depth": 2},
}


@pytest.mark.parametrize(("message", "value"), BAD.items())
def test_metrics_that_say_nothing_are_refused(message, value):
    case = case_of("segmentation")

    def metrics(model, batches):
        _ = list(batches)
        return value

    task = dataclasses.replace(TASKS["segmentation"], metrics=metrics)
    with pytest.raises(ValueError, match=message):
        evaluate(case.model(), [case.batch()], task=task)


def test_targets_of_another_task_are_refused():
    images, masks = case_of("segmentation").batch()
    model = Segmenter().double()
    with pytest.raises(
        ValueError, match=r"batch 1: task 'segmentation' does not fit Segmenter: targets torch.int64 \(4,\)"
    ):
        evaluate(model, [(images, torch.zeros(4, dtype=torch.int64))], task="segmentation")
    with pytest.raises(ValueError, match=r"batch 2: .* class 3 for a model with 3 outputs \(0 to 2\)"):
        evaluate(model, [(images, masks), (images, masks.clamp(0, 2) + 1)], task="segmentation")
    with pytest.raises(ValueError, match="outputs are no detections: expected a list"):
        evaluate(torch.nn.Identity(), [(images, masks)], task="detection")
    with pytest.raises(ValueError, match="does not fit Segmenter: the model returned no features|takes 2 positional"):
        evaluate(model, [(images, masks)], task="image_text")
    with pytest.raises(ValueError, match=f"token {VOCABULARY} for a model with {VOCABULARY} outputs"):
        batch = {"input_ids": torch.zeros(1, 4, dtype=torch.int64), "labels": torch.full((1, 4), VOCABULARY)}
        evaluate(LanguageModel(), [batch], task="language_model")
    with pytest.raises(ValueError, match="task 'language_model' does not fit LanguageModel: index out of range"):
        evaluate(LanguageModel(), [torch.full((1, 4), VOCABULARY)], task="language_model")
    with pytest.raises(ValueError, match=r"compares with the network as it was: pass task=TASKS\['outputs'\].against"):
        evaluate(PairEncoder(), [torch.zeros(1, 6)], task="outputs")


def test_tasks_are_checked_when_built_and_found_by_name():
    with pytest.raises(UnknownNameError, match="unknown task 'segmentatoin'; closest: segmentation"):
        evaluate(Segmenter(), [], task="segmentatoin")
    with pytest.raises(ValueError, match="task=3: expected a Task or one of classification, "):
        evaluate(Segmenter(), [], task=3)
    with pytest.raises(ValueError, match="task 'depth': losses is None; expected a function"):
        Task("depth", None, constant({}), directions={"error": "lower"})
    for directions in ({}, {"error": "smaller"}):
        with pytest.raises(ValueError, match="expected 'higher' or 'lower', whichever is better"):
            Task("depth", len, len, directions=directions)


def test_examples_are_counted_in_every_structure():
    for case in CASES:
        assert count_examples(case.batch()) == 4
    with pytest.raises(ValueError, match="a batch of type int holds no tensor"):
        count_examples(3)
