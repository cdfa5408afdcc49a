"""python -m obc_tools.grid_worker FOLDER works on a launched grid."""

import sys
from pathlib import Path

from .runs.grid import Grid

if __name__ == "__main__":
    Grid(Path(sys.argv[1])).work()
