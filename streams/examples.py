"""A token cache as rows of one question and its answer each, of which the answer alone is learned."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clplat.streams.batch import IGNORE, Batch
from clplat.streams.tokens import TokenCache, TokenData


class ExampleRows(TokenData):
    """Row r is one document: what fits of its prompt, then its answer and the end token; `IGNORE` but for the latter.

    Of an answer longer than `max_answer_tokens` (its end token counted) the beginning is kept, and of a prompt that
    does not fit beside it in `length` + 1 tokens the end, behind `begin` where that is given. Rows are filled up on the
    right with `end`. `max_rows` keeps that many documents, spread evenly over the whole.
    """

    def __init__(
        self,
        cache: TokenCache,
        *,
        length: int,
        task: int,
        max_answer_tokens: int,
        end: int,
        begin: int | None = None,
        max_rows: int | None = None,
    ) -> None:
        super().__init__(cache, length=length, task=task, answers=True, answers_only=True)
        self.max_answer_tokens, self.end, self.begin = max_answer_tokens, end, begin
        self._rows = cache.documents if max_rows is None else min(cache.documents, max_rows)
        self.nbytes = self._rows * length * cache.kind.itemsize
        identity = f"{cache.digest} examples {length} {self._rows} {max_answer_tokens} {begin}"
        self.digest = hashlib.sha256(identity.encode()).hexdigest()[:16]

    def batch(self, rows: Tensor) -> Batch:
        """Rows (B,) as inputs and targets (B, T)."""
        device, front = self._window.device, int(self.begin is not None)
        documents = (rows * self.cache.documents // max(1, self._rows)).to(device, non_blocking=True)
        starts = torch.where(documents > 0, self._ends[(documents - 1).clamp(min=0)], 0)
        middles, ends = starts + self._prompts[documents], self._ends[documents]
        answers = (ends - middles).clamp(max=self.max_answer_tokens)
        prompts = torch.minimum(middles - starts, self.tokens_per_row + 1 - front - answers)
        places = (middles - prompts).unsqueeze(1) + self._window - front
        behind = (self._window >= (front + prompts).unsqueeze(1)) & (
            self._window < (front + prompts + answers).unsqueeze(1)
        )
        window = self._tokens[places.clamp(0, len(self._tokens) - 1)].long() & self._mask
        window = window.masked_fill(self._window >= (front + prompts + answers).unsqueeze(1), self.end)
        if self.begin is not None:
            window[:, 0] = self.begin
        answer = behind[:, 1:]
        return Batch(
            inputs=window[:, :-1].contiguous(),
            targets=window[:, 1:].masked_fill(~answer, IGNORE),
            task=torch.full((len(rows),), self.task, device=device),
            answer=answer,
        )


def sizes(cache: TokenCache) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens (D,) of every document's prompt, and of its answer with the end token."""
    prompts = np.asarray(cache.prompts, dtype=np.int64)
    return prompts, np.diff(cache.ends, prepend=0) - prompts
