"""The cortical column of TRC²: attention whose queries the thalamic signal modulates, then routed experts.

Shapes: B rows, T tokens, S tokens with those in the cache, H query heads, G key-value heads, D head size, C hidden
size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from clplat.architectures.layers import Angles, Attention, Cache, SwiGLU, extend, rotate
from clplat.architectures.mixture_of_experts import MixtureOfExperts
from clplat.architectures.trc2.options import ColumnOptions, Modulation


class QueryModulation(nn.Module):
    """What a signal does to queries, before they are rotated. W_z begins at zero: at first it does nothing, exactly.

    add   q + W_z norm(z)
    gain  q ⊙ (1 + tanh(W_z norm(z)))
    """

    def __init__(self, *, hidden_size: int, kind: Modulation) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        # No nn.Linear, whose initial weights would be drawn: models with and without it share all other weights.
        self.weight = nn.Parameter(torch.zeros(hidden_size, hidden_size))

    def forward(self, query_BTC: Tensor, signal_BTC: Tensor) -> Tensor:
        # Autocast leaves norms in the precision of their weights.
        normed_BTC = self.norm(signal_BTC.to(self.norm.weight.dtype))
        change_BTC = nn.functional.linear(normed_BTC, self.weight)
        return query_BTC + change_BTC if self.kind == "add" else query_BTC * (1 + change_BTC.tanh())


class ModulatedAttention(Attention):
    """Grouped-query attention whose queries a signal (B, T, C) may change."""

    def __init__(
        self, *, hidden_size: int, num_heads: int, num_kv_heads: int, modulation: QueryModulation | None
    ) -> None:
        super().__init__(hidden_size=hidden_size, num_heads=num_heads, num_kv_heads=num_kv_heads)
        self.modulation = modulation

    def read(
        self,
        x_BTC: Tensor,
        signal_BTC: Tensor | None,
        angles: Angles,
        mask: Tensor | None,
        cache: Cache | None,
        positions: Tensor | None,
    ) -> tuple[Tensor, Cache | None]:
        """A full pass under `mask` (None: the plain causal one); or, with a cache, tokens at `positions` (B, T)."""
        query, key, value = self.qkv(x_BTC).split([x_BTC.shape[-1], *[self.num_kv_heads * self.head_size] * 2], dim=-1)
        if signal_BTC is not None:
            assert self.modulation is not None
            query = self.modulation(query, signal_BTC)
        query, key, value = (part.unflatten(-1, (-1, self.head_size)) for part in (query, key, value))
        query, key = rotate(query, angles), rotate(key, angles)
        if cache is None:
            return self._attend(query, key, value, mask), None
        assert positions is not None
        key, value = extend(cache[0], key, positions), extend(cache[1], value, positions)
        return self._attend(query, key, value, mask), (key, value)


class Column(nn.Module):
    """One block: H + attention(norm H; signal), then + experts(norm ·)."""

    def __init__(
        self, *, hidden_size: int, options: ColumnOptions, dropout: float, modulation: Modulation | None
    ) -> None:
        """`modulation` of the queries, or None for a column that no signal reaches."""
        super().__init__()
        heads, inner = num_heads(hidden_size, options), inner_size(hidden_size, options)
        self.attention_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.attention = ModulatedAttention(
            hidden_size=hidden_size,
            num_heads=heads,
            num_kv_heads=heads // options.heads_per_kv,
            modulation=None if modulation is None else QueryModulation(hidden_size=hidden_size, kind=modulation),
        )
        self.mlp_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.mlp: MixtureOfExperts | SwiGLU
        if options.feed_forward == "dense":
            self.mlp = SwiGLU(hidden_size=hidden_size, inner_size=inner)
        else:
            self.mlp = MixtureOfExperts(
                hidden_size=hidden_size,
                inner_size=inner,
                num_experts=options.num_experts,
                experts_per_token=options.experts_per_token,
                shared_experts=options.shared_experts,
                balance=options.balance,
            )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x_BTC: Tensor,
        signal_BTC: Tensor | None,
        angles: Angles,
        mask: Tensor | None,
        cache: Cache | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Cache | None]:
        """The stream after this column, the experts' balance loss where there are any, and the longer cache."""
        mixed, cache = self.attention.read(self.attention_norm(x_BTC), signal_BTC, angles, mask, cache, positions)
        x_BTC = x_BTC + self.dropout(mixed)
        fed = self.mlp(self.mlp_norm(x_BTC))
        added, balance = fed if isinstance(fed, tuple) else (fed, None)
        return x_BTC + self.dropout(added), balance, cache


def num_heads(hidden_size: int, options: ColumnOptions) -> int:
    """Query heads of a column; refuses numbers that do not go together."""
    heads = options.num_heads or hidden_size // 64
    if not heads or hidden_size % (2 * heads):
        raise ValueError(f"column.num_heads: twice its {heads} must divide hidden_size ({hidden_size}); the default is "
                         "hidden_size / 64")  # fmt: skip
    if heads % options.heads_per_kv:
        raise ValueError(f"column.heads_per_kv: {options.heads_per_kv} does not divide num_heads ({heads})")
    return heads


def inner_size(hidden_size: int, options: ColumnOptions) -> int:
    """256 · ⌈8d/768⌉ unless given: 8d/3 rounded up to a multiple of 256, inferred from published parameter counts."""
    return options.inner_size or 256 * math.ceil(8 * hidden_size / 768)
