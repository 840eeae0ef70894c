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
    window: Layers = ()
    """Keys (B, H, c − 1, D), values (B, H, c − 1, E) and, of the Huber bias, thresholds (B, H, c − 1, 1) of the last
    pairs, oldest first, where the rule's window is c > 1; keys of zeros, which write nothing, before the first pair."""
    owed: Layers = ()
    """With orthogonal steps, (B, H, X, 1) of each layer: how far the next one goes for the open chunk's tokens."""


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
    erase: Tensor | None = None
    """(B, H, T), how much of its direction a token erases under a rule with `delta`. None: as much as its step size."""
    window: Tensor | None = None
    """(B, H, T, c), ≥ 0: what the losses of the last c pairs weigh in a token's step, its own first."""

    @property
    def strength(self) -> Tensor:
        """`erase`, or what stands for it."""
        return self.rate if self.erase is None else self.erase

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

    def counted(self) -> Tensor:
        """(B, T) bool, which tokens count."""
        if self.counts is not None:
            return self.counts
        return torch.ones(len(self.rate), self.rate.shape[2], dtype=torch.bool, device=self.rate.device)

    def resting(self) -> Tokens:
        """Tokens that change no memory."""
        erase = None if self.erase is None else torch.zeros_like(self.erase)
        still = tuple(map(torch.zeros_like, self.log_decay))
        return self._replace(rate=torch.zeros_like(self.rate), log_decay=still, erase=erase)

    def silenced(self) -> Tokens:
        """Gates of tokens that do not count as they must be to change nothing."""
        if self.counts is None:
            return self
        off = ~self.counts.unsqueeze(1)
        return self._replace(
            rate=self.rate.masked_fill(off, 0.0),
            erase=None if self.erase is None else self.erase.masked_fill(off, 0.0),
            log_decay=tuple(gate.masked_fill(off.unsqueeze(-1), 0.0) for gate in self.log_decay),
            log_momentum=None if self.log_momentum is None else self.log_momentum.masked_fill(off, 0.0),
        )

    def changed(self, change: Callable[[Tensor, int], Tensor]) -> Tokens:
        """Every tensor made another, told the axis of its tokens."""
        parts = [None if part is None else change(part, 2) for part in (*self[:4], *self[5:7], *self[8:])]
        q, k, v, rate, log_momentum, threshold, erase, window = parts
        assert q is not None and k is not None and v is not None and rate is not None
        log_decay = tuple(change(gate, 2) for gate in self.log_decay)
        counts = None if self.counts is None else change(self.counts, 1)
        return Tokens(q, k, v, rate, log_decay, log_momentum, threshold, counts, erase, window)


def chosen(condition_B: Tensor, yes: Sequence[Tensor], no: Sequence[Tensor]) -> Layers:
    """For each row the tensors of `yes` where the condition holds, else those of `no`."""
    mask = condition_B[:, None, None, None]
    return tuple(torch.where(mask, a, b) for a, b in zip(yes, no, strict=True))


def either(condition_B: Tensor, yes: MemoryState, no: MemoryState) -> MemoryState:
    """For each row `yes` where the condition holds, else `no`."""
    return MemoryState(
        weights=chosen(condition_B, yes.weights, no.weights),
        momentum=chosen(condition_B, yes.momentum, no.momentum),
        anchor=chosen(condition_B, yes.anchor, no.anchor),
        offset=torch.where(condition_B, yes.offset, no.offset),
        window=chosen(condition_B, yes.window, no.window),
        owed=chosen(condition_B, yes.owed, no.owed),
    )


def each_part(change: Callable[..., Tensor], *states: MemoryState) -> MemoryState:
    """A state of which each tensor is made from those of others."""

    def layers(field: int) -> Layers:
        return tuple(change(*parts) for parts in zip(*(state[field] for state in states)))

    offset = change(*(state.offset for state in states))
    return MemoryState(layers(0), layers(1), layers(2), offset, layers(4), layers(5))


def repeated(state: MemoryState, rows: int) -> MemoryState:
    """The state of one row for `rows` of them."""
    return each_part(lambda part: part.expand(rows, *part.shape[1:]), state)
