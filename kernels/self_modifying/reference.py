"""What `self_modifying` computes: a loop over tokens, which defines it, and a chunk at a time, which is its CPU form.

Shapes: B sequences of T tokens, H heads of D features, L tokens of a chunk, and M matrices a head, in this order: those
that make keys, values, step sizes and, with decay, the share that is kept; last the one that answers. For token t of a
head, with the matrices W′ as they were where the token's chunk began:

    k = unit(x W′_key)                       v = x W′_value, of unit length with `unit_values`
    e = max_rate · sigmoid(⟨x W′_rate, r⟩ + b)            a = sigmoid(⟨x W′_decay, s⟩ + c), or 1
    o = q W_M                                               before the token's own write
    for each of the M matrices, with g = k W′ − v W′ (`delta: single`: −v W′), shortened to `max_gradient`, and v in
    place of v W′ where `self_targets` is off:
    S ← η S − e · damping · kᵀ g             η = exp(log_momentum), 0 without; damping 1 where none is given
    W ← a W − e kᵀ k W + S                   without the second term where `delta` is none

Source: Behrouz et al. 2025 (arXiv:2512.24695, Eq. 76-93) for matrices, as docs/hope.md reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.kernels.delta_memory.reference import LOWEST_GATE, chunk_bounds

Delta = Literal["none", "single", "double"]
DELTAS: tuple[str, ...] = get_args(Delta)
KEY, VALUE, RATE, DECAY = range(4)
SHORTEST = 1e-12
"""Vectors are divided by their length, or by this where it is less."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How the matrices learn. `max_rate` bounds step sizes, `max_gradient` a token's gradient of a matrix; with
    `self_targets` each aims at what it answers to a value itself, else at the value."""

    delta: Delta = "double"
    max_rate: float = 1.0
    max_gradient: float | None = 1.0
    unit_values: bool = True
    self_targets: bool = True


class Inputs(NamedTuple):
    """The token-wise arguments, sliced together."""

    x: Tensor
    """(B, T, H, D), of which keys, values and gates are made, or (B, T, H, M − 1, D), for each its own."""
    q: Tensor
    """(B, T, H, D)."""
    log_momentum: Tensor | None = None
    """(B, T, H), ≤ 0."""
    damping: Tensor | None = None
    """(B, T, H), by which step sizes, but not what is erased, are multiplied."""

    def tokens(self, start: int, stop: int) -> Inputs:
        """The tokens start..stop of every sequence."""
        return Inputs(*(None if part is None else part[:, start:stop] for part in self))  # type: ignore[arg-type]

    def heads_first(self) -> Inputs:
        """x (B, H, T, …, D), q (B, H, T, D), gates (B, H, T) in fp32 or wider."""
        wide = torch.promote_types(self.x.dtype, torch.float32)
        return Inputs(*(None if part is None else part.transpose(1, 2).to(wide) for part in self))  # type: ignore[arg-type]


class Readouts(NamedTuple):
    """How gates are read of what memories make."""

    rate: Tensor
    """(H, D), r."""
    rate_bias: Tensor
    """(H,), b."""
    decay: Tensor | None = None
    """(H, D), s; None where nothing is forgotten."""
    decay_bias: Tensor | None = None
    """(H,), c."""


class SelfModifyingState(NamedTuple):
    """What the memories carry from one call to the next, per sequence; fp32 or fp64."""

    W: Tensor
    """(B, M, H, D, D), inputs by outputs."""
    S: Tensor | None = None
    """(B, M, H, D, D), momentum; None without."""
    anchor: Tensor | None = None
    """(B, M, H, D, D), W at the start of a chunk that has not ended; None where a new chunk begins."""
    offset: Tensor | None = None
    """(B,) int32, tokens of that chunk which are written already."""


class Written(NamedTuple):
    """What tokens write, made by the matrices of their chunk's start; L tokens, gates (B, H, L)."""

    k: Tensor
    """(B, H, L, D)."""
    erase: Tensor
    rate: Tensor
    log_decay: Tensor
    slopes: Tensor
    """(B, M, H, L, D), of every matrix's loss at its answer to k."""


