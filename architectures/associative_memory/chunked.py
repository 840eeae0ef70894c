"""The same as the token loop, a chunk of tokens at once: sums over tokens become masked products of L × L matrices.

With step_j = −rate_j · slope_j, A_ij = Π_{j<l≤i} a_l and P_ij = Π_{j<l≤i} η_l, all linear inner rules write

    W_i = b_i W_0 + f_i S_0 + Σ_{j≤i} G_ij x_j step_jᵀ,    G = A P,  b_i = Π_{l≤i} a_l,  f = A m,  m_i = Π_{l≤i} η_l

so that a query reads x W_i = b_i x W_0 + f_i x S_0 + Σ_j (x·x_j) G_ij step_j: no weights of single tokens are ever
made. Without momentum G = A and f = 0. A window makes x_j and step_j those of pairs, and G = A P diag(rate) Γ. Products
of gates are exponentials of differences of sums, masked before the exponential; nothing is divided. Shapes: see
`state.py`; G is (B, H, X, L, L), and with a window (B, H, X, L, P).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.architectures.associative_memory.network import Network, activated
from clplat.architectures.associative_memory.orthogonal import orthogonal_step
from clplat.architectures.associative_memory.state import Layers, MemoryState, Tokens, chosen, either
from clplat.architectures.associative_memory.window import Pairs, moved_on, pairs_of, weights_of


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
    network: Network, tokens: Tokens, state: MemoryState, begins_Bn: Tensor | None = None
) -> tuple[Tensor, MemoryState]:
    """Answers (B, H, T, E) and the state behind the last token; chunks lie at multiples of `chunk` from the first
    token, which has to be a place where one may lie (`layout.py`). Where `begins_Bn`, chunk n begins with `state`."""
    rule, length, first = network.rule, tokens.q.shape[2], state
    tokens = tokens.silenced()
    offset = state.offset
    count = torch.full_like(offset, length) if tokens.counts is None else tokens.counts.sum(1)
    if rule.anchored:
        # Rows of which a chunk is open have its first tokens in `state` and empty places for them here.
        last = chosen(offset == 0, state.weights, state.anchor)
        state = state._replace(anchor=last)
    answers = []
    for number, start in enumerate(range(0, length, rule.chunk)):
        if begins_Bn is not None:
            state = either(begins_Bn[:, number], first, state)._replace(anchor=state.anchor)
        if rule.anchored and number:
            state = state._replace(anchor=state.weights)
            last = chosen(offset + count >= number * rule.chunk, state.weights, last)
        part = tokens.part(start, start + rule.chunk)
        answer, state = chunk_step(network, part, state, _ends(part, rule.chunk))
        answers.append(answer)
    if not rule.anchored:
        return torch.cat(answers, 2), state
    offset = (offset + count) % rule.chunk
    return torch.cat(answers, 2), state._replace(anchor=chosen(offset == 0, state.weights, last), offset=offset)


def one_more(network: Network, token: Tokens, state: MemoryState) -> tuple[Tensor, MemoryState]:
    """A single token after a state of an anchored rule, without places for those of its chunk that went before."""
    anchor = chosen(state.offset == 0, state.weights, state.anchor)
    count = torch.ones_like(state.offset) if token.counts is None else token.counts[:, 0].long()
    ends = (state.offset + count == network.rule.chunk) & (count > 0)
    answer, state = chunk_step(network, token.silenced(), state._replace(anchor=anchor), ends)
    offset = (state.offset + count) % network.rule.chunk
    return answer, state._replace(anchor=chosen(offset == 0, state.weights, anchor), offset=offset)


def chunk_step(network: Network, tokens: Tokens, state: MemoryState, ends_B: Tensor) -> tuple[Tensor, MemoryState]:
    """One chunk of L tokens: answers (B, H, L, E) and the state behind it, whose anchor and offset are as before.
    `ends_B` says where its last token is the chunk's last."""
    if network.rule.orthogonal:
        # Momentum is that of gradients, without the tokens' rates.
        counted = tokens._replace(rate=torch.ones_like(tokens.rate)).silenced()
        momentum = _momentum_left(*_written(network, counted, state), state.momentum)
        answers, after = orthogonal_step(network, tokens, state, momentum, ends_B)
    else:
        answers, after = _linear_step(network, tokens, state)
    return answers, after._replace(window=moved_on(tokens, state.window)) if state.window else after


