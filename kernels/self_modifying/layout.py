"""The sizes of one launch of the `self_modifying` kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clplat.kernels.backends import interpreting
from clplat.kernels.delta_memory.op import num_slots
from clplat.kernels.mlp_memory.layout import may_end_inside
from clplat.kernels.self_modifying.reference import Rule


@dataclass(frozen=True, kw_only=True)
class Layout:
    """N sequences of at most T tokens, H heads of D features with M matrices each, in chunks of C.

    `own`: each matrix that makes something has its own x. `slots` are the places for chunks of each sequence, or of all
    where they are packed.
    """

    N: int
    T: int
    H: int
    D: int
    M: int
    C: int
    packed: bool
    offsets: bool
    slots: int
    all_slots: int
    dtype: torch.dtype
    rule: Rule
    momentum: bool
    own: bool

    @classmethod
    def of(
        cls, x: Tensor, q: Tensor, W: Tensor, rule: Rule, chunk: int, *, momentum: bool, packed: bool, offsets: bool
    ) -> Layout:  # fmt: skip
        (_, T, H, D), (N, M) = q.shape, W.shape[:2]
        every = num_slots(N, T, chunk, packed=packed, offsets=offsets)
        return cls(
            N=N, T=T, H=H, D=D, M=M, C=chunk, packed=packed, offsets=offsets, all_slots=every,
            slots=every if packed else every // N, dtype=q.dtype, rule=rule, momentum=momentum, own=x.ndim == 5,
        )  # fmt: skip

    @property
    def open_chunk(self) -> bool:
        """Whether a sequence may end inside a chunk."""
        return may_end_inside(self.T, self.C, packed=self.packed, offsets=self.offsets)

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def constants(self) -> dict[str, Any]:
        """What every kernel is compiled for."""
        import triton
        import triton.language as tl

        return {
            "H": self.H, "D": self.D, "M": self.M, "C": self.C, "BD": max(16, triton.next_power_of_2(self.D)),
            "DECAY": self.M == 5, "MOMENTUM": self.momentum, "ERASE": self.rule.delta != "none",
            "DIFFERENCE": self.rule.delta != "single", "BOUNDED": self.rule.max_gradient is not None,
            "UNIT": self.rule.unit_values, "OWN": self.own,
            "SELF": self.rule.self_targets, "PACKED": self.packed, "OFFSETS": self.offsets,
            "UPCAST": interpreting() and self.dtype == torch.bfloat16,
            "ACC": tl.float64 if self.dtype == torch.float64 else tl.float32,
            "PRECISION": "tf32" if self.dtype in (torch.bfloat16, torch.float16) else "tf32x3",
        }  # fmt: skip
