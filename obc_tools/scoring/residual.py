"""What is lost after compensation: the residual of a channel given the others, weighted by the Jacobian.

When the channels S of a group go and what reads them makes up for it in least squares (`pruning.compensation`), a
consumer still misses r = x_S − E[x_S | x_K], the part of the removed channels that no mixture of the kept ones K gives.
With ε the gradient of an example's loss at one position of what the consumer takes in, the loss changes by Σ_t ε_tᵀ r_t
in first order. Taken to be independent of the gradients, the residuals have in the mean over squares

    E (Σ_t ε_tᵀ r_t)² = tr(M R),    M = Σ ε εᵀ,    R = Cov(x_S | x_K),

and when the channel i goes next, tr(M R) grows by

    s_i = b_iᵀ M b_i / P_ii,    P = Cov(x_K)⁻¹,

where 1 / P_ii is the conditional variance of x_i given the other kept channels, and b_i holds 1 for i itself and, for
each channel that is gone already, the weight of x_i in what stood in for it. Positions of an example are alike, so that
M is scaled, channel by channel, to say what the example's own Jacobian product says. For the first channel that goes

    s_i = (1 − R_i²) Σ_n (Σ_t ε_nti (x_nti − E x_i))²,

R_i² the share of its variance that the others explain: a Jacobian score of what is left, zero only for a mixture of the
others or where the loss does not look. (Jacobian: Chen et al. 2025. 1 / P_ii as in w_i² / [H⁻¹]_ii: Optimal Brain
Surgeon, Hassibi & Stork 1993, equation 5. P downdated: SparseGPT, Frantar & Alistarh 2023.) Several consumers add up
their s_i.

The sums take one pass, forward and backward; P and Q = BᵀMB are then downdated once for each channel:

    P ← P − P_:i P_i: / P_ii,    Q ← (I − u e_iᵀ) Q (I − e_i uᵀ),    u = P_:i / P_ii,    s = diag(Q) / diag(P).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..state import differentiable, evaluating, hooks, numbered
from ..structure.groups import ChannelGroup, Member
from ..structure.layers import activation_dim, get_layer, layer_axes
from .objectives import Objective, checked_losses

RIDGE = 1e-10
"""Added to every variance, as a share of their mean, so that channels that are mixtures of others have an inverse.

At least 16 times the resolution in which products are taken.
"""


class Reader:
    """The second moments of what a layer takes in, and of the gradients there, in float64.

    Activations and gradients come as (examples, positions, channels).
    """

    def __init__(self):
        self.squares: Tensor | float = 0.0
        self.sums: Tensor | float = 0.0
        self.gradients: Tensor | float = 0.0
        self.products: Tensor | float = 0.0
        self.count = 0
        self.ridge = RIDGE

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Add what was taken in a batch, and the gradients there."""
        self.ridge = max(RIDGE, 16 * torch.finfo(inputs.dtype).eps)
        rows, slopes = inputs.flatten(0, 1), gradients.flatten(0, 1)
        self.squares = self.squares + (rows.T @ rows).double()
        self.sums = self.sums + rows.sum(0).double()
        self.count += len(rows)
        self.gradients = self.gradients + (slopes.T @ slopes).double()
        products, slopes = (inputs * gradients).sum(1).double(), gradients.sum(1).double()
        self.products = self.products + torch.stack(
            [(products**2).sum(0), (products * slopes).sum(0), (slopes**2).sum(0)]
        )

    def covariance(self) -> Tensor:
        """Return the covariance of the inputs."""
        mean = self.sums / self.count
        return self.squares / self.count - mean[:, None] * mean

    def weights(self) -> Tensor:
        """Return M, Σ εεᵀ scaled so that Var(x_i) M_ii is Σ_n (Σ_t ε_ti (x_ti − E x_i))² over examples n."""
        mean, variances = self.sums / self.count, self.covariance().diagonal()
        whole = self.products[0] - 2 * mean * self.products[1] + mean**2 * self.products[2]
        alone = variances * self.gradients.diagonal()
        factors = torch.where(alone > 0, whole / alone, 0).clamp(min=0).sqrt()
        return factors[:, None] * self.gradients * factors


def watch_readers(
    model: nn.Module, layers: Iterable[str], batches: Iterable[Any], objective: Objective
) -> dict[str, Reader]:
    """Run the batches forward and backward; return the moments of what layers that are called as modules take in.

    Raises ValueError as `jacobian_products` does for batches and losses.
    """
    readers = {name: Reader() for name in layers}
    taken: list[tuple[str, int, Tensor]] = []

    def before(name: str, layer: nn.Module, args: tuple) -> tuple:
        dim = activation_dim(layer, args[0])
        alias = args[0].view_as(args[0])  # its gradient is this use's alone
        taken.append((name, dim, alias))
        return (alias, *args[1:])

    handles = (get_layer(model, name).register_forward_pre_hook(partial(before, name)) for name in readers)
    with evaluating(model), differentiable(model, model.parameters()), hooks(handles):
        for number, batch in numbered(batches):
            losses = checked_losses(model, batch, objective, number)
            gradients = torch.autograd.grad(losses.sum(), [alias for *_, alias in taken], allow_unused=True)
            for (name, dim, alias), gradient in zip(taken, gradients, strict=True):
                if gradient is not None:
                    readers[name].add(_positions(alias, dim), _positions(gradient, dim))
            taken.clear()
    return {name: reader for name, reader in readers.items() if isinstance(reader.gradients, Tensor)}


