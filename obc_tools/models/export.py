"""Hand a pruned or merged model on: as a torch.export program, or as an ONNX file that was proven to compute the same.

ONNX needs the packages onnx, onnxscript and onnxruntime: ``pip install obc_tools[export]``.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import check_number
from ..files import replacing
from ..pruning.equivalent import EquivalentModel
from ..state import Forward, Wrapped, call_model, copy_of, misfit, within

TOLERANCE = 1e-4
"""Default bound on the difference between onnxruntime's output and torch's, relative to the largest output."""

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class ExportError(ValueError):
    """A model that cannot be exported, or whose exported form computes something else."""


@dataclass(frozen=True)
class OnnxExport:
    """An ONNX file that was written. ``error``: onnxruntime's output against torch's, relative to the largest."""

    path: Path
    error: float


def export_program(model: nn.Module, example_inputs: Any, *, dynamic_batch: bool = False) -> ExportedProgram:
    """Export a model, in eval mode, by torch.export; save it with ``torch.export.save``.

    Args:
        model: what `prune` or the merge of Equivalent Pruning returned; left unchanged.
        example_inputs: a tensor, a tuple of arguments, a dict of keyword arguments, or a `Forward`, whose ``run`` is
            what is exported, as a function of its ``inputs``.
        dynamic_batch: leave the size of every input's leading axis open; a batch of one example is doubled for it.

    Raises:
        ExportError: an `EquivalentModel`, or a model that torch.export cannot trace.
    """
    if isinstance(model, EquivalentModel):
        raise ExportError("an EquivalentModel is exported after merging: pass model.merge()")
    module = copy_of(model).eval()
    if isinstance(example_inputs, Forward):
        module, example_inputs = Wrapped(module, example_inputs.run), (example_inputs.inputs,)
    if dynamic_batch:
        example_inputs = tree_map(_doubled, example_inputs)
    args, kwargs = _arguments(example_inputs)
    shapes = tree_map(_open_batch, (args, kwargs)) if dynamic_batch else None
    if shapes is not None:
        shapes = (*shapes[0], *shapes[1].values()) if kwargs else shapes[0]
    try:
        with within(torch.no_grad()):
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:
        said = misfit(model, example_inputs, error)
        raise ExportError(f"torch.export cannot export this {type(model).__name__}: {said}") from error


def export_onnx(
    path: str | os.PathLike[str],
    model: nn.Module,
    example_inputs: Any,
    *,
    dynamic_batch: bool = False,
    tolerance: float = TOLERANCE,
) -> OnnxExport:
    """Write a model as an ONNX file whose output in onnxruntime was found to equal torch's.

    The file gets its name only after the comparison, so that what lies there is proven (or is what lay there before).
    Arguments are those of :func:`export_program`; weights are inside the file, which limits it to 2 GB.

    Args:
        tolerance: bound on the largest difference, relative to the largest output.

    Raises:
        ExportError: packages that are missing (says which), and what :func:`export_program` and the ONNX exporter
            refuse, or outputs that differ by more than the tolerance.
    """
    _require_packages()
    check_number("tolerance", tolerance, "a number above 0", lambda number: number > 0)
    program = export_program(model, example_inputs, dynamic_batch=dynamic_batch)
    with replacing(Path(path)) as new:
        try:
            torch.onnx.export(program, dynamo=True, verbose=False).save(new, external_data=False)
        except Exception as error:
            raise ExportError(f"this {type(model).__name__} has no ONNX form: {_first_line(error)}") from error
        try:
            error = _compare(new, model, example_inputs)
        except Exception as error:
            raise ExportError(f"onnxruntime cannot run this {type(model).__name__}: {_first_line(error)}") from error
        if not error <= tolerance:
            raise ExportError(f"onnxruntime's output differs from torch's by {error:.2g} of it, above {tolerance:.2g}")
    return OnnxExport(Path(path), error)


def _require_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"ONNX needs the packages {', '.join(missing)}: pip install obc_tools[export]")


def _arguments(example_inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """Split example inputs as `call_model` does: positional arguments and keyword arguments."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)), {}


def _doubled(leaf: Any) -> Any:
    """Return a batch of one example twice: torch.export takes a size of one for fixed."""
    return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == 1 else leaf


def _open_batch(leaf: Any) -> dict[int, Any] | None:
    return {0: Dim.DYNAMIC} if isinstance(leaf, Tensor) and leaf.dim() else None


def onnx_run(path: Path, example_inputs: Any) -> Callable[[], list[np.ndarray]]:
    """Return what runs an ONNX file on example inputs, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = example_inputs.inputs if isinstance(example_inputs, Forward) else example_inputs
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    names = [node.name for node in session.get_inputs()]
    named = {name: leaf.numpy(force=True) for name, leaf in zip(names, tensors, strict=True)}
    return lambda: session.run(None, named)


def _compare(path: Path, model: nn.Module, example_inputs: Any) -> float:
    """Return the largest difference between onnxruntime's outputs and torch's, relative to the largest output."""
    found = onnx_run(path, example_inputs)()
    with torch.no_grad():
        output = call_model(copy_of(model).eval(), example_inputs)
    expected = [leaf.cpu() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    pairs = [(ours, torch.from_numpy(theirs)) for ours, theirs in zip(expected, found, strict=True)]
    if any(ours.shape != theirs.shape for ours, theirs in pairs):
        return float("inf")
    return max((ours - theirs).abs().max().item() / (ours.abs().max().item() or 1.0) for ours, theirs in pairs)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{type(error).__name__}: {lines[0]}"
