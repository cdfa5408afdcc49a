"""The processes of a training, one a device, and the random state that each lends it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

PATIENCE = timedelta(hours=6)
"""How long processes wait for one that works alone, such as on a plan."""


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
    """
    error = None
    try:
        yield
    except Exception as found:
        error = found
    own = processes()
    if own.count > 1:
        state = PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
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


@contextmanager
def lent_random_state(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Give torch's generators of the CPU and of one device their state back on the way out; begin with a seed."""
    devices = [] if device.type == "cpu" else [device]
    with (
        torch.random.fork_rng(devices=devices, device_type=device.type),
        torch.accelerator.device_index(device.index),
    ):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            for each in devices:
                torch.get_device_module(each).manual_seed(seed)
        yield


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of torch's generators of the CPU and of one device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Bring back what :func:`random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"], device)
