"""Maps from what a memory accumulates to its weights: mirror maps, and weights kept at their norm.

With a map, a memory's state is A, on which steps and decay act linearly, and its weights are W = map(A). What a map
does is not linear, so that it acts where a chunk ends alone (Behrouz et al. 2025, Miras, arXiv:2504.13173, lets it act
at one token of a chunk, too): behind a chunk's last token W = map(A) anew, before that W is linear in A by what held at
the chunk's start. With `chunk: 1` this is the paper's rule for every token.

Shapes: see `state.py`; A and W are (B, H, I, O), a slice is the inputs of one output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clplat.architectures.associative_memory.state import Layers
from clplat.architectures.option_checks import check_at_least, check_choices, check_finite

MapKind = Literal["none", "lq", "kl", "norm"]
Signs = Literal["paired", "positive"]

SMALLEST_SUM = 1e-12
"""Added to a slice's sum of squares: its norm has a gradient where it vanishes."""


@dataclass(frozen=True, kw_only=True)
class MapOptions:
    """From A to W.

    none W = A · lq Moneta's W = A / ‖A‖_q^(q−2) of a whole layer, with q = `power`, and `smoothing` under the norm's
    root (INFERRED): weights grow as A shrinks where q > 3, and without it would do so without end · kl Memora's: each
    slice a softmax of A times `mass`, by default the root of its inputs' number (INFERRED). `signs` paired (INFERRED)
    gives W = W⁺ − W⁻, of which A and −A are the logarithms: both are positive and sum to the mass together; positive is
    the printed rule, with no weight below 0 · norm (INFERRED, for LaCT) scales each slice behind a chunk to the norm
    that it began with, and goes on from there.
    """

    group: ClassVar[str] = "map"

    kind: MapKind = "none"
    power: float = 4.0
    smoothing: float = 1e-4
    signs: Signs = "paired"
    mass: float | None = None

    def __post_init__(self) -> None:
        check_finite(self)
        check_choices(self, kind=MapKind, signs=Signs)
        check_at_least(self, 2, "power")
        check_at_least(self, 0, "smoothing")
        if self.mass is not None and self.mass <= 0:
            raise ValueError(f"map.mass: must be above 0, got {self.mass}")

    @property
    def lags(self) -> bool:
        """Whether weights inside a chunk are what they were at its start, because no factor of A gives them."""
        return self.kind == "kl"

    def step_scale(self, inputs: int) -> float:
        """How many times smaller a step is in W than in A, where all weights of a slice are alike."""
        return inputs / (self.mass or math.sqrt(inputs)) if self.kind == "kl" else 1.0

    def weights(self, state: Layers) -> Layers:
        """W of A, of every layer."""
        if self.kind == "lq":
            return tuple(A / self._size(A) for A in state)
        return tuple(self._kl(A) for A in state) if self.kind == "kl" else state

    def inside(self, start: Layers) -> tuple[Tensor | float, ...] | None:
        """Factors of A that give the weights of every layer inside a chunk, of A at its start; None where these are
        what they were at the start, as a softmax has no such factor."""
        if self.kind == "lq":
            return tuple(1 / self._size(A) for A in start)
        return None if self.lags else (1.0,) * len(start)

    def settled(self, state: Layers, norms: Layers) -> Layers:
        """A from which the next chunk goes on; `norms` (H, 1, O) are those of the slices at first."""
        if self.kind != "norm":
            return state
        return tuple(A * (norm / _norm(A)) for A, norm in zip(state, norms, strict=True))

    def norms(self, first: Layers) -> Layers:
        """(H, 1, O) of each layer's first weights (H, I, O), where the map asks for them."""
        return tuple(map(_norm, first)) if self.kind == "norm" else ()

    def _size(self, A: Tensor) -> Tensor:
        """‖A‖_q^(q−2) of each head, (B, H, 1, 1)."""
        total = A.abs().pow(self.power).sum((-2, -1), keepdim=True)
        return (total + self.smoothing).pow(1 - 2 / self.power)

    def _kl(self, A: Tensor) -> Tensor:
        mass = math.sqrt(A.shape[-2]) if self.mass is None else self.mass
        if self.signs == "positive":
            return mass * A.softmax(-2)
        plus, minus = torch.cat([A, -A], -2).softmax(-2).chunk(2, -2)
        return mass * (plus - minus)


def _norm(A: Tensor) -> Tensor:
    return (A.square().sum(-2, keepdim=True) + SMALLEST_SUM).sqrt()
