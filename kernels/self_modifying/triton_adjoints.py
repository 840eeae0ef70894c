"""Adjoints that the walk back of `self_modifying` asks for in every chunk, beside its products."""

from __future__ import annotations

import triton
import triton.language as tl

from clplat.kernels.delta_memory.triton_tiles import lower, upper
from clplat.kernels.self_modifying.triton_tiles import dot, load_matrix, plus, store_matrix


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
    """Of a gate: what x meets, what the matrix gets along the readout, and the readout's adjoint."""
    wide_DD = a_DD.to(ACC)
    u_D = tl.sum(wide_DD * r_D[None, :], 1)
    xz_D = tl.sum(x_CD.to(ACC) * dz_C[:, None], 0)
    return u_D, xz_D, tl.sum(wide_DD * xz_D[:, None], 0)
