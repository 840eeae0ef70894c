"""The quadratic that holds weights near where earlier tasks left them: what EWC, MAS, SI and RWalk share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from clplat.architectures.base import Output
from clplat.strategies.base import Context, Fixed
from clplat.strategies.weights import flat_parameters, held_part, is_sharded
from clplat.streams.batch import Batch


class QuadraticPenalty:
    """c Σ_i W_i (θ_i − θ*_i)², with its own gradient and its state; goes before `Strategy` among the bases of a class.

    c is `factor` × `strength`. `importance` W and `anchor` θ* are vectors (P,) over all trainable weights, both None
    until there is something to hold; `kept` names all tensors that are saved.
    """

    fixed: ClassVar[Fixed] = "trained"
    factor: ClassVar[float] = 1.0
    kept: ClassVar[tuple[str, ...]] = ("importance", "anchor")
    context: Context
    strength: float
    importance: Tensor | None = None
    anchor: Tensor | None = None
    constant: float = 0.0

    def penalty(self, output: Output, batch: Batch) -> Tensor | None:
        if self.importance is None or not self.strength:
            return None
        model = self.context.architecture
        held = [held_part(model, vector) for vector in (self.importance, self.anchor) if vector is not None]
        quadratic = _Quadratic.apply(self.weights(), *held)
        if is_sharded(model):
            # The value is that of all weights; the gradient goes to this process's share of them, which no other has.
            quadratic = quadratic + (self.context.world.sum(quadratic.detach().clone()) - quadratic.detach())
        return self.factor * self.strength * (quadratic + self.constant)

    def pull(self, weights: Tensor) -> Tensor | float:
        """The gradient of the penalty at `weights`, (P,), or 0."""
        if self.importance is None or self.anchor is None or not self.strength:
            return 0.0
        return 2 * self.factor * self.strength * self.importance * (weights - self.anchor)

    def weights(self) -> Tensor:
        """All trainable weights (P,); refuses an architecture that grew."""
        model = self.context.architecture
        number = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if self.anchor is not None and number != len(self.anchor):
            raise ValueError(f"{type(self).__name__}: the architecture went from {len(self.anchor)} trainable weights "
                             f"to {number} between tasks; use one that does not grow")  # fmt: skip
        return flat_parameters(model)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.kept} | {"constant": self.constant}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        device = self.context.device()
        for name in self.kept:
            # Copies: some of them are added to in place while the run goes on.
            setattr(self, name, None if state[name] is None else state[name].to(device, copy=True))
        self.constant = state["constant"]


class _Quadratic(torch.autograd.Function):
    """Σ_i W_i (θ_i − θ*_i)² with its gradient kept from the forward pass: half the passes over the weights."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, importance: Tensor, anchor: Tensor) -> Tensor:
        moved = weights - anchor
        pull = importance * moved
        ctx.save_for_backward(pull)
        return torch.dot(pull, moved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return 2 * grad * ctx.saved_tensors[0], None, None
