"""Hope: self-modifying memories, or attention, each followed by the levels of a continuum memory.

    class_path: Hope
    init_args:
      hidden_size: 256
      num_layers: 4
      levels: [{period: 1}, {period: 64, clock: token}]

What the paper leaves open, and what is decided here: docs/hope.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from clplat.architectures.associative_memory.presets import LayerKind
from clplat.architectures.continuum_memory.options import Carry, CMSLevel, ContinuumMemory
from clplat.architectures.hope.presets import SelfModifyingTitans
from clplat.architectures.memory_transformer import AttentionLayer, MemoryTransformer
from clplat.streams.base import Spec

LEVELS = (CMSLevel(period=1), CMSLevel(period=64, clock="token"))


class Hope(MemoryTransformer):
    """Self-modifying Titans followed by a continuum memory: tokens (B, T) to logits (B, T, V)."""

    paper = "Behrouz et al. 2025, arXiv:2512.24695"
    fidelity = "interpretation"

    def __init__(
        self,
        *,
        spec: Spec,
        hidden_size: int = 256,
        num_layers: int = 4,
        layer: LayerKind | None = None,
        levels: Sequence[CMSLevel] = LEVELS,
        carry: Carry = "sequential",
        dropout: float = 0.0,
        document_mask: bool = True,
        tie_head: bool = True,
        initial_std: float = 0.02,
    ) -> None:
        """`layer`: what mixes tokens in each of `num_layers` blocks, by default `SelfModifyingTitans`. `levels` and
        `carry` of the continuum memory behind it; levels at the clock of training steps with a period above 1 need
        `LevelClock`. The rest is as in `MemoryTransformer`."""
        super().__init__(
            spec=spec, hidden_size=hidden_size, layers=[SelfModifyingTitans() if layer is None else layer],
            repeat=num_layers, feed_forward=ContinuumMemory(levels=levels, carry=carry), dropout=dropout,
            document_mask=document_mask, tie_head=tie_head, initial_std=initial_std,
        )  # fmt: skip


class HopeAttention(Hope):
    """Softmax attention followed by a continuum memory (Hope-Attention)."""

    paper = "Behrouz et al. 2025, arXiv:2512.24695"
    fidelity = "interpretation"

    def __init__(
        self,
        *,
        spec: Spec,
        hidden_size: int = 256,
        num_layers: int = 4,
        num_heads: int = 4,
        levels: Sequence[CMSLevel] = LEVELS,
        carry: Carry = "sequential",
        dropout: float = 0.0,
        document_mask: bool = True,
        tie_head: bool = True,
        initial_std: float = 0.02,
    ) -> None:
        """`num_heads` of attention; the rest is as in `Hope`."""
        super().__init__(
            spec=spec, hidden_size=hidden_size, num_layers=num_layers, layer=AttentionLayer(num_heads=num_heads),
            levels=levels, carry=carry, dropout=dropout, document_mask=document_mask, tie_head=tie_head,
            initial_std=initial_std,
        )  # fmt: skip
