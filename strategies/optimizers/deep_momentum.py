"""Deep momentum gradient descent: the momentum is a small network that learns while the weights do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clplat.kernels.newton_schulz import newton_schulz
from clplat.strategies.optimizers.joined import NamedWeights, check_numbers, evaluated, with_gradient


class DeepMomentum(Optimizer):
    """DMGD: m ← α m − memory_lr ∇L(m; u), W ← W + lr σ(m(u)); u is the gradient, m a network for each parameter.

    A row of u (a parameter flattened to (rows, inputs); a vector is one row) goes through m(u) = A tanh(B u), or A u.
    The memory learns from all rows of a step at once, in closed form, and answers after it has learned.
    """

    paper = "Behrouz et al. 2025, arXiv:2512.24695, Eq. 50-52"
    fidelity: ClassVar[str] = "interpretation"

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 0.01,
        memory_lr: float = 0.1,
        momentum: float = 0.99,
        memory: Literal["mlp", "linear"] = "mlp",
        hidden_size: int = 32,
        objective: Literal["regression", "literal"] = "regression",
        normalise: bool = True,
        output: Literal["identity", "newton_schulz"] = "identity",
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        """`momentum` is α, and draws m back to where it began. `hidden_size` rows of B, drawn with `seed`; A begins
        at 0. `objective`: ½ ‖m(u) + u‖² averaged over rows, whose memory gives descent, or ⟨m(u), 1⟩ as printed, whose
        memory pushes all outputs down whatever u is. `normalise` divides u by its root mean square before the memory,
        and multiplies what comes out by it. `output` is σ. `weight_decay` is decoupled, lr · weight_decay · W."""
        check_numbers(lr=lr, memory_lr=memory_lr, weight_decay=weight_decay)
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum: must be from 0 to 1, got {momentum}")
        if hidden_size < 1:
            raise ValueError(f"hidden_size: must be at least 1, got {hidden_size}")
        self.seed = seed
        defaults = {
            "lr": lr, "memory_lr": memory_lr, "momentum": momentum, "memory": memory, "hidden_size": hidden_size,
            "objective": objective, "normalise": normalise, "output": output, "weight_decay": weight_decay,
        }  # fmt: skip
        super().__init__(list(NamedWeights.given(params)), defaults)

    @classmethod
    def for_module(cls, module: nn.Module, **options: Any) -> DeepMomentum:
        """The optimizer of a module's trainable parameters."""
        return cls(NamedWeights.of(module), **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step for every parameter with a gradient."""
        loss = evaluated(closure)
        place = 0
        for group in self.param_groups:
            for p in group["params"]:
                place += 1
                if p.grad is not None and not self.state[p]:
                    self.state[p].update(_new_memory(p, group, self.seed + place))
            if weights := with_gradient(group):
                self._update(weights, group)
        return loss

    def _update(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        steps = [self._answer(p, group) for p in weights]
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, steps, alpha=group["lr"])

    def _answer(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """σ(m(u)) of the memory that has learned u."""
        assert p.grad is not None
        memory, scale = self.state[p], None
        u_RI = _rows(p.grad)
        if group["normalise"]:
            # A gradient of zeros is divided by 1e-12, and stays one.
            scale = u_RI.square().mean().sqrt().clamp(min=1e-12)
            u_RI = u_RI / scale
        _learn(memory, u_RI, group)
        answer_RI = _features(memory, u_RI) @ memory["A"].mT
        if group["output"] == "newton_schulz":
            answer_RI = newton_schulz(answer_RI)
        elif scale is not None:
            answer_RI = answer_RI * scale
        return answer_RI.reshape(p.shape)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(1, -1)


def _new_memory(p: Tensor, group: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """A (I, H) of zeros and B (H, I), with which outputs of tanh are neither tiny nor saturated; linear: A (I, I)."""
    inputs = _rows(p).shape[1]
    if group["memory"] == "linear":
        return {"A": p.new_zeros(inputs, inputs)}
    source = torch.Generator().manual_seed(seed)
    drawn = torch.randn(group["hidden_size"], inputs, generator=source) / inputs**0.5
    first = drawn.to(p.device, p.dtype)
    return {"A": p.new_zeros(inputs, group["hidden_size"]), "B": first, "B_initial": first.clone()}


def _features(memory: dict[str, Tensor], u_RI: Tensor) -> Tensor:
    return torch.tanh(u_RI @ memory["B"].mT) if "B" in memory else u_RI


def _learn(memory: dict[str, Tensor], u_RI: Tensor, group: dict[str, Any]) -> None:
    """One gradient step of the memory's own objective, from the memory drawn back to its beginning."""
    features_RH = _features(memory, u_RI)
    if group["objective"] == "literal":
        error_RI = torch.ones_like(u_RI)
    else:
        error_RI = (features_RH @ memory["A"].mT + u_RI) / len(u_RI)
    back_RH = error_RI @ memory["A"]
    rate, kept = group["memory_lr"], group["momentum"]
    memory["A"].mul_(kept).sub_(error_RI.mT @ features_RH, alpha=rate)
    if "B" in memory:
        gradient_HI = ((1 - features_RH.square()) * back_RH).mT @ u_RI
        # α B alone would end at a B of zeros, with which nothing is learned ever after.
        memory["B"].lerp_(memory["B_initial"], 1 - kept).sub_(gradient_HI, alpha=rate)
