"""Configurations of transformers: let a pruned network's say its widths, or let `save_pretrained` say why it cannot.

Which parameters and attributes an entry decides is found by building networks, without memory, from changed entries;
no name of an entry is known here.
"""

from __future__ import annotations

import copy
import dis
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, partial
from itertools import pairwise
from types import CodeType
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from .unseen import forward_codes, named_forward, names_in

Path = tuple[str | int, ...]
Place = tuple[str, int | str]
"""Where a network has a number: a parameter or buffer and its dimension, a module and its attribute."""
Sizes = Mapping[Place, float]

MOST_BUILDS = 60
PROBE = 48
"""What an entry is set to that is usually not given; many numbers divide it."""


class ConfigError(ValueError):
    """A network that no configuration of its type describes."""


@dataclass(frozen=True)
class _Refused:
    """Stands in for `save_pretrained` of a network that `from_pretrained` could not read."""

    reason: str

    def __call__(self, *_: Any, **__: Any) -> None:
        raise ConfigError(
            f"{self.reason}; obc_tools.save_pruned(folder, model, plan) keeps any pruned network, and "
            "load_pruned(folder, model=...) takes the network before pruning"
        )


def follow_config(model: nn.Module, shrunk: nn.Module) -> None:
    """Set the configuration of a shrunk network, in place; where it cannot be, `save_pretrained` raises ConfigError."""
    if not hasattr(type(model), "save_pretrained") or not hasattr(model, "config"):
        return
    before, after = sizes_of(model), sizes_of(shrunk)
    if before == after:
        return
    try:
        found = _Search(model, shrunk, before, after).entries()
    except ConfigError as error:
        shrunk.save_pretrained = _Refused(str(error))
        return
    for path, value in found.items():
        _set(shrunk.config, path, value)


@dataclass
class _Search:
    """Looks for the entries of a configuration that make a network of other sizes."""

    model: nn.Module
    shrunk: nn.Module
    before: Sizes
    after: Sizes
    tried: dict[frozenset, Sizes | None] = field(default_factory=dict)

    def entries(self) -> dict[Path, int]:
        """Return the entries to change; raise ConfigError where none make that network."""
        kind = type(self.model).__name__
        if not hasattr(self.model.config, "to_diff_dict"):
            raise ConfigError(f"the configuration of {kind} cannot say the widths of a pruned network")
        found = self._solve({})
        if found is None:
            name, dim = next(place for place in self.after if self.after[place] != self.before.get(place))
            raise ConfigError(f"no configuration of {kind} describes this network, such as {name!r} along {dim!r}")
        made, pruned = self._made(found, init_empty_weights), dict(self.shrunk.named_buffers())
        for name, buffer in _unsaved(made) if made is not None else ():
            if not torch.equal(buffer, pruned[name]):
                raise ConfigError(f"{kind} makes {name!r} anew, not as the network before pruning had it")
        return found

    def _solve(self, changed: dict[Path, int]) -> dict[Path, int] | None:
        """Change one more entry where a size is not as wanted, until all are."""
        made = self._sizes(changed)
        if made is None or made.keys() != self.after.keys():
            return None
        place = next((place for place, size in self.after.items() if made[place] != size), None)
        if place is None:
            return changed
        for path, probe in self._probes.items():
            if path not in changed and (likely := self._likely(path, probe, place, made[place])):
                for value in likely:
                    found = self._solve(changed | {path: value})
                    if found is not None:
                        return found
        return None

    def _likely(self, path: Path, probe: int, place: Place, size: float) -> list[int]:
        """Return the values of an entry that might make a size as wanted: it may multiply the size or divide it."""
        made, usually = self._sizes({path: probe}), self._sizes({})
        if made is None or usually is None or place not in made or made[place] == usually[place]:
            return []
        usual, wanted = self._numbers[path], Fraction(self.after[place]) / Fraction(size)
        if usual is None:
            values = [Fraction(self.after[place]) * probe / Fraction(made[place])]
        else:
            values = [usual * wanted, usual / wanted]
        return [int(value) for value in values if value.denominator == 1 and value > 0]

    @cached_property
    def _numbers(self) -> dict[Path, int | None]:
        """Return the entries that may be widths and that no forward pass reads: to change them changes no output."""
        config = self.model.config
        codes = [code for kind in {type(module) for module in self.model.modules()} for code in forward_codes(kind)]
        read = set().union(*map(_read_of_config, codes))
        read |= {name for other, name in config.attribute_map.items() if other in read}
        return {path: value for path, value in _entries(config) if read.isdisjoint(path)}

    @cached_property
    def _probes(self) -> dict[Path, int]:
        """Return another value of each entry, those that are usually given before those that are not."""
        return {path: 2 * usual for path, usual in self._numbers.items() if usual} | {
            path: PROBE for path, usual in self._numbers.items() if usual is None
        }

    def _sizes(self, changed: Mapping[Path, int]) -> Sizes | None:
        """Return the sizes of the network that a changed configuration makes; None where it makes none."""
        key = frozenset(changed.items())
        if key not in self.tried:
            made = self._made(changed, partial(torch.device, "meta")) if len(self.tried) < MOST_BUILDS else None
            self.tried[key] = None if made is None else sizes_of(made)
        return self.tried[key]

    def _made(self, changed: Mapping[Path, int], place: Callable[[], Any]) -> nn.Module | None:
        config = copy.deepcopy(self.shrunk.config)  # some of its entries may be right already
        try:
            for path, value in changed.items():
                _set(config, path, value)
            with place():
                return type(self.model)(config)
        except Exception:  # its constructor refuses the combination, in whatever way
            return None


