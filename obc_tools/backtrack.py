"""In which order layers are met when a forward pass is walked back from its outputs.

torch_pruning walks autograd's graph depth first, from the outputs, and names a group of channels after the first of its
convolutions and linear layers that it meets. The same walk over the operations of a traced pass gives the same names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

WITHOUT_GRADIENT = ("detach", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")
"""Operations through whose arguments no gradient goes back."""


@dataclass
class History:
    """The operations of a forward pass: which made each tensor, from the results of which others."""

    parents: list[tuple[int, ...]] = field(default_factory=list)
    made_by: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    layers: dict[int, str] = field(default_factory=dict)

    def note(self, name: str, results: Sequence[Tensor], arguments: Sequence[Tensor]) -> None:
        """Note one operation."""
        follows = () if name in WITHOUT_GRADIENT or name.startswith("new_") else arguments
        found = (self.made_by.get(tensor) for tensor in follows if tensor.is_floating_point())
        self.parents.append(tuple(number for number in found if number is not None))
        for tensor in results:
            if tensor.is_floating_point():
                self.made_by[tensor] = len(self.parents) - 1

    def gave(self, layer: str, output: Tensor) -> None:
        """Note that a layer ended in the operation that made `output`."""
        number = self.made_by.get(output)
        if number is not None:
            self.layers[number] = layer

    def walk_back(self, outputs: Iterable[Tensor]) -> dict[str, int]:
        """Return the layers that lead to the outputs, each with its place in the order in which they are met."""
        met: dict[str, int] = {}
        visited: set[int] = set()
        for output in outputs:
            number = self.made_by.get(output)
            waiting = [] if number is None else [number]
            self._meet(waiting, met)
            while waiting:
                number = waiting.pop()
                if number not in visited:
                    visited.add(number)
                    self._meet(self.parents[number], met)
                    waiting += self.parents[number]
        return met

    def _meet(self, numbers: Iterable[int], met: dict[str, int]) -> None:
        for number in numbers:
            if number in self.layers:
                met.setdefault(self.layers[number], len(met))
