"""What users get wrong, as data: calls of public functions, and commands, each with a piece of what is said of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trainings import Net, batches_of, network

import obc_tools as obc

NAN, INF = math.nan, math.inf


class NormOfOne(nn.Sequential):
    """Batch norm over examples alone: of one example there is no variance."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(108, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))


@dataclass(frozen=True)
class World:
    """A tiny network and what belongs to it, with a folder of good and bad files."""

    folder: Path

    @property
    def model(self) -> nn.Module:
        return network()

    @cached_property
    def example(self) -> Tensor:
        return torch.zeros(1, 3, 6, 6).double()

    @cached_property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        return batches_of((6, 6))

    @property
    def images(self) -> Tensor:
        return self.batches[0][0]

    @property
    def labels(self) -> Tensor:
        return self.batches[0][1]

    @cached_property
    def groups(self) -> tuple[obc.ChannelGroup, ...]:
        return obc.find_groups(self.model, self.example)

    @property
    def group(self) -> obc.ChannelGroup:
        return next(group for group in self.groups if group.prunable)

    @cached_property
    def scores(self) -> obc.Scores:
        return obc.score_groups(self.model, self.groups, "l1")

    @cached_property
    def plan(self) -> obc.PruningPlan:
        return obc.make_plan(self.scores, channels=1)

    @property
    def pruned(self) -> nn.Module:
        return obc.prune(self.model, self.plan)

    @cached_property
    def costs(self) -> Any:
        return obc.cost_model(self.model, self.example)

    @cached_property
    def data(self) -> Any:
        return obc.as_data(*batches_of((12, 6)))

    @cached_property
    def products(self) -> obc.JacobianProducts:
        return obc.jacobian_products(self.model, self.batches)

    def of(self, **changes: Any) -> nn.Module:
        """Return the network with attributes of its first layer changed."""
        model = self.model
        for name, value in changes.items():
            setattr(model[0], name, value)
        return model

    def filled(self, value: float) -> nn.Module:
        model = self.model
        model[0].weight.data.fill_(value)
        return model

    def meta_head(self) -> nn.Module:
        model = self.model
        model[-1].to("meta")
        return model

    def half_head(self) -> nn.Module:
        model = self.model
        model[-1].half()
        return model

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath(*parts)


Change = Mapping[str, Any] | Callable[[World], Mapping[str, Any]]

RECIPE = obc.Recipe(epochs=1, batch_size=6)
JOB = {"model": "resnet8", "data": "digits", "target": obc.Target(speedup=1.5), "pretrain": RECIPE, "device": "cpu"}

BASES: Mapping[str, Callable[[World], Callable[..., Any]]] = {
    "Augmentation": lambda w: obc.Augmentation,
    "Criterion": lambda w: partial(obc.score_groups, w.model, w.groups, batches=w.batches),
    "EquivalentModel": lambda w: partial(obc.EquivalentModel, model=w.model, plan=w.plan),
    "Forward": lambda w: partial(obc.find_groups, w.model),
    "LayerType": lambda w: partial(obc.LayerType, "conv"),
    "PruningJob": lambda w: partial(obc.PruningJob, **JOB),
    "PruningJob.from_dict": lambda w: (
        lambda **changes: obc.PruningJob.from_dict(obc.PruningJob(**JOB).to_dict() | changes)
    ),
    "PruningPlan": lambda w: partial(obc.PruningPlan, groups=w.plan.groups, kept=w.plan.kept),
    "PruningPlan.choose": lambda w: partial(w.plan.choose, root=w.group),
    "PruningPlan.from_json": lambda w: obc.PruningPlan.from_json,
    "PruningPlan.kept_of": lambda w: w.plan.kept_of,
    "PruningPlan.selection": lambda w: w.plan.selection,
    "PruningPlan.then": lambda w: w.plan.then,
    "PruningPlan.validate": lambda w: w.plan.validate,
    "Recipe": lambda w: partial(obc.Recipe, epochs=1),
    "Recipe.from_dict": lambda w: obc.Recipe.from_dict,
    "Run.open": lambda w: obc.Run.open,
    "Grid.open": lambda w: obc.Grid.open,
    "Target": lambda w: obc.Target,
    "Task": lambda w: lambda **changes: obc.Task(**{"name": "mine", "losses": print, "metrics": print} | changes),
    "analyse": lambda w: partial(obc.analyse, model=w.model, example_inputs=w.example),
    "as_data": lambda w: partial(obc.as_data, val=None),
    "check_layer": lambda w: partial(obc.check_layer, layer=nn.Linear(3, 4), example_input=torch.zeros(2, 3)),
    "check_plan": lambda w: partial(obc.check_plan, model=w.model, plan=w.plan, example_inputs=w.example),
    "compare_criteria": lambda w: partial(
        obc.compare_criteria, w.model, w.data, criteria=["l1"], steps=1, batches=1, batch_size=4, progress=False
    ),
    "compensate": lambda w: partial(obc.compensate, model=w.model, plan=w.plan, batches=w.batches),
    "cost": lambda w: partial(obc.cost, model=w.model, example_inputs=w.example),
    "cost_model": lambda w: partial(obc.cost_model, model=w.model, example_inputs=w.example),
    "dense_jtj": lambda w: partial(obc.dense_jtj, model=w.model, batches=w.batches, layer="0"),
    "evaluate": lambda w: partial(obc.evaluate, model=w.model, batches=w.batches),
    "export_onnx": lambda w: partial(obc.export_onnx, path=w.path("out.onnx"), model=w.model, example_inputs=w.example),
    "export_program": lambda w: partial(obc.export_program, model=w.model, example_inputs=w.example),
    "filter_interactions": lambda w: partial(obc.filter_interactions, products=w.products, layer="0"),
    "find_groups": lambda w: partial(obc.find_groups, model=w.model, example_inputs=w.example),
    "find_runs": lambda w: obc.find_runs,
    "fit": lambda w: partial(obc.fit, model=w.model, train=w.batches, val=w.batches, recipe=RECIPE, progress=False),
    "group_jtj": lambda w: partial(obc.group_jtj, model=w.model, batches=w.batches, group=w.group, channel=0),
    "hold_out": lambda w: partial(obc.hold_out, data=w.data, split="train"),
    "jacobian_products": lambda w: partial(obc.jacobian_products, model=w.model, batches=w.batches),
    "latency": lambda w: partial(obc.latency, model=w.model, example_inputs=w.example, repeats=1, warmup=0),
    "speed_table": lambda w: partial(obc.speed_table, models={"one": w.model}, inputs={1: w.example}),
    "launch": lambda w: partial(obc.launch, experiment="resnet56-cifar10", folder=w.path("new"), small=True),
    "launch_grid": lambda w: partial(obc.launch_grid, jobs=[], folder=w.path("new")),
    "load_data": lambda w: obc.load_data,
    "load_model": lambda w: obc.load_model,
    "load_pruned": lambda w: obc.load_pruned,
    "make_plan": lambda w: partial(obc.make_plan, scores=w.scores, ratio=0.5),
    "one_shot_plan": lambda w: partial(obc.one_shot_plan, scores=w.scores, costs=w.costs),
    "paper_grid": lambda w: partial(obc.paper_grid, name="paper-cifar", folder=w.path("new")),
    "prepare": lambda w: obc.prepare,
    "prune": lambda w: partial(obc.prune, model=w.model, plan=w.plan),
    "prune_to": lambda w: partial(
        obc.prune_to, model=w.model, example_inputs=w.example, batches=w.batches, speedup=1.2, steps=2, progress=False
    ),
    "read_comparison": lambda w: obc.read_comparison,
    "recalibrate": lambda w: partial(obc.recalibrate, model=w.model, batches=w.batches),
    "register_layer": lambda w: obc.register_layer,
    "results_table": lambda w: obc.results_table,
    "run_experiment": lambda w: partial(
        obc.run_experiment, experiment="resnet56-cifar10", folder=w.path("new"), small=True, progress=False
    ),
    "save_pruned": lambda w: partial(obc.save_pruned, folder=w.path("new"), model=w.pruned, plan=w.plan),
    "score_groups": lambda w: partial(
        obc.score_groups, model=w.model, groups=w.groups, criterion="jacobian", batches=w.batches
    ),
    "sparse_train": lambda w: partial(
        obc.sparse_train,
        model=w.model,
        train=w.batches,
        val=w.batches,
        recipe=obc.Recipe(epochs=1, group_penalty=1e-3),
        progress=False,
    ),
    "take": lambda w: partial(obc.take, batches=w.batches),
    "task_of": lambda w: obc.task_of,
    "layers_table": lambda w: partial(obc.layers_table, model=w.model, plan=w.plan, example_inputs=w.example),
    "reachable": lambda w: partial(obc.reachable, model=w.model, example_inputs=w.example),
    "sensitivity": lambda w: partial(
        obc.sensitivity, model=w.model, example_inputs=w.example, held_out=w.batches, ratios=(0.5,), progress=False
    ),
    "sweep": lambda w: partial(
        obc.sweep,
        model=w.model,
        example_inputs=w.example,
        batches=w.batches,
        targets={"speedup": (1.2,)},
        steps=2,
        progress=False,
    ),
}
"""Good calls, each open for what a row changes of its keywords."""

