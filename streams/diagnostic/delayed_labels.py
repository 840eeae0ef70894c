"""N-parity and N-delayed match to sample, N = 2, 3, …, as sequences of tasks: the curricula of the timescales study.

Source: Khajehabdollahi et al. 2024 (arXiv:2309.12927) and its published code; docs/timescales.md says what differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clplat.streams.base import EvalSet, Metric, Spec, Stream, Task
from clplat.streams.batch import IGNORE
from clplat.streams.diagnostic.bit_rows import PAD, BitRows, Labels, delayed_match, parity
from clplat.streams.diagnostic.sources import source
from clplat.streams.scorers import Classify, Sums

LABELS: dict[str, Labels] = {"parity": parity, "match": delayed_match}

Curriculum = Literal["single_head", "multi_head", "sliding"]


class TrainedHeads(Classify):
    """`accuracy` and `loss` over all heads that a task trains, and `newest_accuracy`, that of its own head alone."""

    metrics = Classify.metrics | {"newest_accuracy": Metric(higher_is_better=True, best=1.0)}

    def __init__(self, *, newest: int) -> None:
        """`newest`: the place of the task's own head."""
        self.newest = newest

    def sums(self, logits: Tensor, targets: Tensor) -> Sums:
        found = super().sums(logits, targets)
        if targets.ndim == 2:
            logits, targets = logits[:, self.newest], targets[:, self.newest]
        right, count = (logits.argmax(-1) == targets).double().sum(), (targets != IGNORE).double().sum()
        return found | {"newest_accuracy": torch.stack([right, count])}


class _DelayedLabels(Stream):
    """Base: a task for every N from `first` to `last`. A subclass names its labels, and whether its bits are fair.

    A task shows N + 2 to 4N + 2 bits, uniformly, one draw for each training batch; an answer is asked for after the
    last bit. Training bits are 1 with a probability drawn for each row from U[0, 1], or fair; test and validation bits
    are always fair, and the same for every seed.
    """

    label: ClassVar[str]
    fair: ClassVar[bool]

    def __init__(
        self,
        *,
        curriculum: Curriculum = "multi_head",
        first: int = 2,
        last: int = 6,
        window: int | None = None,
        train_rows: int = 102_400,
        val_rows: int = 1024,
        test_rows: int = 1024,
        seed: int = 0,
    ) -> None:
        """`curriculum`: one head for all N (`single_head`), or one for each, where a task trains the heads of all N so
        far (`multi_head`) or of the newest `window` of them (`sliding`). Without a curriculum: `first` equal to `last`.

        The run's seed draws the `train_rows` of each task; a row shows another number of bits in every batch it comes
        in, so that the default makes about two million examples of N = 6.
        """
        if not 2 <= first <= last:
            raise ValueError(f"first, last: N goes from at least 2 upwards; got {first} to {last}")
        if (window is None) == (curriculum == "sliding"):
            raise ValueError(
                f"window: how many of the newest N the curriculum `sliding` trains, and it alone; got {window} with "
                f"{curriculum!r}"
            )
        if window is not None and window < 1:
            raise ValueError(f"window: at least the newest N is trained; got {window}")
        for name, rows in (("train_rows", train_rows), ("val_rows", val_rows), ("test_rows", test_rows)):
            if rows < 1:
                raise ValueError(f"{name}: at least 1, got {rows}")
        self.curriculum, self.window, self.seed = curriculum, window, seed
        self.numbers = list(range(first, last + 1))
        self.rows = {"train": train_rows, "val": val_rows, "test": test_rows}

    def prepare(self) -> None:
        self.spec = Spec(
            kind="classify", input_shape=(4 * self.numbers[-1] + 2,), num_outputs=2, scenario="domain", vocab_size=3,
            pad_token=PAD, heads=None if self.curriculum == "single_head" else len(self.numbers),
        )  # fmt: skip
        self.tasks = [self._task(index, number) for index, number in enumerate(self.numbers)]

    def facts(self) -> Mapping[str, object]:
        return {"curriculum": self.curriculum, "bits": f"{self.numbers[0] + 2} to {4 * self.numbers[-1] + 2}"}

    def trained(self, index: int) -> list[int]:
        """The N whose labels the task number `index` trains on."""
        oldest = {"single_head": index, "multi_head": 0, "sliding": index + 1 - (self.window or 0)}[self.curriculum]
        return self.numbers[max(0, oldest) : index + 1]

    def _task(self, index: int, number: int) -> Task:
        name, trained = f"{self.label}-{number}", self.trained(index)
        newest = 0 if self.curriculum == "single_head" else index
        return Task(
            index=index, name=name, train=self._data(index, "train", trained),
            val=EvalSet(
                name=f"{name}/val", data=self._data(index, "val", trained), scorer=TrainedHeads(newest=newest)
            ),
            test=EvalSet(name=name, data=self._data(index, "test", [number]), scorer=Classify()),
            classes=(0, 1), headline="accuracy",
        )  # fmt: skip

    def _data(self, index: int, part: str, asked: list[int]) -> BitRows:
        """One set of the task; rows that are scored are sorted by length, so that a batch of them is trimmed well."""
        number, count, training = self.numbers[index], self.rows[part], part == "train"
        draw = source(part, number, self.seed if training else "fixed")
        lengths = torch.randint(number + 2, 4 * number + 3, (count,), generator=draw)
        share = torch.rand(count, 1, generator=draw) if training and not self.fair else 0.5
        bits = (torch.rand(count, 4 * number + 2, generator=draw) < share).to(torch.uint8)
        one_head = self.curriculum == "single_head"
        return BitRows(
            bits, lengths if training else lengths.sort().values, labels=LABELS[self.label], task=index,
            questions=asked if one_head else [n if n in asked else None for n in self.numbers],
            width=self.spec.input_shape[0], one_length=training, one_head=one_head,
        )  # fmt: skip


class NParity(_DelayedLabels):
    """Bits, and whether the sum of the last N of them is odd: a task for every N."""

    paper = "Khajehabdollahi et al. 2024, arXiv:2309.12927"
    label, fair = "parity", False


class NDelayedMatch(_DelayedLabels):
    """Bits, and whether the last one equals the one N − 1 steps before it: a task for every N."""

    paper = "Khajehabdollahi et al. 2024, arXiv:2309.12927"
    label, fair = "match", True