def _positions(activation: Tensor, dim: int) -> Tensor:
    """Return an activation as (examples, positions, channels), at least in float32."""
    rows = activation.detach().movedim(dim, -1)
    return rows.reshape(len(rows), -1, rows.shape[-1]).to(torch.promote_types(rows.dtype, torch.float32))


@dataclass
class Removal:
    """P and Q of one consumer of a group's channels while these go, one after the other (see the module's text)."""

    precision: Tensor
    weighted: Tensor

    @classmethod
    def of(cls, reader: Reader, layer: nn.Module, member: Member, width: int) -> Removal:
        """Return the start, P = Cov(x)⁻¹ and Q = M over a group's channels.

        Channels in different convolution groups cannot stand in for each other. The positions that a channel has on a
        flattened axis count like those of an image.
        """
        groups = max(slot.groups for axis in layer_axes(layer).values() for slot in axis.slots)
        block = torch.arange(member.width) * groups // member.width
        apart = block[:, None] != block
        covariance = _by_channel(reader.covariance().cpu().masked_fill(apart, 0), member, width)
        covariance /= len(member.positions) / len(set(member.channels))
        level = (reader.ridge * covariance.diagonal().mean()).clamp(min=torch.finfo(torch.float64).tiny)
        # Symmetric, and positive also where rounding is not: else what is left when mixtures are gone drowns in it.
        values, vectors = torch.linalg.eigh(covariance)
        precision = (vectors / (values.clamp(min=0) + level)) @ vectors.T
        return cls(precision, _by_channel(reader.weights().cpu().masked_fill(apart, 0), member, width))

    def losses(self) -> Tensor:
        """Return s of every channel; of those that are gone, 0."""
        return self.weighted.diagonal() / self.precision.diagonal()

    def remove(self, channel: int) -> None:
        """Take a channel out."""
        u = self.precision[channel] / self.precision[channel, channel]
        row = self.weighted[channel].clone()
        self.precision -= u[:, None] * self.precision[channel]
        self.weighted += row[channel] * u[:, None] * u - u[:, None] * row - row[:, None] * u
        self.precision[channel, channel], self.weighted[channel, channel] = 1.0, 0.0


def _by_channel(matrix: Tensor, member: Member, width: int) -> Tensor:
    """Return a matrix over an axis as one over the group's channels, summed over each channel's positions in order."""
    places: dict[int, list[int]] = {}
    for position, channel in zip(member.positions, member.channels, strict=True):
        places.setdefault(channel, []).append(position)
    channels = torch.tensor(list(places))
    total = torch.zeros(width, width, dtype=torch.float64)
    for at in map(torch.tensor, zip(*places.values(), strict=True)):
        total[channels[:, None], channels] += matrix[at[:, None], at]
    return total


def residual_scores(
    model: nn.Module,
    members: Mapping[ChannelGroup, Sequence[Member]],
    batches: Iterable[Any],
    objective: Objective,
) -> dict[ChannelGroup, Tensor]:
    """Score the channels of groups by what is lost after compensation when they go, in float64: group -> (width,).

    Each group's channels go one after the other, the one that loses least first; a channel's score is s when it goes,
    but no less than that of those before it. Blocks (attention heads, convolution groups) lose the same positions
    together and share their loss.

    Args:
        members: what reads each group's channels. The projections inside torch's attention are not seen.

    Raises:
        ValueError: no consumer of a group is called as a module or reached by the loss.
    """
    layers = dict.fromkeys(member.axis.layer for group in members.values() for member in group)
    seen = watch_readers(model, layers, batches, objective)
    scores = {}
    for group, consumers in members.items():
        removals = [
            Removal.of(seen[m.axis.layer], get_layer(model, m.axis.layer), m, group.width)
            for m in consumers
            if m.axis.layer in seen
        ]
        if not removals:
            raise ValueError(f"group {group.root}: nothing that reads it is called as a module and reached by the loss")
        scores[group] = _greedy(removals, group)
    return scores


def _greedy(removals: Sequence[Removal], group: ChannelGroup) -> Tensor:
    """Remove all of a group's channels, the least loss first; return what each had cost, at least the last cost."""
    size = group.width // group.blocks
    scores, left, level = torch.zeros(group.width, dtype=torch.float64), torch.ones(size, dtype=torch.bool), 0.0
    for _ in range(size):
        losses = sum(removal.losses() for removal in removals).view(group.blocks, size).sum(0)
        unit = int(losses.masked_fill(~left, torch.inf).argmin())
        left[unit] = False
        level = max(level, losses[unit].item() / group.blocks)
        for channel in range(unit, group.width, size):
            scores[channel] = level
            for removal in removals:
                removal.remove(channel)
    return scores
