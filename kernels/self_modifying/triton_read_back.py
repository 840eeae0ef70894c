"""What flows back through the queries of `self_modifying`, all chunks at once.

The forward pass's names, adjoints with a d in front; docs/self_modifying.md derives the formulas. Only what was loaded
is ever transposed: what is needed in both orders is computed twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from clplat.kernels.delta_memory.triton_tiles import chunk_of, load_tile, load_turned, lower, rows_at, store_tile, upper
from clplat.kernels.self_modifying.triton_tiles import (
    NUM_MADE,
    NUM_SQUARES,
    STEPS,
    Z_DECAY,
    Z_RATE,
    decays,
    dot,
    gates_of,
    load_matrix,
    plus,
    shortening,
)


@triton.jit
def read_back(
    q, log_momentum, damping, keys, kept_W, kept_S, slopes, answers, squares, made, do, dq, dk_read, dsteps, derased,
    dsquares, dvectors, cu_seqlens, offsets, q_row, q_token, q_head, max_rate, max_gradient, T, N, slots,
    H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    DECAY: tl.constexpr, MOMENTUM: tl.constexpr, ERASE: tl.constexpr, DIFFERENCE: tl.constexpr, BOUNDED: tl.constexpr,
    UNIT: tl.constexpr, OWN: tl.constexpr, SELF: tl.constexpr, PACKED: tl.constexpr, OFFSETS: tl.constexpr,
    UPCAST: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one chunk and head: dq, and what reaches its keys, the steps and erasings of the memory that answers, and the
    decays through its reads."""
    slot, head = tl.program_id(0), tl.program_id(1)
    n, i, row, start, valid, offset = chunk_of(slot, cu_seqlens, offsets, slots, N, T, C, PACKED, OFFSETS, BN)
    if valid <= 0:
        return
    c, d = tl.arange(0, C), tl.arange(0, BD)
    token, place = (row * T + start).to(tl.int64) * H + head, slot.to(tl.int64) * H + head
    q = rows_at(q, row, start, head, q_row, q_token, q_head)
    q_CD = load_tile(q, c, valid, q_token, d, D, UPCAST)
    q_DC = load_turned(q, c, valid, q_token, d, D, UPCAST)
    k_CD = load_tile(keys + token * D, c, valid, H * D, d, D, UPCAST)
    k_DC = load_turned(keys + token * D, c, valid, H * D, d, D, UPCAST)
    do_CD = load_tile(do + token * D, c, valid, H * D, d, D, UPCAST)
    do_DC = load_turned(do + token * D, c, valid, H * D, d, D, UPCAST)
    narrow = q_CD.dtype
    found = made + place * NUM_MADE * C + c
    z_C, zd_C = tl.load(found + Z_RATE * C), tl.load(found + Z_DECAY * C)
    e_C, damping_C, decay_C, momentum_C, there_C = gates_of(
        z_C, zd_C, log_momentum + token if MOMENTUM else None, damping + token if damping is not None else None,
        max_rate, c, valid, H, C, DECAY, MOMENTUM, ACC,
    )  # fmt: skip
    b1_C, f1_C, _, _, _, _, _, _ = decays(decay_C, momentum_C, there_C, MOMENTUM, C)
    total_C = tl.cumsum(decay_C, 0)
    A1_ij = lower(total_C - decay_C, total_C, False, C)
    A1_ji = upper(total_C - decay_C, total_C, False, C)
    G1_ij = load_tile(squares + (place * NUM_SQUARES + STEPS) * C * C, c, C, C, c, C, UPCAST).to(ACC)
    G1_ji = load_turned(squares + (place * NUM_SQUARES + STEPS) * C * C, c, C, C, c, C, UPCAST).to(ACC)
    own = (token * M + M - 1) * D
    w_DD = load_matrix(kept_W + (place * M + M - 1) * D * D, D, BD, UPCAST)
    g_CD = load_tile(slopes + own, c, valid, H * M * D, d, D, UPCAST).to(ACC)
    g_DC = load_turned(slopes + own, c, valid, H * M * D, d, D, UPCAST).to(ACC)
    k_wide_CD = k_CD.to(ACC)
    share_C, _ = shortening(g_CD, tl.sum(k_wide_CD * k_wide_CD, 1), max_gradient, BOUNDED, C, ACC)
    rate_C = -e_C * damping_C * share_C
    QK_ij, QK_ji = dot(q_CD, k_DC, ACC, PRECISION), dot(k_CD, q_DC, ACC, PRECISION)
    through_ij = dot(do_CD, (rate_C[None, :] * g_DC).to(narrow), ACC, PRECISION)
    dQK_ij = G1_ij * through_ij
    here = dsquares + place * 2 * C * C
    store_tile(here, QK_ij * through_ij, c, C, C, c, C)
    dQK_ji = G1_ji * dot((rate_C[:, None] * g_CD).to(narrow), do_DC, ACC, PRECISION)
    reach_CD = dot(do_CD, tl.trans(w_DD), ACC, PRECISION)
    dq_CD = b1_C[:, None] * reach_CD
    vectors = dvectors + place * 2 * C + c
    tl.store(vectors, tl.sum(reach_CD * q_CD.to(ACC), 1))
    if MOMENTUM:
        s_DD = load_matrix(kept_S + (place * M + M - 1) * D * D, D, BD, UPCAST)
        reach_CD = dot(do_CD, tl.trans(s_DD), ACC, PRECISION)
        dq_CD += f1_C[:, None] * reach_CD
        tl.store(vectors + C, tl.sum(reach_CD * q_CD.to(ACC), 1))
    if ERASE:
        f_CD = load_tile(answers + own, c, valid, H * M * D, d, D, UPCAST).to(ACC)
        f_DC = load_turned(answers + own, c, valid, H * M * D, d, D, UPCAST).to(ACC)
        through_ij = dot(do_CD, (-e_C[None, :] * f_DC).to(narrow), ACC, PRECISION)
        dQK_ij += A1_ij * through_ij
        store_tile(here + C * C, QK_ij * through_ij, c, C, C, c, C)
        dQK_ji += A1_ji * dot((-e_C[:, None] * f_CD).to(narrow), do_DC, ACC, PRECISION)
        derased_CD = dot((QK_ji * A1_ji).to(narrow), do_CD, ACC, PRECISION)
        store_tile(derased + token * D, derased_CD, c, valid, H * D, d, D)
    dq_CD = plus(dq_CD, dQK_ij.to(narrow), k_CD, ACC, PRECISION)
    wide: tl.constexpr = H * D
    store_tile(dq + token * D, dq_CD, c, valid, wide, d, D)
    dk_CD = dot(dQK_ji.to(narrow), q_CD, ACC, PRECISION)
    store_tile(dk_read + token * D, dk_CD, c, valid, wide, d, D)
    dsteps_CD = dot((QK_ji * G1_ji).to(narrow), do_CD, ACC, PRECISION)
    store_tile(dsteps + token * D, dsteps_CD, c, valid, wide, d, D)
