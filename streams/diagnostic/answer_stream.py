"""Streams of generated token rows that ask for answers: sets apart from each other, longer rows as probes, scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.streams.base import EvalSet, Metric, Spec, Stream, Task, digest
from clplat.streams.batch import IGNORE, Batch
from clplat.streams.diagnostic.sources import Drawn, apart, marks, source
from clplat.streams.labelled_rows import TokenRows
from clplat.streams.scorers import Answerer, Scorer, Sums

BLANK = 0
"""Token that says nothing and stands behind rows that are shorter than those of another task."""


class AnsweredRows(TokenRows):
    """Rows to be scored, with the answers that are no longer right as the extra tensor `stale`."""

    def __init__(self, rows: Drawn, *, task: int) -> None:
        super().__init__(rows.inputs, rows.targets, task=task)
        self.stale = None if rows.stale is None else rows.stale.int()
        if self.stale is not None:
            self.nbytes += self.stale.nbytes
            self.digest = digest(self.inputs, self.targets, self.stale)

    def batch(self, rows: Tensor) -> Batch:
        batch = super().batch(rows)
        if self.stale is None:
            return batch
        return batch.replaced(extra={"stale": self.stale[rows.to(self.stale.device)].long()})


class Answers(Scorer):
    """Accuracy and cross-entropy (nats) of each asked token, among the whole vocabulary, and the share of rows without
    an error. With `stale`: accuracy where an answer has changed within the row, and how often the old one is given."""

    def __init__(self, *, stale: bool = False) -> None:
        self.stale = stale
        self.metrics = {
            "accuracy": Metric(higher_is_better=True),
            "loss": Metric(higher_is_better=False, unit="nats"),
            "row_accuracy": Metric(higher_is_better=True),
        }
        if stale:
            self.metrics |= {
                "rewritten_accuracy": Metric(higher_is_better=True),
                "stale_rate": Metric(higher_is_better=False),
            }

    def batch_sums(self, model: Answerer, batch: Batch) -> Sums:
        asked = batch.targets != IGNORE
        logits, targets = model.logits(batch)[asked].float(), batch.targets[asked]
        answers = logits.argmax(-1)
        right = answers == targets
        wrong = torch.zeros_like(batch.targets).masked_scatter(asked, (~right).long()).sum(1)
        rows = asked.any(1)
        nats = F.cross_entropy(logits, targets, reduction="sum")
        sums = {
            "accuracy": _pair(right.sum(), asked.sum()),
            "loss": _pair(nats, asked.sum()),
            "row_accuracy": _pair((rows & (wrong == 0)).sum(), rows.sum()),
        }
        if self.stale:
            old = batch.extra["stale"][asked]
            changed = old != IGNORE
            sums["rewritten_accuracy"] = _pair((right & changed).sum(), changed.sum())
            sums["stale_rate"] = _pair((answers == old).sum(), changed.sum())
        return sums


def _pair(total: Tensor, count: Tensor) -> Tensor:
    return torch.stack([total.double(), count.double()])


class _AnswerStream(Stream):
    """Base: a task for each name, with rows of its own length. A subclass sets `names`, `lengths` and `vocab_size` and
    draws rows.

    Test and validation rows are the same for every seed; the run's seed draws training rows, none of which is a test
    or validation row. Training rows of all tasks are as wide as the longest, so that they can be replayed and joined.
    """

    names: list[str]
    lengths: list[int]
    vocab_size: int
    stale = False

    def __init__(self, *, multiples: Sequence[int], train_rows: int, val_rows: int, test_rows: int, seed: int) -> None:
        for name, rows in (("train_rows", train_rows), ("val_rows", val_rows), ("test_rows", test_rows)):
            if rows < 1:
                raise ValueError(f"{name}: at least 1, got {rows}")
        if any(multiple < 2 for multiple in multiples) or len(set(multiples)) < len(multiples):
            raise ValueError(f"multiples: different whole numbers from 2 upwards, got {list(multiples)}")
        self.multiples, self.seed = list(multiples), seed
        self.rows = {"train": train_rows, "val": val_rows, "test": test_rows}

    def draw(self, index: int, length: int, rows: int, chance: torch.Generator, *, training: bool) -> Drawn:
        """`rows` rows of `length` tokens that ask what the task number `index` asks."""
        raise TypeError(f"{type(self).__name__} must define draw")

    def one_row(self, index: int) -> bool:
        """Whether the task has a single row of each length, which all its sets of this length then consist of."""
        return False

    def prepare(self) -> None:
        self.spec = Spec(kind="language", input_shape=(max(self.lengths),), num_outputs=self.vocab_size)
        self.tasks = [self._task(index) for index in range(len(self.names))]
        self.probes = [
            self._scored(f"{name}-x{multiple}", index, self._rows(index, f"test-x{multiple}", length * multiple))
            for index, (name, length) in enumerate(zip(self.names, self.lengths, strict=True))
            for multiple in self.multiples
        ]

    def facts(self) -> Mapping[str, object]:
        return {"vocab_size": self.vocab_size}

    def _task(self, index: int) -> Task:
        name, length = self.names[index], self.lengths[index]
        test = self._rows(index, "test", length)
        val = self._rows(index, "val", length, apart_from=[test])
        train = self._rows(index, "train", length, apart_from=[test, val]).padded(
            self.spec.input_shape[0], BLANK, IGNORE
        )
        return Task(
            index=index, name=name, train=TokenRows(train.inputs, train.targets, task=index),
            val=self._scored(f"{name}/val", index, val), test=self._scored(name, index, test), headline="accuracy",
        )  # fmt: skip

    def _scored(self, name: str, index: int, rows: Drawn) -> EvalSet:
        return EvalSet(name=name, data=AnsweredRows(rows, task=index), scorer=Answers(stale=self.stale))

    def _rows(self, index: int, part: str, length: int, apart_from: Sequence[Drawn] = ()) -> Drawn:
        """One set of a task, without rows of others; where there are too few rows for that, it is refused."""
        name, training = self.names[index], part == "train"
        chance = source(type(self).__name__, name, part, length, self.seed if training else "fixed")
        others = [] if self.one_row(index) else apart_from
        taken = torch.cat([torch.empty(0, dtype=torch.long), *(marks(other.inputs) for other in others)])
        rows, same = apart(
            lambda count, draw: self.draw(index, length, count, draw, training=training),
            self.rows[part.split("-")[0]], chance, taken,
        )  # fmt: skip
        if same:
            raise ValueError(
                f"{part}_rows: {name} has too few different rows of {length} tokens to keep its sets apart ({same} of "
                f"{len(rows.inputs)} are in another set); ask for longer rows, a larger vocabulary, or fewer test_rows"
            )
        return rows


def for_each_task(name: str, values: Sequence[int], count: int) -> list[int]:
    """One value for each of `count` tasks: as given, or the only one for all."""
    if len(values) not in (1, count):
        raise ValueError(f"{name}: one value for all tasks, or one for each of the {count}; got {list(values)}")
    return list(values) * (count if len(values) == 1 else 1)
