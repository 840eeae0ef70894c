"""The kernels that look at each query's chosen slots: the read itself, and its adjoints.

Names: K entries of a list (at least k, a power of two), G ranks at a time, C = K · GROUP slots of the chosen groups.
"""

from __future__ import annotations

import triton
import triton.language as tl

from clplat.kernels.topk_memory.triton_ranks import NONE, is_slot, merged, nothing, place_of, ranked, score_of

MASS_UNIT = tl.constexpr(float(2**40))
"""Weights are summed by slot in whole numbers of 2⁻⁴⁰: the order of additions, which atomics leave open, is nothing."""


@triton.jit
def row_of(pointer, row, stride, columns, width):
    """Some columns of one row, in fp32, zero outside."""
    return tl.load(pointer + row * stride + columns, mask=columns < width, other=0.0).to(tl.float32)


@triton.jit
def rows_of(pointer, slot_K, there_K, stride, columns, width):
    """(K, columns) of the rows that are there, in fp32, zero elsewhere."""
    inside = there_K[:, None] & (columns < width)[None, :]
    place = pointer + slot_K.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def groups_of_row(
    candidates, row, num, limit, K: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, MAXIMA: tl.constexpr
):
    """The best groups' ranks (K,) of `num` maxima in the order of groups, or of lists of ranks."""
    list_1K = nothing(1, K)
    for start in range(0, num, G):
        g = start + tl.arange(0, G)
        if MAXIMA:
            written = (g < num) & (g * GROUP < limit)
            maximum_G = tl.load(candidates + row * num + g, mask=written, other=float("-inf"))
            rank_G = ranked(maximum_G, g, written)
        else:
            rank_G = tl.load(candidates + row * num + g, mask=g < num, other=NONE)
        list_1K = merged(list_1K, rank_G[None, :], 0)
    return tl.reshape(list_1K, (K,))


@triton.jit
def best_in_order(rank_C, k, K: tl.constexpr):
    """The k largest ranks (K,), largest first."""
    best_K = tl.zeros((K,), tl.int64) + NONE
    for j in range(k):
        best = tl.max(rank_C, 0)
        best_K = tl.where(tl.arange(0, K) == j, best, best_K)
        rank_C = tl.where(rank_C == best, NONE, rank_C)
    return best_K


@triton.jit
def softmax_of(rank_K, scale):
    """Weights of the slots among some ranks, 0 for what is none."""
    found_K = is_slot(rank_K)
    score_K = tl.where(found_K, score_of(rank_K) * scale, float("-inf"))
    # Over no slot at all: the exponents' base is 0 and the sum is never 0.
    base = tl.where(tl.sum(found_K.to(tl.int32), 0) > 0, tl.max(score_K, 0), 0.0)
    part_K = tl.where(found_K, tl.exp(score_K - base), 0.0)
    total = tl.sum(part_K, 0)
    return part_K / tl.where(total == 0, 1.0, total)


