"""Accuracy back without training: the kept weights take over what the removed inputs gave, in least squares.

Removed channels correlate with kept ones, so that a layer which lost inputs can make up for most of them. `compensate`
goes through the layers in running order, the original and the pruned network side by side, and gives each the weights
that map the *pruned network's own* inputs x onto the original's outputs y before the norm, over calibration data:

    W' = W_k + E[(y − W_k x − b) xᵀ] (E[x xᵀ] + λI)⁻¹,    b' = E[y − W' x],

W_k and b as plain pruning leaves them, the moments about their means. So each layer also corrects the errors of those
before it. (He et al. 2017, arXiv 1707.06168, and ThiNet, Luo et al. 2017, arXiv 1707.06342, rebuild outputs of chains
of convolutions in this way; Optimal Brain Surgeon, Hassibi & Stork 1993, and SparseGPT, Frantar & Alistarh 2023, make
up for single weights.) No labels are needed, and nothing is trained.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from tqdm.auto import tqdm

from ..errors import check_number, check_whole
from ..scoring.tasks import Task, find_task
from ..state import call_model, copy_of, evaluating, hooks, numbered, own_inputs, running, without_weight_norms
from ..structure.groups import ignored_layers
from ..structure.layers import LayerAxis, is_batch_norm, kernel_dims
from .moments import Draw, Moments, bias_of, from_weight_matrix, unfolded_chunks, weight_matrix, weight_of
from .plan import PruningPlan, prune
from .readings import PausableCall, Reading, Stop, linear_map, pause, stopping, survey

logger = logging.getLogger(__name__)

PER_INPUT = 20
"""Positions for each input of a layer; the excess error of least squares is about one over their number."""


def _forward_of(task: str | Task | None) -> Callable[[nn.Module, int, Any], Any]:
    """Return how a copy of a batch, with its number, is put through a model, and what comes out.

    Without a task it is a tensor, (inputs, labels), a dict of keyword arguments, or a `Forward`.
    """

    def run(model: nn.Module, number: int, batch: Any) -> Any:
        batch = own_inputs(batch)
        with running(model, batch, lambda: f"batch {number}"):
            if task is None:
                return call_model(model, batch[0] if isinstance(batch, tuple | list) else batch)
            return find_task(task).forward(model, batch)

    return run


@torch.no_grad()
def compensate(
    model: nn.Module,
    plan: PruningPlan,
    batches: Iterable[Any],
    *,
    task: str | Task | None = None,
    ridge: float = 1e-3,
    positions: int | None = None,
    seed: int = 0,
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

    The cost is one forward pass of either network over the batches, one of a single batch, and the moments, all layers'
    in that same pass. All positions of a 3x3 convolution would take 9 · (kept inputs / kept outputs) times the MACs of
    its own pass; some positions suffice. All batches are under way at once, so that the memory is theirs: both
    networks' live activations at one layer, with that layer's moments. Batch norms need no recalibration afterwards.

    Args:
        model: the unpruned model; run in eval mode and left unchanged.
        batches: calibration data, left unchanged. Some hundred images suffice for a small network.
        task: what the network is for, a `Task` or the name of one of `TASKS`, which says how a batch is put through it.
            None: batches are tensors, pairs (inputs, labels), dicts of keyword arguments or `Forward`s.
        ridge: λ over the mean variance of a layer's inputs; 0 is plain least squares.
        positions: take at most so many positions of an example's output (pixels, tokens), drawn for every layer and
            example by ``seed``. None: as many as make 20 for each of a layer's inputs, over all examples; a number
            above theirs takes all.
        ignore: names or globs of layers that are left as they were pruned.
        max_bytes: refuse a layer whose moments would take more.

    Returns:
        A plain network with the keys and shapes of `prune(model, plan)`, in the model's train or eval mode.

    Raises:
        PlanMismatchError: the plan does not fit the model.
        ValueError: no batches, one without examples or that does not run through the model (says which), activations
            that are not finite (says the layer), a layer over `max_bytes`, batches that run different layers, an
            ignored name that does not exist.
    """
    check_number("ridge", ridge, "a number of 0 or more", lambda number: 0 <= number < math.inf)
    if positions is not None:
        check_whole("positions", positions, 1, ", or None for all")
    check_whole("seed", seed, 0)
    check_whole("max_bytes", max_bytes, 1)
    pruned, forward = prune(model, plan), _forward_of(task)
    model = without_weight_norms(model)
    if not plan.shrunk:
        return pruned
    data = _frozen(model, batches)
    with evaluating(model, pruned):
        found = survey(model, partial(forward, model, 1, data[0]))
        plain = {**found.plain, **dict.fromkeys(ignored_layers(model, ignore), "ignored")}
        for name, reason in plain.items():
            logger.info("layer %r stays as it was pruned: %s", name, reason)
        readings = [reading for reading in found.readings if reading.layer not in plain]
        _check_sizes(pruned, readings, max_bytes)
        draws = torch.Generator().manual_seed(seed)
        fitting = Fitting(model, pruned, plan, found.norms, ridge, positions, draws)
        _walk(fitting, readings, forward, data, progress)
    return pruned


