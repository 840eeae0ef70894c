"""Newton-Schulz: singular values come near 1, singular vectors stay, and a batch is its matrices one by one."""

from __future__ import annotations

import pytest
import torch
from optimizer_oracles import MATRICES, by_singular_values, close, gradients

from clplat.kernels.newton_schulz import newton_schulz, orthogonalised


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (1, 7)])
def test_newton_schulz_moves_singular_values_alone_and_brings_them_near_one(shape: tuple[int, int]) -> None:
    matrix = gradients([shape])[0][0]
    result = newton_schulz(matrix)
    assert close(result, by_singular_values(matrix, 5))
    assert ((torch.linalg.svdvals(result) - 1).abs() < 0.35).all()


def test_matrices_of_one_shape_in_one_batch_are_orthogonalised_as_one_by_one() -> None:
    given = gradients(MATRICES)[0]
    for batched, matrix in zip(orthogonalised(given), given, strict=True):
        assert close(batched, newton_schulz(matrix))


def test_a_matrix_of_zeros_stays_one() -> None:
    assert not newton_schulz(torch.zeros(3, 4)).any()
