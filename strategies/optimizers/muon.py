"""Muon for a whole module: torch's own for the matrices, an optimizer of one's choice for everything else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch

from clplat.strategies.optimizers.joined import Joined, NamedWeights, OptimizerFactory, shared_out


class Muon(Joined):
    """Momentum whose matrices are orthogonalised before the step: `torch.optim.Muon`, and `others` for the rest.

    m ← β m + (1 − β) g, W ← W − lr · s · NS(m), s as `adjust_lr_fn` makes it of the shape. It is DMGD with a linear
    memory and σ = Newton-Schulz (Behrouz et al. 2025, arXiv:2512.24695, Eq. 52). The arithmetic is torch's, bfloat16.
    """

    paper = "Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/"

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = None,
        others: OptimizerFactory | None = None,
        exclude: Sequence[str] = (),
    ) -> None:
        """`others` takes what is no matrix, tables of embeddings, and names that match `exclude` (of an output layer,
        say). The rest as in `torch.optim.Muon`; `weight_decay` is 0 here as for SGD."""
        named = NamedWeights.given(params)
        matrices, rest = shared_out(named, others, exclude, "Muon")
        own = torch.optim.Muon(
            matrices, lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
        )  # fmt: skip
        super().__init__(named, [own, *rest])
