"""Where tokens are put so that chunks lie where they should: an open chunk goes on, a document begins a chunk.

Empty places are tokens that do not count. Shapes: see `state.py`; N places, n chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Layout(NamedTuple):
    """Tokens of each row in new places."""

    source_BN: Tensor
    """The token that stands at a place, −1 for none."""
    places_BT: Tensor
    """The place of each token."""
    begins_Bn: Tensor | None
    """Chunks with which a document begins."""

    def back(self, answers_BHNE: Tensor) -> Tensor:
        """The answers (B, H, T, E) in the tokens' order."""
        return answers_BHNE.take_along_dim(self.places_BT[:, None, :, None], 2)


class Documents(NamedTuple):
    """The documents of packed rows, as their starts among all tokens, one row behind the other."""

    starts: tuple[int, ...]
    number_BT: Tensor
    """Each token's document, counted over all rows."""

    def begins(self) -> Tensor:
        """(B, T) bool, first tokens."""
        return F.pad(self.number_BT[:, 1:] != self.number_BT[:, :-1], (1, 0), value=True)

    def longest(self) -> int:
        """Tokens of the longest."""
        return max(end - start for start, end in pairwise((*self.starts, self.number_BT.numel())))


def documents_of(segment_ids: Tensor) -> Documents | None:
    """The documents of rows (B, T); None where every row holds one. Reads the ids once, for which a GPU is waited
    for: how many documents there are decides how much is computed."""
    begins = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True)
    starts = begins.flatten().nonzero().squeeze(-1).tolist()
    if len(starts) == len(segment_ids):
        return None
    return Documents(tuple(starts), begins.flatten().cumsum(0).view_as(begins) - 1)


def continued(offset_B: Tensor, length: int, chunk: int) -> Layout:
    """Each row's tokens behind the `offset_B` places of its open chunk."""
    places = offset_B.unsqueeze(1) + torch.arange(length, device=offset_B.device)
    columns = torch.arange(length + chunk - 1, device=offset_B.device) - offset_B.unsqueeze(1)
    source = columns.masked_fill((columns < 0) | (columns >= length), -1)
    return Layout(source, places, None)


def separated(documents: Documents, rows: int, length: int, chunk: int) -> Layout:
    """Each document from a chunk's beginning."""
    starts = torch.tensor([*documents.starts, rows * length])
    taken = (starts.diff() + chunk - 1) // chunk * chunk
    row = starts[:-1] // length
    ends = taken.cumsum(0)
    first = torch.searchsorted(row, torch.arange(rows))
    place = ends - taken - (ends - taken)[first][row]
    width = int((place + taken).max())
    begins = torch.zeros(rows, width // chunk, dtype=torch.bool)
    begins[row, place // chunk] = True
    device = documents.number_BT.device
    at = torch.arange(length, device=device)
    shift = (place - starts[:-1] % length).to(device)
    places = at + shift[documents.number_BT]
    source = torch.full((rows, width), -1, device=device).scatter(1, places, at.expand(rows, -1))
    return Layout(source, places, begins.to(device))


def bounds(documents: Documents, device: torch.device) -> Tensor:
    """(documents + 1,) int32 starts and the end of all tokens, as `kernels.delta_memory` takes them."""
    ends: Sequence[int] = (*documents.starts, documents.number_BT.numel())
    return torch.tensor(ends, dtype=torch.int32, device=device)