TARGET_ROWS = (
    ({"speedup": NAN}, "speedup=nan: expected a number above 1"),
    ({"speedup": INF}, "speedup=inf: expected a positive number, not an infinite one"),
    ({"speedup": 1}, "speedup=1: expected a number above 1"),
    ({"speedup": -2}, "speedup=-2: expected a number above 1"),
    ({"speedup": "fast"}, "speedup=fast: expected a number above 1"),
    ({"speedup": None}, "give one target: speedup=, macs=, params= or ratio=; got none"),
    ({"ratio": 0.5}, "give one target: speedup=, macs=, params= or ratio=; got"),
    ({"speedup": None, "ratio": NAN}, "ratio=nan: expected a share of channels in (0, 1)"),
    ({"speedup": None, "ratio": 1.0}, "ratio=1.0: expected a share of channels in (0, 1)"),
    ({"speedup": None, "ratio": "half"}, "ratio=half: expected a share of channels in (0, 1)"),
    ({"speedup": None, "macs": 0}, "macs=0: expected a positive number, not an infinite one"),
    ({"speedup": None, "macs": NAN}, "macs=nan: expected a positive number, not an infinite one"),
    ({"speedup": None, "macs": 10**400}, "expected a positive number, not an infinite one"),
    ({"speedup": None, "params": -5}, "params=-5: expected a positive number, not an infinite one"),
    ({"speedup": None, "params": 1}, "params=1 cannot be met: the best that can be had is params=36"),
    ({"speedup": True}, "speedup=True: expected a number above 1"),
)
REACH_ROWS = (({"speedup": 1e9}, "speedup=1e+09 cannot be met: the best that can be had is speedup=4"),)
LIMIT_ROWS = (
    ({"max_ratio": NAN}, "max_ratio=nan: expected a share in (0, 1]"),
    ({"max_ratio": 0}, "max_ratio=0: expected a share in (0, 1]"),
    ({"max_ratio": 1.5}, "max_ratio=1.5: expected a share in (0, 1]"),
    ({"max_ratio": "most"}, "max_ratio=most: expected a share in (0, 1]"),
    ({"min_channels": 0}, "min_channels=0: expected at least 1 (a whole number)"),
    ({"min_channels": 1.5}, "min_channels=1.5: expected at least 1 (a whole number)"),
    ({"min_channels": NAN}, "min_channels=nan: expected at least 1 (a whole number)"),
    ({"min_channels": True}, "min_channels=True: expected at least 1 (a whole number)"),
    ({"round_to": 0}, "round_to=0: expected at least 1, or None (a whole number)"),
    ({"round_to": 2.5}, "round_to=2.5: expected at least 1, or None (a whole number)"),
    ({"round_to": "8"}, "round_to=8: expected at least 1, or None (a whole number)"),
    ({"scope": "layer"}, "unknown scope 'layer'; known: global, isomorphic, local"),
    ({"scope": 3}, "unknown scope '3'; known: global, isomorphic, local"),
    ({"scope": ["global"]}, "unknown scope \"['global']\"; closest: global, local"),
)
MODEL_ROWS = (
    ({"model": "resnet20"}, "model: expected a network (nn.Module), not str"),
    ({"model": None}, "model: expected a network (nn.Module), not NoneType"),
    (lambda w: {"model": w.model.state_dict()}, "model: expected a network (nn.Module), not OrderedDict"),
)
WRAPPED_ROWS = (
    (lambda w: {"model": nn.DataParallel(w.model)}, "the model is wrapped in a DataParallel: give the model itself,"),
)
INPUT_ROWS = (
    (lambda w: {"example_inputs": w.images[:, :2]}, ": RuntimeError: Given groups=1, weight of size [4, 3, 3, 3],"),
    (
        lambda w: {"example_inputs": (w.images * 9).byte()},
        ": images of whole numbers; make them floating point numbers and",
    ),
    (
        lambda w: {"example_inputs": w.images.to(torch.complex64)},
        ": images of complex numbers; make them floating point numbers and",
    ),
    (lambda w: {"example_inputs": w.images[0]}, ": ValueError: expected 4D input (got 3D input)"),
    (lambda w: {"example_inputs": w.images[0, 0]}, ": RuntimeError: Expected 3D (unbatched) or 4D (batched) input to"),
    (lambda w: {"example_inputs": w.images.numpy()}, ": there is no tensor among them"),
    (lambda w: {"example_inputs": (w.images, w.labels)}, "positional arguments"),
    (lambda w: {"example_inputs": {"pixels": w.images}}, ": TypeError:"),
    (lambda w: {"example_inputs": obc.Forward("model", w.images)}, ": TypeError: 'str' object is not callable"),
    (lambda w: {"model": w.meta_head()}, ": its parameters have several devices: cpu, meta"),
)
COUNT_ROWS = (
    ({"example_inputs": None}, "example inputs: the first one is a single value; expected examples"),
    ({"example_inputs": (3, 6, 6)}, "example inputs: the first one is a single value; expected examples"),
    ({"example_inputs": ()}, "example inputs: they hold no example"),
    (lambda w: {"example_inputs": w.images[:0]}, "example inputs: they hold no example"),
)
TYPE_ROWS = (
    (lambda w: {"example_inputs": w.images.float()}, ": dtype float32, the model's is float64"),
    (lambda w: {"model": w.half_head()}, ": its parameters have several dtypes: float16, float64"),
    (lambda w: {"example_inputs": w.images.to("meta")}, ": device meta, the model's is cpu"),
)
EMPTY_ROWS = (
    ({"batches": [[]]}, "batch 1 holds no example: leave it out"),
    (lambda w: {"batches": [(w.images.to("meta"), w.labels)]}, "batch 1: the device meta holds no numbers"),
    (lambda w: {"batches": [*w.batches, w.images[:0]]}, "batch 3 holds no example: leave it out"),
)
BATCH_ROWS = (
    (lambda w: {"batches": w.data}, "batches: not a Data; pass a list of batches, a DataLoader or"),
    ({"batches": []}, "the batches yield no data: an empty data set, or an iterator that"),
    ({"batches": 3}, "batches: not a int; pass a list of batches, a DataLoader or"),
    (
        lambda w: {"batches": [(w.images.float(), w.labels)]},
        "batch 1: Net cannot work on (6, 3, 6, 6) float32, (6,) int64: dtype",
    ),
    (
        lambda w: {"batches": [((w.images * 9).byte(), w.labels)]},
        "batch 1: Net cannot work on (6, 3, 6, 6) uint8, (6,) int64: images",
    ),
    (
        lambda w: {"batches": [((w.images * 9).long(), w.labels)]},
        "batch 1: Net cannot work on (6, 3, 6, 6) int64, (6,) int64: images",
    ),
    (
        lambda w: {"batches": [(w.images[:, :2], w.labels)]},
        "batch 1: Net cannot work on (6, 2, 6, 6) float64, (6,) int64:",
    ),
    (lambda w: {"model": w.half_head()}, ": its parameters have several dtypes: float16, float64"),
    (lambda w: {"model": w.meta_head()}, ": its parameters have several devices: cpu, meta"),
)
DATA_ROWS = (
    (lambda w: {"batches": w.batches[0]}, "(images, labels),"),
    (lambda w: {"batches": [w.images]}, "(images, labels),"),
    (
        lambda w: {"batches": [(w.images.to("meta"), w.labels)]},
        "batch 1: Net cannot work on (6, 3, 6, 6) float64, (6,) int64:",
    ),
    (
        lambda w: {"batches": [(w.images[:0], w.labels[:0])]},
        "batch 1: the objective returned no loss of any example; expected a",
    ),
    (
        lambda w: {"batches": [(w.images * NAN, w.labels)]},
        "batch 1: the loss is nan; look for NaN in the weights or the inputs",
    ),
    (
        lambda w: {"batches": [(w.images.numpy(), w.labels.numpy())]},
        "a batch is two tensors (images, labels), not ndarray, ndarray",
    ),
    (lambda w: {"model": w.filled(NAN)}, "batch 1: the loss is nan; look for NaN in the weights or the inputs"),
    (lambda w: {"batches": w.images}, "a batch is two tensors (images, labels), not (3, 6, 6) float64"),
)
LABEL_ROWS = (
    (lambda w: {"batches": [(w.images, w.labels.double())]}, ": expected a"),
    (lambda w: {"batches": [(w.images, w.labels + 3)]}, "label 5 for a model with 3 outputs (0 to 2)"),
    (lambda w: {"batches": [(w.images, w.labels - 5)]}, "label -5 for a model with 3 outputs (0 to 2)"),
    (lambda w: {"batches": [(w.images, w.labels[:2])]}, "(examples, classes)"),
    (lambda w: {"batches": [(w.images, w.labels[:, None])]}, ": expected a"),
    (lambda w: {"batches": [(w.images, w.labels.bool())]}, ": expected a"),
    (lambda w: {"batches": [(w.images, w.labels.tolist())]}, "(images, labels),"),
    (lambda w: {"batches": [(w.images, None)]}, "(images, labels),"),
    (lambda w: {"batches": [(w.images, w.images)]}, ": expected a"),
)
SCORING_ROWS = (
    ({"criterion": "jacobain"}, "unknown criterion 'jacobain'; closest: jacobian"),
    ({"criterion": 3}, "criterion 3: expected a name (jacobian, taylor, hessian, obdc, l1,"),
    ({"criterion": None}, "criterion None: expected a name (jacobian, taylor, hessian, obdc,"),
    (
        {"criterion": ("jacobian", {"rows": "pixel"})},
        "rows='pixel': expected 'batch', 'sample' or how many consecutive",
    ),
    ({"criterion": ("jacobian", {"colour": 1})}, "unknown option of criterion 'jacobian' 'colour'; known: applies,"),
    ({"criterion": ("jacobian", {"batches": 0})}, "criterion 'jacobian': batches=0; expected at least 1, or None for"),
    ({"criterion": ("jacobian",)}, "criterion ('jacobian',): expected a name (jacobian, taylor,"),
    ({"criterion": lambda weight: weight}, "criterion '<lambda>' gave (4, 27) for 0.out, not (4,)"),
    ({"criterion": lambda weight: "high"}, "criterion '<lambda>' gave str for 0.out, not a tensor"),
    ({"group_reduction": "median"}, "unknown group_reduction 'median'; closest: mean"),
    ({"group_reduction": None}, "; known: first, max, mean, prod, sum"),
    ({"normalizer": "l7"}, "unknown normalizer 'l7'; known: None, gaussian, max, mean,"),
    ({"seed": -1}, "seed=-1: expected at least 0 (a whole number)"),
    ({"seed": 0.5}, "seed=0.5: expected at least 0 (a whole number)"),
    (
        {"objective": lambda model, batch: model(batch[0])},
        "batch 1: the objective returned (6, 3) torch.float64; expected a",
    ),
    ({"objective": lambda model, batch: 0.5}, "batch 1: the objective returned float; expected a scalar or one"),
    (
        {"objective": lambda model, batch: model(batch[0]).detach().sum()},
        "batch 1: the loss does not depend on the model's parameters through",
    ),
    (
        {"objective": lambda model, batch: model(batch[0]).sum() * NAN},
        "batch 1: the loss is nan; look for NaN in the weights or the inputs",
    ),
    (
        {"objective": lambda model, batch: model(batch["image"])},
        "batch 1: Net cannot work on (6, 3, 6, 6) float64, (6,) int64:",
    ),
    ({"objective": "cross_entropy"}, "batch 1: Net cannot work on (6, 3, 6, 6) float64, (6,) int64:"),
)
SELECTION_ROWS = (
    ({"ignore": "nosuch"}, "unknown layer to ignore 'nosuch'; known: 0, 0.bias, 0.weight, 1,"),
    ({"ignore": ["0", 5]}, "ignore: 5 is neither a module nor the name or pattern of one"),
    ({"ignore": nn.Linear(3, 3)}, "ignore: a Linear that is not part of the model"),
    ({"ignore": None}, "ignore: None is neither a module nor the name or pattern of one"),
    ({"only": "heads"}, "unknown only 'heads'; known: None, attention, bottleneck, mlp"),
    ({"only": ["mlp"]}, "unknown only \"['mlp']\"; closest: mlp"),
)
TRAIN_ROWS = (
    ({"train": []}, "train: batches that yield no data"),
    ({"train": None}, "train is no batches: NoneType cannot be iterated or has no length"),
    ({"val": None}, "val is no batches: NoneType cannot be iterated or has no length"),
    ({"train": 3}, "train is no batches: int cannot be iterated or has no length"),
    ({"train": iter([])}, "train is a one-shot iterator (list_iterator): pass a list or a"),
    (lambda w: {"train": (batch for batch in w.batches)}, "train is a one-shot iterator (generator): pass a list or a"),
    (lambda w: {"val": []}, "val: batches that yield no data"),
    (lambda w: {"train": [w.images]}, "train, epoch 1, step 1 of 1 (learning rate 0.01): a batch is two"),
    (
        lambda w: {"train": [(w.images.float(), w.labels)]},
        "train, epoch 1, step 1 of 1 (learning rate 0.01): Net cannot work",
    ),
    (
        lambda w: {"train": [((w.images * 9).byte(), w.labels)]},
        "train, epoch 1, step 1 of 1 (learning rate 0.01): Net cannot work",
    ),
    (
        lambda w: {"train": [(w.images, w.labels.double())]},
        "train, epoch 1, step 1 of 1 (learning rate 0.01): 6 images need as",
    ),
    (
        lambda w: {"train": [(w.images, w.labels + 3)]},
        "train, epoch 1, step 1 of 1 (learning rate 0.01): label 3, but the",
    ),
    (
        lambda w: {"val": [(w.images, w.labels - 1)]},
        "val, batch 1: label -1, but the model has 3 outputs (labels 0 to 2)",
    ),
    (
        lambda w: {"val": [(w.images, w.labels.double())]},
        "val, batch 1: 6 images need as many whole class numbers as labels,",
    ),
    (
        lambda w: {"train": [(w.images, w.labels[:3])]},
        "train, epoch 1, step 1 of 1 (learning rate 0.01): 6 images need as",
    ),
    (
        lambda w: {"train": [(w.images[:0], w.labels[:0])]},
        "train, epoch 1, step 1 of 1 (learning rate 0.01): batches that",
    ),
    (
        lambda w: {"train": [(w.images.numpy(), w.labels.numpy())]},
        "train, epoch 1, step 1 of 1 (learning rate 0.01): a batch is two",
    ),
    (
        lambda w: {"train": [(w.images * NAN, w.labels)]},
        "epoch 1, step 1 of 1 (learning rate 0.01): the inputs of its batch",
    ),
    (lambda w: {"model": w.filled(NAN)}, "parameter '0.weight' holds values that are not finite: load or"),
    (lambda w: {"model": w.half_head()}, "val, batch 1: Net cannot work on (6, 3, 6, 6) float64: its"),
    (
        lambda w: {"model": NormOfOne().double(), "train": [(w.images[:1], w.labels[:1])]},
        "train, epoch 1, step 1 of 1 (learning rate 0.01): NormOfOne cannot",
    ),
    (
        lambda w: {"train": [*w.batches, (w.images[:1, :, :3, :3], w.labels[:1])]},
        "train, epoch 1, step 3 of 3 (learning rate 0.0025): Net cannot work",
    ),
    (lambda w: {"recipe": {"epochs": 1}}, "recipe: expected a Recipe, not dict; Recipe.from_dict reads a"),
    (lambda w: {"recipe": 3}, "recipe: expected a Recipe, not int; Recipe.from_dict reads a mapping"),
    (lambda w: {"task": "depth"}, "unknown task 'depth'; known: classification, detection, image_text,"),
    (lambda w: {"task": 5}, "task=5: expected a Task or one of classification, segmentation,"),
    (lambda w: {"task": "segmentation"}, "train, batch 1: task 'segmentation' does not fit Net: targets"),
    (lambda w: {"task": "detection"}, "train, batch 1: task 'detection' does not fit Net:"),
    (lambda w: {"task": "language_model"}, "train, batch 1: task 'language_model' does not fit Net: tokens"),
    (lambda w: {"task": "image_text"}, "train, batch 1: task 'image_text' does not fit Net:"),
    (lambda w: {"task": "outputs"}, "task 'outputs' trains a model to do as the original does: pass"),
)

