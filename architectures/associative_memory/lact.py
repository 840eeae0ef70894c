"""LaCT by name: a SwiGLU that is written once a large chunk, and read before it is written."""

from __future__ import annotations

from clplat.architectures.associative_memory.maps import MapOptions
from clplat.architectures.associative_memory.mixer import OutputGate, ProjectionOptions
from clplat.architectures.associative_memory.presets import MemoryLayer
from clplat.architectures.associative_memory.rule import BiasOptions, MemoryRule, NetworkOptions


class LaCT(MemoryLayer):
    """Large-chunk test-time training: what it knows of the open chunk is nothing, so that a layer of attention has to
    stand beside it."""

    paper = "Zhang et al. 2025, arXiv:2505.23884"

    def __init__(
        self, *, num_heads: int = 4, conv_width: int = 4, chunk: int = 2048, expand: int = 2, weight_norm: bool = True,
        muon: bool = False, output_gate: OutputGate = "none", max_rate: float | None = None,
    ) -> None:  # fmt: skip
        """`chunk`: the paper's are of 2,048 tokens and more; a row no longer than one reads the memory as it began.
        `weight_norm` scales weights behind each chunk to the norm that they began with (INFERRED in its details).
        `muon`: each chunk's step is made orthogonal. `max_rate`: see `ProjectionOptions`."""
        super().__init__(
            rule=MemoryRule(
                memory=NetworkOptions(kind="swiglu", depth=2, expand=expand, activation="silu"),
                bias=BiasOptions(kind="dot"), map=MapOptions(kind="norm" if weight_norm else "none"), chunk=chunk,
                read="chunk_start", optimizer="muon" if muon else "gd",
            ),
            projection=ProjectionOptions(conv_width=conv_width, output_gate=output_gate, max_rate=max_rate),
            num_heads=num_heads,
        )  # fmt: skip