def _unsaved(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that are in no file of the network, but made by its constructor."""
    for prefix, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            if module._buffers[name] is not None:
                yield f"{prefix}.{name}".lstrip("."), module._buffers[name]


def sizes_of(model: nn.Module) -> Sizes:
    """Return the dimensions of all parameters and buffers, and the numbers in attributes that a forward pass names."""
    found: dict[tuple[str, int | str], float] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found |= {(name, dim): size for dim, size in enumerate(tensor.shape)}
    for name, module in model.named_modules():
        named = named_forward(type(module))
        numbers = {key: held for key, held in vars(module).items() if type(held) in (int, float)}
        found |= {(name, key): held for key, held in numbers.items() if key in named and math.isfinite(held)}
    return found


def _read_of_config(code: CodeType) -> set[str]:
    """Return the entries of `config` that code reads: all names where it hands the configuration on."""
    found = set().union(*(_read_of_config(const) for const in code.co_consts if isinstance(const, CodeType)))
    for one, then in pairwise(dis.get_instructions(code)):
        if one.argval == "config" and one.opname.startswith("LOAD_"):
            attribute = then.opname in ("LOAD_ATTR", "LOAD_METHOD")
            found |= {then.argval} if attribute else names_in(code)
    return found


def _entries(config: Any, before: Path = ()) -> Iterator[tuple[Path, int | None]]:
    """Yield every whole number that a configuration has or may have, those of lists and inner configurations too."""
    inner = enumerate(config) if isinstance(config, list | tuple) else vars(config).items()
    declared = getattr(type(config), "__annotations__", {})
    for key, held in inner:
        whole = isinstance(held, int) and not isinstance(held, bool) and held > 1
        if whole or (held is None and "int" in str(declared.get(key, ""))):
            yield (*before, key), held
        elif isinstance(held, list | tuple) or hasattr(held, "to_diff_dict"):
            yield from _entries(held, (*before, key))


def _set(config: Any, path: Sequence[str | int], value: int) -> None:
    key, *rest = path
    held = getattr(config, key)
    if rest and isinstance(held, list | tuple):
        value = type(held)(value if i == rest[0] else item for i, item in enumerate(held))
    elif rest:
        return _set(held, rest, value)
    setattr(config, key, value)
    return None
