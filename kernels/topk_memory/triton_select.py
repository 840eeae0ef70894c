"""The kernels that look at every slot, and find for each query the groups of slots that its best ones lie in.

Slots in a row form a group of GROUP. The k best slots lie in the k groups with the largest maxima (of equal ones the
lowest), so that only maxima are compared and kept. Scores live in a tile of BM queries and BS slots, never in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from clplat.kernels.topk_memory.triton_ranks import merged, nothing, ranked


@triton.jit
def tile(pointer, rows, num_rows, stride, columns, width, UPCAST: tl.constexpr):
    """(rows, columns) of a matrix, zero outside; UPCAST is for the interpreter, which cannot compute in bf16."""
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    found = tl.load(pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    return found.to(tl.float32) if UPCAST else found


@triton.jit
def group_maxima(
    q, q_MD, keys, mask, row_M, start, N, S, limit, q_stride, key_stride, D,
    BM: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr,
    MASKED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The largest score (BM, BS / GROUP) of each group of the slots from `start` on; −∞ where none is valid.

    WHOLE: all features of the queries are at hand in `q_MD`; else both sides are read in blocks of features.
    """
    slot_S, d = start + tl.arange(0, BS), tl.arange(0, BD)
    if WHOLE:
        key_SD = tile(keys, slot_S, S, key_stride, d, D, UPCAST)
        score_MS = tl.dot(q_MD, tl.trans(key_SD), input_precision=PRECISION)
    else:
        score_MS = tl.zeros((BM, BS), tl.float32)
        for first in range(0, D, BD):
            part_MD = tile(q, row_M, N, q_stride, first + d, D, UPCAST)
            key_SD = tile(keys, slot_S, S, key_stride, first + d, D, UPCAST)
            score_MS = tl.dot(part_MD, tl.trans(key_SD), score_MS, input_precision=PRECISION)
    if MASKED:
        there_S = tl.load(mask + slot_S, mask=slot_S < limit, other=0) != 0
        score_MS = tl.where(there_S[None, :], score_MS, float("-inf"))
    elif start + BS > limit:
        score_MS = tl.where((slot_S < limit)[None, :], score_MS, float("-inf"))
    return tl.max(tl.reshape(score_MS, (BM, BS // GROUP, GROUP)), 2)


@triton.jit
def store_maxima(
    q, keys, count, mask, maxima, N, S, q_stride, key_stride, D, groups, blocks,
    BM: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr,
    COUNTED: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes maxima (N, groups) of `blocks` blocks of slots; groups behind the last valid slot are left as they are."""
    row_M, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BD)
    limit = tl.minimum(tl.load(count), S).to(tl.int32) if COUNTED else S
    first = tl.program_id(1) * blocks * BS
    q_MD = tile(q, row_M, N, q_stride, d, D, UPCAST)
    for start in range(first, tl.minimum(limit, first + blocks * BS), BS):
        found_MG = group_maxima(
            q, q_MD, keys, mask, row_M, start, N, S, limit, q_stride, key_stride, D,
            BM, BS, BD, GROUP, WHOLE, MASKED, UPCAST, PRECISION,
        )  # fmt: skip
        group_G = start // GROUP + tl.arange(0, BS // GROUP)
        inside = (row_M < N)[:, None] & (group_G < groups)[None, :]
        tl.store(maxima + row_M.to(tl.int64)[:, None] * groups + group_G[None, :], found_MG, mask=inside)


@triton.jit
def best_groups(
    q, keys, count, mask, lists, N, S, q_stride, key_stride, D, groups, blocks,
    K: tl.constexpr, ROUNDS: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
    WHOLE: tl.constexpr, COUNTED: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes the ranks (N, parts, K) of the best groups among each part's `blocks` blocks of slots, in no order."""
    row_M, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BD)
    limit = tl.minimum(tl.load(count), S).to(tl.int32) if COUNTED else S
    part, first = tl.program_id(1), tl.program_id(1) * blocks * BS
    q_MD = tile(q, row_M, N, q_stride, d, D, UPCAST)
    list_MK = nothing(BM, K)
    for start in range(first, tl.minimum(limit, first + blocks * BS), BS):
        found_MG = group_maxima(
            q, q_MD, keys, mask, row_M, start, N, S, limit, q_stride, key_stride, D,
            BM, BS, BD, GROUP, WHOLE, MASKED, UPCAST, PRECISION,
        )  # fmt: skip
        group_G = start // GROUP + tl.arange(0, BS // GROUP)
        list_MK = merged(list_MK, ranked(found_MG, group_G[None, :], (row_M < N)[:, None]), ROUNDS)
    place_MK = (row_M.to(tl.int64) * tl.num_programs(1) + part)[:, None] * K + tl.arange(0, K)[None, :]
    tl.store(lists + place_MK, list_MK, mask=(row_M < N)[:, None])
