"""The kernels of a counting sort: how often each expert comes in each block of entries, and where each entry goes.

Names: B entries of a block; experts are counted from 0, and entries without one are an expert more, number `experts`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expert_of(indices, entry_B, num, experts):
    """The experts of some entries; `experts` for what is none, −1 behind the end."""
    expert_B = tl.load(indices + entry_B, mask=entry_B < num, other=-1).to(tl.int32)
    none_B = (expert_B < 0) | (expert_B >= experts)
    return tl.where(entry_B < num, tl.where(none_B, experts, expert_B), -1)


@triton.jit
def before_and_all(indices, expert_B, block, num, experts, B: tl.constexpr, J: tl.constexpr):
    """How many entries of the block have the same expert: those in front of each, and all. J are compared at a time."""
    b = tl.arange(0, B)
    before_B, all_B = tl.zeros((B,), tl.int32), tl.zeros((B,), tl.int32)
    for start in range(0, B, J):
        j = start + tl.arange(0, J)
        same_BJ = (expert_B[:, None] == expert_of(indices, block * B + j, num, experts)[None, :]).to(tl.int32)
        all_B += tl.sum(same_BJ, 1)
        before_B += tl.sum(tl.where(j[None, :] < b[:, None], same_BJ, 0), 1)
    return before_B, all_B


@triton.jit
def count(indices, counts, num, experts, blocks, B: tl.constexpr, J: tl.constexpr):
    """Writes `counts` (experts + 1, blocks), which is zero before, for the experts of one block."""
    block = tl.program_id(0)
    entry_B = block * B + tl.arange(0, B)
    expert_B = expert_of(indices, entry_B, num, experts)
    before_B, all_B = before_and_all(indices, expert_B, block, num, experts, B, J)
    # The first entry of an expert writes for all of them.
    tl.store(counts + expert_B.to(tl.int64) * blocks + block, all_B, mask=(entry_B < num) & (before_B == 0))


@triton.jit
def place(indices, counts, ends, order, places, num, experts, blocks, B: tl.constexpr, J: tl.constexpr):
    """Writes each entry of one block to its place; `ends` are the counts summed up to and with each."""
    block = tl.program_id(0)
    entry_B = block * B + tl.arange(0, B)
    expert_B = expert_of(indices, entry_B, num, experts)
    before_B, _ = before_and_all(indices, expert_B, block, num, experts, B, J)
    own_B, there = expert_B.to(tl.int64) * blocks + block, entry_B < num
    start_B = tl.load(ends + own_B, mask=there, other=0) - tl.load(counts + own_B, mask=there, other=0)
    place_B = start_B + before_B
    tl.store(order + place_B, entry_B, mask=there)
    tl.store(places + entry_B, place_B, mask=there)
