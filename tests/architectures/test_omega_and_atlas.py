"""What the Omega window, orthogonal steps and polynomial features are for, against exact least squares.

Bounds are those of a numpy run of the same mechanisms on 5 seeds: keys and values are unit Gaussian vectors, each pair
is read once, a pair is recalled where its own value is the nearest of all.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from associative_memories import RULES, memory, tokens
from torch import Tensor

from clplat.architectures.associative_memory.features import FeatureMap
from clplat.architectures.associative_memory.memory import AssociativeMemory
from clplat.architectures.associative_memory.presets import Atlas, OmegaNet
from clplat.architectures.associative_memory.rule import BiasOptions, MemoryRule, NetworkOptions, PolynomialOptions
from clplat.architectures.associative_memory.state import MemoryState, Tokens
from clplat.kernels.least_squares import least_squares
from clplat.kernels.newton_schulz import newton_schulz

ALL_PRODUCTS = PolynomialOptions(rank=None)
SEEDS = range(5)


def pairs(seed: int, count: int, width: int, *, common: float = 0.0) -> tuple[Tensor, Tensor]:
    """Keys (1, 1, N, width), which share a direction of strength 4 · common, and values (1, 1, N, 64)."""
    draw = torch.Generator().manual_seed(seed)
    shared = F.normalize(torch.randn(width, generator=draw, dtype=torch.float64), dim=0)
    keys, values = (torch.randn(1, 1, count, size, generator=draw, dtype=torch.float64) for size in (width, 64))
    return F.normalize(keys + 4 * common * shared, dim=-1), F.normalize(values, dim=-1)


def of_rule(rule: MemoryRule, keys: Tensor, values: Tensor, *, learned_start: bool = False) -> AssociativeMemory:
    torch.manual_seed(0)
    made = AssociativeMemory(
        rule=rule, num_heads=1, key_size=keys.shape[-1], value_size=values.shape[-1], learned_start=learned_start
    )
    return made.double()


@torch.no_grad()
def after(
    made: AssociativeMemory, keys: Tensor, values: Tensor, rate: float, state: MemoryState | None = None,
    momentum: float = 0.9,
) -> MemoryState:  # fmt: skip
    """The state behind the pairs, nothing forgotten and all pairs of a window weighing 1."""
    rule, one = made.rule, torch.ones(keys.shape[:3], dtype=torch.float64)
    decay = (torch.zeros_like(one).unsqueeze(-1),) * rule.memory.depth if rule.retention != "none" else ()
    log_momentum = (momentum * one).log() if rule.momentous else None
    window = one.unsqueeze(-1).repeat(1, 1, 1, rule.window) if rule.window > 1 else None
    return made(Tokens(keys, keys, values, rate * one, decay, log_momentum, None, None, window=window), state)[1]


def answers(made: AssociativeMemory, state: MemoryState, keys: Tensor) -> Tensor:
    with torch.no_grad():
        return made._network().read(state.weights, made.features(keys))


def recalled(found: Tensor, values: Tensor) -> float:
    """The share of pairs whose own value is nearest."""
    return (found @ values.mT).argmax(-1).eq(torch.arange(values.shape[2])).double().mean().item()


def once(rule: MemoryRule, rate: float, count: int, width: int, *, common: float = 0.0) -> float:
    """Mean recall over seeds after one reading."""
    shares = []
    for seed in SEEDS:
        keys, values = pairs(seed, count, width, common=common)
        made = of_rule(rule, keys, values)
        shares.append(recalled(answers(made, after(made, keys, values, rate), keys), values))
    return sum(shares) / len(shares)


def exactly(count: int, width: int, *, common: float = 0.0) -> float:
    """The same of the exact solution, and that of softmax attention at scale 30 as well, the smaller of both."""
    shares = []
    for seed in SEEDS:
        keys, values = pairs(seed, count, width, common=common)
        _, (solution, _) = least_squares(*(part.transpose(1, 2) for part in (keys, keys, values)), ridge=1e-3)
        attention = (30 * keys @ keys.mT).softmax(-1) @ values
        shares.append(min(recalled(keys @ solution, values), recalled(attention, values)))
    return sum(shares) / len(shares)


def test_where_keys_resemble_each_other_sums_and_single_steps_fail_and_exact_least_squares_does_not() -> None:
    """Test-time regression (Wang et al. 2025, arXiv:2501.12352): recall over strengths of the shared direction."""
    sums = MemoryRule(feature="identity", bias=BiasOptions(kind="dot"))
    linear, delta, exact = zip(
        *(
            (once(sums, 1.0, 48, 64, common=c), once(MemoryRule(gradient_at="token"), 1.0, 48, 64, common=c),
             exactly(48, 64, common=c))
            for c in (0, 1, 2, 4)
        )
    )  # fmt: skip
    assert exact == (1.0, 1.0, 1.0, 1.0)
    assert linear[0] == 1.0
    assert delta[0] > 0.95
    assert linear[2] < 0.25
    assert delta[2] < 0.5
    assert max(linear[3], delta[3]) < 0.1


def test_no_memory_of_one_reading_is_nearer_than_exact_least_squares_and_a_window_brings_it_nearer() -> None:
    errors = {}
    for name, rule, rate in [
        ("sums", MemoryRule(feature="identity", bias=BiasOptions(kind="dot")), 1.0),
        ("delta", MemoryRule(gradient_at="token"), 1.0),
        ("window", MemoryRule(chunk=1, window=16), 0.1),
    ]:
        keys, values = pairs(0, 48, 64, common=1.0)
        made = of_rule(rule, keys, values)
        errors[name] = (answers(made, after(made, keys, values, rate), keys) - values).square().sum(-1).mean()
    _, (solution, _) = least_squares(*(part.transpose(1, 2) for part in (keys, keys, values)), ridge=1e-3)
    errors["exact"] = (keys @ solution - values).square().sum(-1).mean()
    assert errors["exact"] < 0.1 * min(errors["sums"], errors["delta"], errors["window"])
    assert errors["window"] < 0.8 * errors["delta"] < errors["sums"]
    assert once(MemoryRule(chunk=1, window=16), 0.1, 48, 64, common=2.0) > 0.9


def test_a_window_of_sixteen_pairs_leaves_a_smaller_error_than_one_of_one() -> None:
    left = {}
    for window in (1, 16):
        total = 0.0
        for seed in SEEDS:
            keys, values = pairs(seed, 48, 64)
            made = of_rule(MemoryRule(chunk=1, window=window), keys, values)
            total += (answers(made, after(made, keys, values, 0.4), keys) - values).norm(dim=-1).mean().item()
        left[window] = total / len(SEEDS)
    assert left[1] == pytest.approx(0.70, abs=0.03)
    assert left[16] == pytest.approx(0.51, abs=0.03)


@pytest.mark.parametrize(("count", "plain", "squared"), [(32, 0.49, 0.99), (64, 0.25, 0.87), (128, 0.13, 0.67)])
def test_squares_of_keys_let_a_matrix_hold_more_pairs_than_keys_have_features(
    count: int, plain: float, squared: float
) -> None:
    assert once(MemoryRule(gradient_at="token"), 1.0, count, 16) == pytest.approx(plain, abs=0.05)
    rule = MemoryRule(gradient_at="token", feature="poly", polynomial=ALL_PRODUCTS)
    assert once(rule, 1.0, count, 16) == pytest.approx(squared, abs=0.05)
    bounded = MemoryRule(gradient_at="token", feature="poly", polynomial=PolynomialOptions(rank=128))
    assert once(bounded, 1.0, count, 16) > plain + 0.6 * (squared - plain)


def test_features_with_all_products_have_the_inner_products_of_their_polynomials_and_low_rank_comes_near() -> None:
    x, y = (F.normalize(torch.randn(1, 1, 40, 6, dtype=torch.float64), dim=-1) for _ in range(2))
    inner = (x * y).sum(-1)

    def products(feature: str, rank: int | None, degree: int = 3) -> Tensor:
        torch.manual_seed(0)
        rule = MemoryRule(feature=feature, polynomial=PolynomialOptions(degree=degree, rank=rank))
        made = FeatureMap(rule=rule, num_heads=1, key_size=6).double()
        found = made(x), made(7.0 * y)
        assert found[0].shape[-1] == rule.feature_width(6)
        return (found[0] * found[1]).sum(-1)

    cubic = (inner + inner**2 + inner**3) / 3
    torch.testing.assert_close(products("poly", None), cubic)
    exponential = (1 + inner + inner**2 / 2 + inner**3 / 6) / (1 + 1 + 1 / 2 + 1 / 6)
    torch.testing.assert_close(products("taylor", None), exponential, rtol=0, atol=1e-7)
    assert (products("poly", 512) - cubic).abs().mean() < 0.05
    assert (products("poly", 8) - cubic).abs().mean() > (products("poly", 512) - cubic).abs().mean()
    torch.testing.assert_close(products("poly", 4, degree=1), inner)


def test_a_window_that_weighs_a_tokens_own_pair_alone_is_the_rule_without_one() -> None:
    wide = RULES["mlp-omega"]
    narrow = MemoryRule(**{**wide.__dict__, "window": 1})
    given = tokens(wide, 9)
    alone = torch.zeros_like(given.window)
    alone[..., 0] = 1.0
    found, end = memory(wide)(given._replace(window=alone))
    expected, plain = memory(narrow)(given._replace(window=None))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    for mine, other in zip(end.weights, plain.weights, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-13)
    assert plain.window == ()


def test_pairs_of_a_window_beyond_its_length_are_forgotten_by_it() -> None:
    rule = MemoryRule(chunk=4, window=3)
    made, given = memory(rule), tokens(rule, 9)
    _, end = made(given)
    for held, written in zip(end.window, (made.features(given.k), given.v), strict=True):
        assert torch.equal(held, written[:, :, -2:])


def test_orthogonal_steps_of_single_tokens_are_the_papers() -> None:
    """M_t = α M_{t−1} − rate NS(S_t), S_t = η S_{t−1} + ∇, with the gradient at M_{t−1}."""
    rule = MemoryRule(optimizer="muon", retention="decay", chunk=1)
    made, given = memory(rule), tokens(rule, 6)
    with torch.no_grad():
        found = made(given)[0][0, 0]
        k, q = (made.features(part)[0, 0] for part in (given.k, given.q))
        W, S = made.first[0][0], torch.zeros_like(made.first[0][0])
        for t in range(6):
            S = given.log_momentum[0, 0, t].exp() * S + torch.outer(k[t], k[t] @ W - given.v[0, 0, t])
            W = given.log_decay[0][0, 0, t].exp() * W - given.rate[0, 0, t] * newton_schulz(S)
            torch.testing.assert_close(found[t], q[t] @ W, rtol=0, atol=1e-10)


def test_a_chunks_orthogonal_step_is_about_as_long_in_all_directions_and_only_its_last_token_reads_it() -> None:
    keys, values = pairs(0, 32, 16)
    made = of_rule(MemoryRule(optimizer="muon", chunk=32), keys, values[..., :16], learned_start=True)
    state = after(made, keys, values[..., :16], 0.01)
    sizes = torch.linalg.svdvals(state.weights[0] - made.first[0]) / 0.32
    assert sizes.min() > 0.5
    assert sizes.max() < 1.5
    before = after(made, keys[:, :, :31], values[:, :, :31, :16], 0.01)
    assert torch.equal(before.weights[0], made.first[0].unsqueeze(0))
    torch.testing.assert_close(before.owed[0], torch.full((1, 1, 1, 1), 0.31, dtype=torch.float64))


def small(preset: type[OmegaNet] | type[Atlas], chunk: int) -> MemoryRule:
    return preset(num_heads=1, chunk=chunk, window=4, rank=32).rule


WRITERS = {
    "omega": (MemoryRule(chunk=1, window=4), 0.3),
    "muon": (MemoryRule(optimizer="muon", chunk=1), 0.05),
    "omega-net": (small(OmegaNet, 4), 0.1),
    "atlas": (small(Atlas, 1), 0.01),
    "atlas-by-chunks": (small(Atlas, 4), 0.01),
}


@pytest.mark.parametrize("name", WRITERS)
def test_pairs_that_were_written_are_recalled(name: str) -> None:
    rule, rate = WRITERS[name]
    (keys, values), (strange, others) = pairs(0, 16, 32), pairs(1, 16, 32)
    made = of_rule(rule, keys, values, learned_start=True)

    def error(state: MemoryState, asked: Tensor, wanted: Tensor) -> Tensor:
        return (answers(made, state, asked) - wanted).square().sum(-1).mean()

    state: MemoryState | None = None
    for _ in range(8):
        state = after(made, keys, values, rate, state)
    assert state is not None
    assert error(state, keys, values) < 0.25 * error(made.empty_state(1), keys, values)
    assert error(state, strange, others) > 2 * error(state, keys, values)


@pytest.mark.parametrize("name", ["omega", "omega-net", "atlas-by-chunks"])
def test_one_pair_is_replaced_and_the_others_stay(name: str) -> None:
    rule, rate = WRITERS[name]
    keys, (_, values), (_, others) = (
        torch.eye(32, dtype=torch.float64)[None, None, :16],
        *(pairs(s, 16, 32) for s in (0, 1)),
    )
    made = of_rule(rule, keys, values, learned_start=True)
    state: MemoryState | None = None
    for _ in range(16):
        state = after(made, keys, values, rate, state)
    changed = values.clone()
    changed[:, :, 3] = others[:, :, 3]
    for _ in range(16):
        state = after(made, keys, changed, rate, state)
    assert state is not None
    left = (answers(made, state, keys) - changed).square().sum(-1)[0, 0]
    assert left.max() < 0.25
    assert (answers(made, state, keys)[:, :, 3] - values[:, :, 3]).square().sum() > 0.5


def test_what_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="window: must be at least 1"):
        MemoryRule(window=0)
    with pytest.raises(ValueError, match="window: 4 needs gradient_at: chunk, got 'token'"):
        MemoryRule(window=4, gradient_at="token")
    with pytest.raises(ValueError, match="optimizer: 'muon' needs gradient_at: chunk, got 'decayed'"):
        MemoryRule(optimizer="muon", gradient_at="decayed")
    with pytest.raises(ValueError, match="polynomial.degree: must be at least 1"):
        PolynomialOptions(degree=0)
    keys, values = pairs(0, 4, 16)
    with pytest.raises(ValueError, match="memory.residual: needs keys as wide as values, got 80 and 64"):
        of_rule(MemoryRule(memory=NetworkOptions(residual=True), feature="poly"), keys, values)
    one = torch.ones(1, 1, 4, dtype=torch.float64)
    made = of_rule(MemoryRule(window=3), keys, values)
    with pytest.raises(ValueError, match="window: the memory's rule needs it"):
        made(Tokens(keys, keys, values, one, (), None, None))
    with pytest.raises(ValueError, match="window: must weigh 3 pairs, got 2"):
        made(Tokens(keys, keys, values, one, (), None, None, None, window=one.unsqueeze(-1).repeat(1, 1, 1, 2)))
