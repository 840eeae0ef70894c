"""The two forms of a self-modifying memory: the loop over tokens, which defines it, and chunks of tokens at once.

Memories of one group share a chunk; where a group's chunk begins, its memories are noted (`anchor`), and until the next
one keys, values, gates, targets and gradients are made by what was noted. Two groups have two chunks, the longer a
multiple of the shorter. Nothing is ever made by a memory that has seen a token of the open chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clplat.architectures.associative_memory.state import Layers, MemoryState, Tokens, chosen
from clplat.architectures.associative_memory.token_loop import written
from clplat.architectures.hope.bank import Bank
from clplat.architectures.hope.gates import Momenta
from clplat.architectures.hope.inputs import HeadInputs, Lifted

if TYPE_CHECKING:
    from clplat.architectures.hope.memory import SelfModifyingMemory


@dataclass(frozen=True, kw_only=True)
class Group:
    """Memories that are written together, every `chunk` tokens from what was noted."""

    bank: Bank
    chunk: int


@dataclass(frozen=True, kw_only=True)
class Course:
    """A group's weights in the course of a row: now, their momentum, and as noted."""

    group: Group
    W: Layers
    S: Layers
    anchor: Layers

    def stacked(self) -> Course:
        """As chunks are written: see `bank.py`."""
        return self._each(self.group.bank.stacked)

    def unstacked(self) -> Course:
        """As tokens are written one by one, and as states are kept."""
        return self._each(self.group.bank.unstacked)

    def _each(self, change: Callable[[Layers], Layers]) -> Course:
        W = change(self.W)
        anchor = W if self.anchor is self.W else change(self.anchor)
        return replace(self, W=W, S=change(self.S), anchor=anchor)

    def noted(self, where_B: Tensor) -> Course:
        """With the weights of now as the noted ones of some rows."""
        return replace(self, anchor=chosen(where_B, self.W, self.anchor))

    def where(self, here_B: Tensor, other: Course) -> Course:
        """This in some rows, and the other in the rest."""
        W, S, anchor = (
            chosen(here_B, own, others)
            for own, others in zip((self.W, self.S, self.anchor), (other.W, other.S, other.anchor), strict=True)
        )
        return replace(self, W=W, S=S, anchor=anchor)


def one_by_one(
    memory: SelfModifyingMemory, inputs: HeadInputs, state: MemoryState, begins_BT: Tensor | None = None
) -> tuple[Tensor, MemoryState]:
    """The definition. Where `begins_BT`, a document begins with `state`."""
    first, offset, answers = _courses(memory, state), state.offset, []
    courses = first
    for t in range(inputs.x.shape[2]):
        token = inputs.part(t, t + 1)
        if begins_BT is not None:
            courses = [start.where(begins_BT[:, t], now) for start, now in zip(first, courses, strict=True)]
            offset = torch.where(begins_BT[:, t], state.offset, offset)
        courses = [course.noted(offset % course.group.chunk == 0) for course in courses]
        tokens = memory.generated(token, courses[0].anchor)
        behind = [_behind(course, tokens) for course in courses]
        here = torch.ones_like(offset, dtype=torch.bool) if token.counts is None else token.counts[:, 0]
        behind = [new.where(here, old) for new, old in zip(behind, courses, strict=True)]
        asked = {"before": courses[-1].W, "after": behind[-1].W, "chunk_start": courses[-1].anchor}[memory.options.read]
        answers.append(courses[-1].group.bank.network.read(_last(asked, tokens.q), tokens.q))
        courses, offset = behind, (offset + here.long()) % memory.period
    return torch.cat(answers, 2), _state([course.noted(offset % course.group.chunk == 0) for course in courses], offset)


