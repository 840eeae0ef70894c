"""Launches the kernels of `self_modifying`: forward, from a state to outputs and the next state, and back.

Forward: `walk` goes from chunk to chunk and keeps what every chunk made. Back: `read_back` finds what flows through the
queries of each, `write_back` walks back through the writes, `make_back` finds what reaches the tokens. Nothing is added
atomically: results are the same in every run.
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
from clplat.kernels.self_modifying.triton_make_back import make_back
from clplat.kernels.self_modifying.triton_read_back import read_back
from clplat.kernels.self_modifying.triton_tiles import SHARES
from clplat.kernels.self_modifying.tuning import options


class Kept(NamedTuple):
    """What every chunk made, for the backward pass, which else would walk once more; in the inputs' type but for the
    last. Where nothing is kept the first two and `squares` have room for one chunk of each sequence."""

    keys: Tensor
    """(slots, H, C, D), zero for places without a token."""
    differences: Tensor
    """The same of what slopes are made of: keys minus values, or minus values."""
    W: Tensor | None
    """(slots, H, M, D, D), at the chunk's start."""
    S: Tensor | None
    slopes: Tensor | None
    """(slots, H, M, C, D), of the inner losses, before they are shortened."""
    answers: Tensor | None
    """(slots, H, M, C, D), to each token's key just before its write; None where nothing is erased."""
    squares: Tensor
    """(slots, H, 3 or 4, C, C): how keys meet, the solved system, how keys meet as far as steps are left, and G1."""
    made: Tensor | None
    """(slots, H, 12 + 2 M, C): gates before and behind their squashing, by what keys and values were multiplied,
    decays, and for each matrix how slopes are shortened; `triton_tiles` names them."""


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
) -> tuple[Tensor, SelfModifyingState, Kept | None]:  # fmt: skip
    """Outputs, the end state without its offset, and with `keep` what the backward pass needs."""
    x, q, log_momentum, damping = inputs
    o = torch.empty(q.shape, dtype=layout.dtype, device=q.device)
    W, S = state.W.clone(), None if state.S is None else state.S.clone()
    end_anchor = (state.W if state.anchor is None else state.anchor).clone() if layout.open_chunk else None
    kept = room(q, layout, keep=keep)
    walk[(layout.N, layout.H)](
        x, q, log_momentum, damping, *readouts, W, S, state.anchor, end_anchor, o, *kept, cu_seqlens, state.offset,
        *strides(x), _between_inputs(x), *strides(q), *_bounds(layout), layout.T, layout.slots,
        ANCHOR=end_anchor is not None, KEEP=keep, **layout.constants(), **options("walk", layout),
    )  # fmt: skip
    return o, SelfModifyingState(W, S, end_anchor), kept if keep else None


