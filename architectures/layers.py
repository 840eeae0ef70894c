"""The parts a decoder is made of: rotary positions, grouped-query attention with a cache, short convolutions, SwiGLU.

Shapes: B rows, T tokens, S tokens with those in the cache, H query heads, G key-value heads, D head size,
C hidden size. Normalisation is `torch.nn.RMSNorm`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Cache = tuple[Tensor, Tensor]
"""Keys and values of one layer, each (B, S, G, D); column s holds the row's token at position s."""

Angles = tuple[Tensor, Tensor]
"""Cosines and sines of rotary positions, each (T, 1, D/2) or (B, T, 1, D/2)."""


def rotary_angles(positions: Tensor, head_size: int, base: float) -> Angles:
    """Angle position · base^(−2i/D) for every pair i (Su et al. 2021, RoFormer, eq. 15).

    `positions` is (T,) or (B, T), long. Computed in float32 whatever the model's precision: in bfloat16
    positions above 256 would no longer be told apart.
    """
    pairs = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32)
    angles = positions.float().unsqueeze(-1) * base ** (-pairs / head_size)
    return angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)


def rotate(x_BTHD: Tensor, angles: Angles) -> Tensor:
    """Turn each pair (x_i, x_{i + D/2}) by its angle."""
    cos, sin = (part.to(x_BTHD.dtype) for part in angles)
    first, second = x_BTHD.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def free_to_look(tensor: Tensor) -> bool:
    """Whether the way of the computation may depend on what the tensor holds: on the CPU only. An accelerator would
    have to be waited for, and under a compiler or vmap there is no one answer."""
    return tensor.device.type == "cpu" and not traced()


