"""The forward kernels of `mlp_memory`: what a chunk knows by itself, all chunks at once, then the walk over chunks.

The mathematics is `reference.chunk_step`'s. A memory is too large for registers: it lies in global memory, which is
the second-level cache where it is used, and is changed there in place, a block of inner features at a time.

Hopper's compilers mistake products of transposed accumulators, so that only what was loaded is ever transposed; the
hidden features are computed in both orders instead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from clplat.kernels.delta_memory.triton_tiles import (
    B_,
    F_,
    FROZEN,
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
    load_turned,
    lower,
    num_chunks,
    owner,
    rows_at,
    running,
    running_back,
    sequence,
    store_tile,
)
from clplat.kernels.mlp_memory.triton_tiles import activated, copied, load_layers, slope, store_layers


@triton.jit
def prepare(
    q, k, rate, log_decay, log_momentum, P, R, vectors, cu_seqlens, offsets,
    q_row, q_token, q_head, k_row, k_token, k_head, T, N, slots,
    D: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, DECAY: tl.constexpr,
    MOMENTUM: tl.constexpr, PACKED: tl.constexpr, OFFSETS: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one chunk and head: R = G ∘ rate and P = q kᵀ ∘ R (C, C), and the vectors of gates that `factors` reads."""
    slot, head = tl.program_id(0), tl.program_id(1)
    n, i, row, start, valid, offset = chunk_of(slot, cu_seqlens, offsets, slots, N, T, C, PACKED, OFFSETS, BN)
    if valid <= 0:
        return
    c, d = tl.arange(0, C), tl.arange(0, BD)
    gate = (row * T + start).to(tl.int64) * V + head
    q_CD = load_tile(rows_at(q, row, start, head, q_row, q_token, q_head), c, valid, q_token, d, D, UPCAST)
    k_CD = load_tile(rows_at(k, row, start, head, k_row, k_token, k_head), c, valid, k_token, d, D, UPCAST)
    zero_C = tl.zeros([C], dtype=ACC)
    rate_C = load_row(rate + gate, c, valid, V, ACC)
    decay_C = load_row(log_decay + gate, c, valid, V, ACC) if DECAY else zero_C
    total_C = tl.cumsum(decay_C, 0)
    G_ij, G_row = lower(total_C, total_C, True, C), last_row(total_C, valid - 1, C)
    place = slot.to(tl.int64) * V + head
    here = vectors + place * NUM_VECTORS * C + c
    if MOMENTUM:
        momentum_C = load_row(log_momentum + gate, c, valid, V, ACC)
        next_C = load_row(log_momentum + gate + V, c, valid - 1, V, ACC)
        sums_C = tl.cumsum(momentum_C, 0)
        Le_ij = lower(sums_C, sums_C, True, C).to(q_CD.dtype)
        G_ij = tl.dot(G_ij.to(q_CD.dtype), Le_ij, input_precision=PRECISION, out_dtype=ACC)
        G_row = running_back(G_row, tl.exp(next_C))
        m_C = tl.exp(sums_C)
        tl.store(here + M_ * C, m_C)
        tl.store(here + F_ * C, running(m_C, tl.exp(decay_C)))
        tl.store(here + WL_ * C, last_row(sums_C, valid - 1, C) * rate_C)
    tl.store(here + B_ * C, tl.exp(total_C))
    tl.store(here + WG_ * C, G_row * rate_C)
    R_ij = G_ij * rate_C[None, :]
    store_tile(R + place * C * C, R_ij, c, C, C, c, C)
    P_ij = tl.dot(q_CD, tl.trans(k_CD), input_precision=PRECISION, out_dtype=ACC) * R_ij
    store_tile(P + place * C * C, P_ij, c, C, C, c, C)


