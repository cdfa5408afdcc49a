"""The task of a network that comes from a library: its own inputs and losses, and metrics for what it returns.

A library is known by the module that a network's class is defined in; only one that a network comes from is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms, box_convert

from ..data.batches import count_examples, inputs_and_targets
from ..measure.metrics import IGNORED, Metrics, box_targets, classification_metrics
from ..scoring import tasks
from ..scoring.tasks import CLASSIFICATION, Task

LEAST_SCORE = 1e-3
"""Boxes of lower scores are left out, as COCO's evaluations do."""
OVERLAP = 0.7
"""Of two boxes of a class that overlap more, the lower one is left out."""


def task_of(model: nn.Module) -> Task:
    """Return what a network of transformers, ultralytics, torchvision, open_clip, timm or segmentation_models is for.

    Batches are keyword arguments as the library makes them, "labels" among them, or the pairs of `TASKS`.

    Raises:
        ValueError: a network of none of them, or of transformers without a head that tells what it is for.
    """
    for kind in type(model).__mro__:
        find = LIBRARIES.get(kind.__module__.partition(".")[0])
        if find is not None:
            return find(model, kind)
    raise ValueError(
        f"{type(model).__name__} comes from no library whose tasks are known ({', '.join(LIBRARIES)}): pass task=, a "
        "name of TASKS or a Task of your own"
    )


def _of_transformers(model: nn.Module, kind: type) -> Task:
    """Tell by the tables of transformers' own automatic classes which head a network has."""
    auto = import_module("transformers.models.auto.modeling_auto")
    names = {other.__name__ for other in type(model).__mro__}
    for table, make in HEADS.items():
        known = getattr(auto, f"MODEL_FOR_{table}_MAPPING_NAMES").values()
        if names & {name for entry in known for name in ((entry,) if isinstance(entry, str) else entry)}:
            return make(model)
    if "CLIPModel" in names:
        return tasks.image_text_task(partial(_embed_named, model.config.text_config))
    raise ValueError(
        f"{type(model).__name__} has no head that tells what it is for: pass task=, such as 'outputs', which needs none"
    )


def _named(batch: Any, name: str) -> dict[str, Any]:
    """Return a batch as keyword arguments of transformers: a tensor, or the first of a pair, under a name."""
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in ("labels", "bytes")}
    return {name: inputs_and_targets(batch)[0]}


def _check_tokens(tokens: Any, longest: int | None, known: int) -> None:
    """Raise ValueError where tokens, or their number, are not the model's. What is no tokens is for it to say."""
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point() or not tokens.numel():
        return
    if longest is not None and tokens.shape[1] > longest:
        raise ValueError(f"sequences of {tokens.shape[1]} tokens for a model that takes {longest}")
    if torch.compiler.is_exporting():  # a program has no numbers to look at
        return
    low, high = (int(end) for end in tokens.aminmax())
    if low < 0 or high >= known:
        raise ValueError(f"token {low if low < 0 else high} for a model of {known} tokens")


def _with_tokens(config: Any, batch: Any) -> dict[str, Any]:
    """Return a batch as keyword arguments of a network of transformers that reads tokens, once they are checked."""
    inputs = _named(batch, "input_ids")
    longest = getattr(config, "max_position_embeddings", None)
    _check_tokens(inputs.get("input_ids"), longest, config.vocab_size)
    return inputs


def _embed_named(config: Any, network: nn.Module, batch: Any) -> Any:
    pair = batch if isinstance(batch, Mapping) else dict(zip(("pixel_values", "input_ids"), batch, strict=True))
    return tasks.embed_pairs(network, _with_tokens(config, pair))


def _of_open_clip(model: nn.Module, kind: type) -> Task:
    longest, known = getattr(model, "context_length", None), getattr(model, "vocab_size", None)

    def forward(network: nn.Module, batch: Any) -> Any:
        if known is not None and not isinstance(batch, Mapping):
            _check_tokens(batch[1], longest, known)
        return tasks.embed_pairs(network, batch)

    return tasks.image_text_task(forward)


def _token_logits(config: Any, network: nn.Module, batch: Any, **options: Any) -> Tensor:
    return network(**_with_tokens(config, batch), **options).logits


def _causal_language(model: nn.Module) -> Task:
    # The configuration is the unpruned network's: an EquivalentModel has none.
    return tasks.language_task(partial(_token_logits, model.config, use_cache=False))


def _masked_language(model: nn.Module) -> Task:
    def logits(network: nn.Module, batch: Any) -> Tensor:
        if not isinstance(batch, Mapping) or "labels" not in batch:
            raise ValueError(f"batches need 'labels', the tokens that were masked, and {IGNORED} for all others")
        return _token_logits(model.config, network, batch)

    return tasks.language_task(logits, shift=False, name="masked_language_model")


