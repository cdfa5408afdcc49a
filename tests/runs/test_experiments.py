"""The paper's experiments: what the optimizer gets at every epoch, against a table computed from the paper's words."""

import math
from dataclasses import replace
from itertools import chain

import pytest
import torch
from torch import nn

from obc_tools.pruning.choices import Target
from obc_tools.runs.experiments import EXPERIMENTS, get_experiment
from obc_tools.runs.job import PruningJob
from obc_tools.training.recipe import Recipe, learning_rate_factor, rescaled
from obc_tools.training.stepper import make_optimizer


def steps_at(lr: float, milestones: tuple[int, ...], epochs: int) -> list[float]:
    return [lr * 0.1 ** len([m for m in milestones if m <= epoch]) for epoch in range(epochs)]


def half_cosine(lr: float, epochs: int) -> list[float]:
    return [lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs)) for epoch in range(epochs)]


def vit_rates() -> list[float]:
    """30 epochs of linear warm-up from 0.033 of the rate, then a cosine over 70."""
    warming = [1.25e-4 * (0.033 + 0.967 * epoch / 30) for epoch in range(30)]
    return warming + half_cosine(1.25e-4, 70)


CIFAR = steps_at(0.01, (60, 80), 100)
TABLE = {
    # experiment, stage: rates by epoch, weight decay, (compressors' rate, decay) as multiples, batch, optimizer
    ("vgg19-cifar100", "finetune"): (CIFAR, 5e-4, (0.2, 1.0), 128, "SGD"),
    ("vgg19-cifar100", "sparse"): (CIFAR, 0.0, (1.0, 1.0), 128, "SGD"),
    ("vgg19-cifar100", "baseline"): (steps_at(0.1, (120, 150, 180), 200), 5e-4, (1.0, 1.0), 128, "SGD"),
    ("resnet56-cifar10", "finetune"): (CIFAR, 5e-4, (2.0, 0.0), 128, "SGD"),
    ("resnet56-cifar10", "sparse"): (CIFAR, 0.0, (1.0, 1.0), 128, "SGD"),
    ("resnet56-cifar10", "baseline"): (steps_at(0.1, (120, 150, 180), 200), 5e-4, (1.0, 1.0), 128, "SGD"),
    ("resnet50-imagenet", "finetune"): (half_cosine(0.04, 100), 1e-4, (0.25, 0.0), 256, "SGD"),
    ("resnet50-imagenet", "sparse"): (half_cosine(0.08, 30), 0.0, (1.0, 1.0), 256, "SGD"),
    ("mobilenetv2-imagenet", "finetune"): (half_cosine(0.036, 300), 2e-5, (1.0, 1.0), 512, "SGD"),
    ("mobilenetv2-imagenet", "sparse"): (half_cosine(0.036, 150), 0.0, (1.0, 1.0), 512, "SGD"),
    ("vit-b16-imagenet", "finetune"): (vit_rates(), 0.05, (0.2, 0.0), 128, "AdamW"),
}


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
        self.compressor, self.decompressor = nn.Parameter(torch.ones(1, 2)), nn.Parameter(torch.ones(2, 1))


@pytest.mark.parametrize(("name", "stage"), TABLE)
def test_rates_decays_and_groups_at_each_epoch(name, stage):
    rates, decay, (rate_scale, decay_scale), batch, kind = TABLE[name, stage]
    experiment = EXPERIMENTS[name]
    recipe = experiment.baseline if stage == "baseline" else getattr(experiment.job(), stage)
    model = nn.Sequential(Layer(), nn.BatchNorm2d(2))
    optimizer = make_optimizer(model, recipe)
    assert type(optimizer).__name__ == kind
    assert (recipe.epochs, recipe.batch_size) == (len(rates), batch)
    groups = {group["name"]: group for group in optimizer.param_groups}
    members = {name: {id(parameter) for parameter in group["params"]} for name, group in groups.items()}
    assert members["compressor"] == {id(model[0].compressor), id(model[0].decompressor)}
    assert members["norm"] == {id(model[0].bias), id(model[1].weight), id(model[1].bias)}
    assert members["rest"] == {id(model[0].weight)}
    for epoch, rate in enumerate(rates):
        for step in (7 * epoch, 7 * epoch + 6):
            factor = learning_rate_factor(recipe, step, 7)
            assert groups["rest"]["lr"] * factor == pytest.approx(rate, rel=1e-12, abs=1e-18)
            assert groups["compressor"]["lr"] * factor == pytest.approx(rate_scale * rate, rel=1e-12, abs=1e-18)
    assert [groups[key]["weight_decay"] for key in ("rest", "norm")] == [decay, decay]
    assert groups["compressor"]["weight_decay"] == pytest.approx(decay * decay_scale)
    assert {group.get("momentum", 0.9) for group in groups.values()} == {0.9}
    assert {group.get("betas", (0.9, 0.999)) for group in groups.values()} == {(0.9, 0.999)}


