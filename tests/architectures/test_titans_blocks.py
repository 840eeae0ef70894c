"""Titans' MAC, MAG and MAL against their definitions, one token after the other, with attention written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from memory_presets import PRESETS, taken_by
from torch import nn

from clplat.architectures.associative_memory.presets import LayerKind, LinearAttention, TitansLMM
from clplat.architectures.associative_memory.reading import Reading
from clplat.architectures.associative_memory.titans_presets import TitansMAC, TitansMAG, TitansMAL
from clplat.architectures.associative_memory.token_loop import token_loop

HIDDEN, ROWS, LENGTH = 8, 2, 11
TITANS = TitansLMM(num_heads=2, chunk=2, expand=2)


def layer(kind: LayerKind) -> Any:
    """In float64, with parameters that are none of those it is born with."""
    torch.manual_seed(0)
    made = kind.build(HIDDEN).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def inputs(length: int = LENGTH) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, length, HIDDEN, generator=draw, dtype=torch.float64)


def plain(length: int = LENGTH) -> Reading:
    return Reading(
        positions=torch.arange(length), mask=None, documents=None, lengths=torch.zeros(ROWS, dtype=torch.long)
    )


def attention(made: Any, asking: torch.Tensor, at: int, seen: torch.Tensor, places: list[int]) -> torch.Tensor:
    """The output (B, C) for one token at place `at` that sees the inputs `seen` (B, S, C) at `places`."""
    q = made.projected(asking.unsqueeze(1), torch.tensor([at]))[0]
    _, k, v = made.projected(seen, torch.tensor(places))
    shares = (torch.einsum("bqhd,bshd->bhqs", q, k) / made.head_size**0.5).softmax(-1)
    return made.out(torch.einsum("bhqs,bshd->bqhd", shares, v).flatten(2)[:, 0])


def remembered(mixer: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of a memory that has read the persistent tokens: for them, and for x."""
    p = mixer.persistent.inputs.unsqueeze(0)
    answers, state = mixer.memory.by_definition(mixer._tokens(p, mixer.qkv(p), None, None))
    first, answered = mixer._given_out(p, answers).expand(len(x), -1, -1), []
    # A chunk begins behind the persistent tokens; all else of the memory goes on.
    behind = {part: tuple(w.expand(len(x), -1, -1, -1) for w in getattr(state, part))
              for part in ("weights", "momentum", "window", "owed")}  # fmt: skip
    state = mixer.memory.empty_state(len(x))._replace(**behind)
    tokens = mixer._tokens(x, mixer.qkv(x), None, None)
    for t in range(x.shape[1]):
        answer, state = mixer.memory.by_definition(tokens.part(t, t + 1), state)
        answered.append(answer)
    return first, mixer._given_out(x, torch.cat(answered, 2))


def windowed(made: Any, x: torch.Tensor, persistent: torch.Tensor) -> torch.Tensor:
    """Sliding-window attention, token by token."""
    out, window = [], made.window
    for t in range(x.shape[1]):
        first = max(0, t - window + 1)
        seen = torch.cat([persistent, x[:, first : t + 1]], 1)
        out.append(attention(made, x[:, t], t, seen, [0] * persistent.shape[1] + list(range(first, t + 1))))
    return torch.stack(out, 1)


def mag(made: Any, x: torch.Tensor) -> torch.Tensor:
    attended = windowed(made.attention, x, made.mixer.persistent.inputs.expand(ROWS, -1, -1))
    gate = torch.sigmoid(made.memory_norm(remembered(made.mixer, x)[1]))
    return made.out(made.attention_norm(attended) * gate)


def mal(made: Any, x: torch.Tensor) -> torch.Tensor:
    first, rest = remembered(made.mixer, x)
    return windowed(made.attention, made.memory_norm(rest), made.memory_norm(first))


def mac(made: Any, x: torch.Tensor) -> torch.Tensor:
    mixer, memory, network = made.mixer, made.mixer.memory, made.mixer.memory._network()
    state, p, mixed, out = memory.empty_state(ROWS), made.persistent.inputs.expand(ROWS, -1, -1), [], []
    for t in range(x.shape[1]):
        start = t - t % made.segment
        if t == start:
            weights = state.weights
        segment = x[:, start : t + 1]
        q = mixer.memory.features(made.query(segment).unflatten(-1, (mixer.num_heads, -1)).transpose(1, 2))
        recalled = made.recalled_norm(network.read(weights, q).transpose(1, 2).flatten(2))
        places = list(range(t - start + 1))
        seen = torch.cat([p, recalled, segment], 1)
        mixed.append(attention(made.attention, x[:, t], t - start, seen, [0] * p.shape[1] + places + places))
        y = torch.stack(mixed, 1)
        token = memory.prepared(mixer._tokens(y, mixer.qkv(y), None, None)).part(t, t + 1)
        answer, state = token_loop(network, token, state)
        normed = mixer.norm(answer.transpose(1, 2)).flatten(2)
        out.append(mixer.out(normed * mixed[-1].unsqueeze(1)))
    return torch.cat(out, 1)


