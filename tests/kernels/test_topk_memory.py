"""`topk_read`: every form against the definition, ties, missing slots, and what NaN does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from topk_reads import Case, assert_close, definition, problem, solved

from clplat.kernels.backends import interpreting
from clplat.kernels.topk_memory import launch, reference, topk_read, tuning

FORMS = ("torch", "triton") if interpreting() else ("torch",)
every_form = pytest.mark.parametrize("form", FORMS)
interpreted = pytest.mark.skipif(not interpreting(), reason="here Triton compiles for a GPU: see tests/gpu")

CASES = [
    Case(),
    Case(N=1, S=1, k=1, D=3, E=1),
    Case(N=2, S=150, D=20, E=40, k=8),
    Case(N=3, S=7, k=9),
    Case(N=3, S=135, D=17, E=16, k=3, valid=132),
    Case(N=2, S=50, k=4, valid=0.3),
    Case(N=2, k=17, valid=9),
    Case(N=2, S=50, D=150, E=300, k=4, valid=0.8),
    Case(N=3, S=60, D=32, k=6, whole=False),
]


@every_form
@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_form_reads_what_the_definition_does(case: Case, form: str) -> None:
    given = problem(case)
    assert_close(solved(case, given, form), definition(case, given), forward=2e-6, backward=1e-5)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounding_away_from_fp64(dtype: torch.dtype) -> None:
    case = Case(N=2, k=4)
    given = problem(case, dtype)
    assert_close(solved(case, given, "triton"), definition(case, given), forward=8e-3, backward=8e-3)


def test_the_definition_is_the_softmax_over_the_best_scores() -> None:
    case = Case(whole=False)
    given = problem(case, torch.float64)
    found = topk_read(given["q"], given["keys"], given["values"], case.k, temperature=0.5, backend="reference")
    scores, slots = (given["q"] @ given["keys"].T).topk(case.k)
    weights = (scores / 0.5).softmax(1)
    assert torch.equal(found.indices, slots)
    torch.testing.assert_close(found.weights, weights)
    torch.testing.assert_close(found.output, (weights[..., None] * given["values"][slots]).sum(1))
    mass = [weights[slots == slot].sum() for slot in range(case.S)]
    torch.testing.assert_close(found.mass, torch.stack(mass))


@pytest.mark.parametrize("form", ["torch", "reference"])
@pytest.mark.parametrize("valid", [None, 3, 0])
def test_gradients_are_numerical_derivatives(form: Any, valid: int | None) -> None:
    case = Case(N=3, S=12, D=4, E=3, whole=False)
    given = problem(case, torch.float64)
    leaves = [given[name].requires_grad_() for name in ("q", "keys", "values")]
    assert torch.autograd.gradcheck(lambda *parts: topk_read(*parts, case.k, valid=valid, backend=form)[::2], leaves)


@every_form
def test_of_equal_scores_the_lowest_slots_are_read(form: Any) -> None:
    q, keys, values = torch.ones(2, 8), torch.ones(150, 8), torch.randn(150, 4)
    # One better slot far behind, and zeros of either sign, which are equal too.
    keys[140] = 2.0
    q[1] = 0.0
    keys[::2] *= -1.0
    keys[::2] *= torch.tensor([-1.0, 1.0])[torch.arange(75) % 2][:, None]
    found = topk_read(q, keys, values, 4, backend=form)
    assert found.indices[1].tolist() == [0, 1, 2, 3]
    assert found.indices[0].tolist() == topk_read(q, keys, values, 4, backend="reference").indices[0].tolist()


@every_form
def test_an_empty_store_gives_exactly_nothing_whatever_lies_in_it(form: Any) -> None:
    q = torch.randn(3, 8, requires_grad=True)
    keys, values = (torch.full((40, 8), torch.nan, requires_grad=True) for _ in range(2))
    found = topk_read(q, keys, values, 4, valid=torch.tensor(0), backend=form)
    assert not found.output.any() and not found.weights.any() and not found.mass.any()
    assert (found.indices == -1).all()
    for gradient in torch.autograd.grad(found.output.sum() + found.weights.sum(), [q, keys, values]):
        assert not gradient.any()


@every_form
def test_what_lies_in_invalid_slots_does_not_matter(form: Any) -> None:
    case = Case(N=2, k=5, valid=3)
    given = problem(case)
    clean = solved(case, given, form)
    given["keys"][3:], given["values"][3:] = torch.nan, torch.inf
    found = solved(case, given, form)
    assert all(torch.equal(found[name], clean[name]) for name in clean)
    assert (found["indices"][:, 3:] == -1).all() and not found["weights"][:, 3:].any()
    torch.testing.assert_close(found["weights"].sum(1), torch.ones(2))


@every_form
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # of the interpreter's maxima
def test_a_nan_stays_in_its_query_and_a_slot_of_nan_is_never_read(form: Any) -> None:
    case = Case(N=3, k=4)
    given = problem(case)
    given["q"][1, 2] = torch.nan
    given["keys"][5, 0] = torch.nan
    found = topk_read(given["q"], given["keys"], given["values"], case.k, backend=form)
    assert found.output[1].isnan().all() and found.weights[1].isnan().all()
    rest = topk_read(
        given["q"][::2], given["keys"], given["values"], case.k, valid=~given["keys"].isnan().any(1), backend=form
    )
    assert torch.equal(found.output[::2], rest.output) and torch.equal(found.indices[::2], rest.indices)
    assert torch.equal(found.mass, rest.mass)


@every_form
def test_a_count_is_a_number_a_tensor_or_a_mask(form: Any) -> None:
    given = problem(Case(N=2))
    tensors = given["q"], given["keys"], given["values"], 5
    first = topk_read(*tensors, valid=30, backend=form)
    for valid in (torch.tensor(30), torch.tensor([30], dtype=torch.int32), torch.arange(40) < 30):
        again = topk_read(*tensors, valid=valid, backend=form)
        assert all(torch.equal(one, other) for one, other in zip(again, first, strict=True))


@every_form
def test_leading_dimensions_and_strides_are_the_callers_business(form: Any) -> None:
    case = Case(N=4, S=20, k=2)
    given = problem(case)
    expected = topk_read(given["q"], given["keys"], given["values"], case.k, backend=form)
    q = given["q"].unflatten(0, (2, 2)).transpose(0, 1).contiguous().transpose(0, 1)
    keys, values = given["keys"].T.contiguous().T, torch.cat([given["values"]] * 2, 1)[:, : case.E]
    found = topk_read(q, keys, values, case.k, backend=form)
    assert found.output.shape == (2, 2, case.E) and found.weights.shape == found.indices.shape == (2, 2, case.k)
    torch.testing.assert_close(found.output.flatten(0, 1), expected.output)
    assert torch.equal(found.indices.flatten(0, 1), expected.indices)
    one = topk_read(given["q"][0], keys, values, case.k, backend=form)
    torch.testing.assert_close(one.output, expected.output[0])
    none = topk_read(given["q"][:0], keys, values, case.k, backend=form)
    assert none.output.shape == (0, case.E) and not none.mass.any()


def test_the_blocked_form_is_the_same_in_any_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for case in (Case(N=9, S=70, k=5), Case(N=9, S=70, k=30, valid=0.4)):
        given = problem(case)
        whole = solved(case, given, "torch")
        monkeypatch.setattr(reference, "QUERIES", 4)
        monkeypatch.setattr(reference, "SLOTS", 16)
        assert_close(solved(case, given, "torch"), whole, forward=1e-6, backward=1e-6)
        monkeypatch.undo()


@interpreted
@pytest.mark.parametrize("search", ["maxima", "lists"])
@pytest.mark.parametrize(("group", "slots"), [(16, 32), (8, 64)])
def test_every_way_to_search_reads_the_same(
    search: Any, group: int, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(N=5, S=150, k=3, valid=140)
    given = problem(case)
    plan = tuning.Plan(search=search, group=group, rows=4, slots=slots, features=16, warps=4, stages=1, read_warps=1)
    searched: list[str] = []
    find = launch.searched
    monkeypatch.setattr(launch, "plan_for", lambda *sizes: plan)
    monkeypatch.setattr(launch, "searched", lambda *given: searched.append(given[-1].search) or find(*given))
    # Small parts and small buffers: lists of several parts are joined, and queries come in two launches.
    monkeypatch.setattr(launch, "LARGEST_BUFFER", 4 * -(-case.S // group))
    found = topk_read(given["q"], given["keys"], given["values"], case.k, valid=case.valid, backend="triton")
    expected = topk_read(given["q"], given["keys"], given["values"], case.k, valid=case.valid, backend="reference")
    assert searched == [search] * (2 if search == "maxima" else 1)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.output, expected.output)
    torch.testing.assert_close(found.mass, expected.mass)
