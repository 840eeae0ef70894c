"""The forward kernels of `delta_memory`: what a chunk knows by itself, all chunks at once, then the walk over chunks.

The mathematics is `reference.chunk_step`'s. `prepare` computes P = tril(q kᵀ) ∘ G ∘ rate, T = (I + A)⁻¹ and the vectors
of gates; `scan` carries W and S from chunk to chunk in registers, each program one block of value columns.
"""

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
    GDN,
    HEBB,
    M_,
    NUM_VECTORS,
    WG_,
    WL_,
    chunk_of,
    chunk_rows,
    factors,
    first_slot,
    last_row,
    load_row,
    load_tile,
    lower,
    num_chunks,
    rows_at,
    running,
    running_back,
    sequence,
    store_tile,
    store_turned,
)


@triton.jit
def inverse(A_ij, C: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """(I + A)⁻¹ of a strictly lower triangular A: inverses of ever larger diagonal blocks, joined two by two.

    Every intermediate is a block of the true inverse, so that keys that resemble each other do no harm; a Neumann
    series would explode on them.
    """
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    T_ij = tl.where(i == j, 1.0, 0.0).to(ACC) - tl.where((i == j + 1) & (i % 2 == 1), A_ij, 0.0)
    for level in tl.static_range(1, 6):
        if (1 << level) < C:
            corner = (i // (1 << level) == j // (1 << level) + 1) & ((i // (1 << level)) % 2 == 1)
            joint_ij = tl.dot(tl.where(corner, A_ij, 0.0), T_ij, input_precision=PRECISION, out_dtype=ACC)
            T_ij -= tl.dot(T_ij, joint_ij, input_precision=PRECISION, out_dtype=ACC)
    return T_ij


@triton.jit
def prepare(
    q, k, rate, log_decay, log_momentum, P, Tinv, vectors, cu_seqlens, offsets,
    q_row, q_token, q_head, k_row, k_token, k_head, T, N, slots, D,
    V: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, MODE: tl.constexpr,
    DECAY: tl.constexpr, MOMENTUM: tl.constexpr, PACKED: tl.constexpr, OFFSETS: tl.constexpr, UPCAST: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one chunk and value head: P (C, C), T (C, C) in the modes that need it, and the vectors (7, C)."""
    slot, head = tl.program_id(0), tl.program_id(1)
    n, i, row, start, valid, offset = chunk_of(slot, cu_seqlens, offsets, slots, N, T, C, PACKED, OFFSETS, BN)
    if valid <= 0:
        return
    c, d = tl.arange(0, C), tl.arange(0, BD)
    token = (row * T + start).to(tl.int64)
    q = rows_at(q, row, start, head // GROUP, q_row, q_token, q_head)
    k = rows_at(k, row, start, head // GROUP, k_row, k_token, k_head)
    q_CD = load_tile(q, c, valid, q_token, d, D, UPCAST)
    k_CD = load_tile(k, c, valid, k_token, d, D, UPCAST)
    gate = token * V + head
    zero_C = tl.zeros([C], dtype=ACC)
    rate_C = load_row(rate + gate, c, valid, V, ACC)
    decay_C = load_row(log_decay + gate, c, valid, V, ACC) if DECAY else zero_C
    total_C = tl.cumsum(decay_C, 0)
    G_ij, G_row = lower(total_C, total_C, True, C), last_row(total_C, valid - 1, C)
    f_C, wl_C, m_C, b1_C, f1_C = zero_C, zero_C, zero_C, zero_C, zero_C
    if MOMENTUM:
        momentum_C = load_row(log_momentum + gate, c, valid, V, ACC)
        next_C = load_row(log_momentum + gate + V, c, valid - 1, V, ACC)
        sums_C = tl.cumsum(momentum_C, 0)
        Le_ij = lower(sums_C, sums_C, True, C).to(q_CD.dtype)
        G_ij = tl.dot(G_ij.to(q_CD.dtype), Le_ij, input_precision=PRECISION, out_dtype=ACC)
        G_row = running_back(G_row, tl.exp(next_C))
        m_C = tl.exp(sums_C)
        f_C = running(m_C, tl.exp(decay_C))
        wl_C = last_row(sums_C, valid - 1, C) * rate_C
    square = (slot.to(tl.int64) * V + head) * C * C
    P_ij = tl.dot(q_CD, tl.trans(k_CD), input_precision=PRECISION, out_dtype=ACC) * G_ij * rate_C[None, :]
    store_tile(P + square, P_ij, c, C, C, c, C)
    if MODE >= EXACT:
        seen_C = total_C if MODE == GDN else total_C - decay_C
        b1_C = tl.exp(seen_C)
        G_ij = lower(seen_C, total_C, False, C)
        if MOMENTUM:
            G_ij = tl.dot(G_ij.to(q_CD.dtype), Le_ij, input_precision=PRECISION, out_dtype=ACC)
            # f of the token before, with its decay or the present one's.
            last_C = zero_C
            if DECAY:
                last_C = tl.load(log_decay + gate + (c - 1) * V, mask=(c > 0) & (c <= valid), other=0.0).to(ACC)
            f1_C = running(tl.where(c > 0, tl.exp(sums_C - momentum_C), 0.0), tl.exp(last_C))
            f1_C = f1_C * tl.exp(decay_C) if MODE == GDN else f1_C
        A_ij = tl.dot(k_CD, tl.trans(k_CD), input_precision=PRECISION, out_dtype=ACC) * G_ij * rate_C[None, :]
        store_tile(Tinv + square, inverse(A_ij, C, ACC, PRECISION), c, C, C, c, C)
    here = vectors + (slot.to(tl.int64) * V + head) * NUM_VECTORS * C + c
    tl.store(here + B_ * C, tl.exp(total_C))
    tl.store(here + F_ * C, f_C)
    tl.store(here + WG_ * C, G_row * rate_C)
    tl.store(here + WL_ * C, wl_C)
    tl.store(here + M_ * C, m_C)
    tl.store(here + B1_ * C, b1_C)
    tl.store(here + F1_ * C, f1_C)


@triton.jit
def scan(
    q, k, v, P, Tinv, vectors, W, S, anchor, o, W_end, S_end, anchor_end, W_kept, S_kept, E_kept, cu_seqlens, offsets,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, T, slots, D, E,
    V: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, MODE: tl.constexpr,
    MOMENTUM: tl.constexpr, KEEP: tl.constexpr, READ: tl.constexpr, VALUES: tl.constexpr, PACKED: tl.constexpr,
    OFFSETS: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """End states of one sequence, value head and block of value columns, and with READ the outputs.

    With KEEP also what the backward pass needs of every chunk: W and S at its start, and the errors. Without VALUES all
    values are zero: how the memory would move by itself.
    """
    e, n, head = tl.program_id(0) * BE + tl.arange(0, BE), tl.program_id(1) // V, tl.program_id(1) % V
    row, first, length, offset = sequence(n, cu_seqlens, offsets, T, PACKED, OFFSETS)
    c, d = tl.arange(0, C), tl.arange(0, BD)
    state = (n * V + head).to(tl.int64) * D * E
    W_DE = load_tile(W + state, d, D, E, e, E, False).to(ACC)
    S_DE = load_tile(S + state, d, D, E, e, E, False).to(ACC) if MOMENTUM else W_DE
    q = rows_at(q, row, first, head // GROUP, q_row, q_token, q_head)
    k = rows_at(k, row, first, head // GROUP, k_row, k_token, k_head)
    v = rows_at(v, row, first, head, v_row, v_token, v_head)
    token = (row * T + first).to(tl.int64)
    if READ:
        o += (token * V + head) * E
    if KEEP and MODE != HEBB:
        E_kept += (token * V + head) * E
    slot = (first_slot(n, cu_seqlens, slots, C, PACKED)).to(tl.int64) * V + head
    count = num_chunks(length, offset, C)
    _, valid = chunk_rows(0, length, offset, C)
    b_C, f_C, wg_C, wl_C, b1_C, f1_C, b_end, f_end, m_end = factors(vectors, slot, valid, MODE, MOMENTUM, C)
    for i in range(count):
        start, valid = chunk_rows(i, length, offset, C)
        place = slot + i * V
        ahead = tl.minimum(i + 1, count - 1)
        _, ahead_valid = chunk_rows(ahead, length, offset, C)
        next_b_C, next_f_C, next_wg_C, next_wl_C, next_b1_C, next_f1_C, next_b, next_f, next_m = factors(
            vectors, slot + ahead * V, ahead_valid, MODE, MOMENTUM, C
        )
        W_now = W_DE.to(v.dtype.element_ty) if not UPCAST else W_DE
        if KEEP:
            store_turned(W_kept + place * D * E, W_DE, e, E, D, d, D)
        if anchor_end is not None:
            if i == count - 1:
                store_tile(anchor_end + state, W_DE, d, D, E, e, E)
        if VALUES:
            v_CE = load_tile(v + start * v_token, c, valid, v_token, e, E, UPCAST)
        else:
            v_CE = tl.zeros([C, BE], dtype=W_now.dtype)
        k_CD = load_tile(k + start * k_token, c, valid, k_token, d, D, UPCAST)
        if MODE == HEBB:
            E_CE = -v_CE.to(ACC)
        elif MODE == FROZEN:
            source = W_now
            if OFFSETS:
                if (i == 0) & (offset > 0):
                    source = load_tile(anchor + state, d, D, E, e, E, False).to(W_now.dtype)
                    if count == 1:
                        store_tile(anchor_end + state, source, d, D, E, e, E)
            E_CE = tl.dot(k_CD, source, -v_CE.to(ACC), input_precision=PRECISION, out_dtype=ACC)
        else:
            R_CE = b1_C[:, None] * tl.dot(k_CD, W_now, input_precision=PRECISION, out_dtype=ACC) - v_CE
            if MOMENTUM:
                S_now = S_DE.to(W_now.dtype)
                R_CE += f1_C[:, None] * tl.dot(k_CD, S_now, input_precision=PRECISION, out_dtype=ACC)
            T_ij = load_tile(Tinv + place * C * C, c, C, C, c, C, UPCAST)
            E_CE = tl.dot(T_ij, R_CE.to(T_ij.dtype), input_precision=PRECISION, out_dtype=ACC)
        if KEEP and MODE != HEBB:
            store_tile(E_kept + start * V * E, E_CE, c, valid, V * E, e, E)
        if READ:
            q_CD = load_tile(q + start * q_token, c, valid, q_token, d, D, UPCAST)
            P_ij = load_tile(P + place * C * C, c, C, C, c, C, UPCAST)
            o_CE = b_C[:, None] * tl.dot(q_CD, W_now, input_precision=PRECISION, out_dtype=ACC)
            if MOMENTUM:
                o_CE += f_C[:, None] * tl.dot(q_CD, S_DE.to(W_now.dtype), input_precision=PRECISION, out_dtype=ACC)
            o_CE = tl.dot(P_ij, (-E_CE).to(P_ij.dtype), o_CE, input_precision=PRECISION, out_dtype=ACC)
            store_tile(o + start * V * E, o_CE, c, valid, V * E, e, E)
        k_DC = tl.trans(k_CD)
        W_DE *= b_end
        if MOMENTUM:
            W_DE += f_end * S_DE
            if KEEP:
                store_turned(S_kept + place * D * E, S_DE, e, E, D, d, D)
            S_DE *= m_end
            S_DE = tl.dot(k_DC, (-wl_C[:, None] * E_CE).to(k_DC.dtype), S_DE, input_precision=PRECISION, out_dtype=ACC)
        W_DE = tl.dot(k_DC, (-wg_C[:, None] * E_CE).to(k_DC.dtype), W_DE, input_precision=PRECISION, out_dtype=ACC)
        b_C, f_C, wg_C, wl_C, b1_C, f1_C = next_b_C, next_f_C, next_wg_C, next_wl_C, next_b1_C, next_f1_C
        b_end, f_end, m_end = next_b, next_f, next_m
    store_tile(W_end + state, W_DE, d, D, E, e, E)
    if MOMENTUM:
        store_tile(S_end + state, S_DE, d, D, E, e, E)


@triton.jit
def linear(
    q, k, v, rate, log_decay, W, o, W_end, cu_seqlens, offsets,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, T, D, E,
    V: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, DECAY: tl.constexpr,
    MOMENTUM: tl.constexpr, PACKED: tl.constexpr, OFFSETS: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`prepare` and `scan` in one for linear attention whose backward pass is not wanted: P never leaves the chip."""
    e, n, head = tl.program_id(0) * BE + tl.arange(0, BE), tl.program_id(1) // V, tl.program_id(1) % V
    row, first, length, offset = sequence(n, cu_seqlens, offsets, T, PACKED, OFFSETS)
    c, d = tl.arange(0, C), tl.arange(0, BD)
    state = (n * V + head).to(tl.int64) * D * E
    W_DE = load_tile(W + state, d, D, E, e, E, False).to(ACC)
    q = rows_at(q, row, first, head // GROUP, q_row, q_token, q_head)
    k = rows_at(k, row, first, head // GROUP, k_row, k_token, k_head)
    v = rows_at(v, row, first, head, v_row, v_token, v_head)
    gates = (row * T + first).to(tl.int64) * V + head
    o += gates * E
    count = num_chunks(length, offset, C)
    _, valid = chunk_rows(0, length, offset, C)
    rate_C, decay_C = gates_of(rate, log_decay, gates, c, valid, V, DECAY, C, ACC)
    for i in range(count):
        start, valid = chunk_rows(i, length, offset, C)
        # Gates are asked for one chunk ahead, as in `scan`.
        ahead, ahead_valid = chunk_rows(i + 1, length, offset, C)
        next_rate_C, next_decay_C = gates_of(rate, log_decay, gates + ahead * V, c, ahead_valid, V, DECAY, C, ACC)
        q_CD = load_tile(q + start * q_token, c, valid, q_token, d, D, UPCAST)
        k_CD = load_tile(k + start * k_token, c, valid, k_token, d, D, UPCAST)
        v_CE = load_tile(v + start * v_token, c, valid, v_token, e, E, UPCAST)
        total_C = tl.cumsum(decay_C, 0)
        end = tl.sum(decay_C, 0)
        k_DC = tl.trans(k_CD)
        P_ij = tl.dot(q_CD, k_DC, input_precision=PRECISION, out_dtype=ACC)
        P_ij *= lower(total_C, total_C, True, C) * rate_C[None, :]
        o_CE = tl.dot(q_CD, W_DE.to(q_CD.dtype), input_precision=PRECISION, out_dtype=ACC) * tl.exp(total_C)[:, None]
        o_CE = tl.dot(P_ij.to(q_CD.dtype), v_CE, o_CE, input_precision=PRECISION, out_dtype=ACC)
        store_tile(o + start * V * E, o_CE, c, valid, V * E, e, E)
        written_CE = (tl.exp(end - total_C) * rate_C)[:, None] * v_CE
        W_DE *= tl.exp(end)
        W_DE = tl.dot(k_DC, written_CE.to(q_CD.dtype), W_DE, input_precision=PRECISION, out_dtype=ACC)
        rate_C, decay_C = next_rate_C, next_decay_C
    store_tile(W_end + state, W_DE, d, D, E, e, E)


@triton.jit
def gates_of(rate, log_decay, place, c, valid, V, DECAY: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    """Rates and log decays of a chunk's tokens, zero where it has none."""
    rate_C = load_row(rate + place, c, valid, V, ACC)
    decay_C = load_row(log_decay + place, c, valid, V, ACC) if DECAY else tl.zeros([C], dtype=ACC)
    return rate_C, decay_C
