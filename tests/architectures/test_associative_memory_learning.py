"""What memories are for: what is written is recalled, what is written anew is replaced, what decays is forgotten."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clplat.architectures.associative_memory.memory import AssociativeMemory
from clplat.architectures.associative_memory.rule import BiasOptions, MemoryRule, NetworkOptions
from clplat.architectures.associative_memory.state import MemoryState, Tokens

WIDTH, PAIRS = 32, 16
MLP = NetworkOptions(depth=2, expand=4)

WRITERS = {
    "delta rule": (MemoryRule(gradient_at="token"), 1.0),
    "gradient at the chunk's start": (MemoryRule(chunk=1), 1.0),
    "two layers": (MemoryRule(memory=MLP, chunk=1), 0.3),
    "two layers with a norm": (MemoryRule(memory=NetworkOptions(depth=2, norm=True, residual=True), chunk=1), 0.3),
    # The slope of |e|³ / 3 is small where errors are, some 0.2 in each of 32 features; a rate r diverges from 2 / r on.
    "lp": (MemoryRule(bias=BiasOptions(kind="lp", power=3.0), chunk=1), 1.5),
    "huber": (MemoryRule(bias=BiasOptions(kind="huber"), chunk=1), 1.0),
}


def made(rule: MemoryRule) -> AssociativeMemory:
    torch.manual_seed(0)
    return AssociativeMemory(rule=rule, num_heads=1, key_size=WIDTH, value_size=WIDTH)


def pairs(seed: int = 0, count: int = PAIRS) -> tuple[torch.Tensor, torch.Tensor]:
    """Random keys and values (1, 1, N, WIDTH) of unit length."""
    draw = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(1, 1, count, WIDTH, generator=draw) for _ in range(2))
    return F.normalize(keys, dim=-1), F.normalize(values, dim=-1)


def written(
    memory: AssociativeMemory, keys: torch.Tensor, values: torch.Tensor, rate: float,
    state: MemoryState | None = None, decay: float | None = None,
) -> MemoryState:  # fmt: skip
    """The state after the pairs, with `decay` of everything before each of them and the rule's other gates at 1."""
    one = torch.ones(keys.shape[:3])
    log_decay = () if decay is None else (torch.full_like(one, decay).log().unsqueeze(-1),) * memory.rule.memory.depth
    threshold = one if memory.rule.bias.kind == "huber" else None
    with torch.no_grad():
        return memory(Tokens(keys, keys, values, rate * one, log_decay, None, threshold), state)[1]


