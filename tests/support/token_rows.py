"""Rows of tokens for decoders: as batches, as packed documents, and read in parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from clplat.streams.batch import Batch


def tokens(rows: int = 2, length: int = 16, *, vocabulary: int = 23) -> Tensor:
    """The same tokens at every call."""
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


def batch_of(rows: Tensor, segments: Tensor | None = None) -> Batch:
    """Rows of one task, whose tokens are of the documents `segments`."""
    return Batch(inputs=rows, targets=rows, task=torch.zeros(len(rows), dtype=torch.long), segment_ids=segments)


def assert_reads_documents_alone(model: Any, rows: Tensor, lengths: Sequence[Sequence[int]], *, atol: float) -> None:
    """Fails unless each row's documents, of so many tokens, are read as if each stood alone."""
    numbers = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]
    read = model(batch_of(rows, torch.stack(numbers))).logits
    for number, (row, of_row) in enumerate(zip(rows, lengths, strict=True)):
        for document, found in zip(row.split(list(of_row)), read[number].split(list(of_row)), strict=True):
            alone = model(batch_of(document.unsqueeze(0))).logits[0]
            torch.testing.assert_close(found, alone, rtol=0, atol=atol)


def assert_reads_in_parts(model: Any, rows: Tensor, lengths: Sequence[int], *, atol: float) -> list[int]:
    """Fails unless reading `lengths` tokens at a time with carried state gives the logits of one pass.

    Returns how many numbers the state held after each part.
    """
    state, parts, sizes = model.init_state(len(rows)), [], []
    for part in rows.split(list(lengths), dim=1):
        output = model(batch_of(part), state)
        state = output.state
        parts.append(output.logits)
        sizes.append(sum(leaf.numel() for leaf in tree_leaves(state)))
    torch.testing.assert_close(torch.cat(parts, dim=1), model(batch_of(rows)).logits, rtol=0, atol=atol)
    return sizes
