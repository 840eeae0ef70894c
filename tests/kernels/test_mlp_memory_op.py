"""`mlp_memory` as a PyTorch citizen: compiler, autograd, autocast, FLOP counts, what it refuses and what it touches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_problems import TOKENWISE
from mlp_memories import Case, called, problem, state_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import clplat.kernels.mlp_memory.op  # noqa: F401  registers the operators
from clplat.kernels.backends import interpreting
from clplat.kernels.mlp_memory import MLPState, mlp_memory, which_backend
from clplat.kernels.mlp_memory.layout import packed_row
from clplat.kernels.mlp_memory.reference import ACTIVATIONS, BIASES

BACKENDS = ("torch", "triton") if interpreting() else ("torch",)
interpreted = pytest.mark.skipif(not interpreting(), reason="here Triton compiles for a GPU: see tests/gpu")
COMPILER = Path(__file__).parents[1] / "support" / "hopper_compiler.py"
HOPPER_SHARED_BYTES = 227 * 1024

OP_CASES = [
    Case(tokens=5, momentum=False, decay=False),
    Case(tokens=5, activation="gelu", bias="dot"),
    Case(lengths=(3, 0, 2), offsets=(1, 3, 14)),
]


def operands(case: Case, *, gradients: bool) -> tuple[Any, ...]:
    """The arguments of the forward operator."""
    given, state = problem(case), state_of(case, problem(case))
    rows = packed_row(state).requires_grad_(gradients)
    tokens = [given[name].requires_grad_(gradients) if name in given else None for name in TOKENWISE]
    kind = (ACTIVATIONS.index(case.activation), BIASES.index(case.bias), case.residual)
    return (*tokens, rows, state.offset, case.arguments().get("cu_seqlens"), *kind, case.chunk, True)


@interpreted
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize("case", OP_CASES, ids=str)
def test_the_forward_operator_is_what_it_is_registered_as(case: Case) -> None:
    torch.library.opcheck(torch.ops.clplat.mlp_memory_forward.default, operands(case, gradients=True))


@interpreted
@pytest.mark.parametrize("case", OP_CASES, ids=str)
def test_the_backward_operator_is_what_it_is_registered_as(case: Case) -> None:
    arguments = operands(case, gradients=False)
    with torch.no_grad():
        o, end, starts = torch.ops.clplat.mlp_memory_forward(*arguments)
    flowing = (torch.ones_like(o), torch.ones_like(end))
    torch.library.opcheck(
        torch.ops.clplat.mlp_memory_backward.default, (*arguments[:9], starts, *flowing, *arguments[9:13])
    )


@interpreted
def test_a_second_pass_back_through_one_call_finds_the_same() -> None:
    case = Case(tokens=20)
    given = problem(case)
    given["k"].requires_grad_()
    o, end = called(case, given, backend="triton")
    passes = [torch.autograd.grad([o, end.W2], given["k"], [given["do"], given["dW2"]], retain_graph=True)] * 2
    assert torch.equal(passes[0][0], passes[1][0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_comes_back_is_never_the_callers(backend: str) -> None:
    case = Case(tokens=0)
    given = problem(case)
    _, end = called(case, given, backend=backend)
    end.W1.zero_()
    assert given["W1"].abs().max() > 0


@interpreted
def test_the_flop_counter_knows_both_passes() -> None:
    case = Case(tokens=32, D=16, E=16, inner=64)
    given = {name: part.requires_grad_() for name, part in problem(case).items()}
    with FlopCounterMode(display=False) as counter:
        o, _ = called(case, given, backend="triton")
        forward = counter.get_total_flops()
        o.sum().backward()
    assert counter.get_total_flops() == 3 * forward
    with FlopCounterMode(display=False) as counter:
        called(case, given, backend="torch")
    # The chunked form's own products, but for those of vectors.
    assert forward == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_auto_is_pytorch_on_the_cpu_and_never_the_interpreter() -> None:
    given = problem(Case())
    tensors = given["q"], given["k"], given["v"]
    assert which_backend(*tensors, inner=32) == "torch"
    assert [which_backend(*tensors, inner=32, backend=name) for name in ("torch", "recurrent")] == [  # type: ignore[arg-type]
        "torch", "recurrent",
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_the_kernels_refuse_forward_mode_derivatives_which_plain_pytorch_has() -> None:
    case = Case()
    given = problem(case)

    def answered(backend: str) -> Tensor:
        def of(v: Tensor) -> Tensor:
            return called(case, given | {"v": v}, backend=backend)[0]

        return torch.func.jvp(of, (given["v"],), (torch.ones_like(given["v"]),))[1]

    assert answered("torch").abs().max() > 0
    with pytest.raises(ValueError, match="the kernels know no forward-mode derivatives"):
        answered("triton")


W1, W2 = torch.zeros(1, 1, 16, 32), torch.zeros(1, 1, 32, 16)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"chunk": 16.0}, r"chunk: must be a whole number of tokens, at least 1, got 16\.0"),
        ({"activation": "relu"}, r"activation: must be one of silu, gelu, got 'relu'"),
        ({"bias": "huber"}, r"bias: must be one of l2, dot, got 'huber'"),
        ({"state": (W1, W2)}, r"state: must be an MLPState, as a call returns it, got tuple"),
        ({"state": MLPState(W1, W2[:, :, 1:])}, r"state.W2: must be \(sequences, H, J, E\) = \(1, 1, 32, 16\)"),
        ({"state": MLPState(W1, W2, W1)}, r"state.S1 and state.S2: give both or neither"),
        ({"state": MLPState(W1, W2)}, r"state.S1, S2 and log_momentum: give all or none"),
        ({"state": MLPState(W1, W2, W1, W2, W1, W2)}, r"state.anchor1, anchor2 and offset: give all or none"),
        (
            {"state": MLPState(W1, W2, W1, W2, W1, W2, torch.tensor([16], dtype=torch.int32))},
            r"state.offset: must be at least 0 and below chunk = 16, got \[16\]",
        ),
        ({"v": torch.zeros(1, 18, 1, 24)}, r"residual: needs keys as wide as values, got 16 and 24"),
        ({"chunk": 8, "backend": "triton"}, r"backend: triton is asked for, but chunk is 8"),
    ],
)
@pytest.mark.skipif(not interpreting(), reason="the last of them asks for the kernels on the CPU")
def test_what_no_form_computes_is_refused(changed: dict[str, Any], message: str) -> None:
    case = Case()
    given = problem(case)
    arguments = {name: given[name] for name in TOKENWISE} | case.arguments() | {"state": state_of(case, given)}
    with pytest.raises(ValueError, match=message):
        mlp_memory(**(arguments | changed))  # type: ignore[arg-type]


def test_values_of_other_heads_than_the_keys_are_refused() -> None:
    given = problem(Case(heads=2))
    given["q"], given["k"] = given["q"][:, :, :1], given["k"][:, :, :1]
    with pytest.raises(ValueError, match="v: must have q's 1 heads, got 2"):
        called(Case(), given)


@pytest.mark.long
def test_every_kernel_compiles_for_a_hopper_gpu_and_fits_its_shared_memory() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-P", str(COMPILER), "mlp_memory"],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    occupied = [line.split() for line in result.stdout.splitlines()]
    assert {name for name, _ in occupied} == {"prepare", "walk", "read_back", "write_back", "gates"}
    assert max(int(size) for _, size in occupied) <= HOPPER_SHARED_BYTES
