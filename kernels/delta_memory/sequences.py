"""What operations on a memory a sequence share, whatever its state: rows one by one, gates and states of the caller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from clplat.kernels.delta_memory.reference import LOWEST_GATE

State = TypeVar("State", bound=tuple[Any, ...])
"""A NamedTuple of tensors and None, a row of each for every sequence, with an `offset`."""


def clamped(log_gate: Tensor | None) -> Tensor | None:
    """Log gates no lower than they may be."""
    return None if log_gate is None else log_gate.clamp(min=LOWEST_GATE)


def apart(end: State, given: State) -> State:
    """The same state without tensors of the caller's, which parts are that nothing was written to."""
    own = [id(part) for part in given if part is not None]
    return type(end)(*(part.clone() if part is not None and id(part) in own else part for part in end))


def one_by_one(
    function: Callable[..., tuple[Tensor, State]],
    joined: Callable[[Sequence[State]], State],
    inputs: Any,
    state: State,
    offset: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, State]:
    """Sequences of their own lengths or offsets, one call for each; waits for the device to read them. `joined` makes
    one state of theirs. `inputs` is a NamedTuple of token-wise tensors, which its `tokens` slices. Without a sequence
    its values, of which there are none, and the state come back."""
    count = len(state[0])
    bounds = [0] * (count + 1) if cu_seqlens is None else cu_seqlens.tolist()
    offsets = [0] * count if offset is None else offset.tolist()
    outputs, states = [], []
    for n in range(count):
        own = inputs if cu_seqlens is not None else type(inputs)(*(None if x is None else x[n : n + 1] for x in inputs))
        tokens = own if cu_seqlens is None else own.tokens(bounds[n], bounds[n + 1])
        row = type(state)(*(None if part is None else part[n : n + 1] for part in state))  # type: ignore[arg-type]
        o, after = function(tokens, state=row, offset=offsets[n])
        outputs.append(o)
        states.append(after)
    if not outputs:
        return inputs.v, state
    return torch.cat(outputs, 0 if cu_seqlens is None else 1), joined(states)
