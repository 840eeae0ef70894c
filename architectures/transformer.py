"""The decoder that language studies compare against: RMSNorm, RoPE, grouped queries, SwiGLU, tied head."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from clplat.architectures.base import Architecture, Output, State, device_of
from clplat.architectures.layers import Block, rope_table
from clplat.streams.base import Spec
from clplat.streams.batch import Batch


class Transformer(Architecture):
    """Decoder-only Transformer in the form of Llama."""

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
        inner_size: int | None = None,
        dropout: float = 0.0,
        rope_base: float = 10_000.0,
        max_length: int | None = None,
        document_mask: bool = True,
    ) -> None:
        """`num_kv_heads` defaults to `num_heads`; `inner_size` to 8/3 of the hidden size, rounded up to a multiple of
        32, which costs as much as an ungated layer of four times the hidden size. `max_length` (default: twice the
        stream's row, so that answers can be generated after a full prompt) bounds positions. `document_mask` keeps
        tokens from looking into other documents of the same row."""
        super().__init__()
        if spec.kind != "language":
            raise ValueError(f"Transformer reads token rows; the stream is of kind {spec.kind!r}; use MLP")
        self.max_length = max_length or 2 * spec.input_shape[0]
        self.document_mask, self.num_kv_heads = document_mask, num_kv_heads or num_heads
        inner = inner_size or math.ceil(8 * hidden_size / 3 / 32) * 32
        self.embedding = nn.Embedding(spec.num_outputs, hidden_size)
        self.layers = nn.ModuleList(
            Block(
                hidden_size=hidden_size, num_heads=num_heads, num_kv_heads=self.num_kv_heads, inner_size=inner,
                dropout=dropout,
            )
            for _ in range(num_layers)
        )  # fmt: skip
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("rope", rope_table(self.max_length, hidden_size // num_heads, rope_base), persistent=False)
        self.rope: Tensor
        self._initialise(num_layers)

    def _initialise(self, num_layers: int) -> None:
        """Normal 0.02; layers that write to the residual stream are scaled down by its depth (as in GPT-2)."""
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                writes = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * num_layers) if writes else 0.02)

    def forward(self, batch: Batch, state: State = None, return_hidden: str | None = None) -> Output:
        """Logits (B, T, V) for token rows (B, T); `hidden` (B, T, E) is the input of the head."""
        tokens = batch.inputs
        if tokens.shape[1] > self.max_length:
            raise ValueError(f"Transformer.max_length: a row has {tokens.shape[1]} tokens, more than {self.max_length}")
        mask = self._mask(batch.segment_ids) if self.document_mask else None
        hidden = self.dropout(self.embedding(tokens))
        for layer in self.layers:
            hidden = layer(hidden, self.rope[:, : tokens.shape[1]], mask)
        hidden = self.norm(hidden)
        return Output(logits=hidden @ self.embedding.weight.T, hidden=hidden)

    @staticmethod
    def _mask(segments: Tensor | None) -> Tensor | None:
        """(B, 1, T, T): causal and within one document."""
        if segments is None:
            return None
        same = segments[:, :, None] == segments[:, None, :]
        return same.tril().unsqueeze(1)

    def init_state(self, batch_size: int) -> State:
        """An empty cache for every layer."""
        first: Block = self.layers[0]  # type: ignore[assignment]
        shape = (batch_size, self.num_kv_heads, self.max_length, first.attention.head_dim)
        kind = {"device": device_of(self), "dtype": self.embedding.weight.dtype}
        return [(torch.zeros(shape, **kind), torch.zeros(shape, **kind)) for _ in self.layers]

    def decode(self, tokens: Tensor, state: State, lengths: Tensor) -> tuple[Tensor, State]:
        """Logits (B, T, V) of tokens that follow the `lengths` (B,) tokens in the cache, which is updated in place."""
        places = lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        rope = self.rope[:, places].unsqueeze(2)
        hidden = self.embedding(tokens)
        for layer, cache in zip(self.layers, state, strict=True):
            hidden = layer.decode(hidden, rope, cache, places)
        return self.norm(hidden) @ self.embedding.weight.T, state

    def flops_per_row(self) -> float:
        """2 per weight and token for all matrices, the head included, and the two products of causal attention."""
        length = self.max_length // 2
        weights = sum(p.numel() for p in self.parameters() if p.ndim == 2)
        width = self.embedding.embedding_dim
        return length * (2.0 * weights + 2.0 * len(self.layers) * width * length)