BAD_CALLS: Mapping[str, tuple[tuple[Change, str], ...]] = {
    "layers_table": (*MODEL_ROWS, *INPUT_ROWS),
    "reachable": (*MODEL_ROWS, *INPUT_ROWS, *LIMIT_ROWS),
    "sensitivity": (*MODEL_ROWS, *INPUT_ROWS, ({"ratios": (1.5,)}, "ratio"), ({"ratios": ()}, "ratio")),
    "sweep": (*MODEL_ROWS, *INPUT_ROWS, *LIMIT_ROWS, ({"targets": {}}, "target"), ({"targets": {"mac": 1}}, "mac")),
    "prune_to": (
        ({"speedup": None, "latency_speedup": 1.2, "seed": -1}, "seed=-1: expected at least 0 (a whole number)"),
        *TARGET_ROWS,
        *REACH_ROWS,
        *LIMIT_ROWS,
        *MODEL_ROWS,
        *WRAPPED_ROWS,
        *INPUT_ROWS,
        *TYPE_ROWS,
        *BATCH_ROWS,
        *DATA_ROWS,
        *LABEL_ROWS,
        *SCORING_ROWS,
        *SELECTION_ROWS,
        ({"steps": 0}, "steps=0: expected at least 1 (a whole number)"),
        ({"steps": 1.5}, "steps=1.5: expected at least 1 (a whole number)"),
        ({"steps": NAN}, "steps=nan: expected at least 1 (a whole number)"),
        ({"schedule_ratio": NAN}, "schedule_ratio=nan: expected a share in (0, 1]"),
        ({"schedule_ratio": 0}, "schedule_ratio=0: expected a share in (0, 1]"),
        ({"schedule_ratio": 0.01}, "speedup=1.2 is not met: the schedule ends at schedule_ratio=0.01"),
        ({"last_step": "half"}, "unknown last_step 'half'; known: exact, full"),
        ({"counting": "fvcore"}, "unknown counting 'fvcore'; known: operations, torch_pruning"),
        ({"verify": "twice"}, "verify='twice': True, False or 'float32"),
        ({"stop": 0.7}, "stop=0.7: expected a share of a step's channels in (0, 0.5), or None"),
        ({"stop": NAN}, "stop=nan: expected a share of a step's channels in (0, 0.5), or None"),
        ({"stop": 0.1, "criterion": "l1"}, "stop=0.1: criterion 'l1' has no rows that add up; leave stop"),
        (
            {"rows": "expected", "criterion": "l1"},
            "rows='expected': criterion 'l1' has no rows, it needs weights; leave",
        ),
        ({"task": "depth"}, "unknown task 'depth'; known: classification, detection, image_text,"),
        ({"task": None}, "task=None: expected a Task or one of classification, segmentation,"),
        (
            lambda w: {"model": nn.Linear(3, 3).double(), "example_inputs": w.images[:, 0, 0, :3]},
            "nothing can be pruned: .out: reaches the model's output",
        ),
        (
            lambda w: {"model": nn.Identity(), "example_inputs": w.images},
            "the model's output holds no tensor that depends on its parameters;",
        ),
    ),
    "make_plan": (
        *LIMIT_ROWS,
        ({"ratio": None}, "give one target: ratio= or channels="),
        ({"channels": 1}, "give one target: ratio= or channels="),
        ({"ratio": NAN}, "ratio=nan: expected a share of channels in (0, 1)"),
        ({"ratio": 1}, "ratio=1: expected a share of channels in (0, 1)"),
        ({"ratio": "half"}, "ratio=half: expected a share of channels in (0, 1)"),
        ({"ratio": None, "channels": 1.5}, "channels=1.5: expected at least 0 (a whole number)"),
        ({"ratio": None, "channels": -1}, "channels=-1: expected at least 0 (a whole number)"),
        ({"ratio": None, "channels": 99}, "channels=99: from 0 to 3 channels can be removed within the limits"),
        ({"ratio": None, "channels": NAN}, "channels=nan: expected at least 0 (a whole number)"),
        (lambda w: {"scores": {}}, "zip() argument 2 is longer than argument 1"),
        (lambda w: {"scores": list(w.scores)}, "scores: expected a mapping from groups of channels to tensors, as"),
        (lambda w: {"scores": {w.group: torch.zeros(9)}}, "group 0.out: scores of shape (9,) for 4 channels"),
        (lambda w: {"scores": {w.group: torch.full((4,), NAN)}}, "group 0.out: the score of channel 0 is nan"),
        (
            lambda w: {"scores": {w.group: [1, 2, 3, 4]}},
            "group 0.out: scores are a tensor of real numbers, not int, int,",
        ),
        (
            lambda w: {"scores": {"0": torch.zeros(4)}},
            "scores: expected a mapping from groups of channels to tensors, as",
        ),
        (
            lambda w: {"scores": {w.group: torch.zeros(4, dtype=torch.complex64)}},
            "group 0.out: scores are a tensor of real numbers, not (4,) complex64",
        ),
    ),
    "one_shot_plan": (
        ({"speedup": NAN}, "speedup=nan: expected a number above 1"),
        ({"speedup": "fast"}, "speedup=fast: expected a number above 1"),
        ({"ratio": 1.0}, "ratio=1.0: expected a share of channels in (0, 1)"),
        ({"ratio": 0.5, "max_ratio_of": {("9", "out"): 0.5}}, "unknown group '9.out'; closest: 6.out, 0.out"),
        (
            {"ratio": 0.5, "max_ratio_of": {("0", "out"): NAN}},
            "max_ratio_of group 0.out=nan: expected a share in [0, 1]",
        ),
        ({"ratio": 0.5, "max_ratio_of": {"0": 0.5}}, "0' is no layer axis: expected a pair such as ('conv1', 'out')"),
        ({"ratio": 0.5, "fixed": {("9", "out"): (0,)}}, "unknown group '9.out'; closest: 6.out, 0.out"),
        ({"ratio": 0.5, "fixed": {("0", "out"): (9,)}}, "ratio=0.5 cannot be met: the best that can be had is ratio=0"),
        ({"ratio": 0.5, "fixed": {("0", "out"): ()}}, "ratio=0.5 cannot be met: the best that can be had is ratio=0"),
        (
            {"ratio": 0.5, "by_hand": {("0", "out"): ((0,), (0,))}},
            "group ('0', 'out'): channel 0 is to be kept and to be removed",
        ),
        ({"ratio": 0.5, "by_hand": {("0", "out"): ((7,), ())}}, "group 0.out: no channel 7 in a group of width 4"),
    ),
    "find_groups": (*MODEL_ROWS, *WRAPPED_ROWS, *INPUT_ROWS, *TYPE_ROWS, *SELECTION_ROWS),
    "analyse": (
        *INPUT_ROWS[:4],
        ({"counting": "fvcore"}, "unknown counting 'fvcore'; known: operations, torch_pruning"),
    ),
    "cost": (
        *MODEL_ROWS,
        *INPUT_ROWS,
        *TYPE_ROWS,
        *COUNT_ROWS,
        ({"counting": "fvcore"}, "unknown counting 'fvcore'; known: operations, torch_pruning"),
        ({"counting": None}, "unknown counting 'None'; known: operations, torch_pruning"),
    ),
    "cost_model": (
        *MODEL_ROWS,
        *WRAPPED_ROWS,
        *INPUT_ROWS,
        *TYPE_ROWS,
        ({"counting": "fvcore"}, "unknown counting 'fvcore'; known: operations, torch_pruning"),
    ),
    "latency": (
        *MODEL_ROWS,
        *INPUT_ROWS,
        *TYPE_ROWS[:2],
        *COUNT_ROWS,
        ({"repeats": 0}, "latency: repeats=0: expected at least 1 (a whole number)"),
        ({"repeats": 1.5}, "latency: repeats=1.5: expected at least 1 (a whole number)"),
        ({"repeats": NAN}, "latency: repeats=nan: expected at least 1 (a whole number)"),
        ({"warmup": -1}, "latency: warmup=-1: expected at least 0 (a whole number)"),
        ({"threads": 0}, "latency: threads=0: expected at least 1, or None for torch's"),
        ({"threads": 1.5}, "latency: threads=1.5: expected at least 1, or None for torch's"),
    ),
    "export_onnx": (
        *MODEL_ROWS,
        *INPUT_ROWS[:5],
        ({"tolerance": NAN}, "tolerance=nan: expected a number above 0"),
        ({"tolerance": -1}, "tolerance=-1: expected a number above 0"),
    ),
    "export_program": (*MODEL_ROWS, *INPUT_ROWS),
    "check_plan": (
        *MODEL_ROWS,
        *INPUT_ROWS,
        ({"plan": None}, "plan: expected a PruningPlan, not NoneType; PruningPlan.from_json"),
        ({"plan": "{}"}, "plan: expected a PruningPlan, not str; PruningPlan.from_json reads"),
        ({"tolerance": NAN}, "tolerance=nan: expected a number above 0"),
        ({"tolerance": -1}, "tolerance=-1: expected a number above 0"),
        ({"dtype": torch.int64}, "dtype=torch.int64: expected one of floating point numbers, such as"),
        ({"dtype": "float64"}, "dtype=float64: expected one of floating point numbers, such as"),
        ({"seed": -1}, "seed=-1: expected at least 0 (a whole number)"),
        (lambda w: {"model": nn.Linear(3, 3)}, "the plan's axis 0.out is not in this model: unknown layer '0';"),
        (lambda w: {"model": w.pruned}, "layer '0': the plan's axis 0.out is 4 wide, here 3"),
        (lambda w: {"model": w.filled(NAN)}, "the unpruned model's output is not finite"),
    ),
    "check_layer": (
        ({"layer": None}, "model: expected a network (nn.Module), not NoneType"),
        ({"layer": nn.Bilinear(2, 2, 2)}, "layer '': type Bilinear is not in the table of layer types;"),
        ({"example_input": torch.zeros(2, 5)}, "example_input: Linear cannot work on (2, 5) float64: RuntimeError:"),
        ({"example_input": None}, "example_input: expected a tensor, not NoneType"),
        (
            {"example_input": torch.zeros(2, 3, dtype=torch.int64)},
            "example_input: Linear cannot work on (2, 3) int64: RuntimeError:",
        ),
        ({"tolerance": NAN}, "tolerance=nan: expected a number above 0"),
        ({"seed": -1}, "seed=-1: expected at least 0 (a whole number)"),
    ),
    "score_groups": (
        *BATCH_ROWS,
        *DATA_ROWS,
        *LABEL_ROWS,
        *SCORING_ROWS,
        ({"groups": None}, "groups: expected groups of channels, as find_groups returns them"),
        ({"groups": ()}, "batch 1: the loss does not depend on the model's parameters through"),
        ({"groups": ["0"]}, "groups: expected groups of channels, as find_groups returns them"),
        (lambda w: {"model": nn.Linear(3, 3).double()}, "unknown layer '0'; there is none that has a name"),
        (lambda w: {"model": w.pruned}, "group of axis 0.out: 4 wide, in this model 3"),
        (lambda w: {"model": None}, "model: expected a network (nn.Module), not NoneType"),
    ),
    "jacobian_products": (
        *BATCH_ROWS,
        *DATA_ROWS,
        *LABEL_ROWS,
        ({"layers": ["nosuch"]}, "unknown layer 'nosuch'; known: 0, 1, 2, 3, 4, 5, 6"),
        ({"layers": ["2"]}, "layer '2': type ReLU is not in the table of layer types;"),
        ({"layers": []}, "batch 1: the loss does not depend on the model's parameters through"),
        ({"rows": "pixel"}, "rows='pixel': expected 'batch', 'sample' or how many consecutive"),
        ({"rows": None}, "rows=None: expected 'batch', 'sample' or how many consecutive"),
        ({"max_bytes": 0}, "max_bytes=0: expected a number of bytes above 0"),
        ({"max_bytes": NAN}, "max_bytes=nan: expected a number of bytes above 0"),
        ({"objective": None}, "batch 1: Net cannot work on (6, 3, 6, 6) float64, (6,) int64:"),
    ),
    "dense_jtj": (
        *BATCH_ROWS,
        *DATA_ROWS,
        *LABEL_ROWS,
        ({"layer": "nosuch"}, "unknown layer 'nosuch'; known: 0, 1, 2, 3, 4, 5, 6"),
        ({"layer": "2"}, "layer '2': type ReLU is not in the table of layer types;"),
        ({"layer": None}, "unknown layer None; known: 0, 1, 2, 3, 4, 5, 6"),
        ({"channels": 9}, "0.out: no channel 9; the channels are 0 to 3"),
        ({"channels": -1}, "0.out: no channel -1; the channels are 0 to 3"),
        ({"channels": []}, "0.out: no channels are asked for"),
        ({"channels": 0.5}, "0.out: no channel 0.5; the channels are 0 to 3"),
        ({"channels": ["first"]}, "0.out: no channel first; the channels are 0 to 3"),
        ({"axis": "up"}, "unknown axis of layer '0' 'up'; known: in, out"),
        ({"pool": "median"}, "unknown pool 'median'; known: None, kernel"),
        ({"rows": "pixel"}, "rows='pixel': expected 'batch', 'sample' or how many consecutive"),
        ({"max_bytes": 1}, "0.out: JᵀJ of 4 channels of 28 parameters takes 2.51e-05 GB, more"),
    ),
    "group_jtj": (
        *BATCH_ROWS[:6],
        ({"group": None}, "group=None: expected a group of channels, one of those that"),
        ({"group": "0"}, "group='0': expected a group of channels, one of those that"),
        ({"channel": 9}, "group 0.out: no channel 9; the channels are 0 to 3"),
        ({"channel": -1}, "group 0.out: no channel -1; the channels are 0 to 3"),
        ({"channel": 0.5}, "group 0.out: no channel 0.5; the channels are 0 to 3"),
        ({"channel": None}, "group 0.out: no channel None; the channels are 0 to 3"),
        ({"rows": "pixel"}, "rows='pixel': expected 'batch', 'sample' or how many consecutive"),
    ),
    "filter_interactions": (
        ({"layer": "nosuch"}, "unknown layer axis 'nosuch.out'; closest: 6.out, 1.out, 0.out"),
        ({"layer": None}, "unknown layer axis 'None.out'; closest: 6.out, 1.out, 0.out"),
        ({"axis": "up"}, "unknown layer axis '0.up'; closest: 0.out, 0.in"),
        ({"products": None}, "products: expected what jacobian_products returns, not NoneType"),
        ({"products": {}}, "products: expected what jacobian_products returns, not dict"),
    ),
    "evaluate": (
        *MODEL_ROWS,
        *BATCH_ROWS,
        *DATA_ROWS[:2],
        *LABEL_ROWS,
        ({"task": "depth"}, "unknown task 'depth'; known: classification, detection, image_text,"),
        ({"task": None}, "task=None: expected a Task or one of classification, segmentation,"),
        ({"task": "segmentation"}, "batch 1: task 'segmentation' does not fit Net: targets torch.int64"),
        ({"task": "detection"}, "batch 1: task 'detection' does not fit Net: conv2d() received an"),
        ({"task": "language_model"}, "batch 1: task 'language_model' does not fit Net: tokens torch.int64"),
        ({"task": "image_text"}, "batch 1: task 'image_text' does not fit Net: Sequential.forward()"),
        ({"task": "outputs"}, "batch 0: task 'outputs' does not fit Net: task 'outputs' compares"),
    ),
    "recalibrate": (*MODEL_ROWS, *BATCH_ROWS, *EMPTY_ROWS),
    "compensate": (
        *MODEL_ROWS,
        *BATCH_ROWS,
        *EMPTY_ROWS,
        ({"ridge": NAN}, "ridge=nan: expected a number of 0 or more"),
        ({"ridge": -1}, "ridge=-1: expected a number of 0 or more"),
        ({"positions": 0}, "positions=0: expected at least 1, or None for all (a whole number)"),
        ({"positions": 1.5}, "positions=1.5: expected at least 1, or None for all (a whole number)"),
        ({"max_bytes": 1}, "layer '0': the second moments of its 27 inputs take 12,960 bytes,"),
        ({"ignore": ["nosuch"]}, "unknown layer to ignore 'nosuch'; known: 0, 0.bias, 0.weight, 1,"),
        ({"plan": None}, "plan: expected a PruningPlan, not NoneType; PruningPlan.from_json"),
        (lambda w: {"model": w.pruned}, "layer '0': the plan's axis 0.out is 4 wide, here 3"),
    ),
    "fit": (
        *MODEL_ROWS,
        *TRAIN_ROWS,
        (lambda w: {"train": [(w.images.to("meta"), w.labels)]}, ": the device meta holds no numbers"),
        ({"resume": True}, "resume=True goes on from a checkpoint: pass run=, the folder that"),
        (lambda w: {"run": w.path("file")}, "[Errno 17] File exists:"),
        (lambda w: {"run": w.path("file", "run")}, "[Errno 20] Not a directory:"),
        (
            lambda w: {"recipe": obc.Recipe(epochs=1, distill_weight=1)},
            "distill_weight is 1 and there is no teacher: distillation needs both",
        ),
        (
            lambda w: {"recipe": obc.Recipe(epochs=1, distill_weight=1), "teacher": network().float()},
            "train, epoch 1, step 1 of 2 (learning rate 0.01): Net cannot work",
        ),
        (
            lambda w: {"recipe": obc.Recipe(epochs=1, distill_weight=1), "teacher": Net(outputs=5).double()},
            "train, epoch 1, step 1 of 2 (learning rate 0.01): Net cannot work",
        ),
        (
            lambda w: {"recipe": obc.Recipe(epochs=1, amp="fp16")},
            "amp='fp16' needs a GPU; a model on the CPU trains with amp='bf16'",
        ),
        (
            lambda w: {"recipe": obc.Recipe(epochs=1, freeze=("nosuch",))},
            "unknown parameter to freeze 'nosuch'; known: 0.bias, 0.weight,",
        ),
        (
            lambda w: {"recipe": obc.Recipe(epochs=1, freeze=("*",))},
            "Net has no parameter that requires grad: there is nothing to train",
        ),
        (
            lambda w: {"recipe": obc.Recipe(epochs=1, lr=1e200)},
            "epoch 1, step 2 of 2 (learning rate 5e+199): the loss is nan. The",
        ),
        (lambda w: {"teacher": w.model}, "distill_weight is 0 and there is a teacher: distillation needs both"),
        (lambda w: {"teacher": "resnet20"}, "model: expected a network (nn.Module), not str"),
        (lambda w: {"regularize": 3}, "train, epoch 1, step 1 of 2 (learning rate 0.01): Net cannot work"),
    ),
    "sparse_train": (
        *TRAIN_ROWS[:6],
        (lambda w: {"recipe": obc.Recipe(epochs=1)}, "sparse training needs a recipe with group_penalty above 0 (the"),
        ({"ignore": ["nosuch"]}, "unknown layer to ignore 'nosuch'; known: 0, 0.bias, 0.weight, 1,"),
        (
            lambda w: {"model": nn.Linear(3, 3).double()},
            "cannot trace this Linear: RuntimeError: mat1 and mat2 shapes cannot",
        ),
    ),
    "compare_criteria": (
        *LIMIT_ROWS,
        *SELECTION_ROWS,
        ({"criteria": []}, "criteria need labels of their own, got none; pass a mapping from"),
        ({"criteria": "l1"}, "unknown criterion 'l'; closest: l2, l1"),
        ({"criteria": ["l7"]}, "unknown criterion 'l7'; closest: l2, l1"),
        ({"criteria": ["l1", "l1"]}, "criteria need labels of their own, got l1, l1; pass a mapping from"),
        ({"criteria": [5]}, "criterion 5: expected a name (jacobian, taylor, hessian, obdc, l1,"),
        ({"criteria": {"mine": "l7"}}, "unknown criterion 'l7'; closest: l2, l1"),
        ({"steps": 0}, "steps=0: expected at least 1 (a whole number)"),
        ({"steps": 1.5}, "steps=1.5: expected at least 1 (a whole number)"),
        ({"repeats": 0}, "repeats=0: expected at least 1 (a whole number)"),
        ({"ratio": NAN}, "ratio=nan: expected a share in (0, 1)"),
        ({"ratio": 2}, "ratio=2: expected a share in (0, 1)"),
        ({"ratio": "half"}, "ratio=half: expected a share in (0, 1)"),
        ({"ratio": 0.5, "macs": 0.5}, "give one end: ratio= (share of channels removed) or macs= (share of"),
        ({"macs": 5}, "macs=5: expected a share in (0, 1)"),
        ({"batches": 0}, "batches=0: expected at least 1 (a whole number)"),
        ({"criteria": ["jacobian"], "batches": 99}, "ratio=0.9 cannot be met: the best that can be had is ratio=0.75"),
        ({"batches": 0.5}, "batches=0.5: expected at least 1 (a whole number)"),
        ({"batch_size": 0}, "batch_size=0: expected at least 1 (a whole number)"),
        ({"seed": -1}, "seed=-1: expected at least 0 (a whole number)"),
        ({"held_out": 0}, "held_out=0: expected at least 1 images, or None for all (a whole"),
        ({"held_out": 99}, "ratio=0.9 cannot be met: the best that can be had is ratio=0.75"),
        ({"training": -1}, "training=-1: expected at least 0 images, or None for all (a whole"),
        ({"speed": 3}, "unknown setting 'speed'; known are ignore, whole_heads, only,"),
        ({"task": "depth"}, "unknown task 'depth'; known: classification, detection, image_text,"),
        ({"counting": "fvcore"}, "unknown counting 'fvcore'; known: operations, torch_pruning"),
        (lambda w: {"folder": w.path("file")}, "ratio=0.9 cannot be met: the best that can be had is ratio=0.75"),
        (lambda w: {"folder": w.path("full")}, "ratio=0.9 cannot be met: the best that can be had is ratio=0.75"),
    ),
    "EquivalentModel": (
        *MODEL_ROWS,
        ({"plan": None}, "plan: expected a PruningPlan, not NoneType; PruningPlan.from_json"),
        (lambda w: {"model": w.pruned}, "layer '0': the plan's axis 0.out is 4 wide, here 3"),
        (lambda w: {"start": w.model}, "the start is not what the plan leaves of the model: '0.weight' is"),
        (lambda w: {"start": "naive"}, "model: expected a network (nn.Module), not str"),
    ),
    "prune": (
        *MODEL_ROWS,
        ({"plan": None}, "plan: expected a PruningPlan, not NoneType; PruningPlan.from_json"),
        ({"plan": "plan.json"}, "plan: expected a PruningPlan, not str; PruningPlan.from_json reads"),
        (lambda w: {"plan": w.groups}, "plan: expected a PruningPlan, not tuple; PruningPlan.from_json"),
        (lambda w: {"model": w.pruned}, "layer '0': the plan's axis 0.out is 4 wide, here 3"),
        (lambda w: {"model": nn.Linear(3, 3)}, "the plan's axis 0.out is not in this model: unknown layer '0';"),
    ),
    "save_pruned": (
        *MODEL_ROWS,
        (lambda w: {"folder": w.path("file")}, "/file' is a file, not a folder"),
        (lambda w: {"folder": w.path("full")}, "/full' already holds notes.txt: choose another, or pass"),
        (
            lambda w: {"folder": w.path("full"), "overwrite": True},
            "/full' holds more than a saved model (notes.txt): choose another",
        ),
        (lambda w: {"folder": w.path("file", "in")}, "[Errno 17] File exists:"),
        ({"plan": None}, "plan: expected a PruningPlan, not NoneType; PruningPlan.from_json"),
        (lambda w: {"model": w.model}, "axis 0.out of this model is 4 wide; the plan leaves 3 channels"),
        (lambda w: {"model": w.filled(NAN)}, "axis 0.out of this model is 4 wide; the plan leaves 3 channels"),
        (
            lambda w: {"model": obc.EquivalentModel(w.model, w.plan)},
            "an EquivalentModel is saved after merging: pass model.merge()",
        ),
        ({"source": "resnet57"}, "source {'name': 'resnet57', 'num_classes': 3}: load_model cannot"),
        ({"source": "resnet20"}, "the plan's axis 0.out is not in this model: unknown layer '0';"),
        ({"source": 5}, "source is no name and no mapping of load_model's arguments: 5"),
        (
            {"source": {"name": "resnet20", "weights": "x.pth"}},
            "the plan's axis 0.out is not in this model: unknown layer '0';",
        ),
        (
            {"source": {"name": "resnet20", "num_classes": 0}},
            "source: num_classes is 0; it is a whole number of at least 1",
        ),
        (
            {"source": {"name": "resnet20", "num_classes": 3, "width": NAN}},
            "source: 'width' is nan; only text, booleans, null",
        ),
        (
            {"source": {"name": "resnet20", "num_classes": 3, "colour": "red"}},
            "source {'name': 'resnet20', 'num_classes': 3, 'colour': 'red'}:",
        ),
        ({"source": {"num_classes": 3}}, "source is no mapping of load_model's arguments with a 'name':"),
    ),
    "load_pruned": (
        (lambda w: {"folder": w.path("nosuch")}, "nosuch' is no folder"),
        (lambda w: {"folder": w.path("file")}, "file' is no folder"),
        (lambda w: {"folder": w.path("empty")}, "holds no manifest.json"),
    ),
    "Run.open": (
        (lambda w: {"folder": w.path("nosuch")}, "nosuch' holds no job"),
        (lambda w: {"folder": w.path("file")}, "file' holds no job"),
        (lambda w: {"folder": w.path("empty")}, "empty' holds no job"),
    ),
    "Grid.open": (
        (lambda w: {"folder": w.path("nosuch")}, "nosuch' holds no grid"),
        (lambda w: {"folder": w.path("file")}, "file' holds no grid"),
        (lambda w: {"folder": w.path("empty")}, "empty' holds no grid"),
    ),
    "find_runs": (
        (lambda w: {"folder": w.path("nosuch")}, "nosuch' is no folder"),
        (lambda w: {"folder": w.path("file")}, "file' is no folder"),
    ),
    "results_table": (
        (lambda w: {"runs": w.path("nosuch")}, "/nosuch' is no folder"),
        (lambda w: {"runs": w.path("empty")}, "none of 0 runs has finished with a fine-tuned"),
        ({"runs": []}, "none of 0 runs has finished with a fine-tuned"),
    ),
    "read_comparison": (
        (lambda w: {"path": w.path("nosuch")}, "/nosuch' holds no comparison: [Errno 2] No such file or directory:"),
        (lambda w: {"path": w.path("file")}, "/file' holds no comparison: Expecting value: line 1 column 1 (char"),
        (lambda w: {"path": w.path("empty")}, "/empty' holds no comparison: there is no comparison.json"),
    ),
    "load_model": (
        ({"name": "resnet57"}, "unknown network 'resnet57'; known are resnet20, resnet32, resnet44,"),
        ({"name": "torchvision:resnet5"}, "unknown network 'torchvision:resnet5'; known are resnet20,"),
        ({"name": "timm:resnet5"}, "unknown network 'timm:resnet5'; known are resnet20, resnet32,"),
        ({"name": "keras:resnet50"}, "unknown network 'keras:resnet50'; known are resnet20, resnet32,"),
        ({"name": 20}, "name=20: expected that of a network, such as 'resnet56"),
        ({"name": None}, "name=None: expected that of a network, such as 'resnet56"),
        ({"name": ""}, "unknown network ''; known are resnet20, resnet32, resnet44,"),
        ({"name": "resnet20", "num_classes": 0}, "num_classes=0: expected at least 1 (a whole number)"),
        ({"name": "resnet20", "num_classes": 2.5}, "num_classes=2.5: expected at least 1 (a whole number)"),
        ({"name": "resnet20", "num_classes": "ten"}, "num_classes=ten: expected at least 1 (a whole number)"),
        ({"name": "resnet20", "width": 0}, "network 'resnet20': width=0: expected at least 1 (a whole number)"),
        ({"name": "resnet20", "width": NAN}, "network 'resnet20': width=nan: expected at least 1 (a whole number)"),
        ({"name": "resnet20", "colour": "red"}, "network 'resnet20': CifarResNet.__init__() got an unexpected"),
        (
            {"name": "resnet20", "weights": "nosuch.pth"},
            "weights 'nosuch.pth': there is no such file, and weights by name",
        ),
        (
            {"name": "resnet20", "weights": "pretrained"},
            "resnet20' has no pretrained weights; pass weights='published',",
        ),
        (lambda w: {"name": "resnet20", "weights": w.path("empty")}, "/empty' is a folder"),
        (
            lambda w: {"name": "resnet20", "weights": w.path("file")},
            "/file' is truncated or not a file of weights saved by torch",
        ),
        (
            lambda w: {"name": "resnet20", "weights": w.path("complex.pth")},
            "/complex.pth: these are weights of another architecture: 106",
        ),
        (
            {"name": "torchvision:resnet18", "colour": "red"},
            "network 'torchvision:resnet18': ResNet.__init__() got an unexpected",
        ),
        ({"name": "timm:resnet18", "colour": "red"}, "network 'timm:resnet18': ResNet.__init__() got an unexpected"),
        ({"name": "transformers:nosuch"}, "nosuch' is no folder with a config.json: transformers' networks are"),
    ),
    "load_data": (
        ({"name": "cifar"}, "unknown data set 'cifar'; known are digits, cifar10, cifar100,"),
        ({"name": 10}, "unknown data set '10'; known are digits, cifar10, cifar100,"),
        ({"name": None}, "unknown data set 'None'; known are digits, cifar10, cifar100,"),
        (lambda w: {"name": "digits", "root": w.folder}, "digits come with scikit-learn: root must be None"),
        (
            {"name": "digits", "normalize": "imagenet"},
            "unknown normalisation 'imagenet' of digits; known are training, or",
        ),
        ({"name": "digits", "normalize": 5}, "normalize=5: expected a name or (mean, std), one number a channel"),
        ({"name": "digits", "normalize": (1, 2)}, "normalize=(1, 2): expected a name or (mean, std), one number a"),
        (
            {"name": "digits", "normalize": ((0.5,), (0.0,))},
            "normalisation: standard deviations must be positive, not (0.0,)",
        ),
        (
            {"name": "digits", "normalize": ((0.5,), (NAN,))},
            "normalisation: standard deviations must be positive, not (nan,)",
        ),
        (
            {"name": "digits", "normalize": ((0.5, 0.5), (1.0, 1.0))},
            "digits: images have 1 channels, the normalisation is for 2",
        ),
        ({"name": "digits", "download": True}, "digits cannot be downloaded; only cifar10 and cifar100 can"),
        (
            lambda w: {"name": "cifar10", "root": w.path("empty")},
            "/empty': pass download=True to fetch it there, or as root= a folder",
        ),
        (lambda w: {"name": "cifar10", "root": w.path("file")}, "/file' is truncated or not an .npz file"),
        (
            lambda w: {"name": "cifar10", "root": w.path("nosuch")},
            "/nosuch': pass download=True to fetch it there, or as root= a",
        ),
        (lambda w: {"name": "cifar10", "root": w.path("broken.npz")}, "/broken.npz' is truncated or not an .npz file"),
        (lambda w: {"name": "imagenet", "root": w.path("empty")}, "/empty' has neither a folder 'train' nor one 'val"),
        (lambda w: {"name": "imagenet"}, "imagenet: no root was given; pass root=, a folder with class"),
        (
            lambda w: {"name": "folder", "root": w.path("file")},
            "/file' is not a folder; pass root=, a folder with class folders in",
        ),
        (
            lambda w: {"name": "folder", "root": w.path("classes")},
            "/classes/train' should hold one folder of images a class: Found no",
        ),
        (
            lambda w: {"name": "folder", "root": w.path("classes"), "image_size": 0},
            "/classes/train' should hold one folder of images a class: Found no",
        ),
    ),
    "as_data": (
        ({"train": None}, "as_data: there are neither train nor val examples"),
        ({"train": 5}, "as_data: a int holds no examples that could be drawn by number;"),
        ({"train": []}, "as_data: a list may hold batches or examples; pass a DataLoader"),
        (lambda w: {"train": w.batches}, "as_data: a list may hold batches or examples; pass a DataLoader"),
        (
            lambda w: {"train": (w.images, w.labels[:2])},
            "as_data: tensors of [2, 6] examples; expected equally many, at",
        ),
        (lambda w: {"train": (w.images, w.labels), "classes": ["a"]}, "as_data: label 2 is out of range for 1 classes"),
        (lambda w: {"train": (w.images, w.labels - 3)}, "as_data: label -3; class numbers count from 0"),
        (
            lambda w: {"train": (w.images[:0], w.labels[:0])},
            "as_data: tensors of [0] examples; expected equally many, at least 1",
        ),
        (lambda w: {"train": iter(w.batches)}, "as_data: a list_iterator holds no examples that could be drawn by"),
        (lambda w: {"train": torch.tensor(5)}, "as_data: tensors of [0] examples; expected equally many, at least 1"),
        (
            lambda w: {"train": {"image": w.images, "label": "cat"}},
            "as_data: a dict holds no examples that could be drawn by number;",
        ),
        (lambda w: {"train": (w.images, w.labels), "classes": 3}, "as_data: classes=3; expected names, one a class"),
        (lambda w: {"train": w.images, "val": 5}, "as_data: a int holds no examples that could be drawn by number;"),
    ),
    "hold_out": (
        ({"split": "test"}, "unknown split 'test'; there are 'train' and 'val"),
        ({"share": 0}, "share=0: expected a share of the images in (0, 1)"),
        ({"share": 1.5}, "share=1.5: expected a share of the images in (0, 1)"),
        ({"share": NAN}, "share=nan: expected a share of the images in (0, 1)"),
        ({"share": "half"}, "share=half: expected a share of the images in (0, 1)"),
        ({"seed": -1}, "seed=-1: expected at least 0 (a whole number)"),
    ),
    "take": (
        ({"length": 0}, "take: length=0: expected at least 1 (a whole number)"),
        ({"length": 9}, "take: 9 batches were asked for, a pass holds 2"),
        ({"length": 1.5}, "take: length=1.5: expected at least 1 (a whole number)"),
        ({"length": NAN}, "take: length=nan: expected at least 1 (a whole number)"),
        ({"length": "two"}, "take: length=two: expected at least 1 (a whole number)"),
        (
            lambda w: {"batches": iter(w.batches), "length": 1},
            "take: a list_iterator can be gone through only once; pass Batches,",
        ),
        ({"batches": None, "length": 1}, "batches: not a NoneType; pass a list of batches, a DataLoader or"),
    ),
    "Target": TARGET_ROWS[:5],
    "Recipe": (
        ({"epochs": 0}, "recipe: epochs is 0; it is a whole number of at least 1"),
        ({"epochs": 1.5}, "recipe: epochs is 1.5; it is a whole number of at least 1"),
        ({"epochs": NAN}, "recipe: epochs is nan; it is a whole number of at least 1"),
        ({"lr": NAN}, "recipe: lr is nan; it is a finite number of at least 0"),
        ({"lr": "0.1"}, "recipe: lr is '0.1'; it is a finite number of at least 0"),
        ({"lr": -1.0}, "recipe: lr is -1.0; it is a finite number of at least 0"),
        ({"lr": 0}, "recipe: lr is 0; it is above 0"),
        ({"batch_size": 0}, "recipe: batch_size is 0; it is a whole number of at least 1"),
        ({"batch_size": True}, "recipe: batch_size is True; it is a whole number of at least 1"),
        ({"optimizer": "adam"}, "recipe: optimizer is 'adam'; known are 'sgd', 'adamw"),
        ({"optimizer": ["sgd"]}, "recipe: optimizer is ['sgd']; known are 'sgd', 'adamw"),
        ({"schedule": "poly"}, "recipe: schedule is 'poly'; known are 'cosine', 'multistep',"),
        ({"milestones": (3,)}, "recipe: milestones is (3,); they belong to schedule 'multistep' and"),
        ({"milestones": 3}, "recipe: milestones is 3; it is a list of epochs"),
        (
            {"schedule": "multistep", "milestones": (5, 3)},
            "recipe: milestones is (5, 3); they are whole numbers of at least 1,",
        ),
        (
            {"schedule": "multistep", "milestones": (1.5,)},
            "recipe: milestones is (1.5,); they are whole numbers of at least 1,",
        ),
        ({"momentum": 1.0}, "recipe: momentum is 1.0; it is below 1"),
        ({"momentum": NAN}, "recipe: momentum is nan; it is a finite number of at least 0"),
        ({"nesterov": True, "momentum": 0.0}, "recipe: nesterov is True; it needs optimizer 'sgd' and a momentum"),
        ({"label_smoothing": 1}, "recipe: label_smoothing is 1; it is below 1"),
        ({"clip_norm": NAN}, "recipe: clip_norm is nan; it is a finite number above 0, or None"),
        ({"clip_norm": 0}, "recipe: clip_norm is 0; it is a finite number above 0, or None for"),
        ({"amp": "fp8"}, "recipe: amp is 'fp8'; known are 'no', 'bf16', 'fp16"),
        ({"warmup_epochs": 5}, "recipe: warmup_epochs is 5; training ends after 1 epochs, before"),
        ({"warmup_start": 0}, "recipe: warmup_start is 0; it is a factor above 0 and at most 1"),
        ({"min_lr": 1.0}, "recipe: min_lr is 1.0; it is at most lr (0.01), and only schedule"),
        ({"temperature": 0}, "recipe: temperature is 0; it is a finite number above 0"),
        ({"label_weight": 0}, "recipe: label_weight is 0; nothing is left to learn: distill_weight"),
        ({"ema_decay": 1.0}, "recipe: ema_decay is 1.0; it is a number from 0 to below 1"),
        ({"freeze": "0"}, "recipe: freeze is '0'; it is a list of names or patterns"),
        ({"freeze": (3,)}, "recipe: freeze is (3,); it is a list of names or patterns"),
        ({"augment": 1}, "recipe: augment is 1; it is True or False"),
        ({"rand_augment": 99}, "recipe: rand_augment is 99; it is 0 to 30, and 0 without crop"),
        ({"erase": 2.0}, "recipe: erase=2.0: expected a share of images, 0 to 1"),
        ({"mixup": 0.5, "augment": False}, "recipe: mixup is 0.5; it needs augment=True"),
        ({"repeats": 0}, "recipe: repeats is 0; it is a whole number of at least 1"),
        ({"seed": -1}, "recipe: seed is -1; it is a whole number of at least 0"),
        ({"group_penalty": INF}, "recipe: group_penalty is inf; it is a finite number of at least 0"),
    ),
    "Recipe.from_dict": (
        ({"data": None}, "recipe: a mapping of fields is needed, not NoneType"),
        ({"data": {}}, "recipe: epochs is missing"),
        ({"data": {"epochs": 1, "speed": 2}}, "recipe: unknown fields speed; known are epochs, batch_size,"),
        ({"data": {"epochs": "1"}}, "recipe: epochs is '1'; it is a whole number of at least 1"),
        ({"data": [1]}, "recipe: a mapping of fields is needed, not list"),
    ),
    "Augmentation": (
        ({"rand_augment": 31}, "rand_augment is 31; it is 0 to 30, and 0 without crop"),
        ({"rand_augment": 1.5}, "rand_augment=1.5: expected at least 0 (a whole number)"),
        ({"rand_augment": NAN}, "rand_augment=nan: expected at least 0 (a whole number)"),
        ({"rand_augment": 5, "crop": False}, "rand_augment is 5; it is 0 to 30, and 0 without crop"),
        ({"erase": NAN}, "erase=nan: expected a share of images, 0 to 1"),
        ({"erase": 1.5}, "erase=1.5: expected a share of images, 0 to 1"),
        ({"mixup": -1}, "mixup=-1: expected a number of 0 or above"),
        ({"mixup": NAN}, "mixup=nan: expected a number of 0 or above"),
        ({"cutmix": INF}, "cutmix=inf: expected a number of 0 or above"),
        ({"mixup": "much"}, "mixup=much: expected a number of 0 or above"),
        ({"repeats": 0}, "repeats=0: expected at least 1 (a whole number)"),
        ({"repeats": 1.5}, "repeats=1.5: expected at least 1 (a whole number)"),
    ),
    "Task": (
        ({"directions": {}}, "task 'mine': directions={}; expected 'higher' or 'lower', whichever"),
        ({"directions": {"error": "down"}}, "task 'mine': directions={'error': 'down'}; expected 'higher' or"),
        ({"directions": None}, "task 'mine': directions=None; expected a mapping from metrics"),
        ({"directions": {"error": "lower"}, "losses": None}, "task 'mine': losses is None; expected a function"),
        (
            {"directions": {"error": "lower"}, "metrics": "accuracy"},
            "task 'mine': metrics is 'accuracy'; expected a function",
        ),
        ({"directions": {"error": "lower"}, "forward": 3}, "task 'mine': forward is 3; expected a function"),
    ),
    "PruningJob": (
        (
            {"model": "resnet8", "weights": "x.pth"},
            "give either weights or a recipe to train the network with (pretrain)",
        ),
        ({"pretrain": None}, "give either weights or a recipe to train the network with (pretrain)"),
        ({"equivalent": True}, "Equivalent Pruning is a way of fine-tuning: give it at least 1 epoch"),
        ({"sparse": RECIPE}, "sparse training needs a recipe with group_penalty above 0"),
        ({"calibrate_as_trained": True}, "calibrate_as_trained asks for the augmentation of finetune, and"),
        ({"criterion": "l7"}, "unknown criterion 'l7'; closest: l2, l1"),
        ({"steps": 0}, "steps=0: expected at least 1 (a whole number)"),
        ({"batches": 0}, "batches=0: expected at least 1 (a whole number)"),
        ({"batches": 1.5}, "batches=1.5: expected at least 1 (a whole number)"),
        ({"batch_size": NAN}, "batch_size=nan: expected at least 1 (a whole number)"),
        ({"seed": -1}, "seed=-1: expected at least 0 (a whole number)"),
        ({"max_ratio": NAN}, "max_ratio=nan: expected a share in (0, 1]"),
        ({"train_images": 0}, "train_images=0: expected at least 1 (a whole number)"),
        ({"target": 2.0}, "target=2.0: expected a value of type Target"),
        ({"target": None}, "target=None: expected a value of type Target"),
        ({"pretrain": {"epochs": 1}}, "pretrain={'epochs': 1}: expected a value of type Recipe"),
        ({"model": None}, "model=None: expected a value of type str"),
        ({"data": None}, "data=None: expected a value of type str"),
        ({"task": "depth"}, "unknown task 'depth'; known: classification, detection, image_text,"),
    ),
    "PruningJob.from_dict": (
        ({"speed": 3}, "a job has no speed"),
        ({"target": None}, "a job's target is None; expected one of speedup, macs, params, ratio"),
        ({"target": {"speed": 3}}, "a job's target is {'speed': 3}; expected one of speedup, macs,"),
        ({"pretrain": {"speed": 3}}, "recipe: unknown fields speed; known are epochs, batch_size,"),
        ({"pretrain": 5}, "recipe: a mapping of fields is needed, not int"),
        ({"steps": "many"}, "steps=many: expected at least 1 (a whole number)"),
    ),
    "prepare": (
        (
            lambda w: {"job": obc.PruningJob(**JOB | {"data": "cifar"})},
            "unknown data set 'cifar'; known are digits, cifar10, cifar100,",
        ),
        (
            lambda w: {"job": obc.PruningJob(**JOB | {"model": "resnet57"})},
            "unknown network 'resnet57'; known are resnet20, resnet32, resnet44,",
        ),
        (
            lambda w: {"job": obc.PruningJob(**JOB | {"device": "gpu"})},
            "unknown device 'gpu'; known are auto, cpu, cuda, cuda:1, ...",
        ),
    ),
    "PruningPlan": (
        ({"kept": ()}, "2 groups, but kept channels for 0"),
        (lambda w: {"kept": ((), *w.plan.kept[1:])}, "group 0.out: no channel is kept"),
        (lambda w: {"kept": ((1, 0), *w.plan.kept[1:])}, "group 0.out: kept channels must ascend without repetition"),
        (lambda w: {"kept": ((0, 0), *w.plan.kept[1:])}, "group 0.out: kept channels must ascend without repetition"),
        (lambda w: {"kept": ((0, 9), *w.plan.kept[1:])}, "group 0.out: kept channel 9 in a group of width 4"),
        (lambda w: {"kept": ((-1, 0), *w.plan.kept[1:])}, "group 0.out: kept channel -1 in a group of width 4"),
        (lambda w: {"kept": ((0.5, 1), *w.plan.kept[1:])}, "group 0.out: 0.5 is no number of a channel"),
        (lambda w: {"kept": (("a",), *w.plan.kept[1:])}, "group 0.out: 'a' is no number of a channel"),
        (
            lambda w: {"kept": (*w.plan.kept[:-1], (0,))},
            "group 6.out is kept whole (reaches the model's output), yet the",
        ),
        (lambda w: {"groups": w.groups[:1] * 2, "kept": ((0,), (0,))}, "group 0.out is there twice"),
    ),
    "PruningPlan.choose": (
        ({"keep": (9,)}, "group 0.out: no channel 9 in a group of width 4"),
        ({"remove": (-1,)}, "group 0.out: no channel -1 in a group of width 4"),
        ({"keep": (0,), "remove": (0,)}, "group 0.out: channel 0 is to be kept and to be removed"),
        ({"remove": range(4)}, "group 0.out: no channel is kept"),
        ({"keep": 5}, "group 0.out: no channel 5 in a group of width 4"),
        ({"keep": (0.5,)}, "group 0.out: no channel 0.5 in a group of width 4"),
        ({"keep": ("0",)}, "group 0.out: no channel 0 in a group of width 4"),
        ({"root": ("9", "out"), "keep": (0,)}, "unknown group of this plan '9.out'; closest: 6.out, 0.out"),
        ({"root": "0", "keep": (0,)}, "0' is no layer axis: expected a pair such as ('conv1', 'out')"),
        ({"root": None}, "None is no layer axis: expected a pair such as ('conv1', 'out')"),
    ),
    "PruningPlan.kept_of": (
        ({"root": ("9", "out")}, "unknown group of this plan '9.out'; closest: 6.out, 0.out"),
        ({"root": "0"}, "0' is no layer axis: expected a pair such as ('conv1', 'out')"),
        ({"root": None}, "None is no layer axis: expected a pair such as ('conv1', 'out')"),
    ),
    "PruningPlan.selection": (
        ({"axis": ("9", "out")}, "unknown layer axis of this plan '9.out'; closest: 6.out, 1.out,"),
        ({"axis": "0"}, "0' is no layer axis: expected a pair such as ('conv1', 'out')"),
        ({"axis": 5}, "5 is no layer axis: expected a pair such as ('conv1', 'out')"),
    ),
    "PruningPlan.then": (
        (lambda w: {"other": w.plan}, "group 0.out of width 4 in the second plan; here 3 channels left"),
        ({"other": None}, "plan: expected a PruningPlan, not NoneType; PruningPlan.from_json"),
        ({"other": "plan"}, "plan: expected a PruningPlan, not str; PruningPlan.from_json reads"),
    ),
    "PruningPlan.validate": (
        (lambda w: {"model": w.pruned}, "layer '0': the plan's axis 0.out is 4 wide, here 3"),
        ({"model": None}, "model: expected a network (nn.Module), not NoneType"),
        ({"model": nn.ReLU()}, "the plan's axis 0.out is not in this model: unknown layer '0';"),
    ),
    "PruningPlan.from_json": (
        ({"text": ""}, "not a pruning plan: JSONDecodeError Expecting value: line 1 column"),
        ({"text": "{}"}, "not a pruning plan: KeyError 'format"),
        ({"text": "[]"}, "not a pruning plan: TypeError list indices must be integers or"),
        ({"text": "5"}, "not a pruning plan: TypeError 'int' object is not subscriptable"),
        ({"text": None}, "not a pruning plan: TypeError the JSON object must be str, bytes or"),
        ({"text": '{"format": 99, "groups": []}'}, "plan format 99; this version reads format 1"),
        ({"text": '{"format": 1, "groups": [{}]}'}, "not a pruning plan: KeyError 'width"),
        ({"text": '{"format": 1, "groups": 5}'}, "not a pruning plan: TypeError 'int' object is not iterable"),
        ({"text": "[" * 100_000}, "not a pruning plan: ValueError JSON that is nested too deeply"),
    ),
    "speed_table": (
        ({"runtimes": ("onnx",)}, "unknown runtime 'onnx'; closest: onnxruntime"),
        ({"runtimes": ()}, "speed_table: nothing to time: runtimes [], 1 numbers of examples"),
        ({"inputs": {}}, "speed_table: nothing to time: runtimes ['eager', 'onnxruntime'], 0 numbers of examples"),
        ({"models": {}}, "latency: models=0: expected at least 1 (a whole number)"),
        ({"repeats": 0}, "latency: repeats=0: expected at least 1 (a whole number)"),
        ({"warmup": -1}, "latency: warmup=-1: expected at least 0 (a whole number)"),
    ),
    "launch": (
        ({"experiment": "resnet57"}, "unknown experiment 'resnet57'; closest: resnet56-cifar10,"),
        ({"experiment": None}, "unknown experiment None; known: mobilenetv2-imagenet,"),
        ({"speedup": 2}, "unknown field of a job 'speedup'; closest: speeds, seed, steps"),
        ({"processes": 0}, "processes=0: expected at least 1 (a whole number)"),
        ({"processes": 1.5}, "processes=1.5: expected at least 1 (a whole number)"),
        ({"devices": "gpu"}, "devices='gpu': expected numbers of GPUs, or 'cpu"),
        (lambda w: {"folder": w.path("file")}, "/file' is a file, not a folder"),
        (lambda w: {"folder": w.path("full")}, "/full' holds something else than a run (notes.txt): choose another"),
    ),
    "run_experiment": (
        ({"experiment": "resnet57"}, "unknown experiment 'resnet57'; closest: resnet56-cifar10,"),
        ({"experiment": 5}, "unknown experiment 5; known: mobilenetv2-imagenet,"),
        ({"colour": 2}, "unknown field of a job 'colour'; known: augment, batch_size,"),
        ({"seed": -1}, "seed=-1: expected at least 0 (a whole number)"),
        (lambda w: {"folder": w.path("file")}, "/file' is a file, not a folder"),
        (lambda w: {"folder": w.path("full")}, "/full' holds something else than a run (notes.txt): choose another"),
    ),
    "launch_grid": (
        ({"jobs": []}, "a grid needs jobs, each with a name of its own"),
        (
            lambda w: {"jobs": [obc.GridJob("a", obc.PruningJob(**JOB))] * 2},
            "a grid needs jobs, each with a name of its own",
        ),
        (
            lambda w: {"jobs": [obc.GridJob("a", obc.PruningJob(**JOB))], "each": 0},
            "each=0: expected at least 1 (a whole number)",
        ),
        (
            lambda w: {"jobs": [obc.GridJob("a", obc.PruningJob(**JOB))], "each": 1.5},
            "each=1.5: expected at least 1 (a whole number)",
        ),
        (
            lambda w: {"jobs": [obc.GridJob("a", obc.PruningJob(**JOB))], "devices": "gpu"},
            "devices='gpu': expected numbers of GPUs, or 'cpu",
        ),
        (
            lambda w: {"jobs": [obc.GridJob("a", obc.PruningJob(**JOB), processes=0)]},
            "job 'a': processes=0: expected at least 1 (a whole number)",
        ),
        (
            lambda w: {"jobs": [obc.GridJob("a/b", obc.PruningJob(**JOB))]},
            "job 'a/b': its name is that of a folder in the grid's",
        ),
        (
            lambda w: {"jobs": [obc.GridJob("a", obc.PruningJob(**JOB))], "folder": w.path("file")},
            "/file' holds something else than a grid: choose another folder",
        ),
        (
            lambda w: {"jobs": [obc.GridJob("a", obc.PruningJob(**JOB))], "folder": w.path("full")},
            "/full' holds something else than a grid: choose another folder",
        ),
    ),
    "paper_grid": (
        ({"name": "paper"}, "unknown experiment 'paper'; known: mobilenetv2-imagenet,"),
        ({"name": None}, "unknown experiment None; known: mobilenetv2-imagenet,"),
        ({"seeds": [-1]}, "seed=-1: expected at least 0 (a whole number)"),
        ({"processes": 0}, "job 'vgg19-cifar100_speedup1.5_jacobian_max_none_seed0':"),
        ({"colour": "red"}, "unknown field of a job 'colour'; known: augment, batch_size,"),
    ),
    "register_layer": (
        (
            {"kind": nn.Linear, "described": obc.LayerType("projection")},
            "Linear is in the table of layer types already: replace=True takes",
        ),
        (
            {"kind": "Linear", "described": obc.LayerType("projection")},
            "Linear' is no class of modules: register the type of a layer, not a",
        ),
        ({"kind": Net, "described": None}, "Net is described by None: expected a LayerType"),
        (
            lambda w: {"kind": Net, "described": obc.LayerType("colour")},
            "unknown role of a layer type 'colour'; known: attention, embedding,",
        ),
    ),
    "task_of": (
        ({"model": None}, "NoneType comes from no library whose tasks are known (transformers,"),
        ({"model": "resnet20"}, "str comes from no library whose tasks are known (transformers,"),
        ({"model": nn.Linear(3, 3)}, "Linear comes from no library whose tasks are known (transformers,"),
    ),
}


