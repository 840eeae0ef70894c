"""A Transformer whose feed-forward layers are mixtures of experts, in the form of Mixtral.

The rival "MoE" of TRC² (arXiv:2602.22479): 8 experts of which 2 answer each token, no shared expert, multi-head
attention. What is inferred of it: docs/rivals.md.
"""

from __future__ import annotations

from clplat.architectures.decoder import AttentionDecoder, Block, check_heads, check_language
from clplat.architectures.layers import Attention
from clplat.architectures.mixture_of_experts import MixtureOfExperts, expert_size
from clplat.architectures.option_checks import check_sizes
from clplat.streams.base import Spec


class MoETransformer(AttentionDecoder):
    """Decoder-only Transformer with dropless mixtures of SwiGLU experts: tokens (B, T) to logits (B, T, V)."""

    paper = "Jiang et al. 2024, Mixtral, arXiv:2401.04088"
    fidelity = "mechanism"

    def __init__(
        self,
        *,
        spec: Spec,
        hidden_size: int = 256,
        num_layers: int = 4,
        num_heads: int = 4,
        num_experts: int = 8,
        experts_per_token: int = 2,
        inner_size: int | None = None,
        renormalise: bool = True,
        balance: float = 0.01,
        dropout: float = 0.0,
        rope_base: float = 10_000.0,
        document_mask: bool = True,
        tie_head: bool = True,
    ) -> None:
        """`inner_size` of one expert is by default 8/3 of the hidden size, rounded up to a multiple of 256. The options
        of experts are those of `MixtureOfExperts`, the others those of `Transformer`. The balance losses of all
        layers are summed in the auxiliary loss `balance`."""
        check_language(type(self), spec)
        check_sizes(type(self).__name__, hidden_size=hidden_size, num_layers=num_layers, num_heads=num_heads)
        check_heads(type(self), hidden_size, num_heads)
        inner_size = expert_size(hidden_size) if inner_size is None else inner_size
        blocks = (
            Block(
                hidden_size=hidden_size,
                attention=Attention(hidden_size=hidden_size, num_heads=num_heads, num_kv_heads=num_heads),
                mlp=MixtureOfExperts(
                    hidden_size=hidden_size, inner_size=inner_size, num_experts=num_experts,
                    experts_per_token=experts_per_token, renormalise=renormalise, balance=balance,
                ),
                dropout=dropout,
            )
            for _ in range(num_layers)
        )  # fmt: skip
        super().__init__(
            spec=spec, hidden_size=hidden_size, blocks=blocks, dropout=dropout, document_mask=document_mask,
            tie_head=tie_head,
        )  # fmt: skip
        self.rotary_size, self.rope_base = hidden_size // num_heads, rope_base
