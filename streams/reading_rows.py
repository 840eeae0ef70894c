"""A text as it is read: chunks in order, each behind as much of what came before as the window holds.

Shapes: N tokens of a text, B rows, T tokens of a window, S tokens of a chunk.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from clplat.streams.base import digest, spread_rows
from clplat.streams.batch import IGNORE, Batch


class ReadingRows:
    """Row r is chunk r // `passes` of a text: its S tokens are targets, and the T + 1 − S before them are read only.

    Chunks count targets: chunk c has tokens 1 + cS … (c + 1)S of the text, whose first token is never one. `first` and
    `last` (not included) bound the chunks that are rows here; what a window shows may lie before `first`. `max_rows`
    keeps so many rows, spread evenly. Rows are filled up on the right with `end`. Only the text's last chunk may be
    shorter.
    """

    ordered = True

    def __init__(
        self,
        tokens: Tensor,
        *,
        chunk: int,
        window: int,
        end: int,
        task: int,
        passes: int = 1,
        first: int = 0,
        last: int | None = None,
        max_rows: int | None = None,
    ) -> None:
        self.tokens, self.chunk, self.end, self.passes, self.first = tokens, chunk, end, passes, first
        self.chunks = (chunks_of(len(tokens), chunk) if last is None else last) - first
        self.prefix, self.task = window + 1 - chunk, task
        self._window = torch.arange(window)
        self.tokens_per_row = chunk
        self._rows = spread_rows(self.chunks * passes, max_rows)
        covered = min(len(tokens), 1 + (first + self.chunks) * chunk) - first * chunk
        self.nbytes = max(0, covered) * tokens.element_size()
        self.digest = digest(tokens, torch.tensor([chunk, window, passes, first, self.chunks]), self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def to(self, device: torch.device) -> ReadingRows:
        """The same rows on another device."""
        moved = copy.copy(self)
        moved.tokens, moved._window = self.tokens.to(device), self._window.to(device)
        moved._rows = self._rows.to(device)
        return moved

    def batch(self, rows: Tensor) -> Batch:
        """Rows (B,) as inputs and targets (B, T)."""
        device = self.tokens.device
        chunks = (self.first + self._rows[rows.to(device, non_blocking=True)] // self.passes).unsqueeze(1)
        starts = 1 + chunks * self.chunk
        ends = (starts + self.chunk).clamp(max=len(self.tokens))
        places = (starts - self.prefix).clamp(min=0) + self._window
        shown, wanted = places < ends - 1, (places + 1 >= starts) & (places + 1 < ends)
        last = len(self.tokens) - 1
        return Batch(
            inputs=self.tokens[places.clamp(max=last)].long().masked_fill(~shown, self.end),
            targets=self.tokens[(places + 1).clamp(max=last)].long().masked_fill(~wanted, IGNORE),
            task=torch.full((len(rows),), self.task, device=device),
        )


def chunks_of(tokens: int, chunk: int) -> int:
    """How many chunks a text of so many tokens has."""
    return -(-(tokens - 1) // chunk)


def check_reading(*, chunk: int, window: int, passes: int) -> None:
    """ValueError for sizes that leave nothing to read."""
    if chunk < 1 or passes < 1:
        raise ValueError(f"chunk, passes: at least 1, got {chunk} and {passes}")
    if window < chunk:
        raise ValueError(f"window: {window} tokens do not hold a chunk of {chunk}; raise it, or lower chunk")
