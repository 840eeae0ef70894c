"""What `delta_memory` and `mlp_memory` both owe: calls in parts, any precision, autograd, autocast, compilers.

On a computer without a GPU the Triton kernels run in Triton's interpreter; with one, see tests/gpu.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import delta_memories as delta
import mlp_memories as mlp
import pytest
import torch
from memory_problems import BACKWARD, FORWARD, TOKENWISE, Problems, Sizes
from torch import Tensor

from clplat.kernels.backends import interpreting
from clplat.kernels.delta_memory.reference import MODES

DELTA, MLP = delta.DELTA, mlp.MLP
KINDS: dict[str, tuple[Problems, Callable[..., Sizes]]] = {
    **{mode: (DELTA, partial(delta.Case, mode=mode)) for mode in MODES},
    "mlp": (MLP, mlp.Case),
}
BACKENDS = ("torch", "triton") if interpreting() else ("torch",)

every_kind = pytest.mark.parametrize(("problems", "case_of"), KINDS.values(), ids=KINDS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
interpreted = pytest.mark.skipif(not interpreting(), reason="here Triton compiles for a GPU: see tests/gpu")
strict = pytest.mark.usefixtures("unwritten_is_nan")


@strict
@every_kind
@every_backend
@pytest.mark.parametrize("lengths", [(16, 3), (10, 2, 9)], ids=["at a chunk's end", "in the middle of a chunk"])
def test_calls_one_after_another_are_one_call(problems: Problems, case_of: Any, lengths: Any, backend: str) -> None:
    case = case_of(tokens=sum(lengths))
    given = problems.problem(case)

    def in_parts(inputs: Any, state: Any) -> tuple[Tensor, Any]:
        outputs, start = [], 0
        for length in lengths:
            tokens = inputs.tokens(start, start + length)
            o, state = problems.operation(*tokens, state=state, backend=backend, **case.arguments())
            outputs.append(o)
            start += length
        return torch.cat(outputs, 1), state

    found, expected = problems.solved(case, given, in_parts), problems.definition(case, given)
    problems.assert_close(found, expected, forward=FORWARD, backward=BACKWARD)


@strict
@every_kind
@every_backend
@pytest.mark.parametrize("tokens", [3, 21])
def test_the_rows_of_a_batch_continue_chunks_of_their_own(
    problems: Problems, case_of: Any, tokens: int, backend: str
) -> None:
    problems.agrees(case_of(tokens=tokens, batch=3, offsets=(0, 3, 13)), backend)


@strict
@every_kind
@every_backend
@pytest.mark.parametrize("offsets", [None, (0, 5)])
def test_no_tokens_change_nothing(problems: Problems, case_of: Any, offsets: Any, backend: str) -> None:
    case = case_of(tokens=0, batch=2, offsets=offsets)
    given = problems.problem(case)
    found = problems.by(case, given, backend)
    assert found["o"].shape == (2, 0, 1, 16)
    layers = len(problems.states) // 3
    assert all(torch.equal(found[name], given[name]) for name in problems.states[: 2 * layers])
    momenta = problems.states[layers : 2 * layers]
    assert all(torch.equal(found["d" + name], given["d" + name]) for name in momenta)
    if case.anchored and offsets:
        anchor = problems.states[-1]
        assert found["offset"].tolist() == [0, 5] and torch.equal(found[anchor][1], given[anchor][1])


@strict
@every_kind
@every_backend
@pytest.mark.parametrize("lowest", [-12.0, -torch.inf])
def test_a_memory_that_forgets_all_at_some_tokens_stays_finite(
    problems: Problems, case_of: Any, lowest: float, backend: str
) -> None:
    case = case_of()
    given = problems.problem(case)
    given["log_decay"][:, ::3] = lowest
    given["log_momentum"][:, ::5] = lowest
    problems.agrees(case, backend, given)


HALF = [
    *((DELTA, delta.Case(mode=mode, D=32, E=32, group=2), torch.bfloat16) for mode in MODES),
    (DELTA, delta.Case(mode="gdn", D=32, E=32, group=2), torch.float16),
    (MLP, mlp.Case(D=32, E=32, inner=64), torch.bfloat16),
    (MLP, mlp.Case(D=32, E=32, inner=64, momentum=False), torch.bfloat16),
    (MLP, mlp.Case(D=32, E=32, inner=64), torch.float16),
]


@strict
@pytest.mark.parametrize(("problems", "case", "dtype"), HALF, ids=[f"{case}-{dtype}" for _, case, dtype in HALF])
@every_backend
def test_half_precision_is_rounding_away_from_the_token_loop(
    problems: Problems, case: Sizes, dtype: torch.dtype, backend: str
) -> None:
    given = problems.problem(case, dtype)
    found = problems.by(case, given, backend)
    assert found["o"].dtype == found["dq"].dtype == found["dv"].dtype == dtype
    assert found[problems.states[0]].dtype == found["drate"].dtype == torch.float32
    problems.assert_close(found, problems.definition(case, given), forward=8e-3, backward=2e-2)


@strict
@every_kind
@every_backend
def test_no_output_knows_a_later_token(problems: Problems, case_of: Any, backend: str) -> None:
    case = case_of()
    given = problems.problem(case)
    before = problems.read(case, given, backend)
    for t in (1, 15, 17):
        changed = {name: part.clone() for name, part in given.items()}
        for name in ("q", "k", "v", "rate"):
            changed[name][:, t] *= -3
        for name in ("log_decay", "log_momentum"):
            changed[name][:, t] *= 0.5
        after = problems.read(case, changed, backend)
        assert torch.equal(after[:, :t], before[:, :t]) and not torch.equal(after[:, t], before[:, t])


NUMERICAL = [
    *((DELTA, delta.Case(mode=mode, tokens=40), "triton") for mode in MODES),
    (MLP, mlp.Case(tokens=5, chunk=4, D=3, E=3, inner=4, activation="gelu"), "torch"),
    (MLP, mlp.Case(tokens=20), "triton"),
    (MLP, mlp.Case(tokens=18, bias="dot", activation="gelu", offsets=(5,)), "triton"),
]


@pytest.mark.parametrize(("problems", "case", "backend"), NUMERICAL, ids=str)
def test_gradients_are_the_numerical_derivatives(problems: Problems, case: Sizes, backend: str) -> None:
    if backend == "triton" and not interpreting():
        pytest.skip("here Triton compiles for a GPU, which has no fp64 products")
    assert problems.differentiable(case, backend)


COMPILED = [
    (DELTA, delta.Case(mode="frozen", group=2)), (DELTA, delta.Case(mode="gdn", lengths=(9, 4))),
    (MLP, mlp.Case(tokens=20)), (MLP, mlp.Case(lengths=(9, 4), momentum=False)),
]  # fmt: skip


@interpreted
@pytest.mark.parametrize(("problems", "case"), COMPILED, ids=str)
def test_compiled_it_is_one_graph_and_computes_the_same(problems: Problems, case: Sizes) -> None:
    given, arguments = problems.problem(case), case.arguments()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(inputs: Any, state: Any) -> tuple[Tensor, Any]:
        o, end = problems.operation(*inputs, state=state, backend="triton", **arguments)
        return o, end

    expected = problems.by(case, given, "triton")
    problems.assert_close(problems.solved(case, given, compiled), expected, forward=1e-6, backward=1e-6)


@every_kind
@every_backend
def test_without_gradients_the_outputs_are_the_same(problems: Problems, case_of: Any, backend: str) -> None:
    case = case_of()
    leaves = {name: part.clone().requires_grad_() for name, part in problems.problem(case).items()}
    expected, end = problems.called(case, leaves, backend=backend)
    weights = len(problems.states) // 3
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            o, after = problems.called(case, leaves, backend=backend)
        assert not o.requires_grad and torch.equal(o, expected)
        assert all(torch.equal(one, other) for one, other in zip(after[:weights], end[:weights], strict=True))


@pytest.mark.parametrize("kind", ["frozen", "exact", "mlp"])
@every_backend
def test_autocast_narrows_tokens_and_keeps_states_and_gates(kind: str, backend: str) -> None:
    problems, case_of = KINDS[kind]
    case = case_of()
    given = {name: part.requires_grad_() for name, part in problems.problem(case).items()}
    with torch.autocast("cpu", torch.bfloat16):
        o, end = problems.called(case, given, backend=backend)
    assert o.dtype == torch.bfloat16 and end[0].dtype == torch.float32
    narrowed = {name: part.bfloat16() if name in ("q", "k", "v") else part for name, part in given.items()}
    assert torch.equal(o, problems.called(case, narrowed, backend=backend)[0])
    o.float().sum().backward()
    assert all(given[name].grad.dtype == torch.float32 for name in TOKENWISE)


@pytest.mark.parametrize("kind", ["gdn", "mlp"])
def test_triton_on_the_cpu_is_refused_unless_interpreted(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problems, case_of = KINDS[kind]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend: triton is asked for, but the tensors are on cpu.*need a GPU"):
        problems.called(case_of(), problems.problem(case_of()), backend="triton")
