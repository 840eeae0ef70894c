"""The way of rows to the learner: which rows make up batch number n of a task, and how they get there.

The order is a pure function of (seed, task, pass), so a resumed loader needs one number: batches finished.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from clplat.errors import ConfigError
from clplat.randomness import generator
from clplat.streams.base import Budget, Data, Movable
from clplat.streams.batch import Batch


class RowOrder:
    """Rows of each batch for one process: shuffled passes over the data, split evenly over processes."""

    def __init__(
        self, rows: int, *, batch_size: int, seed: int, task: int, rank: int = 0, size: int = 1, ordered: bool = False
    ) -> None:
        """`batch_size` counts rows over all `size` processes; the rest of a pass that cannot be split is left out.
        `ordered` rows come as they are numbered."""
        if batch_size % size:
            raise ConfigError(f"training.batch_size: {batch_size} rows cannot be split over {size} processes evenly")
        self.rows, self.batch_size = rows, min(batch_size, rows // size * size)
        self.seed, self.task, self.rank, self.size, self.ordered = seed, task, rank, size, ordered
        if self.batch_size == 0:
            raise ConfigError(f"task number {task + 1}: {rows} training rows are fewer than the {size} processes")
        rest = rows % self.batch_size // size * size
        self.batches_per_pass = rows // self.batch_size + bool(rest)
        self.used = rows - rows % self.batch_size + rest

    def total_batches(self, budget: Budget, tokens_per_row: int, accumulate: int) -> int:
        """Batches that a budget means, a multiple of `accumulate`."""
        if budget.steps is not None:
            wanted = budget.steps * accumulate
        elif budget.epochs is not None:
            wanted = math.ceil(budget.epochs * self.batches_per_pass)
        else:
            assert budget.tokens is not None
            wanted = math.ceil(budget.tokens / (self.batch_size * tokens_per_row))
        return math.ceil(wanted / accumulate) * accumulate

    def batches(self, start: int, stop: int) -> Iterator[Tensor]:
        """Row numbers of the batches start..stop, as this process sees them."""
        number = start
        while number < stop:
            turn, first = divmod(number, self.batches_per_pass)
            order = self._order(turn)[: self.used]
            for place in range(first, min(self.batches_per_pass, first + stop - number)):
                yield order[place * self.batch_size : (place + 1) * self.batch_size][self.rank :: self.size]
                number += 1

    def _order(self, turn: int) -> Tensor:
        """All rows in the order of one pass."""
        if self.ordered:
            return torch.arange(self.rows)
        return torch.randperm(self.rows, generator=generator(self.seed, "data", self.task, turn))


def resident(data: Data, device: torch.device) -> Data:
    """The same rows on `device`, where the data can move there."""
    return data.to(device) if isinstance(data, Movable) else data


class TaskLoader:
    """Batches start..stop of one task as Lightning iterates them, once; `len` is what is left."""

    def __init__(
        self, data: Data, order: RowOrder, *, start: int, stop: int, workers: int, device: torch.device
    ) -> None:
        self.order, self.start, self.stop, self.workers, self.device = order, start, stop, workers, device
        # What fits moves to the device once and is sliced there; the rest is read and copied batch by batch.
        self.data = resident(data, device) if workers == 0 else data

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[Batch]:
        numbers = self.order.batches(self.start, self.stop)
        if self.workers:
            yield from self._from_workers(numbers)
        else:
            for rows in numbers:
                yield self.data.batch(rows).pinned_for(self.device)

    def _from_workers(self, numbers: Iterator[Tensor]) -> Iterator[Batch]:
        from torch.utils.data import DataLoader

        # A generator of its own: the loader would otherwise draw its base seed from the model's source.
        yield from DataLoader(
            _Rows(self.data),
            sampler=numbers,
            batch_size=None,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=generator(self.order.seed, "workers", self.order.task),
        )


class _Rows(torch.utils.data.Dataset[Batch]):
    """A set of rows in the shape that torch's DataLoader wants: one "item" is one batch."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def __getitem__(self, rows: Tensor) -> Batch:
        return self.data.batch(rows)
