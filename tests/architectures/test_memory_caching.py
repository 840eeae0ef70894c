"""Kept memories of segments: the loop over tokens is the definition; which reads are equal; what caching is for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from memory_presets import PRESETS, taken_by

from clplat.architectures.associative_memory.caching import (
    CachedMixer,
    MemoryCaching,
    segment_shares,
    together,
)
from clplat.architectures.associative_memory.memory import AssociativeMemory
from clplat.architectures.associative_memory.presets import TTTMLP, DeltaNet, LinearAttention, MemoryLayer, TitansLMM
from clplat.architectures.associative_memory.reading import Reading
from clplat.architectures.associative_memory.rule import MemoryRule
from clplat.architectures.associative_memory.segments import cut, run
from clplat.architectures.associative_memory.state import MemoryState, Tokens

HIDDEN, ROWS = 8, 2
LAYERS: dict[str, MemoryLayer] = {
    "titans": TitansLMM(num_heads=2, chunk=2, expand=2),
    "ttt": TTTMLP(num_heads=2, chunk=2, expand=2),
    "delta": DeltaNet(num_heads=2),
    "linear": LinearAttention(num_heads=2),
}


def mixer(layer: MemoryLayer, **options: Any) -> CachedMixer:
    """A layer in float64 whose parameters are none of those it is born with, segments' queries large."""
    torch.manual_seed(0)
    made = MemoryCaching(layer=layer, segment=options.pop("segment", 4), **options).build(HIDDEN).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def inputs(length: int = 11) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, length, HIDDEN, generator=draw, dtype=torch.float64)


def plain(length: int) -> Reading:
    return Reading(
        positions=torch.arange(length), mask=None, documents=None, lengths=torch.zeros(ROWS, dtype=torch.long)
    )


def by_definition(made: CachedMixer, x: torch.Tensor) -> torch.Tensor:
    """The layer's output, one token after the other."""
    tokens, memory, network = made._tokens(x, made.qkv(x), None, None), made.memory, made.memory._network()
    state, kept, pools, answers = memory.empty_state(ROWS), [], [], []
    for t in range(x.shape[1]):
        start = t - t % made.segment
        if t and t == start:
            kept.append(state.weights)
            pools.append(x[:, t - made.segment : t].mean(1))
            state = state if made.warm else memory.empty_state(ROWS)
        # What a query of the open chunk asks: the memory as it is, or as it was when the chunk began.
        first = state.weights if not made.rule.anchored or not int(state.offset[0]) else state.anchor
        answer, state = memory.by_definition(tokens.part(t, t + 1), state)
        own = first if made.rule.read == "chunk_start" else state.weights
        q, means = memory.prepared(tokens.part(t, t + 1)).q, [*pools, x[:, start : t + 1].mean(1)]
        if made.read == "residual":
            answers.append(answer + sum(network.read(weights, q) for weights in kept))
            continue
        asked = made.segment_query(x[:, t])
        scores = torch.stack([(asked * mean).sum(-1) for mean in means], 1)
        if made.read == "sparse":
            worse = scores[:, :-1].argsort(1)[:, : max(0, len(kept) - made.top)]
            scores = scores.scatter(1, worse, -torch.inf)
        shares = scores.softmax(1)[:, :, None, None, None]
        if made.read == "soup":
            every = [*kept, own]
            answers.append(network.read([sum(shares[:, i] * w[n] for i, w in enumerate(every))
                                         for n in range(len(state.weights))], q))  # fmt: skip
        else:
            answers.append(sum(shares[:, i] * network.read(w, q) for i, w in enumerate([*kept, own])))
    return made._given_out(x, torch.cat(answers, 2))


