"""What the kernels of `topk_memory` share: score and place as one number, the larger the better.

The upper half of a rank (int64) is the score, its bits made an integer of the same order; the lower half counts places
backwards, so that of equal scores the lowest place is the best. No two ranks are equal.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE = tl.constexpr(-(2**63))
"""The lowest rank; NONE + i, of a list's i-th entry, is still below those of all scores but a NaN's."""


@triton.jit
def ranked(score, place, kept):
    """Ranks of fp32 scores; NONE where not `kept`, and where the score is −∞ or no number."""
    # Adding zero makes +0 of −0, which must not be less.
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    return tl.where(kept & (score > float("-inf")), (order << 32) | (0xFFFFFFFF - place.to(tl.int64)), NONE)


@triton.jit
def is_slot(rank):
    """Whether a rank is that of a score."""
    return (rank >> 32) > -2147483648


@triton.jit
def score_of(rank):
    order = (rank >> 32).to(tl.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def place_of(rank):
    return (0xFFFFFFFF - (rank & 0xFFFFFFFF)).to(tl.int32)


@triton.jit
def nothing(M: tl.constexpr, K: tl.constexpr):
    """M lists (M, K) of ranks of nothing, each another, since the lowest is the one to be replaced."""
    return tl.zeros((M, K), tl.int64) + (tl.arange(0, K).to(tl.int64) + NONE)[None, :]


@triton.jit
def merged(list_MK, rank_MG, ROUNDS: tl.constexpr):
    """The K best of the lists and as many new ranks: the best of the new replaces the worst, as long as it is better.

    With ROUNDS, a bound on how often, written out: Triton loads ahead of no loop that has a loop inside.
    """
    worst_M, best_M = tl.min(list_MK, 1), tl.max(rank_MG, 1)
    better = tl.max((best_M > worst_M).to(tl.int32), 0)
    if ROUNDS:
        for _ in tl.static_range(ROUNDS):
            if better > 0:
                list_MK, rank_MG, worst_M, best_M, better = exchanged(list_MK, rank_MG, worst_M, best_M)
    else:
        while better > 0:
            list_MK, rank_MG, worst_M, best_M, better = exchanged(list_MK, rank_MG, worst_M, best_M)
    return list_MK


@triton.jit
def exchanged(list_MK, rank_MG, worst_M, best_M):
    """Lists, new ranks, their worst and best after one exchange, and whether there is another one to make."""
    goes = (list_MK == worst_M[:, None]) & (best_M > worst_M)[:, None]
    list_MK = tl.where(goes, best_M[:, None], list_MK)
    rank_MG = tl.where(rank_MG == best_M[:, None], NONE, rank_MG)
    worst_M, best_M = tl.min(list_MK, 1), tl.max(rank_MG, 1)
    return list_MK, rank_MG, worst_M, best_M, tl.max((best_M > worst_M).to(tl.int32), 0)
