"""Launches the kernels of `self_modifying`: forward, from a state to outputs and the next state, and back.

Forward: `walk` goes from chunk to chunk and keeps the state before every group of chunks. Back: `walk` goes through all
groups at once and keeps what every chunk made, `read_back` finds what flows through the queries of each, `write_back`
walks back through the writes. Nothing is added atomically: results are the same in every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from clplat.kernels.delta_memory.layout import strides
from clplat.kernels.self_modifying.layout import Layout
from clplat.kernels.self_modifying.reference import Inputs, Readouts, SelfModifyingState
from clplat.kernels.self_modifying.triton_bwd import write_back
from clplat.kernels.self_modifying.triton_fwd import walk
from clplat.kernels.self_modifying.triton_read_back import read_back
from clplat.kernels.self_modifying.triton_tiles import NUM_MADE, NUM_SQUARES
from clplat.kernels.self_modifying.tuning import options


class Starts(NamedTuple):
    """The states before all groups of chunks, (groups, M, H, D, D)."""

    W: Tensor
    S: Tensor | None


class Kept(NamedTuple):
    """What every chunk made, for the backward pass; in the inputs' type but for the last."""

    values: Tensor
    """(B, T, H, D)."""
    W: Tensor
    """(slots, H, M, D, D), at the chunk's start."""
    S: Tensor | None
    slopes: Tensor
    """(B, T, H, M, D), of the inner losses, before they are shortened."""
    answers: Tensor | None
    """(B, T, H, M, D), to each token's key just before its write; None where nothing is erased."""
    squares: Tensor
    """(slots, H, 4, C, C): how keys meet, G1, the solved system, and room."""
    made: Tensor
    """(slots, H, 4, C): gates before their squashing, and by what keys and values were multiplied."""


class Gradients(NamedTuple):
    """Adjoints of the tensors of the same names; None where there was no such input."""

    inputs: Inputs
    readouts: Readouts
    W: Tensor
    S: Tensor | None
    anchor: Tensor | None


def forward(
    inputs: Inputs, readouts: Readouts, state: SelfModifyingState, cu_seqlens: Tensor | None, layout: Layout, *,
    keep: bool,
) -> tuple[Tensor, SelfModifyingState, Starts | None]:  # fmt: skip
    """Outputs, the end state without its offset, and with `keep` the states before all groups."""
    o = torch.empty(inputs.q.shape, dtype=layout.dtype, device=inputs.q.device)
    W, S = state.W.clone(), None if state.S is None else state.S.clone()
    end_anchor = (state.W if state.anchor is None else state.anchor).clone() if layout.open_chunk else None
    starts = None
    if keep:
        # An operator's outputs must not depend on what lay in memory, and idle places are left as they are.
        make = torch.zeros if layout.packed or layout.offsets else torch.empty
        shape = (layout.all_groups, *W.shape[1:])
        places = [None if part is None else make(shape, dtype=W.dtype, device=W.device) for part in (W, S)]
        assert places[0] is not None
        starts = Starts(places[0], places[1])
    end = SelfModifyingState(W, S, end_anchor)
    walked(inputs, readouts, end, state, cu_seqlens, layout, o=o, starts=starts)
    return o, end, starts


def walked(
    inputs: Inputs, readouts: Readouts, states: SelfModifyingState, begun: SelfModifyingState,
    cu_seqlens: Tensor | None, layout: Layout, *,
    o: Tensor | None = None, starts: Starts | None = None, kept: Kept | None = None, keys: Tensor | None = None,
) -> None:  # fmt: skip
    """Launches `walk`, which changes `states`: one row for each sequence, or with `kept` for each group."""
    x, q, log_momentum, damping = inputs
    keys = torch.empty(q.shape, dtype=layout.dtype, device=x.device) if keys is None else keys
    values, kept_W, kept_S, slopes, answers, squares, made = kept or (None,) * 7
    walk[(len(states.W), layout.H)](
        x, q, log_momentum, damping, *readouts, states.W, states.S, begun.anchor, states.anchor, o, keys, values,
        *(starts or (None, None)), kept_W, kept_S, slopes, answers, squares, made, cu_seqlens, begun.offset,
        *strides(x), _between_inputs(x), *strides(q), *_bounds(layout), layout.T, layout.N, layout.slots,
        layout.group_slots, PER=layout.per, BN=triton.next_power_of_2(layout.N), ANCHOR=states.anchor is not None,
        READ=o is not None,
        KEEP=kept is not None, MARK=starts is not None, GROUPED=kept is not None,
        **layout.constants(), **options("walk", layout),
    )  # fmt: skip


