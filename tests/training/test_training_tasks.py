"""`fit` on tasks that are no classification: the usual loop, pieces, distillation, imitation, folders, refusals."""

import copy
import dataclasses
import json

import pytest
import torch
from task_networks import CASES, Detector, case_of
from trainings import batches_of, network, numbers, same_state

from obc_tools import TASKS, EquivalentModel, Recipe, fit, make_plan, score_groups
from obc_tools.scoring.tasks import pair_logits
from obc_tools.structure.groups import find_groups
from obc_tools.training.folder import read_history

RECIPE = Recipe(epochs=2, lr=0.05, schedule="constant", momentum=0, weight_decay=0)
TRAINED = [case for case in CASES if case.task != "outputs"]


def batches(case, count=3):
    return [case.batch(seed) for seed in range(1, count + 1)]


def usual_loop(model, losses, given, recipe=RECIPE):
    """Plain gradient descent, two epochs; return the mean loss of each."""
    means = []
    model.train()
    for _ in range(recipe.epochs):
        seen = []
        for batch in given:
            loss = losses(model, batch).mean()
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= recipe.lr * parameter.grad
            seen.append(loss.item())
        means.append(sum(seen) / len(seen))
    return means


def assert_same_weights(model, expected):
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, atol=1e-10, rtol=0, msg=name)


@pytest.mark.parametrize("case", TRAINED, ids=lambda case: case.task)
def test_is_the_usual_loop(case):
    model, expected, task = case.model(), case.model(), TASKS[case.task]
    history = fit(model, batches(case), batches(case, 1), RECIPE, task=case.task, progress=False)
    means = usual_loop(expected, task.losses, batches(case))
    assert_same_weights(model, expected)
    assert [epoch.train_loss for epoch in history] == pytest.approx(means, abs=1e-10)
    assert not model.training and not same_state(model, case.model())
    last = history.last
    assert last.train_accuracy is last.val_accuracy is None and next(iter(last.values)) == task.headline
    assert f"val_{task.headline}" in history.to_frame() and "train_accuracy" not in history.to_frame()
    value, sign = last.values[task.headline], {"higher": "↑", "lower": "↓"}[task.directions[task.headline]]
    assert f"validation {task.headline} {value:.4g} {sign}" in str(last)


def test_imitation_follows_the_original():
    case = case_of("outputs")
    original, model, expected = case.model(), case.model(seed=3), case.model(seed=3)
    given = batches(case)
    history = fit(model, given, given[:1], RECIPE, task="outputs", teacher=original, progress=False)

    def distance(model, batch):
        told, wanted = model(batch), original(batch)
        squares = [
            sum(part.flatten(1).square().sum(1) for part in parts)
            for parts in (
                [told[name] - wanted[name].detach() for name in told],
                [wanted[name].detach() for name in told],
            )
        ]
        return squares[0] / squares[1]

    usual_loop(expected, distance, given)
    assert_same_weights(model, expected)
    first, last = history
    assert last.values["relative_error"] < first.values["relative_error"] and history.best is last
    assert same_state(original, case.model())


@pytest.mark.parametrize("task", ["segmentation", "language_model"])
def test_pieces_of_a_batch_add_up(task):
    """Without statistics over a batch, two pieces give the gradients of the whole."""
    case = case_of(task)
    whole, pieces = case.model(), case.model()
    frozen = {"freeze_statistics": True, "epochs": 1, "lr": 0.05, "momentum": 0.0}
    given = batches(case)
    one = fit(whole, given, given[:1], Recipe(**frozen), task=task, progress=False)
    two = fit(pieces, given, given[:1], Recipe(**frozen, accumulate=2), task=task, progress=False)
    assert_same_weights(pieces, whole)
    assert one.last.train_loss == pytest.approx(two.last.train_loss, abs=1e-10)


def logits_by_hand(task, model, batch):
    if task == "segmentation":
        images, masks = batch
        return model(images)["out"].permute(0, 2, 3, 1)[(masks >= 0) & (masks != 255)]
    if task == "image_text":
        return pair_logits(TASKS[task].forward(model, batch))
    counted = torch.zeros_like(batch["attention_mask"], dtype=torch.bool)
    counted[:, :-1] = batch["attention_mask"][:, 1:] == 1
    return model(batch["input_ids"])[counted]


