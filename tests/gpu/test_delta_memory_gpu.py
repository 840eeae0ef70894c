"""`delta_memory`'s kernels as the GPU's compilers make them: rounding of bf16 and miscompiled products.

    pytest tests/gpu -x

What both memories owe is in test_memory_operations_gpu.py, what needs no GPU in tests/kernels. Every kind of case
(mode, gates, widths, chunk, type, packed or not) costs some seconds for its seven kernels to compile, so there are few,
the most telling first, and all have one length.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from delta_memories import Case, assert_close, by, definition, problem
from memory_problems import Tensors

from clplat.kernels.delta_memory.reference import MODES, chunked

DEVICE = torch.device("cuda")
SIZES: dict[str, Any] = {"tokens": 300, "chunk": 64, "D": 64, "E": 64, "batch": 2, "heads": 2}
WIDE = SIZES | {"D": 128, "E": 128}
PACKED = SIZES | {"batch": 1, "lengths": (130, 0, 7, 163)}

# Of a Frobenius norm: bf16 rounds inputs of every product to 4e-3 at most and the outputs once more.
BF16 = {"forward": 5e-3, "backward": 8e-3, "gates": 2e-2}

HALF_CASES = [
    *(Case(mode=mode, **SIZES) for mode in MODES),
    *(Case(mode=mode, **WIDE) for mode in MODES),
    Case(mode="frozen", offsets=(3, 63, 0, 40), **PACKED),
    Case(mode="gdn", group=2, momentum=False, **PACKED | {"D": 128, "E": 64}),
]


def given_for(case: Case, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """The problem on the GPU."""
    return problem(case, dtype, DEVICE)


@pytest.mark.parametrize("case", HALF_CASES, ids=str)
def test_in_bf16_everything_is_rounding_away_from_fp64(case: Case) -> None:
    given = given_for(case)
    assert_close(by(case, given, "triton"), definition(case, given, chunked), **BF16)


@pytest.mark.parametrize("mode", ["hebb", "exact", "gdn"])
def test_the_size_of_a_chunk_changes_no_result(mode: Any) -> None:
    # Triton 3.4 to 3.7 mistook products of transposed results on Hopper, in tiles of 64 and not of 32.
    large, *others = (Case(mode=mode, **SIZES | {"chunk": chunk}) for chunk in (64, 32, 16))
    given = given_for(large)
    expected = by(large, given, "triton")
    for case in others:
        # Two roundings are apart, each as far as it may be from the truth.
        assert_close(by(case, given, "triton"), expected, **{name: 1.5 * bound for name, bound in BF16.items()})
