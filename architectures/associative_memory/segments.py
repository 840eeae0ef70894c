"""Rows cut into segments that a memory reads one after the other, or all at once where each begins anew.

Shapes: see `state.py`; P places, which is n segments of tokens, or one place for a single token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.architectures.associative_memory.layout import Documents, Layout, continued, separated
from clplat.architectures.associative_memory.memory import AssociativeMemory
from clplat.architectures.associative_memory.state import MemoryState, Tokens, each_part, either


class Segments(NamedTuple):
    """Where segments lie. Their first places are multiples of `width`; empty ones hold tokens that do not count."""

    width: int
    """Places of a segment here: `segment`, 1 for a single token, or fewer where every text is shorter."""
    layout: Layout | None
    """None where every token keeps its place."""
    offset_B: Tensor
    """Tokens of the row's open segment that came before; (1,) where the same for all rows."""
    place_BP: Tensor
    """Tokens of its segment before each place; one row where the same for all, and so below."""
    number_Bn: Tensor
    """Each segment's number in its row, from 0."""
    first_Bn: Tensor
    """The number of the segment with which its document begins."""
    segment: int
    continues: bool = True
    """Whether rows go on at places of their own."""

    @property
    def touched(self) -> int:
        """Segments of a row that this call touches."""
        return self.number_Bn.shape[1]

    def placed(self, tokens: Tokens) -> Tokens:
        """Tokens in their places."""
        return tokens if self.layout is None else tokens.taken(self.layout.source_BN)

    def placed_rows(self, x_BTC: Tensor) -> Tensor:
        """Activations in their places; what stands in empty ones is no matter."""
        if self.layout is None:
            return x_BTC
        return x_BTC.take_along_dim(self.layout.source_BN.clamp(min=0).unsqueeze(-1), 1)

    def back(self, answers_BHPE: Tensor) -> Tensor:
        """Answers in the tokens' order."""
        return answers_BHPE if self.layout is None else self.layout.back(answers_BHPE)

    def begun(self, *, folded: bool = True) -> Tensor | None:
        """Where the tokens of each row begin in the first segment, or those of each row of segments; None where that
        is no matter."""
        if self.layout is None or not self.continues:
            return None
        return F.pad(self.offset_B.unsqueeze(1), (0, self.touched - 1)).flatten() if folded else self.offset_B

    def reaches(self, number: int, counts_B: Tensor) -> Tensor:
        """(B,) bool, whether a row's tokens reach the segment of that number in this call, or its very start."""
        return (self.offset_B + counts_B >= number * self.segment).expand(len(counts_B))

    def after(self, counts_B: Tensor) -> tuple[Tensor, Tensor]:
        """Behind a row's last token: the place in its segment, 0 at a new one's start, and the segment to be asked."""
        total = self.offset_B + counts_B
        return total % self.segment, (total // self.segment).clamp(max=self.touched - 1)


def cut(
    x_BTC: Tensor, segment: int, position_B: Tensor | None, documents: Documents | None, *, chunk: int | None = None
) -> Segments:  # fmt: skip
    """The segments of rows after the `position_B` tokens that each has read, or of documents, or of whole rows.

    With `chunk`, whole rows or documents that are all shorter than a segment take no more places than the next multiple
    of it, which changes no answer."""
    rows, length = x_BTC.shape[:2]
    device = x_BTC.device
    nothing = torch.zeros(1, dtype=torch.long, device=device)
    if documents is not None:
        width = segment if chunk is None else _shortened(segment, documents.longest(), chunk)
        apart = separated(documents, rows, length, width)
        assert apart.begins_Bn is not None
        number = torch.arange(apart.begins_Bn.shape[1], device=device).unsqueeze(0)
        first = number.where(apart.begins_Bn, 0).cummax(1).values
        places = torch.arange(number.shape[1] * width, device=device).unsqueeze(0) % width
        return Segments(width, apart, nothing, places, number, first, segment, False)
    before = nothing if position_B is None else position_B
    offset, number = before % segment, (before // segment).unsqueeze(1)
    if length == 1 and position_B is not None:
        return Segments(1, None, offset, offset.unsqueeze(1), number, torch.zeros_like(number), segment)
    width = segment if chunk is None or position_B is not None else _shortened(segment, length, chunk)
    layout = _whole(rows, length, width, device) if position_B is None else _open(offset, length, segment)
    places_taken = length if layout is None else layout.source_BN.shape[1]
    number = number + torch.arange(places_taken // width, device=device)
    places = torch.arange(places_taken, device=device).unsqueeze(0) % width
    first = torch.zeros_like(number)
    return Segments(width, layout, offset, places, number, first, segment, position_B is not None)


def _shortened(segment: int, longest: int, chunk: int) -> int:
    """Places for a segment of texts of which the longest has so many tokens."""
    return min(segment, -(-max(1, longest) // chunk) * chunk)


def _whole(rows: int, length: int, segment: int, device: torch.device) -> Layout | None:
    if length % segment == 0:
        return None
    places = torch.arange(length, device=device).expand(rows, -1)
    return Layout(F.pad(places, (0, -length % segment), value=-1), places, None)


def _open(offset_B: Tensor, length: int, segment: int) -> Layout:
    layout = continued(offset_B, length, segment)
    missing = -layout.source_BN.shape[1] % segment
    return layout._replace(source_BN=F.pad(layout.source_BN, (0, missing), value=-1))


class Run(NamedTuple):
    """What a memory has done with segments; states of all of them are (B, n, …)."""

    answers_BHPE: Tensor
    starts: MemoryState
    ends: MemoryState
    state: MemoryState
    """Behind each row's last token, (B, …)."""


def run(memory: AssociativeMemory, tokens: Tokens, segments: Segments, state: MemoryState | None, *, warm: bool) -> Run:
    """`tokens` in their places, `prepared`. A segment begins with the state that the one before left (`warm`), or with
    the memory's first state, and all are read at once; a document always begins with the first state. The first
    segment goes on from `state`."""
    first = memory.empty_state(len(tokens.q))
    state = first if state is None else state
    if warm:
        return _in_turn(memory, tokens, segments, state, first)
    rest = segments.touched - 1
    starts = each_part(
        lambda now, new: torch.cat([now.unsqueeze(1), new.unsqueeze(1).expand(-1, rest, *new.shape[1:])], 1),
        state, first,
    )  # fmt: skip
    flat = each_part(lambda part: part.flatten(0, 1), starts)
    answers, ends = memory.aligned(folded(tokens, segments), flat, place_B=segments.begun())
    ends = each_part(lambda part: part.unflatten(0, (-1, segments.touched)), ends)
    place, which = segments.after(counted(tokens))
    rows = torch.arange(len(which), device=which.device)
    last = each_part(lambda part: part[rows, which], ends)
    new = (place == 0).expand(len(which))
    return Run(unfolded(answers, segments), starts, ends, either(new, first, last))


def _in_turn(
    memory: AssociativeMemory, tokens: Tokens, segments: Segments, state: MemoryState, first: MemoryState
) -> Run:
    begins = segments.number_Bn == segments.first_Bn if segments.touched > 1 else None
    answers, starts, ends = [], [], []
    for number in range(segments.touched):
        if number and begins is not None:
            state = either(begins[:, number], first, state)
        starts.append(state)
        part = tokens.part(number * segments.width, (number + 1) * segments.width)
        place = None if number else segments.begun(folded=False)
        answer, state = memory.aligned(part, state, place_B=place)
        answers.append(answer)
        ends.append(state)
    return Run(torch.cat(answers, 2), stacked(starts), stacked(ends), state)


def stacked(states: list[MemoryState]) -> MemoryState:
    """States one behind the other, (B, n, …)."""
    return each_part(lambda *parts: torch.stack(parts, 1), *states)


def counted(tokens: Tokens) -> Tensor:
    """(B,) tokens that count."""
    rows, _, length = tokens.q.shape[:3]
    if tokens.counts is not None:
        return tokens.counts.sum(1)
    return torch.full((rows,), length, dtype=torch.long, device=tokens.q.device)


def folded(tokens: Tokens, segments: Segments) -> Tokens:
    """Segments as rows, (B · n, …)."""
    if segments.touched == 1:
        return tokens
    shape = (segments.touched, segments.width)
    return tokens.changed(lambda part, axis: part.unflatten(axis, shape).movedim(axis, 1).flatten(0, 1))


def unfolded(answers: Tensor, segments: Segments) -> Tensor:
    """Answers (B · n, H, L, E) as (B, H, P, E)."""
    return answers.unflatten(0, (-1, segments.touched)).movedim(1, 2).flatten(2, 3)
