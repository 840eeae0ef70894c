"""Self-modifying memories: the token loop is the definition, the chunked form is equal to it, and it is the paper's."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from associative_memories import assert_same, packed
from self_modifying import HEADS, MATRIX, OPTIONS, ROWS, WIDTH, inputs, memory, solution

from clplat.architectures.associative_memory.rule import NetworkOptions
from clplat.architectures.associative_memory.state import MemoryState
from clplat.architectures.hope import forms, operation
from clplat.architectures.hope.inputs import HeadInputs
from clplat.architectures.hope.options import SelfModifyingOptions
from clplat.kernels.backends import interpreting

every_option = pytest.mark.parametrize("name", OPTIONS)


@every_option
@pytest.mark.parametrize("length", [3, 11])
def test_the_chunked_form_is_the_token_loop_with_all_outer_gradients(name: str, length: int) -> None:
    made, given = memory(OPTIONS[name]), inputs(OPTIONS[name], length)
    expected = solution(made, given, lambda: made.by_definition(given))
    assert_same(solution(made, given, lambda: made(given)), expected)


@every_option
def test_a_row_split_anywhere_is_one_row(name: str) -> None:
    made, given = memory(OPTIONS[name]), inputs(OPTIONS[name], 9)
    expected = solution(made, given, lambda: made(given))
    for place in (1, 6):

        def in_two(place: int = place) -> tuple[torch.Tensor, MemoryState]:
            first, between = made(given.part(0, place))
            second, end = made(given.part(place, 9), between)
            return torch.cat([first, second], 2), end

        assert_same(solution(made, given, in_two), expected)


@every_option
def test_a_resumed_state_is_learned_through_and_rows_may_stand_at_different_places_of_a_chunk(name: str) -> None:
    options = OPTIONS[name]
    made, given, before = memory(options), inputs(options, 7), inputs(options, 6, seed=1)
    counts = torch.arange(6) < torch.tensor([6, 1, 3]).unsqueeze(1)
    with torch.no_grad():
        start = made(before._replace(counts=counts))[1]
        defined = made.by_definition(before._replace(counts=counts))[1]
    assert torch.equal(start.offset, torch.tensor([6, 1, 3]) % made.period)
    for found, expected in zip((*start.weights, *start.anchor), (*defined.weights, *defined.anchor), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    start = MemoryState(*(tuple(w.clone().requires_grad_() for w in layers) for layers in start[:3]), start.offset)
    expected = solution(made, given, lambda: made.by_definition(given, start), start)
    assert_same(solution(made, given, lambda: made(given, start), start), expected)


@every_option
def test_a_packed_document_is_read_as_if_it_stood_alone(name: str) -> None:
    made, given, documents = memory(OPTIONS[name]), inputs(OPTIONS[name], 11), packed()
    expected = solution(made, given, lambda: (made.by_definition(given, documents=documents)[0], None))
    assert_same(solution(made, given, lambda: (made.read_documents(given, documents), None)), expected)
    for row, start, stop in [(0, 0, 5), (0, 5, 6), (0, 6, 11), (1, 0, 11), (2, 0, 3), (2, 3, 11)]:
        alone = made(given.part(start, stop))[0][row]
        torch.testing.assert_close(expected["answers"][row, :, start:stop], alone, rtol=0, atol=1e-12)


@every_option
def test_no_answer_depends_on_a_later_token_and_no_row_on_another(name: str) -> None:
    made, given = memory(OPTIONS[name]), inputs(OPTIONS[name], 9)
    before = made(given)[0]
    for place in (2, 4, 5):
        changed = HeadInputs(*(None if part is None else part.detach().clone() for part in given))
        for part in changed[:7]:
            if part is not None:
                part[0, :, place:] += 1.0
        after = made(changed)[0]
        assert torch.equal(after[0, :, :place], before[0, :, :place])
        assert torch.equal(after[1:], before[1:])


@every_option
def test_it_learns_in_evaluation_and_inference_mode_as_in_training_and_begins_anew_without_a_state(name: str) -> None:
    made, given = memory(OPTIONS[name]).train(), inputs(OPTIONS[name], 9)
    trained, end = made(given)
    with torch.inference_mode():
        asked = made.eval()(HeadInputs(*(None if part is None else part.clone() for part in given)))[0]
    assert torch.equal(trained, asked)
    assert not torch.allclose(made(given, end)[0], trained)
    assert torch.equal(made(given)[0], trained)


def test_it_is_the_papers_rule_written_out_by_hand() -> None:
    """Eq. 88 with matrices and C = 1, in columns as the paper has them: M (α I − η k kᵀ) − η (M k − v̂) kᵀ."""
    options = SelfModifyingOptions(
        network=NetworkOptions(), momentum=False, chunk=1, generator_chunk=1, unit_values=False, max_gradient=None
    )
    made, given = memory(options), inputs(options, 6)
    answers = made(given)[0].detach()
    for b in range(ROWS):
        for h in range(HEADS):
            M = [made.first[0][n * HEADS + h].T.detach() for n in range(5)]
            for t in range(6):
                x = given.x[b, h, t].detach()
                k, v = F.normalize(M[0] @ x[0], dim=0), M[1] @ x[1]
                rate = torch.sigmoid(made.readouts["rate"][h, 0] @ (M[2] @ x[2]) + made.biases["rate"][h, 0]).detach()
                alpha = made.readouts["decay"][h, 0] @ (M[3] @ x[3]) + made.biases["decay"][h, 0]
                alpha = torch.sigmoid(alpha).detach()
                expected = M[4] @ F.normalize(given.query[b, h, t].detach(), dim=0)
                torch.testing.assert_close(answers[b, h, t], expected, rtol=0, atol=1e-12)
                erase = alpha * torch.eye(WIDTH, dtype=x.dtype) - rate * torch.outer(k, k)
                M = [m @ erase - rate * torch.outer(m @ k - m @ v, k) for m in M]


def test_a_chunks_keys_are_made_by_the_memories_of_the_last_finished_chunk() -> None:
    options = OPTIONS["hope"]
    made, given = memory(options), inputs(options, 8)
    _, first = made(given.part(0, 4))
    _, open_chunk = made(given.part(0, 6))
    expected = made.generated(given, first.weights)
    for state in (first, open_chunk):
        tokens = made.generated(given, state.anchor)
        for found, wanted in zip((tokens.k, tokens.v, tokens.rate), (expected.k, expected.v, expected.rate)):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)
    assert not torch.allclose(open_chunk.weights[0], open_chunk.anchor[0])


@every_option
def test_the_outer_loss_reaches_every_weight_that_a_memory_begins_with(name: str) -> None:
    made, given = memory(OPTIONS[name]), inputs(OPTIONS[name], 13)
    made(given)[0].square().sum().backward()
    for number, weight in enumerate(made.first):
        assert (weight.grad.flatten(1).abs().sum(1) > 0).all(), f"layer {number}"
    for parameter in made.parameters():
        assert parameter.grad is not None and (parameter.grad != 0).any()


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="options.max_rate: must lie above 0 and, .* double, at most at 1, beyond"):
        SelfModifyingOptions(max_rate=1.1)
    assert SelfModifyingOptions(delta="single", max_rate=2.0).rule.largest_rate == 2.0
    with pytest.raises(ValueError, match="options.generator_chunk: must divide chunk .16. or be a multiple"):
        SelfModifyingOptions(generator_chunk=24)
    with pytest.raises(ValueError, match="options.generated: must be of query, key, value, rate, decay, got 'keys'"):
        SelfModifyingOptions(generated=["keys"])
    with pytest.raises(ValueError, match="options.network.norm"):
        SelfModifyingOptions(network=NetworkOptions(norm=True))
    with pytest.raises(ValueError, match="options.rate_start: must lie between 0 and 1"):
        SelfModifyingOptions(rate_start=1.0)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the operation can compute goes to its kernels, interpreted."""
    call = operation.kernel.self_modifying
    monkeypatch.setattr(operation.SelfModifyingOperation, "form", lambda self, given: "triton")
    monkeypatch.setattr(operation.kernel, "self_modifying", partial(call, backend="triton"))


