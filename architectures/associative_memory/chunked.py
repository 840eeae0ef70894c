"""The same as the token loop, a chunk of tokens at once: sums over tokens become masked products of L × L matrices.

With step_j = −rate_j · slope_j, A_ij = Π_{j<l≤i} a_l and P_ij = Π_{j<l≤i} η_l, all linear inner rules write

    W_i = b_i W_0 + f_i S_0 + Σ_{j≤i} G_ij x_j step_jᵀ,    G = A P,  b_i = Π_{l≤i} a_l,  f = A m,  m_i = Π_{l≤i} η_l

so that a query reads x W_i = b_i x W_0 + f_i x S_0 + Σ_j (x·x_j) G_ij step_j: no weights of single tokens are ever
made. Without momentum G = A and f = 0. A window makes x_j and step_j those of pairs, and G = A P diag(rate) Γ. Erasing
(`delta`) is a second write along unit inputs h, whose step is not known beforehand, u_i = −e_i h_i W_{i−1}, and found
by one triangular system a layer; A says what is left. A, G, b, f and m: `spans.py`. Shapes: `state.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clplat.architectures.associative_memory.network import Applied, Network, applied
from clplat.architectures.associative_memory.omega_window import Pairs, moved_on, pairs_of, weights_of
from clplat.architectures.associative_memory.orthogonal import orthogonal_step
from clplat.architectures.associative_memory.spans import (
    Spans,
    Write,
    end_spans,
    erasure,
    layer_left,
    layer_pushed,
    layer_read,
    layer_spans,
    one_token_earlier,
    over_pairs,
    products,
)
from clplat.architectures.associative_memory.state import Layers, MemoryState, Tokens, chosen, either

Mixed = Callable[[int, int, Tensor, Tensor], Tensor]
"""From the place of the first of L tokens, a layer's number, what queries gave it (B, H, L, I) and what it answers
(B, H, L, O) to what it answers together with other memories."""


def chunked(
    network: Network, tokens: Tokens, state: MemoryState, begins_Bn: Tensor | None = None, mixed: Mixed | None = None,
    place_B: Tensor | None = None,
) -> tuple[Tensor, MemoryState]:  # fmt: skip
    """Answers (B, H, T, E) and the state behind the last token; chunks lie at multiples of `chunk` from the first
    token, which has to be a place where one may lie (`layout.py`). Where `begins_Bn`, chunk n begins with `state`.
    `mixed`: what other memories add to every layer's output. `place_B`: where each row's tokens begin; None is where
    the open chunk, here the first, goes on."""
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
            anchor = state.weights
            if place_B is not None:
                anchor = chosen(place_B // rule.chunk >= number, state.anchor, anchor)
            state = state._replace(anchor=anchor)
            last = chosen((offset if place_B is None else place_B) + count >= number * rule.chunk, anchor, last)
        part = tokens.part(start, start + rule.chunk)
        answer, state = chunk_step(network, part, state, _closed_by(part, rule.chunk), _from(start, mixed))
        answers.append(answer)
    if not rule.anchored:
        return torch.cat(answers, 2), state
    offset = (offset + count) % rule.chunk
    return torch.cat(answers, 2), state._replace(anchor=chosen(offset == 0, state.weights, last), offset=offset)


def one_more(
    network: Network, token: Tokens, state: MemoryState, mixed: Mixed | None = None
) -> tuple[Tensor, MemoryState]:
    """A single token after a state of an anchored rule, without places for those of its chunk that went before. It may
    be its chunk's last; `mixed` as in `chunked`."""
    anchor = chosen(state.offset == 0, state.weights, state.anchor)
    count = token.counted()[:, 0].long()
    closed = (state.offset + count == network.rule.chunk) & (count > 0)
    answer, state = chunk_step(network, token.silenced(), state._replace(anchor=anchor), closed, mixed)
    offset = (state.offset + count) % network.rule.chunk
    return answer, state._replace(anchor=chosen(offset == 0, state.weights, anchor), offset=offset)


def chunk_step(
    network: Network, tokens: Tokens, state: MemoryState, closed_B: Tensor, mixed: Mixed | None = None
) -> tuple[Tensor, MemoryState]:
    """One chunk of L tokens: answers (B, H, L, E) and the state behind it, whose anchor and offset are as before.
    `closed_B` says where its last token is the chunk's last; `mixed` makes each layer's output another, with places in
    the chunk."""
    rule = network.rule
    if rule.orthogonal:
        # Momentum is that of gradients, without the tokens' rates.
        counted = tokens._replace(rate=torch.ones_like(tokens.rate)).silenced()
        momentum = _momentum_left(*_written(network, counted, state), state.momentum)
        answers, after = orthogonal_step(network, tokens, state, momentum, closed_B)
    else:
        answers, after = _linear_step(network, tokens, state, mixed)
    if rule.mapped:
        answers, after = _settled(network, tokens, answers, after, closed_B, mixed)
    return answers, after._replace(window=moved_on(tokens, state.window)) if state.window else after


