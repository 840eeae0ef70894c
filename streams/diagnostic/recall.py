"""Multi-query associative recall: keys with values are read, then keys alone, each asking for its value.

Source: Arora et al. 2023 (Zoology, arXiv:2312.04927, section 4) and its published code; docs/diagnostics.md says what
differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from clplat.streams.batch import IGNORE
from clplat.streams.diagnostic.answer_stream import BLANK, _AnswerStream, for_each_task
from clplat.streams.diagnostic.sources import Drawn, distinct


class MQAR(_AnswerStream):
    """Multi-query associative recall: pairs of key and value, then every key again; with `rewritten`, some keys get a
    second value and the last one counts."""

    paper = "Arora et al. 2023, arXiv:2312.04927"

    def __init__(
        self,
        *,
        pairs: Sequence[int] = (4, 8, 16),
        rewritten: Sequence[int] = (0,),
        lengths: Sequence[int] = (64,),
        vocab_size: int = 8192,
        own_tokens: bool = False,
        power: float = 0.01,
        gaps: Literal["noise", "blank"] = "noise",
        multiples: Sequence[int] = (),
        train_rows: int = 20_000,
        val_rows: int = 500,
        test_rows: int = 500,
        seed: int = 0,
    ) -> None:
        """A task for each number of `pairs`; `rewritten` (how many of the keys get a second value) and `lengths` are
        one number for all tasks or one for each. Half of the `vocab_size` tokens are keys, half values; with
        `own_tokens` every task has so many tokens for itself. Distances of the questions from the pairs follow a power
        law with exponent `power` − 1, after Zoology; 1 is uniform. The rest of a row is random tokens, or blank.
        `multiples`: further test sets of rows so many times as long with as many pairs, scored as probes.
        """
        super().__init__(
            multiples=multiples, train_rows=train_rows, val_rows=val_rows, test_rows=test_rows, seed=seed
        )  # fmt: skip
        if not pairs:
            raise ValueError("pairs: at least one number, one for each task")
        self.pairs, count = list(pairs), len(pairs)
        self.rewritten, self.lengths = (
            for_each_task("rewritten", rewritten, count),
            for_each_task("lengths", lengths, count),
        )
        self.half, self.power, self.gaps, self.own_tokens = vocab_size // 2, power, gaps, own_tokens
        self.task_vocab, self.stale = vocab_size, any(self.rewritten)
        self.vocab_size = 1 + (vocab_size - 1) * (count if own_tokens else 1)
        self._check(vocab_size)
        described = zip(self.pairs, self.rewritten, self.lengths, strict=True)
        self.names = [f"{k}-pairs{f'-{r}-rewritten' if r else ''}-{t}" for k, r, t in described]
        self._check_names()

    def _check(self, vocab_size: int) -> None:
        if self.power <= 0:
            raise ValueError(f"power: must be positive (1 is uniform), got {self.power}")
        for pairs, rewritten, length in zip(self.pairs, self.rewritten, self.lengths, strict=True):
            if pairs < 1:
                raise ValueError(f"pairs: at least 1, got {pairs}")
            if not 0 <= rewritten <= pairs:
                raise ValueError(f"rewritten: from 0 to the number of pairs ({pairs}), got {rewritten}")
            if 4 * pairs + 2 * rewritten > length:
                raise ValueError(
                    f"lengths: {pairs} pairs, {rewritten} second values and {pairs} questions take "
                    f"{4 * pairs + 2 * rewritten} tokens; got {length}"
                )
            if min(self.half - 1, vocab_size - self.half) < pairs + rewritten or self.half - 1 <= pairs:
                raise ValueError(
                    f"vocab_size: {pairs} pairs and {rewritten} second values want more than so many keys and at least "
                    f"so many values, each half of the tokens; got {vocab_size}"
                )

    def _check_names(self) -> None:
        if len(set(self.names)) < len(self.names) and not self.own_tokens:
            raise ValueError(f"pairs, rewritten, lengths: two tasks are the same without own_tokens; got {self.names}")
        if self.own_tokens:
            self.names = [f"{name}-tokens-{number}" for number, name in enumerate(self.names)]

    def draw(self, index: int, length: int, rows: int, chance: torch.Generator, *, training: bool) -> Drawn:
        pairs, again = self.pairs[index], self.rewritten[index]
        keys = 1 + distinct(rows, pairs, out_of=self.half - 1, draw=chance)
        values = self.half + distinct(rows, pairs + again, out_of=self.task_vocab - self.half, draw=chance)
        written = torch.cat([torch.arange(pairs), torch.arange(again)]).expand(rows, -1)
        written = written.gather(1, torch.rand(rows, pairs + again, generator=chance).argsort(1))
        first, last = _first_and_last(written, pairs)
        context = torch.stack([keys.gather(1, written), values], dim=-1).flatten(1)
        rest = length - context.shape[1]
        places = context.shape[1] + 2 * _distances(rows, pairs, rest // 2, self.power, chance)
        behind = self._between(keys, rest, chance) if self.gaps == "noise" else torch.full((rows, rest), BLANK)
        inputs = torch.cat([context, behind], dim=1).scatter(1, places, keys)
        nothing = torch.full_like(inputs, IGNORE)
        targets = nothing.scatter(1, places, values.gather(1, last))
        old = values.gather(1, first).masked_fill(first == last, IGNORE)
        stale = nothing.scatter(1, places, old) if self.stale else None
        return self._shifted(Drawn(inputs=inputs, targets=targets, stale=stale), index)

    def _between(self, keys: Tensor, count: int, chance: torch.Generator) -> Tensor:
        """Random tokens (N, `count`), none of them blank or a key of its row, which would write or ask once more."""
        pairs = keys.shape[1]
        found = torch.randint(1, self.task_vocab - pairs, (len(keys), count), generator=chance)
        # Number n of those that are left is n plus the number of the row's keys that come before it.
        steps = keys.sort(1).values - torch.arange(pairs)
        return found + torch.searchsorted(steps, found, right=True)

    def _shifted(self, rows: Drawn, index: int) -> Drawn:
        """The rows in the task's own tokens; blanks are common to all."""
        if self.own_tokens:
            by = index * (self.task_vocab - 1)
            rows.inputs = rows.inputs + by * (rows.inputs != BLANK)
            rows.targets = rows.targets + by * (rows.targets != IGNORE)
            if rows.stale is not None:
                rows.stale = rows.stale + by * (rows.stale != IGNORE)
        return rows


def _first_and_last(written: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """Of each key (N, pairs), the places among the writes (N, W) where it is written first and last."""
    at = torch.arange(written.shape[1]).expand_as(written)
    empty = torch.zeros(len(written), pairs, dtype=torch.long)
    first, last = (empty.scatter_reduce(1, written, at, which, include_self=False) for which in ("amin", "amax"))
    return first, last


def _distances(rows: int, count: int, space: int, power: float, chance: torch.Generator) -> Tensor:
    """(rows, count) different numbers below `space`, drawn one after another with shares ∝ (1 + d)^(power − 1)."""
    weights = (power - 1) * torch.arange(1, space + 1).log()
    # The largest of log-weight plus Gumbel noise are such a draw without replacement (Plackett-Luce), in its order.
    uniform = torch.rand(rows, space, generator=chance, dtype=torch.float64).clamp(min=1e-300)
    return (weights - (-uniform.log()).log()).topk(count).indices
