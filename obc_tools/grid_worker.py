"""The process that works on a launched grid: python -m obc_tools.grid_worker FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

from .grid import Grid

if __name__ == "__main__":
    Grid(Path(sys.argv[1])).work()