@torch.no_grad()
def left_plain(model: nn.Module, plan: PruningPlan, batch: Any, *, task: str | Task | None = None) -> dict[str, str]:
    """Return the layers that `compensate` leaves as they are pruned although they lose inputs, with the reasons."""
    lose = {axis.layer.partition(".parametrizations.")[0] for axis in plan.shrunk}
    model = without_weight_norms(model)
    with evaluating(model):
        found = survey(model, partial(_forward_of(task), model, 1, _frozen(model, [batch])[0]))
    return {name: reason for name, reason in found.plain.items() if name in lose}


def _frozen(model: nn.Module, batches: Iterable[Any]) -> list[Any]:
    """Return the batches as a list, on the model's device."""
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    found = []
    for number, batch in numbered(batches):
        tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        if (isinstance(batch, tuple | list) and not batch) or (tensors and not tensors[0].numel()):
            raise ValueError(f"batch {number} holds no example: leave it out")
        if any(tensor.is_meta for tensor in tensors):
            raise ValueError(f"batch {number}: the device meta holds no numbers")
        found.append(tree_map_only(Tensor, lambda tensor: tensor.to(device), batch))
    return found


def _check_sizes(pruned: nn.Module, readings: Iterable[Reading], max_bytes: int) -> None:
    for reading in readings:
        layer = linear_map(pruned, reading)
        groups, outputs, inputs = weight_matrix(layer, weight_of(layer)).shape
        if (size := Moments.nbytes(groups, inputs, outputs)) > max_bytes:
            raise ValueError(
                f"{reading}: the second moments of its {groups * inputs:,} inputs take {size:,} bytes, over "
                f"max_bytes={max_bytes:,}: allow more, or leave the layer out with ignore="
            )


@dataclass(frozen=True, eq=False)
class Fitting:
    """The two networks, and how layers of the pruned one are fitted (see `compensate`)."""

    model: nn.Module
    pruned: nn.Module
    plan: PruningPlan
    norms: Mapping[str, str]
    ridge: float
    positions: int | None
    draws: torch.Generator

    def fit(self, reading: Reading, full: Sequence[Stop], own: Sequence[Stop]) -> None:
        """Give a layer of the pruned network the weights and the intercept of least squares, in place."""
        layer = linear_map(self.pruned, reading)
        bias, norm = bias_of(layer), self.norms.get(reading.layer)
        moments = self._moments(layer, reading, full, own, centred=bias is not None or norm is not None)
        if moments.count <= (inputs := moments.input_sums.shape[1]):
            few = "%s: %d positions of calibration data for %d inputs: there are many solutions, and the ridge decides"
            logger.warning(few, reading, moments.count, inputs)
        change, intercept = moments.solve(self.ridge)
        weight_of(layer).add_(from_weight_matrix(layer, change).to(weight_of(layer)))
        if bias is not None:
            bias.add_(intercept.flatten().to(bias))
        elif norm is not None:
            mean = self.pruned.get_submodule(norm).running_mean
            mean.sub_(intercept.flatten().to(mean))

    def _moments(
        self, layer: nn.Module, reading: Reading, full: Sequence[Stop], own: Sequence[Stop], centred: bool
    ) -> Moments:
        """Sum up the moments of a layer's inputs and of what is missing in its outputs, over all batches."""
        dtype = torch.promote_types(weight_of(layer).dtype, torch.float32)
        weight = weight_matrix(layer, weight_of(layer).to(dtype))
        groups, outputs, inputs = weight.shape
        bias = weight.new_zeros(groups * outputs) if bias_of(layer) is None else bias_of(layer).to(dtype)
        moments = Moments(groups, inputs, outputs, centred=centred, device=weight.device)
        draw = Draw(self.positions or _enough(layer, inputs, own), self.draws)
        for number, (theirs, ours) in enumerate(zip(full, own, strict=True), start=1):
            for x, given in unfolded_chunks(layer, ours.inputs.to(dtype), theirs.outputs.to(dtype), draw):
                y = self._target(reading, given).view(groups, outputs, -1)
                moments.add(x, y - weight @ x - bias.view(groups, outputs, 1))
            if not moments.finite:
                raise ValueError(f"{reading}: what it takes or gives is not finite in batch {number}; look for NaN")
        return moments

    def _target(self, reading: Reading, outputs: Tensor) -> Tensor:
        """Return the rows of the original's outputs that stay; queries grow as far as narrower heads need."""
        axis, parts = LayerAxis(reading.layer, "out"), reading.parts or (0,)
        positions, factor = self.plan.scaled.get(reading.layer, ((), 1.0))
        if positions and parts[0] == 0:
            factors = outputs.new_ones(len(outputs), 1)
            factors[torch.tensor(positions, device=outputs.device)] = factor
            outputs = outputs * factors
        if axis not in self.plan.shrunk:
            return outputs
        kept, width = torch.tensor(self.plan.shrunk[axis], device=outputs.device), len(outputs) // len(parts)
        return outputs[torch.cat([kept + width * number for number in range(len(parts))])]


