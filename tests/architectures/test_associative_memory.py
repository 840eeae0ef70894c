"""The core of the test-time memories: the token loop is the definition, and everything else is equal to it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from associative_memories import (
    HEADS,
    LAYERED,
    ROWS,
    RULES,
    assert_same,
    layers_of,
    memory,
    packed,
    solution,
    tokens,
)  # fmt: skip
from torch import Tensor

from clplat.architectures.associative_memory import operations
from clplat.architectures.associative_memory.memory import AssociativeMemory
from clplat.architectures.associative_memory.network import Network, loss
from clplat.architectures.associative_memory.state import MemoryState, Tokens
from clplat.kernels.newton_schulz import newton_schulz

every_rule = pytest.mark.parametrize("name", RULES)


def inner_loss(own: Network, given: Tokens, source: list[Tensor], b: int, h: int, t: int) -> Callable[..., Tensor]:
    """Of weights: what a token's step lowers, the weighted losses of its window's pairs."""
    rule = own.rule

    def inner(weights: list[Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for back in range(min(rule.window, t + 1)):
            pair = (b, h, slice(t - back, t - back + 1))
            target = own.read(source, given.v[pair]) if rule.target == "self" else given.v[pair]
            limit = None if given.threshold is None else given.threshold[pair]
            answer = own.read(weights, given.k[pair])
            if rule.delta == "single":  # linear in what the layers give, with the slope at nothing given
                nothing = own.answer(given.k[pair], torch.zeros_like(target))
                slope = torch.func.grad(lambda x, v=target, most=limit: loss(x, v, rule.bias, most).sum())(nothing)
                return (answer * slope).sum()
            weight = 1.0 if given.window is None else given.window[b, h, t, back]
            total = total + weight * loss(answer, target, rule.bias, limit).sum()
        return total

    return inner


def by_autograd(made: AssociativeMemory, given: Tokens) -> torch.Tensor:
    """Answers by the equations with inner gradients from `torch.func.grad`, one row, head and token after another."""
    network, rule, start = made._network(), made.rule, made.empty_state(ROWS)
    given = made._checked(given)
    answers = torch.zeros_like(given.v)
    for b in range(ROWS):
        for h in range(HEADS):
            own = network.__class__(
                rule=rule,
                scale=None if network.scale is None else network.scale[h],
                shift=None if network.shift is None else network.shift[h],
                norms=tuple(norm[h] for norm in network.norms),
            )
            W = [weight[b, h] for weight in start.weights]
            S = [torch.zeros_like(weight) for weight in W]
            for t in range(given.q.shape[2]):
                if t % rule.chunk == 0:
                    anchor = W
                    owed = [torch.zeros(1, dtype=torch.float64)] * len(W)
                decays = [gate[b, h, t].exp().unsqueeze(-1) for gate in given.log_decay] or [1.0] * len(W)
                kept = [a * weight for a, weight in zip(decays, W)]
                source = {"chunk": own.weights(anchor), "token": W, "decayed": kept}[rule.gradient_at]
                slopes = torch.func.grad(inner_loss(own, given, source, b, h, t))([part.detach() for part in source])
                momentum = 0.0 if given.log_momentum is None else given.log_momentum[b, h, t].exp()
                rate = given.rate[b, h, t]
                S = [momentum * s - (1.0 if rule.orthogonal else rate) * slope for s, slope in zip(S, slopes)]
                if rule.delta != "none":
                    read = own.through(lambda n, x, source=source: x @ source[n], given.k[b, h, t])[0]
                    erased = [torch.outer(x, x @ old) / (x @ x) for x, old in zip(read, W)]
                    kept = [old - rate * part * rule.erases(n) for n, (old, part) in enumerate(zip(kept, erased))]
                W = [old if rule.orthogonal else old + s for old, s in zip(kept, S)]
                owed = [a * far + rate for a, far in zip(decays, owed)]
                closes = (t + 1) % rule.chunk == 0
                if rule.orthogonal and closes:
                    W = [w + far * newton_schulz(s) for w, far, s in zip(W, owed, S)]
                if rule.mapped and closes:
                    W = own.settled(W)
                asked = own.weights(W if rule.mapped and closes and rule.read == "post" else anchor)
                factors = None if rule.mapped and closes else rule.map.inside(anchor)
                if rule.read == "post" and factors is not None:
                    asked = [factor * weight for factor, weight in zip(factors, W)]
                answers[b, h, t] = own.read(asked, given.q[b, h, t : t + 1])[0]
    return answers


@every_rule
def test_closed_inner_gradients_are_those_that_autograd_finds(name: str) -> None:
    made, given = memory(RULES[name]), tokens(RULES[name], 6)
    expected = by_autograd(made, Tokens(*(p if p is None or isinstance(p, tuple) else p.detach() for p in given)))
    torch.testing.assert_close(made.by_definition(given)[0], expected, rtol=0, atol=1e-12)


@every_rule
@pytest.mark.parametrize("length", [1, 3, 11])
def test_the_chunked_form_is_the_token_loop_with_all_outer_gradients(name: str, length: int) -> None:
    made, given = memory(RULES[name]), tokens(RULES[name], length)
    expected = solution(made, given, lambda: made.by_definition(given))
    assert_same(solution(made, given, lambda: made(given)), expected)


@every_rule
def test_a_row_split_anywhere_is_one_row(name: str) -> None:
    made, given = memory(RULES[name]), tokens(RULES[name], 9)
    expected = solution(made, given, lambda: made(given))
    for place in (1, 4, 7):

        def in_two(place: int = place) -> tuple[torch.Tensor, MemoryState]:
            first, between = made(given.part(0, place))
            second, end = made(given.part(place, 9), between)
            return torch.cat([first, second], 2), end

        assert_same(solution(made, given, in_two), expected)


@every_rule
def test_a_resumed_state_is_learned_through_and_rows_may_stand_at_different_places_of_a_chunk(name: str) -> None:
    rule = RULES[name]
    made, given, before = memory(rule), tokens(rule, 7), tokens(rule, 6, seed=1)
    counts = torch.arange(6) < torch.tensor([6, 1, 3]).unsqueeze(1)
    with torch.no_grad():
        start = made(before._replace(counts=counts))[1]
    assert torch.equal(start.offset, torch.tensor([6, 1, 3]) % rule.chunk if rule.anchored else torch.zeros(3).long())
    start = start._replace(
        **{name: tuple(w.clone().requires_grad_() for w in getattr(start, name)) for name in LAYERED}
    )
    expected = solution(made, given, lambda: made.by_definition(given, start), start)
    assert_same(solution(made, given, lambda: made(given, start), start), expected)


@every_rule
def test_tokens_that_do_not_count_change_nothing(name: str) -> None:
    made, given = memory(RULES[name]), tokens(RULES[name], 9)
    counts = torch.arange(9) < torch.tensor([9, 2, 6]).unsqueeze(1)
    _, end = made(given._replace(counts=counts))
    _, defined = made.by_definition(given._replace(counts=counts))
    for row, length in enumerate([9, 2, 6]):
        _, alone = made(given.part(0, length))
        for other in (end, defined):
            for found, expected in zip(layers_of(other), layers_of(alone), strict=True):
                torch.testing.assert_close(found[row], expected[row], rtol=0, atol=1e-12)
            assert other.offset[row] == alone.offset[row]


@every_rule
def test_a_packed_document_is_read_as_if_it_stood_alone(name: str) -> None:
    made, given, documents = memory(RULES[name]), tokens(RULES[name], 11), packed()
    expected = solution(made, given, lambda: (made.by_definition(given, documents=documents)[0], None))
    assert_same(solution(made, given, lambda: (made.read_documents(given, documents), None)), expected)
    for row, start, stop in [(0, 0, 5), (0, 5, 6), (0, 6, 11), (1, 0, 11), (2, 0, 3), (2, 3, 11)]:
        alone = made(given.part(start, stop))[0][row]
        torch.testing.assert_close(expected["answers"][row, :, start:stop], alone, rtol=0, atol=1e-12)


@every_rule
def test_no_answer_depends_on_a_later_token_and_no_row_on_another(name: str) -> None:
    made, given = memory(RULES[name]), tokens(RULES[name], 7)
    before = made(given)[0]
    for place in (1, 4, 5):
        changed = given._replace(k=given.k.clone(), v=given.v.clone(), q=given.q.clone())
        for part in (changed.k, changed.v, changed.q):
            part.data[0, :, place:] += 1.0
        after = made(changed)[0]
        assert torch.equal(after[0, :, :place], before[0, :, :place])
        assert not torch.equal(after[0, :, place], before[0, :, place])
        assert torch.equal(after[1:], before[1:])


@every_rule
def test_it_learns_in_evaluation_and_inference_mode_as_in_training(name: str) -> None:
    made, given = memory(RULES[name]).train(), tokens(RULES[name], 7)
    trained = made(given)[0]
    with torch.inference_mode():
        asked = made.eval()(Tokens(*(p if p is None or isinstance(p, tuple) else p.clone() for p in given)))[0]
        silent = made(given._replace(rate=torch.zeros_like(given.rate)))[0]
    assert torch.equal(trained, asked)
    assert not torch.allclose(trained, silent)


@every_rule
def test_without_steps_and_forgetting_it_stays_as_it_began(name: str) -> None:
    made, given = memory(RULES[name]), tokens(RULES[name], 7)
    still = given._replace(
        rate=torch.zeros_like(given.rate), log_decay=tuple(torch.zeros_like(gate) for gate in given.log_decay)
    )
    first = made.empty_state(ROWS).weights
    answers, end = made(still)
    for found, expected in zip(end.weights, first):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    network = made._network()
    expected = network.read(network.weights(first), made._checked(given).q)
    torch.testing.assert_close(answers, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["hebb", "frozen", "titans-matrix", "exact", "gdn", "delta-single-gdn", "mlp-titans", "mlp-dot"]
)
def test_calls_that_a_gpu_gives_to_the_kernels_are_the_token_loop_too(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU packed rows and open chunks go to the operations as well; here their PyTorch forms answer for them."""
    rule = RULES[name]
    made, given, documents = memory(rule), tokens(rule, 11), packed()
    for operation in (operations.MatrixOperation, operations.MLPOperation):
        monkeypatch.setattr(operation, "form", lambda self, tokens: "triton")
    expected = solution(made, given, lambda: (made.by_definition(given, documents=documents)[0], None))
    assert_same(solution(made, given, lambda: (made.read_documents(given, documents), None)), expected)
    with torch.no_grad():
        counts = torch.arange(6) < torch.tensor([6, 1, 3]).unsqueeze(1)
        start = made(tokens(rule, 6, seed=1)._replace(counts=counts))[1]
    assert_same(
        solution(made, given, lambda: made(given, start)),
        solution(made, given, lambda: made.by_definition(given, start)),
    )
    assert made.backend == ("mlp_memory triton" if name.startswith("mlp") else "delta_memory triton")


@pytest.mark.parametrize("name", ["gdn", "mlp-titans"])
def test_a_feature_map_that_autocast_computes_in_float32_takes_no_call_from_the_operations(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, given = memory(RULES[name]).float(), tokens(RULES[name], 5)
    narrow = given._replace(q=given.q.bfloat16(), k=given.k.bfloat16(), v=given.v.bfloat16())
    monkeypatch.setattr(made.features, "forward", lambda x: x.float())
    checked = made._checked(narrow)
    assert checked.q.dtype == checked.k.dtype == checked.v.dtype == torch.bfloat16
