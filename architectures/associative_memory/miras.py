"""The three memories of Miras by name: other losses than squared errors, other ways to keep than decay.

All are x + LN(W₁ σ(W₂ x)) with GELU, four times as wide inside, under gates of channels from a narrow projection
(Behrouz et al. 2025, arXiv:2504.13173). What the paper leaves open and what differs: docs/memories.md.
"""

from __future__ import annotations

from typing import Literal

from clplat.architectures.associative_memory.maps import MapOptions, Signs
from clplat.architectures.associative_memory.mixer import ProjectionOptions
from clplat.architectures.associative_memory.presets import MemoryLayer
from clplat.architectures.associative_memory.rule import BiasOptions, HuberForm, MemoryRule, NetworkOptions

Gates = Literal["decay", "channel"]


class Moneta(MemoryLayer):
    """Moneta: ℓ_p errors, and weights that are accumulated gradients over a power of their ℓ_q norm."""

    paper = "Behrouz et al. 2025, arXiv:2504.13173"

    def __init__(
        self, *, num_heads: int = 4, conv_width: int = 4, chunk: int = 16, expand: int = 4, p: float = 3.0,
        q: float = 4.0, retention: Gates = "channel", gate_rank: int | None = 32, max_rate: float | None = None,
    ) -> None:  # fmt: skip
        """`p` and `q` are the paper's best. `retention` decay is one gate a head, which takes far less memory than one
        for each channel. `max_rate` defaults to 1 / (16 chunk): errors are squared here, and the larger what is
        accumulated, the smaller the weights and the larger their gradients under a norm. `gate_rank`: see
        `ProjectionOptions`."""
        super().__init__(
            rule=MemoryRule(
                memory=_network(expand), bias=BiasOptions(kind="lp", power=p), retention=retention,
                map=MapOptions(kind="lq", power=q), chunk=chunk,
            ),
            projection=ProjectionOptions(
                conv_width=conv_width, gate_rank=gate_rank, max_rate=1 / (16 * chunk) if max_rate is None else max_rate
            ),
            num_heads=num_heads,
        )  # fmt: skip


class Yaad(MemoryLayer):
    """Yaad: squared errors up to a threshold that each token sets, and beyond it steps of a size that no error sets."""

    paper = "Behrouz et al. 2025, arXiv:2504.13173"

    def __init__(
        self, *, num_heads: int = 4, conv_width: int = 4, chunk: int = 16, expand: int = 4, huber: HuberForm = "switch",
        retention: Gates = "channel", gate_rank: int | None = 32, max_rate: float | None = None,
    ) -> None:  # fmt: skip
        """`huber`: the paper's rule, or one of the losses that it derives it from (`BiasOptions`)."""
        super().__init__(
            rule=MemoryRule(
                memory=_network(expand), bias=BiasOptions(kind="huber", huber=huber), retention=retention, chunk=chunk
            ),
            projection=ProjectionOptions(conv_width=conv_width, gate_rank=gate_rank, max_rate=max_rate),
            num_heads=num_heads,
        )


class Memora(MemoryLayer):
    """Memora: weights of each output are shares of a fixed mass, moved by squared errors through a softmax."""

    paper = "Behrouz et al. 2025, arXiv:2504.13173"

    def __init__(
        self, *, num_heads: int = 4, conv_width: int = 4, chunk: int = 16, expand: int = 4, signs: Signs = "paired",
        mass: float | None = None, retention: Gates = "channel", gate_rank: int | None = 32,
        max_rate: float | None = None,
    ) -> None:  # fmt: skip
        """`signs` and `mass` of the weights: see `MapOptions`; positive is the printed rule."""
        super().__init__(
            rule=MemoryRule(
                memory=_network(expand), retention=retention, map=MapOptions(kind="kl", signs=signs, mass=mass),
                chunk=chunk,
            ),
            projection=ProjectionOptions(conv_width=conv_width, gate_rank=gate_rank, max_rate=max_rate),
            num_heads=num_heads,
        )  # fmt: skip


def _network(expand: int) -> NetworkOptions:
    return NetworkOptions(depth=2, expand=expand, residual=True, norm=True)
