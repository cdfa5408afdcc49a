import json
import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from torch import nn

from obc_tools.data.batches import Augmentation
from obc_tools.training.recipe import Recipe, RecipeError, learning_rate_factor
from obc_tools.training.stepper import frozen, make_optimizer, parameter_groups

STEPS = 5


class Mixed(nn.Module):
    """One convolution as Equivalent Pruning holds it: by the last part of their names."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.bias = nn.Parameter(torch.ones(4))
        self.compressor = nn.Parameter(torch.ones(2, 4))
        self.decompressor = nn.Parameter(torch.ones(4, 2))


def every_kind() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.GroupNorm(2, 4),
        nn.Flatten(),
        nn.LayerNorm(16),
        nn.RMSNorm(16),
        nn.PReLU(),
        nn.MultiheadAttention(16, 2),
        nn.Linear(16, 2, bias=False),
        Mixed(),
    )
    model.append(nn.Linear(16, 2))
    model[-1].weight = model[8].weight
    return model


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs is 0; it is a whole number of at least 1"),
        ({"epochs": True}, "epochs is True; it is a whole number"),
        ({"epochs": 2.0}, "epochs is 2.0; it is a whole number"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"lr": 0}, "lr is 0; it is above 0"),
        ({"lr": -0.1}, "lr is -0.1; it is a finite number of at least 0"),
        ({"lr": math.nan}, "lr is nan; it is a finite number"),
        ({"lr": "0.1"}, "lr is '0.1'; it is a finite number"),
        ({"optimizer": "adam"}, "optimizer is 'adam'; known are 'sgd', 'adamw'"),
        ({"schedule": "linear"}, "schedule is 'linear'; known are 'cosine', 'multistep', 'step', 'constant'"),
        ({"schedule": ["cosine"]}, r"schedule is \['cosine'\]; known are"),
        ({"amp": True}, "amp is True; known are 'no', 'bf16', 'fp16'"),
        ({"accumulate": 0}, "accumulate is 0; it is a whole number of at least 1"),
        ({"schedule_by": "image"}, "schedule_by is 'image'; known are 'step', 'epoch'"),
        ({"temperature": 0}, "temperature is 0; it is a finite number above 0"),
        ({"ema_decay": 1}, "ema_decay is 1; it is a number from 0 to below 1"),
        ({"label_weight": 0.0}, "label_weight is 0.0; nothing is left to learn"),
        ({"mixup": 0.8, "augment": False}, "mixup is 0.8; it needs augment=True"),
        ({"repeats": 3, "augment": False}, "repeats is 3; it needs augment=True"),
        ({"rand_augment": 40}, "rand_augment is 40; it is 0 to 30"),
        ({"erase": 2.0}, "erase=2.0: expected a share of images"),
        ({"freeze": "conv1"}, "freeze is 'conv1'; it is a list of names or patterns"),
        ({"compile": 1}, "compile is 1; it is True or False"),
        ({"momentum": 1.0}, "momentum is 1.0; it is below 1"),
        ({"label_smoothing": 1}, "label_smoothing is 1; it is below 1"),
        ({"nesterov": 1}, "nesterov is 1; it is True or False"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov is True; it needs optimizer 'sgd' and a momentum above 0"),
        ({"nesterov": True, "optimizer": "adamw"}, "nesterov is True; it needs optimizer 'sgd'"),
        ({"augment": "yes"}, "augment is 'yes'; it is True or False"),
        ({"milestones": (2,)}, r"milestones is \(2,\); they belong to schedule 'multistep'.*not 'cosine'"),
        ({"schedule": "multistep"}, r"milestones is \(\); they belong to schedule 'multistep'"),
        ({"schedule": "multistep", "milestones": 3}, "milestones is 3; it is a list of epochs"),
        ({"schedule": "multistep", "milestones": (3, 2)}, "they are whole numbers of at least 1, rising"),
        ({"schedule": "multistep", "milestones": (0, 2)}, "they are whole numbers of at least 1, rising"),
        ({"schedule": "multistep", "milestones": ("a",)}, "they are whole numbers of at least 1, rising"),
        ({"step_size": 0}, "step_size is 0"),
        ({"warmup_epochs": 11}, "warmup_epochs is 11; training ends after 10 epochs"),
        ({"warmup_start": 0.0}, "warmup_start is 0.0; it is a factor above 0 and at most 1"),
        ({"min_lr": 0.5}, r"min_lr is 0.5; it is at most lr \(0.01\)"),
        ({"min_lr": 0.001, "schedule": "constant"}, "min_lr is 0.001; .* only schedule 'cosine'"),
        ({"clip_norm": 0}, "clip_norm is 0; it is a finite number above 0, or None"),
        ({"compressor_lr_scale": -1}, "compressor_lr_scale is -1"),
    ],
)
def test_refuses(values, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(**{"epochs": 10} | values)


def test_is_plain_frozen_data():
    recipe = Recipe(epochs=100, schedule="multistep", milestones=[60, 80], clip_norm=1.0, amp="bf16")
    assert recipe.milestones == (60, 80)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert hash(recipe) == hash(replace(recipe))
    with pytest.raises(FrozenInstanceError):
        recipe.lr = 1.0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"epochs": 1, "mix": 0.8, "ema": 1}, "unknown fields ema, mix; known are epochs, batch_size"),
        ({"lr": 0.1}, "epochs is missing"),
        ({"epochs": "1"}, "epochs is '1'; it is a whole number"),
        ([1], "a mapping of fields is needed, not list"),
    ],
)
def test_from_dict_refuses(data, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(data)


def factors_of_torch(scheduler_of, steps: int, every: int) -> list[float]:
    """The learning rates of one of torch's schedulers, advanced after every so many steps, at base 1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = scheduler_of(optimizer)
    factors = []
    for step in range(steps):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if (step + 1) % every == 0:
            scheduler.step()
    return factors


