"""Why random channels beat the Jacobian on a small network without labels: one thing changed at a time.

    python benchmarks/outputs_variants.py [--seeds 0 1 2] [--out results/outputs_variants.csv]

The ResNet-8 on single digits of benchmarks/tasks.py, pruned to half of its multiply-adds without labels and not
fine-tuned. Every variant begins with the same batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro
from tasks import CALIBRATION, Options, Original, original

from obc_tools import CRITERIA, cost, prune, prune_to, take
from obc_tools.scoring.criteria import resolve_criterion
from obc_tools.scoring.tasks import projected_outputs
from obc_tools.structure.layers import is_batch_norm

PROJECTIONS = 4
BY_IMAGE = ("jacobian", {"rows": "sample"})
WITHOUT_NORMS = dataclasses.replace(resolve_criterion(BY_IMAGE), applies=lambda layer: not is_batch_norm(layer))
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "jacobian, a row an image": {"criterion": BY_IMAGE},
    "a row a batch": {"criterion": CRITERIA["jacobian"]},
    f"{PROJECTIONS} projections an image": {"criterion": BY_IMAGE, "projections": PROJECTIONS},
    "without batch norm's members": {"criterion": WITHOUT_NORMS},
    "20 steps": {"criterion": BY_IMAGE, "steps": 20},
    "divided by each group's mean": {"criterion": BY_IMAGE, "normalizer": "mean"},
    "the same share of every group": {"criterion": BY_IMAGE, "scope": "local"},
    "per MAC that it saves": {"criterion": BY_IMAGE, "per": "macs"},
    "l2": {"criterion": "l2"},
    "l2, divided by each group's mean": {"criterion": "l2", "normalizer": "mean"},
    "l2, the same share of every group": {"criterion": "l2", "scope": "local"},
    "l2, per MAC that it saves": {"criterion": "l2", "per": "macs"},
    "random": {"criterion": "random"},
    "random, the same share of every group": {"criterion": "random", "scope": "local"},
}


@dataclass(frozen=True)
class Chosen:
    """What to run."""

    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = Path("results/outputs_variants.csv")


def measured(found: Original, seed: int, projections: int = 1, **how: Any) -> dict[str, Any]:
    """Prune and return what a row of the table says."""
    drawn = take(found.data.batches("train", found.setting.train.batch_size, seed=1000 + seed), CALIBRATION)
    batches = [(batch, number) for batch in list(drawn) for number in range(projections)]

    def objective(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return projected_outputs(found.task.forward, batch[1], model, batch[0])

    shared = {"steps": 5, "seed": seed, "progress": False, "objective": objective, "speedup": 2.0}
    plan = prune_to(found.model, found.example(), batches, **{**shared, **how})
    pruned = prune(found.model, plan)
    kept = {str(group.root): len(kept) for group, kept in zip(plan.groups, plan.kept, strict=True) if group.prunable}
    return {"cosine": found.measure(pruned), "parameters": cost(pruned, found.example()).params, "kept": str(kept)}


def rows(chosen: Chosen, done: Set[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """Yield the rows that are not there yet, seed by seed."""
    for seed in chosen.seeds:
        found = original("outputs", seed, Options())
        for variant, how in VARIANTS.items():
            if (variant, seed) in done:
                continue
            yield {"variant": variant, "seed": seed} | measured(found, seed, **how)


def main() -> None:
    """Measure the variants that are not there yet; print all means."""
    chosen = tyro.cli(Chosen, description=__doc__)
    torch.set_num_threads(1)
    table = pd.read_csv(chosen.out).to_dict("records") if chosen.out.exists() else []
    for row in rows(chosen, {(row["variant"], row["seed"]) for row in table}):
        table.append(row)
        pd.DataFrame(table).to_csv(chosen.out, index=False)
    grouped = pd.DataFrame(table).groupby("variant", sort=False)[["cosine", "parameters"]]
    print(grouped.agg(["mean", "std"]).round(3).to_string())


if __name__ == "__main__":
    main()
