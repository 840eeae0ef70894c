"""The same as the token loop, a chunk of tokens at once: sums over tokens become masked products of L × L matrices.

With step_j = −rate_j · slope_j, A_ij = Π_{j<l≤i} a_l and P_ij = Π_{j<l≤i} η_l, all linear inner rules write

    W_i = b_i W_0 + f_i S_0 + Σ_{j≤i} G_ij x_j step_jᵀ,    G = A P,  b_i = Π_{l≤i} a_l,  f = A m,  m_i = Π_{l≤i} η_l

so that a query reads x W_i = b_i x W_0 + f_i x S_0 + Σ_j (x·x_j) G_ij step_j: no weights of single tokens are ever
made. Without momentum G = A and f = 0. Products of gates are exponentials of differences of sums, masked before the
exponential; nothing is divided. Shapes: see `state.py`; G is (B, H, X, L, L).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.architectures.associative_memory.network import Network, activated
from clplat.architectures.associative_memory.state import Layers, MemoryState, Tokens, chosen

Mixed = Callable[[int, int, Tensor, Tensor], Tensor]
"""From a chunk's first token, a layer's number, what queries gave it (B, H, L, I) and what it answers (B, H, L, O) to
what it answers together with other memories."""


class Spans(NamedTuple):
    """How much of what is left after every token, for one layer."""

    writes: Tensor
    """(B, H, X, L, L), G: of the step of token j in W at token i."""
    start: Tensor
    """(B, H, L, X), b: of W before the chunk."""
    carried: Tensor | None
    """(B, H, L, X), f: of S before the chunk in W."""
    pushes: Tensor | None
    """(B, H, L, L), P: of the step of token j in S at token i."""
    pushed: Tensor | None
    """(B, H, L), m: of S before the chunk in S."""


def chunked(
    network: Network, tokens: Tokens, state: MemoryState, begins_Bn: Tensor | None = None, mixed: Mixed | None = None,
    place_B: Tensor | None = None,
) -> tuple[Tensor, MemoryState]:  # fmt: skip
    """Answers (B, H, T, E) and the state behind the last token; chunks lie at multiples of `chunk` from the first
    token, which has to be a place where one may lie (`layout.py`). Where `begins_Bn`, chunk n begins with `state`.
    `mixed`: what other memories add to every layer's output. `place_B`: where each row's tokens begin; None is where
    the open chunk, here the first, goes on."""
    rule, length = network.rule, tokens.q.shape[2]
    tokens = tokens.silenced()
    W, S, anchor, offset = state
    count = torch.full_like(offset, length) if tokens.counts is None else tokens.counts.sum(1)
    if rule.anchored:
        # Rows of which a chunk is open have its first tokens in `state` and empty places for them here.
        last = anchor = chosen(offset == 0, W, anchor)
    answers = []
    for number, start in enumerate(range(0, length, rule.chunk)):
        if begins_Bn is not None:
            W, S = chosen(begins_Bn[:, number], state.weights, W), chosen(begins_Bn[:, number], state.momentum, S)
        if rule.anchored and number:
            anchor = W if place_B is None else chosen(place_B // rule.chunk >= number, anchor, W)
            last = chosen((offset if place_B is None else place_B) + count >= number * rule.chunk, anchor, last)
        answer, W, S = chunk_step(network, tokens.part(start, start + rule.chunk), W, S, anchor, mixed, start)
        answers.append(answer)
    if not rule.anchored:
        return torch.cat(answers, 2), MemoryState(W, S, (), offset)
    offset = (offset + count) % rule.chunk
    return torch.cat(answers, 2), MemoryState(W, S, chosen(offset == 0, W, last), offset)


def one_more(network: Network, token: Tokens, state: MemoryState) -> tuple[Tensor, MemoryState]:
    """A single token after a state of an anchored rule, without places for those of its chunk that went before."""
    W, S, anchor, offset = state
    anchor = chosen(offset == 0, W, anchor)
    answer, W, S = chunk_step(network, token.silenced(), W, S, anchor)
    count = 1 if token.counts is None else token.counts[:, 0].long()
    offset = (offset + count) % network.rule.chunk
    return answer, MemoryState(W, S, chosen(offset == 0, W, anchor), offset)


def chunk_step(
    network: Network, tokens: Tokens, W: Layers, S: Layers, anchor: Layers, mixed: Mixed | None = None, first: int = 0
) -> tuple[Tensor, Layers, Layers]:
    """One chunk of L tokens, the `first` and those behind it: answers (B, H, L, E), weights and momentum behind it."""
    each = range(len(W)) if network.rule.retention == "channel" else [0]
    spans = [_spans(tokens, layer) for layer in each] * (len(W) // len(each))
    if network.rule.gradient_at == "chunk":
        source = anchor if network.rule.anchored else W
        inputs, slopes = network.gradients(source, tokens.k, tokens.v, tokens.threshold)
    else:
        inputs, slopes = (tokens.k,), (_errors_in_turn(tokens, W[0], S[0] if S else None, spans[0], network),)
    steps = [-tokens.rate.unsqueeze(-1) * slope for slope in slopes]
    x = tokens.q
    for layer, span in enumerate(spans):
        kept = (span.start * x) @ W[layer]
        if span.carried is not None:
            kept = kept + (span.carried * x) @ S[layer]
        read = kept + _products(x, inputs[layer], span.writes) @ steps[layer]
        if mixed is not None:
            read = mixed(first, layer, x, read)
        x = read if layer == len(W) - 1 else activated(read, network.rule.memory.activation)
    W_after, S_after = [], []
    for layer, span in enumerate(spans):
        weight, push = _left(span, inputs[layer], steps[layer], W[layer], S[layer] if S else None)
        W_after.append(weight)
        S_after.extend([] if push is None else [push])
    return network.answer(tokens.q, x), tuple(W_after), tuple(S_after)


def _left(span: Spans, x_BHLI: Tensor, step_BHLO: Tensor, W: Tensor, S: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One layer's weights and momentum behind the chunk."""
    weight = span.start[:, :, -1].unsqueeze(-1) * W + (x_BHLI * span.writes[..., -1, :].mT).mT @ step_BHLO
    if S is None or span.carried is None or span.pushes is None or span.pushed is None:
        return weight, None
    push = span.pushed[..., -1, None, None] * S + (x_BHLI * span.pushes[..., -1, :, None]).mT @ step_BHLO
    return weight + span.carried[:, :, -1].unsqueeze(-1) * S, push


