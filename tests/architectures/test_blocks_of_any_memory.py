"""Blocks that take any memory layer, over every one that has a name: decoding is the whole pass, token by token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from memory_presets import PRESETS, taken_by
from token_rows import assert_reads_documents_alone, assert_reads_in_parts, tokens

from clplat.architectures.associative_memory.caching import MemoryCaching
from clplat.architectures.associative_memory.presets import LayerKind, MemoryLayer
from clplat.architectures.associative_memory.titans_presets import TitansMAC, TitansMAG, TitansMAL
from clplat.architectures.associative_memory.tnt import TNT
from clplat.architectures.memory_transformer import MemoryTransformer
from clplat.streams.base import Spec

TEXT = Spec(kind="language", input_shape=(14,), num_outputs=23)
LENGTH = 14
"""Four segments, of which the last is open."""

BLOCKS: dict[str, Callable[[MemoryLayer], LayerKind]] = {
    "cached-residual": lambda layer: MemoryCaching(layer=layer, segment=4, read="residual"),
    "cached-gated-warm": lambda layer: MemoryCaching(layer=layer, segment=4, read="gated", start="warm"),
    "cached-sparse": lambda layer: MemoryCaching(layer=layer, segment=4, read="sparse", top=1),
    "cached-soup": lambda layer: MemoryCaching(layer=layer, segment=4, read="soup"),
    "tnt": lambda layer: TNT(layer=layer, global_chunk=6, local_chunks=[2, 4], shard=4),
    "mac": lambda layer: TitansMAC(layer=layer, num_heads=2, persistent=2, segment=4),
    "mag": lambda layer: TitansMAG(layer=layer, num_heads=2, persistent=3, window=4),
    "mal": lambda layer: TitansMAL(layer=layer, num_heads=2, persistent=2, window=3),
}
CASES = [(block, name) for block, make in BLOCKS.items() for name in taken_by(make)]


def model(kind: LayerKind) -> MemoryTransformer:
    """In float64, with parameters that are none of those it is born with."""
    torch.manual_seed(0)
    made = MemoryTransformer(spec=TEXT, hidden_size=8, layers=[kind], mlp_ratio=2.0).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def test_every_memory_layer_with_a_name_is_among_them() -> None:
    named = {kind for kind in MemoryLayer.__subclasses__() if kind.__module__.startswith("clplat.")}
    assert named <= {type(layer) for layer in PRESETS.values()}


@pytest.mark.parametrize(("block", "name"), CASES)
def test_token_by_token_is_the_whole_pass(block: str, name: str) -> None:
    assert_reads_in_parts(model(BLOCKS[block](PRESETS[name])), tokens(length=LENGTH), [1] * LENGTH, atol=1e-9)


@pytest.mark.parametrize(("block", "name"), [case for case in CASES if case[0] in ("cached-gated-warm", "tnt", "mac")])
def test_calls_of_any_length_are_the_whole_pass(block: str, name: str) -> None:
    assert_reads_in_parts(model(BLOCKS[block](PRESETS[name])), tokens(length=LENGTH), [5, 1, 1, 6, 1], atol=1e-9)


@pytest.mark.parametrize(("block", "name"), [case for case in CASES if case[0] in ("mag", "cached-soup")])
def test_a_packed_document_is_read_as_if_it_stood_alone(block: str, name: str) -> None:
    made = model(BLOCKS[block](PRESETS[name]))
    assert_reads_documents_alone(made, tokens(length=LENGTH), [[4, 1, 9], [14]], atol=1e-9)
