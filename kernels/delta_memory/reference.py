"""What `delta_memory` computes: a loop over tokens, which defines it, and a chunk at a time, which is its CPU form.

Shapes: B sequences of T tokens, H heads of queries and keys with D features, V value heads with E features, L tokens of
one chunk. V is a multiple of H: V/H value heads in a row share one key head. Per value head, with gates
a = exp(log_decay) and η = exp(log_momentum):

    e_t = W_srcᵀ k_t − v_t      S_t = η_t S_{t−1} − rate_t k_t e_tᵀ      W_t = a_t W_{t−1} + S_t      o_t = W_tᵀ q_t

`hebb`: e_t = −v_t. `frozen`: W_src is W at the chunk's start (Titans, TTT). `exact`: W_{t−1}. `gdn`: a_t W_{t−1}, the
gated delta rule. Without `log_momentum`, η = 0.

Sources: Sun et al. 2024 (arXiv:2407.04620), Yang et al. 2024 (arXiv:2412.06464), Behrouz et al. 2024 (2501.00663).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Mode = Literal["hebb", "frozen", "exact", "gdn"]
MODES: tuple[str, ...] = get_args(Mode)
LOWEST_GATE = -12.0


class MemoryState(NamedTuple):
    """What a memory carries from one call to the next, per sequence and value head."""

    W: Tensor
    """(B, V, D, E), the memory."""
    S: Tensor | None = None
    """(B, V, D, E), the momentum; None without."""
    anchor: Tensor | None = None
    """(B, V, D, E), W at the start of a `frozen` chunk that has not ended; None where a new chunk begins."""
    offset: Tensor | None = None
    """(B,) int32, tokens of that chunk which are written already."""


class Inputs(NamedTuple):
    """The token-wise arguments, sliced together: q, k (B, T, H, D), v (B, T, V, E), gates (B, T, V)."""

    q: Tensor
    k: Tensor
    v: Tensor
    rate: Tensor
    log_decay: Tensor | None
    log_momentum: Tensor | None

    def tokens(self, start: int, stop: int) -> Inputs:
        """The tokens start..stop of every sequence."""
        return Inputs(*(None if part is None else part[:, start:stop] for part in self))

    def heads_first(self) -> Inputs:
        """q, k (B, V, T, D), v (B, V, T, E), gates (B, V, T) in fp32 or wider; key heads are repeated."""
        group = self.v.shape[2] // self.q.shape[2]
        q, k = (part.repeat_interleave(group, 2) if group > 1 else part for part in (self.q, self.k))
        wide = torch.promote_types(self.v.dtype, torch.float32)
        parts = (q, k, *self[2:])
        return Inputs(*(None if part is None else part.transpose(1, 2).to(wide) for part in parts))


def empty_state(inputs: Inputs, count: int) -> MemoryState:
    """A memory that knows nothing, for `count` sequences."""
    shape = (count, inputs.v.shape[2], inputs.k.shape[3], inputs.v.shape[3])
    wide = torch.promote_types(inputs.v.dtype, torch.float32)
    zeros = torch.zeros(shape, dtype=wide, device=inputs.v.device)
    return MemoryState(zeros, None if inputs.log_momentum is None else torch.zeros_like(zeros))


def recurrent(
    inputs: Inputs, *, mode: Mode, chunk: int, state: MemoryState, offset: int = 0
) -> tuple[Tensor, MemoryState]:
    """The definition: one token after another. Returns outputs (B, T, V, E) and the state behind the last token."""
    q, k, v, rate, log_decay, log_momentum = inputs.heads_first()
    W, S, anchor = state.W, state.S, state.W if state.anchor is None else state.anchor
    outputs = []
    for t in range(q.shape[2]):
        if (offset + t) % chunk == 0:
            anchor = W
        decayed = W if log_decay is None else W * log_decay[:, :, t, None, None].exp()
        source = {"hebb": None, "frozen": anchor, "exact": W, "gdn": decayed}[mode]
        error = -v[:, :, t] if source is None else torch.einsum("bvd,bvde->bve", k[:, :, t], source) - v[:, :, t]
        step = -torch.einsum("bvd,bve->bvde", k[:, :, t] * rate[:, :, t, None], error)
        if log_momentum is not None:
            assert S is not None
            S = step = S * log_momentum[:, :, t, None, None].exp() + step
        W = decayed + step
        outputs.append(torch.einsum("bvd,bvde->bve", q[:, :, t], W))
    o = torch.stack(outputs, 1) if outputs else v.transpose(1, 2)
    return o.to(inputs.v.dtype), _closed(W, S, anchor, (offset + q.shape[2]) % chunk, mode)


def chunked(
    inputs: Inputs, *, mode: Mode, chunk: int, state: MemoryState, offset: int = 0
) -> tuple[Tensor, MemoryState]:
    """The same a chunk at a time, differentiable, in the inputs' precision but at least fp32."""
    W, S, anchor = state.W, state.S, state.W if state.anchor is None else state.anchor
    outputs = []
    for start, stop in chunk_bounds(inputs.v.shape[1], chunk, offset):
        if start or not offset:
            anchor = W
        o, W, S = chunk_step(inputs.tokens(start, stop), W, S, anchor, mode)
        outputs.append(o)
    o = torch.cat(outputs, 1) if outputs else inputs.v
    return o.to(inputs.v.dtype), _closed(W, S, anchor, (offset + inputs.v.shape[1]) % chunk, mode)


