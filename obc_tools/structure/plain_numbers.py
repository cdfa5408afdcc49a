"""Widths that become plain numbers where no number is asked: noted by what stands in for the other side.

Python asks no whole number how it becomes an index or a factor of a float. So while a model is traced, the floats and
tables of numbers that its functions spell out, keep or find among their globals note the widths that they meet; and
so do `range` and functions of `math`. The functions are made anew for the traced copy, the model's own left alone.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import math
import sys
from collections.abc import Callable
from contextlib import suppress
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

from ..state import Restoring, shared
from .flow import plain

FOREIGN = {"torch", "numpy", "obc_tools"} | sys.stdlib_module_names - {"__main__"}
"""Packages whose functions are left as they are."""


class _RangeType(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, _RANGE)


class _Range(metaclass=_RangeType):
    def __new__(cls, *ends: Any) -> range:
        return _RANGE(*(plain(end, "range") for end in ends))


def _noting(function: Callable) -> Callable:
    name = "root" if function is math.sqrt else function.__name__

    @functools.wraps(function)
    def note(*args: Any) -> Any:
        return function(*(plain(arg, name) for arg in args))

    return note


_RANGE = range
_SEEN = [(builtins, "range", _RANGE, _Range)]
_NOTED = (math.sqrt, math.log, math.log2, math.log10, math.isqrt, math.gcd)
_SEEN += [(math, function.__name__, function, _noting(function)) for function in _NOTED]


def seen_by_python() -> Restoring:
    """Let `range` and functions of `math` note the widths that they take: these ask no number how it becomes plain."""

    def place(noting: bool) -> None:
        for module, name, *functions in _SEEN:
            setattr(module, name, functions[noting])

    return shared("range and math", functools.partial(place, True), functools.partial(place, False))


class _Float(float):
    """A number that notes the widths that it meets: a float asks no whole number how it becomes plain."""


def _noting_other(method: str) -> Callable:
    def compute(self: _Float, *others: Any) -> Any:
        found = getattr(float, method)(self, *(plain(other, method.strip("_").removeprefix("r")) for other in others))
        return _Float(found) if type(found) is float else found

    return compute


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
for _name in (*_BINARY, *(f"r{name}" for name in _BINARY), "lt", "le", "gt", "ge", "neg", "abs"):
    setattr(_Float, f"__{_name}__", _noting_other(f"__{_name}__"))


def _looking_up(kind: type, *methods: str) -> type:
    """Return a kind of table that notes the widths that are looked up in it."""

    def noting(method: str) -> Callable:
        return lambda self, key, *rest: getattr(kind, method)(self, plain(key, "lookup"), *rest)

    return type(f"_{kind.__name__}", (kind,), {method: noting(method) for method in methods})


_TABLES = {
    list: _looking_up(list, "__getitem__"),
    tuple: _looking_up(tuple, "__getitem__"),
    dict: _looking_up(dict, "__getitem__", "__contains__", "get"),
    frozenset: _looking_up(frozenset, "__contains__"),
    set: _looking_up(set, "__contains__"),
}


class _Globals(dict):
    """The globals of a function, each watched when it is asked for; what the function writes stays here."""

    def __init__(self, original: dict[str, Any], watch: Callable[[Any], Any]):
        super().__init__({name: held for name, held in original.items() if name.startswith("__")})
        self.original, self.watch = original, watch

    def __missing__(self, name: str) -> Any:
        held = self.original[name]
        found = self.watch(held)
        if found is not held:
            self[name] = found
        return found


class _Module(ModuleType):
    """A module that watches what is asked of it; functions of `math` give watched numbers."""

    def __init__(self, original: ModuleType, watch: Callable[[Any], Any]):
        super().__init__(original.__name__)
        vars(self).update(original=original, watch=watch)

    def __getattr__(self, name: str) -> Any:
        held = getattr(self.original, name)
        if self.original is math and callable(held):
            return lambda *args: self.watch(held(*args))
        return self.watch(held)


class Watch:
    """Makes functions anew whose numbers note the widths that they meet; each once."""

    def __init__(self) -> None:
        self.functions: dict[FunctionType, FunctionType] = {}
        self.globals: dict[int, _Globals] = {}
        self.cells: dict[int, CellType] = {}

    def value(self, held: Any) -> Any:
        """Return what stands in for a value: a float, a table of numbers, a function; all else as it is."""
        kind = type(held)
        if kind is float:
            return _Float(held)
        if kind in _TABLES and held and _is_numbers(held):
            return _TABLES[kind](held)
        if kind is ModuleType and (held is math or not is_foreign(held.__name__)):
            return _Module(held, self.value)
        if kind is functools.partial:
            named = {name: self.value(each) for name, each in held.keywords.items()}
            return functools.partial(self.value(held.func), *map(self.value, held.args), **named)
        return self.function(held) if kind is FunctionType else held

    def function(self, function: FunctionType) -> FunctionType:
        """Return a function that computes the same, or itself where it holds and finds nothing to watch."""
        if function in self.functions:
            return self.functions[function]
        if is_foreign(function.__module__ or ""):
            return function
        if id(function.__globals__) not in self.globals:
            self.globals[id(function.__globals__)] = _Globals(function.__globals__, self.value)
        closure = function.__closure__ or ()
        fresh = [cell for cell in closure if id(cell) not in self.cells]
        self.cells.update((id(cell), CellType()) for cell in fresh)
        cells = tuple(self.cells[id(cell)] for cell in closure)
        seen = self.globals[id(function.__globals__)]
        made = FunctionType(self._code(function.__code__), seen, function.__name__, closure=cells)
        self.functions[function] = made  # before what it holds, which may be itself
        made.__defaults__ = function.__defaults__ and tuple(map(self.value, function.__defaults__))
        made.__kwdefaults__ = function.__kwdefaults__ and {k: self.value(v) for k, v in function.__kwdefaults__.items()}
        for cell in fresh:
            with suppress(ValueError):  # it is empty yet
                self.cells[id(cell)].cell_contents = self.value(cell.cell_contents)
        return functools.update_wrapper(made, function)

    def _code(self, code: CodeType) -> CodeType:
        constants = (self._code(each) if isinstance(each, CodeType) else each for each in code.co_consts)
        return code.replace(co_consts=tuple(map(self.value, constants)))


def is_foreign(module: str) -> bool:
    """Say whether a module is not the user's, nor of a library of networks."""
    return module.partition(".")[0] in FOREIGN


