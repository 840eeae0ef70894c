"""The sizes of one launch of the `mlp_memory` kernels, and the row of numbers in which a memory travels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clplat.kernels.backends import interpreting
from clplat.kernels.delta_memory.op import num_slots
from clplat.kernels.delta_memory.reference import Inputs
from clplat.kernels.mlp_memory.reference import ACTIVATIONS, MLPState, Rule

GROUP_TOKENS = 512
"""About so many tokens a group: before each the memory is kept in fp32, from which the backward pass walks all groups
at once once more. More are fewer bytes and fewer programs."""


def packed_row(state: MLPState) -> Tensor:
    """A state as (B, H, pairs, J (D + E)): weights, momentum and anchor as far as there are any."""
    pairs = [pair for pair in (state.weights, state.momentum, state.anchor) if pair is not None]
    return torch.stack([torch.cat([first.flatten(2), second.flatten(2)], 2) for first, second in pairs], 2)


def unpacked(rows: Tensor, D: int, E: int, *, momentum: bool) -> MLPState:
    """The state without its offset, of tensors of their own; the anchor is given if it is there."""
    inner = rows.shape[3] // (D + E)
    parts: list[Tensor] = []
    for pair in rows.unbind(2):
        first, second = pair.split([D * inner, inner * E], 2)
        parts += [first.unflatten(2, (D, inner)).contiguous(), second.unflatten(2, (inner, E)).contiguous()]
    W1, W2 = parts[:2]
    S1, S2 = parts[2:4] if momentum else (None, None)
    anchors = parts[4 if momentum else 2 :]
    anchor1, anchor2 = anchors or (None, None)
    return MLPState(W1, W2, S1, S2, anchor1, anchor2)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """N sequences of at most T tokens, V heads with keys of D, values of E and memories of J inner features, in chunks
    of C, of which `per` form a group.

    `slots` are the places for chunks of each sequence, or of all where they are packed; `group_slots` those of groups.
    """

    N: int
    T: int
    V: int
    D: int
    J: int
    E: int
    C: int
    per: int
    packed: bool
    offsets: bool
    slots: int
    all_slots: int
    group_slots: int
    all_groups: int
    dtype: torch.dtype
    rule: Rule
    decay: bool
    momentum: bool

    @classmethod
    def of(
        cls, inputs: Inputs, states: Tensor, offset: Tensor | None, cu_seqlens: Tensor | None, rule: Rule, chunk: int
    ) -> Layout:  # fmt: skip
        (_, T, V, E), D, N = inputs.v.shape, inputs.q.shape[3], len(states)
        packed, offsets, per = cu_seqlens is not None, offset is not None, chunks_per_group(chunk)
        every = num_slots(N, T, chunk, packed=packed, offsets=offsets)
        groups = num_slots(N, T, chunk * per, packed=packed, offsets=offsets)
        return cls(
            N=N, T=T, V=V, D=D, J=states.shape[3] // (D + E), E=E, C=chunk, per=per, packed=packed, offsets=offsets,
            all_slots=every, slots=every if packed else every // N,
            all_groups=groups, group_slots=groups if packed else groups // N, dtype=inputs.v.dtype, rule=rule,
            decay=inputs.log_decay is not None, momentum=inputs.log_momentum is not None,
        )  # fmt: skip

    @property
    def size(self) -> int:
        """Numbers of one pair of layers."""
        return self.J * (self.D + self.E)

    @property
    def open_chunk(self) -> bool:
        """Whether a sequence may end inside a chunk."""
        return may_end_inside(self.T, self.C, packed=self.packed, offsets=self.offsets)

    @property
    def end_pairs(self) -> int:
        """Pairs of layers of an end state."""
        return 1 + self.momentum + self.open_chunk

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def square(self, device: torch.device, dtype: torch.dtype, count: int = 1) -> Tensor:
        """Room for `count` (C, C) matrices a chunk and head."""
        return torch.empty(self.all_slots, self.V, count, self.C, self.C, dtype=dtype, device=device)

    def constants(self) -> dict[str, Any]:
        """What every kernel is compiled for."""
        import triton
        import triton.language as tl

        narrow = self.dtype in (torch.bfloat16, torch.float16)
        return {
            "D": self.D, "V": self.V, "C": self.C, "BD": max(16, triton.next_power_of_2(self.D)),
            "MOMENTUM": self.momentum, "PACKED": self.packed, "OFFSETS": self.offsets,
            "UPCAST": interpreting() and self.dtype == torch.bfloat16,
            "ACC": tl.float64 if self.dtype == torch.float64 else tl.float32,
            "PRECISION": "tf32" if narrow else "tf32x3",
        }  # fmt: skip

    def memory_constants(self) -> dict[str, Any]:
        """Those of the kernels that touch the memory itself, too."""
        import triton

        return self.constants() | {
            "J": self.J, "E": self.E, "BE": max(16, triton.next_power_of_2(self.E)),
            "ACT": ACTIVATIONS.index(self.rule.activation), "RESIDUAL": self.rule.residual,
        }  # fmt: skip


def chunks_per_group(chunk: int) -> int:
    """How many chunks have one kept memory among them."""
    return max(1, GROUP_TOKENS // chunk)


def may_end_inside(length: int, chunk: int, *, packed: bool, offsets: bool) -> bool:
    """Whether the last chunk of some sequence may stay open."""
    return packed or offsets or length % chunk != 0
