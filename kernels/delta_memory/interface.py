"""`delta_memory`: checks its arguments and gives them to the chunked PyTorch form or to the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from clplat.kernels.backends import chosen_form, device_obstacle, hopper_obstacle, interpreting
from clplat.kernels.delta_memory.arguments import check
from clplat.kernels.delta_memory.reference import (
    Inputs,
    MemoryState,
    Mode,
    chunked,
    empty_state,
    recurrent,
)
from clplat.kernels.delta_memory.sequences import apart, clamped, one_by_one

Backend = Literal["auto", "torch", "triton", "recurrent"]
CHUNKS = (16, 32, 64)
LARGEST_WIDTH = 128


def delta_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    log_decay: Tensor | None = None,
    log_momentum: Tensor | None = None,
    *,
    mode: Mode,
    chunk: int = 64,
    state: MemoryState | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, MemoryState]:
    """Writes every token into a matrix memory and reads it; gives outputs (B, T, V, E) in v's type and the last state.

    q, k (B, T, H, D); v (B, T, V, E), V a multiple of H; `rate`, `log_decay` ≤ 0 and `log_momentum` ≤ 0 (B, T, V), the
    last two clamped to ≥ −12; what each `mode` computes stands in `reference.py`. q is not scaled, k not normalised.

    `chunk` (16, 32 or 64) is how many tokens are computed at once. It changes results in mode `frozen` alone, where
    all tokens of a chunk take their gradient at its start: 1/‖k‖² is a safe rate divided by how often a key repeats.
    `state` continues an earlier call, in the middle of a frozen chunk too. `cu_seqlens` (N + 1,) int32, first 0, last
    T, packs N sequences into B = 1; `state` then has N rows.

    `backend`: `auto` takes the Triton kernels on GPUs of compute capability 8.0 and higher and the chunked PyTorch form
    elsewhere; `triton` never falls back; `recurrent` is the token loop that defines the operation.
    Raises ValueError for shapes, types and values that no form, or not the one asked for, supports.
    """
    if torch.is_autocast_enabled(q.device.type):
        narrow = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(narrow), k.to(narrow), v.to(narrow)
        # Products of the states stay in fp32: the chunked form's own matrix products must not be narrowed.
        with torch.autocast(q.device.type, enabled=False):
            return delta_memory(
                q, k, v, rate, log_decay, log_momentum, mode=mode, chunk=chunk, state=state, cu_seqlens=cu_seqlens,
                backend=backend,
            )  # fmt: skip
    check(Inputs(q, k, v, rate, log_decay, log_momentum), mode, chunk, state, cu_seqlens)
    form = which_backend(q, k, v, chunk=chunk, backend=backend)
    inputs = Inputs(q, k, v, rate, clamped(log_decay), clamped(log_momentum))
    sequences = len(q) if cu_seqlens is None else len(cu_seqlens) - 1
    state = empty_state(inputs, sequences) if state is None else _widened(state, v.dtype)
    # Without a sequence there is nothing to launch.
    if form == "triton" and sequences:
        from clplat.kernels.delta_memory.op import fused

        return fused(inputs, mode=mode, chunk=chunk, state=state, cu_seqlens=cu_seqlens)
    function = recurrent if form == "recurrent" else chunked
    if cu_seqlens is None and state.offset is None:
        o, end = function(inputs, mode=mode, chunk=chunk, state=state)
    else:
        o, end = one_by_one(
            partial(function, mode=mode, chunk=chunk), _joined, inputs, state, state.offset, cu_seqlens
        )  # fmt: skip
    return o, apart(end, state)


def which_backend(q: Tensor, k: Tensor, v: Tensor, *, chunk: int = 64, backend: Backend = "auto") -> str:
    """The form that `delta_memory` takes for these tensors, for logs; raises ValueError as `delta_memory` does."""
    return chosen_form(backend, "recurrent", lambda: _obstacle(q, k, v, chunk), on_gpu=q.is_cuda)


def _obstacle(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> str:
    """Why the kernels cannot compute these tensors; empty where they can."""
    if found := device_obstacle(q):
        return found
    types = [torch.bfloat16, torch.float16, torch.float32, *([torch.float64] if interpreting() else [])]
    if not q.dtype == k.dtype == v.dtype or v.dtype not in types:
        return f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; the kernels take one of {', '.join(map(str, types))}"
    if max(q.shape[-1], v.shape[-1]) > LARGEST_WIDTH:
        return f"heads are {q.shape[-1]} and {v.shape[-1]} wide; the kernels go up to {LARGEST_WIDTH}"
    if chunk not in CHUNKS:
        return f"chunk is {chunk}; the kernels know {CHUNKS}"
    return hopper_obstacle(q)


def _widened(state: MemoryState, dtype: torch.dtype) -> MemoryState:
    """States are kept in fp32, or fp64 beside such inputs, whatever they come in."""
    wide = torch.promote_types(dtype, torch.float32)
    W, S, anchor = (None if part is None else part.to(wide) for part in state[:3])
    assert W is not None
    return MemoryState(W, S, anchor, state.offset)


def _joined(states: Sequence[MemoryState]) -> MemoryState:
    """States of several sequences as one; a sequence without an open chunk has its own W as anchor."""
    W = torch.cat([state.W for state in states])
    S = None if states[0].S is None else torch.cat([state.S for state in states if state.S is not None])
    if all(state.offset is None for state in states):
        return MemoryState(W, S)
    anchor = torch.cat([state.W if state.anchor is None else state.anchor for state in states])
    zero = torch.zeros(1, dtype=torch.int32, device=W.device)
    return MemoryState(W, S, anchor, torch.cat([zero if state.offset is None else state.offset for state in states]))
