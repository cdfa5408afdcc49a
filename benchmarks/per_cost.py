"""Whether channels should be ranked by score alone or by score over the MACs that they save, without fine-tuning.

    python benchmarks/per_cost.py resnet56 --weights FILE --root FILE.npz
    python benchmarks/per_cost.py efficientnet --weights FILE --root DIR

Networks, data, held-out images and steps of `compensation.py`: each criterion to the same MACs with `per=None` and
`per="macs"`, from the same batches (a draw). Every row is written when it is known; what is there is not done again.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
import tyro
from compensation import STEPS, Setting, efficientnet, resnet56

from obc_tools import cost, evaluate, prune, prune_to, take
from obc_tools.files import environment

KEYS = ("network", "target", "criterion", "per", "draw")


@dataclass(frozen=True)
class Options:
    """What to run."""

    what: tyro.conf.Positional[Literal["resnet56", "efficientnet"]]
    weights: Path
    root: Path
    out: Path = Path("results/per_cost.csv")
    targets: tuple[float, ...] = ()
    criteria: tuple[str, ...] = ("jacobian", "taylor", "l2")
    draws: tuple[int, ...] = (0,)


def measured(setting: Setting, job: tuple) -> dict[str, Any]:
    """Return one row of the table."""
    _, target, criterion, per, draw = job
    size, count = setting.scoring
    batches = take(setting.data.batches("train", size, seed=draw), count)
    how = {"criterion": criterion, "per": None if per == "none" else per, "steps": STEPS, "progress": False}
    network = prune(setting.model, prune_to(setting.model, setting.example, batches, **how, **setting.target(target)))
    result, left = evaluate(network, setting.held_out), cost(network, setting.example)
    about = environment(torch.device("cpu"))
    return dict(zip(KEYS, job, strict=True)) | {
        "accuracy": result.accuracy,
        "loss": round(result.loss, 5),
        "held-out images": result.examples,
        "MACs": round(left.macs),
        "parameters": left.params,
        "hardware": f"{about['cpu']}, {about['threads']} thread",
        "torch": about["libraries"]["torch"],
    }


def main() -> None:
    """Measure what is missing in the table, row by row."""
    options = tyro.cli(Options)
    torch.set_num_threads(1)
    setting = {"resnet56": resnet56, "efficientnet": efficientnet}[options.what](options)
    rows = pd.read_csv(options.out).to_dict("records") if options.out.exists() else []
    done = {tuple(row[key] for key in KEYS) for row in rows}
    targets = options.targets or setting.targets
    for draw, target, criterion, per in itertools.product(options.draws, targets, options.criteria, ("none", "macs")):
        job = (options.what, target, criterion, per, draw)
        if job not in done:
            rows.append(measured(setting, job))
            pd.DataFrame(rows).to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
