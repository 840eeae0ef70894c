"""The Omega rule's window: a token's step lowers the weighted losses of the last c pairs, not of its own alone.

With weights γ_j^(i) that token i gives to pair j, i − c < j ≤ i, its gradient is Σ_j γ_j^(i) ∂ loss(M(k_j), v_j) / ∂W
at W_src (Behrouz et al. 2025, ATLAS, arXiv:2505.23735). Summed over a chunk this is one more matrix Γ between steps and
pairs, of P = c − 1 + L pairs: those of the chunk and the c − 1 before it, which the state carries and whose gradients
are taken anew where the chunk's are. Shapes: see `state.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clplat.architectures.associative_memory.state import Layers, Tokens


class Pairs(NamedTuple):
    """What gradients are taken of."""

    k: Tensor
    """(B, H, P, D) keys."""
    v: Tensor
    """(B, H, P, E) values."""
    threshold: Tensor | None
    """(B, H, P)."""


def empty_window(rows: int, heads: int, shapes: tuple[int, ...], length: int, like: Tensor) -> Layers:
    """A window of no pairs, for keys, values and thresholds of those widths: zeros, of which nothing is written."""
    return tuple(like.new_zeros(rows, heads, length, width) for width in shapes)


def pairs_of(tokens: Tokens, window: Layers) -> Pairs:
    """The pairs of the window and of the tokens behind it."""
    k, v, *more = _joined(tokens, window)
    return Pairs(k, v, more[0].squeeze(-1) if more else None)


def weights_of(tokens: Tokens, window: Layers) -> Tensor:
    """Γ (B, H, L, P): the weight of each pair in each token's step."""
    assert tokens.window is not None
    length, before = tokens.window.shape[2:]
    rank = torch.arange(length, device=tokens.q.device).unsqueeze(0)
    if tokens.counts is not None:
        rank = tokens.counts.long().cumsum(1) - 1
    of_window = torch.arange(1 - before, 0, device=rank.device).expand(len(rank), -1)
    lag = rank.unsqueeze(-1) - torch.cat([of_window, rank], dim=1).unsqueeze(-2)
    # Tokens of one rank are one that counts and others that do not; later columns of the chunk are not in the window.
    inside = (lag >= 0) & (lag < before)
    if tokens.counts is not None:
        inside[..., before - 1 :] &= tokens.counts.unsqueeze(1)
    inside[..., before - 1 :] &= torch.ones(length, length, dtype=torch.bool, device=rank.device).tril()
    weights = tokens.window.take_along_dim(lag.clamp(0, before - 1).unsqueeze(1), -1)
    return weights.masked_fill(~inside.unsqueeze(1), 0.0)


def moved_on(tokens: Tokens, window: Layers) -> Layers:
    """The window behind the tokens."""
    length = window[0].shape[2]
    joined = _joined(tokens, window)
    if tokens.counts is None:
        return tuple(part[:, :, part.shape[2] - length :] for part in joined)
    # Those that count, in their order, then the rest; the last ones of the window and of those that count.
    order = (~tokens.counts).to(torch.uint8).argsort(dim=1, stable=True)
    first = tokens.counts.sum(1, keepdim=True) + torch.arange(length, device=order.device)
    behind = torch.cat([torch.arange(length, device=order.device).expand(len(order), -1), length + order], dim=1)
    places = behind.gather(1, first)
    return tuple(part.take_along_dim(places[:, None, :, None], 2) for part in joined)


def _joined(tokens: Tokens, window: Layers) -> list[Tensor]:
    own = [tokens.k, tokens.v] + ([] if tokens.threshold is None else [tokens.threshold.unsqueeze(-1)])
    return [torch.cat([before, part], dim=2) for before, part in zip(window, own, strict=True)]
