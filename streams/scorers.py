"""Scorers: from a model and a set to sums and counts per metric, which add up over batches and processes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.streams.base import Data, Metric
from clplat.streams.batch import IGNORE, Batch


class Answerer(Protocol):
    """A learner as a scorer sees it: in evaluation mode, on its device, through one view."""

    def logits(self, batch: Batch) -> Tensor:
        """(B, C) or (B, T, V), with classes that the scenario hides at minus infinity."""
        ...

    def generate(self, prompts: list[list[int]], *, max_new_tokens: int, stop: int | None) -> list[list[int]]:
        """Greedy continuations of token prompts, without the prompt, ended before `stop`."""
        ...

    def features(self, batch: Batch) -> Tensor:
        """(B, H), the inputs of the model's last layer; refuses a model that shows none."""
        ...

    def classes_seen(self) -> list[int]:
        """Output units, or numbers of labels, of the tasks that the learner has been trained on."""
        ...

    def tasks_seen(self) -> list[int]:
        """Indices of the tasks that the learner has been trained on."""
        ...

    def waits_for(self, task: int) -> bool:
        """Whether the learner has been trained, and on the task of this index not yet."""
        ...

    def device(self) -> torch.device: ...

    def reading(self, rows: int) -> AbstractContextManager[Reader]:
        """Within it the learner reads so many rows and learns from what has been scored of them; for models whose
        levels learn the next token, and in a fork."""
        ...


class Reader(Protocol):
    """Rows of text that a learner reads from their beginnings; what it learns from a row it knows there alone."""

    chunk: int
    """Tokens that are scored before anything is learned from them."""

    def logits(self, batch: Batch) -> Tensor:
        """(B, T, V) for all tokens of the rows so far, with gradients."""
        ...

    def learn(self, nats: Tensor, tokens: int) -> None:
        """Learn from the sum of the losses of what was scored last; `tokens` of each row have been scored by now."""
        ...


Sums = dict[str, Tensor]
"""Per metric a float64 tensor (2,): the sum and the count."""


class Scorer:
    """Base: batches go through `batch_sums`, whose results are added up.

    `adaptive` scorers change the model while they score; they run in a fork that is thrown away. `whole` scorers need
    all rows together: `evaluation.max_rows` does not hold for them, and each process does the same work.
    """

    metrics: Mapping[str, Metric]
    adaptive: bool = False
    whole: bool = False

    def score(self, model: Answerer, data: Data, rows: Tensor, batch_size: int) -> Sums:
        """Score the rows `rows` (N,) of `data`; the platform gives each process its share."""
        total = {name: torch.zeros(2, dtype=torch.float64) for name in self.metrics}
        for part in rows.split(batch_size):
            for name, pair in self.batch_sums(model, data.batch(part).to(model.device())).items():
                total[name] += pair.to("cpu", torch.float64)
        return total

    def batch_sums(self, model: Answerer, batch: Batch) -> Sums:
        """Sum and count of every metric over one batch."""
        raise TypeError(f"{type(self).__name__} must define batch_sums or score")

    def learning(self) -> Scorer:
        """The same scores of a model that learns from tokens once they are scored; itself where there is no such."""
        return self


class Classify(Scorer):
    """Accuracy and cross-entropy (nats an answer) of a classifier; each sample is forwarded once for both. Of a sample
    with several questions, those that it is asked count."""

    metrics = {
        "accuracy": Metric(higher_is_better=True, best=1.0),
        "loss": Metric(higher_is_better=False, unit="nats"),
    }

    def batch_sums(self, model: Answerer, batch: Batch) -> Sums:
        return self.sums(model.logits(batch).float(), batch.targets)

    def sums(self, logits: Tensor, targets: Tensor) -> Sums:
        """Sum and count of every metric for answers (B, C) or (B, heads, C)."""
        right = (logits.argmax(-1) == targets).double().sum()
        nats = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum", ignore_index=IGNORE).double()
        count = (targets != IGNORE).double().sum()
        return {"accuracy": torch.stack([right, count]), "loss": torch.stack([nats, count])}


