"""What this process may use of the machine, and whether a configuration asks for more."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

from clplat.config import TrainingConfig
from clplat.errors import ConfigError


def cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_room(training: TrainingConfig) -> None:
    """Refuse more threads, or more processes, than the machine can run at once: they would wait for one another.

    Two processes are let through everywhere, so that what several do differently can be tried on one core. Threads are
    part of a result, so that a run that was begun with more has to be resumed where there are as many.
    """
    import torch

    there, on_gpu = cores(), training.accelerator != "cpu" and torch.cuda.is_available()
    if training.accelerator == "gpu" and not on_gpu:
        raise ConfigError("training.accelerator: 'gpu' was asked for, and torch sees none; use 'auto' or 'cpu'")
    if training.threads > there:
        raise ConfigError(
            f"training.threads: is {training.threads}, and this process may use {there} cores; set it to {there} or "
            "less, or, since a run that was begun keeps its threads, resume it on a larger machine"
        )
    room, what = (torch.cuda.device_count(), "GPUs") if on_gpu else (max(there, 2), "processes for its cores")
    if training.devices > room:
        raise ConfigError(
            f"training.devices: is {training.devices}, and this machine has {room} {what}; set it to {room} or less"
        )


@contextmanager
def no_collector() -> Iterator[None]:
    """Without Python's garbage collector: MLflow's import and a thousand runs make hundreds of thousands of objects
    that stay, and walking them again and again takes as long as all the rest."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