schedulers = torch.optim.lr_scheduler


@pytest.mark.parametrize(
    ("recipe", "scheduler_of", "every"),
    [
        (Recipe(epochs=8, lr=1.0), lambda o: schedulers.CosineAnnealingLR(o, 8 * STEPS), 1),
        (Recipe(epochs=8, lr=1.0, min_lr=0.2), lambda o: schedulers.CosineAnnealingLR(o, 8 * STEPS, eta_min=0.2), 1),
        (
            Recipe(epochs=8, lr=1.0, schedule="multistep", milestones=(3, 6), gamma=0.3),
            lambda o: schedulers.MultiStepLR(o, [3, 6], gamma=0.3),
            STEPS,
        ),
        (
            Recipe(epochs=8, lr=1.0, schedule="step", step_size=3, gamma=0.5),
            lambda o: schedulers.StepLR(o, 3, gamma=0.5),
            STEPS,
        ),
        (
            Recipe(epochs=8, lr=1.0, schedule="constant", warmup_epochs=3, warmup_start=0.1),
            lambda o: schedulers.LinearLR(o, start_factor=0.1, total_iters=3 * STEPS),
            1,
        ),
        (
            Recipe(epochs=8, lr=1.0, warmup_epochs=2, warmup_start=0.033),
            lambda o: schedulers.SequentialLR(
                o,
                [
                    schedulers.LinearLR(o, start_factor=0.033, total_iters=2 * STEPS),
                    schedulers.CosineAnnealingLR(o, 6 * STEPS),
                ],
                milestones=[2 * STEPS],
            ),
            1,
        ),
    ],
    ids=["cosine", "cosine to min_lr", "multistep", "step", "warm-up", "warm-up and cosine"],
)
def test_schedule_is_torchs(recipe, scheduler_of, every):
    factors = [learning_rate_factor(recipe, step, STEPS) for step in range(8 * STEPS)]
    assert factors == pytest.approx(factors_of_torch(scheduler_of, 8 * STEPS, every), abs=1e-12)


