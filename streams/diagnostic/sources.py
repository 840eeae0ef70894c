"""Where diagnostic rows come from: random sources by name, distinct draws, and sets that share no row."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

REDRAWS = 50
"""How often rows that another set has are drawn again before their space counts as too small."""
CHUNK = 2**22
"""Numbers that `distinct` draws at once, 16 MiB of them."""


@dataclass(kw_only=True)
class Drawn:
    """Rows of tokens (N, T) long, with the answers (N, T) that they ask for, `IGNORE` where they ask for none.

    `stale` (N, T) are answers that were right earlier in the row and no longer are, `IGNORE` where there is none.
    """

    inputs: Tensor
    targets: Tensor
    stale: Tensor | None = None

    def replace(self, places: Tensor, other: Drawn) -> None:
        """Put the rows of `other` in the place of the rows `places` (M,) long."""
        for field in fields(self):
            if (mine := getattr(self, field.name)) is not None:
                mine[places] = getattr(other, field.name)

    def padded(self, width: int, fill: int, ignore: int) -> Drawn:
        """The same rows, filled up on the right to `width` tokens."""
        missing = (0, width - self.inputs.shape[1])
        return Drawn(inputs=F.pad(self.inputs, missing, value=fill), targets=F.pad(self.targets, missing, value=ignore))


Draw = Callable[[int, torch.Generator], Drawn]
"""From a number of rows and a random source to so many rows."""


def source(*names: str | int) -> torch.Generator:
    """A source of its own for each set: no row of one is a row of another by the same draws."""
    value = hashlib.sha256(":".join(map(str, names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(value[:8]) >> 1)


def distinct(rows: int, count: int, *, out_of: int, draw: torch.Generator) -> Tensor:
    """(rows, count) long: in each row `count` different numbers below `out_of`, every ordered choice equally likely."""
    parts = (min(max(1, CHUNK // out_of), rows - first) for first in range(0, rows, max(1, CHUNK // out_of)))
    taken = [torch.rand(part, out_of, generator=draw).topk(count).indices for part in parts]
    return torch.cat(taken) if taken else torch.empty(0, count, dtype=torch.long)


def marks(inputs: Tensor) -> Tensor:
    """A number (N,) long for each row (N, T), the same for the same row, and hardly ever the same for two."""
    factors = torch.randint(2**62, (inputs.shape[1],), generator=source("marks")) * 2 + 1
    return ((inputs + 1) * factors).sum(1)


def apart(draw: Draw, count: int, chance: torch.Generator, taken: Tensor) -> tuple[Drawn, int]:
    """`count` rows none of which is among those whose `marks` are `taken` (M,), and how many are nevertheless.

    That number is 0 unless there are hardly any other rows to draw.
    """
    rows = draw(count, chance)
    for _ in range(REDRAWS):
        again = torch.isin(marks(rows.inputs), taken).nonzero().flatten()
        if not len(again):
            return rows, 0
        rows.replace(again, draw(len(again), chance))
    return rows, int(torch.isin(marks(rows.inputs), taken).sum())
