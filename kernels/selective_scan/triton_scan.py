"""The kernels of the selective scan: one program walks one row's tokens for some channels, its state in registers.

Names: T tokens, C channels, N state size (BN, BC: padded, of one program), L tokens of a chunk. Tensors are contiguous
and all of one type, float32 or float64.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def token_inputs(x, step, b, c, keep, token, channel_C, number_N, C, N, KEEP: tl.constexpr):
    """x and Δ of one token's channels, B and C of it, and what is kept of the state before."""
    there_C, there_N = channel_C < C, number_N < N
    x_C = tl.load(x + token * C + channel_C, mask=there_C, other=0.0)
    step_C = tl.load(step + token * C + channel_C, mask=there_C, other=0.0)
    b_N = tl.load(b + token * N + number_N, mask=there_N, other=0.0)
    c_N = tl.load(c + token * N + number_N, mask=there_N, other=0.0)
    kept = tl.load(keep + token) if KEEP else 1.0
    return x_C, step_C, b_N, c_N, kept


@triton.jit
def forward(
    x, step, rate, b, c, first, keep, answers, last, starts, rows, T, C, N, L,
    BN: tl.constexpr, BC: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Writes the answers, the last state, and the state before each chunk (chunks, rows, N, C)."""
    row, channel_C = tl.program_id(0).to(tl.int64), tl.program_id(1) * BC + tl.arange(0, BC)
    number_N = tl.arange(0, BN)
    place_NC = number_N[:, None] * C + channel_C[None, :]
    there_NC = (number_N < N)[:, None] & (channel_C < C)[None, :]
    rate_NC = tl.load(rate + place_NC, mask=there_NC, other=0.0)
    state_NC = tl.load(first + row * N * C + place_NC, mask=there_NC, other=0.0)
    for t in range(T):
        if t % L == 0:
            tl.store(starts + ((t // L) * rows + row) * N * C + place_NC, state_NC, mask=there_NC)
        token = row * T + t
        x_C, step_C, b_N, c_N, kept = token_inputs(x, step, b, c, keep, token, channel_C, number_N, C, N, KEEP)
        decay_NC = tl.exp(step_C[None, :] * rate_NC) * kept
        state_NC = decay_NC * state_NC + b_N[:, None] * (step_C * x_C)[None, :]
        tl.store(answers + token * C + channel_C, tl.sum(state_NC * c_N[:, None], 0), mask=channel_C < C)
    tl.store(last + row * N * C + place_NC, state_NC, mask=there_NC)


@triton.jit
def backward(
    x, step, rate, b, c, keep, starts, slope, carry, states, dx, dstep, drate, db, dc, dfirst, rows, T, C, N, L,
    BN: tl.constexpr, BC: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Gradients, last chunk first: of B and C for each block of channels (blocks, rows, T, N), of A for each row.

    `slope` is that of the answers, `carry` of the last state. `states` (rows, L, N, C) is room for one chunk's states,
    which are computed again.
    """
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel_C, number_N = block * BC + tl.arange(0, BC), tl.arange(0, BN)
    place_NC = number_N[:, None] * C + channel_C[None, :]
    there_C, there_N = channel_C < C, number_N < N
    there_NC = there_N[:, None] & there_C[None, :]
    rate_NC = tl.load(rate + place_NC, mask=there_NC, other=0.0)
    slope_NC = tl.load(carry + row * N * C + place_NC, mask=there_NC, other=0.0)
    drate_NC = tl.zeros_like(rate_NC)
    chunks = tl.cdiv(T, L)
    for passed in range(chunks):
        chunk = chunks - 1 - passed
        start, stop = chunk * L, tl.minimum(T, chunk * L + L)
        state_NC = tl.load(starts + (chunk * rows + row) * N * C + place_NC, mask=there_NC, other=0.0)
        for t in range(start, stop):
            tl.store(states + (row * L + t - start) * N * C + place_NC, state_NC, mask=there_NC)
            x_C, step_C, b_N, c_N, kept = token_inputs(
                x, step, b, c, keep, row * T + t, channel_C, number_N, C, N, KEEP
            )
            decay_NC = tl.exp(step_C[None, :] * rate_NC) * kept
            state_NC = decay_NC * state_NC + b_N[:, None] * (step_C * x_C)[None, :]
        # What other threads of this program wrote is read below.
        tl.debug_barrier()
        for back in range(stop - start):
            t = stop - 1 - back
            token = row * T + t
            x_C, step_C, b_N, c_N, kept = token_inputs(x, step, b, c, keep, token, channel_C, number_N, C, N, KEEP)
            before_NC = tl.load(states + (row * L + t - start) * N * C + place_NC, mask=there_NC, other=0.0)
            answer_C = tl.load(slope + token * C + channel_C, mask=there_C, other=0.0)
            decay_NC = tl.exp(step_C[None, :] * rate_NC) * kept
            write_C = step_C * x_C
            state_NC = decay_NC * before_NC + b_N[:, None] * write_C[None, :]
            slope_NC += c_N[:, None] * answer_C[None, :]
            own = ((block * rows + row) * T + t) * N + number_N
            tl.store(dc + own, tl.sum(state_NC * answer_C[None, :], 1), mask=there_N)
            tl.store(db + own, tl.sum(slope_NC * write_C[None, :], 1), mask=there_N)
            dwrite_C = tl.sum(slope_NC * b_N[:, None], 0)
            slope_NC *= decay_NC
            dexponent_NC = slope_NC * before_NC
            drate_NC += dexponent_NC * step_C[None, :]
            tl.store(dx + token * C + channel_C, step_C * dwrite_C, mask=there_C)
            dstep_C = x_C * dwrite_C + tl.sum(dexponent_NC * rate_NC, 0)
            tl.store(dstep + token * C + channel_C, dstep_C, mask=there_C)
        # The next chunk's states take the place of these.
        tl.debug_barrier()
    tl.store(dfirst + row * N * C + place_NC, slope_NC, mask=there_NC)
    tl.store(drate + row * N * C + place_NC, drate_NC, mask=there_NC)
