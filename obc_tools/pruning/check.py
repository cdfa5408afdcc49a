"""Prove, on the user's own network, that a plan does what it says: pruned = masked, EP = naive, merge = EP, costs.

Errors are relative to the output's scale: the largest difference between the outputs of two networks over the largest
deviation of an output from the mean over the examples, so that a bias that all examples share hides nothing. Forward
passes run in float64: a check needs few of one small batch, so that double costs little, and the rounding of float32
would grow with depth until a small wrong coupling is lost in it.

A plan is right or wrong whatever the weights are. Where they hide what goes (a branch that starts at zero, a dead
unit), the proof is repeated with *probe weights*, drawn at random; where these show nothing either, it cannot tell.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import check_number, check_whole
from ..measure.costs import Cost, CostModel, cost, cost_model, example_count
from ..state import (
    RANDOMNESS,
    alone,
    call_model,
    copy_of,
    hooks,
    no_fused_attention,
    own_inputs,
    running,
    within,
    without_weight_norms,
)
from ..structure.counting import count
from ..structure.groups import loses_heads
from .equivalent import EquivalentModel
from .masking import Masking, dead_entries
from .plan import PruningPlan, check_is_plan, shrink

logger = logging.getLogger(__name__)

TOLERANCE = 1e-6
"""Default bound on relative errors: far above double rounding, far below what any wrongly coupled channel causes."""

DISTURBANCE = 0.1
"""How much random matrices change the signal behind each map of Equivalent Pruning, relative to it."""


SINGLE_TOLERANCE = 1e-3
"""Bound on relative errors of a network that does not run in double precision."""


ROUNDING = 1e-9
"""Bound on the relative error of predicted costs, which are sums of whole numbers."""


LEAST_EFFECT = 1e-3
"""How much of the output's scale must hang on what goes, for an equality to show anything."""


DOUBLE_BYTES = 2**32
"""The largest copy of a network in double precision that `prove` makes; a larger one is proven in single precision."""

FEW = 8
"""Examples of a batch on which `prove` compares networks; whether work depends on data it asks of all."""


RIGHT, WRONG, CANNOT_TELL = "right", "wrong", "cannot tell"
"""Verdicts."""


HIDDEN = (
    "the output does not show what goes, nor with random weights: give inputs on which it does, or "
    "Forward(run, inputs) whose run returns what comes before"
)


WAY_OUT = "a width may be computed with unseen, as in 1 / x.shape[1]: ignore= the layers before it keeps theirs"


