"""A token level that lives inside of a slower one (carry: nested): it begins anew whenever that one's period ends.

Between two ends it is a `TokenLevel`. With θ₀ where a row's level begins and θ its weights at the end of the slower
level's period,

    θ₀ ← θ₀ + start_rate (θ − θ₀),    θ ← θ₀

which is one step of the slower level on θ₀ along Σ of the gradients that the level itself took since it began
(first-order meta-learning: Nichol et al. 2018, arXiv:1803.02999). Nested Learning (Behrouz et al. 2025,
arXiv:2512.24695, §7.1) says that θ₀ is meta-learned in the slower level, not by which rule: INFERRED. With start_rate 1
nothing is undone, and the level is one of `carry: sequential`; with 0 all of it is.

Shapes: B rows, T tokens, C hidden size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from clplat.architectures.associative_memory.layout import Documents
from clplat.architectures.associative_memory.segments import Segments, counted, cut
from clplat.architectures.associative_memory.state import Layers, MemoryState, Tokens, chosen
from clplat.architectures.continuum_memory.levels import LevelSize, TokenLevel


class NestedState(NamedTuple):
    """A nested level between two tokens of each row."""

    memory: MemoryState
    start: Layers
    """(B, 1, I, O) of each layer: θ₀."""
    position: Tensor
    """(B,) tokens read."""

    @classmethod
    def of(cls, parts: tuple[Any, ...]) -> NestedState:
        """From plain tuples, as states are carried."""
        memory, start, position = parts
        return cls(MemoryState(*memory), start, position)

    def plain(self) -> tuple[Any, ...]:
        """As plain tuples."""
        return tuple(self.memory), self.start, self.position

    def where(self, condition_B: Tensor, other: NestedState) -> NestedState:
        """This state for rows where the condition holds, the weights of the other elsewhere; what tells places of
        tokens is the same in both."""
        mine, theirs = self.memory, other.memory
        memory = mine._replace(
            weights=chosen(condition_B, mine.weights, theirs.weights),
            anchor=chosen(condition_B, mine.anchor, theirs.anchor),
        )
        return NestedState(memory, chosen(condition_B, self.start, other.start), other.position)


class NestedLevel(TokenLevel):
    """A `TokenLevel` whose weights go back to what the slower level has learned of their start, at each
    `size.context`-th token, a multiple of its own period."""

    def __init__(self, size: LevelSize) -> None:
        super().__init__(size)
        assert size.context is not None
        self.context, self.start_rate = size.context, size.start_rate

    def _read_rows(self, x_BTC: Tensor, documents: Documents | None) -> Tensor:
        return self._read(x_BTC, None, documents, None)[0]

    def _end(self, x_BTC: Tensor, tokens: Tokens) -> Layers:
        return self._read(x_BTC, None, None, None)[1].memory.weights

    def continued(
        self, x_BTC: Tensor, state: tuple[Any, ...], counts_BT: Tensor | None
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Tokens after those in `state`, a `NestedState` as plain tuples."""
        if self.target is None:
            return self.resting(x_BTC), state
        answers, after = self._read(x_BTC, NestedState.of(state), None, counts_BT)
        return answers, after.plain()

    def empty_state(self, batch_size: int) -> tuple[Any, ...]:
        """The state before any token."""
        return () if self.target is None else self._first(batch_size).plain()

    def _first(self, rows: int) -> NestedState:
        memory = self.fast.empty_state(rows)
        return NestedState(memory, memory.weights, torch.zeros_like(memory.offset))

    def _read(
        self, x_BTC: Tensor, before: NestedState | None, documents: Documents | None, counts_BT: Tensor | None
    ) -> tuple[Tensor, NestedState]:
        position = None if before is None else before.position
        segments = cut(x_BTC, self.context, position, documents, chunk=self.size.period)
        tokens = segments.placed(self.fast.prepared(self._tokens(x_BTC, counts_BT)))
        first = self._first(len(x_BTC))
        now, answers, count = first if before is None else before, [], counted(tokens)
        for number in range(segments.touched):
            if number:
                now = self._turned(now, first, segments, number, count, packed=documents is not None)
            answer, memory = self._segment(tokens, now, segments, number)
            now = now._replace(memory=memory)
            answers.append(answer)
        ended = (segments.after(count)[0] == 0).expand(len(count))
        now = self._begun_anew(now).where(ended, now)._replace(position=now.position + count)
        return segments.back(torch.cat(answers, 2)).squeeze(1).to(x_BTC.dtype), now

    def _segment(
        self, tokens: Tokens, now: NestedState, segments: Segments, number: int
    ) -> tuple[Tensor, MemoryState]:  # fmt: skip
        part = tokens.part(number * segments.width, (number + 1) * segments.width)
        return self.fast.aligned(part, now.memory, place_B=None if number else segments.begun(folded=False))

    def _turned(
        self, now: NestedState, first: NestedState, segments: Segments, number: int, count_B: Tensor, *, packed: bool
    ) -> NestedState:
        """The state with which the slower level's next period begins, for rows that reach it; a document begins with
        the first state."""
        if packed:
            begins = (segments.number_Bn == segments.first_Bn)[:, number]
            return first.where(begins, self._begun_anew(now))
        return self._begun_anew(now).where(segments.reaches(number, count_B), now)

    def _begun_anew(self, now: NestedState) -> NestedState:
        """Doing it twice is doing it once: weights that stand at their start leave it where it is."""
        start = tuple(a + self.start_rate * (b - a) for a, b in zip(now.start, now.memory.weights, strict=True))
        return now._replace(memory=now.memory._replace(weights=start, anchor=start), start=start)