def backward(
    inputs: Inputs, readouts: Readouts, state: SelfModifyingState, cu_seqlens: Tensor | None, layout: Layout,
    starts: Starts, do: Tensor, dend: SelfModifyingState,
) -> Gradients:  # fmt: skip
    """Adjoints of all inputs; `do` (B, T, H, D) dense, `dend` that of the end state, whose tensors are changed."""
    (x, q, log_momentum, damping), device = inputs, inputs.x.device
    kept, keys = _room(q, layout), torch.empty(q.shape, dtype=layout.dtype, device=device)
    copies = SelfModifyingState(starts.W.clone(), None if starts.S is None else starts.S.clone())
    walked(inputs, readouts, copies, state, cu_seqlens, layout, kept=kept, keys=keys)
    wide = {"dtype": layout.accumulator, "device": device}
    dx, dq = (torch.empty(part.shape, dtype=layout.dtype, device=device) for part in (x, q))
    dk_read, dsteps, derased = (torch.empty(q.shape, **wide) for _ in range(3))
    dsquares = torch.empty(layout.all_slots, layout.H, 2, layout.C, layout.C, **wide)
    dvectors = torch.empty(layout.all_slots, layout.H, 2, layout.C, **wide)
    constants, middle = layout.constants(), kept[1:]
    every = {"BN": triton.next_power_of_2(layout.N)}
    read_back[(layout.all_slots, layout.H)](
        q, log_momentum, damping, keys, *middle, do, dq, dk_read, dsteps, derased, dsquares, dvectors, cu_seqlens,
        state.offset, *strides(q), *_bounds(layout), layout.T, layout.N, layout.slots,
        **every, **constants, **options("read_back", layout),
    )  # fmt: skip
    dmomentum, ddamping = (None if gate is None else torch.empty_like(gate) for gate in (log_momentum, damping))
    dreadouts = torch.empty(layout.N, layout.H, 2, layout.D, **wide)
    dbiases = torch.empty(layout.N, layout.H, 2, **wide)
    write_back[(layout.N, layout.H)](
        x, q, log_momentum, damping, readouts.rate, readouts.decay, keys, kept.values, state.anchor, *middle, do,
        dk_read, dsteps, derased, dsquares, dvectors, dend.W, dend.S, dend.anchor, dx, dmomentum, ddamping, dreadouts,
        dbiases, cu_seqlens, state.offset, *strides(x), _between_inputs(x), *strides(q), *_bounds(layout), layout.T,
        layout.slots, ANCHOR=layout.open_chunk, **constants, **options("write_back", layout),
    )  # fmt: skip
    read = [part.clone() for pair in zip(dreadouts.sum(0).unbind(1), dbiases.sum(0).unbind(1)) for part in pair]
    return Gradients(
        Inputs(dx, dq, dmomentum, ddamping), Readouts(*read[: 2 + 2 * (readouts.decay is not None)]),
        *_begun(dend, state),
    )  # fmt: skip


def _between_inputs(x: Tensor) -> int:
    """Numbers between the inputs of two matrices of one token; none where they share one."""
    return x.stride(3) if x.ndim == 5 else 0


def _room(q: Tensor, layout: Layout) -> Kept:
    """Where `walk` keeps what chunks made."""
    chunks, erases = (layout.all_slots, layout.H), layout.rule.delta != "none"
    states = [q.new_empty(*chunks, layout.M, layout.D, layout.D) for _ in range(1 + layout.momentum)]
    tokens = [q.new_empty(*q.shape[:3], layout.M, layout.D) for _ in range(1 + erases)]
    made = torch.empty(*chunks, int(NUM_MADE.value), layout.C, dtype=layout.accumulator, device=q.device)
    return Kept(
        q.new_empty(q.shape), states[0], states[1] if layout.momentum else None, tokens[0],
        tokens[1] if erases else None, q.new_empty(*chunks, int(NUM_SQUARES.value), layout.C, layout.C), made,
    )  # fmt: skip


def _bounds(layout: Layout) -> tuple[float, float]:
    """Of step sizes and of gradients."""
    return layout.rule.max_rate, 1.0 if layout.rule.max_gradient is None else layout.rule.max_gradient


def _begun(dend: SelfModifyingState, state: SelfModifyingState) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Where the call had no anchor, that of a sequence without tokens is its weights."""
    if state.anchor is None and dend.anchor is not None:
        return dend.W + dend.anchor, dend.S, None
    return dend.W, dend.S, dend.anchor
