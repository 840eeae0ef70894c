"""TRC², first version (25 February 2026): a causal form of what was published.

The published equations let a token see tokens that it has to predict (`chunks`); the perplexity of 2.0 on C4 that is
reported for them is no target. Here a token sees the past alone.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from clplat.architectures.base import Architecture, Output, State
from clplat.architectures.trc2_v1.block import V1Block
from clplat.architectures.trc2_v1.options import V1Sizes, V1Switches
from clplat.streams.base import Spec
from clplat.streams.batch import Batch


class TRC2V1(Architecture):
    """Chunk-routed state units with a memory of learned patterns: tokens (B, T) to logits (B, T, V)."""

    causal = True
    paper = "Thalamically Routed Cortical Columns, arXiv:2602.22479v1"
    fidelity = "mechanism"

    def __init__(
        self,
        *,
        spec: Spec,
        hidden_size: int = 256,
        num_layers: int = 4,
        sizes: V1Sizes | None = None,
        switches: V1Switches | None = None,
        dropout: float = 0.1,
        max_positions: int | None = None,
        balance: float = 0.01,
        prediction: float = 0.1,
        causal: bool = True,
    ) -> None:
        """`max_positions` of the learned table of positions defaults to twice the rows of training. `balance` and
        `prediction` are the coefficients of their losses, summed over blocks. `causal: false`, which is how the paper
        writes it, is refused. Documents of one row are read as one text.
        """
        super().__init__()
        _check(spec, num_layers, causal)
        self.row_length, self.prediction = spec.input_shape[0], prediction
        self.embedding = nn.Embedding(spec.num_outputs, hidden_size)
        self.positions = nn.Parameter(torch.empty(max_positions or 2 * self.row_length, hidden_size))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            V1Block(
                hidden_size=hidden_size,
                sizes=sizes or V1Sizes(),
                switches=switches or V1Switches(),
                dropout=dropout,
                balance=balance,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)
        for block in self.blocks:
            assert isinstance(block, V1Block)
            nn.init.normal_(block.mlp.gate_up.weight, std=0.02)
            nn.init.normal_(block.mlp.down.weight, std=0.02 / math.sqrt(2 * len(self.blocks)))

    def forward(self, batch: Batch, state: State = None, return_hidden: str | None = None) -> Output:
        """Logits (B, T, V); `hidden` (B, T, C) is the input of the head."""
        length = batch.inputs.shape[1]
        if length > len(self.positions):
            raise ValueError(
                f"TRC2V1.max_positions: a row of {length} tokens is longer than the table of {len(self.positions)}"
            )
        x_BTC = self.dropout(self.embedding(batch.inputs) + self.positions[:length])
        losses = {"prediction": x_BTC.new_zeros(()), "route": x_BTC.new_zeros(())}
        for block in self.blocks:
            x_BTC, found = block(x_BTC)
            for name, value in found.items():
                losses[name] = losses[name] + value
        losses["prediction"] = self.prediction * losses["prediction"]
        hidden = self.norm(x_BTC)
        return Output(logits=F.linear(hidden, self.embedding.weight), losses=losses, hidden=hidden)

    def flops_per_row(self) -> float:
        """Forward operations for a row of T tokens: 2 per weight and token; all units are computed, then chosen from.
        What is done once a chunk is counted as if it were done for every token."""
        weights = sum(p.numel() for name, p in self.named_parameters() if p.ndim > 1 and name != "positions")
        return 2.0 * self.row_length * weights


def _with_published_leaks(model: TRC2V1) -> TRC2V1:
    """The same model with the equations as published, for the test that shows what they are worth."""
    for block in model.blocks:
        assert isinstance(block, V1Block)
        block.causal = False
    return model


def _check(spec: Spec, num_layers: int, causal: bool) -> None:
    if spec.kind != "language":
        raise ValueError(f"TRC2V1: predicts the next token of rows, but the stream is of kind {spec.kind!r}")
    if not causal:
        raise ValueError(
            "TRC2V1.causal: false would let every token see the ones it has to predict, as the published equations "
            "do, and its losses would mean nothing; leave it true"
        )
    if num_layers < 1:
        raise ValueError(f"TRC2V1.num_layers: must be at least 1, got {num_layers}")
