"""What flows back through the queries of `self_modifying`, all chunks at once.

The forward pass's names, adjoints with a d in front; docs/self_modifying.md derives the formulas. Only what was loaded
is ever transposed: what is needed in both orders is computed twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from clplat.kernels.delta_memory.triton_tiles import chunk_of, load_tile, load_turned, lower, rows_at, store_tile, upper
from clplat.kernels.self_modifying.triton_tiles import (
    B1,
    ERASED,
    F1,
    RATE_,
    SHARES,
    STEPS,
    Z_DECAY,
    dot,
    load_matrix,
    load_rows,
    log_sigmoid,
    plus,
    store_rows,
    turned_rows,
)


@triton.jit
def read_back(
    q, keys, kept_W, kept_S, slopes, answers, squares, made, do, dq, dk_read, dsteps, derased,
    dsquares, dvectors, cu_seqlens, offsets, q_row, q_token, q_head, T, N, slots,
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
    k_CD = load_rows(keys + place * C * D, C, D, BD, UPCAST)
    do_CD = load_tile(do + token * D, c, valid, H * D, d, D, UPCAST)
    narrow = q_CD.dtype
    found = made + place * (SHARES + 2 * M) * C + c
    decay_C, there_C = tl.zeros([C], dtype=ACC), tl.where(c < valid, 1.0, 0.0)
    if DECAY:
        decay_C = log_sigmoid(tl.load(found + Z_DECAY * C)) * there_C
    e_C, b1_C, f1_C = tl.load(found + ERASED * C), tl.load(found + B1 * C), tl.load(found + F1 * C)
    rate_C = -tl.load(found + RATE_ * C) * tl.load(found + (SHARES + 2 * M - 2) * C)
    total_C = tl.cumsum(decay_C, 0)
    A1_ij = lower(total_C - decay_C, total_C, False, C)
    A1_ji = upper(total_C - decay_C, total_C, False, C)
    G1_ij, G1_ji = A1_ij, A1_ji
    if MOMENTUM:
        square = squares + (place * 4 + STEPS) * C * C
        G1_ij = load_rows(square, C, C, C, UPCAST).to(ACC)
        G1_ji = turned_rows(square, C, C, C, UPCAST).to(ACC)
    own = (place * M + M - 1) * C * D
    wide: tl.constexpr = H * D
    vectors = dvectors + place * 3 * C + c
    # First what reaches keys and writes, then what reaches queries: so fewer tiles live at once.
    QK_ji = dot(k_CD, load_turned(q, c, valid, q_token, d, D, UPCAST), ACC, PRECISION)
    do_DC = load_turned(do + token * D, c, valid, wide, d, D, UPCAST)
    written_CD = rate_C[:, None] * load_rows(slopes + own, C, D, BD, UPCAST).to(ACC)
    if ERASE:
        f_CD = load_rows(answers + own, C, D, BD, UPCAST).to(ACC)
        if not MOMENTUM:
            written_CD -= e_C[:, None] * f_CD
    dQK_ji = G1_ji * dot(written_CD.to(narrow), do_DC, ACC, PRECISION)
    dsteps_CD = dot((QK_ji * G1_ji).to(narrow), do_CD, ACC, PRECISION)
    store_rows(dsteps + place * C * D, dsteps_CD, C, D, BD)
    if ERASE and MOMENTUM:
        dQK_ji += A1_ji * dot((-e_C[:, None] * f_CD).to(narrow), do_DC, ACC, PRECISION)
        derased_CD = dot((QK_ji * A1_ji).to(narrow), do_CD, ACC, PRECISION)
        store_rows(derased + place * C * D, derased_CD, C, D, BD)
        tl.store(vectors + 2 * C, tl.sum(derased_CD * f_CD, 1))
    dk_CD = dot(dQK_ji.to(narrow), q_CD, ACC, PRECISION)
    store_rows(dk_read + place * C * D, dk_CD, C, D, BD)
    QK_ij = dot(q_CD, turned_rows(keys + place * C * D, C, D, BD, UPCAST), ACC, PRECISION)
    written_DC = rate_C[None, :] * turned_rows(slopes + own, C, D, BD, UPCAST).to(ACC)
    if ERASE:
        f_DC = turned_rows(answers + own, C, D, BD, UPCAST).to(ACC)
        if not MOMENTUM:
            written_DC -= e_C[None, :] * f_DC
    through_ij = dot(do_CD, written_DC.to(narrow), ACC, PRECISION)
    here = dsquares + place * (1 + MOMENTUM) * C * C
    store_rows(here, QK_ij * through_ij, C, C, C)
    dQK_ij = G1_ij * through_ij
    if ERASE and MOMENTUM:
        through_ij = dot(do_CD, (-e_C[None, :] * f_DC).to(narrow), ACC, PRECISION)
        dQK_ij += A1_ij * through_ij
        store_rows(here + C * C, QK_ij * through_ij, C, C, C)
    w_DD = load_matrix(kept_W + (place * M + M - 1) * D * D, D, BD, UPCAST)
    reach_CD = dot(do_CD, tl.trans(w_DD), ACC, PRECISION)
    dq_CD = b1_C[:, None] * reach_CD
    tl.store(vectors, tl.sum(reach_CD * q_CD.to(ACC), 1))
    if MOMENTUM:
        s_DD = load_matrix(kept_S + (place * M + M - 1) * D * D, D, BD, UPCAST)
        reach_CD = dot(do_CD, tl.trans(s_DD), ACC, PRECISION)
        dq_CD += f1_C[:, None] * reach_CD
        tl.store(vectors + C, tl.sum(reach_CD * q_CD.to(ACC), 1))
    dq_CD = plus(dq_CD, dQK_ij.to(narrow), k_CD, ACC, PRECISION)
    store_tile(dq + token * D, dq_CD, c, valid, wide, d, D)
