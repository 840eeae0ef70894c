"""The scorer of labelled text for language models: which label, written out, is the most likely continuation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.streams.base import Data, Metric
from clplat.streams.batch import IGNORE, Batch
from clplat.streams.scorers import Answerer, Scorer, Sums


class LabelLikelihood(Scorer):
    """Accuracy of the label of highest log-probability, and the right answer's cross-entropy in nats a token.

    Rows are prompts continued by the tokens of their right label (`labelled_rows.answered`). Every candidate label is
    put in its place and read with the whole prompt again, at most `batch_size` pairs of row and label at a time; labels
    of one token each are read off behind the prompt at once.
    """

    metrics = {
        "accuracy": Metric(higher_is_better=True, best=1.0),
        "answer_loss": Metric(higher_is_better=False, unit="nats"),
    }

    def __init__(
        self,
        *,
        labels: Sequence[Sequence[int]],
        candidates: Sequence[int] | None = None,
        measure: Literal["sum", "mean"] = "sum",
    ) -> None:
        """`labels`: the tokens of each label, with its end token where rows have one, no two alike. `candidates`: the
        labels that may be answered, by number; None means those of the tasks seen. `measure`: a label's
        log-probability, or its mean over the label's tokens, which does not favour short labels."""
        if not all(labels) or len(set(map(tuple, labels))) < len(labels):
            raise ValueError("labels: each needs at least one token, and no two may have the same")
        self.candidates, self.measure = candidates, measure
        self.lengths = torch.tensor([len(label) for label in labels])
        self.tokens = torch.full((len(labels), int(self.lengths.max())), IGNORE)
        for number, label in enumerate(labels):
            self.tokens[number, : len(label)] = torch.tensor(label)

    def score(self, model: Answerer, data: Data, rows: Tensor, batch_size: int) -> Sums:
        allowed = model.classes_seen() if self.candidates is None else self.candidates
        candidates = torch.tensor(allowed, dtype=torch.long)
        total = {name: torch.zeros(2, dtype=torch.float64) for name in self.metrics}
        if not len(candidates):  # nothing can be answered yet: no score, rather than a wrong one
            return total
        for part in rows.split(batch_size):
            batch = data.batch(part).to(model.device())
            nats, count = self._answer_loss(model, batch)
            total["answer_loss"] += torch.tensor([nats, count], dtype=torch.float64)
            chosen = candidates[self.likelihoods(model, batch, candidates, batch_size).argmax(1)]
            right = (chosen == self.numbers(batch).cpu()).sum()
            total["accuracy"] += torch.tensor([float(right), len(part)], dtype=torch.float64)
        return total

    def likelihoods(self, model: Answerer, batch: Batch, candidates: Tensor, at_once: int) -> Tensor:
        """Log-probability (B, C) of every candidate (C,) behind every row's prompt, on the CPU."""
        if self.tokens.shape[1] == 1:
            place = self._places(batch)
            logits = model.logits(batch)[torch.arange(len(batch), device=place.device), place[:, 0]]
            return logits.float().log_softmax(-1).double().cpu()[:, self.tokens[candidates, 0]]
        pairs = torch.arange(len(batch) * len(candidates))
        found = [
            self._pair_likelihoods(model, batch, part // len(candidates), candidates[part % len(candidates)])
            for part in pairs.split(at_once)
        ]
        return torch.cat(found).view(len(batch), len(candidates))

    def numbers(self, batch: Batch) -> Tensor:
        """The label number (B,) that each row's answer spells."""
        places, width = self._places(batch), batch.targets.shape[1]
        answers = F.pad(batch.targets, (0, self.tokens.shape[1]), value=IGNORE).gather(1, places)
        alike = (answers.unsqueeze(1) == self.tokens.to(answers.device)).all(-1)
        if not bool(alike.any(1).all()):
            raise ValueError(f"LabelLikelihood.labels: a row of {width} tokens ends in an answer that is no label")
        return alike.int().argmax(1)

    def _places(self, batch: Batch) -> Tensor:
        """Positions (B, L) of the targets that an answer can take."""
        starts = (batch.targets != IGNORE).int().argmax(1, keepdim=True)
        return starts + torch.arange(self.tokens.shape[1], device=starts.device)

    def _pair_likelihoods(self, model: Answerer, batch: Batch, rows: Tensor, labels: Tensor) -> Tensor:
        """Log-probability (N,) of one label for each of some rows."""
        places = self._places(batch)[rows]
        targets, length = self.tokens[labels].to(places.device), self.tokens.shape[1]
        spelled = targets.clamp(min=0)
        # The label stands behind its prompt; what follows a short one is read by nobody, since the model is causal.
        inputs = F.pad(batch.inputs[rows], (0, length + 1)).scatter(1, places + 1, spelled)[:, : int(places.max()) + 1]
        task = None if batch.task is None else batch.task[rows]
        logits = model.logits(Batch(inputs=inputs, targets=inputs, task=task))
        at = places.unsqueeze(-1).expand(-1, -1, logits.shape[-1])
        chances = logits.gather(1, at).float().log_softmax(-1).gather(2, spelled.unsqueeze(-1)).squeeze(-1)
        sums = chances.double().masked_fill(targets == IGNORE, 0.0).sum(1).cpu()
        return sums / self.lengths[labels] if self.measure == "mean" else sums

    def _answer_loss(self, model: Answerer, batch: Batch) -> tuple[float, int]:
        """Nats of the right answers' tokens, and their number."""
        logits = model.logits(batch).flatten(0, 1).float()
        nats = F.cross_entropy(logits, batch.targets.flatten(), reduction="sum", ignore_index=IGNORE)
        return float(nats), int((batch.targets != IGNORE).sum())
