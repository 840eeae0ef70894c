"""Every form of `self_modifying` against the token loop in fp64: outputs, end states and the gradient of every input.

On a computer without a GPU the Triton kernels run in Triton's interpreter; with one, see tests/gpu.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from delta_memories import Tensors, covering
from self_modifying_ops import READ, STATES, TOKENWISE, Case, assert_close, by, called, definition, problem, solved

from clplat.kernels.backends import interpreting
from clplat.kernels.self_modifying import SelfModifyingState

BACKENDS = ("torch", "triton") if interpreting() else ("torch",)
DOUBLE = {"forward": 1e-13, "backward": 1e-12}
SINGLE = {"forward": 5e-6, "backward": 2e-5}

pytestmark = [pytest.mark.usefixtures("unwritten_is_nan")]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
interpreted = pytest.mark.skipif(not interpreting(), reason="with a GPU, see tests/gpu")

CASES = [
    Case(**levels)
    for levels in covering(
        ("delta", "momentum", "self_targets"), own=(False, True), self_targets=(True, False),
        delta=("double", "single", "none"), momentum=(True, False), decay=(True, False), damped=(True, False),
        unit_values=(True, False), max_gradient=(None, 0.3), tokens=(1, 15, 16, 17), D=(16, 20),
    )
]  # fmt: skip
LARGER = [
    Case(tokens=33, chunk=32, D=24, batch=2),
    Case(tokens=70, chunk=64, D=32, heads=2),
    Case(tokens=31, chunk=32, momentum=False, D=60),
]
SEGMENTS = (5, 0, 16, 19)


def agrees(case: Case, backend: str, given: Tensors | None = None) -> Tensors:
    """The solution of a backend, in fp64 if not told otherwise, after it was found to be the definition's."""
    given = problem(case, torch.float64) if given is None else given
    found = by(case, given, backend)
    assert_close(found, definition(case, given), **(DOUBLE if given["x"].dtype == torch.float64 else SINGLE))
    return found


@pytest.mark.parametrize("case", CASES + LARGER, ids=str)
@every_backend
def test_outputs_states_and_gradients_are_those_of_the_token_loop(case: Case, backend: str) -> None:
    agrees(case, backend)


@pytest.mark.parametrize("delta", ["double", "single"])
@every_backend
def test_in_fp32_every_form_is_fp32_rounding_away_from_the_token_loop(delta: Any, backend: str) -> None:
    case = Case(tokens=17, delta=delta, heads=2)
    agrees(case, backend, problem(case))


def test_the_chunked_forms_gradients_are_its_numerical_derivatives() -> None:
    case = Case(tokens=18, D=4, max_gradient=0.4)
    given = problem(case, torch.float64)
    names = [name for name in (*TOKENWISE, *READ, *STATES) if name in given]

    def flat(numbers: torch.Tensor) -> torch.Tensor:
        parts = numbers.split([given[name].numel() for name in names])
        own = {name: part.view_as(given[name]) for name, part in zip(names, parts, strict=True)}
        o, end = called(case, own, backend="torch")
        return torch.cat([part.flatten() for part in (o, *end[:3]) if part is not None])

    start = torch.cat([given[name].flatten() for name in names]).requires_grad_()
    assert torch.autograd.gradcheck(flat, start, fast_mode=True)


@pytest.mark.parametrize("lengths", [(16, 3), (10, 2, 9)], ids=["at a chunk's end", "in the middle of a chunk"])
@every_backend
def test_calls_one_after_another_are_one_call(lengths: tuple[int, ...], backend: Any) -> None:
    case = Case(tokens=sum(lengths))
    given = problem(case)

    def in_parts(leaves: Tensors) -> tuple[torch.Tensor, SelfModifyingState]:
        outputs, start, named = [], 0, {}
        for length in lengths:
            own = {name: leaves[name][:, start : start + length] for name in TOKENWISE}
            o, state = called(case, leaves | own, backend=backend, **named)
            outputs.append(o)
            named = {"state": state}
            start += length
        return torch.cat(outputs, 1), state

    assert_close(solved(given, in_parts), definition(case, given), **SINGLE)


@pytest.mark.parametrize(("offsets", "momentum"), [(None, True), ((3, 0, 7, 15), False)])
@every_backend
def test_packed_sequences_are_as_good_as_alone_and_continue_chunks_of_their_own(
    offsets: Any, momentum: bool, backend: str
) -> None:
    agrees(Case(lengths=SEGMENTS, offsets=offsets, momentum=momentum), backend)


