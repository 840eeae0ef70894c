"""What `delta_memory` refuses: shapes, types, and on the CPU values too; on a GPU reading them would wait for it."""

from __future__ import annotations

import torch
from torch import Tensor

from clplat.kernels.delta_memory.reference import MODES, Inputs, MemoryState


def check(inputs: Inputs, mode: str, chunk: int, state: MemoryState | None, cu_seqlens: Tensor | None) -> None:
    """Raises ValueError with the argument's name, what it must be and what it is."""
    if mode not in MODES:
        raise ValueError(f"mode: must be one of {', '.join(MODES)}, got {mode!r}")
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk: must be a whole number of tokens, at least 1, got {chunk!r}")
    check_inputs(inputs)
    check_packing(inputs, cu_seqlens)
    if state is not None:
        _check_state(state, inputs, chunk, len(inputs.q) if cu_seqlens is None else len(cu_seqlens) - 1)


def check_inputs(inputs: Inputs) -> None:
    for name, part in inputs._asdict().items():
        if part is not None and not (isinstance(part, Tensor) and part.is_floating_point()):
            kind = part.dtype if isinstance(part, Tensor) else type(part).__name__
            raise ValueError(f"{name}: must be a tensor of floating-point numbers, got {kind}")
        if part is not None and part.device != inputs.q.device:
            raise ValueError(f"{name}: is on {part.device}, q on {inputs.q.device}; move them together")
    q, k, v = inputs[:3]
    if q.ndim != 4 or q.shape != k.shape:
        raise ValueError(f"q and k must be (B, T, H, D) alike, got {tuple(q.shape)} and {tuple(k.shape)}")
    if v.ndim != 4 or v.shape[:2] != q.shape[:2] or not q.shape[2] or v.shape[2] % q.shape[2]:
        raise ValueError(
            f"v must be (B, T, V, E) with q's B and T and V a multiple of {q.shape[2]} heads, got {tuple(v.shape)}"
        )
    for name, gate in (("rate", inputs.rate), ("log_decay", inputs.log_decay), ("log_momentum", inputs.log_momentum)):
        if gate is not None and gate.shape != v.shape[:3]:
            raise ValueError(f"{name}: must be (B, T, V) = {tuple(v.shape[:3])}, got {tuple(gate.shape)}")


def check_packing(inputs: Inputs, cu_seqlens: Tensor | None) -> None:
    check_packed(cu_seqlens, *inputs.q.shape[:2])


def check_packed(cu_seqlens: Tensor | None, rows: int, tokens: int) -> None:
    if cu_seqlens is None:
        return
    integers = isinstance(cu_seqlens, Tensor) and cu_seqlens.dtype in (torch.int32, torch.int64)
    if not integers or cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        kind = f"{tuple(cu_seqlens.shape)} of {cu_seqlens.dtype}" if isinstance(cu_seqlens, Tensor) else cu_seqlens
        raise ValueError(f"cu_seqlens: must be a tensor (sequences + 1,) of integers, got {kind}")
    if rows != 1:
        raise ValueError(f"cu_seqlens: packed sequences come as one row, B = 1, got B = {rows}")
    if readable(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if bounds != sorted(bounds) or (bounds[0], bounds[-1]) != (0, tokens):
            raise ValueError(f"cu_seqlens: must go from 0 to T = {tokens} and never back, got {bounds}")


def _check_state(state: MemoryState, inputs: Inputs, chunk: int, sequences: int) -> None:
    if not isinstance(state, MemoryState):
        raise ValueError(f"state: must be a MemoryState, as a call returns it, got {type(state).__name__}")
    shape = (sequences, inputs.v.shape[2], inputs.k.shape[3], inputs.v.shape[3])
    for name, part in (("W", state.W), ("S", state.S), ("anchor", state.anchor)):
        if part is not None and part.shape != shape:
            raise ValueError(f"state.{name}: must be (sequences, V, D, E) = {shape}, got {tuple(part.shape)}")
    check_pairs(state.S, inputs.log_momentum, state.anchor, state.offset)
    check_offset(state.offset, sequences, chunk)


def check_pairs(
    S: Tensor | None, log_momentum: Tensor | None, anchor: Tensor | None, offset: Tensor | None
) -> None:  # fmt: skip
    """What of a state goes together: momentum with its gate, the start of an open chunk with the tokens in it."""
    if (S is None) != (log_momentum is None):
        raise ValueError(
            "state.S and log_momentum: give both or neither; to begin or end momentum here, set S to zeros or to None"
        )
    if (anchor is None) != (offset is None):
        raise ValueError("state.anchor and state.offset: give both or neither")


def check_offset(offset: Tensor | None, sequences: int, chunk: int) -> None:
    if offset is None:
        return
    if offset.shape != (sequences,):
        raise ValueError(f"state.offset: must be (sequences,) = ({sequences},), got {tuple(offset.shape)}")
    if readable(offset) and not all(0 <= number < chunk for number in offset.tolist()):
        raise ValueError(
            f"state.offset: must be at least 0 and below chunk = {chunk}, got {offset.tolist()}; a state inside "
            "a chunk goes on at the chunk size that it was made with"
        )


def readable(numbers: Tensor) -> bool:
    """Whether reading them waits for nothing and is no break in a compiled graph."""
    return numbers.device.type == "cpu" and not torch.compiler.is_compiling()