def _spans(tokens: Tokens, layer: int) -> Spans:
    log_decay = tokens.log_decay[layer] if tokens.log_decay else torch.zeros_like(tokens.rate).unsqueeze(-1)
    kept, start = _triangle(log_decay.mT)
    if tokens.log_momentum is None:
        return Spans(kept, start.mT, None, None, None)
    pushes, pushed = _triangle(tokens.log_momentum)
    shown, given = pushes, pushed
    if tokens.counts is not None:
        # A token that does not count must not add the momentum once more.
        counts = tokens.counts.to(pushes.dtype).unsqueeze(1)
        shown, given = pushes * counts.unsqueeze(-1), pushed * counts
    carried = (kept @ given[:, :, None, :, None]).squeeze(-1).mT
    return Spans(kept @ shown.unsqueeze(2), start.mT, carried, pushes, pushed)


def _triangle(log_gate: Tensor) -> tuple[Tensor, Tensor]:
    """exp of the sums of log gates (…, L) over j < l ≤ i, zero above the diagonal, and over l ≤ i."""
    total = log_gate.cumsum(-1)
    between = total.unsqueeze(-1) - total.unsqueeze(-2)
    above = torch.ones_like(between, dtype=torch.bool).triu(1)
    return between.masked_fill(above, -torch.inf).exp(), total.exp()


def _products(q_BHLI: Tensor, k_BHLI: Tensor, writes_BHXLL: Tensor) -> Tensor:
    """Σ_c q_ic k_jc G_cij, (B, H, L, L)."""
    if writes_BHXLL.shape[2] == 1:
        return (q_BHLI @ k_BHLI.mT) * writes_BHXLL.squeeze(2)
    return torch.einsum("bhic,bhjc,bhcij->bhij", q_BHLI, k_BHLI, writes_BHXLL)


def _errors_in_turn(tokens: Tokens, W: Tensor, S: Tensor | None, span: Spans, network: Network) -> Tensor:
    """Errors (B, H, L, E) of a matrix memory, each of which knows the writes before it: one triangular system.

    The error of token i is taken at W_{i−1}, that is with the spans of the token before, or at a_i W_{i−1}.
    """
    writes = F.pad(span.writes[..., :-1, :], (0, 0, 1, 0))
    start = F.pad(span.start[:, :, :-1], (0, 0, 1, 0), value=1.0)
    carried = None if span.carried is None else F.pad(span.carried[:, :, :-1], (0, 0, 1, 0))
    if network.rule.gradient_at == "decayed" and tokens.log_decay:
        decay = tokens.log_decay[0].exp()
        writes, start = writes * decay.mT.unsqueeze(-1), start * decay
        carried = None if carried is None else carried * decay
    errors = (start * tokens.k) @ W - tokens.v
    if carried is not None and S is not None:
        errors = errors + (carried * tokens.k) @ S
    # E = R − A E with A strictly lower triangular.
    system = _products(tokens.k, tokens.k, writes).tril(-1) * tokens.rate.unsqueeze(-2)
    identity = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
    return torch.linalg.solve_triangular(system + identity, errors, upper=False, unitriangular=True)
