"""Two TD critics of the loss to come, whose disagreement says what is worth remembering.

    δ_t = r_t + γ V(h_{t+1}) − V(h_t)     r: a token's loss, h: its detached hidden vector; no V at a document's end

V_fast follows this error by Adam; V_slow is its moving average and begins elsewhere, since with equal critics the
difference of their errors, γ ΔV(h_{t+1}) − ΔV(h_t), would be 0. They learn outside the optimizer of the model, once a
step, so their weights are parameters without gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class Critic(nn.Sequential):
    """V: hidden vectors (…, C) to values (…, 1). Inner size 2C, by which all published parameter counts are met."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(nn.Linear(hidden_size, 2 * hidden_size), nn.GELU(), nn.Linear(2 * hidden_size, 1))
        self.requires_grad_(False)


class Critics(nn.Module):
    """The fast critic with its Adam moments, and the slow one where `slow` asks for it."""

    def __init__(self, *, hidden_size: int, slow: bool, discount: float, rate: float, slow_rate: float) -> None:
        super().__init__()
        self.discount, self.rate, self.slow_rate = discount, rate, slow_rate
        self.fast = Critic(hidden_size)
        self.slow = Critic(hidden_size) if slow else None
        self.size = sum(p.numel() for p in self.fast.parameters())
        self.register_buffer("moments", torch.zeros(2, self.size))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.moments: Tensor
        self.steps: Tensor

    def errors(
        self, hidden_BTC: Tensor, loss_BT: Tensor, follows_BT: Tensor, counted_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """w (B, T): |δ_fast − δ_slow|, or |δ_fast| without a slow critic; and the gradient of the fast one's squared
        errors, summed over the counted tokens (size,)."""
        weights = {name: p.detach().requires_grad_() for name, p in self.fast.named_parameters()}
        with torch.enable_grad():
            value_BT = functional_call(self.fast, weights, (hidden_BTC,)).squeeze(-1)
            fast_BT = self._error(value_BT, loss_BT, follows_BT)
            objective = torch.where(counted_BT, fast_BT.square(), 0.0).sum()
            gradients = torch.autograd.grad(objective, list(weights.values()))
        fast_BT = fast_BT.detach()
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        if self.slow is None:
            return fast_BT.abs(), flat
        slow_BT = self._error(self.slow(hidden_BTC).squeeze(-1), loss_BT, follows_BT)
        return (fast_BT - slow_BT).abs(), flat

    def learn(self, gradient: Tensor, current: Tensor) -> None:
        """One step of Adam for the fast critic; the slow one follows. Where `current` (bool, on the device) is false
        there was nothing to learn from, and all stays as it is: momentum would move the critics by itself."""
        self.steps += current
        first, second = self.moments
        share = current.to(gradient.dtype)
        first.lerp_(gradient, (1 - BETA1) * share)
        second.lerp_(gradient.square(), (1 - BETA2) * share)
        count = self.steps.to(gradient.dtype).clamp(min=1)
        scale = (second / (1 - BETA2**count)).sqrt() + EPSILON
        change = share * self.rate * first / (1 - BETA1**count) / scale
        start = 0
        for weight in self.fast.parameters():
            weight.sub_(change[start : start + weight.numel()].view_as(weight))
            start += weight.numel()
        if self.slow is not None:
            for kept, new in zip(self.slow.parameters(), self.fast.parameters(), strict=True):
                kept.lerp_(new, (1 - self.slow_rate) * share)

    def _error(self, value_BT: Tensor, loss_BT: Tensor, follows_BT: Tensor) -> Tensor:
        """δ (B, T) with a detached target; `follows_BT` says that the next token belongs to the same document."""
        following_BT = F.pad(value_BT.detach()[:, 1:], (0, 1))
        return loss_BT + self.discount * torch.where(follows_BT, following_BT, 0.0) - value_BT