@triton.jit
def walk(
    q, k, v, P, R, vectors, states, o, errors, kept, starts, cu_seqlens, offsets,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, T, N, slots, group_slots,
    D: tl.constexpr, J: tl.constexpr, E: tl.constexpr, V: tl.constexpr, C: tl.constexpr, PER: tl.constexpr,
    BD: tl.constexpr, BJ: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, PAIRS: tl.constexpr, ACT: tl.constexpr,
    DOT: tl.constexpr, RESIDUAL: tl.constexpr, MOMENTUM: tl.constexpr, ANCHOR: tl.constexpr, READ: tl.constexpr,
    KEEP: tl.constexpr, MARK: tl.constexpr, GROUPED: tl.constexpr, PACKED: tl.constexpr, OFFSETS: tl.constexpr,
    UPCAST: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Brings `states` of one sequence and head, in place, from where it begins to its end.

    READ: writes the outputs. MARK: writes `starts`, the memory before every PER chunks. GROUPED: a program walks such a
    group alone, beginning with its own row of `states`. KEEP: writes weights and momentum at every chunk's start, in
    the inputs' type, and the chunk's errors.
    """
    size: tl.constexpr = J * (D + E)
    head = tl.program_id(1)
    n, group = tl.program_id(0), 0
    if GROUPED:
        n, group = owner(tl.program_id(0), cu_seqlens, group_slots, N, C * PER, PACKED, BN)
    row, first, length, offset = sequence(n, cu_seqlens, offsets, T, PACKED, OFFSETS)
    count = num_chunks(length, offset, C)
    begin, end = group * PER, count
    if GROUPED:
        end = tl.minimum(count, begin + PER)
    own = states + (tl.program_id(0) * V + head).to(tl.int64) * PAIRS * size
    mark = starts
    if MARK:
        mark += (first_slot(n, cu_seqlens, group_slots, C * PER, PACKED).to(tl.int64) * V + head) * PAIRS * size
    c, d, e = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BE)
    q = rows_at(q, row, first, head, q_row, q_token, q_head)
    k = rows_at(k, row, first, head, k_row, k_token, k_head)
    v = rows_at(v, row, first, head, v_row, v_token, v_head)
    token = ((row * T + first).to(tl.int64) * V + head) * E
    slot = first_slot(n, cu_seqlens, slots, C, PACKED).to(tl.int64)
    for i in range(begin, end):
        start, valid = chunk_rows(i, length, offset, C)
        place = (slot + i) * V + head
        b_C, f_C, wg_C, wl_C, _, _, b_end, f_end, m_end = factors(vectors, place, valid, FROZEN, MOMENTUM, C)
        k_CD = load_tile(k + start * k_token, c, valid, k_token, d, D, UPCAST)
        k_DC = load_turned(k + start * k_token, c, valid, k_token, d, D, UPCAST)
        v_CE = load_tile(v + start * v_token, c, valid, v_token, e, E, UPCAST)
        narrow = k_CD.dtype
        if MARK:
            if i % PER == 0:
                copied(own, mark + (i // PER) * V * PAIRS * size, PAIRS * size, 2048)
        source = own
        if ANCHOR:
            anchor = own + (PAIRS - 1) * size
            if OFFSETS:
                source = own + tl.where((i == 0) & (offset > 0), (PAIRS - 1) * size, 0)
            if (i == count - 1) & ((i > 0) | (offset <= 0)):
                copied(own, anchor, size, 2048)
        e_CE = -v_CE.to(ACC)
        if not DOT:
            for block in range(0, J, BJ):
                a_DJ, a_JE = load_layers(source, block + tl.arange(0, BJ), D, J, E, BD, BE, False)
                z_CJ = tl.dot(k_CD, a_DJ.to(narrow), input_precision=PRECISION, out_dtype=ACC)
                h_CJ = activated(z_CJ, ACT).to(narrow)
                e_CE = tl.dot(h_CJ, a_JE.to(narrow), e_CE, input_precision=PRECISION, out_dtype=ACC)
            if RESIDUAL:
                e_CE += k_CD.to(ACC)
        if KEEP:
            store_tile(errors + token + start * V * E, e_CE, c, valid, V * E, e, E)
        if READ:
            q_CD = load_tile(q + start * q_token, c, valid, q_token, d, D, UPCAST)
            P_ij = load_tile(P + place * C * C, c, C, C, c, C, UPCAST)
            X_ij, o_CE = tl.zeros([C, C], dtype=ACC), tl.zeros([C, BE], dtype=ACC)
        slopes_CE = e_CE.to(narrow)
        kg_DC, kl_DC = (-wg_C[None, :] * k_DC).to(narrow), (-wl_C[None, :] * k_DC).to(narrow)
        eg_CE, el_CE = (-wg_C[:, None] * e_CE).to(narrow), (-wl_C[:, None] * e_CE).to(narrow)
        for block in range(0, J, BJ):
            inner = block + tl.arange(0, BJ)
            w_DJ, w_JE = load_layers(own, inner, D, J, E, BD, BE, False)
            a_DJ, a_JE = w_DJ.to(narrow), w_JE.to(narrow)
            if OFFSETS:
                a_DJ, a_JE = load_layers(source, inner, D, J, E, BD, BE, False)
                a_DJ, a_JE = a_DJ.to(narrow), a_JE.to(narrow)
            z_CJ = tl.dot(k_CD, a_DJ, input_precision=PRECISION, out_dtype=ACC)
            u_CJ = tl.dot(slopes_CE, tl.trans(a_JE), input_precision=PRECISION, out_dtype=ACC)
            d_CJ = (u_CJ * slope(z_CJ, ACT)).to(narrow)
            z_JC = tl.dot(tl.trans(a_DJ), k_DC, input_precision=PRECISION, out_dtype=ACC)
            h_JC = activated(z_JC, ACT).to(narrow)
            if MOMENTUM:
                s_DJ, s_JE = load_layers(own + size, inner, D, J, E, BD, BE, False)
            if READ:
                x_CJ = b_C[:, None] * tl.dot(q_CD, w_DJ.to(narrow), input_precision=PRECISION, out_dtype=ACC)
                if MOMENTUM:
                    x_CJ += f_C[:, None] * tl.dot(q_CD, s_DJ.to(narrow), input_precision=PRECISION, out_dtype=ACC)
                x_CJ -= tl.dot(P_ij, d_CJ, input_precision=PRECISION, out_dtype=ACC)
                hq_CJ = activated(x_CJ, ACT).to(narrow)
                X_ij = tl.dot(hq_CJ, h_JC, X_ij, input_precision=PRECISION, out_dtype=ACC)
                o_CE += b_C[:, None] * tl.dot(hq_CJ, w_JE.to(narrow), input_precision=PRECISION, out_dtype=ACC)
                if MOMENTUM:
                    o_CE += f_C[:, None] * tl.dot(hq_CJ, s_JE.to(narrow), input_precision=PRECISION, out_dtype=ACC)
            if KEEP:
                store_layers(kept + place * (1 + MOMENTUM) * size, w_DJ, w_JE, inner, D, J, E, BD, BE)
            w_DJ *= b_end
            w_JE *= b_end
            if MOMENTUM:
                if KEEP:
                    store_layers(kept + (place * 2 + 1) * size, s_DJ, s_JE, inner, D, J, E, BD, BE)
                w_DJ += f_end * s_DJ
                w_JE += f_end * s_JE
                s_DJ = tl.dot(kl_DC, d_CJ, m_end * s_DJ, input_precision=PRECISION, out_dtype=ACC)
                s_JE = tl.dot(h_JC, el_CE, m_end * s_JE, input_precision=PRECISION, out_dtype=ACC)
            w_DJ = tl.dot(kg_DC, d_CJ, w_DJ, input_precision=PRECISION, out_dtype=ACC)
            w_JE = tl.dot(h_JC, eg_CE, w_JE, input_precision=PRECISION, out_dtype=ACC)
            # Other threads may not have read yet what these overwrite.
            tl.debug_barrier()
            store_layers(own, w_DJ, w_JE, inner, D, J, E, BD, BE)
            if MOMENTUM:
                store_layers(own + size, s_DJ, s_JE, inner, D, J, E, BD, BE)
        if READ:
            R_ij = tl.load(R + place * C * C + c[:, None] * C + c[None, :])
            o_CE -= tl.dot((X_ij * R_ij).to(narrow), slopes_CE, input_precision=PRECISION, out_dtype=ACC)
            if RESIDUAL:
                o_CE += q_CD.to(ACC)
            store_tile(o + token + start * V * E, o_CE, c, valid, V * E, e, E)
        tl.debug_barrier()
