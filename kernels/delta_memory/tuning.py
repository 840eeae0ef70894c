"""How wide and with how many warps the kernels run: what was fastest on an H200, see docs/results/kernels.md."""

from __future__ import annotations

import triton

from clplat.kernels.delta_memory.layout import Layout
from clplat.kernels.delta_memory.triton_tiles import HEBB

WIDEST = {"linear": 32, "scan": 32, "scan_back": 32, "scores": 128, "gather": 32}
"""Columns of values that a program holds at once; `scores` needs all. The walk over chunks is one long chain: many
short chains hide each other's waits. In `gather` more columns spill registers."""


def options(kernel: str, layout: Layout, mode: int) -> dict[str, int]:
    """Constants of a launch: columns of values a program holds (BE), warps, and stages of the pipeline of loads."""
    small = layout.block_D <= 64
    stages = 3 if kernel == "gather" or (small and kernel in ("linear", "scan", "scan_back")) else 2
    found = {"num_warps": 1 if kernel == "gates" else 4, "num_stages": stages}
    if kernel not in WIDEST:
        return found
    # Without errors to solve for, a wide program's registers suffice.
    widest = 64 if kernel == "scan" and mode == HEBB.value and not small else WIDEST[kernel]
    return found | {"BE": min(widest, layout.block_E)}


def one_kernel(layout: Layout, mode: int) -> bool:
    """Whether linear attention forward is one kernel, `linear`, in place of two; wide keys leave it no room to load
    ahead."""
    return mode == HEBB.value and layout.block_D <= 64


def num_groups(layout: Layout) -> int:
    """Into how many groups of chunks the walk over each sequence is cut; 1 where the sequences alone fill the card.

    A cut walk is walked three times, but by so many more programs at once.
    """
    groups, programs = 1, layout.N * layout.V * triton.cdiv(layout.E, 32)
    if layout.packed or layout.offsets:
        return 1
    while groups < 16 and programs * groups < 512 and not layout.T % (2 * groups * layout.C):
        groups *= 2
    return groups if groups >= 8 and 16 * groups * layout.C <= layout.T else 1
