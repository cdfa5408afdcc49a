from collections import Counter
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from trainings import CLASSES, TRAIN, VAL, batches_of, network, numbers, same_state

from obc_tools.data.batches import Batches
from obc_tools.pruning.equivalent import EquivalentModel
from obc_tools.pruning.plan import PruningPlan
from obc_tools.scoring.tasks import evaluate
from obc_tools.structure.groups import find_groups
from obc_tools.training.fit import fit
from obc_tools.training.recipe import Recipe, learning_rate_factor
from obc_tools.training.stepper import DivergenceError, Guard, Where

CONSTANT = {"lr": 0.05, "schedule": "constant"}


def plain_loop(model: nn.Module, recipe: Recipe) -> list[tuple[float, float]]:
    """The usual loop, with torch's unfused optimizers; return mean loss and accuracy of each epoch."""
    if recipe.optimizer == "sgd":
        kinds = {"momentum": recipe.momentum, "nesterov": recipe.nesterov, "weight_decay": recipe.weight_decay}
        optimizer = torch.optim.SGD(model.parameters(), lr=recipe.lr, foreach=False, **kinds)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, weight_decay=recipe.weight_decay, foreach=False)
    means = []
    model.train()
    for epoch in range(recipe.epochs):
        loss_sum, correct = 0.0, 0
        for step, (images, labels) in enumerate(TRAIN):
            factor = learning_rate_factor(recipe, epoch * len(TRAIN) + step, len(TRAIN))
            optimizer.param_groups[0]["lr"] = recipe.lr * factor
            logits = model(images)
            loss = functional.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            if recipe.clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            optimizer.step()
            loss_sum += loss.item() * len(labels)
            correct += (logits.argmax(1) == labels).sum().item()
        means.append((loss_sum / 21, correct / 21))
    return means


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(epochs=4, lr=0.1, label_smoothing=0.1, clip_norm=0.2),
        Recipe(epochs=4, lr=0.1, nesterov=True, weight_decay=0.01, schedule="multistep", milestones=(1, 3)),
        Recipe(epochs=4, lr=0.01, optimizer="adamw", weight_decay=0.1, warmup_epochs=2, warmup_start=0.1),
    ],
    ids=["sgd, smoothing, clipping", "nesterov, milestones", "adamw, warm-up"],
)
def test_is_the_usual_loop(recipe):
    model, expected = network(), network()
    history = fit(model, TRAIN, VAL, recipe, progress=False)
    means = plain_loop(expected, recipe)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, atol=1e-10, rtol=0, msg=name)
    assert [e.train_loss for e in history] == pytest.approx([loss for loss, _ in means], abs=1e-10)
    assert [e.train_accuracy for e in history] == pytest.approx([accuracy for _, accuracy in means])
    assert not same_state(model, network())


def test_history_tells_what_happened():
    recipe = Recipe(epochs=3, schedule="step", step_size=1, gamma=0.5, lr=0.1)
    model, seen = network(), []
    history = fit(model, TRAIN, VAL, recipe, progress=False, on_epoch=seen.append)
    assert [e.epoch for e in history] == [1, 2, 3]
    assert [e.lr for e in history] == pytest.approx([0.1, 0.05, 0.025])
    assert [len(part) for part in seen] == [1, 2, 3]
    assert seen[-1] == history
    metrics = evaluate(model, VAL)
    assert (history.last.val_loss, history.last.val_accuracy) == (metrics.loss, metrics.accuracy)
    for e in history:
        assert 0 < e.seconds < 60
        assert e.images_per_second >= 21 / e.seconds