def backward(
    inputs: Inputs, readouts: Readouts, state: SelfModifyingState, cu_seqlens: Tensor | None, layout: Layout,
    kept: Kept, do: Tensor, dend: SelfModifyingState,
) -> Gradients:  # fmt: skip
    """Adjoints of all inputs; `do` (B, T, H, D) dense, `dend` that of the end state, whose tensors are changed."""
    (x, q, log_momentum, damping), device = inputs, inputs.x.device
    keys, differences, *middle = kept
    wide, N, H, C, D = {"dtype": layout.accumulator, "device": device}, layout.N, layout.H, layout.C, layout.D
    dx, dq = (torch.empty(part.shape, dtype=layout.dtype, device=device) for part in (x, q))
    dk_read, dsteps, derased = (torch.empty(keys.shape, **wide) for _ in range(3))
    dsquares = torch.empty(layout.all_slots, H, 1 + layout.momentum, C, C, **wide)
    dvectors = torch.empty(layout.all_slots, H, 3, C, **wide)
    constants, ways = layout.constants(), (cu_seqlens, state.offset)
    every = {"BN": triton.next_power_of_2(N)}
    read_back[(layout.all_slots, H)](
        q, keys, *middle, do, dq, dk_read, dsteps, derased, dsquares, dvectors, *ways, *strides(q), layout.T, N,
        layout.slots, **every, **constants, **options("read_back", layout),
    )  # fmt: skip
    dmomentum, ddamping = (None if gate is None else torch.empty_like(gate) for gate in (log_momentum, damping))
    dkeys, dvalues = torch.empty_like(keys), torch.empty_like(keys)
    # Idle places are left as they are.
    dmade, dreadouts = (torch.zeros(layout.all_slots, H, 2, width, **wide) for width in (C, D))
    backs, sums = q.new_empty(N, H, layout.M, C, D), q.new_empty(N, H, C, C)
    pushes = torch.empty(backs.shape, **wide) if layout.momentum else None
    write_back[(N, H)](
        x, q, log_momentum, damping, readouts.rate, readouts.decay, keys, differences, state.anchor, *middle, do,
        dk_read, dsteps, derased, dsquares, dvectors, dend.W, dend.S, dend.anchor, backs, pushes, sums, dkeys, dvalues,
        dmade, dmomentum, ddamping, *ways, *strides(x), _between_inputs(x), *strides(q), layout.T, layout.slots,
        ANCHOR=layout.open_chunk, **constants, **options("write_back", layout),
    )  # fmt: skip
    make_back[(layout.all_slots, H)](
        x, readouts.rate, readouts.decay, kept.W, state.anchor, dkeys, dvalues, dmade, dx, dreadouts, *ways,
        *strides(x), _between_inputs(x), layout.T, N, layout.slots, **every, **constants,
        **options("make_back", layout),
    )  # fmt: skip
    found = (*dreadouts.sum(0).unbind(1), *dmade.sum((0, 3)).unbind(1))
    read = [found[place].clone() for place in (0, 2, 1, 3)]
    return Gradients(
        Inputs(dx, dq, dmomentum, ddamping), Readouts(*read[: 2 + 2 * (readouts.decay is not None)]),
        *_begun(dend, state),
    )  # fmt: skip


def _between_inputs(x: Tensor) -> int:
    """Numbers between the inputs of two matrices of one token; none where they share one."""
    return x.stride(3) if x.ndim == 5 else 0


def room(q: Tensor, layout: Layout, *, keep: bool) -> Kept:
    """Where `walk` leaves what chunks made; `q` says where and in which type."""
    erases, M, C, D = layout.rule.delta != "none", layout.M, layout.C, layout.D
    # An operator's outputs must not depend on what lay in memory, and idle places are left as they are.
    make = q.new_zeros if keep and (layout.packed or layout.offsets or not erases) else q.new_empty
    chunks = (layout.all_slots if keep else layout.N, layout.H)
    keys, differences = make(*chunks, C, D), make(*chunks, C, D)
    squares = make(*chunks, 3 + layout.momentum, C, C)
    if not keep:
        return Kept(keys, differences, None, None, None, None, squares, None)
    return Kept(
        keys, differences, make(*chunks, M, D, D), make(*chunks, M, D, D) if layout.momentum else None,
        make(*chunks, M, C, D), make(*chunks, M, C, D) if erases else None, squares,
        make(*chunks, int(SHARES.value) + 2 * M, C, dtype=layout.accumulator),
    )  # fmt: skip


def _bounds(layout: Layout) -> tuple[float, float]:
    """Of step sizes and of gradients."""
    return layout.rule.max_rate, 1.0 if layout.rule.max_gradient is None else layout.rule.max_gradient


def _begun(dend: SelfModifyingState, state: SelfModifyingState) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Where the call had no anchor, that of a sequence without tokens is its weights."""
    if state.anchor is None and dend.anchor is not None:
        return dend.W + dend.anchor, dend.S, None
    return dend.W, dend.S, dend.anchor