@pytest.mark.skipif(not interpreting(), reason="with a GPU, see tests/gpu")
@pytest.mark.usefixtures("kernels")
def test_the_kernels_are_the_token_loop_for_resumed_rows_and_packed_documents() -> None:
    options = SelfModifyingOptions(network=MATRIX, chunk=16, generator_chunk=16)
    made, given, documents = memory(options), inputs(options, 5), packed()
    counts = torch.arange(13) < torch.tensor([13, 0, 11]).unsqueeze(1)
    with torch.no_grad():
        start = made.by_definition(inputs(options, 13, seed=1)._replace(counts=counts))[1]
    start = MemoryState(*(tuple(w.clone().requires_grad_() for w in layers) for layers in start[:3]), start.offset)
    expected = solution(made, given, lambda: made.by_definition(given, start), start)
    assert_same(solution(made, given, lambda: made(given, start), start), expected)
    assert made.backend == "self_modifying triton"
    given = inputs(options, 11)
    with torch.no_grad():
        expected = made.by_definition(given, documents=documents)[0]
        torch.testing.assert_close(made.read_documents(given, documents), expected, rtol=0, atol=1e-12)


def test_only_what_the_operation_knows_goes_there() -> None:
    for name, options in OPTIONS.items():
        made = memory(options)
        made(inputs(options, 3))
        taken = name in ("matrix", "matrix, token by token", "matrix, shared inputs", "matrix, values as targets")
        assert made.backend == ("self_modifying torch" if taken else "chunked PyTorch"), name


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
def test_compiled_a_chunk_is_one_graph_and_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    options, calls = replace(OPTIONS["hope"], compiled=True), []
    made, given = memory(options), inputs(options, 8)

    def taken() -> object:
        calls.append("asked")
        return torch.compile(forms._stepped, fullgraph=True, dynamic=False, backend="eager")

    expected = memory(OPTIONS["hope"])(given)[0]
    monkeypatch.setattr(forms, "_compiled", taken)
    found = made(given)[0]
    assert calls and torch.equal(found, expected)
