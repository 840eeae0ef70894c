"""Sizes and switches of the first version; all switches are booleans of the paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from clplat.architectures.option_checks import check_at_least, check_choices

Pooling = Literal["first", "mean"]


@dataclass(frozen=True, kw_only=True)
class V1Switches:
    """`topology`: a prior by which units lie in a plane. `ei_gates`: excitation, inhibition and disinhibition of units.
    `skip` past a unit. `modulation` of routing, prediction and gain by statistics of the past. `predictive` coding:
    what was predicted is taken off. `memory` of learned patterns (Hopfield). `gated_readout` of units by that memory.
    `refinement`: a second routing that knows what the chunk before gave. `corrector`: a low-rank fast path."""

    group: ClassVar[str] = "switches"

    topology: bool = True
    ei_gates: bool = True
    skip: bool = True
    modulation: bool = True
    predictive: bool = True
    memory: bool = True
    gated_readout: bool = True
    refinement: bool = True
    corrector: bool = True

    def __post_init__(self) -> None:
        if self.gated_readout and not self.memory:
            raise ValueError(
                "switches.gated_readout: is opened by the memory; set memory: true, or gated_readout: false"
            )


@dataclass(frozen=True, kw_only=True)
class V1Sizes:
    """`units` M with `state_size` n each, of which every chunk of `chunk` tokens uses `units_per_chunk`; `kernel` of
    all convolutions; `patterns` of the memory; `rank` of the corrector. `pooling`: what of a chunk stands for it in
    routing, its first token or a mean."""

    group: ClassVar[str] = "sizes"

    units: int = 8
    units_per_chunk: int = 2
    state_size: int = 32
    chunk: int = 16
    kernel: int = 4
    patterns: int = 64
    rank: int = 16
    pooling: Pooling = "first"

    def __post_init__(self) -> None:
        check_choices(self, pooling=Pooling)
        check_at_least(self, 1, "units", "units_per_chunk", "state_size", "chunk", "kernel", "patterns", "rank")
        if self.units_per_chunk > self.units:
            raise ValueError(f"sizes.units_per_chunk: {self.units_per_chunk} exceeds units ({self.units})")
