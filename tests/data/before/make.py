"""Write the files beside this one; run once, with the package of commit be0ceb9, before plans and jobs knew a count.

They show that what was written then opens, reloads and resumes today.
"""

import os
import shutil
import sys
from pathlib import Path

import torch
from obc_tools.grid import Grid, GridJob, launch_grid
from obc_tools.recipe import Recipe
from obc_tools.slurm import write_slurm_script

import obc_tools as obc
from obc_tools.runs import work_on
from obc_tools.training import Stopped

HERE = Path(__file__).parent
FINETUNE = Recipe(epochs=2, lr=0.02, batch_size=16)
JOB = obc.PruningJob(
    title="before",
    model="resnet8",
    model_options={"width": 2},
    data="digits",
    train_images=48,
    val_images=16,
    target=obc.Target(speedup=1.3),
    criterion="l2",
    batches=1,
    batch_size=16,
    steps=2,
    pretrain=Recipe(epochs=1, lr=0.05, batch_size=16),
    finetune=FINETUNE,
    equivalent=True,
    device="cpu",
)


def network():
    torch.manual_seed(0)
    return obc.load_model("resnet8", 10, in_channels=1, width=2)


def main():
    torch.set_num_threads(1)
    finished, interrupted = HERE / "finished", HERE / "interrupted"
    for folder in (finished, interrupted, HERE / "comparison", HERE / "grid", HERE / "slurm"):
        shutil.rmtree(folder, ignore_errors=True)
    work_on(JOB, finished, progress=False)
    for name in ("pruned", "naive"):
        shutil.rmtree(finished / name)
    calls = []

    def stop():
        calls.append(1)
        return len(calls) > 2

    try:
        work_on(JOB, interrupted, stop=stop, progress=False)
    except Stopped:
        print("interrupted with", sorted(path.name for path in interrupted.iterdir()))
    data = obc.load_data("digits").limited(48, 16)
    options = {"steps": 3, "ratio": 0.4, "batches": 1, "batch_size": 16, "progress": False}
    obc.compare_criteria(network(), data, ["l1", "jacobian"], repeats=1, folder=HERE / "comparison", **options)
    (HERE / "comparison" / "curve_jacobian_0.json").unlink()
    Grid.resume = lambda self: self
    launch_grid([GridJob("one", JOB), GridJob("two", JOB)], HERE / "grid")
    script = write_slurm_script(JOB, HERE / "slurm")
    text = script.read_text().replace(str(HERE / "slurm"), "FOLDER").replace(sys.executable, "python")
    script.write_text(text)
    for unneeded in (*HERE.rglob("tensorboard"), *finished.rglob("checkpoint.pt")):
        shutil.rmtree(unneeded) if unneeded.is_dir() else unneeded.unlink()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