def test_the_seed_fixes_everything_random():
    state = torch.get_rng_state()
    models = [network(dropout=0.5) for _ in range(3)]
    histories = []
    for model, seed in zip(models, (3, 3, 4), strict=True):
        loader = DataLoader(TensorDataset(*(torch.cat(parts) for parts in zip(*TRAIN, strict=True))), 7, shuffle=True)
        histories.append(fit(model, loader, VAL, Recipe(epochs=2, seed=seed), progress=False))
        torch.rand(1)
    assert same_state(models[0], models[1])
    assert numbers(histories[0]) == numbers(histories[1])
    assert not same_state(models[0], models[2])
    torch.set_rng_state(state)
    fit(network(dropout=0.5), loader, VAL, Recipe(epochs=1), progress=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_numbered_passes_are_used_from_the_first():
    drawn = []

    def draw(pass_number):
        drawn.append(pass_number)
        return iter(batches_of((8, 8), seed=pass_number))

    train = Batches(draw, 2)
    list(train), list(train)
    drawn.clear()
    first, second = network(), network()
    fit(first, train, VAL, Recipe(epochs=3), progress=False)
    fit(second, train, VAL, Recipe(epochs=3), progress=False)
    assert drawn == [0, 1, 2] * 2
    assert same_state(first, second)


class ModeSpy(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def forward(self, x):
        self.seen["train" if self.training else "eval"] += 1
        return x


def test_trains_equivalent_pruning_like_any_model():
    """Compressors have rates of their own: at a scale of 0 they stay, all else moves."""
    model = network()
    groups = find_groups(model, TRAIN[0][0][:1])
    plan = PruningPlan(
        tuple(groups), tuple((1, 3) if group.prunable else tuple(range(group.width)) for group in groups)
    )
    equivalent = EquivalentModel(model, plan)
    before = deepcopy(equivalent.state_dict())
    recipe = Recipe(epochs=1, lr=0.1, compressor_lr_scale=0.0)
    fit(equivalent, TRAIN, VAL, recipe, progress=False)
    moved = {name for name, tensor in equivalent.state_dict().items() if not torch.equal(tensor, before[name])}
    compressors = {name for name in before if name.endswith("compressor")}
    assert compressors == {"mixed.0.compressor", "mixed.6.decompressor"}
    assert moved == set(before) - compressors
    fit(equivalent, TRAIN, VAL, Recipe(epochs=1, lr=0.1), progress=False)
    assert not torch.equal(equivalent.state_dict()["mixed.0.compressor"], before["mixed.0.compressor"])
    merged = equivalent.merge()
    assert evaluate(merged, VAL).loss == pytest.approx(evaluate(equivalent, VAL).loss, abs=1e-10)


def test_modes_during_and_after():
    model = network().append(ModeSpy()).eval()
    model[0].train()
    fit(model, TRAIN, VAL, Recipe(epochs=2), progress=False)
    # One image is tried before training.
    assert model[-1].seen == {"train": 2 * len(TRAIN), "eval": 2 * len(VAL) + 1}
    assert [module.training for module in model.modules()] == [False, True] + [False] * 7
    assert all(parameter.grad is None for parameter in model.parameters())


def test_frozen_parameters_stay():
    model = network()
    model[0].requires_grad_(False)
    before = deepcopy(model)
    fit(model, TRAIN, VAL, Recipe(epochs=1, lr=0.1), progress=False)
    assert same_state(model[0], before[0])
    assert not same_state(model[6], before[6])


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (iter(TRAIN), VAL, r"train is a one-shot iterator \(list_iterator\)"),
        (TRAIN, (batch for batch in VAL), r"val is a one-shot iterator \(generator\)"),
        (3, VAL, "train is no batches: int cannot be iterated or has no length"),
        ([], VAL, "train: batches that yield no data"),
        (TRAIN, [], "val: batches that yield no data"),
        (Batches(lambda number: iter(()), 2), VAL, "train: pass 0 ended after 0 batches; the length of train is 2"),
        (Batches(lambda number: iter(TRAIN), 2), VAL, "train: this pass has more batches than the length 2"),
        (TRAIN, Batches(lambda number: iter(()), 2), "val: batches that yield no data"),
        ([TRAIN[0][0]], VAL, r"train, epoch 1, step 1 of 1 .*: a batch is two tensors \(images, labels\), not Tensor"),
        (TRAIN, [(VAL[0][0], [0])], r"val, batch 1: a batch is two tensors \(images, labels\), not tuple"),
        ([batches_of((0,))[0]], VAL, r"train, .*: batches that yield no data \(0 images\)"),
        (
            [(TRAIN[0][0], TRAIN[0][1][:3])],
            VAL,
            r"8 images need as many whole class numbers .* torch.int64 of shape \(3,\)",
        ),
        ([(TRAIN[0][0], TRAIN[0][1].double())], VAL, "not torch.float64 of shape"),
        ([TRAIN[0], (TRAIN[1][0], torch.full((8,), 7))], VAL, r"step 2 of 2 .*: label 7, but the model has 3 outputs"),
        (
            TRAIN,
            [(VAL[0][0], VAL[0][1] - 5)],
            r"val, batch 1: label -\d, but the model has 3 outputs \(labels 0 to 2\)",
        ),
        (TRAIN, [(VAL[0][0][:, :2], VAL[0][1])], r"val, batch 1: Net cannot work on \(\d+, 2, 6, 6\)"),
    ],
)
def test_refuses_batches(train, val, message):
    model = network().eval()
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        fit(model, train, val, Recipe(epochs=1), progress=False)
    assert not any(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Flatten(0), "Flatten has no parameter that requires grad"),
        (network().append(nn.Unflatten(1, (3, 1))), r"the model returned \(1, 3, 1\), not logits \(batch, classes\)"),
    ],
)
def test_refuses_models(model, message):
    with pytest.raises(ValueError, match=message):
        fit(model, TRAIN, VAL, Recipe(epochs=1), progress=False)


