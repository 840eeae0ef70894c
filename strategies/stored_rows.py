"""Which tensors of a batch are stored, and stored rows as a set to train on."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from clplat.streams.base import digest
from clplat.streams.batch import Batch

SLOT = "slot:"
"""How the names of extra tensors begin that say where in a buffer replayed rows lie; they live for one step."""


class StoredRows:
    """The rows of one batch as a set to train on (`streams.base.Data`)."""

    def __init__(self, rows: Batch) -> None:
        self.rows, tensors = rows, rows.tensors().values()
        self.nbytes = sum(tensor.nbytes for tensor in tensors)
        self.digest = digest(*tensors)
        self.tokens_per_row = math.prod(rows.targets.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Tensor) -> Batch:
        return self.rows.rows(rows.to(self.rows.inputs.device, non_blocking=True))

    def to(self, device: torch.device) -> StoredRows:
        """The same rows on another device."""
        moved = copy.copy(self)
        moved.rows = self.rows.to(device)
        return moved


def stored_fields(batch: Batch) -> dict[str, Tensor]:
    """The tensors of a batch that a buffer keeps, as it keeps them."""
    kept = {name: tensor for name, tensor in batch.tensors().items()
            if name not in ("origin", "weight") and not name.startswith(f"extra.{SLOT}")}  # fmt: skip
    return {name: tensor.int() if tensor.dtype == torch.long else tensor for name, tensor in kept.items()}
