"""What a network is for, as a value: how a batch is put through it, its losses, and how good it is.

`TASKS` holds the ready ones. One's own is a loss and a metric with a direction:

    def losses(model, batch):
        return (model(batch[0]) - batch[1]).square().mean(1)

    def metrics(model, batches):
        error = torchmetrics.MeanAbsoluteError()
        for inputs, depths in batches:
            error.update(model(inputs), depths)
        return {"error": error.compute()}

    depth = Task("depth", losses, metrics, directions={"error": "lower"})
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import length_hint
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from ..data.batches import inputs_and_targets, to_device
from ..data.data import Data, check_classes
from ..errors import check_name
from ..measure.metrics import (
    IGNORED,
    Metrics,
    TaskMetrics,
    box_targets,
    classification_metrics,
    closeness_metrics,
    detection_metrics,
    language_metrics,
    mask_targets,
    retrieval_metrics,
    segmentation_metrics,
    token_targets,
)
from ..state import Forward, call_model, check_iterable, check_module, evaluating, logits_of, numbered, running
from .criteria import Criterion
from .objectives import Objective, check_losses, classification

Run = Callable[[nn.Module, Any], Any]
"""(model, batch) -> what the model makes of the batch."""
DIRECTIONS = ("higher", "lower")


def predict(model: nn.Module, batch: Any) -> Tensor:
    """Return the logits of a batch's inputs (see `data.batches.inputs_and_targets`)."""
    return logits_of(call_model(model, inputs_and_targets(batch)[0]))


@dataclass(frozen=True)
class Task:
    """What a network is for; checked when built.

    Attributes:
        name: For messages, tables and settings.
        losses: (model, batch) -> one loss an example, (examples,), or one scalar. The model may be in eval mode.
        metrics: (model in eval mode, batches on its device) -> metric -> value; no gradients are kept.
        forward: (model, batch) -> outputs; whoever traces the network runs it like this (see `example`).
        directions: Metric -> "higher" or "lower", whichever is better; the first is the headline.
        logits: (outputs, batch) -> (rows, classes), what distillation compares; None: there is nothing to distil.
        training: What `fit` minimises, likewise (model, batch) -> losses; None: ``losses``.
        against: The unpruned network -> this task measured against it; None: the task needs no such network.
        beside: Other networks that its functions run, such as that one: whoever borrows a model borrows them with it.
    """

    name: str
    losses: Objective
    metrics: Callable[[nn.Module, Iterable[Any]], Mapping[str, Any] | Metrics]
    forward: Run = predict
    directions: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    logits: Callable[[Any, Any], Tensor] | None = field(default=None, kw_only=True)
    training: Objective | None = field(default=None, kw_only=True)
    against: Callable[[nn.Module], Task] | None = field(default=None, kw_only=True)
    beside: tuple[nn.Module, ...] = field(default=(), kw_only=True)

    def __post_init__(self):
        for name in ("losses", "metrics", "forward"):
            if not callable(getattr(self, name)):
                raise ValueError(f"task '{self.name}': {name} is {getattr(self, name)!r}; expected a function")
        if not isinstance(self.directions, Mapping):
            raise ValueError(f"task '{self.name}': directions={self.directions!r}; expected a mapping from metrics")
        if not self.directions or set(self.directions.values()) - {*DIRECTIONS}:
            raise ValueError(
                f"task '{self.name}': directions={dict(self.directions)}; expected 'higher' or 'lower', whichever is "
                "better, for at least one metric"
            )
        object.__setattr__(self, "directions", MappingProxyType(dict(self.directions)))

    @property
    def headline(self) -> str:
        """The metric that stands for all."""
        return next(iter(self.directions))

    def example(self, batch: Any) -> Forward:
        """Return example inputs, for `find_groups` and whatever else wants some, out of a batch."""
        return Forward(self.forward, batch)


def segmentation_losses(forward: Run, model: nn.Module, batch: Any) -> Tensor:
    """Return each image's mean cross entropy over the pixels that count, (examples,)."""
    logits = forward(model, batch)
    masks = mask_targets(batch, logits)
    losses = F.cross_entropy(logits, masks, ignore_index=IGNORED, reduction="none")
    return losses.sum((1, 2)) / (masks != IGNORED).sum((1, 2)).clamp_min(1)


def language_losses(forward: Run, shift: bool, model: nn.Module, batch: Any) -> Tensor:
    """Return each sequence's mean cross entropy over the tokens that count, (examples,)."""
    logits = forward(model, batch)
    targets = token_targets(batch, logits, shift=shift)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(targets).sum(1) / (targets != IGNORED).sum(1).clamp_min(1)


