"""A pruning job end to end: original → sparse → plan → pruned (→ compensated) → fine-tuned naively, with EP → merged.

A job is data (`PruningJob`). `prepare` loads what it names and raises whatever is wrong with it before any work is
done; `perform` does the work in memory. `work_on` does both and keeps the outcome in a folder that grows meanwhile;
that of `run_job` is there when all is done.
"""

from __future__ import annotations

import copy
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import files
from ..data.batches import to_device
from ..measure.costs import cost
from ..measure.latency import latencies
from ..models.networks import load_weights, read_weights
from ..models.runtimes import speed_table
from ..models.store import load_pruned, save_pruned
from ..pruning.check import ProofError
from ..pruning.choices import Target
from ..pruning.compensation import compensate
from ..pruning.equivalent import EquivalentModel
from ..pruning.plan import PruningPlan, prune
from ..pruning.prune import Stage, Way, prune_in_steps
from ..scoring.jtj import DenseJTJ, dense_jtj
from ..scoring.tasks import CLASSIFICATION, Task, checked_example, evaluate
from ..state import LentRandomness, evaluating
from ..structure.layers import kernel_dims, layer_axes
from ..training.fit import fit
from ..training.folder import History
from ..training.processes import agreed, processes
from ..training.recipe import Recipe
from ..training.sparse import sparse_train
from . import job as jobs
from .job import Equivalence, JobInputs, JobResult, Measured, PruningJob, RunFolderError

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""The largest difference of logits between models that compute the same function, over the largest logit above 1."""

SHOWN_FILTERS = 16
LARGEST_SHOWN_FILTER = 1024


class EquivalenceError(ValueError):
    """Two models of a job that should compute the same function and do not."""


def prepare(job: PruningJob) -> JobInputs:
    """Load what a job names, and raise whatever would go wrong with it later.

    Raises:
        ValueError: for data, weights or a device that are not there, a network that does not suit the data, and a
            target that cannot be met.
    """
    device = jobs.find_device(job.device)
    data = job.load()
    task, options = jobs.own_task(job.task), dict(job.model_options)
    if ":" not in job.model:
        options.setdefault("in_channels", data.image_shape[0])
    classes = len(data.classes) if job.weights is None else None
    with LentRandomness(job.seed):
        model = jobs.find_model(job.model, job.num_classes or classes, job.weights, **options).to(device)
    source = None if jobs.is_own(job.model) else {"name": job.model, **options}
    task = task if task.against is None else task.against(copy.deepcopy(model))
    criteria = [job.scoring(job.criterion).resolved]
    example = checked_example(task, model, data, device, criteria)
    inputs = JobInputs(job, data, model, source, device, example, task)
    inputs.calibration_batches()
    if job.sparse_weights:
        load_weights(copy.deepcopy(model), read_weights(job.sparse_weights), origin=job.sparse_weights)
    for recipe in job.recipes.values():
        inputs.training_batches(recipe)
    # A plan by random scores costs next to nothing and fails where the real one would, but before hours of training.
    if processes().is_main:
        find_plan(inputs, model, criterion="random", steps=1, progress=False)
    return inputs


@dataclass(frozen=True)
class Keeping:
    """Where a job keeps its trainings and its plan while it runs, and who may stop it; by default nowhere and nobody.

    Attributes:
        folder: Gets a folder for each training and the plan, from which a job that was interrupted goes on.
        stop: Asked before every step; once it says True, what there is is kept and `Stopped` raised.
    """

    folder: Path | None = None
    stop: Callable[[], bool] = lambda: False


EXAMPLES = 32
"""At a time, in the table of speeds."""


def perform(inputs: JobInputs, *, progress: bool = True, keeping: Keeping | None = None) -> JobResult:
    """Do a job: train the original if need be, sparsely too if asked, find the plan, fine-tune, merge, measure.

    Held-out images are evaluated for the report and never decide anything. Launched in several processes, all train
    together; the first one finds the plan and measures.

    Args:
        inputs: What :func:`prepare` returned.
        progress: Show bars.
        keeping: Where to keep what is done, and go on from.

    Raises:
        EquivalenceError: if Equivalent Pruning starts from, or merges into, another function than it should.
        ValueError: for training that diverges and scores that are not finite.
        Stopped: when ``keeping.stop`` said so.
    """
    work = Stages(inputs, progress=progress and processes().is_main, keeping=keeping)
    job, seconds = inputs.job, {}
    models: dict[str, nn.Module] = {jobs.ORIGINAL: inputs.model}
    if job.pretrain:
        with _stage(f"training {job.model} from scratch on {job.data}", seconds):
            work.original()
    base = inputs.model
    if job.sparse or job.sparse_weights:
        with _stage("sparse training", seconds):
            base = models[jobs.SPARSE] = work.sparse()
    with _stage(f"pruning to {job.target} by the {job.criterion} criterion", seconds):
        plan = work.plan(base)
        start = models[jobs.PRUNED] = prune(base, plan)
    if job.compensate:
        with _stage("compensating", seconds):
            start = models[jobs.COMPENSATED] = work.compensated(base, plan)
    if job.finetune:
        with _stage("fine-tuning the pruned network (naive)", seconds):
            models[jobs.NAIVE] = work.naive(start)
    equivalence = None
    if job.equivalent:
        with _stage("fine-tuning with Equivalent Pruning", seconds):
            models[jobs.MERGED], equivalence = work.equivalent(
                base, plan, models[jobs.NAIVE], models.get(jobs.COMPENSATED)
            )
    with _stage("measuring", seconds):
        measured = work.measure(models)
        filters = _first_filters(inputs)
        speeds = work.speeds(models) if job.speeds else None
    return JobResult(job, plan, models, measured, work.histories, equivalence, filters, seconds, speeds)


class Stages:
    """The stages of a job, one at a time; what they share: its inputs, where they keep things, the histories so far.

    Args:
        inputs: What :func:`prepare` returned.
        progress: Show bars.
        keeping: Where to keep what is done, and go on from.
    """

    def __init__(self, inputs: JobInputs, *, progress: bool = True, keeping: Keeping | None = None):
        self.inputs, self.progress, self._keeping = inputs, progress, keeping or Keeping()
        self.histories: dict[str, History] = {}
        # The unpruned network teaches, as it was before sparse training.
        self._teacher = inputs.model

    def original(self) -> nn.Module:
        """Return the unpruned network, trained from scratch where the job says so."""
        if self.inputs.job.pretrain:
            self._train(jobs.ORIGINAL, self.inputs.model, self.inputs.job.pretrain)
        return self.inputs.model

    def sparse(self) -> nn.Module:
        """Return the network after sparse training, or with the weights that one left; without either, the original."""
        job, model = self.inputs.job, copy.deepcopy(self.inputs.model)
        if job.sparse_weights:
            load_weights(model, read_weights(job.sparse_weights), origin=job.sparse_weights)
        elif job.sparse:
            self._train(jobs.SPARSE, model, job.sparse)
        return model

    def plan(self, model: nn.Module) -> PruningPlan:
        """Return the plan: the kept one, else a new one, which of several processes the first finds."""
        path, own = None if self._keeping.folder is None else self._keeping.folder / jobs.PLAN, processes()
        if path is None and own.count > 1:
            raise ValueError("a job in several processes needs a folder to keep its plan in")
        with agreed(self.inputs.device):  # the others wait here, and end with the first where that fails
            plan = self._plan(model, path) if own.is_main else None
        return plan or _read_plan(path)

    def _plan(self, model: nn.Module, path: Path | None) -> PruningPlan:
        if path is not None and path.is_file():
            return _read_plan(path)
        job, how = self.inputs.job, {"progress": self.progress, "kept": path and path.with_name(jobs.PRUNING)}
        try:
            plan = find_plan(self.inputs, model, criterion=job.criterion, steps=job.steps, **how)
        except ProofError as error:
            if path is None:
                raise
            raise keep_refused(error, path.with_name(jobs.REFUSED_PLAN)) from error
        if path is not None:
            files.write_text(path, plan.to_json())
        return plan

    def compensated(self, base: nn.Module, plan: PruningPlan) -> nn.Module:
        """Return the pruned network whose weights make up for what it lost, in least squares."""
        return compensate(base, plan, self.inputs.calibration_batches().at(0), task=self.inputs.task)

    def naive(self, pruned: nn.Module) -> nn.Module:
        """Return a copy of the pruned network, or of the compensated one, after fine-tuning."""
        model = copy.deepcopy(pruned)
        self._train(jobs.NAIVE, model, self.inputs.job.finetune)
        return model

    def equivalent(
        self, base: nn.Module, plan: PruningPlan, naive: nn.Module, compensated: nn.Module | None = None
    ) -> tuple[nn.Module, Equivalence]:
        """Fine-tune with Equivalent Pruning and merge; check the start, the merge and that it fits the naive network.

        With a compensated network it begins there, else at the pruned one.

        Raises:
            EquivalenceError: a start from, or a merge into, another function than it should be.
        """
        batch, task = next(iter(self.inputs.held_out_batches())), self.inputs.task
        model, pruned = EquivalentModel(base, plan, start=compensated), prune(base, plan)
        start = _difference(model, pruned if compensated is None else compensated, batch, task)
        _check_equal(start, "Equivalent Pruning before training and the network that it starts from")
        self._train(jobs.MERGED, model, self.inputs.job.finetune)
        merged = model.merge()
        difference = _difference(merged, model, batch, task)
        _check_equal(difference, "the merged network and the trained Equivalent Pruning")
        try:
            pruned.load_state_dict(merged.state_dict(), strict=True)
        except RuntimeError as error:
            raise EquivalenceError(f"the merged network does not load into the pruned one: {error}") from error
        return merged, Equivalence(start, difference, _difference(merged, naive, batch, task), True)

    def measure(self, models: Mapping[str, nn.Module]) -> dict[str, Measured]:
        """Return metrics on the held-out examples, cost and CPU latency of every network."""
        inputs, batches = self.inputs, self.inputs.held_out_batches()
        bar = {"task": inputs.task, "progress": self.progress}
        metrics = {key: evaluate(model, batches, **bar) for key, model in models.items()}
        costs = {key: cost(model, inputs.example, counting=inputs.job.target.counting) for key, model in models.items()}
        on_cpu = {key: copy.deepcopy(model).cpu() for key, model in models.items()}
        timed = latencies(on_cpu, to_device(inputs.example, "cpu"))
        return {key: Measured(metrics[key], costs[key], timed[key]) for key in models}

    def speeds(self, models: Mapping[str, nn.Module]) -> pd.DataFrame:
        """Return how fast the networks are on this machine, one held-out example and `EXAMPLES` at a time."""
        data, task = self.inputs.data, self.inputs.task
        firsts = {n: next(iter(data.batches("val", n).at(0))) for n in (1, EXAMPLES) if n <= len(data.val)}
        inputs = {n: batch[0] if task is CLASSIFICATION else task.example(batch) for n, batch in firsts.items()}
        return speed_table(
            {jobs.TITLES[key]: models[key] for key in (jobs.ORIGINAL, jobs.PRUNED, jobs.MERGED) if key in models},
            inputs,
        )

    def _train(self, key: str, model: nn.Module, recipe: Recipe) -> None:
        """Train a network; keep its history and, for other jobs to start from, the weights of an unpruned one."""
        inputs, folder = self.inputs, self._keeping.folder
        train = partial(sparse_train, ignore=inputs.job.ignore) if key == jobs.SPARSE else fit
        self.histories[key] = train(
            model,
            inputs.training_batches(recipe),
            inputs.held_out_batches(share=processes().share),
            recipe,
            task=inputs.task,
            teacher=self._teacher if recipe.distill_weight else None,
            run=None if folder is None else folder / f"{jobs.TRAINING}{key}",
            resume=folder is not None,
            stop=self._keeping.stop,
            progress=self.progress,
        )
        if folder is not None and processes().is_main and key in jobs.WEIGHTS:
            with files.replacing(folder / jobs.WEIGHTS[key]) as new:
                save_model(model, str(new))


def keep_refused(error: ProofError, path: Path) -> ProofError:
    """Keep a plan whose proof failed; return the error that says where."""
    files.write_text(path, error.plan.to_json())
    first = error.__cause__ if isinstance(error.__cause__, ProofError) else error  # kept before, elsewhere
    return ProofError(f"{first}; the plan is kept in '{path}'", error.plan)


def _read_plan(path: Path) -> PruningPlan:
    """Read the plan of a run; raise ValueError unless it is what the last step left (which older runs do not say)."""
    text, last = path.read_text("utf-8", "replace"), path.with_name(jobs.PRUNING)
    if last.is_file() and files.read_json(last, "plan")["plan"] != text:
        raise ValueError(f"'{path}' was changed after it was written: without it and '{last}', the run prunes anew")
    return PruningPlan.from_json(text)


def _keep_stage(path: Path, stage: Stage) -> None:
    content = {"step": stage.step, "plan": stage.plan.to_json(), "met": bool(stage.met)}
    files.write_json(path, content, checked=True)


def _kept_stage(path: Path | None, target: Target) -> Stage | None:
    """Return the last stage of a pruning that was interrupted; None for one that begins."""
    if path is None or not path.is_file():
        return None
    kept = files.read_json(path, "plan", "step", "met")
    plan = PruningPlan.from_json(kept["plan"])
    logger.info("pruning goes on after step %d", kept["step"])
    return Stage(plan, kept["step"], ((target, plan),) if kept["met"] else ())


@contextmanager
def _stage(title: str, seconds: dict[str, float]) -> Iterator[None]:
    logger.info("%s", title)
    start = time.perf_counter()
    yield
    seconds[title] = time.perf_counter() - start


def find_plan(
    inputs: JobInputs, model: nn.Module, *, criterion: str, steps: int, progress: bool, kept: Path | None = None
) -> PruningPlan:
    """Return the plan of a job for a network, by its own criterion and steps or by others.

    What every step leaves is kept in a file, if one is named, and gone on from.
    """
    job, batches, begun = inputs.job, inputs.calibration_batches(), _kept_stage(kept, inputs.job.target)
    # Every step has passes of its own, the same after a resume: one to score and, before it, one to compensate.
    passes = 2 if job.compensate else 1
    numbers = itertools.count(begun.step if begun else 0)

    def compensated(model: nn.Module, plan: PruningPlan) -> nn.Module:
        return compensate(model, plan, batches=batches.at(passes * next(numbers)), task=inputs.task)

    way = Way(
        selection=job.selection,
        scoring=job.scoring(criterion, inputs.task.losses),
        limits=job.limits,
        steps=replace(job.schedule, steps=steps),
        left=compensated if job.compensate else prune,
        seed=job.seed,
        progress=progress,
    )
    keep = (lambda stage: None) if kept is None else partial(_keep_stage, kept)
    of_step = {"of_step": lambda step: batches.at(passes * step - 1)}
    return prune_in_steps(model, inputs.example, batches, job.target, way, begun=begun, keep=keep, **of_step)


def _difference(one: nn.Module, other: nn.Module, batch: Any, task: Task) -> float:
    """Return the largest difference of what two networks say of a batch, over the largest number above 1."""
    return max(
        ((first - second).abs().max() / first.abs().max().clamp_min(1)).item()
        for first, second in zip(said(one, batch, task), said(other, batch, task), strict=True)
    )


def said(model: nn.Module, batch: Any, task: Task) -> list[Tensor]:
    """Return the numbers that a network's forward pass of a batch ends with, without gradients."""
    with torch.no_grad(), evaluating(model):
        leaves = tree_leaves(task.forward(model, batch))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _check_equal(difference: float, models: str) -> None:
    if not difference <= TOLERANCE:
        raise EquivalenceError(f"{models}: logits differ by up to {difference:.3g}; at most {TOLERANCE:g} is rounding")


