"""What flows back through the writes of `mlp_memory`: the walk from a sequence's last chunk to its first.

Names and rules as in `triton_read_back.py`, whose results it takes up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from clplat.kernels.delta_memory.triton_tiles import (
    FROZEN,
    M_,
    NUM_VECTORS,
    WG_,
    WL_,
    chunk_rows,
    factors,
    first_slot,
    load_tile,
    load_turned,
    num_chunks,
    rows_at,
    sequence,
    store_tile,
)
from clplat.kernels.mlp_memory.triton_tiles import activated, bend, load_layers, load_source, slope, store_layers


@triton.jit
def write_back(
    q, k, vectors, states, kept, errors, do, dk_read, de, hidden, dinner, dslopes, dhidden, dstates, dk, dv, adjoints,
    cu_seqlens, offsets, q_row, q_token, q_head, k_row, k_token, k_head, T, slots,
    D: tl.constexpr, J: tl.constexpr, E: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BD: tl.constexpr,
    BJ: tl.constexpr, BE: tl.constexpr, PAIRS: tl.constexpr, END_PAIRS: tl.constexpr, ACT: tl.constexpr,
    DOT: tl.constexpr, RESIDUAL: tl.constexpr, MOMENTUM: tl.constexpr, ANCHOR: tl.constexpr, PACKED: tl.constexpr,
    OFFSETS: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Brings `dstates` of one sequence and head, in place, from its end to its beginning, and finds dk and dv."""
    size: tl.constexpr = J * (D + E)
    n, head = tl.program_id(0), tl.program_id(1)
    row, first, length, offset = sequence(n, cu_seqlens, offsets, T, PACKED, OFFSETS)
    count = num_chunks(length, offset, C)
    own = dstates + (n * V + head).to(tl.int64) * END_PAIRS * size
    danchor = own + (END_PAIRS - 1) * size
    anchor = states + ((n * V + head).to(tl.int64) * PAIRS + PAIRS - 1) * size
    c, d, e = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BE)
    q = rows_at(q, row, first, head, q_row, q_token, q_head)
    k = rows_at(k, row, first, head, k_row, k_token, k_head)
    slot = first_slot(n, cu_seqlens, slots, C, PACKED).to(tl.int64)
    for back in range(count):
        i = count - 1 - back
        start, valid = chunk_rows(i, length, offset, C)
        token, place = (row * T + first + start).to(tl.int64) * V + head, (slot + i) * V + head
        here = kept + place * (1 + MOMENTUM) * size
        anchored = (i == 0) & (offset > 0)
        b_C, f_C, wg_C, wl_C, _, _, b_end, f_end, m_end = factors(vectors, place, valid, FROZEN, MOMENTUM, C)
        k_CD = load_tile(k + start * k_token, c, valid, k_token, d, D, UPCAST)
        k_DC = load_turned(k + start * k_token, c, valid, k_token, d, D, UPCAST)
        q_DC = load_turned(q + start * q_token, c, valid, q_token, d, D, UPCAST)
        e_CE = load_tile(errors + token * E, c, valid, V * E, e, E, UPCAST)
        do_CE = load_tile(do + token * E, c, valid, V * E, e, E, UPCAST)
        narrow = k_CD.dtype
        de_CE = load_tile(de + token * E, c, valid, V * E, e, E, False)
        hw_CE, hs_CE = tl.zeros([C, BE], dtype=ACC), tl.zeros([C, BE], dtype=ACC)
        dwg_C, dwl_C = tl.zeros([C], dtype=ACC), tl.zeros([C], dtype=ACC)
        for block in range(0, J, BJ):
            inner = block + tl.arange(0, BJ)
            a_DJ, a_JE = load_source(here, anchor, anchored, inner, D, J, E, BD, BE, OFFSETS, UPCAST)
            dw_DJ, dw_JE = load_layers(own, inner, D, J, E, BD, BE, False)
            z_CJ = tl.dot(k_CD, a_DJ, input_precision=PRECISION, out_dtype=ACC)
            u_CJ = tl.dot(e_CE, tl.trans(a_JE), input_precision=PRECISION, out_dtype=ACC)
            h_CJ, through_CJ = activated(z_CJ, ACT).to(narrow), slope(z_CJ, ACT)
            dd_CJ = load_tile(dslopes + token * J, c, valid, V * J, inner, J, False).to(ACC)
            reach_CJ = tl.dot(k_CD, dw_DJ.to(narrow), input_precision=PRECISION, out_dtype=ACC)
            dwg_C -= tl.sum(reach_CJ * u_CJ * through_CJ, 1)
            dd_CJ -= wg_C[:, None] * reach_CJ
            hw_CE = tl.dot(h_CJ, dw_JE.to(narrow), hw_CE, input_precision=PRECISION, out_dtype=ACC)
            if MOMENTUM:
                ds_DJ, ds_JE = load_layers(own + size, inner, D, J, E, BD, BE, False)
                reach_CJ = tl.dot(k_CD, ds_DJ.to(narrow), input_precision=PRECISION, out_dtype=ACC)
                dwl_C -= tl.sum(reach_CJ * u_CJ * through_CJ, 1)
                dd_CJ -= wl_C[:, None] * reach_CJ
                hs_CE = tl.dot(h_CJ, ds_JE.to(narrow), hs_CE, input_precision=PRECISION, out_dtype=ACC)
            du_CJ = (dd_CJ * through_CJ).to(narrow)
            de_CE = tl.dot(du_CJ, a_JE, de_CE, input_precision=PRECISION, out_dtype=ACC)
            tl.debug_barrier()
            store_tile(dslopes + token * J, dd_CJ, c, valid, V * J, inner, J)
        dwg_C -= tl.sum(hw_CE * e_CE, 1)
        de_CE -= wg_C[:, None] * hw_CE
        if MOMENTUM:
            dwl_C -= tl.sum(hs_CE * e_CE, 1)
            de_CE -= wl_C[:, None] * hs_CE
        store_tile(dv + token * E, -de_CE, c, valid, V * E, e, E)
        dk_CD = load_tile(dk_read + token * D, c, valid, V * D, d, D, False)
        if RESIDUAL:
            if not DOT:
                dk_CD += de_CE
        de_CE = de_CE.to(narrow)
        eg_CE, el_CE = (-wg_C[:, None] * e_CE).to(narrow), (-wl_C[:, None] * e_CE).to(narrow)
        ob_CE, of_CE = (b_C[:, None] * do_CE).to(narrow), (f_C[:, None] * do_CE).to(narrow)
        qb_DC, qf_DC = (b_C[None, :] * q_DC).to(narrow), (f_C[None, :] * q_DC).to(narrow)
        kw_CD, ks_CD = tl.zeros([C, BD], dtype=ACC), tl.zeros([C, BD], dtype=ACC)
        WW, WS, SS = tl.sum(dwg_C * 0.0, 0), tl.sum(dwg_C * 0.0, 0), tl.sum(dwg_C * 0.0, 0)
        tl.debug_barrier()
        for block in range(0, J, BJ):
            inner = block + tl.arange(0, BJ)
            w_DJ, w_JE = load_layers(here, inner, D, J, E, BD, BE, UPCAST)
            a_DJ, a_JE = load_source(here, anchor, anchored, inner, D, J, E, BD, BE, OFFSETS, UPCAST)
            dw_DJ, dw_JE = load_layers(own, inner, D, J, E, BD, BE, False)
            dd_CJ = load_tile(dslopes + token * J, c, valid, V * J, inner, J, False).to(ACC)
            dd_JC = load_turned(dslopes + token * J, c, valid, V * J, inner, J, False).to(ACC)
            dx_CJ = load_tile(dinner + token * J, c, valid, V * J, inner, J, UPCAST)
            hq_JC = load_turned(hidden + token * J, c, valid, V * J, inner, J, UPCAST)
            dh_CJ = load_tile(dhidden + token * J, c, valid, V * J, inner, J, False).to(ACC)
            z_CJ = tl.dot(k_CD, a_DJ, input_precision=PRECISION, out_dtype=ACC)
            u_CJ = tl.dot(e_CE, tl.trans(a_JE), input_precision=PRECISION, out_dtype=ACC)
            z_JC = tl.dot(tl.trans(a_DJ), k_DC, input_precision=PRECISION, out_dtype=ACC)
            d_CJ = (u_CJ * slope(z_CJ, ACT)).to(narrow)
            dw_narrow_DJ, dw_narrow_JE = dw_DJ.to(narrow), dw_JE.to(narrow)
            dh_CJ = tl.dot(eg_CE, tl.trans(dw_narrow_JE), dh_CJ, input_precision=PRECISION, out_dtype=ACC)
            kw_CD = tl.dot(d_CJ, tl.trans(dw_narrow_DJ), kw_CD, input_precision=PRECISION, out_dtype=ACC)
            WW += tl.sum(tl.sum(w_DJ.to(ACC) * dw_DJ, 1), 0) + tl.sum(tl.sum(w_JE.to(ACC) * dw_JE, 1), 0)
            if MOMENTUM:
                s_DJ, s_JE = load_layers(here + size, inner, D, J, E, BD, BE, UPCAST)
                ds_DJ, ds_JE = load_layers(own + size, inner, D, J, E, BD, BE, False)
                ds_narrow_DJ, ds_narrow_JE = ds_DJ.to(narrow), ds_JE.to(narrow)
                dh_CJ = tl.dot(el_CE, tl.trans(ds_narrow_JE), dh_CJ, input_precision=PRECISION, out_dtype=ACC)
                ks_CD = tl.dot(d_CJ, tl.trans(ds_narrow_DJ), ks_CD, input_precision=PRECISION, out_dtype=ACC)
                WS += tl.sum(tl.sum(s_DJ.to(ACC) * dw_DJ, 1), 0) + tl.sum(tl.sum(s_JE.to(ACC) * dw_JE, 1), 0)
                SS += tl.sum(tl.sum(s_DJ.to(ACC) * ds_DJ, 1), 0) + tl.sum(tl.sum(s_JE.to(ACC) * ds_JE, 1), 0)
                ds_DJ = m_end * ds_DJ + f_end * dw_DJ
                ds_JE = m_end * ds_JE + f_end * dw_JE
                ds_DJ = tl.dot(qf_DC, dx_CJ, ds_DJ, input_precision=PRECISION, out_dtype=ACC)
                ds_JE = tl.dot(hq_JC, of_CE, ds_JE, input_precision=PRECISION, out_dtype=ACC)
            du_JC = (dd_JC * slope(z_JC, ACT)).to(narrow)
            dsource_JE = tl.dot(du_JC, e_CE, input_precision=PRECISION, out_dtype=ACC)
            if not DOT:
                dh_CJ = tl.dot(de_CE, tl.trans(a_JE), dh_CJ, input_precision=PRECISION, out_dtype=ACC)
                h_JC = activated(z_JC, ACT).to(narrow)
                dsource_JE = tl.dot(h_JC, de_CE, dsource_JE, input_precision=PRECISION, out_dtype=ACC)
            dz_CJ = (dd_CJ * u_CJ * bend(z_CJ, ACT) + dh_CJ * slope(z_CJ, ACT)).to(narrow)
            dk_CD = tl.dot(dz_CJ, tl.trans(a_DJ), dk_CD, input_precision=PRECISION, out_dtype=ACC)
            dsource_DJ = tl.dot(k_DC, dz_CJ, input_precision=PRECISION, out_dtype=ACC)
            dw_DJ = tl.dot(qb_DC, dx_CJ, b_end * dw_DJ, input_precision=PRECISION, out_dtype=ACC)
            dw_JE = tl.dot(hq_JC, ob_CE, b_end * dw_JE, input_precision=PRECISION, out_dtype=ACC)
            if ANCHOR:
                if i == count - 1:
                    given_DJ, given_JE = load_layers(danchor, inner, D, J, E, BD, BE, False)
                    dsource_DJ += given_DJ
                    dsource_JE += given_JE
            # Other threads may not have read yet what these overwrite.
            tl.debug_barrier()
            if ANCHOR:
                to_anchor = tl.where(anchored, 1.0, 0.0).to(ACC)
                if (i == count - 1) | anchored:
                    store_layers(danchor, to_anchor * dsource_DJ, to_anchor * dsource_JE, inner, D, J, E, BD, BE)
                dsource_DJ *= 1.0 - to_anchor
                dsource_JE *= 1.0 - to_anchor
            store_layers(own, dw_DJ + dsource_DJ, dw_JE + dsource_JE, inner, D, J, E, BD, BE)
            if MOMENTUM:
                store_layers(own + size, ds_DJ, ds_JE, inner, D, J, E, BD, BE)
        dk_CD -= wg_C[:, None] * kw_CD
        found = adjoints + place * NUM_VECTORS * C
        if MOMENTUM:
            dk_CD -= wl_C[:, None] * ks_CD
            tl.store(found + WL_ * C + c, dwl_C)
        store_tile(dk + token * D, dk_CD, c, valid, V * D, d, D)
        tl.store(found + WG_ * C + c, dwg_C)
        # The place of m, whose adjoint `gates` finds, holds what factors of states get: <W, dW>, <S, dW>, <S, dS>.
        tl.store(found + M_ * C + c, tl.where(c == 0, WW, tl.where(c == 1, WS, SS)))
        tl.debug_barrier()
