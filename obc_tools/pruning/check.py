"""Prove, on the user's own network, that a plan does what it says: pruned = masked, EP = naive, merge = EP, costs.

Errors are relative to the output's scale: the largest difference between the outputs of two networks over the largest
deviation of an output from the mean over the examples, so that a bias that all examples share hides nothing. Forward
passes run in float64: a check needs four of one small batch, so that double costs little, and the rounding of float32
would grow with depth until a small wrong coupling is lost in it.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..measure.costs import Cost, CostModel, cost, cost_model
from ..state import call_model, hooks
from ..structure.groups import loses_heads
from ..structure.layers import LayerAxis, activation_dim, is_norm, scored_layers
from ..structure.tracing import trace_model
from .equivalent import EquivalentModel
from .masking import masked
from .plan import PruningPlan, prune

logger = logging.getLogger(__name__)

TOLERANCE = 1e-6
"""Default bound on relative errors: far above double rounding, far below what any wrongly coupled channel causes."""

DISTURBANCE = 0.1
"""How much random matrices change the signal behind each map of Equivalent Pruning, relative to it."""


SINGLE_TOLERANCE = 1e-3
"""Bound on relative errors of a network that does not run in double precision."""


ROUNDING = 1e-9
"""Bound on the relative error of predicted costs, which are sums of whole numbers."""


class CheckError(ValueError):
    """A plan that was proven wrong, or a network on which nothing can be proven."""


class ProofError(CheckError):
    """A plan whose pruned network is not what it must be. ``plan`` is the plan."""

    def __init__(self, message: str, plan: PruningPlan):
        super().__init__(message)
        self.plan = plan


@dataclass(frozen=True)
class Finding:
    """One comparison: the error found and the bound on it.

    ``differs``: the error must exceed the bound, not stay below it (a comparison that shows others to have power).
    ``note`` says what went wrong where nothing could be compared; ``error`` is then infinite.
    """

    name: str
    error: float
    bound: float
    differs: bool = False
    note: str = ""

    @property
    def ok(self) -> bool:
        """Say whether the comparison came out as it must."""
        return not self.note and (self.error > self.bound) == self.differs

    def __str__(self) -> str:
        relation = "at least" if self.differs else "at most"
        return f"{self.name}: " + (self.note or f"{self.error:.2g}, must be {relation} {self.bound:.2g}")


@dataclass(frozen=True, repr=False)
class Check:
    """What `check_plan` found. ``effect``: how much pruning changes the output, relative to its scale."""

    findings: tuple[Finding, ...]
    effect: float

    @property
    def ok(self) -> bool:
        """Say whether every comparison came out as it must."""
        return all(finding.ok for finding in self.findings)

    def error_of(self, name: str) -> float:
        """Return the error of one comparison by its name."""
        return next(finding.error for finding in self.findings if finding.name == name)

    def raise_if_failed(self) -> None:
        """Raise CheckError with every failed comparison, if there is one."""
        if not self.ok:
            raise CheckError("; ".join(str(finding) for finding in self.findings if not finding.ok))

    def to_frame(self) -> pd.DataFrame:
        """Return one row a comparison: its name, the error, the bound on it, whether it is met, and a note."""
        rows = [(f.name, f.error, f"{'≥' if f.differs else '≤'} {f.bound:.2g}", f.ok, f.note) for f in self.findings]
        return pd.DataFrame(rows, columns=["check", "error", "bound", "ok", "note"])

    def __repr__(self) -> str:
        return f"{self._title()}\n{self.to_frame().to_string(index=False, float_format='{:.2g}'.format)}"

    def _repr_html_(self) -> str:
        return f"<b>{self._title()}</b>{self.to_frame().to_html(index=False, float_format='{:.2g}'.format)}"

    def _title(self) -> str:
        failed = sum(not finding.ok for finding in self.findings)
        verdict = f"{failed} of {len(self.findings)} checks failed" if failed else "all checks passed"
        return f"Check: {verdict}; pruning changes the output by {self.effect:.2g} of its scale"


def check_plan(
    model: nn.Module,
    plan: PruningPlan,
    example_inputs: Any,
    *,
    tolerance: float = TOLERANCE,
    dtype: torch.dtype | None = torch.float64,
    costs: CostModel | None = None,
    seed: int = 0,
) -> Check:
    """Compare what a plan makes of a network with what it must be.

    - pruned = masked: `prune` against a network of full size whose removed channels are zeroed (`masking.masked`),
    - EP = naive: a fresh `EquivalentModel` against the pruned network,
    - merge = EP, after its maps were disturbed at random as training would; that must differ from naive,
    - costs: MACs and parameters as `cost_model` predicts them against those counted on the pruned network.

    Args:
        model: the unpruned network; left unchanged. All runs are in eval mode.
        example_inputs: what one forward pass takes; two or more examples that differ.
        tolerance: bound on errors relative to the output's scale.
        dtype: of the forward passes; None leaves the model's own, for networks that insist on it (raise ``tolerance``).
        costs: of the model; learnt here if not given.
        seed: of the disturbance.

    Raises:
        PlanMismatchError: the plan does not fit the model.
        CheckError: the model's output does not depend on its input, or is not finite, so that nothing can be told.
    """
    plan.validate(model)
    counted = _count(model, plan, example_inputs, costs)
    original = copy.deepcopy(model).eval()
    if dtype is not None:
        original, example_inputs = original.to(dtype), tree_map(lambda leaf: _cast(leaf, dtype), example_inputs)
    outputs = _Outputs(example_inputs, tolerance)
    whole = outputs.of(original)
    _check_telling(whole)
    try:
        naive = outputs.of(prune(original, plan))
    except Exception as error:
        return Check((Finding("pruned = masked", math.inf, tolerance, note=_describe(error)), *counted), math.nan)
    findings = [
        outputs.compare("pruned = masked", lambda: masked(original, plan), naive),
        *_check_equivalent(original, plan, naive, outputs, seed),
        *counted,
    ]
    return Check(tuple(findings), relative_error(whole, naive))


def _check_equivalent(
    model: nn.Module, plan: PruningPlan, naive: list[Tensor], outputs: _Outputs, seed: int
) -> list[Finding]:
    try:
        equivalent = EquivalentModel(model, plan)
    except Exception as error:
        return [Finding("EP = naive", math.inf, outputs.tolerance, note=_describe(error))]
    findings = [outputs.compare("EP = naive", lambda: equivalent, naive)]
    if equivalent.mixed_layers and findings[0].ok:
        _disturb(equivalent, seed)
        trained = outputs.of(equivalent)
        findings.append(outputs.compare("merge = EP, maps disturbed", equivalent.merge, trained))
        error = relative_error(naive, trained)
        findings.append(Finding("disturbed maps change the output", error, outputs.tolerance, differs=True))
    return findings


@dataclass(frozen=True)
class _Outputs:
    """Runs networks on the same inputs."""

    inputs: Any
    tolerance: float

    @torch.no_grad()
    def of(self, model: nn.Module) -> list[Tensor]:
        with torch.random.fork_rng():  # networks may add noise
            torch.manual_seed(0)
            output = call_model(model.eval(), tree_map(_copy, self.inputs))
        return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]

    def compare(self, name: str, build: Callable[[], nn.Module], expected: list[Tensor]) -> Finding:
        """Compare a network's output with another's; a network that cannot be built or run is a finding too."""
        try:
            return Finding(name, relative_error(expected, self.of(build())), self.tolerance)
        except Exception as error:
            return Finding(name, math.inf, self.tolerance, note=_describe(error))


def relative_error(expected: list[Tensor], found: list[Tensor]) -> float:
    """Return the largest difference between two lists of outputs, each relative to the expected one's scale."""
    if [leaf.shape for leaf in expected] != [leaf.shape for leaf in found]:
        return math.inf
    errors = [(a - b).abs().max().item() / _scale(a) for a, b in zip(expected, found, strict=True) if a.numel()]
    return max((math.inf if math.isnan(error) else error for error in errors), default=0.0)


