"""The same as the token loop, a chunk of tokens at once: sums over tokens become masked products of L × L matrices.

With step_j = −rate_j · slope_j, A_ij = Π_{j<l≤i} a_l and P_ij = Π_{j<l≤i} η_l, all linear inner rules write

    W_i = b_i W_0 + f_i S_0 + Σ_{j≤i} G_ij x_j step_jᵀ,    G = A P,  b_i = Π_{l≤i} a_l,  f = A m,  m_i = Π_{l≤i} η_l

so that a query reads x W_i = b_i x W_0 + f_i x S_0 + Σ_j (x·x_j) G_ij step_j: no weights of single tokens are ever
made. Without momentum G = A and f = 0. Erasing (`delta`) is a second write along unit inputs h, whose step is not known
beforehand, u_i = −e_i h_i W_{i−1}, and found by one triangular system a layer; A says what is left. Products of
gates are exponentials of differences of sums, masked before the exponential; nothing is divided. Shapes: see
`state.py`; G is (B, H, X, L, L).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.architectures.associative_memory.network import Network
from clplat.architectures.associative_memory.state import Layers, MemoryState, Tokens, chosen


class Spans(NamedTuple):
    """How much of what is left after every token, for one layer."""

    kept: Tensor
    """(B, H, X, L, L), A: of what token j adds to W, in W at token i."""
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


class Write(NamedTuple):
    """Outer products that the tokens of a chunk add to a layer, and how much of them is left after every token."""

    along: Tensor
    """(B, H, L, I)."""
    step: Tensor
    """(B, H, L, O)."""
    left: Tensor
    """(B, H, X, L, L)."""


def chunked(
    network: Network, tokens: Tokens, state: MemoryState, begins_Bn: Tensor | None = None
) -> tuple[Tensor, MemoryState]:
    """Answers (B, H, T, E) and the state behind the last token; chunks lie at multiples of `chunk` from the first
    token, which has to be a place where one may lie (`layout.py`). Where `begins_Bn`, chunk n begins with `state`."""
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
            anchor = W
            last = chosen(offset + count >= number * rule.chunk, W, last)
        part = tokens.part(start, start + rule.chunk)
        answer, W, S = chunk_step(network, part, W, S, anchor)
        if rule.mapped and part.q.shape[2] == rule.chunk:
            answer, W = _closed(network, part, answer, W, part.counted()[:, -1])
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
    count = token.counted()[:, 0].long()
    offset = (offset + count) % network.rule.chunk
    if network.rule.mapped:
        answer, W = _closed(network, token, answer, W, (count > 0) & (offset == 0))
    return answer, MemoryState(W, S, chosen(offset == 0, W, anchor), offset)


def chunk_step(network: Network, tokens: Tokens, W: Layers, S: Layers, anchor: Layers) -> tuple[Tensor, Layers, Layers]:
    """One chunk of L tokens: answers (B, H, L, E), weights and momentum behind it."""
    rule = network.rule
    factors = None if rule.read == "chunk_start" else rule.map.inside(anchor if rule.mapped else W)
    each = range(len(W)) if rule.retention == "channel" else [0]
    # Where no query asks behind its own token's write, what is left at the chunk's end is all that is needed.
    plain = rule.gradient_at == "chunk" and rule.optimizer == "gd" and rule.delta == "none"
    spanned = _ends if factors is None and plain else layer_spans
    spans = [spanned(tokens, layer) for layer in each] * (len(W) // len(each))
    if rule.gradient_at == "chunk":
        source = network.weights(anchor) if rule.anchored else W
        inputs, slopes = network.gradients(source, tokens.k, tokens.v, tokens.threshold)
    else:
        inputs, slopes = (tokens.k,), (_errors_in_turn(tokens, W[0], S[0] if S else None, spans[0], network),)
    steps = [-tokens.rate.unsqueeze(-1) * slope for slope in slopes]
    writes = [[Write(x, step, span.writes)] for x, step, span in zip(inputs, steps, spans, strict=True)]
    for layer, span in enumerate(spans):
        if rule.erases(layer):
            writes[layer].append(erasure(span, writes[layer][0], tokens.strength, W[layer], S[layer] if S else None))
    if factors is None:
        answers = network.read(network.weights(anchor), tokens.q)
    else:
        answers = _read_in_turn(network, tokens.q, spans, writes, W, S, factors)
    W_after, S_after = [], []
    for layer, span in enumerate(spans):
        weight, push = layer_left(span, writes[layer], W[layer], S[layer] if S else None)
        W_after.append(weight)
        S_after.extend([] if push is None else [push])
    return answers, tuple(W_after), tuple(S_after)


def _read_in_turn(
    network: Network, q_BHLD: Tensor, spans: list[Spans], writes: list[list[Write]], W: Layers, S: Layers,
    factors: tuple[Tensor | float, ...],
) -> Tensor:  # fmt: skip
    """Each query's answer (B, H, L, E) behind its own token's write."""

    def applied(layer: int, x: Tensor) -> Tensor:
        momentum = S[layer] if S else None
        return factors[layer] * layer_read(spans[layer], writes[layer], x, W[layer], momentum)

    return network.read_by(applied, q_BHLD)


def _closed(network: Network, tokens: Tokens, answer: Tensor, W: Layers, closed_B: Tensor) -> tuple[Tensor, Layers]:
    """Answers and state where a chunk's last token is written: the map acts, and that token's query asks behind it."""
    W = chosen(closed_B, network.settled(W), W)
    if network.rule.read == "chunk_start":
        return answer, W
    last = network.read(network.weights(W), tokens.q[:, :, -1:])
    (last,) = chosen(closed_B, [last], [answer[:, :, -1:]])
    return torch.cat([answer[:, :, :-1], last], 2), W


def layer_read(span: Spans, writes: list[Write], x_BHLI: Tensor, W: Tensor, S: Tensor | None) -> Tensor:
    """One layer's outputs (B, H, L, O), each by the weights behind its own token."""
    read = (span.start * x_BHLI) @ W
    if S is not None and span.carried is not None:
        read = read + (span.carried * x_BHLI) @ S
    for write in writes:
        read = read + _products(x_BHLI, write.along, write.left) @ write.step
    return read