def _is_numbers(held: list | tuple | dict | frozenset | set) -> bool:
    """Say whether a table holds plain numbers alone, by whole numbers if they are looked up by keys.

    A list of whole numbers may be sizes, which functions of torch ask for by their type.
    """
    values = held.values() if isinstance(held, dict) else held
    if isinstance(held, dict) and any(type(key) is not int for key in held):
        return False
    kinds = set(map(type, values))
    return kinds <= {int, float} and (float in kinds or not isinstance(held, list | tuple))


def watch_numbers(model: nn.Module) -> None:
    """Let the numbers that modules keep, and those that their functions spell out or find, note widths; in place."""
    watch = Watch()
    for module in model.modules():
        if type(module).__module__.startswith("torch.nn"):
            continue
        held = vars(module)
        held.update({key: watch.value(value) for key, value in held.items() if not key.startswith("_")})
        held.update(_methods(module, watch))


def _methods(module: nn.Module, watch: Watch) -> dict[str, Callable]:
    """Return the methods of a module's class and its ancestors below torch's, but those that it keeps others for."""
    names = {name for kind in type(module).__mro__ if kind is not nn.Module for name in vars(kind)}
    found = {name: inspect.getattr_static(module, name) for name in names - vars(module).keys() if name[:2] != "__"}
    methods: dict[str, Callable] = {}
    for name, method in found.items():
        if isinstance(method, staticmethod | classmethod) and isinstance(method.__func__, FunctionType):
            function = watch.function(method.__func__)
            methods[name] = function if isinstance(method, staticmethod) else MethodType(function, type(module))
        elif isinstance(method, FunctionType):
            methods[name] = MethodType(watch.function(method), module)
    return methods