def test_names_weights_that_are_not_finite():
    model = network()
    model[6].bias.data[1] = torch.inf
    with pytest.raises(ValueError, match=r"parameter '6.bias' holds values that are not finite"):
        fit(model, TRAIN, VAL, Recipe(epochs=1), progress=False)


@pytest.mark.parametrize("lag", [0, 1], ids=["read at once", "read a step later, as on an accelerator"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_stops_before_a_step_that_is_not_finite(optimizer, lag, monkeypatch):
    monkeypatch.setattr("obc_tools.training.stepper.reading_lag", lambda device: lag)
    recipe = Recipe(epochs=2, optimizer=optimizer, **CONSTANT)
    poisoned = [*TRAIN[:2], (TRAIN[2][0] * torch.nan, TRAIN[2][1])]
    model, expected = network(), network()
    message = r"epoch 1, step 3 of 3 \(learning rate 0.05\): the inputs of its batch hold values that are not finite"
    with pytest.raises(DivergenceError, match=message):
        fit(model, poisoned, VAL, recipe, progress=False)
    fit(expected, TRAIN[:2], VAL, Recipe(epochs=1, optimizer=optimizer, **CONSTANT), progress=False)
    assert same_state(model, expected)
    assert not same_state(model, network())
    assert model.training


def test_a_huge_learning_rate_is_named():
    model = network()
    message = r"epoch 1, step 2 of 3 \(learning rate 1e\+200\): the loss is nan.*The step was not taken.*Lower lr"
    with pytest.raises(DivergenceError, match=message):
        fit(model, TRAIN, VAL, Recipe(epochs=1, lr=1e200, schedule="constant"), progress=False)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_says_after_which_epoch_evaluating_failed():
    with pytest.raises(
        ValueError, match=r"val, after epoch 1 of 2: batch 1: the loss of 7 of 7 examples is not finite"
    ):
        fit(network(), TRAIN[:1], VAL, Recipe(epochs=2, lr=1e200, schedule="constant"), progress=False)


class InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf


class Overflow(nn.Module):
    """Passes its input on, with an infinite gradient in its third use in train mode."""

    def __init__(self):
        super().__init__()
        self.uses = 0

    def forward(self, x):
        self.uses += self.training
        return InfiniteGradient.apply(x) if self.training and self.uses == 3 else x


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_stops_before_an_update_that_is_not_finite(clip_norm):
    model, expected = network().append(Overflow()), network()
    recipe = Recipe(epochs=1, clip_norm=clip_norm, **CONSTANT)
    with pytest.raises(
        DivergenceError, match=r"step 3 of 3 .*: the loss is 1\.\d+, but the gradient's norm is (inf|nan)"
    ):
        fit(model, TRAIN, VAL, recipe, progress=False)
    fit(expected, TRAIN[:2], VAL, recipe, progress=False)
    assert same_state(model, expected)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("last_step_is_bad", [False, True])
def test_guard_undoes_everything_since_the_bad_step(lag, last_step_is_bad):
    """On an accelerator the verdict is read one step late; nothing of that step may be left."""
    images = [torch.full((2, 1), float(value)) for value in (1, 2, torch.nan, 4)][: 3 if last_step_is_bad else 4]
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, fused=True)
    guard = Guard(model.buffers(), optimizer, torch.device("cpu"), lag)
    states, taken = [], 0
    with pytest.raises(DivergenceError, match=r"epoch 1, step 3 of 4 .*: the inputs of its batch"):
        for step, batch in enumerate(images, start=1):
            states.append(deepcopy(model.state_dict()))
            guard.keep_buffers()
            loss = model(batch).square().mean()
            optimizer.zero_grad()
            guard.blocked(loss).backward()
            norm = nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
            guard.judge(loss.detach(), norm, Where(1, step, 4, 0.1), batch)
            optimizer.step()
            guard.read()
            taken += 1
        guard.read_all()
    assert taken == (2 if lag == 0 else 3)
    assert all(torch.equal(states[2][name], tensor) for name, tensor in model.state_dict().items())
    assert not torch.equal(states[1]["1.weight"], states[2]["1.weight"])


def test_guard_blocks_gradients_where_scaling_withholds_updates():
    """With fp16, gradient scaling skips a step by its gradient; after a bad loss every later one must be skipped."""
    guard = Guard([], None, torch.device("cpu"), lag=1)
    weight = torch.ones((), requires_grad=True)
    for step, loss in enumerate((torch.nan, 1.0, 1.0), start=1):
        guard.judge(torch.tensor(loss), None, Where(1, step, 3, 0.1), torch.ones(1))
        weight.grad = None
        guard.blocked(weight * 2).backward()
        assert weight.grad.isnan()


def test_mixed_precision_is_for_the_forward_pass_of_training():
    plain, mixed = network().float(), network().float()
    train = [(images.float(), labels) for images, labels in TRAIN]
    val = [(images.float(), labels) for images, labels in VAL]
    fit(plain, train, val, Recipe(epochs=2, lr=0.1), progress=False)
    history = fit(mixed, train, val, Recipe(epochs=2, lr=0.1, amp="bf16"), progress=False)
    assert not same_state(plain, mixed)
    for a, b in zip(plain.parameters(), mixed.parameters(), strict=True):
        assert b.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=0.02, rtol=0.02)
    assert history.last.val_loss == evaluate(mixed, val).loss
    assert mixed(train[0][0]).dtype == torch.float32
    assert "forward" not in vars(mixed)


