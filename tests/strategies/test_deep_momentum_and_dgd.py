"""Deep momentum and delta gradient descent against their page's equations, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from optimizer_oracles import SHAPES, agrees, by_singular_values, close
from torch import Tensor, nn

from clplat.architectures.layers import WeightsAlone
from clplat.strategies.optimizers.deep_momentum import DeepMomentum
from clplat.strategies.optimizers.delta_gradient_descent import DGD

# Deep momentum


def deep_momentum_oracle(optimizer: DeepMomentum, options: dict[str, object]) -> Callable[..., Tensor]:
    """The memory learns by autograd here."""

    def run(w: Tensor, history: list[Tensor], place: int) -> Tensor:
        shape, w = w.shape, w.reshape(w.shape[0] if w.ndim > 1 else 1, -1)
        start = optimizer.state[optimizer.param_groups[0]["params"][place]].get("B_initial")
        memory = [torch.zeros(w.shape[1], w.shape[1] if start is None else len(start), dtype=w.dtype)]
        memory += [] if start is None else [start.clone()]
        origins = [part.clone() for part in memory]

        def answer(parts: list[Tensor], u: Tensor) -> Tensor:
            return (torch.tanh(u @ parts[1].T) if len(parts) > 1 else u) @ parts[0].T

        for flat in history:
            u = flat.reshape(w.shape)
            scale = u.square().mean().sqrt() if options.get("normalise", True) else torch.ones((), dtype=u.dtype)
            u = u / scale
            leaves = [part.clone().requires_grad_() for part in memory]
            y = answer(leaves, u)
            loss = y.sum() if options.get("objective") == "literal" else 0.5 * (y + u).square().sum(1).mean()
            found = torch.autograd.grad(loss, leaves)
            memory = [o + 0.9 * (m - o) - 0.2 * g for o, m, g in zip(origins, memory, found, strict=True)]
            step = answer(memory, u)
            step = by_singular_values(step, 5) if options.get("output") == "newton_schulz" else step * scale
            w = w - 0.3 * 0.1 * w + 0.3 * step
        return w.reshape(shape)

    return run


@pytest.mark.parametrize(
    "options",
    [{}, {"objective": "literal"}, {"normalise": False}, {"memory": "linear"}, {"output": "newton_schulz"},
     {"memory": "linear", "objective": "literal", "normalise": False}],
    ids=str,
)  # fmt: skip
def test_deep_momentum_is_its_equation_step_by_step(options: dict[str, object]) -> None:
    made: list[DeepMomentum] = []

    def make(given: list[nn.Parameter]) -> DeepMomentum:
        made.append(
            DeepMomentum(given, lr=0.3, memory_lr=0.2, momentum=0.9, hidden_size=6, weight_decay=0.1, **options)
        )
        return made[0]

    # For σ the oracle needs singular values, which differ from zero for matrices alone.
    shapes = [(5, 3), (3, 5)] if "output" in options else SHAPES
    agrees(make, shapes, lambda w, history, place: deep_momentum_oracle(made[0], options)(w, history, place))


def test_the_printed_objective_of_deep_momentum_is_no_descent_and_the_regression_is() -> None:
    ends = {}
    for objective, steps in (("literal", 10), ("regression", 200)):
        weight = nn.Parameter(torch.full((1, 4), -2.0, dtype=torch.float64))
        optimizer = DeepMomentum([weight], lr=0.1, objective=objective)
        for _ in range(steps):
            weight.grad = weight.detach().clone()
            optimizer.step()
        ends[objective] = float(weight.detach().norm())
    # It began at length 4, and the outputs of the literal memory go down where the weight has to go up.
    assert ends["regression"] < 0.1 < 4.1 < ends["literal"]


# Delta gradient descent


def layer_and_rows(rows: int) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(5)
    return (nn.Linear(4, 3, bias=False, dtype=torch.float64), torch.randn(rows, 4, dtype=torch.float64),
            torch.randn(rows, 3, dtype=torch.float64))  # fmt: skip


def one_step(form: str, rows: int, lr: float = 0.3, erase: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weight before and after, the rows, and the loss's gradient by each row's outputs (not divided by rows)."""
    layer, x, target = layer_and_rows(rows)
    before = layer.weight.detach().clone()
    optimizer = DGD.for_module(layer, lr=lr, form=form, erase=erase)
    (0.5 * (layer(x) - target).square().sum(1).mean()).backward()
    optimizer.step()
    return before, layer.weight.detach(), x, x @ before.T - target


