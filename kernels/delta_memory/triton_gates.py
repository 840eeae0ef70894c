"""Adjoints of the gates, of P = tril(q kᵀ) ∘ G ∘ rate and of A, all chunks at once."""

from __future__ import annotations

import triton
import triton.language as tl

from clplat.kernels.delta_memory.triton_tiles import (
    B1_,
    B_,
    EXACT,
    F1_,
    F_,
    GDN,
    HEBB,
    M_,
    NUM_VECTORS,
    WG_,
    WL_,
    chunk_of,
    last_row,
    load_row,
    load_tile,
    load_turned,
    lower,
    rows_at,
    running,
    running_back,
    store_tile,
    upper,
)


@triton.jit
def scores(
    q, k, v, errors, do, dv, rate, log_decay, log_momentum, dX, dY, drate, ddecay, dmomentum, cu_seqlens, offsets,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, T, N, slots, D, E,
    V: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
    MODE: tl.constexpr, DECAY: tl.constexpr, MOMENTUM: tl.constexpr, PACKED: tl.constexpr, OFFSETS: tl.constexpr,
    UPCAST: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adjoints dX of q kᵀ and dY of k kᵀ in one chunk, and of its gates what comes through P and A."""
    slot, head = tl.program_id(0), tl.program_id(1)
    n, i, row, start, valid, offset = chunk_of(slot, cu_seqlens, offsets, slots, N, T, C, PACKED, OFFSETS, BN)
    if valid <= 0:
        return
    c, d, e = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BE)
    token = (row * T + start).to(tl.int64)
    q = rows_at(q, row, start, head // GROUP, q_row, q_token, q_head)
    k = rows_at(k, row, start, head // GROUP, k_row, k_token, k_head)
    do += (token * V + head) * E
    do_CE = load_tile(do, c, valid, V * E, e, E, UPCAST)
    if MODE == HEBB:
        v = rows_at(v, row, start, head, v_row, v_token, v_head)
        E_EC = -load_turned(v, c, valid, v_token, e, E, UPCAST)
    else:
        E_EC = load_turned(errors + (token * V + head) * E, c, valid, V * E, e, E, UPCAST)
    k_DC = load_turned(k, c, valid, k_token, d, D, UPCAST)
    q_CD = load_tile(q, c, valid, q_token, d, D, UPCAST)
    rate_C = load_row(rate + token * V + head, c, valid, V, ACC)
    decay_C = load_row(log_decay + token * V + head, c, valid, V, ACC) if DECAY else tl.zeros([C], dtype=ACC)
    total_C = tl.cumsum(decay_C, 0)
    G_ij = lower(total_C, total_C, True, C)
    if MOMENTUM:
        momentum_C = tl.cumsum(load_row(log_momentum + token * V + head, c, valid, V, ACC), 0)
        La_ij, Le_ij = G_ij, lower(momentum_C, momentum_C, True, C).to(q_CD.dtype)
        G_ij = tl.dot(La_ij.to(q_CD.dtype), Le_ij, input_precision=PRECISION, out_dtype=ACC)
    causal = c[:, None] >= c[None, :]
    dP_ij = tl.where(causal, -tl.dot(do_CE, E_EC, input_precision=PRECISION, out_dtype=ACC), 0.0)
    square = (slot.to(tl.int64) * V + head) * C * C
    dX_ij = dP_ij * G_ij
    store_tile(dX + square, dX_ij * rate_C[None, :], c, C, C, c, C)
    X_ij = tl.dot(q_CD, k_DC, input_precision=PRECISION, out_dtype=ACC)
    drate_C = tl.sum(dX_ij * X_ij, 0)
    dG_ij = dP_ij * X_ij * rate_C[None, :]
    if MOMENTUM:
        dG_ij = dG_ij.to(q_CD.dtype)
        dLa_ij = tl.dot(dG_ij, tl.trans(Le_ij), input_precision=PRECISION, out_dtype=ACC) * La_ij
        La_ji = upper(total_C, total_C, True, C).to(q_CD.dtype)
        dLe_ij = tl.dot(La_ji, dG_ij, input_precision=PRECISION, out_dtype=ACC)
    else:
        dLa_ij = dG_ij * G_ij
    dtotal_C = tl.sum(dLa_ij, 1) - tl.sum(dLa_ij, 0)
    dseen_C = tl.zeros([C], dtype=ACC)
    if MODE >= EXACT:
        dR_CE = -load_tile(dv + (token * V + head) * E, c, valid, V * E, e, E, UPCAST)
        seen_C = total_C if MODE == GDN else total_C - decay_C
        La1_ij = lower(seen_C, total_C, False, C)
        G1_ij = La1_ij
        if MOMENTUM:
            G1_ij = tl.dot(La1_ij.to(q_CD.dtype), Le_ij, input_precision=PRECISION, out_dtype=ACC)
        strict = c[:, None] > c[None, :]
        dA_ij = tl.where(strict, -tl.dot(dR_CE, E_EC, input_precision=PRECISION, out_dtype=ACC), 0.0)
        k_CD = load_tile(k, c, valid, k_token, d, D, UPCAST)
        Y_ij = tl.dot(k_CD, k_DC, input_precision=PRECISION, out_dtype=ACC)
        dY_ij = dA_ij * G1_ij
        store_tile(dY + square, dY_ij * rate_C[None, :], c, C, C, c, C)
        drate_C += tl.sum(dY_ij * Y_ij, 0)
        dG1_ij = dA_ij * Y_ij * rate_C[None, :]
        if MOMENTUM:
            dG1_ij = dG1_ij.to(q_CD.dtype)
            dLa1_ij = tl.dot(dG1_ij, tl.trans(Le_ij), input_precision=PRECISION, out_dtype=ACC) * La1_ij
            La1_ji = upper(seen_C, total_C, False, C).to(q_CD.dtype)
            dLe_ij += tl.dot(La1_ji, dG1_ij, input_precision=PRECISION, out_dtype=ACC)
        else:
            dLa1_ij = dG1_ij * La1_ij
        dseen_C += tl.sum(dLa1_ij, 1)
        dtotal_C -= tl.sum(dLa1_ij, 0)
    kept = c < valid
    tl.store(drate + (token + c) * V + head, drate_C, mask=kept)
    if DECAY:
        tl.store(ddecay + (token + c) * V + head, _summed(dtotal_C, dseen_C, MODE), mask=kept)
    if MOMENTUM:
        dLe_ij = tl.where(causal, dLe_ij, 0.0) * Le_ij
        dlog_C = tl.cumsum(tl.sum(dLe_ij, 1) - tl.sum(dLe_ij, 0), 0, reverse=True)
        tl.store(dmomentum + (token + c) * V + head, dlog_C, mask=kept)


@triton.jit
def _summed(dtotal_C, dseen_C, MODE: tl.constexpr):
    """From the adjoints of running sums to those of log gates; what `exact` sees leaves the token's own decay out."""
    dlog_C = tl.cumsum(dtotal_C + dseen_C, 0, reverse=True)
    return dlog_C - dseen_C if MODE == EXACT else dlog_C


@triton.jit
def gates(
    rate, log_decay, log_momentum, vectors, adjoints, drate, ddecay, dmomentum, cu_seqlens, offsets, T, N, slots,
    V: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, MODE: tl.constexpr, DECAY: tl.constexpr,
    MOMENTUM: tl.constexpr, PACKED: tl.constexpr, OFFSETS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Adds what reaches the gates of one chunk through the vectors, after `scores` and both gatherings."""
    slot, head = tl.program_id(0), tl.program_id(1)
    n, i, row, start, valid, offset = chunk_of(slot, cu_seqlens, offsets, slots, N, T, C, PACKED, OFFSETS, BN)
    if valid <= 0:
        return
    c = tl.arange(0, C)
    token = (row * T + start).to(tl.int64)
    place = (slot.to(tl.int64) * V + head) * NUM_VECTORS * C
    here, found = vectors + place + c, adjoints + place + c
    zero_C = tl.zeros([C], dtype=ACC)
    dwg_C, states = tl.load(found + WG_ * C), adjoints + place + M_ * C
    WW, b_C, db_C = tl.load(states), tl.load(here + B_ * C), tl.load(found + B_ * C)
    if MODE >= EXACT:
        b1_C, db1_C = tl.load(here + B1_ * C), tl.load(found + B1_ * C)
    if MOMENTUM:
        WS, SS, df_C = tl.load(states + 1), tl.load(states + 2), tl.load(found + F_ * C)
        dwl_C, df1_C = tl.load(found + WL_ * C), tl.load(found + F1_ * C)
    last, kept = valid - 1, c < valid
    gates_at = token * V + head
    gate = gates_at + c * V
    rate_C = load_row(rate + gates_at, c, valid, V, ACC)
    decay_C = load_row(log_decay + gates_at, c, valid, V, ACC) if DECAY else zero_C
    total_C = tl.cumsum(decay_C, 0)
    La_row = last_row(total_C, last, C)
    drow_C = dwg_C * rate_C
    dtotal_C = (db_C + tl.where(c == last, WW, 0.0)) * b_C
    dseen_C = db1_C * b1_C if MODE >= EXACT else zero_C
    # Adjoints of a matrix of decays reach its running sums as the sums of its rows less those of its columns.
    if MOMENTUM:
        momentum_C = load_row(log_momentum + gates_at, c, valid, V, ACC)
        sums_C = tl.cumsum(momentum_C, 0)
        m_C, Le_row = tl.exp(sums_C), last_row(sums_C, last, C)
        next_momentum_C = tl.exp(load_row(log_momentum + gates_at + V, c, valid - 1, V, ACC))
        next_decay_C = tl.exp(load_row(log_decay + gates_at + V, c, valid - 1, V, ACC)) if DECAY else zero_C + 1.0
        G_row = running_back(La_row, next_momentum_C)
        read_C = La_row * running(drow_C, tl.exp(momentum_C))
        tail_C = dwl_C * rate_C * Le_row
        df_C += tl.where(c == last, WS, 0.0)
        dm_C = running_back(df_C, next_decay_C)
        dtotal_C += df_C * tl.load(here + F_ * C) - m_C * dm_C + _turned(read_C, last, C)
        if MODE >= EXACT:
            # What f′ has of a token's m begins with the token after it.
            next_df1_C = tl.load(found + F1_ * C + 1, mask=c < last, other=0.0)
            dm1_C = running_back(next_df1_C * next_decay_C if MODE == GDN else next_df1_C, next_decay_C)
            dseen_C += df1_C * tl.load(here + F1_ * C)
            dtotal_C -= m_C * dm1_C
            dm_C += dm1_C
        dm_C += tl.where(c == last, SS, 0.0)
        dlog_C = tl.cumsum(read_C - drow_C * G_row + _turned(tail_C, last, C) + dm_C * m_C, 0, reverse=True)
        tl.store(dmomentum + gate, tl.load(dmomentum + gate, mask=kept, other=0.0) + dlog_C, mask=kept)
        drate_C = dwg_C * G_row + dwl_C * Le_row
    else:
        dtotal_C += _turned(drow_C * La_row, last, C)
        drate_C = dwg_C * La_row
    tl.store(drate + gate, tl.load(drate + gate, mask=kept, other=0.0) + drate_C, mask=kept)
    if DECAY:
        dlog_C = _summed(dtotal_C, dseen_C, MODE)
        tl.store(ddecay + gate, tl.load(ddecay + gate, mask=kept, other=0.0) + dlog_C, mask=kept)


@triton.jit
def _turned(row_C, last, C: tl.constexpr):
    """Row sums less column sums of a matrix that is zero but for its row `last`."""
    return tl.where(tl.arange(0, C) == last, tl.sum(row_C, 0), 0.0) - row_C