def erasure(span: Spans, write: Write, strength_BHL: Tensor, W: Tensor, S: Tensor | None) -> Write:
    """What the tokens take off a layer along the inputs that they write along, −e_i h_i W_{i−1} (`delta`)."""
    unit, earlier = F.normalize(write.along, dim=-1), one_token_earlier(span)
    found = layer_read(earlier, [write._replace(left=earlier.writes)], unit, W, S)
    return Write(
        unit,
        _in_turn(_products(unit, unit, earlier.kept), strength_BHL, -strength_BHL.unsqueeze(-1) * found),
        span.kept,
    )


def one_token_earlier(span: Spans) -> Spans:
    """What is left before each token: of nothing in the chunk for the first one."""
    kept, writes = (F.pad(part[..., :-1, :], (0, 0, 1, 0)) for part in (span.kept, span.writes))
    start = F.pad(span.start[:, :, :-1], (0, 0, 1, 0), value=1.0)
    carried = None if span.carried is None else F.pad(span.carried[:, :, :-1], (0, 0, 1, 0))
    return span._replace(kept=kept, writes=writes, start=start, carried=carried)


def _in_turn(products_BHLL: Tensor, strength_BHL: Tensor, known_BHLO: Tensor) -> Tensor:
    """U with U_i = known_i − e_i Σ_{j<i} products_ij U_j: one triangular system."""
    system = products_BHLL.tril(-1) * strength_BHL.unsqueeze(-1)
    identity = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
    return torch.linalg.solve_triangular(system + identity, known_BHLO, upper=False, unitriangular=True)


def layer_left(span: Spans, writes: list[Write], W: Tensor, S: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One layer's weights and momentum behind the chunk. The first write is that of the gradients."""
    weight = span.start[:, :, -1].unsqueeze(-1) * W
    for write in writes:
        weight = weight + (write.along * write.left[..., -1, :].mT).mT @ write.step
    if S is None or span.carried is None or span.pushes is None or span.pushed is None:
        return weight, None
    steps = writes[0]
    push = span.pushed[..., -1, None, None] * S + (steps.along * span.pushes[..., -1, :, None]).mT @ steps.step
    return weight + span.carried[:, :, -1].unsqueeze(-1) * S, push


def _ends(tokens: Tokens, layer: int) -> Spans:
    """`layer_spans` without momentum, behind the last token alone: L numbers instead of L × L."""
    log_decay = tokens.log_decay[layer] if tokens.log_decay else torch.zeros_like(tokens.rate).unsqueeze(-1)
    total = log_decay.mT.cumsum(-1)
    last = total[..., -1:]
    left = (last - total).exp().unsqueeze(-2)
    return Spans(left, left, last.exp().mT, None, None, None)


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
    _, writes, start, carried, *_ = one_token_earlier(span)
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
