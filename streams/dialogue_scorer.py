"""Answers about a dialogue: LoCoMo's token F1 by kind of question (Maharana et al. 2024, arXiv:2402.17753)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from clplat.streams.base import Data, Metric
from clplat.streams.generation_scorers import waits, write_answers
from clplat.streams.scorers import Answerer, Scorer, Sums
from clplat.streams.tokenizers import Tokenizer

KINDS = {1: "multi_hop", 2: "temporal", 3: "open_domain", 4: "single_hop", 5: "adversarial"}
"""LoCoMo's numbers of the kinds of questions."""
ADVERSARIAL = 5


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question, its answer (the trap, if it is adversarial: the text does not tell) and its kind."""

    question: str
    answer: str
    category: int


class DialogueAnswers(Scorer):
    """F1 of greedy answers: `f1` over all questions that have an answer, `f1_KIND` by kind, and `adversarial`, the F1
    with the answer that a question without one is a trap for: lower is better. (INFERRED: the official score asks
    whether the answer says that there is none, in words that only instructed models know.)"""

    def __init__(
        self,
        *,
        questions: Sequence[Question],
        prompts: Sequence[list[int]],
        tokenizer: Tokenizer,
        max_new_tokens: int,
        tokens_per_row: int,
        once_seen: int | None = None,
    ) -> None:
        """`prompts` are those of the questions, in tokens; as many are answered together as have the tokens of a batch
        of rows of `tokens_per_row`. `once_seen` is as in `WrittenAnswers`."""
        if find_spec("nltk") is None:
            raise ValueError("nltk is not installed; pip install 'clplat[pretrained]' brings it")
        self.questions, self.prompts = list(questions), list(prompts)
        self.tokenizer, self.max_new_tokens = tokenizer, max_new_tokens
        self.tokens_per_row, self.once_seen = tokens_per_row, once_seen
        better = Metric(higher_is_better=True, best=1.0)
        asked = {question.category for question in questions}
        self.metrics = {"f1": better} | {f"f1_{KINDS[kind]}": better for kind in sorted(asked - {ADVERSARIAL})}
        if ADVERSARIAL in asked:
            self.metrics["adversarial"] = Metric(higher_is_better=False, best=0.0)

    def score(self, model: Answerer, data: Data, rows: torch.Tensor, batch_size: int) -> Sums:
        """Question q goes with row q (modulo the rows): a process that has the row asks that question."""
        total = {name: torch.zeros(2, dtype=torch.float64) for name in self.metrics}
        if waits(model, self.once_seen):
            return total
        numbers = torch.arange(len(self.questions))
        mine = numbers[torch.isin(numbers % max(1, len(data)), rows)].tolist()
        answers = write_answers(
            model, [self.prompts[number] for number in mine], max_new_tokens=self.max_new_tokens,
            stop=self.tokenizer.end_token, batch_size=batch_size, tokens_per_row=self.tokens_per_row,
        )  # fmt: skip
        for number, tokens in zip(mine, answers, strict=True):
            question = self.questions[number]
            value = dialogue_f1(self.tokenizer.decode(tokens), question.answer, question.category)
            for name in _metrics_of(question.category):
                total[name] += torch.tensor([value, 1.0], dtype=torch.float64)
        return total


def dialogue_f1(written: str, wanted: str, category: int) -> float:
    """LoCoMo's F1 of the first line of an answer. Of several wanted answers, separated by commas (multi-hop), each
    counts with the written part that is closest; of an open question's answer, what stands before a semicolon."""
    written = written.strip().partition("\n")[0]
    if KINDS[category] == "multi_hop":
        parts, offered = wanted.split(","), written.split(",")
        return sum(max(token_f1(offer, part) for offer in offered) for part in parts) / len(parts)
    if KINDS[category] == "open_domain":
        wanted = wanted.partition(";")[0]
    return token_f1(written, wanted)


def token_f1(written: str, wanted: str) -> float:
    """F1 of stemmed words, without articles, `and`, case and punctuation."""
    ours, theirs = _words(written), _words(wanted)
    shared = (ours & theirs).total()
    return 2 * shared / (ours.total() + theirs.total()) if shared else 0.0


def _metrics_of(category: int) -> tuple[str, ...]:
    return ("adversarial",) if category == ADVERSARIAL else ("f1", f"f1_{KINDS[category]}")


def _words(text: str) -> Counter[str]:
    plain = "".join(mark for mark in text.lower() if mark not in string.punctuation)
    return Counter(_stemmer().stem(word) for word in re.sub(r"\b(a|an|the|and)\b", " ", plain).split())


@cache
def _stemmer() -> Any:
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()