def made(tokens: Inputs, anchor: Tensor, readouts: Readouts, rule: Rule) -> Written:
    """Keys, gates and gradients of `heads_first` tokens."""
    x = tokens.x.unbind(-2) if tokens.x.ndim == 5 else (tokens.x,) * 4
    k = F.normalize(x[KEY] @ anchor[:, KEY], dim=-1, eps=SHORTEST)
    v = x[VALUE] @ anchor[:, VALUE]
    v = F.normalize(v, dim=-1, eps=SHORTEST) if rule.unit_values else v
    erase = rule.max_rate * _gate(x[RATE], anchor[:, RATE], readouts.rate, readouts.rate_bias).sigmoid()
    log_decay = torch.zeros_like(erase)
    if readouts.decay is not None and readouts.decay_bias is not None:
        gate = _gate(x[DECAY], anchor[:, DECAY], readouts.decay, readouts.decay_bias)
        log_decay = F.logsigmoid(gate).clamp(min=LOWEST_GATE)
    slopes = _slopes(k, v, anchor, rule)
    if rule.max_gradient is not None:
        size = k.square().sum(-1, keepdim=True).unsqueeze(1) * slopes.square().sum(-1, keepdim=True)
        slopes = slopes / (size.clamp(min=1e-30).sqrt() / rule.max_gradient).clamp(min=1.0)
    rate = erase if tokens.damping is None else erase * tokens.damping
    return Written(k, erase, rate, log_decay, slopes)


def _slopes(k: Tensor, v: Tensor, anchor: Tensor, rule: Rule) -> Tensor:
    """(B, M, H, L, D)."""
    if rule.self_targets:
        return (-v if rule.delta == "single" else k - v).unsqueeze(1) @ anchor
    if rule.delta == "single":
        return -v.unsqueeze(1).expand(-1, anchor.shape[1], -1, -1, -1)
    return k.unsqueeze(1) @ anchor - v.unsqueeze(1)


def _gate(x_BHLD: Tensor, matrix_BHDD: Tensor, readout_HD: Tensor, bias_H: Tensor) -> Tensor:
    """(B, H, L): the readout of a matrix's answers, without the answers."""
    return (x_BHLD @ (matrix_BHDD @ readout_HD.unsqueeze(-1))).squeeze(-1) + bias_H.unsqueeze(-1)


def recurrent(
    inputs: Inputs, readouts: Readouts, *, rule: Rule, chunk: int, state: SelfModifyingState, offset: int = 0
) -> tuple[Tensor, SelfModifyingState]:
    """The definition: one token after another. Returns outputs (B, T, H, D) and the state behind the last token."""
    tokens, (W, S), outputs = inputs.heads_first(), state[:2], []
    anchor = W if state.anchor is None else state.anchor
    for t in range(inputs.x.shape[1]):
        if (offset + t) % chunk == 0:
            anchor = W
        token = Inputs(*(None if part is None else part[:, :, t : t + 1] for part in tokens))  # type: ignore[arg-type]
        outputs.append(token.q @ W[:, -1])
        new = made(token, anchor, readouts, rule)
        k, erase, rate, log_decay = (part.unsqueeze(1) for part in new[:4])
        step = -rate.unsqueeze(-1) * k.mT @ new.slopes
        kept = log_decay.exp().unsqueeze(-1) * W
        if rule.delta != "none":
            kept = kept - erase.unsqueeze(-1) * k.mT @ (k @ W)
        if token.log_momentum is not None:
            assert S is not None
            S = step = token.log_momentum.exp()[:, None, ..., None] * S + step
        W = kept + step
    o = torch.cat(outputs, 2).transpose(1, 2) if outputs else inputs.q
    return o.to(inputs.q.dtype), closed(W, S, anchor, (offset + inputs.x.shape[1]) % chunk)


