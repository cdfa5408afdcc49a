"""Send what the library logs somewhere for a while: a file, the terminal."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
