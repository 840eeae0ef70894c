"""The selective scan of Mamba: a linear recurrence whose decay and inputs depend on the token.

    h_t = exp(Δ_t A) ⊙ h_{t−1} + (Δ_t x_t) B_tᵀ        y_t = h_t C_t        (Gu & Dao 2023, arXiv:2312.00752, eq. 2-4)

`token_loop` is the definition. `selective_scan` computes the same in chunks and keeps only the state between them for
the backward pass. Decays stay products of numbers in [0, 1] and are never divided by, as the closed form of a
recurrence would: nothing overflows however fast a state forgets, and a decay of 0 forgets everything.

Shapes: B rows, T tokens, L tokens of a chunk, C channels, N state size. Computed in at least float32.
"""

from __future__ import annotations

from math import ceil, isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def token_loop(
    x_BTC: Tensor, step_BTC: Tensor, rate_CN: Tensor, b_BTN: Tensor, c_BTN: Tensor, first_BCN: Tensor, keep_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """Answers (B, T, C) and the last state (B, C, N), one token after the other; see `selective_scan`."""
    state_BCN, answers = first_BCN, []
    for t in range(x_BTC.shape[1]):
        decay_BCN = (step_BTC[:, t].unsqueeze(-1) * rate_CN).exp() * keep_BT[:, t, None, None]
        state_BCN = decay_BCN * state_BCN + (step_BTC[:, t] * x_BTC[:, t]).unsqueeze(-1) * b_BTN[:, t].unsqueeze(1)
        answers.append((state_BCN * c_BTN[:, t].unsqueeze(1)).sum(-1))
    return torch.stack(answers, dim=1), state_BCN


def selective_scan(
    x_BTC: Tensor,
    step_BTC: Tensor,
    rate_CN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    *,
    first_BCN: Tensor | None = None,
    keep_BT: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Answers (B, T, C) and the last state (B, C, N).

    `step_BTC` is Δ ≥ 0 (0 leaves the state as it is), `rate_CN` is A ≤ 0, `first_BCN` the state before the first
    token (None: zero), `keep_BT` is 0 where the state before a token is forgotten and 1 elsewhere (None: 1). Memory
    beyond the inputs is a few times B·chunk·C·N numbers for a moment, and B·C·N for every chunk. `chunk` defaults to
    64 tokens on a CPU, whose caches then hold one (fastest of 16 to 256), and to 512 elsewhere, for fewer launches.
    """
    if chunk is None:
        chunk = 64 if x_BTC.device.type == "cpu" else 512
    precise = torch.promote_types(x_BTC.dtype, torch.float32)
    inputs = [part.to(precise) for part in (x_BTC, step_BTC, rate_CN, b_BTN, c_BTN)]
    if first_BCN is None:
        first_BCN = inputs[0].new_zeros(len(x_BTC), *rate_CN.shape)
    keep_BT = None if keep_BT is None else keep_BT.to(precise)
    with torch.autocast(x_BTC.device.type, enabled=False):
        # functorch knows no such function; what it transforms is then differentiated operation by operation.
        if torch._C._are_functorch_transforms_active():
            return _through_chunks(*inputs, first_BCN.to(precise), keep_BT, chunk)[:2]
        return _SelectiveScan.apply(*inputs, first_BCN.to(precise), keep_BT, chunk)


class _SelectiveScan(Function):
    """The scan with a backward pass that computes a chunk's states again, last chunk first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, rate: Tensor, b: Tensor, c: Tensor, *rest: Any) -> Any:
        first, keep, chunk = rest
        answers, last, starts = _through_chunks(x, step, rate, b, c, first, keep, chunk)
        ctx.save_for_backward(x, step, rate, b, c, keep, *starts)
        ctx.chunk = chunk
        return answers, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_BTC: Tensor, carry_BCN: Tensor) -> Any:
        x, step, rate, b, c, keep, *starts = ctx.saved_tensors
        parts: list[list[Tensor]] = []
        with torch.autocast(x.device.type, enabled=False):
            for number in reversed(range(len(starts))):
                place = slice(number * ctx.chunk, (number + 1) * ctx.chunk)
                inputs = (x[:, place], step[:, place], rate, b[:, place], c[:, place])
                kept = None if keep is None else keep[:, place]
                *found, carry_BCN = _chunk_slopes(*inputs, starts[number], kept, slope_BTC[:, place], carry_BCN)
                parts.append(found)
        slopes = [list(reversed(found)) for found in zip(*parts)]
        x_slope, step_slope, b_slope, c_slope = (torch.cat(slopes[place], dim=1) for place in (0, 1, 3, 4))
        return x_slope, step_slope, torch.stack(slopes[2]).sum(0), b_slope, c_slope, carry_BCN, None, None


def _through_chunks(
    x: Tensor, step: Tensor, rate: Tensor, b: Tensor, c: Tensor, first: Tensor, keep: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Answers, last state, and the state before each chunk."""
    answers, starts, state = [], [], first
    for start in range(0, x.shape[1], chunk):
        place = slice(start, start + chunk)
        kept = None if keep is None else keep[:, place]
        decay, write = _decay_and_write(x[:, place], step[:, place], rate, b[:, place], kept)
        starts.append(state)
        states, state = linear_recurrence(decay, write, state)
        answers.append((states @ c[:, place].unsqueeze(-1)).squeeze(-1))
    return torch.cat(answers, dim=1), state, starts


def _chunk_slopes(
    x: Tensor,
    step: Tensor,
    rate: Tensor,
    b: Tensor,
    c: Tensor,
    start: Tensor,
    keep: Tensor | None,
    slope: Tensor,
    carry: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of x, step, rate, b, c of one chunk and of the state before it.

    `slope` is that of the chunk's answers, `carry` that of its last state. The gradient of a state is a recurrence of
    the same kind from the last token to the first.
    """
    decay, write = _decay_and_write(x, step, rate, b, keep)
    states, _ = linear_recurrence(decay, write, start)
    before = torch.cat([start.unsqueeze(1), states[:, :-1]], dim=1)
    c_slope = (slope.unsqueeze(2) @ states).squeeze(2)
    following = torch.cat([decay[:, 1:], torch.ones_like(decay[:, :1])], dim=1)
    state_slope, _ = linear_recurrence(following, slope.unsqueeze(-1) * c.unsqueeze(2), carry, backwards=True)
    carry = decay[:, 0] * state_slope[:, 0]
    write_slope = (state_slope @ b.unsqueeze(-1)).squeeze(-1)
    b_slope = ((step * x).unsqueeze(2) @ state_slope).squeeze(2)
    exponent_slope = state_slope * before * decay
    step_slope = x * write_slope + (exponent_slope * rate).sum(-1)
    rate_slope = (exponent_slope * step.unsqueeze(-1)).sum((0, 1))
    return step * write_slope, step_slope, rate_slope, b_slope, c_slope, carry


def _decay_and_write(x: Tensor, step: Tensor, rate: Tensor, b: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """What each token leaves of the state before it and what it adds, both (B, L, C, N)."""
    decay = (step.unsqueeze(-1) * rate).exp()
    if keep is not None:
        decay = decay * keep[..., None, None]
    return decay, (step * x).unsqueeze(-1) * b.unsqueeze(2)


def linear_recurrence(
    decay_BLCN: Tensor, write_BLCN: Tensor, first_BCN: Tensor, *, backwards: bool = False
) -> tuple[Tensor, Tensor]:
    """All states h_t = decay_t ⊙ h_{t−1} + write_t (B, L, C, N), and the last one (B, C, N).

    About √L groups of √L tokens: first what each group alone makes of no state and leaves of one, then the states
    between groups, then all groups side by side from those: 3·√L operations and two passes over the input.
    `backwards` goes from the last token to the first.
    """
    length = decay_BLCN.shape[1]
    size = isqrt(length - 1) + 1
    groups = ceil(length / size)
    padding = (0, 0, 0, 0, 0, groups * size - length)
    if padding[-1]:
        decay_BLCN, write_BLCN = F.pad(decay_BLCN, padding, value=1.0), F.pad(write_BLCN, padding)
    decay = decay_BLCN.unflatten(1, (groups, size)).unbind(2)
    write = write_BLCN.unflatten(1, (groups, size)).unbind(2)
    order = range(size)[::-1] if backwards else range(size)
    made, left = write[order[0]], decay[order[0]]
    for place in order[1:]:
        made, left = torch.addcmul(write[place], decay[place], made), left * decay[place]
    state, starts = first_BCN, [first_BCN] * groups
    for group in range(groups)[::-1] if backwards else range(groups):
        starts[group] = state
        state = torch.addcmul(made[:, group], left[:, group], state)
    inside, states = torch.stack(starts, dim=1), [first_BCN] * size
    for place in order:
        inside = torch.addcmul(write[place], decay[place], inside)
        states[place] = inside
    return torch.stack(states, dim=2).flatten(1, 2)[:, :length], state
