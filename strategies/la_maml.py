"""Look-ahead meta-learning: steps that serve remembered rows too, at rates that are learned weight by weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from clplat.architectures.base import Output
from clplat.strategies.base import Context
from clplat.strategies.buffers import Policy
from clplat.strategies.replay import ExperienceReplay
from clplat.streams.batch import Batch

Weights = dict[str, Tensor]


class LaMAML(ExperienceReplay):
    """La-MAML: a step lowers the loss that current and remembered rows will have after steps on the current ones.

    Fast weights start from θ and go through the current rows part by part, θ_k+1 = θ_k − α ⊙ ∇L(θ_k; part); the meta
    loss is the mean over k of the loss of the whole mixed batch at θ_k+1. Then α ← α − η ∇_α and
    θ ← θ − max(0, α) ⊙ ∇_θ. This owns the step: the configured optimizer, its rate and `clip_norm` have no effect.
    """

    paper = "Gupta et al. 2020, arXiv:2007.13904"
    fidelity = "mechanism"

    def __init__(
        self,
        *,
        capacity: int | None = None,
        capacity_bytes: int | None = None,
        policy: Policy = "reservoir",
        ratio: float = 1.0,
        weight: float = 1.0,
        from_task: int = 1,
        inner_steps: int = 5,
        initial_rate: float = 0.1,
        rate_of_rates: float = 0.1,
        second_order: bool = False,
        clip: float = 2.0,
    ) -> None:
        """`inner_steps` parts into which the current rows are cut, at most one row each; α begins at `initial_rate`
        everywhere, and `rate_of_rates` is η. `second_order` also follows how ∇L(θ_k) changes with θ and α, at about
        twice the cost. `clip` bounds every entry of an inner gradient, and the norms of both meta-gradients (`.inf`:
        nothing is bounded). The others as in `ExperienceReplay`."""
        super().__init__(
            capacity=capacity, capacity_bytes=capacity_bytes, policy=policy, ratio=ratio, weight=weight,
            from_task=from_task,
        )  # fmt: skip
        if inner_steps < 1:
            raise ValueError(f"inner_steps: must be at least 1, got {inner_steps}")
        if initial_rate <= 0 or rate_of_rates < 0 or clip <= 0:
            raise ValueError("initial_rate, rate_of_rates, clip: must be positive (rate_of_rates: or 0), "
                             f"got {initial_rate}, {rate_of_rates} and {clip}")  # fmt: skip
        self.inner_steps, self.initial_rate, self.rate_of_rates = inner_steps, initial_rate, rate_of_rates
        self.second_order, self.clip = second_order, clip
        self.rates: Weights = {}

    def setup(self, context: Context) -> None:
        if context.world.size > 1:
            raise ValueError("LaMAML: owns the step, which several processes cannot share; set training.devices: 1")
        super().setup(context)

    def step(self, batch: Batch, optimizer: torch.optim.Optimizer) -> tuple[Tensor, Output]:
        weights: Weights = {n: p for n, p in self.context.architecture.named_parameters() if p.requires_grad}
        for name, weight in weights.items():
            if name not in self.rates or self.rates[name].shape != weight.shape:  # new, or grown
                self.rates[name] = torch.full_like(weight, self.initial_rate, requires_grad=True)
        rates = {name: self.rates[name] for name in weights}
        # The fused forms of attention cannot be differentiated twice; the plain form can.
        with sdpa_kernel(SDPBackend.MATH) if self.second_order else nullcontext():
            loss, output = self.meta_loss(weights, rates, batch)
            found = torch.autograd.grad(loss, [*weights.values(), *rates.values()], materialize_grads=True)
        with torch.no_grad():
            for rate, part in zip(rates.values(), clipped(found[len(weights) :], self.clip), strict=True):
                rate.sub_(self.rate_of_rates * part)
            for name, part in zip(weights, clipped(found[: len(weights)], self.clip), strict=True):
                weights[name].sub_(rates[name].clamp(min=0) * part)
        return loss.detach(), replace(output, logits=output.logits.detach())

    def meta_loss(self, weights: Weights, rates: Weights, batch: Batch) -> tuple[Tensor, Output]:
        """The mean loss of `batch` along the inner steps from `weights` at `rates`, and its last output."""
        current = batch.rows(slice(0, len(self.fresh[-1]))).replaced(origin=None, weight=None)
        fast, total = weights, torch.zeros((), device=batch.inputs.device)
        parts = torch.arange(len(current)).split(math.ceil(len(current) / self.inner_steps))
        for part in parts:
            loss, _ = self.loss_at(fast, current.rows(slice(int(part[0]), int(part[-1]) + 1)))
            pulls = torch.autograd.grad(
                loss, list(fast.values()), create_graph=self.second_order, materialize_grads=True
            )
            fast = {
                name: weight - rates[name] * pull.clamp(-self.clip, self.clip)
                for (name, weight), pull in zip(fast.items(), pulls, strict=True)
            }
            loss, output = self.loss_at(fast, batch)
            total = total + loss
        return total / len(parts), output

    def loss_at(self, weights: Weights, batch: Batch) -> tuple[Tensor, Output]:
        """The run's default loss and the architecture's own, and the output, with `weights` in place."""
        output: Output = functional_call(self.context.architecture, weights, (batch,))
        return self.context.loss(output, batch) + sum(output.losses.values()), output

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"rates": {name: rate.detach() for name, rate in self.rates.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        device = self.context.device()
        self.rates = {name: rate.to(device, copy=True).requires_grad_() for name, rate in state["rates"].items()}


def clipped(parts: Sequence[Tensor], norm: float) -> list[Tensor]:
    """A gradient that is given tensor by tensor, shortened to at most `norm`; never asked on the CPU."""
    length = torch.stack([part.float().norm() for part in parts]).norm()
    share = (norm / (length + 1e-6)).clamp(max=1)
    return [part * share for part in parts]
