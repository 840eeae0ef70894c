"""What `least_squares` computes: the best matrix for all pairs so far, after every token, and its three forms.

Shapes: B rows of T tokens, H heads, D features of keys and queries, E of values, L tokens of one chunk. Per head, with
λ = exp(log_forget) and weights γ, the memory behind token t is the one matrix W_t (D, E) that makes

    Σ_{i≤t} γ_i (Π_{i<l≤t} λ_l) ‖W_tᵀ k_i − v_i‖² + ridge (Π_{l≤t} λ_l) ‖W_t‖²

smallest, and o_t = W_tᵀ q_t. `ridge_solution` solves this for each token. `recurrent` needs no solving: with P the
inverse of Σ γ Π λ k kᵀ + ridge Π λ I (Sherman and Morrison 1950),

    P ← P / λ_t    g = P k_t / (1 / γ_t + k_tᵀ P k_t)    W ← W + g (v_t − Wᵀ k_t)ᵀ    P ← P − g k_tᵀ P

`chunked` takes L tokens at once. Forgetting weighs all of the past alike, so that within a chunk only γ_i / Π_{l≤i} λ_l
matters; with K and R = V − K W scaled by its root, the Gram matrix I + K P Kᵀ of the first t tokens is a corner of that
of all, and so is its Cholesky factor: one factor C serves every token, o = Q W + tril(Q P Kᵀ C⁻ᵀ) C⁻¹ R.

Sources: Haykin, Adaptive Filter Theory, for the recursion with forgetting; Wang et al. 2025 (Test-time regression,
arXiv:2501.12352) for attention layers as steps towards this solution.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SquaresState(NamedTuple):
    """A solution, and what a later pair needs to change it."""

    W: Tensor
    """(B, H, D, E), the memory."""
    P: Tensor
    """(B, H, D, D), the inverse of the weighted sum of k kᵀ with the ridge."""


class Inputs(NamedTuple):
    """Heads first and in one precision: q, k (B, H, T, D), v (B, H, T, E), weight and log_forget (B, H, T)."""

    q: Tensor
    k: Tensor
    v: Tensor
    weight: Tensor
    log_forget: Tensor

    def tokens(self, start: int, stop: int) -> Inputs:
        """The tokens start..stop of every row."""
        return Inputs(*(part[:, :, start:stop] for part in self))


def empty_state(inputs: Inputs, ridge: float) -> SquaresState:
    """The solution to no pairs, which is zero."""
    rows, heads, _, width = inputs.k.shape
    P = torch.eye(width, dtype=inputs.k.dtype, device=inputs.k.device) / ridge
    return SquaresState(inputs.v.new_zeros(rows, heads, width, inputs.v.shape[-1]), P.expand(rows, heads, -1, -1))


def recurrent(inputs: Inputs, state: SquaresState) -> tuple[Tensor, SquaresState]:
    """The recursion, one token after another: outputs (B, H, T, E) and the state behind the last."""
    (W, P), outputs = state, []
    for t in range(inputs.q.shape[2]):
        q, k, v = (part[:, :, t].unsqueeze(-1) for part in inputs[:3])
        P = P / inputs.log_forget[:, :, t, None, None].exp()
        weight = inputs.weight[:, :, t, None, None]
        gain = weight * (P @ k) / (1 + weight * (k.mT @ P @ k))
        W = W + gain @ (v - W.mT @ k).mT
        P = P - gain @ (k.mT @ P)
        outputs.append((W.mT @ q).squeeze(-1))
    return torch.stack(outputs, 2) if outputs else inputs.v, SquaresState(W, P)


def chunked(inputs: Inputs, state: SquaresState, chunk: int) -> tuple[Tensor, SquaresState]:
    """The same `chunk` tokens at a time."""
    outputs = []
    for start in range(0, inputs.q.shape[2], chunk):
        output, state = chunk_step(inputs.tokens(start, start + chunk), state)
        outputs.append(output)
    return torch.cat(outputs, 2) if outputs else inputs.v, state


def chunk_step(inputs: Inputs, state: SquaresState) -> tuple[Tensor, SquaresState]:
    """One chunk: outputs (B, H, L, E) and the state behind it."""
    q, k, v, weight, log_forget = inputs
    W, P = state
    forgotten = log_forget.cumsum(-1).exp()
    scale = (weight / forgotten).sqrt().unsqueeze(-1)
    keys, errors = scale * k, scale * (v - k @ W)
    gram = keys @ P @ keys.mT + torch.eye(k.shape[2], dtype=k.dtype, device=k.device)
    factor = torch.linalg.cholesky(gram)
    pairs = torch.linalg.solve_triangular(factor, torch.cat([keys @ P, errors], dim=-1), upper=False)
    keys_below, errors_below = pairs.split([k.shape[-1], v.shape[-1]], dim=-1)
    output = q @ W + (q @ keys_below.mT).tril() @ errors_below
    P = (P - keys_below.mT @ keys_below) / forgotten[..., -1, None, None]
    return output, SquaresState(W + keys_below.mT @ errors_below, P)


def ridge_solution(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, log_forget: Tensor, ridge: float) -> Tensor:
    """Outputs (B, H, T, E) by one linear system a token; heads first, for tests and small problems."""
    total = log_forget.cumsum(-1)
    between = (total.unsqueeze(-1) - total.unsqueeze(-2)).exp().tril() * weight.unsqueeze(-2)
    moments = torch.einsum("bhti,bhid,bhie->bhtde", between, k, k)
    eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    moments = moments + ridge * total.exp()[..., None, None] * eye
    targets = torch.einsum("bhti,bhid,bhie->bhtde", between, k, v)
    return (q.unsqueeze(-2) @ torch.linalg.solve(moments, targets)).squeeze(-2)
