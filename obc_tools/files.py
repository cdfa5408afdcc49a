"""Files that are complete or not there, logs that go to one, and what figures depend on: hardware and versions."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

LOGGER = "obc_tools"


@contextmanager
def logging_to(handler: logging.Handler) -> Iterator[None]:
    """Hand what the library logs, at level INFO and above, to a handler too, which is closed on the way out."""
    logger = logging.getLogger(LOGGER)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()


@contextmanager
def logging_to_file(path: Path) -> Iterator[None]:
    """Append what the library logs, with the time, to a file."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    with logging_to(handler):
        yield


LIBRARIES = ("obc_tools", "torch", "torchvision", "timm", "torch-pruning", "accelerate", "numpy")


def environment(device: Any) -> dict[str, Any]:
    """Return what the figures of a run on a torch device depend on beside its job: hardware and versions."""
    import torch  # not above: the command line's help needs this file and should come at once

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_text(path: Path, text: str) -> None:
    """Write a text file, and the folders to it, so that it is the old one or the new one whenever the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)
