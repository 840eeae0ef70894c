"""Erasing along keys: what is written with it, what is erased, and which eigenvalues a memory can have."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clplat.architectures.associative_memory.memory import AssociativeMemory
from clplat.architectures.associative_memory.mixer import MemoryMixer, ProjectionOptions
from clplat.architectures.associative_memory.presets import MemoryLayer
from clplat.architectures.associative_memory.rule import BiasOptions, MapOptions, MemoryRule, NetworkOptions
from clplat.architectures.associative_memory.state import MemoryState, Tokens
from clplat.kernels.delta_memory import MemoryState as MatrixState
from clplat.kernels.delta_memory import delta_memory

WIDTH = 8


def made(**rule: object) -> AssociativeMemory:
    torch.manual_seed(0)
    return AssociativeMemory(
        rule=MemoryRule(chunk=1, **rule),
        num_heads=1,
        key_size=WIDTH,
        value_size=WIDTH,  # type: ignore[arg-type]
    ).double()


def pairs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthogonal unit keys and random values, (1, 1, N, WIDTH)."""
    draw = torch.Generator().manual_seed(1)
    values = torch.randn(1, 1, count, WIDTH, generator=draw, dtype=torch.float64)
    return torch.eye(WIDTH, dtype=torch.float64)[None, None, :count], values


def written(
    memory: AssociativeMemory, keys: torch.Tensor, values: torch.Tensor, rate: float, state: MemoryState | None = None
) -> MemoryState:
    with torch.no_grad():
        return memory(Tokens(keys, keys, values, torch.full_like(keys[..., 0], rate), (), None, None), state)[1]


def answers(memory: AssociativeMemory, state: MemoryState, keys: torch.Tensor) -> torch.Tensor:
    return memory._network().read(state.weights, keys).detach()


@pytest.mark.parametrize(("delta", "share"), [("single", 1.0), ("double", 0.5)])
@pytest.mark.parametrize("rate", [0.4, 0.9])
def test_a_pair_written_again_and_again_is_learned_whole_by_single_and_half_by_double(
    delta: str, share: float, rate: float
) -> None:
    memory, (key, value) = made(delta=delta), pairs(1)
    state = written(memory, key.expand(-1, -1, 200, -1), value.expand(-1, -1, 200, -1), rate)
    torch.testing.assert_close(answers(memory, state, key), share * value, rtol=0, atol=1e-10)


@pytest.mark.parametrize("network", [NetworkOptions(), NetworkOptions(depth=2, residual=True)])
def test_a_pair_is_erased_where_its_key_is_read_again_and_others_stay(network: NetworkOptions) -> None:
    memory, (keys, values) = made(delta="single", memory=network), pairs(WIDTH)
    state = written(memory, keys, values, 1.0)
    before = answers(memory, state, keys)
    again = written(memory, keys[:, :, 3:4], torch.zeros_like(values[:, :, 3:4]) + keys[:, :, 3:4], 1.0, state)
    after = answers(memory, again, keys)
    target = keys[:, :, 3:4]
    moved = (after - before).norm(dim=-1)[0, 0]
    assert (after[:, :, 3] - target[:, :, 0]).norm() < 0.35 * (before[:, :, 3] - target[:, :, 0]).norm()
    if network.depth == 1:
        torch.testing.assert_close(before, values, rtol=0, atol=1e-12)
        assert moved[[0, 1, 2, 4, 5, 6, 7]].max() < 1e-12
    else:
        assert moved[[0, 1, 2, 4, 5, 6, 7]].mean() < 0.5 * moved[3]


def test_double_diverges_above_a_rate_of_one_and_a_layer_refuses_such_rates() -> None:
    memory, (key, value) = made(delta="double"), pairs(1)
    many = key.expand(-1, -1, 100, -1), value.expand(-1, -1, 100, -1)
    assert answers(memory, written(memory, *many, 1.1), key).abs().max() > 1e6
    for delta, most in (("double", 1.0), ("single", 2.0)):
        rule = MemoryRule(delta=delta)
        assert MemoryLayer(rule=rule, projection=ProjectionOptions(max_rate=most)).build(16).max_rate == most
        with pytest.raises(ValueError, match=f"projection.max_rate: .*delta: {delta}, at most at {most:g}, beyond"):
            MemoryLayer(rule=rule, projection=ProjectionOptions(max_rate=1.01 * most)).build(16)