VARIES = "how much the network computes depends on its data, such as how many rows an expert is sent"


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
    ``note`` says what went wrong where nothing could be compared; ``error`` is then infinite. ``unclear`` says why the
    comparison tells nothing, and what to do; ``where`` which layer is the first to differ.
    """

    name: str
    error: float
    bound: float
    differs: bool = False
    note: str = ""
    unclear: str = ""
    where: str = ""

    @property
    def verdict(self) -> str:
        """Say whether the comparison came out as it must: "right", "wrong" or "cannot tell"."""
        if self.unclear:
            return CANNOT_TELL
        return RIGHT if not self.note and (self.error > self.bound) == self.differs else WRONG

    @property
    def ok(self) -> bool:
        """Say whether the comparison came out as it must."""
        return self.verdict == RIGHT

    def __str__(self) -> str:
        relation = "at least" if self.differs else "at most"
        text = self.note or f"{self.error:.2g}, must be {relation} {self.bound:.2g}"
        text = f"{CANNOT_TELL}: {self.unclear}" if self.unclear else text
        return f"{self.name}: {text}" + (f"; {self.where}" if self.where else "")


@dataclass(frozen=True, repr=False)
class Check:
    """What `check_plan` found. ``effect``: how much pruning changes the output, relative to its scale.

    ``probe``: outputs were compared with random weights, as the network's own hide what goes.
    """

    findings: tuple[Finding, ...]
    effect: float
    probe: bool = False

    @property
    def verdict(self) -> str:
        """Say "wrong" where any comparison failed, "cannot tell" where one tells nothing, else "right"."""
        found = {finding.verdict for finding in self.findings}
        return next((verdict for verdict in (WRONG, CANNOT_TELL) if verdict in found), RIGHT)

    @property
    def ok(self) -> bool:
        """Say whether every comparison came out as it must; where one tells nothing this is not known, so False."""
        return self.verdict == RIGHT

    def error_of(self, name: str) -> float:
        """Return the error of one comparison by its name."""
        return next(finding.error for finding in self.findings if finding.name == name)

    def raise_if_failed(self) -> None:
        """Raise CheckError with every comparison that failed, if there is one; log those that tell nothing."""
        if self.verdict == WRONG:
            raise CheckError("; ".join(str(finding) for finding in self.findings if finding.verdict == WRONG))
        for finding in self.findings:
            if finding.verdict == CANNOT_TELL:
                logger.warning("%s", finding)

    def to_frame(self) -> pd.DataFrame:
        """Return one row a comparison: its name, the error, the bound on it, whether it is met, the verdict, a note."""
        bounds = [f"{'≥' if finding.differs else '≤'} {finding.bound:.2g}" for finding in self.findings]
        rows = [
            (f.name, f.error, bound, f.ok, f.verdict, f.unclear or f.note or f.where)
            for f, bound in zip(self.findings, bounds, strict=True)
        ]
        return pd.DataFrame(rows, columns=["check", "error", "bound", "ok", "verdict", "note"])

    def __repr__(self) -> str:
        return f"{self._title()}\n{self.to_frame().to_string(index=False, float_format='{:.2g}'.format)}"

    def _repr_html_(self) -> str:
        return f"<b>{self._title()}</b>{self.to_frame().to_html(index=False, float_format='{:.2g}'.format)}"

    def _title(self) -> str:
        verdicts, told = [finding.verdict for finding in self.findings], {WRONG: "failed", CANNOT_TELL: CANNOT_TELL}
        counts = {words: verdicts.count(verdict) for verdict, words in told.items()}
        said = [f"{count} of {len(verdicts)} checks {words}" for words, count in counts.items() if count]
        weights = " with random weights, as its own hide what goes" if self.probe else ""
        verdict = ", ".join(said) or "all checks passed"
        return f"Check: {verdict}; pruning changes the output by {self.effect:.2g} of its scale{weights}"


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

    - pruned = masked: `prune` against the whole network, run as if what goes were not there (`masking.Masking`),
    - EP = naive: a fresh `EquivalentModel` against the pruned network,
    - merge = EP, after its maps were disturbed at random as training would; that must differ from naive,
    - costs: MACs and parameters as `cost_model` predicts them against those counted on the pruned network.

    A comparison is right, wrong, or cannot tell: then it says why, and what to pass instead.

    Args:
        model: the unpruned network; left unchanged. All runs are in eval mode.
        example_inputs: what one forward pass takes; two or more examples that differ.
        tolerance: bound on errors relative to the output's scale.
        dtype: of the forward passes; None leaves the model's own, for networks that insist on it (raise ``tolerance``).
        costs: of the model; learnt here if not given.
        seed: of the disturbance, and of probe weights.

    Raises:
        PlanMismatchError: the plan does not fit the model.
        CheckError: the model returns nothing to compare, its output is not finite, or all examples are the same.
    """
    check_is_plan(plan)
    model = without_weight_norms(model)
    plan.validate(model)
    check_number("tolerance", tolerance, "a number above 0", lambda number: number > 0)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype={dtype}: expected one of floating point numbers, such as torch.float64, or None")
    check_whole("seed", seed, 0)
    example_count(example_inputs)
    counted = _count(model, plan, example_inputs, costs)
    original = copy_of(model).eval()
    if dtype is not None:
        original, example_inputs = original.to(dtype), tree_map(lambda leaf: _cast(leaf, dtype), example_inputs)
    outputs = _Outputs(example_inputs, tolerance)
    findings, effect, hidden = _compare(original, plan, outputs, seed)
    if probe := hidden:
        _draw_weights(original, seed)
        findings, effect, hidden = _compare(original, plan, outputs, seed)
    return Check((*(_unclear_if(hidden, finding) for finding in findings), *counted), effect, probe)


