"""The backward kernels of `delta_memory`; the forward pass's tiles and names, adjoints with a d in front.

`scores` computes what a chunk's own tokens owe each other, all chunks at once; `scan_back` carries dW and dS from chunk to
chunk against time; `gather` adds up, all chunks at once, what reaches q, k and the gates through the chunk's two states.
Nothing is added atomically: results are the same in every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from clplat.kernels.delta_memory.layout import Kept, Layout, strides
from clplat.kernels.delta_memory.reference import Inputs, MemoryState
from clplat.kernels.delta_memory.triton_fwd import prepared
from clplat.kernels.delta_memory.triton_tiles import (
    B1_,
    B_,
    EXACT,
    F1_,
    F_,
    FROZEN,
    GDN,
    HEBB,
    M_,
    NUM_VECTORS,
    WG_,
    WL_,
    chunk_rows,
    first_slot,
    load_row,
    load_tile,
    load_turned,
    lower,
    num_chunks,
    owner,
    row_of,
    sequence,
    store_tile,
    upper,
)
from clplat.kernels.delta_memory.tuning import options


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
    dW_DE = load_tile(dW_end + state, d, D, E, e, E, False).to(ACC)
    dS_DE = load_tile(dS_end + state, d, D, E, e, E, False).to(ACC) if MOMENTUM else dW_DE
    q += row.to(tl.int64) * q_row + first.to(tl.int64) * q_token + head // GROUP * q_head
    k += row.to(tl.int64) * k_row + first.to(tl.int64) * k_token + head // GROUP * k_head
    token = (row * T + first).to(tl.int64)
    do += (token * V + head) * E
    dv += (token * V + head) * E
    slot = first_slot(n, cu_seqlens, slots, C, PACKED).to(tl.int64) * V + head
    count = num_chunks(length, offset, C)
    if MODE == FROZEN:
        if OFFSETS:
            untouched_DE = load_tile(danchor_end + state, d, D, E, e, E, False)
            store_tile(danchor + state, untouched_DE * tl.where(count == 0, 1.0, 0.0), d, D, E, e, E)
        elif count == 0:
            dW_DE += load_tile(danchor_end + state, d, D, E, e, E, False).to(ACC)
    for back in range(count):
        i = count - 1 - back
        start, valid = chunk_rows(i, length, offset, C)
        place = slot + i * V
        here = vectors + place * NUM_VECTORS * C
        store_tile(dW_kept + place * D * E, dW_DE, d, D, E, e, E)
        do_CE = load_tile(do + start * V * E, c, valid, V * E, e, E, UPCAST)
        k_CD = load_tile(k + start * k_token, c, valid, k_token, d, D, UPCAST)
        P_ji = load_turned(P + place * C * C, c, C, C, c, C, UPCAST)
        wg_C = tl.load(here + WG_ * C + c)
        dW_now = dW_DE.to(do_CE.dtype)
        dE_CE = -tl.dot(P_ji, do_CE, input_precision=PRECISION, out_dtype=ACC)
        dE_CE -= wg_C[:, None] * tl.dot(k_CD, dW_now, input_precision=PRECISION, out_dtype=ACC)
        if MOMENTUM:
            store_tile(dS_kept + place * D * E, dS_DE, d, D, E, e, E)
            wl_C = tl.load(here + WL_ * C + c)
            dS_now = dS_DE.to(do_CE.dtype)
            dE_CE -= wl_C[:, None] * tl.dot(k_CD, dS_now, input_precision=PRECISION, out_dtype=ACC)
        dR_CE = dE_CE
        if MODE >= EXACT:
            T_ji = load_turned(Tinv + place * C * C, c, C, C, c, C, UPCAST)
            dR_CE = tl.dot(T_ji, dE_CE.to(T_ji.dtype), input_precision=PRECISION, out_dtype=ACC)
        store_tile(dv + start * V * E, -dR_CE, c, valid, V * E, e, E)
        q_DC = load_turned(q + start * q_token, c, valid, q_token, d, D, UPCAST)
        k_DC = load_turned(k + start * k_token, c, valid, k_token, d, D, UPCAST)
        b_C = tl.load(here + B_ * C + c)
        if MOMENTUM:
            f_C = tl.load(here + F_ * C + c)
            dS_DE *= tl.load(here + M_ * C + valid - 1)
            dS_DE += tl.load(here + F_ * C + valid - 1) * dW_DE
            dS_DE += tl.dot(q_DC, (f_C[:, None] * do_CE).to(q_DC.dtype), input_precision=PRECISION, out_dtype=ACC)
            if MODE >= EXACT:
                f1_C = tl.load(here + F1_ * C + c)
                dS_DE += tl.dot(k_DC, (f1_C[:, None] * dR_CE).to(k_DC.dtype), input_precision=PRECISION, out_dtype=ACC)
        dW_DE *= tl.load(here + B_ * C + valid - 1)
        dW_DE += tl.dot(q_DC, (b_C[:, None] * do_CE).to(q_DC.dtype), input_precision=PRECISION, out_dtype=ACC)
        if MODE >= EXACT:
            b1_C = tl.load(here + B1_ * C + c)
            dW_DE += tl.dot(k_DC, (b1_C[:, None] * dR_CE).to(k_DC.dtype), input_precision=PRECISION, out_dtype=ACC)
        if MODE == FROZEN:
            dsource_DE = tl.dot(k_DC, dR_CE.to(k_DC.dtype), input_precision=PRECISION, out_dtype=ACC)
            if i == count - 1:
                dsource_DE += load_tile(danchor_end + state, d, D, E, e, E, False).to(ACC)
            if OFFSETS:
                if (i == 0) & (offset > 0):
                    store_tile(danchor + state, dsource_DE, d, D, E, e, E)
                    dsource_DE *= 0.0
            dW_DE += dsource_DE
    store_tile(dW + state, dW_DE, d, D, E, e, E)
    if MOMENTUM:
        store_tile(dS + state, dS_DE, d, D, E, e, E)


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
    n, i = owner(slot, cu_seqlens, slots, N, C, PACKED, BN)
    row, first, length, offset = sequence(n, cu_seqlens, offsets, T, PACKED, OFFSETS)
    if i >= num_chunks(length, offset, C):
        return
    start, valid = chunk_rows(i, length, offset, C)
    c, d, e = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BE)
    token = (row * T + first + start).to(tl.int64)
    q += row.to(tl.int64) * q_row + (first + start).to(tl.int64) * q_token + head // GROUP * q_head
    k += row.to(tl.int64) * k_row + (first + start).to(tl.int64) * k_token + head // GROUP * k_head
    do += (token * V + head) * E
    do_CE = load_tile(do, c, valid, V * E, e, E, UPCAST)
    if MODE == HEBB:
        v += row.to(tl.int64) * v_row + (first + start).to(tl.int64) * v_token + head * v_head
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
        Le_ij = lower(momentum_C, momentum_C, True, C)
        Le_ji = upper(momentum_C, momentum_C, True, C)
        La_ij = G_ij
        G_ij = tl.dot(La_ij, Le_ij, input_precision=PRECISION, out_dtype=ACC)
    causal = c[:, None] >= c[None, :]
    dP_ij = tl.where(causal, -tl.dot(do_CE, E_EC, input_precision=PRECISION, out_dtype=ACC), 0.0)
    square = (slot.to(tl.int64) * V + head) * C * C
    dX_ij = dP_ij * G_ij
    store_tile(dX + square, dX_ij * rate_C[None, :], c, C, C, c, C)
    X_ij = tl.dot(q_CD, k_DC, input_precision=PRECISION, out_dtype=ACC)
    drate_C = tl.sum(dX_ij * X_ij, 0)
    dG_ij = dP_ij * X_ij * rate_C[None, :]
    if MOMENTUM:
        dLa_ij = tl.dot(dG_ij, Le_ji, input_precision=PRECISION, out_dtype=ACC) * La_ij
        La_ji = upper(total_C, total_C, True, C)
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
            G1_ij = tl.dot(La1_ij, Le_ij, input_precision=PRECISION, out_dtype=ACC)
        strict = c[:, None] > c[None, :]
        dA_ij = tl.where(strict, -tl.dot(dR_CE, E_EC, input_precision=PRECISION, out_dtype=ACC), 0.0)
        k_CD = load_tile(k, c, valid, k_token, d, D, UPCAST)
        Y_ij = tl.dot(k_CD, k_DC, input_precision=PRECISION, out_dtype=ACC)
        dY_ij = dA_ij * G1_ij
        store_tile(dY + square, dY_ij * rate_C[None, :], c, C, C, c, C)
        drate_C += tl.sum(dY_ij * Y_ij, 0)
        dG1_ij = dA_ij * Y_ij * rate_C[None, :]
        if MOMENTUM:
            dLa1_ij = tl.dot(dG1_ij, Le_ji, input_precision=PRECISION, out_dtype=ACC) * La1_ij
            La1_ji = upper(seen_C, total_C, False, C)
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
def gather(
    q, k, v, errors, do, dv, rate, log_decay, log_momentum, vectors, W_kept, S_kept, anchor, dW_kept, dS_kept, dX, dY,
    dq, dk, drate, ddecay, dmomentum, cu_seqlens, offsets,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, T, N, slots, D, E,
    V: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
    MODE: tl.constexpr, DECAY: tl.constexpr, MOMENTUM: tl.constexpr, PACKED: tl.constexpr, OFFSETS: tl.constexpr,
    UPCAST: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and dk (B, T, V, D) of every value head, and what reaches the gates through the states; after `scores`."""
    slot, head = tl.program_id(0), tl.program_id(1)
    n, i = owner(slot, cu_seqlens, slots, N, C, PACKED, BN)
    row, first, length, offset = sequence(n, cu_seqlens, offsets, T, PACKED, OFFSETS)
    if i >= num_chunks(length, offset, C):
        return
    start, valid = chunk_rows(i, length, offset, C)
    c, d = tl.arange(0, C), tl.arange(0, BD)
    token = (row * T + first + start).to(tl.int64)
    q += row.to(tl.int64) * q_row + (first + start).to(tl.int64) * q_token + head // GROUP * q_head
    k += row.to(tl.int64) * k_row + (first + start).to(tl.int64) * k_token + head // GROUP * k_head
    v += row.to(tl.int64) * v_row + (first + start).to(tl.int64) * v_token + head * v_head
    place = slot.to(tl.int64) * V + head
    tokens = (token * V + head) * E
    q_CD = load_tile(q, c, valid, q_token, d, D, UPCAST)
    k_CD = load_tile(k, c, valid, k_token, d, D, UPCAST)
    here = vectors + place * NUM_VECTORS * C + c
    b_C, wg_C = tl.load(here + B_ * C), tl.load(here + WG_ * C)
    X_ij = load_tile(dX + place * C * C, c, C, C, c, C, UPCAST)
    X_ji = load_turned(dX + place * C * C, c, C, C, c, C, UPCAST)
    dq_CD = tl.dot(X_ij, k_CD, input_precision=PRECISION, out_dtype=ACC)
    dk_CD = tl.dot(X_ji, q_CD, input_precision=PRECISION, out_dtype=ACC)
    if MODE >= EXACT:
        Y_ij = load_tile(dY + place * C * C, c, C, C, c, C, UPCAST)
        Y_ji = load_turned(dY + place * C * C, c, C, C, c, C, UPCAST)
        dk_CD += tl.dot((Y_ij + Y_ji).to(Y_ij.dtype), k_CD, input_precision=PRECISION, out_dtype=ACC)
        b1_C = tl.load(here + B1_ * C)
    if MOMENTUM:
        f_C, wl_C = tl.load(here + F_ * C), tl.load(here + WL_ * C)
        if MODE >= EXACT:
            f1_C = tl.load(here + F1_ * C)
    zero_C = tl.zeros([C], dtype=ACC)
    db_C, df_C, db1_C, df1_C, dwg_C, dwl_C = zero_C, zero_C, zero_C, zero_C, zero_C, zero_C
    WW, WS, SS = tl.sum(zero_C, 0), tl.sum(zero_C, 0), tl.sum(zero_C, 0)
    for block in range(0, E, BE):
        e = block + tl.arange(0, BE)
        do_CE = load_tile(do + tokens, c, valid, V * E, e, E, UPCAST)
        W_ED = load_turned(W_kept + place * D * E, d, D, E, e, E, UPCAST)
        dW_ED = load_turned(dW_kept + place * D * E, d, D, E, e, E, UPCAST)
        if MODE == HEBB:
            E_CE = -load_tile(v, c, valid, v_token, e, E, UPCAST)
        else:
            E_CE = load_tile(errors + tokens, c, valid, V * E, e, E, UPCAST)
        part_CD = tl.dot(do_CE, W_ED, input_precision=PRECISION, out_dtype=ACC)
        dq_CD += b_C[:, None] * part_CD
        db_C += tl.sum(q_CD * part_CD, 1)
        part_CD = tl.dot(E_CE, dW_ED, input_precision=PRECISION, out_dtype=ACC)
        dk_CD -= wg_C[:, None] * part_CD
        dwg_C -= tl.sum(k_CD * part_CD, 1)
        WW += tl.sum(tl.sum(W_ED.to(ACC) * dW_ED.to(ACC), 1), 0)
        if MODE != HEBB:
            dR_CE = -load_tile(dv + tokens, c, valid, V * E, e, E, UPCAST)
            if MODE == FROZEN:
                source_ED = W_ED
                if OFFSETS:
                    if (i == 0) & (offset > 0):
                        state = (n * V + head).to(tl.int64) * D * E
                        source_ED = load_turned(anchor + state, d, D, E, e, E, False).to(W_ED.dtype)
                dk_CD += tl.dot(dR_CE, source_ED, input_precision=PRECISION, out_dtype=ACC)
            else:
                part_CD = tl.dot(dR_CE, W_ED, input_precision=PRECISION, out_dtype=ACC)
                dk_CD += b1_C[:, None] * part_CD
                db1_C += tl.sum(k_CD * part_CD, 1)
        if MOMENTUM:
            S_ED = load_turned(S_kept + place * D * E, d, D, E, e, E, UPCAST)
            dS_ED = load_turned(dS_kept + place * D * E, d, D, E, e, E, UPCAST)
            part_CD = tl.dot(do_CE, S_ED, input_precision=PRECISION, out_dtype=ACC)
            dq_CD += f_C[:, None] * part_CD
            df_C += tl.sum(q_CD * part_CD, 1)
            part_CD = tl.dot(E_CE, dS_ED, input_precision=PRECISION, out_dtype=ACC)
            dk_CD -= wl_C[:, None] * part_CD
            dwl_C -= tl.sum(k_CD * part_CD, 1)
            WS += tl.sum(tl.sum(S_ED.to(ACC) * dW_ED.to(ACC), 1), 0)
            SS += tl.sum(tl.sum(S_ED.to(ACC) * dS_ED.to(ACC), 1), 0)
            if MODE >= EXACT:
                part_CD = tl.dot(dR_CE, S_ED, input_precision=PRECISION, out_dtype=ACC)
                dk_CD += f1_C[:, None] * part_CD
                df1_C += tl.sum(k_CD * part_CD, 1)
    store_tile(dq + (token * V + head) * D, dq_CD, c, valid, V * D, d, D)
    store_tile(dk + (token * V + head) * D, dk_CD, c, valid, V * D, d, D)
    last, kept = valid - 1, c < valid
    gate = (token + c) * V + head
    rate_C = load_row(rate + token * V + head, c, valid, V, ACC)
    decay_C = load_row(log_decay + token * V + head, c, valid, V, ACC) if DECAY else zero_C
    total_C = tl.cumsum(decay_C, 0)
    seen_C = total_C if MODE == GDN else total_C - decay_C
    La_ij = lower(total_C, total_C, True, C)
    b_end = tl.where(c == last, WW, 0.0)
    dtotal_C = (db_C + b_end) * b_C
    dseen_C = zero_C
    if MODE >= EXACT:
        dseen_C += db1_C * b1_C
    drow_C = dwg_C * rate_C
    if MOMENTUM:
        momentum_C = tl.cumsum(load_row(log_momentum + token * V + head, c, valid, V, ACC), 0)
        Le_ij = lower(momentum_C, momentum_C, True, C)
        m_C = tl.exp(momentum_C)
        df_C += tl.where(c == last, WS, 0.0)
        La_row = row_of(La_ij, last, C)
        G_row = tl.sum(La_row[:, None] * Le_ij, 0)
        dLa_ij = df_C[:, None] * m_C[None, :]
        dLa_ij += tl.where(c[:, None] == last, tl.sum(Le_ij * drow_C[None, :], 1)[None, :], 0.0)
        dLa_ij *= La_ij
        dLe_ij = La_row[:, None] * drow_C[None, :]
        dLe_ij += tl.where(c[:, None] == last, (dwl_C * rate_C)[None, :], 0.0)
        dm_C = tl.sum(La_ij * df_C[:, None], 0) + tl.where(c == last, SS, 0.0)
        if MODE >= EXACT:
            La1_ij = lower(seen_C, total_C, False, C)
            dLa1_ij = df1_C[:, None] * m_C[None, :] * La1_ij
            dseen_C += tl.sum(dLa1_ij, 1)
            dtotal_C -= tl.sum(dLa1_ij, 0)
            dm_C += tl.sum(La1_ij * df1_C[:, None], 0)
        dLe_ij *= Le_ij
        dlog_C = tl.cumsum(tl.sum(dLe_ij, 1) - tl.sum(dLe_ij, 0) + dm_C * m_C, 0, reverse=True)
        tl.store(dmomentum + gate, tl.load(dmomentum + gate, mask=kept, other=0.0) + dlog_C, mask=kept)
        drate_C = dwg_C * G_row + dwl_C * row_of(Le_ij, last, C)
    else:
        La_row = row_of(La_ij, last, C)
        dLa_ij = tl.where(c[:, None] == last, (drow_C * La_row)[None, :], 0.0)
        drate_C = dwg_C * La_row
    dtotal_C += tl.sum(dLa_ij, 1) - tl.sum(dLa_ij, 0)
    tl.store(drate + gate, tl.load(drate + gate, mask=kept, other=0.0) + drate_C, mask=kept)
    if DECAY:
        dlog_C = _summed(dtotal_C, dseen_C, MODE)
        tl.store(ddecay + gate, tl.load(ddecay + gate, mask=kept, other=0.0) + dlog_C, mask=kept)