def _scale(output: Tensor) -> float:
    """Return the largest deviation from the mean over the examples, or from 0 where that is all the same."""
    several = output.dim() > 0 and len(output) > 1
    deviation = (output - output.mean(0) if several else output).abs().max().item()
    return deviation or output.abs().max().item() or 1.0


def _check_telling(outputs: list[Tensor]) -> None:
    if not outputs:
        raise CheckError("the model returns no floating-point tensor")
    if not all(leaf.isfinite().all() for leaf in outputs):
        raise CheckError("the unpruned model's output is not finite")
    varied = [leaf for leaf in outputs if leaf.dim() and len(leaf) > 1 and leaf.numel()]
    if varied and all(torch.equal(leaf, leaf[:1].expand_as(leaf)) for leaf in varied):
        raise CheckError("the unpruned model's output is the same for all examples; give inputs that differ")


def _count(model: nn.Module, plan: PruningPlan, inputs: Any, costs: CostModel | None) -> list[Finding]:
    """Compare predicted with counted costs: relative errors, which must be zero."""
    try:
        predicted, counted = (
            (costs or cost_model(model, inputs, whole_heads=loses_heads(plan.groups))).of(plan),
            cost(prune(model, plan), inputs),
        )
    except Exception as error:
        return [Finding("costs predicted = counted", math.inf, 0.0, note=_describe(error))]
    return [Finding("costs predicted = counted", _deviation(predicted, counted), 0.0)]


def _deviation(predicted: Cost, counted: Cost) -> float:
    """Return the largest relative error of predicted costs."""
    pairs = (predicted.macs, counted.macs), (predicted.params, counted.params)
    return max(0.0 if one == other else abs(one / other - 1) if other else math.inf for one, other in pairs)