def test_refuses_fp16_on_a_cpu():
    with pytest.raises(ValueError, match=r"amp='fp16' needs a GPU; .* amp='bf16' or 'no'"):
        fit(network(), TRAIN, VAL, Recipe(epochs=1, amp="fp16"), progress=False)


def test_gradient_scaling_trains_and_withholds_what_is_not_finite(monkeypatch):
    """On the CPU, which computes in float16 too, only slowly: a step, a clipped one, and one that is refused."""
    monkeypatch.setattr("obc_tools.training.fit.check_precision", lambda recipe, device: None)
    plain, scaled, stopped = network().float(), network().float(), network().float()
    train = [(images.float(), labels) for images, labels in TRAIN[:2]]
    val = [(images.float(), labels) for images, labels in VAL]
    recipe = Recipe(epochs=1, lr=0.1, clip_norm=1.0)
    fit(plain, train, val, recipe, progress=False)
    fit(scaled, train, val, replace(recipe, amp="fp16"), progress=False)
    assert not same_state(plain, network().float())
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=0.01, rtol=0.01)
    poisoned = [*train, (train[0][0] * torch.nan, train[0][1])]
    fp16 = replace(recipe, amp="fp16", **CONSTANT)
    with pytest.raises(DivergenceError, match="epoch 1, step 3 of 3"):
        fit(stopped, poisoned, val, fp16, progress=False)
    expected = network().float()
    fit(expected, train, val, fp16, progress=False)
    assert same_state(stopped, expected)


