"""What a memory reads, token by token, and what it carries from one call to the next.

Shapes, here and in the modules beside it: B rows, H heads, T tokens, L tokens of a chunk, D features of a key, E of a
value, I inputs and O outputs of one of the memory's layers, X 1 or I: gates of a layer's inputs, together or each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LOWEST_GATE = -12.0
"""Log gates are clamped to this, as `kernels.delta_memory` clamps them: e^−12 of a state is left."""

Layers = tuple[Tensor, ...]
"""A tensor for every layer of the memory, first to last."""


class MemoryState(NamedTuple):
    """A memory between two tokens, in float32 or float64. Give it back to go on, at any token."""

    weights: Layers
    """(B, H, I, O) of each layer."""
    momentum: Layers
    """The same shapes; empty without momentum."""
    anchor: Layers
    """The weights when the open chunk began; empty where chunks are not part of the function."""
    offset: Tensor
    """(B,) long, how many tokens of the open chunk are written; 0 where a new one begins."""


class Tokens(NamedTuple):
    """What is written and asked, heads first and in the state's precision."""

    q: Tensor
    """(B, H, T, D) queries."""
    k: Tensor
    """(B, H, T, D) keys."""
    v: Tensor
    """(B, H, T, E) values."""
    rate: Tensor
    """(B, H, T) step sizes."""
    log_decay: Layers
    """(B, H, T, X) of each layer, ≤ 0; empty where nothing is forgotten."""
    log_momentum: Tensor | None
    """(B, H, T), ≤ 0."""
    threshold: Tensor | None
    """(B, H, T), above 0, of the Huber bias."""
    counts: Tensor | None = None
    """(B, T) bool: a token that does not count changes nothing. None: all count."""

    def part(self, start: int, stop: int) -> Tokens:
        """The tokens start..stop of every row."""
        return self.changed(lambda part, axis: part.narrow(axis, start, min(stop, part.shape[axis]) - start))

    def taken(self, source_BN: Tensor) -> Tokens:
        """Tokens in new places: column n of row b holds what stood at source[b, n]; −1 is one that does not count."""
        index = source_BN.clamp(min=0)

        def gathered(part: Tensor, axis: int) -> Tensor:
            shape = [len(index), *[1] * (part.ndim - 2)]
            shape.insert(axis, index.shape[1])
            return part.take_along_dim(index.view(shape), axis)

        moved, here = self.changed(gathered), source_BN >= 0
        return moved._replace(counts=here if moved.counts is None else here & moved.counts)

    def silenced(self) -> Tokens:
        """Gates of tokens that do not count as they must be to change nothing."""
        if self.counts is None:
            return self
        off = ~self.counts.unsqueeze(1)
        return self._replace(
            rate=self.rate.masked_fill(off, 0.0),
            log_decay=tuple(gate.masked_fill(off.unsqueeze(-1), 0.0) for gate in self.log_decay),
            log_momentum=None if self.log_momentum is None else self.log_momentum.masked_fill(off, 0.0),
        )

    def changed(self, change: Callable[[Tensor, int], Tensor]) -> Tokens:
        """Every tensor made another, told the axis of its tokens."""
        parts = [None if part is None else change(part, 2) for part in (*self[:4], *self[5:7])]
        q, k, v, rate, log_momentum, threshold = parts
        assert q is not None and k is not None and v is not None and rate is not None
        log_decay = tuple(change(gate, 2) for gate in self.log_decay)
        counts = None if self.counts is None else change(self.counts, 1)
        return Tokens(q, k, v, rate, log_decay, log_momentum, threshold, counts)


def chosen(condition_B: Tensor, yes: Sequence[Tensor], no: Sequence[Tensor]) -> Layers:
    """For each row the tensors of `yes` where the condition holds, else those of `no`."""
    mask = condition_B[:, None, None, None]
    return tuple(torch.where(mask, a, b) for a, b in zip(yes, no, strict=True))


def each_part(change: Callable[..., Tensor], *states: MemoryState) -> MemoryState:
    """A state of which each tensor is made from those of others."""
    weights, momentum, anchor = (
        tuple(change(*parts) for parts in zip(*(state[field] for state in states))) for field in range(3)
    )
    return MemoryState(weights, momentum, anchor, change(*(state.offset for state in states)))


def repeated(state: MemoryState, rows: int) -> MemoryState:
    """The state of one row for `rows` of them."""
    return each_part(lambda part: part.expand(rows, *part.shape[1:]), state)
