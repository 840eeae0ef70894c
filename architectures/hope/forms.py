"""The two forms of a self-modifying memory: the loop over tokens, which defines it, and chunks of tokens at once.

Memories of one group share a chunk; where a group's chunk begins, its memories are noted (`anchor`), and until the next
one keys, values, gates, targets and gradients are made by what was noted. Two groups have two chunks, the longer a
multiple of the shorter. Nothing is ever made by a memory that has seen a token of the open chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clplat.architectures.associative_memory.state import Layers, MemoryState, Tokens, chosen
from clplat.architectures.associative_memory.token_loop import written
from clplat.architectures.hope.bank import Bank
from clplat.architectures.hope.inputs import HeadInputs

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
    memory: SelfModifyingMemory, inputs: HeadInputs, state: MemoryState, begins_Bn: Tensor | None = None
) -> tuple[Tensor, MemoryState]:
    """The same. Row b has its first `state.offset[b]` places empty; where `begins_Bn`, the n-th stretch of `period`
    places begins with `state`."""
    length, shortest = inputs.x.shape[2], min(group.chunk for group in memory.groups)
    count = torch.full_like(state.offset, length) if inputs.counts is None else inputs.counts.sum(1)
    end, first, answers = state.offset + count, _courses(memory, state), []
    courses, last = first, [course.anchor for course in first]
    for start in range(0, length, shortest):
        if begins_Bn is not None and start % memory.period == 0:
            begins = begins_Bn[:, start // memory.period]
            courses = [fresh.where(begins, now) for fresh, now in zip(first, courses, strict=True)]
        for n, course in enumerate(courses):
            if start % course.group.chunk == 0:
                # Rows that are further have this chunk open, or behind them, and noted in `state`.
                anchor = chosen(state.offset > start, first[n].anchor, course.W)
                courses[n] = replace(course, anchor=anchor)
                last[n] = chosen(end >= start, anchor, last[n])
        answer, courses = _stepped(memory, inputs.part(start, start + shortest), courses)
        answers.append(answer)
    courses = [replace(course, anchor=anchor) for course, anchor in zip(courses, last, strict=True)]
    offset = end % memory.period
    return torch.cat(answers, 2), _state([course.noted(offset % course.group.chunk == 0) for course in courses], offset)


def one_more(memory: SelfModifyingMemory, token: HeadInputs, state: MemoryState) -> tuple[Tensor, MemoryState]:
    """A single token after a state, without places for those of its chunk that went before."""
    courses = [course.noted(state.offset % course.group.chunk == 0) for course in _courses(memory, state)]
    answer, courses = _stepped(memory, token, courses)
    count = 1 if token.counts is None else token.counts[:, 0].long()
    offset = (state.offset + count) % memory.period
    return answer, _state([course.noted(offset % course.group.chunk == 0) for course in courses], offset)


def _stepped(memory: SelfModifyingMemory, inputs: HeadInputs, courses: list[Course]) -> tuple[Tensor, list[Course]]:
    """Tokens of one chunk of every group."""
    tokens, after, answers = memory.generated(inputs, courses[0].anchor), [], None
    for n, course in enumerate(courses):
        read = memory.options.read if n == len(courses) - 1 else None
        answers, W, S = course.group.bank.written(tokens, course.W, course.S, course.anchor, read)
        after.append(replace(course, W=W, S=S))
    assert answers is not None
    return answers, after


def _behind(course: Course, tokens: Tokens) -> Course:
    """With one token's write."""
    bank = course.group.bank
    W, S = written(bank.network, bank.copied(tokens), course.W, course.S, course.anchor)
    return replace(course, W=W, S=S)


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
