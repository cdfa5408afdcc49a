"""Accuracy back without training: the kept weights take over what the removed inputs gave, in least squares.

Removed channels correlate with kept ones, so that a layer which lost inputs can make up for most of them. `compensate`
goes through the layers in running order, the original and the pruned network side by side, and gives each the weights
that map the *pruned network's own* inputs x onto the original's outputs y before the norm, over calibration data:

    W' = W_k + E[(y − W_k x − b) xᵀ] (E[x xᵀ] + λI)⁻¹,    b' = E[y − W' x],

W_k and b as plain pruning leaves them, the moments about their means. Each layer so corrects the errors of those before
it, too. (He et al. 2017, arXiv 1707.06168, and ThiNet, Luo et al. 2017, arXiv 1707.06342, reconstruct outputs of chains
of convolutions in this way; Optimal Brain Surgeon, Hassibi & Stork 1993, and SparseGPT, Frantar & Alistarh 2023, make up
for single weights.) No labels are needed, and nothing is trained.
"""

from __future__ import annotations

import copy
import fnmatch
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from tqdm.auto import tqdm

from ..errors import UnknownNameError
from ..state import call_model, evaluating, hooks, numbered
from ..structure.layers import LayerAxis
from .lockstep import PausableCall, pause
from .moments import Moments, from_weight_matrix, unfolded_chunks, weight_matrix
from .plan import PruningPlan
from .prune import prune
from .readings import LinearMap, Normalization, Reading, Stop, Survey, linear_map, stopping, survey

logger = logging.getLogger(__name__)

