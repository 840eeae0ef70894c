"""The walk of `delta_memory` back through the chunks: the forward pass's names, adjoints with a d in front."""

from __future__ import annotations

import triton
import triton.language as tl

from clplat.kernels.delta_memory.triton_tiles import (
    EXACT,
    FROZEN,
    chunk_rows,
    factors,
    first_slot,
    load_tile,
    load_turned,
    num_chunks,
    rows_at,
    sequence,
    store_tile,
    store_turned,
)


@triton.jit
def scan_back(
    q, k, do, P, Tinv, vectors, dW_end, dS_end, danchor_end, dv, dW, dS, danchor, dW_kept, dS_kept,
    cu_seqlens, offsets, q_row, q_token, q_head, k_row, k_token, k_head, T, slots, D, E,
    V: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, MODE: tl.constexpr,
    MOMENTUM: tl.constexpr, PACKED: tl.constexpr, OFFSETS: tl.constexpr, UPCAST: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv, the adjoints of W and S at the end of every chunk, and those of the initial state."""
    e, n, head = tl.program_id(0) * BE + tl.arange(0, BE), tl.program_id(1) // V, tl.program_id(1) % V
    row, first, length, offset = sequence(n, cu_seqlens, offsets, T, PACKED, OFFSETS)
    c, d = tl.arange(0, C), tl.arange(0, BD)
    state = (n * V + head).to(tl.int64) * D * E
    dW_DE, dS_DE = tl.zeros([BD, BE], dtype=ACC), tl.zeros([BD, BE], dtype=ACC)
    if dW_end is not None:
        dW_DE = load_tile(dW_end + state, d, D, E, e, E, False).to(ACC)
    if dS_end is not None:
        dS_DE = load_tile(dS_end + state, d, D, E, e, E, False).to(ACC)
    q = rows_at(q, row, first, head // GROUP, q_row, q_token, q_head)
    k = rows_at(k, row, first, head // GROUP, k_row, k_token, k_head)
    token = (row * T + first).to(tl.int64)
    do += (token * V + head) * E
    dv += (token * V + head) * E
    slot = first_slot(n, cu_seqlens, slots, C, PACKED).to(tl.int64) * V + head
    count = num_chunks(length, offset, C)
    if MODE == FROZEN:
        # An empty sequence leaves its anchor as it is.
        untouched_DE = tl.zeros([BD, BE], dtype=ACC)
        if danchor_end is not None:
            if count == 0:
                untouched_DE = load_tile(danchor_end + state, d, D, E, e, E, False).to(ACC)
        if OFFSETS:
            store_tile(danchor + state, untouched_DE, d, D, E, e, E)
        else:
            dW_DE += untouched_DE
    i = tl.maximum(count - 1, 0)
    _, valid = chunk_rows(i, length, offset, C)
    b_C, f_C, wg_C, wl_C, b1_C, f1_C, b_end, f_end, m_end = factors(vectors, slot + i * V, valid, MODE, MOMENTUM, C)
    for back in range(count):
        i = count - 1 - back
        start, valid = chunk_rows(i, length, offset, C)
        place = slot + i * V
        ahead = tl.maximum(i - 1, 0)
        _, ahead_valid = chunk_rows(ahead, length, offset, C)
        next_b_C, next_f_C, next_wg_C, next_wl_C, next_b1_C, next_f1_C, next_b, next_f, next_m = factors(
            vectors, slot + ahead * V, ahead_valid, MODE, MOMENTUM, C
        )
        store_turned(dW_kept + place * D * E, dW_DE, e, E, D, d, D)
        do_CE = load_tile(do + start * V * E, c, valid, V * E, e, E, UPCAST)
        k_CD = load_tile(k + start * k_token, c, valid, k_token, d, D, UPCAST)
        P_ji = load_turned(P + place * C * C, c, C, C, c, C, UPCAST)
        dW_now = dW_DE.to(do_CE.dtype)
        dE_CE = -tl.dot(P_ji, do_CE, input_precision=PRECISION, out_dtype=ACC)
        dE_CE -= wg_C[:, None] * tl.dot(k_CD, dW_now, input_precision=PRECISION, out_dtype=ACC)
        if MOMENTUM:
            store_turned(dS_kept + place * D * E, dS_DE, e, E, D, d, D)
            dS_now = dS_DE.to(do_CE.dtype)
            dE_CE -= wl_C[:, None] * tl.dot(k_CD, dS_now, input_precision=PRECISION, out_dtype=ACC)
        dR_CE = dE_CE
        if MODE >= EXACT:
            T_ji = load_turned(Tinv + place * C * C, c, C, C, c, C, UPCAST)
            dR_CE = tl.dot(T_ji, dE_CE.to(T_ji.dtype), input_precision=PRECISION, out_dtype=ACC)
        store_tile(dv + start * V * E, -dR_CE, c, valid, V * E, e, E)
        q_DC = load_turned(q + start * q_token, c, valid, q_token, d, D, UPCAST)
        k_DC = tl.trans(k_CD)
        if MOMENTUM:
            dS_DE *= m_end
            dS_DE += f_end * dW_DE
            dS_DE += tl.dot(q_DC, (f_C[:, None] * do_CE).to(q_DC.dtype), input_precision=PRECISION, out_dtype=ACC)
            if MODE >= EXACT:
                dS_DE += tl.dot(k_DC, (f1_C[:, None] * dR_CE).to(k_DC.dtype), input_precision=PRECISION, out_dtype=ACC)
        dW_DE *= b_end
        dW_DE += tl.dot(q_DC, (b_C[:, None] * do_CE).to(q_DC.dtype), input_precision=PRECISION, out_dtype=ACC)
        if MODE >= EXACT:
            dW_DE += tl.dot(k_DC, (b1_C[:, None] * dR_CE).to(k_DC.dtype), input_precision=PRECISION, out_dtype=ACC)
        if MODE == FROZEN:
            dR_CE = dR_CE.to(k_DC.dtype)
            if OFFSETS:
                dsource_DE = tl.dot(k_DC, dR_CE, input_precision=PRECISION, out_dtype=ACC)
                if danchor_end is not None:
                    if i == count - 1:
                        dsource_DE += load_tile(danchor_end + state, d, D, E, e, E, False).to(ACC)
                if (i == 0) & (offset > 0):
                    store_tile(danchor + state, dsource_DE, d, D, E, e, E)
                    dsource_DE *= 0.0
                dW_DE += dsource_DE
            else:
                dW_DE = tl.dot(k_DC, dR_CE, dW_DE, input_precision=PRECISION, out_dtype=ACC)
                if danchor_end is not None:
                    if i == count - 1:
                        dW_DE += load_tile(danchor_end + state, d, D, E, e, E, False).to(ACC)
        b_C, f_C, wg_C, wl_C, b1_C, f1_C = next_b_C, next_f_C, next_wg_C, next_wl_C, next_b1_C, next_f1_C
        b_end, f_end, m_end = next_b, next_f, next_m
    store_tile(dW + state, dW_DE, d, D, E, e, E)
    if MOMENTUM:
        store_tile(dS + state, dS_DE, d, D, E, e, E)