def test_warm_up_alone_may_fill_the_training():
    recipe = Recipe(epochs=2, warmup_epochs=2, warmup_start=0.5)
    assert [learning_rate_factor(recipe, step, 2) for step in range(4)] == [0.5, 0.625, 0.75, 0.875]


def test_every_trainable_parameter_is_in_one_group():
    model = every_kind()
    model[0].weight.requires_grad_(False)
    groups = parameter_groups(model, Recipe(epochs=1))
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {group["name"]: [names[parameter] for parameter in group["params"]] for group in groups}
    assert found == {
        "compressor": ["9.compressor", "9.decompressor"],
        "norm": [
            *("0.bias", "1.weight", "1.bias", "2.weight", "2.bias", "4.weight", "4.bias", "5.weight"),
            *("7.in_proj_bias", "7.out_proj.bias", "9.bias", "10.bias"),
        ],
        "rest": ["6.weight", "7.in_proj_weight", "7.out_proj.weight", "8.weight", "9.weight"],
    }
    assert sum(len(group["params"]) for group in groups) == len(names) - 1


def test_groups_have_their_own_rates():
    recipe = Recipe(
        epochs=1,
        lr=0.5,
        weight_decay=0.01,
        compressor_lr_scale=0.2,
        compressor_weight_decay_scale=0.0,
        norm_weight_decay_scale=0.5,
    )
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in parameter_groups(every_kind(), recipe)}
    assert rates == {"compressor": (0.1, 0.0), "norm": (0.5, 0.005), "rest": (0.5, 0.01)}


def test_plain_models_have_no_compressor_group():
    groups = parameter_groups(nn.Linear(2, 2), Recipe(epochs=1))
    assert [group["name"] for group in groups] == ["norm", "rest"]


def test_refuses_a_frozen_model():
    with pytest.raises(ValueError, match="Linear has no parameter that requires grad: there is nothing to train"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), Recipe(epochs=1))


def test_optimizers():
    sgd = make_optimizer(nn.Linear(2, 2), Recipe(epochs=1, momentum=0.8, nesterov=True))
    assert isinstance(sgd, torch.optim.SGD)
    assert [(group["momentum"], group["nesterov"], group["fused"]) for group in sgd.param_groups] == [
        (0.8, True, True)
    ] * 2
    adamw = make_optimizer(nn.Linear(2, 2), Recipe(epochs=1, optimizer="adamw", weight_decay=0.1), fused=False)
    assert isinstance(adamw, torch.optim.AdamW)
    assert [(group["weight_decay"], group["fused"]) for group in adamw.param_groups] == [(0.1, False)] * 2


def test_schedules_by_epoch_hold_for_whole_epochs():
    recipe = Recipe(epochs=6, warmup_epochs=2, warmup_start=0.1, schedule_by="epoch")
    by_step = replace(recipe, schedule_by="step")
    for step in range(6 * STEPS):
        factor = learning_rate_factor(recipe, step, STEPS)
        assert factor == learning_rate_factor(by_step, step // STEPS * STEPS, STEPS)


def test_the_augmentation_of_a_recipe():
    recipe = Recipe(epochs=1, mixup=0.8, cutmix=1.0, rand_augment=9, erase=0.25, repeats=3)
    assert recipe.augmentation == Augmentation(mixup=0.8, cutmix=1.0, rand_augment=9, erase=0.25, repeats=3)
    assert Recipe(epochs=1, augment=False).augmentation == Augmentation(crop=False)


def test_frozen_parameters_get_their_flags_back():
    model = every_kind()
    model[0].bias.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with frozen(model, Recipe(epochs=1, freeze=("7", "*compressor"))):
        still = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert still == {"0.bias", "9.compressor", "9.decompressor"} | {
        f"7.{name}" for name, _ in model[7].named_parameters()
    }
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    with (
        pytest.raises(ValueError, match="unknown parameter to freeze 'conv'"),
        frozen(model, Recipe(epochs=1, freeze=("conv",))),
    ):
        pass
