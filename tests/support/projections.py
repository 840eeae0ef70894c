"""What A-GEM and GEM have in common in their tests: the gradient that they project."""

from __future__ import annotations

import torch
from torch import Tensor

from clplat.strategies.toy_run import ToyRun


def gradient(run: ToyRun) -> Tensor:
    """That of all weights, flat."""
    return torch.cat([p.grad.flatten() for p in run.architecture.parameters()])


def assert_no_gradient_is_made_up(run: ToyRun) -> None:
    """Weights that got no gradient get none by the projection, be it one of them or all."""
    first = next(run.architecture.parameters())
    first.grad = None
    run.strategies[0].gradient()
    assert first.grad is None
    run.architecture.zero_grad()
    run.strategies[0].gradient()
    assert all(parameter.grad is None for parameter in run.architecture.parameters())
