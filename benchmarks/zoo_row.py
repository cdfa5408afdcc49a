"""What the zoo does with one network: find groups, prune two ways, prove, save, load, export; a row of a table."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flops import counted_by_torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from zoo_models import OTHER_TASKS, Case, build, example, randomize
from zoo_tasks import DETECTORS, real_loss

from obc_tools import cost, find_groups, load_pruned, make_plan, prune, prune_to, save_pruned, score_groups
from obc_tools.models.runtimes import export_onnx
from obc_tools.pruning.check import WRONG, Check, CheckError, Finding, check_plan
from obc_tools.pruning.plan import PruningPlan
from obc_tools.state import call_model

RATIO, SPEEDUP = 0.3, 1.5
LEAST_EFFECT = 1e-3
"""How much pruning must change the output, relative to its scale, for an equality to mean something."""

COUNTS_BOUND = 1e-9
"""Bound on the relative difference of two counts of multiply-adds."""

ONNX_BOUND = 1e-3
"""Bound on the difference of an exported network: random weights amplify rounding (in double from 1e-16 to 1e-12)."""

COLUMNS = (
    "source", "model", "params", "input", "reduced", "groups", "prunable", "pruned 0.3", "loss", "speed-up", "by torch",
    "MACs = FLOPs/2", "masked = pruned", "EP = naive", "merge = EP", "save/load", "ONNX", "seconds", "ok", "reason",
)  # fmt: skip


class WrongError(Exception):
    """An output that is not what it must be: the one thing that the zoo must never find."""


class UnclearError(Exception):
    """A part of the proof that cannot tell, or ended in an error which is not of the library's own kind."""


