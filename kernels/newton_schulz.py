"""Orthogonalisation of matrices by the quintic Newton-Schulz iteration, many of one shape at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients with the steepest slope at 0: singular values come near 1 in five steps, and stay within about 0.3 of it
(K. Jordan 2024, kellerjordan.github.io/posts/muon)."""

STEPS = 5
"""As many as Muon takes."""


def newton_schulz(
    matrix_BMN: Tensor, steps: int = STEPS, coefficients: tuple[float, float, float] = QUINTIC, eps: float = 1e-7
) -> Tensor:
    """U Vᵀ of each matrix U S Vᵀ, roughly: X ← a X + (b X Xᵀ + c (X Xᵀ)²) X from X = matrix / its Frobenius norm.

    Any leading dimensions; computed in the dtype of the matrix. A matrix of zeros stays one.
    """
    a, b, c = coefficients
    tall = matrix_BMN.shape[-2] > matrix_BMN.shape[-1]
    x = matrix_BMN.mT if tall else matrix_BMN
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def orthogonalised(matrices: Sequence[Tensor], steps: int = STEPS) -> list[Tensor]:
    """`newton_schulz` of every matrix, those of one shape in one batch."""
    by_shape: dict[tuple[torch.Size, torch.device, torch.dtype], list[int]] = {}
    for place, matrix in enumerate(matrices):
        by_shape.setdefault((matrix.shape, matrix.device, matrix.dtype), []).append(place)
    results: list[Tensor] = list(matrices)
    for places in by_shape.values():
        batch = newton_schulz(torch.stack([matrices[place] for place in places]), steps)
        for place, result in zip(places, batch.unbind(), strict=True):
            results[place] = result
    return results
