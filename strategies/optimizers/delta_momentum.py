"""Delta momentum: a momentum that forgets along the gradients it is given, as a delta rule does along its keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clplat.strategies.optimizers.joined import NamedWeights, check_numbers, check_shares, evaluated, with_gradient


class DeltaMomentum(Optimizer):
    """m ← m (α − gᵀ g) − lr P g, W ← W + m: old momentum is erased where the new gradient points.

    m has the shape of W, flattened to (rows, inputs); gᵀ g acts on the inputs. A vector is one row.
    """

    paper = "Behrouz et al. 2025, arXiv:2512.24695, Eq. 49"
    fidelity: ClassVar[str] = "interpretation"

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 0.01,
        momentum: float = 0.9,
        erase: Literal["bounded", "literal"] = "bounded",
        side: Literal["input", "vector"] = "input",
        preconditioner: Literal["none", "rms"] = "none",
        beta: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        """`momentum` is α. `erase`: gᵀ g as printed, which diverges where ‖g‖² > 1 + α, or divided by 1 + ‖g‖², with
        which nothing grows. `side`: gᵀ g over the inputs of a matrix, or the tensor as one long vector, m − ⟨m, g⟩ g.
        `preconditioner`: P is 1, or 1 / (√v̂ + eps) with v the moving average of g² at `beta`. `weight_decay` is
        decoupled, lr · weight_decay · W."""
        check_numbers(lr=lr, weight_decay=weight_decay, eps=eps)
        check_shares(momentum=momentum, beta=beta)
        defaults = {
            "lr": lr, "momentum": momentum, "erase": erase, "side": side, "preconditioner": preconditioner,
            "beta": beta, "eps": eps, "weight_decay": weight_decay, "steps": 0,
        }  # fmt: skip
        super().__init__(list(NamedWeights.given(params)), defaults)

    @classmethod
    def for_module(cls, module: nn.Module, **options: Any) -> DeltaMomentum:
        """The optimizer of a module's trainable parameters."""
        return cls(NamedWeights.of(module), **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step for every parameter with a gradient."""
        loss = evaluated(closure)
        for group in self.param_groups:
            if weights := with_gradient(group):
                group["steps"] += 1
                self._update(weights, group)
        return loss

    def _update(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [p.grad for p in weights if p.grad is not None]
        for p in weights:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum"] for p in weights]
        overlaps = [_overlap(m, g, group["side"]) for m, g in zip(momenta, gradients, strict=True)]
        if group["erase"] == "bounded":
            squares = [norm.square().add(1) for norm in torch._foreach_norm(gradients)]
            torch._foreach_div_(overlaps, squares)
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_sub_(momenta, overlaps)
        torch._foreach_add_(momenta, self._preconditioned(weights, gradients, group), alpha=-group["lr"])
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, momenta)

    def _preconditioned(self, weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """P g."""
        if group["preconditioner"] == "none":
            return gradients
        for p in weights:
            if "square" not in self.state[p]:
                self.state[p]["square"] = torch.zeros_like(p)
        squares = [self.state[p]["square"] for p in weights]
        torch._foreach_lerp_(squares, torch._foreach_mul(gradients, gradients), 1 - group["beta"])
        scale = torch._foreach_sqrt(torch._foreach_div(squares, 1 - group["beta"] ** group["steps"]))
        torch._foreach_add_(scale, group["eps"])
        return list(torch._foreach_div(gradients, scale))


def _overlap(momentum: Tensor, gradient: Tensor, side: str) -> Tensor:
    """m gᵀ g over the inputs, by the cheaper of its two orders, or ⟨m, g⟩ g."""
    if side == "vector" or momentum.ndim < 2:
        return (momentum * gradient).sum() * gradient
    m, g = momentum.flatten(1), gradient.flatten(1)
    product = m @ (g.mT @ g) if m.shape[0] > m.shape[1] else (m @ g.mT) @ g
    return product.view_as(momentum)