@pytest.mark.parametrize(
    ("name", "read", "start"),
    [("titans", "gated", "independent"), ("titans", "gated", "warm"), ("ttt", "soup", "independent"),
     ("titans", "soup", "warm"), ("delta", "sparse", "independent"), ("linear", "residual", "warm")],
)  # fmt: skip
def test_a_full_pass_is_the_loop_over_tokens_with_all_outer_gradients(name: str, read: str, start: str) -> None:
    top = 1 if read == "sparse" else None
    made, x = mixer(LAYERS[name], read=read, start=start, top=top), inputs().requires_grad_()
    pull = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    leaves = {"x": x, **dict(made.named_parameters())}
    found, expected = made(x, plain(11)), by_definition(made, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    for leaf, a, b in zip(
        leaves, *(torch.autograd.grad((out * pull).sum(), list(leaves.values())) for out in (found, expected))
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9, msg=lambda text, leaf=leaf: f"{leaf}: {text}")
        assert bool(a.any()), leaf


@pytest.mark.parametrize(
    ("name", "read"),
    [(name, read) for read in ("residual", "gated", "soup", "sparse")
     for name in taken_by(lambda layer, read=read: MemoryCaching(layer=layer, segment=4, read=read))],
)  # fmt: skip
def test_over_every_named_layer_a_full_pass_is_the_loop_over_tokens(name: str, read: str) -> None:
    start, top = ("warm", 1) if read == "sparse" else ("independent", None)
    made, x = mixer(PRESETS[name], read=read, start=start, top=top), inputs()
    with torch.no_grad():
        torch.testing.assert_close(made(x, plain(11)), by_definition(made, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("read", ["residual", "gated", "soup", "sparse"])
@pytest.mark.parametrize("start", ["independent", "warm"])
def test_one_segment_is_the_layer_alone(read: str, start: str) -> None:
    made, x = mixer(LAYERS["titans"], read=read, start=start, segment=12), inputs()
    alone = LAYERS["titans"].build(HIDDEN).double()
    alone.load_state_dict({k: v for k, v in made.state_dict().items() if not k.startswith("segment_query")})
    torch.testing.assert_close(made(x, plain(11)), alone(x, plain(11)), rtol=0, atol=1e-12)
    smaller = mixer(LAYERS["titans"], read=read, start=start)
    assert (smaller(x, plain(11)) - alone(x, plain(11))).abs().max() > 1e-3


def test_soup_is_gated_for_a_matrix_memory_and_not_for_two_layers() -> None:
    for name, equal in (("delta", True), ("linear", True), ("titans", False)):
        made, x = mixer(LAYERS[name], read="gated"), inputs()
        gated = made(x, plain(11))
        made.read = "soup"
        assert ((made(x, plain(11)) - gated).abs().max() < 1e-6) == equal


def test_the_best_of_all_segments_are_gated_and_fewer_are_not() -> None:
    made, x = mixer(LAYERS["titans"], read="gated"), inputs()
    gated = made(x, plain(11))
    made.read, made.top = "sparse", 2
    torch.testing.assert_close(made(x, plain(11)), gated, rtol=0, atol=1e-12)
    made.top = 1
    assert (made(x, plain(11)) - gated).abs().max() > 1e-3


def recall(seed: int) -> dict[str, float]:
    """Share of 256 pairs in 8 segments, with a direction of the segment in their keys, whose value is the nearest to
    the answer: set-up as measured for Memory Caching with a delta memory of width 32 and values of 64."""
    draw = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(8, 1, 32, generator=draw), dim=-1)
    noise = F.normalize(torch.randn(8, 32, 32, generator=draw), dim=-1)
    keys = F.normalize(noise + 0.7 * centres, dim=-1).flatten(0, 1)
    values = F.normalize(torch.randn(256, 64, generator=draw), dim=-1)
    memory = AssociativeMemory(
        rule=MemoryRule(gradient_at="token"), num_heads=1, key_size=32, value_size=64, learned_start=False
    )
    k, v = keys[None, None], values[None, None]
    tokens = memory.prepared(Tokens(k, k, v, torch.ones(1, 1, 256), (), None, None))
    single = memory.by_definition(tokens)[1].weights
    segments = cut(keys.unsqueeze(0), 32, None, None)
    ends = run(memory, tokens, segments, None, warm=False).ends.weights[0]
    pools = keys.unflatten(0, (8, 32)).mean(1).unsqueeze(0)
    # After the last token the eighth segment is the current one, with all of its keys in its mean.
    seen = torch.ones(1, 256, 7, dtype=torch.bool)
    current = pools[:, 7:].expand(1, 256, 32)
    one, others = ends[:, 7], ends[:, :7]

    def right(answers: torch.Tensor) -> float:
        return float(((answers[0, 0] @ values.T).argmax(-1) == torch.arange(256)).float().mean())

    def gated(top: int | None) -> torch.Tensor:
        shares = segment_shares(20 * keys.unsqueeze(0), pools[:, :7], current, seen, top)
        return together(memory.read([one], k), memory.read([others], k.unsqueeze(1)), shares)

    everywhere = memory.read([ends], k.unsqueeze(1))[0, :, 0]
    own = torch.arange(256) // 32
    return {
        "single": right(memory.read(single, k)),
        "residual": right(everywhere.sum(0)[None, None]),
        "gated": right(gated(None)),
        "sparse": right(gated(2)),
        "oracle": right(everywhere[own, torch.arange(256)][None, None]),
    }


def test_gates_find_the_segment_of_a_key_as_well_as_an_oracle() -> None:
    runs = [recall(seed) for seed in range(5)]
    mean = {name: sum(found[name] for found in runs) / len(runs) for name in runs[0]}
    assert mean["gated"] > mean["oracle"] - 0.03, mean
    assert mean["sparse"] > mean["oracle"] - 0.03, mean
    assert mean["gated"] > 3 * mean["single"], mean
    assert mean["residual"] < mean["gated"] / 2, mean


def test_a_state_grows_by_one_memory_a_segment() -> None:
    made, x = mixer(LAYERS["titans"]), inputs()
    state, kept = made.empty_state(ROWS), []
    for t in range(11):
        reading = Reading(positions=torch.tensor([[t]] * ROWS), mask=None, documents=None,
                          lengths=torch.full((ROWS,), t))  # fmt: skip
        _, state = made.continued(x[:, t : t + 1], state, reading)
        kept.append(state[1][1][0].shape[1])
    # The last token is pending until the next call says that it counts.
    assert kept == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert isinstance(MemoryState(*state[1][0]), MemoryState)


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="MemoryCaching.segment: must be a multiple of the layer's chunk .16., got 24"):
        MemoryCaching(segment=24)
    with pytest.raises(ValueError, match="MemoryCaching.read: must be one of residual, gated"):
        MemoryCaching(read="mean")
    with pytest.raises(ValueError, match="MemoryCaching.top: must be at least 1"):
        MemoryCaching(top=0)
    with pytest.raises(ValueError, match="TitansLMM.num_heads: 4 does not divide"):
        MemoryCaching().build(6)
