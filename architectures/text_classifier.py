"""A Transformer that reads a whole text and gives it a class: the text counterpart of the image classifiers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from clplat.architectures.base import Architecture, Output, State
from clplat.architectures.layers import rotary_angles, trimmed
from clplat.architectures.option_checks import check_dropout, check_sizes
from clplat.architectures.transformer import dense_block
from clplat.streams.base import Spec
from clplat.streams.batch import Batch


class TextClassifier(Architecture):
    """Transformer encoder with mean pooling and a linear head: token rows (B, T) to logits (B, C)."""

    causal = False
    paper = "Vaswani et al. 2017; blocks of Touvron et al. 2023, arXiv:2302.13971"

    def __init__(
        self,
        *,
        spec: Spec,
        hidden_size: int = 128,
        num_layers: int = 2,
        num_heads: int = 4,
        mlp_ratio: float = 8 / 3,
        dropout: float = 0.0,
        rope_base: float = 10_000.0,
        attention: Literal["bidirectional", "causal"] = "bidirectional",
    ) -> None:
        """`attention`: whether a token sees the whole text or what stands before it. Padding is never seen, and does
        not count in the mean, so that logits do not depend on the width of a batch. The other options are those of
        `Transformer`."""
        super().__init__()
        if spec.vocab_size is None or spec.pad_token is None:
            raise ValueError("TextClassifier: reads padded token rows with a class each, as `LabelledTextStream` gives "
                             "them; use Transformer for language and MLP for images")  # fmt: skip
        name = type(self).__name__
        check_sizes(name, hidden_size=hidden_size, num_layers=num_layers, num_heads=num_heads, mlp_ratio=mlp_ratio)
        check_dropout(name, dropout)
        if hidden_size % (2 * num_heads):
            raise ValueError(
                f"TextClassifier.hidden_size: {hidden_size} is not a multiple of 2 * num_heads ({2 * num_heads})"
            )
        self.row_length, self.pad_token, self.attention = spec.input_shape[0], spec.pad_token, attention
        self.head_size, self.rope_base = hidden_size // num_heads, rope_base
        self.embedding = nn.Embedding(spec.vocab_size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            dense_block(
                hidden_size=hidden_size, num_heads=num_heads, num_kv_heads=num_heads, mlp_ratio=mlp_ratio,
                dropout=dropout,
            )
            for _ in range(num_layers)
        )  # fmt: skip
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.head = nn.Linear(hidden_size, spec.num_outputs)

    def forward(self, batch: Batch, state: State = None, return_hidden: str | None = None) -> Output:
        """Logits (B, C); `hidden` (B, H) is the mean over a row's tokens, the input of the head."""
        tokens = trimmed(batch.inputs, self.pad_token)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        # The first place always counts: attention and mean over nothing would be undefined for an empty text.
        real = (tokens != self.pad_token) | (places == 0)
        angles = rotary_angles(places, self.head_size, self.rope_base)
        mask, x_BTC = self._mask(real), self.dropout(self.embedding(tokens))
        for block in self.blocks:
            x_BTC, _ = block(x_BTC, angles, mask)
        kept = real.unsqueeze(-1)
        hidden = (self.norm(x_BTC) * kept).sum(1) / kept.sum(1)
        return Output(logits=self.head(hidden), hidden=hidden)

    def flops_per_row(self) -> float:
        """Forward operations for a full row: 2 per weight of the blocks and token, 2 per weight of the head, and 4·C
        in each layer for every pair of tokens that attention compares and mixes. An accelerator reads
        padding as well, and it is counted."""
        tokens, width = self.row_length, self.embedding.embedding_dim
        pairs = tokens * tokens if self.attention == "bidirectional" else tokens * (tokens + 1) // 2
        weights = sum(p.numel() for p in self.blocks.parameters() if p.ndim == 2)
        return 2.0 * (tokens * weights + self.head.weight.numel()) + 4.0 * len(self.blocks) * width * pairs

    def _mask(self, real_BT: Tensor) -> Tensor:
        """(B, 1, T, T), or (B, 1, 1, T) where all tokens see the same: True where a token may look."""
        seen = real_BT[:, None, None, :]
        if self.attention == "bidirectional":
            return seen
        return seen & torch.ones_like(real_BT[0]).expand(real_BT.shape[1], -1).tril()