def _first_filters(inputs: JobInputs) -> DenseJTJ | None:
    """Return JᵀJ of the first filters of the first convolution, over one set of calibration batches."""
    found = [(name, layer) for name, layer in inputs.model.named_modules() if kernel_dims(layer) == 2]
    if not found or found[0][1].weight[0].numel() > LARGEST_SHOWN_FILTER:
        return None
    name, layer = found[0]
    channels = range(min(SHOWN_FILTERS, layer_axes(layer, name)["out"].width))
    return dense_jtj(inputs.model, inputs.calibration_batches(), name, channels, objective=inputs.task.losses)


def run_job(
    job: PruningJob, out: str | os.PathLike[str], *, overwrite: bool = False, progress: bool = True
) -> JobResult:
    """Do a job as :func:`work_on` does, in a folder that appears when all is done.

    After Ctrl-C, or where the process was killed, another call for the same job goes on from what is kept beside it.

    Args:
        job: What to do.
        out: The folder to make. It is refused when it holds anything.
        overwrite: Replace the run that the folder holds; anything but a run is refused all the same.
        progress: Show bars.

    Raises:
        ValueError: what :func:`work_on` raises; a folder in use.
        ProofError: the plan is wrong; it is kept beside the folder, which does not appear.
    """
    folder = Path(out).resolve()
    jobs.check_run_folder(folder, overwrite=overwrite)
    with files.held(folder):
        begun = files.begun_beside(folder)
        if not _is_begun(begun, job):
            files.remove_leftovers(folder.parent, of=folder.name)
        try:
            with files.replacing(folder, begun=begun) as new:
                result = work_on(job, new, progress=progress)
                files.keep_hold(folder, new)
            return result
        except ProofError as error:
            raise keep_refused(error, folder.with_name(f"{folder.name}.{jobs.REFUSED_PLAN}")) from error


