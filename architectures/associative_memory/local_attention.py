"""Attention beside a memory: over a sliding window, or over a segment, with learned tokens that are always seen.

Shapes: B rows, T tokens, N persistent tokens, W window, L tokens of a block, H heads, D head size, C hidden size,
S tokens that may be seen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.architectures.associative_memory.reading import Reading
from clplat.architectures.layers import rotary_angles, rotate

WindowState = tuple[Tensor, Tensor, Tensor, Tensor]
"""Keys and values of the W − 1 tokens before the pending ones, (B, W − 1, H, D) each, and of those, (B, P, H, D)."""


class PersistentTokens(nn.Module):
    """N learned inputs that stand before every text and document, of the scale of normed activations."""

    def __init__(self, count: int, hidden_size: int) -> None:
        super().__init__()
        self.inputs = nn.Parameter(torch.empty(count, hidden_size))
        self.reset_dynamics()

    def reset_dynamics(self) -> None:
        """Normal, of deviation 1."""
        nn.init.normal_(self.inputs)


class Projections(nn.Module):
    """Heads of softmax attention with rotary positions; subclasses say who sees whom."""

    def __init__(self, *, hidden_size: int, num_heads: int, rope_base: float = 10_000.0) -> None:
        super().__init__()
        self.head_size, self.rope_base = hidden_size // num_heads, rope_base
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)

    def projected(self, x_BTC: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, T, H, D), at positions (T,) or (B, T)."""
        q, k, v = self.qkv(x_BTC).unflatten(-1, (3, -1, self.head_size)).unbind(-3)
        angles = rotary_angles(positions, self.head_size, self.rope_base)
        return rotate(q, angles), rotate(k, angles), v

    def attended(self, q_BTHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask: Tensor) -> Tensor:
        """(B, T, C) under a mask (B, 1, T, S), or one for all rows."""
        q, k, v = (part.transpose(1, 2) for part in (q_BTHD, k_BSHD, v_BSHD))
        mixed_BHTD = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(mixed_BHTD.transpose(1, 2).flatten(2))


