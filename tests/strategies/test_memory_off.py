"""A reading without memory: a view of models that have one, refused for others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from clplat.architectures.associative_memory.presets import TitansLMM
from clplat.architectures.memory_transformer import AttentionLayer, MemoryTransformer
from clplat.architectures.transformer import Transformer
from clplat.strategies.memory_off import MemoryOff
from clplat.streams.base import Spec
from clplat.streams.batch import Batch

TEXT = Spec(kind="language", input_shape=(8,), num_outputs=23)


def test_within_the_view_no_memory_writes_and_behind_it_all_do() -> None:
    torch.manual_seed(0)
    model = MemoryTransformer(spec=TEXT, hidden_size=16, layers=[TitansLMM(chunk=4)], mlp_ratio=2.0).eval()
    rows = torch.randint(23, (2, 8))
    batch = Batch(inputs=rows, targets=rows, task=torch.zeros(2, dtype=torch.long))
    strategy = MemoryOff()
    strategy.setup(SimpleNamespace(architecture=model))
    usual = model(batch).logits
    with strategy.views()["memory_off"]():
        silent = model(batch).logits
    assert not torch.equal(silent, usual)
    assert torch.equal(model(batch).logits, usual)


def test_a_model_without_memories_is_refused() -> None:
    attention = MemoryTransformer(spec=TEXT, hidden_size=16, layers=[AttentionLayer(num_heads=2)], mlp_ratio=2.0)
    for model in (Transformer(spec=TEXT, hidden_size=16, num_layers=1, num_heads=2), attention):
        with pytest.raises(ValueError, match=f"MemoryOff: {type(model).__name__} has no memories that write"):
            MemoryOff().setup(SimpleNamespace(architecture=model))
