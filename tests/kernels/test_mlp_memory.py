"""Every form of `mlp_memory` against the token loop in fp64: outputs, end states and the gradient of every input.

On a computer without a GPU the Triton kernels run in Triton's interpreter; with one, see tests/gpu.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from memory_problems import covering, distances
from mlp_memories import STATES, Case, agrees, assert_close, by, definition, problem

from clplat.kernels.backends import interpreting
from clplat.kernels.mlp_memory import layout
from clplat.kernels.mlp_memory.reference import Rule, gradients
from clplat.kernels.mlp_memory.reference import read as answers

BACKENDS = ("torch", "triton") if interpreting() else ("torch",)

pytestmark = [pytest.mark.usefixtures("unwritten_is_nan")]
every_backend = pytest.mark.parametrize("backend", BACKENDS)

CASES = [
    Case(residual=sizes[0] == sizes[1] and number % 2 == 0, D=sizes[0], E=sizes[1], **levels)
    for number, (sizes, levels) in enumerate(
        (levels.pop("sizes"), levels)
        for levels in covering(
            ("bias", "momentum"),
            bias=("l2", "dot"), momentum=(True, False), decay=(True, False), activation=("silu", "gelu"),
            tokens=(1, 15, 16, 17), sizes=((16, 16), (20, 20), (16, 24)), inner=(32, 40, 64),
        )
    )
]  # fmt: skip
LARGER = [
    Case(tokens=35, batch=2),
    Case(tokens=33, chunk=32),
    Case(tokens=130, chunk=64, D=32, E=32, inner=64),
    Case(tokens=31, chunk=32, momentum=False, activation="gelu"),
    # More inner features than a program holds at once, and not a multiple of that.
    Case(tokens=20, D=60, E=60, inner=72),
]
SEGMENTS = (5, 0, 16, 1, 19, 0)


@pytest.mark.parametrize("case", CASES + LARGER, ids=str)
@every_backend
def test_outputs_states_and_gradients_are_those_of_the_token_loop(case: Case, backend: str) -> None:
    agrees(case, backend)


@pytest.mark.parametrize("bias", ["l2", "dot"])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_the_closed_inner_gradients_are_those_that_autograd_finds(activation: Any, bias: Any) -> None:
    rule = Rule(activation=activation, bias=bias, residual=True)
    W = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((6, 9), (9, 6)))
    k, v = torch.randn(2, 1, 6, dtype=torch.float64)
    answer = answers(W, k, rule)
    loss = 0.5 * (answer - v).square().sum() if bias == "l2" else -(answer * v).sum()
    hidden, *slopes = gradients(W, k, v, rule)
    for found, expected in zip((k.mT @ slopes[0], hidden.mT @ slopes[1]), torch.autograd.grad(loss, W), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_the_chunked_form_is_the_token_loop_to_the_last_digits_of_fp64(activation: Any) -> None:
    case = Case(tokens=37, heads=2, activation=activation)
    given = problem(case, torch.float64)
    assert_close(by(case, given, "torch"), definition(case, given), forward=1e-13, backward=1e-12)


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("offsets", [None, (3, 7, 0, 15, 5, 0)])
@every_backend
def test_packed_sequences_are_as_good_as_alone_and_continue_chunks_of_their_own(
    offsets: Any, momentum: bool, backend: str
) -> None:
    agrees(Case(lengths=SEGMENTS, offsets=offsets, momentum=momentum), backend)


@pytest.mark.parametrize(
    "case",
    [
        Case(tokens=70),
        Case(tokens=64, momentum=False),
        Case(lengths=(40, 0, 3), offsets=(15, 2, 0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.skipif(not interpreting(), reason="with a GPU, see tests/gpu")
def test_groups_of_chunks_that_are_walked_once_more_begin_where_the_first_walk_passed(
    case: Case, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clplat.kernels.mlp_memory import launch

    monkeypatch.setattr(layout, "GROUP_TOKENS", 32)
    groups = []
    monkeypatch.setattr(launch, "reads_apart", lambda given: groups.append(given.all_groups) or apart)
    agrees(case, "triton")
    assert groups[0] > 1


@every_backend
def test_rate_zero_and_no_decay_leave_the_memory_alone(backend: str) -> None:
    case = Case(momentum=False, decay=False)
    given = problem(case)
    given["rate"] = torch.zeros_like(given["rate"])
    found = agrees(case, backend, given)
    assert torch.equal(found["W1"], given["W1"]) and torch.equal(found["W2"], given["W2"])
    expected = answers((given["W1"], given["W2"]), given["q"].transpose(1, 2), case.rule).transpose(1, 2)
    torch.testing.assert_close(found["o"], expected, atol=1e-5, rtol=1e-5)


@every_backend
def test_one_key_all_through_a_chunk_does_no_harm_at_steps_of_one_through_its_length(backend: str) -> None:
    case = Case(tokens=70, chunk=32)
    given = problem(case)
    given["k"] = torch.nn.functional.normalize(given["k"] + 20 * given["k"][:, :1], dim=-1)
    given["rate"] = torch.full_like(given["rate"], 1 / 32) * (1 - given["log_momentum"].exp())
    agrees(case, backend, given)


@every_backend
def test_inputs_may_lie_in_memory_in_any_order(backend: str) -> None:
    case = Case(heads=2)
    given = problem(case)
    strange = {name: given[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("q", "v", "do")}
    strange["k"] = torch.stack([given["k"], given["k"]], -1)[..., 0]
    strange |= {name: given[name].mT.contiguous().mT for name in ("W1", "dW2", "dS1", "S2")}
    strange |= {name: given[name][..., :1].expand(-1, -1, 2) for name in ("rate", "log_decay", "log_momentum")}
    assert not any(part.is_contiguous() for part in strange.values())
    agrees(case, backend, given | strange)


@every_backend
def test_rows_and_heads_know_nothing_of_each_other(backend: str) -> None:
    case = Case(tokens=5, batch=2, heads=2)
    given = problem(case)
    changed = {name: part.clone() for name, part in given.items()}
    for name in ("q", "k", "v", "rate", "do"):
        changed[name][1] *= -0.5
        changed[name][:, :, 1] *= -0.5
    for name in ("W1", "S2", "dW1", "dS2"):
        changed[name][1] = 7
        changed[name][:, 1] = 7
    before, after = by(case, given, backend), by(case, changed, backend)
    for name in ("o", "dq", "dk", "dv", "drate", "dlog_decay", "dlog_momentum"):
        assert torch.equal(before[name][0, :, 0], after[name][0, :, 0]), name
        assert not torch.equal(before[name], after[name]), name
    for name in (*STATES[:4], "dW1", "dW2", "dS1", "dS2"):
        assert torch.equal(before[name][0, 0], after[name][0, 0]), name


def test_a_batch_without_rows_is_answered() -> None:
    case = Case(batch=0)
    given = problem(case)
    for backend in BACKENDS:
        assert distances(by(case, given, backend), by(case, given, "recurrent")).keys()
