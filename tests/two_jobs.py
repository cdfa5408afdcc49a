"""One of two processes of a job of which the first fails and lives on: python -m tests.two_jobs FOLDER RANK PORT WHEN.

WHEN it fails: "begin", as it prepares the job, or "plan", as it looks for the plan.
"""

import os
import sys
import time
from pathlib import Path

import torch

from obc_tools import PruningJob, Recipe, Target
from obc_tools.runs import pipeline

RECIPE = Recipe(epochs=1, lr=0.02, batch_size=64, augment=False)
JOB = PruningJob(
    title="two",
    model="resnet8",
    data="digits",
    model_options={"width": 2},
    target=Target(speedup=1.3),
    train_images=128,
    val_images=32,
    batches=1,
    batch_size=64,
    steps=1,
    pretrain=RECIPE,
    finetune=RECIPE,
    device="cpu",
)


def failing(*arguments, criterion="", **options):
    if criterion != "random":
        raise ValueError("no room for scores")


def unprepared(job):
    raise ValueError("no data here")


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ |= {"RANK": sys.argv[2], "LOCAL_RANK": sys.argv[2], "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[3]}
    first = sys.argv[2] == "0"
    if first and sys.argv[4] == "begin":
        pipeline.prepare = unprepared
    elif first:
        pipeline.find_plan = failing
    try:
        pipeline.work_on(JOB, Path(sys.argv[1]), progress=False)
    except ValueError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    if first:
        time.sleep(600)
    torch.distributed.destroy_process_group()
