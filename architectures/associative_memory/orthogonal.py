"""Orthogonal steps a chunk at a time: momentum is summed over the chunk, and made a step at the chunk's last token.

Shapes: see `state.py`; the definition stands in `token_loop.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clplat.architectures.associative_memory.network import Network
from clplat.architectures.associative_memory.state import Layers, MemoryState, Tokens, chosen
from clplat.kernels.newton_schulz import newton_schulz


def orthogonal_step(
    network: Network, tokens: Tokens, state: MemoryState, momentum: Layers, ends_B: Tensor
) -> tuple[Tensor, MemoryState]:
    """Answers (B, H, L, E) and the state behind the tokens, given the momentum there. Where `ends_B`, the last of them
    is the chunk's last, which makes the step and reads it; all others read what is left of the weights before."""
    totals = [gate.cumsum(2) for gate in tokens.log_decay]
    if not totals:
        totals = [torch.zeros_like(tokens.rate).unsqueeze(-1)] * len(state.weights)
    weights, owed = [], []
    for layer, total in enumerate(totals):
        last = total[:, :, -1:]
        weights.append(last.exp().mT * state.weights[layer])
        far = (tokens.rate.unsqueeze(-1) * (last - total).exp()).sum(2, keepdim=True)
        owed.append((last.exp() * state.owed[layer].mT + far).mT)
    stepped = [w + r * newton_schulz(s) for w, r, s in zip(weights, owed, momentum, strict=True)]
    after = state._replace(
        weights=chosen(ends_B, stepped, weights), momentum=momentum,
        owed=chosen(ends_B, [torch.zeros_like(part) for part in owed], owed),
    )  # fmt: skip
    if network.rule.read == "chunk_start":
        return network.read(network.weights(state.anchor), tokens.q), after
    answers = network.read_by(lambda layer, x: (totals[layer].exp() * x) @ state.weights[layer], tokens.q)
    reading = network.read(after.weights, tokens.q[:, :, -1:])
    final = torch.where(ends_B[:, None, None, None], reading, answers[:, :, -1:])
    return torch.cat([answers[:, :, :-1], final], dim=2), after