def chunked(
    inputs: Inputs, readouts: Readouts, *, rule: Rule, chunk: int, state: SelfModifyingState, offset: int = 0
) -> tuple[Tensor, SelfModifyingState]:
    """The same a chunk at a time, differentiable, in the inputs' precision but at least fp32."""
    tokens, (W, S), outputs = inputs.heads_first(), state[:2], []
    anchor = W if state.anchor is None else state.anchor
    for start, stop in chunk_bounds(inputs.x.shape[1], chunk, offset):
        if start or not offset:
            anchor = W
        part = Inputs(*(None if part is None else part[:, :, start:stop] for part in tokens))  # type: ignore[arg-type]
        o, W, S = chunk_step(part, W, S, anchor, readouts, rule)
        outputs.append(o)
    o = torch.cat(outputs, 2).transpose(1, 2) if outputs else inputs.q
    return o.to(inputs.q.dtype), closed(W, S, anchor, (offset + inputs.x.shape[1]) % chunk)


def chunk_step(
    tokens: Inputs, W: Tensor, S: Tensor | None, anchor: Tensor, readouts: Readouts, rule: Rule
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One chunk of `heads_first` tokens: outputs (B, H, L, D) and the states behind it.

    Rows and columns of (L, L) matrices are tokens that read and that wrote before: A1 is how much of an erasing is
    left, G1 of a step, b1 and f1 of W and S before the chunk; the same with `end` behind the last token.
    """
    new, q = made(tokens, anchor, readouts, rule), tokens.q
    total = new.log_decay.cumsum(-1)
    before = total - new.log_decay
    A1, b1 = _between(before, total).tril(-1), before.exp()
    A_end, b_end = (total[..., -1:] - total).exp(), total[..., -1].exp()
    G1, G_end = A1, A_end
    k, steps = new.k, -new.rate[:, None, ..., None] * new.slopes
    found = b1[:, None, ..., None] * (k.unsqueeze(1) @ W)
    o = b1.unsqueeze(-1) * (q @ W[:, -1])
    after, pushed = _over(b_end) * W, None
    if tokens.log_momentum is not None:
        assert S is not None
        sums = tokens.log_momentum.cumsum(-1)
        Le, m = _between(sums, sums), sums.exp()
        G1, f1 = A1 @ Le, (A1 @ m.unsqueeze(-1)).squeeze(-1)
        G_end = (A_end.unsqueeze(-2) @ Le).squeeze(-2)
        found = found + f1[:, None, ..., None] * (k.unsqueeze(1) @ S)
        o = o + f1.unsqueeze(-1) * (q @ S[:, -1])
        after = after + _over((A_end * m).sum(-1)) * S
        pushed = _over(m[..., -1]) * S + (k * Le[..., -1, :, None]).mT.unsqueeze(1) @ steps
    scores, written = q @ k.mT, G_end[:, None, ..., None] * steps
    o = o + (scores * G1) @ steps[:, -1]
    if rule.delta != "none":
        meets = k @ k.mT
        found = found + (meets * G1).unsqueeze(1) @ steps
        system = (meets * A1 * new.erase.unsqueeze(-2)).unsqueeze(1)
        answers = torch.linalg.solve_triangular(system, found, upper=False, unitriangular=True)
        erased = -new.erase[:, None, ..., None] * answers
        o = o + (scores * A1) @ erased[:, -1]
        written = written + A_end[:, None, ..., None] * erased
    return o, after + k.mT.unsqueeze(1) @ written, pushed


def _between(to: Tensor, since: Tensor) -> Tensor:
    """exp(to_i − since_j) for j ≤ i, zero elsewhere: masked before the exponential."""
    above = torch.ones(to.shape[-1], to.shape[-1], dtype=torch.bool, device=to.device).triu(1)
    return (to.unsqueeze(-1) - since.unsqueeze(-2)).masked_fill(above, -torch.inf).exp()


def _over(gate_BH: Tensor) -> Tensor:
    """A number a head, for matrices (B, M, H, D, D)."""
    return gate_BH[:, None, :, None, None]


def closed(W: Tensor, S: Tensor | None, anchor: Tensor, offset: int) -> SelfModifyingState:
    """The state at an offset that all sequences have."""
    if offset == 0:
        return SelfModifyingState(W, S)
    return SelfModifyingState(W, S, anchor, torch.full((len(W),), offset, dtype=torch.int32, device=W.device))
