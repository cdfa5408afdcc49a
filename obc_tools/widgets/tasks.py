"""Work beside the kernel: in a thread, one piece at a time, and only the newest one.

A cell's code and the callbacks of widgets run one after the other in the kernel, so work in either leaves every button
dead until it ends.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Cancelled(Exception):
    """Work that is not wanted any more."""


class Task:
    """One piece of work: it is told when to stop, and tells how far it is."""

    def __init__(self, report: Callable[[str, float], None]):
        self._report = report
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Let the work end where it next looks."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Say whether the work is not wanted any more."""
        return self._cancelled.is_set()

    def check(self) -> None:
        """Raise Cancelled if the work is not wanted any more."""
        if self.cancelled:
            raise Cancelled

    def at(self, what: str, share: float) -> None:
        """Tell what is being done and how much of it is done, a share in [0, 1]; raise as `check` does."""
        self.check()
        self._report(what, share)

    def watch(self, items: Collection[T], what: str) -> Watched[T]:
        """Return the items, telling before each how far it is, and stopping there when that is asked for."""
        return Watched(self, items, what)


class Watched(Generic[T]):
    """Items whose iteration is watched by a task; may be gone through again and again."""

    def __init__(self, task: Task, items: Collection[T], what: str):
        self._task, self._items, self._what = task, items, what

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[T]:
        for number, item in enumerate(self._items):
            self._task.at(self._what, number / len(self._items))
            yield item
        self._task.check()


class Worker:
    """Does the newest piece of work in a thread; one that is under way is cancelled, and has ended before it begins.

    Attributes:
        lock: held while outcomes are handed over. What changes the same state elsewhere holds it too.
    """

    def __init__(self, report: Callable[[str, float], None], failed: Callable[[Exception], None]):
        self.lock = threading.RLock()
        self._report, self._failed = report, failed
        self._turn = threading.Lock()
        self._task: Task | None = None

    @property
    def busy(self) -> bool:
        """Say whether work is under way."""
        with self.lock:
            return self._task is not None

    def start(self, work: Callable[[Task], T], then: Callable[[T], None]) -> Task:
        """Begin a piece of work; ``then`` takes its outcome, in the thread, unless the work was cancelled meanwhile."""
        with self.lock:
            self.cancel()
            task = self._task = Task(lambda what, share: self._tell(task, what, share))
        threading.Thread(target=self._run, args=(task, work, then), daemon=True).start()
        return task

    def cancel(self) -> None:
        """Cancel the work under way; its outcome is dropped."""
        with self.lock:
            if self._task is not None:
                self._task.cancel()
                self._task = None

    def wait(self, timeout: float = 60.0) -> None:
        """Wait until no work is under way; raise TimeoutError if some still is after so many seconds."""
        end = time.monotonic() + timeout
        while self.busy:
            if time.monotonic() > end:
                raise TimeoutError(f"work is still under way after {timeout:g} s")
            time.sleep(0.005)

    def _tell(self, task: Task, what: str, share: float) -> None:
        with self.lock:
            task.check()
            self._report(what, share)

    def _run(self, task: Task, work: Callable[[Task], T], then: Callable[[T], None]) -> None:
        with self._turn:
            try:
                task.check()
                outcome = work(task)
            except Cancelled:
                logger.debug("work was cancelled")
            # Whatever it is, it is shown where the work was asked for; nobody looks at a thread's traceback.
            except Exception as error:
                logger.debug("work failed", exc_info=True)
                self._finish(task, lambda error=error: self._failed(error))
            else:
                self._finish(task, lambda: then(outcome))

    def _finish(self, task: Task, hand_over: Callable[[], None]) -> None:
        with self.lock:
            if task is not self._task:
                return
            self._task = None
            try:
                hand_over()
            except Exception as error:
                logger.debug("an outcome could not be shown", exc_info=True)
                self._failed(error)
