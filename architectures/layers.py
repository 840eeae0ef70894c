"""Building blocks of decoders: RMSNorm, rotary positions, grouped-query attention with a cache, SwiGLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KVCache = tuple[Tensor, Tensor]
"""Keys and values (B, H_kv, T_max, D) of the tokens read so far."""


def rope_table(length: int, head_dim: int, base: float) -> Tensor:
    """Cosines and sines (2, T, D/2) of rotary positions 0..T-1 (Su et al. 2021, arXiv:2104.09864)."""
    rates = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x_BHTD: Tensor, table_2TD: Tensor) -> Tensor:
    """Turn the pairs (first half, second half) of each head by the angle of its position."""
    cos, sin = table_2TD.to(x_BHTD.dtype)
    first, second = x_BHTD.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Attention(nn.Module):
    """Causal self-attention with fewer key-value heads than query heads (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, *, hidden_size: int, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        if hidden_size % num_heads or num_heads % num_kv_heads or (hidden_size // num_heads) % 2:
            raise ValueError(
                f"num_heads: {num_heads} heads ({num_kv_heads} for keys) do not divide a hidden size of {hidden_size} "
                "into even heads; hidden_size/num_heads must be an even whole number, num_heads/num_kv_heads whole"
            )
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, (num_heads + 2 * num_kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x_BTE: Tensor, rope: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, E) → (B, T, E); `mask` (B, 1, T, T) True where a token may look, None for plain causality."""
        q, k, v = self._heads(x_BTE, rope)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.num_kv_heads != self.num_heads
        )
        return self.out(y.transpose(1, 2).flatten(2))

    def decode(self, x_BTE: Tensor, rope: Tensor, cache: KVCache, places_BT: Tensor) -> Tensor:
        """Like `forward` for tokens that continue what the cache holds; writes them into it at `places_BT`."""
        q, k, v = self._heads(x_BTE, rope)
        where = places_BT[:, None, :, None].expand_as(k)
        keys, values = cache[0].scatter_(2, where, k), cache[1].scatter_(2, where, v)
        visible = torch.arange(keys.shape[2], device=q.device) <= places_BT[:, None, :, None]
        y = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=visible, enable_gqa=self.num_kv_heads != self.num_heads
        )
        return self.out(y.transpose(1, 2).flatten(2))

    def _heads(self, x_BTE: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = x_BTE.shape
        heads = self.qkv(x_BTE).view(batch, length, -1, self.head_dim).transpose(1, 2)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        return rotate(q, rope), rotate(k, rope), v


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, *, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, 2 * inner_size, bias=False)
        self.down = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class Block(nn.Module):
    """One pre-norm layer: attention, then feed-forward, each added to the residual stream."""

    def __init__(
        self, *, hidden_size: int, num_heads: int, num_kv_heads: int, inner_size: int, dropout: float
    ) -> None:
        super().__init__()
        self.norm_attention = nn.RMSNorm(hidden_size, eps=1e-6)
        self.attention = Attention(hidden_size=hidden_size, num_heads=num_heads, num_kv_heads=num_kv_heads)
        self.norm_feed = nn.RMSNorm(hidden_size, eps=1e-6)
        self.feed = SwiGLU(hidden_size=hidden_size, inner_size=inner_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.dropout(self.attention(self.norm_attention(x), rope, mask))
        return x + self.dropout(self.feed(self.norm_feed(x)))

    def decode(self, x: Tensor, rope: Tensor, cache: KVCache, places_BT: Tensor) -> Tensor:
        """One continuation step with the layer's cache."""
        x = x + self.attention.decode(self.norm_attention(x), rope, cache, places_BT)
        return x + self.feed(self.norm_feed(x))
