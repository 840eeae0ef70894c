"""The sizes of one launch of the `delta_memory` kernels, and the buffers that live between two of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from clplat.kernels.backends import interpreting
from clplat.kernels.delta_memory.op import num_slots
from clplat.kernels.delta_memory.reference import Inputs, MemoryState


@dataclass(frozen=True, kw_only=True)
class Layout:
    """N sequences of at most T tokens, V value heads on keys of D and values of E features, in chunks of C.

    `slots` are the places for chunks of each sequence, or of all where they are packed.
    """

    N: int
    T: int
    V: int
    D: int
    E: int
    C: int
    group: int
    packed: bool
    offsets: bool
    slots: int
    all_slots: int
    dtype: torch.dtype

    @classmethod
    def of(cls, inputs: Inputs, state: MemoryState, cu_seqlens: Tensor | None, chunk: int) -> Layout:
        (_, T, V, E), (H, D), N = inputs.v.shape, inputs.q.shape[2:], len(state.W)
        packed, offsets = cu_seqlens is not None, state.offset is not None
        every = num_slots(N, T, chunk, packed=packed, offsets=offsets)
        return cls(
            N=N, T=T, V=V, D=D, E=E, C=chunk, group=V // H, packed=packed, offsets=offsets, all_slots=every,
            slots=every if packed else every // N, dtype=inputs.v.dtype,
        )  # fmt: skip

    def cut(self, groups: int) -> Layout:
        """The same rows as `groups` times as many sequences."""
        return replace(self, N=self.N * groups, T=self.T // groups, slots=self.slots // groups)

    def squared(self) -> Layout:
        """For states of D columns."""
        return replace(self, E=self.D)

    @property
    def block_D(self) -> int:
        return max(16, triton.next_power_of_2(self.D))

    @property
    def block_E(self) -> int:
        return max(16, triton.next_power_of_2(self.E))

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def square(self, device: torch.device) -> Tensor:
        """Room for one (C, C) matrix a chunk and value head, in the type that tensor cores read."""
        return torch.empty(self.all_slots, self.V, self.C, self.C, dtype=self.dtype, device=device)

    def constants(self, *, momentum: bool) -> dict[str, Any]:
        """What the kernels are compiled for."""
        return {
            "V": self.V, "GROUP": self.group, "C": self.C, "BD": self.block_D, "MOMENTUM": momentum,
            "PACKED": self.packed, "OFFSETS": self.offsets,
            "UPCAST": interpreting() and self.dtype == torch.bfloat16,
            "ACC": tl.float64 if self.dtype == torch.float64 else tl.float32,
            "PRECISION": "tf32" if self.dtype in (torch.bfloat16, torch.float16) else "tf32x3",
        }  # fmt: skip


class Kept(NamedTuple):
    """What the forward pass leaves for the backward one."""

    W: Tensor | None
    """(slots, V, E, D), the memory at the start of every chunk, on its side."""
    S: Tensor | None
    """(slots, V, E, D), the momentum there; None without."""
    E: Tensor | None
    """(B, T, V, E), the errors; None in mode `hebb`, where they are −v."""
    P: Tensor | None
    """(slots, V, C, C), what each token's write adds to later reads of its chunk."""
    T: Tensor | None
    """(slots, V, C, C), from first errors to those after the chunk's own writes; None in `hebb` and `frozen`."""
    vectors: Tensor | None
    """(slots, V, 7, C), factors of the states' reads and writes."""


def strides(tensor: Tensor) -> tuple[int, int, int]:
    """Of batch rows, tokens and heads of a (B, T, heads, width) tensor whose last dimension is dense."""
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)