def _unclear_if(hidden: bool, finding: Finding) -> Finding:
    """Say that a comparison tells nothing, should it not have failed but be of outputs that hide what goes."""
    tells = not hidden or (finding.verdict == WRONG and not finding.differs)
    return finding if tells else replace(finding, unclear=HIDDEN)


def _compare(model: nn.Module, plan: PruningPlan, outputs: _Outputs, seed: int) -> tuple[list[Finding], float, bool]:
    """Return what comparisons of outputs find, the effect of pruning, and whether the outputs hide what goes."""
    with running(model, outputs.inputs, lambda: "example inputs"):
        whole = outputs.of(model)
    constant = _check_telling(whole, outputs.inputs)
    try:
        naive = outputs.of(shrink(model, plan))
    except Exception as error:
        return [Finding("pruned = masked", math.inf, outputs.tolerance, note=_describe(error))], math.nan, False
    effect = relative_error(whole, naive)
    found = _compare_masked(model, plan, naive, outputs)
    findings = [found, *_check_equivalent(model, plan, naive, outputs, seed)]
    weak = plan.channels_removed > 0 and effect <= LEAST_EFFECT
    hidden = constant or weak or not all(finding.ok for finding in findings if finding.differs)
    failed = any(finding.verdict == WRONG and not finding.differs for finding in findings)
    return findings, effect, hidden and not failed


def _compare_masked(model: nn.Module, plan: PruningPlan, naive: list[Tensor], outputs: _Outputs) -> Finding:
    """Compare the pruned network's output with the masked one's; say what first differs, or what cannot be followed."""
    masking = Masking(model, plan)
    found = outputs.compare("pruned = masked", lambda: model, naive, masking)
    if found.ok:
        return found
    where, why = _first_difference(model, plan, outputs), ""
    if found.note:
        why = f"the network does not run with the removed channels left out ({found.note})"
    elif masking.doubts:
        why = f"what {', '.join(masking.doubts)} does with channels that go is not known"
    return replace(found, where=where, unclear=why and f"{why}: ignore= the layers before it, or write it otherwise")


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

    def of(self, model: nn.Module, under: AbstractContextManager | None = None) -> list[Tensor]:
        inputs, model = own_inputs(self.inputs), model.eval()
        lent = alone(RANDOMNESS), torch.random.fork_rng()
        with within(torch.no_grad(), *lent, no_fused_attention(), under or nullcontext()):
            torch.manual_seed(0)  # networks may add noise
            output = call_model(model, inputs)
        return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]

    def compare(
        self,
        name: str,
        build: Callable[[], nn.Module],
        expected: list[Tensor],
        under: AbstractContextManager | None = None,
    ) -> Finding:
        """Compare a network's output with another's; a network that cannot be built or run is a finding too."""
        try:
            return Finding(name, relative_error(expected, self.of(build(), under)), self.tolerance)
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
    return _spread(output) or output.abs().max().item() or 1.0


def _spread(tensor: Tensor) -> float:
    """Return the largest deviation from the mean over the examples, 0 where it may be rounding, or there is but one.

    Equal examples need not give equal numbers: some processors' kernels round the last rows of a batch otherwise.
    """
    if tensor.dim() == 0 or len(tensor) < 2 or not tensor.numel():
        return 0.0
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return float((tensor != tensor[:1]).any())
    spread = (tensor - tensor.mean(0)).abs().max().item()
    rounding = min(torch.finfo(tensor.dtype).eps ** 0.5, LEAST_EFFECT) * tensor.abs().max().item()
    return 0.0 if spread <= rounding else spread


def _check_telling(outputs: list[Tensor], inputs: Any) -> bool:
    """Say whether outputs are the same for all examples; raise CheckError where they must be, or are of no use."""
    if not outputs:
        raise CheckError("the model returns no floating-point tensor")
    if not all(leaf.isfinite().all() for leaf in outputs):
        raise CheckError("the unpruned model's output is not finite")
    constant = _all_the_same(outputs)
    if constant and _all_the_same([leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]):
        raise CheckError("the unpruned model's output is the same for all examples; give inputs that differ")
    return constant


