"""Scorers that let the model write: what its answers are worth, exact match of a final answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from clplat.streams.answer_metrics import NAMES, AnswerMetric, answer_value
from clplat.streams.base import Data, Metric
from clplat.streams.scorers import Answerer, Scorer, Sums
from clplat.streams.tokenizers import Tokenizer
from clplat.streams.tokens import TokenCache


class WrittenAnswers(Scorer):
    """Mean value, in 0..1, of the greedy continuations of prompts. A subclass may define `value` itself."""

    def __init__(
        self,
        *,
        cache: TokenCache,
        tokenizer: Tokenizer,
        max_prompt_tokens: int,
        max_new_tokens: int,
        max_examples: int,
        metric: AnswerMetric = "exact_match",
        begin: int | None = None,
        once_seen: int | None = None,
    ) -> None:
        """Scores the first `max_examples` documents of `cache` that have a prompt.

        `once_seen` is a task's index: its answers are written before any training and from that task on, and have no
        score (NaN) in between.

        Answers are cut at `max_new_tokens`, and of a prompt longer than `max_prompt_tokens` the end is kept, which
        is where the question stands, behind the token `begin` where one is given.
        """
        self.cache, self.tokenizer, self.max_prompt_tokens = cache, tokenizer, max_prompt_tokens
        self.begin = [] if begin is None else [begin]
        self.max_new_tokens, self.once_seen = max_new_tokens, once_seen
        self.examples = torch.from_numpy(np.flatnonzero(cache.prompts)[:max_examples])
        self.metric = NAMES.get(metric, metric)
        self.metrics = {self.metric: Metric(higher_is_better=True, best=1.0)}
        self._value = answer_value(metric)

    def value(self, prompt: list[int], wanted: list[int], written: list[int]) -> float:
        """What a written answer is worth, from tokens."""
        return self._value(*(self.tokenizer.decode(tokens) for tokens in (prompt, wanted, written)))

    def score(self, model: Answerer, data: Data, rows: Tensor, batch_size: int) -> Sums:
        """Example e goes with row e (modulo the rows): a process that has the row writes that answer."""
        if waits(model, self.once_seen):
            return {self.metric: torch.zeros(2, dtype=torch.float64)}
        mine = self.examples[torch.isin(torch.arange(len(self.examples)) % max(1, len(data)), rows)].tolist()
        examples, room = [self.cache.document(number) for number in mine], self.max_prompt_tokens - len(self.begin)
        prompts = [self.begin + prompt[-room:] for prompt, _ in examples]
        answers = write_answers(
            model, prompts, max_new_tokens=self.max_new_tokens, stop=self.tokenizer.end_token, batch_size=batch_size,
            tokens_per_row=data.tokens_per_row,
        )  # fmt: skip
        total = sum(self.value(*example, answer) for example, answer in zip(examples, answers, strict=True))
        return {self.metric: torch.tensor([total, len(mine)], dtype=torch.float64)}


def waits(model: Answerer, once_seen: int | None) -> bool:
    """Whether the answers of task `once_seen` are not to be written yet: other tasks have been trained, and it not."""
    return once_seen is not None and model.waits_for(once_seen)


def write_answers(
    model: Answerer, prompts: Sequence[list[int]], *, max_new_tokens: int, stop: int | None, batch_size: int,
    tokens_per_row: int,
) -> list[list[int]]:  # fmt: skip
    """The greedy continuation of each prompt, as `Answerer.generate` has it.

    Prompts of like length are written side by side, since a batch costs what its longest one does: `batch_size` at
    least, and where they are short as many as have no more tokens than so many rows. A token takes as long for a few
    prompts as for many.
    """
    left, most = sorted(range(len(prompts)), key=lambda number: len(prompts[number])), batch_size * tokens_per_row
    found: dict[int, list[int]] = {}
    while left:
        count = min(batch_size, len(left))
        while count < len(left) and (count + 1) * (len(prompts[left[count]]) + max_new_tokens) <= most:
            count += 1
        part, left = left[:count], left[count:]
        answers = model.generate([prompts[n] for n in part], max_new_tokens=max_new_tokens, stop=stop)
        found |= zip(part, answers, strict=True)
    return [found[number] for number in range(len(prompts))]


class ExactMatch(WrittenAnswers):
    """Share of prompts whose greedy continuation ends in the right answer: the text behind the last marker."""

    def __init__(
        self,
        *,
        cache: TokenCache,
        tokenizer: Tokenizer,
        marker: str,
        max_prompt_tokens: int,
        max_new_tokens: int,
        max_examples: int,
    ) -> None:
        """As `WrittenAnswers`; an empty `marker` compares whole answers."""
        super().__init__(
            cache=cache, tokenizer=tokenizer, max_prompt_tokens=max_prompt_tokens, max_new_tokens=max_new_tokens,
            max_examples=max_examples,
        )  # fmt: skip
        self.marker = marker

    def value(self, prompt: list[int], wanted: list[int], written: list[int]) -> float:
        return float(self.final(written) == self.final(wanted) != "")

    def final(self, tokens: list[int]) -> str:
        """What an answer comes to; empty where it has no marker."""
        text = self.tokenizer.decode(tokens)
        if not self.marker:
            return text.strip()
        return text.rpartition(self.marker)[2].strip() if self.marker in text else ""


class Together(Scorer):
    """Several scorers on one set, their metrics side by side."""

    def __init__(self, *scorers: Scorer) -> None:
        self.scorers = scorers
        self.metrics = {name: metric for scorer in scorers for name, metric in scorer.metrics.items()}
        self.adaptive = any(scorer.adaptive for scorer in scorers)

    def learning(self) -> Scorer:
        changed = [scorer.learning() for scorer in self.scorers]
        return self if all(a is b for a, b in zip(changed, self.scorers, strict=True)) else Together(*changed)

    def score(self, model: Answerer, data: Data, rows: Tensor, batch_size: int) -> Sums:
        found: Sums = {}
        for scorer in self.scorers:
            found |= scorer.score(model, data, rows, batch_size)
        return found
