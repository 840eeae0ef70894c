"""`mlp_memory`: checks its arguments and gives them to the chunked PyTorch form or to the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from clplat.kernels.backends import chosen_form, device_obstacle, hopper_obstacle, interpreting
from clplat.kernels.delta_memory.interface import CHUNKS
from clplat.kernels.delta_memory.reference import Inputs
from clplat.kernels.delta_memory.sequences import apart, clamped, one_by_one
from clplat.kernels.mlp_memory.arguments import check
from clplat.kernels.mlp_memory.reference import Activation, Bias, MLPState, Rule, chunked, recurrent

Backend = Literal["auto", "torch", "triton", "recurrent"]
LARGEST_WIDTH, LARGEST_INNER = 128, 1024
LARGEST_FULL_TILE = 64 * 32
"""Tokens of a chunk times the width of a head in fp32, whose products take three times the shared memory, and on GPUs
before compute capability 9.0, which have less of it."""


def mlp_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    log_decay: Tensor | None = None,
    log_momentum: Tensor | None = None,
    *,
    state: MLPState,
    activation: Activation = "silu",
    bias: Bias = "l2",
    residual: bool = False,
    chunk: int = 16,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, MLPState]:
    """Writes every token into a memory of two layers and reads it: outputs (B, T, H, E) in v's type, and the state.

    q, k (B, T, H, D); v (B, T, H, E); `rate`, `log_decay` ≤ 0 and `log_momentum` ≤ 0 (B, T, H), the last two clamped to
    ≥ −12; `reference.py` defines what is computed. q is not scaled, k not normalised. `state` is where the memory
    begins, in the middle of a chunk too; there is no default, as a network that begins from zero learns nothing.

    `chunk` is a part of the function: all its tokens take their gradient at its start, so that a rate is safe up to
    1/chunk for unit keys that repeat. `cu_seqlens` (N + 1,) int32, first 0, last T, packs N sequences into B = 1;
    `state` then has N rows.

    `backend`: `auto` takes the Triton kernels on GPUs of compute capability 8.0 and higher and the chunked PyTorch form
    elsewhere; `triton` never falls back; `recurrent` is the token loop that defines the operation.
    Raises ValueError for shapes, types and values that no form, or not the one asked for, supports.
    """
    rule = Rule(activation=activation, bias=bias, residual=residual)
    if torch.is_autocast_enabled(q.device.type):
        narrow = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(narrow), k.to(narrow), v.to(narrow)
    # Products of the states stay in fp32: the chunked form's own matrix products must not be narrowed.
    with torch.autocast(q.device.type, enabled=False):
        check(Inputs(q, k, v, rate, log_decay, log_momentum), rule, chunk, state, cu_seqlens)
        form = which_backend(q, k, v, inner=state.W1.shape[-1], chunk=chunk, backend=backend)
        inputs = Inputs(q, k, v, rate, clamped(log_decay), clamped(log_momentum))
        state = _widened(state, v.dtype)
        # Without a sequence there is nothing to launch.
        if form == "triton" and len(state.W1):
            from clplat.kernels.mlp_memory.op import fused

            return fused(inputs, rule=rule, chunk=chunk, state=state, cu_seqlens=cu_seqlens)
        function = recurrent if form == "recurrent" else chunked
        if cu_seqlens is None and state.offset is None:
            o, end = function(inputs, rule=rule, chunk=chunk, state=state)
        else:
            o, end = one_by_one(
            partial(function, rule=rule, chunk=chunk), _joined, inputs, state, state.offset, cu_seqlens
        )  # fmt: skip
        return o, apart(end, state)


def which_backend(
    q: Tensor, k: Tensor, v: Tensor, *, inner: int, chunk: int = 16, backend: Backend = "auto"
) -> str:  # fmt: skip
    """The form that `mlp_memory` takes for these tensors and `inner` features; raises ValueError as it does."""
    return chosen_form(backend, "recurrent", lambda: _obstacle(q, k, v, inner, chunk), on_gpu=q.is_cuda)


def _obstacle(q: Tensor, k: Tensor, v: Tensor, inner: int, chunk: int) -> str:
    """Why the kernels cannot compute these tensors; empty where they can."""
    if found := device_obstacle(q):
        return found
    types = [torch.bfloat16, torch.float16, torch.float32, *([torch.float64] if interpreting() else [])]
    if not q.dtype == k.dtype == v.dtype or v.dtype not in types:
        return f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; the kernels take one of {', '.join(map(str, types))}"
    if max(q.shape[-1], v.shape[-1]) > LARGEST_WIDTH or inner > LARGEST_INNER:
        return (
            f"heads are {q.shape[-1]} and {v.shape[-1]} wide and {inner} inside; the kernels go up to {LARGEST_WIDTH} "
            f"and {LARGEST_INNER}"
        )
    if chunk not in CHUNKS:
        return f"chunk is {chunk}; the kernels know {CHUNKS}"
    if not q.is_cuda:
        return ""
    major, tile = torch.cuda.get_device_capability(q.device)[0], chunk * max(q.shape[-1], v.shape[-1])
    if tile > LARGEST_FULL_TILE and (v.dtype == torch.float32 or major < 9):
        return (
            f"chunks of {chunk} tokens {tile // chunk} wide need half precision and a GPU of capability 9.0 or higher"
        )
    return hopper_obstacle(q)


def _widened(state: MLPState, dtype: torch.dtype) -> MLPState:
    """States are kept in fp32, or fp64 beside such inputs, whatever they come in."""
    wide = torch.promote_types(dtype, torch.float32)
    kept = [None if part is None else part.to(wide) for part in state[:6]]
    return MLPState(*kept, state.offset)  # type: ignore[arg-type, call-arg]


def _joined(states: Sequence[MLPState]) -> MLPState:
    """States of several sequences as one; a sequence without an open chunk has its own weights as anchor."""
    if any(state.offset is not None for state in states):
        zero = torch.zeros(1, dtype=torch.int32, device=states[0].W1.device)
        states = [
            state._replace(anchor1=state.W1, anchor2=state.W2, offset=zero) if state.offset is None else state
            for state in states
        ]
    return MLPState(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*states)))  # type: ignore[arg-type]