def _linear_step(
    network: Network, tokens: Tokens, state: MemoryState, mixed: Mixed | None
) -> tuple[Tensor, MemoryState]:
    rule, (W, S, anchor, *_) = network.rule, state
    spans, writes = _written(network, tokens, state)
    factors = rule.map.inside(anchor if rule.mapped else W) if rule.reads_in_turn else None
    own = applied(network.weights(anchor)) if factors is None else _in_turn_by(spans, writes, W, S, factors)
    answers = network.read_by(_together(0, own, mixed), tokens.q)
    left = tuple(layer_left(*parts, S[n] if S else None) for n, parts in enumerate(zip(spans, writes, W, strict=True)))
    return answers, state._replace(weights=left, momentum=_momentum_left(spans, writes, S))


def _written(network: Network, tokens: Tokens, state: MemoryState) -> tuple[list[Spans], list[list[Write]]]:
    """How much is left of what, and what each layer is written: first along its gradients, then what it erases. With a
    window the pairs before the chunk are written too, and weights and rates are in the spans."""
    rule, (W, S, *_) = network.rule, state
    each = range(len(W)) if rule.retention == "channel" else [0]
    # Where nothing asks behind another token's write, what is left at the chunk's end is all that is needed.
    at_once = not (rule.reads_in_turn or rule.gradient_at != "chunk" or rule.momentous or rule.delta != "none")
    spans = [(end_spans if at_once else layer_spans)(tokens, layer) for layer in each]
    given, rate = Pairs(tokens.k, tokens.v, tokens.threshold), tokens.rate.unsqueeze(-1)
    if state.window:
        weights = rate * weights_of(tokens, state.window)
        spans = [over_pairs(span, weights) for span in spans]
        given, rate = pairs_of(tokens, state.window), torch.ones_like(rate[:1, :1, :1])
    if rule.gradient_at == "chunk":
        inputs, slopes = network.gradients(network.weights(state.anchor) if rule.anchored else W, *given)
    else:
        inputs, slopes = (tokens.k,), (_errors_in_turn(tokens, W[0], S[0] if S else None, spans[0], network),)
    spans = spans * (len(W) // len(each))
    writes = [[Write(x, -rate * slope, span.writes)] for x, slope, span in zip(inputs, slopes, spans, strict=True)]
    for layer, span in enumerate(spans):
        if rule.erases(layer):
            writes[layer].append(erasure(span, writes[layer][0], tokens.strength, W[layer], S[layer] if S else None))
    return spans, writes


def _momentum_left(spans: list[Spans], writes: list[list[Write]], S: Layers) -> Layers:
    """The momentum behind the chunk; none where there is none."""
    return tuple(layer_pushed(span, write[0], part) for span, write, part in zip(spans, writes, S))


def _in_turn_by(
    spans: list[Spans], writes: list[list[Write]], W: Layers, S: Layers, factors: tuple[Tensor | float, ...]
) -> Applied:
    """Layers whose outputs are each by the weights behind its own token, times what a map makes of them."""
    return lambda layer, x: (
        factors[layer] * layer_read(spans[layer], writes[layer], x, W[layer], S[layer] if S else None)
    )


def _settled(
    network: Network, tokens: Tokens, answers: Tensor, state: MemoryState, closed_B: Tensor, mixed: Mixed | None
) -> tuple[Tensor, MemoryState]:
    """Answers and state where a chunk's last token is written: the map acts, and that token's query asks behind it."""
    state = state._replace(weights=chosen(closed_B, network.settled(state.weights), state.weights))
    if network.rule.read == "chunk_start":
        return answers, state
    own, place = applied(network.weights(state.weights)), tokens.q.shape[2] - 1
    last = network.read_by(_together(place, own, mixed), tokens.q[:, :, -1:])
    (last,) = chosen(closed_B, [last], [answers[:, :, -1:]])
    return torch.cat([answers[:, :, :-1], last], 2), state


def _from(start: int, mixed: Mixed | None) -> Mixed | None:
    """The same with places counted from `start`."""
    return None if mixed is None else lambda place, layer, x, own: mixed(start + place, layer, x, own)


def _together(place: int, own: Applied, mixed: Mixed | None) -> Applied:
    """Layers of tokens from that place on, together with other memories where there are any."""
    return own if mixed is None else lambda layer, x: mixed(place, layer, x, own(layer, x))


def _closed_by(part: Tokens, chunk: int) -> Tensor:
    """(B,) bool: whether the chunk's last place holds a token that counts."""
    counted = part.counted()
    return counted[:, -1] if counted.shape[1] == chunk else torch.zeros_like(counted[:, 0])


def _errors_in_turn(tokens: Tokens, W: Tensor, S: Tensor | None, span: Spans, network: Network) -> Tensor:
    """Errors (B, H, L, E) of a matrix memory, each of which knows the writes before it: one triangular system.

    The error of token i is taken at W_{i−1}, that is with the spans of the token before, or at a_i W_{i−1}.
    """
    _, writes, start, carried, *_ = one_token_earlier(span)
    if network.rule.gradient_at == "decayed" and tokens.log_decay:
        decay = tokens.log_decay[0].exp()
        writes, start = writes * decay.mT.unsqueeze(-1), start * decay
        carried = None if carried is None else carried * decay
    errors = (start * tokens.k) @ W - tokens.v
    if carried is not None and S is not None:
        errors = errors + (carried * tokens.k) @ S
    # E = R − A E with A strictly lower triangular.
    system = products(tokens.k, tokens.k, writes).tril(-1) * tokens.rate.unsqueeze(-2)
    identity = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
    return torch.linalg.solve_triangular(system + identity, errors, upper=False, unitriangular=True)
