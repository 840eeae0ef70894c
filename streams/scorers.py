"""Scorers: from a model and a set to sums and counts per metric, which add up over batches and processes."""

from __future__ import annotations

import math
from collections.abc import Mapping
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

    def device(self) -> torch.device: ...


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
        logits = model.logits(batch)
        nats = (
            F.cross_entropy(
                logits.flatten(0, 1).float(), batch.targets.flatten(), reduction="none", ignore_index=IGNORE
            )
            .view_as(batch.targets)
            .double()
        )
        counted = batch.targets != IGNORE
        lengths = self.token_bytes.to(batch.targets.device)[batch.targets.clamp(min=0)]
        size = (lengths * counted).sum().double()
        sums = {
            "loss": torch.stack([nats.sum(), counted.sum().double()]),
            "bits_per_byte": torch.stack([nats.sum() / math.log(2), size]),
        }
        if self.answers:
            if batch.answer is None:
                raise ValueError("Likelihood(answers=True) needs batches with `answer` marks; this set has none")
            kept = batch.answer & counted
            sums["answer_loss"] = torch.stack([(nats * kept).sum(), kept.sum().double()])
        return sums