def detector_losses(model: nn.Module, batch: Any) -> Tensor:
    """Return the sum of a detector's own losses, those it returns in train mode for (images, targets).

    In eval mode, modules that hold others alone are switched to train mode: norms and dropout stay as they are.
    """
    images, targets = inputs_and_targets(batch)[0], box_targets(batch)
    modes = {module: module.training for module in model.modules()}
    try:
        for module in () if model.training else modes:
            module.training = any(True for _ in module.children())
        losses = model(list(images), targets)
    finally:
        for module, training in modes.items():
            module.training = training
    if not isinstance(losses, Mapping) or not losses:
        raise ValueError(f"a detector in train mode returns a dict of losses, not {type(losses).__name__}")
    return sum(losses.values())


def detect(model: nn.Module, batch: Any) -> Any:
    """Return what a detector finds in a batch (images, targets)."""
    return model(list(inputs_and_targets(batch)[0]))


def embed_pairs(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | float]:
    """Return features of images and of texts, both (examples, width), the texts' tokens, and the scale of logits.

    A batch is (images, tokens), or keyword arguments with "input_ids"; the model returns features as CLIP's usual
    implementations do.
    """
    inputs = dict(batch) if isinstance(batch, Mapping) else tuple(batch)
    output = call_model(model, inputs)
    tokens = inputs["input_ids"] if isinstance(inputs, dict) else inputs[1]
    if hasattr(output, "image_embeds"):
        scale = getattr(model, "logit_scale", None)
        return output.image_embeds, output.text_embeds, tokens, 1.0 if scale is None else scale.exp()
    names = ("image_features", "text_features", "logit_scale")
    parts = [output.get(name) for name in names] if isinstance(output, Mapping) else list(output)[:3]
    if len(parts) < 2 or not all(isinstance(part, Tensor) and part.ndim == 2 for part in parts[:2]):
        raise ValueError("the model returned no features of images and texts, (examples, width) both")
    return parts[0], parts[1], tokens, 1.0 if len(parts) < 3 or parts[2] is None else parts[2]


def pair_logits(outputs: Any, batch: Any = None) -> Tensor:
    """Return scale · cos(image, text), (images, texts)."""
    images, texts, _, scale = outputs
    return scale * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T


def contrastive_loss(forward: Run, model: nn.Module, batch: Any) -> Tensor:
    """Return the symmetric contrastive loss (Radford et al. 2021, Fig. 3), a scalar: its examples see each other.

    Examples with the same text share a target.
    """
    outputs = forward(model, batch)
    logits, tokens = pair_logits(outputs), outputs[2].flatten(1)
    same = (tokens[:, None] == tokens).all(-1).to(logits.dtype)
    shares = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, shares) + F.cross_entropy(logits.T, shares)) / 2


def told(forward: Run, model: nn.Module, batch: Any) -> list[Tensor]:
    """Return what a network says of a batch, (examples, …) each: logits, hidden states, or all it returns.

    Positions of padding, by "attention_mask", are 0.
    """
    output = forward(model, batch)
    for name in ("logits", "last_hidden_state"):
        output = getattr(output, name, output)
    found = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not found:
        raise ValueError("the model returned no tensor of floating point numbers")
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is None:
        return found
    covered = [leaf.ndim > mask.ndim and leaf.shape[: mask.ndim] == mask.shape for leaf in found]
    return [leaf * mask[..., None].to(leaf) if here else leaf for leaf, here in zip(found, covered, strict=True)]


def projected_outputs(forward: Run, seed: int, model: nn.Module, batch: Any) -> Tensor:
    """Return ⟨r, f(x)⟩ of each example, (examples,), r standard normal: then E_r Σ (J w)² = wᵀ(J_fᵀ J_f)w.

    r is fixed by the seed and the batch, so that the same batch always has the same losses.
    """
    found = [leaf for leaf in told(forward, model, batch) if leaf.requires_grad]
    if not found:
        raise ValueError("the model's outputs do not depend on its parameters through autograd")
    generator = torch.Generator().manual_seed(zlib.crc32(_fingerprint(batch), seed))
    losses = 0.0
    for leaf in found:
        r = torch.randn(leaf.shape, generator=generator, dtype=torch.float32).to(leaf.device, leaf.dtype)
        losses = losses + (r * leaf).flatten(1).sum(1)
    return losses