def by_chunks(
    memory: SelfModifyingMemory, inputs: HeadInputs, state: MemoryState, begins_Bn: Tensor | None = None, *,
    fresh: bool = False,
) -> tuple[Tensor, MemoryState]:  # fmt: skip
    """The same. Row b has its first `state.offset[b]` places empty, none where all are `fresh`; where `begins_Bn`, the
    n-th stretch of `period` places begins with `state`."""
    length, shortest = inputs.x.shape[2], min(group.chunk for group in memory.groups)
    count = torch.full_like(state.offset, length) if inputs.counts is None else inputs.counts.sum(1)
    end, first, answers = state.offset + count, [course.stacked() for course in _courses(memory, state)], []
    courses, last, step = first, [course.anchor for course in first], _step(memory)
    for n, (part, momenta) in enumerate(_chunks(memory.lifted(inputs), shortest)):
        start = n * shortest
        if begins_Bn is not None and start % memory.period == 0:
            begins = begins_Bn[:, start // memory.period]
            courses = [begun.where(begins, now) for begun, now in zip(first, courses, strict=True)]
        for number, course in enumerate(courses):
            if start % course.group.chunk == 0:
                # Rows that are further have this chunk open, or behind them, and noted in `state`.
                anchor = course.W if fresh else chosen(state.offset > start, first[number].anchor, course.W)
                courses[number] = replace(course, anchor=anchor)
                all_here = fresh and inputs.counts is None
                last[number] = anchor if all_here else chosen(end >= start, anchor, last[number])
        answer, courses = step(memory, part, momenta, courses)
        answers.append(answer)
    courses = [replace(course, anchor=anchor) for course, anchor in zip(courses, last, strict=True)]
    offset = end % memory.period
    courses = [course.unstacked().noted(offset % course.group.chunk == 0) for course in courses]
    return torch.cat(answers, 2), _state(courses, offset)


def one_more(memory: SelfModifyingMemory, token: HeadInputs, state: MemoryState) -> tuple[Tensor, MemoryState]:
    """A single token after a state, without places for those of its chunk that went before."""
    courses = [course.noted(state.offset % course.group.chunk == 0).stacked() for course in _courses(memory, state)]
    ((part, momenta),) = _chunks(memory.lifted(token), 1)
    answer, courses = _stepped(memory, part, momenta, courses)
    count = 1 if token.counts is None else token.counts[:, 0].long()
    offset = (state.offset + count) % memory.period
    courses = [course.unstacked().noted(offset % course.group.chunk == 0) for course in courses]
    return answer, _state(courses, offset)


def _chunks(lifted: Lifted, size: int) -> Iterator[tuple[Lifted, tuple[Tensor, Tensor] | None]]:
    """The tokens of each chunk, and what is left of momentum in it."""
    parts = lifted.chunks(size)
    if lifted.log_momentum is None:
        yield from ((part, None) for part in parts)
        return
    momenta = Momenta.of(lifted.log_momentum, size)
    for part, pushes, pushed in zip(parts, momenta.pushes.unbind(2), momenta.pushed.unbind(2), strict=True):
        L = part.x.shape[2]
        yield part, (pushes, pushed) if size == L else (pushes[..., :L, :L], pushed[..., :L])


def _step(memory: SelfModifyingMemory) -> Callable[..., tuple[Tensor, list[Course]]]:
    """`_stepped`, or one graph of it where that is asked for and nobody compiles the whole."""
    return _compiled() if memory.options.compiled and not torch.compiler.is_compiling() else _stepped


@cache
def _compiled() -> Callable[..., tuple[Tensor, list[Course]]]:
    return torch.compile(_stepped, fullgraph=True, dynamic=False)


def _stepped(
    memory: SelfModifyingMemory, inputs: Lifted, momenta: tuple[Tensor, Tensor] | None, courses: list[Course]
) -> tuple[Tensor, list[Course]]:
    """Tokens of one chunk of every group."""
    tokens, after, answers = memory.made(inputs, courses[0].anchor), [], None
    for n, course in enumerate(courses):
        read = memory.options.read if n == len(courses) - 1 else None
        answers, W, S = course.group.bank.written(tokens, course.W, course.S, course.anchor, read, momenta)
        after.append(replace(course, W=W, S=S))
    assert answers is not None
    return answers, after


def _behind(course: Course, tokens: Tokens) -> Course:
    """With one token's write."""
    bank = course.group.bank
    offset = torch.zeros(len(tokens.q), dtype=torch.long, device=tokens.q.device)
    before = MemoryState(course.W, course.S, course.anchor, offset)
    after = written(bank.network, bank.copied(tokens), before)
    return replace(course, W=after.weights, S=after.momentum)


def _last(weights: Layers, q_BHTD: Tensor) -> Layers:
    """Those of the memory that answers."""
    return tuple(part[:, -q_BHTD.shape[1] :] for part in weights)


def _courses(memory: SelfModifyingMemory, state: MemoryState) -> list[Course]:
    depth, courses = len(memory.first), []
    for n, group in enumerate(memory.groups):
        W, S, anchor = (part[n * depth : (n + 1) * depth] for part in state[:3])
        courses.append(Course(group=group, W=W, S=S, anchor=anchor))
    return courses


def _state(courses: list[Course], offset: Tensor) -> MemoryState:
    W, S, anchor = (tuple(part for c in courses for part in getattr(c, name)) for name in ("W", "S", "anchor"))
    return MemoryState(W, S, anchor, offset)