def _enough(layer: nn.Module, inputs: int, stops: Sequence[Stop]) -> int:
    """Return how many positions of each example make up `PER_INPUT` for every input of a layer."""
    alone = kernel_dims(layer) + 1  # the dimensions of an example that comes without a batch
    examples = sum(1 if stop.inputs.dim() == alone else len(stop.inputs) for stop in stops)
    return math.ceil(PER_INPUT * inputs / max(1, examples))


def _walk(
    fitting: Fitting, readings: Sequence[Reading], forward: Callable, data: Sequence[Any], progress: bool
) -> None:
    """Run both networks on all batches from reading to reading, and fit the pruned one's at each."""
    layers = list(dict.fromkeys(reading.layer for reading in readings))
    with ExitStack() as stack:
        stack.enter_context(stopping(fitting.model, layers, pause, after=True))
        stack.enter_context(stopping(fitting.pruned, layers, pause, after=False))
        calls = [
            [stack.enter_context(PausableCall(partial(forward, network, *one))) for one in enumerate(data, 1)]
            for network in (fitting.model, fitting.pruned)
        ]
        for reading in tqdm(readings, desc="compensating", disable=not progress, leave=False):
            full, own = ([_next_stop(call, reading, n) for n, call in enumerate(side, 1)] for side in calls)
            # A layer that gets exactly what it got in the original has the right weights as they are.
            if not all(torch.equal(a.inputs, b.inputs) for a, b in zip(full, own, strict=True)):
                fitting.fit(reading, full, own)
            del full, own  # or they would outlive the next layer's


def _next_stop(call: PausableCall, reading: Reading, number: int) -> Stop:
    stop = call.resume()
    if stop is None or stop.reading != reading:
        ran = "ends" if stop is None else f"runs {stop.reading}"
        raise ValueError(f"batch {number} {ran} where batch 1 runs {reading}: all batches must run the same layers")
    return stop


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any], *, task: str | Task | None = None) -> nn.Module:
    """Return a copy of a model whose batch norms have the statistics of calibration data.

    One pass: means and variances of the batches, averaged by their numbers of positions; dropout stays off. Norms
    that no batch reaches stay as they are. A pruned network gains by it, less than by `compensate`; after `compensate`
    it costs one to two points of accuracy on a small ResNet, since there the running means carry the intercepts.

    Raises:
        ValueError: no batches, no batch norm with running statistics, statistics that are not finite (says the norm).
    """
    copied = copy_of(model)
    norms = {
        name: layer for name, layer in copied.named_modules() if is_batch_norm(layer) and layer.running_mean is not None
    }
    if not norms:
        raise ValueError("the model has no batch norm with running statistics: there is nothing to recalibrate")
    counts = dict.fromkeys(norms.values(), 0)

    def weigh(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        positions = inputs[0].numel() // inputs[0].shape[1]
        if not counts[norm]:
            norm.reset_running_stats()
        counts[norm] += positions
        norm.momentum = positions / counts[norm]

    momenta, forward = {norm: norm.momentum for norm in counts}, _forward_of(task)
    with evaluating(copied), hooks([norm.register_forward_pre_hook(weigh) for norm in counts]):
        for norm in counts:
            norm.training = True
        for number, batch in enumerate(_frozen(copied, batches), start=1):
            forward(copied, number, batch)
    for norm, momentum in momenta.items():
        norm.momentum = momentum
    for name, norm in norms.items():
        if not (norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()):
            raise ValueError(f"norm {name!r}: its new statistics are not finite; look for NaN in the data or weights")
    return copied