def _is_begun(folder: Path, job: PruningJob) -> bool:
    """Say whether a folder holds the beginning of a job."""
    try:
        jobs.check_same_job(folder, job)
    except RunFolderError:
        return False
    return True


def work_on(
    job: PruningJob,
    folder: str | os.PathLike[str],
    *,
    stop: Callable[[], bool] = lambda: False,
    progress: bool = True,
) -> JobResult:
    """Do a job in its folder, where it may be watched, stopped and killed; go on with what an earlier call left there.

    Everything that may be wrong with the job or the folder is raised before work begins and anything is written. In
    the end, saved models are loaded again and compared, bit by bit.

    Args:
        job: What to do.
        folder: Where; made if need be. One that holds another job is refused.
        stop: Asked again and again; once it says True, what there is is kept and `Stopped` raised.
        progress: Show bars.

    Raises:
        Stopped: when ``stop`` said so.
        ValueError: what `prepare` and `perform` raise; a folder that holds something else.
    """
    folder, main = Path(folder).resolve(), processes().is_main
    if (folder / jobs.JOB).is_file():
        job = jobs.as_begun(folder, job)
        jobs.check_same_job(folder, job)
    else:
        jobs.check_run_folder(folder, overwrite=False)
    with agreed(jobs.find_device(job.device)):
        inputs = prepare(job)
    with ExitStack() as stack:
        with agreed(inputs.device):
            if main:
                stack.enter_context(_begun(folder, job))
        result = perform(inputs, progress=progress, keeping=Keeping(folder, stop))
        if main:
            _finish(result, inputs, folder, progress)
        logger.info("done")
    return result


