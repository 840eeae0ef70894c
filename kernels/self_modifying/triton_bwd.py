"""What flows back through the writes of `self_modifying`: the walk from a sequence's last chunk to its first.

Names and rules as in `triton_read_back.py`, whose results it takes up. Without momentum as much is left of a step as of
what was erased, so that both go together: `dsteps` is what reaches either, `written` P + U.
"""

from __future__ import annotations

import triton
import triton.language as tl

from clplat.kernels.delta_memory.triton_tiles import (
    chunk_rows,
    first_slot,
    load_row,
    load_tile,
    load_turned,
    lower,
    num_chunks,
    rows_at,
    sequence,
)
from clplat.kernels.self_modifying.triton_adjoints import add_to, gates_back, load_source, made_of, through_momentum
from clplat.kernels.self_modifying.triton_tiles import (
    A_END,
    B1,
    ENDS,
    ERASED,
    F1,
    G_END,
    KEY_SHARE,
    L_END,
    LOWEST,
    MEETS,
    RATE_,
    SHARES,
    STEPS,
    TURNS,
    VALUE_SHARE,
    WEIGHED,
    Z_DECAY,
    Z_RATE,
    dot,
    load_matrix,
    load_rows,
    log_sigmoid,
    plus,
    sigmoid,
    store_matrix,
    store_rows,
    turned_rows,
)


