"""What becomes of a random network in the library: right, wrong, refused; the share of its channels that may go."""

from __future__ import annotations

import csv
import json
import sys
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from random_networks import Known, build
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from obc_tools import analyse, make_plan, prune, score_groups
from obc_tools.pruning.check import WRONG, CheckError, check_plan

BOUND = 1e-8


def examine(seed: int, check: bool = False) -> dict[str, object]:
    """Prune a seed's network at random and by hand; return the verdict and (prunable, removable) of each kind.

    Also how many channels went, and by how much of the largest output that changed the outputs.

    Verdicts: right, "wrong: …", "refused: …" (an error of the ValueError family), "crash: …" and,
    with ``check``, "false alarm: …" or "cannot tell: …" of `check_plan`.
    """
    known = build(seed)
    row: dict[str, object] = {"seed": seed, "verdict": "right", "kinds": {}}
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    try:
        groups, costs = analyse(known.network, inputs)
        row["kinds"] = _kinds(known, groups)
        share = float(np.random.default_rng(seed).uniform(0.2, 0.7))
        plan = make_plan(score_groups(known.network, groups, "random", seed=seed), ratio=share, scope="local")
        pruned = prune(known.network, plan)
    except ValueError as error:
        return row | {"verdict": f"refused: {error}"}
    gone = set()
    for (layer, axis), kept in plan.shrunk.items():
        channels = known.along(layer, axis)
        if channels is not None:
            gone |= {int(c) for position, c in enumerate(channels) if position not in set(kept)}
    row |= {"removed": plan.channels_removed, "changed": _difference(pruned, known.network, inputs)}
    row["verdict"] = _verdict(known, pruned, gone, inputs, generator)
    predicted, counted = costs.of(plan).macs, _counted(pruned, inputs) / len(inputs)
    routed = "experts" in known.maker.kinds  # which rows an expert sees changes with pruning
    if row["verdict"] == "right" and not routed and abs(predicted - counted) > 1e-9 * counted:
        row["verdict"] = f"wrong: {predicted:g} MACs predicted, {counted:g} counted"
    if check and row["verdict"] == "right":
        row["verdict"] = _alarm(known, plan, inputs)
    return row


def _alarm(known: Known, plan, inputs: Tensor) -> str:
    """Return what `check_plan` says of a plan that is right."""
    try:
        findings = check_plan(known.network, plan, inputs).findings
    except CheckError as error:
        return f"cannot tell: {error}"
    return next((f"false alarm: {finding}" for finding in findings if finding.verdict == WRONG), "right")


def _kinds(known: Known, groups) -> dict[str, tuple[int, int]]:
    prunable = set()
    for group in groups:
        for member in group.members if group.prunable else ():
            channels = known.along(*member.axis)
            if channels is not None:
                prunable |= {int(channels[position]) for position in member.positions}
    maker, found, all_ = known.maker, Counter(), Counter()
    for channel, (kind, removable) in enumerate(zip(maker.kinds, maker.removable, strict=True)):
        if removable:
            all_[kind] += 1
            found[kind] += channel in prunable
    return {kind: (found[kind], count) for kind, count in all_.items()}


def _verdict(known: Known, pruned, gone: set[int], inputs: Tensor, generator: torch.Generator) -> str:
    oracle = known.without(gone)
    shapes = [{k: tuple(v.shape) for k, v in net.state_dict().items()} for net in (oracle, pruned)]
    unequal = [name for name in shapes[0] if shapes[0][name] != shapes[1][name]]
    if unequal:
        name = unequal[0]
        return f"wrong: {name} is {shapes[1][name]}, by hand {shapes[0][name]}"
    more = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 3, 8, 8), (1, 3, 12, 12))]
    for x in (inputs, *more):
        error = _difference(pruned, oracle, x)
        if not error < BOUND:
            return f"wrong: outputs differ by {error:.1e} on {tuple(x.shape)}"
    return "right"


@torch.no_grad()
def _difference(one, other, x: Tensor) -> float:
    """Return the largest difference of two networks' outputs, relative to the other's largest."""
    expected = other(x)
    return float((one(x) - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


@torch.no_grad()
def _counted(network, x: Tensor) -> float:
    # The counter does not know the CPU's own fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(x)
    return counter.get_total_flops() / 2


def examine_safely(seed: int, check: bool = False) -> dict[str, object]:
    """Return `examine`'s row, also where something raises what it should not."""
    try:
        return examine(seed, check)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return {
            "seed": seed,
            "verdict": f"crash: {type(error).__name__}: {error} ({Path(where.filename).name})",
            "kinds": {},
        }


def shares(rows: list[dict[str, object]]) -> dict[str, tuple[int, int]]:
    """Return the prunable and the removable channels of each kind over all networks."""
    total: dict[str, tuple[int, int]] = {}
    for row in rows:
        for kind, (found, count) in row["kinds"].items():
            one, other = total.get(kind, (0, 0))
            total[kind] = one + found, other + count
    return dict(sorted(total.items()))


def read_rows(path: Path) -> list[dict[str, object]]:
    """Return the rows of a table that `main` wrote."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as lines:
        return [row | {"seed": int(row["seed"]), "kinds": json.loads(row["kinds"])} for row in csv.DictReader(lines)]


def main(count: int, path: Path) -> int:
    """Examine seeds 0 to count − 1 that the table lacks; append rows; print the summary of the whole table."""
    rows = read_rows(path)
    done = {row["seed"] for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as lines:
        table = csv.writer(lines)
        if not done:
            table.writerow(["seed", "verdict", "kinds"])
        for seed in range(count):
            if seed not in done:
                rows.append(row := examine_safely(seed, check=True))
                table.writerow([seed, " ".join(str(row["verdict"]).split()), json.dumps(row["kinds"])])
                lines.flush()
    return report(rows)


def report(rows: list[dict[str, object]]) -> int:
    """Print verdicts and each kind's share of prunable channels; return 1 where anything is wrong, else 0."""
    for verdict, number in Counter(str(row["verdict"]).partition(":")[0] for row in rows).items():
        print(f"{verdict:12} {number}")
    found = shares(rows)
    found["all"] = sum(one for one, _ in found.values()), sum(other for _, other in found.values())
    for kind, (one, other) in found.items():
        print(f"{kind:32} {one:6} of {other:6} prunable  {one / other:.0%}")
    return int(any(str(row["verdict"]).startswith(("wrong", "crash", "false")) for row in rows))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2])))