def test_leaves_the_process_own_accelerator_alone():
    own = Accelerator(cpu=True, mixed_precision="bf16")
    try:
        fit(network(), TRAIN, VAL, Recipe(epochs=1, amp="no"), progress=False)
        assert own.mixed_precision == "bf16"
        assert own.gradient_accumulation_steps == 1
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    fit(network(), TRAIN, VAL, Recipe(epochs=1, amp="no"), progress=False)
    assert not AcceleratorState._shared_state


def test_a_launchers_environment_does_not_change_the_training(monkeypatch):
    expected, model = network(), network()
    fit(expected, TRAIN, VAL, Recipe(epochs=1), progress=False)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    fit(model, TRAIN, VAL, Recipe(epochs=1), progress=False)
    assert same_state(model, expected)


def test_progress_goes_over_all_steps(capsys, monkeypatch):
    monkeypatch.setattr("obc_tools.training.fit.SECONDS_BETWEEN_POSTFIXES", 0.0)
    fit(network(), TRAIN, VAL, Recipe(epochs=2), progress=False)
    assert capsys.readouterr() == ("", "")
    history = fit(network(), TRAIN, VAL, Recipe(epochs=2))
    bar = capsys.readouterr().err
    assert "6/6" in bar
    assert f"accuracy={history.last.train_accuracy:.1%}, epoch=2, loss={history.last.train_loss:.3f}" in bar