def _all_the_same(tensors: list[Tensor]) -> bool:
    varied = [leaf for leaf in tensors if leaf.dim() and len(leaf) > 1 and leaf.numel()]
    return bool(varied) and not any(map(_spread, varied))


def _count(model: nn.Module, plan: PruningPlan, inputs: Any, costs: CostModel | None) -> list[Finding]:
    """Compare predicted with counted costs: relative errors, which must be zero but for work that depends on data."""
    try:
        predicted = (costs or cost_model(model, inputs, whole_heads=loses_heads(plan.groups))).of(plan)
        counted = cost(shrink(model, plan), inputs)
    except Exception as error:
        return [Finding("costs predicted = counted", math.inf, 0.0, note=_describe(error))]
    found = Finding("costs predicted = counted", _deviation(predicted, counted), 0.0)
    varies = not found.ok and predicted.params == counted.params and _depends_on_data(model, plan, inputs)
    return [replace(found, unclear=VARIES if varies else "")]


def _deviation(predicted: Cost, counted: Cost) -> float:
    """Return the largest relative error of predicted costs."""
    pairs = (predicted.macs, counted.macs), (predicted.params, counted.params)
    return max(0.0 if one == other else abs(one / other - 1) if other else math.inf for one, other in pairs)


def prove(
    model: nn.Module,
    plan: PruningPlan,
    example_inputs: Any,
    predicted: Cost,
    *,
    counting: str = "operations",
    single: bool = False,
) -> None:
    """Prove on example inputs that a plan's network runs, equals the masked one (`masking`) and costs what it should.

    Forward passes in eval mode: one that counts and three in double precision, of a batch the first `FEW` examples
    where the network runs on these, with probe weights too where the network's own hide what goes. Work that depends
    on data, such as a detector's boxes, need not cost what was predicted. Where nothing can be told the log says why,
    and nothing is refused.

    Args:
        model: the unpruned network; left unchanged.
        predicted: what a cost model says of the plan, by the same ``counting``.
        single: compare in single precision, to 1e-3, which takes half of the memory. So is a network that does not run
            in double precision, or whose copy in it would take more than 4 GiB.

    Raises:
        ProofError: it does not; says the first layer that differs.
    """
    model = without_weight_norms(model)
    try:
        counted = cost(shrink(model, plan), example_inputs, counting=counting)
    except Exception as error:
        where = _first_difference(model, plan, _Outputs(example_inputs, TOLERANCE))
        raise ProofError(
            f"the pruned network does not run: {_describe(error.__cause__ or error)}; {where}", plan
        ) from error
    if _deviation(predicted, counted) > ROUNDING and not _depends_on_data(model, plan, example_inputs):
        where = _first_cost(model, plan, example_inputs)
        raise ProofError(f"the pruned network costs {counted}, and {predicted} was predicted; {where}", plan)
    large = sum(parameter.numel() for parameter in model.parameters()) * 8 > DOUBLE_BYTES
    original, outputs = _in_precision(model, example_inputs, single=single or large)
    found, hidden = _prove_equal(original, plan, outputs)
    if found.ok and hidden:
        _draw_weights(original, seed=0)
        found, hidden = _prove_equal(original, plan, outputs)
        found = _unclear_if(hidden, found)
    if found.verdict == CANNOT_TELL:
        logger.warning("cannot tell whether the plan is right: %s", found.unclear)
    elif not found.ok:
        raise ProofError(f"{found}; {WAY_OUT}", plan)


def _prove_equal(model: nn.Module, plan: PruningPlan, outputs: _Outputs) -> tuple[Finding, bool]:
    """Compare a pruned network with the masked one; say also whether their outputs hide what goes."""
    whole, naive = outputs.of(model), outputs.of(shrink(model, plan))
    effect = relative_error(whole, naive) if plan.channels_removed else math.inf
    hidden = effect <= LEAST_EFFECT or _all_the_same(naive)
    return _compare_masked(model, plan, naive, outputs), hidden


