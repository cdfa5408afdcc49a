"""A network in other runtimes: as a torch.export program, as an ONNX file that was proven to compute the same; and how
fast networks are on this machine: by runtime, by threads, on a GPU where there is one, by examples at a time.

ONNX needs the packages onnx, onnxscript and onnxruntime: ``pip install obc_tools[export]``.
`python -m obc_tools.models.runtimes FILE` times two networks in a process of its own, for `pruning.prune`.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from ..data.batches import to_device
from ..errors import check_name, check_number
from ..files import replacing
from ..measure.latency import RUNTIMES, latencies, using_threads
from ..pruning.equivalent import EquivalentModel
from ..state import Forward, Wrapped, call_model, copy_of, misfit, within

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Default bound on the difference between onnxruntime's output and torch's, relative to the largest output."""

GPU = "eager, GPU"
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
    args, kwargs = (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        args, kwargs = (), dict(example_inputs)
    elif isinstance(example_inputs, tuple | list):
        args = tuple(example_inputs)
    shapes = tree_map(_open_batch, (*args, *kwargs.values())) if dynamic_batch else None
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
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise ExportError(f"ONNX needs the packages {', '.join(missing)}: pip install obc_tools[export]")
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


def speed_table(
    models: Mapping[str, nn.Module],
    inputs: Mapping[int, Any],
    *,
    runtimes: Sequence[str] = RUNTIMES[:2],
    repeats: int = 10,
    warmup: int = 2,
) -> pd.DataFrame:
    """Measure how long a forward pass of each model takes, the models in turns.

    Args:
        models: by name; the first is what speed-ups are over. Copied, and left where they are.
        inputs: examples at a time -> example inputs of so many (see `latency`).
        runtimes: of the CPU, with one thread and with as many as torch has; "compile" takes a minute a model. A CUDA
            GPU, where there is one, runs them eagerly too.
        repeats, warmup: forward passes that count, and before those.

    Returns:
        One row a runtime, number of threads, number of examples and model: median and quartiles in milliseconds, and
        the speed-up, the median of the ratios of single rounds. What a runtime cannot run is left out, with a warning.

    Raises:
        ValueError: an unknown runtime, nothing that could be timed, and what `latencies` raises.
    """
    for runtime in runtimes:
        check_name("runtime", runtime, RUNTIMES)
    how, frames = {"repeats": repeats, "warmup": warmup}, []
    at_home = {name: copy.deepcopy(model).cpu().eval() for name, model in models.items()}
    for examples, given in inputs.items():
        on_cpu = to_device(given, "cpu")
        with tempfile.TemporaryDirectory() as folder:
            for threads in sorted({1, torch.get_num_threads()}):
                place = {"examples": examples, "threads": threads, "folder": Path(folder)}
                frames += [_timed(at_home, on_cpu, runtime, **place, **how) for runtime in runtimes]
        if torch.cuda.is_available():
            on_gpu = {name: copy.deepcopy(model).cuda() for name, model in at_home.items()}
            frames.append(_timed(on_gpu, to_device(given, "cuda"), GPU, examples, **how))
    found = [frame for frame in frames if frame is not None]
    if not found:
        raise ValueError(f"speed_table: nothing to time: runtimes {[*runtimes]}, {len(inputs)} numbers of examples")
    return pd.concat(found, ignore_index=True)


def _timed(
    models: Mapping[str, nn.Module],
    inputs: Any,
    runtime: str,
    examples: int,
    threads: int | None = None,
    folder: Path = Path(),
    **how: int,
) -> pd.DataFrame | None:
    """Return the rows of one runtime, number of threads and of examples; None where it cannot run a model.

    ONNX files are kept in ``folder``, and used again.
    """
    with using_threads(threads):
        if runtime in RUNTIMES[1:]:
            try:
                models = _all_in_runtime(runtime, models, inputs, folder)
            except ExportError as error:
                logger.warning("latencies leave out %s, %d at a time: %s", runtime, examples, error)
                return None
            inputs = torch.empty(1)
        frame = latencies(models, inputs, **how).to_frame()
    figures = ["median (ms)", "first quartile (ms)", "third quartile (ms)", "speed-up"]
    return frame.assign(runtime=runtime, examples=examples)[["runtime", "threads", "examples", "model", *figures]]


def _all_in_runtime(runtime: str, models: Mapping[str, nn.Module], inputs: Any, folder: Path) -> dict[str, Wrapped]:
    """Return what runs each of some models, whose ONNX files are kept in a folder by the models' places."""
    return {
        name: in_runtime(runtime, model, inputs, folder / f"{number}.onnx")
        for number, (name, model) in enumerate(models.items())
    }


def in_runtime(runtime: str, model: nn.Module, example_inputs: Any, path: Path) -> Wrapped:
    """Return what runs a model on its inputs, whatever it is called with; ``path`` is that of its ONNX file.

    The file is written where it is not there.
    """
    if runtime == "compile":
        compiled = torch.compile(partial(call_model, model.eval()))
        return Wrapped(nn.Module(), lambda *_: compiled(example_inputs))
    if not path.exists():
        export_onnx(path, model, example_inputs)
    run = onnx_run(path, example_inputs)
    return Wrapped(nn.Module(), lambda *_: run())


def main(path: str) -> None:
    """Write the median milliseconds of both, one JSON line, to where the process that asked reads them."""
    # Whole networks, of any class: a file in a private folder that the process which asked made and takes away again.
    models, inputs, runtime, how = torch.load(path, weights_only=False)
    torch.set_num_threads(how["threads"])
    if runtime != "eager":
        models = _all_in_runtime(runtime, models, inputs, Path(path).parent)
        inputs = torch.empty(1)
    found = latencies(models, inputs, **how)
    sys.stdout.write(json.dumps({name: measured.median_ms for name, measured in found.items()}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
