"""Rows of random bits with labels that depend on the last N of them, made when a batch is sliced.

Shapes: B rows, W the width of a row, K questions (one N each).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.streams.base import digest
from clplat.streams.batch import IGNORE, Batch

PAD = 2
"""Token that fills a row up behind its bits 0 and 1."""

Labels = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From bits (B, W), their number (B,) and N (K,), all long, to labels (B, K)."""


def parity(bits: Tensor, lengths: Tensor, numbers: Tensor) -> Tensor:
    """N-parity: the sum of the last N bits mod 2."""
    counts, last = F.pad(bits.cumsum(1), (1, 0)), lengths.unsqueeze(1)
    return (counts.gather(1, last) - counts.gather(1, last - numbers)) % 2


def delayed_match(bits: Tensor, lengths: Tensor, numbers: Tensor) -> Tensor:
    """N-delayed match to sample: whether bit M − N + 1 equals bit M, the last one."""
    last = lengths.unsqueeze(1)
    return (bits.gather(1, last - numbers) == bits.gather(1, last - 1)).long()


class BitRows:
    """Bits (N, W) and how many of them each row shows; the rest of a row is `PAD`.

    `one_length`: all rows of a batch show as many bits as its first row, so that lengths are one draw a batch and a row
    asks something else whenever it comes in another batch. `questions` names the N whose labels are asked for, by
    head: None where a head has none. Targets are (B, K), or (B,) where `one_head`.
    """

    tokens_per_row = 1

    def __init__(
        self,
        bits: Tensor,
        lengths: Tensor,
        *,
        labels: Labels,
        questions: Sequence[int | None],
        task: int,
        width: int,
        one_length: bool,
        one_head: bool,
    ) -> None:
        """`bits` (N, ≤ `width`) and `lengths` (N,) of any integer type; `width` is that of every row of the stream."""
        self.bits, self.lengths, self.labels = bits, lengths, labels
        self.numbers = torch.tensor([0 if number is None else number for number in questions])
        self.task, self.width, self.one_length, self.one_head = task, width, one_length, one_head
        self.nbytes = bits.nbytes + lengths.nbytes
        kind = torch.tensor(list(labels.__name__.encode()), dtype=torch.uint8)
        self.digest = digest(bits, lengths, kind, self.numbers, torch.tensor([one_length, one_head]))

    def __len__(self) -> int:
        return len(self.bits)

    def batch(self, rows: Tensor) -> Batch:
        rows = rows.to(self.bits.device, non_blocking=True)
        bits, lengths = self.bits[rows].long(), self.lengths[rows].long()
        if self.one_length:
            lengths = lengths[:1].expand(len(rows))
        hidden = torch.arange(bits.shape[1], device=bits.device) >= lengths.unsqueeze(1)
        tokens = F.pad(bits.masked_fill(hidden, PAD), (0, self.width - bits.shape[1]), value=PAD)
        # A head without a question looks at N = 1, which every row has, and is then ignored.
        targets = self.labels(bits, lengths, self.numbers.clamp(min=1)).masked_fill(self.numbers == 0, IGNORE)
        task = torch.full((len(rows),), self.task, dtype=torch.long, device=bits.device)
        return Batch(inputs=tokens, targets=targets[:, 0] if self.one_head else targets, task=task)

    def to(self, device: torch.device) -> BitRows:
        """The same rows on another device."""
        moved = copy.copy(self)
        moved.bits, moved.lengths = self.bits.to(device), self.lengths.to(device)
        moved.numbers = self.numbers.to(device)
        return moved