def rows() -> list[tuple[str, Change, str]]:
    return [(entry, *row) for entry, found in BAD_CALLS.items() for row in found]


def tried(world: World, entry: str, change: Change) -> Any:
    """Return what a bad call returns."""
    return BASES[entry](world)(**(change(world) if callable(change) else change))


def furnish(folder: Path) -> World:
    """Return the world of a folder, in which good and bad files are laid out."""
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("of something else")
    (folder / "file").write_text("no folder")
    (folder / "broken.npz").write_bytes(b"PK\x03\x04 no archive")
    (folder / "classes" / "train" / "cat").mkdir(parents=True)
    torch.save({"conv1.weight": torch.zeros(16, 3, 3, 3, dtype=torch.complex64)}, folder / "complex.pth")
    resnet = obc.load_model("resnet8", 10, in_channels=1)
    torch.save(resnet.state_dict(), folder / "resnet8.pth")
    for name, model in (("saved", resnet), ("wide", obc.load_model("resnet8", 12, in_channels=1))):
        whole = obc.PruningPlan.whole(obc.find_groups(model, torch.zeros(1, 1, 8, 8)))
        obc.save_pruned(folder / name, model, whole, source={"name": "resnet8", "in_channels": 1})
    return World(folder)


PRUNE = "prune --model resnet8 --data digits --weights {}/resnet8.pth --out {}/new --device cpu --batches 1 --steps 1"
COMPARE = "compare --model resnet8 --data digits --weights {}/resnet8.pth --out {}/new --device cpu --batches 1"
EVALUATE = "evaluate {}/saved --data digits --device cpu"
RUN = "run resnet56-cifar10 --small --device cpu --out {}/new"
GRID = "grid resnet56-cifar10 --small --device cpu --out {}/new"