def test_every_stage_of_every_experiment_is_in_the_table():
    stages = [
        (name, stage)
        for name, experiment in EXPERIMENTS.items()
        for stage, there in (("finetune", True), ("sparse", experiment.base.sparse), ("baseline", experiment.baseline))
        if there
    ]
    assert sorted(stages) == sorted(TABLE)


def test_what_the_paper_says_beside_rates():
    jobs = {name: experiment.job() for name, experiment in EXPERIMENTS.items()}
    assert {name: (job.scope, job.steps, job.batches, job.batch_size) for name, job in jobs.items()} == {
        "vgg19-cifar100": ("local", 400, 50, 128),
        "resnet56-cifar10": ("global", 400, 50, 128),
        "resnet50-imagenet": ("global", 100, 50, 256),
        "mobilenetv2-imagenet": ("isomorphic", 100, 50, 256),
        "vit-b16-imagenet": ("global", 100, 50, 64),
    }
    assert {job.schedule_ratio for job in jobs.values()} == {1.0}
    assert {name: job.sparse and job.sparse.group_penalty for name, job in jobs.items()} == {
        "vgg19-cifar100": 5e-4,
        "resnet56-cifar10": 5e-4,
        "resnet50-imagenet": 1e-4,
        "mobilenetv2-imagenet": 1e-4,
        "vit-b16-imagenet": None,
    }
    targets = {name: [str(target) for target in experiment.targets] for name, experiment in EXPERIMENTS.items()}
    assert targets["vgg19-cifar100"] == [f"speedup={value}" for value in ("1.5", "3", "6", "9", "12")]
    assert targets["resnet56-cifar10"] == ["speedup=2.11", "speedup=2.55"]
    assert [targets[f"{n}-imagenet"] for n in ("resnet50", "mobilenetv2", "vit-b16")] == [
        ["macs=2.04e+09"],
        ["macs=1.54e+08"],
        ["macs=1e+10"],
    ]
    distilled = [name for name, job in jobs.items() if job.finetune.distill_weight]
    assert distilled == ["resnet50-imagenet", "vit-b16-imagenet"]
    assert jobs["resnet50-imagenet"].sparse.distill_weight == jobs["resnet50-imagenet"].sparse.label_weight == 0.5
    assert jobs["mobilenetv2-imagenet"].model_options == {"dropout": 0.2}
    assert [job.equivalent for job in jobs.values()] == [True, True, True, False, True]
    vit = jobs["vit-b16-imagenet"]
    assert (vit.round_to, vit.calibrate_as_trained, vit.finetune.label_smoothing) == (12, True, 0.11)
    assert vit.finetune.augmentation.__dict__ == {
        "crop": True,
        "rand_augment": 9,
        "erase": 0.25,
        "mixup": 0.8,
        "cutmix": 1.0,
        "repeats": 1,
    }
    assert all(experiment.source for experiment in EXPERIMENTS.values())


def test_what_the_scripts_ask_for_and_ignore_is_off_until_asked_for():
    vit = EXPERIMENTS["vit-b16-imagenet"]
    published, requested = vit.job().finetune, vit.job(as_requested=True).finetune
    assert (published.repeats, published.clip_norm) == (1, None)
    assert (requested.repeats, requested.clip_norm) == (3, 1.0)
    assert replace(requested, repeats=1, clip_norm=None) == published
    assert "asks for repeated augmentation" in vit.source and "uses neither" in vit.source


