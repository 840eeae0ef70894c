"""A memory of two disjoint parts: a ring of the latest rows, and a reservoir of those that fell out of it."""

from __future__ import annotations

import torch
from torch import Tensor

from clplat.strategies.buffers import Buffer, vitter
from clplat.strategies.world import World
from clplat.streams.batch import Batch


class RingReservoir(Buffer):
    """The `long_from` latest rows in their order (first in, first out), and a uniform sample of all earlier ones.

    A row enters the ring; the row that it pushes out is offered to the reservoir (Vitter 1985, algorithm R), so that no
    row lies in both. Places below `long_from` are the ring's. Needs no task labels. At step n only rows stamped before
    n are drawn. Source: "recent ring + long-term reservoir" in the material on TRC² (arXiv:2602.22479); sizes, sampling
    and hand-over are inferred.
    """

    def __init__(
        self, *, capacity: int, ring_share: float, generator: torch.Generator, world: World, tracks: str | None = None
    ) -> None:
        """`ring_share` of the `capacity` rows are the ring's: 0.2 of 10,240 are 2,048 beside 8,192."""
        self.long_from = round(ring_share * capacity)
        if not 0 < self.long_from < capacity:
            raise ValueError(f"ring_share: {ring_share:g} of {capacity} rows are {self.long_from}; ring and reservoir "
                             "need at least one row each")  # fmt: skip
        super().__init__(capacity=capacity, policy="ring_reservoir", generator=generator, world=world, tracks=tracks)

    def add(
        self,
        batch: Batch,
        priority: Tensor | None = None,
        *,
        loss: Tensor | None = None,
        stamp: tuple[int, int] = (0, 0),
    ) -> None:
        fields, losses = self._fields(batch), self._losses(batch, loss)
        for part in torch.arange(len(batch) * self.world.size).split(self.long_from):
            number = self.seen + torch.arange(len(part))
            places = number % self.long_from
            self._hand_over(places[number >= self.long_from])
            self._put(fields, part, places, stamp, losses)
            self.seen += len(part)

    def _hand_over(self, leaving: Tensor) -> None:
        """Offer the ring's rows at some places, the oldest first, to the reservoir."""
        gone = max(0, self.seen - self.long_from)
        taken, slots = vitter(gone, len(leaving), self.capacity - self.long_from, self.generator)
        if len(taken):
            stamps = self.stamps[leaving[taken]]
            self._put(self.rows, leaving[taken], self.long_from + slots, (0, 0), self.best)
            self.stamps[self.long_from + slots] = stamps

    def draw(
        self,
        count: int,
        *,
        rounds: bool = False,
        step: int | None = None,
        position: int | None = None,
        long_share: float = 0.5,
    ) -> Batch:
        """`count` rows for this process: round(`long_share` × rows) of all processes' from the reservoir, the rest from
        the ring. Where one part has nothing to give the other gives all."""
        total, places = count * self.world.size, self.available(step, position)
        recent, long_term = places[places < self.long_from], places[places >= self.long_from]
        from_long = total if not len(recent) else 0 if not len(long_term) else round(long_share * total)
        parts = [self._some_of(long_term, from_long) if from_long else long_term[:0]]
        parts += [self._some_of(recent, total - from_long)] if total > from_long else []
        return self._drawn(torch.cat(parts))