@dataclass
class Row:
    """One line of the table, filled in as far as the network gets."""

    case: Case
    values: dict[str, object] = field(default_factory=dict)

    def fill(self) -> dict[str, object]:
        """Take the network through everything; return the row: seconds of computing, the reason where it stopped."""
        start = time.process_time()
        self.values = dict.fromkeys(COLUMNS, "") | {"source": self.case.source, "model": self.case.name}
        self.values |= {"reduced": self.case.reduced, "ONNX": "-", "ok": False}
        try:
            self._measure()
            self.values["ok"] = True
        except WrongError as error:
            self.values["reason"] = f"WRONG: {error}"
        except UnclearError as error:
            self.values["reason"] = f"unclear: {error}"
        except ValueError as error:
            self.values["reason"] = f"refused: {_describe(error)}"
        except Exception as error:
            self.values["reason"] = f"unclear: {_describe(error)}"
        return self.values | {"seconds": round(time.process_time() - start, 1)}

    def _measure(self) -> None:
        model, inputs = build(self.case), example(self.case)
        randomize(model, inputs)
        self.values["params"] = sum(parameter.numel() for parameter in model.parameters())
        first = tree_leaves(inputs)[0]
        self.values["input"] = "x".join(map(str, first.shape[1:]))
        groups = find_groups(model, inputs)
        self.values |= {"groups": len(groups), "prunable": sum(group.prunable for group in groups)}
        scores = score_groups(model, groups, "l1")
        plan = make_plan(scores, ratio=RATIO, scope="local")
        if not plan.channels_removed:
            raise ValueError("nothing can be pruned: " + "; ".join(sorted({g.kept_whole or "" for g in groups})[:3]))
        self.values["pruned 0.3"] = round(plan.channels_removed / plan.channels, 3)
        self._prune_to_speed(model, inputs)
        self._prove(check_plan(model, plan, inputs))
        pruned = prune(model, plan)
        self._save_and_load(pruned, plan, inputs)
        if self.case.onnx:
            self._export(pruned, inputs)

    def _prune_to_speed(self, model: nn.Module, inputs: Any) -> None:
        how = {"criterion": "l1"}
        if (self.case.source, self.case.name) in OTHER_TASKS:
            objective, batch = real_loss(self.case.source, self.case.name, model, inputs)
            how = {"criterion": "jacobian", "batches": [batch], "objective": objective}
            self.values["loss"] = getattr(objective, "func", objective).__name__.strip("_").replace("_", " ")
        plan = prune_to(model, inputs, speedup=SPEEDUP, scope="local", steps=1, progress=False, **how)
        pruned = prune(model, plan)
        ours, torchs = ([count(net, _one(inputs)) for net in (model, pruned)] for count in (_macs, counted_by_torch))
        reached = ours[0] / ours[1]
        error = max(abs(one / other - 1) for one, other in zip(ours, torchs, strict=True))
        self.values |= {"speed-up": round(reached, 3), "by torch": round(torchs[0] / torchs[1], 3)}
        self.values["MACs = FLOPs/2"] = f"{error:.1e}"
        if error > COUNTS_BOUND and not self._by_data:
            raise WrongError(f"MACs of the network and pruned to {SPEEDUP}x {ours}, half of torch's FLOPs {torchs}")
        if reached < SPEEDUP or not _run(pruned, inputs).isfinite().all():
            raise WrongError(f"pruned to {SPEEDUP}x: speed-up {reached:.3f}, or an output that is not finite")

    @property
    def _by_data(self) -> bool:
        """Whether the network's work depends on what it finds, as that of detectors on their boxes."""
        return self.case.name in DETECTORS

    def _prove(self, check: Check) -> None:
        errors = {finding.name: finding.error for finding in check.findings}
        columns = {
            "masked = pruned": "pruned = masked",
            "EP = naive": "EP = naive",
            "merge = EP": "merge = EP, maps disturbed",
        }
        for column, name in columns.items():
            if name in errors:
                self.values[column] = f"{errors[name]:.1e}"
        failed = [finding for finding in check.findings if finding.verdict == WRONG]
        if failed:
            kind = WrongError if any(not finding.note for finding in failed) else _kind(failed)
            raise kind("; ".join(map(str, failed)))
        if not check.ok:
            raise UnclearError("; ".join(str(finding) for finding in check.findings if not finding.ok))
        if not check.effect > LEAST_EFFECT:
            raise WrongError(f"pruning changes the output by {check.effect:.1e} of its scale: nothing was shown")

    def _save_and_load(self, pruned: nn.Module, plan: PruningPlan, inputs: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            save_pruned(Path(folder) / "saved", pruned, plan)
            loaded = load_pruned(Path(folder) / "saved", model=build(self.case, seed=1))
        self.values["save/load"] = "equal"
        if not torch.equal(_run(loaded, inputs), _run(pruned, inputs)):
            self.values["save/load"] = "different"
            raise WrongError("the loaded model's output is not that of the saved one")

    def _export(self, pruned: nn.Module, inputs: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            written = export_onnx(Path(folder) / "model.onnx", pruned, inputs, tolerance=ONNX_BOUND)
        self.values["ONNX"] = f"{written.error:.1e}"


def _macs(model: nn.Module, inputs: Any) -> float:
    return cost(model, inputs).macs


def _kind(failed: list[Finding]) -> type[Exception]:
    """Return CheckError where every part of the proof was refused by an error of the ValueError family."""
    refusals = {"ValueError"} | {kind.__name__ for kind in _family(ValueError)}
    return CheckError if all(finding.note.partition(":")[0] in refusals for finding in failed) else UnclearError


def _family(kind: type[Exception]) -> Iterator[type[Exception]]:
    for child in kind.__subclasses__():
        yield child
        yield from _family(child)


def _one(inputs: Any) -> Any:
    """Return a batch of the first example; lists are of examples."""
    if isinstance(inputs, tuple):
        return tuple(map(_one, inputs))
    return {key: _one(value) for key, value in inputs.items()} if isinstance(inputs, dict) else inputs[:1]


@torch.no_grad()
def _run(model: nn.Module, inputs: Any) -> Tensor:
    parts = [leaf for leaf in tree_leaves(call_model(model.eval(), inputs)) if isinstance(leaf, Tensor)]
    return parts[0] if len(parts) == 1 else torch.cat([part.flatten().double() for part in parts])


def _describe(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]
