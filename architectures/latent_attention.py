"""Multi-head latent attention: keys and values of all heads are made from one small vector a token.

DeepSeek-V2 (2024, arXiv:2405.04434, §2.1, eq. 9-19), without the compression of queries, which its authors use to
save activation memory and leave out of their smaller model.

Shapes: B rows, T tokens, S tokens with those in the cache, H heads, D head size without and R with rotary position,
L latent size, C hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.architectures.layers import Angles, Cache, extend, rotate


class LatentAttention(nn.Module):
    """Causal attention whose cache holds, for a token, its latent (L) and one rotary key that all heads share (R).

    A rotated key cannot be made from the latent by a matrix that is the same at all positions, so position has
    dimensions of its own ("decoupled" RoPE). A full pass makes keys and values of each head; decoding instead takes
    the query to the latent (q · W k = Wᵀq · k), so that nothing is made again for tokens in the cache.
    """

    def __init__(self, *, hidden_size: int, num_heads: int, latent_size: int, rotary_size: int) -> None:
        super().__init__()
        self.num_heads, self.head_size = num_heads, hidden_size // num_heads
        self.latent_size, self.rotary_size = latent_size, rotary_size
        self.query = nn.Linear(hidden_size, num_heads * (self.head_size + rotary_size), bias=False)
        self.compress = nn.Linear(hidden_size, latent_size + rotary_size, bias=False)
        self.latent_norm = nn.RMSNorm(latent_size, eps=1e-6)
        self.expand = nn.Linear(latent_size, num_heads * 2 * self.head_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x_BTC: Tensor, angles: Angles, mask: Tensor | None) -> Tensor:
        """A full pass; `mask` (B, 1, T, T) bool, or None for the plain causal one."""
        plain, turned = self._queries(x_BTC, angles)
        latent_BTL, shared_BT1R = self._compressed(x_BTC, angles)
        key, value = self.expand(latent_BTL).unflatten(-1, (self.num_heads, -1)).chunk(2, dim=-1)
        key = torch.cat([key, shared_BT1R.expand(-1, -1, self.num_heads, -1)], dim=-1)
        query = torch.cat([plain, turned], dim=-1)
        mixed_BHTD = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask, is_causal=mask is None
        )
        return self.out(mixed_BHTD.transpose(1, 2).flatten(2))

    def continued(
        self, x_BTC: Tensor, cache: Cache, angles: Angles, mask: Tensor, positions: Tensor
    ) -> tuple[Tensor, Cache]:
        """New tokens at `positions` (B, T) after those in `cache`; `mask` (B, 1, T, S + T)."""
        plain, turned = self._queries(x_BTC, angles)
        latent_BTL, shared_BT1R = self._compressed(x_BTC, angles)
        latent, shared = extend(cache[0], latent_BTL.unsqueeze(2), positions), extend(cache[1], shared_BT1R, positions)
        for_keys, for_values = self._expanding()
        query = torch.cat([torch.einsum("bthd,hdl->bthl", plain, for_keys), turned], dim=-1)
        mixed_BHTL = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            torch.cat([latent, shared], dim=-1).transpose(1, 2),
            latent.transpose(1, 2),
            attn_mask=mask,
            scale=(self.head_size + self.rotary_size) ** -0.5,
            enable_gqa=True,
        )
        mixed_BTHD = torch.einsum("bhtl,hdl->bthd", mixed_BHTL, for_values)
        return self.out(mixed_BTHD.flatten(2)), (latent, shared)

    def empty_state(self, batch_size: int) -> Cache:
        """A cache of no tokens: latents (B, 0, 1, L) and rotary keys (B, 0, 1, R)."""
        weight = self.compress.weight
        sizes = (self.latent_size, self.rotary_size)
        latent, shared = (weight.new_empty(batch_size, 0, 1, size) for size in sizes)
        return latent, shared

    def mixing_flops(self, tokens: int) -> float:
        """Operations beyond products with weights: D + R multiplications to compare a pair in a head and D to mix."""
        return float(self.num_heads * (2 * self.head_size + self.rotary_size) * tokens * (tokens + 1))

    def _queries(self, x_BTC: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        """Without position (B, T, H, D), and turned by it (B, T, H, R)."""
        query = self.query(x_BTC).unflatten(-1, (self.num_heads, -1))
        plain, turned = query.split([self.head_size, self.rotary_size], dim=-1)
        return plain, rotate(turned, angles)

    def _compressed(self, x_BTC: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        """Latents (B, T, L) and the rotary key that all heads share (B, T, 1, R)."""
        latent_BTL, shared_BTR = self.compress(x_BTC).split([self.latent_size, self.rotary_size], dim=-1)
        precise = latent_BTL.to(self.latent_norm.weight.dtype)  # autocast gives a norm what its weights are not in
        return self.latent_norm(precise).to(latent_BTL.dtype), rotate(shared_BTR.unsqueeze(2), angles)

    def _expanding(self) -> tuple[Tensor, Tensor]:
        """The weights (H, D, L) that make keys and those that make values."""
        for_keys, for_values = self.expand.weight.unflatten(0, (self.num_heads, -1)).chunk(2, dim=1)
        return for_keys, for_values
