"""How much of what is left between the tokens of one chunk: what all memories of a head have in common.

Products of gates are exponentials of differences of sums, masked before the exponential; nothing is divided. Shapes:
see `inputs.py`; n chunks of C places, L tokens of one of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Momenta(NamedTuple):
    """Of momentum, which is given and not made, so that all chunks are known before the first is read."""

    pushes: Tensor
    """(B, H, n, C, C): of a step in the momentum behind a token."""
    pushed: Tensor
    """(B, H, n, C): of the momentum before the chunk."""

    @classmethod
    def of(cls, log_momentum_BHT: Tensor, chunk: int) -> Momenta:
        places = -log_momentum_BHT.shape[2] % chunk
        log = F.pad(log_momentum_BHT, (0, places)).unflatten(2, (-1, chunk))
        total = log.cumsum(-1)
        return cls(between(total, total, above(chunk, 1, log.device)), total.exp())


class Left(NamedTuple):
    """What a query finds that asks before or behind each token's write."""

    kept: Tensor
    """(B, H, L, L), A: of what another token erased."""
    steps: Tensor
    """(B, H, L, L), G: of another token's step."""
    start: Tensor
    """(B, H, L, 1), b: of W before the chunk."""
    carried: Tensor | None
    """(B, H, L, 1), f: of S before the chunk in W; None without momentum."""

    def each(self) -> Left:
        """For each of several memories, as a dimension behind rows."""
        return Left(*(None if part is None else part.unsqueeze(1) for part in self))  # type: ignore[arg-type]


class End(NamedTuple):
    """What is left behind the chunk."""

    kept: Tensor
    """(B, H, L, 1), of what each token erased."""
    steps: Tensor
    """(B, H, L, 1), of its step."""
    pushes: Tensor | None
    """(B, H, L, 1), of its step in S."""
    start: Tensor
    """(B, H, 1, 1), of W."""
    carried: Tensor | None
    """(B, H, 1, 1), of S in W."""
    pushed: Tensor | None
    """(B, H, 1, 1), of S in S."""

    def each(self) -> End:
        """For each of several memories, as a dimension behind rows."""
        return End(*(None if part is None else part.unsqueeze(1) for part in self))  # type: ignore[arg-type]


def lefts(
    log_decay_BHL: Tensor, pushes: Tensor | None, pushed: Tensor | None, counts_BL: Tensor | None, *, behind: bool
) -> tuple[Left, Left, End]:
    """What is left before each token, before it or `behind` it, and at the end, of a chunk with `pushes` (B, H, L, L)
    and `pushed` (B, H, L) of momentum."""
    total = log_decay_BHL.cumsum(-1)
    shown, given = pushes, pushed
    if counts_BL is not None and pushes is not None and pushed is not None:
        # A token that does not count must not add the momentum once more.
        counts = counts_BL.to(pushes.dtype).unsqueeze(1)
        shown, given = pushes * counts.unsqueeze(-1), pushed * counts

    def left(reading: Tensor, diagonal: int) -> Left:
        kept = between(reading, total, above(total.shape[-1], diagonal, total.device))
        start = reading.exp().unsqueeze(-1)
        if shown is None or given is None:
            return Left(kept, kept, start, None)
        return Left(kept, kept @ shown, start, kept @ given.unsqueeze(-1))

    before = left(total - log_decay_BHL, 0)
    last = total[..., -1:]
    kept = (last - total).exp().unsqueeze(-1)
    end = End(kept, kept, None, last.exp().unsqueeze(-1), None, None)
    if shown is not None and given is not None and pushes is not None and pushed is not None:
        end = End(
            kept, shown.mT @ kept, pushes[..., -1, :].unsqueeze(-1), end.start, kept.mT @ given.unsqueeze(-1),
            pushed[..., -1:].unsqueeze(-1),
        )  # fmt: skip
    return before, left(total, 1) if behind else before, end


def between(to: Tensor, since: Tensor, hidden: Tensor) -> Tensor:
    """exp(to_i − since_j), zero where `hidden`."""
    return (to.unsqueeze(-1) - since.unsqueeze(-2)).masked_fill(hidden, -torch.inf).exp()


def above(length: int, diagonal: int, device: torch.device) -> Tensor:
    """(L, L) bool, from that diagonal upwards."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(diagonal)
