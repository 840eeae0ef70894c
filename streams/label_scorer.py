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

SLACK = 0.1
"""Nats by which the same token may be more likely in one batch than in another, by rounding to 16 bits."""


class LabelLikelihood(Scorer):
    """Accuracy of the label of highest log-probability, and the right answer's cross-entropy in nats a token.

    Rows are prompts continued by the tokens of their right label (`labelled_rows.answered`). Other labels are put in
    its place and read with the whole prompt again, at most `batch_size` pairs of row and label at a time, the most
    promising ones first: a label is no more likely than its first token, which is read off behind the prompt for all of
    them at once, so that those whose first token is less likely than a whole label need not be read.
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
            for name, pair in self._sums(model, data.batch(part).to(model.device()), candidates, batch_size).items():
                total[name] += pair
        return total

    def _sums(self, model: Answerer, batch: Batch, candidates: Tensor, at_once: int) -> Sums:
        """Sum and count of both metrics over one batch, whose logits are gone when the next one's come."""
        logits = model.logits(batch)
        chosen = candidates[self._likeliest(model, batch, logits, candidates, at_once)]
        right = (chosen == self.numbers(batch).cpu()).sum()
        return {
            "accuracy": torch.tensor([float(right), len(batch)], dtype=torch.float64),
            "answer_loss": self._answer_loss(logits, batch),
        }

    def likelihoods(self, model: Answerer, batch: Batch, rows: Tensor, labels: Tensor) -> Tensor:
        """The measure (N,) of one label each behind the prompts of some rows, on the CPU."""
        places = self._places(batch)[rows]
        targets, length = self.tokens[labels].to(places.device), self.tokens.shape[1]
        spelled = targets.clamp(min=0)
        # The label stands behind its prompt; what follows a short one is read by nobody, since the model is causal.
        inputs = F.pad(batch.inputs[rows], (0, length + 1)).scatter(1, places + 1, spelled)[:, : int(places.max()) + 1]
        task = None if batch.task is None else batch.task[rows]
        logits = model.logits(Batch(inputs=inputs, targets=inputs, task=task))
        at = places.unsqueeze(-1).expand(-1, -1, logits.shape[-1])
        chances = logits.gather(1, at).float().log_softmax(-1).gather(2, spelled.unsqueeze(-1)).squeeze(-1)
        return self._measured(chances.double().masked_fill(targets == IGNORE, 0.0).sum(1).cpu(), labels)

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

    def _likeliest(self, model: Answerer, batch: Batch, logits: Tensor, candidates: Tensor, at_once: int) -> Tensor:
        """Which candidate (B,) has the highest measure behind each row's prompt; `logits` are the batch's own."""
        place = self._places(batch)[:, 0]
        first = logits[torch.arange(len(batch), device=place.device), place].float().log_softmax(-1)
        begins = self.tokens[candidates, 0].to(place.device)
        bounds = self._measured(first[:, begins].double().cpu(), candidates)
        # Labels of one token are read already.
        known = bounds.masked_fill(self.lengths[candidates] > 1, float("-inf"))
        bounds, order = bounds.masked_fill(self.lengths[candidates] == 1, float("-inf")).sort(1, descending=True)
        begun, wave = 0, 1
        while begun < len(candidates):
            hopeful = bounds[:, begun : begun + wave] > known.amax(1, keepdim=True) - SLACK
            rows, places = hopeful.nonzero(as_tuple=True)
            if not len(rows):
                break
            asked = order[rows, begun + places]
            for part in torch.arange(len(rows)).split(at_once):
                pairs = rows[part], asked[part]
                known[pairs] = self.likelihoods(model, batch, pairs[0], candidates[pairs[1]])
            begun, wave = begun + wave, 2 * wave
        return known.argmax(1)

    def _measured(self, sums: Tensor, labels: Tensor) -> Tensor:
        return sums / self.lengths[labels] if self.measure == "mean" else sums

    def _answer_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Nats of the right answers' tokens, and their number, (2,) on the CPU."""
        rows, places = (batch.targets != IGNORE).nonzero(as_tuple=True)
        nats = F.cross_entropy(logits[rows, places].float(), batch.targets[rows, places], reduction="sum").double()
        return torch.stack([nats, nats.new_tensor(len(rows))]).cpu()