class Likelihood(Scorer):
    """Cross-entropy of text in nats a token, and in bits a byte where tokenizers differ.

    `token_bytes` (V,) gives the bytes that each token stands for. With `answers`, `answer_loss` covers the
    target tokens of answers alone.
    """

    def __init__(self, *, token_bytes: Tensor, answers: bool = False) -> None:
        self.token_bytes, self.answers = token_bytes, answers
        metrics = {
            "loss": Metric(higher_is_better=False, unit="nats"),
            "bits_per_byte": Metric(higher_is_better=False, unit="bits"),
        }
        if answers:
            metrics["answer_loss"] = Metric(higher_is_better=False, unit="nats")
        self.metrics = metrics

    def batch_sums(self, model: Answerer, batch: Batch) -> Sums:
        return self.sums(model.logits(batch), batch)

    def learning(self) -> Scorer:
        return NextToken(self)

    def sums(self, logits: Tensor, batch: Batch) -> Sums:
        """Sum and count of every metric for answers (B, T, V)."""
        if self.answers and batch.answer is None:
            raise ValueError("Likelihood(answers=True) needs batches with `answer` marks; this set has none")
        targets, flat = batch.targets.flatten(), logits.flatten(0, 1)
        answer = None if batch.answer is None else batch.answer.flatten()
        counted = targets != IGNORE
        at = counted.nonzero().squeeze(1)
        if 2 * len(at) < len(flat):
            # Answers are a few places of long rows; the chances of all tokens at all others would fill the memory.
            targets, flat, counted = targets[at], flat[at], counted[at]
            answer = None if answer is None else answer[at]
        nats = F.cross_entropy(flat.float(), targets, reduction="none", ignore_index=IGNORE).double()
        lengths = self.token_bytes.to(targets.device)[targets.clamp(min=0)]
        sums = {
            "loss": torch.stack([nats.sum(), counted.sum().double()]),
            "bits_per_byte": torch.stack([nats.sum() / math.log(2), (lengths * counted).sum().double()]),
        }
        if self.answers and answer is not None:
            kept = answer & counted
            sums["answer_loss"] = torch.stack([(nats * kept).sum(), kept.sum().double()])
        return sums


class NextToken(Scorer):
    """What a `Likelihood` says of a model that learns while it is scored: a chunk is scored, and only then learned, by
    the cross-entropy of its targets (dynamic evaluation: Krause et al. 2018, arXiv:1709.07432; here of each row alone).

    A row is read anew from its beginning for every chunk, since all of it is answered by the weights of now: n chunks
    cost about n / 2 times as much as one reading, and as many backward passes.
    """

    adaptive = True

    def __init__(self, scorer: Likelihood) -> None:
        self.scorer, self.metrics = scorer, scorer.metrics

    def batch_sums(self, model: Answerer, batch: Batch) -> Sums:
        total = {name: torch.zeros(2, dtype=torch.float64, device=batch.targets.device) for name in self.metrics}
        length = batch.targets.shape[1]
        with model.reading(len(batch)) as reader:
            for start in range(0, length, reader.chunk):
                stop = min(start + reader.chunk, length)
                logits, part = reader.logits(columns(batch, 0, stop))[:, start:], columns(batch, start, stop)
                for name, pair in self.scorer.sums(logits.detach(), part).items():
                    total[name] += pair
                if stop < length:
                    flat = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
                    nats = F.cross_entropy(flat, part.targets.flatten(), reduction="sum", ignore_index=IGNORE)
                    reader.learn(nats, stop)
        return total


def columns(batch: Batch, start: int, stop: int) -> Batch:
    """The tokens start..stop of all rows, without what a stream added to them."""

    def cut(part: Tensor | None) -> Tensor | None:
        return None if part is None else part[:, start:stop]

    return batch.replaced(
        inputs=batch.inputs[:, start:stop], targets=batch.targets[:, start:stop], segment_ids=cut(batch.segment_ids),
        answer=cut(batch.answer), extra={},
    )  # fmt: skip
