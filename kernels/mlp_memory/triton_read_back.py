"""What flows back through the queries of `mlp_memory`, all chunks at once.

The forward pass's names, adjoints with a d in front; docs/mlp_memory.md derives the formulas. As in the forward pass
only what was loaded is ever transposed: what is needed in both orders is written and read again, or computed twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from clplat.kernels.delta_memory.triton_tiles import (
    B_,
    F_,
    FROZEN,
    NUM_VECTORS,
    chunk_of,
    factors,
    load_row,
    load_tile,
    load_turned,
    lower,
    rows_at,
    store_tile,
    upper,
)
from clplat.kernels.mlp_memory.triton_tiles import activated, load_layers, load_source, slope


@triton.jit
def read_back(
    q, k, P, rate, log_decay, log_momentum, vectors, states, kept, errors, do, dq, dk, de, hidden, dinner, dslopes,
    dhidden, squares, adjoints, drate, ddecay, dmomentum, cu_seqlens, offsets,
    q_row, q_token, q_head, k_row, k_token, k_head, T, N, slots,
    D: tl.constexpr, J: tl.constexpr, E: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BD: tl.constexpr,
    BJ: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, PAIRS: tl.constexpr, ACT: tl.constexpr,
    RESIDUAL: tl.constexpr, DECAY: tl.constexpr, MOMENTUM: tl.constexpr, PACKED: tl.constexpr, OFFSETS: tl.constexpr,
    UPCAST: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one chunk and head: dq, and what reaches k, the errors, slopes and hidden features of its keys, and its gates
    through its own reads. The adjoints of queries' inner features, `dinner`, are what the states get in `write_back`.
    """
    size: tl.constexpr = J * (D + E)
    slot, head = tl.program_id(0), tl.program_id(1)
    n, i, row, start, valid, offset = chunk_of(slot, cu_seqlens, offsets, slots, N, T, C, PACKED, OFFSETS, BN)
    if valid <= 0:
        return
    c, d, e = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BE)
    token = (row * T + start).to(tl.int64) * V + head
    q = rows_at(q, row, start, head, q_row, q_token, q_head)
    k = rows_at(k, row, start, head, k_row, k_token, k_head)
    place = slot.to(tl.int64) * V + head
    anchor, anchored = states + ((n * V + head).to(tl.int64) * PAIRS + PAIRS - 1) * size, (i == 0) & (offset > 0)
    kept += place * (1 + MOMENTUM) * size
    hidden += token * J
    dinner += token * J
    squares += place * 3 * C * C
    b_C, f_C, _, _, _, _, _, _, _ = factors(vectors, place, valid, FROZEN, MOMENTUM, C)
    q_CD = load_tile(q, c, valid, q_token, d, D, UPCAST)
    k_CD = load_tile(k, c, valid, k_token, d, D, UPCAST)
    k_DC = load_turned(k, c, valid, k_token, d, D, UPCAST)
    do_CE = load_tile(do + token * E, c, valid, V * E, e, E, UPCAST)
    e_CE = load_tile(errors + token * E, c, valid, V * E, e, E, UPCAST)
    e_EC = load_turned(errors + token * E, c, valid, V * E, e, E, UPCAST)
    P_ij = load_tile(P + place * C * C, c, C, C, c, C, UPCAST)
    P_ji = load_turned(P + place * C * C, c, C, C, c, C, UPCAST)
    narrow = k_CD.dtype
    rate_C = load_row(rate + token, c, valid, V, ACC)
    decay_C = load_row(log_decay + token, c, valid, V, ACC) if DECAY else tl.zeros([C], dtype=ACC)
    total_C = tl.cumsum(decay_C, 0)
    G_ij = lower(total_C, total_C, True, C)
    if MOMENTUM:
        sums_C = tl.cumsum(load_row(log_momentum + token, c, valid, V, ACC), 0)
        La_ij, Le_ij = G_ij, lower(sums_C, sums_C, True, C).to(narrow)
        G_ij = tl.dot(La_ij.to(narrow), Le_ij, input_precision=PRECISION, out_dtype=ACC)
    R_ij = G_ij * rate_C[None, :]
    X_ij = tl.zeros([C, C], dtype=ACC)
    for block in range(0, J, BJ):
        inner = block + tl.arange(0, BJ)
        a_DJ, a_JE = load_source(kept, anchor, anchored, inner, D, J, E, BD, BE, OFFSETS, UPCAST)
        w_DJ = load_layers(kept, inner, D, J, E, BD, BE, UPCAST)[0]
        z_CJ = tl.dot(k_CD, a_DJ, input_precision=PRECISION, out_dtype=ACC)
        u_CJ = tl.dot(e_CE, tl.trans(a_JE), input_precision=PRECISION, out_dtype=ACC)
        x_CJ = b_C[:, None] * tl.dot(q_CD, w_DJ, input_precision=PRECISION, out_dtype=ACC)
        if MOMENTUM:
            s_DJ = load_layers(kept + size, inner, D, J, E, BD, BE, UPCAST)[0]
            x_CJ += f_C[:, None] * tl.dot(q_CD, s_DJ, input_precision=PRECISION, out_dtype=ACC)
        d_CJ = (u_CJ * slope(z_CJ, ACT)).to(narrow)
        x_CJ -= tl.dot(P_ij, d_CJ, input_precision=PRECISION, out_dtype=ACC)
        hq_CJ = activated(x_CJ, ACT).to(narrow)
        h_JC = activated(tl.dot(tl.trans(a_DJ), k_DC, input_precision=PRECISION, out_dtype=ACC), ACT).to(narrow)
        X_ij = tl.dot(hq_CJ, h_JC, X_ij, input_precision=PRECISION, out_dtype=ACC)
        store_tile(hidden, hq_CJ, c, valid, V * J, inner, J)
        # Until the adjoint takes its place: what it will be multiplied with.
        store_tile(dinner, slope(x_CJ, ACT), c, valid, V * J, inner, J)
    causal = c[:, None] >= c[None, :]
    dP_ij = tl.where(causal, -tl.dot(do_CE, e_EC, input_precision=PRECISION, out_dtype=ACC), 0.0)
    dX_ij = (dP_ij * R_ij).to(narrow)
    store_tile(squares, X_ij * R_ij, c, C, C, c, C)
    store_tile(squares + C * C, dX_ij, c, C, C, c, C)
    dR_ij = dP_ij * X_ij
    tl.debug_barrier()
    P2_ji = load_turned(squares, c, C, C, c, C, UPCAST)
    dX_ji = load_turned(squares + C * C, c, C, C, c, C, UPCAST)
    de_CE = -tl.dot(P2_ji, do_CE, input_precision=PRECISION, out_dtype=ACC)
    store_tile(de + token * E, de_CE, c, valid, V * E, e, E)
    dP_ij = tl.zeros([C, C], dtype=ACC)
    dqw_CD, dqs_CD = tl.zeros([C, BD], dtype=ACC), tl.zeros([C, BD], dtype=ACC)
    db_C, df_C = tl.zeros([C], dtype=ACC), tl.zeros([C], dtype=ACC)
    for block in range(0, J, BJ):
        inner = block + tl.arange(0, BJ)
        a_DJ, a_JE = load_source(kept, anchor, anchored, inner, D, J, E, BD, BE, OFFSETS, UPCAST)
        w_DJ, w_JE = load_layers(kept, inner, D, J, E, BD, BE, UPCAST)
        hq_CJ = load_tile(hidden, c, valid, V * J, inner, J, UPCAST)
        through_CJ = load_tile(dinner, c, valid, V * J, inner, J, UPCAST)
        h_CJ = activated(tl.dot(k_CD, a_DJ, input_precision=PRECISION, out_dtype=ACC), ACT).to(narrow)
        reach_CJ = tl.dot(do_CE, tl.trans(w_JE), input_precision=PRECISION, out_dtype=ACC)
        db_C += tl.sum(reach_CJ * hq_CJ, 1)
        dx_CJ = tl.dot(dX_ij, h_CJ, b_C[:, None] * reach_CJ, input_precision=PRECISION, out_dtype=ACC)
        if MOMENTUM:
            s_DJ, s_JE = load_layers(kept + size, inner, D, J, E, BD, BE, UPCAST)
            reach_CJ = tl.dot(do_CE, tl.trans(s_JE), input_precision=PRECISION, out_dtype=ACC)
            df_C += tl.sum(reach_CJ * hq_CJ, 1)
            dx_CJ += f_C[:, None] * reach_CJ
        dx_CJ = (dx_CJ * through_CJ).to(narrow)
        z_JC = tl.dot(tl.trans(a_DJ), k_DC, input_precision=PRECISION, out_dtype=ACC)
        u_JC = tl.dot(a_JE, e_EC, input_precision=PRECISION, out_dtype=ACC)
        d_JC = (u_JC * slope(z_JC, ACT)).to(narrow)
        dP_ij = tl.dot(dx_CJ, d_JC, dP_ij, input_precision=PRECISION, out_dtype=ACC)
        dqw_CD = tl.dot(dx_CJ, tl.trans(w_DJ), dqw_CD, input_precision=PRECISION, out_dtype=ACC)
        if MOMENTUM:
            dqs_CD = tl.dot(dx_CJ, tl.trans(s_DJ), dqs_CD, input_precision=PRECISION, out_dtype=ACC)
        dd_CJ = -tl.dot(P_ji, dx_CJ, input_precision=PRECISION, out_dtype=ACC)
        dh_CJ = tl.dot(dX_ji, hq_CJ, input_precision=PRECISION, out_dtype=ACC)
        tl.debug_barrier()
        store_tile(dinner, dx_CJ, c, valid, V * J, inner, J)
        store_tile(dslopes + token * J, dd_CJ, c, valid, V * J, inner, J)
        store_tile(dhidden + token * J, dh_CJ, c, valid, V * J, inner, J)
    dP_ij = tl.where(causal, -dP_ij, 0.0)
    dX_ij = (dP_ij * R_ij).to(narrow)
    store_tile(squares + 2 * C * C, dX_ij, c, C, C, c, C)
    dR_ij += dP_ij * tl.dot(q_CD, k_DC, input_precision=PRECISION, out_dtype=ACC)
    dq_CD = tl.dot(dX_ij, k_CD, b_C[:, None] * dqw_CD, input_precision=PRECISION, out_dtype=ACC)
    db_C += tl.sum(dqw_CD * q_CD, 1)
    if MOMENTUM:
        dq_CD += f_C[:, None] * dqs_CD
        df_C += tl.sum(dqs_CD * q_CD, 1)
    if RESIDUAL:
        dq_CD += do_CE.to(ACC)
    store_tile(dq + token * D, dq_CD, c, valid, V * D, d, D)
    tl.debug_barrier()
    dX_ji = load_turned(squares + 2 * C * C, c, C, C, c, C, UPCAST)
    store_tile(dk + token * D, tl.dot(dX_ji, q_CD, input_precision=PRECISION, out_dtype=ACC), c, valid, V * D, d, D)
    found = adjoints + place * NUM_VECTORS * C + c
    tl.store(found + B_ * C, db_C)
    tl.store(found + F_ * C, df_C)
    tl.store(drate + token + c * V, tl.sum(dR_ij * G_ij, 0), mask=c < valid)
    dG_ij = dR_ij * rate_C[None, :]
    if MOMENTUM:
        dG_ij = dG_ij.to(narrow)
        dLa_ij = tl.dot(dG_ij, tl.trans(Le_ij), input_precision=PRECISION, out_dtype=ACC) * La_ij
        La_ji = upper(total_C, total_C, True, C).to(narrow)
        dLe_ij = tl.dot(La_ji, dG_ij, input_precision=PRECISION, out_dtype=ACC)
        dLe_ij = tl.where(causal, dLe_ij, 0.0) * Le_ij
        dlog_C = tl.cumsum(tl.sum(dLe_ij, 1) - tl.sum(dLe_ij, 0), 0, reverse=True)
        tl.store(dmomentum + token + c * V, dlog_C, mask=c < valid)
    else:
        dLa_ij = dG_ij * G_ij
    if DECAY:
        dlog_C = tl.cumsum(tl.sum(dLa_ij, 1) - tl.sum(dLa_ij, 0), 0, reverse=True)
        tl.store(ddecay + token + c * V, dlog_C, mask=c < valid)
