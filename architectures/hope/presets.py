"""Hope's layers by name, for the list of layers of a `MemoryTransformer`: docs/hope.md."""

from __future__ import annotations

from collections.abc import Sequence

from clplat.architectures.associative_memory.presets import LayerKind, in_words_of
from clplat.architectures.associative_memory.rule import Delta, NetworkOptions, Target
from clplat.architectures.hope.mixer import SelfModifyingMixer
from clplat.architectures.hope.options import Generated, Read, SelfModifyingOptions, Source
from clplat.architectures.option_checks import check_at_least


class SelfModifyingLayer(LayerKind):
    """Self-modifying memories with every option."""

    def __init__(self, *, options: SelfModifyingOptions | None = None, num_heads: int = 4) -> None:
        """`options`: what the memories are and make. Each head has memories of its own."""
        self.options = SelfModifyingOptions() if options is None else options
        self.num_heads = num_heads
        check_at_least(self, 1, "num_heads")

    def build(self, hidden_size: int) -> SelfModifyingMixer:
        """The layer; ValueError where heads do not divide the stream."""
        try:
            return SelfModifyingMixer(hidden_size=hidden_size, num_heads=self.num_heads, options=self.options)
        except ValueError as error:
            raise in_words_of(self, error) from error


class SelfModifyingTitans(SelfModifyingLayer):
    """The first half of Hope: memories that make keys, values, step sizes, decay and their own targets."""

    paper = "Behrouz et al. 2025, arXiv:2512.24695"

    def __init__(
        self, *, num_heads: int = 4, conv_width: int = 4, chunk: int = 16, generator_chunk: int = 16, depth: int = 2,
        expand: int = 4, delta: Delta = "double", momentum: bool = True, decay: bool = True,
        generated: Sequence[Generated] = ("key", "value", "rate", "decay"), read: Read = "before",
        max_rate: float | None = None, target: Target = "self", inputs: Source = "own", compiled: bool = False,
    ) -> None:  # fmt: skip
        """`depth` of every memory, 1 for matrices (which have no residual). The rest as in `SelfModifyingOptions`."""
        super().__init__(
            options=SelfModifyingOptions(
                network=NetworkOptions(depth=depth, expand=expand, residual=depth > 1), generated=generated,
                delta=delta, momentum=momentum, decay=decay, chunk=chunk, generator_chunk=generator_chunk, read=read,
                max_rate=max_rate, target=target, inputs=inputs, compiled=compiled, conv_width=conv_width,
            ),
            num_heads=num_heads,
        )  # fmt: skip
