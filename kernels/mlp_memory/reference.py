"""What `mlp_memory` computes: a loop over tokens, which defines it, and a chunk at a time, which is its CPU form.

Shapes: B sequences of T tokens, H heads with D features of queries and keys and E of values, J inner features, L tokens
of one chunk. Per head, with M(x) = σ(x W1) W2, plus x with `residual`, and a = exp(log_decay), η = exp(log_momentum):

    g_t = ∂ loss(M(k_t), v_t) / ∂(W1, W2) at W_src      W_src: the weights where the token's chunk began
    S_t = η_t S_{t−1} − rate_t g_t                      the step of both layers, with momentum
    W_t = a_t W_{t−1} + S_t                             the memory
    o_t = M_t(q_t)                                      what is read, this token's write included

The loss is ½‖M(k) − v‖² (`l2`) or −⟨M(k), v⟩ (`dot`). Without `log_momentum`, η = 0.

Sources: Behrouz et al. 2024 (arXiv:2501.00663, Eq. 8-14), Sun et al. 2024 (2407.04620, Eq. 3-7).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.kernels.delta_memory.reference import Inputs, chunk_bounds, decay_matrices

Activation = Literal["silu", "gelu"]
Bias = Literal["l2", "dot"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)
BIASES: tuple[str, ...] = get_args(Bias)

Layers = tuple[Tensor, Tensor]
"""A tensor for each layer: (B, H, D, J) and (B, H, J, E)."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What the memory is and what it learns. `gelu` is the exact one; `residual` needs D = E."""

    activation: Activation = "silu"
    bias: Bias = "l2"
    residual: bool = False


class MLPState(NamedTuple):
    """What a memory carries from one call to the next, per sequence and head; fp32 or fp64."""

    W1: Tensor
    """(B, H, D, J), the first layer."""
    W2: Tensor
    """(B, H, J, E), the second layer."""
    S1: Tensor | None = None
    """(B, H, D, J), the first layer's momentum; None without."""
    S2: Tensor | None = None
    """(B, H, J, E), the second layer's momentum; None without."""
    anchor1: Tensor | None = None
    """(B, H, D, J), W1 at the start of a chunk that has not ended; None where a new chunk begins."""
    anchor2: Tensor | None = None
    """(B, H, J, E), W2 there."""
    offset: Tensor | None = None
    """(B,) int32, tokens of that chunk which are written already."""

    @property
    def weights(self) -> Layers:
        """Both layers."""
        return self.W1, self.W2

    @property
    def momentum(self) -> Layers | None:
        """That of both layers, if there is any."""
        return None if self.S1 is None or self.S2 is None else (self.S1, self.S2)

    @property
    def anchor(self) -> Layers | None:
        """Both layers at the start of an open chunk, if there is one."""
        return None if self.anchor1 is None or self.anchor2 is None else (self.anchor1, self.anchor2)


def activated(x: Tensor, kind: Activation) -> Tensor:
    """σ(x)."""
    return F.silu(x) if kind == "silu" else F.gelu(x)


def activation_slope(x: Tensor, kind: Activation) -> Tensor:
    """σ′(x)."""
    if kind == "gelu":
        return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    gate = torch.sigmoid(x)
    return gate * (1 + x * (1 - gate))


def read(weights: Layers, x: Tensor, rule: Rule) -> Tensor:
    """M(x) of weights that all tokens share."""
    answer = activated(x @ weights[0], rule.activation) @ weights[1]
    return x + answer if rule.residual else answer