def _fingerprint(batch: Any) -> bytes:
    """Return some bytes that differ from batch to batch: up to 4,096 numbers of its first tensor, evenly spread."""
    first = next(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)).detach().flatten()
    return first[:: max(1, len(first) // 4096)].double().cpu().numpy().tobytes()


def _pairs(forward: Run, original: nn.Module, model: nn.Module, batch: Any) -> list[tuple[Tensor, Tensor]]:
    with torch.no_grad(), evaluating(original):
        wanted = told(forward, original, batch)
    return list(zip(told(forward, model, batch), wanted, strict=True))


def imitation_losses(forward: Run, original: nn.Module, model: nn.Module, batch: Any) -> Tensor:
    """Return each example's squared distance to the original's outputs over their square, (examples,)."""
    pairs = _pairs(forward, original, model, batch)
    distance = sum((own - wanted).flatten(1).square().sum(1) for own, wanted in pairs)
    return distance / sum(wanted.flatten(1).square().sum(1) for _, wanted in pairs).clamp_min(1e-12)


def _unbound(model: nn.Module, batches: Iterable[Any]) -> Mapping[str, Any]:
    raise ValueError(
        "task 'outputs' compares with the network as it was: pass task=TASKS['outputs'].against(original), or to fit "
        "teacher=original"
    )


def segmentation_task(forward: Run = predict) -> Task:
    """Return the task of telling the class of every pixel, by a forward that returns logits."""
    return Task(
        "segmentation",
        partial(segmentation_losses, forward),
        partial(segmentation_metrics, forward),
        forward,
        directions={"mean_iou": "higher", "pixel_accuracy": "higher", "loss": "lower"},
        logits=lambda outputs, batch: outputs.movedim(1, -1)[mask_targets(batch, outputs) != IGNORED],
    )


def language_task(forward: Run = predict, *, shift: bool = True, name: str = "language_model") -> Task:
    """Return the task of telling the next token, or without ``shift`` the token itself, by a forward with logits."""
    return Task(
        name,
        partial(language_losses, forward, shift),
        partial(language_metrics, forward, shift=shift),
        forward,
        directions={"perplexity": "lower", "bits_a_byte": "lower", "loss": "lower"},
        logits=lambda outputs, batch: outputs[token_targets(batch, outputs, shift=shift) != IGNORED],
    )


def detection_task(
    losses: Objective = detector_losses,
    forward: Run = detect,
    *,
    found: Run = detect,
    wanted: Callable[[Any], Any] = box_targets,
) -> Task:
    """Return the task of finding boxes, by a detector's own losses.

    Args:
        forward: For tracing: whatever the network computes, if possible before it chooses among boxes.
        found: Returns a list of {"boxes", "scores", "labels"}, one an image.
        wanted: A batch -> a list of {"boxes", "labels"}.
    """
    directions = {"map50": "higher", "map": "higher"}
    return Task("detection", losses, partial(detection_metrics, found, wanted), forward, directions=directions)


def image_text_task(forward: Run = embed_pairs) -> Task:
    """Return the task of matching images and texts, by a forward that returns what `embed_pairs` does."""
    directions = {"zero_shot_accuracy": "higher", "recall_at_1": "higher"}
    functions = partial(contrastive_loss, forward), partial(retrieval_metrics, forward)
    return Task("image_text", *functions, forward, directions=directions, logits=pair_logits)


def outputs_task(
    forward: Run = lambda model, batch: call_model(model, inputs_and_targets(batch)[0]),
    *,
    seed: int = 0,
    original: nn.Module | None = None,
) -> Task:
    """Return the task without labels: to say what the original says.

    Scored by random projections of the outputs, for a distance to the original has no gradient at the start; trained
    and measured against the original, once that is known.
    """
    known = original is not None
    return Task(
        "outputs",
        partial(projected_outputs, forward, seed),
        partial(closeness_metrics, partial(_pairs, forward, original)) if known else _unbound,
        forward,
        directions={"cosine": "higher", "relative_error": "lower"},
        training=partial(imitation_losses, forward, original) if known else None,
        against=None if known else lambda network: outputs_task(forward, seed=seed, original=network),
        beside=(original,) if known else (),
    )


CLASSIFICATION = Task(
    "classification",
    classification,
    classification_metrics,
    directions={"accuracy": "higher", "top5": "higher", "loss": "lower"},
    logits=lambda outputs, batch: outputs,
)
TASKS: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for task in (
            CLASSIFICATION,
            segmentation_task(),
            detection_task(),
            language_task(),
            image_text_task(),
            outputs_task(),
        )
    }
)
"""The ready tasks by name."""


def find_task(task: str | Task) -> Task:
    """Return a task, or the ready one of a name; raise ValueError for anything else."""
    if isinstance(task, Task):
        return task
    if not isinstance(task, str):
        raise ValueError(f"task={task!r}: expected a Task or one of {', '.join(TASKS)}")
    check_name("task", task, TASKS)
    return TASKS[task]


