"""What reaches q, k and the vectors of gates through the two states of a chunk, all chunks at once."""

from __future__ import annotations

import triton
import triton.language as tl

from clplat.kernels.delta_memory.triton_tiles import (
    B1_,
    B_,
    EXACT,
    F1_,
    F_,
    FROZEN,
    HEBB,
    M_,
    NUM_VECTORS,
    WG_,
    WL_,
    chunk_of,
    load_tile,
    load_turned,
    rows_at,
    store_tile,
)


@triton.jit
def reached(dx_CD, dgate_C, x_CD, dy_CE, W_ED, gate_C, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """Adds to the adjoints of x and of the gate what y = gate · (x W) sends back; W lies on its side."""
    y_CE = tl.dot(x_CD, tl.trans(W_ED), input_precision=PRECISION, out_dtype=ACC)
    dgate_C += tl.sum(dy_CE * y_CE, 1)
    scaled_CE = (gate_C[:, None] * dy_CE).to(W_ED.dtype)
    return tl.dot(scaled_CE, W_ED, dx_CD, input_precision=PRECISION, out_dtype=ACC), dgate_C


@triton.jit
def gather_q(
    q, k, do, vectors, W_kept, S_kept, dX, dq, adjoints, slot, head, row, start, valid,
    q_row, q_token, q_head, k_row, k_token, k_head, T, D, E,
    V: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    MOMENTUM: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq (B, T, V, D) of every value head, and the adjoints of b and f."""
    c, d = tl.arange(0, C), tl.arange(0, BD)
    token = (row * T + start).to(tl.int64)
    q = rows_at(q, row, start, head // GROUP, q_row, q_token, q_head)
    k = rows_at(k, row, start, head // GROUP, k_row, k_token, k_head)
    place = slot.to(tl.int64) * V + head
    do += (token * V + head) * E
    # do Wᵀ and do Sᵀ serve both adjoints: q's, and with q that of the gate.
    Wdo_CD, Sdo_CD = tl.zeros([C, BD], dtype=ACC), tl.zeros([C, BD], dtype=ACC)
    for block in range(0, E, BE):
        e = block + tl.arange(0, BE)
        do_CE = load_tile(do, c, valid, V * E, e, E, UPCAST)
        W_ED = load_tile(W_kept + place * D * E, e, E, D, d, D, UPCAST)
        Wdo_CD = tl.dot(do_CE, W_ED, Wdo_CD, input_precision=PRECISION, out_dtype=ACC)
        if MOMENTUM:
            S_ED = load_tile(S_kept + place * D * E, e, E, D, d, D, UPCAST)
            Sdo_CD = tl.dot(do_CE, S_ED, Sdo_CD, input_precision=PRECISION, out_dtype=ACC)
    q_CD = load_tile(q, c, valid, q_token, d, D, UPCAST)
    k_CD = load_tile(k, c, valid, k_token, d, D, UPCAST)
    X_ij = load_tile(dX + place * C * C, c, C, C, c, C, UPCAST)
    here = vectors + place * NUM_VECTORS * C + c
    found = adjoints + place * NUM_VECTORS * C + c
    dq_CD = tl.load(here + B_ * C)[:, None] * Wdo_CD
    tl.store(found + B_ * C, tl.sum(q_CD * Wdo_CD, 1))
    if MOMENTUM:
        dq_CD += tl.load(here + F_ * C)[:, None] * Sdo_CD
        tl.store(found + F_ * C, tl.sum(q_CD * Sdo_CD, 1))
    dq_CD = tl.dot(X_ij, k_CD, dq_CD, input_precision=PRECISION, out_dtype=ACC)
    store_tile(dq + (token * V + head) * D, dq_CD, c, valid, V * D, d, D)


@triton.jit
def gather_k(
    q, k, v, errors, do, dv, vectors, W_kept, S_kept, anchor, dW_kept, dS_kept, dX, dY, dk, adjoints,
    slot, head, n, i, row, start, valid, offset,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, T, D, E,
    V: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    MODE: tl.constexpr, MOMENTUM: tl.constexpr, OFFSETS: tl.constexpr, UPCAST: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk (B, T, V, D) of every value head, and the adjoints of b′, f′, the writes' weights and the states' factors."""
    c, d = tl.arange(0, C), tl.arange(0, BD)
    token = (row * T + start).to(tl.int64)
    q = rows_at(q, row, start, head // GROUP, q_row, q_token, q_head)
    k = rows_at(k, row, start, head // GROUP, k_row, k_token, k_head)
    v = rows_at(v, row, start, head, v_row, v_token, v_head)
    place = slot.to(tl.int64) * V + head
    tokens = (token * V + head) * E
    q_CD = load_tile(q, c, valid, q_token, d, D, UPCAST)
    k_CD = load_tile(k, c, valid, k_token, d, D, UPCAST)
    here = vectors + place * NUM_VECTORS * C + c
    found = adjoints + place * NUM_VECTORS * C + c
    X_ji = load_turned(dX + place * C * C, c, C, C, c, C, UPCAST)
    dk_CD = tl.dot(X_ji, q_CD, input_precision=PRECISION, out_dtype=ACC)
    wg_C, zero_C = tl.load(here + WG_ * C), tl.zeros([C], dtype=ACC)
    db1_C, df1_C, dwg_C, dwl_C = zero_C, zero_C, zero_C, zero_C
    WW, WS, SS = tl.sum(zero_C, 0), tl.sum(zero_C, 0), tl.sum(zero_C, 0)
    if MODE >= EXACT:
        Y_ij = load_tile(dY + place * C * C, c, C, C, c, C, UPCAST)
        Y_ji = load_turned(dY + place * C * C, c, C, C, c, C, UPCAST)
        dk_CD += tl.dot((Y_ij + Y_ji).to(Y_ij.dtype), k_CD, input_precision=PRECISION, out_dtype=ACC)
        b1_C = tl.load(here + B1_ * C)
    if MOMENTUM:
        wl_C = tl.load(here + WL_ * C)
        if MODE >= EXACT:
            f1_C = tl.load(here + F1_ * C)
    for block in range(0, E, BE):
        e = block + tl.arange(0, BE)
        if MODE == HEBB:
            minus_E_CE = load_tile(v, c, valid, v_token, e, E, UPCAST)
        else:
            minus_E_CE = -load_tile(errors + tokens, c, valid, V * E, e, E, UPCAST)
        dW_ED = load_tile(dW_kept + place * D * E, e, E, D, d, D, UPCAST)
        dk_CD, dwg_C = reached(dk_CD, dwg_C, k_CD, minus_E_CE, dW_ED, wg_C, ACC, PRECISION)
        W_ED = load_tile(W_kept + place * D * E, e, E, D, d, D, UPCAST)
        WW += tl.sum(tl.sum(W_ED.to(ACC) * dW_ED.to(ACC), 1), 0)
        if MODE != HEBB:
            dR_CE = -load_tile(dv + tokens, c, valid, V * E, e, E, UPCAST)
            if MODE == FROZEN:
                source_ED = W_ED
                if OFFSETS:
                    if (i == 0) & (offset > 0):
                        state = (n * V + head).to(tl.int64) * D * E
                        source_ED = load_turned(anchor + state, d, D, E, e, E, False).to(W_ED.dtype)
                dk_CD = tl.dot(dR_CE, source_ED, dk_CD, input_precision=PRECISION, out_dtype=ACC)
            else:
                dk_CD, db1_C = reached(dk_CD, db1_C, k_CD, dR_CE, W_ED, b1_C, ACC, PRECISION)
        if MOMENTUM:
            S_ED = load_tile(S_kept + place * D * E, e, E, D, d, D, UPCAST)
            WS += tl.sum(tl.sum(S_ED.to(ACC) * dW_ED.to(ACC), 1), 0)
            if MODE >= EXACT:
                dk_CD, df1_C = reached(dk_CD, df1_C, k_CD, dR_CE, S_ED, f1_C, ACC, PRECISION)
            dS_ED = load_tile(dS_kept + place * D * E, e, E, D, d, D, UPCAST)
            SS += tl.sum(tl.sum(S_ED.to(ACC) * dS_ED.to(ACC), 1), 0)
            dk_CD, dwl_C = reached(dk_CD, dwl_C, k_CD, minus_E_CE, dS_ED, wl_C, ACC, PRECISION)
    store_tile(dk + (token * V + head) * D, dk_CD, c, valid, V * D, d, D)
    tl.store(found + B1_ * C, db1_C)
    tl.store(found + F1_ * C, df1_C)
    tl.store(found + WG_ * C, dwg_C)
    tl.store(found + WL_ * C, dwl_C)
    # The place of m, whose adjoint `gates` finds, holds what the states' own factors get: <W, dW>, <S, dW>, <S, dS>.
    tl.store(found + M_ * C, tl.where(c == 0, WW, tl.where(c == 1, WS, SS)))


@triton.jit
def gather(
    q, k, v, errors, do, dv, vectors, W_kept, S_kept, anchor, dW_kept, dS_kept, dX, dY, dq, dk, adjoints,
    cu_seqlens, offsets,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, T, N, slots, D, E,
    V: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
    MODE: tl.constexpr, MOMENTUM: tl.constexpr, PACKED: tl.constexpr, OFFSETS: tl.constexpr, UPCAST: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`gather_q` and `gather_k` of one chunk by two neighbours, of which the second finds W and S in the cache."""
    slot, part, head = tl.program_id(0) // 2, tl.program_id(0) % 2, tl.program_id(1)
    n, i, row, start, valid, offset = chunk_of(slot, cu_seqlens, offsets, slots, N, T, C, PACKED, OFFSETS, BN)
    if valid <= 0:
        return
    if part == 0:
        gather_q(
            q, k, do, vectors, W_kept, S_kept, dX, dq, adjoints, slot, head, row, start, valid,
            q_row, q_token, q_head, k_row, k_token, k_head, T, D, E, V, GROUP, C, BD, BE, MOMENTUM, UPCAST, ACC,
            PRECISION,
        )  # fmt: skip
    else:
        gather_k(
            q, k, v, errors, do, dv, vectors, W_kept, S_kept, anchor, dW_kept, dS_kept, dX, dY, dk, adjoints,
            slot, head, n, i, row, start, valid, offset,
            q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, T, D, E, V, GROUP, C, BD, BE,
            MODE, MOMENTUM, OFFSETS, UPCAST, ACC, PRECISION,
        )  # fmt: skip
