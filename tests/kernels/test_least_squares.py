"""Recursive least squares: recursion, chunks and one ridge system a token are the same, with all gradients."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clplat.kernels.least_squares import SquaresState, least_squares, ridge_solution

Problem = dict[str, Tensor]


def problem(length: int, *, seed: int = 0, forget: float = 0.5, rows: int = 2, heads: int = 3) -> Problem:
    draw = torch.Generator().manual_seed(seed)

    def normal(width: int) -> Tensor:
        return torch.randn(rows, length, heads, width, generator=draw, dtype=torch.float64)

    def uniform(low: float) -> Tensor:
        return low + (1 - low) * torch.rand(rows, length, heads, generator=draw, dtype=torch.float64)

    parts = {
        "q": normal(5),
        "k": normal(5),
        "v": normal(4),
        "weight": uniform(0.0),
        "log_forget": uniform(forget).log(),
    }
    return {name: part.requires_grad_() for name, part in parts.items()}


def by_ridge(given: Problem, ridge: float) -> Tensor:
    return ridge_solution(*(part.transpose(1, 2) for part in given.values()), ridge).transpose(1, 2)


def gradients(given: Problem, output: Tensor, *more: Tensor) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    outer = sum((part * torch.randn(part.shape, generator=draw, dtype=part.dtype)).sum() for part in (output, *more))
    return list(torch.autograd.grad(outer, list(given.values())))


@pytest.mark.parametrize("backend", ["chunked", "recurrent"])
@pytest.mark.parametrize("length", [1, 4, 13])
def test_every_answer_is_that_of_the_ridge_solution_of_all_pairs_before_with_all_gradients(
    backend: str, length: int
) -> None:
    given = problem(length)
    expected = by_ridge(given, 0.1)
    found, _ = least_squares(**given, ridge=0.1, chunk=4, backend=backend)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    for mine, other in zip(gradients(given, found), gradients(given, expected), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chunk", [1, 3, 5, 64])
def test_chunks_change_neither_answers_nor_states_nor_gradients(chunk: int) -> None:
    given = problem(11)
    expected, end = least_squares(**given, backend="recurrent")
    found, state = least_squares(**given, chunk=chunk)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    for mine, other in zip(state, end, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-8)
    for mine, other in zip(gradients(given, found, *state), gradients(given, expected, *end), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["chunked", "recurrent"])
def test_a_state_goes_on_at_any_token(backend: str) -> None:
    given = problem(9)
    whole, end = least_squares(**given, ridge=0.1, chunk=4, backend=backend)
    for place in (1, 4, 6):
        first = {name: part[:, :place] for name, part in given.items()}
        rest = {name: part[:, place:] for name, part in given.items()}
        before, state = least_squares(**first, ridge=0.1, chunk=4, backend=backend)
        after, last = least_squares(**rest, ridge=0.1, chunk=4, backend=backend, state=state)
        torch.testing.assert_close(torch.cat([before, after], 1), whole, rtol=0, atol=1e-10)
        for mine, other in zip(last, end, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


def test_the_inverse_is_one_and_pairs_of_weight_zero_are_not_read() -> None:
    given = problem(12)
    given["weight"] = torch.where(torch.arange(12).view(1, 12, 1) % 3 == 0, 0.0, given["weight"])
    found, (W, P) = least_squares(**given, ridge=0.1, chunk=5)
    k, weight, total = (given[name].transpose(1, 2) for name in ("k", "weight", "log_forget"))
    left = (total.sum(-1, keepdim=True) - total.cumsum(-1)).exp() * weight
    moments = (k * left.unsqueeze(-1)).mT @ k + 0.1 * total.sum(-1).exp()[..., None, None] * torch.eye(5)
    torch.testing.assert_close(P @ moments, torch.eye(5, dtype=P.dtype).expand_as(P), rtol=0, atol=1e-8)
    spoiled = given | {"v": given["v"] + 100.0 * (given["weight"] == 0).unsqueeze(-1)}
    torch.testing.assert_close(least_squares(**spoiled, ridge=0.1, chunk=5)[0], found, rtol=0, atol=1e-9)


def test_as_many_pairs_as_features_are_recalled_exactly_and_with_forgetting_the_last_of_more() -> None:
    given = problem(40, forget=0.3)
    few = {name: part[:, :5] for name, part in given.items() if name in "qkv"}
    _, (W, _) = least_squares(**few, ridge=1e-8)
    torch.testing.assert_close(few["k"].transpose(1, 2) @ W, few["v"].transpose(1, 2), rtol=0, atol=1e-4)
    many = {name: given[name] for name in "qkv"}
    _, (lasting, _) = least_squares(**many, chunk=8)
    _, (fading, _) = least_squares(**many, log_forget=given["log_forget"], chunk=8)
    newest, value = given["k"][:, -2:].transpose(1, 2), given["v"][:, -2:].transpose(1, 2)
    assert (newest @ fading - value).square().mean() < 0.2 * (newest @ lasting - value).square().mean()


def test_halves_are_computed_in_single_precision_and_come_back_as_they_were() -> None:
    given = {name: part.detach().bfloat16() for name, part in problem(20, forget=0.9).items()}
    found, state = least_squares(**given, ridge=0.1, chunk=8)
    assert found.dtype == torch.bfloat16
    assert isinstance(state, SquaresState)
    assert state.W.dtype == state.P.dtype == torch.float32
    wide = {name: part.double() for name, part in given.items()}
    expected, _ = least_squares(**wide, ridge=0.1, backend="recurrent")
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)


def test_what_does_not_fit_is_refused_by_name() -> None:
    given = problem(3)
    for change, message in [
        ({"v": given["v"][:, :2]}, "q, k, v: must be .B, T, H, D."),
        ({"weight": given["weight"][:, :2]}, r"weight: must be \(2, 3, 3\), got \(2, 2, 3\)"),
        ({"ridge": 0.0}, "ridge: must be above 0"),
        ({"chunk": 0}, "chunk: must be at least 1"),
        ({"backend": "triton"}, "backend: must be chunked or recurrent, got 'triton'"),
    ]:
        with pytest.raises(ValueError, match=message):
            least_squares(**(given | change))


def test_the_pages_example_runs_as_printed() -> None:
    names: dict[str, Tensor] = {}
    page = (Path(__file__).parents[2] / "docs" / "memories.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    assert names["outputs"].shape == (2, 100, 4, 16)