def traced() -> bool:
    """Whether a compiler or vmap reads along, for which nothing may depend on what tensors hold."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def trimmed(tokens_BT: Tensor, pad_token: int) -> Tensor:
    """The columns up to the last token of any row, where that may be looked up: short rows cost what they are long."""
    if not free_to_look(tokens_BT):
        return tokens_BT
    used = (tokens_BT != pad_token).any(0).nonzero()
    return tokens_BT[:, : int(used[-1]) + 1] if len(used) else tokens_BT[:, :1]


def causal_document_mask(segment_ids: Tensor) -> Tensor | None:
    """(B, 1, T, T), True where a token may look: its own past within its own document.

    None, which stands for the plain causal mask, where every row holds one document and that may be looked up.
    """
    if free_to_look(segment_ids) and bool((segment_ids[:, 0] == segment_ids[:, -1]).all()):
        return None
    same = segment_ids.unsqueeze(2) == segment_ids.unsqueeze(1)
    return same.tril().unsqueeze(1)


def extend(past_BSGD: Tensor, new_BTGD: Tensor, positions: Tensor) -> Tensor:
    """The cache with new columns, and each row's new tokens written at `positions` (B, T).

    The width grows by T at every call, so it always suffices and nobody has to ask for the longest row. What
    stands beyond a row's own length is filler that the mask hides. The cache that was passed is left alone.
    """
    grown = torch.cat([past_BSGD.to(new_BTGD.dtype), new_BTGD], dim=1)
    rows = torch.arange(len(grown), device=grown.device).unsqueeze(1)
    return grown.index_put_((rows, positions), new_BTGD)


def causal_convolution(
    x_BTC: Tensor, weight_KC: Tensor, bias_C: Tensor | None, before_BKC: Tensor | None, document_BT: Tensor | None
) -> Tensor:
    """Each token and the K − 1 before it, weighed by channel; those of another document count as 0.

    `before_BKC` are the K − 1 tokens before the first, None for none of them; `document_BT` numbers documents from 0.
    """
    width, tokens = len(weight_KC), x_BTC.shape[1]
    padded = F.pad(x_BTC, (0, 0, width - 1, 0)) if before_BKC is None else torch.cat(
        [before_BKC.to(x_BTC.dtype), x_BTC], dim=1
    )  # fmt: skip
    sums = torch.zeros_like(x_BTC) if bias_C is None else bias_C.to(x_BTC.dtype).expand_as(x_BTC)
    for place, weight in enumerate(weight_KC.to(x_BTC.dtype)):
        seen = padded[:, place : place + tokens]
        if document_BT is not None:
            age = width - 1 - place
            # −1 is no document.
            other = F.pad(document_BT, (age, 0), value=-1)[:, :tokens] != document_BT
            seen = seen.masked_fill(other.unsqueeze(-1), 0.0)
        sums = torch.addcmul(sums, seen, weight)
    return sums


class Attention(nn.Module):
    """Causal self-attention with rotary positions; G < H shares each key-value head among H/G query heads
    (Ainslie et al. 2023, GQA)."""

    def __init__(self, *, hidden_size: int, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_size = hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, (num_heads + 2 * num_kv_heads) * self.head_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x_BTC: Tensor, angles: Angles, mask: Tensor | None) -> Tensor:
        """A full pass; `mask` (B, 1, T, T) bool, or None for the plain causal one."""
        return self._attend(*self._project(x_BTC, angles), mask)

    def empty_state(self, batch_size: int) -> Cache:
        """A cache of no tokens."""
        empty = self.qkv.weight.new_empty(batch_size, 0, self.num_kv_heads, self.head_size)
        return empty, empty

    def mixing_flops(self, tokens: int) -> float:
        """Operations beyond products with weights: 4·H·D for each of the T(T + 1)/2 pairs that are compared and
        mixed."""
        return 2.0 * self.num_heads * self.head_size * tokens * (tokens + 1)

    def continued(
        self, x_BTC: Tensor, cache: Cache, angles: Angles, mask: Tensor, positions: Tensor
    ) -> tuple[Tensor, Cache]:
        """New tokens at `positions` (B, T) after those in `cache`; `mask` (B, 1, T, S + T)."""
        query, key, value = self._project(x_BTC, angles)
        key, value = extend(cache[0], key, positions), extend(cache[1], value, positions)
        return self._attend(query, key, value, mask), (key, value)

    def _project(self, x_BTC: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, D), keys and values (B, T, G, D); queries and keys are rotated together."""
        heads = self.qkv(x_BTC).unflatten(-1, (-1, self.head_size))
        turned, value = heads.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=2)
        query, key = rotate(turned, angles).split([self.num_heads, self.num_kv_heads], dim=2)
        return query, key, value

    def _attend(self, q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, mask: Tensor | None) -> Tensor:
        mixed_BHTD = F.scaled_dot_product_attention(
            q_BTHD.transpose(1, 2),
            k_BSGD.transpose(1, 2),
            v_BSGD.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        return self.out(mixed_BHTD.transpose(1, 2).flatten(2))


class WideBias(nn.Linear):
    """A linear layer whose bias is added, and whose answer given, in float32 or wider: for gates that are told apart
    near 0 or 1, where three digits of a coarser type are too few."""

    def forward(self, input: Tensor) -> Tensor:
        product = F.linear(input, self.weight)
        wide = torch.promote_types(product.dtype, torch.float32)
        return product.to(wide) + self.bias.to(wide)


class AsPrecise(nn.Linear):
    """A linear layer without bias that computes in the precision of what it reads, whatever its weights are kept in."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype))


class WeightsAlone(nn.Linear):
    """A linear layer that is never called: its model multiplies by the weights in a way of its own. Optimizers that
    follow what layers are given (DGD) know it by the attribute."""

    weights_alone = True


class SwiGLU(nn.Module):
    """Gated feed-forward layer: down(silu(gate(x)) · up(x)) (Shazeer 2020, eq. 6)."""

    def __init__(self, *, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * inner_size, bias=False)
        self.down = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        gate, up = self.gate_up(x_BTC).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