class WindowAttention(Projections):
    """Each token sees the persistent ones, itself and the W − 1 tokens before it in its document.

    A full pass takes blocks of W tokens, which see their own and the one before: O(T · W).
    """

    def __init__(self, *, hidden_size: int, num_heads: int, window: int) -> None:
        super().__init__(hidden_size=hidden_size, num_heads=num_heads)
        self.window = window

    def forward(self, x_BTC: Tensor, persistent_NC: Tensor, reading: Reading) -> Tensor:
        """A full pass."""
        rows, length = x_BTC.shape[:2]
        size = min(self.window, length)
        missing = -length % size
        q, k, v = (F.pad(part, (0, 0, 0, 0, 0, missing)) for part in self.projected(x_BTC, _own_positions(reading)))
        blocks = (length + missing) // size
        q = q.unflatten(1, (blocks, size)).flatten(0, 1)
        seen = [_with_block_before(part, size).flatten(0, 1) for part in (k, v)]
        at = torch.arange(size, device=x_BTC.device)
        other = torch.arange(-size, size, device=x_BTC.device)
        mask = (other <= at.unsqueeze(1)) & (other > at.unsqueeze(1) - self.window)
        start = size * torch.arange(blocks, device=x_BTC.device)
        mask = (mask & (start[:, None, None] + other >= 0)).expand(rows, -1, -1, -1)
        if reading.documents is not None:
            number = F.pad(reading.documents.number_BT, (0, missing), value=-1).view(rows, -1, 1, 1)
            other_number = _with_block_before(number, size).flatten(2)
            mask = mask & (number.view(rows, blocks, size, 1) == other_number.unsqueeze(2))
        mask = mask.flatten(0, 1).unsqueeze(1)
        mixed = self._with_persistent(q, seen[0], seen[1], mask, persistent_NC)
        return mixed.unflatten(0, (rows, blocks)).flatten(1, 2)[:, :length]

    def continued(
        self, x_BTC: Tensor, persistent_NC: Tensor, state: WindowState, count_B: Tensor, reading: Reading
    ) -> tuple[Tensor, WindowState]:
        """New tokens after those in `state`, of which `count_B` of the pending ones are each row's own."""
        q, k, v = self.projected(x_BTC, reading.positions)
        k_before, v_before = (_last(*parts, count_B) for parts in zip(state[:2], state[2:]))
        held, length = self.window - 1, x_BTC.shape[1]
        at = torch.arange(length, device=x_BTC.device).unsqueeze(1)
        other = torch.arange(held + length, device=x_BTC.device)
        mask = (other >= at) & (other <= at + held)
        begun = reading.lengths.unsqueeze(1) - held + other >= 0
        mask = (mask & begun.unsqueeze(1)).unsqueeze(1)
        seen = [torch.cat([old.to(new.dtype), new], 1) for old, new in ((k_before, k), (v_before, v))]
        return self._with_persistent(q, seen[0], seen[1], mask, persistent_NC), (k_before, v_before, k, v)

    def empty_state(self, batch_size: int) -> WindowState:
        """The state before any token."""
        heads = self.out.in_features // self.head_size
        before = self.out.weight.new_zeros(batch_size, self.window - 1, heads, self.head_size)
        pending = before.new_zeros(batch_size, 0, heads, self.head_size)
        return before, before, pending, pending

    def mixing_flops(self, tokens: int, persistent: int) -> float:
        """As computed: each block of tokens is compared and mixed with two of them and the persistent ones."""
        size = min(self.window, tokens)
        return 4.0 * self.out.in_features * size * -(-tokens // size) * (2 * size + persistent)

    def _with_persistent(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, persistent_NC: Tensor) -> Tensor:
        count = len(persistent_NC)
        _, first_k, first_v = self.projected(
            persistent_NC.unsqueeze(0), torch.zeros(count, dtype=torch.long, device=q.device)
        )
        k, v = (torch.cat([new.expand(len(old), -1, -1, -1), old], 1) for new, old in ((first_k, k), (first_v, v)))
        return self.attended(q, k, v, F.pad(mask, (count, 0), value=True))


def _own_positions(reading: Reading) -> Tensor:
    """Positions from each document's start, so that persistent tokens stand before every document alike."""
    if reading.documents is None:
        return reading.positions
    begins = reading.documents.begins()
    return reading.positions - torch.where(begins, reading.positions, 0).cummax(1).values


def _with_block_before(x_BTHD: Tensor, size: int) -> Tensor:
    """(B, n, 2L, H, D): each block of L tokens behind the one before it."""
    blocks = x_BTHD.unflatten(1, (-1, size))
    return torch.cat([F.pad(blocks[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0)), blocks], 2)


def _last(before: Tensor, pending: Tensor, count_B: Tensor) -> Tensor:
    """As many of each row's last tokens as `before` holds, once `count_B` pending ones belong to it."""
    places = count_B.unsqueeze(1) + torch.arange(before.shape[1], device=before.device)
    return torch.cat([before.to(pending.dtype), pending], 1).take_along_dim(places[:, :, None, None], 1)


class SegmentAttention(Projections):
    """Each token of a segment sees the persistent ones, and of what a memory recalls for the segment's tokens and of
    these tokens those up to its own place."""

    def forward(self, x_BLC: Tensor, recalled_BLC: Tensor, persistent_NC: Tensor) -> Tensor:
        """The segment's tokens, mixed."""
        rows, length = x_BLC.shape[:2]
        count = len(persistent_NC)
        seen = torch.cat([persistent_NC.expand(rows, -1, -1).to(x_BLC.dtype), recalled_BLC, x_BLC], 1)
        place = torch.arange(length, device=x_BLC.device)
        q, k, v = self.projected(seen, torch.cat([place.new_zeros(count), place, place]))
        past = torch.ones(length, length, dtype=torch.bool, device=x_BLC.device).tril()
        mask = F.pad(torch.cat([past, past], 1), (count, 0), value=True)
        return self.attended(q[:, count + length :], k, v, mask)

    def mixing_flops(self, tokens: int, segment: int, persistent: int) -> float:
        """As computed: each token is compared and mixed with all of its segment twice and the persistent ones; keys
        and values of recalled tokens and queries that nobody needs are projected too."""
        width = self.out.in_features
        return 4.0 * width * tokens * (2 * segment + persistent) + 6.0 * width * width * tokens
