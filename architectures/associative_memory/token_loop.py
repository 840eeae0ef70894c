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

Sources: Behrouz et al. 2024 (Titans, arXiv:2501.00663, Eq. 8-14) for the rule with momentum and decay, Sun et al. 2024
(TTT, 2407.04620, Eq. 3-7) for gradients at a chunk's start, Behrouz et al. 2025 (Nested Learning, 2512.24695, Eq. 88)
for erasing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.architectures.associative_memory.network import Network
from clplat.architectures.associative_memory.state import Layers, MemoryState, Tokens, chosen


def token_loop(
    network: Network, tokens: Tokens, state: MemoryState, begins_BT: Tensor | None = None
) -> tuple[Tensor, MemoryState]:
    """Answers (B, H, T, E) and the state behind the last token. Where `begins_BT`, a document begins with `state`."""
    W, S, anchor, offset, answers, first = *state, [], state
    for t in range(tokens.q.shape[2]):
        token = tokens.part(t, t + 1)
        if begins_BT is not None:
            W, S, anchor, offset = _begun(begins_BT[:, t], first, MemoryState(W, S, anchor, offset))
        if network.rule.anchored:
            anchor = chosen(offset == 0, W, anchor)
        new_W, new_S = written(network, token, W, S, anchor)
        here = torch.ones_like(offset, dtype=torch.bool) if token.counts is None else token.counts[:, 0]
        W, S = chosen(here, new_W, W), chosen(here, new_S, S)
        if network.rule.anchored:
            offset = (offset + here.long()) % network.rule.chunk
        if network.rule.mapped:
            W = chosen(here & (offset == 0), network.settled(W), W)
        answers.append(network.read(_asked(network, W, anchor, here & (offset == 0)), token.q))
    if network.rule.anchored:
        anchor = chosen(offset == 0, W, anchor)
    return torch.cat(answers, 2), MemoryState(W, S, anchor, offset)


def _begun(begins_B: Tensor, first: MemoryState, state: MemoryState) -> MemoryState:
    return MemoryState(
        chosen(begins_B, first.weights, state.weights),
        chosen(begins_B, first.momentum, state.momentum),
        chosen(begins_B, first.anchor, state.anchor),
        torch.where(begins_B, first.offset, state.offset),
    )


def _asked(network: Network, W: Layers, anchor: Layers, closed_B: Tensor) -> Layers:
    """The weights that a query asks."""
    if network.rule.read == "chunk_start":
        return network.weights(anchor)
    if not network.rule.mapped:
        return W
    factors = network.rule.map.inside(anchor)
    inside = network.weights(anchor) if factors is None else tuple(f * w for f, w in zip(factors, W, strict=True))
    return chosen(closed_B, network.weights(W), inside)


def written(network: Network, token: Tokens, W: Layers, S: Layers, anchor: Layers) -> tuple[Layers, Layers]:
    """Weights and momentum with one token's write."""
    decay = [gate[:, :, 0].exp().unsqueeze(-1) for gate in token.log_decay]
    kept = tuple(a * w for a, w in zip(decay, W, strict=True)) if decay else W
    start = network.weights(anchor) if network.rule.anchored else W
    source = {"chunk": start, "token": W, "decayed": kept}[network.rule.gradient_at]
    inputs, slopes = network.gradients(source, token.k, token.v, token.threshold)
    if network.rule.delta != "none":
        kept = tuple(w - part for w, part in zip(kept, _erased(network, token, W, inputs), strict=True))
    steps = [-token.rate.unsqueeze(-1) * (x.mT @ slope) for x, slope in zip(inputs, slopes)]
    if token.log_momentum is None:
        return tuple(w + step for w, step in zip(kept, steps)), ()
    momentum = token.log_momentum.exp().unsqueeze(-1)
    S = tuple(momentum * s + step for s, step in zip(S, steps, strict=True))
    return tuple(w + s for w, s in zip(kept, S)), S


def _erased(network: Network, token: Tokens, W: Layers, inputs: Layers) -> Layers:
    """What one token takes off each layer."""
    units = [F.normalize(x, dim=-1) for x in inputs]
    strength = token.strength.unsqueeze(-1)
    return tuple(
        strength * unit.mT @ (unit @ weight) if network.rule.erases(layer) else torch.zeros_like(weight)
        for layer, (unit, weight) in enumerate(zip(units, W, strict=True))
    )