def error(memory: AssociativeMemory, state: MemoryState, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Squared distance of each answer from its value; values have length 1."""
    with torch.no_grad():
        return (memory._network().read(state.weights, keys) - values).square().sum(-1)[0, 0]


@pytest.mark.parametrize("name", WRITERS)
def test_pairs_that_were_written_are_recalled(name: str) -> None:
    rule, rate = WRITERS[name]
    memory, (keys, values), (other_keys, other_values) = made(rule), pairs(), pairs(seed=1)
    if rule.memory.norm:  # whose answers have variance 1
        values, other_values = values * WIDTH**0.5, other_values * WIDTH**0.5
    before, state = error(memory, memory.empty_state(1), keys, values), None
    for _ in range(8):
        state = written(memory, keys, values, rate, state)
    assert state is not None
    assert error(memory, state, keys, values).mean() < 0.25 * before.mean()
    unseen = error(memory, state, other_keys, other_values).mean()
    assert unseen > 2 * error(memory, state, keys, values).mean()


def test_one_pair_is_replaced_and_the_others_stay() -> None:
    memory, keys = made(MemoryRule(gradient_at="token")), torch.eye(WIDTH)[None, None, :PAIRS]
    _, values = pairs()
    state = written(memory, keys, values, 1.0)
    assert error(memory, state, keys, values).max() < 1e-8
    new = pairs(seed=1, count=1)[1]
    state = written(memory, keys[:, :, 3:4], new, 1.0, state)
    left = error(memory, state, keys, values)
    assert error(memory, state, keys[:, :, 3:4], new).max() < 1e-8
    assert left[3] > 0.5
    assert left[[*range(3), *range(4, PAIRS)]].max() < 1e-8


def test_the_hebbian_memory_does_not_replace_but_adds() -> None:
    memory = made(MemoryRule(bias=BiasOptions(kind="dot")))
    (keys, values), (_, new) = pairs(count=1), pairs(seed=1, count=1)
    state = written(memory, keys, new, 1.0, written(memory, keys, values, 1.0))
    with torch.no_grad():
        first = memory._network().read(memory.empty_state(1).weights, keys)
    assert error(memory, state, keys, first + values + new).max() < 1e-8


@pytest.mark.parametrize("network", [NetworkOptions(), MLP])
def test_decay_forgets_what_is_not_written_again(network: NetworkOptions) -> None:
    memory = made(MemoryRule(memory=network, retention="decay", chunk=1))
    (keys, values), (others, nothing) = pairs(count=4), pairs(seed=1, count=30)
    state = written(memory, keys, values, 0.3, decay=1.0)
    kept = written(memory, others, nothing, 0.0, state, decay=1.0)
    gone = written(memory, others, nothing, 0.0, state, decay=0.8)
    for after, before in zip(kept.weights, state.weights):
        torch.testing.assert_close(after, before)
    for after, before in zip(gone.weights, state.weights):
        torch.testing.assert_close(after, before * 0.8**30)


@pytest.mark.parametrize(("network", "rate"), [(NetworkOptions(), 1.0), (MLP, 0.3)])
def test_a_matrix_learns_again_when_all_is_forgotten_and_layers_do_not(network: NetworkOptions, rate: float) -> None:
    memory = made(MemoryRule(memory=network, retention="decay", chunk=1))
    (keys, values), (others, nothing) = pairs(), pairs(seed=1, count=2000)
    keys, values = keys.repeat(1, 1, 8, 1), values.repeat(1, 1, 8, 1)

    def left(decay: float) -> float:
        """The error that writing leaves of the one before, behind 2,000 tokens of so much decay."""
        then = written(memory, others, nothing, 0.0, decay=decay)
        after = written(memory, keys, values, rate, then, decay=1.0)
        return float(error(memory, after, keys, values).mean() / error(memory, then, keys, values).mean())

    assert left(0.9999) < 0.5
    assert left(0.99) < 0.5 if network.depth == 1 else left(0.99) > 0.99


def test_huber_recalls_clean_pairs_among_values_that_are_twenty_times_too_large_and_l2_does_not() -> None:
    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    keys = F.normalize(torch.randn(1, 1, 40, 64, generator=draw), dim=-1)
    values = F.normalize(torch.randn(1, 1, 40, 64, generator=draw), dim=-1)
    spoiled = torch.arange(40) % 10 == 9
    noisy = torch.where(spoiled.unsqueeze(-1), 20 * values, values)
    recalled = {}
    for kind in ("l2", "huber"):
        rule = MemoryRule(bias=BiasOptions(kind=kind), chunk=1)
        memory = AssociativeMemory(rule=rule, num_heads=1, key_size=64, value_size=64, learned_start=False)
        one = torch.ones(1, 1, 40)
        threshold = 0.3 * one if kind == "huber" else None
        _, state = memory(Tokens(keys, keys, noisy, one, (), None, threshold))
        answers = (keys[0, 0] @ state.weights[0][0, 0])[~spoiled]
        nearest = (answers @ values[0, 0].T).argmax(-1)
        recalled[kind] = (nearest == torch.arange(40)[~spoiled]).float().mean().item()
    assert recalled["huber"] >= 0.9
    assert recalled["l2"] <= 0.5


def test_lp_of_power_two_is_l2_and_huber_with_a_far_threshold_too() -> None:
    (keys, values), one = pairs(), torch.ones(1, 1, PAIRS)
    plain = written(made(MemoryRule(chunk=4)), keys, values, 0.3).weights[0]
    lp = written(made(MemoryRule(bias=BiasOptions(kind="lp", power=2.0), chunk=4)), keys, values, 0.3)
    far = made(MemoryRule(bias=BiasOptions(kind="huber"), chunk=4))
    _, huber = far(Tokens(keys, keys, values, 0.3 * one, (), None, 100 * one))
    torch.testing.assert_close(lp.weights[0], plain)
    torch.testing.assert_close(huber.weights[0], plain)


def test_without_momentum_and_decay_titans_with_a_matrix_is_the_delta_rule() -> None:
    keys, values = pairs()
    one = torch.ones(1, 1, PAIRS)
    titans = made(MemoryRule(retention="decay", optimizer="momentum", chunk=1))
    _, end = titans(Tokens(keys, keys, values, 0.7 * one, (0 * one.unsqueeze(-1),), -12 * one, None))
    delta = written(made(MemoryRule(gradient_at="token")), keys, values, 0.7)
    torch.testing.assert_close(end.weights[0], delta.weights[0], rtol=1e-4, atol=1e-5)


def test_where_an_operation_has_the_rule_it_is_what_computes_it() -> None:
    keys, values = pairs()
    for rule, expected in {
        MemoryRule(gradient_at="decayed"): "delta_memory torch",
        MemoryRule(): "delta_memory torch",
        MemoryRule(bias=BiasOptions(kind="dot")): "delta_memory torch",
        MemoryRule(memory=MLP): "mlp_memory torch",
        MemoryRule(memory=MLP, bias=BiasOptions(kind="lp")): "chunked PyTorch",
        MemoryRule(bias=BiasOptions(kind="lp")): "chunked PyTorch",
        MemoryRule(target="self"): "chunked PyTorch",
    }.items():
        memory = made(rule)
        assert memory.backend == "none yet"
        written(memory, keys, values, 0.1)
        assert memory.backend == expected


def test_states_stay_precise_where_tokens_are_bfloat16() -> None:
    for network in (NetworkOptions(), MLP):
        memory, (keys, values) = made(MemoryRule(memory=network)).bfloat16(), pairs()
        one = torch.ones(1, 1, PAIRS, dtype=torch.bfloat16)
        answers, end = memory(Tokens(keys.bfloat16(), keys.bfloat16(), values.bfloat16(), 0.1 * one, (), None, None))
        assert answers.isfinite().all()
        assert all(part.dtype == torch.float32 for part in end.weights)


def test_what_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="gradient_at: 'token' is computed for a matrix memory"):
        MemoryRule(memory=MLP, gradient_at="token")
    with pytest.raises(ValueError, match="gradient_at: 'decayed'.*bias l2"):
        MemoryRule(bias=BiasOptions(kind="lp"), gradient_at="decayed")
    with pytest.raises(ValueError, match="bias.smoothing: must be above 0 where power is below 2"):
        BiasOptions(kind="lp", power=1.5, smoothing=0.0)
    with pytest.raises(ValueError, match="chunk: must be at least 1"):
        MemoryRule(chunk=0)
    with pytest.raises(ValueError, match="learned_start: an MLP that begins from zero"):
        AssociativeMemory(rule=MemoryRule(memory=MLP), num_heads=1, key_size=4, value_size=4, learned_start=False)
    with pytest.raises(ValueError, match="memory.residual: needs keys as wide as values, got 4 and 6"):
        AssociativeMemory(rule=MemoryRule(memory=NetworkOptions(residual=True)), num_heads=1, key_size=4, value_size=6)
    keys, values = pairs()
    with pytest.raises(ValueError, match="log_decay: the memory's rule needs it"):
        written(made(MemoryRule(retention="decay")), keys, values, 0.1)
    with pytest.raises(ValueError, match="log_decay: the memory's rule has no use for it"):
        written(made(MemoryRule()), keys, values, 0.1, decay=0.9)
