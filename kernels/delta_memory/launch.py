"""Launches the kernels of `delta_memory`: forward, from a state to outputs and the next state, and back.

Forward: `prepare` computes what every chunk knows by itself, `scan` walks from chunk to chunk; a long walk of few
sequences is cut into groups of chunks. Back: `scan_back` walks the other way, `scores` finds what a
chunk's tokens owe each other, `gather` what reaches them through the chunk's states, `gates` adds the gates' share.
Nothing is added atomically: results are the same in every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from clplat.kernels.delta_memory.layout import Kept, Layout, strides
from clplat.kernels.delta_memory.reference import Inputs, MemoryState
from clplat.kernels.delta_memory.triton_bwd import scan_back
from clplat.kernels.delta_memory.triton_fwd import linear, prepare, scan
from clplat.kernels.delta_memory.triton_gates import gates, scores
from clplat.kernels.delta_memory.triton_gather import gather
from clplat.kernels.delta_memory.triton_tiles import EXACT, FROZEN, HEBB, NUM_VECTORS
from clplat.kernels.delta_memory.tuning import num_groups, one_kernel, options

NOTHING = Kept(None, None, None, None, None, None)
Prepared = tuple[Tensor, Tensor | None, Tensor]


def forward(
    inputs: Inputs, state: MemoryState, cu_seqlens: Tensor | None, *, mode: int, chunk: int, keep: bool
) -> tuple[Tensor, MemoryState, Kept]:
    """Outputs, the state behind them and what the backward pass needs; `state.anchor` and `offset` both or neither."""
    layout = Layout.of(inputs, state, cu_seqlens, chunk)
    v, momentum = inputs.v, inputs.log_momentum is not None
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    groups = num_groups(layout)
    if one_kernel(layout, mode) and groups == 1 and not momentum and not keep:
        return o, attend(inputs, state, layout, o, cu_seqlens), NOTHING
    kept, ready = NOTHING, prepared(inputs, state, cu_seqlens, layout, mode)
    if keep:
        W_kept = v.new_empty(layout.all_slots, layout.V, layout.E, layout.D)
        S_kept, E_kept = torch.empty_like(W_kept) if momentum else None, None if mode == 0 else torch.empty_like(o)
        kept = Kept(W_kept, S_kept, E_kept, *ready)
    if groups == 1:
        return o, walk(inputs, ready, state, layout, mode, o=o, kept=kept, cu_seqlens=cu_seqlens), kept
    # Too few sequences to fill the card: the walk is cut into groups of chunks, each begun where the last one ended.
    grouped = Inputs(*(None if x is None else x.unflatten(1, (groups, -1)).flatten(0, 1) for x in inputs))
    parts = layout.cut(groups)
    starts = group_starts(grouped, ready, state, parts, mode, groups)
    end = walk(grouped, ready, starts, parts, mode, o=o, kept=kept)
    last = (None if x is None else x.unflatten(0, (-1, groups))[:, -1].contiguous() for x in end)
    return o, MemoryState(*last), kept


def attend(inputs: Inputs, state: MemoryState, layout: Layout, o: Tensor, cu_seqlens: Tensor | None) -> MemoryState:
    """Launches `linear`, which needs nothing prepared, and gives the state behind it."""
    (q, k, v, rate, log_decay, _), W = inputs, torch.empty_like(state.W)
    tuned = options("linear", layout, HEBB.value)
    linear[(triton.cdiv(layout.E, tuned["BE"]), layout.N * layout.V)](
        q, k, v, rate, log_decay, state.W, o, W, cu_seqlens, state.offset,
        *strides(q), *strides(k), *strides(v), layout.T, layout.D, layout.E,
        DECAY=log_decay is not None, **layout.constants(momentum=False), **tuned,
    )  # fmt: skip
    return MemoryState(W)


def walk(
    inputs: Inputs, ready: Prepared, state: MemoryState, layout: Layout, mode: int, *, o: Tensor | None = None,
    kept: Kept = NOTHING, cu_seqlens: Tensor | None = None, values: bool = True,
) -> MemoryState:  # fmt: skip
    """Launches `scan` from `state` and gives the state behind it, the anchor that of the last chunk."""
    q, k, v = inputs[:3]
    W, S = torch.empty_like(state.W), None if state.S is None else torch.empty_like(state.S)
    # An empty sequence leaves its open chunk as it is.
    open_chunk = mode == FROZEN.value and (layout.packed or layout.offsets or layout.T % layout.C)
    anchor = (state.W if state.anchor is None else state.anchor).clone() if open_chunk else None
    tuned = options("scan", layout, mode)
    scan[(triton.cdiv(layout.E, tuned["BE"]), layout.N * layout.V)](
        q, k, v, *ready, state.W, state.S, state.anchor, o, W, S, anchor, *kept[:3], cu_seqlens, state.offset,
        *strides(q), *strides(k), *strides(v), layout.T, layout.slots, layout.D, layout.E,
        MODE=mode, KEEP=kept.W is not None, READ=o is not None, VALUES=values,
        **layout.constants(momentum=state.S is not None), **tuned,
    )  # fmt: skip
    return MemoryState(W, S, anchor)


def group_starts(
    inputs: Inputs, ready: Prepared, state: MemoryState, layout: Layout, mode: int, groups: int
) -> MemoryState:
    """The state at the start of every group; `inputs` and `layout` have a row for each.

    A group maps states linearly but for what its values write: x → M x + n. Walks from zero and from unit states find n
    and M of all groups at once, a short loop chains them.
    """
    rows, momentum = (groups * len(state.W), *state.W.shape[1:]), state.S is not None
    zero = state.W.new_zeros(rows)
    n = walk(inputs, ready, MemoryState(zero, zero if momentum else None), layout, mode)
    unit = torch.eye(layout.D, dtype=zero.dtype, device=zero.device).expand(*rows[:2], -1, -1).contiguous()
    none = torch.zeros_like(unit) if momentum else None
    square = layout.squared()
    M = _stacked(walk(inputs, ready, MemoryState(unit, none), square, mode, values=False))
    if momentum:
        M = torch.cat([M, _stacked(walk(inputs, ready, MemoryState(none, unit), square, mode, values=False))], 3)
    M, n = (part.unflatten(0, (-1, groups)) for part in (M, _stacked(n)))
    starts = torch.empty_like(n)
    starts[:, 0] = _stacked(state)
    for group in range(groups - 1):
        now = (part[:, group].flatten(0, 1) for part in (n, M, starts))
        starts[:, group + 1] = torch.baddbmm(*now).view_as(starts[:, group])
    W, *S = (part.contiguous() for part in starts.flatten(0, 1).split(layout.D, 2))
    return MemoryState(W, S[0] if S else None)


def _stacked(state: MemoryState) -> Tensor:
    """W, with momentum above S."""
    return state.W if state.S is None else torch.cat([state.W, state.S], 2)


def prepared(inputs: Inputs, state: MemoryState, cu_seqlens: Tensor | None, layout: Layout, mode: int) -> Prepared:
    """P and T (slots, V, C, C), the latter where the mode has one, and the vectors of gates (slots, V, 7, C)."""
    q, k, v = inputs[:3]
    P, Tinv = layout.square(v.device), layout.square(v.device) if mode >= EXACT.value else None
    shape = (layout.all_slots, layout.V, NUM_VECTORS.value, layout.C)
    # An operator's outputs must not depend on what lay in memory, and idle slots are left as they are.
    idle = layout.packed or layout.offsets
    vectors = (torch.zeros if idle else torch.empty)(shape, dtype=layout.accumulator, device=v.device)
    prepare[(layout.all_slots, layout.V)](
        q, k, inputs.rate, inputs.log_decay, inputs.log_momentum, P, Tinv, vectors, cu_seqlens, state.offset,
        *strides(q), *strides(k), layout.T, layout.N, layout.slots, layout.D,
        BN=triton.next_power_of_2(layout.N), MODE=mode, DECAY=inputs.log_decay is not None,
        **layout.constants(momentum=inputs.log_momentum is not None), **options("prepare", layout, mode),
    )  # fmt: skip
    return P, Tinv, vectors


class EndAdjoints(NamedTuple):
    """Adjoints of the end state; None is zero."""

    W: Tensor | None
    S: Tensor | None
    anchor: Tensor | None


class Gradients(NamedTuple):
    """Adjoints of the tensors of the same names; None where there was no such input."""

    q: Tensor
    k: Tensor
    v: Tensor
    rate: Tensor
    log_decay: Tensor | None
    log_momentum: Tensor | None
    W: Tensor
    S: Tensor | None
    anchor: Tensor | None


def backward(
    inputs: Inputs, state: MemoryState, cu_seqlens: Tensor | None, kept: Kept, do: Tensor, dend: EndAdjoints,
    *, mode: int, chunk: int,
) -> Gradients:  # fmt: skip
    """Adjoints of all inputs; `do` (B, T, V, E) dense, `dend` those of the end state."""
    layout = Layout.of(inputs, state, cu_seqlens, chunk)
    (q, k, v, rate, decay, momentum), device = inputs, inputs.v.device
    P, Tinv, vectors = kept[3:]
    dX, dY = layout.square(device), None if Tinv is None else layout.square(device)
    shape = (*v.shape[:3], layout.D)
    dq, dk, dv = v.new_empty(shape), v.new_empty(shape), torch.empty(v.shape, dtype=v.dtype, device=device)
    dgates = [None if gate is None else torch.empty_like(gate) for gate in (rate, decay, momentum)]
    states = [None if part is None else torch.empty_like(part) for part in (state.W, state.S)]
    # Only `frozen` looks at the anchor.
    empty = torch.empty_like if mode == FROZEN.value else torch.zeros_like
    states.append(None if state.anchor is None else empty(state.anchor))
    dkept = [None if part is None else torch.empty_like(part) for part in (kept.W, kept.S)]
    constants = layout.constants(momentum=momentum is not None) | {"MODE": mode}
    q_strides, k_strides, v_strides = strides(q), strides(k), strides(v)
    tuned = options("scan_back", layout, mode)
    scan_back[(triton.cdiv(layout.E, tuned["BE"]), layout.N * layout.V)](
        q, k, do, P, Tinv, vectors, *dend, dv, *states, *dkept,
        cu_seqlens, state.offset, *q_strides, *k_strides, layout.T, layout.slots, layout.D, layout.E,
        **tuned, **constants,
    )  # fmt: skip
    sizes = (layout.T, layout.N, layout.slots, layout.D, layout.E)
    constants["BN"] = triton.next_power_of_2(layout.N)
    grid = (layout.all_slots, layout.V)
    scores[grid](
        q, k, v, kept.E, do, dv, rate, decay, momentum, dX, dY, *dgates, cu_seqlens, state.offset,
        *q_strides, *k_strides, *v_strides, *sizes,
        DECAY=decay is not None, **options("scores", layout, mode), **constants,
    )  # fmt: skip
    adjoints = torch.empty_like(vectors)
    gather[(2 * layout.all_slots, layout.V)](
        q, k, v, kept.E, do, dv, vectors, kept.W, kept.S, state.anchor, *dkept, dX, dY, dq, dk, adjoints, cu_seqlens,
        state.offset, *q_strides, *k_strides, *v_strides, *sizes, **options("gather", layout, mode), **constants,
    )  # fmt: skip
    for name in ("GROUP", "BD", "UPCAST", "PRECISION"):
        del constants[name]
    gates[grid](
        rate, decay, momentum, vectors, adjoints, *dgates, cu_seqlens, state.offset, layout.T, layout.N, layout.slots,
        DECAY=decay is not None, **options("gates", layout, mode), **constants,
    )  # fmt: skip
    if layout.group > 1:
        dq, dk = (part.unflatten(2, (-1, layout.group)).sum(3) for part in (dq, dk))
    return Gradients(dq, dk, dv, *dgates, *states)