@pytest.mark.parametrize("task", ["segmentation", "language_model", "image_text"])
def test_distillation_is_over_the_rows_that_count(task):
    case = case_of(task)
    model, expected, teacher = case.model(), case.model(), case.model(seed=5)
    recipe = Recipe(
        epochs=2,
        lr=0.05,
        schedule="constant",
        momentum=0,
        weight_decay=0,
        label_weight=0.3,
        distill_weight=0.7,
        temperature=2.0,
    )

    def losses(model, batch):
        own, taught = (logits_by_hand(task, network, batch) / 2 for network in (model, teacher))
        divergence = (taught.softmax(1) * (taught.log_softmax(1) - own.log_softmax(1))).sum(1).mean()
        return 0.3 * TASKS[task].losses(model, batch).mean() + 0.7 * 4 * divergence

    fit(model, batches(case), batches(case, 1), recipe, task=task, teacher=teacher, progress=False)
    assert_close_after_training(task, model, expected, losses, batches(case), recipe)


def assert_close_after_training(task, model, expected, losses, given, recipe):
    usual_loop(expected, losses, given, recipe)
    if task != "segmentation":  # there the loop by hand runs the batch norm twice a step
        assert_same_weights(model, expected)
        return
    for (name, one), (_, other) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0, msg=name)
    assert model.norm.num_batches_tracked == 6 and expected.norm.num_batches_tracked == 12


@pytest.mark.parametrize("case", TRAINED, ids=lambda case: case.task)
def test_equivalent_models_learn_every_task(case):
    model, task = case.model(), TASKS[case.task]
    example = task.example(case.batch()) if case.task != "detection" else case.batch()[0][0][None]
    groups = find_groups(model, example)
    plan = make_plan(score_groups(model, groups, "jacobian", batches(case), objective=task.losses), ratio=0.4)
    ep = EquivalentModel(model, plan)
    history = fit(ep, batches(case), batches(case, 1), RECIPE, task=case.task, progress=False)
    merged = ep.merge()
    own, other = (task.losses(network.eval(), case.batch()) for network in (ep, merged))
    torch.testing.assert_close(own, other)
    assert history.last.train_loss < history[0].train_loss and plan.channels_removed


def test_a_history_is_kept_and_gone_on_from(tmp_path):
    case = case_of("segmentation")
    given = batches(case)
    whole, part = case.model(), case.model()
    long = Recipe(epochs=4, lr=0.05)
    expected = fit(whole, given, given[:1], long, task="segmentation", progress=False)

    class Enough(Exception):
        pass

    def stop_after_two(history):
        if len(history) == 2:
            raise Enough

    with pytest.raises(Enough):
        fit(part, given, given[:1], long, task="segmentation", run=tmp_path, on_epoch=stop_after_two, progress=False)
    rest = case.model()
    found = fit(rest, given, given[:1], long, task="segmentation", run=tmp_path, resume=True, progress=False)
    assert_same_weights(rest, whole)
    keep = [(e.train_loss, e.values, e.directions) for e in found]
    assert keep == [(e.train_loss, e.values, e.directions) for e in expected]
    assert read_history(tmp_path) == found