def evaluate(
    model: nn.Module, batches: Iterable[Any], *, task: str | Task = CLASSIFICATION, progress: bool = False
) -> Metrics | TaskMetrics:
    """Measure how well a model does its task on all of some batches, in eval mode and without gradients.

    Args:
        model: its train/eval mode is restored.
        batches: as the task takes them, pairs (images, labels) by default; moved to the model's device. A one-shot
            iterator will do.
        task: a `Task`, or the name of one of `TASKS`.
        progress: show a progress bar.

    Raises:
        ValueError: no data, a batch that does not fit the model or the task (named, counted from 1), metrics that are
            NaN or not there.
    """
    task, seen, held = find_task(task), [0], []
    check_module(model)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    total = length_hint(check_iterable(batches)) or None
    bar = tqdm(batches, desc="evaluate", total=total, disable=not progress, leave=False)

    def moved() -> Iterator[Any]:
        for seen[0], batch in numbered(bar):
            held[:] = [batch]
            yield to_device(batch, device)

    with evaluating(model, *task.beside), torch.no_grad():
        if task is CLASSIFICATION:
            with running(model, held, lambda: f"batch {seen[0]}"):
                return task.metrics(model, moved())
        with fitting(task, model, lambda: f"batch {seen[0]}"):
            found = as_metrics(task, task.metrics(model, moved()))
    if wrong := [name for name, value in found.values.items() if value != value]:
        raise ValueError(
            f"metric {wrong[0]!r} of task '{task.name}' is NaN: look at the model's outputs and the targets"
        )
    return found


def as_metrics(task: Task, found: Any) -> TaskMetrics:
    """Return what a task's metrics returned as a value; raise ValueError where there is no headline."""
    found = found.values if isinstance(found, Metrics) else found
    if not isinstance(found, Mapping):
        raise ValueError(f"its metrics returned {type(found).__name__}; expected a mapping from names to numbers")
    return TaskMetrics(task.name, found, task.directions)


def example_inputs(task: Task, data: Data, device: torch.device | str, dtype: torch.dtype | None = None) -> Any:
    """Return example inputs of a task, one example of some data; of classification zeros of an image's shape."""
    if task is CLASSIFICATION:
        return torch.zeros(1, *data.image_shape, device=device, dtype=dtype)
    split = "val" if data.train is None else "train"
    return task.example(next(iter(data.batches(split, 1, device=device, dtype=dtype).at(0))))


def checked_example(
    task: Task, model: nn.Module, data: Data, device: torch.device, criteria: Iterable[Criterion] = ()
) -> Any:
    """Return example inputs of a task; raise ValueError where the model does not suit it, or not the data."""
    if task is CLASSIFICATION:
        images, _ = next(iter(data.batches("val", 1, device=device).at(0)))
        check_classes(count_outputs(model, images), data)
        return images
    firsts = (next(iter(data.batches(split, 2, device=device).at(0))) for split in ("train", "val"))
    check_task(task, model, *firsts, criteria=criteria)
    return example_inputs(task, data, device)


def count_outputs(model: nn.Module, images: Tensor, where: str = "data") -> int:
    """Return how many logits a classifier gives for the first of some images; raise ValueError for what is none."""
    with running(model, images, lambda: where), torch.no_grad(), evaluating(model):
        logits = model(images[:1])
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"the model returned {given}, not logits (batch, classes): name its task, such as task='segmentation'"
        )
    return logits.shape[1]


@contextmanager
def fitting(task: Task, model: nn.Module, where: Callable[[], str]) -> Iterator[None]:
    """Say of whatever goes wrong inside that the task does not fit the model, and where."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError, TypeError, KeyError, IndexError, AttributeError) as error:
        said = f"{type(error).__name__} {error}" if isinstance(error, KeyError | AttributeError) else str(error)
        raise ValueError(f"{where()}: task '{task.name}' does not fit {type(model).__name__}: {said}") from error


def check_task(
    task: Task, model: nn.Module, train: Any, val: Any, *, distils: bool = False, criteria: Iterable[Criterion] = ()
) -> TaskMetrics:
    """Raise ValueError, with one sentence, where a task does not fit a model on a first batch of each kind.

    The model is in eval mode meanwhile, and no gradients are kept.

    Args:
        distils: there will be a teacher.
        criteria: those that will score.

    Returns:
        What was measured on the batch of ``val``, NaN where it says nothing yet.
    """
    with evaluating(model, *task.beside), torch.no_grad():
        with fitting(task, model, lambda: "train, batch 1"):
            losses = (task.training or task.losses)(model, train)
            if distils and task.logits is None:
                raise ValueError("it has no logits to distil; set distill_weight to 0")
            if distils:
                task.logits(task.forward(model, train), train)
        check_losses(losses, f"train, batch 1, task '{task.name}'")
        alone = [criterion.name for criterion in criteria if criterion.by_example]
        if alone and losses.dim() == 0:
            raise ValueError(
                f"criterion '{alone[0]}' takes rows of single examples, and the loss of task '{task.name}' is one a "
                "batch: take rows='batch' or another criterion"
            )
        with fitting(task, model, lambda: "val, batch 1"):
            return as_metrics(task, task.metrics(model, iter([val])))