@pytest.mark.parametrize(("delta", "largest"), [("double", 1.0), ("single", 2.0)])
def test_a_step_of_more_than_half_the_largest_turns_the_sign_of_what_is_kept_along_a_key(
    delta: str, largest: float
) -> None:
    """The eigenvalue along k is 1 − 2η or 1 − η: parity needs one near −1, which decay and smaller steps never give."""
    mixer = MemoryLayer(rule=MemoryRule(delta=delta, chunk=1), projection=ProjectionOptions(max_rate=largest)).build(16)
    assert isinstance(mixer, MemoryMixer)
    memory, (key, _) = made(delta=delta), pairs(1)
    start = MemoryState((torch.eye(WIDTH, dtype=torch.float64)[None, None],), (), (), torch.zeros(1).long())
    for rate, sign in ((0.49 * largest, 1.0), (0.51 * largest, -1.0), (0.95 * largest, -1.0)):
        with torch.no_grad():  # the layer's own gate reaches these rates
            mixer.gates.bias.fill_(torch.tensor(rate / largest).logit().item())
        reached = mixer._tokens(torch.zeros(1, 1, 16), mixer.qkv(torch.zeros(1, 1, 16)), None, None).rate
        torch.testing.assert_close(reached, torch.full_like(reached, rate))
        state = start._replace(anchor=start.weights) if memory.rule.anchored else start
        left = answers(memory, written(memory, key, torch.zeros_like(key), rate, state), key)[0, 0, 0, 0]
        assert left.sign() == sign
        assert float(left) == pytest.approx(1 - rate * 2 / largest)


def test_a_chunk_of_it_is_a_gated_delta_rule_with_frozen_residuals() -> None:
    """β = η / α and v = −α R with the residual R at the chunk's start, which is why `delta_memory` could serve."""
    torch.manual_seed(0)
    rule = MemoryRule(delta="double", retention="decay", chunk=16)
    memory = AssociativeMemory(rule=rule, num_heads=2, key_size=WIDTH, value_size=WIDTH).double()
    q, k, v = (torch.randn(3, 2, 16, WIDTH, dtype=torch.float64) for _ in range(3))
    rate, alpha = (0.2 + 0.7 * torch.rand(3, 2, 16, dtype=torch.float64) for _ in range(2))
    found, end = memory(Tokens(q, k, v, rate, (alpha.log().unsqueeze(-1),), None, None))
    q, k, W = F.normalize(q, dim=-1), F.normalize(k, dim=-1), memory.empty_state(3).weights[0]
    residual = k @ W - v
    parts = (q, k, -alpha.unsqueeze(-1) * residual, rate / alpha, alpha.log())
    o, state = delta_memory(*(part.transpose(1, 2) for part in parts), mode="gdn", chunk=16, state=MatrixState(W))
    torch.testing.assert_close(found, o.transpose(1, 2), rtol=0, atol=1e-12)
    torch.testing.assert_close(end.weights[0], state.W, rtol=0, atol=1e-12)


def test_single_is_given_to_the_kernels_operation_and_double_is_not() -> None:
    for delta, backend in (("single", "delta_memory torch"), ("double", "chunked PyTorch")):
        memory = made(delta=delta)
        written(memory, *pairs(4), 0.5)
        assert memory.backend == backend


def test_what_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="delta: must be one of none, single, double, got 'twice'"):
        MemoryRule(delta="twice")
    with pytest.raises(ValueError, match="delta: 'double' needs gradient_at: chunk, got 'token'"):
        MemoryRule(delta="double", gradient_at="token")
    with pytest.raises(ValueError, match="delta: 'single' has no meaning under memory.norm"):
        MemoryRule(delta="single", memory=NetworkOptions(norm=True))
    with pytest.raises(ValueError, match="max_gradient: must be above 0"):
        MemoryRule(max_gradient=0.0)
    with pytest.raises(ValueError, match="delta: 'double' is computed with .* and window 1 alone, without a map"):
        MemoryRule(delta="double", map=MapOptions(kind="lq"))
    assert MemoryRule(delta="single", bias=BiasOptions(kind="lp")).hebbian