CASES = {
    "mac": (TitansMAC(layer=TITANS, num_heads=2, persistent=2, segment=4), mac),
    "mac-without-persistent": (TitansMAC(layer=TITANS, num_heads=1, persistent=0, segment=6), mac),
    "mag": (TitansMAG(layer=TITANS, num_heads=2, persistent=3, window=4), mag),
    "mag-wide": (TitansMAG(layer=TITANS, num_heads=2, persistent=1, window=20), mag),
    "mal": (TitansMAL(layer=TITANS, num_heads=2, persistent=2, window=3), mal),
    "mal-narrow": (TitansMAL(layer=TITANS, num_heads=2, persistent=1, window=1), mal),
}


@pytest.mark.parametrize("name", CASES)
def test_a_full_pass_is_the_definition_with_all_outer_gradients(name: str) -> None:
    kind, definition = CASES[name]
    made, x = layer(kind), inputs().requires_grad_()
    pull = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    leaves: dict[str, torch.Tensor] = {"x": x, **{n: p for n, p in made.named_parameters() if p.numel()}}
    found, expected = made(x, plain()), definition(made, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    for leaf, a, b in zip(
        leaves, *(torch.autograd.grad((out * pull).sum(), list(leaves.values())) for out in (found, expected))
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9, msg=lambda text, leaf=leaf: f"{leaf}: {text}")
        assert bool(a.any()), leaf


KINDS: dict[str, tuple[Any, Any]] = {
    "mac": (lambda layer: TitansMAC(layer=layer, num_heads=2, persistent=2, segment=4), mac),
    "mag": (lambda layer: TitansMAG(layer=layer, num_heads=2, persistent=3, window=4), mag),
    "mal": (lambda layer: TitansMAL(layer=layer, num_heads=2, persistent=3, window=3), mal),
}


@pytest.mark.parametrize(
    ("block", "name"), [(block, name) for block, (make, _) in KINDS.items() for name in taken_by(make)]
)
def test_over_every_named_layer_a_full_pass_is_the_definition(block: str, name: str) -> None:
    make, definition = KINDS[block]
    made, x = layer(make(PRESETS[name])), inputs()
    with torch.no_grad():
        torch.testing.assert_close(made(x, plain()), definition(made, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["mac", "mag", "mal"])
def test_decoding_keeps_a_state_of_bounded_size(name: str) -> None:
    made, x, sizes = layer(CASES[name][0]), inputs(), []
    state = made.empty_state(ROWS)
    for t in range(LENGTH):
        reading = Reading(positions=torch.tensor([[t]] * ROWS), mask=None, documents=None,
                          lengths=torch.full((ROWS,), t))  # fmt: skip
        _, state = made.continued(x[:, t : t + 1], state, reading)
        sizes.append(sum(part.numel() for part in torch.utils._pytree.tree_leaves(state)))
    assert max(sizes[5:]) == max(sizes)
    assert sizes[-1] == sizes[6]


def test_persistent_tokens_are_learned_and_seen() -> None:
    for name in ("mac", "mag", "mal"):
        made, x = layer(CASES[name][0]), inputs()
        before = made(x, plain())
        inner: nn.Module = made if name == "mac" else made.mixer
        with torch.no_grad():
            inner.persistent.inputs.mul_(-2.0)
        assert bool(((made(x, plain()) - before).abs().amax(-1) > 1e-6).all())


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="TitansMAC.segment: must be a multiple of the layer's chunk .16., got 24"):
        TitansMAC(segment=24)
    with pytest.raises(ValueError, match="TitansMAG.window: must be at least 1"):
        TitansMAG(window=0)
    with pytest.raises(ValueError, match="TitansMAL.persistent: must be at least 0"):
        TitansMAL(persistent=-1)
    with pytest.raises(ValueError, match="TitansMAL.num_heads: hidden_size .12. is no multiple of 2 . 4"):
        TitansMAL().build(12)
    with pytest.raises(ValueError, match="TitansMAC.layer: a memory with a normaliser"):
        TitansMAC(layer=LinearAttention())