class Gradients(NamedTuple):
    """Adjoints of the tensors of the same names; None where there was no such input."""

    q: Tensor
    k: Tensor
    v: Tensor
    rate: Tensor
    log_decay: Tensor | None
    log_momentum: Tensor | None
    W: Tensor
    S: Tensor | None
    anchor: Tensor | None


def backward(
    inputs: Inputs, state: MemoryState, cu_seqlens: Tensor | None, kept: Kept, do: Tensor, dstate: MemoryState,
    *, mode: int, chunk: int,
) -> Gradients:  # fmt: skip
    """Adjoints of all inputs; `do` (B, T, V, E) dense, `dstate` those of the end state."""
    layout = Layout.of(inputs, state, cu_seqlens, chunk)
    (q, k, v, rate, decay, momentum), device = inputs, inputs.v.device
    P, Tinv, vectors = prepared(inputs, state, cu_seqlens, layout, mode)
    shape = (*v.shape[:3], layout.D)
    dq, dk, dv = v.new_empty(shape), v.new_empty(shape), torch.empty(v.shape, dtype=v.dtype, device=device)
    gates = [None if gate is None else torch.empty_like(gate) for gate in (rate, decay, momentum)]
    states = [None if part is None else torch.empty_like(part) for part in (state.W, state.S, state.anchor)]
    dkept = [None if part is None else torch.empty_like(part) for part in (kept.W, kept.S)]
    constants = layout.constants(momentum=momentum is not None) | {"MODE": mode}
    q_strides, k_strides, v_strides = strides(q), strides(k), strides(v)
    tuned = options("scan_back", layout)
    scan_back[(triton.cdiv(layout.E, tuned["BE"]), layout.N * layout.V)](
        q, k, do, P, Tinv, vectors, dstate.W, dstate.S, dstate.anchor, dv, *states, *dkept,
        cu_seqlens, state.offset, *q_strides, *k_strides, layout.T, layout.slots, layout.D, layout.E,
        **tuned, **constants,
    )  # fmt: skip
    # The walk is over: what it read of P and T is free for the adjoints of q kᵀ and k kᵀ.
    sizes = (layout.T, layout.N, layout.slots, layout.D, layout.E)
    constants |= {"BN": triton.next_power_of_2(layout.N), "DECAY": decay is not None}
    scores[(layout.all_slots, layout.V)](
        q, k, v, kept.E, do, dv, rate, decay, momentum, P, Tinv, *gates, cu_seqlens, state.offset,
        *q_strides, *k_strides, *v_strides, *sizes,
        **options("scores", layout), **constants,
    )  # fmt: skip
    gather[(layout.all_slots, layout.V)](
        q, k, v, kept.E, do, dv, rate, decay, momentum, vectors, kept.W, kept.S, state.anchor, *dkept, P, Tinv,
        dq, dk, *gates, cu_seqlens, state.offset, *q_strides, *k_strides, *v_strides, *sizes,
        **options("gather", layout), **constants,
    )  # fmt: skip
    if layout.group > 1:
        dq, dk = (part.unflatten(2, (-1, layout.group)).sum(3) for part in (dq, dk))
    return Gradients(dq, dk, dv, *gates, *states)
