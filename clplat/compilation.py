"""What torch.compile sees of a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from clplat.architectures.base import Architecture, Output, State
from clplat.objective import Objective
from clplat.streams.batch import Batch

P, R = ParamSpec("P"), TypeVar("R")
Answer = Callable[[Batch, State], tuple[Output, Tensor | None]]


def answerer(architecture: Architecture, objective: Objective | None, mode: bool | str) -> Answer:
    """The forward pass and the default loss as one function, so that a compiler can join the head and the loss.

    The loss is a scalar, or one part for each origin of a mixed batch, or None without `objective`.
    """

    def answer(batch: Batch, state: State) -> tuple[Output, Tensor | None]:
        output = architecture(batch, state)
        if objective is None:
            return output, None
        return output, objective(output, batch) if batch.origin is None else objective.by_origin(output, batch)

    return compiled(answer, mode)


def compiled(function: Callable[P, R], mode: bool | str) -> Callable[P, R]:
    """The function as `training.compile` wants it."""
    return torch.compile(function, mode=mode if isinstance(mode, str) else None) if mode else function
