"""What a decoder tells of its memories after an evaluation: losses before and after writing, moves, gates, NaN."""

from __future__ import annotations

import pytest
import torch
from token_rows import batch_of, tokens

from clplat.architectures.associative_memory.presets import DeltaNet, LayerKind, TitansLMM
from clplat.architectures.associative_memory.titans_presets import TitansMAC
from clplat.architectures.associative_memory.tnt import TNT
from clplat.architectures.memory_transformer import MemoryTransformer
from clplat.streams.base import Spec

TEXT = Spec(kind="language", input_shape=(16,), num_outputs=23)


def decoder(*layers: LayerKind) -> MemoryTransformer:
    torch.manual_seed(0)
    return MemoryTransformer(spec=TEXT, hidden_size=16, layers=layers, mlp_ratio=2.0).double().eval()


@torch.no_grad()
@pytest.mark.parametrize("shards", [1, 3])
def test_tnt_tells_of_each_local_memory_what_it_writes_in_every_shard_alone(shards: int) -> None:
    titans, length = TitansLMM(num_heads=2, chunk=2, max_rate=0.3), 4 * shards - 1
    made = decoder(TNT(layer=titans, global_chunk=8, local_chunks=[2, 4], shard=4))
    layer = made.blocks[0].attention
    made(batch_of(tokens()[:, :length]))  # the last shard is short
    found = {key.removeprefix("memory.0.attention."): value for key, value in made.measurements().items()}
    x = layer.last_row
    given = layer.memory.prepared(layer._tokens(x, layer.qkv(x), None, None))
    for number, local in enumerate(layer.near):
        before, after, moved = [], [], []
        for start in range(0, length, 4):
            part = given.part(start, start + 4)
            _, end = local.by_definition(part)
            for weights, told in ((local.empty_state(1).weights, before), (end.weights, after)):
                told += (0.5 * (local.read(weights, part.k) - part.v).square().sum(-1)).mean(1).flatten().tolist()
            steps = [(new - old).square().sum() for new, old in zip(end.weights, local.first, strict=True)]
            moved.append(float(sum(steps) ** 0.5 / sum(part.square().sum() for part in local.first) ** 0.5))
        assert found[f"local{number}.loss_before"] == pytest.approx(sum(before) / len(before), rel=1e-9)
        assert found[f"local{number}.loss_after"] == pytest.approx(sum(after) / len(after), rel=1e-9)
        assert found[f"local{number}.loss_after"] < found[f"local{number}.loss_before"]
        assert found[f"local{number}.moved"] == pytest.approx(sum(moved) / len(moved), rel=1e-9)
        assert found[f"local{number}.rate"] == pytest.approx(float(given.rate[:, :, :length].mean()), rel=1e-9)
    assert {"kept", "momentum", "local0.kept", "local1.momentum"} <= found.keys()


@torch.no_grad()
def test_mac_tells_what_its_memory_learned_of_what_attention_gave() -> None:
    titans = TitansLMM(num_heads=2, chunk=2, max_rate=0.3)
    made = decoder(TitansMAC(layer=titans, num_heads=2, persistent=2, segment=4))
    layer = made.blocks[0].attention
    memory, heard = layer.mixer.memory, []
    usual = memory.aligned
    memory.aligned = lambda given, state: heard.append(given) or usual(given, state)  # type: ignore[method-assign]
    made(batch_of(tokens(1)[:, :11]))
    del memory.aligned
    parts, state = tuple(heard), memory.empty_state(1)
    for part in parts:
        _, state = memory.by_definition(part, state)
    assert [part.q.shape[2] for part in parts] == [4, 4, 3]

    def inner(weights: tuple[torch.Tensor, ...]) -> float:
        errors = [memory.read(weights, part.k) - part.v for part in parts]
        return float(0.5 * torch.cat(errors, 2).square().sum(-1).mean())

    found = {key.removeprefix("memory.0.attention."): value for key, value in made.measurements().items()}
    assert found["loss_before"] == pytest.approx(inner(memory.empty_state(1).weights), rel=1e-9)
    assert found["loss_after"] == pytest.approx(inner(state.weights), rel=1e-9)
    assert found["loss_after"] < found["loss_before"] and found["moved"] > 0
    assert found["kept"] == pytest.approx(0.99, abs=0.01) and found["momentum"] == pytest.approx(0.9, abs=0.02)
    made(batch_of(tokens(1)[:, :4]))
    layer.mixer.qkv.weight[16 + 8 : 16 + 16] = torch.nan  # keys of the second of two heads
    with pytest.raises(FloatingPointError, match="layer 0.attention: the memory of head 1 is not finite"):
        made.measurements()


def test_measurements_are_of_the_last_evaluation_and_a_memory_that_is_not_finite_is_named() -> None:
    made = decoder(TitansLMM(chunk=4, max_rate=0.2), DeltaNet())
    assert not made.measurements()
    made(batch_of(tokens()))
    found = made.measurements()
    assert found["memory.0.attention.loss_after"] < found["memory.0.attention.loss_before"]
    assert found["memory.0.attention.kept"] == pytest.approx(0.99, abs=0.01)
    assert found["memory.0.attention.momentum"] == pytest.approx(0.9, abs=0.02)
    assert found["memory.0.attention.moved"] > 0
    assert "memory.1.attention.moved" not in found  # it begins from 0
    with torch.no_grad():
        made.blocks[1].attention.qkv.weight[16 + 4 : 16 + 8] = torch.nan  # keys of the second of four heads
    with pytest.raises(FloatingPointError, match="layer 1.attention: the memory of head 1 is not finite"):
        made.measurements()
