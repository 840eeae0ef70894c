"""Scorers that let the model write: exact match of a final answer."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from clplat.streams.base import Data, Metric
from clplat.streams.scorers import Answerer, Scorer, Sums
from clplat.streams.tokenizers import Tokenizer
from clplat.streams.tokens import TokenCache


class ExactMatch(Scorer):
    """Share of prompts whose greedy continuation ends in the right answer: the text behind the last marker."""

    metrics = {"exact_match": Metric(higher_is_better=True, best=1.0)}

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
        """Scores the first `max_examples` documents of `cache` that have a prompt.

        Answers are cut at `max_new_tokens`, and of a prompt longer than `max_prompt_tokens` the end is kept, which
        is where the question stands. An empty `marker` compares whole answers.
        """
        self.cache, self.tokenizer, self.marker, self.max_prompt_tokens = cache, tokenizer, marker, max_prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.examples = torch.from_numpy(np.flatnonzero(cache.prompts)[:max_examples])

    def score(self, model: Answerer, data: Data, rows: Tensor, batch_size: int) -> Sums:
        """Example e goes with row e (modulo the rows): a process that has the row writes that answer."""
        mine = self.examples[torch.isin(torch.arange(len(self.examples)) % max(1, len(data)), rows)]
        right = sum(self._right(model, part.tolist()) for part in mine.split(batch_size) if len(part))
        return {"exact_match": torch.tensor([right, len(mine)], dtype=torch.float64)}

    def _right(self, model: Answerer, numbers: list[int]) -> int:
        examples = [self.cache.document(number) for number in numbers]
        prompts = [prompt[-self.max_prompt_tokens :] for prompt, _ in examples]
        written = model.generate(prompts, max_new_tokens=self.max_new_tokens, stop=self.tokenizer.end_token)
        pairs = zip(examples, written, strict=True)
        return sum(self.final(answered) == self.final(answer) != "" for (_, answer), answered in pairs)

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

    def score(self, model: Answerer, data: Data, rows: Tensor, batch_size: int) -> Sums:
        found: Sums = {}
        for scorer in self.scorers:
            found |= scorer.score(model, data, rows, batch_size)
        return found
