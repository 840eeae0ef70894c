"""`self_modifying`'s kernels as the GPU's compilers make them: rounding, miscompiled products, waits and replays.

    pytest tests/gpu/test_self_modifying_gpu.py -x

What needs no GPU is tested in tests/kernels. Every kind of case costs half a minute for its kernels to compile, so
there are few, the most telling first.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from delta_memories import Tensors, distances
from gpu_work import captured, no_waiting
from self_modifying_ops import READ, STATES, TOKENWISE, Case, by, called, definition, problem
from torch import Tensor

from clplat.architectures.hope.inputs import HeadInputs
from clplat.architectures.hope.memory import SelfModifyingMemory
from clplat.architectures.hope.options import SelfModifyingOptions
from clplat.kernels.self_modifying import launch, which_backend
from clplat.kernels.self_modifying.reference import chunked

DEVICE = torch.device("cuda")
SIZES: dict[str, Any] = {"tokens": 300, "D": 64, "batch": 2, "heads": 2}
PACKED = SIZES | {"batch": 1, "lengths": (130, 0, 7, 163)}

HALF_CASES = [
    Case(**SIZES),
    Case(**SIZES, chunk=64),
    Case(**SIZES, chunk=32, momentum=False, damped=False, delta="single", max_gradient=1.0),
    # Rounding grows a thousandfold over 300 tokens where each memory reads its own inputs; plain PyTorch's in fp32 too.
    Case(**SIZES | {"tokens": 100}, chunk=32, own=True),
    Case(**SIZES | {"tokens": 70}, chunk=64, own=True, self_targets=False),
    Case(**SIZES, chunk=64, decay=False, delta="none", max_gradient=None, unit_values=False),
    Case(offsets=(3, 63, 0, 40), **PACKED, chunk=64),
    Case(offsets=(3, 11, 0, 15), **PACKED | {"D": 60}),
    # Several groups of chunks.
    Case(**SIZES | {"tokens": 1100}),
]
FULL_CASES = [Case(**SIZES), Case(**SIZES, chunk=32)]


def given_for(case: Case, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """The problem on the GPU."""
    return problem(case, dtype, DEVICE)


def agrees(case: Case, given: Tensors, *, forward: float, backward: float) -> None:
    """Fails with names that are further from fp64 than allowed, and than twice what plain PyTorch is whose products are
    rounded to bf16: keys that are made of rounded memories make memories, and errors grow from chunk to chunk."""
    expected, bound = definition(case, given, chunked), dict[str, float]()
    if given["x"].dtype != torch.float32:
        with torch.autocast("cuda", given["x"].dtype):
            rounded = definition(case, given, chunked, torch.float32)
        bound = {name: 2 * error for name, error in distances(rounded, expected).items()}
    errors = distances(by(case, given, "triton"), expected)
    allowed = {name: forward if name in ("o", *STATES) else backward for name in errors}
    # Written so that NaN fails.
    wrong = {n: error for n, error in errors.items() if not error <= max(allowed[n], bound.get(n, 0.0))}
    assert not wrong, f"relative errors too large: {wrong}; all: {errors}; allowed by plain PyTorch's: {bound}"


@pytest.mark.parametrize("case", HALF_CASES, ids=str)
def test_in_bf16_everything_is_rounding_away_from_fp64(case: Case) -> None:
    agrees(case, given_for(case), forward=1.5e-2, backward=3e-2)


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_in_fp32_everything_is_fp32_rounding_away_from_fp64(case: Case) -> None:
    agrees(case, given_for(case, torch.float32), forward=5e-5, backward=2e-4)


def test_a_layer_of_hope_takes_the_kernels_of_itself() -> None:
    given = given_for(Case(**SIZES))
    assert which_backend(given["x"], given["q"]) == "triton"
    assert which_backend(given["x"], given["q"], chunk=256) == "torch"


@pytest.mark.parametrize("chunk", [16, 64])
def test_every_number_of_warps_computes_the_same(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Triton 3.4 to 3.7 mistook products of transposed results on Hopper, in tiles of 64 and not of 32.
    case = Case(**SIZES, chunk=chunk)
    given = given_for(case)
    for warps in (4, 8, 16):
        monkeypatch.setattr(launch, "options", lambda *_, warps=warps: {"num_warps": warps, "num_stages": 1})
        agrees(case, given, forward=1.5e-2, backward=3e-2)


def test_every_run_gives_the_same_bits() -> None:
    case = Case(**SIZES | {"tokens": 1100})
    given = given_for(case)
    first = by(case, given, "triton")
    for _ in range(5):
        again = by(case, given, "triton")
        assert not [name for name in first if not torch.equal(first[name], again[name])]


def test_the_host_waits_for_nothing() -> None:
    case = Case(**SIZES)
    given = given_for(case)
    leaves = {name: given[name].requires_grad_() for name in (*TOKENWISE, *READ, *STATES) if name in given}

    def both() -> tuple[Tensor, ...]:
        o, end = called(case, given, backend="triton")
        return torch.autograd.grad([o, end.W], list(leaves.values()), [given["do"], given["dW"]])

    expected = both()
    with no_waiting():
        found = both()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_replayed_graph_computes_what_a_call_does() -> None:
    case = Case(**SIZES)
    given = given_for(case)

    def read() -> Tensor:
        with torch.no_grad():
            return called(case, given, backend="triton")[0]

    graph, o = captured(read)
    for name in ("x", "W"):
        given[name].mul_(-0.5)
    graph.replay()
    assert torch.equal(o, read())


def test_a_chunk_without_kernels_compiles_to_one_graph_that_computes_the_same() -> None:
    torch.manual_seed(0)
    given = HeadInputs(*(torch.randn(2, 2, 40, 32, device=DEVICE) for _ in range(2)), *[None] * 6)
    given = given._replace(momentum=torch.randn(2, 2, 40, device=DEVICE))
    found = []
    for compiled in (False, True):
        torch.manual_seed(1)
        options = SelfModifyingOptions(compiled=compiled)
        made = SelfModifyingMemory(options=options, num_heads=2, head_size=32).to(DEVICE)
        answers, _ = made(given)
        found.append([answers, *torch.autograd.grad(answers.square().sum(), list(made.parameters()))])
    for eager, one in zip(*found, strict=True):
        torch.testing.assert_close(one, eager, rtol=1e-3, atol=1e-4)
