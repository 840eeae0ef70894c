"""The decoder-only Transformer, the language baseline that every other model is measured against.

Pre-norm RMSNorm, rotary positions, grouped-query attention, SwiGLU, tied head: the form of Llama (Touvron et al.
2023, arXiv:2302.13971). No position is learned, so prompts may be longer than the rows of training.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.architectures.base import Architecture, Output, State
from clplat.architectures.layers import Angles, Attention, Cache, SwiGLU, causal_document_mask, rotary_angles
from clplat.streams.base import Spec
from clplat.streams.batch import Batch


class Block(nn.Module):
    """Attention and feed-forward layer, each added to the residual stream after a norm of its own."""

    def __init__(self, *, hidden_size: int, num_heads: int, num_kv_heads: int, inner_size: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.attention = Attention(hidden_size=hidden_size, num_heads=num_heads, num_kv_heads=num_kv_heads)
        self.mlp_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.mlp = SwiGLU(hidden_size=hidden_size, inner_size=inner_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTC: Tensor, angles: Angles, mask: Tensor | None) -> Tensor:
        x_BTC = x_BTC + self.dropout(self.attention(self.attention_norm(x_BTC), angles, mask))
        return x_BTC + self.dropout(self.mlp(self.mlp_norm(x_BTC)))

    def continued(
        self, x_BTC: Tensor, angles: Angles, mask: Tensor, cache: Cache, positions: Tensor
    ) -> tuple[Tensor, Cache]:
        """The same for tokens that follow those in `cache`; returns the longer cache too."""
        mixed, cache = self.attention.continued(self.attention_norm(x_BTC), angles, mask, cache, positions)
        x_BTC = x_BTC + self.dropout(mixed)
        return x_BTC + self.dropout(self.mlp(self.mlp_norm(x_BTC))), cache


class Transformer(Architecture):
    """Decoder-only Transformer: tokens (B, T) to logits (B, T, V)."""

    causal = True
    paper = "Vaswani et al. 2017; Touvron et al. 2023, arXiv:2302.13971"

    def __init__(
        self,
        *,
        spec: Spec,
        hidden_size: int = 256,
        num_layers: int = 4,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        mlp_ratio: float = 8 / 3,
        dropout: float = 0.0,
        rope_base: float = 10_000.0,
        document_mask: bool = True,
        tie_head: bool = True,
    ) -> None:
        """`num_kv_heads` defaults to `num_heads` (no sharing). `mlp_ratio` is inner over hidden size, rounded up to
        a multiple of 32; 8/3 gives SwiGLU's three matrices the weights of an ungated layer of ratio 4. `dropout`
        acts on the embedding and on what each layer adds. `document_mask` keeps the documents of one row from
        seeing each other, where the stream marks them. `tie_head` uses the embedding as the head's weights.
        """
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_options(spec, hidden_size, num_heads, num_kv_heads)
        self.row_length, self.head_size, self.rope_base = spec.input_shape[0], hidden_size // num_heads, rope_base
        self.num_kv_heads, self.document_mask = num_kv_heads, document_mask
        self.embedding = nn.Embedding(spec.num_outputs, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(
                hidden_size=hidden_size,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                inner_size=32 * math.ceil(mlp_ratio * hidden_size / 32),
                dropout=dropout,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.own_head = None if tie_head else nn.Linear(hidden_size, spec.num_outputs, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """Normal 0.02, and less for layers that add to the residual stream, so that its scale does not grow with
        depth (Radford et al. 2019, GPT-2)."""
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                adds = name.endswith(("attention.out.weight", "mlp.down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * len(self.blocks)) if adds else 0.02)

    def forward(self, batch: Batch, state: State = None, return_hidden: str | None = None) -> Output:
        """Logits (B, T, V); `hidden` (B, T, C) is the input of the head.

        With `state`, every row continues after all the tokens it holds, and the state after them is returned.
        """
        if state is not None:
            return self._continue(batch, state)
        tokens, mask = batch.inputs, None
        if self.document_mask and batch.segment_ids is not None:
            mask = causal_document_mask(batch.segment_ids)
        angles = rotary_angles(torch.arange(tokens.shape[1], device=tokens.device), self.head_size, self.rope_base)
        x_BTC = self.dropout(self.embedding(tokens))
        for block in self.blocks:
            x_BTC = block(x_BTC, angles, mask)
        hidden = self.norm(x_BTC)
        return Output(logits=self._head(hidden), hidden=hidden)

    def init_state(self, batch_size: int) -> list[Cache]:
        """An empty cache for each layer."""
        empty = self.embedding.weight.new_empty(batch_size, 0, self.num_kv_heads, self.head_size)
        return [(empty, empty) for _ in self.blocks]

    def decode(self, tokens: Tensor, state: list[Cache], lengths: Tensor) -> tuple[Tensor, list[Cache]]:
        """Logits (B, T, V) of `tokens` (B, T), which follow the `lengths` (B,) tokens that each row has in `state`.

        Rows of unequal length are padded on the right; what follows is written over a row's padding.
        """
        hidden, state = self._read(tokens, state, lengths)
        return self._head(hidden), state

    def flops_per_row(self) -> float:
        """Forward operations for a row of T tokens: 2 per weight and token, head included and lookup not, and 4·C
        in each layer for every one of the T(T + 1)/2 pairs that causal attention compares and mixes."""
        width, tokens = self.embedding.embedding_dim, self.row_length
        weights = self.embedding.weight.numel() + sum(p.numel() for p in self.blocks.parameters() if p.ndim == 2)
        return 2.0 * tokens * weights + 2.0 * len(self.blocks) * width * tokens * (tokens + 1)

    def _head(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, (self.own_head or self.embedding).weight)

    def _read(self, tokens: Tensor, state: list[Cache], lengths: Tensor) -> tuple[Tensor, list[Cache]]:
        """Inputs of the head for tokens that follow those in the cache, and the longer cache."""
        positions = lengths.unsqueeze(1) + torch.arange(tokens.shape[1], device=tokens.device)
        columns = torch.arange(state[0][0].shape[1] + tokens.shape[1], device=tokens.device)
        mask = (columns <= positions.unsqueeze(-1)).unsqueeze(1)
        angles = rotary_angles(positions, self.head_size, self.rope_base)
        x_BTC = self.dropout(self.embedding(tokens))
        caches = []
        for block, cache in zip(self.blocks, state, strict=True):
            x_BTC, longer = block.continued(x_BTC, angles, mask, cache, positions)
            caches.append(longer)
        return self.norm(x_BTC), caches

    def _continue(self, batch: Batch, state: list[Cache]) -> Output:
        if self.document_mask and batch.segment_ids is not None:
            raise ValueError("Transformer.document_mask: a carried state does not know documents; pass no segment_ids")
        hidden, state = self._read(batch.inputs, state, torch.full_like(batch.inputs[:, 0], state[0][0].shape[1]))
        return Output(logits=self._head(hidden), state=state, hidden=hidden)


def _check_options(spec: Spec, hidden_size: int, num_heads: int, num_kv_heads: int) -> None:
    if spec.kind != "language":
        other = "MLP" if spec.vocab_size is None else "TextClassifier"
        raise ValueError(f"Transformer: reads token rows, but the stream is of kind {spec.kind!r}; use {other}")
    if hidden_size % (2 * num_heads):
        raise ValueError(f"Transformer.hidden_size: {hidden_size} is not a multiple of 2 * num_heads ({2 * num_heads})")
    if num_heads % num_kv_heads:
        raise ValueError(f"Transformer.num_kv_heads: {num_kv_heads} does not divide num_heads ({num_heads})")
