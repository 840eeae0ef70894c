"""Formal languages as token streams, one after another: state to be tracked, trained at one length, tested at longer.

Sources: Bhattamishra et al. 2020 (arXiv:2009.11264) for the counting, periodic and bracket languages, Merrill et al.
2024 (arXiv:2404.08819) for word problems of groups; docs/diagnostics.md says what differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from clplat.streams.batch import IGNORE
from clplat.streams.diagnostic.answer_stream import _AnswerStream, for_each_task
from clplat.streams.diagnostic.languages import (
    Language,
    brackets,
    counting,
    cyclic_table,
    group,
    permutation_table,
    repeated,
)
from clplat.streams.diagnostic.sources import Drawn

NO, YES, TAGS = 1, 2, 3
"""Answers to whether a word is in a language, and the first token that names a language."""
SHORTEST = 24
"""The longest word aⁿbⁿcⁿ of the shortest row, with its end mark and the name of the language."""

LanguageName = Literal["parity", "cyclic", "S3", "A5", "S5", "aa", "abab", "anbn", "anbncn", "dyck"]


class FormalLanguages(_AnswerStream):
    """Parity, counting modulo m, word problems of S3, A5 and S5, (aa)*, (abab)*, aⁿbⁿ, aⁿbⁿcⁿ and Dyck-(k, D): a task
    for each, trained at one length and tested at longer ones too."""

    paper = "Bhattamishra et al. 2020, arXiv:2009.11264; Merrill et al. 2024, arXiv:2404.08819"

    def __init__(
        self,
        *,
        languages: Sequence[LanguageName] = ("parity", "cyclic", "S3", "anbn", "dyck"),
        lengths: Sequence[int] = (64,),
        modulus: int = 5,
        bracket_kinds: int = 2,
        depth: int = 4,
        multiples: Sequence[int] = (2, 4),
        train_rows: int = 20_000,
        val_rows: int = 200,
        test_rows: int = 200,
        seed: int = 0,
    ) -> None:
        """A task for each of `languages` (one may come again with another length); `lengths` (tokens of a row, the
        first of which names the language) is one for all or one for each. `modulus` is that of `cyclic`,
        `bracket_kinds` and `depth` are k and D of `dyck`. `multiples`: further test sets of rows so many times as
        long, scored as probes. All languages share their symbols.
        """
        super().__init__(multiples=multiples, train_rows=train_rows, val_rows=val_rows, test_rows=test_rows, seed=seed)
        for name, given in (("modulus", modulus), ("bracket_kinds", bracket_kinds), ("depth", depth)):
            if given < 2:
                raise ValueError(f"{name}: at least 2, got {given}")
        self.modulus, self.bracket_kinds, self.depth = modulus, bracket_kinds, depth
        if not languages:
            raise ValueError("languages: at least one")
        self.lengths = for_each_task("lengths", lengths, len(languages))
        if min(self.lengths) < SHORTEST:
            raise ValueError(f"lengths: at least {SHORTEST} tokens a row, got {list(lengths)}")
        self.names = [f"{name}-{length}" for name, length in zip(languages, self.lengths, strict=True)]
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"languages, lengths: two tasks are the same, {self.names}")
        tagged = list(dict.fromkeys(languages))
        self.tags = [TAGS + tagged.index(name) for name in languages]
        self.languages = [self._language(name) for name in languages]
        self.first = TAGS + len(tagged)
        self.vocab_size = self.first + max(language.symbols for language in self.languages)

    def _language(self, name: LanguageName) -> Language:
        match name:
            case "parity":
                return group(cyclic_table(2))
            case "cyclic":
                return group(cyclic_table(self.modulus))
            case "S3" | "S5" | "A5":
                return group(permutation_table(int(name[1]), even=name[0] == "A"))
            case "aa" | "abab":
                return repeated(len(name))
            case "anbn" | "anbncn":
                return counting(len(name) // 2)
            case "dyck":
                return brackets(self.bracket_kinds, self.depth)
        raise ValueError(f"languages: {name!r} is none of {', '.join(LanguageName.__args__)}")

    def one_row(self, index: int) -> bool:
        return self.languages[index].one_row

    def facts(self) -> Mapping[str, object]:
        chances = {f"{n}.chance": language.chance for n, language in zip(self.names, self.languages, strict=True)}
        return {**super().facts(), **chances}

    def draw(self, index: int, length: int, rows: int, chance: torch.Generator, *, training: bool) -> Drawn:
        language = self.languages[index]
        symbols, answers = language.draw(rows, length - 1, chance)
        tag = torch.full((rows, 1), self.tags[index])
        tokens = answers + (self.first if language.answers_symbols else NO)
        return Drawn(
            inputs=torch.cat([tag, symbols + self.first], dim=1),
            targets=torch.cat([torch.full_like(tag, IGNORE), tokens.masked_fill(answers == IGNORE, IGNORE)], dim=1),
        )