@triton.jit
def write_back(
    x, q, log_momentum, damping, rate_readout, decay_readout, keys, differences, anchor, kept_W, kept_S, slopes,
    answers, squares, made, do, dk_read, dsteps, derased, dsquares, dvectors, dW, dS, danchor, backs, pushes, sums,
    dkeys, dvalues, dmade, dmomentum, ddamping, cu_seqlens, offsets, x_row, x_token, x_head, x_memory, q_row, q_token,
    q_head, T, slots,
    H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, DECAY: tl.constexpr,
    MOMENTUM: tl.constexpr, ERASE: tl.constexpr, DIFFERENCE: tl.constexpr, BOUNDED: tl.constexpr, UNIT: tl.constexpr,
    OWN: tl.constexpr, SELF: tl.constexpr,
    ANCHOR: tl.constexpr, PACKED: tl.constexpr, OFFSETS: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Brings dW, dS and danchor of one sequence and head, in place, from its end to its beginning; finds what reaches
    its gates, and what reaches the products of x that became keys, values and gates (`dkeys`, `dvalues`, `dmade`).

    Loops over the matrices share the work of a chunk, so that none holds more sums than there are registers: what goes
    through momentum (`pushes`), R of each matrix (`backs`), and what R is multiplied with for keys and between tokens.
    """
    size: tl.constexpr = D * D
    step: tl.constexpr = H * D * D
    n, head = tl.program_id(0), tl.program_id(1)
    row, first, length, offset = sequence(n, cu_seqlens, offsets, T, PACKED, OFFSETS)
    count = num_chunks(length, offset, C)
    own = (n * M * H + head).to(tl.int64) * size
    backs += (n * H + head).to(tl.int64) * M * C * D
    if MOMENTUM:
        pushes += (n * H + head).to(tl.int64) * M * C * D
    sums += (n * H + head).to(tl.int64) * C * C
    c, d = tl.arange(0, C), tl.arange(0, BD)
    x = rows_at(x, row, first, head, x_row, x_token, x_head)
    q = rows_at(q, row, first, head, q_row, q_token, q_head)
    r_D = tl.load(rate_readout + head * D + d, mask=d < D, other=0.0)
    s_D = tl.load(decay_readout + head * D + d, mask=d < D, other=0.0) if DECAY else r_D
    slot = first_slot(n, cu_seqlens, slots, C, PACKED).to(tl.int64)
    for back in tl.range(count, disable_licm=True):
        i = count - 1 - back
        start, valid = chunk_rows(i, length, offset, C)
        token, place = (row * T + first + start).to(tl.int64) * H + head, (slot + i) * H + head
        resumed = (i == 0) & (offset > 0)
        found = made + place * (SHARES + 2 * M) * C + c
        square = squares + place * (3 + MOMENTUM) * C * C
        # Operands of products are read where they are used: what lives through the loops takes registers.
        key, aim = keys + place * C * D, differences + place * C * D
        e_C, rate_C = tl.load(found + ERASED * C), tl.load(found + RATE_ * C)
        a_end_C, g_end_C, l_end_C = tl.load(found + A_END * C), tl.load(found + G_END * C), tl.load(found + L_END * C)
        b1_C, f1_C = tl.load(found + B1 * C), tl.load(found + F1 * C)
        ends = made + (place * (SHARES + 2 * M) + ENDS) * C
        b_end, f_end, m_end = tl.load(ends), tl.load(ends + 1), tl.load(ends + 2)
        dk_CD, ddifference_CD = tl.zeros([C, BD], dtype=ACC), tl.zeros([C, BD], dtype=ACC)
        straight_CD, along_F_C = tl.zeros([C, BD], dtype=ACC), tl.zeros([C], dtype=ACC)
        dg_C, dl_C, drate_C = tl.zeros([C], dtype=ACC), tl.zeros([C], dtype=ACC), tl.zeros([C], dtype=ACC)
        db_end_D, df_end_D, dm_end_D = tl.zeros([BD], dtype=ACC), tl.zeros([BD], dtype=ACC), tl.zeros([BD], dtype=ACC)
        if MOMENTUM:
            dk_CD, dl_C, df_end_D, dm_end_D = through_momentum(
                key, slopes, kept_S, made, dW, dS, pushes, own, place, rate_C, l_end_C, f_end, m_end, H, D, M, C, BD,
                UPCAST, ACC, PRECISION,
            )  # fmt: skip
            tl.debug_barrier()
        for m in tl.range(M, disable_licm=True):
            at, kept, tile = own + m * step, (place * M + m) * size, (place * M + m) * C * D
            share_C = tl.load(found + (SHARES + 2 * m) * C)
            scale_C = -rate_C * share_C
            k_CD, g_CD = load_rows(key, C, D, BD, UPCAST), load_rows(slopes + tile, C, D, BD, UPCAST)
            narrow = k_CD.dtype
            dwn_DD = load_matrix(dW + at, D, BD, False).to(narrow)
            dmove_CD = dot(k_CD, dwn_DD, ACC, PRECISION)
            written_CD = scale_C[:, None] * g_CD.to(ACC)
            if MOMENTUM:
                dg_C += tl.sum(dmove_CD * written_CD, 1)
                written_CD *= g_end_C[:, None]
            if ERASE:
                f_CD = load_rows(answers + tile, C, D, BD, UPCAST)
                erased_CD = -e_C[:, None] * f_CD.to(ACC)
                if MOMENTUM:
                    erased_CD *= a_end_C[:, None]
                    along_F_C += tl.sum(dmove_CD * f_CD.to(ACC), 1)
                written_CD += erased_CD
            dk_CD = plus(dk_CD, written_CD.to(narrow), tl.trans(dwn_DD), ACC, PRECISION)
            dsteps_CD = g_end_C[:, None] * dmove_CD
            if MOMENTUM:
                dsteps_CD += load_rows(pushes + m * C * D, C, D, BD, False)
            if m == M - 1:
                dsteps_CD += load_rows(dsteps + place * C * D, C, D, BD, False)
            if ERASE:
                derased_CD = dsteps_CD
                if MOMENTUM:
                    derased_CD = a_end_C[:, None] * dmove_CD
                    if m == M - 1:
                        derased_CD += load_rows(derased + place * C * D, C, D, BD, False)
                turn_ji = turned_rows(square + TURNS * C * C, C, C, C, UPCAST)
                backn_CD = dot(turn_ji, (-e_C[:, None] * derased_CD).to(narrow), ACC, PRECISION).to(narrow)
                store_rows(backs + m * C * D, backn_CD, C, D, BD)
                KG_ji = turned_rows(square + WEIGHED * C * C, C, C, C, UPCAST)
                dsteps_CD = plus(dsteps_CD, KG_ji, backn_CD, ACC, PRECISION)
                if not MOMENTUM:
                    along_F_C += tl.sum(dsteps_CD * f_CD.to(ACC), 1)
            along_C = tl.sum(dsteps_CD * g_CD.to(ACC), 1)
            drate_C -= along_C * share_C
            if BOUNDED:
                # A slope that was shortened feels nothing along itself.
                along_C /= tl.maximum(tl.load(found + (SHARES + 2 * m + 1) * C), 1e-30)
                dsteps_CD -= tl.where(share_C < 1.0, along_C, 0.0)[:, None] * g_CD.to(ACC)
            dslope_CD = scale_C[:, None] * dsteps_CD
            dslopen_CD = dslope_CD.to(narrow)
            a_DD = load_source(kept_W + kept, anchor, at, resumed, narrow, D, BD, OFFSETS, UPCAST)
            if SELF:
                ddifference_CD = plus(ddifference_CD, dslopen_CD, tl.trans(a_DD), ACC, PRECISION)
            else:
                ddifference_CD += dslope_CD
                if DIFFERENCE:
                    straight_CD = plus(straight_CD, dslopen_CD, tl.trans(a_DD), ACC, PRECISION)
            before_DD = tl.zeros([BD, BD], dtype=ACC)
            if SELF or DIFFERENCE:
                aimed_DC = turned_rows(aim if SELF else key, C, D, BD, UPCAST)
                before_DD = plus(before_DD, aimed_DC, dslopen_CD, ACC, PRECISION)
            # Other threads may not have read yet what is overwritten from here on.
            tl.debug_barrier()
            if ANCHOR:
                if resumed:
                    add_to(danchor + at, before_DD, D, BD)
                    before_DD *= 0.0
                elif i == count - 1:
                    before_DD += load_matrix(danchor + at, D, BD, False)
                    tl.debug_barrier()
                    store_matrix(danchor + at, tl.zeros([BD, BD], dtype=ACC), D, BD)
            if ERASE:
                k_DC = turned_rows(key, C, D, BD, UPCAST)
                before_DD = plus(before_DD, k_DC, (b1_C[:, None] * backn_CD).to(narrow), ACC, PRECISION)
            # Read once more, as what lives through the products takes registers that they need.
            dw_DD = load_matrix(dW + at, D, BD, False)
            db_end_D += tl.sum(load_matrix(kept_W + kept, D, BD, UPCAST).to(ACC) * dw_DD, 1)
            store_matrix(dW + at, b_end * dw_DD + before_DD, D, BD)
        tl.debug_barrier()
        k_CD = load_rows(key, C, D, BD, UPCAST)
        k_wide_CD = k_CD.to(ACC)
        narrow = k_CD.dtype
        da_C, de_C = -e_C * along_F_C, -along_F_C
        if MOMENTUM:
            de_C *= a_end_C
            if ERASE:
                de_C -= tl.load(dvectors + (place * 3 + 2) * C + c)
        else:
            da_C = tl.sum(dk_CD * k_wide_CD, 1)
            dk_CD *= a_end_C[:, None]
        dk_CD += load_rows(dk_read + place * C * D, C, D, BD, False) + straight_CD
        if SELF and DIFFERENCE:
            dk_CD += ddifference_CD
        dv_CD = -ddifference_CD
        if UNIT:
            v_CD = -load_rows(aim, C, D, BD, UPCAST).to(ACC)
            if SELF and DIFFERENCE:
                v_CD += k_wide_CD
            dv_CD -= v_CD * tl.sum(dv_CD * v_CD, 1)[:, None]
            dv_CD *= tl.load(found + VALUE_SHARE * C)[:, None]
        dv_CD = dv_CD.to(narrow)
        store_rows(dvalues + place * C * D, dv_CD, C, D, BD)
        q_DC = load_turned(q + start * q_token, c, valid, q_token, d, D, UPCAST).to(ACC)
        do_CD = load_tile(do + token * D, c, valid, H * D, d, D, UPCAST)
        last = own + (M - 1) * step
        add_to(dW + last, dot((q_DC * b1_C[None, :]).to(narrow), do_CD, ACC, PRECISION), D, BD)
        if MOMENTUM:
            add_to(dS + last, dot((q_DC * f1_C[None, :]).to(narrow), do_CD, ACC, PRECISION), D, BD)
        here = dsquares + place * (1 + MOMENTUM) * C * C + c[:, None] * C + c[None, :]
        db1_C, df1_C = tl.load(dvectors + place * 3 * C + c), tl.zeros([C], dtype=ACC)
        if MOMENTUM:
            df1_C = tl.load(dvectors + (place * 3 + 1) * C + c)
        dA1_ij, dG1_ij, there_C = tl.zeros([C, C], dtype=ACC), tl.load(here), tl.where(c < valid, 1.0, 0.0)
        decay_C, momentum_C = tl.zeros([C], dtype=ACC), tl.zeros([C], dtype=ACC)
        zd_C = tl.load(found + Z_DECAY * C)
        if DECAY:
            decay_C = log_sigmoid(zd_C) * there_C
        if MOMENTUM:
            momentum_C = load_row(log_momentum + token, c, valid, H, ACC)
        if ERASE:
            reach_CD, push_CD = tl.zeros([C, BD], dtype=ACC), tl.zeros([C, BD], dtype=ACC)
            through_F_ij, through_G_ij = tl.zeros([C, C], dtype=ACC), tl.zeros([C, C], dtype=ACC)
            for m in tl.range(M, disable_licm=True):
                kept, tile = (place * M + m) * size, (place * M + m) * C * D
                backn_CD = load_rows(backs + m * C * D, C, D, BD, UPCAST)
                w_DD = load_matrix(kept_W + kept, D, BD, UPCAST)
                reach_CD = plus(reach_CD, backn_CD, tl.trans(w_DD), ACC, PRECISION)
                f_DC = turned_rows(answers + tile, C, D, BD, UPCAST)
                g_DC = turned_rows(slopes + tile, C, D, BD, UPCAST).to(ACC)
                written_DC = (-rate_C * tl.load(found + (SHARES + 2 * m) * C))[None, :] * g_DC
                if MOMENTUM:
                    k_DC = turned_rows(key, C, D, BD, UPCAST)
                    add_to(dS + own + m * step, dot(k_DC, (f1_C[:, None] * backn_CD).to(narrow), ACC, PRECISION), D, BD)
                    s_DD = load_matrix(kept_S + kept, D, BD, UPCAST)
                    push_CD = plus(push_CD, backn_CD, tl.trans(s_DD), ACC, PRECISION)
                    through_F_ij = plus(through_F_ij, backn_CD, f_DC, ACC, PRECISION)
                else:
                    written_DC -= e_C[None, :] * f_DC.to(ACC)
                through_G_ij = plus(through_G_ij, backn_CD, written_DC.to(narrow), ACC, PRECISION)
            db1_C += tl.sum(reach_CD * k_wide_CD, 1)
            dk_CD += b1_C[:, None] * reach_CD
            if MOMENTUM:
                df1_C += tl.sum(push_CD * k_wide_CD, 1)
                dk_CD += f1_C[:, None] * push_CD
            A1_ij = lower(tl.cumsum(decay_C, 0) - decay_C, tl.cumsum(decay_C, 0), False, C)
            KK_ij = load_rows(square + MEETS * C * C, C, C, C, UPCAST).to(ACC)
            dG1_ij += through_G_ij * KK_ij
            if MOMENTUM:
                dA1_ij = tl.load(here + C * C) - through_F_ij * KK_ij * e_C[None, :]
                through_F_ij *= A1_ij
                de_C -= tl.sum(through_F_ij * KK_ij, 0)
                G1_ij = load_rows(square + STEPS * C * C, C, C, C, UPCAST).to(ACC)
                dKK_ij = through_G_ij * G1_ij - through_F_ij * e_C[None, :]
            else:
                dKK_ij = through_G_ij * A1_ij
            store_rows(sums, dKK_ij, C, C, C)
            tl.debug_barrier()
            dk_CD = plus(dk_CD, load_rows(sums, C, C, C, UPCAST), k_CD, ACC, PRECISION)
            dk_CD = plus(dk_CD, turned_rows(sums, C, C, C, UPCAST), k_CD, ACC, PRECISION)
        dk_CD = (dk_CD - k_wide_CD * tl.sum(dk_CD * k_wide_CD, 1)[:, None]) * tl.load(found + KEY_SHARE * C)[:, None]
        dk_CD = dk_CD.to(narrow)
        store_rows(dkeys + place * C * D, dk_CD, C, D, BD)
        ddecay_C, dlog_momentum_C = gates_back(
            decay_C, momentum_C, there_C, dA1_ij, dG1_ij, db1_C, df1_C, da_C, dg_C, dl_C, tl.sum(db_end_D, 0),
            tl.sum(df_end_D, 0), tl.sum(dm_end_D, 0), narrow, MOMENTUM, C, ACC, PRECISION,
        )  # fmt: skip
        if MOMENTUM:
            tl.store(dmomentum + token + c * H, dlog_momentum_C, mask=c < valid)
        if damping is not None:
            tl.store(ddamping + token + c * H, drate_C * e_C, mask=c < valid)
            drate_C *= load_row(damping + token, c, valid, H, ACC)
        dz_C = (de_C + drate_C) * e_C * sigmoid(-tl.load(found + Z_RATE * C)) * there_C
        tl.store(dmade + place * 2 * C + c, dz_C)
        to = dW + own
        if OFFSETS:
            if resumed:
                to = danchor + own
        tl.debug_barrier()
        dzd_C = dz_C
        if DECAY:
            dzd_C = tl.where(log_sigmoid(zd_C) > LOWEST, ddecay_C * sigmoid(-zd_C), 0.0) * there_C
            tl.store(dmade + (place * 2 + 1) * C + c, dzd_C)
        made_of(
            x + start * x_token, to, dk_CD, dv_CD, dz_C, dzd_C, r_D, s_D, valid, x_token, x_memory, H, D, C, BD, DECAY,
            OWN, UPCAST, ACC, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()
