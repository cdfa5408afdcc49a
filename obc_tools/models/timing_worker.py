"""Time two networks in turns in this process, for `pruning.timed.measure_apart`, which wrote the file that it reads."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..measure.latency import latencies
from ..state import Wrapped, call_model


def in_runtime(runtime: str, model: nn.Module, example_inputs: Any, path: Path) -> Wrapped:
    """Return what runs a model on its inputs, whatever it is called with; ``path`` is that of its ONNX file.

    The file is written where it is not there.
    """
    if runtime == "compile":
        compiled = torch.compile(partial(call_model, model.eval()))
        return Wrapped(nn.Module(), lambda *_: compiled(example_inputs))
    from .export import export_onnx, onnx_run  # what a process needs for ONNX alone takes seconds to load

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
        files = {name: Path(path).with_name(f"{name}.onnx") for name in models}
        models = {name: in_runtime(runtime, model, inputs, files[name]) for name, model in models.items()}
        inputs = torch.empty(1)
    found = latencies(models, inputs, **how)
    sys.stdout.write(json.dumps({name: measured.median_ms for name, measured in found.items()}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
