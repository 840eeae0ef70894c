"""A level of the token clock that learns the next token: outside of the model, while a text is scored.

In the model it is a feed-forward layer whose weights training steps like all others. Whoever scores a text
(`streams.scorers.NextToken`) gives every row weights of its own, which begin at these, and moves them by the loss of
what it has scored. No gradient is taken in here.

Shapes: B rows, T tokens, C hidden size, I inner size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.architectures.continuum_memory.levels import LevelSize, StepLevel


class NextTokenLevel(StepLevel):
    """A `StepLevel` that answers by weights of each row's own while it is given some."""

    def __init__(self, size: LevelSize) -> None:
        super().__init__(size)
        self.rows: Mapping[str, Tensor] | None = None
        """(B, 2I, C) `mlp.gate_up.weight` and (B, C, I) `mlp.down.weight`, while rows have their own."""
        self.writes = True
        """False: it is not to learn, for a reading without memory."""

    def forward(self, x_BTC: Tensor) -> Tensor:
        if self.rows is None:
            return self.mlp(x_BTC)
        gate_up, down = (self.rows[f"mlp.{part}.weight"] for part in ("gate_up", "down"))
        gates, ups = torch.bmm(x_BTC, gate_up.mT).chunk(2, dim=-1)
        return torch.bmm(F.silu(gates) * ups, down.mT)
