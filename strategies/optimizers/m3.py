"""M3, multi-scale momentum Muon: a fast and a slow momentum, both orthogonalised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from clplat.kernels.newton_schulz import orthogonalised
from clplat.strategies.optimizers.joined import (
    Joined,
    NamedWeights,
    OptimizerFactory,
    check_numbers,
    check_shares,
    evaluated,
    shared_out,
    with_gradient,
)

Variant = Literal["ema", "literal"]


class M3(Joined):
    """W ← W − lr (NS(M1) + α NS(M2)) / (√V + ε): M1 follows every gradient, M2 sums of `period` gradients.

    `ema`: M1 ← β₁ M1 + (1 − β₁) g, M2 ← β₃ M2 + (1 − β₃) mean of the last `period` gradients, V ← β₂ V + (1 − β₂) g²,
    bias-corrected where a scale matters. `literal`: as printed, M1 += β₁ g, M2 += β₃ Σ g, V += β₂ g². What
    orthogonalises ignores the scale of M1 and M2, so their bias needs no correction.
    """

    paper = "Behrouz et al. 2025, arXiv:2512.24695, Algorithm 1 and Eq. 75"
    fidelity: ClassVar[str] = "mechanism"

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 0.02,
        variant: Variant = "ema",
        betas: tuple[float, float, float] = (0.95, 0.99, 0.9),
        alpha: float = 0.5,
        period: int = 8,
        second_moment: bool | None = None,
        weight_decay: float = 0.0,
        ns_steps: int = 5,
        eps: float = 1e-8,
        others: OptimizerFactory | None = None,
        exclude: Sequence[str] = (),
    ) -> None:
        """`alpha` weighs the slow momentum, `period` is f: M2 changes once in so many steps, and counts from the next
        one on. `second_moment`, the division by √V: None is on for `literal` and off for `ema`, where near a minimum
        it makes steps of constant size large without bound. `weight_decay` is decoupled, lr · weight_decay · W.
        `others` and `exclude` as in `Muon`."""
        check_numbers(lr=lr, alpha=alpha, weight_decay=weight_decay, eps=eps, ns_steps=ns_steps)
        if variant == "ema":
            check_shares(**{f"betas.{place}": beta for place, beta in enumerate(betas)})
        if period < 1:
            raise ValueError(f"period: must be at least 1 step, got {period}")
        named = NamedWeights.given(params)
        matrices, rest = shared_out(named, others, exclude, "M3")
        own = _MatrixM3(matrices, {
            "lr": lr, "variant": variant, "betas": tuple(betas), "alpha": alpha, "period": period,
            "second_moment": variant == "literal" if second_moment is None else second_moment,
            "weight_decay": weight_decay, "ns_steps": ns_steps, "eps": eps, "steps": 0,
        })  # fmt: skip
        super().__init__(named, [own, *rest])


class _MatrixM3(Optimizer):
    """M3's part for matrices; the steps are counted on the host and saved with the group."""

    def __init__(self, params: NamedWeights, defaults: dict[str, Any]) -> None:
        super().__init__(list(params), defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = evaluated(closure)
        for group in self.param_groups:
            if weights := with_gradient(group):
                group["steps"] += 1
                self._update(weights, group)
        return loss

    def _update(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        kept = {name: self._buffers(weights, name) for name in ("fast", "slow", "window")}
        gradients = [p.grad for p in weights]
        _accumulate(kept["fast"], gradients, group["betas"][0], group["variant"])
        torch._foreach_add_(kept["window"], gradients)
        steps = orthogonalised(kept["fast"], group["ns_steps"])
        torch._foreach_add_(steps, orthogonalised(kept["slow"], group["ns_steps"]), alpha=group["alpha"])
        if group["second_moment"]:
            torch._foreach_div_(steps, self._scale(weights, gradients, group))
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, steps, alpha=-group["lr"])
        if group["steps"] % group["period"] == 0:
            # After the step: the slow momentum of a window is used in the next one.
            if group["variant"] == "ema":
                torch._foreach_div_(kept["window"], group["period"])
            _accumulate(kept["slow"], kept["window"], group["betas"][2], group["variant"])
            torch._foreach_zero_(kept["window"])

    def _scale(self, weights: list[Tensor], gradients: list[Tensor | None], group: dict[str, Any]) -> list[Tensor]:
        """√V + ε."""
        beta, square = group["betas"][1], self._buffers(weights, "square")
        _accumulate(square, torch._foreach_mul(gradients, gradients), beta, group["variant"])
        # A parameter whose gradients began later than the group's has its V underestimated for a while.
        corrected = 1 - beta ** group["steps"] if group["variant"] == "ema" else 1.0
        scale = torch._foreach_sqrt(torch._foreach_div(square, corrected))
        torch._foreach_add_(scale, group["eps"])
        return list(scale)

    def _buffers(self, weights: list[Tensor], name: str) -> list[Tensor]:
        for p in weights:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p)
        return [self.state[p][name] for p in weights]


def _accumulate(kept: Sequence[Tensor], fresh: Sequence[Tensor | None], beta: float, variant: str) -> None:
    """Moving average, or, as printed, a sum without end."""
    if variant == "ema":
        torch._foreach_lerp_(kept, fresh, 1 - beta)
    else:
        torch._foreach_add_(kept, fresh, alpha=beta)