@pytest.mark.parametrize(("tokens", "offsets"), [(3, (0, 3, 13)), (14, (3, 13))])
@every_backend
def test_the_rows_of_a_batch_continue_chunks_of_their_own(tokens: int, offsets: Any, backend: str) -> None:
    agrees(Case(tokens=tokens, batch=len(offsets), offsets=offsets), backend)


@pytest.mark.parametrize("case", [Case(tokens=40), Case(lengths=(20, 0, 3), offsets=(15, 2, 0))], ids=str)
@interpreted
def test_the_kernels_walk_through_several_chunks(case: Case) -> None:
    agrees(case, "triton")


@pytest.mark.parametrize("offsets", [None, (0, 5)])
@every_backend
def test_no_tokens_change_nothing(offsets: Any, backend: str) -> None:
    case = Case(tokens=0, batch=2, offsets=offsets)
    given = problem(case)
    found = by(case, given, backend)
    assert found["o"].shape == (2, 0, 1, 16)
    assert torch.equal(found["W"], given["W"]) and torch.equal(found["dS"], given["dS"])
    if offsets:
        assert found["offset"].tolist() == [0, 5] and torch.equal(found["anchor"][1], given["anchor"][1])


@every_backend
def test_a_memory_that_forgets_all_at_once_stays_finite(backend: str) -> None:
    case = Case()
    given = problem(case, torch.float64)
    given["decay_bias"] = given["decay_bias"] - 60.0
    given["log_momentum"][:, ::5] = -torch.inf
    agrees(case, backend, given)


@every_backend
def test_one_token_all_through_a_chunk_does_no_harm(backend: str) -> None:
    case = Case(tokens=40, chunk=32)
    given = problem(case, torch.float64)
    given["x"] = given["x"][:, :1] + 0.05 * given["x"]
    agrees(case, backend, given)


@every_backend
def test_inputs_may_lie_in_memory_in_any_order(backend: str) -> None:
    case = Case(tokens=5, heads=2)
    given = problem(case, torch.float64)
    strange = {name: given[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("q", "do")}
    strange["x"] = torch.stack([given["x"], given["x"]], -1)[..., 0]
    strange |= {name: given[name].mT.contiguous().mT for name in ("W", "dW", "S", "dS", "rate", "decay")}
    strange |= {name: given[name][..., :1].expand(-1, -1, 2) for name in ("log_momentum", "damping")}
    assert not any(part.is_contiguous() for part in strange.values())
    agrees(case, backend, given | strange)


@every_backend
def test_half_precision_is_rounding_away_from_the_token_loop(backend: str) -> None:
    case, dtype = Case(D=32, tokens=20), torch.bfloat16
    given = problem(case, dtype)
    found = by(case, given, backend)
    assert found["o"].dtype == found["dx"].dtype == found["dq"].dtype == dtype
    assert found["W"].dtype == found["drate"].dtype == torch.float32
    assert_close(found, definition(case, given), forward=1.5e-2, backward=3e-2)


@every_backend
def test_no_output_knows_a_later_token(backend: str) -> None:
    case = Case()
    given = problem(case)
    with torch.no_grad():
        before = called(case, given, backend=backend)[0]
        for t in (1, 16):
            changed = {name: part.clone() for name, part in given.items()}
            for name in ("x", "q", "log_momentum", "damping"):
                changed[name][:, t] *= 0.5
            after = called(case, changed, backend=backend)[0]
            assert torch.equal(after[:, :t], before[:, :t]) and not torch.equal(after[:, t], before[:, t])


@every_backend
def test_rows_and_heads_know_nothing_of_each_other(backend: str) -> None:
    case = Case(tokens=2, batch=2, heads=2)
    given = problem(case)
    changed = {name: part.clone() for name, part in given.items()}
    for name in ("x", "q", "log_momentum", "damping", "do"):
        changed[name][1] *= 0.5
        changed[name][:, :, 1] *= 0.5
    for name in ("W", "S", "dW", "dS"):
        changed[name][1] = 7
        changed[name][:, :, 1] = 7
    before, after = by(case, given, backend), by(case, changed, backend)
    for name in ("o", "dx", "dq", "dlog_momentum", "ddamping"):
        assert torch.equal(before[name][0, :, 0], after[name][0, :, 0]), name
        assert not torch.equal(before[name], after[name]), name
    for name in ("W", "S", "dW", "dS"):
        assert torch.equal(before[name][0, :, 0], after[name][0, :, 0]), name


def test_a_batch_without_rows_is_answered() -> None:
    case = Case(batch=0)
    given = problem(case)
    for backend in BACKENDS:
        o, end = called(case, given, backend=backend)
        assert o.shape == (0, 18, 1, 16) and end.W.shape == given["W"].shape
