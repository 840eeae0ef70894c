"""`expert_order`: a stable sort by expert with its lengths, and a mixture of experts that is computed through it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clplat.kernels.backends import interpreting
from clplat.kernels.topk_memory import expert_order

every_form = pytest.mark.parametrize("form", ("torch", "triton") if interpreting() else ("torch",))


@every_form
@pytest.mark.parametrize(("entries", "experts"), [(1, 1), (300, 7), (257, 1), (130, 500)])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_entries_come_expert_by_expert_and_in_their_order(
    entries: int, experts: int, kind: torch.dtype, form: Any
) -> None:
    indices = torch.randint(-1, experts + 1, (entries,), generator=torch.Generator().manual_seed(0)).to(kind)
    order, places, ends = expert_order(indices, experts, backend=form)
    by_hand = [[n for n, own in enumerate(indices.tolist()) if own == expert] for expert in range(experts)]
    nobodys = [n for n, own in enumerate(indices.tolist()) if not 0 <= own < experts]
    assert order.tolist() == [n for own in by_hand for n in own] + nobodys
    assert ends.tolist() == torch.tensor([len(own) for own in by_hand]).cumsum(0).tolist()
    assert order[places.long()].tolist() == list(range(entries))
    assert {part.dtype for part in (order, places, ends)} == {torch.int32}


@every_form
def test_no_entries_are_no_work(form: Any) -> None:
    order, places, ends = expert_order(torch.zeros(0, 2, dtype=torch.int64), 3, backend=form)
    assert not len(order) and not len(places) and ends.tolist() == [0, 0, 0]


@every_form
def test_a_mixture_of_experts_through_it_is_the_sum_over_each_tokens_experts(form: Any) -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(20, 4), torch.randn(3, 4, 5)
    gates, chosen = torch.randn(20, 3).softmax(1).topk(2)
    order, places, ends = expert_order(chosen, 3, backend=form)
    rows = x[order // 2]
    parts = [part @ own for part, own in zip(rows.tensor_split(ends.tolist()[:-1]), weights, strict=True)]
    found = (torch.cat(parts)[places].unflatten(0, chosen.shape) * gates[..., None]).sum(1)
    expected = torch.einsum("td,tkde,tk->te", x, weights[chosen], gates)
    torch.testing.assert_close(found, expected)


@pytest.mark.skipif(not interpreting(), reason="here Triton compiles for a GPU: see tests/gpu")
def test_the_operator_is_what_it_is_registered_as() -> None:
    torch.library.opcheck(torch.ops.clplat.expert_order.default, (torch.tensor([2, 0, 1, 2]), 3))


@pytest.mark.parametrize(
    ("indices", "experts", "form", "says"),
    [
        (torch.zeros(3), 2, "auto", "^indices: must be a tensor of int32 or int64, got torch.float32"),
        ([1, 2], 2, "auto", "^indices: .*got list"),
        (torch.zeros(3, dtype=torch.int64), 0, "auto", "^num_experts: must be a whole number, at least 1, got 0"),
        (
            torch.zeros(3, dtype=torch.int64),
            2,
            "sort",
            "^backend: must be auto, torch, triton or reference, got 'sort'",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(indices: Any, experts: int, form: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        expert_order(indices, experts, backend=form)


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    indices = torch.zeros(3, dtype=torch.int64)
    if interpreting():
        with pytest.raises(ValueError, match="there are 2000 experts; the kernels go up to 1024"):
            expert_order(indices, 2000, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="the indices are on cpu"):
        expert_order(indices, 2, backend="triton")