def gradients(source: Layers, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """What the second layer read, and the loss's slopes at the outputs of both: a gradient is an outer product."""
    inner = k @ source[0]
    hidden = activated(inner, rule.activation)
    error = -v
    if rule.bias == "l2":
        error = hidden @ source[1] - v
        error = error + k if rule.residual else error
    return hidden, (error @ source[1].mT) * activation_slope(inner, rule.activation), error


def recurrent(
    inputs: Inputs, *, rule: Rule, chunk: int, state: MLPState, offset: int = 0
) -> tuple[Tensor, MLPState]:  # fmt: skip
    """The definition: one token after another. Returns outputs (B, T, H, E) and the state behind the last token."""
    q, k, v, rate, log_decay, log_momentum = inputs.heads_first()
    W, S, outputs = state.weights, state.momentum, []
    anchor = W if state.anchor is None else state.anchor
    for t in range(q.shape[2]):
        if (offset + t) % chunk == 0:
            anchor = W
        key = k[:, :, t : t + 1]
        hidden, *slopes = gradients(anchor, key, v[:, :, t : t + 1], rule)
        steps = [-rate[:, :, t, None, None] * (x.mT @ slope) for x, slope in zip((key, hidden), slopes, strict=True)]
        if log_momentum is not None:
            assert S is not None
            eta = log_momentum[:, :, t, None, None].exp()
            steps = [eta * s + step for s, step in zip(S, steps, strict=True)]
            S = (steps[0], steps[1])
        decay = 1.0 if log_decay is None else log_decay[:, :, t, None, None].exp()
        W = (decay * W[0] + steps[0], decay * W[1] + steps[1])
        outputs.append(read(W, q[:, :, t : t + 1], rule))
    o = torch.cat(outputs, 2).transpose(1, 2) if outputs else v.transpose(1, 2)
    return o.to(inputs.v.dtype), closed(W, S, anchor, (offset + q.shape[2]) % chunk)


def chunked(inputs: Inputs, *, rule: Rule, chunk: int, state: MLPState, offset: int = 0) -> tuple[Tensor, MLPState]:
    """The same a chunk at a time, differentiable, in the inputs' precision but at least fp32."""
    W, S, outputs = state.weights, state.momentum, []
    anchor = W if state.anchor is None else state.anchor
    for start, stop in chunk_bounds(inputs.v.shape[1], chunk, offset):
        if start or not offset:
            anchor = W
        o, W, S = chunk_step(inputs.tokens(start, stop), W, S, anchor, rule)
        outputs.append(o)
    o = torch.cat(outputs, 1) if outputs else inputs.v
    return o.to(inputs.v.dtype), closed(W, S, anchor, (offset + inputs.v.shape[1]) % chunk)


def chunk_step(
    tokens: Inputs, W: Layers, S: Layers | None, anchor: Layers, rule: Rule
) -> tuple[Tensor, Layers, Layers | None]:
    """One chunk of at most L tokens: outputs (B, L, H, E) and both layers, with their momentum, behind it.

    G (L, L) is how much of the step of token j is left in W at token i, b and f (L) how much of W and S at the start:
    the same for both layers. No weights of single tokens are made.
    """
    q, k, v, rate, log_decay, log_momentum = tokens.heads_first()
    G, b, f, Le, m = decay_matrices(rate, log_decay, log_momentum)
    hidden, *slopes = gradients(anchor, k, v, rule)
    written, x, after, pushed = (k, hidden), q, [], []
    for layer, (source, slope) in enumerate(zip(written, slopes, strict=True)):
        kept = (b[..., None] * x) @ W[layer]
        weight = b[..., -1:, None] * W[layer] - (source * (G[..., -1, :] * rate)[..., None]).mT @ slope
        if S is not None:
            kept = kept + (f[..., None] * x) @ S[layer]
            weight = weight + f[..., -1:, None] * S[layer]
            step = (source * (Le[..., -1, :] * rate)[..., None]).mT @ slope
            pushed.append(m[..., -1:, None] * S[layer] - step)
        after.append(weight)
        answer = kept - ((x @ source.mT) * G * rate[..., None, :]) @ slope
        x = activated(answer, rule.activation) if layer == 0 else answer
    o = q + x if rule.residual else x
    return o.transpose(1, 2), (after[0], after[1]), (pushed[0], pushed[1]) if pushed else None


def closed(W: Layers, S: Layers | None, anchor: Layers, offset: int) -> MLPState:
    """The state at an offset that all sequences have."""
    S1, S2 = (None, None) if S is None else S
    if offset == 0:
        return MLPState(W[0], W[1], S1, S2)
    offsets = torch.full((len(W[0]),), offset, dtype=torch.int32, device=W[0].device)
    return MLPState(W[0], W[1], S1, S2, anchor[0], anchor[1], offsets)
