"""What reaches the tokens of which `self_modifying` makes keys, values and gates, all chunks at once.

Nothing of it is needed to walk back, so that `write_back` leaves it to this.
"""

from __future__ import annotations

import triton
import triton.language as tl

from clplat.kernels.delta_memory.triton_tiles import chunk_of, load_tile, rows_at, store_tile
from clplat.kernels.self_modifying.triton_adjoints import load_source, read_out_back
from clplat.kernels.self_modifying.triton_tiles import DECAY_, KEY, RATE, VALUE, dot, load_rows, plus


@triton.jit
def make_back(
    x, rate_readout, decay_readout, kept_W, anchor, dkeys, dvalues, dmade, dx, dreadouts, cu_seqlens, offsets,
    x_row, x_token, x_head, x_memory, T, N, slots,
    H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    DECAY: tl.constexpr, MOMENTUM: tl.constexpr, ERASE: tl.constexpr, DIFFERENCE: tl.constexpr, BOUNDED: tl.constexpr,
    UNIT: tl.constexpr, OWN: tl.constexpr, SELF: tl.constexpr, PACKED: tl.constexpr, OFFSETS: tl.constexpr,
    UPCAST: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one chunk and head: dx, and its part of what reaches the readouts."""
    slot, head = tl.program_id(0), tl.program_id(1)
    n, i, row, start, valid, offset = chunk_of(slot, cu_seqlens, offsets, slots, N, T, C, PACKED, OFFSETS, BN)
    if valid <= 0:
        return
    size: tl.constexpr = D * D
    step: tl.constexpr = H * D * D
    resumed = (i == 0) & (offset > 0)
    c, d = tl.arange(0, C), tl.arange(0, BD)
    token, place = (row * T + start).to(tl.int64) * H + head, slot.to(tl.int64) * H + head
    x = rows_at(x, row, start, head, x_row, x_token, x_head)
    kept, own = kept_W + place * M * size, (n * M * H + head).to(tl.int64) * size
    dk_CD = load_rows(dkeys + place * C * D, C, D, BD, UPCAST)
    narrow = dk_CD.dtype
    many: tl.constexpr = M - 1 if OWN else 1
    dx += token * many * D
    a_DD = load_source(kept + KEY * size, anchor, own + KEY * step, resumed, narrow, D, BD, OFFSETS, UPCAST)
    dx_CD = dot(dk_CD, tl.trans(a_DD), ACC, PRECISION)
    if OWN:
        store_tile(dx + KEY * D, dx_CD, c, valid, H * many * D, d, D)
        dx_CD = tl.zeros([C, BD], dtype=ACC)
    dv_CD = load_rows(dvalues + place * C * D, C, D, BD, UPCAST)
    a_DD = load_source(kept + VALUE * size, anchor, own + VALUE * step, resumed, narrow, D, BD, OFFSETS, UPCAST)
    dx_CD = plus(dx_CD, dv_CD, tl.trans(a_DD), ACC, PRECISION)
    if OWN:
        store_tile(dx + VALUE * D, dx_CD, c, valid, H * many * D, d, D)
    for gate in tl.static_range(RATE, DECAY_ + DECAY):
        r_D = tl.load((rate_readout if gate == RATE else decay_readout) + head * D + d, mask=d < D, other=0.0)
        dz_C = tl.load(dmade + (place * 2 + gate - RATE) * C + c)
        x_CD = load_tile(x + (gate * x_memory if OWN else 0), c, valid, x_token, d, D, UPCAST)
        a_DD = load_source(kept + gate * size, anchor, own + gate * step, resumed, narrow, D, BD, OFFSETS, UPCAST)
        u_D, dr_D = read_out_back(a_DD, r_D, x_CD, dz_C, ACC)
        tl.store(dreadouts + (place * 2 + gate - RATE) * D + d, dr_D, mask=d < D)
        if OWN:
            store_tile(dx + gate * D, dz_C[:, None] * u_D[None, :], c, valid, H * many * D, d, D)
        else:
            dx_CD += dz_C[:, None] * u_D[None, :]
    if not OWN:
        store_tile(dx, dx_CD, c, valid, H * many * D, d, D)
