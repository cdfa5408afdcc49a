"""The processes of a training, one a device, and the random state that each lends it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
from accelerate import PartialState

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


def meet(device: torch.device) -> None:
    """Join the other processes, where there are any, and wait until all have.

    Raises:
        ValueError: if the device is not of the kind that was launched for.
    """
    if processes().count == 1:
        return
    state = PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
    if state.device.type != device.type:
        raise ValueError(f"the model is on {device}, but Accelerate is set to {state.device}: move the model")
    state.wait_for_everyone()


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