@pytest.mark.parametrize("form", ["mean", "proximal"])
def test_dgd_of_one_row_is_the_printed_update_with_the_length_of_the_input(form: str) -> None:
    before, after, x, error = one_step(form, rows=1)
    rate = 0.3 / (1 + 0.3 * x[0].dot(x[0]))
    expected = before @ (torch.eye(4, dtype=x.dtype) - rate * torch.outer(x[0], x[0])) - rate * torch.outer(
        error[0], x[0]
    )
    assert close(after, expected)


def test_dgd_of_many_rows_is_the_minimum_of_its_problem_in_the_proximal_form() -> None:
    before, after, x, error = one_step("proximal", rows=6)
    moved = after.clone().requires_grad_()
    y = x @ moved.T
    problem = ((error * y).sum(1) + 0.5 * y.square().sum(1)).mean() + (moved - before).square().sum() / (2 * 0.3)
    assert torch.autograd.grad(problem, moved)[0].abs().max() < 1e-12


def test_dgd_of_many_rows_takes_their_mean_outer_product_in_the_mean_form() -> None:
    before, after, x, error = one_step("mean", rows=6)
    outer, gradient, length = torch.zeros(4, 4, dtype=x.dtype), torch.zeros(3, 4, dtype=x.dtype), 0.0
    for row, pull in zip(x, error, strict=True):
        outer, gradient = outer + torch.outer(row, row) / 6, gradient + torch.outer(pull, row) / 6
        length += row.dot(row) / 6
    rate = 0.3 / (1 + 0.3 * length)
    assert close(after, before - rate * before @ outer - rate * gradient)


@pytest.mark.parametrize("form", ["mean", "proximal"])
def test_dgd_that_erases_nothing_is_gradient_descent(form: str) -> None:
    before, after, x, error = one_step(form, rows=6, erase=0.0)
    assert close(after, before - 0.3 * error.T @ x / 6)


def test_dgd_ends_at_half_of_the_least_squares_solution_since_it_erases_twice() -> None:
    layer, x, target = layer_and_rows(12)
    optimizer = DGD.for_module(layer, lr=0.5, form="proximal")
    for _ in range(2000):
        (0.5 * (layer(x) - target).square().sum(1).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.allclose(layer.weight.detach(), 0.5 * torch.linalg.lstsq(x, target).solution.T, atol=1e-8)


class Multiplied(nn.Module):
    """A layer that is called, and one of which the weight alone is used."""

    def __init__(self, alone: type[nn.Linear]) -> None:
        super().__init__()
        self.called, self.apart = nn.Linear(3, 3, bias=False), alone(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.called(x) @ self.apart.weight


def test_a_layer_that_is_never_called_is_named_before_anything_moves_or_goes_to_others_if_it_says_so() -> None:
    def sgd(given: object) -> torch.optim.Optimizer:
        return torch.optim.SGD(given, lr=0.1)

    made = Multiplied(nn.Linear)
    before = made.called.weight.detach().clone()
    optimizer = DGD.for_module(made, lr=0.1)
    made(torch.randn(4, 3)).sum().backward()
    with pytest.raises(RuntimeError, match=r"apart.weight: .* exclude: \['apart.weight'\]"):
        optimizer.step()
    assert torch.equal(made.called.weight, before)
    told = Multiplied(WeightsAlone)
    stepped = DGD.for_module(told, lr=0.1, others=sgd)
    told(torch.randn(4, 3)).sum().backward()
    expected = told.apart.weight - 0.1 * told.apart.weight.grad
    stepped.step()
    torch.testing.assert_close(told.apart.weight, expected)