def _sequence_to_sequence(model: nn.Module) -> Task:
    """T5, BART and their kin: the decoder reads the labels shifted right by the network, or what it is given."""
    if not model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} writes sequences without a decoder of its own: pass task=")

    def logits(network: nn.Module, batch: Any) -> Tensor:
        if not isinstance(batch, Mapping) or "labels" not in batch:
            raise ValueError(f"batches need 'labels', the tokens to be written, and {IGNORED} where there are none")
        inputs = _with_tokens(model.config, batch)
        labels = {} if "decoder_input_ids" in inputs else {"labels": batch["labels"].contiguous()}  # T5 views them flat
        return network(**inputs, **labels, use_cache=False).logits

    return tasks.language_task(logits, shift=False, name="sequence_to_sequence")


def _classifier(name: str, model: nn.Module) -> Task:
    def forward(network: nn.Module, batch: Any) -> Tensor:
        inputs = _with_tokens(model.config, batch) if name == "input_ids" else _named(batch, name)
        return network(**inputs).logits

    def losses(network: nn.Module, batch: Any) -> Tensor:
        labels = inputs_and_targets(batch)[1]
        logits = forward(network, batch)
        if not isinstance(labels, Tensor) or labels.shape != logits.shape[:1] or labels.is_floating_point():
            raise ValueError("batches need 'labels', one whole class number an example")
        return F.cross_entropy(logits, labels.long(), reduction="none")

    def metrics(network: nn.Module, batches: Iterable[Any]) -> Metrics:
        pairs = ((forward(network, batch), inputs_and_targets(batch)[1]) for batch in batches)
        return classification_metrics(nn.Identity(), pairs)

    directions, logits = CLASSIFICATION.directions, CLASSIFICATION.logits
    return Task("classification", losses, metrics, forward, directions=directions, logits=logits)


def _pixel_classifier(model: nn.Module) -> Task:
    def forward(network: nn.Module, batch: Any) -> Tensor:
        inputs = _named(batch, "pixel_values")
        logits = network(**inputs).logits
        return F.interpolate(logits, inputs["pixel_values"].shape[-2:], mode="bilinear", align_corners=False)

    return tasks.segmentation_task(forward)


def _box_transformer(model: nn.Module) -> Task:
    """DETR and its kin: labels are lists of {"class_labels", "boxes"}, boxes centre and size as shares of the image."""

    def losses(network: nn.Module, batch: Any) -> Tensor:
        return network(**batch).loss

    def forward(network: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        output = network(**_named(batch, "pixel_values"))
        return output.logits, output.pred_boxes

    def found(network: nn.Module, batch: Any) -> list[dict[str, Tensor]]:
        logits, boxes = forward(network, batch)
        # The last class is "no object".
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)
        parts = zip(box_convert(boxes, "cxcywh", "xyxy"), scores, labels, strict=True)
        return [dict(zip(("boxes", "scores", "labels"), part, strict=True)) for part in parts]

    def wanted(batch: Any) -> list[dict[str, Tensor]]:
        targets = inputs_and_targets(batch)[1]
        return [{"boxes": box_convert(t["boxes"], "cxcywh", "xyxy"), "labels": t["class_labels"]} for t in targets]

    return tasks.detection_task(losses, forward, found=found, wanted=wanted)


HEADS: Mapping[str, Callable[[nn.Module], Task]] = {
    "SEQ_TO_SEQ_CAUSAL_LM": _sequence_to_sequence,
    "CAUSAL_LM": _causal_language,
    "MASKED_LM": _masked_language,
    "SEQUENCE_CLASSIFICATION": partial(_classifier, "input_ids"),
    "IMAGE_CLASSIFICATION": partial(_classifier, "pixel_values"),
    "SEMANTIC_SEGMENTATION": _pixel_classifier,
    "OBJECT_DETECTION": _box_transformer,
}
"""transformers' tables of classes by what they are for, in the order in which they are asked."""


def _of_torchvision(model: nn.Module, kind: type) -> Task:
    if ".segmentation" in kind.__module__:
        return tasks.segmentation_task()
    if ".detection" not in kind.__module__:
        return CLASSIFICATION
    return tasks.detection_task(tasks.detector_losses, _unsorted_boxes)


