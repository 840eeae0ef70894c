"""How much of what is left after every token of a chunk, for one layer of a memory, and what follows from it.

Products of gates are exponentials of differences of sums, masked before the exponential; nothing is divided. Shapes:
see `state.py`; L tokens of a chunk, P pairs that they write: their own, and with a window also those before.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.architectures.associative_memory.state import Tokens


class Spans(NamedTuple):
    """How much of what is left after every token, for one layer."""

    kept: Tensor
    """(B, H, X, L, L), A: of what token j adds to W, in W at token i."""
    writes: Tensor
    """(B, H, X, L, P), G: of the step of pair j in W at token i."""
    start: Tensor
    """(B, H, L, X), b: of W before the chunk."""
    carried: Tensor | None
    """(B, H, L, X), f: of S before the chunk in W."""
    pushes: Tensor | None
    """(B, H, L, P): of the step of pair j in S at token i."""
    pushed: Tensor | None
    """(B, H, L), m: of S before the chunk in S."""


class Write(NamedTuple):
    """Outer products that the pairs of a chunk add to a layer, and how much of them is left after every token."""

    along: Tensor
    """(B, H, P, I)."""
    step: Tensor
    """(B, H, P, O)."""
    left: Tensor
    """(B, H, X, L, P)."""


def layer_spans(tokens: Tokens, layer: int) -> Spans:
    """How much of what is left in that layer."""
    log_decay = tokens.log_decay[layer] if tokens.log_decay else torch.zeros_like(tokens.rate).unsqueeze(-1)
    kept, start = _triangle(log_decay.mT)
    if tokens.log_momentum is None:
        return Spans(kept, kept, start.mT, None, None, None)
    pushes, pushed = _triangle(tokens.log_momentum)
    shown, given = pushes, pushed
    if tokens.counts is not None:
        # A token that does not count must not add the momentum once more.
        counts = tokens.counts.to(pushes.dtype).unsqueeze(1)
        shown, given = pushes * counts.unsqueeze(-1), pushed * counts
    carried = (kept @ given[:, :, None, :, None]).squeeze(-1).mT
    return Spans(kept, kept @ shown.unsqueeze(2), start.mT, carried, pushes, pushed)


def end_spans(tokens: Tokens, layer: int) -> Spans:
    """`layer_spans` without momentum, behind the last token alone: L numbers instead of L × L."""
    log_decay = tokens.log_decay[layer] if tokens.log_decay else torch.zeros_like(tokens.rate).unsqueeze(-1)
    total = log_decay.mT.cumsum(-1)
    last = total[..., -1:]
    kept = (last - total).exp().unsqueeze(-2)
    return Spans(kept, kept, last.exp().mT, None, None, None)


def over_pairs(span: Spans, weights_BHLP: Tensor) -> Spans:
    """Spans of the pairs' gradients from those of the tokens' steps."""
    pushes = None if span.pushes is None else span.pushes @ weights_BHLP
    return span._replace(writes=span.writes @ weights_BHLP.unsqueeze(2), pushes=pushes)


def layer_read(span: Spans, writes: list[Write], x_BHLI: Tensor, W: Tensor, S: Tensor | None) -> Tensor:
    """One layer's outputs (B, H, L, O), each by the weights behind its own token."""
    read = (span.start * x_BHLI) @ W
    if S is not None and span.carried is not None:
        read = read + (span.carried * x_BHLI) @ S
    for write in writes:
        read = read + products(x_BHLI, write.along, write.left) @ write.step
    return read


def erasure(span: Spans, write: Write, strength_BHL: Tensor, W: Tensor, S: Tensor | None) -> Write:
    """What the tokens take off a layer along the inputs that they write along, −e_i h_i W_{i−1} (`delta`)."""
    unit, earlier = F.normalize(write.along, dim=-1), one_token_earlier(span)
    found = layer_read(earlier, [write._replace(left=earlier.writes)], unit, W, S)
    return Write(
        unit,
        in_turn(products(unit, unit, earlier.kept), strength_BHL, -strength_BHL.unsqueeze(-1) * found),
        span.kept,
    )


def one_token_earlier(span: Spans) -> Spans:
    """What is left before each token: of nothing in the chunk for the first one."""
    kept, writes = (F.pad(part[..., :-1, :], (0, 0, 1, 0)) for part in (span.kept, span.writes))
    start = F.pad(span.start[:, :, :-1], (0, 0, 1, 0), value=1.0)
    carried = None if span.carried is None else F.pad(span.carried[:, :, :-1], (0, 0, 1, 0))
    return span._replace(kept=kept, writes=writes, start=start, carried=carried)


def layer_left(span: Spans, writes: list[Write], W: Tensor, S: Tensor | None) -> Tensor:
    """One layer's weights (B, H, I, O) behind the chunk."""
    weight = span.start[:, :, -1].unsqueeze(-1) * W
    for write in writes:
        weight = weight + (write.along * write.left[..., -1, :].mT).mT @ write.step
    return weight if S is None or span.carried is None else weight + span.carried[:, :, -1].unsqueeze(-1) * S


def layer_pushed(span: Spans, write: Write, S: Tensor) -> Tensor:
    """One layer's momentum (B, H, I, O) behind the chunk, with the write of its gradients."""
    assert span.pushes is not None and span.pushed is not None
    steps = (write.along * span.pushes[..., -1, :, None]).mT @ write.step
    return span.pushed[..., -1, None, None] * S + steps


def in_turn(products_BHLL: Tensor, strength_BHL: Tensor, known_BHLO: Tensor) -> Tensor:
    """U with U_i = known_i − e_i Σ_{j<i} products_ij U_j: one triangular system."""
    system = products_BHLL.tril(-1) * strength_BHL.unsqueeze(-1)
    identity = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
    return torch.linalg.solve_triangular(system + identity, known_BHLO, upper=False, unitriangular=True)


def _triangle(log_gate: Tensor) -> tuple[Tensor, Tensor]:
    """exp of the sums of log gates (…, L) over j < l ≤ i, zero above the diagonal, and over l ≤ i."""
    total = log_gate.cumsum(-1)
    between = total.unsqueeze(-1) - total.unsqueeze(-2)
    above = torch.ones_like(between, dtype=torch.bool).triu(1)
    return between.masked_fill(above, -torch.inf).exp(), total.exp()


def products(q_BHLI: Tensor, k_BHLI: Tensor, writes_BHXLL: Tensor) -> Tensor:
    """Σ_c q_ic k_jc G_cij, (B, H, L, L)."""
    if writes_BHXLL.shape[2] == 1:
        return (q_BHLI @ k_BHLI.mT) * writes_BHXLL.squeeze(2)
    return torch.einsum("bhic,bhjc,bhcij->bhij", q_BHLI, k_BHLI, writes_BHXLL)
