"""Adjoints that the walk back of `self_modifying` asks for in every chunk, beside its products."""

from __future__ import annotations

import triton
import triton.language as tl

from clplat.kernels.delta_memory.triton_tiles import load_tile, load_turned, lower, upper
from clplat.kernels.self_modifying.triton_tiles import (
    DECAY_,
    KEY,
    RATE,
    SHARES,
    VALUE,
    dot,
    load_matrix,
    load_rows,
    plus,
    store_matrix,
    store_rows,
)


@triton.jit
def gates_back(
    decay_C, momentum_C, there_C, dA1_ij, dG1_ij, db1_C, df1_C, da_C, dg_C, dl_C, db_end, df_end, dm_end, narrow,
    MOMENTUM: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adjoints of log decay and log momentum, from those of all that `decays` gives."""
    c = tl.arange(0, C)
    total_C = tl.cumsum(decay_C, 0)
    end = tl.sum(decay_C, 0)
    before_C = total_C - decay_C
    A1_ij = lower(before_C, total_C, False, C)
    a_end_C = tl.exp(end - total_C)
    dmomentum_C = da_C
    if MOMENTUM:
        sums_C = tl.cumsum(momentum_C, 0)
        last = tl.sum(momentum_C, 0)
        m_C, l_end_C = tl.exp(sums_C) * there_C, tl.exp(last - sums_C)
        Le_ij = lower(sums_C, sums_C, True, C) * there_C[:, None]
        Le_ji = upper(sums_C, sums_C, True, C) * there_C[None, :]
        A1_ji = upper(before_C, total_C, False, C)
        dA1_ij = plus(dA1_ij, dG1_ij.to(narrow), Le_ji.to(narrow), ACC, PRECISION) + df1_C[:, None] * m_C[None, :]
        dLe_ij = dot(A1_ji.to(narrow), dG1_ij.to(narrow), ACC, PRECISION) + a_end_C[:, None] * dg_C[None, :]
        da_C += tl.sum(Le_ij * dg_C[None, :], 1) + df_end * m_C
        dm_C = tl.sum(A1_ij * df1_C[:, None], 0) + df_end * a_end_C
        dLe_ij *= Le_ij
        dsums_C = tl.sum(dLe_ij, 1) - tl.sum(dLe_ij, 0) + dm_C * m_C - dl_C * l_end_C
        dsums_C += tl.where(c == C - 1, tl.sum(dl_C * l_end_C, 0) + dm_end * tl.exp(last), 0.0)
        dmomentum_C = tl.cumsum(dsums_C, 0, reverse=True)
    else:
        dA1_ij += dG1_ij
        da_C += dg_C
    dA1_ij *= A1_ij
    da_C *= a_end_C
    dbefore_C = tl.sum(dA1_ij, 1) + db1_C * tl.exp(before_C)
    dtotal_C = tl.where(c == C - 1, tl.sum(da_C, 0) + db_end * tl.exp(end), 0.0) - tl.sum(dA1_ij, 0) - da_C
    return tl.cumsum(dbefore_C + dtotal_C, 0, reverse=True) - dbefore_C, dmomentum_C


@triton.jit
def add_to(pointer, tile_DD, D: tl.constexpr, BD: tl.constexpr):
    """Adds to a matrix."""
    store_matrix(pointer, load_matrix(pointer, D, BD, False) + tile_DD, D, BD)


@triton.jit
def load_source(
    kept, anchor, at, resumed, narrow, D: tl.constexpr, BD: tl.constexpr, OFFSETS: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """The matrix of which a chunk's keys, values or gates are made."""
    a_DD = load_matrix(kept, D, BD, UPCAST)
    if OFFSETS:
        if resumed:
            a_DD = load_matrix(anchor + at, D, BD, False).to(narrow)
    return a_DD


@triton.jit
def read_out_back(a_DD, r_D, x_CD, dz_C, ACC: tl.constexpr):
    """Of a gate: what x meets, and the readout's adjoint."""
    wide_DD = a_DD.to(ACC)
    xz_D = tl.sum(x_CD.to(ACC) * dz_C[:, None], 0)
    return tl.sum(wide_DD * r_D[None, :], 1), tl.sum(wide_DD * xz_D[:, None], 0)


@triton.jit
def made_of(
    x, to, dk_CD, dv_CD, dz_C, dzd_C, r_D, s_D, valid, x_token, x_memory, H: tl.constexpr, D: tl.constexpr,
    C: tl.constexpr, BD: tl.constexpr, DECAY: tl.constexpr, OWN: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to the matrices at `to` what reaches them through keys, values and gates that they made of a chunk's x."""
    c, d = tl.arange(0, C), tl.arange(0, BD)
    step: tl.constexpr = H * D * D
    x_DC = load_turned(x, c, valid, x_token, d, D, UPCAST)
    add_to(to + KEY * step, dot(x_DC, dk_CD, ACC, PRECISION), D, BD)
    if OWN:
        x_DC = load_turned(x + VALUE * x_memory, c, valid, x_token, d, D, UPCAST)
    add_to(to + VALUE * step, dot(x_DC, dv_CD, ACC, PRECISION), D, BD)
    x_CD = load_tile(x + (RATE * x_memory if OWN else 0), c, valid, x_token, d, D, UPCAST)
    add_to(to + RATE * step, tl.sum(x_CD.to(ACC) * dz_C[:, None], 0)[:, None] * r_D[None, :], D, BD)
    if DECAY:
        if OWN:
            x_CD = load_tile(x + DECAY_ * x_memory, c, valid, x_token, d, D, UPCAST)
        add_to(to + DECAY_ * step, tl.sum(x_CD.to(ACC) * dzd_C[:, None], 0)[:, None] * s_D[None, :], D, BD)


@triton.jit
def through_momentum(
    key, slopes, kept_S, made, dW, dS, pushes, own, place, rate_C, l_end_C, f_end, m_end, H: tl.constexpr,
    D: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Takes all dS through a chunk, but for what was erased, and writes what reaches its steps to `pushes`. Returns
    their part of dk, the adjoint of l, and those of f and m at the end, still to be summed."""
    size: tl.constexpr = D * D
    c = tl.arange(0, C)
    dk_CD, dl_C = tl.zeros([C, BD], dtype=ACC), tl.zeros([C], dtype=ACC)
    df_end_D, dm_end_D = tl.zeros([BD], dtype=ACC), tl.zeros([BD], dtype=ACC)
    for m in tl.range(M, disable_licm=True):
        at, kept = own + m * H * size, place * M + m
        g_CD = load_rows(slopes + kept * C * D, C, D, BD, UPCAST)
        narrow = g_CD.dtype
        share_C = tl.load(made + (place * (SHARES + 2 * M) + SHARES + 2 * m) * C + c)
        steps_CD = (-rate_C * share_C)[:, None] * g_CD.to(ACC)
        dsn_DD = load_matrix(dS + at, D, BD, False).to(narrow)
        dpush_CD = dot(load_rows(key, C, D, BD, UPCAST), dsn_DD, ACC, PRECISION)
        dl_C += tl.sum(dpush_CD * steps_CD, 1)
        store_rows(pushes + m * C * D, l_end_C[:, None] * dpush_CD, C, D, BD)
        dk_CD = plus(dk_CD, (l_end_C[:, None] * steps_CD).to(narrow), tl.trans(dsn_DD), ACC, PRECISION)
        # Other threads may not have read yet what is overwritten.
        tl.debug_barrier()
        dw_DD, ds_DD = load_matrix(dW + at, D, BD, False), load_matrix(dS + at, D, BD, False)
        store_matrix(dS + at, m_end * ds_DD + f_end * dw_DD, D, BD)
        s_DD = load_matrix(kept_S + kept * size, D, BD, UPCAST).to(ACC)
        df_end_D += tl.sum(s_DD * dw_DD, 1)
        dm_end_D += tl.sum(s_DD * ds_DD, 1)
    return dk_CD, dl_C, df_end_D, dm_end_D
