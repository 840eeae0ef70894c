"""Scorers that let the model write: exact match of a final answer."""

from __future__ import annotations

import torch
from torch import Tensor

from clplat.streams.base import Data, Metric
from clplat.streams.scorers import Answerer, Scorer, Sums
from clplat.streams.tokenizers import Tokenizer
from clplat.streams.tokens import TokenCache


class ExactMatch(Scorer):
    """Share of prompts whose greedy continuation ends in the right answer: the text behind the last marker."""

    metrics = {"exact_match": Metric(higher_is_better=True)}

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
        """Scores the first `max_examples` documents of `cache`; answers are cut at `max_new_tokens`, and of a prompt
        longer than `max_prompt_tokens` the end is kept, which is where the question stands."""
        self.cache, self.tokenizer, self.marker, self.max_prompt_tokens = cache, tokenizer, marker, max_prompt_tokens
        self.max_new_tokens, self.count = max_new_tokens, min(max_examples, len(cache.prompts))

    def score(self, model: Answerer, data: Data, rows: Tensor, batch_size: int) -> Sums:
        """`rows` only says which share of the work this process has; examples are documents, not rows."""
        first, stride = (int(rows[0]) if len(rows) else self.count), 1
        if len(rows) > 1:
            stride = int(rows[1] - rows[0])
        mine = range(first, self.count, stride)
        right = 0
        for start in range(0, len(mine), batch_size):
            examples = [self.cache.document(number) for number in mine[start : start + batch_size]]
            written = model.generate(
                [prompt[-self.max_prompt_tokens :] for prompt, _ in examples],
                max_new_tokens=self.max_new_tokens,
                stop=self.tokenizer.end_token,
            )
            for (_, answer), answered in zip(examples, written, strict=True):
                right += self._final(answered) == self._final(answer) != ""
        return {"exact_match": torch.tensor([right, len(mine)], dtype=torch.float64)}

    def _final(self, tokens: list[int]) -> str:
        text = self.tokenizer.decode(tokens)
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
