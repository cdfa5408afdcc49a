"""One pruning job from end to end: original → plan → pruned → fine-tuned naively and with Equivalent Pruning → merged.

A job is data (`PruningJob`). `prepare` loads what it names and raises whatever is wrong with it before any work is
done; `perform` does the work in memory. `obc_tools.runs.run_job` does both and keeps the outcome in a folder.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import MappingProxyType

import pandas as pd
import torch
from torch import Tensor, nn

from .data import Data, check_classes, load_data
from .dense import DenseJTJ, dense_jtj
from .equivalent import EquivalentModel
from .job import JobInputs, PruningJob, find_device
from .layers import layer_axes
from .measure import Cost, Latency, Metrics, cost, evaluate, latencies
from .models import load_model
from .plan import PruningPlan
from .pruning import prune, prune_to
from .state import evaluating
from .training import History, Recipe, fit

logger = logging.getLogger(__name__)

ORIGINAL, PRUNED, NAIVE, MERGED = "original", "pruned", "naive", "merged"
TITLES: Mapping[str, str] = MappingProxyType(
    {
        ORIGINAL: "original",
        PRUNED: "pruned, no fine-tuning",
        NAIVE: "naive fine-tuning",
        MERGED: "Equivalent Pruning, merged",
    }
)
"""The models of a job, in the order of its table."""

TOLERANCE = 1e-4
"""The largest difference of logits, float32, between models that compute the same function."""

SHOWN_FILTERS = 16
LARGEST_SHOWN_FILTER = 1024


class EquivalenceError(ValueError):
    """Two models of a job that should compute the same function and do not."""


@dataclass(frozen=True)
class Measured:
    """What was measured of one model: metrics on all held-out images, MACs and CPU latency of one image."""

    metrics: Metrics
    cost: Cost
    latency: Latency


@dataclass(frozen=True)
class Equivalence:
    """How far Equivalent Pruning kept its promises: largest differences of logits on a batch of held-out images.

    Attributes:
        start_from_naive: EP before training against the naively pruned network; at most `TOLERANCE`.
        merged_from_trained: The merged network against the trained EP; at most `TOLERANCE`.
        merged_from_naive: The merged network against the naively fine-tuned one; above 0, or EP did nothing.
        merged_loads_into_naive: The merged state dict was loaded, strictly, into the naively pruned network.
    """

    start_from_naive: float
    merged_from_trained: float
    merged_from_naive: float
    merged_loads_into_naive: bool


@dataclass(frozen=True, eq=False, repr=False)
class JobResult:
    """What a job led to.

    Attributes:
        job: What was asked for.
        plan: Which channels stay.
        models: Key -> model, in the order of `TITLES`; those that the job asked for.
        measured: Key -> what was measured of that model.
        histories: Key -> its training.
        equivalence: None without Equivalent Pruning.
        filters: JᵀJ of some channels of the first layer of the original; None where a channel is too large to show.
        seconds: Stage -> duration.
    """

    job: PruningJob
    plan: PruningPlan
    models: Mapping[str, nn.Module]
    measured: Mapping[str, Measured]
    histories: Mapping[str, History]
    equivalence: Equivalence | None
    filters: DenseJTJ | None
    seconds: Mapping[str, float]

    def to_frame(self) -> pd.DataFrame:
        """Return one row a model: accuracy, loss, MACs, MACs of the original over its own, parameters, CPU latency."""
        whole = self.measured[ORIGINAL].cost.macs
        rows = [
            {
                "model": TITLES[key],
                "test accuracy": measured.metrics.accuracy,
                "test loss": measured.metrics.loss,
                "MACs": round(measured.cost.macs),
                "speed-up": whole / measured.cost.macs,
                "parameters": measured.cost.params,
                "CPU latency (ms)": measured.latency.median_ms,
            }
            for key, measured in self.measured.items()
        ]
        return pd.DataFrame(rows)

    def table(self) -> pd.DataFrame:
        """Return `to_frame` as text, each number with as many digits as a reader wants."""
        digits = {
            "test accuracy": "{:.2%}",
            "test loss": "{:.4f}",
            "MACs": "{:,}",
            "speed-up": "{:.2f}x",
            "parameters": "{:,}",
            "CPU latency (ms)": "{:.2f}",
        }
        frame = self.to_frame()
        return frame.assign(**{name: frame[name].map(text.format) for name, text in digits.items()})

    def __repr__(self) -> str:
        return self.table().to_string(index=False)

    def _repr_html_(self) -> str:
        return self.table().to_html(index=False)


def prepare(job: PruningJob) -> JobInputs:
    """Load what a job names, and raise whatever would go wrong with it later.

    Raises:
        ValueError: for data, weights or a device that are not there, a network that does not suit the data, and a
            target that cannot be met.
    """
    device = find_device(job.device)
    data = load_data(job.data, job.root, normalize=job.normalize)
    options = dict(job.model_options)
    if ":" not in job.model:
        options.setdefault("in_channels", data.image_shape[0])
    classes = len(data.classes) if job.weights is None else None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(job.seed)
        model = load_model(job.model, job.num_classes or classes, job.weights, **options)
    inputs = JobInputs(job, data, model.to(device), {"name": job.model, **options}, device, _example(data, device))
    check_classes(_count_outputs(model, inputs.example), data)
    inputs.calibration_batches()
    for recipe in filter(None, (job.pretrain, job.finetune)):
        inputs.training_batches(recipe)
    # A plan by random scores costs next to nothing and fails where the real one would, but before hours of training.
    _find_plan(inputs, criterion="random", steps=1, progress=False)
    return inputs


def perform(inputs: JobInputs, *, progress: bool = True) -> JobResult:
    """Do a job: train the original if need be, find the plan, fine-tune, merge, measure.

    Held-out images are evaluated for the report and never decide anything.

    Raises:
        EquivalenceError: if Equivalent Pruning starts from, or merges into, another function than it should.
        ValueError: for training that diverges and scores that are not finite.
    """
    job, seconds = inputs.job, {}
    models: dict[str, nn.Module] = {ORIGINAL: inputs.model}
    histories: dict[str, History] = {}
    if job.pretrain:
        with _stage(f"training {job.model} from scratch on {job.data}", seconds):
            histories[ORIGINAL] = _train(inputs, inputs.model, job.pretrain, progress)
    with _stage(f"pruning to {job.target} by the {job.criterion} criterion", seconds):
        plan = _find_plan(inputs, criterion=job.criterion, steps=job.steps, progress=progress)
        models[PRUNED] = prune(inputs.model, plan)
    if job.finetune:
        with _stage("fine-tuning the pruned network (naive)", seconds):
            models[NAIVE] = copy.deepcopy(models[PRUNED])
            histories[NAIVE] = _train(inputs, models[NAIVE], job.finetune, progress)
    equivalence = None
    if job.equivalent:
        with _stage("fine-tuning with Equivalent Pruning", seconds):
            models[MERGED], histories[MERGED], equivalence = _equivalent(inputs, plan, models, progress)
    with _stage("measuring", seconds):
        measured = _measure(inputs, models, progress)
        filters = _first_filters(inputs)
    return JobResult(job, plan, models, measured, histories, equivalence, filters, seconds)


@contextmanager
def _stage(title: str, seconds: dict[str, float]) -> Iterator[None]:
    logger.info("%s", title)
    start = time.perf_counter()
    yield
    seconds[title] = time.perf_counter() - start


def _train(inputs: JobInputs, model: nn.Module, recipe: Recipe, progress: bool) -> History:
    history = fit(model, inputs.training_batches(recipe), inputs.held_out_batches(), recipe, progress=progress)
    logger.info("%s", history.last)
    return history


def _find_plan(inputs: JobInputs, *, criterion: str, steps: int, progress: bool) -> PruningPlan:
    job = inputs.job
    return prune_to(
        inputs.model,
        inputs.example,
        inputs.calibration_batches(),
        criterion=criterion,
        **asdict(job.target),
        scope=job.scope,
        steps=steps,
        ignore=job.ignore,
        round_to=job.round_to,
        group_reduction=job.group_reduction,
        normalizer=job.normalizer,
        seed=job.seed,
        progress=progress,
    )


def _equivalent(
    inputs: JobInputs, plan: PruningPlan, models: Mapping[str, nn.Module], progress: bool
) -> tuple[nn.Module, History, Equivalence]:
    """Fine-tune with Equivalent Pruning and merge; check the start, the merge and that it fits the naive network."""
    images, _ = next(iter(inputs.held_out_batches()))
    model = EquivalentModel(inputs.model, plan)
    start = _logit_difference(model, models[PRUNED], images)
    _check_equal(start, "Equivalent Pruning before training and the pruned network")
    history = _train(inputs, model, inputs.job.finetune, progress)
    merged = model.merge()
    difference = _logit_difference(merged, model, images)
    _check_equal(difference, "the merged network and the trained Equivalent Pruning")
    try:
        copy.deepcopy(models[PRUNED]).load_state_dict(merged.state_dict(), strict=True)
    except RuntimeError as error:
        raise EquivalenceError(f"the merged network does not load into the pruned one: {error}") from error
    against_naive = _logit_difference(merged, models[NAIVE], images)
    return merged, history, Equivalence(start, difference, against_naive, True)


def _logit_difference(one: nn.Module, other: nn.Module, images: Tensor) -> float:
    with torch.no_grad(), evaluating(one), evaluating(other):
        return (one(images) - other(images)).abs().max().item()


def _check_equal(difference: float, models: str) -> None:
    if not difference <= TOLERANCE:
        raise EquivalenceError(f"{models}: logits differ by up to {difference:.3g}; at most {TOLERANCE:g} is rounding")


def _measure(inputs: JobInputs, models: Mapping[str, nn.Module], progress: bool) -> dict[str, Measured]:
    batches = inputs.held_out_batches()
    metrics = {key: evaluate(model, batches, progress=progress) for key, model in models.items()}
    costs = {key: cost(model, inputs.example) for key, model in models.items()}
    on_cpu = {key: copy.deepcopy(model).cpu() for key, model in models.items()}
    timed = latencies(on_cpu, inputs.example.cpu())
    return {key: Measured(metrics[key], costs[key], timed[key]) for key in models}


def _first_filters(inputs: JobInputs) -> DenseJTJ | None:
    """Return JᵀJ of the first filters of the first convolution, over one set of calibration batches."""
    found = [(name, layer) for name, layer in inputs.model.named_modules() if isinstance(layer, nn.Conv2d)]
    if not found or found[0][1].weight[0].numel() > LARGEST_SHOWN_FILTER:
        return None
    name, layer = found[0]
    channels = range(min(SHOWN_FILTERS, layer_axes(layer, name)["out"].width))
    return dense_jtj(inputs.model, inputs.calibration_batches(), name, channels)


def _example(data: Data, device: torch.device) -> Tensor:
    images, _ = next(iter(data.batches("val", 1, device=device)))
    return images


def _count_outputs(model: nn.Module, example: Tensor) -> int:
    try:
        with torch.no_grad(), evaluating(model):
            logits = model(example)
    except RuntimeError as error:
        raise ValueError(f"the network cannot take images of shape {tuple(example.shape[1:])}: {error}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ValueError(f"{type(model).__name__} returns no logits (batch, classes): only classifiers are pruned here")
    return logits.shape[1]
