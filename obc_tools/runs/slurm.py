"""A script for the SLURM scheduler that works on a run folder, on one node or several."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from ..files import write_text
from .experiments import Experiment
from .folder import check_run_folder, write_job
from .job import PruningJob
from .run import job_of

SCRIPT = "run.slurm"

TEMPLATE = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --cpus-per-task={cpus}
#SBATCH --time={time}
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --output={folder}/slurm-%j.log
# Submitted again, or requeued, it goes on from the last checkpoint.
rm -f {folder}/stop {folder}/stopped.json {folder}/error.json
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun {python} -m torch.distributed.run \\
    --nnodes={nodes} --nproc_per_node={gpus} \\
    --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$head:{port}" \\
    -m obc_tools.worker {folder}
"""


def write_slurm_script(
    experiment: str | Experiment | PruningJob,
    folder: str | os.PathLike[str],
    *,
    nodes: int = 1,
    gpus: int = 4,
    cpus: int = 32,
    time: str = "24:00:00",
    port: int = 29500,
    small: bool = False,
    **options: object,
) -> Path:
    """Write a run folder with its job and a script for sbatch; return the script's path.

    Args:
        experiment, small, **options: As of `launch`.
        folder: The run's folder, on a disk that all nodes share.
        nodes, gpus, cpus: Nodes, GPUs a node, CPUs a node.
        time: Longest duration, as SLURM writes it; two minutes before its end the run saves a checkpoint and stops.
        port: Where the nodes find each other, on the first of them.

    Raises:
        ValueError: for a folder in use, counts below 1, and what the experiment raises.
    """
    if min(nodes, gpus, cpus) < 1:
        raise ValueError(f"nodes={nodes}, gpus={gpus}, cpus={cpus}: at least 1 each")
    job, path = job_of(experiment, small=small, **options), Path(folder).resolve()
    check_run_folder(path, overwrite=False)
    write_job(path, job)
    values = {"name": path.name, "nodes": nodes, "gpus": gpus, "cpus": cpus, "time": time, "port": port}
    text = TEMPLATE.format(**values, folder=shlex.quote(str(path)), python=shlex.quote(sys.executable))
    write_text(path / SCRIPT, text)
    return path / SCRIPT
