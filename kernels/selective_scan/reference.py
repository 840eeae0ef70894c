"""What the selective scan is, one token after the other, and the same in chunks, with its gradients, in PyTorch.

    h_t = exp(Δ_t A) ⊙ h_{t−1} + B_t (Δ_t x_t)ᵀ        y_t = C_tᵀ h_t        (Gu & Dao 2023, arXiv:2312.00752, eq. 2-4)

`token_loop` is the definition. In chunks only the state between them is kept for the backward pass. Decays stay
products of numbers in [0, 1] and are never divided by, as the closed form of a recurrence would: nothing overflows
however fast a state forgets, and a decay of 0 forgets everything.

Shapes: B rows, T tokens, L tokens of a chunk, C channels, N state size. Computed in at least float32.
"""

from __future__ import annotations

from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor


def token_loop(
    x_BTC: Tensor, step_BTC: Tensor, rate_NC: Tensor, b_BTN: Tensor, c_BTN: Tensor, first_BNC: Tensor, keep_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """Answers (B, T, C) and the last state (B, N, C), one token after the other; see `selective_scan`."""
    state_BNC, answers = first_BNC, []
    for t in range(x_BTC.shape[1]):
        decay_BNC = (step_BTC[:, t].unsqueeze(1) * rate_NC).exp() * keep_BT[:, t, None, None]
        state_BNC = decay_BNC * state_BNC + (step_BTC[:, t] * x_BTC[:, t]).unsqueeze(1) * b_BTN[:, t].unsqueeze(-1)
        answers.append((state_BNC * c_BTN[:, t].unsqueeze(-1)).sum(1))
    return torch.stack(answers, dim=1), state_BNC


def through_chunks(
    x: Tensor, step: Tensor, rate: Tensor, b: Tensor, c: Tensor, first: Tensor, keep: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Answers, last state, and the state before each chunk."""
    answers, starts, state = [], [], first
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, x.shape[1], chunk):
            place = slice(start, start + chunk)
            kept = None if keep is None else keep[:, place]
            decay, write = _decay_and_write(x[:, place], step[:, place], rate, b[:, place], kept)
            starts.append(state)
            states, state = linear_recurrence(decay, write, state)
            answers.append((c[:, place].unsqueeze(2) @ states).squeeze(2))
    return torch.cat(answers, dim=1), state, torch.stack(starts)


def slopes_through_chunks(
    x: Tensor, step: Tensor, rate: Tensor, b: Tensor, c: Tensor, keep: Tensor | None, starts: Tensor, slope: Tensor,
    carry: Tensor, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, step, rate, b, c and the first state: states of a chunk are computed again, last chunk first."""
    parts: list[tuple[Tensor, ...]] = []
    with torch.autocast(x.device.type, enabled=False):
        for number in reversed(range(len(starts))):
            place = slice(number * chunk, (number + 1) * chunk)
            inputs = (x[:, place], step[:, place], rate, b[:, place], c[:, place])
            kept = None if keep is None else keep[:, place]
            *found, carry = _chunk_slopes(*inputs, starts[number], kept, slope[:, place], carry)
            parts.append(tuple(found))
    slopes = list(zip(*reversed(parts)))
    x_slope, step_slope, b_slope, c_slope = (torch.cat(slopes[place], dim=1) for place in (0, 1, 3, 4))
    return x_slope, step_slope, torch.stack(slopes[2]).sum(0), b_slope, c_slope, carry


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
    c_slope = (states @ slope.unsqueeze(-1)).squeeze(-1)
    following = torch.cat([decay[:, 1:], torch.ones_like(decay[:, :1])], dim=1)
    state_slope, _ = linear_recurrence(following, slope.unsqueeze(2) * c.unsqueeze(-1), carry, backwards=True)
    carry = decay[:, 0] * state_slope[:, 0]
    write_slope = (b.unsqueeze(2) @ state_slope).squeeze(2)
    b_slope = (state_slope @ (step * x).unsqueeze(-1)).squeeze(-1)
    exponent_slope = before.mul_(decay).mul_(state_slope)  # in place: new memory of this size costs as much as the sum
    step_slope = x * write_slope + (exponent_slope * rate).sum(2)
    rate_slope = exponent_slope.mul_(step.unsqueeze(2)).sum((0, 1))
    return step * write_slope, step_slope, rate_slope, b_slope, c_slope, carry


def _decay_and_write(x: Tensor, step: Tensor, rate: Tensor, b: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """What each token leaves of the state before it and what it adds, both (B, L, N, C)."""
    decay = (step.unsqueeze(2) * rate).exp_()
    if keep is not None:
        decay = decay * keep[..., None, None]
    return decay, (step * x).unsqueeze(2) * b.unsqueeze(-1)


def linear_recurrence(
    decay_BLNC: Tensor, write_BLNC: Tensor, first_BNC: Tensor, *, backwards: bool = False
) -> tuple[Tensor, Tensor]:
    """All states h_t = decay_t ⊙ h_{t−1} + write_t (B, L, N, C), and the last one (B, N, C).

    About √L groups of about √L tokens, a power of two: first what each group alone makes of no state and leaves of
    one, then the states between groups, then all groups side by side from those: some 3·√L operations and two passes
    over the input, filled up where groups do not fit.
    `backwards` goes from the last token to the first.
    """
    length = decay_BLNC.shape[1]
    size = 1 << (length.bit_length() // 2)
    groups = ceil(length / size)
    padding = (0, 0, 0, 0, 0, groups * size - length)
    if padding[-1]:
        decay_BLNC, write_BLNC = F.pad(decay_BLNC, padding, value=1.0), F.pad(write_BLNC, padding)
    decay = decay_BLNC.unflatten(1, (groups, size)).unbind(2)
    write = write_BLNC.unflatten(1, (groups, size)).unbind(2)
    order = range(size)[::-1] if backwards else range(size)
    made, left = write[order[0]], decay[order[0]]
    for place in order[1:]:
        made, left = torch.addcmul(write[place], decay[place], made), left * decay[place]
    state, starts = first_BNC, [first_BNC] * groups
    for group in range(groups)[::-1] if backwards else range(groups):
        starts[group] = state
        state = torch.addcmul(made[:, group], left[:, group], state)
    inside, states = torch.stack(starts, dim=1), [first_BNC] * size
    for place in order:
        inside = torch.addcmul(write[place], decay[place], inside)
        states[place] = inside
    return torch.stack(states, dim=2).flatten(1, 2)[:, :length], state
