"""What all kernels of `delta_memory` share: where a chunk lies, its matrices of decay, its tiles in memory.

Names in kernels: C tokens of a chunk, D and E the widths of keys and values, N sequences, H key heads, V value heads; a
tile's shape stands behind its name, and ij means (C, C). Every chunk of every sequence has a slot, its place in buffers
that hold one entry per chunk. Empty segments and ragged ends need no information on the host: slots are handed out
generously and idle programs leave at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

HEBB, FROZEN, EXACT, GDN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
LOG2_E = tl.constexpr(1.4426950408889634)
NUM_VECTORS = tl.constexpr(7)
B_, F_, WG_, WL_, M_, B1_, F1_ = (tl.constexpr(number) for number in range(7))


@triton.jit
def sequence(n, cu_seqlens, offsets, T, PACKED: tl.constexpr, OFFSETS: tl.constexpr):
    """Batch row, first token and length of sequence n, and how many tokens of its first chunk are written already."""
    if PACKED:
        first = tl.load(cu_seqlens + n).to(tl.int32)
        length = tl.load(cu_seqlens + n + 1).to(tl.int32) - first
        row = n * 0
    else:
        first = n * 0
        length = n * 0 + T
        row = n
    offset = tl.load(offsets + n).to(tl.int32) if OFFSETS else n * 0
    return row, first, length, offset


@triton.jit
def num_chunks(length, offset, C: tl.constexpr):
    """Chunks of a sequence; the first holds `offset` earlier tokens."""
    return tl.where(length > 0, (length + offset + C - 1) // C, 0)


@triton.jit
def chunk_rows(i, length, offset, C: tl.constexpr):
    """First token of chunk i within its sequence, and how many tokens it has."""
    start = tl.maximum(0, i * C - offset)
    return start, tl.minimum(length, (i + 1) * C - offset) - start


@triton.jit
def first_slot(n, cu_seqlens, slots, C: tl.constexpr, PACKED: tl.constexpr):
    """The slot of the first chunk of sequence n; `slots` a sequence where they are not packed."""
    if PACKED:
        return tl.load(cu_seqlens + n).to(tl.int32) // C + 2 * n
    return n * slots


@triton.jit
def owner(slot, cu_seqlens, slots, N, C: tl.constexpr, PACKED: tl.constexpr, BN: tl.constexpr):
    """The sequence that a slot belongs to, and which of its chunks the slot is."""
    if PACKED:
        n_BN = tl.arange(0, BN)
        first_BN = tl.load(cu_seqlens + n_BN, mask=n_BN < N, other=0).to(tl.int32) // C + 2 * n_BN
        n = tl.sum(tl.where((n_BN < N) & (first_BN <= slot), 1, 0), 0) - 1
        return n, slot - (tl.load(cu_seqlens + n).to(tl.int32) // C + 2 * n)
    return slot // slots, slot % slots


@triton.jit
def chunk_of(
    slot, cu_seqlens, offsets, slots, N, T, C: tl.constexpr, PACKED: tl.constexpr, OFFSETS: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """The chunk that lies in a slot: its sequence n, its number i there, batch row, first token of the row, how many
    tokens it has (none in an idle slot), and `sequence`'s offset.
    """
    n, i = owner(slot, cu_seqlens, slots, N, C, PACKED, BN)
    row, first, length, offset = sequence(n, cu_seqlens, offsets, T, PACKED, OFFSETS)
    start, valid = chunk_rows(i, length, offset, C)
    return n, i, row, first + start, valid, offset


@triton.jit
def factors(vectors, place, valid, MODE: tl.constexpr, MOMENTUM: tl.constexpr, C: tl.constexpr):
    """Of the chunk in a place: b, f, the writes' weights for W and S, b′, f′, and what is left of W and S at its end.

    A walk asks for them one chunk ahead, so that it never waits for them; of a chunk without tokens they are zero. b
    stands for what a mode has not.
    """
    here, c, some = vectors + place * NUM_VECTORS * C, tl.arange(0, C), valid > 0
    there = c < tl.where(some, C, 0)
    b_C, wg_C = tl.load(here + B_ * C + c, mask=there, other=0.0), tl.load(here + WG_ * C + c, mask=there, other=0.0)
    b_end = tl.load(here + B_ * C + valid - 1, mask=some, other=0.0)
    f_C, wl_C, b1_C, f1_C, f_end, m_end = b_C, b_C, b_C, b_C, b_end, b_end
    if MOMENTUM:
        f_C = tl.load(here + F_ * C + c, mask=there, other=0.0)
        wl_C = tl.load(here + WL_ * C + c, mask=there, other=0.0)
        f_end = tl.load(here + F_ * C + valid - 1, mask=some, other=0.0)
        m_end = tl.load(here + M_ * C + valid - 1, mask=some, other=0.0)
    if MODE >= EXACT:
        b1_C = tl.load(here + B1_ * C + c, mask=there, other=0.0)
        if MOMENTUM:
            f1_C = tl.load(here + F1_ * C + c, mask=there, other=0.0)
    return b_C, f_C, wg_C, wl_C, b1_C, f1_C, b_end, f_end, m_end


@triton.jit
def rows_at(pointer, row, token, head, row_stride, token_stride, head_stride):
    """Where the features of one head begin, at one token of one batch row."""
    return pointer + row.to(tl.int64) * row_stride + token.to(tl.int64) * token_stride + head * head_stride


@triton.jit
def lower(total_C, base_C, DIAGONAL: tl.constexpr, C: tl.constexpr):
    """exp(total_i − base_j) for j < i, and j = i with DIAGONAL; zero elsewhere."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    kept = i >= j if DIAGONAL else i > j
    return tl.exp2(tl.where(kept, (total_C * LOG2_E)[:, None] - (base_C * LOG2_E)[None, :], float("-inf")))