def _in_precision(model: nn.Module, inputs: Any, *, single: bool) -> tuple[nn.Module, _Outputs]:
    """Return a copy of a network and what runs it: in double precision, else in single, else in its own.

    Of a batch it takes the first examples, or all where the network does not run on these alone.
    """
    for dtype, tolerance in ((torch.float64, TOLERANCE), (torch.float32, SINGLE_TOLERANCE))[single:]:
        original = copy_of(model).to(dtype)
        for taken in _first_examples(inputs), inputs:
            outputs = _Outputs(tree_map(lambda leaf, dtype=dtype: _cast(leaf, dtype), taken), tolerance)
            with suppress(Exception):
                outputs.of(original)
                return original, outputs
    return copy_of(model), _Outputs(inputs, SINGLE_TOLERANCE)


def _first_examples(inputs: Any) -> Any:
    """Return the first `FEW` along the leading axis, if all tensors have as many there, and more."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if len({len(leaf) if leaf.dim() else 0 for leaf in tensors}) != 1 or len(tensors[0]) <= FEW:
        return inputs
    return tree_map(lambda leaf: leaf[:FEW] if isinstance(leaf, Tensor) else leaf, inputs)


@torch.no_grad()
def _depends_on_data(model: nn.Module, plan: PruningPlan, inputs: Any) -> bool:
    """Say whether what a network multiplies changes with its weights alone, their sizes being equal.

    Weights are silenced where they go, then drawn at random.
    """
    other, known = copy_of(model), _sizes(model, inputs)
    for tensor, mask in dead_entries(other, plan):
        tensor.masked_fill_(mask, 0)
    if _sizes(other, inputs) != known:
        return True
    _draw_weights(other, seed=0)
    return _sizes(other, inputs) != known


def _sizes(model: nn.Module, inputs: Any) -> list[tuple[str, int]]:
    return [(product.layer, product.size) for product in count(model, inputs).products]


@torch.no_grad()
def _draw_weights(model: nn.Module, seed: int) -> None:
    """Draw probe weights in place: normal ones that keep the signal's scale; vectors, such as a norm's, around one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in (parameter for parameter in model.parameters() if parameter.is_floating_point()):
        several = parameter.dim() > 1
        drawn = (torch.randn if several else torch.rand)(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(drawn * (2 * len(parameter) / max(parameter.numel(), 1)) ** 0.5 if several else drawn + 0.5)


def _first_cost(model: nn.Module, plan: PruningPlan, inputs: Any) -> str:
    """Name the first layer that does not cost what was predicted."""
    predicted = cost_model(model, inputs, whole_heads=loses_heads(plan.groups)).by_layer(plan)
    counted = cost_model(shrink(model, plan), inputs).by_layer(PruningPlan((), ())).set_index("layer")
    for layer, *expected in predicted.itertuples(index=False):
        found = counted.loc[layer].tolist() if layer in counted.index else [0, 0]
        if not np.allclose(found, expected, rtol=ROUNDING, atol=0):
            return f"first differs layer {layer!r}: {found} MACs and parameters, {expected} predicted"
    return "no single layer differs"


def _first_difference(model: nn.Module, plan: PruningPlan, outputs: _Outputs) -> str:
    """Name the first layer whose output is not that of the masked network, or at which the pruned one ends."""
    whole = copy_of(model)
    expected = _layer_outputs(whole, outputs, Masking(whole, plan))
    found = _layer_outputs(shrink(model, plan), outputs)
    for number, (name, output) in enumerate(expected):
        if number >= len(found):
            return f"it ends at layer {name!r} or before"
        if relative_error([output], [found[number][1]]) > outputs.tolerance:
            return f"first differs layer {name!r}"
    return "no layer's output differs"


def _layer_outputs(model: nn.Module, outputs: _Outputs, masking: Masking | None = None) -> list[tuple[str, Tensor]]:
    """Return what every call of a module gave, in order, also where the network fails on the way; the living alone."""
    calls: list[tuple[str, Tensor]] = []

    def keep(name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            calls.append((name, (masking.living(output) if masking else output.flatten()).clone()))

    handles = [
        layer.register_forward_hook(lambda _layer, _inputs, output, name=name: keep(name, output))
        for name, layer in model.named_modules()
        if name
    ]
    with hooks(handles), suppress(Exception):
        outputs.of(model, masking)
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


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
