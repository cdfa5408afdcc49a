"""How fast networks are on this machine: by runtime, by threads, on a GPU where there is one, by examples at a time."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from ..data.batches import to_device
from ..errors import check_name
from ..measure.latency import latencies, using_threads
from .export import ExportError
from .timing_worker import in_runtime

logger = logging.getLogger(__name__)
RUNTIMES = ("eager", "onnxruntime", "compile")
GPU = "eager, GPU"


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
                files = {name: folder / f"{number}.onnx" for number, name in enumerate(models)}
                models = {name: in_runtime(runtime, model, inputs, files[name]) for name, model in models.items()}
            except ExportError as error:
                logger.warning("latencies leave out %s, %d at a time: %s", runtime, examples, error)
                return None
            inputs = torch.empty(1)
        frame = latencies(models, inputs, **how).to_frame()
    figures = ["median (ms)", "first quartile (ms)", "third quartile (ms)", "speed-up"]
    return frame.assign(runtime=runtime, examples=examples)[["runtime", "threads", "examples", "model", *figures]]
