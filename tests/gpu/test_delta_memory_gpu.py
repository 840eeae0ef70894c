"""`delta_memory`'s kernels as the GPU's compilers make them: rounding, miscompiled products, waits and replays.

    pytest tests/gpu -x

What needs no GPU is tested in tests/kernels. Every kind of case (mode, gates, widths, chunk, type, packed or not) costs
some seconds for its seven kernels to compile, so there are few, the most telling first, and all have one length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from delta_memories import STATES, TOKENWISE, Case, Tensors, assert_close, by, definition, problem, read, solved
from torch import Tensor

from clplat.kernels.delta_memory import MemoryState, delta_memory
from clplat.kernels.delta_memory.reference import MODES, chunked

DEVICE = torch.device("cuda")
SIZES: dict[str, Any] = {"tokens": 300, "chunk": 64, "D": 64, "E": 64, "batch": 2, "heads": 2}
WIDE = SIZES | {"D": 128, "E": 128}
PACKED = SIZES | {"batch": 1, "lengths": (130, 0, 7, 163)}

# Of a Frobenius norm: bf16 rounds inputs of every product to 4e-3 at most and the outputs once more.
BF16 = {"forward": 5e-3, "backward": 8e-3, "gates": 2e-2}
# Products of fp32 are three of tf32, which leaves 1e-6 or so of each.
FP32 = {"forward": 2e-5, "backward": 1e-4}

HALF_CASES = [
    *(Case(mode=mode, **SIZES) for mode in MODES),
    *(Case(mode=mode, **WIDE) for mode in MODES),
    Case(mode="frozen", offsets=(3, 63, 0, 40), **PACKED),
    Case(mode="gdn", group=2, momentum=False, **PACKED | {"D": 128, "E": 64}),
]
FULL_CASES = [
    Case(mode="exact", **SIZES),
    Case(mode="frozen", **SIZES | {"chunk": 32}),
    Case(mode="gdn", momentum=False, **WIDE),
]


def given_for(case: Case, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """The problem on the GPU."""
    return problem(case, dtype, DEVICE)


@pytest.mark.parametrize("case", HALF_CASES, ids=str)
def test_in_bf16_everything_is_rounding_away_from_fp64(case: Case) -> None:
    given = given_for(case)
    assert_close(by(case, given, "triton"), definition(case, given, chunked), **BF16)


@pytest.mark.parametrize("mode", ["hebb", "exact", "gdn"])
def test_the_size_of_a_chunk_changes_no_result(mode: Any) -> None:
    # Triton 3.4 to 3.7 mistook products of transposed results on Hopper, in tiles of 64 and not of 32.
    large, *others = (Case(mode=mode, **SIZES | {"chunk": chunk}) for chunk in (64, 32, 16))
    given = given_for(large)
    expected = by(large, given, "triton")
    for case in others:
        # Two roundings are apart, each as far as it may be from the truth.
        assert_close(by(case, given, "triton"), expected, **{name: 1.5 * bound for name, bound in BF16.items()})


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_in_fp32_everything_is_fp32_rounding_away_from_fp64(case: Case) -> None:
    given = given_for(case, torch.float32)
    assert_close(by(case, given, "triton"), definition(case, given, chunked), **FP32)


@pytest.mark.parametrize("mode", MODES)
def test_every_run_gives_the_same_bits(mode: Any) -> None:
    case = Case(mode=mode, **SIZES)
    given = given_for(case)
    first = by(case, given, "triton")
    for _ in range(5):
        again = by(case, given, "triton")
        assert not [name for name in first if not torch.equal(first[name], again[name])]


@pytest.fixture
def waiting_fails() -> Iterator[Any]:
    """Switches on that the host may not wait for the GPU."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def test_the_host_waits_for_nothing(waiting_fails: Any) -> None:
    case = Case(mode="frozen", offsets=(3, 63, 0, 40), **PACKED)
    given, arguments = given_for(case), case.arguments(DEVICE)
    leaves = {name: given[name].requires_grad_() for name in (*TOKENWISE, *STATES)}
    tokens: Any = [leaves[name] for name in TOKENWISE]
    state = MemoryState(*(leaves[name] for name in STATES), torch.tensor((3, 63, 0, 40), dtype=torch.int32).to(DEVICE))

    def both() -> tuple[Tensor, ...]:
        o, end = delta_memory(*tokens, state=state, backend="triton", **arguments)
        return torch.autograd.grad([o, end.W], list(leaves.values()), [given["do"], given["dW"]])

    expected = both()
    torch.cuda.synchronize()
    waiting_fails()
    found = both()
    torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("mode", ["frozen", "gdn"])
def test_a_replayed_graph_computes_what_a_call_does(mode: Any) -> None:
    case = Case(mode=mode, **SIZES)
    given = given_for(case)
    read(case, given, "triton")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        read(case, given, "triton")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = read(case, given, "triton")
    for name in ("v", "W"):
        given[name].mul_(-0.5)
    graph.replay()
    assert torch.equal(o, read(case, given, "triton"))


def test_compiled_it_is_one_graph_and_computes_the_same() -> None:
    case = Case(mode="frozen", **SIZES)
    given, arguments = given_for(case), case.arguments(DEVICE)

    @torch.compile(fullgraph=True)
    def compiled(inputs: Any, state: MemoryState) -> tuple[Tensor, MemoryState]:
        # Something for the compiler to fuse around the operator.
        o, end = delta_memory(*inputs, state=state, backend="triton", **arguments)
        return o * 1.0, end

    assert_close(solved(case, given, compiled), by(case, given, "triton"), forward=1e-5, backward=1e-5)