ForwardPass = Callable[[nn.Module, Any], Any]
"""(model, batch) -> whatever: how a batch is put through a model. An objective will do."""


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Put a batch through a model: a tensor, (inputs, labels), a dict of keyword arguments, or a `Forward`."""
    return call_model(model, batch[0] if isinstance(batch, tuple | list) else batch)


@torch.no_grad()
def compensate(
    model: nn.Module,
    plan: PruningPlan,
    batches: Iterable[Any],
    *,
    forward: ForwardPass = run_batch,
    ridge: float = 1e-3,
    positions: int | None = None,
    ignore: Iterable[str] = (),
    max_bytes: int = 4 * 2**30,
    progress: bool = False,
) -> nn.Module:
    """Return `prune(model, plan)` with the weights by which its layers best reproduce the original's outputs.

    Every convolution (grouped, depthwise, transposed), linear layer and projection of torch's attention whose inputs
    are not what they were is fitted, in running order (see the module's text). A layer without a bias has its intercept
    in the running mean of the norm that alone reads it; where there is none, it is fitted without. Left as `prune` left
    them, with the reason (see `left_plain`; also logged): embeddings, layers that share parameters or run several times
    a pass, standardised weights, unknown types.

    The cost is one forward pass of either network over the batches, one of a single batch, and the second moments, which
    for a 3x3 convolution are 9 · (kept inputs / outputs) times its own MACs. All batches are under way at once: the memory
    is their inputs, both networks' live activations at one layer, and that layer's moments. Batch norms need no
    recalibration afterwards.

    Args:
        model: the unpruned model; run in eval mode and left unchanged.
        batches: calibration data. Some hundred images suffice for a small network.
        forward: how a batch is put through a model. By default batches are tensors, pairs (inputs, labels), dicts of
            keyword arguments or `Forward`s.
        ridge: λ over the mean variance of a layer's inputs; 0 is plain least squares.
        ignore: names or globs of layers that are left as they were pruned.
        max_bytes: refuse a layer whose moments would take more.

    Returns:
        A plain network with the keys and shapes of `prune(model, plan)`, in the model's train or eval mode.

    Raises:
        PlanMismatchError: the plan does not fit the model.
        ValueError: no batches, activations that are not finite (says the layer), a layer over `max_bytes`, batches that
            run different layers, an ignored name that does not exist.
    """
    if ridge < 0:
        raise ValueError(f"ridge={ridge}; expected 0 or more, a share of the inputs' mean variance")
    pruned = prune(model, plan)
    data = _frozen(model, batches)
    with evaluating(model), evaluating(pruned):
        found = _ignoring(model, survey(model, partial(forward, model, data[0])), ignore)
        for name, reason in found.plain.items():
            logger.info("layer %r stays as it was pruned: %s", name, reason)
        _check_sizes(pruned, found, max_bytes)
        _walk(model, pruned, plan, found, data, forward, ridge, progress)
    return pruned


@torch.no_grad()
def left_plain(
    model: nn.Module, plan: PruningPlan, batch: Any, *, forward: ForwardPass = run_batch
) -> dict[str, str]:
    """Return the layers that `compensate` leaves as they are pruned although they lose inputs, with the reasons."""
    lose = {axis.layer for axis in plan.shrunk}
    with evaluating(model):
        found = survey(model, partial(forward, model, _frozen(model, [batch])[0]))
    return {name: reason for name, reason in found.plain.items() if name in lose}


def _frozen(model: nn.Module, batches: Iterable[Any]) -> list[Any]:
    """Return the batches as a list, on the model's device."""
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    return [tree_map_only(Tensor, lambda tensor: tensor.to(device), batch) for _, batch in numbered(batches)]


def _ignoring(model: nn.Module, found: Survey, ignore: Iterable[str]) -> Survey:
    """Return the survey with the ignored layers left plain."""
    names = [name for name, _ in model.named_modules()]
    plain = dict(found.plain)
    for pattern in [ignore] if isinstance(ignore, str) else ignore:
        hits = fnmatch.filter(names, pattern)
        if not hits:
            raise UnknownNameError("layer to ignore", pattern, [name for name in names if name])
        plain |= dict.fromkeys(hits, "ignored")
    return replace(found, readings=tuple(r for r in found.readings if r.layer not in plain), plain=plain)


def _check_sizes(pruned: nn.Module, found: Survey, max_bytes: int) -> None:
    for reading in found.readings:
        layer = linear_map(pruned, reading)
        groups, outputs, inputs = weight_matrix(layer, layer.weight).shape
        if (size := Moments.nbytes(groups, inputs, outputs)) > max_bytes:
            raise ValueError(
                f"{reading}: the second moments of its {groups * inputs:,} inputs take {size:,} bytes, over "
                f"max_bytes={max_bytes:,}: allow more, or leave the layer out with ignore="
            )


def _walk(
    model: nn.Module,
    pruned: nn.Module,
    plan: PruningPlan,
    found: Survey,
    data: Sequence[Any],
    forward: ForwardPass,
    ridge: float,
    progress: bool,
) -> None:
    """Run both networks on all batches from reading to reading, and fit the pruned one's at each."""
    layers = list(dict.fromkeys(reading.layer for reading in found.readings))
    with ExitStack() as stack:
        stack.enter_context(stopping(model, layers, pause, after=True))
        stack.enter_context(stopping(pruned, layers, pause, after=False))
        calls = [
            [stack.enter_context(PausableCall(partial(forward, network, batch))) for batch in data]
            for network in (model, pruned)
        ]
        for reading in tqdm(found.readings, desc="compensating", disable=not progress, leave=False):
            full, own = ([_next_stop(call, reading, n) for n, call in enumerate(side, 1)] for side in calls)
            if not _same_inputs(full, own):
                _fit(model, pruned, plan, found, reading, full, own, ridge)
            del full, own  # or they outlive the activations of the next layer


def _next_stop(call: PausableCall, reading: Reading, number: int) -> Stop:
    stop = call.resume()
    if stop is None or stop.reading != reading:
        ran = "ends" if stop is None else f"runs {stop.reading}"
        raise ValueError(f"batch {number} {ran} where batch 1 runs {reading}: all batches must run the same layers")
    return stop


def _same_inputs(full: Sequence[Stop], own: Sequence[Stop]) -> bool:
    """Say whether a layer gets exactly what it got in the original, so that its weights are right as they are."""
    return all(
        a.inputs.shape == b.inputs.shape and torch.equal(a.inputs, b.inputs) for a, b in zip(full, own, strict=True)
    )


def _fit(
    model: nn.Module,
    pruned: nn.Module,
    plan: PruningPlan,
    found: Survey,
    reading: Reading,
    full: Sequence[Stop],
    own: Sequence[Stop],
    ridge: float,
) -> None:
    """Give a layer of the pruned network the weights and the intercept of least squares, in place."""
    layer = linear_map(pruned, reading)
    norm = found.norms.get(reading.layer) if layer.bias is None else None
    moments = _moments(layer, reading, partial(_target, model, plan, reading), full, own, layer.bias is not None or norm)
    groups, inputs = moments.input_sums.shape
    if moments.count <= inputs:
        few = "%s: %d positions of calibration data for %d inputs; only the ridge decides between many solutions"
        logger.warning(few, reading, moments.count, inputs)
    change, intercept = moments.solve(ridge)
    layer.weight += from_weight_matrix(layer, change).to(layer.weight)
    if layer.bias is not None:
        layer.bias += intercept.flatten().to(layer.bias)
    elif norm is not None:
        mean = pruned.get_submodule(norm).running_mean
        mean -= intercept.flatten().to(mean)


def _moments(
    layer: LinearMap,
    reading: Reading,
    target: Callable[[Tensor], Tensor],
    full: Sequence[Stop],
    own: Sequence[Stop],
    centred: Any,
) -> Moments:
    """Sum up the moments of a layer's inputs and of what is missing in its outputs, over all batches."""
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    weight = weight_matrix(layer, layer.weight.to(dtype))
    bias = weight.new_zeros(weight.shape[:2]) if layer.bias is None else layer.bias.to(dtype).view(weight.shape[:2])
    groups, outputs, inputs = weight.shape
    moments = Moments(groups, inputs, outputs, centred=bool(centred), device=weight.device)
    for number, (theirs, ours) in enumerate(zip(full, own, strict=True), start=1):
        for x, y in unfolded_chunks(layer, ours.inputs.to(dtype), target(theirs.outputs.to(dtype))):
            moments.add(x, y - weight @ x - bias[..., None])
        if not moments.finite:
            raise ValueError(f"{reading}: its inputs or outputs are not finite in batch {number}; look for NaN there")
    return moments


def _target(model: nn.Module, plan: PruningPlan, reading: Reading, outputs: Tensor) -> Tensor:
    """Return the original's outputs that stay; queries grow as far as narrower heads need."""
    axis = LayerAxis(reading.layer, "out")
    layer = model.get_submodule(reading.layer)
    dim = outputs.dim() - (1 if isinstance(layer, nn.Linear | nn.MultiheadAttention) else 1 + len(layer.kernel_size))
    positions, factor = plan.scaled.get(reading.layer, ((), 1.0))
    width, parts = outputs.shape[dim] // max(1, len(reading.parts)), reading.parts or (0,)
    kept = torch.tensor(plan.shrunk.get(axis, range(width)), device=outputs.device)
    if positions and parts[0] == 0:
        factors = outputs.new_ones(outputs.shape[dim])
        factors[torch.tensor(positions, device=outputs.device)] = factor
        outputs = outputs * factors.view([-1 if d == dim else 1 for d in range(outputs.dim())])
    elif axis not in plan.shrunk:
        return outputs
    return outputs.index_select(dim, torch.cat([kept + width * number for number in range(len(parts))]))


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any], *, forward: ForwardPass = run_batch) -> nn.Module:
    """Return a copy of a model whose batch norms have the statistics of calibration data.

    One pass: means and variances of the batches, averaged by their numbers of positions; dropout stays off. A pruned
    network gains by it, less than by `compensate`; after `compensate` it costs one to two points of accuracy on a small
    ResNet, since there the running means carry the intercepts.

    Raises:
        ValueError: no batches, no batch norm with running statistics, or statistics that are not finite (says the norm).
    """
    copied = copy.deepcopy(model)
    norms = {
        name: layer
        for name, layer in copied.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None
    }
    if not norms:
        raise ValueError("the model has no batch norm with running statistics: there is nothing to recalibrate")
    counts = dict.fromkeys(norms.values(), 0)

    def weigh(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        positions = inputs[0].numel() // inputs[0].shape[1]
        counts[norm] += positions
        norm.momentum = positions / counts[norm]

    momenta = {norm: norm.momentum for norm in counts}
    with evaluating(copied), hooks([norm.register_forward_pre_hook(weigh) for norm in counts]):
        for norm in counts:
            norm.reset_running_stats()
            norm.training = True
        for batch in _frozen(copied, batches):
            forward(copied, batch)
    for norm, momentum in momenta.items():
        norm.momentum = momentum
    for name, norm in norms.items():
        if not (norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()):
            raise ValueError(f"norm {name!r}: its new statistics are not finite; look for NaN in the data or weights")
    return copied
