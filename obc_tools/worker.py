"""python -m obc_tools.worker FOLDER works on a launched run."""

import sys
from pathlib import Path

from .runs.run import work_on_run

if __name__ == "__main__":
    sys.exit(work_on_run(Path(sys.argv[1])))
