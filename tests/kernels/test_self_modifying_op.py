"""`self_modifying` as a PyTorch citizen: compiler, autograd, autocast, FLOP counts, what it refuses and touches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from self_modifying_ops import READ, STATES, TOKENWISE, Case, assert_close, by, called, problem, solved
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import clplat.kernels.self_modifying.op  # noqa: F401  registers the operators
from clplat.kernels.backends import interpreting
from clplat.kernels.self_modifying import Rule, SelfModifyingState, which_backend
from clplat.kernels.self_modifying.reference import DELTAS

BACKENDS = ("torch", "triton") if interpreting() else ("torch",)
interpreted = pytest.mark.skipif(not interpreting(), reason="here Triton compiles for a GPU: see tests/gpu")
COMPILER = Path(__file__).parents[1] / "support" / "hopper_compiler.py"
HOPPER_SHARED_BYTES = 227 * 1024

OP_CASES = [
    Case(tokens=5, momentum=False, decay=False, damped=False, max_gradient=None),
    Case(lengths=(3, 0), offsets=(1, 3), delta="single"),
]


def operands(case: Case, *, gradients: bool) -> tuple[Any, ...]:
    """The arguments of the forward operator."""
    given = problem(case)
    parts = [given[n].requires_grad_(gradients) if n in given else None for n in (*TOKENWISE, *READ, *STATES)]
    offset = None if case.offsets is None else torch.tensor(case.offsets, dtype=torch.int32)
    kind = (DELTAS.index(case.delta), case.rule.max_rate, case.max_gradient, case.unit_values, case.self_targets)
    return (*parts, offset, case.arguments().get("cu_seqlens"), *kind, case.chunk, True)


@interpreted
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize("case", OP_CASES[1:], ids=str)
def test_the_forward_operator_is_what_it_is_registered_as(case: Case) -> None:
    torch.library.opcheck(torch.ops.clplat.self_modifying_forward.default, operands(case, gradients=True))


@interpreted
@pytest.mark.parametrize("case", OP_CASES, ids=str)
def test_the_backward_operator_is_what_it_is_registered_as(case: Case) -> None:
    arguments = operands(case, gradients=False)
    with torch.no_grad():
        o, W, S, anchor, *starts = torch.ops.clplat.self_modifying_forward(*arguments)
    flowing = [torch.ones_like(part) if part.numel() else None for part in (o, W, S, anchor)]
    torch.library.opcheck(
        torch.ops.clplat.self_modifying_backward.default, (*arguments[:13], *starts, *flowing, *arguments[13:19])
    )


@interpreted
def test_compiled_it_is_one_graph_and_computes_the_same() -> None:
    case = Case(lengths=(3, 4))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(leaves: dict[str, Tensor]) -> tuple[Tensor, SelfModifyingState]:
        return called(case, leaves, backend="triton")

    given = problem(case)
    assert_close(solved(given, compiled), by(case, given, "triton"), forward=1e-6, backward=1e-6)


@interpreted
def test_a_second_pass_back_through_one_call_finds_the_same() -> None:
    case = Case(tokens=5)
    given = problem(case)
    given["x"].requires_grad_()
    o, end = called(case, given, backend="triton")
    first, second = (
        torch.autograd.grad([o, end.W], given["x"], [given["do"], given["dW"]], retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients_the_outputs_are_the_same(backend: str) -> None:
    case = Case()
    leaves = {name: part.clone().requires_grad_() for name, part in problem(case).items()}
    expected, end = called(case, leaves, backend=backend)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            o, after = called(case, leaves, backend=backend)
        assert not o.requires_grad and torch.equal(o, expected) and torch.equal(after.W, end.W)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_narrows_tokens_and_keeps_states_and_gates(backend: str) -> None:
    case = Case()
    given = {name: part.requires_grad_() for name, part in problem(case).items()}
    with torch.autocast("cpu", torch.bfloat16):
        o, end = called(case, given, backend=backend)
    assert o.dtype == torch.bfloat16 and end.W.dtype == torch.float32
    narrowed = {name: part.bfloat16() if name in ("x", "q") else part for name, part in given.items()}
    assert torch.equal(o, called(case, narrowed, backend=backend)[0])
    o.float().sum().backward()
    assert all(given[name].grad.dtype == torch.float32 for name in (*TOKENWISE, *READ))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_comes_back_is_never_the_callers(backend: str) -> None:
    case = Case(tokens=0)
    given = problem(case)
    _, end = called(case, given, backend=backend)
    end.W.zero_()
    assert given["W"].abs().max() > 0


@interpreted
def test_the_flop_counter_knows_both_passes() -> None:
    case = Case(tokens=16)
    given = {name: part.requires_grad_() for name, part in problem(case).items()}
    with FlopCounterMode(display=False) as counter:
        o, _ = called(case, given, backend="triton")
        forward = counter.get_total_flops()
        o.sum().backward()
    assert counter.get_total_flops() == 3 * forward
    with FlopCounterMode(display=False) as counter:
        called(case, given, backend="torch")
    # The chunked form's own products, but for those of vectors and the solved system, which torch does not count.
    assert forward == pytest.approx(counter.get_total_flops(), rel=0.15)


def test_auto_is_pytorch_on_the_cpu_and_never_the_interpreter() -> None:
    given = problem(Case())
    assert which_backend(given["x"], given["q"]) == "torch"


def test_triton_on_the_cpu_is_refused_unless_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend: triton is asked for, but the tensors are on cpu.*need a GPU"):
        called(Case(), problem(Case()), backend="triton")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@interpreted
def test_the_kernels_refuse_forward_mode_derivatives_which_plain_pytorch_has() -> None:
    case = Case()
    given = problem(case)

    def answered(backend: str) -> Tensor:
        def of(x: Tensor) -> Tensor:
            return called(case, given | {"x": x}, backend=backend)[0]

        return torch.func.jvp(of, (given["x"],), (torch.ones_like(given["x"]),))[1]

    assert answered("torch").abs().max() > 0
    with pytest.raises(ValueError, match="the kernels know no forward-mode derivatives"):
        answered("triton")


W = torch.zeros(1, 5, 1, 16, 16)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"chunk": 16.0}, r"chunk: must be a whole number of tokens, at least 1, got 16\.0"),
        ({"rule": Rule(delta="triple")}, r"rule.delta: must be one of none, single, double, got 'triple'"),  # type: ignore[arg-type]
        ({"rule": Rule(max_gradient=0.0)}, r"rule.max_gradient: must be above 0, got 0\.0"),
        ({"state": (W, W)}, r"state: must be a SelfModifyingState, as a call returns it, got tuple"),
        (
            {"state": SelfModifyingState(W[:, :4], W)},
            r"state.W: must be \(sequences, M, H, D, D\) = \(1, 5, 1, 16, 16\)",
        ),
        ({"state": SelfModifyingState(W)}, r"state.S and log_momentum: give both or neither"),
        ({"state": SelfModifyingState(W, W, W)}, r"state.anchor and state.offset: give both or neither"),
        (
            {"state": SelfModifyingState(W, W, W, torch.tensor([16], dtype=torch.int32))},
            r"state.offset: must be at least 0 and below chunk = 16, got \[16\]",
        ),
        ({"cu_seqlens": torch.tensor([0, 7], dtype=torch.int32)}, r"cu_seqlens: must go from 0 to T = 18"),
    ],
)
def test_what_no_form_computes_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        called(Case(), problem(Case()), **changed)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("q", torch.zeros(1, 18, 1, 8), r"x and q must be \(B, T, H, D\) alike"),
        ("damping", torch.zeros(1, 18), r"damping: must be \(B, T, H\) = \(1, 18, 1\), got \(1, 18\)"),
        ("rate", torch.zeros(16), r"readouts.rate: must be \(1, 16\), got \(16,\)"),
        ("x", torch.zeros(1, 18, 1, 16, dtype=torch.long), r"x: must be a tensor of floating-point numbers"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name: str, given: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        called(Case(), problem(Case()) | {name: given})


@interpreted
@pytest.mark.parametrize(
    ("case", "message"), [(Case(chunk=8), "but chunk is 8"), (Case(D=72, tokens=2), "but heads are 72 wide")]
)
def test_what_the_kernels_do_not_take_is_refused_where_they_are_asked_for(case: Case, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        called(case, problem(case), backend="triton")
    assert called(case, problem(case), backend="torch")[0].isfinite().all()


@pytest.mark.long
def test_every_kernel_compiles_for_a_hopper_gpu_and_fits_its_shared_memory() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-P", str(COMPILER), "self_modifying"],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    occupied = [line.split() for line in result.stdout.splitlines()]
    assert {name for name, _ in occupied} == {"walk", "read_back", "write_back", "make_back"}
    assert max(int(size) for _, size in occupied) <= HOPPER_SHARED_BYTES
