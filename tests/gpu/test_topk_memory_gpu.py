"""`topk_memory`'s kernels as the GPU's compilers make them: rounding, ties, every way to search, waits and replays.

    pytest tests/gpu/test_topk_memory_gpu.py -x

What needs no GPU is tested in tests/kernels. Whole numbers of few bits make scores that no type rounds, so that slots
must be those of the definition exactly, many ties included.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_work import captured, no_waiting
from topk_reads import Case, assert_close, definition, problem, solved
from torch import Tensor

from clplat.kernels.topk_memory import expert_order, launch, topk_read
from clplat.kernels.topk_memory.tuning import ALTERNATIVES

DEVICE = torch.device("cuda")
LARGE: dict[str, Any] = {"N": 300, "S": 5000, "D": 64, "E": 64, "k": 8}

CASES = [
    Case(**LARGE),
    Case(**LARGE | {"D": 128, "E": 128, "valid": 4000}),
    Case(**LARGE | {"D": 20, "E": 40, "valid": 0.5}),
    Case(**LARGE | {"S": 512, "D": 256, "E": 256, "valid": 300}),
    Case(**LARGE | {"N": 70, "D": 1000, "E": 1024, "k": 3}),
    Case(**LARGE | {"k": 32}),
    Case(**LARGE | {"N": 5, "S": 70_000, "k": 1}),
    Case(**LARGE | {"S": 20, "k": 25, "valid": 7}),
    Case(**LARGE | {"k": 16, "valid": 0}),
]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.bfloat16) for case in CASES),
        *((case, torch.float32) for case in CASES[:5:2]),
        (CASES[1], torch.float16),
    ],
    ids=str,
)
def test_everything_is_rounding_away_from_fp64_and_slots_are_the_same(case: Case, dtype: torch.dtype) -> None:
    given = problem(case, dtype, DEVICE)
    bounds = {"forward": 1e-5, "backward": 2e-5} if dtype == torch.float32 else {"forward": 5e-3, "backward": 8e-3}
    assert_close(solved(case, given, "triton"), definition(case, given), **bounds)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_of_real_numbers_only_slots_within_rounding_are_taken_for_one_another(dtype: torch.dtype) -> None:
    case = Case(**LARGE, whole=False)
    given = problem(case, dtype, DEVICE)
    found = topk_read(given["q"], given["keys"], given["values"], case.k)
    scores = given["q"].double() @ given["keys"].double().T
    best, taken = scores.topk(case.k)[0], scores.gather(1, found.indices)
    assert (taken.sort(1, descending=True)[0] - best).abs().max() <= 1e-5 * best.abs().max()
    assert all(len(set(row)) == case.k for row in found.indices.tolist())
    assert torch.equal(found.mass, mass(found.indices, found.weights, case.S))


def mass(indices: Tensor, weights: Tensor, slots: int) -> Tensor:
    """Summed in whole numbers of 2⁻⁴⁰, as the kernel does."""
    units = torch.zeros(slots, dtype=torch.int64, device=DEVICE)
    units.index_add_(0, indices.flatten(), (weights.flatten().double() * 2**40).long())
    return (units.double() / 2**40).float()


# Of each kind of search and size of groups, one.
TRIED = {(plan.search, plan.group): name for name, plan in ALTERNATIVES.items()}


@pytest.mark.parametrize("name", TRIED.values())
def test_every_way_to_search_reads_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for case in (Case(**LARGE | {"valid": 4090}), Case(**LARGE | {"D": 128, "valid": 0.7})):
        given = problem(case, torch.bfloat16, DEVICE)
        arguments = given["q"], given["keys"], given["values"], case.k
        expected = topk_read(*arguments, valid=case.valid_on(DEVICE))
        with monkeypatch.context() as patched:
            patched.setattr(launch, "plan_for", lambda *sizes: ALTERNATIVES[name])
            found = topk_read(*arguments, valid=case.valid_on(DEVICE))
        assert torch.equal(found.indices, expected.indices)
        torch.testing.assert_close(found.output, expected.output)


def test_every_run_gives_the_same_bits() -> None:
    case = Case(**LARGE, whole=False)
    given = problem(case, torch.bfloat16, DEVICE)
    first = solved(case, given, "triton")
    for _ in range(5):
        again = solved(case, given, "triton")
        assert not [name for name in first if not torch.equal(first[name], again[name])]


def test_the_host_waits_for_nothing() -> None:
    case = Case(**LARGE)
    given, experts = problem(case, torch.bfloat16, DEVICE), torch.randint(0, 8, (300, 2), device=DEVICE)
    count = torch.tensor(4000, device=DEVICE)
    expected = solved(case, given, "triton", valid=count)
    with no_waiting():
        found = solved(case, given, "triton", valid=count)
        solved(case, given, "triton", valid=4000)
        expert_order(experts, 8)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_replayed_graph_reads_with_the_count_that_then_holds() -> None:
    case = Case(**LARGE)
    given, count = problem(case, torch.bfloat16, DEVICE), torch.tensor(5000, device=DEVICE)

    def both() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            found = topk_read(given["q"], given["keys"], given["values"], case.k, valid=count)
            return found.output, expert_order(found.indices % 7, 7).order

    graph, replayed = captured(both)
    count.fill_(900)
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(replayed, both(), strict=True))


def test_compiled_it_is_one_graph_and_reads_the_same() -> None:
    case = Case(**LARGE)
    given = problem(case, torch.bfloat16, DEVICE)
    leaves = [given[name].requires_grad_() for name in ("q", "keys", "values")]

    def work(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return topk_read(q * 2, keys, values, case.k, backend="triton").output * 1.0

    results = []
    for function in (work, torch.compile(work, fullgraph=True)):
        o = function(*leaves)
        results.append([o, *torch.autograd.grad(o, leaves, given["doutput"])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("entries", "experts"), [(1, 1), (1000, 7), (131_072, 64), (65_536, 1024)])
def test_experts_are_counted_as_they_are_sorted(entries: int, experts: int) -> None:
    draw = torch.Generator(DEVICE).manual_seed(0)
    indices = torch.randint(-1, experts + 1, (entries,), generator=draw, device=DEVICE)
    for kind in (torch.int64, torch.int32):
        found = expert_order(indices.to(kind), experts, backend="triton")
        expected = expert_order(indices.to(kind), experts, backend="torch")
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
