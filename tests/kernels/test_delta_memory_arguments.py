"""What `delta_memory` refuses, and that what it returns is never the caller's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from clplat.kernels.delta_memory import MemoryState, delta_memory
from clplat.kernels.delta_memory.interface import Backend


def tokens(count: int, rows: int = 1) -> list[Tensor]:
    """q, k, v and rate of two heads of 16 features."""
    return [*(torch.randn(rows, count, 2, 16) for _ in range(3)), torch.rand(rows, count, 2)]


def bounds(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize("numbers", [(0, 5, 19), (0, 5, 21), (0, 15, 10, 20), (-1, 20), (1, 20)])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bounds_that_are_not_those_of_the_row_are_refused(numbers: tuple[int, ...], backend: Backend) -> None:
    with pytest.raises(ValueError, match=r"cu_seqlens: must go from 0 to T = 20 and never back"):
        delta_memory(*tokens(20), mode="gdn", chunk=16, cu_seqlens=bounds(*numbers), backend=backend)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cu_seqlens": bounds(0)}, r"cu_seqlens: must be a tensor \(sequences \+ 1,\) of integers, got \(1,\)"),
        ({"cu_seqlens": [0, 20]}, r"cu_seqlens: must be a tensor .* got \[0, 20\]"),
        ({"chunk": 16.0}, r"chunk: must be a whole number of tokens, at least 1, got 16\.0"),
        ({"mode": "delta"}, r"mode: must be one of hebb, frozen, exact, gdn, got 'delta'"),
        ({"log_decay": -0.1}, r"log_decay: must be a tensor of floating-point numbers, got float"),
        (
            {"v": torch.ones(1, 20, 2, 16, dtype=torch.long)},
            r"v: must be a tensor of floating-point .* got torch.int64",
        ),
        ({"v": torch.ones(1, 20, 2, 16, device="meta")}, r"v: is on meta, q on cpu"),
        ({"state": (1, 2)}, r"state: must be a MemoryState, as a call returns it, got tuple"),
    ],
)
def test_what_no_form_computes_is_refused(changed: dict[str, Any], message: str) -> None:
    arguments = dict(zip(("q", "k", "v", "rate"), tokens(20), strict=True)) | {"mode": "gdn"}
    with pytest.raises(ValueError, match=message):
        delta_memory(**(arguments | changed))


@pytest.mark.parametrize("offset", [-1, 16, 40])
def test_a_state_from_another_size_of_chunk_is_refused(offset: int) -> None:
    W = torch.zeros(1, 2, 16, 16)
    with pytest.raises(ValueError, match="state.offset: must be at least 0 and below chunk = 16"):
        delta_memory(*tokens(5), mode="frozen", chunk=16, state=MemoryState(W, None, W, bounds(offset)))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_the_kernels_refuse_forward_mode_derivatives_which_plain_pytorch_has() -> None:
    q, *rest = tokens(20)

    def answered(backend: Backend) -> Tensor:
        return torch.func.jvp(
            lambda x: delta_memory(x, *rest, mode="gdn", chunk=16, backend=backend)[0], (q,), (torch.ones_like(q),)
        )[1]

    # Outputs are linear in q.
    expected = delta_memory(torch.ones_like(q), *rest, mode="gdn", chunk=16)[0]
    torch.testing.assert_close(answered("torch"), expected)
    with pytest.raises(ValueError, match="the kernels know no forward-mode derivatives"):
        answered("triton")


@pytest.mark.parametrize("count", [0, 5])
@pytest.mark.parametrize("backend", ["torch", "recurrent", "triton"])
def test_no_part_of_a_state_is_the_callers_tensor(count: int, backend: Backend) -> None:
    given = MemoryState(torch.randn(1, 2, 16, 16), torch.randn(1, 2, 16, 16))
    arguments = {"log_momentum": -torch.rand(1, count, 2), "mode": "frozen", "chunk": 16, "backend": backend}
    _, end = delta_memory(*tokens(count), state=given, **arguments)
    held = {part.untyped_storage().data_ptr() for part in given if part is not None}
    assert not held & {part.untyped_storage().data_ptr() for part in end if part is not None}


@pytest.mark.parametrize("backend", ["torch", "recurrent", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_state_of_another_type_is_taken_as_fp32(backend: Backend, dtype: torch.dtype) -> None:
    given, W = tokens(20), torch.randn(1, 2, 16, 16).to(dtype)
    o, end = delta_memory(*given, mode="gdn", chunk=16, state=MemoryState(W), backend=backend)
    expected, _ = delta_memory(*given, mode="gdn", chunk=16, state=MemoryState(W.float()), backend=backend)
    assert torch.equal(o, expected)
    assert end.W.dtype == torch.float32


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_batch_without_rows_is_answered(backend: Backend) -> None:
    o, end = delta_memory(*tokens(20, rows=0), mode="exact", chunk=16, backend=backend)
    assert o.shape == (0, 20, 2, 16)
    assert end.W.shape == (0, 2, 16, 16)
