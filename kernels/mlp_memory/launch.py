"""Launches the kernels of `mlp_memory`: forward, from a memory to outputs and the next memory, and back.

Forward: `prepare` computes what every chunk knows by itself, `walk` goes from chunk to chunk and keeps the memory
before every group of chunks. Back: `walk` goes through all groups at once and keeps the memory before every chunk,
`read_back` finds what flows through the queries of each, `write_back` walks back through the writes, `gates` adds the
gates' share.
Nothing is added atomically: results are the same in every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from clplat.kernels.delta_memory.layout import strides
from clplat.kernels.delta_memory.reference import Inputs
from clplat.kernels.delta_memory.triton_gates import gates
from clplat.kernels.delta_memory.triton_tiles import FROZEN, NUM_VECTORS
from clplat.kernels.mlp_memory.layout import Layout
from clplat.kernels.mlp_memory.triton_bwd import write_back
from clplat.kernels.mlp_memory.triton_fwd import prepare, walk
from clplat.kernels.mlp_memory.triton_read_back import read_back
from clplat.kernels.mlp_memory.tuning import options, reads_apart


class Prepared(NamedTuple):
    """What chunks know by themselves."""

    P: Tensor
    """(slots, V, 1, C, C), how a query meets the keys of its chunk, with all gates; in the inputs' type."""
    R: Tensor
    """(slots, V, 1, C, C), the gates of that alone."""
    vectors: Tensor
    """(slots, V, 7, C), factors of the memory's reads and writes."""


class Kept(NamedTuple):
    """The memory before every chunk, for the backward pass."""

    layers: Tensor
    """(slots, V, 1 or 2, J (D + E)), weights and momentum in the inputs' type."""
    errors: Tensor
    """(B, T, V, E), slopes of the loss at the answers to keys."""


class Gradients(NamedTuple):
    """Adjoints of the tensors of the same names; None where there was no such input."""

    q: Tensor
    k: Tensor
    v: Tensor
    rate: Tensor
    log_decay: Tensor | None
    log_momentum: Tensor | None
    states: Tensor


