"""Launches of the selective scan's kernels: over what grids, with what buffers."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from clplat.kernels.selective_scan import triton_scan

NUMBERS = 512
"""Numbers of the state that a warp holds: with 16 a channel, each thread has a channel, and few sums cross threads."""


def _constants(N: int, C: int, keep: Tensor | None) -> dict[str, Any]:
    """Padded sizes of a program and its warps: one where a row's state is small, so that a sum over it is cheap."""
    state = triton.next_power_of_2(N)
    channels = min(triton.next_power_of_2(C), max(16, NUMBERS // state))
    warps = max(1, min(8, state * channels // NUMBERS))
    return {"BN": state, "BC": channels, "KEEP": keep is not None, "num_warps": warps}


def forward(
    x: Tensor, step: Tensor, rate: Tensor, b: Tensor, c: Tensor, first: Tensor, keep: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Answers, last state, and the state before each chunk."""
    rows, T, C = x.shape
    constants = _constants(len(rate), C, keep)
    answers, last = torch.empty_like(x), torch.empty_like(first)
    starts = first.new_empty(triton.cdiv(T, chunk), *first.shape)
    triton_scan.forward[(rows, triton.cdiv(C, constants["BC"]))](
        x, step, rate, b, c, first, keep, answers, last, starts, rows, T, C, len(rate), chunk, **constants
    )
    return answers, last, starts


def backward(
    x: Tensor, step: Tensor, rate: Tensor, b: Tensor, c: Tensor, keep: Tensor | None, starts: Tensor, slope: Tensor,
    carry: Tensor, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, step, rate, b, c and the first state. Sums have one order: every run gives the same bits."""
    (rows, T, C), N = x.shape, len(rate)
    constants = _constants(N, C, keep)
    blocks = triton.cdiv(C, constants["BC"])
    dx, dstep, dfirst, drate = (torch.empty_like(part) for part in (x, step, carry, carry))
    db, dc = x.new_empty(blocks, *b.shape), x.new_empty(blocks, *c.shape)
    states = x.new_empty(rows, min(T, chunk), N, C)
    triton_scan.backward[(rows, blocks)](
        x, step, rate, b, c, keep, starts, slope, carry, states, dx, dstep, drate, db, dc, dfirst,
        rows, T, C, N, min(T, chunk), **constants,
    )  # fmt: skip
    return dx, dstep, drate.sum(0), db.sum(0), dc.sum(0), dfirst
