"""Scoring a text by a model that learns while it reads: a chunk is scored, and only then learned.

Dynamic evaluation (Krause et al. 2018, arXiv:1709.07432) of each row on its own. Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.streams.scorers import Answerer, Scorer, Sums
from clplat.streams.batch import IGNORE, Batch


class Reader(Protocol):
    """Rows of text that a learner reads from their beginnings; each has what it has learned to itself."""

    chunk: int
    """Tokens to be scored before the next ones are asked for."""

    def logits(self, batch: Batch) -> Tensor:
        """(B, T, V) for all tokens so far, with gradients."""
        ...

    def learn(self, nats: Tensor, tokens: int) -> None:
        """Learn from the sum of the losses of tokens that have been scored; `tokens` of each row are now read."""
        ...


@runtime_checkable
class Learns(Answerer, Protocol):
    """An answerer that can learn from what it has been scored on."""

    def reading(self, rows: int) -> AbstractContextManager[Reader]:
        """Within it the learner reads so many rows; behind it it is what it was."""
        ...


class NextToken(Scorer):
    """What `scorer` would say of answers to each chunk of a row by a learner that has learned the chunks before.

    `scorer` makes its sums of logits and targets (`TokenSums`). A row is read for every chunk anew from its beginning,
    since all that stands before the chunk is answered by the weights of now: a row of n chunks costs about n / 2
    forward passes, and as many backward.
    """

    adaptive = True

    def __init__(self, scorer: TokenSums) -> None:
        self.scorer, self.metrics = scorer, scorer.metrics

    def batch_sums(self, model: Answerer, batch: Batch) -> Sums:
        if not isinstance(model, Learns):
            raise TypeError(f"{type(model).__name__}: cannot learn while it is scored, as NextToken needs")
        total = {name: torch.zeros(2, dtype=torch.float64, device=batch.targets.device) for name in self.metrics}
        length = batch.targets.shape[1]
        with model.reading(len(batch)) as reader:
            for start in range(0, length, reader.chunk):
                stop = min(start + reader.chunk, length)
                logits, part = reader.logits(columns(batch, 0, stop))[:, start:], columns(batch, start, stop)
                for name, pair in self.scorer.sums(logits.detach(), part).items():
                    total[name] += pair
                if stop < length:
                    flat, targets = logits.flatten(0, 1).float(), part.targets.flatten()
                    reader.learn(F.cross_entropy(flat, targets, reduction="sum", ignore_index=IGNORE), stop)
        return total


class TokenSums(Scorer):
    pass


def columns(batch: Batch, start: int, stop: int) -> Batch:
    """The tokens start..stop of all rows."""
    kept = {name: part for name, part in batch.tensors().items() if not name.startswith("extra.")}
    of_tokens = ("inputs", "targets", "segment_ids", "answer")
    return Batch.from_tensors({n: part[:, start:stop] if n in of_tokens else part for n, part in kept.items()})
