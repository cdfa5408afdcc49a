"""The processes of a training, one a device, as Accelerate launches them; and what each borrows from its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, is_tensorboard_available

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
    rank, count, local = (int(os.environ.get(name, default)) for name, default in _NAMES)
    return Processes(rank, count, local)


_NAMES = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))


@contextmanager
def accelerating(amp: str, device: torch.device, folder: Path | None = None) -> Iterator[Accelerator]:
    """Make an Accelerator for one precision and device, beside any that the process already has.

    Accelerate keeps one precision a process in shared state; that state is put aside and brought back. With a folder,
    figures that are logged go to TensorBoard's files in it, where TensorBoard is installed.

    Raises:
        ValueError: if the device does not have the precision, or is not the one that was launched for.
    """
    if amp == "fp16" and device.type == "cpu":
        raise ValueError("amp='fp16' needs a GPU; a model on the CPU trains with amp='bf16' or 'no'")
    shared = [state._shared_state for state in (PartialState, AcceleratorState, GradientState)]
    aside = [dict(state) for state in shared]
    for state in shared:
        state.clear()
    try:
        accelerator = _accelerator(amp, device, folder)
        try:
            yield accelerator
        finally:
            for tracker in accelerator.trackers:
                tracker.finish()
    finally:
        for state, before in zip(shared, aside, strict=True):
            state.clear()
            state.update(before)


def _accelerator(amp: str, device: torch.device, folder: Path | None) -> Accelerator:
    accelerator = Accelerator(
        mixed_precision=amp,
        cpu=device.type == "cpu",
        device_placement=False,
        log_with="tensorboard" if folder is not None and is_tensorboard_available() else None,
        project_dir=folder,
        # Said out loud, so that a launcher's environment cannot divide the gradient by another number.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if accelerator.device.type != device.type:
        raise ValueError(f"the model is on {device}, but Accelerate is set to {accelerator.device}: move the model")
    if folder is not None:
        accelerator.init_trackers("tensorboard")
    return accelerator


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators of the CPU and of one device; give them their state back on the way out."""
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield
        return
    with (
        torch.random.fork_rng(devices=[device], device_type=device.type),
        torch.accelerator.device_index(device.index),
    ):
        torch.default_generator.manual_seed(seed)
        torch.get_device_module(device).manual_seed(seed)
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
