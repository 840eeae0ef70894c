"""What torch.compile, or a recorder of kernels, sees of a training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from clplat.architectures.base import Architecture, Output, State
from clplat.objective import Objective
from clplat.recording import Answer
from clplat.strategies.base import Hidden
from clplat.streams.batch import Batch

P = ParamSpec("P")
R = TypeVar("R")


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
        return inputs, output if open_logits else _closed(output, shown=hidden is not None), loss

    return answer


def _closed(output: Output, *, shown: bool) -> Output:
    """The output without a gradient through its logits, nor through activations that nobody has asked for."""
    if shown or output.hidden is None:
        return replace(output, logits=output.logits.detach())
    return replace(output, logits=output.logits.detach(), hidden=output.hidden.detach())


def replayed(mode: bool | str) -> bool:
    """Whether `training.compile` replays CUDA graphs, which write their results into the same memory each time."""
    return isinstance(mode, str)


def compiled(function: Callable[P, R], mode: bool | str, *, dynamic: bool | None = None) -> Callable[P, R]:
    """The function as `training.compile` wants it; `dynamic` as in torch.compile. Kernels are recorded of whole steps
    alone (`recording.py`)."""
    if not mode or mode == "cudagraphs":
        return function
    return torch.compile(function, mode=mode if isinstance(mode, str) else None, dynamic=dynamic)
