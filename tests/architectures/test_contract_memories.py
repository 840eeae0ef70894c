"""Models of test-time memories hold the contract of all architectures."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from delta_steps import assert_dgd_steps

from clplat.architectures.associative_memory.caching import MemoryCaching
from clplat.architectures.associative_memory.lact import LaCT
from clplat.architectures.associative_memory.miras import Memora, Moneta, Yaad
from clplat.architectures.associative_memory.mixer import ProjectionOptions
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
from clplat.architectures.associative_memory.rule import BiasOptions, MemoryRule, NetworkOptions
from clplat.architectures.associative_memory.titans_presets import TitansMAC, TitansMAG, TitansMAL
from clplat.architectures.associative_memory.tnt import TNT
from clplat.architectures.continuum_memory.options import CMSLevel, ContinuumMemory
from clplat.architectures.contract import CHECKS
from clplat.architectures.memory_transformer import AttentionLayer, MemoryTransformer
from clplat.architectures.probing import Contract
from clplat.streams.base import Spec

TEXT = Spec(kind="language", input_shape=(12,), num_outputs=23)
CHANNELS = MemoryLayer(
    rule=MemoryRule(
        memory=NetworkOptions(depth=2, expand=2), bias=BiasOptions(kind="huber"), retention="channel",
        optimizer="momentum", chunk=4,
    ),
    projection=ProjectionOptions(damped=True), num_heads=2,
)  # fmt: skip
TITANS = TitansLMM(num_heads=2, chunk=2, expand=2)

LAYERS: dict[str, list[LayerKind]] = {
    "linear-attention": [LinearAttention(num_heads=2, chunk=4)],
    "delta-net": [DeltaNet(num_heads=2, chunk=4)],
    "gated-delta-net": [GatedDeltaNet(num_heads=2, chunk=4)],
    "ttt-linear": [TTTLinear(num_heads=2, chunk=4)],
    "ttt-mlp-and-attention": [TTTMLP(num_heads=2, chunk=5, expand=2), AttentionLayer(num_heads=4, num_kv_heads=2)],
    "titans": [TitansLMM(num_heads=2, chunk=4, expand=2)],
    "titans-matrix-behind-attention": [AttentionLayer(), TitansLMM(chunk=4, depth=1, residual=False)],
    "moneta": [Moneta(num_heads=2, chunk=4, expand=2, gate_rank=3)],
    "yaad": [Yaad(num_heads=2, chunk=4, expand=2, gate_rank=3)],
    "memora": [Memora(num_heads=2, chunk=4, expand=2, gate_rank=3)],
    "lact-and-attention": [LaCT(num_heads=2, chunk=4), AttentionLayer(num_heads=2)],
    "lact-muon": [LaCT(num_heads=2, chunk=4, muon=True), AttentionLayer(num_heads=2)],
    "channels-and-huber": [CHANNELS],
    "omega-net": [OmegaNet(num_heads=2, chunk=4, window=6, expand=2, rank=8)],
    "atlas": [Atlas(num_heads=2, chunk=4, window=3, expand=2, rank=8)],
    "atlas-of-exponentials": [Atlas(num_heads=2, chunk=3, window=1, depth=1, feature="taylor", rank=None)],
    "cached-soup": [MemoryCaching(layer=TITANS, segment=4, read="soup", start="warm")],
    "cached-best": [MemoryCaching(layer=GatedDeltaNet(num_heads=2), segment=3, read="sparse", top=1)],
    "tnt": [TNT(layer=TITANS, global_chunk=6, local_chunks=[2, 4], shard=4, later={1: [1, 2]})],
    "mac": [TitansMAC(layer=TITANS, num_heads=2, persistent=2, segment=4)],
    "mag": [TitansMAG(layer=TITANS, num_heads=2, persistent=3, window=5)],
    "mal": [TitansMAL(layer=TITANS, num_heads=2, persistent=2, window=4)],
}


def factory(layers: list[LayerKind]) -> Callable[[Spec], MemoryTransformer]:
    return lambda spec: MemoryTransformer(spec=spec, hidden_size=16, layers=layers, mlp_ratio=2.0, dropout=0.2)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", LAYERS)
def test_contract(name: str, check: Callable[[Contract], None]) -> None:
    check(Contract(factory=factory(LAYERS[name]), spec=TEXT))


@pytest.mark.parametrize("name", LAYERS)
def test_delta_gradient_descent_sees_the_inputs_of_every_linear_layer(name: str) -> None:
    assert_dgd_steps(Contract(factory=factory(LAYERS[name]), spec=TEXT))


CONTINUA: dict[str, ContinuumMemory] = {
    "sequential": ContinuumMemory(levels=[CMSLevel(), CMSLevel(period=5, clock="token")]),
    "independent": ContinuumMemory(
        levels=[CMSLevel(period=3, clock="token", reduction="mean"), CMSLevel(period=4)], carry="independent"
    ),
    "nested": ContinuumMemory(
        levels=[CMSLevel(), CMSLevel(period=6, clock="token"), CMSLevel(period=2, clock="token")], carry="nested"
    ),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", CONTINUA)
def test_contract_with_a_continuum_memory(name: str, check: Callable[[Contract], None]) -> None:
    layers = [AttentionLayer(num_heads=2), TitansLMM(num_heads=2, chunk=4, expand=2)]

    def build(spec: Spec) -> MemoryTransformer:
        return MemoryTransformer(spec=spec, hidden_size=16, layers=layers, dropout=0.2, feed_forward=CONTINUA[name])

    check(Contract(factory=build, spec=TEXT))
