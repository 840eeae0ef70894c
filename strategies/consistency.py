"""How far fast weights' answers are from slow ones', as a loss on the fast ones: I-LoRA's consistency term.

Shapes: B rows, T tokens, C channels of a hidden state (or V logits), and layers S between where there are several.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from clplat.streams.batch import IGNORE

Target = Literal["slow", "elementwise_max", "better_ce"]
"""What fast answers are drawn to: slow ones; the larger of both, element by element; or slow ones in rows that slow
weights predict better, and nothing in the others."""
Positions = Literal["all", "tokens", "targets"]
"""Which tokens count: all columns, padding included; each row's own, up to its last target; those with a target."""


def consistency_loss(
    fast: Tensor, slow: Tensor, *, counted: Tensor, target: Target = "slow", better: Tensor | None = None
) -> Tensor:
    """Mean over the counted tokens of (fast − target)², its mean over channels and layers; () in float32 at least.

    `fast` and `slow` (B, T, C) or (B, S, T, C), no gradient flows into `slow`; `counted` (B, T) bool; `better` (B,)
    bool for `target="better_ce"`, the rows that slow weights predict better: the others count as at no distance. 0
    where no token counts.
    """
    wide = torch.promote_types(fast.dtype, torch.float32)
    apart = slow.detach().to(wide) - fast.to(wide)
    if target == "elementwise_max":
        # max(fast, slow) − fast
        apart = apart.relu()
    squares = apart.square().mean(-1)
    if squares.ndim == 3:
        squares = squares.mean(1)
    weight = counted.to(wide)
    kept = weight if better is None else weight * better.to(wide).unsqueeze(1)
    return (squares * kept).sum() / weight.sum().clamp(min=1)


def counted_tokens(targets: Tensor, positions: Positions) -> Tensor:
    """(B, T) bool for `targets` (B, T), of which padding is what follows a row's last target."""
    predicted = targets != IGNORE
    if positions == "all":
        return torch.ones_like(predicted)
    return predicted if positions == "targets" else predicted.flip(1).cumsum(1).flip(1) > 0


def row_means(loss: Tensor, targets: Tensor) -> Tensor:
    """Mean loss of each row (B,) over its targets, from the loss of every token (B, T)."""
    return loss.sum(1) / (targets != IGNORE).sum(1).clamp(min=1)