def chunk_bounds(length: int, chunk: int, offset: int) -> Iterator[tuple[int, int]]:
    """First token and end of each chunk, where the first chunk holds `offset` earlier tokens already."""
    start = 0
    while start < length:
        stop = min(length, start + chunk - (offset if start == 0 else 0))
        yield start, stop
        start = stop


def chunk_step(
    tokens: Inputs, W: Tensor, S: Tensor | None, anchor: Tensor, mode: Mode
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One chunk of at most L tokens: outputs (B, L, V, E) and the states behind it.

    G (L, L) is how much of the write of token j is left in W at token i, b and f (L) how much of W and S at the start.
    """
    q, k, v, rate, log_decay, log_momentum = tokens.heads_first()
    G, b, f, Le, m = decay_matrices(rate, log_decay, log_momentum)
    if mode == "hebb":
        E = -v
    elif mode == "frozen":
        E = k @ anchor - v
    else:
        G1, b1, f1 = shifted(G, b, f, None if log_decay is None else log_decay.exp(), mode)
        R = b1[..., None] * (k @ W) - v
        if S is not None:
            R = R + f1[..., None] * (k @ S)
        # E = R − A E with A strictly lower triangular: each error knows the writes before it.
        A = (k @ k.mT).tril(-1) * G1 * rate[..., None, :]
        identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        E = torch.linalg.solve_triangular(A + identity, R, upper=False, unitriangular=True)
    o = b[..., None] * (q @ W) - ((q @ k.mT) * G * rate[..., None, :]) @ E
    W1 = b[..., -1:, None] * W - (k * (G[..., -1, :] * rate)[..., None]).mT @ E
    if S is None:
        return o.transpose(1, 2), W1, None
    o = o + f[..., None] * (q @ S)
    W1 = W1 + f[..., -1:, None] * S
    S1 = m[..., -1:, None] * S - (k * (Le[..., -1, :] * rate)[..., None]).mT @ E
    return o.transpose(1, 2), W1, S1


def decay_matrices(
    like: Tensor, log_decay: Tensor | None, log_momentum: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """G (…, L, L), b, f (…, L), and of momentum alone Le (…, L, L), m (…, L); `like` (…, L) gives shape and type."""
    La, b = _triangle(torch.zeros_like(like) if log_decay is None else log_decay)
    if log_momentum is None:
        zero = torch.zeros_like(like)
        return La, b, zero, torch.zeros_like(La), zero
    Le, m = _triangle(log_momentum)
    # All terms are positive: no division and no cancellation, whatever the gates.
    return La @ Le, b, (La @ m[..., None])[..., 0], Le, m


def shifted(G: Tensor, b: Tensor, f: Tensor, decay: Tensor | None, mode: Mode) -> tuple[Tensor, Tensor, Tensor]:
    """G, b and f as the error of a token sees them: before its own write, for `gdn` after its own decay."""
    G1, f1 = torch.zeros_like(G), torch.zeros_like(f)
    G1[..., 1:, :], f1[..., 1:] = G[..., :-1, :], f[..., :-1]
    if mode == "gdn":
        return (G1, b, f1) if decay is None else (G1 * decay[..., None], b, f1 * decay)
    return G1, torch.cat([torch.ones_like(b[..., :1]), b[..., :-1]], -1), f1


def _triangle(log_gate: Tensor) -> tuple[Tensor, Tensor]:
    """exp of sums of log gates over j < s ≤ i, zero above the diagonal, and over s ≤ i."""
    total = log_gate.cumsum(-1)
    span = total[..., :, None] - total[..., None, :]
    upper = torch.ones_like(span, dtype=torch.bool).triu(1)
    return span.masked_fill(upper, -torch.inf).exp(), total.exp()


def _closed(W: Tensor, S: Tensor | None, anchor: Tensor, offset: int, mode: Mode) -> MemoryState:
    if mode != "frozen" or offset == 0:
        return MemoryState(W, S)
    return MemoryState(W, S, anchor, torch.full((len(W),), offset, dtype=torch.int32, device=W.device))
