"""Calls that can be left in the middle: several forward passes go on side by side, one of them at a time.

A forward pass runs to its end once begun, and hooks inside it cannot wait for another pass. Each call here has a thread
of its own, and exactly one thread runs at any time, so that they are generators whose body may pause at any depth.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

_here = threading.local()


class PausableCall:
    """A call of a function without arguments that stops wherever `pause` is called inside; gradients are off in it.

    A context manager: on the way out, the call is unwound from where it stopped, so that no thread is left.
    """

    def __init__(self, function: Callable[[], Any]):
        self._function = function
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._value: Any = None
        self._error: BaseException | None = None
        self._closing = self._ended = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> PausableCall:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        if not self._ended:
            self._go.release()
        self._thread.join()

    def resume(self) -> Any:
        """Go on to the next `pause`; return the value given there, or None when the call has come to its end.

        Raises what the call raises.
        """
        if self._ended:
            return None
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error
        value, self._value = self._value, None
        return value

    def _run(self) -> None:
        self._go.acquire()
        _here.call = self
        try:
            if not self._closing:
                with torch.no_grad():
                    self._function()
        except GeneratorExit:
            pass
        except BaseException as error:  # handed on to whoever resumes
            self._error = error
        finally:
            self._ended = True
            self._back.release()

    def _pause(self, value: Any) -> None:
        self._value = value
        del value
        self._back.release()
        self._go.acquire()
        if self._closing:
            raise GeneratorExit


def pause(value: Any) -> None:
    """Stop the running `PausableCall` here and hand a value, not None, to whoever resumed it; elsewhere do nothing."""
    call = getattr(_here, "call", None)
    if call is not None:  # none in another thread that happens to run the same network
        call._pause(value)
