"""A Transformer with latent attention and a shared expert beside the routed ones, in the form of DeepSeek-V2.

The rival "DeepSeek" of TRC² (arXiv:2602.22479): 8 routed and 1 shared expert in every layer. What is inferred of it,
and what DeepSeek's own models have besides: docs/rivals.md.
"""

from __future__ import annotations

from clplat.architectures.decoder import AttentionDecoder, Block, check_heads, check_language
from clplat.architectures.latent_attention import LatentAttention
from clplat.architectures.mixture_of_experts import MixtureOfExperts, expert_size
from clplat.architectures.option_checks import check_sizes
from clplat.streams.base import Spec


class DeepSeekTransformer(AttentionDecoder):
    """Latent attention and mixtures with shared experts: tokens (B, T) to logits (B, T, V)."""

    paper = "DeepSeek-AI 2024, DeepSeek-V2, arXiv:2405.04434; Dai et al. 2024, DeepSeekMoE, arXiv:2401.06066"
    fidelity = "mechanism"

    def __init__(
        self,
        *,
        spec: Spec,
        hidden_size: int = 256, num_layers: int = 4, num_heads: int = 4,
        latent_size: int | None = None, rotary_size: int | None = None,
        num_experts: int = 8, experts_per_token: int = 2, shared_experts: int = 1, inner_size: int | None = None,
        renormalise: bool = False, balance: float = 0.01, dropout: float = 0.0, rope_base: float = 10_000.0,
        document_mask: bool = True, tie_head: bool = True,
    ) -> None:  # fmt: skip
        """`latent_size` (default 4 head sizes) and `rotary_size` (default half a head size) are what is cached of a
        token, in DeepSeek-V2's own proportions (§2.1.4). `renormalise` is off as in DeepSeekMoE (eq. 3-5).
        `inner_size` of one expert is by default 8/3 of the hidden size, rounded up to a multiple of 256. The options
        of experts are those of `MixtureOfExperts`, the others those of `Transformer`."""
        check_language(type(self), spec)
        check_sizes(
            type(self).__name__, hidden_size=hidden_size, num_layers=num_layers, num_heads=num_heads,
            latent_size=latent_size,
        )  # fmt: skip
        check_heads(type(self), hidden_size, num_heads)
        latent_size, rotary_size = _cached_sizes(hidden_size // num_heads, latent_size, rotary_size)
        inner_size = expert_size(hidden_size) if inner_size is None else inner_size
        blocks = (
            Block(
                hidden_size=hidden_size,
                attention=LatentAttention(
                    hidden_size=hidden_size, num_heads=num_heads, latent_size=latent_size, rotary_size=rotary_size
                ),
                mlp=MixtureOfExperts(
                    hidden_size=hidden_size, inner_size=inner_size, num_experts=num_experts,
                    experts_per_token=experts_per_token, shared_experts=shared_experts, renormalise=renormalise,
                    balance=balance,
                ),
                dropout=dropout,
            )
            for _ in range(num_layers)
        )  # fmt: skip
        super().__init__(
            spec=spec, hidden_size=hidden_size, blocks=blocks, dropout=dropout, document_mask=document_mask,
            tie_head=tie_head,
        )  # fmt: skip
        self.rotary_size, self.rope_base = rotary_size, rope_base


def _cached_sizes(head_size: int, latent_size: int | None, rotary_size: int | None) -> tuple[int, int]:
    """Latent and rotary size, by default in the proportions of DeepSeek-V2."""
    latent_size = 4 * head_size if latent_size is None else latent_size
    rotary_size = 2 * (head_size // 4) if rotary_size is None else rotary_size
    if rotary_size < 2 or rotary_size % 2:
        raise ValueError(f"DeepSeekTransformer.rotary_size: {rotary_size} is not a positive even number")
    return latent_size, rotary_size
