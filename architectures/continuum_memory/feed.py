"""The levels of a continuum memory as the feed-forward layer of a block, with the state that tokens leave in them.

Shapes: B rows, T tokens, P pending tokens, C hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clplat.architectures.associative_memory.layout import Documents
from clplat.architectures.associative_memory.reading import Reading
from clplat.architectures.base import LevelPeriod
from clplat.architectures.continuum_memory.levels import LevelSize, StepLevel, TokenLevel
from clplat.architectures.continuum_memory.nested import NestedLevel
from clplat.architectures.continuum_memory.next_token import NextTokenLevel
from clplat.architectures.decoder import ReadingFeed
from clplat.architectures.layers import SwiGLU

FeedState = tuple[list[tuple[Any, ...]], Tensor, Tensor]
"""The memory of each token level (`MemoryState` as plain tuples), tokens that were read last and may be padding
(B, P, C), and the number of tokens before them (B,)."""


class ContinuumFeed(ReadingFeed):
    """y = what the levels add to x, one after another or side by side.

    How many of a call's tokens were a row's own is known only when the next call says where it continues, as in
    `MemoryMixer`: the state keeps the last call's inputs, and the next one takes in those that count.
    """

    def __init__(self, *, levels: Sequence[LevelSize], independent: bool, residual: bool) -> None:
        super().__init__()
        self.independent = independent
        self.levels = nn.ModuleDict({size.name: _level(size) for size in levels})
        # A single level, and a bare chain, have nothing to be weighed against.
        several = len(levels) > 1 and residual
        start = 1 / len(levels) if independent else 1.0
        self.gains = nn.Parameter(torch.full((len(levels),), start)) if several else None

    def forward(self, x_BTC: Tensor, reading: Reading) -> Tensor:
        """A full pass."""
        return self._passed(x_BTC, None, reading.documents, None)[0]

    def continued(self, x_BTC: Tensor, state: FeedState, reading: Reading) -> tuple[Tensor, FeedState]:
        """New tokens after the `reading.lengths` (B,) tokens of each row that `state` holds."""
        memories, pending, held = state
        if pending.shape[1]:
            places = torch.arange(pending.shape[1], device=pending.device)
            counts_BP = places < (reading.lengths - held).unsqueeze(1)
            _, memories = self._passed(pending, memories, None, counts_BP)
        added, _ = self._passed(x_BTC, memories, None, None)
        return added, (memories, x_BTC, reading.lengths)

    def empty_state(self, batch_size: int) -> FeedState:
        """The state before any token, with nothing pending."""
        weight = next(self.parameters())
        hidden = next(level.size.hidden_size for level in self._each())
        memories = [level.empty_state(batch_size) for level in self._each() if isinstance(level, TokenLevel)]
        none = weight.new_zeros(batch_size, dtype=torch.long)
        return memories, weight.new_zeros(batch_size, 0, hidden), none

    def mixing_flops(self, tokens: int) -> float:
        """Operations of the token levels' learning."""
        return sum(level.mixing_flops(tokens) for level in self._each() if isinstance(level, TokenLevel))

    def facts(self) -> dict[str, str]:
        """Clock, period and loss of each level, in words, and in which it is nested."""
        words = {"local": "tokens, local loss", "next_token": "tokens, the next token's loss while scored"}
        found = {}
        for size in (level.size for level in self._each()):
            inside = f", in {size.within}" if size.within else ""
            told = "training steps, the run's loss" if size.clock == "step" else words[size.loss]
            found[f"level.{size.name}"] = f"{size.period} {told}{inside}"
        return found

    def periods(self, place: str) -> dict[str, LevelPeriod]:
        """The levels of the step clock, with the names of their parameters behind `place`. Where a nested token level
        begins belongs to the fastest of them: rows lie inside of its period."""
        found = {}
        for level in self._each():
            if isinstance(level, StepLevel) and level.size.clock == "step":
                size = level.size
                found[size.name] = LevelPeriod(
                    parameters=tuple(f"{place}.levels.{size.name}.{own}" for own, _ in level.named_parameters()),
                    period=size.period, lr=size.lr, reduction=size.reduction, within=size.within,
                    start_rate=size.start_rate,
                )  # fmt: skip
        if not found:
            return found
        fastest = min(found, key=lambda name: found[name].period)
        starts = tuple(
            f"{place}.levels.{level.size.name}.fast.first.{n}"
            for level in self._each()
            if isinstance(level, TokenLevel) and level.size.within
            for n in range(len(level.fast.first))
        )
        own = found[fastest]
        return found | {fastest: dataclasses.replace(own, parameters=own.parameters + starts)}

    @torch.no_grad()
    def begin_as(self, mlp: SwiGLU) -> None:
        """Every level begins as a copy of a trained feed-forward layer, and together they are that layer: side by side
        they share it; one after another the slowest gives all of it, and the gains of the others begin at 0."""
        for level in self._each():
            level.begin_as(mlp)
        if self.gains is None:
            if len(self.levels) > 1:
                raise ValueError(
                    "ContinuumMemory.residual: a bare chain of copies is another function than their layer"
                )
        elif self.independent:
            self.gains.fill_(1 / len(self.gains))
        else:
            periods = [level.size.period * (level.size.clock == "step") for level in self._each()]
            self.gains.zero_()
            self.gains[periods.index(max(periods))] = 1.0

    def _each(self) -> list[StepLevel | TokenLevel]:
        return list(self.levels.values())  # type: ignore[arg-type]

    def _passed(
        self, x_BTC: Tensor, memories: list[tuple[Any, ...]] | None, documents: Documents | None,
        counts_BT: Tensor | None,
    ) -> tuple[Tensor, list[tuple[Any, ...]]]:  # fmt: skip
        """What is added, and the memories of the token levels behind the tokens."""
        left, after, added, read = list(memories or []), [], None, x_BTC
        for number, level in enumerate(self._each()):
            if isinstance(level, StepLevel):
                answer = level(read)
            elif memories is None:
                answer = level(read, documents)
            else:
                answer, memory = level.continued(read, left.pop(0), counts_BT)
                after.append(memory)
            if self.gains is None:
                added = read = answer
                continue
            answer = self.gains[number].to(answer.dtype) * answer
            added = answer if added is None else added + answer
            read = x_BTC if self.independent else x_BTC + added
        assert added is not None
        return added, after


def _level(size: LevelSize) -> StepLevel | TokenLevel:
    if size.clock == "step":
        return StepLevel(size)
    if size.loss == "next_token":
        return NextTokenLevel(size)
    return TokenLevel(size) if size.context is None else NestedLevel(size)
