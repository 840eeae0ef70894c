"""What torch.compile sees of a training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from clplat.architectures.base import Architecture, Output, State
from clplat.objective import Objective
from clplat.strategies.base import Hidden
from clplat.streams.batch import Batch

P = ParamSpec("P")
R = TypeVar("R")
Answer = Callable[[Batch, State], tuple[Tensor | None, Output, Tensor | None]]


def answerer(
    architecture: Architecture,
    objective: Objective | None,
    augment: Callable[[Tensor], Tensor] | None,
    *,
    with_inputs: bool,
    open_logits: bool,
    hidden: Hidden | None = None,
) -> Answer:
    """Augmentation, forward pass and default loss as one function, so that a compiler can join them.

    It gives the inputs as the model saw them (`with_inputs`; each result costs a replayed graph time), the output, and
    the loss: a scalar, or one part for each origin of a mixed batch, or None without `objective`. Without `open_logits`
    no gradient but the loss's flows through the logits, which spares the backward pass a zero for each of them.
    `hidden` says which activations the output is to show.
    """

    def answer(batch: Batch, state: State) -> tuple[Tensor | None, Output, Tensor | None]:
        if augment is not None:
            batch = batch.replaced(inputs=augment(batch.inputs))
        output = architecture(batch, state) if hidden is None else architecture(batch, state, hidden)
        inputs = batch.inputs if with_inputs else None
        if objective is None:
            return inputs, output, None
        loss = objective(output, batch) if batch.origin is None else objective.by_origin(output, batch)
        return inputs, output if open_logits else replace(output, logits=output.logits.detach()), loss

    return answer


def replayed(mode: bool | str) -> bool:
    """Whether `training.compile` replays CUDA graphs, which write their results into the same memory each time."""
    return isinstance(mode, str)


def compiled(function: Callable[P, R], mode: bool | str, *, dynamic: bool | None = None) -> Callable[P, R]:
    """The function as `training.compile` wants it; `dynamic` as in torch.compile."""
    if not mode:
        return function
    if mode == "cudagraphs":
        return torch.compile(function, backend="cudagraphs", dynamic=dynamic)
    return torch.compile(function, mode=mode if isinstance(mode, str) else None, dynamic=dynamic)
