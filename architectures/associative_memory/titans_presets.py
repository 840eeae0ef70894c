"""Titans' blocks of memory and attention by name, for the list of layers of a `MemoryTransformer`."""

from __future__ import annotations

from abc import ABC
from typing import ClassVar

from torch import nn

from clplat.architectures.associative_memory.caching import check_weights, check_whole
from clplat.architectures.associative_memory.context_memory import ContextMemory
from clplat.architectures.associative_memory.presets import LayerKind, MemoryLayer, TitansLMM
from clplat.architectures.associative_memory.windowed_memory import GatingMemory, LayeredMemory
from clplat.architectures.option_checks import check_at_least


class TitansBlock(LayerKind, ABC):
    """Base of the three."""

    def __init__(self, *, layer: MemoryLayer | None = None, num_heads: int = 4, persistent: int = 4) -> None:
        """`layer`: the memory, TitansLMM by default. `num_heads` of attention. `persistent` learned tokens before every
        text; their number is not in the paper."""
        self.layer = TitansLMM() if layer is None else layer
        self.num_heads, self.persistent = num_heads, persistent
        name = type(self).__name__
        if self.layer.projection.normaliser:
            raise ValueError(f"{name}.layer: a memory with a normaliser cannot be asked beside attention")
        check_at_least(self, 1, "num_heads")
        check_at_least(self, 0, "persistent")

    def _check_heads(self, hidden_size: int) -> None:
        if hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"{type(self).__name__}.num_heads: hidden_size ({hidden_size}) is no multiple of 2 * {self.num_heads}"
            )
        self.layer.build(hidden_size)


class WindowedTitans(TitansBlock, ABC):
    """Base of the two with window attention; `mixer` is the layer of each."""

    mixer: ClassVar[type[GatingMemory | LayeredMemory]]

    def __init__(
        self, *, layer: MemoryLayer | None = None, num_heads: int = 4, persistent: int = 4, window: int = 64
    ) -> None:
        """`window`: tokens that attention sees, the asking one among them. The rest: `TitansBlock`."""
        super().__init__(layer=layer, num_heads=num_heads, persistent=persistent)
        self.window = window
        if window < 1:
            raise ValueError(f"{type(self).__name__}.window: must be at least 1, got {window}")

    def build(self, hidden_size: int) -> nn.Module:
        """The layer; ValueError where heads do not divide the stream."""
        self._check_heads(hidden_size)
        return self.mixer(
            hidden_size=hidden_size, layer=self.layer, num_heads=self.num_heads, window=self.window,
            persistent=self.persistent,
        )  # fmt: skip


class TitansMAG(WindowedTitans):
    """Memory as a gate of window attention."""

    paper = "Behrouz et al. 2024, arXiv:2501.00663"
    mixer = GatingMemory


class TitansMAL(WindowedTitans):
    """Memory as a layer before window attention."""

    paper = "Behrouz et al. 2024, arXiv:2501.00663"
    mixer = LayeredMemory


class TitansMAC(TitansBlock):
    """Memory as context of segment attention."""

    paper = "Behrouz et al. 2024, arXiv:2501.00663"

    def __init__(
        self, *, layer: MemoryLayer | None = None, num_heads: int = 4, persistent: int = 4, segment: int = 64
    ) -> None:
        """`segment`: tokens that attention sees at most, of the text. The rest: `TitansBlock`."""
        super().__init__(layer=layer, num_heads=num_heads, persistent=persistent)
        self.segment = segment
        if segment < 1:
            raise ValueError(f"TitansMAC.segment: must be at least 1, got {segment}")
        check_weights("TitansMAC", self.layer)
        check_whole("TitansMAC.segment", segment, self.layer)

    def build(self, hidden_size: int) -> nn.Module:
        """The layer; ValueError where heads do not divide the stream."""
        self._check_heads(hidden_size)
        return ContextMemory(
            hidden_size=hidden_size, layer=self.layer, num_heads=self.num_heads, segment=self.segment,
            persistent=self.persistent,
        )  # fmt: skip