def test_pieces_of_a_batch_add_up_to_it():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES)).double()
    pieces = deepcopy(plain)
    fit(plain, TRAIN, VAL, Recipe(epochs=2, clip_norm=0.5), progress=False)
    history = fit(pieces, TRAIN, VAL, Recipe(epochs=2, clip_norm=0.5, accumulate=3), progress=False)
    for a, b in zip(plain.parameters(), pieces.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    assert history.last.train_loss > 0


def test_norms_keep_their_statistics_where_the_recipe_says_so():
    model = network()
    before = deepcopy(model[1])
    fit(model, TRAIN, VAL, Recipe(epochs=1, lr=0.1, freeze_statistics=True, freeze=("0", "1.bias")), progress=False)
    assert torch.equal(model[1].running_mean, before.running_mean)
    assert torch.equal(model[1].bias, before.bias) and not torch.equal(model[1].weight, before.weight)
    assert model[1].training and model[0].weight.requires_grad


def test_what_a_hook_freezes_stays_so_and_what_a_recipe_freezes_does_not():
    model = network()

    def freeze(history):
        model[1].weight.requires_grad_(False)

    fit(model, TRAIN, VAL, Recipe(epochs=1, freeze=("0",)), on_epoch=freeze, progress=False)
    assert model[0].weight.requires_grad and not model[1].weight.requires_grad


def test_channels_last_gives_the_same_numbers_and_leaves_the_usual_order():
    plain, last = network(), network()
    fit(plain, TRAIN, VAL, Recipe(epochs=2), progress=False)
    fit(last, TRAIN, VAL, Recipe(epochs=2, channels_last=True), progress=False)
    for a, b in zip(plain.parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
        assert b.is_contiguous()


def test_learns_from_shares_of_classes():
    """Labels as shares, all of one class, train as class numbers do."""
    numbers_, shares = network(), network()
    soft = [(images, functional.one_hot(labels, CLASSES).double()) for images, labels in TRAIN]
    first = fit(numbers_, TRAIN, VAL, Recipe(epochs=2), progress=False)
    second = fit(shares, soft, VAL, Recipe(epochs=2), progress=False)
    torch.testing.assert_close(numbers_.state_dict(), shares.state_dict(), atol=1e-12, rtol=0)
    assert [e.train_accuracy for e in first] == [e.train_accuracy for e in second]
    with pytest.raises(ValueError, match="labels share 4 classes, but the model has 3 outputs"):
        fit(network(), [(TRAIN[0][0], torch.ones(8, 4))], VAL, Recipe(epochs=1), progress=False)


def test_distils_from_a_teacher_that_stays():
    model, teacher = network(), network(seed=1)
    before = deepcopy(teacher)
    recipe = Recipe(epochs=60, lr=0.2, distill_weight=1.0, label_weight=0.0, temperature=2.0, weight_decay=0.0)
    with torch.no_grad():
        teacher.eval()
        taught = [teacher(images).softmax(1) for images, _ in TRAIN]
        teacher.train()
    fit(model, TRAIN, VAL, recipe, teacher=teacher, progress=False)
    assert same_state(teacher, before) and teacher.training
    plain = network()
    fit(plain, TRAIN, VAL, Recipe(epochs=60, lr=0.2, weight_decay=0.0), progress=False)

    def distance(network):
        network.eval()
        with torch.no_grad():
            own = [network(images).softmax(1) for images, _ in TRAIN]
        return max((a - b).abs().max().item() for a, b in zip(own, taught, strict=True))

    assert distance(model) < 0.25 * distance(plain)
    with pytest.raises(ValueError, match="distill_weight is 1 and there is no teacher: distillation needs both"):
        fit(model, TRAIN, VAL, recipe, progress=False)
    with pytest.raises(ValueError, match="distill_weight is 0 and there is a teacher"):
        fit(model, TRAIN, VAL, Recipe(epochs=1), teacher=teacher, progress=False)
    with pytest.raises(ValueError, match="the teacher shares weights with the model"):
        fit(model, TRAIN, VAL, recipe, teacher=model, progress=False)


def test_leaves_the_averaged_weights():
    """Against an average by hand, copied until the warm-up is over."""
    recipe = Recipe(epochs=3, batch_size=8, ema_every=2, ema_decay=0.9, lr=0.1, schedule="constant", warmup_epochs=1)
    model, steps = network(), []
    expected = deepcopy(model)
    history = fit(
        model, TRAIN, VAL, recipe, progress=False, regularize=lambda: steps.append(deepcopy(model.state_dict()))
    )
    raw = network()
    trail = []
    fit(
        raw,
        TRAIN,
        VAL,
        replace(recipe, ema_every=0),
        progress=False,
        regularize=lambda: trail.append(deepcopy(raw.state_dict())),
    )
    # What the gradients of step k were computed at is what step k - 1 left.
    after = [*trail[1:], deepcopy(raw.state_dict())]
    average = deepcopy(after[0])
    keep = 1 - 0.1 * 8 * 2 / 3
    for step, state in enumerate(after):
        if step % 3 % 2 == 0:
            for name, value in state.items():
                # The first update after the warm-up copies too: the count of updates was set back.
                average[name] = value.clone() if step <= 3 else keep * average[name] + (1 - keep) * value
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), average[name], atol=1e-12, rtol=0, msg=name)
    assert history.last.val_loss == evaluate(model, VAL).loss
    assert not same_state(model, raw) and not same_state(model, expected)


def test_regularizes_between_the_gradients_and_the_update():
    model, expected = network(), network()

    def add_decay():
        for parameter in model.parameters():
            parameter.grad += 0.1 * parameter.detach()

    fit(model, TRAIN, VAL, Recipe(epochs=2, weight_decay=0.0), regularize=add_decay, progress=False)
    fit(expected, TRAIN, VAL, Recipe(epochs=2, weight_decay=0.1), progress=False)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_refuses_shares_of_a_process_that_is_alone():
    train = Batches(lambda number: iter(TRAIN), 3, parts=2)
    with pytest.raises(ValueError, match="train: batches for 2 processes, but 1 were launched"):
        fit(network(), train, VAL, Recipe(epochs=1), progress=False)


def test_trains_compiled(monkeypatch):
    """By torch's compiler up to, not including, its code for this machine, which takes minutes to make."""
    plain, compiled, graphs = network(), network(), []

    def count_graphs(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()  # what other tests compiled counts towards a limit of the process
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend=count_graphs))
    fit(plain, TRAIN, VAL, Recipe(epochs=1), progress=False)
    fit(compiled, TRAIN, VAL, Recipe(epochs=1, compile=True), progress=False)
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)
    assert graphs