@triton.jit
def read(
    q, keys, values, count, mask, candidates, output, indices, weights, mass,
    S, q_stride, key_stride, value_stride, D, E, num, k, scale,
    K: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    MAXIMA: tl.constexpr, COUNTED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One query: the slots of its best groups scored anew, the k best of them, their softmax and their values' sum."""
    row, kk, d, e = tl.program_id(0).to(tl.int64), tl.arange(0, K), tl.arange(0, BD), tl.arange(0, BE)
    limit = tl.minimum(tl.load(count), S).to(tl.int32) if COUNTED else S
    group_K = groups_of_row(candidates, row, num, limit, K, G, GROUP, MAXIMA)
    slot_KG = place_of(group_K)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    there_C = tl.reshape(is_slot(group_K)[:, None] & (slot_KG < limit), (K * GROUP,))
    slot_C = tl.reshape(slot_KG, (K * GROUP,))
    if MASKED:
        there_C = there_C & (tl.load(mask + slot_C, mask=there_C, other=0) != 0)
    score_C, nan = tl.zeros((K * GROUP,), tl.float32), 0
    for first in range(0, D, BD):
        q_D = row_of(q, row, q_stride, first + d, D)
        nan = tl.maximum(nan, tl.max((q_D != q_D).to(tl.int32), 0))
        score_C += tl.sum(rows_of(keys, slot_C, there_C, key_stride, first + d, D) * q_D[None, :], 1)
    rank_C = ranked(score_C, slot_C, there_C)
    best_K = best_in_order(rank_C, k, K)
    found_K = is_slot(best_K)
    slot_K = tl.where(found_K, place_of(best_K), -1)
    weight_K = softmax_of(best_K, scale)
    weight_K = tl.where(nan > 0, float("nan"), weight_K)
    tl.store(indices + row * k + kk, slot_K.to(tl.int64), mask=kk < k)
    tl.store(weights + row * k + kk, weight_K, mask=kk < k)
    unit_K = (tl.where(weight_K == weight_K, weight_K, 0.0) * MASS_UNIT).to(tl.int64)
    tl.atomic_add(mass + slot_K, unit_K, mask=found_K, sem="relaxed")
    weight_K = tl.where((nan > 0) | found_K, weight_K, 0.0)
    for first in range(0, E, BE):
        value_KE = rows_of(values, slot_K, found_K, value_stride, first + e, E)
        out_E = tl.sum(weight_K[:, None] * value_KE, 0)
        tl.store(output + row * E + first + e, out_E.to(output.dtype.element_ty), mask=first + e < E)


@triton.jit
def adjoints(
    q, keys, values, indices, weights, doutput, dweights, dq, dscores,
    key_stride, value_stride, D, E, k, scale, K: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    WEIGHED: tl.constexpr,
):  # fmt: skip
    """One query: the adjoints of its k scores, and of the query."""
    row, kk, d, e = tl.program_id(0).to(tl.int64), tl.arange(0, K), tl.arange(0, BD), tl.arange(0, BE)
    slot_K = tl.load(indices + row * k + kk, mask=kk < k, other=-1)
    found_K = slot_K >= 0
    weight_K = tl.load(weights + row * k + kk, mask=found_K, other=0.0)
    dweight_K = tl.load(dweights + row * k + kk, mask=found_K, other=0.0) if WEIGHED else tl.zeros((K,), tl.float32)
    for first in range(0, E, BE):
        do_E = row_of(doutput, row, E, first + e, E)
        dweight_K += tl.sum(rows_of(values, slot_K, found_K, value_stride, first + e, E) * do_E[None, :], 1)
    dscore_K = weight_K * (dweight_K - tl.sum(weight_K * dweight_K, 0)) * scale
    tl.store(dscores + row * k + kk, dscore_K, mask=kk < k)
    for first in range(0, D, BD):
        key_KD = rows_of(keys, slot_K, found_K, key_stride, first + d, D)
        dq_D = tl.sum(dscore_K[:, None] * key_KD, 0)
        tl.store(dq + row * D + first + d, dq_D.to(dq.dtype.element_ty), mask=first + d < D)


@triton.jit
def gathered_by_slot(rows, coefficients, order, bounds, out, row_stride, width, k, B: tl.constexpr, BW: tl.constexpr):
    """One slot: the sum of the rows of the queries that chose it, by coefficient, in the order of queries."""
    slot, w = tl.program_id(0).to(tl.int64), tl.program_id(1) * BW + tl.arange(0, BW)
    first, stop = tl.load(bounds + slot), tl.load(bounds + slot + 1)
    sum_W = tl.zeros((BW,), tl.float32)
    for start in range(first, stop, B):
        b = start + tl.arange(0, B)
        entry_B = tl.load(order + b, mask=b < stop, other=0)
        coefficient_B = tl.load(coefficients + entry_B, mask=b < stop, other=0.0)
        sum_W += tl.sum(coefficient_B[:, None] * rows_of(rows, entry_B // k, b < stop, row_stride, w, width), 0)
    tl.store(out + slot * width + w, sum_W.to(out.dtype.element_ty), mask=w < width)
