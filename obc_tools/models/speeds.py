"""How fast networks are on this machine: by runtime, by threads, on a GPU where there is one, by examples at a time.

`python -m obc_tools.models.speeds FILE` times two networks in a process of its own, for `pruning.prune.measure_apart`.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from ..data.batches import to_device
from ..errors import check_name
from ..measure.latency import RUNTIMES, latencies, using_threads
from ..state import Wrapped, call_model
from .export import ExportError, export_onnx, onnx_run

logger = logging.getLogger(__name__)
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
