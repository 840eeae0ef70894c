"""What tests of optimizers compare with: plain steps in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from clplat.kernels.newton_schulz import QUINTIC

SHAPES = [(5, 3), (3, 5), (4, 3, 2, 2), (6,), ()]
MATRICES = [(5, 3), (3, 5), (5, 3), (4, 4)]


def close(left: Tensor, right: Tensor) -> bool:
    return torch.allclose(left, right, rtol=1e-11, atol=1e-13)


def gradients(shapes: list[tuple[int, ...]], steps: int = 7) -> list[list[Tensor]]:
    source = torch.Generator().manual_seed(3)
    return [[torch.randn(shape, generator=source, dtype=torch.float64) for shape in shapes] for _ in range(steps)]


def weights(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    source = torch.Generator().manual_seed(4)
    return [nn.Parameter(torch.randn(shape, generator=source, dtype=torch.float64)) for shape in shapes]


def agrees(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], shapes: list[tuple[int, ...]],
           oracle: Callable[[Tensor, list[Tensor], int], Tensor]) -> None:  # fmt: skip
    """The optimizer ends where `oracle(weight, its gradients, its place)` says, and somewhere else than it began."""
    given, steps = weights(shapes), gradients(shapes)
    optimizer = make(given)
    for step in steps:
        for weight, gradient in zip(given, step, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
    for place, (weight, first) in enumerate(zip(given, weights(shapes), strict=True)):
        expected = oracle(first.detach(), [step[place] for step in steps], place)
        assert close(weight.detach(), expected), (place, (weight - expected).abs().max())
        assert (expected - first).abs().max() > 1e-4


def by_singular_values(matrix: Tensor, steps: int) -> Tensor:
    """What the iteration does to a matrix, from what it does to its singular values."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.square().sum().sqrt()
    a, b, c = QUINTIC
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v
