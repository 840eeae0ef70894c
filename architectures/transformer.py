"""The decoder-only Transformer, the language baseline that every other model is measured against.

Pre-norm RMSNorm, rotary positions, grouped-query attention, SwiGLU, tied head: the form of Llama (Touvron et al.
2023, arXiv:2302.13971). No position is learned, so prompts may be longer than the rows of training.
"""

from __future__ import annotations

import math

from clplat.architectures.decoder import AttentionDecoder, Block, check_heads, check_language
from clplat.architectures.layers import Attention, SwiGLU
from clplat.architectures.option_checks import check_sizes
from clplat.streams.base import Spec


def dense_block(*, hidden_size: int, num_heads: int, num_kv_heads: int, mlp_ratio: float, dropout: float) -> Block:
    """Grouped-query attention and SwiGLU, whose inner size is `mlp_ratio` times the hidden size, rounded up to a
    multiple of 32."""
    return Block(
        hidden_size=hidden_size,
        attention=Attention(hidden_size=hidden_size, num_heads=num_heads, num_kv_heads=num_kv_heads),
        mlp=SwiGLU(hidden_size=hidden_size, inner_size=32 * math.ceil(mlp_ratio * hidden_size / 32)),
        dropout=dropout,
    )


class Transformer(AttentionDecoder):
    """Decoder-only Transformer: tokens (B, T) to logits (B, T, V)."""

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
        initial_std: float = 0.02,
    ) -> None:
        """`num_kv_heads` defaults to `num_heads` (no sharing). `mlp_ratio` is inner over hidden size, rounded up to
        a multiple of 32; 8/3 gives SwiGLU's three matrices the weights of an ungated layer of ratio 4. `dropout`
        acts on the embedding and on what each layer adds. `document_mask` keeps the documents of one row from
        seeing each other, where the stream marks them. `tie_head` uses the embedding as the head's weights.
        `initial_std` is the deviation of the initial weights; the usual 0.02 leaves narrow models' attention flat.
        """
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_language(type(self), spec)
        check_sizes(
            type(self).__name__, hidden_size=hidden_size, num_layers=num_layers, num_heads=num_heads,
            num_kv_heads=num_kv_heads, mlp_ratio=mlp_ratio,
        )  # fmt: skip
        check_heads(type(self), hidden_size, num_heads)
        if num_heads % num_kv_heads:
            name = type(self).__name__
            raise ValueError(f"{name}.num_kv_heads: {num_kv_heads} does not divide num_heads ({num_heads})")
        blocks = (
            dense_block(
                hidden_size=hidden_size, num_heads=num_heads, num_kv_heads=num_kv_heads, mlp_ratio=mlp_ratio,
                dropout=dropout,
            )
            for _ in range(num_layers)
        )  # fmt: skip
        super().__init__(
            spec=spec, hidden_size=hidden_size, blocks=blocks, dropout=dropout, document_mask=document_mask,
            tie_head=tie_head, initial_std=initial_std,
        )  # fmt: skip
        self.rotary_size, self.rope_base = hidden_size // num_heads, rope_base
