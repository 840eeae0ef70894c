"""What the kernels of `self_modifying` share: gates of a chunk, matrices of decays, where a matrix lies.

Names in kernels: C tokens of a chunk, D features of a head, of which tiles have BD, M matrices a head; a tile's shape
stands behind its name, and ij means (C, C). A state is (sequences, M, H, D, D): `step` numbers lie between two matrices
of one head. `e` is what a token erases, `rate` its step, both zero for places without a token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from clplat.kernels.delta_memory.triton_tiles import load_row, load_tile, lower, store_tile

KEY, VALUE, RATE, DECAY_ = (tl.constexpr(number) for number in range(4))
Z_RATE, Z_DECAY, KEY_SHARE, VALUE_SHARE, ERASED, RATE_, B1, F1, A_END, G_END, L_END, ENDS = (
    tl.constexpr(number) for number in range(12)
)
SHARES = tl.constexpr(12)
"""Behind it two numbers for each matrix: by what its slope is multiplied, and the slope's squared length."""
MEETS, TURNS, WEIGHED, STEPS = (tl.constexpr(number) for number in range(4))
LOWEST, SHORTEST = tl.constexpr(-12.0), tl.constexpr(1e-12)


@triton.jit
def dot(x, y, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """x y."""
    return tl.dot(x, y, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def plus(z, x, y, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """z + x y."""
    return tl.dot(x, y, z, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def load_rows(pointer, C: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr):
    """C rows of D numbers, one behind the other; without a mask, which takes registers, where it hides nothing."""
    c, d = tl.arange(0, C)[:, None], tl.arange(0, BD)[None, :]
    tile = tl.load(pointer + c * D + d) if D == BD else tl.load(pointer + c * D + d, mask=d < D, other=0.0)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def turned_rows(pointer, C: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr):
    """The same transposed (BD, C), by the order of its addresses."""
    d, c = tl.arange(0, BD)[:, None], tl.arange(0, C)[None, :]
    tile = tl.load(pointer + c * D + d) if D == BD else tl.load(pointer + c * D + d, mask=d < D, other=0.0)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def store_rows(pointer, tile_CD, C: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Writes them."""
    c, d = tl.arange(0, C)[:, None], tl.arange(0, BD)[None, :]
    if D == BD:
        tl.store(pointer + c * D + d, tile_CD.to(pointer.dtype.element_ty))
    else:
        tl.store(pointer + c * D + d, tile_CD.to(pointer.dtype.element_ty), mask=d < D)


@triton.jit
def load_matrix(pointer, D: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr):
    """A matrix of one memory."""
    d = tl.arange(0, BD)
    if D == BD:
        return load_rows(pointer, BD, D, BD, UPCAST)
    return load_tile(pointer, d, D, D, d, D, UPCAST)


@triton.jit
def store_matrix(pointer, tile_DD, D: tl.constexpr, BD: tl.constexpr):
    """Writes it."""
    d = tl.arange(0, BD)
    if D == BD:
        store_rows(pointer, tile_DD, BD, D, BD)
    else:
        store_tile(pointer, tile_DD, d, D, D, d, D)


@triton.jit
def unit_share(x_CD):
    """By what rows must be multiplied to have length 1."""
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(x_CD * x_CD, 1)), SHORTEST)


@triton.jit
def readout(a_DD, r_D, x_CD, bias, ACC: tl.constexpr):
    """The gate's numbers, ⟨x a, r⟩ + bias, and what x meets there, a r."""
    u_D = tl.sum(a_DD.to(ACC) * r_D[None, :], 1)
    return tl.sum(x_CD.to(ACC) * u_D[None, :], 1) + bias, u_D


@triton.jit
def sigmoid(z):
    """σ(z), of whatever size."""
    small = tl.exp(-tl.abs(z))
    return tl.where(z >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def log_sigmoid(z):
    """log σ(z), no lower than it may be."""
    return tl.maximum(tl.minimum(z, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(z))), LOWEST)


@triton.jit
def gates_of(
    z_C, zd_C, log_momentum, damping, max_rate, c, valid, H: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr,
    MOMENTUM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of a chunk's tokens: what is erased, the steps' damping, log decay, log momentum, and 1 for those there are."""
    there_C = tl.where(c < valid, 1.0, 0.0).to(ACC)
    e_C = max_rate * sigmoid(z_C) * there_C
    decay_C, momentum_C, damping_C = tl.zeros([C], dtype=ACC), tl.zeros([C], dtype=ACC), there_C
    if DECAY:
        decay_C = log_sigmoid(zd_C) * there_C
    if MOMENTUM:
        momentum_C = load_row(log_momentum, c, valid, H, ACC)
    if damping is not None:
        damping_C = load_row(damping, c, valid, H, ACC)
    return e_C, damping_C, decay_C, momentum_C, there_C


@triton.jit
def between(
    decay_C, momentum_C, there_C, narrow, MOMENTUM: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """How much of what a token erased, and of its step, is left before another one: A1 and G1 (C, C)."""
    total_C = tl.cumsum(decay_C, 0)
    A1_ij = lower(total_C - decay_C, total_C, False, C)
    G1_ij = A1_ij
    if MOMENTUM:
        sums_C = tl.cumsum(momentum_C, 0)
        Le_ij = lower(sums_C, sums_C, True, C) * there_C[:, None]
        G1_ij = dot(A1_ij.to(narrow), Le_ij.to(narrow), ACC, PRECISION)
    return A1_ij, G1_ij


@triton.jit
def decays(decay_C, momentum_C, there_C, MOMENTUM: tl.constexpr, C: tl.constexpr):
    """b1 and f1, then A, G and the momentum's own share behind the chunk (C,), and b, f, m there; see
    `reference.chunk_step`."""
    total_C = tl.cumsum(decay_C, 0)
    end = tl.sum(decay_C, 0)
    b1_C, a_end_C = tl.exp(total_C - decay_C), tl.exp(end - total_C)
    g_end_C, f1_C, l_end_C = a_end_C, b1_C, a_end_C
    b_end = tl.exp(end)
    f_end, m_end = b_end, b_end
    if MOMENTUM:
        sums_C = tl.cumsum(momentum_C, 0)
        m_C = tl.exp(sums_C) * there_C
        Le_ij = lower(sums_C, sums_C, True, C) * there_C[:, None]
        g_end_C = tl.sum(a_end_C[:, None] * Le_ij, 0)
        f1_C = tl.sum(lower(total_C - decay_C, total_C, False, C) * m_C[None, :], 1)
        last = tl.sum(momentum_C, 0)
        l_end_C = tl.exp(last - sums_C)
        f_end, m_end = tl.sum(a_end_C * m_C, 0), tl.exp(last)
    return b1_C, f1_C, a_end_C, g_end_C, l_end_C, b_end, f_end, m_end


@triton.jit
def shortening(g_CD, kk_C, max_gradient, BOUNDED: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    """By what slopes are multiplied, so that with keys of squared length kk gradients are no longer than they may be;
    and the squared length of the slopes."""
    gg_C = tl.sum(g_CD * g_CD, 1)
    share_C = tl.zeros([C], dtype=ACC) + 1.0
    if BOUNDED:
        share_C = 1.0 / tl.maximum(tl.sqrt(tl.maximum(kk_C * gg_C, 1e-30)) / max_gradient, 1.0)
    return share_C, gg_C
