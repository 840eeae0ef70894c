"""What a decoder tells of its memories after an evaluation: losses before and after writing, moves, gates, NaN."""

from __future__ import annotations

import pytest
import torch
from token_rows import batch_of, tokens

from clplat.architectures.associative_memory.presets import DeltaNet, LayerKind, TitansLMM
from clplat.architectures.associative_memory.titans_presets import TitansMAC
from clplat.architectures.associative_memory.tnt import TNT
from clplat.architectures.continuum_memory.options import CMSLevel, ContinuumMemory
from clplat.architectures.hope.presets import SelfModifyingTitans, Target
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


@torch.no_grad()
@pytest.mark.parametrize(("chunk", "generators", "target"), [(4, 4, "self"), (2, 4, "value"), (4, 2, "self")])
def test_hope_tells_of_each_memory_what_it_learned_of_pairs_that_were_made_meanwhile(
    chunk: int, generators: int, target: Target
) -> None:
    made = decoder(SelfModifyingTitans(num_heads=2, chunk=chunk, generator_chunk=generators, target=target))
    mixer = made.blocks[0].attention
    made(batch_of(tokens()[:, :11]))
    found = {key.removeprefix("memory.0.attention."): value for key, value in made.measurements().items()}
    x, memory = mixer.last_row, mixer.memory
    inputs, state, pairs = mixer._tokens(x, mixer.qkv(x), None, None), memory.empty_state(1), []
    for t in range(11):
        _, after = memory.by_definition(inputs.part(t, t + 1), state)
        noted = state.weights if t % generators == 0 else state.anchor
        pairs.append(memory.generated(inputs.part(t, t + 1), noted[: len(memory.first)]))
        state = after
    k, v = (torch.cat([getattr(pair, name) for pair in pairs], 2) for name in ("k", "v"))
    network, start, size = memory.groups[0].bank.network, memory.empty_state(1).weights, len(memory.first)
    names = ["key", "value", "rate", "decay", "memory"]
    assert {key.split(".")[0] for key in found} == set(names)
    for number, name in enumerate(names):
        apart = chunk != generators and name == "memory"
        layers, place = slice(size * apart, size * (apart + 1)), 0 if apart else number
        own = [tuple(W[:, 2 * place : 2 * place + 2] for W in each[layers]) for each in (start, state.weights)]
        wanted = network.read(own[0], v) if target == "self" else v
        losses = [float(0.5 * (network.read(W, k) - wanted).square().sum(-1).mean()) for W in own]
        assert [found[f"{name}.loss_{when}"] for when in ("before", "after")] == pytest.approx(losses, rel=1e-9)
        steps = [(new - old).square().sum() for old, new in zip(*own, strict=True)]
        moved = float((sum(steps) / sum(part.square().sum() for part in own[0])) ** 0.5)
        assert found[f"{name}.moved"] == pytest.approx(moved, rel=1e-9)
        assert (f"{name}.rate" in found) == (name == "memory")
    assert found["memory.kept"] == pytest.approx(0.99, abs=0.01)
    assert found["memory.momentum"] == pytest.approx(0.9, abs=0.02)


@torch.no_grad()
@pytest.mark.parametrize("nested", [False, True])
def test_a_level_of_the_token_clock_tells_what_it_learned_of_the_row(nested: bool) -> None:
    fast = CMSLevel(name="fast", period=2, clock="token", lr=2.0)
    levels = [fast, CMSLevel(name="slow", period=8, clock="token", lr=1.0)] if nested else [fast]
    feed = ContinuumMemory(levels=levels, carry="nested" if nested else "sequential")
    torch.manual_seed(0)
    made = MemoryTransformer(
        spec=TEXT, hidden_size=16, layers=[DeltaNet()], repeat=1, feed_forward=feed
    ).double().eval()  # fmt: skip
    made(batch_of(tokens()[:, :11]))
    found, level = made.measurements(), made.blocks[0].mlp.levels["fast"]
    place, x = "memory.0.mlp.levels.fast", level.last_row
    given, (_, after) = level._tokens(x, None), level.continued(x, level.empty_state(1), None)
    weights = after[0][0] if nested else after[0]
    for when, each in (("before", level.fast.empty_state(1).weights), ("after", weights)):
        loss = float(0.5 * (level.fast.read(each, given.k) - given.v).square().sum(-1).mean())
        assert found[f"{place}.loss_{when}"] == pytest.approx(loss, rel=1e-9)
    assert found[f"{place}.loss_after"] < found[f"{place}.loss_before"] and found[f"{place}.moved"] > 0


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
