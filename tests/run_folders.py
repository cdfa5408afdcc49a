"""Folders as runs leave them while they train, without a training."""

import json
import os
import time
from dataclasses import asdict

from obc_tools.files import process_identity
from obc_tools.pruning.choices import Target
from obc_tools.runs.job import PruningJob
from obc_tools.training.folder import Epoch
from obc_tools.training.recipe import Recipe

TRAINED = Recipe(epochs=4)
JOB = PruningJob(
    title="tiny", model="resnet8", data="digits", target=Target(speedup=1.3), pretrain=TRAINED, finetune=TRAINED
)
PLACE = {"epoch": 2, "step": 5, "steps": 10, "lr": 0.1, "epochs": 4, "loss": 0.5, "accuracy": 0.75}
PLACE |= {"images_per_second": 1234.5, "gpu_memory": 3 * 2**30}


def epochs(count, seconds=60.0):
    return [Epoch(i, 0.1, 1 / i, 0.5, 1.5 / i, 0.6, seconds, 900.0) for i in range(1, count + 1)]


def detections(count):
    """Epochs of a detector: the second is the best."""
    values = [{"map50": 0.4 - 0.1 * abs(i - 2), "map": 0.2} for i in range(1, count + 1)]
    directions = {"map50": "higher", "map": "higher"}
    return [Epoch(i, 0.1, 1 / i, None, None, None, 60.0, 900.0, v, directions) for i, v in enumerate(values, 1)]


def write(folder, key="naive", done=1, running=True, made=epochs, **place):
    """Leave in a folder what a run leaves there while it trains."""
    training = folder / f"training_{key}"
    training.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(JOB.to_dict()))
    (training / "metrics.jsonl").write_text("".join(json.dumps(asdict(e)) + "\n" for e in made(done)))
    (training / "progress.json").write_text(json.dumps(PLACE | {"time": time.time()} | place))
    (folder / "run.log").write_text("".join(f"line {i} <b>\n" for i in range(40)))
    if running:
        (folder / "process.json").write_text(json.dumps(process_identity(os.getpid())))
    else:
        (folder / "process.json").unlink(missing_ok=True)
        (folder / "stopped.json").write_text("{}")
    return folder
