"""The processes of a training, one a device."""

from __future__ import annotations

import atexit
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch.distributed import TCPStore

PATIENCE = timedelta(hours=6)
"""How long processes wait for one that works alone, such as on a plan."""
MEETING, MINUTES_TO_MEET = "OBC_TOOLS_MINUTES_TO_MEET", 10.0
"""The environment variable that says how long processes wait, in the beginning, until all have come; and without it."""
SECONDS_BETWEEN_LOOKS, SECONDS_TO_FAIL = 1.0, 5.0
"""How often processes look whether another has failed, and how long they then have to fail by themselves: of a loss
that is not finite, all do."""
_WATCHES = []

logger = logging.getLogger(__name__)


class Processes(NamedTuple):
    """This process among those that train together."""

    rank: int
    count: int
    local_rank: int

    @property
    def is_main(self) -> bool:
        """Say whether this process writes files and shows progress."""
        return self.rank == 0

    @property
    def share(self) -> tuple[int, int]:
        """This process's share of a batch, for `Data.batches`."""
        return self.rank, self.count


def processes() -> Processes:
    """Return what a launcher (accelerate launch, torchrun) told this process in its environment; alone without one."""
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    return Processes(*(int(os.environ.get(name, default)) for name, default in names.items()))


@contextmanager
def agreed(device: torch.device) -> Iterator[None]:
    """Run the checks of a training; where several processes train together, all pass them, or every process raises.

    Else those that pass would wait for hours for one that does not come. Where there are several, this joins them.

    Raises:
        ValueError: for what another process raised (says which), or for a device not of the kind that was launched for.
        TimeoutError: not all processes came within `MEETING` minutes.
    """
    own, error = processes(), None
    state = _met(own, device) if own.count > 1 else None
    try:
        yield
    except Exception as found:
        error = found
    if state is not None:
        if error is None and state.device.type != device.type:
            error = ValueError(f"the model is on {device}, but Accelerate is set to {state.device}: move the model")
        others = gather_object([None if error is None else f"{type(error).__name__}: {error}"])
        failed = next(
            (f"process {rank} of {own.count} raised {said}" for rank, said in enumerate(others) if said), None
        )
        if error is None and failed is not None:
            raise ValueError(f"{failed}; all end")
    if error is not None:
        raise error


def _met(own: Processes, device: torch.device) -> PartialState:
    """Join the other processes of a training, once all have come."""
    if torch.distributed.is_initialized():
        return PartialState(cpu=device.type == "cpu")
    said = os.environ.get(MEETING, MINUTES_TO_MEET)
    try:
        limit = timedelta(minutes=float(said))
        if not timedelta() < limit <= PATIENCE:
            raise OverflowError
    except (ValueError, OverflowError):
        raise ValueError(f"{MEETING}={said}: expected minutes, above 0 and at most 360") from None
    begun = time.monotonic()
    try:
        state = PartialState(cpu=device.type == "cpu", timeout=limit)
    except RuntimeError as error:
        if time.monotonic() - begun < limit.total_seconds() / 2:
            raise
        raise TimeoutError(
            f"process {own.rank} of {own.count} waited {float(said):g} minutes for the others to begin, not all came: "
            f"see why in what they wrote, then start all again; {MEETING}, in the environment, sets how long they wait"
        ) from error
    lengthen = getattr(torch.distributed, "set_timeout", None) or torch.distributed.distributed_c10d._set_pg_timeout
    lengthen(PATIENCE)
    return state


@contextmanager
def failing_together() -> Iterator[None]:
    """Where one of several processes that train together fails, have all end soon, though it may live on.

    Else those that wait for its share of a step would do so for `PATIENCE`, in torch's own code, which nothing but the
    end of the process interrupts. One that fails leaves word; the others look for it until all begin another training.

    Raises:
        ValueError: for what another process raised (says which), where that has closed the connection.
    """
    own = processes()
    if own.count == 1:
        yield
        return
    _end_watches()  # all have left the training before
    store, words = _common_store(own), [str(rank) for rank in range(own.count)]
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(store, words, ended), daemon=True)
    watch.start()
    _WATCHES.append((ended, watch))
    try:
        yield
    except Exception as error:
        ended.set()
        said = _word_of_another(store, words)
        if said is not None and isinstance(error, RuntimeError):
            raise ValueError(said) from error
        store.set(words[own.rank], f"{type(error).__name__}: {error}")
        raise


def _common_store(own: Processes) -> TCPStore:
    """Return a store that all processes share, in the memory of the first; each calls this."""
    place = [os.environ.get("MASTER_ADDR") or socket.gethostname(), 0]
    store = TCPStore(*place, is_master=True, wait_for_workers=False) if own.is_main else None
    host, port = broadcast_object_list([place[0], store.port if store else None])
    return store or TCPStore(host, port)


@atexit.register
def _end_watches() -> None:
    """End the threads that watch: one inside torch while the interpreter ends would abort the process."""
    while _WATCHES:
        ended, watch = _WATCHES.pop()
        ended.set()
        watch.join(SECONDS_TO_FAIL)


def _watch(store: TCPStore, words: Sequence[str], ended: threading.Event) -> None:
    """End this process a while after another has failed, unless it is told by then that this one has ended, too."""
    while not ended.wait(SECONDS_BETWEEN_LOOKS):
        try:
            said = _word_of_another(store, words)
        except RuntimeError:  # who kept the words has ended, and the connections to it
            return
        if said is not None and not ended.wait(SECONDS_TO_FAIL):
            logger.error("%s", said)
            sys.stderr.write(f"obc_tools: {said}\n")
            sys.stderr.flush()
            os._exit(1)


def _word_of_another(store: TCPStore, words: Sequence[str]) -> str | None:
    """Return what the first process that failed has raised, None where none has."""
    for rank, word in enumerate(words):
        if store.check([word]):
            return f"process {rank} of {len(words)} raised {store.get(word).decode()}; all end"
    return None
