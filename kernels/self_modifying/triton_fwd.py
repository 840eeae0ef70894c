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
    lower,
    num_chunks,
    rows_at,
    sequence,
    store_tile,
)
from clplat.kernels.self_modifying.triton_tiles import (
    A_END,
    B1,
    DECAY_,
    ENDS,
    ERASED,
    F1,
    G_END,
    KEY,
    KEY_SHARE,
    L_END,
    MEETS,
    RATE,
    RATE_,
    SHARES,
    STEPS,
    TURNS,
    VALUE,
    VALUE_SHARE,
    WEIGHED,
    Z_DECAY,
    Z_RATE,
    between,
    decays,
    dot,
    gates_of,
    load_matrix,
    load_rows,
    plus,
    readout,
    shortening,
    store_matrix,
    store_rows,
    turned_rows,
    unit_share,
)


@triton.jit
def walk(
    x, q, log_momentum, damping, rate_readout, rate_bias, decay_readout, decay_bias, W, S, anchor, end_anchor, o,
    keys, differences, kept_W, kept_S, slopes, answers, squares, made, cu_seqlens, offsets,
    x_row, x_token, x_head, x_memory, q_row, q_token, q_head, max_rate, max_gradient, T, slots,
    H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, DECAY: tl.constexpr,
    MOMENTUM: tl.constexpr, ERASE: tl.constexpr, DIFFERENCE: tl.constexpr, BOUNDED: tl.constexpr, UNIT: tl.constexpr,
    OWN: tl.constexpr, SELF: tl.constexpr, ANCHOR: tl.constexpr, KEEP: tl.constexpr, PACKED: tl.constexpr,
    OFFSETS: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Brings W and S of one sequence and head, in place, from where it begins to its end, and writes the outputs.

    KEEP: writes what the backward pass needs of every chunk: W and S at its start, `slopes`, what memories answer to
    keys just before they are written (`answers`), and what they share; else there is room for one chunk of `keys`,
    `differences` and `squares` a program, from which products read them: what lives through the loop takes registers.
    """
    size: tl.constexpr = D * D
    step: tl.constexpr = H * D * D
    n, head = tl.program_id(0), tl.program_id(1)
    row, first, length, offset = sequence(n, cu_seqlens, offsets, T, PACKED, OFFSETS)
    count = num_chunks(length, offset, C)
    own = (n * M * H + head).to(tl.int64) * size
    c, d = tl.arange(0, C), tl.arange(0, BD)
    x = rows_at(x, row, first, head, x_row, x_token, x_head)
    q = rows_at(q, row, first, head, q_row, q_token, q_head)
    r_D = tl.load(rate_readout + head * D + d, mask=d < D, other=0.0)
    r_bias, s_D, s_bias = tl.load(rate_bias + head), r_D, 0.0
    if DECAY:
        s_D, s_bias = tl.load(decay_readout + head * D + d, mask=d < D, other=0.0), tl.load(decay_bias + head)
    slot = first_slot(n, cu_seqlens, slots, C, PACKED).to(tl.int64)
    # Registers are what is short: nothing is moved out of the loops to be held through them.
    for i in tl.range(0, count, disable_licm=True):
        start, valid = chunk_rows(i, length, offset, C)
        token, place = (row * T + first + start).to(tl.int64) * H + head, (slot + i) * H + head
        resumed = (i == 0) & (offset > 0)
        x_CD = load_tile(x + start * x_token, c, valid, x_token, d, D, UPCAST)
        narrow = x_CD.dtype
        spot = place if KEEP else (n * H + head).to(tl.int64)
        key, aim, square = keys + spot * C * D, differences + spot * C * D, squares + spot * (3 + MOMENTUM) * C * C
        source = W + own
        if OFFSETS:
            if resumed:
                source = anchor + (n * M * H + head).to(tl.int64) * size
        if ANCHOR:
            if (i == count - 1) & (not resumed):
                for m in tl.range(M, disable_licm=True):
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
        store_rows(key, k_CD, C, D, BD)
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
        store_rows(aim, k_CD - v_CD if SELF and DIFFERENCE else -v_CD, C, D, BD)
        if ERASE:
            tl.debug_barrier()
            KK_ij = dot(k_CD.to(narrow), turned_rows(key, C, D, BD, UPCAST), ACC, PRECISION)
            store_rows(square + WEIGHED * C * C, KK_ij * G1_ij, C, C, C)
            if KEEP:
                store_rows(square + MEETS * C * C, KK_ij, C, C, C)
            turn_ij = inverse(KK_ij * A1_ij * e_C[None, :], C, ACC, PRECISION)
            store_rows(square + TURNS * C * C, turn_ij, C, C, C)
        if MOMENTUM:
            store_rows(square + STEPS * C * C, G1_ij, C, C, C)
        if KEEP:
            found = made + place * (SHARES + 2 * M) * C + c
            tl.store(found + Z_RATE * C, z_C)
            tl.store(found + Z_DECAY * C, zd_C)
            tl.store(found + KEY_SHARE * C, k_share_C)
            tl.store(found + VALUE_SHARE * C, v_share_C)
            tl.store(found + ERASED * C, e_C)
            tl.store(found + RATE_ * C, rate_C)
            tl.store(found + B1 * C, b1_C)
            tl.store(found + F1 * C, f1_C)
            tl.store(found + A_END * C, a_end_C)
            tl.store(found + G_END * C, g_end_C)
            tl.store(found + L_END * C, l_end_C)
            tl.store(found + ENDS * C, tl.where(c == 0, b_end, tl.where(c == 1, f_end, m_end)))
        tl.debug_barrier()
        for m in tl.range(M, disable_licm=True):
            at, kept = own + m * step, place * M + m
            wn_DD = load_matrix(W + at, D, BD, False).to(narrow)
            a_DD = load_matrix(source + m * step, D, BD, False).to(narrow) if OFFSETS else wn_DD
            key_CD, aim_CD = load_rows(key, C, D, BD, UPCAST), load_rows(aim, C, D, BD, UPCAST)
            if SELF:
                g_CD = dot(aim_CD, a_DD, ACC, PRECISION)
            else:
                g_CD = aim_CD.to(ACC)
                if DIFFERENCE:
                    g_CD = plus(g_CD, key_CD, a_DD, ACC, PRECISION)
            share_C, gg_C = shortening(g_CD, kk_C, max_gradient, BOUNDED, C, ACC)
            steps_CD = (-rate_C * share_C)[:, None] * g_CD
            if KEEP:
                shares = made + (place * (SHARES + 2 * M) + SHARES + 2 * m) * C + c
                tl.store(shares, share_C)
                tl.store(shares + C, gg_C)
                store_matrix(kept_W + kept * size, wn_DD, D, BD)
                store_rows(slopes + kept * C * D, g_CD, C, D, BD)
            if MOMENTUM:
                sn_DD = load_matrix(S + at, D, BD, False).to(narrow)
                if KEEP:
                    store_matrix(kept_S + kept * size, sn_DD, D, BD)
            # What a token writes in all, of which without momentum as much is left as of each part.
            written_CD = steps_CD
            if ERASE:
                f_CD = b1_C[:, None] * dot(key_CD, wn_DD, ACC, PRECISION)
                if MOMENTUM:
                    f_CD += f1_C[:, None] * dot(key_CD, sn_DD, ACC, PRECISION)
                KG_ij = load_rows(square + WEIGHED * C * C, C, C, C, UPCAST)
                f_CD = plus(f_CD, KG_ij, steps_CD.to(narrow), ACC, PRECISION)
                f_CD = dot(load_rows(square + TURNS * C * C, C, C, C, UPCAST), f_CD.to(narrow), ACC, PRECISION)
                if KEEP:
                    store_rows(answers + kept * C * D, f_CD, C, D, BD)
                erased_CD = -e_C[:, None] * f_CD
                written_CD = steps_CD + erased_CD
            if m == M - 1:
                q_CD = load_tile(q + start * q_token, c, valid, q_token, d, D, UPCAST)
                QK_ij = dot(q_CD, turned_rows(key, C, D, BD, UPCAST), ACC, PRECISION)
                o_CD = b1_C[:, None] * dot(q_CD, wn_DD, ACC, PRECISION)
                left_ij = lower(tl.cumsum(decay_C, 0) - decay_C, tl.cumsum(decay_C, 0), False, C)
                if MOMENTUM:
                    o_CD += f1_C[:, None] * dot(q_CD, sn_DD, ACC, PRECISION)
                    if ERASE:
                        o_CD = plus(o_CD, (QK_ij * left_ij).to(narrow), erased_CD.to(narrow), ACC, PRECISION)
                    left_ij = load_rows(square + STEPS * C * C, C, C, C, UPCAST).to(ACC)
                    o_CD = plus(o_CD, (QK_ij * left_ij).to(narrow), steps_CD.to(narrow), ACC, PRECISION)
                else:
                    o_CD = plus(o_CD, (QK_ij * left_ij).to(narrow), written_CD.to(narrow), ACC, PRECISION)
                store_tile(o + token * D, o_CD, c, valid, H * D, d, D)
            move_CD = a_end_C[:, None] * written_CD
            if MOMENTUM:
                move_CD = g_end_C[:, None] * steps_CD
                if ERASE:
                    move_CD += a_end_C[:, None] * erased_CD
            k_DC = turned_rows(key, C, D, BD, UPCAST)
            add_DD = dot(k_DC, move_CD.to(narrow), ACC, PRECISION)
            # Other threads may not have read yet what these overwrite.
            tl.debug_barrier()
            w_DD = load_matrix(W + at, D, BD, False)
            if MOMENTUM:
                s_DD = load_matrix(S + at, D, BD, False)
                add_DD += f_end * s_DD
                push_DD = dot(k_DC, (l_end_C[:, None] * steps_CD).to(narrow), ACC, PRECISION)
                store_matrix(S + at, m_end * s_DD + push_DD, D, BD)
            store_matrix(W + at, b_end * w_DD + add_DD, D, BD)
        # What the next chunk begins with must be there for all threads.
        tl.debug_barrier()