def _linear_step(network: Network, tokens: Tokens, state: MemoryState) -> tuple[Tensor, MemoryState]:
    spans, inputs, steps = _written(network, tokens, state)
    x, last = tokens.q, len(spans) - 1
    for layer, span in enumerate(spans):
        kept = (span.start * x) @ state.weights[layer]
        if span.carried is not None:
            kept = kept + (span.carried * x) @ state.momentum[layer]
        read = kept + _products(x, inputs[layer], span.writes) @ steps[layer]
        x = read if layer == last else activated(read, network.rule.memory.activation)
    weights = _weights_left(spans, inputs, steps, state)
    momentum = _momentum_left(spans, inputs, steps, state.momentum)
    return network.answer(tokens.q, x), state._replace(weights=weights, momentum=momentum)


def _weights_left(spans: list[Spans], inputs: Layers, steps: Layers, state: MemoryState) -> Layers:
    """The weights behind the chunk."""
    weights = []
    for layer, span in enumerate(spans):
        weight = span.start[:, :, -1].unsqueeze(-1) * state.weights[layer]
        weight = weight + (inputs[layer] * span.writes[..., -1, :].mT).mT @ steps[layer]
        if span.carried is not None:
            weight = weight + span.carried[:, :, -1].unsqueeze(-1) * state.momentum[layer]
        weights.append(weight)
    return tuple(weights)


def _momentum_left(spans: list[Spans], inputs: Layers, steps: Layers, S: Layers) -> Layers:
    """The momentum behind the chunk; none where there is none."""
    return tuple(
        span.pushed[..., -1, None, None] * S[layer] + (inputs[layer] * span.pushes[..., -1, :, None]).mT @ steps[layer]
        for layer, span in enumerate(spans)
        if span.pushes is not None and span.pushed is not None
    )


def _written(network: Network, tokens: Tokens, state: MemoryState) -> tuple[list[Spans], Layers, Layers]:
    """How much is left of what, and of each layer the inputs (B, H, P, I) and steps (B, H, P, O) of the pairs: with a
    window also those before the chunk, and with all weights and rates in the spans."""
    rule, W, S = network.rule, state.weights, state.momentum
    each = range(len(W)) if rule.retention == "channel" else [0]
    spans = [_spans(tokens, layer) for layer in each]
    given, rate = Pairs(tokens.k, tokens.v, tokens.threshold), tokens.rate.unsqueeze(-1)
    if state.window:
        weights = rate * weights_of(tokens, state.window)
        spans = [_over_pairs(span, weights) for span in spans]
        given, rate = pairs_of(tokens, state.window), torch.ones_like(rate[:1, :1, :1])
    if rule.gradient_at == "chunk":
        inputs, slopes = network.gradients(state.anchor if rule.anchored else W, *given)
    else:
        inputs, slopes = (tokens.k,), (_errors_in_turn(tokens, W[0], S[0] if S else None, spans[0], network),)
    return spans * (len(W) // len(each)), inputs, tuple(-rate * slope for slope in slopes)


def _over_pairs(span: Spans, weights_BHLP: Tensor) -> Spans:
    """Spans of the pairs' gradients from those of the tokens' steps."""
    pushes = None if span.pushes is None else span.pushes @ weights_BHLP
    return span._replace(writes=span.writes @ weights_BHLP.unsqueeze(2), pushes=pushes)


def _ends(part: Tokens, chunk: int) -> Tensor:
    """(B,) bool: whether the chunk's last place holds a token that counts."""
    rows, _, length, _ = part.q.shape
    if length < chunk or part.counts is None:
        return torch.full((rows,), length == chunk, device=part.q.device)
    return part.counts[:, -1]


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