def _unsorted_boxes(model: nn.Module, batch: Any) -> Any:
    """Return what a detector's heads say everywhere, and of the whole images: no number depends on what is found."""
    images = model.transform(list(inputs_and_targets(batch)[0]))[0]
    features = model.backbone(images.tensors)
    features = {"0": features} if isinstance(features, Tensor) else features
    if not hasattr(model, "rpn"):
        return model.head(list(features.values()))
    whole = [images.tensors.new_tensor([[0.0, 0.0, size[1], size[0]]]) for size in images.image_sizes]
    pooled = model.roi_heads.box_roi_pool(features, whole, images.image_sizes)
    return model.rpn.head(list(features.values())), model.roi_heads.box_predictor(model.roi_heads.box_head(pooled))


def _of_ultralytics(model: nn.Module, kind: type) -> Task:
    if not hasattr(model, "loss"):
        raise ValueError(f"{type(model).__name__} is no network but what holds one: pass its .model")
    return tasks.detection_task(
        _yolo_losses, lambda network, batch: _heads(network, batch)[0], found=_yolo_boxes, wanted=_boxes
    )


def _heads(network: nn.Module, batch: Any) -> Any:
    return network(batch["img"] if isinstance(batch, Mapping) else inputs_and_targets(batch)[0])


def _yolo_losses(network: nn.Module, batch: Any) -> Tensor:
    """Return the loss of a batch, per image; a batch is ultralytics' own dict, or images and targets."""
    given = dict(batch) if isinstance(batch, Mapping) else _yolo_batch(batch[0], box_targets(batch))
    with _lent_criterion(network):
        return network(given)[0].sum() / len(given["img"])


def _yolo_batch(images: Tensor, targets: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return images and boxes in pixels as ultralytics has them: centres and sizes as shares of the image."""
    counts = torch.tensor([len(target["boxes"]) for target in targets], device=images.device)
    height, width = images.shape[-2:]
    boxes = torch.cat([target["boxes"] for target in targets]).to(images).reshape(-1, 4)
    shares = box_convert(boxes, "xyxy", "cxcywh") / boxes.new_tensor([width, height, width, height])
    labels = torch.cat([target["labels"] for target in targets]).to(images)[:, None]
    rows = torch.arange(len(targets), device=images.device).repeat_interleave(counts)
    return {"img": images, "batch_idx": rows.to(images), "cls": labels, "bboxes": shares}


@contextmanager
def _lent_criterion(network: nn.Module) -> Iterator[None]:
    """Give a network of ultralytics the arguments of its criterion where it has none, and take both away again."""
    inner = next(module for module in network.modules() if hasattr(type(module), "init_criterion"))
    before = {name: vars(inner)[name] for name in ("args", "criterion") if name in vars(inner)}
    try:
        if not hasattr(before.get("args"), "box"):
            inner.args = import_module("ultralytics.cfg").get_cfg()
        inner.criterion = None
        yield
    finally:
        for name in ("args", "criterion"):
            vars(inner).pop(name, None)
        vars(inner).update(before)


def _yolo_boxes(network: nn.Module, batch: Any) -> list[dict[str, Tensor]]:
    """Return the boxes of each image, the lower one of any two that show the same left out."""
    output = _heads(network, batch)
    output = output[0] if isinstance(output, tuple) else output
    found = []
    for image in output if output.shape[-1] == 6 else output.transpose(1, 2):
        if output.shape[-1] == 6:  # end to end: corners, score and class
            boxes, scores, labels = image[:, :4], image[:, 4], image[:, 5].long()
        else:
            boxes = box_convert(image[:, :4], "cxcywh", "xyxy")
            scores, labels = image[:, 4:].max(1)
            kept = scores > LEAST_SCORE
            boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
            kept = batched_nms(boxes, scores, labels, OVERLAP)
            boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
        found.append({"boxes": boxes, "scores": scores, "labels": labels})
    return found


def _boxes(batch: Any) -> list[Mapping[str, Tensor]]:
    """Return the targets of a batch, boxes in pixels, whichever of the two forms it has."""
    if not isinstance(batch, Mapping):
        return box_targets(batch)
    height, width = batch["img"].shape[-2:]
    boxes = box_convert(batch["bboxes"], "cxcywh", "xyxy") * batch["bboxes"].new_tensor([width, height, width, height])
    own = [batch["batch_idx"] == number for number in range(count_examples(batch["img"]))]
    return [{"boxes": boxes[rows], "labels": batch["cls"][rows].flatten().long()} for rows in own]


LIBRARIES: Mapping[str, Callable[[nn.Module, type], Task]] = {
    "transformers": _of_transformers,
    "ultralytics": _of_ultralytics,
    "torchvision": _of_torchvision,
    "open_clip": _of_open_clip,
    "timm": lambda model, kind: CLASSIFICATION,
    "segmentation_models_pytorch": lambda model, kind: tasks.segmentation_task(),
}
"""How the task of a network is found, by the library that its class comes from."""
