"""Memories whose weights are a map of what they accumulate, and the presets that are made of them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.architectures.associative_memory.lact import LaCT
from clplat.architectures.associative_memory.maps import MapOptions
from clplat.architectures.associative_memory.memory import AssociativeMemory
from clplat.architectures.associative_memory.miras import Memora, Moneta, Yaad
from clplat.architectures.associative_memory.mixer import ProjectionOptions
from clplat.architectures.associative_memory.presets import MemoryLayer
from clplat.architectures.associative_memory.rule import BiasOptions, HuberForm, MemoryRule, NetworkOptions
from clplat.architectures.associative_memory.state import Layers, MemoryState, Tokens

WIDTH, PAIRS = 32, 16

# Each with a step size: of 0.01, 0.02, 0.05, 0.1, 0.3, 1 and 3, one at which it recalls well.
MIRAS: dict[str, tuple[MemoryLayer, float]] = {
    "Moneta": (Moneta(chunk=1, retention="decay"), 0.02),
    "Yaad": (Yaad(chunk=1, retention="decay"), 0.1),
    "Memora": (Memora(chunk=1, retention="decay"), 0.3),
    "Memora of positive weights": (Memora(chunk=1, retention="decay", signs="positive"), 0.3),
}
every_miras = pytest.mark.parametrize("name", MIRAS)


def made(rule: MemoryRule, width: int = WIDTH, *, learned_start: bool = True) -> AssociativeMemory:
    torch.manual_seed(0)
    return AssociativeMemory(
        rule=rule, num_heads=1, key_size=width, value_size=width, learned_start=learned_start
    ).double()


def drawn(seed: int = 0, count: int = PAIRS, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """Random keys (1, 1, N, D) of unit length, and values whose features have variance 1."""
    draw = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(1, 1, count, width, generator=draw, dtype=torch.float64) for _ in range(2))
    return F.normalize(keys, dim=-1), values


def given(rule: MemoryRule, keys: Tensor, values: Tensor, rate: float, decay: float = 1.0) -> Tokens:
    """Pairs to be written, with thresholds of 1 and the same gates for all of them."""
    one = torch.ones_like(keys[..., 0])
    layers = len(rule.widths(WIDTH, WIDTH)) if rule.retention != "none" else 0
    kept = ((one * decay).log().unsqueeze(-1),) * layers
    return Tokens(keys, keys, values, rate * one, kept, None, one if rule.bias.kind == "huber" else None)


@torch.no_grad()
def written(
    memory: AssociativeMemory, keys: Tensor, values: Tensor, rate: float, passes: int, state: MemoryState | None = None
) -> MemoryState:
    for _ in range(passes):
        _, state = memory(given(memory.rule, keys, values, rate), state)
    assert state is not None
    return state


def weights(memory: AssociativeMemory, state: MemoryState) -> Layers:
    return memory._network().weights(state.weights)


@torch.no_grad()
def errors(memory: AssociativeMemory, state: MemoryState, keys: Tensor, values: Tensor) -> Tensor:
    """(N,) squared distances of answers from values."""
    return (memory._network().read(weights(memory, state), keys) - values).square().sum(-1)[0, 0]


@every_miras
def test_sixteen_pairs_are_recalled_and_others_are_not(name: str) -> None:
    layer, rate = MIRAS[name]
    memory, (keys, values) = made(layer.rule), drawn()
    before = errors(memory, memory.empty_state(1), keys, values).mean()
    state = written(memory, keys, values, rate, passes=8)
    after = errors(memory, state, keys, values).mean()
    assert after < 0.15 * before
    assert errors(memory, state, *drawn(seed=1)).mean() > 4 * after


@every_miras
def test_one_pair_is_replaced_and_the_others_stay(name: str) -> None:
    layer, rate = MIRAS[name]
    memory, (keys, values), (_, new) = made(layer.rule), drawn(), drawn(seed=1)
    state = written(memory, keys, values, rate, passes=8)
    key, value, others = keys[:, :, 3:4], new[:, :, 3:4], [*range(3), *range(4, PAIRS)]
    replaced = written(memory, key, value, rate, passes=16, state=state)
    assert errors(memory, replaced, key, value).mean() < 0.2 * errors(memory, state, key, value).mean()
    assert errors(memory, replaced, keys, values)[3] > WIDTH  # half of how far two values lie apart
    fresh = errors(memory, memory.empty_state(1), keys, values)[others].mean()
    assert errors(memory, replaced, keys, values)[others].mean() < 0.5 * fresh


@pytest.mark.parametrize("huber", ["feature", "norm", "switch"])
def test_yaads_losses_recall_clean_pairs_among_large_values_and_l2_does_not(huber: HuberForm) -> None:
    recalled: dict[str, list[float]] = {"l2": [], "huber": []}
    for seed in range(10):
        keys, values = drawn(seed, 40, 64)
        values = F.normalize(values, dim=-1)
        spoiled = torch.rand(40, generator=torch.Generator().manual_seed(seed)) < 0.1
        noisy = torch.where(spoiled.unsqueeze(-1), 20 * values, values)
        for kind, found in recalled.items():
            bias = BiasOptions(kind=kind, huber=huber) if kind == "huber" else BiasOptions(kind=kind)
            rule = MemoryRule(bias=bias, chunk=1)
            memory = made(rule, 64, learned_start=False)
            one = torch.ones_like(keys[..., 0])
            # Of ‖e‖ for whole errors, which are about 1 where pairs are clean, and of its share in each of 64 features.
            limit = {"norm": 1.0, "switch": 0.2, "feature": 0.3}[huber] * one if kind == "huber" else None
            _, state = memory(Tokens(keys, keys, noisy, 0.5 * one, (), None, limit))
            answers = (keys[0, 0] @ state.weights[0][0, 0])[~spoiled]
            right = (answers @ values[0, 0].T).argmax(-1) == torch.arange(40)[~spoiled]
            found.append(right.double().mean().item())
    assert sum(recalled["huber"]) / 10 >= 0.9
    assert sum(recalled["l2"]) / 10 <= 0.5


def test_yaad_steps_by_the_error_below_its_threshold_and_by_signs_beyond() -> None:
    memory, (keys, values) = made(MemoryRule(bias=BiasOptions(kind="huber", huber="switch"), chunk=1)), drawn(count=1)
    first, key, value = memory.empty_state(1).weights[0][0, 0], keys[0, 0, 0], values[0, 0, 0]
    error, one = first.T @ key - value, torch.ones(1, 1, 1, dtype=torch.float64)
    for threshold, slope in ((1.1 * error.norm(), error), (0.9 * error.norm(), 0.9 * error.norm() * error.sign())):
        _, end = memory(Tokens(keys, keys, values, 0.3 * one, (), None, threshold * one))
        torch.testing.assert_close(end.weights[0][0, 0], first - 0.3 * torch.outer(key, slope), rtol=0, atol=1e-12)


def test_moneta_of_one_token_chunks_is_the_printed_rule() -> None:
    rule = MemoryRule(bias=BiasOptions(kind="lp", smoothing=0.0), retention="decay", map=MapOptions(kind="lq"), chunk=1)
    memory, (keys, values) = made(rule), drawn()
    answers, end = memory(given(rule, keys, values, 0.05, 0.9))
    A = memory.empty_state(1).weights[0][0, 0]
    for key, value, answer in zip(keys[0, 0], values[0, 0], answers[0, 0]):
        W = A / (A.pow(4).sum() + 1e-4).sqrt()
        error = W.T @ key - value
        A = 0.9 * A - 0.05 * torch.outer(key, error.sign() * error.abs().square())
        torch.testing.assert_close(answer, (A / (A.pow(4).sum() + 1e-4).sqrt()).T @ key, rtol=0, atol=1e-12)
    torch.testing.assert_close(end.weights[0][0, 0], A, rtol=0, atol=1e-12)


def test_moneta_of_powers_two_is_the_delta_rule() -> None:
    keys, values = drawn()
    lp = BiasOptions(kind="lp", power=2.0)
    moneta, delta = made(MemoryRule(bias=lp, map=MapOptions(kind="lq", power=2.0), chunk=1)), made(MemoryRule(chunk=1))
    for found, expected in zip(
        moneta(given(moneta.rule, keys, values, 0.7))[0], delta(given(delta.rule, keys, values, 0.7))[0]
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_memora_of_one_token_chunks_is_the_printed_rule_and_keeps_weights_positive_and_their_sum() -> None:
    rule = MemoryRule(retention="decay", map=MapOptions(kind="kl", signs="positive", mass=1.0), chunk=1)
    memory, (keys, values) = made(rule), drawn()
    state, W = memory.empty_state(1), memory.empty_state(1).weights[0][0, 0].softmax(0)
    for n in range(PAIRS):
        key, value = keys[:, :, n : n + 1], values[:, :, n : n + 1]
        gradient = torch.outer(key[0, 0, 0], W.T @ key[0, 0, 0] - value[0, 0, 0])
        W = (0.9 * W.log() - 3.0 * gradient).softmax(0)
        _, state = memory(given(rule, key, value, 3.0, 0.9), state)
        found = weights(memory, state)[0][0, 0]
        torch.testing.assert_close(found, W, rtol=0, atol=1e-12)
        assert found.min() >= 0
        torch.testing.assert_close(found.sum(0), torch.ones(WIDTH, dtype=torch.float64), rtol=0, atol=1e-12)


def test_memoras_paired_weights_are_differences_of_two_such_memories_and_stay_finite_however_far_it_goes() -> None:
    A, paired = torch.randn(2, 3, 8, 5, dtype=torch.float64), MapOptions(kind="kl")
    plus, minus = A.exp(), (-A).exp()
    expected = math.sqrt(8) * (plus - minus) / (plus + minus).sum(-2, keepdim=True)
    torch.testing.assert_close(paired.weights((A,))[0], expected, rtol=0, atol=1e-12)
    far = (1e4 * A.float()).requires_grad_()
    (W,) = paired.weights((far,))
    (slope,) = torch.autograd.grad(W.square().sum(), far)
    assert slope.isfinite().all()
    assert (W.abs().sum(-2) <= math.sqrt(8) * (1 + 1e-6)).all()
    assert torch.equal(paired.weights((torch.zeros(1, 1, 4, 4),))[0], torch.zeros(1, 1, 4, 4))


def test_lact_keeps_the_norm_of_every_slice_behind_each_chunk() -> None:
    rule = LaCT(chunk=8).rule
    memory, (keys, values) = made(rule), drawn()
    tokens = given(rule, keys, values, 0.5)
    first = memory.empty_state(1)
    open_chunk, ends = memory(tokens.part(0, 12))[1], memory(tokens)[1]
    for began, inside, end in zip(first.weights, open_chunk.weights, ends.weights, strict=True):
        torch.testing.assert_close(end.norm(dim=-2), began.norm(dim=-2), rtol=0, atol=1e-10)
        assert (inside.norm(dim=-2) - began.norm(dim=-2)).abs().max() > 1e-3
        assert (end - began).abs().max() > 1e-2


def test_lact_answers_from_earlier_chunks_alone() -> None:
    rule = LaCT(chunk=8).rule
    memory, (keys, values) = made(rule), drawn()
    tokens = given(rule, keys, values, 0.5)
    before = memory(tokens)[0]
    for place, unseen in ((3, 8), (8, 16)):
        changed = values.clone()
        changed[:, :, place] += 1.0
        after = memory(tokens._replace(v=changed))[0]
        assert torch.equal(after[:, :, :unseen], before[:, :, :unseen])
        assert not unseen < PAIRS or (after[:, :, unseen:] != before[:, :, unseen:]).any(-1).all()


def test_lact_points_to_the_values_of_a_chunk_that_it_has_written() -> None:
    memory, (keys, values) = made(LaCT(chunk=PAIRS, expand=4).rule), drawn()
    pointing = []
    for state in (memory.empty_state(1), written(memory, keys, values, 0.05, passes=4)):
        with torch.no_grad():
            answers = memory._network().read(weights(memory, state), keys)[0, 0]
        nearest = F.cosine_similarity(answers.unsqueeze(1), values[0, 0], dim=-1).argmax(-1)
        pointing.append((nearest == torch.arange(PAIRS)).double().mean().item())
    assert pointing[0] <= 0.25
    assert pointing[1] >= 0.75


def test_what_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="map: .lq. needs gradient_at: chunk"):
        MemoryRule(gradient_at="token", map=MapOptions(kind="lq"))
    with pytest.raises(ValueError, match="map.power: must be at least 2"):
        MapOptions(kind="lq", power=1.5)
    with pytest.raises(ValueError, match="map.mass: must be above 0, got 0"):
        MapOptions(kind="kl", mass=0)
    with pytest.raises(ValueError, match="memory.depth: a swiglu has depth 2, got 1"):
        NetworkOptions(kind="swiglu")
    with pytest.raises(ValueError, match="learned_start: weights that begin from zero have no norm"):
        made(MemoryRule(map=MapOptions(kind="norm")), learned_start=False)
    with pytest.raises(ValueError, match="projection.gate_rank: must be at least 1"):
        ProjectionOptions(gate_rank=0)