BAD_COMMANDS: Mapping[str, str] = {
    "": "Missing subcommand",
    "prun": "Unrecognized options: prun",
    "prune": "Missing from obc prune",
    "prune --colour red": "Missing from obc prune",
    f"{PRUNE} --speedup": "Missing value for argument '--speedup'",
    f"{PRUNE} --speedup fast": "Error parsing --speedup",
    f"{PRUNE} --steps 1.5": "Error parsing --steps",
    f"{PRUNE} --speedup 2 --colour red": "Unrecognized options: --colour, red",
    f"{PRUNE}": "give one target: --speedup, --macs, --params or --ratio;",
    f"{PRUNE} --speedup nan": "--speedup nan: expected a number above 1",
    f"{PRUNE} --speedup 0.5": "--speedup 0.5: expected a number above 1",
    f"{PRUNE} --speedup 1e9": "--speedup 1e+09 cannot be met: the best that can be had is",
    f"{PRUNE} --ratio 2": "--ratio 2.0: expected a share between 0 and 1",
    f"{PRUNE} --macs -1": "--macs -1.0: expected a positive number",
    f"{PRUNE} --params inf": "--params inf: expected a positive number",
    f"{PRUNE} --ratio 0.5 --speedup 2": "give one target: --speedup, --macs, --params or --ratio;",
    f"{PRUNE} --speedup 2 --criterion l7": "unknown --criterion 'l7'; closest: l2, l1",
    f"{PRUNE} --speedup 2 --scope layer": "unknown --scope 'layer'; known: global, isomorphic, local",
    f"{PRUNE} --speedup 2 --max-ratio nan": "--max-ratio nan: expected a share above 0, at most 1",
    f"{PRUNE} --speedup 2 --min-channels 0": "--min-channels 0: expected at least 1",
    f"{PRUNE} --speedup 2 --round-to -8": "--round-to -8: expected at least 1",
    f"{PRUNE} --speedup 2 --group-reduction median": "unknown --group-reduction 'median'; closest: mean",
    f"{PRUNE} --speedup 2 --normalizer l7": "unknown --normalizer 'l7'; known: gaussian, max, mean,",
    f"{PRUNE} --speedup 2 --only heads": "unknown --only 'heads'; known: attention, bottleneck, mlp",
    f"{PRUNE} --speedup 2 --ignore nosuch": "unknown layer to ignore 'nosuch'; known: bn1, bn1.bias,",
    f"{PRUNE} --speedup 2 --counting fvcore": "unknown --counting 'fvcore'; known: operations,",
    f"{PRUNE} --speedup 2 --steps 0": "--steps 0: expected at least 1",
    f"{PRUNE} --speedup 2 --batches 0": "--batches 0: expected at least 1",
    f"{PRUNE} --speedup 2 --batches 9999": "take: 9999 batches were asked for, a pass holds 12",
    f"{PRUNE} --speedup 2 --batch-size 0": "--batch-size 0: expected at least 1",
    f"{PRUNE} --speedup 2 --seed -1": "--seed -1: expected at least 0",
    f"{PRUNE} --speedup 2 --epochs -1": "--epochs -1: expected at least 0",
    f"{PRUNE} --speedup 2 --epochs 1 --lr nan": "--lr nan: expected a number of at least 0",
    f"{PRUNE} --speedup 2 --equivalent": "--equivalent: Equivalent Pruning is a way of fine-tuning: give",
    f"{PRUNE} --speedup 2 --device tpu": "--device tpu: expected auto, cpu, cuda, cuda:1, ...",
    f"{PRUNE} --speedup 2 --device cuda:99": "cuda:99",
    f"{PRUNE} --speedup 2 --model resnet57": "unknown network 'resnet57'; closest: resnet56,",
    f"{PRUNE} --speedup 2 --model nosuch:model": "nosuch:model' returns a network as it is: give no weights",
    f"{PRUNE} --speedup 2 --model torchvision:nosuch": "unknown network of torchvision 'nosuch'; ",
    f"{PRUNE} --speedup 2 --data cifar": "unknown --data 'cifar'; closest: cifar10, cifar100",
    f"{PRUNE} --speedup 2 --data nosuch:data": "nosuch:data' is no function that could be called without",
    f"{PRUNE} --speedup 2 --data cifar10 --root {{}}/nosuch": "nosuch: there is no such folder",
    f"{PRUNE} --speedup 2 --data folder --root {{}}/file": "file' is not a folder; pass --root, a folder with class",
    f"{PRUNE} --speedup 2 --data imagenet": "imagenet: no root was given; pass --root, a folder with",
    f"{PRUNE} --speedup 2 --task depth": "unknown --task 'depth'; known: classification, detection,",
    f"{PRUNE} --speedup 2 --task segmentation": "train, batch 1: task 'segmentation' does not fit CifarResNet:",
    f"{PRUNE} --speedup 2 --task nosuch:task": "nosuch:task' is no function that could be called without",
    f"{PRUNE} --speedup 2 --weights {{}}/nosuch.pth": "nosuch.pth: there is no such file, nor weights of that name",
    f"{PRUNE} --speedup 2 --weights {{}}/file": "file' is truncated or not a file of weights saved by torch",
    f"{PRUNE} --speedup 2 --weights {{}}/empty": "empty' is a folder",
    f"{PRUNE} --speedup 2 --weights {{}}/complex.pth": "complex.pth: these are weights of another architecture: 46",
    f"{PRUNE} --speedup 2 --weights pretrained": "--weights pretrained: there are none of resnet8, only",
    f"{PRUNE} --speedup 2 --num-classes 0": "--num-classes 0: expected at least 1",
    f"{PRUNE} --speedup 2 --num-classes 7": "resnet8.pth: file has 10 classes, model asked for 7 (layer 'fc')",
    f"{PRUNE} --speedup 2 --normalize imagenet": "unknown normalisation 'imagenet' of digits; known are training,",
    f"{PRUNE} --speedup 2 --out {{}}/file": "file is a file, not a folder",
    f"{PRUNE} --speedup 2 --out {{}}/full": "full' holds something else than a run (notes.txt): choose",
    f"{PRUNE} --speedup 2 --out {{}}/full --overwrite": "full' holds something else than a run (notes.txt): choose",
    f"{PRUNE} --speedup 2 --out {{}}/file/in": "file' is a file, not a folder",
    f"{COMPARE} --criteria l7": "unknown --criteria 'l7'; closest: l2, l1",
    f"{COMPARE} --criteria l1 l1": "--criteria l1 l1: name at least one, each once",
    f"{COMPARE} --criteria": "--criteria: name at least one, each once",
    f"{COMPARE} --criteria l1 --steps 0": "--steps 0: expected at least 1",
    f"{COMPARE} --criteria l1 --ratio nan": "--ratio nan: expected a share between 0 and 1",
    f"{COMPARE} --criteria l1 --ratio 0.5 --macs 0.5": "give one target: --ratio or --macs; got --ratio 0.5,",
    f"{COMPARE} --criteria l1 --macs 7": "--macs 7.0: expected a share between 0 and 1",
    f"{COMPARE} --criteria l1 --repeats 0": "--repeats 0: expected at least 1",
    f"{COMPARE} --criteria l1 --held-out 0": "--held-out 0: expected at least 1",
    f"{COMPARE} --criteria l1 --training -1": "--training -1: expected at least 0",
    f"{COMPARE} --criteria l1 --hold-out 2": "--hold-out 2.0: expected a share between 0 and 1",
    f"{COMPARE} --criteria l1 --hold-out nan": "--hold-out nan: expected a share between 0 and 1",
    f"{COMPARE} --criteria l1 --out {{}}/file": "file is a file, not a folder",
    f"{COMPARE} --criteria l1 --out {{}}/full": "full' holds something else than a comparison (notes.txt): choose",
    f"{COMPARE} --criteria l1 --weights {{}}/nosuch.pth": "nosuch.pth: there is no such file, nor weights of that name",
    f"{COMPARE} --criteria l1 --batches 9999": "take: 9999 batches were asked for, a pass holds 12",
    "compare --model resnet8 --data digits --criteria l1 --out {}/new": "--weights: which weights of 'resnet8'? It",
    "evaluate": "Missing from obc evaluate",
    "evaluate {}/nosuch --data digits": "nosuch' holds no saved model; for a network by name, pass",
    "evaluate {}/file --data digits": "file' holds no saved model; for a network by name, pass",
    "evaluate {}/empty --data digits": "empty' holds no saved model; for a network by name, pass",
    "evaluate resnet20 --data digits": "resnet20' holds no saved model; for a network by name, pass",
    "evaluate resnet57 --data digits --weights {}/resnet8.pth": "unknown network 'resnet57'; closest: resnet56,",
    "evaluate resnet20 --data digits --weights {}/resnet8.pth --device cpu": "resnet8.pth: these are weights of",
    f"{EVALUATE} --data cifar": "unknown --data 'cifar'; closest: cifar10, cifar100",
    f"{EVALUATE} --data cifar10 --root {{}}/empty": "empty': pass as --root a folder that holds one of",
    f"{EVALUATE} --root {{}}/empty": "digits come with scikit-learn: root must be None",
    f"{EVALUATE} --batch-size 0": "--batch-size 0: expected at least 1",
    f"{EVALUATE} --device tpu": "--device tpu: expected auto, cpu, cuda, cuda:1, ...",
    f"{EVALUATE} --task depth": "unknown --task 'depth'; known: classification, detection,",
    f"{EVALUATE} --task segmentation": "batch 1: task 'segmentation' does not fit CifarResNet: targets",
    f"{EVALUATE} --task language_model": "batch 1: task 'language_model' does not fit CifarResNet: tokens",
    f"{EVALUATE} --task outputs": "batch 0: task 'outputs' does not fit CifarResNet: task",
    f"{EVALUATE} --normalize imagenet": "unknown normalisation 'imagenet' of digits; known are training,",
    f"{EVALUATE} --data folder --root {{}}/classes": "classes/train' should hold one folder of images a class: Found",
    "evaluate {}/wide --data digits --device cpu": "model has 12 outputs, data has 10 classes",
    "runs {}/nosuch": "nosuch' holds 0 runs",
    "runs {}/file": "file' holds 0 runs",
    "runs {}/empty": "empty' holds 0 runs",
    "runs {}/empty --stop": "empty' holds 0 runs",
    "runs {}/full --resume": "full' holds 0 runs",
    "runs --log many": "Error parsing --log",
    "run": "Missing from obc run",
    "run resnet57 --out {}/new": "unknown experiment 'resnet57'; closest: resnet56-cifar10,",
    "run resnet56-cifar10": "Missing from obc run",
    f"{RUN} --speedup 0.5": "--speedup 0.5: expected a number above 1",
    f"{RUN} --speedup nan": "--speedup nan: expected a number above 1",
    f"{RUN} --speedup 2 --macs 5": "give one target: --speedup or --macs; got --speedup 2,",
    f"{RUN} --criterion l7": "unknown --criterion 'l7'; closest: l2, l1",
    f"{RUN} --group-reduction median": "unknown --group-reduction 'median'; closest: mean",
    f"{RUN} --root {{}}/nosuch": "nosuch: there is no such folder",
    f"{RUN} --data cifar": "unknown --data 'cifar'; closest: cifar10, cifar100",
    f"{RUN} --seed -1": "--seed -1: expected at least 0",
    f"{RUN} --amp fp8": "unknown --amp 'fp8'; closest: fp16",
    f"{RUN} --epochs 0": "--epochs 0: expected at least 1",
    f"{RUN} --steps 0": "--steps 0: expected at least 1",
    f"{RUN} --train-images 0": "--train-images 0: expected at least 1",
    f"{RUN} --processes 0": "--processes 0: expected at least 1",
    f"{RUN} --weights {{}}/nosuch.pth --root {{}}/empty": "nosuch.pth: there is no such file, nor weights of that name",
    f"{RUN} --out {{}}/file": "file is a file, not a folder",
    f"{RUN} --out {{}}/full": "full' holds something else than a run (notes.txt): choose",
    f"{RUN} --out {{}}/full --resume": "full' holds something else than a run (notes.txt): choose",
    "grid": "Missing from obc grid",
    "grid paper --out {}/new": "unknown grid 'paper'; closest: paper-cifar",
    f"{GRID} --each 0": "--each 0: expected at least 1",
    f"{GRID} --processes 0": "--processes 0: expected at least 1",
    f"{GRID} --seeds -1": "--seeds -1: expected at least 0",
    f"{GRID} --out {{}}/file": "file is a file, not a folder",
    f"{GRID} --out {{}}/full": "full' holds something else than a grid (notes.txt): choose",
    "slurm": "Missing from obc slurm",
    "slurm resnet57 --out {}/new": "unknown experiment 'resnet57'; closest: resnet56-cifar10,",
    "slurm resnet56-cifar10 --out {}/full": "full' holds something else than a run (notes.txt): choose",
    "slurm resnet56-cifar10 --out {}/new --nodes 0": "--nodes 0: expected at least 1",
    "slurm resnet56-cifar10 --out {}/new --gpus 0": "--gpus 0: expected at least 1",
    "slurm resnet56-cifar10 --out {}/new --cpus 0": "--cpus 0: expected at least 1",
    "demo --seed -1": "--seed -1: expected at least 0",
    "demo --seed many": "Error parsing --seed",
    "demo --out {}/full": "full' holds something else than a run (notes.txt): choose",
    "demo --out {}/file --overwrite": "file is a file, not a folder",
}
"""Words of a command, {} being the folder of the world -> a piece of what is said."""
