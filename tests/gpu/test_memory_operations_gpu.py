"""What the kernels of `delta_memory` and `mlp_memory` both owe on a GPU: rounding of fp32, bits, waits and replays.

    pytest tests/gpu -x

What needs no GPU is tested in tests/kernels. Every kind of case costs seconds for its kernels to compile.
"""

from __future__ import annotations

from typing import Any

import delta_memories as delta
import mlp_memories as mlp
import pytest
import torch
from gpu_work import captured, no_waiting
from memory_problems import TOKENWISE, Problems, Sizes, Tensors
from torch import Tensor

from clplat.kernels.delta_memory import reference as delta_reference
from clplat.kernels.delta_memory.reference import MODES
from clplat.kernels.mlp_memory import reference as mlp_reference

DEVICE = torch.device("cuda")
DELTA, MLP = delta.DELTA, mlp.MLP
DELTA_SIZES: dict[str, Any] = {"tokens": 300, "chunk": 64, "D": 64, "E": 64, "batch": 2, "heads": 2}
MLP_SIZES = DELTA_SIZES | {"inner": 256}
PACKED = {"batch": 1, "lengths": (130, 0, 7, 163), "offsets": (3, 63, 0, 40)}

# Products of fp32 are three of tf32, which leaves 1e-6 or so of each.
FP32 = {"forward": 2e-5, "backward": 1e-4}


def given_for(problems: Problems, case: Sizes, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """The problem on the GPU."""
    return problems.problem(case, dtype, DEVICE)


FULL_CASES = [
    (DELTA, delta.Case(mode="exact", **DELTA_SIZES)),
    (DELTA, delta.Case(mode="frozen", **DELTA_SIZES | {"chunk": 32})),
    (DELTA, delta.Case(mode="gdn", momentum=False, **DELTA_SIZES | {"D": 128, "E": 128})),
    (MLP, mlp.Case(**MLP_SIZES | {"chunk": 16})),
    (MLP, mlp.Case(**MLP_SIZES | {"chunk": 32, "activation": "gelu"})),
]


@pytest.mark.parametrize(("problems", "case"), FULL_CASES, ids=str)
def test_in_fp32_everything_is_fp32_rounding_away_from_fp64(problems: Problems, case: Sizes) -> None:
    given = given_for(problems, case, torch.float32)
    chunked = delta_reference.chunked if problems is DELTA else mlp_reference.chunked
    problems.assert_close(problems.by(case, given, "triton"), problems.definition(case, given, chunked), **FP32)


BITS = [
    *((DELTA, delta.Case(mode=mode, **DELTA_SIZES)) for mode in MODES),
    (MLP, mlp.Case(**MLP_SIZES | {"tokens": 1100, "chunk": 16})),
]


@pytest.mark.parametrize(("problems", "case"), BITS, ids=str)
def test_every_run_gives_the_same_bits(problems: Problems, case: Sizes) -> None:
    given = given_for(problems, case)
    first = problems.by(case, given, "triton")
    for _ in range(5):
        again = problems.by(case, given, "triton")
        assert not [name for name in first if not torch.equal(first[name], again[name])]


WAITING = [(DELTA, delta.Case(mode="frozen", **DELTA_SIZES | PACKED)), (MLP, mlp.Case(**MLP_SIZES | PACKED))]


@pytest.mark.parametrize(("problems", "case"), WAITING, ids=str)
def test_the_host_waits_for_nothing(problems: Problems, case: Sizes) -> None:
    given, arguments = given_for(problems, case), case.arguments(DEVICE)
    leaves = {name: given[name].requires_grad_() for name in (*TOKENWISE, *problems.states)}
    tokens, state = [leaves[name] for name in TOKENWISE], problems.state_of(case, leaves)

    def both() -> tuple[Tensor, ...]:
        o, end = problems.operation(*tokens, state=state, backend="triton", **arguments)
        return torch.autograd.grad([o, end[0]], list(leaves.values()), [given["do"], given["d" + problems.states[0]]])

    expected = both()
    with no_waiting():
        found = both()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


REPLAYED = [
    (DELTA, delta.Case(mode="frozen", **DELTA_SIZES)), (DELTA, delta.Case(mode="gdn", **DELTA_SIZES)),
    (MLP, mlp.Case(**MLP_SIZES)),
]  # fmt: skip


@pytest.mark.parametrize(("problems", "case"), REPLAYED, ids=str)
def test_a_replayed_graph_computes_what_a_call_does(problems: Problems, case: Sizes) -> None:
    given = given_for(problems, case)
    graph, o = captured(lambda: problems.read(case, given, "triton"))
    for name in ("v", problems.states[0]):
        given[name].mul_(-0.5)
    graph.replay()
    assert torch.equal(o, problems.read(case, given, "triton"))


@pytest.mark.parametrize(("problems", "case"), REPLAYED[::2], ids=str)
def test_compiled_it_is_one_graph_and_computes_the_same(problems: Problems, case: Sizes) -> None:
    given, arguments = given_for(problems, case), case.arguments(DEVICE)

    @torch.compile(fullgraph=True)
    def compiled(inputs: Any, state: Any) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        # Something for the compiler to fuse around the operator. The state as plain tensors: torch 2.11 cannot return
        # an object with methods of its own that it made inside.
        o, end = problems.operation(*inputs, state=state, backend="triton", **arguments)
        return o * 1.0, tuple(end)

    def restored(inputs: Any, state: Any) -> tuple[Tensor, Any]:
        o, parts = compiled(inputs, state)
        return o, problems.state(*parts)

    expected = problems.by(case, given, "triton")
    problems.assert_close(problems.solved(case, given, restored), expected, forward=1e-5, backward=1e-5)
