"""What a self-modifying memory is given of each token, before its own memories make keys, values and gates of it.

Shapes: B rows, H heads, T tokens, N places, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class HeadInputs(NamedTuple):
    """Tokens as the heads see them. What a memory makes is None here."""

    x: Tensor
    """(B, H, T, D), of which the memories make the rest, or (B, H, T, G, D), for each of G that do its own."""
    query: Tensor | None
    """(B, H, T, D), and so are key and value."""
    key: Tensor | None
    value: Tensor | None
    rate: Tensor | None
    """(B, H, T), before its sigmoid, and so are decay and momentum."""
    decay: Tensor | None
    momentum: Tensor | None
    counts: Tensor | None = None
    """(B, T) bool: a token that does not count changes nothing. None: all count."""

    def part(self, start: int, stop: int) -> HeadInputs:
        """The tokens start..stop of every row."""
        return self._each(lambda part, axis: part.narrow(axis, start, min(stop, part.shape[axis]) - start))

    def taken(self, source_BN: Tensor) -> HeadInputs:
        """Tokens in new places: column n of row b holds what stood at source[b, n]; −1 is one that does not count."""
        index = source_BN.clamp(min=0)

        def gathered(part: Tensor, axis: int) -> Tensor:
            shape = [len(index), *[1] * (part.ndim - 2)]
            shape.insert(axis, index.shape[1])
            return part.take_along_dim(index.view(shape), axis)

        moved, here = self._each(gathered), source_BN >= 0
        return moved._replace(counts=here if moved.counts is None else here & moved.counts)

    def widened(self, dtype: torch.dtype) -> HeadInputs:
        """The same in another precision."""
        return self._each(lambda part, _: part if part.dtype == torch.bool else part.to(dtype))

    def in_one_row(self) -> HeadInputs:
        """The tokens of all rows, one row behind the other."""
        return self._each(lambda part, axis: part.movedim(axis, 1).flatten(0, 1).unsqueeze(0).movedim(1, axis))

    def _each(self, change: Callable[[Tensor, int], Tensor]) -> HeadInputs:
        query, key, value, rate, decay, momentum = (None if part is None else change(part, 2) for part in self[1:7])
        counts = None if self.counts is None else change(self.counts, 1)
        return HeadInputs(change(self.x, 2), query, key, value, rate, decay, momentum, counts)


class Lifted(NamedTuple):
    """The same as far as it depends on no memory: what is given has unit length, or is squashed."""

    x: Tensor
    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    rate: Tensor | None
    """(B, H, T), before its sigmoid, and so is decay."""
    decay: Tensor | None
    log_momentum: Tensor | None
    """(B, H, T)."""
    damping: Tensor | None
    """(B, H, T), by which steps are multiplied; None where they are not."""
    counts: Tensor | None

    def chunks(self, size: int) -> list[Lifted]:
        """The tokens of every so many places. Split at once, as many slices of one tensor would each send back a
        gradient of its whole size."""
        count = -(-self.x.shape[2] // size)
        each = [
            [None] * count if part is None else part.split(size, axis)
            for part, axis in zip(self, (*[2] * 8, 1), strict=True)
        ]  # fmt: skip
        return [Lifted(*parts) for parts in zip(*each, strict=True)]  # type: ignore[arg-type]
