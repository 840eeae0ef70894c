"""`self_modifying`: checks its arguments and gives them to the chunked PyTorch form or to the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from clplat.kernels.backends import chosen_form, device_obstacle, hopper_obstacle, interpreting
from clplat.kernels.delta_memory.interface import CHUNKS
from clplat.kernels.delta_memory.sequences import apart, clamped, one_by_one
from clplat.kernels.mlp_memory.interface import LARGEST_FULL_TILE
from clplat.kernels.self_modifying.arguments import check
from clplat.kernels.self_modifying.reference import (
    Inputs,
    Readouts,
    Rule,
    SelfModifyingState,
    chunked,
    recurrent,
)

Backend = Literal["auto", "torch", "triton", "recurrent"]
LARGEST_WIDTH = 64
"""Of a head: the backward pass holds four matrices of it at once, in registers."""


def self_modifying(
    inputs: Inputs,
    readouts: Readouts,
    *,
    state: SelfModifyingState,
    rule: Rule | None = None,
    chunk: int = 16,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, SelfModifyingState]:
    """Lets matrix memories read tokens, write what they make of them and answer: (B, T, H, D) in q's type, the state.

    `reference.py` defines what is computed and all shapes. q is not scaled or normalised; `log_momentum` is clamped to
    ≥ −12. `state` is where the memories begin, in the middle of a chunk too; there is no default, as memories that
    begin from zero make nothing. `chunk` is a part of the function: all its tokens read what was known at its start.
    `cu_seqlens` (N + 1,) int32, first 0, last T, packs N sequences into B = 1; `state` then has N rows.

    `backend`: `auto` takes the Triton kernels on GPUs of compute capability 8.0 and higher and the chunked PyTorch form
    elsewhere; `triton` never falls back; `recurrent` is the token loop that defines the operation.
    Raises ValueError for shapes, types and values that no form, or not the one asked for, supports.
    """
    rule = Rule() if rule is None else rule
    if torch.is_autocast_enabled(inputs.x.device.type):
        narrow = torch.get_autocast_dtype(inputs.x.device.type)
        inputs = inputs._replace(x=inputs.x.to(narrow), q=inputs.q.to(narrow))
    # Products of the states stay in fp32: the chunked form's own matrix products must not be narrowed.
    with torch.autocast(inputs.x.device.type, enabled=False):
        check(inputs, readouts, rule, chunk, state, cu_seqlens)
        form = which_backend(inputs.x, inputs.q, chunk=chunk, backend=backend)
        inputs = inputs._replace(log_momentum=clamped(inputs.log_momentum))
        state, readouts = _widened(state, readouts, inputs.x.dtype)
        if not len(state.W):
            return inputs.q.clone(), apart(state, state)
        if form == "triton":
            from clplat.kernels.self_modifying.op import fused

            return fused(inputs, readouts, rule=rule, chunk=chunk, state=state, cu_seqlens=cu_seqlens)
        function = partial(
            recurrent if form == "recurrent" else chunked, readouts=readouts, rule=rule, chunk=chunk
        )  # fmt: skip
        if cu_seqlens is None and state.offset is None:
            o, end = function(inputs, state=state)
        else:
            o, end = one_by_one(function, _joined, inputs, state, state.offset, cu_seqlens)
        return o, apart(end, state)


def which_backend(x: Tensor, q: Tensor, *, chunk: int = 16, backend: Backend = "auto") -> str:
    """The form that `self_modifying` takes for these tensors; raises ValueError as it does."""
    return chosen_form(backend, "recurrent", lambda: _obstacle(x, q, chunk), on_gpu=x.is_cuda)


def _obstacle(x: Tensor, q: Tensor, chunk: int) -> str:
    """Why the kernels cannot compute these tensors; empty where they can."""
    if found := device_obstacle(x):
        return found
    types = [torch.bfloat16, torch.float16, torch.float32, *([torch.float64] if interpreting() else [])]
    if x.dtype != q.dtype or x.dtype not in types:
        return f"x and q are {x.dtype} and {q.dtype}; the kernels take one of {', '.join(map(str, types))}"
    if x.shape[-1] > LARGEST_WIDTH:
        return f"heads are {x.shape[-1]} wide; the kernels go up to {LARGEST_WIDTH}"
    if chunk not in CHUNKS:
        return f"chunk is {chunk}; the kernels know {CHUNKS}"
    if x.is_cuda and x.dtype == torch.float32 and chunk * x.shape[-1] > LARGEST_FULL_TILE:
        return f"chunks of {chunk} tokens {x.shape[-1]} wide need half precision, for shared memory"
    return hopper_obstacle(x)


def _widened(
    state: SelfModifyingState, readouts: Readouts, dtype: torch.dtype
) -> tuple[SelfModifyingState, Readouts]:  # fmt: skip
    """States and readouts are kept in fp32, or fp64 beside such inputs, whatever they come in."""
    wide = torch.promote_types(dtype, torch.float32)
    kept: Any = [None if part is None else part.to(wide) for part in state[:3]]
    read: Any = [None if part is None else part.to(wide) for part in readouts]
    return SelfModifyingState(*kept)._replace(offset=state.offset), Readouts(*read)


def _joined(states: Sequence[SelfModifyingState]) -> SelfModifyingState:
    """States of several sequences as one; a sequence without an open chunk has its own weights as anchor."""
    if any(state.offset is not None for state in states):
        zero = torch.zeros(1, dtype=torch.int32, device=states[0].W.device)
        states = [
            state._replace(anchor=state.W, offset=zero) if state.offset is None else state for state in states
        ]  # fmt: skip
    joined: Any = [None if parts[0] is None else torch.cat(parts) for parts in zip(*states)]
    return SelfModifyingState(*joined)
