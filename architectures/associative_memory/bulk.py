"""A chunk written into a memory that nobody reads inside of it: no L × L matrices, so that chunks may be long.

Of step j in W behind the last token L is left, with A and P as in `chunked.py`,

    c_j = Σ_{l≥j} A_Ll P_lj = A_Lj + η_{j+1} c_{j+1}        (c_j = A_Lj without momentum)

which is a recurrence of scalars, solved for all tokens in log2 L rounds. Shapes: see `state.py`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from clplat.architectures.associative_memory.network import Network
from clplat.architectures.associative_memory.rule import MemoryRule
from clplat.architectures.associative_memory.state import MemoryState, Tokens, chosen


def takes(rule: MemoryRule) -> bool:
    """Whether a rule is one of those that are written so."""
    plain = rule.window == 1 and rule.delta == "none" and not rule.mapped and not rule.orthogonal
    return plain and rule.gradient_at == "chunk"


def written(network: Network, tokens: Tokens, state: MemoryState) -> MemoryState:
    """The state behind tokens of one chunk of a rule that it `takes`; `tokens` in the state's precision."""
    rule, tokens = network.rule, tokens.silenced()
    W, S, anchor, offset, *_ = state
    anchor = chosen(offset == 0, W, anchor) if rule.anchored else ()
    inputs, slopes = network.gradients(anchor if rule.anchored else W, tokens.k, tokens.v, tokens.threshold)
    W_after, S_after = [], []
    for layer, (x, slope) in enumerate(zip(inputs, slopes)):
        step = -tokens.rate.unsqueeze(-1) * slope
        log_decay = tokens.log_decay[layer] if tokens.log_decay else tokens.rate.new_zeros(*tokens.rate.shape, 1)
        left, start = _left(log_decay)
        weight = start.mT * W[layer]
        if tokens.log_momentum is not None:
            log_momentum = tokens.log_momentum.unsqueeze(-1)
            pushed, pushes = _left(log_momentum)
            left = _summed(left if tokens.counts is None else left * _columns(tokens.counts, left), log_momentum)
            carried = log_momentum[:, :, :1].exp() * left[:, :, :1]
            weight = weight + carried.mT * S[layer]
            S_after.append(pushes.mT * S[layer] + (x * pushed).mT @ step)
        W_after.append(weight + (x * left).mT @ step)
    if not rule.anchored:
        return MemoryState(tuple(W_after), tuple(S_after), (), offset)
    length = tokens.q.shape[2]
    offset = (offset + (length if tokens.counts is None else tokens.counts.sum(1))) % rule.chunk
    return MemoryState(tuple(W_after), tuple(S_after), chosen(offset == 0, W_after, anchor), offset)


def _columns(counts_BT: Tensor, like: Tensor) -> Tensor:
    return counts_BT.to(like.dtype)[:, None, :, None]


def _left(log_gate_BHLX: Tensor) -> tuple[Tensor, Tensor]:
    """What gates leave of each token's step behind the last, (B, H, L, X), and of what was before, (B, H, 1, X)."""
    total = log_gate_BHLX.cumsum(2)
    return (total[:, :, -1:] - total).exp(), total[:, :, -1:].exp()


def _summed(left_BHLX: Tensor, log_momentum_BHL1: Tensor) -> Tensor:
    """c from c_j = left_j + η_{j+1} c_{j+1}: the sum over twice as many tokens in every round."""
    length, reach = left_BHLX.shape[2], 1
    total, factor = left_BHLX, F.pad(log_momentum_BHL1[:, :, 1:].exp(), (0, 0, 0, 1))
    while reach < length:
        total = total + factor * F.pad(total[:, :, reach:], (0, 0, 0, reach))
        factor = factor * F.pad(factor[:, :, reach:], (0, 0, 0, reach))
        reach *= 2
    return total