def prove(
    model: nn.Module, plan: PruningPlan, example_inputs: Any, predicted: Cost, *, counting: str = "operations"
) -> None:
    """Prove on example inputs that a plan's network runs, equals the masked one (`masking`) and costs what it should.

    Forward passes in eval mode: one that counts and two in double precision, in the model's own where it insists on
    it. Work that depends on data, such as a detector's boxes, need not cost what was predicted. Behind a layer of zeros
    all outputs are equal, which proves nothing and is not refused. Where a difference may come from norms written by
    hand, which the masked network does not know, the log says so, and nothing is refused.

    Args:
        model: the unpruned network; left unchanged.
        predicted: what a cost model says of the plan, by the same ``counting``.

    Raises:
        ProofError: it does not; says the first layer that differs.
    """
    try:
        counted = cost(prune(model, plan), example_inputs, counting=counting)
    except Exception as error:
        where = _first_difference(model, plan, _Outputs(example_inputs, TOLERANCE))
        raise ProofError(f"the pruned network does not run: {_describe(error)}; {where}", plan) from error
    if _deviation(predicted, counted) > ROUNDING and not _depends_on_data(model, plan, example_inputs):
        where = _first_cost(model, plan, example_inputs)
        raise ProofError(f"the pruned network costs {counted}, and {predicted} was predicted; {where}", plan)
    original, outputs = _in_double(model, example_inputs)
    found = outputs.compare("pruned = masked", lambda: masked(original, plan), outputs.of(prune(original, plan)))
    if found.ok:
        return
    if unseen := _own_statistics(model, example_inputs):
        logger.warning(
            "cannot tell whether the plan is right: %s; the masked network does not see the kept alone", unseen
        )
        return
    raise ProofError(f"{found}; {_first_difference(original, plan, outputs)}", plan)


def _own_statistics(model: nn.Module, inputs: Any) -> str:
    """Say which layers take statistics over channels without being norms of the table, so that masking misses them."""
    names = trace_model(model, inputs).flow.statistics
    own = [repr(name) for name in names if not is_norm(model.get_submodule(name), "channels")]
    return f"layers {', '.join(own)} take statistics over channels" if own else ""


def _in_double(model: nn.Module, inputs: Any) -> tuple[nn.Module, _Outputs]:
    """Return a network in double precision and what runs it, or as it is where it does not run so."""
    original = copy.deepcopy(model).double()
    outputs = _Outputs(tree_map(lambda leaf: _cast(leaf, torch.float64), inputs), TOLERANCE)
    try:
        outputs.of(original)
    except Exception:
        return copy.deepcopy(model), _Outputs(inputs, SINGLE_TOLERANCE)
    return original, outputs


def _depends_on_data(model: nn.Module, plan: PruningPlan, inputs: Any) -> bool:
    """Say whether the network's work changes with its weights alone, their sizes being equal."""
    return cost(masked(model, plan), inputs).macs != cost(model, inputs).macs


def _first_cost(model: nn.Module, plan: PruningPlan, inputs: Any) -> str:
    """Name the first layer that does not cost what was predicted."""
    predicted = cost_model(model, inputs, whole_heads=loses_heads(plan.groups)).by_layer(plan)
    counted = cost_model(prune(model, plan), inputs).by_layer(PruningPlan((), ())).set_index("layer")
    for layer, *expected in predicted.itertuples(index=False):
        found = counted.loc[layer].tolist() if layer in counted.index else [0, 0]
        if not np.allclose(found, expected, rtol=ROUNDING, atol=0):
            return f"first differs layer {layer!r}: {found} MACs and parameters, {expected} predicted"
    return "no single layer differs"


def _first_difference(model: nn.Module, plan: PruningPlan, outputs: _Outputs) -> str:
    """Name the first layer whose kept outputs are not those of the masked network, or at which the pruned one ends."""
    expected, found = (_layer_outputs(network, outputs) for network in (masked(model, plan), prune(model, plan)))
    for number, (name, output) in enumerate(expected):
        kept = plan.shrunk.get(LayerAxis(name, "out"))
        if kept is not None:
            dim = activation_dim(model.get_submodule(name), output)
            output = output.index_select(dim, torch.tensor(kept, device=output.device))
        if number >= len(found):
            return f"it ends at layer {name!r} or before"
        if relative_error([output], [found[number][1]]) > outputs.tolerance:
            return f"first differs layer {name!r}"
    return "no layer's output differs"


def _layer_outputs(model: nn.Module, outputs: _Outputs) -> list[tuple[str, Tensor]]:
    """Return what every call of a layer gave, in order, also where the network fails on the way."""
    calls: list[tuple[str, Tensor]] = []

    def keep(name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            calls.append((name, output.clone()))

    handles = [
        layer.register_forward_hook(lambda _layer, _inputs, output, name=name: keep(name, output))
        for name, layer in scored_layers(model)
    ]
    with hooks(handles), suppress(Exception):
        outputs.of(model)
    return calls


@torch.no_grad()
def _disturb(equivalent: EquivalentModel, seed: int) -> None:
    """Add noise to every compressor and decompressor, so that all original weights take part."""
    generator = torch.Generator().manual_seed(seed)
    for mixed in equivalent.mixed_layers.values():
        for matrix in (mixed.compressor, mixed.decompressor):
            if matrix is not None:
                noise = torch.randn(matrix.shape, generator=generator, dtype=matrix.dtype)
                matrix += DISTURBANCE * matrix.shape[-1] ** -0.5 * noise.to(matrix.device)


def _cast(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
