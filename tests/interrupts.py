"""Ctrl-C at a chosen line of the library, and all state that a call must leave as it was."""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

import obc_tools

LIBRARY = str(Path(obc_tools.__file__).parent)


class Counter:
    """Counts the lines that run in the library, and raises KeyboardInterrupt at one of them."""

    def __init__(self, stop=None):
        self.stop, self.lines, self.where = stop, 0, None

    def __call__(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(LIBRARY):
            return None
        return self._line

    def _line(self, frame, event, argument):
        if event == "line":
            self.lines += 1
            if self.lines == self.stop:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
                raise KeyboardInterrupt
        return self._line


def run(call, stop=None):
    """Run a call, interrupted at the `stop`-th line; return the counter."""
    counter, before = Counter(stop), sys.gettrace()
    sys.settrace(counter)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return counter


FUNCTIONS = {name: getattr(F, name) for name in dir(F) if callable(getattr(F, name))}


def state(model, inputs):
    """Return what a call must leave as it was, in a form that compares."""
    modules = list(model.named_modules())
    hooks = [key for key in vars(nn.Module()) if key.endswith("_hooks")]
    return {
        "weights": {key: value.clone() for key, value in model.state_dict().items()},
        "places": {key: value.data_ptr() for key, value in model.state_dict().items()},
        "inputs": [leaf.clone() for leaf in tree_leaves(inputs)],
        "modes": {name: module.training for name, module in modules},
        "attributes": {name: sorted(vars(module)) for name, module in modules},
        "forward": {name: "forward" in vars(module) for name, module in modules},
        "hooks": {name: [len(getattr(module, key)) for key in hooks] for name, module in modules},
        "flags": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "gradients": {name: parameter.grad is None for name, parameter in model.named_parameters()},
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "functions": [name for name in FUNCTIONS if getattr(F, name) is not FUNCTIONS[name]],
        "dispatch modes": list(_get_current_dispatch_mode_stack()),
        "function modes": list(_get_current_function_mode_stack()),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "random numbers": torch.get_rng_state(),
        "global hooks": [
            len(getattr(nn.modules.module, key))
            for key in dir(nn.modules.module)
            if key.startswith("_global_") and key.endswith("hooks")
        ],
        "compiler stance": torch.compiler.is_compiling(),
    }


def differences(before, after):
    """Return the names of what differs."""
    return [name for name in before if not _same(before[name], after[name])]


def _same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other
