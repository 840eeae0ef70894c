"""What flows back through the writes of `self_modifying`: the walk from a sequence's last chunk to its first.

Names and rules as in `triton_read_back.py`, whose results it takes up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from clplat.kernels.delta_memory.triton_tiles import (
    chunk_rows,
    first_slot,
    load_tile,
    load_turned,
    lower,
    num_chunks,
    rows_at,
    sequence,
    store_tile,
)
from clplat.kernels.self_modifying.triton_adjoints import add_to, gates_back, load_source, read_out_back
from clplat.kernels.self_modifying.triton_tiles import (
    DECAY_,
    KEY,
    KEY_SHARE,
    LOWEST,
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
    decays,
    dot,
    gates_of,
    load_matrix,
    log_sigmoid,
    plus,
    shortening,
    sigmoid,
    store_matrix,
)


@triton.jit
def write_back(
    x, q, log_momentum, damping, rate_readout, decay_readout, keys, values, anchor, kept_W, kept_S, slopes, answers,
    squares, made, do, dk_read, dsteps, derased, dsquares, dvectors, dW, dS, danchor, dx, dmomentum, ddamping,
    dreadouts, dbiases, cu_seqlens, offsets, x_row, x_token, x_head, x_memory, q_row, q_token, q_head, max_rate,
    max_gradient, T, slots,
    H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, DECAY: tl.constexpr,
    MOMENTUM: tl.constexpr, ERASE: tl.constexpr, DIFFERENCE: tl.constexpr, BOUNDED: tl.constexpr, UNIT: tl.constexpr,
    OWN: tl.constexpr, SELF: tl.constexpr,
    ANCHOR: tl.constexpr, PACKED: tl.constexpr, OFFSETS: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Brings dW, dS and danchor of one sequence and head, in place, from its end to its beginning; finds dx and what
    reaches its gates, and sums what reaches the readouts and their biases."""
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
    s_D = tl.load(decay_readout + head * D + d, mask=d < D, other=0.0) if DECAY else r_D
    dr_D, ds_D = tl.zeros([BD], dtype=ACC), tl.zeros([BD], dtype=ACC)
    dr_bias, ds_bias = tl.sum(dr_D, 0), tl.sum(dr_D, 0)
    slot = first_slot(n, cu_seqlens, slots, C, PACKED).to(tl.int64)
    for back in range(count):
        i = count - 1 - back
        start, valid = chunk_rows(i, length, offset, C)
        token, place = (row * T + first + start).to(tl.int64) * H + head, (slot + i) * H + head
        resumed = (i == 0) & (offset > 0)
        k_CD = load_tile(keys + token * D, c, valid, H * D, d, D, UPCAST)
        k_DC = load_turned(keys + token * D, c, valid, H * D, d, D, UPCAST)
        v_DC = load_turned(values + token * D, c, valid, H * D, d, D, UPCAST)
        narrow = k_CD.dtype
        difference_DC = (k_DC.to(ACC) - v_DC.to(ACC) if DIFFERENCE else -v_DC.to(ACC)).to(narrow)
        found = made + place * NUM_MADE * C + c
        z_C, zd_C = tl.load(found + Z_RATE * C), tl.load(found + Z_DECAY * C)
        e_C, damping_C, decay_C, momentum_C, there_C = gates_of(
            z_C, zd_C, log_momentum + token if MOMENTUM else None,
            damping + token if damping is not None else None, max_rate, c, valid, H, C, DECAY, MOMENTUM, ACC,
        )  # fmt: skip
        rate_C = e_C * damping_C
        b1_C, f1_C, a_end_C, g_end_C, l_end_C, b_end, f_end, m_end = decays(
            decay_C, momentum_C, there_C, MOMENTUM, C
        )  # fmt: skip
        square = squares + place * NUM_SQUARES * C * C
        if ERASE:
            turn_ji = load_turned(square + TURNS * C * C, c, C, C, c, C, UPCAST)
            G1_ji = load_turned(square + STEPS * C * C, c, C, C, c, C, UPCAST).to(ACC)
            KK_ji = load_turned(square + MEETS * C * C, c, C, C, c, C, UPCAST).to(ACC)
            KG_ji = (KK_ji * G1_ji).to(narrow)
        k_wide_CD = k_CD.to(ACC)
        kk_C = tl.sum(k_wide_CD * k_wide_CD, 1)
        dk_CD = load_tile(dk_read + token * D, c, valid, H * D, d, D, False)
        ddifference_CD = tl.zeros([C, BD], dtype=ACC)
        db1_C, df1_C = tl.load(dvectors + place * 2 * C + c), tl.zeros([C], dtype=ACC)
        if MOMENTUM:
            df1_C = tl.load(dvectors + (place * 2 + 1) * C + c)
        da_C, dg_C, dl_C = tl.zeros([C], dtype=ACC), tl.zeros([C], dtype=ACC), tl.zeros([C], dtype=ACC)
        de_C, drate_C = tl.zeros([C], dtype=ACC), tl.zeros([C], dtype=ACC)
        db_end, df_end, dm_end = tl.sum(da_C, 0), tl.sum(da_C, 0), tl.sum(da_C, 0)
        through_F_ij, through_G_ij = tl.zeros([C, C], dtype=ACC), tl.zeros([C, C], dtype=ACC)
        for m in range(M):
            at, kept, tile = own + m * step, (place * M + m) * size, (token * M + m) * D
            w_DD, dw_DD = load_matrix(kept_W + kept, D, BD, UPCAST), load_matrix(dW + at, D, BD, False)
            dwn_DD = dw_DD.to(narrow)
            a_DD = load_source(kept_W + kept, anchor, at, resumed, narrow, D, BD, OFFSETS, UPCAST)
            g_CD = load_tile(slopes + tile, c, valid, H * M * D, d, D, UPCAST).to(ACC)
            share_C, gg_C = shortening(g_CD, kk_C, max_gradient, BOUNDED, C, ACC)
            steps_CD = (-rate_C * share_C)[:, None] * g_CD
            dmove_CD = dot(k_CD, dwn_DD, ACC, PRECISION)
            db_end += tl.sum(tl.sum(w_DD.to(ACC) * dw_DD, 1), 0)
            dg_C += tl.sum(dmove_CD * steps_CD, 1)
            dsteps_CD = g_end_C[:, None] * dmove_CD
            move_CD = g_end_C[:, None] * steps_CD
            before_DD = b_end * dw_DD
            if MOMENTUM:
                s_DD, ds_DD = load_matrix(kept_S + kept, D, BD, UPCAST), load_matrix(dS + at, D, BD, False)
                dsn_DD = ds_DD.to(narrow)
                dpush_CD = dot(k_CD, dsn_DD, ACC, PRECISION)
                dl_C += tl.sum(dpush_CD * steps_CD, 1)
                dsteps_CD += l_end_C[:, None] * dpush_CD
                df_end += tl.sum(tl.sum(s_DD.to(ACC) * dw_DD, 1), 0)
                dm_end += tl.sum(tl.sum(s_DD.to(ACC) * ds_DD, 1), 0)
                dk_CD = plus(dk_CD, (l_end_C[:, None] * steps_CD).to(narrow), tl.trans(dsn_DD), ACC, PRECISION)
                pushed_DD = m_end * ds_DD + f_end * dw_DD
            if m == M - 1:
                dsteps_CD += load_tile(dsteps + token * D, c, valid, H * D, d, D, False)
            if ERASE:
                f_CD = load_tile(answers + tile, c, valid, H * M * D, d, D, UPCAST).to(ACC)
                f_DC = load_turned(answers + tile, c, valid, H * M * D, d, D, UPCAST)
                g_DC = load_turned(slopes + tile, c, valid, H * M * D, d, D, UPCAST).to(ACC)
                erased_CD = -e_C[:, None] * f_CD
                move_CD += a_end_C[:, None] * erased_CD
                derased_CD = a_end_C[:, None] * dmove_CD
                da_C += tl.sum(dmove_CD * erased_CD, 1)
                if m == M - 1:
                    derased_CD += load_tile(derased + token * D, c, valid, H * D, d, D, False)
                de_C -= tl.sum(derased_CD * f_CD, 1)
                back_CD = dot(turn_ji, (-e_C[:, None] * derased_CD).to(narrow), ACC, PRECISION)
                backn_CD = back_CD.to(narrow)
                dsteps_CD = plus(dsteps_CD, KG_ji, backn_CD, ACC, PRECISION)
                through_F_ij = plus(through_F_ij, backn_CD, f_DC, ACC, PRECISION)
                turned_DC = ((-rate_C * share_C)[None, :] * g_DC).to(narrow)
                through_G_ij = plus(through_G_ij, backn_CD, turned_DC, ACC, PRECISION)
                reach_CD = dot(backn_CD, tl.trans(w_DD), ACC, PRECISION)
                db1_C += tl.sum(reach_CD * k_wide_CD, 1)
                dk_CD += b1_C[:, None] * reach_CD
                before_DD = plus(before_DD, k_DC, (b1_C[:, None] * back_CD).to(narrow), ACC, PRECISION)
                if MOMENTUM:
                    reach_CD = dot(backn_CD, tl.trans(s_DD), ACC, PRECISION)
                    df1_C += tl.sum(reach_CD * k_wide_CD, 1)
                    dk_CD += f1_C[:, None] * reach_CD
                    pushed_DD = plus(pushed_DD, k_DC, (f1_C[:, None] * back_CD).to(narrow), ACC, PRECISION)
            dk_CD = plus(dk_CD, move_CD.to(narrow), tl.trans(dwn_DD), ACC, PRECISION)
            drate_C -= tl.sum(dsteps_CD * g_CD, 1) * share_C
            dslope_CD = -rate_C[:, None] * dsteps_CD
            if BOUNDED:
                # A slope that was shortened feels nothing along itself.
                along_C = tl.sum(dslope_CD * g_CD, 1) / tl.maximum(gg_C, 1e-30)
                dslope_CD = share_C[:, None] * (dslope_CD - tl.where(share_C < 1.0, along_C, 0.0)[:, None] * g_CD)
            dslopen_CD = dslope_CD.to(narrow)
            if SELF:
                ddifference_CD = plus(ddifference_CD, dslopen_CD, tl.trans(a_DD), ACC, PRECISION)
                dsource_DD = dot(difference_DC, dslopen_CD, ACC, PRECISION)
            else:
                ddifference_CD += dslope_CD
                dsource_DD = tl.zeros([BD, BD], dtype=ACC)
                if DIFFERENCE:
                    dk_CD = plus(dk_CD, dslopen_CD, tl.trans(a_DD), ACC, PRECISION)
                    dsource_DD = dot(k_DC, dslopen_CD, ACC, PRECISION)
            if m == M - 1:
                q_DC = load_turned(q + start * q_token, c, valid, q_token, d, D, UPCAST).to(ACC)
                do_CD = load_tile(do + token * D, c, valid, H * D, d, D, UPCAST)
                before_DD = plus(before_DD, (q_DC * b1_C[None, :]).to(narrow), do_CD, ACC, PRECISION)
                if MOMENTUM:
                    pushed_DD = plus(pushed_DD, (q_DC * f1_C[None, :]).to(narrow), do_CD, ACC, PRECISION)
            # Other threads may not have read yet what these overwrite.
            tl.debug_barrier()
            if ANCHOR:
                if resumed:
                    add_to(danchor + at, dsource_DD, D, BD)
                    dsource_DD *= 0.0
                elif i == count - 1:
                    dsource_DD += load_matrix(danchor + at, D, BD, False)
                    tl.debug_barrier()
                    store_matrix(danchor + at, tl.zeros([BD, BD], dtype=ACC), D, BD)
            store_matrix(dW + at, before_DD + dsource_DD, D, BD)
            if MOMENTUM:
                store_matrix(dS + at, pushed_DD, D, BD)
        dA1_ij, dG1_ij = (
            tl.zeros([C, C], dtype=ACC),
            tl.load(dsquares + place * 2 * C * C + c[:, None] * C + c[None, :]),
        )
        if ERASE:
            # What lived through the loop would take the registers that its products need.
            A1_ij = lower(tl.cumsum(decay_C, 0) - decay_C, tl.cumsum(decay_C, 0), False, C)
            KK_ij = load_tile(square + MEETS * C * C, c, C, C, c, C, UPCAST).to(ACC)
            G1_ij = load_tile(square + STEPS * C * C, c, C, C, c, C, UPCAST).to(ACC)
            dA1_ij += tl.load(dsquares + (place * 2 + 1) * C * C + c[:, None] * C + c[None, :])
            dKA_ij = -through_F_ij * e_C[None, :]
            de_C -= tl.sum(through_F_ij * KK_ij * A1_ij, 0)
            dA1_ij += dKA_ij * KK_ij
            dG1_ij += through_G_ij * KK_ij
            dKK_ij = (dKA_ij * A1_ij + through_G_ij * G1_ij).to(narrow)
            scratch = square + (NUM_SQUARES - 1) * C * C
            store_tile(scratch, dKK_ij, c, C, C, c, C)
            tl.debug_barrier()
            dk_CD = plus(dk_CD, dKK_ij, k_CD, ACC, PRECISION)
            dk_CD = plus(dk_CD, load_turned(scratch, c, C, C, c, C, UPCAST), k_CD, ACC, PRECISION)
        ddecay_C, dlog_momentum_C = gates_back(
            decay_C, momentum_C, there_C, dA1_ij, dG1_ij, db1_C, df1_C, da_C, dg_C, dl_C, db_end, df_end, dm_end,
            narrow, MOMENTUM, C, ACC, PRECISION,
        )  # fmt: skip
        if MOMENTUM:
            tl.store(dmomentum + token + c * H, dlog_momentum_C, mask=c < valid)
        if damping is not None:
            tl.store(ddamping + token + c * H, drate_C * e_C, mask=c < valid)
        de_C += drate_C * damping_C
        dz_C = de_C * e_C * sigmoid(-z_C) * there_C
        if SELF and DIFFERENCE:
            dk_CD += ddifference_CD
        dk_CD = (dk_CD - k_wide_CD * tl.sum(dk_CD * k_wide_CD, 1)[:, None]) * tl.load(found + KEY_SHARE * C)[:, None]
        dv_CD = -ddifference_CD
        if UNIT:
            v_CD = load_tile(values + token * D, c, valid, H * D, d, D, UPCAST).to(ACC)
            dv_CD -= v_CD * tl.sum(dv_CD * v_CD, 1)[:, None]
            dv_CD *= tl.load(found + VALUE_SHARE * C)[:, None]
        dk_CD, dv_CD = dk_CD.to(narrow), dv_CD.to(narrow)
        x_CD = load_tile(x + start * x_token, c, valid, x_token, d, D, UPCAST)
        x_DC = load_turned(x + start * x_token, c, valid, x_token, d, D, UPCAST)
        kept, to = place * M * size, dW + own
        if OFFSETS:
            if resumed:
                to = danchor + own
        tl.debug_barrier()
        a_DD = load_source(
            kept_W + kept + KEY * size, anchor, own + KEY * step, resumed, narrow, D, BD, OFFSETS, UPCAST
        )
        dx_CD = dot(dk_CD, tl.trans(a_DD), ACC, PRECISION)
        add_to(to + KEY * step, dot(x_DC, dk_CD, ACC, PRECISION), D, BD)
        dx_own = dx + token * (M - 1) * D
        if OWN:
            store_tile(dx_own + KEY * D, dx_CD, c, valid, H * (M - 1) * D, d, D)
            dx_CD = tl.zeros([C, BD], dtype=ACC)
            x_DC = load_turned(x + VALUE * x_memory + start * x_token, c, valid, x_token, d, D, UPCAST)
        a_DD = load_source(
            kept_W + kept + VALUE * size, anchor, own + VALUE * step, resumed, narrow, D, BD, OFFSETS, UPCAST
        )
        dx_CD = plus(dx_CD, dv_CD, tl.trans(a_DD), ACC, PRECISION)
        add_to(to + VALUE * step, dot(x_DC, dv_CD, ACC, PRECISION), D, BD)
        if OWN:
            store_tile(dx_own + VALUE * D, dx_CD, c, valid, H * (M - 1) * D, d, D)
            dx_CD = tl.zeros([C, BD], dtype=ACC)
            x_CD = load_tile(x + RATE * x_memory + start * x_token, c, valid, x_token, d, D, UPCAST)
        a_DD = load_source(
            kept_W + kept + RATE * size, anchor, own + RATE * step, resumed, narrow, D, BD, OFFSETS, UPCAST
        )
        u_D, xz_D, more_D = read_out_back(a_DD, r_D, x_CD, dz_C, ACC)
        dx_CD += dz_C[:, None] * u_D[None, :]
        add_to(to + RATE * step, xz_D[:, None] * r_D[None, :], D, BD)
        dr_D += more_D
        dr_bias += tl.sum(dz_C, 0)
        if DECAY:
            if OWN:
                store_tile(dx_own + RATE * D, dx_CD, c, valid, H * (M - 1) * D, d, D)
                dx_CD = tl.zeros([C, BD], dtype=ACC)
                x_CD = load_tile(x + DECAY_ * x_memory + start * x_token, c, valid, x_token, d, D, UPCAST)
            dz_C = tl.where(log_sigmoid(zd_C) > LOWEST, ddecay_C * sigmoid(-zd_C), 0.0) * there_C
            a_DD = load_source(
                kept_W + kept + DECAY_ * size, anchor, own + DECAY_ * step, resumed, narrow, D, BD, OFFSETS, UPCAST
            )
            u_D, xz_D, more_D = read_out_back(a_DD, s_D, x_CD, dz_C, ACC)
            dx_CD += dz_C[:, None] * u_D[None, :]
            add_to(to + DECAY_ * step, xz_D[:, None] * s_D[None, :], D, BD)
            ds_D += more_D
            ds_bias += tl.sum(dz_C, 0)
        if OWN:
            store_tile(dx_own + (M - 2) * D, dx_CD, c, valid, H * (M - 1) * D, d, D)
        else:
            store_tile(dx + token * D, dx_CD, c, valid, H * D, d, D)
        tl.debug_barrier()
    place = (n * H + head).to(tl.int64)
    tl.store(dreadouts + place * 2 * D + d, dr_D, mask=d < D)
    tl.store(dreadouts + place * 2 * D + D + d, ds_D, mask=d < D)
    tl.store(dbiases + place * 2, dr_bias)
    tl.store(dbiases + place * 2 + 1, ds_bias)