def test_the_files_of_classification_stay_as_they_were(tmp_path):
    given = batches_of((4, 4))
    history = fit(network(), given, given, Recipe(epochs=1), run=tmp_path, progress=False)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    fields = ["epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "seconds", "images_per_second"]
    assert [*line] == fields == [*history.to_frame().columns]


def test_classification_by_its_name_is_the_default():
    given = batches_of((4, 4))
    one, other = network(), network()
    histories = [
        fit(model, given, given, Recipe(epochs=2), progress=False, **options)
        for model, options in ((one, {}), (other, {"task": "classification"}))
    ]
    assert same_state(one, other) and numbers(histories[0]) == numbers(histories[1])


REFUSED = {
    "train, batch 1: task 'segmentation' does not fit Segmenter: targets": ("segmentation", {}, {"train": "labels"}),
    "val, batch 1: task 'segmentation' does not fit Segmenter: targets": ("segmentation", {}, {"val": "labels"}),
    "task 'outputs' trains a model to do as the original does: pass teacher=, the original": ("outputs", {}, {}),
    "label_smoothing=0.1 is for classification, not for 'language_model'": (
        "language_model",
        {"label_smoothing": 0.1},
        {},
    ),
    "task 'detection' does not fit Detector: it has no logits to distil; set distill_weight to 0": (
        "detection",
        {"distill_weight": 0.5},
        {"teacher": True},
    ),
    "train: batches that yield no data": ("segmentation", {}, {"train": "none"}),
    r"train, batch 1: .* targets of type Tensor; expected a list of \{'boxes', 'labels'\}": (
        "detection",
        {},
        {"train": "classes"},
    ),
    r"val, batch 1: .* targets of type list; expected a list of \{'boxes', 'labels'\}": (
        "detection",
        {},
        {"val": "no boxes"},
    ),
    "metric 'map50' of task 'detection' is NaN": ("detection", {}, {"val": "nothing there"}),
}


@pytest.mark.parametrize(("message", "given"), REFUSED.items(), ids=list(REFUSED))
def test_what_does_not_fit_is_refused_before_training(message, given):
    task, recipe, wrong = given
    case = case_of(task)
    sets = {"train": batches(case), "val": batches(case, 1)}
    classes, pictures = torch.zeros(4, dtype=torch.int64), case_of("detection").batch()[0]
    empty = {"boxes": torch.zeros(0, 4), "labels": classes[:0]}
    others = {
        "labels": [(torch.randn(4, 2, 5, 5).double(), classes)],
        "none": [],
        "classes": [(pictures, classes)],
        "no boxes": [(pictures, [{"labels": classes}] * 4)],
        "nothing there": [(pictures, [empty] * 4)],
    }
    sets |= {name: others[wrong[name]] for name in sets if name in wrong}
    teacher = case.model(seed=5) if "teacher" in wrong else None
    model = case.model()
    with pytest.raises(ValueError, match=message):
        fit(model, *sets.values(), Recipe(epochs=1, **recipe), task=task, teacher=teacher, progress=False)
    assert same_state(model, case.model()) and not model.training


class Finder(Detector):
    """Returns what it found in train mode too."""

    def forward(self, images, targets=None):
        training, self.training = self.training, False
        try:
            return super().forward(images)
        finally:
            self.training = training


def test_a_detector_without_losses_is_refused_before_training():
    given = batches(case_of("detection"))
    with pytest.raises(ValueError, match="does not fit Finder: a detector in train mode returns a dict of losses, not"):
        fit(Finder().double(), given, given, RECIPE, task="detection", progress=False)


def test_a_batch_without_any_box_says_nothing_and_the_next_one_does():
    case = case_of("detection")
    empty = {"boxes": torch.zeros(0, 4).double(), "labels": torch.zeros(0, dtype=torch.int64)}
    val = [(case.batch()[0], [empty] * 4), case.batch()]
    history = fit(case.model(), batches(case), val, RECIPE, task="detection", progress=False)
    assert 0 <= history.last.values["map50"] <= 1


def test_a_metric_that_is_never_a_number_is_refused_before_training():
    case = case_of("segmentation")
    model, given = case.model(), batches(case, 1)
    task = dataclasses.replace(TASKS["segmentation"], metrics=lambda model, batches: {"mean_iou": float("nan")})
    with pytest.raises(ValueError, match="^metric 'mean_iou' of task 'segmentation' is NaN: look at"):
        fit(model, given, given, RECIPE, task=task, progress=False)
    assert same_state(model, case.model())


def test_a_teacher_that_is_the_model_is_refused():
    case = case_of("outputs")
    model = case.model()
    with pytest.raises(ValueError, match="the teacher shares weights with the model that is trained: pass a copy"):
        fit(model, batches(case), batches(case), RECIPE, task="outputs", teacher=model, progress=False)
    fit(copy.deepcopy(model), batches(case), batches(case), RECIPE, task="outputs", teacher=model, progress=False)