@triton.jit
def upper(total_C, base_C, DIAGONAL: tl.constexpr, C: tl.constexpr):
    """The transpose of `lower`, computed and not transposed: Hopper's compilers mistake transposed accumulators."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    kept = i <= j if DIAGONAL else i < j
    return tl.exp2(tl.where(kept, (total_C * LOG2_E)[None, :] - (base_C * LOG2_E)[:, None], float("-inf")))


@triton.jit
def _linked(kept, value, next_kept, next_value):
    return kept * next_kept, value * next_kept + next_value


@triton.jit
def running(x_C, kept_C):
    """y_i = x_i + kept_i y_{i−1}: a product with a triangle of decays, without the triangle."""
    return tl.associative_scan((kept_C, x_C), 0, _linked)[1]


@triton.jit
def running_back(x_C, next_kept_C):
    """y_i = x_i + kept_{i+1} y_{i+1}, given kept_{i+1}: a product with the transposed triangle."""
    return tl.associative_scan((next_kept_C, x_C), 0, _linked, reverse=True)[1]


@triton.jit
def last_row(total_C, last, C: tl.constexpr):
    """Row `last` of `lower(total_C, total_C, True, C)`, without the rest."""
    c = tl.arange(0, C)
    end = tl.sum(tl.where(c == last, total_C, 0.0), 0)
    return tl.where(c <= last, tl.exp(tl.where(c <= last, end - total_C, 0.0)), 0.0)


@triton.jit
def load_tile(pointer, rows, valid, stride, columns, width, UPCAST: tl.constexpr):
    """A tile (rows, columns) of a matrix with `valid` rows, `stride` apart, and `width` columns; zero outside.

    UPCAST is for the interpreter, which cannot compute in bf16.
    """
    mask = (rows < valid)[:, None] & (columns < width)[None, :]
    tile = tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def load_turned(pointer, rows, valid, stride, columns, width, UPCAST: tl.constexpr):
    """The same tile transposed (columns, rows), by the order of its addresses."""
    mask = (columns < width)[:, None] & (rows < valid)[None, :]
    tile = tl.load(pointer + rows[None, :] * stride + columns[:, None], mask=mask, other=0.0)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def store_tile(pointer, tile, rows, valid, stride, columns, width):
    """Writes what of a tile lies inside a matrix, in the matrix's type."""
    mask = (rows < valid)[:, None] & (columns < width)[None, :]
    tl.store(pointer + rows[:, None] * stride + columns[None, :], tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def store_turned(pointer, tile, rows, valid, stride, columns, width):
    """The same of a tile (columns, rows)."""
    mask = (columns < width)[:, None] & (rows < valid)[None, :]
    tl.store(pointer + rows[None, :] * stride + columns[:, None], tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_row(pointer, rows, valid, stride, ACC: tl.constexpr):
    """One number a token, zero outside."""
    return tl.load(pointer + rows * stride, mask=rows < valid, other=0.0).to(ACC)