def forward(
    inputs: Inputs, states: Tensor, offset: Tensor | None, cu_seqlens: Tensor | None, layout: Layout, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Outputs, the end state's row, and with `keep` the memories before all groups, (groups, V, pairs, J (D + E))."""
    ready = prepared(inputs, offset, cu_seqlens, layout)
    o = torch.empty(inputs.v.shape, dtype=inputs.v.dtype, device=inputs.v.device)
    end = _begun(states, layout)
    apart = reads_apart(layout)
    starts = None
    if keep or apart:
        # An operator's outputs must not depend on what lay in memory, and idle places are left as they are.
        make = torch.zeros if layout.packed or layout.offsets else torch.empty
        starts = make(layout.all_groups, *end.shape[1:], dtype=end.dtype, device=end.device)
    walked(inputs, ready, end, offset, cu_seqlens, layout, o=None if apart else o, starts=starts)
    if apart and starts is not None:
        own = starts.clone() if keep else starts
        walked(inputs, ready, own, offset, cu_seqlens, layout, o=o, grouped=True)
    return o, end, starts if keep else None


def prepared(inputs: Inputs, offset: Tensor | None, cu_seqlens: Tensor | None, layout: Layout) -> Prepared:
    """Launches `prepare`."""
    (q, k), device = inputs[:2], inputs.q.device
    P, R = layout.square(device, layout.dtype), layout.square(device, layout.accumulator)
    vectors = torch.empty(
        layout.all_slots, layout.V, NUM_VECTORS.value, layout.C, dtype=layout.accumulator, device=device
    )
    prepare[(layout.all_slots, layout.V)](
        q, k, inputs.rate, inputs.log_decay, inputs.log_momentum, P, R, vectors, cu_seqlens, offset,
        *strides(q), *strides(k), layout.T, layout.N, layout.slots, DECAY=layout.decay,
        BN=triton.next_power_of_2(layout.N), **layout.constants(), **options("prepare", layout),
    )  # fmt: skip
    return Prepared(P, R, vectors)


def walked(
    inputs: Inputs, ready: Prepared, states: Tensor, offset: Tensor | None, cu_seqlens: Tensor | None, layout: Layout,
    *, o: Tensor | None = None, starts: Tensor | None = None, kept: Kept | None = None, grouped: bool = False,
) -> None:  # fmt: skip
    """Launches `walk`, which changes `states`: one row for each sequence, or `grouped` for each group."""
    q, k, v = inputs[:3]
    walk[(len(states), layout.V)](
        q, k, v, *ready, states, o, None if kept is None else kept.errors, None if kept is None else kept.layers,
        starts, cu_seqlens, offset,
        *strides(q), *strides(k), *strides(v), layout.T, layout.N, layout.slots, layout.group_slots,
        PER=layout.per, BN=triton.next_power_of_2(layout.N), PAIRS=states.shape[2], DOT=layout.rule.bias == "dot",
        ANCHOR=layout.open_chunk, READ=o is not None, KEEP=kept is not None, MARK=starts is not None, GROUPED=grouped,
        **layout.memory_constants(), **options("walk", layout),
    )  # fmt: skip


def backward(
    inputs: Inputs, states: Tensor, offset: Tensor | None, cu_seqlens: Tensor | None, starts: Tensor, do: Tensor,
    dend: Tensor | None, layout: Layout,
) -> Gradients:  # fmt: skip
    """Adjoints of all inputs; `do` (B, T, V, E) dense, `dend` that of the end state's row, None for zero."""
    (q, k, v, rate, decay, momentum), device = inputs, inputs.v.device
    ready = prepared(inputs, offset, cu_seqlens, layout)
    layers = v.new_empty(layout.all_slots, layout.V, 1 + layout.momentum, layout.size)
    kept = Kept(layers, torch.empty(v.shape, dtype=v.dtype, device=device))
    walked(inputs, ready, starts.clone(), offset, cu_seqlens, layout, kept=kept, grouped=True)
    tokens = v.shape[:3]
    dq, dk, dv = v.new_empty(*tokens, layout.D), v.new_empty(*tokens, layout.D), v.new_empty(*tokens, layout.E)
    dk_read, de = (
        torch.empty(*tokens, width, dtype=layout.accumulator, device=device) for width in (layout.D, layout.E)
    )
    # Features of the queries; adjoints of theirs before the activation, of the keys' slopes, of the keys' features.
    inner = [v.new_empty(*tokens, layout.J) for _ in range(4)]
    dgates = [None if gate is None else torch.empty_like(gate) for gate in (rate, decay, momentum)]
    adjoints = torch.empty_like(ready.vectors)
    constants = layout.memory_constants()
    every, number = {"BN": triton.next_power_of_2(layout.N)}, (layout.T, layout.N, layout.slots)
    grid = (layout.all_slots, layout.V)
    read_back[grid](
        q, k, ready.P, rate, decay, momentum, ready.vectors, states, *kept, do, dq, dk_read, de, *inner,
        layout.square(device, layout.dtype, 3), adjoints, *dgates, cu_seqlens, offset, *strides(q), *strides(k),
        *number, PAIRS=states.shape[2], DECAY=layout.decay, **every, **constants, **options("read_back", layout),
    )  # fmt: skip
    dstates = _ended(dend, states, layout)
    write_back[(layout.N, layout.V)](
        q, k, ready.vectors, states, *kept, do, dk_read, de, *inner, dstates, dk, dv, adjoints, cu_seqlens, offset,
        *strides(q), *strides(k), layout.T, layout.slots, PAIRS=states.shape[2], END_PAIRS=layout.end_pairs,
        DOT=layout.rule.bias == "dot", ANCHOR=layout.open_chunk, **constants, **options("write_back", layout),
    )  # fmt: skip
    few = {name: constants[name] for name in ("V", "C", "MOMENTUM", "PACKED", "OFFSETS", "ACC")}
    gates[grid](
        rate, decay, momentum, ready.vectors, adjoints, *dgates, cu_seqlens, offset, *number, MODE=FROZEN.value,
        DECAY=layout.decay, **every, **few, **options("gates", layout),
    )  # fmt: skip
    drate, ddecay, dmomentum = dgates
    assert drate is not None
    return Gradients(dq, dk, dv, drate, ddecay, dmomentum, _without_anchor(dstates, states, layout))


def _begun(states: Tensor, layout: Layout) -> Tensor:
    """A row of its own for the walk, with place for an anchor where a chunk may stay open."""
    if states.shape[2] == layout.end_pairs:
        return states.clone()
    return torch.cat([states, states[:, :, :1]], 2)


def _ended(dend: Tensor | None, states: Tensor, layout: Layout) -> Tensor:
    """A row of its own for the walk back."""
    if dend is not None:
        return dend.clone()
    return states.new_zeros(*states.shape[:2], layout.end_pairs, states.shape[3])


def _without_anchor(dstates: Tensor, states: Tensor, layout: Layout) -> Tensor:
    """Where the call had no anchor, that of a sequence without tokens is its weights."""
    if states.shape[2] == layout.end_pairs:
        return dstates
    given = dstates[:, :, :-1].clone()
    given[:, :, 0] += dstates[:, :, -1]
    return given
