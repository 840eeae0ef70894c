"""What an associative memory computes, one token after the other: the definition.

For token t, with a = exp(log_decay), η = exp(log_momentum), and for each layer ℓ of the memory M its weights W:

    g_t = ∂ loss(M(k_t), target_t) / ∂W at W_src       the gradient (`network.py`)
    S_t = η_t S_{t−1} − rate_t g_t                      the step; without momentum η = 0
    W_t = a_t ⊙ W_{t−1} + S_t                           the memory; a weighs a layer's inputs, together or each
          − e_t h_t h_tᵀ W_{t−1}                        with `delta`: h_t is what the layer read in W_src from k_t,
                                                        at unit length, and e_t is rate_t where it is not given
    y_t = M_t(q_t)                                      what is read, this token's write included; with
                                                        `read: chunk_start` by W when the token's chunk began

`gradient_at` says what W_src is: W as it was when the token's chunk began, W_{t−1}, or a_t ⊙ W_{t−1}. `target` is v_t,
or M_src(v_t), which the inner gradient takes as given and the outer loss does not.

With a map (`maps.py`), decay and steps act on A instead. Behind a chunk's last token W = map(A); before it, W is A
times the map's factor at the chunk's start, or, where the map has none, still what it was there.

With a `window` of c > 1 pairs, g_t = Σ_r γ_tr ∂ loss(M(k_{t−r}), target_{t−r}) / ∂W at W_src, r = 0 … c − 1: also the
earlier pairs' gradients are taken at the W_src of token t. With the optimizer `muon`, NS being Newton-Schulz,

    S_t = η_t S_{t−1} − g_t        r_t = a_t r_{t−1} + rate_t        W_t = a_t ⊙ W_{t−1} [+ r_t ⊙ NS(S_t)]

where the bracket is added at a chunk's last token, behind which r is 0: one step a chunk, as far as its tokens' steps
together. Tokens before it do not read their chunk. With chunks of one token it is a step a token, as in ATLAS.

Sources: Behrouz et al. 2024 (Titans, arXiv:2501.00663, Eq. 8-14) for the rule with momentum and decay, Sun et al. 2024
(TTT, 2407.04620, Eq. 3-7) for gradients at a chunk's start, Behrouz et al. 2025 (Nested Learning, 2512.24695, Eq. 88)
for erasing, Behrouz et al. 2025 (ATLAS, 2505.23735) for the window and orthogonal steps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.architectures.associative_memory.network import Network
from clplat.architectures.associative_memory.omega_window import moved_on, pairs_of
from clplat.architectures.associative_memory.state import Layers, MemoryState, Tokens, chosen, either
from clplat.kernels.newton_schulz import newton_schulz


def token_loop(
    network: Network, tokens: Tokens, state: MemoryState, begins_BT: Tensor | None = None
) -> tuple[Tensor, MemoryState]:
    """Answers (B, H, T, E) and the state behind the last token. Where `begins_BT`, a document begins with `state`."""
    answers, first, rule = [], state, network.rule
    for t in range(tokens.q.shape[2]):
        token = tokens.part(t, t + 1)
        if begins_BT is not None:
            state = either(begins_BT[:, t], first, state)
        if rule.anchored:
            state = state._replace(anchor=chosen(state.offset == 0, state.weights, state.anchor))
        here = token.counted()[:, 0]
        after = written(network, token, state)
        if rule.anchored:
            after = after._replace(offset=(state.offset + 1) % rule.chunk)
        closed = here & (after.offset == 0)
        if rule.mapped:
            after = after._replace(weights=chosen(closed, network.settled(after.weights), after.weights))
        state = either(here, after, state)
        answers.append(network.read(_asked(network, state, closed), token.q))
    if rule.anchored:
        state = state._replace(anchor=chosen(state.offset == 0, state.weights, state.anchor))
    return torch.cat(answers, 2), state


def _asked(network: Network, state: MemoryState, closed_B: Tensor) -> Layers:
    """The weights that a query asks."""
    if network.rule.read == "chunk_start":
        return network.weights(state.anchor)
    if not network.rule.mapped:
        return state.weights
    factors, inside = network.rule.map.inside(state.anchor), network.weights(state.anchor)
    if factors is not None:
        inside = tuple(f * w for f, w in zip(factors, state.weights, strict=True))
    return chosen(closed_B, network.weights(state.weights), inside)


def written(network: Network, token: Tokens, state: MemoryState) -> MemoryState:
    """The state with one token's write, of which the offset is as before."""
    rule, W = network.rule, state.weights
    decay = [gate[:, :, 0].exp().unsqueeze(-1) for gate in token.log_decay]
    kept = tuple(a * w for a, w in zip(decay, W, strict=True)) if decay else W
    start = network.weights(state.anchor) if rule.anchored else W
    source = {"chunk": start, "token": W, "decayed": kept}[rule.gradient_at]
    gradients, inputs = _gradients(network, token, source, state.window)
    if rule.delta != "none":
        kept = tuple(w - part for w, part in zip(kept, _erased(network, token, W, inputs), strict=True))
    if state.window:
        state = state._replace(window=moved_on(token._replace(counts=None), state.window))
    rate = token.rate.unsqueeze(-1)
    if token.log_momentum is None:
        return state._replace(weights=tuple(w - rate * g for w, g in zip(kept, gradients)))
    size = torch.ones_like(rate) if rule.orthogonal else rate
    momentum = token.log_momentum.exp().unsqueeze(-1)
    S = tuple(momentum * s - size * g for s, g in zip(state.momentum, gradients, strict=True))
    if not rule.orthogonal:
        return state._replace(weights=tuple(w + s for w, s in zip(kept, S)), momentum=S)
    owed = tuple(a * r + rate for a, r in zip(decay or [1.0] * len(W), state.owed, strict=True))
    stepped = tuple(w + r * newton_schulz(s) for w, r, s in zip(kept, owed, S))
    ends = state.offset == rule.chunk - 1
    return state._replace(
        weights=chosen(ends, stepped, kept), momentum=S, owed=chosen(ends, tuple(map(torch.zeros_like, owed)), owed)
    )


def _gradients(network: Network, token: Tokens, source: Layers, window: Layers) -> tuple[list[Tensor], Layers]:
    """Of each layer, (B, H, I, O), and what it read from the keys."""
    if not window:
        inputs, slopes = network.gradients(source, token.k, token.v, token.threshold)
        return [x.mT @ slope for x, slope in zip(inputs, slopes)], inputs
    assert token.window is not None
    inputs, slopes = network.gradients(source, *pairs_of(token, window))
    weights = token.window.flip(-1).mT  # the oldest pair first
    return [x.mT @ (weights * slope) for x, slope in zip(inputs, slopes)], inputs


def _erased(network: Network, token: Tokens, W: Layers, inputs: Layers) -> Layers:
    """What one token takes off each layer."""
    units = [F.normalize(x, dim=-1) for x in inputs]
    strength = token.strength.unsqueeze(-1)
    return tuple(
        strength * unit.mT @ (unit @ weight) if network.rule.erases(layer) else torch.zeros_like(weight)
        for layer, (unit, weight) in enumerate(zip(units, W, strict=True))
    )