def test_a_seed_goes_everywhere_and_small_is_the_same_job_made_smaller():
    for experiment in EXPERIMENTS.values():
        job = experiment.job(seed=3, weights="scratch" if experiment.baseline else "file.pth")
        recipes = [getattr(job, name) for name in ("pretrain", "sparse", "finetune") if getattr(job, name)]
        assert {job.seed, *(recipe.seed for recipe in recipes)} == {3}
        small = experiment.small(seed=3, device="cpu")
        assert (small.model, small.scope, small.ignore, small.target) == (job.model, job.scope, job.ignore, job.target)
        assert small.finetune.epochs == 1 and small.device == "cpu"
        assert small.finetune.lr / small.finetune.batch_size == job.finetune.lr / job.finetune.batch_size
        assert (small.sparse is None) == (job.sparse is None)
        assert (job.title, small.title) == (experiment.title, f"{experiment.title}, small run")
        assert experiment.job(data="digits").title == f"{experiment.title}, here on digits"


def test_fewer_pruning_steps_do_not_go_past_the_target():
    experiment = EXPERIMENTS["resnet56-cifar10"]
    assert [experiment.job().last_step, experiment.job(steps=400).last_step] == ["full", "full"]
    assert [experiment.job(steps=20).last_step, experiment.small().last_step] == ["exact", "exact"]
    assert experiment.job(steps=20, last_step="full").last_step == "full"


def test_a_job_survives_json():
    for experiment in EXPERIMENTS.values():
        for job in (
            experiment.job(),
            experiment.small(root="data", weights="scratch" if experiment.baseline else None),
        ):
            assert PruningJob.from_dict(job.to_dict()) == job
    with pytest.raises(ValueError, match="a job has no colour"):
        PruningJob.from_dict({"colour": "red"})


def test_what_an_experiment_refuses():
    with pytest.raises(ValueError, match="unknown experiment 'vgg19'; closest: vgg19-cifar100"):
        get_experiment("vgg19")
    with pytest.raises(ValueError, match="vit-b16-imagenet has no recipe from scratch"):
        EXPERIMENTS["vit-b16-imagenet"].job(weights="scratch")
    with pytest.raises(ValueError, match="sparse training needs a recipe with group_penalty above 0"):
        EXPERIMENTS["resnet56-cifar10"].job(sparse=Recipe(epochs=1))
    with pytest.raises(ValueError, match="calibrate_as_trained asks for the augmentation of finetune"):
        replace(EXPERIMENTS["vit-b16-imagenet"].job(), finetune=None, equivalent=False)


def test_recipes_of_other_lengths():
    recipe = EXPERIMENTS["resnet56-cifar10"].job().finetune
    assert rescaled(recipe, 10).milestones == (6, 8)
    assert rescaled(recipe, 1).milestones == (1,)
    assert rescaled(EXPERIMENTS["vit-b16-imagenet"].job().finetune, 10).warmup_epochs == 3


def test_targets_are_stated_in_the_papers_count():
    for experiment in EXPERIMENTS.values():
        targets = (*experiment.targets, experiment.base.target, experiment.job().target, experiment.small().target)
        assert {target.counting for target in targets} == {"torch_pruning"}
    own = Target(speedup=3.0)
    assert EXPERIMENTS["vgg19-cifar100"].job(target=own).target == Target(speedup=3.0, counting="torch_pruning")
    assert EXPERIMENTS["vgg19-cifar100"].job(target=own, counting="operations").target == own
    old = EXPERIMENTS["vgg19-cifar100"].job().to_dict()
    del old["target"]["counting"], old["min_channels"], old["max_ratio"]
    assert PruningJob.from_dict(old) == EXPERIMENTS["vgg19-cifar100"].job()


def test_a_target_of_ones_own():
    job = EXPERIMENTS["vgg19-cifar100"].job(target=Target(speedup=6.0), group_reduction="sum")
    assert (job.target.speedup, job.group_reduction) == (6.0, "sum")
    seen = list(chain.from_iterable(e.variants for e in EXPERIMENTS.values()))
    assert {"group_reduction": "mean", "normalizer": "mean"} in seen
