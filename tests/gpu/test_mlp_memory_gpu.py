"""`mlp_memory`'s kernels as the GPU's compilers make them: rounding of bf16 and miscompiled products.

    pytest tests/gpu/test_mlp_memory_gpu.py -x

What both memories owe is in test_memory_operations_gpu.py, what needs no GPU in tests/kernels. Every kind of case costs
some ten seconds for its kernels to compile, so there are few, the most telling first.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from memory_problems import Tensors
from mlp_memories import Case, assert_close, by, definition, problem

from clplat.kernels.mlp_memory import launch
from clplat.kernels.mlp_memory.reference import chunked

DEVICE = torch.device("cuda")
SIZES: dict[str, Any] = {"tokens": 300, "chunk": 64, "D": 64, "E": 64, "inner": 256, "batch": 2, "heads": 2}
PACKED = SIZES | {"batch": 1, "lengths": (130, 0, 7, 163)}

# Of a Frobenius norm: bf16 rounds the inputs of every product to 4e-3 at most, and a gradient goes through some ten. An
# end state holds what the last tokens wrote, of two rounded factors: plain PyTorch is the measure of it.
BF16 = {"forward": 8e-3, "backward": 2e-2, "gates": 3e-2}

HALF_CASES = [
    Case(**SIZES | {"chunk": 16}),
    Case(**SIZES),
    Case(**SIZES | {"chunk": 32, "momentum": False, "activation": "gelu"}),
    Case(**SIZES | {"bias": "dot", "residual": False, "decay": False}),
    Case(offsets=(3, 63, 0, 40), **PACKED),
    Case(offsets=(3, 11, 0, 15), **PACKED | {"chunk": 16, "D": 60, "E": 60, "inner": 240}),
    Case(**SIZES | {"D": 128, "E": 128, "inner": 512}),
    # Several groups of chunks.
    Case(**SIZES | {"tokens": 1100, "chunk": 16}),
]


def given_for(case: Case, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """The problem on the GPU."""
    return problem(case, dtype, DEVICE)


def references(case: Case, given: Tensors) -> tuple[Tensors, dict[str, Any]]:
    """The solution in fp64, and the bounds of one in bf16."""
    with torch.autocast("cuda", torch.bfloat16):
        rounded = definition(case, given, chunked, torch.float32)
    return definition(case, given, chunked), BF16 | {"rounded": rounded}


@pytest.mark.parametrize("case", HALF_CASES, ids=str)
def test_in_bf16_everything_is_rounding_away_from_fp64(case: Case) -> None:
    given = given_for(case)
    expected, bounds = references(case, given)
    assert_close(by(case, given, "triton"), expected, **bounds)


@pytest.mark.parametrize("apart", [True, False])
def test_reading_in_the_walk_or_apart_from_it_is_the_same(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(**SIZES | {"tokens": 1100, "chunk": 64})
    given = given_for(case)
    monkeypatch.setattr(launch, "reads_apart", lambda layout: apart)
    expected, bounds = references(case, given)
    assert_close(by(case, given, "triton"), expected, **bounds)


@pytest.mark.parametrize("chunk", [16, 64])
def test_every_block_of_inner_features_and_number_of_warps_computes_the_same(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Triton 3.4 to 3.7 mistook products of transposed results on Hopper, in tiles of 64 and not of 32.
    case = Case(**SIZES | {"chunk": chunk})
    given = given_for(case)
    expected, bounds = references(case, given)
    usual = launch.options
    for block, warps, stages in ((16, 4, 1), (32, 4, 1), (32, 8, 1), (64, 8, 1), (32, 8, 2)):

        def chosen(kernel: str, layout: Any, block=block, warps=warps, stages=stages) -> dict[str, int]:
            found = usual(kernel, layout)
            if "BJ" in found:
                found |= {"BJ": block, "num_warps": warps, "num_stages": stages}
            return found

        monkeypatch.setattr(launch, "options", chosen)
        assert_close(by(case, given, "triton"), expected, **bounds)
