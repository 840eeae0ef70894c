"""Fewer slots for a memory without gates, f(a) = Σ_i φ(⟨k_i, a⟩) v_i: NL-SVD, and fits to what the memory answered.

Shapes: N slots, n kept ones, T inputs, d hidden size. Lu et al. 2026, §3; what is INFERRED is named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.architectures.locas.options import Compression

LEAST_SHARE = 1e-6
"""Directions with less than this share of the largest singular value carry no probe."""
RIDGE = 1e-6
"""Share of the mean squared activity that keeps the refit solvable."""

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Slots:
    """Keys and values (N, d)."""

    keys: Tensor
    values: Tensor

    def __call__(self, x_Td: Tensor, activation: Activation) -> Tensor:
        """The memory's answer (T, d)."""
        return activation(x_Td @ self.keys.T) @ self.values

    def strength(self) -> Tensor:
        """s_i = ‖k_i‖ · ‖v_i‖, (N,)."""
        return self.keys.norm(dim=1) * self.values.norm(dim=1)


def compressed(slots: Slots, count: int, mode: Compression, activation: Activation, inputs_Td: Tensor) -> Slots:
    """At most `count` slots for the same memory; the slots themselves where there are no more. `inputs_Td` are those on
    which the modes with a refit shall answer as before."""
    if len(slots.keys) <= count:
        return slots
    if mode == "prune_refit":
        kept = slots.keys[slots.strength().topk(count).indices]
        return _refitted(slots, kept, activation, inputs_Td)
    kept = probes(slots, count, activation)
    if mode == "nl_svd_refit":
        return _refitted(slots, kept, activation, inputs_Td)
    return Slots(kept, slots(kept, activation))


def probes(slots: Slots, count: int, activation: Activation) -> Tensor:
    """NL-SVD's new keys (n, d): unit eigenvectors of K̄^T K̄, K̄ the unit keys times their strength, the largest first.

    At most d of them. An eigenvector's sign is arbitrary, and φ is not even: the sign whose Σ_i s_i φ(⟨k_i, ±p⟩) is
    larger is taken (INFERRED).
    """
    strength = slots.strength()
    weighted = strength.unsqueeze(1) * F.normalize(slots.keys, dim=1)
    # In double precision: products of near-parallel keys are what counts here.
    _, sizes, directions = torch.linalg.svd(weighted.double(), full_matrices=False)
    kept = directions[:count][sizes[:count] > LEAST_SHARE * sizes[0].clamp(min=1e-30)].to(slots.keys.dtype)
    ahead, behind = (strength @ activation(sign * (slots.keys @ kept.T)) for sign in (1.0, -1.0))
    return torch.where((ahead >= behind).unsqueeze(1), kept, -kept)


def _refitted(slots: Slots, keys: Tensor, activation: Activation, inputs_Td: Tensor) -> Slots:
    """These keys with the values that come closest to the memory's answers: ridge regression in double precision."""
    active = activation(inputs_Td @ keys.T).double()
    products = active.T @ active
    ridge = RIDGE * products.diagonal().mean().clamp(min=1e-30)
    products.diagonal().add_(ridge)
    wanted = active.T @ slots(inputs_Td, activation).double()
    values = torch.cholesky_solve(wanted, torch.linalg.cholesky(products))
    return Slots(keys, values.to(slots.values.dtype))
