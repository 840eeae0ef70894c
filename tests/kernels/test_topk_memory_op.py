"""`topk_read` as a PyTorch citizen: compilers, autograd, autocast, FLOP counts, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from topk_reads import LEAVES, Case, problem
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import clplat.kernels.topk_memory.op  # noqa: F401  registers the operators
from clplat.kernels.backends import interpreting
from clplat.kernels.topk_memory import topk_read, which_backend

COMPILER = Path(__file__).parents[1] / "support" / "hopper_compiler.py"
HOPPER_SHARED_BYTES = 227 * 1024
CASE = Case(N=2, S=20, k=3)

interpreted = pytest.mark.skipif(not interpreting(), reason="here Triton compiles for a GPU: see tests/gpu")


def tensors(given: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return given["q"], given["keys"], given["values"]


@interpreted
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
def test_the_forward_operator_is_what_it_is_registered_as() -> None:
    leaves = [part.requires_grad_() for part in tensors(problem(CASE))]
    count, mask = torch.tensor([12]), torch.arange(20) % 2 == 0
    torch.library.opcheck(torch.ops.clplat.topk_read_forward.default, (*leaves, count, mask, 3, 0.5))


@interpreted
@pytest.mark.parametrize("weighed", [False, True])
def test_the_backward_operator_is_what_it_is_registered_as(weighed: bool) -> None:
    given = problem(CASE)
    found = topk_read(*tensors(given), CASE.k, backend="triton")
    flowing = given["doutput"], given["dweights"] if weighed else None
    torch.library.opcheck(
        torch.ops.clplat.topk_read_backward.default, (*tensors(given), found.indices, found.weights, *flowing, 0.5)
    )


@interpreted
@pytest.mark.parametrize("through", ["output", "weights"])
def test_gradients_flow_through_one_output_alone(through: str) -> None:
    results = []
    for form in ("triton", "reference"):
        leaves = [part.detach().requires_grad_() for part in tensors(problem(CASE))]
        found = topk_read(*leaves, CASE.k, temperature=2.0, backend=form)  # type: ignore[arg-type]
        assert not found.indices.requires_grad and not found.mass.requires_grad
        getattr(found, through).square().sum().backward()
        results.append([torch.zeros(1) if part.grad is None else part.grad for part in leaves])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other.numel() == 1 else other, atol=1e-5, rtol=1e-5)


@interpreted
def test_compiled_it_is_one_graph_and_reads_the_same() -> None:
    given = problem(CASE)
    leaves = [part.requires_grad_() for part in tensors(given)]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return topk_read(q, keys, values, CASE.k, temperature=3.0, backend="triton").output

    o = compiled(*leaves)
    expected = topk_read(*leaves, CASE.k, temperature=3.0, backend="triton").output
    assert torch.equal(o, expected)
    for one, other in zip(*(torch.autograd.grad(part.sum(), leaves) for part in (o, expected)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("form", ("torch", "triton") if interpreting() else ("torch",))
def test_autocast_narrows_what_is_read_and_keeps_weights(form: Any) -> None:
    given = problem(Case(N=2, S=20, k=3, whole=False))
    leaves = [part.requires_grad_() for part in tensors(given)]
    with torch.autocast("cpu", torch.bfloat16):
        found = topk_read(*leaves, 3, backend=form)
    assert found.output.dtype == torch.bfloat16 and found.weights.dtype == torch.float32
    expected = topk_read(*(part.bfloat16() for part in leaves), 3, backend=form)
    assert torch.equal(found.output, expected.output) and torch.equal(found.weights, expected.weights)
    found.output.float().sum().backward()
    assert all(part.grad is not None and part.grad.dtype == torch.float32 for part in leaves)


@interpreted
def test_the_flop_counter_knows_both_passes() -> None:
    leaves = [part.requires_grad_() for part in tensors(problem(CASE))]
    with FlopCounterMode(display=False) as counter:
        found = topk_read(*leaves, CASE.k, backend="triton")
        forward = counter.get_total_flops()
        found.output.sum().backward()
    chosen = CASE.N * CASE.k
    assert forward == 2 * CASE.N * CASE.S * CASE.D + 2 * chosen * CASE.E
    assert counter.get_total_flops() - forward == 4 * chosen * (CASE.D + CASE.E)


@pytest.mark.parametrize("form", ["torch", "reference"])
def test_second_derivatives_and_functorch_are_plain_pytorchs(form: Any) -> None:
    given = problem(Case(N=2, S=9, D=4, E=3, k=2, whole=False), torch.float64)
    q, keys, values = tensors(given)
    assert torch.autograd.gradgradcheck(
        lambda *parts: topk_read(*parts, 2, backend=form).output, [part.requires_grad_() for part in (q, keys, values)]
    )
    jacobian = torch.func.jacrev(lambda part: topk_read(part, keys, values, 2, backend=form).output)(q)
    assert jacobian.shape == (2, 3, 2, 4) and not jacobian[0, :, 1].any()


def test_auto_is_pytorch_on_the_cpu_and_never_the_interpreter() -> None:
    given = tensors(problem(CASE))
    assert which_backend(*given, 3) == "torch"
    assert [which_backend(*given, 3, backend=name) for name in ("torch", "reference")] == ["torch", "reference"]  # type: ignore[arg-type]
    if interpreting():
        assert which_backend(*given, 3, backend="triton") == "triton"


def test_triton_on_the_cpu_is_refused_unless_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend: triton is asked for, but the tensors are on cpu.*need a GPU"):
        topk_read(*tensors(problem(CASE)), 3, backend="triton")


@interpreted
@pytest.mark.parametrize(
    ("case", "k", "narrow", "says"),
    [
        (Case(D=1030), 3, False, "keys are 1030 and values 24 wide.*up to 1024"),
        (Case(E=2000), 3, False, "keys are 16 and values 2000 wide.*up to 1024"),
        (Case(), 33, False, "k is 33; the kernels go up to 32"),
        (Case(), 3, True, "q, keys, values are torch.bfloat16, torch.float32, torch.float32; the kernels take one of"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_with_what_they_can(case: Case, k: int, narrow: bool, says: str) -> None:
    q, keys, values = tensors(problem(case))
    q = q.bfloat16() if narrow else q
    with pytest.raises(ValueError, match=f"backend: triton is asked for, but .*{says}"):
        topk_read(q, keys, values, k, backend="triton")
    assert which_backend(q, keys, values, k) == "torch"


@interpreted
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # forward mode's own
def test_forward_mode_is_refused_and_not_silently_zero() -> None:
    q, keys, values = tensors(problem(CASE))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(ValueError, match="no forward-mode.*backend='torch'"):
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        topk_read(dual, keys, values, 3, backend="triton")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"q": torch.zeros(2, 5)}, r"^q: must be \(…, D\) with the keys' D = 16, got \(2, 5\)"),
        (
            {"q": torch.zeros(2, 16, dtype=torch.int32)},
            "^q: must be a tensor of floating-point numbers, got torch.int32",
        ),
        ({"keys": torch.zeros(0, 16)}, "^keys: must be .* at least one slot"),
        ({"values": torch.zeros(19, 4)}, r"^values: must be \(slots, E\) for the keys' 20 slots"),
        ({"values": None}, "^values: must be a tensor of floating-point numbers, got NoneType"),
        ({"k": 0}, "^k: must be a whole number of slots, at least 1, got 0"),
        ({"temperature": 0.0}, "^temperature: must be a number above 0"),
        ({"temperature": torch.tensor(1.0)}, "^temperature: .*scale q by a learned one"),
        ({"valid": 21}, "^valid: must be a number of slots from 0 to 20, got 21"),
        ({"valid": torch.ones(19, dtype=torch.bool)}, r"^valid: .* or \(slots,\) = \(20,\) of bool, got \(19,\)"),
        ({"valid": torch.tensor(2.0)}, "^valid: .* of one integer too"),
        ({"backend": "cuda"}, "^backend: must be auto, torch, triton or reference, got 'cuda'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(change: dict[str, Any], says: str) -> None:
    given = dict(zip(LEAVES, tensors(problem(CASE)))) | {"k": 3} | change
    with pytest.raises(ValueError, match=says):
        topk_read(**given)


def test_every_kernel_compiles_for_a_hopper_gpu_and_fits_its_shared_memory() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-P", str(COMPILER), "topk_memory"], env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    occupied = [line.split() for line in result.stdout.splitlines()]
    assert {name for name, _ in occupied} == {
        "store_maxima", "best_groups", "read", "adjoints", "gathered_by_slot", "count", "place",
    }  # fmt: skip
    assert max(int(size) for _, size in occupied) <= HOPPER_SHARED_BYTES
