"""What one pass through the columns of TRC² knows about its rows, and what it leaves.

Shapes: B rows, T tokens, C hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.architectures.layers import Angles
from clplat.architectures.trc2.thalamus import Trace
from clplat.streams.batch import Batch


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How one pass reads its rows: `position` of tokens in their documents (T,) or (B, T), of which a row may hold
    `several`; attention's `angles` and `mask`; `current` (B,) marks rows that are not replay, None for all of them; and
    in decoding the `caches` of the columns, the `traces` of the routers, and the `places` of tokens in rows (B, T)."""

    position: Tensor
    several: bool
    angles: Angles
    mask: Tensor | None
    current: Tensor | None = None
    caches: list[Any] | None = None
    traces: dict[str, Trace] | None = None
    places: Tensor | None = None


@dataclass(kw_only=True)
class Passed:
    """What a pass through the columns leaves: the stream `x`, losses by name, what step_end wants, and what to go on
    from."""

    x: Tensor
    losses: dict[str, Tensor]
    stash: dict[str, Tensor]
    caches: list[Any]
    traces: dict[str, Trace]

    def lose(self, losses: Mapping[str, Tensor]) -> None:
        for name, value in losses.items():
            self.losses[name] = self.losses[name] + value if name in self.losses else value


def places_in_documents(segments: Tensor) -> Tensor:
    """Each token's place in its document (B, T)."""
    places = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    return places - torch.where(begins, places, 0).cummax(1).values


def goes_on(batch: Batch) -> Tensor:
    """(B, T) bool, where the row's next token belongs to the same document."""
    same = torch.ones_like(batch.inputs[:, 1:], dtype=torch.bool)
    if batch.segment_ids is not None:
        same = batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]
    return F.pad(same, (0, 1), value=False)


def added(signal: Tensor | None, feedback: Tensor | None) -> Tensor | None:
    if signal is None or feedback is None:
        return feedback if signal is None else signal
    return signal + feedback


def only(x_BTC: Tensor, kept: Tensor | None) -> Tensor:
    """Zero for the rows that are not kept."""
    return x_BTC if kept is None else torch.where(kept.view(-1, 1, 1), x_BTC, 0.0)
