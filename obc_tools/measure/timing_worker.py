"""Time two networks in turns in this process, for `pruning.timed.measure_apart`, which wrote the file that it reads."""

from __future__ import annotations

import json
import sys

import torch

from .latency import latencies


def main(path: str) -> None:
    """Write the median milliseconds of both, one JSON line, to where the process that asked reads them."""
    # Whole networks, of any class: a file in a private folder that the process which asked made and takes away again.
    original, pruned, example_inputs, how = torch.load(path, weights_only=False)
    found = latencies({"original": original, "pruned": pruned}, example_inputs, **how)
    sys.stdout.write(json.dumps({name: measured.median_ms for name, measured in found.items()}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
