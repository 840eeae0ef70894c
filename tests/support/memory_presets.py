"""Every memory layer that has a name, small: what blocks that take any `MemoryLayer` are tested with."""

from __future__ import annotations

from collections.abc import Callable

from clplat.architectures.associative_memory.lact import LaCT
from clplat.architectures.associative_memory.maps import MapOptions
from clplat.architectures.associative_memory.miras import Memora, Moneta, Yaad
from clplat.architectures.associative_memory.presets import (
    TTTMLP,
    Atlas,
    DeltaNet,
    GatedDeltaNet,
    LayerKind,
    LinearAttention,
    MemoryLayer,
    OmegaNet,
    TitansLMM,
    TTTLinear,
)
from clplat.architectures.associative_memory.rule import MemoryRule, NetworkOptions

PRESETS: dict[str, MemoryLayer] = {
    "linear-attention": LinearAttention(num_heads=2, chunk=2),
    "delta-net": DeltaNet(num_heads=2, chunk=2),
    "gated-delta-net": GatedDeltaNet(num_heads=2, chunk=2),
    "ttt-linear": TTTLinear(num_heads=2, chunk=2),
    "ttt-mlp": TTTMLP(num_heads=2, chunk=2, expand=2),
    "titans": TitansLMM(num_heads=2, chunk=2, expand=2),
    "titans-residual": TitansLMM(num_heads=2, chunk=2, expand=2, residual=True),
    "omega-net": OmegaNet(num_heads=2, chunk=2, window=3, expand=2, rank=3),
    "omega-net-unit": OmegaNet(num_heads=2, chunk=2, window=4, expand=2, feature="unit"),
    "atlas": Atlas(num_heads=2, chunk=2, window=3, expand=2, rank=3),
    "atlas-unit": Atlas(num_heads=2, chunk=2, window=3, expand=2, feature="unit"),
    "moneta": Moneta(num_heads=2, chunk=2, expand=2, gate_rank=3),
    "yaad": Yaad(num_heads=2, chunk=2, expand=2, gate_rank=3),
    "memora": Memora(num_heads=2, chunk=2, expand=2, gate_rank=3),
    "lact": LaCT(num_heads=2, chunk=2),
    "lact-muon": LaCT(num_heads=2, chunk=2, muon=True),
    "muon": MemoryLayer(num_heads=2, rule=MemoryRule(optimizer="muon", retention="decay", chunk=2)),
    "weight-norm": MemoryLayer(
        num_heads=2,
        rule=MemoryRule(memory=NetworkOptions(depth=2, expand=2), map=MapOptions(kind="norm"), window=3, chunk=2),
    ),
}  # fmt: skip


def taken_by(make: Callable[[MemoryLayer], LayerKind]) -> list[str]:
    """The names of those that a block takes, which `make` makes of one; others it refuses by its `layer`."""
    taken = []
    for name, layer in PRESETS.items():
        try:
            make(layer)
        except ValueError as error:
            assert ".layer: " in str(error) or ".read: 'soup'" in str(error), error
            continue
        taken.append(name)
    return taken
