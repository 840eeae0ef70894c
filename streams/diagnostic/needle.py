"""A needle in a haystack: one key with its value somewhere in a long filler, asked for at the end of the row.

The form of the single-needle tasks of RULER (Hsieh et al. 2024, arXiv:2404.06654), generated; docs/diagnostics.md says
what differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from clplat.streams.batch import IGNORE
from clplat.streams.diagnostic.answer_stream import _AnswerStream
from clplat.streams.diagnostic.sources import Drawn, distinct

NEEDLE, ASK, FIRST = 1, 2, 3
"""Tokens before a key that is given a value and before the key that is asked for, and the first key."""
TEXT_BYTES = 256
TRAINED_TEXT = 0.8
"""Share of the text that training rows are cut from; scored rows are cut from the rest."""


class SingleNeedle(_AnswerStream):
    """One key with its value, hidden in filler and asked for at the end; longer rows and further needles as options."""

    paper = "Hsieh et al. 2024, arXiv:2404.06654"

    def __init__(
        self,
        *,
        lengths: Sequence[int] = (128,),
        filler: Literal["repeat", "noise", "text"] = "noise",
        filler_tokens: int = 64,
        num_keys: int = 64,
        num_values: int = 64,
        value_length: int = 1,
        distractors: int = 0,
        multiples: Sequence[int] = (2, 4, 8),
        train_rows: int = 20_000,
        val_rows: int = 200,
        test_rows: int = 200,
        seed: int = 0,
    ) -> None:
        """A task for each of `lengths`. `filler`: the same `filler_tokens` over and over, that many at random, or
        Python's language reference as bytes. The answer is the `value_length` tokens, each one of `num_values`, behind
        the key in its needle; `distractors` more needles have other keys. `multiples`: further test sets of rows so
        many times as long, scored as probes.
        """
        super().__init__(multiples=multiples, train_rows=train_rows, val_rows=val_rows, test_rows=test_rows, seed=seed)
        least = {
            "filler_tokens": (filler_tokens, 1), "num_keys": (num_keys, distractors + 1), "num_values": (num_values, 2),
            "value_length": (value_length, 1), "distractors": (distractors, 0),
        }  # fmt: skip
        for name, (given, needed) in least.items():
            if given < needed:
                raise ValueError(f"{name}: at least {needed}, got {given}")
        self.num_keys, self.num_values = num_keys, num_values
        self.value_length, self.distractors = value_length, distractors
        self.needle, self.question = 2 + value_length, 1 + value_length
        fixed = self.question + (distractors + 1) * self.needle
        if not lengths or min(lengths) <= fixed or len(set(lengths)) < len(lengths):
            raise ValueError(
                f"lengths: different numbers above the {fixed} tokens of needles and question, one for each task; got "
                f"{list(lengths)}"
            )
        self.filler, self.filler_tokens = filler, TEXT_BYTES if filler == "text" else filler_tokens
        self.vocab_size = FIRST + num_keys + num_values + self.filler_tokens
        self.lengths, self.names = list(lengths), [f"needle-{length}" for length in lengths]

    def draw(self, index: int, length: int, rows: int, chance: torch.Generator, *, training: bool) -> Drawn:
        count, body = self.distractors + 1, length - self.question
        keys = FIRST + distinct(rows, count, out_of=self.num_keys, draw=chance)
        values = torch.randint(self.num_values, (rows, count, self.value_length), generator=chance)
        values += FIRST + self.num_keys
        needles = torch.cat([torch.full((rows, count, 1), NEEDLE), keys.unsqueeze(2), values], dim=2)
        # A needle stands before any filler token or behind the last, each place as likely; ties stand side by side.
        before = torch.randint(body - count * self.needle + 1, (rows, count), generator=chance).sort(1).values
        starts = before + self.needle * torch.arange(count)
        places = (starts.unsqueeze(2) + torch.arange(self.needle)).flatten(1)
        hay = torch.ones(rows, body, dtype=torch.bool).scatter(1, places, False)
        filler = self._filler(rows, body - count * self.needle, chance, training=training)
        filled = torch.zeros(rows, body, dtype=torch.long).masked_scatter(hay, filler)
        asked = torch.randint(count, (rows,), generator=chance)
        key, value = keys[torch.arange(rows), asked], values[torch.arange(rows), asked]
        question = torch.cat([torch.full((rows, 1), ASK), key.unsqueeze(1), value[:, :-1]], dim=1)
        return Drawn(
            inputs=torch.cat([filled.scatter(1, places, needles.flatten(1)), question], dim=1),
            targets=torch.cat([torch.full((rows, body + 1), IGNORE), value], dim=1),
        )

    def _filler(self, rows: int, count: int, chance: torch.Generator, *, training: bool) -> Tensor:
        """Filler tokens (rows, count)."""
        first = FIRST + self.num_keys + self.num_values
        if self.filler == "noise":
            return torch.randint(self.filler_tokens, (rows, count), generator=chance) + first
        if self.filler == "repeat":
            return (torch.arange(count) % self.filler_tokens).expand(rows, -1) + first
        text = _reference()
        middle = int(TRAINED_TEXT * len(text))
        text = text[:middle] if training else text[middle:]
        if count > len(text):
            raise ValueError(
                f"multiples, lengths: rows want {count} bytes of filler text, and there are {len(text)}; make them "
                "shorter, or use filler noise"
            )
        begins = torch.randint(len(text) - count + 1, (rows, 1), generator=chance)
        return text[begins + torch.arange(count)] + first


@cache
def _reference() -> Tensor:
    """Python's language reference as bytes (M,) long; a little different in every version of Python."""
    from pydoc_data.topics import topics

    joined = "\n".join(text for _, text in sorted(topics.items())).encode()
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8).long()
