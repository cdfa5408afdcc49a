"""What keeping a training costs: `fit` of two checkouts in turns, in seconds of the processor, and a checkpoint's.

    git worktree add ../before 23a29da && python benchmarks/fit_cost.py ../before . [PAIRS]

ResNet-20 on digits, four epochs with a checkpoint each, one thread. Every figure is of a process of its own, after an
epoch that is not timed.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median


def once() -> None:
    """Train with the library of this process; print its seconds and a checkpoint's (of the processor, in all)."""
    import torch

    from obc_tools import Recipe, fit, load_data, load_model
    from obc_tools.training.folder import TrainingFolder

    torch.set_num_threads(1)
    data, saves, save = load_data("digits"), [], TrainingFolder.save

    def timed(folder: TrainingFolder, checkpoint: dict) -> None:
        start = time.process_time(), time.perf_counter()
        save(folder, checkpoint)
        saves.append((time.process_time() - start[0], time.perf_counter() - start[1]))

    TrainingFolder.save = timed
    for epochs in (1, 4):
        torch.manual_seed(0)
        model, saves[:] = load_model("resnet20", num_classes=10, in_channels=1), []
        with tempfile.TemporaryDirectory() as place:
            start = time.process_time()
            fit(
                *(model, data.batches("train", 64), data.batches("val", 256), Recipe(epochs=epochs, lr=0.1)),
                run=Path(place, "run"),
                progress=False,
            )
            seconds = time.process_time() - start
    print(seconds, *map(median, zip(*saves, strict=True)))


def main() -> None:
    before, now, *pairs = sys.argv[1:]
    ratios = []
    for number in range(int(*pairs or [10])):
        order = (before, now) if number % 2 else (now, before)
        found = {}
        for place in order:
            environment = os.environ | {"PYTHONPATH": str(Path(place).resolve()), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-c", "import runpy, sys; runpy.run_path(sys.argv[1])['once']()"]
            command.append(str(Path(__file__).resolve()))
            said = subprocess.run(command, cwd=place, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found[place] = list(map(float, said.stdout.split()))
        ratios.append(found[now][0] / found[before][0])
        print(f"fit {found[now][0]:.2f} s, before {found[before][0]:.2f} s, ratio {ratios[-1]:.3f}; a checkpoint "
              f"{found[now][1]:.4f} s of the processor, {found[now][2]:.4f} s in all; load {os.getloadavg()[0]:.0f}",
              flush=True)  # fmt: skip
    print(f"median of {len(ratios)}: {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
