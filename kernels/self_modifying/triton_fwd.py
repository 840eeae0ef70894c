"""The forward kernel of `self_modifying`: the walk over a sequence's chunks.

The mathematics is `reference.chunk_step`'s. The matrices of one head lie in global memory, which is the second-level
cache where they are used, and are changed there in place, one after another. As Hopper's compilers mistake products of
transposed accumulators, keys are written and read again for what needs them transposed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from clplat.kernels.delta_memory.triton_fwd import inverse
from clplat.kernels.delta_memory.triton_tiles import (
    chunk_rows,
    first_slot,
    load_tile,
    load_turned,
    num_chunks,
    owner,
    rows_at,
    sequence,
    store_tile,
)
from clplat.kernels.self_modifying.triton_tiles import (
    DECAY_,
    KEY,
    KEY_SHARE,
    MEETS,
    NUM_MADE,
    NUM_SQUARES,
    RATE,
    STEPS,
    TURNS,
    VALUE,
    VALUE_SHARE,
    Z_DECAY,
    Z_RATE,
    between,
    decays,
    dot,
    gates_of,
    load_matrix,
    plus,
    readout,
    shortening,
    store_matrix,
    unit_share,
)


@triton.jit
def walk(
    x, q, log_momentum, damping, rate_readout, rate_bias, decay_readout, decay_bias, W, S, anchor, end_anchor, o,
    keys, values, starts_W, starts_S, kept_W, kept_S, slopes, answers, squares, made, cu_seqlens, offsets,
    x_row, x_token, x_head, x_memory, q_row, q_token, q_head, max_rate, max_gradient, T, N, slots, group_slots,
    H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, C: tl.constexpr, PER: tl.constexpr, BD: tl.constexpr,
    BN: tl.constexpr, DECAY: tl.constexpr, MOMENTUM: tl.constexpr, ERASE: tl.constexpr, DIFFERENCE: tl.constexpr,
    BOUNDED: tl.constexpr, UNIT: tl.constexpr, OWN: tl.constexpr, SELF: tl.constexpr, ANCHOR: tl.constexpr,
    READ: tl.constexpr, KEEP: tl.constexpr, MARK: tl.constexpr, GROUPED: tl.constexpr, PACKED: tl.constexpr,
    OFFSETS: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Brings W and S of one sequence and head, in place, from where it begins to its end.

    READ: writes the outputs. MARK: writes the states before every PER chunks. GROUPED: a program walks such a group
    alone, beginning with its own row of W and S. KEEP: writes what the backward pass needs of every chunk: W and S at
    its start, `slopes`, what memories answer to keys just before they are written (`answers`), and what they share.
    """
    size: tl.constexpr = D * D
    step: tl.constexpr = H * D * D
    head = tl.program_id(1)
    n, group = tl.program_id(0), 0
    if GROUPED:
        n, group = owner(tl.program_id(0), cu_seqlens, group_slots, N, C * PER, PACKED, BN)
    row, first, length, offset = sequence(n, cu_seqlens, offsets, T, PACKED, OFFSETS)
    count = num_chunks(length, offset, C)
    begin, end = group * PER, count
    if GROUPED:
        end = tl.minimum(count, begin + PER)
    own = (tl.program_id(0) * M * H + head).to(tl.int64) * size
    c, d = tl.arange(0, C), tl.arange(0, BD)
    x = rows_at(x, row, first, head, x_row, x_token, x_head)
    q = rows_at(q, row, first, head, q_row, q_token, q_head)
    r_D = tl.load(rate_readout + head * D + d, mask=d < D, other=0.0)
    r_bias, s_D, s_bias = tl.load(rate_bias + head), r_D, 0.0
    if DECAY:
        s_D, s_bias = tl.load(decay_readout + head * D + d, mask=d < D, other=0.0), tl.load(decay_bias + head)
    slot = first_slot(n, cu_seqlens, slots, C, PACKED).to(tl.int64)
    for i in range(begin, end):
        start, valid = chunk_rows(i, length, offset, C)
        token, place = (row * T + first + start).to(tl.int64) * H + head, (slot + i) * H + head
        resumed = (i == 0) & (offset > 0)
        x_CD = load_tile(x + start * x_token, c, valid, x_token, d, D, UPCAST)
        narrow = x_CD.dtype
        if MARK:
            if i % PER == 0:
                mark = (first_slot(n, cu_seqlens, group_slots, C * PER, PACKED) + i // PER).to(tl.int64) * M * step
                mark += head * size
                for m in range(M):
                    store_matrix(starts_W + mark + m * step, load_matrix(W + own + m * step, D, BD, False), D, BD)
                    if MOMENTUM:
                        store_matrix(starts_S + mark + m * step, load_matrix(S + own + m * step, D, BD, False), D, BD)
        source = W + own
        if OFFSETS:
            if resumed:
                source = anchor + (n * M * H + head).to(tl.int64) * size
        if ANCHOR:
            if (i == count - 1) & (not resumed):
                for m in range(M):
                    store_matrix(end_anchor + own + m * step, load_matrix(W + own + m * step, D, BD, False), D, BD)
        k_CD = dot(x_CD, load_matrix(source + KEY * step, D, BD, False).to(narrow), ACC, PRECISION)
        k_share_C, v_share_C = unit_share(k_CD), tl.zeros([C], dtype=ACC) + 1.0
        k_CD *= k_share_C[:, None]
        if OWN:
            x_CD = load_tile(x + VALUE * x_memory + start * x_token, c, valid, x_token, d, D, UPCAST)
        v_CD = dot(x_CD, load_matrix(source + VALUE * step, D, BD, False).to(narrow), ACC, PRECISION)
        if UNIT:
            v_share_C = unit_share(v_CD)
            v_CD *= v_share_C[:, None]
        store_tile(keys + token * D, k_CD, c, valid, H * D, d, D)
        if OWN:
            x_CD = load_tile(x + RATE * x_memory + start * x_token, c, valid, x_token, d, D, UPCAST)
        z_C = readout(load_matrix(source + RATE * step, D, BD, False), r_D, x_CD, r_bias, ACC)[0]
        zd_C = z_C
        if DECAY:
            if OWN:
                x_CD = load_tile(x + DECAY_ * x_memory + start * x_token, c, valid, x_token, d, D, UPCAST)
            zd_C = readout(load_matrix(source + DECAY_ * step, D, BD, False), s_D, x_CD, s_bias, ACC)[0]
        e_C, damping_C, decay_C, momentum_C, there_C = gates_of(
            z_C, zd_C, log_momentum + token if MOMENTUM else None, damping + token if damping is not None else None,
            max_rate, c, valid, H, C, DECAY, MOMENTUM, ACC,
        )  # fmt: skip
        rate_C = e_C * damping_C
        b1_C, f1_C, a_end_C, g_end_C, l_end_C, b_end, f_end, m_end = decays(
            decay_C, momentum_C, there_C, MOMENTUM, C
        )  # fmt: skip
        A1_ij, G1_ij = between(decay_C, momentum_C, there_C, narrow, MOMENTUM, C, ACC, PRECISION)
        kk_C = tl.sum(k_CD * k_CD, 1)
        difference_CD = (k_CD - v_CD if DIFFERENCE else -v_CD).to(narrow)
        k_CD = k_CD.to(narrow)
        tl.debug_barrier()
        k_DC = load_turned(keys + token * D, c, valid, H * D, d, D, UPCAST)
        if ERASE:
            KK_ij = dot(k_CD, k_DC, ACC, PRECISION)
            turn_ij = inverse(KK_ij * A1_ij * e_C[None, :], C, ACC, PRECISION).to(narrow)
            KG_ij = (KK_ij * G1_ij).to(narrow)
        if KEEP:
            here = squares + place * NUM_SQUARES * C * C
            store_tile(here + STEPS * C * C, G1_ij, c, C, C, c, C)
            if ERASE:
                store_tile(here + MEETS * C * C, KK_ij, c, C, C, c, C)
                store_tile(here + TURNS * C * C, turn_ij, c, C, C, c, C)
            store_tile(values + token * D, v_CD, c, valid, H * D, d, D)
            found = made + place * NUM_MADE * C + c
            tl.store(found + Z_RATE * C, z_C)
            tl.store(found + Z_DECAY * C, zd_C)
            tl.store(found + KEY_SHARE * C, k_share_C)
            tl.store(found + VALUE_SHARE * C, v_share_C)
        for m in range(M):
            at = own + m * step
            w_DD = load_matrix(W + at, D, BD, False)
            wn_DD = w_DD.to(narrow)
            a_DD = load_matrix(source + m * step, D, BD, False).to(narrow) if OFFSETS else wn_DD
            if SELF:
                g_CD = dot(difference_CD, a_DD, ACC, PRECISION)
            else:
                g_CD = -v_CD
                if DIFFERENCE:
                    g_CD = plus(g_CD, k_CD, a_DD, ACC, PRECISION)
            share_C, _ = shortening(g_CD, kk_C, max_gradient, BOUNDED, C, ACC)
            steps_CD = (-rate_C * share_C)[:, None] * g_CD
            move_CD = g_end_C[:, None] * steps_CD
            after_DD = b_end * w_DD
            if MOMENTUM:
                s_DD = load_matrix(S + at, D, BD, False)
                sn_DD = s_DD.to(narrow)
                after_DD += f_end * s_DD
                pushed_DD = plus(m_end * s_DD, k_DC, (l_end_C[:, None] * steps_CD).to(narrow), ACC, PRECISION)
            if ERASE:
                f_CD = b1_C[:, None] * dot(k_CD, wn_DD, ACC, PRECISION)
                if MOMENTUM:
                    f_CD += f1_C[:, None] * dot(k_CD, sn_DD, ACC, PRECISION)
                f_CD = plus(f_CD, KG_ij, steps_CD.to(narrow), ACC, PRECISION)
                f_CD = dot(turn_ij, f_CD.to(narrow), ACC, PRECISION)
                erased_CD = -e_C[:, None] * f_CD
                move_CD += a_end_C[:, None] * erased_CD
            after_DD = plus(after_DD, k_DC, move_CD.to(narrow), ACC, PRECISION)
            if READ:
                if m == M - 1:
                    q_CD = load_tile(q + start * q_token, c, valid, q_token, d, D, UPCAST)
                    # Once more, as what lived through the loop would take the registers that its products need.
                    kept_ij, left_ij = between(decay_C, momentum_C, there_C, narrow, MOMENTUM, C, ACC, PRECISION)
                    QK_ij = dot(q_CD, k_DC, ACC, PRECISION)
                    o_CD = b1_C[:, None] * dot(q_CD, wn_DD, ACC, PRECISION)
                    if MOMENTUM:
                        o_CD += f1_C[:, None] * dot(q_CD, sn_DD, ACC, PRECISION)
                    o_CD = plus(o_CD, (QK_ij * left_ij).to(narrow), steps_CD.to(narrow), ACC, PRECISION)
                    if ERASE:
                        o_CD = plus(o_CD, (QK_ij * kept_ij).to(narrow), erased_CD.to(narrow), ACC, PRECISION)
                    store_tile(o + token * D, o_CD, c, valid, H * D, d, D)
            if KEEP:
                kept = (place * M + m) * size
                store_matrix(kept_W + kept, w_DD, D, BD)
                if MOMENTUM:
                    store_matrix(kept_S + kept, s_DD, D, BD)
                store_tile(slopes + (token * M + m) * D, g_CD, c, valid, H * M * D, d, D)
                if ERASE:
                    store_tile(answers + (token * M + m) * D, f_CD, c, valid, H * M * D, d, D)
            # Other threads may not have read yet what these overwrite.
            tl.debug_barrier()
            store_matrix(W + at, after_DD, D, BD)
            if MOMENTUM:
                store_matrix(S + at, pushed_DD, D, BD)
        tl.debug_barrier()
        # What the next chunk begins with must be there for all threads.
        tl.debug_barrier()