@contextmanager
def _begun(folder: Path, job: PruningJob) -> Iterator[None]:
    """Hold a run's folder, with its job and its log in it."""
    with files.held(folder):
        files.remove_leftovers(folder)
        jobs.write_job(folder, job)
        with files.logging_to_file(folder / jobs.RUN_LOG):
            yield


def _finish(result: JobResult, inputs: JobInputs, folder: Path, progress: bool) -> None:
    """Add histories as tables, the pruned models and all figures to what a job has left in its folder."""
    logger.info("saving, loading again and comparing")
    for key, history in result.histories.items():
        files.write_text(folder / f"history_{key}.csv", history.to_frame().to_csv(index=False))
    saved = [key for key in jobs.SAVED_MODELS if key in result.models]
    reloaded = {key: _save_and_reload(result, key, inputs, folder, progress) for key in saved}
    files.write_json(folder / jobs.RESULTS, _results(result, inputs, reloaded), checked=True)


def _save_and_reload(result: JobResult, key: str, inputs: JobInputs, folder: Path, progress: bool) -> dict[str, Any]:
    """Save a model, load it again and evaluate what was loaded; raise RunFolderError if it is not the same network."""
    model = result.models[key]
    save_pruned(folder / key, model, result.plan, source=inputs.source, overwrite=True)
    own = {} if inputs.source else {"model": inputs.model}
    loaded = load_pruned(folder / key, **own).to(inputs.device)
    batch = next(iter(inputs.held_out_batches()))
    pairs = zip(said(loaded, batch, inputs.task), said(model, batch, inputs.task), strict=True)
    if not all(torch.equal(one, other) for one, other in pairs):
        raise RunFolderError(f"the {key} model computes other logits after saving and loading")
    metrics = evaluate(loaded, inputs.held_out_batches(), task=inputs.task, progress=progress)
    return asdict(metrics) | {"bit_equal_logits": True}


def _results(result: JobResult, inputs: JobInputs, reloaded: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    data, plan = inputs.data, result.plan
    return {
        "format": jobs.FORMAT,
        "job": result.job.to_dict(),
        "data": {"train_images": len(data.train), "held_out_images": len(data.val), "classes": len(data.classes)},
        "plan": {"channels": plan.channels, "channels_removed": plan.channels_removed},
        "models": {
            key: asdict(measured) | {"median_latency_ms": measured.latency.median_ms}
            for key, measured in result.measured.items()
        },
        "reloaded": reloaded,
        "equivalence": asdict(result.equivalence) if result.equivalence else None,
        "histories": {key: history.to_frame().to_dict("records") for key, history in result.histories.items()},
        "seconds": dict(result.seconds),
        "speeds": None if result.speeds is None else result.speeds.to_dict("records"),
        "environment": files.environment(inputs.device),
    }
