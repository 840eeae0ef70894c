"""`delta_memory`: checks its arguments and gives them to the chunked PyTorch form or to the Triton kernels."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from clplat.kernels.delta_memory.assembler import fault_on_hopper
from clplat.kernels.delta_memory.reference import (
    LOWEST_GATE,
    MODES,
    Inputs,
    MemoryState,
    Mode,
    chunked,
    empty_state,
    recurrent,
)

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
    inputs = Inputs(q, k, v, rate, _clamped(log_decay), _clamped(log_momentum))
    sequences = len(q) if cu_seqlens is None else len(cu_seqlens) - 1
    _check(inputs, mode, chunk, state, cu_seqlens, sequences)
    if which_backend(q, k, v, chunk=chunk, backend=backend) == "triton":
        from clplat.kernels.delta_memory.op import fused

        return fused(inputs, mode=mode, chunk=chunk, state=state, cu_seqlens=cu_seqlens, sequences=sequences)
    state = state or empty_state(inputs, sequences)
    function = recurrent if backend == "recurrent" else chunked
    if cu_seqlens is None and state.offset is None:
        return function(inputs, mode=mode, chunk=chunk, state=state)
    return _one_by_one(function, inputs, mode, chunk, state, cu_seqlens)


def which_backend(q: Tensor, k: Tensor, v: Tensor, *, chunk: int = 64, backend: Backend = "auto") -> str:
    """The form that `delta_memory` takes for these tensors, for logs; raises ValueError as `delta_memory` does."""
    if backend not in ("auto", "torch", "triton", "recurrent"):
        raise ValueError(f"backend: must be auto, torch, triton or recurrent, got {backend!r}")
    if backend in ("torch", "recurrent"):
        return backend
    obstacle = _obstacle(q, k, v, chunk)
    if backend == "triton":
        if obstacle:
            raise ValueError(f"backend: triton is asked for, but {obstacle}")
        return "triton"
    return "torch" if obstacle or not q.is_cuda else "triton"


def _obstacle(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> str:
    """Why the kernels cannot compute these tensors; empty where they can."""
    types = [torch.bfloat16, torch.float16, torch.float32]
    if interpreting():
        types.append(torch.float64)
    elif not q.is_cuda:
        return f"the tensors are on {q.device.type}; the kernels need a GPU (or TRITON_INTERPRET=1, to test them)"
    elif torch.cuda.get_device_capability(q.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    if not q.dtype == k.dtype == v.dtype or v.dtype not in types:
        return f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; the kernels take one of {', '.join(map(str, types))}"
    if max(q.shape[-1], v.shape[-1]) > LARGEST_WIDTH:
        return f"heads are {q.shape[-1]} and {v.shape[-1]} wide; the kernels go up to {LARGEST_WIDTH}"
    if chunk not in CHUNKS:
        return f"chunk is {chunk}; the kernels know {CHUNKS}"
    if q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9:
        return fault_on_hopper()
    return ""


def interpreting() -> bool:
    """Whether Triton runs its kernels on the CPU, as the tests ask for by TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _check(
    inputs: Inputs, mode: str, chunk: int, state: MemoryState | None, cu_seqlens: Tensor | None, sequences: int
) -> None:
    q, k, v = inputs[:3]
    if mode not in MODES:
        raise ValueError(f"mode: must be one of {', '.join(MODES)}, got {mode!r}")
    if chunk < 1:
        raise ValueError(f"chunk: must be at least 1, got {chunk}")
    if q.ndim != 4 or q.shape != k.shape:
        raise ValueError(f"q and k must be (B, T, H, D) alike, got {tuple(q.shape)} and {tuple(k.shape)}")
    if v.ndim != 4 or v.shape[:2] != q.shape[:2] or v.shape[2] % q.shape[2]:
        raise ValueError(
            f"v must be (B, T, V, E) with q's B and T and V a multiple of {q.shape[2]} heads, got {tuple(v.shape)}"
        )
    for name, gate in (("rate", inputs.rate), ("log_decay", inputs.log_decay), ("log_momentum", inputs.log_momentum)):
        if gate is not None and gate.shape != v.shape[:3]:
            raise ValueError(f"{name}: must be (B, T, V) = {tuple(v.shape[:3])}, got {tuple(gate.shape)}")
    if cu_seqlens is not None and (cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64)):
        kind = f"{tuple(cu_seqlens.shape)} of {cu_seqlens.dtype}"
        raise ValueError(f"cu_seqlens: must be (sequences + 1,) integers, got {kind}")
    if cu_seqlens is not None and len(q) != 1:
        raise ValueError(f"cu_seqlens: packed sequences come as one row, B = 1, got B = {len(q)}")
    if state is None:
        return
    shape = (sequences, v.shape[2], k.shape[3], v.shape[3])
    for name, part in (("W", state.W), ("S", state.S), ("anchor", state.anchor)):
        if part is not None and part.shape != shape:
            raise ValueError(f"state.{name}: must be (sequences, V, D, E) = {shape}, got {tuple(part.shape)}")
    if state.offset is not None and state.offset.shape != (sequences,):
        raise ValueError(f"state.offset: must be (sequences,) = ({sequences},), got {tuple(state.offset.shape)}")
    if (state.S is None) != (inputs.log_momentum is None):
        raise ValueError("state.S and log_momentum: give both or neither")
    if (state.anchor is None) != (state.offset is None):
        raise ValueError("state.anchor and state.offset: give both or neither")


def _clamped(log_gate: Tensor | None) -> Tensor | None:
    return None if log_gate is None else log_gate.clamp(min=LOWEST_GATE)


def _one_by_one(
    function: Callable[..., tuple[Tensor, MemoryState]],
    inputs: Inputs,
    mode: Mode,
    chunk: int,
    state: MemoryState,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, MemoryState]:
    """Sequences of their own lengths or offsets, one call for each; waits for the device to read them."""
    count = len(state.W)
    bounds = [0] * (count + 1) if cu_seqlens is None else cu_seqlens.tolist()
    offsets = [0] * count if state.offset is None else state.offset.tolist()
    outputs, states = [], []
    for n in range(count):
        own = Inputs(*(None if part is None else part[n : n + 1] for part in inputs)) if cu_seqlens is None else inputs
        tokens = own if cu_seqlens is None else own.tokens(bounds[n], bounds[n + 1])
        row = MemoryState(*(None if part is None else part[n : n + 1] for part in state))
        o, after = function(tokens, mode=mode, chunk=chunk, state=row, offset=offsets[n])
        outputs.append(o)
        states.append(after)
    return torch.cat(outputs, 0 if cu_seqlens is None else 1), _joined(states)


def _joined(states: Sequence[MemoryState]) -> MemoryState:
    """States of several sequences as one; a sequence without an open chunk has its own W as anchor."""
    W = torch.cat([state.W for state in states])
    S = None if states[0].S is None else torch.cat([state.S for state in states if state.S is not None])
    if all(state.offset is None for state in states):
        return MemoryState(W, S)
    anchor = torch.cat([state.W if state.anchor is None else state.anchor for state in states])
    zero = torch.zeros(1, dtype=torch.int32, device=W.device)
    return MemoryState(W, S, anchor, torch.cat([zero if state.offset is None else state.offset for state in states]))
