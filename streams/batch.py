"""The batch: the one shape in which data travels from a stream to the loss."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
"""Target value that no loss and no metric counts."""

CURRENT, REPLAY, AUXILIARY = 0, 1, 2
"""Row origins: the current task, replayed for the loss, and rows that only a penalty reads."""


@dataclass(kw_only=True)
class Batch:
    """Rows of one step: B samples, or B rows of T tokens.

    `inputs` (B, ...) and `targets` (B,) or (B, T), long, `IGNORE` where nothing is predicted.
    `task` (B,) long, the task each row came from, or None when hidden.
    `origin` (B,) long, one of the constants above; None means that every row is `CURRENT`.
    `weight` (B,) float, factor of each row's loss; None means 1.
    `segment_ids` (B, T) long, rising at document boundaries; None for one document a row.
    `answer` (B, T) bool, True where the target is part of an answer (question-answer text).
    `extra` further tensors by name with B rows, for example logits stored by DER++.
    """

    inputs: Tensor
    targets: Tensor
    task: Tensor | None = None
    origin: Tensor | None = None
    weight: Tensor | None = None
    segment_ids: Tensor | None = None
    answer: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.inputs.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by field name; `extra` ones as `extra.NAME`."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        named = {name: value for name, value in own.items() if value is not None}
        return named | {f"extra.{name}": value for name, value in self.extra.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Batch:
        """The inverse of `tensors`."""
        extra = {name[6:]: value for name, value in tensors.items() if name.startswith("extra.")}
        return cls(**{name: v for name, v in tensors.items() if not name.startswith("extra.")}, extra=extra)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """This batch on `device`; itself when it is there already."""
        if self.inputs.device == torch.device(device):
            return self
        return Batch.from_tensors({n: t.to(device, non_blocking=non_blocking) for n, t in self.tensors().items()})

    def pin_memory(self) -> Batch:
        """This batch in page-locked memory (called by torch's DataLoader)."""
        return Batch.from_tensors({name: tensor.pin_memory() for name, tensor in self.tensors().items()})

    def pinned_for(self, device: torch.device) -> Batch:
        """This batch as it can be copied to `device` without waiting: page-locked, where it must travel to a GPU."""
        return self.pin_memory() if device.type == "cuda" and self.inputs.device.type == "cpu" else self

    def rows(self, index: Tensor | slice) -> Batch:
        """The rows that `index` (long or bool tensor, or slice) selects."""
        return Batch.from_tensors({name: tensor[index] for name, tensor in self.tensors().items()})

    def replaced(self, **changes: Any) -> Batch:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def with_origin(self, origin: int, weight: float = 1.0) -> Batch:
        """This batch with every row marked by one origin and one weight."""
        count, device = len(self), self.inputs.device
        return replace(
            self,
            origin=torch.full((count,), origin, dtype=torch.long, device=device),
            weight=torch.full((count,), weight, device=device),
        )

    def joined(self, other: Batch) -> Batch:
        """The rows of both: `origin`, `weight` and `extra` are filled in where one side lacks them."""
        left, right = self._explicit().tensors(), other._explicit().tensors()
        for name in left.keys() ^ right.keys():
            if not name.startswith("extra."):
                raise ValueError(f"batches differ in the field {name!r}: one has it, the other does not")
            have, lack, size = (left, right, len(other)) if name in left else (right, left, len(self))
            lack[name] = have[name].new_zeros((size, *have[name].shape[1:]))
        return Batch.from_tensors({name: torch.cat([left[name], right[name]]) for name in left})

    def _explicit(self) -> Batch:
        if self.origin is None:
            return self.with_origin(CURRENT)
        if self.weight is None:
            return replace(self, weight=torch.ones(len(self), device=self.inputs.device))
        return self
