"""GEM: its quadratic programme against brute force, the constraints that hold afterwards, and what it remembers."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from projections import assert_no_gradient_is_made_up, gradient

from clplat.objective import Objective
from clplat.strategies.projection import GEM, RIDGE, gem_multipliers
from clplat.strategies.toy_run import ROWS, STEPS, TASKS, ToyRun


def brute_force(overlap: np.ndarray, opposed: np.ndarray, margin: float) -> np.ndarray:
    """The best of all 2^T ways to hold multipliers at their bound, in float64."""
    P, best, least = overlap + RIDGE * np.eye(len(overlap)), None, np.inf
    for choice in product([False, True], repeat=len(opposed)):
        free, v = np.array(choice), np.full(len(opposed), margin)
        if free.any():
            rest = opposed[free] + P[np.ix_(free, ~free)] @ v[~free]
            v[free] = np.linalg.solve(P[np.ix_(free, free)], -rest)
        value = 0.5 * v @ P @ v + opposed @ v
        if (v >= margin - 1e-12).all() and value < least:
            best, least = v, value
    assert best is not None
    return best


@pytest.mark.parametrize("tasks", [1, 2, 3, 7])
@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_the_multipliers_are_those_of_brute_force(tasks: int, margin: float) -> None:
    draw, free = np.random.default_rng(tasks), 0
    for size in [1, 3, 50] * 20:  # with 1 or 3 weights the gradients of several tasks depend on each other
        reference, own = draw.normal(size=(tasks, size)), draw.normal(size=size)
        found = gem_multipliers(reference @ reference.T, reference @ own, margin)
        expected = brute_force(reference @ reference.T, reference @ own, margin)
        assert np.allclose(found, expected, rtol=1e-7, atol=1e-7)
        free += (found > margin + 1e-9).sum()
    assert free, "no bound was ever left"


def test_forty_parallel_gradients_are_settled_too() -> None:
    draw = np.random.default_rng(0)
    reference = draw.normal(size=(1, 300)) * draw.normal(size=(40, 1)) + 1e-6 * draw.normal(size=(40, 300))
    overlap, opposed = reference @ reference.T, reference @ draw.normal(size=300)
    v = gem_multipliers(overlap, opposed, 0.1)
    slope = (overlap + RIDGE * np.eye(40)) @ v + opposed
    assert (v >= 0.1).all() and (slope > -1e-6).all() and np.abs(slope * (v - 0.1)).max() < 1e-6


def at_third_task(direction: tuple[float, float], strength: float) -> tuple[ToyRun, torch.Tensor, torch.Tensor]:
    """A run in its third task with a gradient made of those of the first two tasks, and (2, P) these two."""
    run = ToyRun([GEM(patterns_per_task=ROWS, memory_strength=strength)], Objective).train(2 * STEPS)
    weights, references = list(run.architecture.parameters()), []
    for task in range(2):
        batch = run.path[task].train.batch(torch.arange(ROWS))
        parts = torch.autograd.grad(run.context.loss(run.architecture(batch), batch), weights)
        references.append(torch.cat([part.flatten() for part in parts]))
    reference = torch.stack(references)
    own = torch.tensor(direction) @ reference + 0.02 * torch.randn(
        reference.shape[1], generator=torch.Generator().manual_seed(3)
    )
    for parameter, part in zip(weights, own.split([p.numel() for p in weights])):
        parameter.grad = part.view_as(parameter).clone()
    return run, own, reference


@pytest.mark.parametrize("direction", [(-1.0, 0.3), (0.3, -1.0), (-1.0, -1.0)])
def test_after_projection_no_earlier_task_is_opposed_and_the_step_is_the_nearest_such(direction) -> None:
    run, own, reference = at_third_task(direction, strength=0.0)
    assert (reference @ own).min() < 0
    run.strategies[0].gradient()
    assert (reference @ gradient(run)).min() > -0.01 * (reference @ own).abs().max(), "but for the ridge"
    v = brute_force((reference @ reference.T).double().numpy(), (reference @ own).double().numpy(), 0.0)
    assert torch.allclose(gradient(run), own + reference.T @ torch.from_numpy(v).float(), atol=1e-5)


def test_strength_is_the_least_share_of_every_earlier_gradient() -> None:
    run, own, reference = at_third_task((-1.0, 0.3), strength=2.0)
    run.strategies[0].gradient()
    v = brute_force((reference @ reference.T).double().numpy(), (reference @ own).double().numpy(), 2.0)
    assert v.min() >= 2.0
    assert torch.allclose(gradient(run), own + reference.T @ torch.from_numpy(v).float(), atol=1e-5)


def test_a_gradient_that_opposes_no_task_keeps_every_bit() -> None:
    run, own, reference = at_third_task((1.0, 1.0), strength=0.5)
    assert (reference @ own).min() > 0
    run.strategies[0].gradient()
    assert torch.equal(gradient(run), own)


def test_weights_that_got_no_gradient_get_none_by_projection() -> None:
    run, _, _ = at_third_task((-1.0, -1.0), strength=0.5)
    assert_no_gradient_is_made_up(run)


def test_each_reference_is_of_the_rows_of_one_task() -> None:
    run = ToyRun([GEM(patterns_per_task=5)], Objective)
    (strategy,) = run.strategies
    for task in range(TASKS):
        run.train((task + 1) * STEPS)
        assert strategy.ends == [5 * (number + 1) for number in range(task + 1)]
        assert strategy.memory.batch(slice(5 * task, 5 * task + 5)).task.tolist() == [task] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [({"patterns_per_task": 0}, "patterns_per_task"), ({"patterns_per_task": 1, "memory_strength": -1}, "strength")],
)
def test_wrong_options_are_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GEM(**options)
