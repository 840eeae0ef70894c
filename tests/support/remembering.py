"""An architecture whose carried state lives as long as the run: what all rows so far were on average."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from clplat.architectures.base import Architecture, Output
from clplat.streams.base import Spec
from clplat.streams.batch import Batch


class RunningMean(Architecture):
    """A linear classifier that reads rows beside a mean of the rows of all steps."""

    memory_life = "run"

    def __init__(self, *, spec: Spec) -> None:
        super().__init__()
        self.size = torch.Size(spec.input_shape).numel()
        self.head = nn.Linear(2 * self.size, spec.num_outputs)

    def forward(self, batch: Batch, state: Any = None, return_hidden: str | None = None) -> Output:
        rows = batch.inputs.flatten(1)
        state = state or {"mean": rows.new_zeros(self.size), "steps": torch.zeros((), dtype=torch.long)}
        logits = self.head(torch.cat([rows, state["mean"].expand_as(rows)], 1))
        return Output(
            logits=logits, state={"mean": 0.8 * state["mean"] + 0.2 * rows.mean(0), "steps": state["steps"] + 1}
        )  # fmt: skip
